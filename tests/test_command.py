"""command.py as specification: a dataclass is the command line, one run in a folder, work resumes, ranks."""
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT, run_script

import data
from model import command
from model.command import Ranks, Store, behind_set, option


@dataclass(frozen=True)
class Options:
    preset: str = option("plain", "a set of defaults")
    out: str = option("", "the folder (50% of it)")
    n: int = option(3, "how many", off="--none")
    rate: float = option(0.5, "how fast")
    fast: bool = option(False, "in a hurry")
    kind: str = option("a", "which", choices=("a", "b"))
    size: float = option(1.0, "how large", above=0)
    depth: int = option(0, "how deep", at_least=0)
    shares: tuple = behind_set((1.0, 2.5), "of the parts")
    deep: bool = behind_set(True, "all the way down, a text of more words than one line holds: it is folded")


def parsed(*argv, positional=()):
    return command.parse(Options, argv, "prog.py", "What it does.", positional)


# ---- options ----

def test_only_what_was_given_is_returned_with_its_type():
    assert parsed() == ({}, {})
    chosen, _ = parsed("--out", "x", "--n", "7", "--rate", "2", "--fast", "--kind", "b",
                       "--set", "shares=3,4", "--set", "deep=false")
    assert chosen == {"out": "x", "n": 7, "rate": 2.0, "fast": True, "kind": "b", "shares": (3.0, 4.0),
                      "deep": False}
    assert Options(**chosen).n == 7 and Options().shares == (1.0, 2.5)
    assert parsed("--set", "n=3")[0] == {"n": 3}                  # an option of its own name, too
    assert parsed("--no-fast", "--none")[0] == {"fast": False, "n": 0}
    stages = [("stage", ("all", "one"), "all", "which stage")]
    assert parsed("one", "--n", "1", positional=stages) == ({"n": 1}, {"stage": "one"})
    assert parsed(positional=stages) == ({}, {"stage": "all"})


@pytest.mark.parametrize("argv, words", [
    (["--n", "three"], "--n three: 'three' is not a whole number"),
    (["--rate", "fast"], "--rate fast: 'fast' is not a number"),
    (["--kind", "c"], "--kind c: give one of a, b"),
    (["--size", "0"], "--size 0: it must be a number above 0"), (["--size", "nan"], "--size nan: .*above 0"),
    (["--depth", "-1"], "--depth -1: it must not be below 0"),
    (["--set", "deep=maybe"], "--set deep=maybe: 'maybe' is not true or false"),
    (["--set", "shares=1,x"], "is not numbers with commas"),
    (["--set", "deep"], "give KEY=VALUE with KEY one of shares, deep"),
    (["--set", "absent=3"], "--set absent=3: give KEY=VALUE"),
    (["--set", "share=3,4"], r"--set share=3,4 \(did you mean shares\?\): give KEY=VALUE")])
def test_a_bad_value_is_refused_with_what_was_written_and_what_it_should_be(argv, words):
    with pytest.raises(data.UserError, match=words):
        parsed(*argv)


@pytest.mark.parametrize("words, says", [
    ("train_dpo.py --los dpo", "train_dpo.py: there is no --los (did you mean --loss?); see --help"),
    ("train_dpo.py --los=dpo", "train_dpo.py: there is no --los (did you mean --loss?); see --help"),
    ("train_dpo.py --loss dpo+mdop", "loss 'mdop' is not in losses.py (did you mean mdpo?): give a sum"),
    ("train_dpo.py --preset clasroom", "--preset clasroom (did you mean classroom?): give one of"),
    ("train_dpo.py --set scene=3", "--set scene=3 (did you mean scenes?): give KEY=VALUE "),
    ("train_dpo.py --image_rejected croop", "--image_rejected croop (did you mean crop?): give one of"),
    ("eval_hallu.py answer pope", "step: answer (did you mean answers?): give one of score, answers"),
    ("eval_hallu.py score amberr", "amberr (did you mean amber?): give one of classroom, pope, amber"),
    ("eval_hallu.py score pope --answer a", "score pope: there is no --answer (did you mean --answers?)"),
    ("eval_hallu.py score chair --scorer x", "argument --scorer: x: give one of original, objhal"),
    ("synth.py imges", "argument stage: imges (did you mean images?): give one of all, prompts, images"),
    ("lora.py merg", "lora.py: argument command: merg (did you mean merge?): give one of merge"),
    ("lora.py merge --adaptor A", "there is no --adaptor (did you mean --adapter?)")])
def test_a_mistyped_word_is_refused_with_the_likely_one(words, says):
    script, *arguments = words.split()
    code, said = run_script(ROOT / script, *arguments)
    assert code == 1 and says in said and said.count("\n") == 1, said


@pytest.mark.parametrize("argv", [["--lose", "x"], ["--fas"], ["--n"]])
def test_an_unknown_or_shortened_option_is_refused_in_a_sentence(argv):
    with pytest.raises(SystemExit, match="prog.py: .*; see --help"):
        parsed(*argv)


def test_help_has_a_text_for_every_field_and_fits_80_columns(capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed("--help")
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and max(map(len, said.splitlines())) <= 80
    for words in ("how many [3]", "the folder (50% of it) [none]", "in a hurry [false]", "--out TEXT",
                  "--none", "shares=1,2.5: of the parts", "deep=true: all the way down", "--set KEY=VALUE"):
        assert words in said
    with pytest.raises(TypeError):                                # a field cannot be without its text
        option(3)


def test_presets_are_defaults_below_the_command_line():
    from training import options
    o = options.parse(["--preset", "mdpo-llava", "--model", "M", "--data", "D", "--batch", "5"], "")
    assert (o.batch, o.lr, o.preset) == (5, options.PRESETS["mdpo-llava"]["lr"], "mdpo-llava")
    assert {*options.NAMES.split(", ")} == options.PRESETS.keys()
    with pytest.raises(data.UserError, match="--preset slow: give one of classroom, "):
        options.parse(["--preset", "slow"], "")


# ---- the folder ----

def test_a_folder_is_claimed_once_and_free_again_when_the_run_ends(tmp_path):
    lock = command.claim(tmp_path / "deep" / "run")
    code = f"from model import command; command.claim({str(tmp_path / 'deep' / 'run')!r})"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode and "in use by another run" in other.stderr
    lock.close()
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(data.UserError, match="cannot be written"):
        command.claim(tmp_path / "file")


# ---- work that resumes ----

def items(n, version=""):
    return [{"id": f"i{k}", "hash": f"h{k}{version}", "_private": k} for k in range(n)]


def squares(groups, made=None):
    for group in groups:
        if made is not None:
            made.extend(item["id"] for item in group)
        yield [{"square": item["_private"] ** 2} for item in group]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_made_is_kept_and_only_what_changed_is_made_again(tmp_path):
    path, made = tmp_path / "squares.jsonl", []
    rows = Store(path).work(items(5), lambda groups: squares(groups, made), size=2)
    assert rows == lines(path) == [{"id": f"i{k}", "hash": f"h{k}", "square": k * k} for k in range(5)]
    assert made == [f"i{k}" for k in range(5)] and os.listdir(tmp_path) == ["squares.jsonl"]
    before, made[:] = path.read_bytes(), []
    assert Store(path).work(items(5), lambda groups: squares(groups, made), size=2) == rows
    assert made == [] and path.read_bytes() == before
    changed = [*items(4), items(5, "new")[4]]
    Store(path).work(changed, lambda groups: squares(groups, made), size=2)
    assert made == ["i4"] and [row["hash"] for row in lines(path)] == ["h0", "h1", "h2", "h3", "h4new"]


def test_an_item_that_failed_is_left_out_and_tried_again(tmp_path):
    path = tmp_path / "squares.jsonl"

    def some(groups):
        for rows in squares(groups):
            yield [None if row["square"] == 4 else row for row in rows]
    assert [row["id"] for row in Store(path).work(items(4), some)] == ["i0", "i1", "i3"]
    assert [row["id"] for row in Store(path).work(items(4), squares)] == ["i0", "i1", "i2", "i3"]
    assert [row["id"] for row in lines(path)] == ["i0", "i1", "i2", "i3"]


def test_killed_with_a_torn_line_it_goes_on_in_the_same_groups_to_the_same_bytes(tmp_path):
    whole, path = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    head = {"settings": {"model": "m"}}
    Store(whole, head=head).work(items(7), squares, size=2)
    store, groups = Store(path, head=head), []

    def killed(some):
        for number, rows in enumerate(squares(some)):
            if number == 2:
                raise KeyboardInterrupt
            yield rows
    with pytest.raises(KeyboardInterrupt):
        store.work(items(7), killed, size=2)
    with open(tmp_path / "killed.jsonl.rank0", "a") as part:
        part.write('{"rows": [{"id": "i4", "ha')                  # the line that the kill tore

    def seen(some):
        groups.extend([item["id"] for item in group] for group in some)
        return squares(some)
    Store(path, head=head).work(items(7), seen, size=2)
    assert groups == [["i4", "i5"], ["i6"]]
    assert path.read_bytes() == whole.read_bytes() and not store.parts()


@pytest.mark.parametrize("left", ["", '{"settings": {"mod'])
def test_a_part_without_its_first_line_gets_it(tmp_path, left):
    """A full disk, or a kill, came between the file and its first line."""
    store = Store(tmp_path / "answers.jsonl", head={"settings": {"model": "m"}})
    (tmp_path / "answers.jsonl.rank0").write_text(left)
    rows = store.work(items(3), squares)
    assert lines(store.path)[0] == store.head and lines(store.path)[1:] == rows


def test_a_file_begun_with_other_settings_is_refused_and_what_differs_named(tmp_path):
    path = tmp_path / "answers.jsonl"
    Store(path, head={"settings": {"model": "a", "seed": 1}}).work(items(2), squares)
    before = path.read_bytes()
    with pytest.raises(data.UserError, match=r"other settings: model \(a, now b\); give another --out"):
        Store(path, head={"settings": {"model": "b", "seed": 1}}).work(items(2), squares)
    assert path.read_bytes() == before


@pytest.mark.parametrize("head", [{}, {"settings": "m"}, {"id": "i0"}])
def test_a_file_without_settings_is_refused(tmp_path, head):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(head) + "\n")
    with pytest.raises(data.UserError, match=r"answers.jsonl is damaged or has no settings \(.*\); del"):
        Store(path, head={"settings": {"model": "m"}}).work(items(2), squares)


def test_a_line_may_have_a_shape_of_its_own(tmp_path):
    shaped = Store(tmp_path / "short.jsonl", shape=lambda row: {"square": row["square"]})
    shaped.work(items(2), squares)
    assert lines(tmp_path / "short.jsonl") == [{"square": 0}, {"square": 1}]


def rank(number, port, folder, work):
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = command.join("cpu")
    work(ranks, folder)
    command.leave(ranks)


def both(work, folder):
    """work(ranks, folder) on two gloo ranks; their exit codes."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    fork = multiprocessing.get_context("fork").Process
    processes = [fork(target=rank, args=(k, port, folder, work)) for k in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def test_two_ranks_make_a_half_each_and_end_with_the_bytes_of_one(tmp_path):
    def work(ranks, folder):
        made = []
        rows = Store(folder / "two.jsonl", ranks).work(items(7), lambda some: squares(some, made), size=2)
        (folder / f"made{ranks.rank}").write_text(" ".join(made))
        assert [row["id"] for row in rows] == [f"i{k}" for k in range(7)]
    assert both(work, tmp_path) == [0, 0]
    Store(tmp_path / "one.jsonl").work(items(7), squares, size=2)
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert [(tmp_path / f"made{k}").read_text() for k in range(2)] == ["i0 i1 i4 i5", "i2 i3 i6"]
    assert not list(tmp_path.glob("*.rank*"))


def test_parts_that_two_ranks_left_are_taken_up_by_one(tmp_path):
    path, made = tmp_path / "squares.jsonl", []
    for number, group in enumerate((items(4)[:2], items(4)[2:3])):
        Store(path, Ranks(number, 2)).add([{**x, "square": x["_private"] ** 2} for x in group])
    Store(path).work(items(4), lambda some: squares(some, made), size=2)
    assert made == ["i2", "i3"] and [row["square"] for row in lines(path)] == [0, 1, 4, 9]
    assert not list(tmp_path.glob("*.rank*"))


# ---- ranks ----

def test_what_rank_0_finds_all_find_and_its_mistake_ends_all(tmp_path):
    def work(ranks, folder):
        assert ranks.first(lambda: ranks.rank + 5) == 5 and ranks.gather(ranks.rank * 2) == [0, 2]

        def mistake():
            raise data.UserError("a sentence")
        try:
            ranks.first(mistake)
        except data.UserError as error:
            (folder / "said").write_text(f"{ranks.rank} {error}")
        except SystemExit:
            (folder / "left").write_text(str(ranks.rank))
    assert both(work, tmp_path) == [0, 0]
    assert (tmp_path / "said").read_text() == "0 a sentence" and (tmp_path / "left").read_text() == "1"


def test_one_process_is_rank_0_of_1(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks = command.join("cpu")
    assert (ranks.rank, ranks.world, str(ranks.device)) == (0, 1, "cpu")
    ranks.barrier()
    assert ranks.gather("x") == ["x"] and ranks.first(lambda: 3) == 3
