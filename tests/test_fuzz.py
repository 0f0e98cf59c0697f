"""Spoiled inputs and kills: each ends with the right result or with a sentence. See fuzz.py and kill.py."""
import contextlib
import os
import tempfile
from collections import Counter
from pathlib import Path

import fuzz
import fuzz_kinds
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
    assert not [row[:5] for row in spoiled if row[2] == "fault" and not fuzz.is_known(row[0], row[4])], \
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
