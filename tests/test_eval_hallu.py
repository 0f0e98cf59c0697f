"""eval_hallu.py: answers that survive a kill, scores without a model."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_llava
from PIL import Image

import data
import eval_hallu
import metrics

WORDS = ["dog", "cat"]


def write_scenes(folder, n=10):
    """n images, each with a caption to write and a question."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(n):
        Image.new("RGB", (28, 28), (25 * i, 255 - 25 * i, 90)).save(folder / "images" / f"{i}.png")
        image = f"images/{i}.png"
        lines.append({"id": f"{i}-0", "image": image, "question": "what is this ?", "kind": "caption",
                      "truth": {"present": [WORDS[i % 2]], "absent": [WORDS[1 - i % 2]]}})
        lines.append({"id": f"{i}-1", "image": image, "question": "is there a dog ?", "kind": "existence",
                      "truth": {"answer": "no" if i % 2 else "yes", "choices": ["yes", "no"],
                                "set": "random"}})
    (folder / "scenes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "scenes.jsonl", lines


@pytest.fixture(scope="module")
def m(tmp_path_factory):
    import vlm
    return vlm.load(write_llava(tmp_path_factory.mktemp("model")))


def answer(m, scenes, out, **more):
    more = {"batch_size": 3, "max_new_tokens": 6, "progress": False, **more}
    eval_hallu.answer_scenes(m, scenes, out, **more)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_answers_are_the_scenes_in_order_with_the_settings_first(m, tmp_path):
    scenes, lines = write_scenes(tmp_path / "scenes")
    first, *answers = answer(m, scenes, tmp_path / "answers.jsonl")
    known = {"max_new_tokens": 6, "decoding": "greedy", "benchmark": "classroom", "questions": 20,
             "adapter": None, "scenes": "scenes/scenes.jsonl"}
    assert first["settings"] | known == first["settings"]
    assert [{k: v for k, v in a.items() if k != "answer"} for a in answers] == lines
    assert any(a["answer"] for a in answers)
    assert eval_hallu.score_classroom(tmp_path / "answers.jsonl") == metrics.classroom(answers)


def test_a_killed_run_continues_and_ends_with_the_same_file(m, tmp_path, monkeypatch):
    scenes, _ = write_scenes(tmp_path / "scenes")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    answer(m, scenes, whole)
    import vlm
    asked, generate = [], vlm.generate
    monkeypatch.setattr(vlm, "generate", lambda m, i, questions, **k: asked.append(len(questions))
                        or generate(m, i, questions, **k))
    for cut in (10, 700, 1500, len(whole.read_bytes()) - 3):                  # torn settings, torn lines
        asked.clear()
        out.write_bytes(whole.read_bytes()[:cut])
        answer(m, scenes, out)
        assert out.read_bytes() == whole.read_bytes()
    assert asked == [2]                                                  # the last batch once more
    answer(m, scenes, out)
    assert asked == [2]                                                  # nothing is left to do


def test_other_settings_or_questions_are_refused_and_named(m, tmp_path):
    import lora
    scenes, _ = write_scenes(tmp_path / "scenes")
    out = tmp_path / "answers.jsonl"
    answer(m, scenes, out)
    before = out.read_bytes()
    with pytest.raises(data.UserError, match=r"answers.jsonl.*max_new_tokens \(6, now 7\); give"):
        answer(m, scenes, out, max_new_tokens=7)
    scenes.write_text(scenes.read_text().replace("is there a dog ?", "is there a cat ?"))
    with pytest.raises(data.UserError, match="scenes_sha256"):
        answer(m, scenes, out)
    write_scenes(tmp_path / "again" / "scenes")
    import vlm
    other = vlm.load(m.folder)
    lora.add_lora(other.model, 2, 4)
    with pytest.raises(data.UserError, match="adapter"):
        answer(other, tmp_path / "again" / "scenes", out)
    out.write_text('{"id": 1}\n')
    with pytest.raises(data.UserError, match="no settings"):
        answer(m, scenes, out)
    assert before


@pytest.mark.parametrize("change, says", [
    ({"image": "../secret.png"}, "leaves the folder"),
    ({"image": None}, "line 1 lacks"),
    ({"kind": "attribute"}, "line 1.*choices"),
    ({"image": "images/none.png"}, "none.png is missing"),
])
def test_faulty_scenes_are_refused(m, tmp_path, change, says):
    scenes, (first, *_) = write_scenes(tmp_path / "scenes", 1)
    scenes.write_text(json.dumps({**first, **change}) + "\n")
    with pytest.raises((data.UserError, metrics.AnswerError), match=says):
        answer(m, scenes, tmp_path / "answers.jsonl")


def run(*arguments):
    done = subprocess.run([sys.executable, ROOT / "eval_hallu.py", *map(str, arguments)],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    return done.returncode, done.stdout, done.stderr


def test_score_by_hand(tmp_path):
    _, lines = write_scenes(tmp_path / "scenes", 2)
    said = ["there is a dog and a cat", "yes", "a cat", "what ?"]
    answers = tmp_path / "answers.jsonl"
    lines = [line | {"answer": text} for line, text in zip(lines, said, strict=True)]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = run("score", "classroom", "--answers", answers, "--out", tmp_path / "scores.json")
    assert (code, err) == (0, "")
    assert "CHAIR_s, lower is better           50.0     0.0 to 100.0" in out and "1 of them unreadable" in out
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["chair_s"], scores["cover"], scores["pope_random_acc"]) == (50, 100, 50)
    assert scores["pope_adversarial_acc"] is None and scores["by_kind"]["existence"]["n"] == 2
    items = [json.loads(line) for line in (tmp_path / "scores.items.jsonl").read_text().splitlines()]
    assert items[0]["hallucinated"] == ["cat"] and items[0]["sums"]["chair_i"] == [1, 2]
    assert items[3] == {"id": "1-1", "kind": "existence", "answer": "what ?", "hallucinated": [],
                        "sums": {"existence": [0, 1], "pope_random_acc": [0, 1], "pope_random_f1": [0, 0]}}


def test_score_refuses_an_unfinished_file(m, tmp_path):
    scenes, _ = write_scenes(tmp_path / "scenes")
    out = tmp_path / "answers.jsonl"
    answer(m, scenes, out)
    out.write_text(out.read_text()[:-5])                                       # killed within the last line
    code, _, err = run("score", "classroom", "--answers", out, "--out", tmp_path / "scores.json")
    assert code == 1 and "19 of 20" in err and err.count("\n") == 1
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("arguments, says", [
    (["score", "pope"], "pope"),                                              # offered once it exists
    (["answers", "classroom", "--model", "m", "--data", "d", "--out", "o", "--batch_size=0"], "batch_size"),
    (["score", "classroom", "--nonsense"], "score"),
    (["score", "classroom", "--answers", "none.jsonl", "--out", "o.json"], "none.jsonl"),
    (["answers", "classroom", "--model", "nowhere", "--data", "d", "--out", "o"], "nowhere"),
])
def test_mistakes_exit_1_with_a_sentence(arguments, says):
    code, _, err = run(*arguments)
    assert code == 1 and says in err and "Traceback" not in err


def test_help_and_score_load_no_model_code():
    code = "import sys, eval_hallu; print({'transformers', 'vlm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_command_line_answers_a_folder_of_scenes(m, tmp_path):
    write_scenes(tmp_path / "scenes", 2)
    out = tmp_path / "answers.jsonl"
    code, _, err = run("answers", "classroom", "--model", m.folder, "--data", tmp_path / "scenes",
                       "--out", out, "--max_new_tokens", 4)
    assert code == 0, err
    assert len(out.read_text().splitlines()) == 5
    assert run("score", "classroom", "--answers", out, "--out", tmp_path / "scores.json")[0] == 0


def test_word_rewards_are_zero_at_init_and_add_up_to_the_answer(m, tmp_path):
    """beta (policy - reference), word by word, on the true and on another image of the run's own scenes."""
    import torch

    import lora
    import vlm
    scenes, _ = write_scenes(tmp_path / "scenes")
    policy = vlm.load(m.folder)
    lora.add_lora(policy.model, 2, 4)
    for name in ("before", "after"):
        answer(policy, scenes, tmp_path / f"{name}.jsonl")
    words = eval_hallu.word_rewards(policy, tmp_path, 0.1)
    assert 0 < len(words) <= 4 and all(abs(w["true"]) < 1e-6 for entry in words for w in entry["words"])
    torch.manual_seed(0)
    for weight in lora.lora_parameters(policy.model).values():
        weight.data.normal_(std=.1)
    words = eval_hallu.word_rewards(policy, tmp_path, 0.1)
    for entry in words:
        assert " ".join(w["word"] for w in entry["words"]).split() == entry["answer_after"].split()
        assert entry["image"] != entry["other_image"] and (tmp_path / entry["other_image"]).exists()
    assert any(w["true"] != w["other"] for entry in words for w in entry["words"])


@pytest.mark.skipif(not Path(ROOT, "classroom", "models", "base0", "config.json").exists(),
                    reason="the classroom's model has not been made: python classroom/make.py")
def test_the_classroom_model_looks(tmp_path):
    """The shipped base on fresh scenes: it hallucinates often, and sees what is there."""
    import vlm
    subprocess.run([sys.executable, ROOT / "classroom" / "pairs.py", "scenes", "--seed", "3", "--n", "60",
                    "--questions", "60", "--split", "tune", "--out", tmp_path], check=True)
    eval_hallu.answer_scenes(vlm.load("classroom"), tmp_path, tmp_path / "answers.jsonl", progress=False)
    scores = eval_hallu.score_classroom(tmp_path / "answers.jsonl")
    assert 25 < scores["chair_s"] < 75 and scores["cover"] > 75 and scores["unparsed"] <= 3
