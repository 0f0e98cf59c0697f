"""How a run is saved, continued and stopped: last/checkpoint.safetensors and the log.

Part of train_dpo.py.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of train_dpo.py; run: python train_dpo.py --help"))

import json
import signal
from dataclasses import asdict, dataclass

import data
from training import options

FILE = "last/checkpoint.safetensors"                         # in the run's folder


@dataclass
class State:
    """Where a run is."""
    step: int = 0                                            # steps that are done
    seconds: float = 0.0                                     # of training
    log_bytes: int = 0


def save(run):
    """last/checkpoint.safetensors in one move: weights, the optimiser's state, the reference's log-probs."""
    from safetensors.torch import save as to_bytes
    run.reference.sync()
    tensors = run.optimiser.state()
    tensors |= {"reference/logps": run.reference.logps, "reference/key": run.reference.key}
    if run.ranks.rank == 0:
        run.state.log_bytes = (run.out / "log.jsonl").stat().st_size
        about = {"state": json.dumps(asdict(run.state)), "base": run.base}
        data.atomic_write(run.out / FILE, to_bytes(tensors, about))


def restore(run):
    """Continue from the last checkpoint, if there is one. Raises UserError for one of other inputs."""
    from safetensors import safe_open
    file = run.out / FILE
    if file.exists():
        with safe_open(file, "pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}
            about = f.metadata()
        if about["base"] != run.base:
            raise data.UserError(f"{file} was made with another base than --model is now: give another --out")
        run.reference.logps = tensors.pop("reference/logps")
        run.reference.key = tensors.pop("reference/key")
        run.optimiser.load(tensors)
        run.state = State(**json.loads(about["state"]))
    if run.ranks.rank == 0:
        with open(run.out / "log.jsonl", "ab") as file:
            file.truncate(run.state.log_bytes)


def opening(run):
    """The first line of the log: what the run depends on."""
    front = run.model.front
    base = run.model.frozen or run.model
    frozen = [p for p in base.model.parameters() if not p.requires_grad]
    held = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]                   # by this rank
    return {"options": asdict(run.o), "ranks": run.ranks.world, "device": str(run.ranks.device),
            "dtype": str(run.model.model.dtype).removeprefix("torch."), "base": run.base,
            "base_bytes": sum(p.nbytes for p in held), "template": front.template_name,
            "images": front.preparation, "pairs": len(run.pairs), "steps": run.steps,
            "official": options.departures(run.o), **options.provenance(run.o)}


def log(run, line):
    """A line of log.jsonl, which rank 0 writes; a resumed run first cuts the file to its checkpoint."""
    if run.ranks.rank == 0:
        data.append_jsonl(run.out / "log.jsonl", line)


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
