"""How a run is saved, continued and stopped: last/checkpoint.safetensors and the log.

Part of train_dpo.py.
"""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

import contextlib
import hashlib
import json
import math
import os
import signal
import sys
from dataclasses import asdict, dataclass
from statistics import fmean

from safetensors import safe_open
from safetensors.torch import save as to_bytes

import data
from training import options, report

BEST = "last/best.safetensors"                               # the one that keep=best keeps
FILE = "last/checkpoint.safetensors"                         # in the run's folder
PREVIOUS = "last/previous.safetensors"                       # the one before
WINDOW = 40                                                  # steps that `warning` looks at


@dataclass
class State:
    """Where a run is."""
    step: int = 0                                            # steps that are done
    seconds: float = 0.0                                     # of training
    log_bytes: int = 0
    best: int = 0                                            # the step of the best evaluation
    value: float = math.inf                                  # its `measure`; the lower, the better
    measure: str = ""


def kept(path, use):
    """What a JSON file of a run holds; None where it is missing or `use` fails on it: it is to be made again.
    """
    try:
        found = data.read_json(path)
        use(found)
        return found
    except (ValueError, TypeError, LookupError, AttributeError):
        return None


def save(run, file=FILE):
    """A checkpoint in one move: weights, the optimiser's state, the reference's log-probs."""
    run.reference.sync()
    tensors = run.optimiser.state() | run.reference.state()
    if run.ranks.rank == 0:
        run.state.log_bytes = (run.out / "log.jsonl").stat().st_size
        about = {"state": json.dumps(asdict(run.state)), **made_from(run)}
        if file == FILE:
            with contextlib.suppress(OSError):               # there is none, or the file system has no links
                (run.out / PREVIOUS).unlink(missing_ok=True)
                os.link(run.out / FILE, run.out / PREVIOUS)
        write(run.out / file, tensors, about)
        run.reference.keep()


def write(file, tensors, about):
    """A checkpoint: tensors, and texts about them, under a hash over all of it."""
    data.atomic_write(file, to_bytes(tensors, about | {"sha256": digest(tensors, about)}))


def made_from(run):
    """What a checkpoint goes with."""
    return {"base": run.base, "options": json.dumps(options.decisive(run.o) | {"out": ""})}


def digest(tensors, about):
    """A hash over all that a checkpoint holds."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    found.update(to_bytes(tensors))
    return found.hexdigest()


def read(file):
    """(tensors, metadata) of a checkpoint. Raises UserError for one that is not as it was written."""
    try:
        with safe_open(file, "pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}
            about = f.metadata()
        if about.pop("sha256") != digest(tensors, about):
            raise ValueError
    except Exception:                                        # a torn file may break anywhere
        raise data.UserError(f"{file} is damaged, or of another version: put {PREVIOUS} in its place, if it "
                             "exists, or begin anew with --restart") from None
    return tensors, about


def restore(run):
    """Continue from the last checkpoint, if there is one. Raises UserError for one that does not fit."""
    file = run.out / FILE
    if file.exists():
        run.state = load(run, file)
    if run.ranks.rank == 0:
        with open(run.out / "log.jsonl", "ab") as log:
            if log.tell() < run.state.log_bytes:
                print(f"{log.name} has lost lines since {file} was written: its steps are not all in it",
                      file=sys.stderr)
            else:
                log.truncate(run.state.log_bytes)


def load(run, file):
    """Take up a checkpoint; returns its State. Raises UserError."""
    tensors, about = read(file)
    state = State(**json.loads(about.pop("state")))
    if about != made_from(run):
        raise data.UserError(f"{file} is of a run with another base or other options: give another --out, or "
                             "--restart")
    run.reference.load(tensors)
    run.optimiser.load(tensors)
    return state


def opening(run):
    """The first line of the log: what the run depends on."""
    front = run.model.front
    base = run.model.frozen or run.model
    frozen = [p for p in base.model.parameters() if not p.requires_grad]
    held = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]                   # by this rank
    return {"options": options.decisive(run.o), "ranks": run.ranks.world, "device": str(run.ranks.device),
            "dtype": str(run.model.model.dtype).removeprefix("torch."), "base": run.base,
            "base_bytes": sum(p.nbytes for p in held), "template": front.template_name,
            "images": front.preparation, "pairs": len(run.pairs),
            "pairs_without_image": run.pairs.without_image, "steps": run.steps,
            "official": options.departures(run.o), **run.ranks.first(options.provenance, run.o)}


def log(run, line):
    """A line of log.jsonl, which rank 0 writes; a resumed run first cuts the file to its checkpoint. Its
    numbers go to --set track, too, under TRL's names."""
    if run.ranks.rank == 0:
        data.append_jsonl(run.out / "log.jsonl", line)
    if run.send:
        where = "eval" if "eval" in line else "train"
        for name, value in report.values(line.get("eval", line)).items():
            run.send(f"{where}/{'learning_rate' if name == 'lr' else name}", value, run.state.step)


def tracker(run):
    """f(name, value, step) that sends a number where --set track says; None without."""
    if run.o.track == "wandb":
        import wandb
        there = wandb.init(name=run.out.name, dir=run.out, config=options.decisive(run.o))
        return lambda name, value, step: there.log({name: value}, step)
    if run.o.track:
        from torch.utils.tensorboard import SummaryWriter
        there = SummaryWriter(run.out / "tensorboard", purge_step=run.state.step + 1)
        return there.add_scalar


def warning(lines, o):
    """A line with advice, of some steps' lines of the log: the margin stays flat (past the warm-up), or the
    chosen responses are less likely than at the start; else ""."""
    flat = all(abs(line.get("rewards/margins", 1)) < 1e-3 for line in lines)
    if flat and fmean(line["lr"] for line in lines) > o.lr / 4:
        return f"rewards/margins is 0 for {WINDOW} steps: nothing is learned; raise --lr ({o.lr:g})\n"
    if fmean(line.get("rewards/chosen", 0) for line in lines) > -0.1:
        return ""
    more = f" or add an anchor: --loss {o.loss}+ancpo"
    if any(name in o.loss for name in ("ancpo", "mdpo", "symmpo")):
        more = ""
    return f"rewards/chosen falls: the chosen responses become less likely; lower --lr ({o.lr:g}){more}\n"


def judge(run, found):
    """Compare an evaluation with those before it; keep=best keeps a checkpoint of the best. Raises UserError
    if the number that it goes by is not there."""
    o, state, values = run.o, run.state, report.values(found)
    if not o.keep:
        return
    name = o.keep.rpartition(":")[2]
    if name == "best":
        name = next(iter(values), name)
    if name not in values:
        raise data.UserError(f"--set keep={o.keep} needs a number of the evaluations ({', '.join(values)}), "
                             "as best:NAME; your own data has some with --val_data")
    value = values[name]
    if name != "loss" and "chair" not in name:
        value = -value
    if value < state.value:
        state.best, state.value, state.measure = state.step, value, name
        save(run, BEST)


def over(run):
    """Whether no step is left, or `patience` evaluations have brought nothing better."""
    o, state = run.o, run.state
    return state.step == run.steps or 0 < o.patience * o.eval_every <= state.step - state.best


class Stop:
    """SIGTERM and Ctrl-C: inside the `with`, the first takes effect at the end of a step; a second one, and
    any after the `with`, at once."""
    asked = False

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)

    def hear(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error):
        self.asked = True
