"""What is done stays done: items, their hashes, and journals that a kill cannot tear; nothing of synthesis.

A file of its own, because synth.py's seven stages resume through this one function, `work`. An item is a dict
with an `id` and a `hash` over all that it is made from; parts/NAME.jsonl in the run's folder holds the rows
that are made, and .NAME.RANK.jsonl beside it those of a run under way, one line for each group of items.
"""
import gc
import hashlib
import json
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

from tqdm import tqdm

import data
from data import UserError


@dataclass
class Run:
    """A call's options, its folder, and its place among the ranks."""
    o: object
    out: Path
    rank: int = 0
    world: int = 1
    device: str = "cpu"

    def barrier(self):
        if self.world > 1:
            import torch.distributed as dist
            dist.barrier()

    def rows(self, name, made_by=None):
        """The lines of OUT/name.jsonl. Where it is missing: [] without `made_by`, else a UserError."""
        path = self.out / f"{name}.jsonl"
        if not path.exists() and made_by:
            raise UserError(f"{path} is missing: run `python synth.py {made_by}` with this --out first")
        return list(data.read_jsonl(path)) if path.exists() else []

    def write(self, name, rows):
        """OUT/name.jsonl, in one move, by rank 0."""
        if self.rank == 0:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            data.atomic_write(self.out / f"{name}.jsonl", "".join(lines).encode("utf-8", "backslashreplace"))

    def say(self, **line):
        """A line of log.jsonl and of the terminal."""
        if self.rank == 0:
            data.append_jsonl(str(self.out / "log.jsonl"), line)
            print("  ".join(f"{k.replace('_', ' ')} {v}" for k, v in line.items()), flush=True)


def begin(o, out):
    """A Run in the folder `out`, which it locks; under torchrun one of several. Raises UserError."""
    import fcntl

    import torch
    places = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, world, local = (int(os.environ.get(name, alone)) for name, alone in places.items())
    if world > 1:               # gloo: the ranks only wait for each other, for as long as a slow one takes
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=30))
    device = o.device or ("cuda" if torch.cuda.is_available() else
                          "mps" if torch.backends.mps.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{local % max(1, torch.cuda.device_count())}"
    run = Run(o, Path(out), rank, world, device)
    identity.cache_clear()                              # another run may have come before it in this process
    try:
        (run.out / "parts").mkdir(parents=True, exist_ok=True)
        if rank == 0:
            run.lock = open(run.out / ".lock", "w")
            fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)        # let go however the run ends
    except BlockingIOError:
        raise UserError(f"--out {out} is in use by another run: wait for it or give another") from None
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): give another folder") from None
    run.barrier()
    return run


def key(*parts):
    """16 hex digits over everything that an item is made from."""
    text = json.dumps(parts, sort_keys=True).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


@cache
def identity(source):
    """What tells one model from another: a URL itself; of a file or folder its files' names and hashes (a
    tuned model differs nearly everywhere, so blocks of large files do). Raises UserError."""
    source = str(source)
    if source.startswith(("http://", "https://")):
        return source
    path, digest = Path(source), hashlib.blake2b(digest_size=8)
    if not path.exists():
        raise UserError(f"{source}: no such file or folder, and no URL; check the path")
    inside = [f for f in path.rglob("*") if f.is_file() and f.suffix != ".md"] if path.is_dir() else [path]
    for file in sorted(inside):
        digest.update(f"{file.relative_to(path)} {file_hash(file)}".encode())
    return digest.hexdigest()


def file_hash(path):
    """Of a file's size and content; beyond 1 MiB of 16 spread blocks of 64 KiB."""
    try:
        with open(path, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest = hashlib.blake2b(str(size).encode(), digest_size=8)
            for block in range(16 if size > 1 << 20 else 1):
                stream.seek(size * block // 16)
                digest.update(stream.read(1 << 16 if size > 1 << 20 else -1))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); run the stage before again") from error
    return digest.hexdigest()


def done(run, name, items):
    """({id: row} of the items that are made, how many rows of the journals were made twice)."""
    wanted, rows, seen, twice = {x["id"]: x["hash"] for x in items}, {}, set(), 0
    folder = run.out / "parts"
    for file in [folder / f"{name}.jsonl", *sorted(folder.glob(f".{name}.*.jsonl"))]:
        for line in data.read_jsonl(file, torn_ok=True) if file.exists() else ():
            for row in line.get("rows", [line]):
                if "rows" in line:
                    twice += (row["id"], row["hash"]) in seen
                    seen.add((row["id"], row["hash"]))
                if wanted.get(row["id"]) == row["hash"]:
                    rows[row["id"]] = row
    return rows, twice


def work(run, name, items, make, size=1):
    """The items' rows in their order, without those that failed; only what is missing is made.

    make: groups (lists of `size` items) -> their rows, group by group, None for an item that failed. It is
    called where something is missing, and a group is made whole, so that a resumed run computes in the same
    batches. Group g is rank g's (modulo the ranks); its rows are one line of the rank's journal, which is
    there or not whenever the process is killed. At the end rank 0 merges the journals. Keys of an item that
    begin with _ are for `make` alone.
    """
    folder, start = run.out / "parts", time.time()
    had, _ = done(run, name, items)
    run.say(stage=name, items=len(items), there=len(had))
    run.barrier()                                       # everyone has read what is there before it grows
    groups = [items[at:at + size] for at in range(0, len(items), size)]
    mine = [g for g in groups[run.rank::run.world] if any(x["id"] not in had for x in g)]
    with tqdm(total=len(mine), desc=name, unit="group", disable=None if run.rank == 0 else True) as bar:
        for group, rows in zip(mine, make(mine), strict=True) if mine else ():
            new = [{k: v for k, v in (x | row).items() if not k.startswith("_")}
                   for x, row in zip(group, rows, strict=True) if row is not None and x["id"] not in had]
            if new:
                data.append_jsonl(str(folder / f".{name}.{run.rank}.jsonl"), {"rows": new})
            bar.update()
    free()
    run.barrier()
    rows, twice = done(run, name, items)
    run.barrier()                                       # everyone has read the journals before they go
    rows = [rows[x["id"]] for x in items if x["id"] in rows]
    run.write(f"parts/{name}", rows)
    for file in folder.glob(f".{name}.*.jsonl") if run.rank == 0 else ():
        file.unlink()
    run.say(stage=name, items=len(items), made=len(rows) - len(had), failed=len(items) - len(rows),
            twice=twice, seconds=round(time.time() - start, 1))
    return rows


def free():
    """Give memory back that nothing refers to any more: to the next model."""
    import torch
    gc.collect()                                        # modules refer to each other in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bare(row):
    """A row without what only parts/ needs."""
    return {k: v for k, v in row.items() if k != "hash"}
