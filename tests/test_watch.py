"""A run that is watched: its page, the answers as it trains, the best weights, an early end."""
import json
import os
import re
import signal
from functools import partial

import pytest
import torch
from conftest import write_llava
from safetensors.torch import load_file
from test_report import Page
from test_train_dpo import adapter, arguments, kill_at, lines_of, log_of, run, trained, write_pairs

import lora
import train_dpo
from training import report

LOSSES = {"before": 3., "step-2": 2., "step-4": 1., "step-6": 1.5, "step-8": 1.25, "step-9": 1.75,
          "after": 1.}
KEEP = ("--eval_every", "2", "--set", "save_every=4", "--set", "keep=best")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(model folder, pairs): a tiny random LLaVA and twelve pairs; 9 steps of 4 pairs in 3 epochs."""
    folder = tmp_path_factory.mktemp("world")
    return write_llava(folder / "model"), write_pairs(folder)


def watched(world, out, *more):
    return arguments(world, out, "--val_data", str(world[1]), "--set", "look=0", "--set", "max_new_tokens=4",
                     *more)


def scored(then=lambda: None):
    """Evaluations find LOSSES instead of what they measure; then: what else is to break."""
    train_dpo.validate = lambda run, name: {"loss": LOSSES[name], "margin": -LOSSES[name], "n": 12}
    then()


def stopped_at(world, out, step, ranks):
    """The adapter's tensors in the checkpoint of a run without keep=best that ended after a step."""
    code, _ = run(arguments(world, out, "--set", f"save_every={step}"), kill_at(step + 1), ranks)
    assert code == -signal.SIGKILL
    tensors = load_file(out / "last" / "checkpoint.safetensors")
    return {name.removeprefix("weight/"): x.T for name, x in tensors.items() if name.startswith("weight/")}


def kill_before_it_is_saved():
    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)
    lora.save = kill


@pytest.mark.parametrize("ranks", [1, 2])
def test_keep_best_and_patience_end_with_the_weights_of_a_run_stopped_there_however_often_killed(
        world, tmp_path, ranks):
    """Step 4 is the best, the two evaluations after it are no better; killed in step 7, and at the end."""
    argv = watched(world, tmp_path / "run", *KEEP, "--set", "patience=2")
    for breaks in (kill_at(7), kill_before_it_is_saved):
        assert run(argv, partial(scored, breaks), ranks)[0] == -signal.SIGKILL
    text = trained(argv, scored, ranks)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["remarks"] == ["8 of 9 steps; kept: 4, best loss"] and summary["remarks"][0] in text
    assert summary["steps"] == len(log_of(tmp_path / "run")[1]) == 8
    found = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    wanted = stopped_at(world, tmp_path / "plain", 4, ranks)
    assert len(found) == len(wanted)
    for name, x in wanted.items():
        assert torch.equal(found[f"base_model.model.{name}.weight"], x), name


def test_of_another_number_more_is_better_and_the_last_step_counts_too(world, tmp_path):
    trained(watched(world, tmp_path / "run", *KEEP[:-1], "keep=best:margin"), scored)
    assert (tmp_path / "run" / "step-9.json").exists()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["remarks"] == ["9 of 9 steps; kept: 4, best margin"]


@pytest.mark.parametrize("more, words", [
    (("--set", "keep=best"), "they need --eval_every N and keep=best"),
    (("--eval_every", "2", "--set", "patience=1"), "they need --eval_every N and keep=best"),
    (("--eval_every", "2", "--set", "keep=best:chair"), "needs a number of the evaluations (loss, margin")])
def test_what_cannot_be_kept_is_refused_in_one_sentence(world, tmp_path, more, words):
    code, text = run(watched(world, tmp_path / "run", *more))
    assert code == 1 and words in text.strip().splitlines()[-1] and "Traceback" not in text


def keep_pages():
    """Every page that a run writes is copied beside it."""
    write = report.write
    def copied(out):
        page = write(out)
        names = [file for file in out.iterdir() if file.name.startswith("page-")]
        (out / f"page-{len(names)}.html").write_bytes(page.read_bytes())
        return page
    report.write = copied


def test_the_page_is_written_at_every_evaluation_and_refreshes_itself_until_the_end(world, tmp_path):
    out = tmp_path / "run"
    trained(watched(world, out, "--eval_every", "4"), keep_pages)
    pages = [(out / f"page-{n}.html").read_text() for n in range(4)]       # before, step 4, step 8, after
    assert [len(re.findall('http-equiv="refresh"', html)) for html in pages] == [1, 1, 1, 0]
    assert not (out / "page-4.html").exists() and pages[-1] == (out / "report.html").read_text()
    for n, html in enumerate(pages):
        seen = Page(html)
        assert seen.open == [] and html.endswith("</html>\n") and ("not finished" in seen.text) == (n < 3)
        assert ("Evaluations" in seen.text) == (n > 0) and seen.text.count("what is this ?") == 6
    said = {line["evaluation"]: line for line in lines_of(out) if "evaluation" in line}
    assert list(said) == ["before", "step-4", "step-8", "after"]
    for name, line in said.items():
        assert [answer["id"] for answer in line["answers"]] == [f"pair-{i}" for i in range(6)]
        assert all(isinstance(answer["answer"], str) for answer in line["answers"])
        assert ("eval" in line) == name.startswith("step")
    assert "<dt>step-4</dt>" in pages[-1] and pages[-1].count("<img") == 6
    trained(arguments(world, tmp_path / "alone"))
    assert adapter(out) == adapter(tmp_path / "alone")                 # to be watched moves no bit


def test_without_held_out_pairs_those_of_training_are_asked_if_one_image_and_no_turn_before_ask_them(
        world, tmp_path):
    rows = [json.loads(line) for line in world[1].read_text().splitlines()]
    rows[0] |= {"image": None}
    rows[1] |= {"history": [["what is there ?", "a dog"]]}
    path = world[1].with_name("odd.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained(arguments((world[0], path), tmp_path / "run", "--eval_every", "4", "--max_steps", "5",
                      "--set", "max_new_tokens=4"))
    line = next(line for line in lines_of(tmp_path / "run") if line.get("evaluation") == "step-4")
    assert [answer["id"] for answer in line["answers"]] == [f"pair-{i}" for i in range(2, 8)]


def test_the_classroom_shows_its_first_captions_and_marks_what_is_invented(tmp_path):
    fields = ("pairs=16", "scenes=8", "questions=8", "look=0", "max_new_tokens=24", "keep=best:cover")
    argv = ["--max_steps", "2", "--batch", "8", "--eval_every", "1", "--out", str(tmp_path / "run"),
            *(x for field in fields for x in ("--set", field))]
    text = trained(argv)
    assert re.search(r"2 of 2 steps; kept: \d, best cover", text)
    said = {line["evaluation"]: line["answers"] for line in lines_of(tmp_path / "run") if "answers" in line}
    assert list(said) == ["before", "step-1", "step-2", "after"]
    for lines in said.values():
        assert len(lines) == 6 and {line["kind"] for line in lines} == {"caption"}
    html = (tmp_path / "run" / "report.html").read_text()
    assert Page(html).tags.count("img") == 6
    assert [html.count(f"<dt>{name}</dt>") for name in said] == [6] * 4
