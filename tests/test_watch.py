"""A run that is watched: its page, the answers as it trains, the best weights, an early end."""
import json
import os
import re
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, write_llava
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
    said, = summary["remarks"]
    assert said == "8 of 9 steps were taken; the weights are those of step 4, the best by loss"
    assert said in text
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
    said, = summary["remarks"]
    assert said == "9 of 9 steps were taken; the weights are those of step 4, the best by margin"


@pytest.mark.parametrize("more, words", [
    (("--set", "keep=best"), "they need --eval_every N and keep=best"),
    (("--eval_every", "2", "--set", "patience=1"), "they need --eval_every N and keep=best"),
    (("--eval_every", "2", "--set", "keep=best:chair"), "needs a number of the evaluations (loss, margin"),
    (("--set", "track=mlflow"), "give one of wandb, tensorboard")])
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
    assert re.search(r"2 of 2 steps were taken; the weights are those of step \d, the best by cover", text)
    said = {line["evaluation"]: line["answers"] for line in lines_of(tmp_path / "run") if "answers" in line}
    assert list(said) == ["before", "step-1", "step-2", "after"]
    for lines in said.values():
        assert len(lines) == 6 and {line["kind"] for line in lines} == {"caption"}
    html = (tmp_path / "run" / "report.html").read_text()
    assert Page(html).tags.count("img") == 6
    assert [html.count(f"<dt>{name}</dt>") for name in said] == [6] * 4


# ---- wandb, tensorboard ----
WANTED = {"train/loss", "train/learning_rate", "train/rewards/chosen", "train/rewards/margins", "eval/loss"}


def tracked(world, out, kind):
    """The options of a run that is tracked; its steps are a program's: only those end as they should."""
    pytest.importorskip(kind, reason=f"{kind} is not installed: --set track={kind} is tested where it is")
    argv = watched(world, out, "--eval_every", "4", "--max_steps", "5", "--set", f"track={kind}")
    done = subprocess.run([sys.executable, ROOT / "train_dpo.py", *argv], capture_output=True, text=True,
                          env={**os.environ, "WANDB_MODE": "offline"})
    assert done.returncode == 0, done.stderr
    return log_of(out)[1]


def test_tensorboard_gets_trls_names_and_the_logs_numbers(world, tmp_path):
    steps = tracked(world, tmp_path / "run", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert {*found.Tags()["scalars"]} >= WANTED
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in steps]
    assert [event.step for event in found.Scalars("eval/loss")] == [4]


def test_wandb_gets_them_too_without_a_network(world, tmp_path):
    tracked(world, tmp_path / "run", "wandb")
    file, = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert [name for name in WANTED if name.encode() not in content] == []


def test_a_tracker_that_is_not_installed_is_named_with_how_to_install_it(world, tmp_path, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"no {name}")
    monkeypatch.setattr("training.options.version", absent)
    code, text = run(watched(world, tmp_path / "run", "--set", "track=wandb"))
    assert code == 1 and "needs a package (no wandb); pip install wandb" in text and "Traceback" not in text
