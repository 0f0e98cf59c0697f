"""eval_hallu.py ask: in the terminal, and on its page."""
import base64
import http.client
import io
import json
import math
import sys
import threading

import pytest
import torch

import data
import eval_hallu
import lora
from classroom import ask as page
from evaluation import benchmarks, dialogue
from model import ask, vlm

CAPTION = "describe the picture ."


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: an adapter that moves the model, and two scenes."""
    from classroom import pairs
    folder = tmp_path_factory.mktemp("run")
    pairs.main_scenes(["--n", "2", "--questions", "4", "--out", str(folder / "scenes")])
    m = vlm.load("classroom")
    lora.add_lora(m.model, 4, 8)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in lora.lora_parameters(m.model).items():
            if name.endswith("lora_B"):
                weight.normal_(0, 0.03)
    lora.save(m.model, folder / "adapter", str(m.front.folder))
    return folder, m


def talk(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["eval_hallu.py", "ask", *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    eval_hallu.main()
    return capsys.readouterr().out


def test_each_line_is_echoed_and_answered_before_and_after(run, monkeypatch, capsys):
    folder, m = run
    out = talk(monkeypatch, capsys, ["--adapter", folder / "adapter"], f"{CAPTION}\n\nis there a cup ?\n")
    assert out.index(f"> {CAPTION}") < out.index("before:") < out.index("> is there a cup ?")
    assert out.count("before:") == out.count("after:") == 2
    assert str(folder / "scenes") in out and "owed to the picture" in out


def test_one_answer_without_an_adapter_about_a_picture_of_ones_own(run, monkeypatch, capsys, tmp_path):
    folder, m = run
    scene = next(iter(benchmarks.truths(folder / "scenes")))
    data.read_image(scene).save(tmp_path / "own.png")
    out = talk(monkeypatch, capsys, ["--model", "classroom", "--image", tmp_path / "own.png"], CAPTION)
    assert "before" not in out and "answer:" in out and "*" not in out


def test_an_end_without_a_question_is_no_error(run, monkeypatch, capsys):
    assert "before" not in talk(monkeypatch, capsys, ["--adapter", run[0] / "adapter"], "")


def test_there_must_be_a_model(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        talk(monkeypatch, capsys, [], CAPTION)
    assert "give --model" in end.value.code


def test_invented_words_are_in_stars_and_columns_are_side_by_side(monkeypatch):
    monkeypatch.setenv("COLUMNS", "84")
    found = {"before": {"text": "a cup and a lamp .", "words": [], "invented": ["lamp"]},
             "after": {"text": "a cup .", "words": [("a", 0.25), ("cup", 3.0)], "invented": []}}
    lines = list(dialogue.columns(found))
    assert lines[1] == "a cup and a *lamp* .".ljust(40) + " | a cup ."
    assert lines[-1].endswith("| a +0.2 cup +3.0")


def test_words_owe_together_what_the_answer_owes(run):
    _, m = run
    image = data.read_image(next(iter(benchmarks.truths(run[0] / "scenes"))))
    words = dialogue.owed(m, image, CAPTION, "this is a kitchen . you can see a cup .")
    blank = data.rejected_image("blank", image, 0, "")
    gains = [dialogue.token_logps(m, one, CAPTION, "this is a kitchen . you can see a cup .")[:-1].sum()
             for one in (image, blank)]
    assert [word for word, _ in words] == "this is a kitchen . you can see a cup .".split()
    assert math.isclose(sum(nats for _, nats in words), gains[0] - gains[1], abs_tol=1e-4)


# ---- the page ----
@pytest.fixture(scope="module")
def site(run):
    folder, m = run
    with page.Site(m, benchmarks.truths(folder / "scenes"), 64) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found, found.server_port
        found.shutdown()


def request(port, path, body=None, host=None, **headers):
    """(status, text) of a request to the page's server."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers |= {"Host": host or f"127.0.0.1:{port}"}
    text = body if isinstance(body, str | None) else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, text, headers)
    reply = connection.getresponse()
    return reply.status, reply.read().decode()


def test_the_page_answers_and_weighs_two_crops_as_python_does(run, site):
    _, m = run
    found, port = site
    url = next(iter(found.paths))
    status, said = request(port, "/ask", {"question": CAPTION, "image": url})
    said = json.loads(said)
    image = data.read_image(base64.b64decode(url.rpartition(",")[2]))
    text = said["answers"]["after"]["text"]
    assert status == 200 and said["answers"] == json.loads(json.dumps(
        dialogue.answers(m, image, CAPTION, found.scenes[found.paths[url]])))
    assert math.isclose(said["reward"], page.reward(m, image, CAPTION, text), abs_tol=1e-5)
    w, h = image.size
    for crop in [0.25, 0.25, 0.75, 0.75], [0, 0.5, 0.5, 1]:
        status, weighed = request(port, "/reward", {"question": CAPTION, "answer": text, "image": url,
                                                    "crop": crop})
        part = image.crop([round(share * side) for share, side in zip(crop, (w, h, w, h), strict=True)])
        wanted = page.reward(m, part, CAPTION, text)
        assert status == 200 and math.isclose(json.loads(weighed)["reward"], wanted, abs_tol=1e-5)
        assert not math.isclose(wanted, said["reward"], abs_tol=1e-3)


def test_the_reward_is_the_losses_own(run):
    """BETA times the difference of Logps.chosen that the naive forward computes."""
    _, m = run
    image = data.read_image(next(iter(benchmarks.truths(run[0] / "scenes"))))
    answer = "this is a kitchen ."
    prompt, response = m.front.prompt_ids(CAPTION, (image.size,)), m.front.response_ids(answer)
    pair = data.Pair("p", prompt, prompt, response, response, (image.size,), (image.size,))
    features = vlm.encode_images(m, vlm.Batch([pair], m.front.prepare([image])))
    with torch.no_grad():
        policy = vlm.naive(m, [pair], features, {"chosen"}).chosen
        with vlm.base_of(m) as base:
            reference = vlm.naive(base, [pair], features, {"chosen"}).chosen
    assert math.isclose(page.reward(m, image, CAPTION, answer), 0.1 * (policy - reference), abs_tol=1e-5)


def test_the_page_shows_the_scenes_and_lets_nothing_else_load(site):
    found, port = site
    status, text = request(port, "/")
    assert status == 200 and text.count('class="scene"') == len(found.paths) == 2
    assert "connect-src 'self'" in text and "http://" not in text and "https://" not in text
    assert request(port, "/etc/passwd")[0] == 404


@pytest.mark.parametrize("host, more", [
    ("evil.example:80", {}),
    (None, {"Origin": "http://evil.example"})])
def test_another_page_is_refused(site, host, more):
    _, port = site
    assert request(port, "/", host=host, **more)[0] == 403
    assert request(port, "/ask", {"question": "a", "image": None}, host=host, **more)[0] == 403


def test_over_20_mb_is_refused_unread(site):
    _, port = site
    status, says = request(port, "/ask", "x", **{"Content-Length": str(21 << 20)})
    assert status == 413 and "20 MB" in says


@pytest.mark.parametrize("path, body", [
    ("/ask", "{"),
    ("/ask", {"question": 3, "image": None}),
    ("/ask", {"question": "a", "image": None, "more": 1}),
    ("/ask", {"question": "a", "image": "data:image/png;base64,!!!"}),
    ("/ask", {"question": "a", "image": "data:image/png;base64,AAAA"}),
    ("/ask", {"question": "<image> a", "image": None}),
    ("/nothing", {"question": "a", "image": None}),
    ("/reward", {"question": "a", "answer": "b", "image": ask.image_url, "crop": [0, 0, 1]}),
    ("/reward", {"question": "a", "answer": "b", "image": ask.image_url, "crop": [0.5, 0, 0.2, 1]}),
    ("/reward", {"question": "a", "answer": "", "image": None, "crop": [0, 0, 1, 1]})])
def test_what_a_page_would_not_send_is_a_sentence(site, path, body):
    found, port = site
    if body is not None and isinstance(body, dict) and callable(body.get("image")):
        body = body | {"image": next(iter(found.paths))}
    status, said = request(port, path, body)
    assert status == 400 and json.loads(said)["error"]
    assert request(port, "/")[0] == 200                       # and the server goes on


def test_a_question_without_a_picture_is_answered(site):
    _, port = site
    status, said = request(port, "/ask", {"question": CAPTION, "image": None})
    assert status == 200 and set(json.loads(said)["answers"]) == {"before", "after"}
