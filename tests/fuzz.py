"""Spoil every kind of input at random, give it to the real commands, and count what happens.

    python tests/fuzz.py --n 2000 --seed 0             all kinds, in the shares of fuzz_kinds.KINDS
    python tests/fuzz.py --n 2000 --kinds records,logs     as many of each of these
    python tests/fuzz.py --again records:17            one input once more, with what it said

Commands run in this process's children, one input after another, in a folder that looks the same for every
input; input NUMBER of KIND is always the same. A fault is
    an exception that is no sentence, a traceback     a process that dies, 10 seconds without an end, 2 GiB more memory
    exit code 0 and another result than the sound input gave, where nothing but the writing was changed or where no
        change may pass (checkpoint, log and state of a training run)
    a file outside the output that is new, changed or gone; a changed input; a file of a run that is gone
"""
import argparse
import contextlib
import faulthandler
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
               "TRANSFORMERS_VERBOSITY": "error", "OPENAI_API_KEY": "sk-secret"}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SECONDS, BYTES = 10, 2 << 30
# Faults that are known: (kind, what, where). Each has an entry with a reproducing input in the report; the list is
# to shrink to nothing.
KNOWN = set()


class Case:
    """One input: see fuzz_kinds.py."""
    def __init__(self, kind, number, clean=False):
        self.kind, self.number, self.clean = kind, number, clean
        self.draw, self.rng = random.Random(f"{kind}/{number}"), random.Random(f"{kind}/{number}/spoil")
        self.argv, self.printed, self.sources = [], "", []
        self.same = self.anywhere = False
        self.result = None

    def take(self, source, name=None):
        """Copy a sound file or folder into case/ -> its path there."""
        self.sources.append(str(source))
        target = Path("case", name or Path(source).name)
        (shutil.copytree if Path(source).is_dir() else shutil.copyfile)(source, target)
        return str(target)

    def spoil(self, path, how, neutral=False):
        """Change a file by how(rng, bytes); neutral: now and then only the way it is written."""
        if self.clean:
            return
        path = Path(path)
        before = path.read_bytes()
        if neutral and self.rng.random() < .2:
            import fuzz_mutate
            content = fuzz_mutate.neutral(self.rng, before)
            self.same = True
        else:
            content = how(self.rng, before)
            self.same = self.same or content == before
        path.write_bytes(content)

    def run(self, *argv, result=None):
        self.argv, self.result = [str(word) for word in argv], result

    def help(self, argv):
        """A command's --help."""
        words = [argv[0], *argv[1:2 + (argv[1:2] == ["score"])]] if argv[0] == "eval_hallu.py" else argv[:1]
        if tuple(words) not in HELP:
            HELP[tuple(words)] = command([*words, "--help"])[2]
        return HELP[tuple(words)]


HELP, SOUND = {}, {}


# ---- one input ----
def command(argv):
    """Run a command in this process -> (exit code or sentence, error, what it printed). error: an exception."""
    import importlib
    module = importlib.import_module(argv[0].removesuffix(".py"))
    printed, error, code = io.StringIO(), None, 0
    sys.argv = list(argv)
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module.main()
        except SystemExit as end:
            code = end.code or 0
        except BaseException as fault:
            error = fault
    return code, error, printed.getvalue()


def snapshot():
    """{path: what tells whether it changed} of everything under the world's grandparent, case/out apart."""
    found, todo = {}, [os.path.abspath("../..")]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                else:
                    found[os.path.relpath(entry.path)] = about.st_size, about.st_mtime_ns, about.st_ino
    return found


def sound(case):
    """What the sound input of a case gives; kept."""
    from fuzz_kinds import KINDS
    other = prepared(Case(case.kind, case.number, clean=True), KINDS)
    key = json.dumps([other.argv, other.sources])
    if key not in SOUND:
        code, error, other.printed = command(other.argv)
        if error or code:
            raise AssertionError(f"the sound input {case.kind}:{case.number} fails: {error or code}") from error
        SOUND[key] = digest(other.result(other))
    return SOUND[key]


def digest(value):
    return hashlib.sha256(repr(value).encode("utf-8", "backslashreplace")).hexdigest()


def prepared(case, kinds):
    """The case with its folder case/ made anew."""
    shutil.rmtree("case", ignore_errors=True)
    Path("case").mkdir()
    kinds[case.kind][0](case)
    return case


def attempt(kind, number):
    """One input -> (outcome, what, where, details). outcome: refused, past, equal or fault."""
    from fuzz_kinds import KINDS
    case = prepared(Case(kind, number), KINDS)
    wanted = sound(case) if case.same else None
    if wanted:
        case = prepared(Case(kind, number), KINDS)
    before = snapshot()
    code, error, case.printed = command(case.argv)
    if error:
        return fault(type(error).__name__, place(error.__traceback__), error)
    if "Traceback (most recent" in case.printed:
        return "fault", "a traceback is printed", last_place(case.printed), case.printed[-900:]
    if "sk-secret" in f"{case.printed}{code}" or "secret@" in f"{case.printed}{code}":
        return "fault", "a secret is printed", case.argv[0], f"{code}{case.printed[-300:]}"
    if wrong := changes(case, before, snapshot()):
        return "fault", *wrong, f"{code}"
    if code:
        said = code if isinstance(code, str) else case.printed
        if not str(said).strip():
            return "fault", "refused without a sentence", case.argv[0], ""
        return "refused", "", "", said[-400:]
    if not wanted:
        return "past", "", "", case.printed[-400:]
    if digest(case.result(case)) != wanted:
        return "fault", "another result", " ".join(case.argv[:2]), case.printed[-400:]
    return "equal", "", "", ""


def changes(case, before, after):
    """("what", "where") if a command changed what is not its own."""
    for path in before.keys() | after.keys():
        mine = path.startswith(("case/out", "case/page.html", "case/answers.jsonl"))
        if before.get(path) == after.get(path) or mine and path in after:
            continue
        if path not in after:
            if re.search(r"\.rank\d+$|\.tmp|\.lock$|report\.html|(before|after)\.\w*\.?jsonl", path):
                continue
            return "a file is gone", re.sub(r"\d+", "N", path)
        if not case.anywhere and not path.startswith("runs/"):
            return "written outside the output" if path not in before else "an input was changed", path
    return None


def place(trace):
    """The last of our own functions in a traceback: file.py:function."""
    found = "?"
    for frame in traceback.extract_tb(trace):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path.parent.name != "tests":
            found = f"{path.relative_to(ROOT)}:{frame.name}"
    return found


def last_place(text):
    """The same of a printed traceback, the last call first or last."""
    found = re.findall(rf'File "{re.escape(str(ROOT))}/([^"]+)", line \d+,? in (\S+)', text)
    found = [f"{path}:{name}" for path, name in found if not path.startswith(("tests/", ".venv"))]
    return found[-1] if found else "?"


def fault(what, where, error):
    lines = traceback.format_exception(error)
    return "fault", what, where, "".join(lines)[-1500:]


# ---- many inputs ----
def work(tasks, folder, pipe, log):
    """A child: the inputs one after another. One that hangs, or takes 2 GiB, ends it; its parent starts another."""
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdin = open(os.devnull)
    start = peak()
    used = int(re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(log, "w") as file:
        faulthandler.enable(file)
        for kind, number in tasks:
            file.truncate(0)
            faulthandler.dump_traceback_later(SECONDS, exit=True, file=file)
            found = attempt(kind, number)
            faulthandler.cancel_dump_traceback_later()
            grown = peak() - start
            if grown > BYTES:
                found = "fault", f"over {BYTES >> 30} GiB", "?" if found[0] != "fault" else found[2], str(found)
            pipe.send(found)
            if grown > BYTES:
                return


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def start(tasks, folder, log):
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=work, args=(tasks, folder, theirs, log), daemon=True)
    child.start()
    theirs.close()
    return child, ours


def run(tasks, folder, jobs=1, report=None):
    """[(kind, number)] -> [(kind, number, outcome, what, where, details, seconds)]. folder: of build()."""
    found, live, place_of = [], {}, {}
    for job in range(jobs):
        mine = tasks[job::jobs]
        own = Path(folder, f"{job}/a/world")
        shutil.copytree(Path(folder, "world"), own)
        place_of[job] = own, Path(folder, f"{job}.log")
        live[job] = (mine, *start(mine, *place_of[job]), time.monotonic()) if mine else None
    while any(live.values()):
        waiting = {live[job][2]: job for job in live if live[job]}
        for pipe in multiprocessing.connection.wait(list(waiting), timeout=5 * SECONDS):
            job = waiting[pipe]
            left, child, _, began = live[job]
            try:
                outcome = pipe.recv()
                ended = False
            except EOFError:
                child.join()
                said = place_of[job][1].read_text()
                what = "a hang" if "Timeout" in said else f"the process died ({child.exitcode})"
                first = re.findall(rf'File "{re.escape(str(ROOT))}/(?!tests|\.venv)([^"]+)", line \d+ in (\S+)', said)
                outcome = "fault", what, ":".join(first[0]) if first else "?", said[-1500:]
                ended = True
            if not ended or left:
                (kind, number), *left = left
                found.append((kind, number, *outcome, time.monotonic() - began))
            if outcome[1].startswith("over"):
                child.join()
                ended = True
            live[job] = None
            if left:
                again = start(left, *place_of[job]) if ended else (child, pipe)
                live[job] = (left, *again, time.monotonic())
            if report:
                report(found[-1], len(tasks) - len(found))
    return found


def tasks_of(n, seed, kinds=()):
    """n inputs of each of some kinds; without kinds n of all in their shares, mixed."""
    from fuzz_kinds import KINDS
    base = seed * 1_000_000
    if kinds:
        return [(kind, base + k) for k in range(n) for kind in kinds]
    whole, tasks = sum(share for _, share in KINDS.values()), []
    for kind, (_, share) in KINDS.items():
        tasks += [(kind, base + k) for k in range(round(n * share / whole))]
    random.Random(seed).shuffle(tasks)
    return tasks


# ---- the table ----
def table(found):
    """The counts by kind, and each kind of fault with inputs that reproduce it."""
    lines = [f"{'kind':14}{'inputs':>8}{'refused':>9}{'past':>7}{'equal':>7}{'known':>7}{'faults':>8}{'seconds':>9}"]
    kinds = defaultdict(Counter)
    faults = defaultdict(list)
    for kind, number, outcome, what, where, details, seconds in found:
        if outcome == "fault":
            faults[kind, what, where].append((number, details))
            outcome = "known" if (kind, what, where) in KNOWN else "fault"
        for name in (kind, "all"):
            kinds[name].update({"inputs": 1, outcome: 1, "seconds": seconds})
    for kind, count in sorted(kinds.items(), key=lambda item: item[0] == "all"):
        past = count["past"] + count["equal"]
        lines.append(f"{kind:14}{count['inputs']:8}{count['refused']:9}{past:7}{count['equal']:7}{count['known']:7}"
                     f"{count['fault']:8}{count['seconds']:9.1f}")
    for (kind, what, where), some in sorted(faults.items(), key=lambda item: -len(item[1])):
        again = " ".join(f"{kind}:{number}" for number, _ in some[:3])
        known = "known " if (kind, what, where) in KNOWN else ""
        lines += ["", f"{known}{len(some)} x {(kind, what, where)}   --again {again}", *some[0][1].rstrip().splitlines()[-4:]]
    return lines


def built(folder):
    """The sound inputs in folder/world."""
    import fuzz_world
    Path(folder, "world").mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        here = os.getcwd()
        fuzz_world.build(Path(folder, "world"))
        os.chdir(here)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="inputs; with --kinds of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="with commas")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--again", default="", help="KIND:NUMBER")
    parser.add_argument("--json", default="", help="every outcome, a line each")
    o, typed = parser.parse_args(), " ".join(sys.argv)
    tasks = tasks_of(o.n, o.seed, tuple(filter(None, o.kinds.split(","))))
    if o.again:
        kind, _, number = o.again.partition(":")
        tasks = [(kind, int(number))]
    with tempfile.TemporaryDirectory(prefix="nanovpo-fuzz-") as folder:
        built(folder)
        began = time.monotonic()
        found = run(tasks, folder, o.jobs)
        if o.again:
            print(*found[0], sep="\n")
            case = Path(folder, "0/a/world/case")
            print(*sorted(str(path) for path in case.rglob("*"))[:40], sep="\n")
    print(*table(found), sep="\n")
    print(f"\n{len(found)} inputs in {time.monotonic() - began:.0f} s: python {typed}")
    if o.json:
        Path(o.json).write_text("".join(json.dumps(row) + "\n" for row in found))
    sys.exit(any(row[2] == "fault" and (row[0], *row[3:5]) not in KNOWN for row in found))


if __name__ == "__main__":
    main()
