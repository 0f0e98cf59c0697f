"""Kill the commands at random moments, start them again, and compare what they end with.

    python tests/kill.py --n 20 --seed 0                20 kills of each job below
    python tests/kill.py --n 5 --jobs train,torchrun

A job is killed with SIGKILL up to three times and then left to end: its files must be those of a job that
nobody disturbed, times and speeds apart, and no temporary file may be left. Half of the kills fall on a
random moment, the others on one at which a temporary file is there: within the write of a checkpoint or a
result. Of several ranks now and then only one is killed, and torchrun must end the others. Processes are
forked from this one, where the imports are done; torchrun is started as a user does it.
"""
import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import fuzz
from fuzz_case import command
from fuzz_world import OUT, SYNTH, TRAIN
from tqdm import tqdm

VOLATILE = {"seconds", "tokens_per_second", "waiting", "memory_gib", "versions", "commit"}
APART = (".lock", "report.html", "gallery.html", "last/", "checked/")    # pages show times
RUN = f"train_dpo.py {TRAIN} --out {OUT}"
MORE = "--responders llava15,replies/one.ours.jsonl --batch 1 --set max_new_tokens=24"
STAGES = ("instruct", "respond", "score", "pairs", "analyse")


@dataclass
class Job:
    """Commands that run one after another. writes: about how many files they replace."""
    commands: list
    writes: int = 1
    ranks: int = 1
    torchrun: bool = False
    stages: bool = False                                 # of a synthesis run whose images are ranked
    once: bool = False                                   # a whole folder is not made again


JOBS = {
    "train": Job([RUN], writes=6),
    "ranks": Job([RUN], writes=6, ranks=2),
    "answers": Job(["eval_hallu.py answers pope --model llava15 --data pope --images coco --batch_size 1 "
                    f"--max_new_tokens 24 --out {OUT}/answers.jsonl"]),
    "synth": Job([f"synth.py {stage} {SYNTH} {MORE}" for stage in STAGES], writes=6, stages=True),
    "merge": Job([f"lora.py merge --model llava15 --adapter adapter --out {OUT}"], once=True),
    "import": Job([f"model.import_checkpoint bunny {OUT} --vision_tower bunny/siglip"], once=True),
    "torchrun": Job([RUN], writes=6, ranks=2, torchrun=True)}


# ---- processes ----
def started(job, argv, log):
    """The process ids of a command's ranks, or of torchrun."""
    if job.torchrun:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        with open(log, "a") as file:
            done = subprocess.Popen([*words, str(fuzz.ROOT / argv[0]), *argv[1:]], stdin=subprocess.DEVNULL,
                                    stdout=file, stderr=file, start_new_session=True)
        done.returncode = 0                                              # we wait for it ourselves
        return [done.pid]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    return [fork(argv, rank, job.ranks, port, log) for rank in range(job.ranks)]


def fork(argv, rank, ranks, port, log):
    """One rank of a command in a child -> its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    tqdm.set_lock(threading.RLock())                 # not the one that all share: who is killed would keep it
    try:
        os.setpgid(0, 0)
        if ranks > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                           "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        sys.stdin = open(os.devnull)
        end, error, printed = command(argv)
        with open(log, "a") as file:
            file.write(f"{printed}\n{end or ''}\n{error or ''}\n")
        code = 1 if end or error else 0
    finally:
        os._exit(code)


def ended(children):
    """The exit codes of those that have ended; they leave the list."""
    codes = []
    for child in list(children):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            children.remove(child)
            codes.append(os.waitstatus_to_exitcode(status))
    return codes


def kill_one(job, children, rng):
    """SIGKILL to one rank -> whether torchrun ends the others, and itself, within 30 seconds."""
    victims, seconds = list(children), rng.uniform(0, .5)                # as soon as torchrun does it
    if job.torchrun:
        listed = Path(f"/proc/{children[0]}/task/{children[0]}/children").read_text().split()
        victims, seconds = [int(child) for child in listed] or victims, 30
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(victims), signal.SIGKILL)
    end = time.monotonic() + seconds
    while children and time.monotonic() < end:
        ended(children)
        time.sleep(.01)
    return not (children and job.torchrun)


def kill_all(children):
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)                             # torchrun's ranks
    while children:
        ended(children)
        time.sleep(.005)


def writing():
    """Whether a temporary file or folder is there."""
    for _, folders, files in os.walk("case"):
        if any(".tmp" in name or ".unfinished" in name for name in (*folders, *files)):
            return True
    return False


# ---- one job ----
def undisturbed(job, log):
    """Run a job from where it is to its end -> (seconds, the exit code of the command that failed)."""
    began = time.monotonic()
    for argv in job.commands:
        children, codes = started(job, argv.split(), log), []
        while children:
            codes += ended(children)
            time.sleep(.005)
        if any(codes):
            return time.monotonic() - began, max(codes, key=abs)
    return time.monotonic() - began, 0


def disturbed(job, rng, length, log):
    """Start a job and kill it -> a Counter of what happened: kills, on a write, of a single rank; hangs."""
    on_write, single = rng.random() < .5, job.ranks > 1 and rng.random() < .5
    moment, which = rng.uniform(0, length), rng.randrange(job.writes)   # the time, or the place of the write
    began, seen = time.monotonic(), False
    for argv in job.commands:
        children = started(job, argv.split(), log)
        while children:
            now = on_write and writing()
            which -= now and not seen
            seen = now
            if (now and which < 0) if on_write else time.monotonic() - began > moment:
                alone = kill_one(job, children, rng) if single else True
                kill_all(children)
                return Counter(kills=1, writes=int(on_write), single=int(single), hangs=int(not alone))
            if any(ended(children)):
                kill_all(children)
                return Counter()
            time.sleep(.0002 if on_write else .002)
    return Counter()


def contents():
    """What a job leaves: {file: its bytes}, times and speeds apart."""
    found = {}
    for path in sorted(Path(OUT).rglob("*")):
        name = str(path.relative_to(OUT))
        if not path.is_file() or name.startswith(APART) or ".tmp" in name:
            continue
        found[name] = content = path.read_bytes()
        if name == "log.jsonl":
            found[name] = [told(line) for line in content.splitlines()]
        elif name == "summary.json":
            found[name] = told(content)
    if "prompts.jsonl" in found:
        del found["log.jsonl"]                                           # what each call made
    return found


def told(line):
    return {key: value for key, value in json.loads(line).items() if key not in VOLATILE}


def prepare(job):
    shutil.rmtree("case", ignore_errors=True)
    Path("case").mkdir()
    if job.stages:
        Path(OUT, "parts").mkdir(parents=True)
        shutil.copytree("synth/images", f"{OUT}/images")
        for name in ("prompts", "images", "ranked"):
            shutil.copy(f"synth/{name}.jsonl", OUT)


def attempt(job, rng, length, wanted, log):
    """Kill a job up to three times, let it end, compare -> (a Counter, what is wrong)."""
    prepare(job)
    Path(log).write_text("")
    count, wrong = Counter(runs=1), ""
    for _ in range(rng.choice((1, 1, 2, 3))):
        count += disturbed(job, rng, length, log)
    _, code = undisturbed(job, log)
    there = contents()
    if code and not (job.once and there == wanted):
        count["refused"], wrong = 1, Path(log).read_text()[-1500:]
    elif there != wanted:
        names = [name for name in there.keys() | wanted.keys() if there.get(name) != wanted.get(name)]
        count["different"], wrong = 1, f"different: {', '.join(sorted(names))}"
    else:
        count["equal"] = 1
    if count["hangs"]:
        wrong = wrong or "torchrun did not end when a rank was killed"
    if writing():
        left = [str(path) for path in Path("case").rglob("*") if ".tmp" in path.name]
        count["left"], wrong = 1, wrong or f"left: {', '.join(left)}"
    return count, wrong


# ---- the table ----
COLUMNS = ("runs", "kills", "writes", "single", "equal", "different", "refused", "left", "hangs")
WRONG = ("different", "refused", "left", "hangs")


def run(n, seed, names, logs):
    """At least n kills of each job, in the folder of sound inputs -> ({name: Counter}, [what was wrong])."""
    found, wrong = defaultdict(Counter), []
    for name in names:
        job, log = JOBS[name], str(Path(logs, f"{name}.log"))
        prepare(job)
        length, code = undisturbed(job, log)
        assert not code, Path(log).read_text()
        wanted = contents()
        for k in range(5 * n):
            if found[name]["kills"] >= n:
                break
            count, says = attempt(job, random.Random(f"{name}/{seed}/{k}"), length, wanted, log)
            found[name].update(count)
            if says:
                wrong.append(f"{name}, run {k}: {says}")
    return found, wrong


def table(found):
    lines = [f"{'job':10}" + "".join(f"{name:>11}" for name in COLUMNS)]
    for name, count in [*found.items(), ("all", sum(found.values(), Counter()))]:
        lines.append(f"{name:10}" + "".join(f"{count[column]:11}" for column in COLUMNS))
    return lines


def faults(found):
    """[job: how many of what]."""
    return [f"{job}: {count[name]} {name}" for job, count in found.items() for name in WRONG if count[name]]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--n", type=int, default=20, help="kills of each job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", default=",".join(JOBS), help=f"of {', '.join(JOBS)}")
    o, typed, began = parser.parse_args(), " ".join(sys.argv), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nanovpo-kill-", dir=fuzz.memory()) as folder:
        fuzz.built(folder)
        with contextlib.chdir(Path(folder, "world")):
            found, wrong = run(o.n, o.seed, o.jobs.split(","), folder)
    print(*table(found), "", *wrong[:20], sep="\n")
    print(f"\n{time.monotonic() - began:.0f} s: python {typed}")
    sys.exit(bool(faults(found)))


if __name__ == "__main__":
    main()
