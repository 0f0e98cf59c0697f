"""One spoiled input of tests/fuzz.py: its files, the real command on it, and what came of it."""
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import fuzz_kinds
import fuzz_mutate
from conftest import ROOT
from fuzz_world import OUT

SECRETS = re.compile("sk-secret|:secret@|key=secret")
# what a command may remove from its folder
GOES = re.compile(r"\.rank\d+$|\.tmp|\.lock$|report\.html|(before|after)\.\w*\.?jsonl")


class Case:
    """One input: see fuzz_kinds.py. clean: the sound one that the same choices lead to."""
    def __init__(self, kind, number, clean=False):
        self.kind, self.number, self.clean = kind, number, clean
        self.draw, self.rng = random.Random(f"{kind}/{number}"), random.Random(f"{kind}/{number}/spoil")
        self.argv, self.sources, self.result, self.printed = [], [], None, ""
        self.same = self.anywhere = False
        shutil.rmtree("case", ignore_errors=True)
        Path("case").mkdir()
        make, _ = fuzz_kinds.KINDS[kind]
        make(self)

    def take(self, source, name=None):
        """Copy a sound file or folder into case/ -> its path there."""
        self.sources.append(str(source))
        target = Path("case", name or Path(source).name)
        copy = shutil.copytree if Path(source).is_dir() else shutil.copyfile
        return str(copy(source, target))

    def spoil(self, path, how, neutral=False):
        """Change a file by how(rng, bytes). neutral: now and then only the way it is written; "blanks": where
        the order of keys says something."""
        if self.clean:
            return
        before = Path(path).read_bytes()
        if neutral and self.rng.random() < .2:
            content = fuzz_mutate.neutral(self.rng, before, order=neutral != "blanks")
            self.same = True
        else:
            content = how(self.rng, before)
            self.same = self.same or content == before
        Path(path).write_bytes(content)

    def run(self, command, *more, result=None):
        """The command that reads the input; result: case -> what must be equal."""
        self.argv, self.result = [*command.split(), *more], result

    def help(self):
        words = self.argv[:1]
        if words == ["eval_hallu.py"]:
            words = self.argv[:3 if self.argv[1] == "score" else 2]
        return helped(*words)


@functools.cache
def helped(*words):
    return command([*words, "--help"])[2]


# ---- one input ----
def command(argv):
    """Run a command in this process -> (exit code or sentence, an exception or None, what it printed)."""
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


SOUND = {}                                             # {a case without its fault: the digest of its result}


def sound(case):
    """The digest of what the sound input of a case gives; None where it is refused."""
    other = Case(case.kind, case.number, clean=True)
    key = json.dumps([other.argv, other.sources])
    if key not in SOUND:
        code, error, other.printed = command(other.argv)
        if error or code and "official" not in other.argv:
            raise AssertionError(f"the sound input of {case.kind}:{case.number} fails: {code}") from error
        SOUND[key] = None if code else digest(other.result(other))      # official mode refuses some
    return SOUND[key]


def digest(value):
    return hashlib.sha256(repr(value).encode("utf-8", "backslashreplace")).hexdigest()


def attempt(kind, number):
    """One input -> (refused, past, equal or fault; what; where; details)."""
    case, wanted = Case(kind, number), None
    if case.same and case.result:
        wanted = sound(case)
        case = Case(kind, number)
    before = {**OUTSIDE, **files("case")} if OUTSIDE else files("../..")
    code, error, case.printed = command(case.argv)
    said, after = f"{case.printed}{code}", files("../..")
    wrong = changes(case, before, after)
    OUTSIDE.clear()                                    # nobody but a command changes these
    OUTSIDE.update({path: about for path, about in after.items() if not path.startswith("case/")})
    if error:
        lines = "".join(traceback.format_exception(error))
        return "fault", type(error).__name__, place(error.__traceback__), lines[-1500:]
    if "Traceback (most recent" in said:
        return "fault", "a traceback is printed", first_place(said), said[-1500:]
    if SECRETS.search(said):
        return "fault", "a secret is printed", case.argv[0], said[-400:]
    if wrong:
        return "fault", *wrong, said[-400:]
    if code and not said.removesuffix(f"{code}").strip() and not isinstance(code, str):
        return "fault", "refused without a sentence", case.argv[0], f"exit code {code}"
    if code:
        return "refused", "", "", said[-400:]
    if not wanted:
        return "past", "", "", said[-400:]
    if digest(case.result(case)) != wanted:
        return "fault", "another result", " ".join(case.argv[:2]), said[-400:]
    return "equal", "", "", ""


OUTSIDE = {}                                           # files() of all but case/, after the last command


def files(folder):
    """{path: what tells whether it changed} of everything in a folder; paths within this one are relative."""
    found, here, todo = {}, os.getcwd() + os.sep, [os.path.abspath(folder)]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                about = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                else:
                    found[entry.path.removeprefix(here)] = about.st_size, about.st_mtime_ns, about.st_ino
    return found


def changes(case, before, after):
    """("what", "where") if a command changed what is not its own."""
    for path in before.keys() | after.keys():
        if before.get(path) == after.get(path):
            continue
        if path not in after:
            if not GOES.search(path):
                return "a file is gone", re.sub(r"\d+", "N", path)
        elif not (case.anywhere or path.startswith((f"{OUT}/", "runs/"))):
            return "an input was changed" if path in before else "written outside the output", path
    return None


def place(trace):
    """The last of our own functions in a traceback: FILE:FUNCTION."""
    found = "?"
    for frame in traceback.extract_tb(trace):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and not {".venv", "tests"} & {*path.parts}:
            found = f"{path.relative_to(ROOT)}:{frame.name}"
    return found


def first_place(text):
    """The first of our own functions in a traceback that was printed."""
    found = re.search(rf'File "{re.escape(str(ROOT))}/(?!tests|\.venv)([^"]+)", line \d+,? in (\S+)', text)
    return ":".join(found.groups()) if found else "?"
