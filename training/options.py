"""The options of a run, the fields behind --set, the presets, and the name of a run's folder.

Every value of a preset is tagged: p = the paper, c = its official code, o = ours. Sources: mDPO, arXiv
2406.11839, and luka-group/mDPO; PDS-DPO, arXiv 2412.17417, and its repository.
"""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

import math
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path

import data
import losses
from data import UserError
from model import command
from model.command import behind_set, option
from training import objectives
from training.records import Records

DAMAGED = tuple(data.REJECTED)

# of PRESETS
NAMES = "classroom, mdpo-bunny, mdpo-llava, pds-llava, smolvlm-256m, smolvlm-500m, qwen2.5-vl-3b"


@dataclass(frozen=True)
class Options:
    """The command line of train_dpo.py. The defaults are the preset `classroom`, all ours."""
    preset: str = option("classroom", f"a set of defaults: {NAMES}", choices=NAMES.split(", "))
    model: str = option("classroom", "a model's folder, ORG/NAME (families: docs/training.md) or classroom")
    adapter: str = option("", "a LoRA folder to go on from; the reference is the model with it, frozen")
    data: str = option("classroom", "preference pairs, a file, a folder or ORG/NAME; classroom makes its own")
    val_data: str = option("", "held-out pairs, for your own data: loss, margin and look, before and after")
    image_root: str = option("", "where image paths start (default: the folder of --data)")
    follow_links: bool = option(False, "symbolic links in a folder of images may lead out of it")
    out: str = option("", "the run's folder (default: runs/PRESET-LOSS-sSEED-HASH)")
    loss: str = option("mdpo", "a name in losses.py or training/objectives.py, or a sum: dpo+copo, "
                       "0.8*dpo+0.2*bco+sft")
    beta: float = option(0.1, "how strongly the policy is held to the reference", above=0)
    delta: float = option(0.0, "the reward that AncPO holds the chosen above", at_least=-command.MOST)
    anchors: str = option("w", "what AncPO anchors: w (chosen), wl (+ rejected), wlm (+ rejected image)")
    image_rejected: str = option("crop", f"the rejected image: {', '.join(DAMAGED)}; or none at all",
                                 choices=(*DAMAGED, "none"))
    forward: str = option("packed", "packed (fast) or naive (to be read): the same numbers",
                          choices=("packed", "naive"))
    epochs: int = option(3, "passes over the pairs", above=0)
    max_steps: int = option(0, "stop after this many steps; 0: all")
    batch: int = option(16, "pairs per optimiser step, over all ranks", above=0)
    micro_batch: int = option(8, "pairs per forward", above=0)
    lr: float = option(2e-4, "peak learning rate", above=0)
    lora_r: int = option(64, "LoRA rank; 0: no adapter, all but the vision tower trains", off="--no-lora")
    seed: int = option(0, "pairs, LoRA, order and draws")
    eval_seed: int = option(0, "the scenes of the printed table")
    eval_every: int = option(0, "evaluate every N steps too; 0: before and after only")
    skip_bad: bool = option(False, "drop faulty records, with counts, instead of stopping")
    shard: bool = option(False, "split the base over torchrun's ranks (FSDP2), where one cannot hold it")
    dtype: str = option("auto", "of the base: float32, bfloat16, float64, nf4; auto is bfloat16 on a GPU",
                        choices=("auto", "float32", "bfloat16", "float64", "nf4"))
    dry_run: bool = option(False, "only print what the run would need: steps, tokens, GiB per GPU, hours")
    restart: bool = option(False, "start from the beginning; what --out holds is kept as OUT.1, .2, ...")

    lora_alpha: int = behind_set(128, "LoRA's scale is lora_alpha / lora_r", above=0)
    lora_targets: str = behind_set("", "which linear layers get LoRA, with commas: q_proj means the language "
                                   "model's, a name with dots any layer whose full name ends so "
                                   "(multi_modal_projector.linear_1) (default: all of the language model)")
    loss_args: str = behind_set("", "a loss's further arguments, with commas: gamma=0.5,lam=2 (default: the "
                                "papers', in training/objectives.py)")
    weight_decay: float = behind_set(0.0, "AdamW's weight decay")
    adam_beta1: float = behind_set(0.9, "AdamW's first beta", at_most=0.9999999)
    adam_beta2: float = behind_set(0.999, "AdamW's second beta", at_most=0.9999999)
    clip: float = behind_set(1.0, "largest norm of the gradient; 0: any")
    warmup: float = behind_set(0.1, "share of the steps in which the learning rate rises", at_most=1)
    max_length: int = behind_set(2048, "tokens of prompt and response; only responses are ever shortened",
                                 above=0)
    template: str = behind_set("", "chat template: a name (vicuna, plain, mistral, llama3) or Jinja "
                               "(default: the model folder's own)")
    images: str = behind_set("", "pad: pad pictures to a square first (default: as the model folder says)",
                             choices=("", "pad"))
    redraw: bool = behind_set(False, "a fresh rejected image every epoch")
    crop_pixels: bool = behind_set(False, "crop the prepared pixels, padding and all, not the picture")
    official: bool = behind_set(False, "a paper's preset with the departures of its official code")
    checkpointing: bool = behind_set(False, "recompute activations in the backward, which saves memory")
    compile: bool = behind_set(False, "torch.compile the decoder layers: a minute or two at the start, then "
                               "faster on a GPU")
    check_memory: bool = behind_set(True, "refuse what certainly cannot fit into memory")
    workers: int = behind_set(4, "threads that read the next step's pairs", above=0)
    reference_cache: str = behind_set("", "a folder that keeps the reference's log-probs for other runs")
    save_every: int = behind_set(50, "steps between checkpoints", above=0)
    pairs: int = behind_set(1000, "pairs of the classroom", above=0)
    pair_options: str = behind_set("", "more options of classroom/pairs.py")
    scenes: int = behind_set(1000, "scenes of the classroom's printed table", above=0)
    questions: int = behind_set(2000, "questions of the classroom's printed table", above=0)
    split: str = behind_set("print", "the classroom's scenes to report on; tune: to choose settings on",
                            choices=("print", "tune"))
    look: int = behind_set(200, "held-out pairs that test whether the model looks at its image; 0: none")
    max_new_tokens: int = behind_set(64, "tokens of an answer in an evaluation", above=0)
    eval_data: str = behind_set("", "a small POPE file, or questions about COCO images, evaluated too")
    eval_images: str = behind_set("", "the folder of its images (default: its own)")
    eval_annotations: str = behind_set("", "COCO's annotations, for CHAIR on questions about COCO images")
    eval_synonyms: str = behind_set("", "and CHAIR's synonyms file")
    keep: str = behind_set("", "best, or best:NAME (chair_s, loss): end with the best evaluation's weights")
    patience: int = behind_set(0, "stop after this many evaluations without improvement in `keep`; 0: never")
    track: str = behind_set("", "wandb or tensorboard: send the log's numbers there, too",
                             choices=("", "wandb", "tensorboard"))
    device: str = behind_set("", "cuda, mps or cpu (default: the first available)",
                             choices=("", "cuda", "mps", "cpu"))


# What is not named is the default above: of mDPO loss, beta, epochs, warmup, lora_r, lora_alpha (p), clip and
# max_length (c); of PDS-DPO weight_decay and adam_beta2 (c). A test compares all of it with docs/presets.md.
_MDPO = dict(
    image_rejected="crop", delta=0.0, batch=32, lr=1e-5,                                                   # p
    weight_decay=0.05, adam_beta2=0.98, template="vicuna", micro_batch=4,                                  # c
)
_SMALL = _MDPO | {"template": "", "micro_batch": 1}                # for a laptop; all of these are ours: o
PRESETS = {
    "classroom": {},                                                                                       # o
    "smolvlm-256m": _SMALL,
    "smolvlm-500m": _SMALL,
    "qwen2.5-vl-3b": _SMALL,
    "mdpo-bunny": _MDPO,
    "mdpo-llava": _MDPO,
    "pds-llava": dict(
        loss="dpo", epochs=2, batch=8, lr=1e-5, micro_batch=1,                                             # p
        warmup=0.03, beta=0.1, lora_r=128, lora_alpha=256, clip=1.0, max_length=5012,                      # c
        template="vicuna", images="pad",                                                                   # c
    ),
}
# What official=true adds. mDPO's code crops the padded and normalised pixels, anew in every forward (policy
# and reference apart; ours see the same crop). PDS-DPO's runs two GPUs of one pair, without accumulation.
_MDPO_CODE = {"crop_pixels": True, "redraw": True}
OFFICIAL = {"mdpo-bunny": _MDPO_CODE, "mdpo-llava": _MDPO_CODE, "pds-llava": {"batch": 2}}


def parse(argv, description):
    """Options from the command line. Raises UserError for an unknown field, a wrong type or value."""
    chosen, _ = command.parse(Options, argv, "train_dpo.py", description)
    defaults = PRESETS[chosen.get("preset", "classroom")]
    if chosen.get("official"):
        defaults = defaults | OFFICIAL.get(chosen.get("preset"), {})
    o = Options(**defaults | chosen)
    for field in ("model", "data"):
        if {o.preset, o.data} != {"classroom"} and field not in chosen:
            raise UserError(f"--preset {o.preset} on {o.data} needs --{field}: only the classroom's is here")
    for field in ("lora_r", "lora_alpha", "lora_targets"):
        if o.adapter and field in chosen:
            raise UserError(f"--adapter {o.adapter} says what {field} is: leave {field} out")
    check(o)
    return o


def check(o):
    """Raise UserError if two values do not fit together."""
    try:
        needs = needs_of(o)
    except (ValueError, TypeError, ArithmeticError) as e:
        raise UserError(f"--loss {o.loss}: {e}") from None
    if o.image_rejected == "none" and {*data.grouped(needs)} - {"images"}:
        raise UserError(f"--image_rejected none: --loss {o.loss} is without the image it compares; use dpo")
    if o.dtype == "nf4" and (o.shard or not o.lora_r):
        raise UserError("--dtype nf4 needs LoRA, and goes without --shard: choose another type")
    if o.redraw and o.reference_cache:
        raise UserError("--set redraw=true scores other images in each epoch: leave out reference_cache")
    if o.official and o.preset not in OFFICIAL:
        raise UserError(f"--set official=true goes with --preset {', '.join(OFFICIAL)}, not {o.preset}")
    if (o.keep or o.patience) and not (o.keep and o.eval_every):
        raise UserError(f"--set keep={o.keep}, patience={o.patience}: they need --eval_every N and keep=best")
    if o.track:
        with command.explained(f"--set track={o.track} needs a package", f"pip install {o.track}"):
            version(o.track)
    if o.crop_pixels and o.image_rejected not in data.AREAS:
        raise UserError(f"--set crop_pixels=true needs --image_rejected {', '.join(data.AREAS)}")


def loss_of(o):
    """f(policy, reference, beta, delta) -> (B,). Raises ValueError."""
    more = {}
    for item in filter(None, o.loss_args.split(",")):
        name, _, text = item.partition("=")
        more[name] = float(text)
    return objectives.resolve(o.loss, anchors=o.anchors, **more)


def needs_of(o):
    """The fields of losses.Logps that a run computes. Raises ValueError."""
    return losses.needs(loss_of(o)) | {"chosen"}


def announce(o):
    """Say what the loss is at the start, and whether it pulls the right way -> the fields of losses.Logps
    that a run computes of the reference."""
    policy, reference, values = losses.tried(loss_of(o), o.beta, o.delta)
    said = f"--loss {o.loss} begins at {values.mean():.4f} for two made-up pairs"
    gradient = policy.chosen.grad
    if gradient is None or (gradient >= 0).any():
        said += " and does not make their chosen responses likelier: check its signs, if it should"
    print(said, file=sys.stderr)
    return {*reference, "chosen"} if reference else set()


def steps_of(o, n):
    """The optimiser steps of a run on n pairs."""
    steps = o.epochs * math.ceil(n / o.batch)
    return min(steps, o.max_steps or steps)


def departures(o):
    """With official=true: what was taken from the official code, for the log."""
    taken = OFFICIAL[o.preset] if o.official else {}
    return [f"{name} {value}" for name, value in taken.items() if getattr(o, name) == value]


# ---------------------------------------------------------------------------------------- the run's folder
def decisive(o):
    """{name: value} of what a run depends on: all but whether it begins anew."""
    found = asdict(o)
    del found["restart"]
    return found


def run_folder(o):
    """The run's folder. Its default name holds a hash of the options and of losses.py: an edit, a new run."""
    if o.out:
        return Path(o.out)
    text = repr(sorted(decisive(o).items())) + losses_source()
    return Path("runs") / f"{o.preset}-{o.loss}-s{o.seed}-{command.fingerprint(text.encode())[:8]}"


def losses_source():
    return "".join(Path(module.__file__).read_text() for module in (losses, objectives))


def claim(out, o):
    """Lock the folder; returns the lock. Raises UserError if it is in use or holds a run of other options,
    which --restart moves away first."""
    lock = command.claim(out)
    if o.restart:
        here = out.absolute()
        names = (here.with_name(f"{here.name}.{n}") for n in count(1))
        here.rename(next(name for name in names if not name.exists()))
        lock = command.claim(out)
    log = out / "log.jsonl"
    with command.explained(f"{log} is damaged", "give another folder, or --restart"):
        first = next(data.read_jsonl(log, torn_ok=True), None) if log.exists() else None
        if not first:
            return lock
        there = asdict(Options()) | first.get("options", {})           # the log is older than an option
        differ = [f"{name} {there[name]!r} there, {value!r} here" for name, value in decisive(o).items()
                  if name != "out" and there[name] != value]
        if first.get("losses_source") != losses_source():
            differ.append("losses.py was edited since")
        for name in ("data", "val_data"):
            now = data_identity(o, name)
            was = first.get(f"{name}_identity", now)
            if was != now:
                image = "an image of " if was[:16] == now[:16] else ""
                differ.append(f"{image}{getattr(o, name)} has changed since")
    if differ:
        raise UserError(f"--out {out} holds a run of other options ({'; '.join(differ)}): "
                             "give another folder, or --restart")
    return lock


def data_identity(o, name):
    """What tells pairs from others in a file of the same name; "" for the classroom's, which are made."""
    path = getattr(o, name)
    if path in ("", "classroom"):
        return ""
    return Records(path, o.image_root, False, o.follow_links).identity()


def provenance(o):
    """What a run depends on besides its options, for the first line of its log."""
    packages = "torch transformers safetensors numpy pillow".split()
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    failed, commit = subprocess.getstatusoutput(f"git -C '{Path(__file__).parent}' describe --always --dirty")
    return {"versions": versions, "commit": "unknown" if failed else commit, "losses_source": losses_source(),
            "data_identity": data_identity(o, "data"), "val_data_identity": data_identity(o, "val_data")}
