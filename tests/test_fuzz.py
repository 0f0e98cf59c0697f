"""Spoiled inputs and kills: each ends with the right result or with a sentence. See fuzz.py and kill.py."""
import contextlib
import os
import re
import resource
import tempfile
from collections import Counter
from pathlib import Path

import fuzz
import fuzz_case
import fuzz_kinds
import fuzz_world
import kill
import pytest


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory(prefix="nanovpo-fuzz-", dir=fuzz.memory()) as found:
        fuzz.built(found)
        yield Path(found)


@pytest.fixture(scope="module")
def spoiled(folder):
    """The outcomes of some spoiled inputs of all kinds; NANOVPO_FUZZ says how many."""
    n = int(os.environ.get("NANOVPO_FUZZ", 360))
    return fuzz.run(fuzz.tasks_of(n, 0), folder, jobs=min(2, os.cpu_count()))


def test_spoiled_inputs_are_refused_in_a_sentence_or_change_nothing(spoiled, capsys):
    lines = fuzz.table(spoiled)
    with capsys.disabled():
        print("", *lines[:len(fuzz_kinds.KINDS) + 2], sep="\n")
    assert not [row[:5] for row in spoiled if row[2] == "fault"], \
        "\n".join(lines)


def test_a_tenth_of_each_kind_gets_past_parsing(spoiled):
    count, past = Counter(row[0] for row in spoiled), Counter()
    for row in spoiled:
        past[row[0]] += row[2] in ("past", "equal")
    assert {*count} == {*fuzz_kinds.KINDS}
    assert [kind for kind in count if past[kind] < count[kind] / 10] == []


def test_an_input_is_the_same_each_time(folder):
    tasks = [(kind, number) for kind in ("records", "answers", "options") for number in range(5)]
    once, again = (fuzz.run(tasks, folder / name) for name in linked(folder))
    assert [row[:5] for row in once] == [row[:5] for row in again]


def linked(folder):
    """Two folders with the same sound inputs."""
    for name in ("once", "again"):
        (folder / name).mkdir()
        (folder / name / "world").symlink_to(folder / "world")
    return "once", "again"


@pytest.mark.parametrize("job", ["train", "answers"])
def test_a_killed_job_ends_as_an_undisturbed_one(folder, tmp_path, job):
    with contextlib.chdir(folder / "world"):
        found, wrong = kill.run(2, 0, [job], tmp_path)
    assert kill.faults(found) == [], "\n".join(wrong)


OUT = fuzz_world.OUT
SCORE = "eval_hallu.py score pope --answers pope.a.jsonl --questions pope"
FULL = {                                      # a job, and the bytes beyond which no file of it can grow
    "its log": (kill.JOBS["train"], 3_000), "its checkpoint": (kill.JOBS["train"], 20_000),
    "a stage's finished work": (kill.JOBS["synth"], 150), "answers": (kill.JOBS["answers"], 300),
    "a merged folder": (kill.JOBS["merge"], 20_000), "an imported folder": (kill.JOBS["import"], 4_000),
    "scores": (kill.Job([f"{SCORE} --out {OUT}/scores.json"]), 700),
    "a page": (kill.Job([f"eval_hallu.py compare pope.a.jsonl pope.b.jsonl --out {OUT}/page.html"]), 2_000)}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_said_and_the_next_call_ends_as_an_undisturbed_one(folder, tmp_path, what):
    job, most = FULL[what]
    log = tmp_path / "log"
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.chdir(folder / "world"):
        kill.prepare(job)
        assert kill.undisturbed(job, log)[1] == 0, log.read_text()
        wanted = kill.contents()
        kill.prepare(job)
        log.unlink()
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
        try:
            _, code = kill.undisturbed(job, log)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        said = log.read_text()
        assert code == 1 and "Traceback" not in said and re.search("File too large", said), said
        assert kill.undisturbed(job, log)[1] == 0, log.read_text()
        assert kill.contents() == wanted and not kill.writing()


PLACES = [f"train_dpo.py {fuzz_world.TRAIN} --out", "lora.py merge --model llava15 --adapter adapter --out",
          "model.import_checkpoint bunny", f"{SCORE} --out", f"synth.py prompts {fuzz_world.SYNTH} --out",
          "eval_hallu.py compare pope.a.jsonl pope.b.jsonl --out"]


@pytest.mark.parametrize("words", PLACES, ids=lambda words: words.split()[0])
@pytest.mark.parametrize("place", ["lines.jsonl/out/x", "/proc/out/x", "/dev/null", "x" * 300 + "/x"])
def test_a_place_where_nothing_can_be_written_is_said(folder, words, place):
    """Under a file, in a folder of the system's, a device, an overlong name."""
    with contextlib.chdir(folder / "world"):
        Path("lines.jsonl").write_text("")
        code, error, printed = fuzz_case.command([*words.split(), place])
    assert error is None and isinstance(code, str) and len(code.splitlines()) == 1, (code, error)
