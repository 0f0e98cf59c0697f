"""What a killed run goes on from: last/checkpoint.safetensors, the log, and how a run is stopped.

Part of train_dpo.py.
"""
import json
import signal
from dataclasses import asdict, dataclass, field

import data
import options


@dataclass
class State:
    """Where a run is."""
    step: int = 0                                            # steps that are done
    seconds: float = 0.0                                     # of training
    log_bytes: int = 0
    chosen: list = field(default_factory=list)               # the chosen reward of the last 40 steps
    warned: bool = False


def save(run):
    """last/checkpoint.safetensors in one move: weights, the optimiser's state, the reference's log-probs."""
    from safetensors.torch import save as to_bytes
    run.reference.sync()
    tensors = run.optimiser.state()
    tensors |= {"reference/logps": run.reference.logps, "reference/key": run.reference.key}
    if run.ranks.rank == 0:
        run.state.log_bytes = run.log.size()
        about = {"state": json.dumps(asdict(run.state)), "base": run.base}
        (run.out / "last").mkdir(exist_ok=True)
        data.atomic_write(run.out / "last" / "checkpoint.safetensors", to_bytes(tensors, about))


def restore(run):
    """Go on from the last checkpoint, if there is one. Raises UserError for one of other inputs."""
    from safetensors import safe_open
    file = run.out / "last" / "checkpoint.safetensors"
    if file.exists():
        with safe_open(file, "pt") as f:
            tensors, about = {key: f.get_tensor(key) for key in f.keys()}, f.metadata()
        if about["base"] != run.base or len(tensors["reference/key"]) != len(run.pairs):
            raise data.UserError(f"{file} was made with another base or number of pairs than --model and "
                                 "--data give now: give another --out")
        run.reference.logps, run.reference.key = tensors.pop("reference/logps"), tensors.pop("reference/key")
        run.optimiser.load(tensors)
        run.state = State(**json.loads(about["state"]))
    run.log.cut(run.state.log_bytes)


def opening(run):
    """The first line of the log: what the run depends on."""
    front, model = run.model.front, run.model.frozen or run.model
    frozen = [p for p in model.model.parameters() if not p.requires_grad]
    held = [p.to_local() if hasattr(p, "to_local") else p for p in frozen]                   # by this rank
    return {"options": asdict(run.o), "ranks": run.ranks.world, "device": str(run.ranks.device),
            "dtype": str(run.model.model.dtype).removeprefix("torch."), "base": run.base,
            "base_bytes": sum(p.nbytes for p in held), "template": front.template_name,
            "images": front.preparation, "pairs": len(run.pairs), "steps": run.steps,
            "official": options.departures(run.o), **options.provenance(run.o)}


class Log:
    """log.jsonl, which rank 0 writes; a resumed run cuts it to where its checkpoint was."""
    def __init__(self, path, rank):
        self.path = path if rank == 0 else None

    def cut(self, size):
        if self.path:
            with open(self.path, "ab") as file:
                file.truncate(size)

    def write(self, line):
        if self.path:
            data.append_jsonl(self.path, line)

    def size(self):
        return self.path.stat().st_size


class Stop:
    """SIGTERM and Ctrl-C: inside the `with` they are heard at the end of a step; a second one, and any behind
    the `with`, acts at once."""
    asked = False

    def __enter__(self):
        self.armed = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)

    def hear(self, number, frame):
        if self.asked or not self.armed:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error):
        self.armed = False
