"""A training step beside TRL's DPOTrainer: the same model, pairs, LoRA, loss; time, memory, gradients.

    python bench/vs_trl.py --out bench.json      ten minutes
    python bench/vs_trl.py --threads 0           all cores
    python bench/vs_trl.py --shape 7b --device cuda --dtype bfloat16

Without options it measures one pinned core in float32; the last command has LLaVA-1.5-7B's shape on a GPU.
Needs trl and peft (requirements-dev.txt). First both sides must give the same loss and the same gradient of
every LoRA weight; only then are they timed, in rounds where each side takes one optimiser step of two
pairs. A ratio is taken within a round, so that a machine which slows down slows both.

trl: DPOTrainer.training_step, clipping, AdamW. Its own collator makes the batch. Gradient checkpointing is
off, as on our side. On a CPU it would put every position through lm_head, on a GPU only responses':
trl.trainer.utils._use_triton decides, and is made to say yes, so that its GPU's arithmetic is what is
compared.

trl_defaults: checkpointing on (its default), every position scored where there is no Triton.

concatenated (DPO): ours without the shared prompt, each response behind its own, nothing padded.

ours, ours_cached: the product's step, in its first epoch, and in the later ones, whose reference is kept.

mDPO is not in TRL. It is compared with DPOTrainer extended as the official mDPO trainer extends it: a
second forward of the chosen responses with the rejected image, by policy and by reference.

Not in a step on either side: decoding, resizing and tokenising (both can do it ahead, in workers), the
learning rate's schedule, logging to files.
"""
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

from limit import (
    BETA,
    Ours,
    as_train_dpo,
    batch_of,
    fastest,
    middle,
    minimum,
    pin,
    products,
    random_records,
    resident,
    rounds,
    write_model,
)
from section import ROOT, SHAPES, arguments, command, heading, machine, report

os.environ.setdefault("HF_HUB_OFFLINE", "1")       # nothing here may reach for a hub
import torch  # noqa: E402
from torch.nn.functional import logsigmoid  # noqa: E402

import data  # noqa: E402
import lora  # noqa: E402
import losses  # noqa: E402
from model import vlm  # noqa: E402

SHARED = Path(os.environ.get("NANOVPO_SHARED", ROOT.parent / "shared"))


# ----------------------------------------------------------------------------------------------- TRL's side
@contextlib.contextmanager
def responses_only(wanted):
    """TRL's fused head scores only responses' positions inside, as it does where there is Triton."""
    import trl.trainer.utils as utils
    before = utils._use_triton
    utils._use_triton = (lambda device: True) if wanted else before
    try:
        yield
    finally:
        utils._use_triton = before


def mdpo_trainer():
    """DPOTrainer with mDPO's two further terms, after the official code's way: one more forward each."""
    from trl import DPOTrainer
    from trl.trainer.utils import use_adapter

    class MDPOTrainer(DPOTrainer):
        def _compute_loss(self, model, inputs, return_outputs):
            inputs, scored = dict(inputs), []
            pixels = inputs.pop("pixel_values_rejected")
            hook = model.register_forward_hook(lambda *call: scored.append(call[-1].log_probs.sum(1)))
            loss = super()._compute_loss(model, inputs, return_outputs)
            hook.remove()
            chosen, reference = (rows.chunk(2)[0] for rows in scored)
            n = len(chosen)
            end = int(inputs["attention_mask"][:n].sum(1).max())     # no padding up to the rejected's length
            ids, mask, response = (inputs[key][:n, :end] for key in
                                   ("input_ids", "attention_mask", "completion_mask"))
            again = dict(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False,
                         labels=ids.masked_fill(response == 0, -100), fused_lm_head=True)
            policy_image = model(**again).log_probs.sum(1)
            with torch.no_grad(), use_adapter(self.accelerator.unwrap_model(model), None):
                reference_image = model(**again).log_probs.sum(1)
            copo = -logsigmoid(self.beta * ((chosen - policy_image) - (reference - reference_image)))
            return loss + (copo - logsigmoid(self.beta * (chosen - reference))).mean()
    return MDPOTrainer


class TRL:
    """DPOTrainer on `ours`' weights and adapter (no second copy of the weights), step by step."""

    def __init__(self, folder, shape, o, loss, ours=None, defaults=False, out=None):
        import datasets
        import transformers
        from peft import LoraConfig
        from trl import DPOConfig, DPOTrainer
        self.responses_only = not defaults
        processor = transformers.AutoProcessor.from_pretrained(folder, use_fast=False)
        kind = transformers.LlavaForConditionalGeneration
        model = kind.from_pretrained(folder, dtype=getattr(torch, o.dtype)).to(o.device)
        for name, p in model.named_parameters() if ours else ():
            p.data = ours.m.model.get_parameter(name).data
        config = DPOConfig(
            output_dir=out or str(Path(folder) / "trl"), per_device_train_batch_size=2, beta=BETA,
            max_length=None, learning_rate=1e-6, gradient_checkpointing=defaults, bf16=o.dtype == "bfloat16",
            report_to="none", use_cpu=o.device == "cpu", disable_tqdm=True, dataloader_pin_memory=False)
        adapter = LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, lora_dropout=0.0,
                             target_modules=r".*language_model.*_proj")
        row = {"prompt": "<s> <image>", "chosen": "</s>", "rejected": "</s>", "images": [None]}
        self.trainer = (mdpo_trainer() if loss == "mdpo" else DPOTrainer)(
            model=model, args=config, peft_config=adapter, processing_class=processor,
            train_dataset=datasets.Dataset.from_list([row]))
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        if defaults:                                            # what train() does before its first step
            self.trainer.model.activation_checkpointing_enable()

    def take(self, ours):
        """Our adapter as it is now."""
        for name, p in lora.lora_parameters(ours.m.model).items():
            self.weight(name).data.copy_(p.data.T)

    def weight(self, name):
        """The LoRA weight that ours calls `name`; A and B are transposed in PEFT."""
        return self.trainer.model.get_parameter(f"base_model.model.{name}.default.weight")

    def collate(self, records, loss):
        """The batch that TRL's own collator makes, and mDPO's rejected images beside it."""
        texts = ("prompt", "chosen", "rejected")
        rows = [{"images": [r["image"]], **{k: r[k] for k in texts}} for r in records]
        batch = dict(self.trainer.data_collator(rows))
        if loss == "mdpo":
            images = [r["image_rejected"] for r in records]
            batch["pixel_values_rejected"] = self.trainer.processing_class.image_processor(
                images, return_tensors="pt")["pixel_values"]
        kind = self.trainer.model.dtype
        return {k: v.to(kind) if v.is_floating_point() else v for k, v in batch.items()}

    def loss(self, batch):
        with responses_only(self.responses_only):
            return self.trainer.training_step(self.trainer.model_wrapped, dict(batch)).item()

    def step(self, batch):
        value = self.loss(batch)
        parameters = self.trainer.model.parameters()
        self.trainer.accelerator.clip_grad_norm_(parameters, self.trainer.args.max_grad_norm)
        self.trainer.optimizer.step()
        self.trainer.model.zero_grad()
        return value


# ------------------------------------------------------------------------------------------------- our sides
def concatenated(m, pairs, features, needs):
    """vlm.packed without sharing: every response follows a prompt of its own, and nothing is padded."""
    rows, shown = list(pairs), [*features.images]
    if "rejected" in needs:
        rows += [p._replace(chosen=p.rejected) for p in pairs]
        shown += features.images
    if "image_rejected" in needs:
        rows += [p._replace(prompt=p.prompt_rejected) for p in pairs]
        shown += features.rejected
    row = data.pack(rows, {"chosen"})
    sums = [part.sum() for part in vlm.packed_token_logps(m, row, shown).split(row.lengths)]
    parts = iter(torch.stack(sums).split(len(pairs)))
    return losses.Logps(chosen=next(parts), rejected=next(parts) if "rejected" in needs else None,
                        image_rejected=next(parts) if "image_rejected" in needs else None)


def equality(ours, theirs, batch, collated, loss):
    """(relative difference of the loss, of the flat LoRA gradient), or SystemExit if one is too large."""
    theirs.take(ours)
    value, other = ours.loss(batch, loss, cached=False), theirs.loss(collated)
    square = error = 0.0
    for name, p in lora.lora_parameters(ours.m.model).items():
        their = theirs.weight(name).grad.T.double()
        error, square = error + (p.grad.double() - their).square().sum(), square + their.square().sum()
    ours.optimiser.grad.zero_()
    theirs.trainer.model.zero_grad()
    differences = abs(value - other) / abs(other), float(error / square) ** 0.5
    # Sums near -1000 round to 1e-4 in float32, in which TRL's fused head computes whatever the model's type.
    allowed = {torch.bfloat16: (0.1, 0.5)}.get(ours.m.model.dtype, (1e-4, 1e-3))
    if not (differences[0] < allowed[0] and differences[1] < allowed[1]):     # nan too
        sys.exit(f"bench/vs_trl.py: {loss}: the two sides do not compute the same (loss {value} and {other}, "
                 f"gradients {differences[1]:.1e} apart): nothing was timed")
    return differences


# ------------------------------------------------------------------------------------------------- the pairs
def real_records(shape, shared=None):
    """(records of the published PDS-DPO sample, "") in file order, without empty responses; or ([], why not).

    Pictures are its own. Texts are counted in Llama's tokens and mapped onto the model's few words: the
    lengths are real, what a random model thinks of the words does not matter.
    """
    sample = (shared or SHARED) / "real" / "pds10"
    words = (shared or SHARED) / "official" / "llama_tokenizer"
    for path in (sample / "step3_sanity.json", words / "tokenizer.model"):
        if not path.exists():
            return [], f"{path.relative_to(shared or SHARED)} is absent: set NANOVPO_SHARED"
    from transformers import LlamaTokenizer
    tokenizer = LlamaTokenizer.from_pretrained(words, legacy=True)

    def mapped(text):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return " ".join(f"w{5 + i % (shape.vocabulary - 5)}" for i in ids)
    records = []
    for row in json.loads((sample / "step3_sanity.json").read_text()):
        question = row["conversations"][0]["value"].replace("<image>", "").strip()
        chosen, rejected = (row[key][1]["value"] for key in ("conversations", "rejected_conversations"))
        if chosen.strip() and rejected.strip():
            image = data.read_image(sample / row["image"])
            other = data.rejected_image("crop", image, 0, row["id"])
            records.append({"prompt": f"<s> {mapped('USER:')} <image> {mapped(question + ' ASSISTANT:')}",
                            "chosen": f"{mapped(chosen)} </s>", "rejected": f"{mapped(rejected)} </s>",
                            "image": image, "image_rejected": other})
    return records, ""


# ----------------------------------------------------------------------------------------------- measurements
def measure(ours, theirs, batches, loss, o, n):
    """{side: seconds of every round of every batch}, batches one after the other, and both differences."""
    taken, differences = {}, None
    for batch, records in batches:
        collated = theirs["trl"].collate(records, loss)
        # The first batch's is the warming up, too: it is a step of both sides.
        differences = differences or equality(ours, theirs["trl"], batch, collated, loss)
        sides = {name: partial(side.step, collated) for name, side in theirs.items()}
        if loss == "dpo":
            sides["concatenated"] = partial(ours.step, batch, loss, False, concatenated)
        sides |= {"ours": partial(ours.step, batch, loss, False),
                  "ours_cached": partial(ours.step, batch, loss, True)}
        extra, operations = products(ours.m, batch.pairs, loss, o.dtype, o.device)
        timed = rounds({**extra, **sides}, n, o.device, warm=0)
        for name in sides:
            taken.setdefault(name, []).append(timed[name])
        best, work = fastest(operations, timed), minimum(ours.m, batch.pairs, loss, False)
        taken.setdefault("limit", []).append([sum(work.values()) / operations[best] * t for t in timed[best]])
    return taken, differences


def ratios(taken, base="trl"):
    """{side: (median, least, most) of base's seconds over the side's}: over the rounds of one batch.

    Where there are several batches, of a pass over all of them; least and most are then of the batches.
    """
    found = {}
    for side in taken:
        within = [[b / s for b, s in zip(*both, strict=True)]
                  for both in zip(taken[base], taken[side], strict=True)]
        if len(within) == 1:
            found[side] = middle(within[0])
        else:
            passes = [sum(map(statistics.median, taken[name])) for name in (base, side)]
            each = [statistics.median(r) for r in within]
            found[side] = passes[0] / passes[1], min(each), max(each)
    return found


def memory(side, folder, shape, o):
    """{"before", "peak"}: MiB of this process once the model is loaded, and at most during two steps."""
    loss, kind = side.split("/")
    records = random_records(shape)
    if kind.startswith("trl"):
        theirs = TRL(folder, shape, o, loss, defaults=kind == "trl_defaults", out=tempfile.mkdtemp())
        run = partial(theirs.step, theirs.collate(records, loss))
    else:
        as_train_dpo(o.device)
        ours = Ours(folder, shape, o.dtype, o.device)
        run = partial(ours.step, batch_of(ours.m, records, losses.needs(losses.resolve(loss))), loss, False)
    before = resident("VmRSS", o.device)
    for _ in range(2):
        run()
    return {"before": before, "peak": resident("VmHWM", o.device)}


def memories(folder, o, sides):
    """memory() of each side, each in a new process."""
    found = {}
    for side in sides:
        asked = [sys.executable, str(Path(__file__).resolve()), "--memory", side, "--model", str(folder),
                 "--shape", o.shape, "--threads", str(o.threads), "--dtype", o.dtype, "--device", o.device]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"bench/vs_trl.py: peak memory of {side}: {done.stderr.strip().splitlines()[-1]}")
        found[side] = json.loads(done.stdout.splitlines()[-1])
    return found


# ------------------------------------------------------------------------------------------------- the table
NAMES = {"trl": "TRL, checkpointing off, responses' positions only",
         "trl_defaults": "TRL, its defaults in this type",
         "concatenated": "ours without the shared prompt, nothing padded", "ours": "**ours, first epoch**",
         "ours_cached": "**ours, later epochs (reference cached)**"}


def table(found, o, about, threads):
    lines = heading("A step beside TRL's", about, command())
    lines += [f"Shape {o.shape}, micro-batch 2, {o.dtype}, {threads}, medians of {o.rounds} interleaved "
              "rounds; in brackets the least and the most of the rounds (random pairs) or of the "
              "batches (real pairs, once each). The largest relative difference to TRL's loss is "
              f"{found['loss_difference']:.1e}, to its LoRA gradient {found['gradient_difference']:.1e}."]
    for name, part in found["tables"].items():
        if "skipped" in part:
            lines.append(f"\nReal pairs: skipped, {part['skipped']}.")
            continue
        lengths = SHAPES[o.shape]
        title = f"{part['pairs']} real pairs, their own lengths and pictures, seconds of a mean step"
        if name == "random":
            title = (f"two random pairs of {(lengths.pixels // 14) ** 2} image, {lengths.question} question, "
                     f"{lengths.response} and {lengths.response} response tokens")
        lines += [f"\n| {title} | DPO, seconds | x TRL | mDPO, seconds | x TRL |", "|---|---|---|---|---|"]
        for side, words in NAMES.items():
            cells = []
            for loss in ("dpo", "mdpo"):
                if side in part[loss]["ratios"]:
                    ratio, least, most = part[loss]["ratios"][side]
                    cells += [f"{part[loss]['seconds'][side]:.2f}", f"{ratio:.2f} ({least:.2f}, {most:.2f})"]
                else:
                    cells += ["-", "-"]
            lines.append(f"| {words} | {' | '.join(cells)} |")
    lines += ["\n| peak memory of a process of its own, MiB | with the model, before a step | at most | "
              "the steps alone |", "|---|---|---|---|"]
    for side, got in found["memory"].items():
        loss, name = side.split("/")
        words = f"{'DPO' if loss == 'dpo' else 'mDPO'}: {NAMES[name].replace('*', '')}"
        steps = got["peak"] - got["before"]
        lines.append(f"| {words} | {got['before']:,.0f} | {got['peak']:,.0f} | {steps:,.0f} |")
    if found["memory"]:
        lines.append(f"\nMemory, ours over TRL's (DPO, first epoch): {found['memory_ratio']:.2f} of the "
                     f"process, {found['memory_ratio_of_steps']:.2f} of the steps alone.")
    least, most = found["limit_spread"]
    lines.append(f"\nThe DPO step reaches {found['limit_fraction']:.0%} ({least:.0%}, {most:.0%}) of this "
                 "machine's matrix products (bench/limit.py says how that is counted). TRL's steps, in the "
                 "same process, have ours' settings of memory, which it does not make itself.")
    return lines


def main():
    parser = arguments(__doc__, 3)
    parser.add_argument("--tables", default="random,real", help="random: the shape's lengths; real: the "
                        "published PDS-DPO sample (%(default)s)")
    parser.add_argument("--no_memory", action="store_true", help="without the processes for peak memory")
    parser.add_argument("--memory", help="print one side's peak memory: LOSS/SIDE, with --model")
    parser.add_argument("--model", help="a folder that write_model wrote")
    o = parser.parse_args()
    if unknown := set(o.tables.split(",")) - {"random", "real"}:
        parser.error(f"--tables {min(unknown)}: give random, real, or both with a comma")
    try:
        import trl  # noqa: F401
    except ImportError:
        sys.exit("bench/vs_trl.py: TRL is not installed: pip install -r bench/requirements.txt")
    warnings.simplefilter("ignore", FutureWarning)                       # of transformers about itself
    threads = pin(o.threads, o.core) if o.device == "cpu" else o.device
    shape = SHAPES[o.shape]
    if o.memory:
        return print(json.dumps(memory(o.memory, o.model, shape, o)))
    about, found = machine(o.device), {"ratios": {}, "spread": {}, "tables": {}}
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, shape, o.dtype, o.device)
        # While this process is small: a child's peak is its own, but the machine's memory is shared.
        sides = ["dpo/trl", "dpo/ours", "mdpo/trl", "mdpo/ours", "dpo/trl_defaults"]
        found["memory"] = {} if o.no_memory else memories(folder, o, sides)
        as_train_dpo(o.device)
        ours, differences = Ours(folder, shape, o.dtype, o.device), []
        theirs = {loss: TRL(folder, shape, o, loss, ours) for loss in ("dpo", "mdpo")}
        defaults = TRL(folder, shape, o, "dpo", ours, defaults=True)
        for name in o.tables.split(","):
            records, why = real_records(shape) if name == "real" else (random_records(shape), "")
            if not records:
                found["tables"][name] = {"skipped": why}
                continue
            found["tables"][name] = part = {"pairs": len(records)}
            for loss in ("dpo", "mdpo"):
                needs = losses.needs(losses.resolve(loss))
                batches = [(batch_of(ours.m, records[at:at + 2], needs, at), records[at:at + 2])
                           for at in range(0, len(records), 2)]
                first = len(batches) == 1
                sides = {"trl": theirs[loss]}
                if loss == "dpo" and first:
                    sides["trl_defaults"] = defaults
                taken, apart = measure(ours, sides, batches, loss, o, o.rounds if first else 1)
                differences.append(apart)
                part[loss] = {"ratios": ratios(taken), "rounds": taken, "seconds": {
                    side: statistics.mean(map(statistics.median, rows)) for side, rows in taken.items()}}
    first = found["tables"][o.tables.split(",")[0]]
    for loss in ("dpo", "mdpo"):
        for key, side in ((loss, "ours"), (f"{loss}_cached", "ours_cached")):
            found["ratios"][key], *found["spread"][key] = first[loss]["ratios"][side]
    found["limit_fraction"], *found["limit_spread"] = ratios(first["dpo"]["rounds"], "limit")["ours"]
    found["loss_difference"], found["gradient_difference"] = map(max, zip(*differences, strict=True))
    ours_peak, trl_peak = (found["memory"].get(f"dpo/{s}", {"peak": 0, "before": 0}) for s in ("ours", "trl"))
    for key, base in (("memory_ratio", 0), ("memory_ratio_of_steps", 1)):
        a, b = (p["peak"] - base * p["before"] for p in (ours_peak, trl_peak))
        found[key] = a / b if b else None
    report(table(found, o, about, threads), {**found, **about, "threads": threads}, o)


if __name__ == "__main__":
    main()
