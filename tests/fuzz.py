"""Spoil every kind of input at random, give it to the real commands, and count what happens.

    python tests/fuzz.py --n 2000 --seed 0              all kinds, in the shares of fuzz_kinds.KINDS
    python tests/fuzz.py --n 2000 --kinds records,logs  so many of each of these; --kinds all: of each kind
    python tests/fuzz.py --again records:17             one input once more, with what it said

Commands run in children of this process, one input after another, in a folder that looks the same for each:
input NUMBER of KIND is always the same. A fault is
    an exception that is no sentence; a printed traceback; a process that dies; a refusal without a word
    10 seconds without an end; 2 GiB more memory; a key or a URL's secret in what is printed
    exit code 0 and another result than the sound input's, where only the writing was changed or where no
        change may pass (checkpoint, log and state of a training run)
    a file outside the output that is new or changed; a changed input; a file of a run that is gone
"""
import argparse
import contextlib
import copy
import faulthandler
import functools
import gc
import io
import json
import multiprocessing.connection
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import fuzz_case  # noqa: E402
import fuzz_kinds  # noqa: E402
import fuzz_world  # noqa: E402

import data  # noqa: E402
from model import import_checkpoint, vlm  # noqa: E402

SECONDS, BYTES = 10, 2 << 30
# ---- many inputs ----
def remember():
    """For speed: what is made of a sound model folder is made once. Spoiled ones are always read anew."""
    read, describe, kept = data.from_folder, import_checkpoint.describe, {}

    def once(folder, key, make):
        if str(folder) not in fuzz_kinds.MODELS:
            return make()
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def from_folder(kind, folder, what, fix="copy it again", **options):
        make = functools.partial(read, kind, folder, what, fix, **options)
        found = once(folder, (kind, str(folder), repr(sorted(options))), make)
        return copy.deepcopy(found) if what == "model" else found

    data.from_folder = from_folder
    import_checkpoint.describe = lambda folder: once(folder, f"of {folder}", lambda: [*describe(folder)])


def spare_devices(event, words):
    """An audit hook: root could put a file in a device's place."""
    if event == "os.rename" and str(words[1]).startswith(("/dev/", "/proc/")):
        raise AssertionError(f"{words[1]} would be replaced")


def work(tasks, folder, pipe, log):
    """A child: the inputs one after another. One that hangs, or takes 2 GiB, ends it; so does one that has
    asked for as much and not touched it, which the allocator keeps and later inputs would lack."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdin = open(os.devnull)
    os.environ["OPENAI_API_KEY"] = "sk-secret"
    sys.addaudithook(spare_devices)
    remember()
    gc.freeze()                                          # the product collects garbage between models
    if used := size():
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * BYTES,) * 2)
    with open(log, "w") as file:
        faulthandler.enable(file)
        start = peak()
        for kind, number in tasks:
            file.truncate(0)
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=file)
            found = fuzz_case.attempt(kind, number)
            faulthandler.cancel_dump_traceback_later()
            if grown := peak() - start > BYTES:
                found = "fault", f"over {BYTES >> 30} GiB", found[2] or "?", str(found)
            leaves = grown or size() > used + BYTES
            pipe.send((found, leaves))
            if leaves:
                return


def size():
    """Bytes of this process's address space; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return int(re.search(r"VmSize:\s*(\d+)", status.read_text())[1]) << 10


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Worker:
    """A process for a part of the inputs; another takes over where one ends before its inputs do."""
    def __init__(self, tasks, folder, number):
        self.left, self.log = tasks, Path(folder, f"{number}.log")
        self.world = Path(folder, f"{number}/a/world")
        shutil.copytree(Path(folder, "world"), self.world)
        self.start()

    def start(self):
        self.pipe, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        words = (self.left, self.world, theirs, self.log)
        self.child, self.began = fork.Process(target=work, args=words, daemon=True), time.monotonic()
        self.child.start()
        theirs.close()

    def take(self):
        """The outcome of the next input."""
        try:
            found, leaves = self.pipe.recv()
        except EOFError:
            self.child.join()
            leaves = True
            said = self.log.read_text(errors="replace")
            what = "a hang" if "Timeout" in said else f"the process died ({self.child.exitcode})"
            found = "fault", what, fuzz_case.first_place(said), said[:1500]
        (kind, number), *self.left = self.left
        row = kind, number, *found, time.monotonic() - self.began
        self.began = time.monotonic()
        if self.left and leaves:
            self.child.join()
            self.start()
        return row


def run(tasks, folder, jobs=1):
    """[(kind, number)] -> [(kind, number, outcome, what, where, details, seconds)]. folder: of built()."""
    found = []
    workers = [Worker(tasks[job::jobs], folder, job) for job in range(min(jobs, len(tasks)))]
    while workers := [worker for worker in workers if worker.left]:
        ready = multiprocessing.connection.wait([worker.pipe for worker in workers])
        found += [worker.take() for worker in workers if worker.pipe in ready]
    return found


def tasks_of(n, seed, kinds=()):
    """[(kind, number)]: n of each of some kinds; without kinds n of all in their shares, mixed."""
    base, tasks = seed * 1_000_000, []
    if kinds:
        return [(kind, base + k) for k in range(n) for kind in kinds]
    whole = sum(share for _, share in fuzz_kinds.KINDS.values())
    for kind, (_, share) in fuzz_kinds.KINDS.items():
        tasks += [(kind, base + k) for k in range(round(n * share / whole))]
    random.Random(seed).shuffle(tasks)
    return tasks


# ---- the table ----
def table(found):
    """The counts by kind; then each fault, with inputs that show it."""
    names = ("inputs", "refused", "past", "equal", "fault")
    lines = [f"{'kind':14}" + "".join(f"{name:>9}" for name in (*names, "seconds"))]
    kinds, faults = defaultdict(Counter), defaultdict(list)
    for kind, number, outcome, what, where, details, seconds in found:
        if outcome == "fault":
            faults[kind, what, where].append((number, details))
        for name in (kind, "all"):
            kinds[name].update({"inputs": 1, outcome: 1, "seconds": seconds})
            kinds[name]["past"] += outcome == "equal"
    for kind in sorted(kinds, key=lambda kind: kind == "all"):
        count = kinds[kind]
        cells = "".join(f"{count[name]:9}" for name in names)
        lines.append(f"{kind:14}{cells}{count['seconds']:9.1f}")
    for (kind, what, where), some in sorted(faults.items(), key=lambda item: -len(item[1])):
        again = " ".join(f"{kind}:{number}" for number, _ in some[:3])
        last = [line[:200] for line in some[0][1].rstrip().splitlines()[-3:]]
        lines += ["", f"{len(some)} x {kind}: {what} in {where}   --again {again}", *last]
    return lines


def built(folder):
    """Write the sound inputs into folder/world, in a child: training runs are stopped by signals."""
    world = Path(folder, "world")
    world.mkdir(parents=True)
    child = multiprocessing.get_context("fork").Process(target=build, args=(world,))
    child.start()
    child.join()
    assert child.exitcode == 0, "the sound inputs cannot be made"
    with contextlib.redirect_stderr(io.StringIO()):
        for model in ("llava15", "llava16"):
            vlm.load(world / model)                      # the children shall find it imported


def build(world):
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            fuzz_world.build(world)
    except BaseException:
        print(said.getvalue()[-3000:], file=sys.stderr)
        raise


def memory():
    """A folder in memory for many small files, where there is one."""
    there = "/dev/shm"
    return there if os.access(there, os.W_OK) and shutil.disk_usage(there).free > 4 << 30 else None


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--n", type=int, default=2000, help="inputs; with --kinds of each kind")
    parser.add_argument("--seed", type=int, default=0, help="inputs SEED * 1,000,000 and following")
    parser.add_argument("--kinds", default="", help=f"all, or of {', '.join(fuzz_kinds.KINDS)}")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--again", default="", help="KIND:NUMBER")
    parser.add_argument("--json", default="", help="a file for every outcome, a line each")
    o, typed = parser.parse_args(), " ".join(sys.argv)
    kinds = [*fuzz_kinds.KINDS] if o.kinds == "all" else [*filter(None, o.kinds.split(","))]
    tasks = tasks_of(o.n, o.seed, kinds)
    if o.again:
        kind, _, number = o.again.partition(":")
        tasks = [(kind, int(number))]
    with tempfile.TemporaryDirectory(prefix="nanovpo-fuzz-", dir=memory()) as folder:
        built(folder)
        began = time.monotonic()
        found = run(tasks, folder, o.jobs)
    if o.again:
        print(*found[0], "", sep="\n")
    print(*table(found), sep="\n")
    print(f"\n{len(found)} inputs in {time.monotonic() - began:.0f} s: python {typed}")
    if o.json:
        Path(o.json).write_text("".join(json.dumps(row) + "\n" for row in found))
    sys.exit(any(row[2] == "fault" for row in found))


if __name__ == "__main__":
    main()
