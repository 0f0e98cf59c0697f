"""What a run can be told: the options, the fields behind --set, the presets; and what its folder is called.

Every value of a preset is tagged: p = the paper, c = its official code, o = ours. Sources: mDPO, arXiv
2406.11839, and luka-group/mDPO; PDS-DPO, arXiv 2412.17417, and its repository.
"""
import argparse
import dataclasses
import hashlib
import math
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import data
import losses


def option(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


DAMAGED = ", ".join(data.REJECTED)


@dataclass(frozen=True)
class Options:
    """The options, then the fields behind --set. The defaults are the preset `classroom`, all ours."""
    preset: str = option("classroom", "a set of defaults: classroom, mdpo-bunny, mdpo-llava, pds-llava")
    model: str = option("classroom", "a llava-hf folder, or classroom")
    data: str = option("classroom", "preference pairs in any format of records.py; classroom makes its own")
    val_data: str = option("", "held-out pairs, for your own data: loss, margin and look, before and after")
    image_root: str = option("", "where image paths start (default: the folder of --data)")
    out: str = option("", "the run's folder (default: runs/PRESET-LOSS-sSEED-HASH)")
    loss: str = option("mdpo", "a name in losses.LOSSES, or a sum such as dpo+copo")
    beta: float = option(0.1, "how strongly the policy is held to the reference")
    delta: float = option(0.0, "the reward that AncPO holds the chosen above")
    anchors: str = option("w", "what AncPO anchors: w (chosen), wl (+ rejected), wlm (+ rejected image)")
    image_rejected: str = option("crop", f"the rejected image: {DAMAGED}; or none at all")
    forward: str = option("packed", "packed (fast) or naive (to be read): the same numbers")
    epochs: int = option(3, "passes over the pairs")
    max_steps: int = option(0, "stop after so many steps (0: all)")
    batch: int = option(16, "pairs per optimiser step, over all ranks")
    micro_batch: int = option(8, "pairs per forward")
    lr: float = option(2e-4, "peak learning rate")
    lora_r: int = option(64, "LoRA rank; 0, or --no-lora: no adapter, all but the vision tower trains")
    seed: int = option(0, "pairs, LoRA, order and draws")
    eval_seed: int = option(0, "the scenes of the printed table")
    eval_every: int = option(0, "evaluate every N steps too (0: before and after only)")
    skip_bad: bool = option(False, "drop faulty records, with counts, in place of stopping")
    shard: bool = option(False, "deal the frozen base to torchrun's ranks (FSDP2), where one cannot hold it")
    dtype: str = option("auto", "of the base: float32, bfloat16, float64; auto is bfloat16 on a GPU")
    # behind --set
    lora_alpha: int = 128
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    clip: float = 1.0                 # of the gradient's norm; 0: none
    warmup: float = 0.1               # share of all steps
    max_length: int = 2048            # tokens of prompt and response; only responses are ever shortened
    template: str = ""                # "": the model folder's own
    images: str = ""                  # "": prepared as the model folder says; pad: to a square first
    redraw: bool = False              # a fresh rejected image every epoch
    crop_pixels: bool = False         # crop the prepared pixels, padding and all, not the picture
    official: bool = False            # a paper's preset with the departures of its official code, OFFICIAL
    checkpointing: bool = False       # recompute activations in the backward
    check_memory: bool = True         # refuse what plan.py says cannot fit
    workers: int = 4                  # threads that read the next step's pairs
    save_every: int = 50              # steps between checkpoints
    pairs: int = 1000                 # of the classroom
    pair_options: str = ""            # more options of classroom/pairs.py
    scenes: int = 1000                # of the classroom, in the printed table
    questions: int = 2000
    split: str = "print"              # scenes to report on; tune: to choose settings on
    look: int = 200                   # held-out pairs that diagnose.py looks at, no more than pairs; 0: none
    max_new_tokens: int = 64
    eval_data: str = ""               # a small file of POPE's, or of questions about COCO images, asked too
    eval_images: str = ""             # the folder of its images ("": beside it)
    eval_annotations: str = ""        # for questions about COCO images: COCO's annotations, for CHAIR
    eval_synonyms: str = ""           # and CHAIR's synonyms file
    device: str = ""                  # "": cuda, else mps, else cpu


_MDPO = dict(
    loss="mdpo", image_rejected="crop", beta=0.1, delta=0.0, epochs=3, batch=32, lr=1e-5, warmup=0.1,      # p
    lora_r=64, lora_alpha=128,                                                                             # p
    weight_decay=0.05, adam_beta2=0.98, clip=1.0, max_length=2048, template="vicuna", micro_batch=4,       # c
)
PRESETS = {
    "classroom": {},                                                                                       # o
    "mdpo-bunny": _MDPO,
    "mdpo-llava": _MDPO,
    "pds-llava": dict(
        loss="dpo", epochs=2, batch=8, lr=1e-5, micro_batch=1,                                             # p
        warmup=0.03, beta=0.1, lora_r=128, lora_alpha=256, weight_decay=0.0, adam_beta2=0.999, clip=1.0,   # c
        max_length=5012, template="vicuna", images="pad",                                                  # c
    ),
}
# Where the official codes depart from the papers or from our defaults: {field: (value, what it is)}. mDPO's
# draws the crop anew in every forward, so that policy and reference differ; ours are the same in an epoch.
_MDPO_CODE = {
    "weight_decay": (0.05, "AdamW's weight decay, which the paper does not give"),
    "adam_beta2": (0.98, "AdamW's second beta, which the paper does not give"),
    "crop_pixels": (True, "the rejected image is a crop of the padded and normalised pixels"),
    "redraw": (True, "a fresh crop every epoch")}
OFFICIAL = {"mdpo-bunny": _MDPO_CODE, "mdpo-llava": _MDPO_CODE,
            "pds-llava": {"weight_decay": (0.0, "AdamW's weight decay, which the paper does not give"),
                          "adam_beta2": (0.999, "AdamW's second beta, which the paper does not give"),
                          "batch": (2, "two GPUs of one pair, without the paper's accumulation over four")}}


def parse(argv, description):
    """Options from the command line. Raises UserError for an unknown field, a wrong type or value."""
    parser = data.Parser(prog="train_dpo.py", description=description,
                         formatter_class=argparse.RawTextHelpFormatter)
    behind = {f.name: f for f in dataclasses.fields(Options) if not f.metadata}
    for f in dataclasses.fields(Options):
        kind = {"type": f.type, "metavar": f.type.__name__}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        if f.metadata:
            parser.add_argument(f"--{f.name}", help=f"{f.metadata['help']} [{f.default!r}]", **kind)
    parser.add_argument("--no-lora", dest="lora_r", action="store_const", const=0, help="--lora_r 0")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="behind",
                        help="one of\n" + "\n".join(f"  {f.name}={f.default}" for f in behind.values()))
    given = vars(parser.parse_args(argv))
    chosen = {}
    for item in given.pop("behind"):
        key, _, text = item.partition("=")
        if key not in behind or "=" not in item:
            raise data.UserError(f"--set {item}: give KEY=VALUE with KEY one of {', '.join(behind)}")
        try:
            kind = behind[key].type
            chosen[key] = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError):
            raise data.UserError(f"--set {item}: {text!r} is not of type {kind.__name__}") from None
    chosen |= {k: v for k, v in given.items() if v is not None}
    preset = chosen.get("preset", "classroom")
    if preset not in PRESETS:
        raise data.UserError(f"--preset {preset}: give one of {', '.join(PRESETS)}")
    for name in ("model", "data"):
        if preset != "classroom" and name not in chosen:
            raise data.UserError(f"--preset {preset} needs --{name}: the papers' own are not built in")
    official = {k: value for k, (value, _) in OFFICIAL.get(preset, {}).items() if chosen.get("official")}
    o = Options(**{**PRESETS[preset], **official, **chosen})
    check(o)
    return o


def check(o):
    """Raise UserError where a value is none of its choices, is out of range, or does not fit another."""
    try:
        needs = losses.needs(losses.resolve(o.loss, anchors=o.anchors))
    except ValueError as e:
        raise data.UserError(f"--loss {o.loss} --anchors {o.anchors}: {e}") from None
    choices = {"image_rejected": (*data.REJECTED, "none"), "forward": ("packed", "naive"),
               "dtype": ("auto", "float32", "bfloat16", "float64"),
               "device": ("", "cuda", "mps", "cpu"), "split": ("print", "tune"), "images": ("", "pad")}
    for name, values in choices.items():
        if getattr(o, name) not in values:
            known = ", ".join(v for v in values if v)
            raise data.UserError(f"{name} is {getattr(o, name)!r}: give one of {known}")
    if o.image_rejected == "none" and "image_rejected" in needs:
        raise data.UserError(f"--image_rejected none leaves --loss {o.loss} without the image it compares: "
                             "use --loss dpo")
    for name in ("epochs", "batch", "micro_batch", "lora_alpha", "workers", "save_every", "max_length",
                 "pairs", "scenes", "questions", "max_new_tokens", "beta", "lr"):
        if not 0 < getattr(o, name) < math.inf:
            raise data.UserError(f"{name} is {getattr(o, name)}: it must be a number above 0")
    for name in ("lora_r", "max_steps", "eval_every", "look", "warmup", "clip", "weight_decay"):
        if not 0 <= getattr(o, name) < math.inf:
            raise data.UserError(f"{name} is {getattr(o, name)}: it must not be below 0")
    if o.official and o.preset not in OFFICIAL:
        raise data.UserError(f"--set official=true: --preset {o.preset} follows no official code; give one "
                             f"of {', '.join(OFFICIAL)}")
    if o.crop_pixels and o.image_rejected not in data.AREAS:
        raise data.UserError(f"--set crop_pixels=true needs --image_rejected {', '.join(data.AREAS)}, not "
                             f"{o.image_rejected}")
    if o.batch % o.micro_batch:
        raise data.UserError(f"--batch {o.batch} is no multiple of --micro_batch {o.micro_batch}: change one")


def departures(o):
    """With official=true: what was taken from the official code, for the log."""
    return [f"{k} {value}: {what}" for k, (value, what) in OFFICIAL.get(o.preset, {}).items()
            if o.official and getattr(o, k) == value]


# ---------------------------------------------------------------------------------------- the run's folder
def run_folder(o):
    """The run's folder. Its default name holds a hash of the options and of losses.py: an edit, a new run."""
    if o.out:
        return Path(o.out)
    text = repr(sorted(dataclasses.asdict(o).items())) + Path(losses.__file__).read_text()
    return Path("runs") / f"{o.preset}-{o.loss}-s{o.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def claim(out, o):
    """Lock the folder; returns the lock. Raises UserError where another run uses it, or has other options."""
    import fcntl
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)           # let go by the system however the run ends
    except BlockingIOError:
        raise data.UserError(f"--out {out} is in use by another run: wait for it or give another") from None
    except OSError as e:
        raise data.UserError(f"--out {out} cannot be written ({e.strerror}): give another folder") from None
    log = out / "log.jsonl"
    first = next(data.read_jsonl(log, torn_ok=True), None) if log.exists() else None
    if first:
        there = first.get("options", {})
        differ = [f"{k} {there.get(k)!r} there, {v!r} here" for k, v in dataclasses.asdict(o).items()
                  if k != "out" and there.get(k) != v]
        if first.get("losses_source") != Path(losses.__file__).read_text():
            differ.append("losses.py was edited since")
        if differ:
            raise data.UserError(f"--out {out} holds a run of other options ({'; '.join(differ)}): "
                                 "give another folder")
    return lock


def provenance():
    """What a run depends on besides its options, for the first line of its log."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"],
                                capture_output=True, text=True).stdout
    except OSError:
        commit = ""
    packages = ("torch", "transformers", "safetensors", "numpy", "pillow")
    return {"versions": {"python": sys.version.split()[0], **{p: version(p) for p in packages}},
            "commit": commit.strip() or "unknown", "losses_source": Path(losses.__file__).read_text()}
