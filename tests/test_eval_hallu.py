"""eval_hallu.py, its answers and benchmarks: answers that survive a kill, scores without a model."""
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from conftest import GOLDEN, ROOT, SHARED, need, picture, run_forked, write_llava
from PIL import Image
from test_chat import reply, server

import data
import eval_hallu
from evaluation import answers as answering
from evaluation import benchmarks, metrics
from model import ask as chat

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
    from model import vlm
    return vlm.load(write_llava(tmp_path_factory.mktemp("model")))


def answer(m, scenes, out, **more):
    more = {"batch_size": 3, "max_new_tokens": 6, **more}
    answering.answer_scenes(m, scenes, out, **more)
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_answers_are_the_scenes_in_order_with_the_settings_first(m, tmp_path):
    scenes, lines = write_scenes(tmp_path / "scenes")
    first, *answers = answer(m, scenes, tmp_path / "answers.jsonl")
    known = {"max_new_tokens": 6, "decoding": "greedy", "benchmark": "classroom", "questions": 20,
             "adapter": None, "scenes": "scenes/scenes.jsonl"}
    assert first["settings"] | known == first["settings"]
    assert [{k: v for k, v in a.items() if k != "answer"} for a in answers] == lines
    assert any(a["answer"] for a in answers)
    assert answering.score_classroom(tmp_path / "answers.jsonl") == metrics.classroom(answers)


def test_a_killed_run_continues_and_ends_with_the_same_file(m, tmp_path, monkeypatch):
    scenes, _ = write_scenes(tmp_path / "scenes")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    answer(m, scenes, whole)
    from model import generation
    asked, generate = [], generation.generate
    monkeypatch.setattr(generation, "generate", lambda m, i, questions, **k: asked.append(len(questions))
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
    from model import vlm
    other = vlm.load(m.front.folder)
    lora.add_lora(other.model, 2, 4)
    with pytest.raises(data.UserError, match="adapter"):
        answer(other, tmp_path / "again" / "scenes", out)
    out.write_text('{"id": 1}\n')
    with pytest.raises(data.UserError, match="no settings"):
        answer(m, scenes, out)
    assert before


@pytest.mark.parametrize("change, says", [
    ({"image": "../secret.png"}, "leaves the folder"),
    ({"image": None}, "record 1 has no 'image'"),
    ({"kind": "attribute"}, "line 1.*choices"),
    ({"image": "images/none.png"}, "none.png is missing"),
])
def test_faulty_scenes_are_refused(m, tmp_path, change, says):
    scenes, (first, *_) = write_scenes(tmp_path / "scenes", 1)
    scenes.write_text(json.dumps({**first, **change}) + "\n")
    with pytest.raises(data.UserError, match=says):
        answer(m, scenes, tmp_path / "answers.jsonl")


def run(*arguments):
    """(exit code, stdout, stderr) of the command, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["eval_hallu.py", *map(str, arguments)])
        try:
            eval_hallu.main()
        except SystemExit as end:                               # as Python ends a process with it
            if isinstance(end.code, str):
                return 1, out.getvalue(), err.getvalue() + end.code + "\n"
            return end.code or 0, out.getvalue(), err.getvalue()
    return 0, out.getvalue(), err.getvalue()


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
    assert items[3] == {"id": "1-1", "image": "images/1.png", "kind": "existence", "answer": "what ?",
                        "hallucinated": [], "unparsed": True,
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
    (["score", "pope"], "--answers"),
    (["score", "chess"], "chess"),
    (["answers", "pope", "--model", "m", "--data", "none.json", "--out", "o"], "none.json"),
    (["answers", "classroom", "--model", "m", "--data", "d", "--out", "o", "--limit", "3"], "--limit"),
    (["answers", "classroom", "--model", "m", "--data", "d", "--out", "o", "--batch_size=0"], "batch_size"),
    (["score", "classroom", "--nonsense"], "score"),
    (["score", "classroom", "--answers", "none.jsonl", "--out", "o.json"], "none.jsonl"),
    (["score", "classroom", "--answers", "none.jsonl", "--out", "/dev/null"], "--out"),
    (["answers", "classroom", "--model", "nowhere", "--data", "d", "--out", "o"], "nowhere"),
])
def test_mistakes_exit_1_with_a_sentence(arguments, says):
    code, _, err = run(*arguments)
    assert code == 1 and says in err and "Traceback" not in err


def test_help_and_score_load_no_model_code():
    code = "import sys, eval_hallu; print({'torch', 'transformers', 'vlm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("command", ["", "score", *eval_hallu.COMMANDS])
def test_help_is_complete_and_fits_a_terminal(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        eval_hallu.parse([*command.split(), "--help"])
    said = capsys.readouterr().out
    assert not stop.value.code and max(map(len, said.splitlines())) <= 80
    _, _, arguments = eval_hallu.COMMANDS.get(command, ("", "", {}))
    for about in arguments.values():
        assert "".join(about["help"].split()) in "".join(said.split())


def test_command_line_answers_a_folder_of_scenes(m, tmp_path):
    write_scenes(tmp_path / "scenes", 2)
    out = tmp_path / "answers.jsonl"
    code, _, err = run("answers", "classroom", "--model", m.front.folder, "--data", tmp_path / "scenes",
                       "--out", out, "--max_new_tokens", 4)
    assert code == 0, err
    assert len(out.read_text().splitlines()) == 5
    assert run("score", "classroom", "--answers", out, "--out", tmp_path / "scores.json")[0] == 0


@pytest.mark.skipif(not Path(ROOT, "classroom", "models", "base0", "config.json").exists(),
                    reason="the classroom's model has not been made: python classroom/make.py")
def test_the_classroom_model_looks(tmp_path):
    """The shipped base on fresh scenes: it hallucinates often, and sees what is there."""
    from model import vlm
    subprocess.run([sys.executable, ROOT / "classroom" / "pairs.py", "scenes", "--seed", "3", "--n", "60",
                    "--questions", "60", "--split", "tune", "--out", tmp_path], check=True)
    answering.answer_scenes(vlm.load("classroom"), tmp_path, tmp_path / "answers.jsonl")
    scores = answering.score_classroom(tmp_path / "answers.jsonl")
    assert 25 < scores["chair_s"] < 75 and scores["cover"] > 75 and scores["unparsed"] <= 3


# ------------------------------------------------------------------------------- the published benchmarks
# Files of their layout with content of our own: nothing of theirs is part of this repository.
def write_json(path, records, lines=True):
    text = "".join(json.dumps(record) + "\n" for record in records) if lines else json.dumps(records,
                                                                                             indent=1)
    path.write_text(text)
    return path


def write_images(folder, names):
    folder.mkdir(exist_ok=True)
    for n, name in enumerate(names):
        picture(n).save(folder / name)
    return folder


def pope_file(folder, split="random", n=6):
    rows = [{"question_id": i + 1, "image": f"COCO_val2014_{i // 3:012d}.jpg",
             "label": "no" if i % 2 else "yes",
             "text": f"Is there a {WORDS[i % 2]} in the image ? {split}" } for i in range(n)]
    write_images(folder, {row["image"] for row in rows})
    return write_json(folder / f"coco_pope_{split}.json", rows), rows


def amber_folder(folder):
    """Two captions, then a question about existence, state, number and action each, two about relations."""
    folder.mkdir(exist_ok=True)
    truths = [["dog", "cat"], ["cat"]]
    queries = [{"id": i + 1, "image": f"AMBER_{i + 1}.jpg", "query": "what is this ?"} for i in range(2)]
    asked = [{"id": i + 3, "image": f"AMBER_{i % 2 + 1}.jpg", "query": "is there a dog ?"} for i in range(6)]
    kinds = ["discriminative-hallucination", *(f"discriminative-attribute-{kind}" for kind in
                                               ("state", "number", "action")), "relation",
             "discriminative-relation"]
    notes = [{"id": i + 1, "type": "generative", "truth": truths[i], "hallu": ["bird"]} for i in range(2)]
    notes += [{"id": i + 3, "type": kind, "truth": "no"} for i, kind in enumerate(kinds)]
    write_json(folder / "query_generative.json", queries, lines=False)
    write_json(folder / "query_discriminative.json", asked, lines=False)
    write_json(folder / "annotations.json", notes, lines=False)
    (folder / "relation.json").write_text(json.dumps({"dog": ["puppy"], "cat": [], "bird": []}))
    (folder / "safe_words.txt").write_text("line\nlight")
    write_images(folder, ["AMBER_1.jpg", "AMBER_2.jpg"])
    return folder


def mmhal_file(folder, n=8):
    rows = [{"question_type": metrics.MMHAL[i % 8], "question_topic": "none", "image_id": f"{i:015x}f",
             "image_src": f"https://a.test/{i}_o.jpg", "image_content": ["Dog", "Cat"], "model_answer": "",
             "question": f"what is this ? {i}", "gt_answer": "A dog and a cat."} for i in range(n)]
    write_images(folder, [f"{i}_o.jpg" if i % 2 else f"{i:02}_{i}_o.jpg" for i in range(n)])
    return write_json(folder / "template.json", rows, lines=False), rows


def objhal_file(folder, n=4):
    """One image each way: base64, beside its question or under `prompt`, a name, and only a COCO number."""
    write_images(folder, ["dog.png", "COCO_val2014_000000000003.jpg"])
    code = base64.b64encode((folder / "dog.png").read_bytes()).decode()
    rows = [{"image_id": 10, "question": "what is this ?", "image": code},
            {"image_id": 11, "prompt": "what is this ?", "image": code},
            {"image_id": 12, "question": "a red dog ?", "image_path": "dog.png"},
            {"question_id": 7, "image_id": 3, "question": "what is this ?"}]
    return write_json(folder / "questions.jsonl", rows[:n]), rows


FILES = {"pope": pope_file, "mmhal": mmhal_file, "objhal": objhal_file,
         "amber": lambda folder: (amber_folder(folder), None)}
KEYS = {"pope": {"question_id", "split", "image", "question", "label"}, "amber": {"id", "image", "question"},
        "objhal": {"question_id", "image_id", "question"},
        "mmhal": {"question_id", "question_type", "question_topic", "image_id", "image_src", "image_content",
                  "question", "gt_answer"}}


def ask(m, benchmark, path, out, **more):
    questions = benchmarks.questions(benchmark, [path])
    answering.answer_questions(m, benchmark, questions, out, **{"batch_size": 3, "max_new_tokens": 5, **more})
    return data.read_records(out)


def test_answers_are_asked_for_as_the_adapter_was_trained(tmp_path):
    """--template and --pad go to the model and into the settings: other ones do not continue a file."""
    model, (path, _) = write_llava(tmp_path / "model"), pope_file(tmp_path / "data")
    argv = ["answers", "pope", "--model", model, "--data", path, "--out", tmp_path / "a.jsonl", "--limit", 2]
    code, _, err = run(*argv, "--template", "vicuna", "--pad")
    assert code == 0, err
    settings = data.read_records(tmp_path / "a.jsonl")[0]["settings"]
    assert "A chat between" in settings["template"] and "pad" in settings["images"]
    code, _, err = run(*argv, "--pad")
    assert code == 1 and "template" in err


def test_a_server_answers_in_order_and_is_asked_for_what_is_missing(tmp_path):
    path, _ = pope_file(tmp_path / "data")
    out = tmp_path / "a.jsonl"
    up = []

    def respond(body, number):
        image, text = body["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/")
        assert (body["max_tokens"], body["temperature"], body["model"]) == (7, 0.0, "big")
        return reply(f" yes, {text['text']} ") if up or number <= 2 else (400, "broken")
    with server(respond) as (url, calls):
        argv = ["answers", "pope", "--model", url, "--data", path, "--out", out, "--chat_model", "big",
                "--max_new_tokens", 7, "--batch_size", 2]
        code, _, err = run(*argv)
        assert code == 1 and "the same command asks again" in err and "Traceback" not in err
        up.append(True)
        assert run(*argv)[0] == 0
        head, *lines = data.read_records(out)
        assert head["settings"]["model"] == "big" and len(lines) == 6
        assert all(line["answer"] == f"yes, {line['question']}" for line in lines)
        assert len(calls) == 2 + 2 + 4                                  # answered, refused, what was missing
        for wrong in (["--adapter", "A"], ["--dtype", "float32"]):
            code, _, err = run(*argv, *wrong)
            assert code == 1 and f"{wrong[0]} does not go with" in err
    code, _, err = run("answers", "pope", "--model", "m", "--chat_model", "big", "--data", path, "--out", out)
    assert code == 1 and "--chat_model does not go with --model m" in err


@pytest.mark.parametrize("benchmark", FILES)
def test_each_benchmark_is_answered_in_its_order_and_goes_on_after_a_kill(m, tmp_path, benchmark):
    path, _ = FILES[benchmark](tmp_path / "data")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    first, *rest = ask(m, benchmark, path, whole)
    assert first["settings"] | {"benchmark": benchmark, "decoding": "greedy", "max_new_tokens": 5,
                                "seed": None,
                                "adapter": None, "questions": len(rest)} == first["settings"]
    assert {"model", "base", "template", "dtype", "questions_sha256"} <= first["settings"].keys()
    assert all(line.keys() == KEYS[benchmark] | {"answer"} for line in rest)
    assert len({line["answer"] for line in rest}) > 1
    for cut in (10, len(whole.read_bytes()) // 2, len(whole.read_bytes()) - 3):
        out.write_bytes(whole.read_bytes()[:cut])
        ask(m, benchmark, path, out)
        assert out.read_bytes() == whole.read_bytes()
    with pytest.raises(data.UserError, match="max_new_tokens"):
        ask(m, benchmark, path, out, max_new_tokens=6)


def test_a_batch_of_one_and_a_batch_of_many_give_the_same_answers(tmp_path):
    """Left padding changes nothing, in float64, where rounding cannot turn a near-tie."""
    import torch

    from model import vlm
    model = vlm.load(write_llava(tmp_path / "model", seed=3), dtype=torch.float64)
    path, rows = pope_file(tmp_path / "data", n=12)
    for i, row in enumerate(rows):                                                 # prompts of many lengths
        row["text"] = " ".join(["a red dog and a blue cat"] * (i % 4) + ["what is this ?"])
    write_json(path, rows)
    said = {size: [line["answer"] for line in ask(model, "pope", path, tmp_path / f"{size}.jsonl",
                                                  batch_size=size,
                                                  max_new_tokens=12)[1:]] for size in (1, 5, 12)}
    assert said[1] == said[5] == said[12] and len(set(said[1])) > 3


def test_the_prompt_can_be_extended_and_is_part_of_the_settings(m, tmp_path, monkeypatch):
    from model import generation
    asked = []
    monkeypatch.setattr(generation, "generate", lambda m, images, prompts,
                        **k: asked.extend(prompts) or ["yes"] * len(prompts))
    path, rows = pope_file(tmp_path / "data", n=1)
    questions = benchmarks.questions("pope", [path], prompt="{question}\nyes or no ?")
    answering.answer_questions(m, "pope", questions, tmp_path / "a.jsonl", prompt="{question}\nyes or no ?")
    assert asked == [rows[0]["text"] + "\nyes or no ?"]
    first, line = data.read_records(tmp_path / "a.jsonl")
    assert first["settings"]["prompt"] == "{question}\nyes or no ?" and line["question"] == rows[0]["text"]


def test_pope_is_answered_from_a_folder_or_from_files(tmp_path):
    for split in ("adversarial", "popular", "random"):
        pope_file(tmp_path, split)
    splits = [q.line["split"] for q in benchmarks.questions("pope", [tmp_path])]
    assert splits == [split for split in benchmarks.SPLITS for _ in range(6)]
    files = [tmp_path / "coco_pope_adversarial.json", tmp_path / "coco_pope_random.json"]
    assert [q.line["split"] for q in benchmarks.questions("pope", files)][::6] == ["random", "adversarial"]
    write_json(tmp_path / "coco_pope_random.2910.json", pope_file(tmp_path)[1])
    with pytest.raises(data.UserError, match="second file of the split random.*2,910 and 3,000"):
        benchmarks.questions("pope", [tmp_path])


def test_images_are_found_under_their_published_names(tmp_path):
    path, _ = objhal_file(tmp_path / "objhal")
    first, second, third, fourth = benchmarks.questions("objhal", [path])
    shown = {data.read_image(question.image).tobytes() for question in (first, second, third)}
    assert shown == {picture(0).tobytes()}
    assert fourth.image.endswith("COCO_val2014_000000000003.jpg")
    assert [q.line["question_id"] for q in (first, second, third, fourth)] == [0, 1, 2, 7]
    path, _ = mmhal_file(tmp_path / "mmhal")
    images = [os.path.basename(q.image) for q in benchmarks.questions("mmhal", [path])]
    assert images[:2] == ["00_0_o.jpg", "1_o.jpg"]
    llava = write_json(tmp_path / "qa.jsonl", [{"question_id": 4, "image": "000000000003.jpg",
                                                "text": "what ?"}])
    write_images(tmp_path, ["000000000003.jpg"])
    question, = benchmarks.questions("objhal", [llava])
    assert question.line == {"question_id": 4, "image_id": 3, "question": "what ?"}


@pytest.mark.parametrize("benchmark, given, says", [
    ("pope", "amber", "coco_pope|no 'question_id'"),
    ("pope", "mmhal", "no 'question_id', so this is no POPE"),
    ("amber", "pope", "no 'id', so this is no AMBER query file"),
    ("mmhal", "pope", "no 'question_type', so this is no MMHal-Bench"),
    ("objhal", "amber", "no question or no image, so this is not a file of questions"),
])
def test_another_benchmarks_file_is_refused_by_name(tmp_path, benchmark, given, says):
    path, _ = FILES[given](tmp_path / "data")
    path = path / "query_generative.json" if given == "amber" else path
    with pytest.raises(data.UserError, match=says):
        benchmarks.questions(benchmark, [path])


def test_links_out_of_the_folder_of_images_are_followed_on_request(tmp_path):
    path, rows = pope_file(tmp_path / "data")
    (tmp_path / "links").mkdir()
    for name in {row["image"] for row in rows}:
        (tmp_path / "links" / name).symlink_to(tmp_path / "data" / name)
    with pytest.raises(data.UserError, match="--follow_links"):
        benchmarks.questions("pope", [path], tmp_path / "links")
    found = benchmarks.questions("pope", [path], tmp_path / "links", follow_links=True)
    assert [question.image for question in found] == [str(tmp_path / "links" / row["image"]) for row in rows]
    o = eval_hallu.parse(["answers", "pope", "--model", "m", "--data", str(path), "--out", "o",
                          "--follow_links"])
    assert o.follow_links


def test_missing_and_broken_images_are_said_before_or_where_they_are_met(m, tmp_path):
    path, rows = pope_file(tmp_path / "data")
    (tmp_path / "data" / rows[0]["image"]).unlink()
    with pytest.raises(data.UserError, match=r"lacks 3 of 6 images \(first: COCO_val2014_000000000000.jpg\)"):
        benchmarks.questions("pope", [path])
    with pytest.raises(data.UserError, match="--images .*nowhere is not a folder"):
        benchmarks.questions("pope", [path], tmp_path / "nowhere")
    write_json(path, [{**rows[0], "image": "../secret.png"}])
    with pytest.raises(data.UserError, match="secret.png leaves the folder"):
        benchmarks.questions("pope", [path])
    write_json(tmp_path / "data" / "q.jsonl", [{"image_id": 1, "question": "what ?",
                                                "image": "A" * 400 + "!"}])
    with pytest.raises(data.UserError, match="AAAA..., is broken base64"):
        ask(m, "objhal", tmp_path / "data" / "q.jsonl", tmp_path / "a.jsonl")


def test_two_ranks_share_the_questions_and_one_goes_on_with_what_they_wrote(m, tmp_path, monkeypatch):
    path, _ = pope_file(tmp_path / "data", n=14)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    ask(m, "pope", path, whole)
    arguments = ["answers", "pope", "--model", m.front.folder, "--data", path, "--out", out,
                 "--batch_size", 3, "--max_new_tokens", 5]
    code, said = run_forked(eval_hallu.main, list(map(str, arguments)), ranks=2)
    assert code == 0, said
    assert out.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("*.rank*"))
    first, *lines = whole.read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    rows = [{"id": place, "hash": chat.hashed({k: v for k, v in line.items() if k != "answer"}),
             "answer": line["answer"]} for place, line in enumerate(lines)]
    out.unlink()                                                         # what a killed run may leave
    for rank, groups in ((0, [rows[:3], rows[6:9]]), (1, [rows[3:6], rows[9:12]])):
        part = [json.loads(first), *({"rows": group} for group in groups)]
        write_json(tmp_path / f"answers.jsonl.rank{rank}", part)
    with open(tmp_path / "answers.jsonl.rank1", "a") as file:
        file.write('{"rows": [{"id": 12, "ans')
    from model import generation
    asked, generate = [], generation.generate
    monkeypatch.setattr(generation, "generate", lambda m, i, questions, **k: asked.append(len(questions))
                        or generate(m, i, questions, **k))
    ask(m, "pope", path, out)
    assert asked == [2]
    assert out.read_bytes() == whole.read_bytes() and not list(tmp_path.glob("*.rank*"))
    write_json(tmp_path / "answers.jsonl.rank0", [{"settings": {"model": "another"}}])
    with pytest.raises(data.UserError, match="rank0 was begun with other settings"):
        ask(m, "pope", path, out)


# ------------------------------------------------------------------------------- scores
def score(tmp_path, benchmark, answers, *arguments):
    """-> (scores.json, its items) of the command line, run in this process."""
    out = tmp_path / "scores.json"
    files = [answers] if isinstance(answers, Path) else answers
    o = eval_hallu.parse(["score", benchmark, "--answers", *map(str, files), "--out", str(out),
                          *map(str, arguments)])
    o.run(o)
    items = [json.loads(line) for line in (tmp_path / "scores.items.jsonl").read_text().splitlines()]
    return json.loads(out.read_text()), items


def pope_answers(rows, said="yes", **more):
    return [{"question_id": row["question_id"], "question": row["text"], "answer": said,
             **more} for row in rows]


def test_score_pope_by_hand(tmp_path, capsys):
    questions, rows = pope_file(tmp_path / "data")
    said = ["Yes", "No", "yes, there is", "A cat.", "No!",
            "no"]                    # labels: yes no yes no yes no
    answers = write_json(tmp_path / "a.jsonl", [{**a, "answer": text} for a, text in
                                                zip(pope_answers(rows), said, strict=True)])
    scores, items = score(tmp_path, "pope", answers, "--questions", questions)
    assert [scores[k] for k in ("tp", "fp", "tn", "fn", "unparsed", "n")] == [2, 1, 2, 1, 1, 6]
    assert scores["accuracy"] == pytest.approx(4 / 6) and scores["version"] == "random, 6 questions"
    assert scores["intervals"]["accuracy"][0] < 4 / 6 < scores["intervals"]["accuracy"][1]
    assert [item["right"] for item in items] == [True, True, True, False, False, True]
    out = capsys.readouterr().out
    assert "accuracy                           66.7" in out and "6 answers, 1 of them unreadable" in out
    assert "random, 6 questions" in out
    official, _ = score(tmp_path, "pope", answers, "--questions", questions, "--mode", "official")
    assert [official[k] for k in ("tp", "fp", "tn", "fn", "unparsed")] == [3, 1, 2, 0, 0]     # "No!" is a yes


def test_score_pope_over_three_splits(tmp_path, capsys):
    """One file with `split` in its lines, or one file a split, given by its name; the mean of the three."""
    rows = {split: pope_file(tmp_path / "data", split)[1] for split in benchmarks.SPLITS}
    said = dict(zip(benchmarks.SPLITS, ("yes", "no", "yes"), strict=True))
    together = write_json(tmp_path / "a.jsonl", [line for split in rows for line in
                                                 pope_answers(rows[split], said[split], split=split)])
    scores, _ = score(tmp_path, "pope", together, "--questions", tmp_path / "data")
    assert scores["recall"] == pytest.approx(2 / 3) and scores["n"] == 18 and len(scores["by_split"]) == 3
    assert scores["by_split"]["popular"]["recall"] == 0
    apart = [write_json(tmp_path / f"{split}.jsonl", pope_answers(rows[split],
                                                                  said[split])) for split in rows]
    assert score(tmp_path, "pope", apart, "--questions", tmp_path / "data")[0] == scores
    one, _ = score(tmp_path, "pope", apart[1], "--questions", tmp_path / "data")
    assert one["n"] == 6 and one["by_split"].keys() == {"popular"}                # by the file's name
    with pytest.raises(data.UserError, match="x.jsonl: of several answers files, each needs the name"):
        score(tmp_path, "pope", [apart[0], write_json(tmp_path / "x.jsonl", pope_answers(rows["random"]))],
              "--questions", tmp_path / "data")


@pytest.mark.parametrize("rows, says", [
    ([{"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}], "1 is a question"),
    ([{"question_id": 1, "image": "a.jpg", "text": "Describe this.", "category": "detail"}], "is a question"),
    ([{"question": "what ?", "gt_answer": "a dog", "model_answer": ""}], "nobody has filled in")])
def test_questions_are_not_scored_as_answers(tmp_path, rows, says):
    """Some benchmarks keep questions under `text`, others answers: no number may come of a mix-up."""
    questions, _ = pope_file(tmp_path / "data")
    with pytest.raises(data.UserError, match=says):
        score(tmp_path, "pope", write_json(tmp_path / "a.jsonl", rows), "--questions", questions)


def lines_of(folder, name):
    return data.read_records(need(SHARED / "cases" / "evaluation" / folder) / name)


@pytest.mark.parametrize("form", ["pope-official-form", "string-ids"])
def test_pope_reads_its_own_form_and_ids_in_any_type(tmp_path, form):
    """`question` and `answer` in the questions' order; "1" is 1."""
    folder = need(SHARED / "cases" / "evaluation" / form)
    arguments = ["--questions", folder / "my_pope.json"]
    scores, _ = score(tmp_path, "pope", folder / "answers.jsonl", *arguments)
    assert (scores["accuracy"], scores["n"], scores["unparsed"]) == (1, 4, 0)
    shuffled = write_json(tmp_path / "a.jsonl", lines_of(form, "answers.jsonl")[::-1])
    if form == "string-ids":
        assert score(tmp_path, "pope", shuffled, *arguments)[0] == scores
    else:
        with pytest.raises(data.UserError, match="4 answers are to other questions under these ids"):
            score(tmp_path, "pope", shuffled, *arguments)


def test_popes_own_form_over_several_splits(tmp_path):
    answers = []
    for split, said in zip(benchmarks.SPLITS, ("yes", "no", "yes"), strict=True):
        rows = pope_answers(pope_file(tmp_path / "data", split)[1], said)
        answers.append(write_json(tmp_path / f"{split}.json",
                                  [{key: row[key] for key in ("question", "answer")} for row in rows]))
    scores, _ = score(tmp_path, "pope", answers, "--questions", tmp_path / "data")
    assert scores["recall"] == pytest.approx(2 / 3) and scores["n"] == 18


def hub_file(folder, splits=benchmarks.SPLITS):
    """The splits in one file under the columns of lmms-lab/POPE, all values texts; and POPE's own rows."""
    own, hubs = {}, []
    for split in splits:
        own[split] = pope_file(folder / "own", split, n=2)[1]
        for row in own[split]:
            hubs.append({"id": str(len(hubs)), "question_id": str(row["question_id"]),
                         "question": row["text"], "answer": row["label"], "category": split,
                         "image_source": row["image"].removesuffix(".jpg"), "image": {"bytes": "..."}})
    return write_json(folder / "test.jsonl", hubs[::-1]), own, hubs


def test_the_hubs_pope_is_asked_and_scored_as_popes_own_files(m, tmp_path):
    """All splits in one file, in any order; answers by question_id, by the hub's id, by image and text."""
    path, own, hubs = hub_file(tmp_path)
    rows = [row | {"split": split} for split in benchmarks.SPLITS for row in own[split]]
    answers = [line | {"split": row["split"]} for line, row in zip(pope_answers(rows), rows, strict=True)]
    expected, _ = score(tmp_path, "pope", write_json(tmp_path / "a.jsonl", answers), "--questions",
                        tmp_path / "own")
    named = [{"image": line["image_source"], "question": f"{line['question']} Yes or no?",
              "category": line["category"]} for line in hubs]
    for lines in (answers, [{"id": line["id"]} for line in hubs],
                  [{"id": int(line["id"])} for line in hubs[::-1]],
                  [{key: line[key] for key in line if key != "image"} for line in hubs],
                  [line | {"question": line["question"][:-11]} for line in named[::-1]]):
        lines = [line | {"answer": "yes"} for line in lines]
        name = "random.jsonl" if "category" in lines[0] else "b.jsonl"            # what a line says counts
        found, _ = score(tmp_path, "pope", write_json(tmp_path / name, lines), "--questions", path)
        assert found | {"version": ""} == expected | {"version": ""}
    asked, wanted = (benchmarks.questions("pope", [each], tmp_path / "own")
                     for each in (path, tmp_path / "own"))
    assert [q.prompt for q in asked] == [q.prompt for q in sorted(
        wanted, key=lambda q: (benchmarks.SPLITS.index(q.line["split"]), -q.line["question_id"]))]
    assert {q.image for q in asked} == {q.image for q in wanted}
    with pytest.raises(data.UserError, match="is a second file of the split random"):
        benchmarks.pope_questions([path, tmp_path / "own" / "coco_pope_random.json"])


def test_an_answer_about_another_image_is_refused(tmp_path):
    """Nothing else tells: its id is known, and it does not say what was asked."""
    path, rows = pope_file(tmp_path / "data")
    lines = [{"question_id": row["question_id"], "image": f"val2014/{row['image']}", "answer": "yes"}
             for row in rows]
    good = score(tmp_path, "pope", write_json(tmp_path / "a.jsonl", lines), "--questions", path)[0]
    assert good["n"] == 6
    lines[2]["image"] = "AMBER_7.jpg"
    with pytest.raises(data.UserError, match="1 answers are to other questions .*ids random 3"):
        score(tmp_path, "pope", write_json(tmp_path / "a.jsonl", lines), "--questions", path)
    with pytest.raises(data.UserError, match="1 answers are to other questions .*ids 2"):
        score(tmp_path, "amber", write_json(tmp_path / "b.jsonl", [
            {"id": i, "image": "AMBER_1.jpg", "response": "A dog."} for i in (1, 2)]),
            "--data", amber_folder(tmp_path / "amber"))
    template, rows = mmhal_file(tmp_path / "mmhal")
    lines = [{"image_id": row["image_id"], "response": "a dog"} for row in rows]
    lines[1]["image_id"] = "ffff"
    with pytest.raises(data.UserError, match="1 answers belong to none of the questions .ids image ffff"):
        score(tmp_path, "mmhal", write_json(tmp_path / "c.jsonl", lines), "--template", template)


def test_two_versions_of_popes_random_questions_are_told_apart(tmp_path):
    """The longer version has other questions under most ids of the shorter one."""
    path, rows = pope_file(tmp_path / "data", n=12)
    short = [row | {"question_id": i} for i, row in enumerate(rows[:3] + rows[6:], 1)]
    for given, says in ((short, "3 of 12 questions have no answer"), (rows, "3 answers belong to none")):
        other = path if given is short else write_json(tmp_path / "coco_pope_random.json", short)
        for keys in (("question_id", "question"), ("question",)):
            lines = [{key: line[key] for key in (*keys, "answer")} for line in pope_answers(given)]
            with pytest.raises(data.UserError, match=says):
                score(tmp_path, "pope", write_json(tmp_path / "a.jsonl", lines), "--questions", other)
    lines = pope_answers(short)
    with pytest.raises(data.UserError, match="answers are to other questions"):
        score(tmp_path, "pope", write_json(tmp_path / "a.jsonl", lines), "--questions", path, "--partial")


def test_answers_to_another_split_are_refused(tmp_path):
    """Their ids are those of this one; their questions are not."""
    questions, _ = pope_file(tmp_path / "data")
    _, others = pope_file(tmp_path / "other", "adversarial")
    answers = write_json(tmp_path / "a.jsonl", pope_answers(others))
    with pytest.raises(data.UserError, match="6 answers are to other questions .*ids random 1"):
        score(tmp_path, "pope", answers, "--questions", questions)


def test_amber_joins_ids_of_any_type(tmp_path):
    folder = amber_folder(tmp_path / "data")
    answers = [{"id": i + 1, "response": "A dog." if i < 2 else "No"} for i in range(8)]
    found = score(tmp_path, "amber", write_json(tmp_path / "a.jsonl", answers), "--data", folder)
    answers = [line | {"id": str(line["id"])} for line in answers]
    assert score(tmp_path, "amber", write_json(tmp_path / "b.jsonl", answers), "--data", folder) == found


def test_empty_answers_are_counted_and_named(tmp_path, capsys):
    folder = amber_folder(tmp_path / "data")
    answers = write_json(tmp_path / "a.jsonl", [{"id": 1, "response": ""}, {"id": 2, "response": " \n"}])
    scores, _ = score(tmp_path, "amber", answers, "--data", folder)
    said = capsys.readouterr().out
    assert "2 answers are empty (ids 1, 2)" in said and "generative: chair is 0/0, given as 0" in said
    assert "CHAIR, lower is better          undefined: names no objects" in said
    assert any("2 answers are empty" in remark for remark in scores["remarks"])
    answers = write_json(tmp_path / "a.jsonl", [{"id": 2, "response": ""}])
    scores, _ = score(tmp_path, "amber", answers, "--data", folder, "--partial")
    said = capsys.readouterr().out
    assert "1 answers are empty (ids 2)" in said and "1 answers, of 2 questions" in said
    questions, rows = pope_file(tmp_path / "pope")
    answers = write_json(tmp_path / "b.jsonl", pope_answers(rows, ""))
    score(tmp_path, "pope", answers, "--questions", questions)
    assert "6 answers are empty (ids 1, 2, 3, 4, 5, and 1 more)" in capsys.readouterr().out


def test_empty_answers_are_named_by_every_scorer_and_by_compare(tmp_path, coco, capsys):
    path, rows = mmhal_file(tmp_path / "mmhal")
    judged = write_json(tmp_path / "r.jsonl", [{"id": i, "reply": "Rating: 6"} for i in range(8)])
    _, scenes = write_scenes(tmp_path / "scenes", 1)
    for benchmark, lines, more in (
            ("mmhal", mmhal_answers(rows), ["--template", path, "--judge", judged]),
            ("chair", CAPTIONS, coco),
            ("classroom", [line | {"answer": "yes"} for line in scenes], [])):
        key = "answer" if benchmark == "classroom" else "text"
        lines = [line | {key: "\n"} if place == 1 else line for place, line in enumerate(lines)]
        name = lines[1].get("question_id", lines[1].get("id"))
        scores, _ = score(tmp_path, benchmark, write_json(tmp_path / "a.jsonl", lines), *more)
        says = f"1 answers are empty (ids {name}): a broken model"
        assert capsys.readouterr().out.count(says) == 1 and [says in r for r in scores["remarks"]].count(True)
        code, out, err = run("compare", *[tmp_path / "a.jsonl"] * 2, "--out", tmp_path / "p.html")
        assert (code, err) == (0, "") and f"A: {says}" in out and f"B: {says}" in out


def test_mmhal_joins_by_image(tmp_path):
    folder = need(SHARED / "cases" / "evaluation" / "mmhal-join")
    with pytest.raises(data.UserError, match="3 prompts"):
        score(tmp_path, "mmhal", folder / "answers.jsonl", "--template", folder / "template.json")
    for place, line in enumerate(data.read_records(tmp_path / "scores.prompts.jsonl")):
        assert f"ANSWER TO IMG{place}" in line["messages"][0]["content"]


@pytest.mark.parametrize("form, lost", [("string-ids", 0), ("string-ids", 3), ("mmhal-join", 0),
                                        ("mmhal-join", 2), ("pope-official-form", 3)])
def test_a_shared_case_that_lacks_an_answer_is_scored_with_partial(tmp_path, form, lost):
    folder, lines = need(SHARED / "cases" / "evaluation" / form), lines_of(form, "answers.jsonl")
    of = len(lines)
    del lines[lost]
    answers = write_json(tmp_path / "a.jsonl", lines)
    if form == "mmhal-join":
        said = [{"id": line["image_id"].removeprefix("img"), "reply": "Rating: 4"} for line in lines]
        judge = write_json(tmp_path / "replies.jsonl", said)
        arguments = ["mmhal", answers, "--template", folder / "template.json", "--judge", judge]
    else:
        arguments = ["pope", answers, "--questions", folder / "my_pope.json"]
    with pytest.raises(data.UserError, match=f"1 of {of} questions have no answer"):
        score(tmp_path, *arguments)
    scores, _ = score(tmp_path, *arguments, "--partial")
    assert scores["coverage"] == {"answered": of - 1, "of": of} and scores["n"] == of - 1
    assert scores.get("accuracy", scores.get("score")) in (1, 4)


@pytest.mark.parametrize("partial", [[], ["--partial"]])
def test_of_answers_in_order_only_the_last_may_be_missing(tmp_path, partial):
    """The others would be scored beside a question that they do not answer."""
    folder, lines = SHARED / "cases" / "evaluation", lines_of("pope-official-form", "answers.jsonl")
    answers = write_json(tmp_path / "a.jsonl", lines[:1] + lines[2:])
    with pytest.raises(data.UserError, match="questions"):
        score(tmp_path, "pope", answers, "--questions", folder / "pope-official-form/my_pope.json", *partial)


@pytest.mark.parametrize("partial", [[], ["--partial"]])
def test_a_judge_that_never_replies_is_an_error_with_counts(tmp_path, monkeypatch, partial):
    monkeypatch.setattr(chat, "BACKOFF", 0.001)
    folder = need(SHARED / "cases" / "evaluation" / "judge-no-reply")
    with server(lambda body, n: (500, "oops")) as (url, _):
        with pytest.raises(data.UserError, match="the judge did not reply to 3 of 3 requests"):
            score(tmp_path, "mmhal", folder / "answers.jsonl", "--template", folder / "template.json",
                  "--judge", url, *partial)
    assert not (tmp_path / "scores.json").exists()


# What fake.py of the shared case says in its modes.
SILENT = "did not reply to 3 of 3 requests"
UNREAD = "none of 3 replies can be read"
JUDGES = {
    "reasoning": (reply(None, "length", reasoning_content="I think about rating"), SILENT),
    "empty": (reply("", "length"), SILENT),
    "filter": (reply("", "content_filter"), SILENT),
    "refusal": (reply(None, refusal="I can't help with that."), SILENT),
    "err200": ((200, '{"error": {"message": "Rate limit reached", "code": 429}}'), SILENT),
    "ctx": ((400, '{"message": "This model\'s maximum context length is 2048 tokens."}'), SILENT),
    "stream": ((200, 'data: {"choices": [{"delta": {"content": "Rating: 4"}}]}\n\ndata: [DONE]'), SILENT),
    "thinkcut": (reply("<think>\nLet me see. A rating of 2 could", "length"), UNREAD),
    "cut": (reply("My first impression is Rating: 2, but on closer", "length"), UNREAD)}
RATES = {
    "gpt5": lambda body, n: (400, "Unsupported parameter: 'max_tokens'") if "max_tokens" in body
    else reply("Rating: 4"),
    "list": lambda body, n: reply([{"type": "text", "text": "Rating: 4"}]),
    "think": lambda body, n: reply("<think>\nIs it rating: 2? No, so Rating: 4 or 5.\n</think>\n\nRating: 4"),
    "r429": lambda body, n: (429, "slow", {"Retry-After": "0"}) if n % 2 else reply("Rating: 4")}


@pytest.mark.parametrize("mode", RATES)
def test_shared_judge_that_rates(tmp_path, monkeypatch, mode):
    monkeypatch.setattr(chat, "BACKOFF", 0.001)
    folder = need(SHARED / "cases" / "evaluation" / "judge-no-reply")
    modes = {*re.findall(r'MODE=="(\w+)"', (folder / "fake.py").read_text())}
    assert modes - {"models401", "resp", "respthink"} == JUDGES.keys() | RATES.keys()      # others' cases
    with server(RATES[mode]) as (url, calls):
        scores, _ = score(tmp_path, "mmhal", folder / "answers.jsonl", "--template", folder / "template.json",
                          "--judge", url)
    assert (scores["score"], scores["n"], scores["unparsed"]) == (4, 3, 0)


@pytest.mark.parametrize("benchmark", ["mmhal", "chair"])
@pytest.mark.parametrize("mode", JUDGES)
def test_shared_judge_that_gives_no_rating(tmp_path, coco, monkeypatch, mode, benchmark):
    """With --partial the others' replies are scored, and none at all is an error with counts."""
    monkeypatch.setattr(chat, "BACKOFF", 0.001)
    folder, (fault, says) = need(SHARED / "cases" / "evaluation" / "judge-no-reply"), JUDGES[mode]
    if benchmark == "mmhal":
        good, answers = "Rating: 4", folder / "answers.jsonl"
        arguments = ["--template", folder / "template.json", "--partial", "--judge"]
    else:
        good, answers = '["dog"]', write_json(tmp_path / "a.jsonl", [
            {"image_id": 1, "caption": f"A cup on the {place}."} for place in ("desk", "bed", "floor")])
        arguments = [*coco, "--partial", "--extractor"]

    def respond(body, number):
        """The faulty reply to the first question, a good one to the others."""
        said = body["messages"][0]["content"]
        return fault if "What colour" in said or "desk" in said else reply(good)
    with server(lambda body, number: fault) as (url, calls):
        with pytest.raises(data.UserError, match=says):
            score(tmp_path, benchmark, answers, *arguments, url)
    assert not (tmp_path / "scores.json").exists()
    with server(respond) as (url, calls):
        scores, _ = score(tmp_path, benchmark, answers, *arguments, url)
    assert (scores["n"], scores["unparsed"]) == (2, int(says == UNREAD))
    assert scores["coverage"] == {"answered": 2 + (says == UNREAD), "of": 3}
    assert scores.get("score", 4) == 4 and scores.get("chair_s", 0) == 0


FAULTS = {
    "missing": (lambda rows: rows[:-2], "2 of 6 questions have no answer .*5.*6"),
    "twice": (lambda rows: [*rows, rows[0]], "1 answers appear twice .*ids .*1"),
    "stranger": (lambda rows: [*rows, {**rows[0], "question_id": 99}], "belong to none .*99"),
    "no text": (lambda rows: [*rows[:-1], {**rows[-1], "answer": 7}], "answer 6 .*has no text"),
    "another benchmark": (lambda rows: [{"settings": {"benchmark": "amber"}}, *rows],
                          "are to amber, not to pope")}


@pytest.mark.parametrize("partial", [[], ["--partial"]])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_joined_is_refused_with_its_ids(tmp_path, fault, partial):
    """A faulty line, too, is none that may be missing."""
    questions, rows = pope_file(tmp_path / "data")
    change, says = FAULTS[fault]
    answers = write_json(tmp_path / "a.jsonl", change(pope_answers(rows)))
    arguments = ["--questions", questions, *partial]
    if partial and fault == "missing":
        scores, _ = score(tmp_path, "pope", answers, *arguments)
        assert scores["n"] == 4 and scores["coverage"] == {"answered": 4, "of": 6}
        return
    with pytest.raises(data.UserError, match=says):
        score(tmp_path, "pope", answers, *arguments)
    assert not (tmp_path / "scores.json").exists()


def test_a_half_written_last_line_is_a_missing_answer(tmp_path, capsys):
    questions, rows = pope_file(tmp_path / "data")
    answers = write_json(tmp_path / "a.jsonl", pope_answers(rows))
    answers.write_text(answers.read_text()[:-9])
    with pytest.raises(data.UserError, match=r"1 of 6 questions have no answer \(ids .*6\)"):
        score(tmp_path, "pope", answers, "--questions", questions)
    scores, _ = score(tmp_path, "pope", answers, "--questions", questions, "--partial")
    assert scores["coverage"] == {"answered": 5, "of": 6} and scores["n"] == 5
    assert "5 answers, of 6 questions" in capsys.readouterr().out


def test_the_answers_are_never_written_over(tmp_path):
    questions, rows = pope_file(tmp_path / "data")
    answers = write_json(tmp_path / "scores.json", pope_answers(rows))
    with pytest.raises(data.UserError, match="would write over the answers"):
        score(tmp_path, "pope", answers, "--questions", questions)
    with pytest.raises(data.UserError, match="broken JSON"):
        score(tmp_path, "pope", write_json(tmp_path / "b.json", [], lines=False).parent / "b.json",
              "--questions",
              (tmp_path / "data" / "torn.json").write_text("[{") and tmp_path / "data" / "torn.json")


@pytest.mark.parametrize("mode", ["robust", "official"])
def test_score_amber_whole_and_in_parts(tmp_path, capsys, mode):
    folder, out = amber_folder(tmp_path / "data"), {}
    said = ["A puppy and a bird.", "A cat.", *["No"] * 5, "Yes"]
    everything = [{"id": i + 1, "response": text} for i, text in enumerate(said)]
    for name, part in (("all", everything), ("captions", everything[:2]), ("existence", everything[2:3])):
        answers = write_json(tmp_path / f"{name}.json", part, lines=False)
        out[name], items = score(tmp_path, "amber", answers, "--data", folder, "--mode", mode)
        assert len(items) == len(part)
    near = {"abs": 0.11}
    assert out["captions"]["chair"] == pytest.approx(100 / 3,
                                                     **near) and out["captions"]["hal"] == pytest.approx(50,
                                                                                                         **near)
    assert out["captions"]["cover"] == pytest.approx(200 / 3, **near) and "f1" not in out["captions"]
    assert out["existence"]["by_type"].keys() == {"existence"} and "f1" not in out["existence"]
    assert out["all"]["accuracy"] == pytest.approx(500 / 6, **near)
    assert out["all"]["amber_score"] == pytest.approx((100 - out["all"]["chair"] + out["all"]["f1"]) / 2,
                                                      **near)
    assert "AMBER score" in capsys.readouterr().out
    nouns = write_json(tmp_path / "nouns.jsonl", [{"id": 1, "nouns": ["dog"]},
                                                  {"id": 2, "nouns_in_vocab": ["bird"]}])
    scores, _ = score(tmp_path, "amber", tmp_path / "captions.json", "--data", folder, "--nouns", nouns,
                      "--mode", mode)
    assert scores["hal"] == pytest.approx(50, **near) and scores["cover"] == pytest.approx(100 / 3, **near)
    table = write_json(tmp_path / "table.json", {"bird dog": 0.9, "bird cat": 0.9}, lines=False)
    assert score(tmp_path, "amber", tmp_path / "captions.json", "--data", folder, "--similarity",
                 table)[0]["cog"] == 50
    with pytest.raises(data.UserError, match="so this is no file of nouns"):
        score(tmp_path, "amber", tmp_path / "captions.json", "--data", folder, "--nouns",
              tmp_path / "captions.json")


def coco_files(tmp_path):
    """COCO's four files about two images: 1 with a dog, 2 with a dog and a cat; and a synonyms file."""
    folder = tmp_path / "annotations"
    folder.mkdir()
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "height": 3} for i in (1, 2, 9)]
    marks = [{"image_id": i, "category_id": k, "id": n, "segmentation": [[1.5, 2]], "iscrowd": 0}
             for n, (i, k) in enumerate([(1, 18), (2, 18), (9, 17)])]
    for split in ("train", "val"):
        here = split == "val"
        head = {"info": {"year": 2014}, "licenses": [{"id": 1, "name": "x", "url": ""}],
                "images": images * here}
        kinds = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
        write_json(folder / f"instances_{split}2014.json",
                   head | {"annotations": marks * here, "categories": kinds},
                   lines=False)
        said = [{"image_id": 2, "id": 5, "caption": "A kitten sleeps."},
                {"image_id": 1, "id": 6, "caption": "Grass."}]
        write_json(folder / f"captions_{split}2014.json", head | {"annotations": said * here}, lines=False)
    (tmp_path / "synonyms.txt").write_text("dog, puppy\ncat, kitten\nbird, gull\n")
    return ["--annotations", folder, "--synonyms", tmp_path / "synonyms.txt"]


@pytest.fixture
def coco(tmp_path):
    return coco_files(tmp_path)


CAPTIONS = [{"question_id": 0, "image_id": 1, "prompt": "Describe it.",
             "text": "Two puppies and a gull on the grass."},
            {"question_id": 1, "image_id": 2, "prompt": "Describe it.",
             "text": "A dog beside a sleeping cat."},
            {"question_id": 2, "image_id": 2, "prompt": "What is it?", "text": "Green grass."}]


@pytest.mark.parametrize("scorer", ["objhal", "original"])
def test_score_chair_by_hand(tmp_path, coco, capsys, scorer):
    answers = write_json(tmp_path / "a.jsonl", CAPTIONS)
    scores, items = score(tmp_path, "chair", answers, *coco, "--scorer", scorer)
    assert scores["chair_s"] == pytest.approx(1 / 3) and scores["chair_s_refine"] == pytest.approx(1 / 2)
    assert scores["chair_i"] == pytest.approx(1 / 4) and scores["recall"] == pytest.approx(3 / 5)
    assert (scores["n"], scores["n_with_objects"]) == (3, 2) and scores["mean_words"] == pytest.approx(16 / 3)
    assert [item["hallucinated"] for item in items] == [["bird"], [], []]
    assert "CHAIR_s, of those with an object   50.0" in capsys.readouterr().out
    first = write_json(tmp_path / "b.json", [{"image_id": line["image_id"], "caption": line["text"]}
                                             for line in CAPTIONS], lines=False)      # the first CHAIR's form
    assert score(tmp_path, "chair", first, *coco, "--scorer", scorer)[0] == scores


def test_coco_files_that_are_missing_or_of_other_images_are_named(tmp_path, coco):
    answers = write_json(tmp_path / "a.jsonl", [{**CAPTIONS[0], "image_id": 77}])
    with pytest.raises(data.UserError, match="images that the annotations do not hold"):
        score(tmp_path, "chair", answers, *coco)
    (coco[1] / "captions_train2014.json").unlink()
    with pytest.raises(data.UserError, match="captions_train2014.json could not be read"):
        score(tmp_path, "chair", answers, *coco)


def last_line(body):
    return body["messages"][0]["content"].splitlines()


def test_an_extractor_is_asked_once_a_caption_and_again_for_nonsense(tmp_path, coco, capsys, monkeypatch):
    """Captions of up to three words are not asked about; a reply that is no list is asked for again."""
    monkeypatch.setattr(chat, "BACKOFF", 0.001)
    answers = write_json(tmp_path / "a.jsonl", CAPTIONS)
    said = {"puppies": '["puppies", "gull"]', "beside": 'Sure!\n["dog", "cat"]'}

    def respond(body, number):
        key, = [key for key in said if key in body["messages"][0]["content"]]
        return reply("I cannot do that.") if number < 3 else reply(said[key])
    with server(respond) as (url, calls):
        scores, items = score(tmp_path, "chair", answers, *coco, "--extractor", url)
        assert len(calls) == 4 and all("Describe it." in c[2]["messages"][0]["content"] for c in calls)
        assert score(tmp_path, "chair", answers, *coco, "--extractor", url)[0] == scores and len(calls) == 4
    assert scores["chair_i"] == pytest.approx(1 / 4) and scores["n"] == 3
    assert items[0]["hallucinated"] == ["bird"] and scores["extractor"] == f"{url} (judge-1)"
    assert scores["extractor_prompt"].startswith("built-in, in our own words")
    assert len(scores["extractor_prompt_sha256"]) == 64 and "our own words" in capsys.readouterr().out
    saved, _ = score(tmp_path, "chair", answers, *coco, "--extractor", tmp_path / "scores.extractor.jsonl")
    assert saved["chair_i"] == scores["chair_i"] and saved["extractor_prompt"] == scores["extractor_prompt"]
    official = write_json(tmp_path / "replies.jsonl", [{"question_id": 0, "judge_reply": said["puppies"]},
                                                       {"question_id": 1, "judge_reply": "nothing"},
                                                       {"question_id": 2, "judge_reply": "[]"}])
    scores, _ = score(tmp_path, "chair", answers, *coco, "--extractor", official)
    assert (scores["unparsed"], scores["n"]) == (1, 2)
    assert scores["extractor_prompt"] == "the replies do not say which"


def judged(body, number):
    """A judge that likes answers with a dog in them."""
    text = body["messages"][0]["content"]
    return reply("It is right.\nRating: 5" if "a dog" in text.split("which you grade:")[1].splitlines()[0]
                 else "It is not.\n**Rating:** 1")


def mmhal_answers(rows, said=("a dog", "a bird")):
    return [{"question_id": i, "image_id": row["image_id"], "prompt": row["question"], "text": said[i % 2]}
            for i, row in enumerate(rows)]


def test_score_mmhal_with_a_server_and_with_what_it_said(tmp_path, capsys):
    template, rows = mmhal_file(tmp_path / "data")
    answers = write_json(tmp_path / "a.jsonl", mmhal_answers(rows))
    with server(judged) as (url, calls):
        scores, items = score(tmp_path, "mmhal", answers, "--template", template, "--judge", url)
    assert len(calls) == 8 and calls[0][2] | {"temperature": 0.0} == calls[0][2]
    assert scores["score"] == 3 and scores["hallucination_rate"] == 0.5 and scores["unparsed"] == 0
    assert [scores["by_category"][kind]["score"] for kind in ("attribute", "adversarial")] == [5, 1]
    assert "our own words" in scores["judge_prompt"] and "**Rating:** 1" in items[1]["reply"]
    merged = write_json(tmp_path / "m.json", [{**row, "model_answer": line["text"]} for row, line in
                                              zip(rows, mmhal_answers(rows), strict=True)], lines=False)
    again, _ = score(tmp_path, "mmhal", merged, "--template", template, "--judge",
                     tmp_path / "scores.judge.jsonl")
    assert again["score"] == 3
    official, _ = score(tmp_path, "mmhal", answers, "--template", template, "--judge",
                        tmp_path / "scores.judge.jsonl",
                        "--mode", "official")
    assert official["score"] == 2.5                          # to the official reader "**Rating:** 1" is a 0
    changed = write_json(tmp_path / "b.jsonl", mmhal_answers(rows, ("a cat", "a bird")))
    with pytest.raises(data.UserError, match="replies to other requests"):
        score(tmp_path, "mmhal", changed, "--template", template, "--judge", tmp_path / "scores.judge.jsonl")


@pytest.mark.parametrize("fault", [(500, "oops"), (200, "<html>sign in</html>"), None, (200, "{}")])
def test_a_judge_that_fails_is_a_counted_retry_and_never_a_number(tmp_path, capsys, monkeypatch, fault):
    monkeypatch.setattr(chat, "BACKOFF", 0.001)
    template, rows = mmhal_file(tmp_path / "data")
    answers = write_json(tmp_path / "a.jsonl", mmhal_answers(rows))

    def respond(body, number):
        return fault if "what is this ? 3" in body["messages"][0]["content"] else judged(body, number)
    with server(respond) as (url, calls):
        with pytest.raises(data.UserError, match="judge did not reply to 1 of 8 requests"):
            score(tmp_path, "mmhal", answers, "--template", template, "--judge", url)
        assert len(calls) == 7 + 4 and not (tmp_path / "scores.json").exists()
        assert "1 of 8 requests got no reply (last: " in capsys.readouterr().err
        scores, _ = score(tmp_path, "mmhal", answers, "--template", template, "--judge", url, "--partial")
        assert scores["n"] == 7 and scores["coverage"] == {"answered": 7, "of": 8} and len(calls) == 15
        assert "7 answers, of 8 questions" in capsys.readouterr().out
    with server(judged) as (url, calls):
        assert score(tmp_path, "mmhal", answers, "--template", template, "--judge", url)[0]["n"] == 8
        assert len(calls) == 1                                                             # nothing was lost


def test_a_judge_that_rambles_gives_no_number(tmp_path, monkeypatch, capsys):
    """Each is asked again, a bounded number of times; what still cannot be read is counted and left out."""
    monkeypatch.setattr(chat, "BACKOFF", 0.001)
    template, rows = mmhal_file(tmp_path / "data")
    answers = write_json(tmp_path / "a.jsonl", mmhal_answers(rows))
    arguments = ["--template", template, "--judge"]
    with server(lambda body, n: reply("What a nice day")) as (url, calls):
        with pytest.raises(data.UserError, match="none of 8 replies can be read"):
            score(tmp_path, "mmhal", answers, *arguments, url)
    assert len(calls) == 8 * 4 and not (tmp_path / "scores.json").exists()

    def respond(body, number):
        vague = "what is this ? 3" in body["messages"][0]["content"]
        return reply("A nice day") if vague else judged(body, number)
    with server(respond) as (url, calls):
        scores, _ = score(tmp_path, "mmhal", answers, *arguments, url)
    assert (scores["unparsed"], scores["n"], len(calls)) == (1, 7, 7 + 4)
    assert "1 of them unreadable" in capsys.readouterr().out


@pytest.mark.parametrize("mode, unparsed", [("robust", 1), ("official", 1 + 3)])             # **Rating:** 1
def test_a_rating_in_a_reply_that_is_cut_off_is_no_rating(tmp_path, monkeypatch, capsys, mode, unparsed):
    """In neither mode: the official scripts know no such reply."""
    monkeypatch.setattr(chat, "BACKOFF", 0.001)
    template, rows = mmhal_file(tmp_path / "data")
    answers = write_json(tmp_path / "a.jsonl", mmhal_answers(rows))
    arguments = ["--template", template, "--mode", mode, "--judge"]

    def respond(body, number):
        cut = "what is this ? 3" in body["messages"][0]["content"]
        return reply("My first impression is Rating: 2, but", "length") if cut else judged(body, number)
    with server(respond) as (url, calls):
        scores, _ = score(tmp_path, "mmhal", answers, *arguments, url, "--judge_tokens", "9")
        assert calls[0][2]["max_tokens"] == 9
    assert (scores["unparsed"], scores["n"], len(calls)) == (unparsed, 7, 7 + 4)
    assert "judge: 1 of 8 replies are cut off" in capsys.readouterr().err
    (tmp_path / "scores.judge.jsonl").unlink()
    with server(lambda body, n: reply("Rating: 2, but", "length")) as (url, calls):
        with pytest.raises(data.UserError, match="none of 8 replies can be read"):
            score(tmp_path, "mmhal", answers, *arguments, url, "--partial")


def test_lists_that_are_cut_off_leave_nothing_to_score(tmp_path, coco, monkeypatch, capsys):
    monkeypatch.setattr(chat, "BACKOFF", 0.001)
    for said, says in ((reply('["dog"]', "length"), "none of 1 replies can be read"),
                       (reply(None, refusal="no"), "the extractor did not reply to 1 of 1 requests")):
        answers = write_json(tmp_path / "a.jsonl", [{"image_id": 1, "caption": f"a dog and {says}"}])
        with server(lambda body, n, said=said: said) as (url, calls):
            with pytest.raises(data.UserError, match=says):
                score(tmp_path, "chair", answers, *coco, "--extractor", url, "--partial")
        assert len(calls) == 4
    assert "{'a refusal': 1}" in capsys.readouterr().err


def test_without_a_judge_the_prompts_are_written_for_another(tmp_path):
    template, rows = mmhal_file(tmp_path / "data")
    answers = write_json(tmp_path / "a.jsonl", mmhal_answers(rows))
    prompt = tmp_path / "judge.txt"
    prompt.write_text("Known: {}. {} {} {} Rating?")
    with pytest.raises(data.UserError, match="scores.prompts.jsonl holds the 8 prompts"):
        score(tmp_path, "mmhal", answers, "--template", template, "--judge_prompt", prompt)
    first = data.read_records(tmp_path / "scores.prompts.jsonl")[0]
    assert first["messages"][0]["content"] == ("Known: Dog, Cat. what is this ? 0 A dog and a cat. "
                                                "a dog Rating?")
    wrong = write_json(tmp_path / "wrong.json", [{"question": "what ?"}], lines=False)
    with pytest.raises(data.UserError, match="wrong.json, record 1 has no 'image_content'.*no MMHal"):
        score(tmp_path, "mmhal", answers, "--template", wrong)
    prompt.write_text("Known: {}. {}")
    with pytest.raises(data.UserError, match="judge.txt must hold {} {} {} {}"):
        score(tmp_path, "mmhal", answers, "--template", template, "--judge_prompt", prompt)


def test_a_local_model_judges(m, tmp_path, capsys, monkeypatch):
    """It is asked like a server; a random one says nothing that can be read, and no number comes of it."""
    template, rows = mmhal_file(tmp_path / "data", 2)
    answers = write_json(tmp_path / "a.jsonl", mmhal_answers(rows))
    prompt = tmp_path / "judge.txt"
    prompt.write_text("{} {} {} {} ?")
    arguments = ["--template", template, "--judge", m.front.folder, "--judge_prompt", prompt]
    with pytest.raises(data.UserError, match="none of 2 replies can be read"):
        score(tmp_path, "mmhal", answers, *arguments)
    from model import generation
    complete = generation.complete
    monkeypatch.setattr(generation, "complete", lambda *a, **k: [(f"{text} Rating: 4", ended)
                                                          for text, ended in complete(*a, **k)])
    (tmp_path / "scores.judge.jsonl").unlink()
    scores, _ = score(tmp_path, "mmhal", answers, *arguments)
    assert scores["score"] == 4 and scores["judge_prompt"] == str(prompt)


OFFICIAL = {"pope": {"question_id": "question_id", "question": "question", "answer": "answer"},
            "amber": {"id": "id", "answer": "response"},
            "mmhal": {key: key for key in KEYS["mmhal"] - {"question_id"}} | {"answer": "model_answer"}}


@pytest.mark.parametrize("benchmark", OFFICIAL)
def test_answers_score_alike_in_our_form_and_as_the_official_scripts_take_them(m, tmp_path, benchmark):
    path, rows = FILES[benchmark](tmp_path / "data")
    answers = tmp_path / "answers.jsonl"
    lines = ask(m, benchmark, path, answers)[1:]
    official = write_json(tmp_path / "official.json", [
        {theirs: line[ours] for ours, theirs in OFFICIAL[benchmark].items()} for line in lines], lines=False)
    arguments = {"pope": ["--questions", path], "amber": ["--data", path]}.get(benchmark,
                                                                               ["--template", path])
    if benchmark == "mmhal":
        saved = write_json(tmp_path / "replies.jsonl", [{"id": i,
                                                         "reply": f"Rating: {i % 7}"} for i in range(8)])
        arguments += ["--judge", saved]
    ours, _ = score(tmp_path, benchmark, answers, *arguments)
    assert ours.pop("settings")["benchmark"] == benchmark
    assert score(tmp_path, benchmark, official, *arguments)[0] == ours


def test_quick_scores_a_small_file_while_training(m, tmp_path, coco):
    path, _ = pope_file(tmp_path / "data")
    found = answering.quick(m, path, tmp_path / "pope.jsonl")
    assert found.keys() == {"pope_accuracy", "pope_f1",
                            "pope_yes_ratio"} and 0 <= found["pope_accuracy"] <= 100
    captions = write_json(tmp_path / "captions.jsonl", [
        {"question_id": i, "image": f"COCO_val2014_{i:012d}.jpg", "text": "what is this ?"} for i in (1, 2)])
    write_images(tmp_path, ["COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg"])
    found = answering.quick(m, captions, tmp_path / "chair.jsonl", annotations=coco[1], synonyms=coco[3])
    assert found.keys() == {"chair_s", "chair_i", "recall"}


@pytest.mark.parametrize("benchmark, n", [("pope", 9000), ("amber", 15220)])
def test_scoring_takes_seconds_and_no_torch(tmp_path, benchmark, n):
    """The whole of the largest benchmarks, start-up included, in one process on one core."""
    (tmp_path / "data").mkdir()
    if benchmark == "pope":
        for split in benchmarks.SPLITS:
            rows = [{"question_id": i, "image": f"{i // 6}.jpg",
                     "text": f"Is there a dog in the image? {split}",
                     "label": "no" if i % 2 else "yes"} for i in range(3000)]
            write_json(tmp_path / "data" / f"coco_pope_{split}.json", rows)
        answers = [{"question_id": i, "split": split, "answer": "Yes, there is a dog in the image."}
                   for split in benchmarks.SPLITS for i in range(3000)]
        arguments = ["--questions", tmp_path / "data"]
    else:
        words = [f"w{i}" for i in range(400)] + ["dog", "cat"]
        notes = [{"id": i, "type": "generative", "truth": ["dog", *words[:5]], "hallu": ["cat", *words[5:9]]}
                 for i in range(1, 1005)]
        notes += [{"id": i, "type": "discriminative-attribute-state", "truth": "no"} for i in range(1005,
                                                                                                    15221)]
        write_json(tmp_path / "data" / "annotations.json", notes, lines=False)
        (tmp_path / "data" / "relation.json").write_text(json.dumps({word: [word + "s"] for word in words}))
        (tmp_path / "data" / "safe_words.txt").write_text("line\n")
        caption = "The image features two dogs that lie on a bed beside a cat, while a person looks on. " * 5
        answers = [{"id": i, "response": caption if i < 1005 else "No, it is not."} for i in range(1, 15221)]
        arguments = ["--data", tmp_path / "data"]
    assert len(answers) == n
    path = write_json(tmp_path / "a.json", answers, lines=False)
    code = "import sys, eval_hallu; eval_hallu.main(); sys.exit('torch' in sys.modules)"
    start = os.times()
    done = subprocess.run([sys.executable, "-c", code, "score", benchmark, "--answers", path, "--out",
                           tmp_path / "s.json", *arguments], capture_output=True, text=True, cwd=ROOT)
    used = os.times().children_user - start.children_user      # of the processor: others may be at work
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["n"] == n
    assert used < 5


# ------------------------------------------------------------------------------- the official numbers
def golden(kind, pattern):
    return [pytest.param(path, id=f"{path.parent.name}-{path.stem}")
            for path in sorted((GOLDEN / kind).glob(pattern))]


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("pope", "responses_*.jsonl"))
def test_the_command_gives_popes_official_numbers(tmp_path, path):
    expected = json.loads((path.parent / "expected.json").read_text())[path.stem.removeprefix("responses_")]
    scores, _ = score(tmp_path, "pope", path, "--questions", need(SHARED / expected["label_file"]), "--mode",
                      "official")
    official = expected["official"]
    assert [scores[k] for k in ("tp", "fp", "tn", "fn")] == [official[k] for k in ("TP", "FP", "TN", "FN")]
    for key in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert scores[key] == pytest.approx(official[key], abs=1e-12)


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("amber", "expected.json"))
def test_the_command_gives_ambers_official_numbers(tmp_path, path):
    data_folder = need(SHARED / "official" / "amber")
    for case, expected in json.loads(path.read_text()).items():
        name, _, how = case.partition("|")
        arguments = ["--data", data_folder, "--mode", "official"]
        if (nouns := path.parent / f"nouns.{name}.jsonl").exists():
            arguments += ["--nouns", nouns]
        if how == "similarity=table":
            arguments += ["--similarity", path.parent / "similarity_table.json"]
        if "printed" not in expected or not (path.parent / f"{name}.json").exists():
            continue
        scores, _ = score(tmp_path, "amber", path.parent / f"{name}.json", *arguments)
        for task, numbers in expected["printed"].items():
            part = "existence" if task == "Exsitence" else task.lower()                    # as it is printed
            found = scores if "Task" in task else scores["by_type"][part]
            assert {key: found[key.lower()] for key in numbers} == numbers, (case, task)


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("chair", "extractor_replies.*.jsonl"))
def test_the_command_gives_object_halbenchs_official_numbers(tmp_path, path):
    name = path.stem.removeprefix("extractor_replies.")
    expected = json.loads((path.parent / "expected.json").read_text())
    arguments = ["--annotations", path.parent / "coco80", "--mode", "official", "--synonyms",
                 need(SHARED / "official" / "objhal" / "synonyms_refine.rlhfv.txt")]
    for case, extra in ((f"rlhfv_nogpt|{name}", []), (f"rlhfv_gpt_canned|{name}", ["--extractor", path])):
        scores, _ = score(tmp_path, "chair", path.parent / f"responses_{name}.jsonl", *arguments, *extra)
        for key, theirs in (("chair_s", "CHAIRs"), ("chair_s_refine", "CHAIRs_refine"), ("chair_i", "CHAIRi"),
                            ("recall", "obj_rec"), ("mean_words", "avg_word_len")):
            assert scores[key] == pytest.approx(expected[case][theirs], abs=1e-9), (case, key)


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("mmhal", "reviews_*.json"))
def test_the_command_gives_mmhals_official_numbers(tmp_path, path):
    expected = json.loads((path.parent / "expected.json").read_text())[path.stem.removeprefix("reviews_")]
    template = need(SHARED / "official" / "mmhal" / "mmhal-bench_answer_template.json")
    prompt = need(SHARED / "official" / "mmhal" / "judge_prompt.txt")
    with pytest.raises(data.UserError, match="96 prompts"):
        score(tmp_path, "mmhal", path.parent / "answers.jsonl", "--template", template, "--judge_prompt",
              prompt)
    asked = [line["messages"][0]["content"] for line in data.read_records(tmp_path / "scores.prompts.jsonl")]
    hashes = json.loads((path.parent / "expected.json").read_text())["prompts"]["sha256"]
    assert [hashlib.sha256(text.encode()).hexdigest() for text in asked] == hashes
    for answers in ("answers.jsonl", "answers_merged.json"):
        scores, items = score(tmp_path, "mmhal", path.parent / answers, "--template", template, "--judge",
                              path,
                              "--mode", "official")
        assert [item["score"] for item in items] == expected["scores"]
        assert scores["score"] == pytest.approx(expected["average"])
        assert scores["hallucination_rate"] == pytest.approx(expected["hallucination_rate"])
        assert {k: v["score"] for k,
                v in scores["by_category"].items()} == pytest.approx(expected["per_type"])


# ------------------------------------------------------------------------------- other people's evaluators
@pytest.mark.parametrize("published", [True, False])
def test_the_merged_model_answers_alike_under_transformers_alone(tmp_path, published):
    """As LMMs-Eval loads and asks a folder (AutoProcessor, its chat template, generate): the answers are
    those of our base with the adapter."""
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, LlavaProcessor

    import lora
    from model import vlm
    folder = write_llava(tmp_path / "model", seed=5)
    policy = vlm.load(folder)
    front = policy.front
    if published:                                   # with a processor_config.json: else merge writes one
        LlavaProcessor(AutoImageProcessor.from_pretrained(folder, backend="pil"), front.tokenizer,
                       patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
                       chat_template=front.template).save_pretrained(folder)
    assert (folder / "processor_config.json").exists() == published
    lora.add_lora(policy.model, 4, 8)
    torch.manual_seed(1)
    for weight in lora.lora_parameters(policy.model).values():
        weight.data.normal_(std=.2)
    lora.save(policy.model, tmp_path / "adapter", str(folder))
    path, rows = pope_file(tmp_path / "data")
    ours, base = ([line["answer"] for line in ask(m, "pope", path, tmp_path / f"{name}.jsonl")[1:]]
                  for name, m in (("ours", policy), ("base", vlm.load(folder))))
    lora.merge_folder(folder, tmp_path / "adapter", tmp_path / "merged")
    processor = AutoProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    theirs = []
    for row in rows:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["text"]}]}
        text = processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        inputs = processor(images=Image.open(tmp_path / "data" / row["image"]), text=text,
                           return_tensors="pt", add_special_tokens=False)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=5)
        theirs += processor.batch_decode(out[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)
    assert [text.strip() for text in theirs] == ours != base
