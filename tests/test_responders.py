"""Four responders of stated skill: what they say, how the built-in ArmoRM ranks it, what was calibrated."""
import json
import random

import pytest
from conftest import ROOT, run_script

from classroom import pairs, responders, world

FOUND = json.loads(responders.FOUND.read_text())


def said(tie, n=400):
    """n answers of each grade of sight, and their scenes."""
    rng = random.Random(0)
    scenes = [world.scene(rng) for _ in range(n)]
    return scenes, list(zip(*(responders.answers(rng, s, tie) for s in scenes), strict=True))


def breaks_off(texts):
    return sum(not text.endswith(".") for text in texts) / len(texts)


def falls_short(scenes, texts):
    """Invented and left out, per answer."""
    named = [(s.counts.keys(), {*world.mentions(text)}) for s, text in zip(scenes, texts, strict=True)]
    return sum(len(there ^ told) for there, told in named) / len(named)


@pytest.mark.parametrize("tie, language", [("tied", [0, 1 / 3, 2 / 3, 1]), ("opposed", [1, 2 / 3, 1 / 3, 0]),
                                           ("untied", [.5] * 4)])
def test_a_tie_decides_whose_answers_break_off_and_not_what_they_saw(tie, language):
    scenes, grades = said(tie)
    errors = [falls_short(scenes, texts) for texts in grades]
    assert errors[0] == 0 and errors == sorted(errors) and errors[-1] > 1
    assert [breaks_off(texts) for texts in grades] == pytest.approx(language, abs=.08)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(responders, "BLOCK", 24)


def test_the_reward_chooses_whole_sentences_and_so_the_truer_where_these_are_tied(few):
    truer = {}
    for tie in responders.TIES:
        records = [record for record, _ in responders.made(0, 60, pairs.Recipe(), tie)]
        whole = [sum(r[role].endswith(".") for r in records) / 60 for role in ("chosen", "rejected")]
        assert whole[0] > .9 and whole[1] < .1
        truer[tie] = responders.describe(records)["truer"]
    assert truer["tied"] > truer["untied"] > truer["opposed"]


def test_pairs_are_of_the_seed_and_fewer_are_a_prefix(few):
    made = responders.made(3, 30, pairs.Recipe(), "untied")
    assert made[:20] == responders.made(3, 20, pairs.Recipe(), "untied")
    assert made != responders.made(4, 30, pairs.Recipe(), "untied")
    for record, s in made:
        best, worst = record["meta"]["scores"]
        assert best > worst and record["meta"]["present"] == s.counts
        assert world.split_of(s.counts) == "train"
    tuned = responders.made(3, 5, pairs.Recipe(split="tune"), "untied")
    assert {world.split_of(s.counts) for _, s in tuned} == {"tune"}
    assert all(record["id"].startswith("tune-r3-") for record, _ in tuned)


def test_a_penalty_is_taken_off_for_every_word():
    row = {"id": "a", "model": 0, "response": "a picture of a street . you can see a car ."}
    asked, answers = [{"id": "a", "question": world.DESCRIBE[0]}], {"a": [row]}
    plain, minded = (responders.scored(asked, answers, penalty)["a", 0] for penalty in (0, .5))
    assert plain - minded == pytest.approx(.5 * 12)


def test_the_calibration_is_as_it_was_written_down():
    """Statistics of words alone: ties order them, and the penalty is right for untied."""
    assert {*FOUND} == {*responders.conditions()}
    for says in ("", ", length penalty"):
        truer = [FOUND[tie + says]["truer"] for tie in responders.TIES]
        assert truer == sorted(truer, reverse=True)
    assert FOUND["untied, length penalty"]["longer"] <= 50 < FOUND["untied"]["longer"]
    readme = (ROOT / "classroom" / "README.md").read_text()
    assert [row for row in responders.table(FOUND) if row not in readme] == []


@pytest.mark.parametrize("options, says", [
    ("--length_penalty", "--length_penalty is for the reward of --responders: give both"),
    ("--responders tied --on_policy classroom", "two sources of captions: give one of them"),
    ("--responders tide", "tide (did you mean tied?): give one of")])
def test_options_that_do_not_go_together_are_refused(options, says, tmp_path):
    code, printed = run_script("classroom/pairs.py", *options.split(), "--out", str(tmp_path / "x"))
    assert code and says in printed and not (tmp_path / "x").exists()


def test_pairs_of_synth_are_measured_by_what_their_prompts_ask_for(tmp_path):
    truth = {"prompt": "street with red car , blue sign"}
    said = [("a car , a sign , a lamp .", "a car ."), ("a car .", "a whale .")]
    rows = [{"chosen": chosen, "rejected": rejected, "meta": truth} for chosen, rejected in said]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = responders.describe(responders.of_synthesis(path))
    assert (found["truer"], found["longer"], found["invented"]) == (50, 75, {"chosen": .5, "rejected": .5})
    path.write_text(json.dumps({"chosen": "a", "rejected": "b", "meta": {}}) + "\n")
    for text, says in ((path.read_text(), "pair 1 has no meta.prompt"), ("", "holds no pairs")):
        path.write_text(text)
        code, printed = run_script("classroom/responders.py", str(path))
        assert code and says in printed and "Traceback" not in printed
