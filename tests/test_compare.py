"""compare.py: paired differences by hand; papers/votes.py: a page that is blind, and votes counted right."""
import base64
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from conftest import picture
from test_eval_hallu import (
    CAPTIONS,
    amber_folder,
    coco_files,
    mmhal_answers,
    mmhal_file,
    pope_answers,
    pope_file,
    score,
    write_json,
)

import data
import eval_hallu
from evaluation import amber, metrics, stats, words

LONG = "A </script><script>alert(1)</script> & a <b>cat</b>."


def two_files(folder, n=20, same=0, **more):
    """Answers of two models: B's end in `no cat`; the first `same` are equal."""
    lines = [{"question_id": i, "image_id": i, "prompt": f"Describe it, {i}.", **more} for i in range(n)]
    a = write_json(folder / "model-a.jsonl", [{**line, "text": LONG} for line in lines])
    b = write_json(folder / "model-b.jsonl", [{**line, "text": LONG if i < same else "There is no cat."}
                                              for i, line in enumerate(lines)])
    return a, b


def run(*arguments):
    o = eval_hallu.parse(list(map(str, arguments)))
    o.run(o)


def content(page):
    """What the page holds as data."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page,
                                re.DOTALL)[1])


# ------------------------------------------------------------------------------- paired differences
def test_two_pope_files_are_compared_by_their_items(tmp_path, capsys):
    questions, rows = pope_file(tmp_path / "data", n=40)
    files, items = [], []
    for name in "ab":                                                        # A: 20 of the 40 are right
        said = ["yes" if name == "a" else row["label"] for row in rows]
        lines = [{**line, "answer": text} for line, text in zip(pope_answers(rows), said, strict=True)]
        files.append(write_json(tmp_path / f"{name}.jsonl", lines))
        score(tmp_path, "pope", files[-1], "--questions", questions)
        items.append((tmp_path / "scores.items.jsonl").rename(tmp_path / f"{name}.items.jsonl"))
    capsys.readouterr()
    run("compare", *files, "--items", *items, "--out", tmp_path / "page.html")
    said = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in said.splitlines() if line}
    assert rows["accuracy"][:3] == ["50.0", "100.0", "+50.0"] and rows["f1"][:3] == ["66.7", "100.0", "+33.3"]
    assert "without pictures" in said and (tmp_path / "page.html").exists()
    run("compare", *files, "--out", tmp_path / "page.html")
    assert "give --items" in capsys.readouterr().out


def test_the_classrooms_difference_is_that_of_metrics(tmp_path, capsys):
    truth = {"present": ["dog"], "absent": ["cat"]}
    a = [{"id": i, "image": f"{i}.png", "question": "what ?", "kind": "caption", "truth": truth,
          "answer": "a dog and a cat" if i % 3 else "a dog"} for i in range(30)]
    b = [{**line, "answer": "a dog" if i % 2 else "a cat"} for i, line in enumerate(a)]
    run("compare", write_json(tmp_path / "a.jsonl", a), write_json(tmp_path / "b.jsonl", b), "--out",
        tmp_path / "page.html")
    said, theirs = capsys.readouterr().out, metrics.difference(a, b)
    for measure in ("chair_s", "chair_i", "cover"):
        low, high = theirs[measure]["interval"]
        line, = re.findall(rf"^{measure} .*", said, re.MULTILINE)
        assert f"{theirs[measure]['change']:+.1f}   {low:.1f} to {high:.1f}" in line


def amber_captions(texts):
    truth = [{"id": i, "type": "generative", "truth": ["dog", "sky"], "hallu": ["cat", "sun"]}
             for i in range(6)]
    relation = {word: [] for word in ("dog", "cat", "sky", "sun")}
    answers = [{"id": i, "response": text} for i, text in enumerate(texts)]
    return amber.measures([], answers, truth, relation, [], str.split)[1]


def amber_questions(said):
    notes = [{"id": i, "type": "relation", "truth": "no"} for i in range(6)]
    answers = [{"id": i, "response": said} for i in range(6)]
    return amber.measures([], answers, notes, {}, [], {})[1]


def chair_items(text):
    answers = [{"question_id": i, "image_id": i, "text": text} for i in range(6)]
    truth = {i: {"dog"} for i in range(6)}
    return metrics.chair(answers, truth, {"dog": "dog", "cat": "cat"}, words.lemmas)[1]


def mmhal_items(scores):
    template = [{"image_content": [], "question": "q", "gt_answer": "a"} for _ in scores]
    answers = [{"question_id": i, "answer": "a"} for i, _ in enumerate(scores)]
    return metrics.mmhal(template, answers, {i: f"Rating: {score}" for i, score in enumerate(scores)})[1]


ITEMS = {
    "chair": (chair_items("a dog , a cat"), chair_items("a dog"),
              {"chair_s": (100, 0), "chair_s_refine": (100, 0), "chair_i": (50, 0), "recall": (100, 100),
               "mean_words": (5, 2)}),
    "amber": (amber_captions(["dog dog cat dog"] * 6), amber_captions(["dog sky dog sky"] * 6),
              {"chair": (25, 0), "cover": (50, 100), "clean": (0, 100), "cog": (50, 0)}),
    "questions": (amber_questions("Yes"), amber_questions("No"),
                  {"accuracy": (0, 100), "precision": (0, 100), "recall": (0, 100), "f1": (0, 100)}),
    "mmhal": (mmhal_items([1, 4, "none"]), mmhal_items([5, 4, 6]),
              {"score": (2.5, 5), "hallucination_rate": (50, 0),
               "informativeness": (pytest.approx(100 / 3), pytest.approx(200 / 3))})}


@pytest.mark.parametrize("kind", ITEMS)
def test_items_of_each_benchmark_are_compared(tmp_path, capsys, kind):
    """MMHal's answers whose replies were not read are left out, and its scores are no percent."""
    a, b, expected = ITEMS[kind]
    found = stats.paired(a, b)
    assert {k: (row["a"], row["b"]) for k, row in found.items()} == expected
    files = [write_json(tmp_path / f"{name}.items.jsonl", items) for name, items in (("a", a), ("b", b))]
    run("compare", *two_files(tmp_path), "--items", *files, "--out", tmp_path / "page.html")
    assert re.search(rf"^{next(iter(expected))} .* to ", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(data.UserError, match="no id in common"):
        stats.paired(a, [{**item, "id": 99} for item in b])


def test_what_score_did_not_write_is_no_file_of_items(tmp_path):
    files = two_files(tmp_path)
    with pytest.raises(data.UserError, match="record 1 has no 'id'.*no file of what `score` wrote"):
        run("compare", *files, "--items", *files, "--out", tmp_path / "page.html")


@pytest.mark.parametrize("change, says", [
    (lambda lines: [{**line, "question_id": line["question_id"] + 50} for line in lines],
     "no question in common"),
    (lambda lines: [{**line, "prompt": "Is it?"} for line in lines],
     r"different questions under 20 ids \(first: 0"),
    (lambda lines: [*lines, lines[3]], "id 3 is there twice"),
    (lambda lines: [{"text": "a"}], r"different questions under 1 ids \(first: 0"),
    (lambda lines: [{**lines[0], "question_id": [1]}], r"model-b.jsonl: answer 1 .*no usable `question_id`"),
    (lambda lines: [{**lines[0], "text": 4}], r"answer 1 \(id 0\) has no text")])
def test_files_that_are_no_pair_are_refused(tmp_path, change, says):
    a, b = two_files(tmp_path)
    write_json(b, change([json.loads(line) for line in b.read_text().splitlines()]))
    with pytest.raises(data.UserError, match=says):
        run("compare", a, b, "--out", tmp_path / "page.html")


def test_what_only_one_file_answers_is_said(tmp_path, capsys):
    a, b = two_files(tmp_path)
    b.write_text("".join(b.read_text().splitlines(keepends=True)[:15]))
    run("compare", a, b, "--out", tmp_path / "page.html")
    assert "15 questions that both answer; A answers 20, B 15" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ the page
def test_the_page_is_blind_escaped_and_whole(tmp_path, capsys):
    a, b = two_files(tmp_path, n=60, same=10)
    (tmp_path / "images").mkdir()
    for i in range(60):
        picture(i).save(tmp_path / "images" / f"COCO_val2014_{i:012d}.jpg")
    run("compare", a, b, "--out", tmp_path / "page.html", "--images", tmp_path / "images", "--n", 40)
    page = (tmp_path / "page.html").read_text()
    assert "model-a" not in page and "model-b" not in page and str(tmp_path) not in page
    assert page.count("</script>") == 2 and "alert(1)</script>" not in page and not re.search("https?:", page)
    found = content(page)
    shown = len(found["items"])
    assert f"{shown} pairs to choose from, {40 - shown} equal pairs left out" in capsys.readouterr().out
    assert 25 < shown <= 40 and all(item["image"].startswith("data:image/") for item in found["items"])
    first = Counter("no cat" in item["first"] for item in found["items"])
    assert min(first.values()) > shown // 4                                   # the sides are mixed
    assert all({item["first"], item["second"]} == {LONG, "There is no cat."} for item in found["items"])
    run("compare", a, b, "--out", tmp_path / "again.html", "--images", tmp_path / "images", "--n", 40)
    assert (tmp_path / "again.html").read_text() == page
    run("compare", a, b, "--out", tmp_path / "other.html", "--n", 40, "--seed", 1)
    other = content((tmp_path / "other.html").read_text())
    assert [i["question"] for i in other["items"]] != [i["question"] for i in found["items"]]
    run("compare", b, a, "--out", tmp_path / "swapped.html", "--n", 40)
    swapped = content((tmp_path / "swapped.html").read_text())
    assert all(x["first"] == y["second"] for x, y in zip(found["items"], swapped["items"], strict=True))


def votes(page, rater, choose):
    """The file that the page downloads, with the choices of choose(item) -> first, tie or second."""
    found = content(Path(page).read_text())
    return {"rater": rater, "page": found["page"], "key": found["key"], "of": len(found["items"]), "votes": [
        {"item": n, "choice": choose(item), "seconds": 1.0} for n, item in enumerate(found["items"])]}


def likes(word):
    return lambda item: "first" if word in item["first"] else "second"


@pytest.fixture
def page(tmp_path):
    run("compare", *two_files(tmp_path, n=20, same=4), "--out", tmp_path / "page.html")
    return tmp_path / "page.html"


def count(tmp_path, *files):
    paths = [write_json(tmp_path / f"votes-{n}.json", file, lines=False) for n, file in enumerate(files)]
    run("score", "votes", *paths, "--out", tmp_path / "preference.json")
    return json.loads((tmp_path / "preference.json").read_text())


def test_votes_are_traced_back_to_the_models(tmp_path, page, capsys):
    """Equal pairs are ties that nobody was shown; A is the first file, wherever its answers stood."""
    found = count(tmp_path, votes(page, "Ann", likes("no cat")))
    assert found["a"].endswith("model-a.jsonl") and found["b"].endswith("model-b.jsonl")
    assert [found[k] for k in ("win", "tie", "loss", "n", "votes", "equal")] == [0, .2, .8, 20, 16, 4]
    assert found["intervals"]["loss"][0] < .8 < found["intervals"]["loss"][1]
    assert re.search("B is better +80.0", capsys.readouterr().out)
    found = count(tmp_path, votes(page, "Ann", likes("no cat")), votes(page, "Bob", likes("alert")),
                  votes(page, "Cy", lambda item: "tie"))
    assert found["raters"] == 3
    assert found["win"] == found["loss"] == pytest.approx(16 / 60) and found["tie"] == pytest.approx(28 / 60)


def keyed(**changes):
    """Puts other values into the key of votes."""
    def change(votes):
        key = json.loads(base64.b64decode(votes["key"]))
        votes["key"] = base64.b64encode(json.dumps(key | changes).encode()).decode()
    return change


BAD = {"choice": lambda v: v["votes"][0].update(choice="left"),
       "item": lambda v: v["votes"][0].update(item=99),
       "below": lambda v: v["votes"][0].update(item=-1), "twice": lambda v: v["votes"].append(v["votes"][0]),
       "key": lambda v: v.update(key="nonsense"), "rater": lambda v: v.pop("rater"),
       "other key": lambda v: v.update(key=base64.b64encode(b"{}").decode()),
       "endless": keyed(same=10 ** 9), "fewer than none": keyed(same=-1),
       "half a letter": keyed(a="\ud800.jsonl"), "rater's half": lambda v: v.update(rater="\ud800")}


@pytest.mark.parametrize("fault", BAD)
def test_votes_that_were_not_downloaded_so_are_refused(tmp_path, page, fault):
    file = votes(page, "Ann", likes("no cat"))
    BAD[fault](file)
    with pytest.raises(data.UserError, match="votes-0.json is not a file of votes"):
        count(tmp_path, file)
    assert not (tmp_path / "preference.json").exists()


def test_votes_of_two_pages_or_twice_of_one_rater_are_not_mixed(tmp_path, page):
    ann = votes(page, "Ann", likes("no cat"))
    with pytest.raises(data.UserError, match="second file by 'Ann'"):
        count(tmp_path, ann, ann)
    run("compare", tmp_path / "model-a.jsonl", tmp_path / "model-b.jsonl", "--out", tmp_path / "other.html",
        "--seed", 1)
    with pytest.raises(data.UserError, match="votes on another page"):
        count(tmp_path, ann, votes(tmp_path / "other.html", "Bob", likes("no cat")))
    with pytest.raises(data.UserError, match="holds no vote yet"):
        count(tmp_path, {**ann, "votes": []})


# For a copy of the page without its policy: it presses keys and keeps what would be downloaded.
PRESS = """<script>
URL.createObjectURL = blob => { blob.text().then(text => {
  const out = document.createElement("pre");
  out.id = "saved"; out.textContent = text; document.body.append(out); });
  return "#"; };
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key: key, bubbles: true}));
press("s");                                                 // without a name nothing is downloaded
for (let n = 0; n < 40 && !document.getElementById("item").hidden; n++) {
  if (n === 2) { press("2"); press("Backspace"); }
  const first = document.getElementById("first").textContent.includes("no cat");
  if (n % 2) document.querySelector(`[data-choice=${first ? "first" : "second"}]`).click();
  else press(first ? "1" : "ArrowRight");
}
document.getElementById("rater").value = "Ann"; press("s");
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed: Debian's package has it")
@pytest.mark.parametrize("hooked", [False, True])
def test_the_page_in_a_browser(tmp_path, page, hooked):
    text = page.read_text()
    if hooked:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace(
            "</body>", f"{PRESS}</body>")
    (tmp_path / "try.html").write_text(text)
    done = subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                           "--disable-background-networking", "--disable-component-update", "--disable-sync",
                           f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000",
                           "--dump-dom",
                           f"file://{tmp_path / 'try.html'}"], capture_output=True, text=True, timeout=120)
    dom = re.sub(r'<script type="application/json".*?</script>', "", done.stdout, flags=re.DOTALL)
    assert "model-" not in re.sub(r'<pre id="saved">.*?</pre>', "", dom, flags=re.DOTALL)
    if not hooked:                                              # under its policy the page's own script runs
        assert "Question 1 of 16, 0 judged" in dom and "There is no cat." in dom
        return
    saved = json.loads(re.search(r'<pre id="saved">(.*?)</pre>', dom, re.DOTALL)[1])
    assert saved["rater"] == "Ann" and len(saved["votes"]) == 16 and dom.count('id="saved"') == 1
    found = count(tmp_path, saved)
    assert [found[k] for k in ("win", "tie", "loss", "votes")] == [0, .2, .8, 16]


def test_score_and_compare_work_together(own_programs, tmp_path, capsys):
    """From answers to a table, by the items that `score` wrote; what could not be read does not count."""
    questions, rows = pope_file(tmp_path / "data", n=20)
    for name, said in (("a", "yes"), ("b", "no")):
        folder = tmp_path / name
        folder.mkdir()
        score(folder, "pope", write_json(folder / "answers.jsonl", pope_answers(rows, said)), "--questions",
              questions)
    run("compare", tmp_path / "a" / "answers.jsonl", tmp_path / "b" / "answers.jsonl", "--out",
        tmp_path / "page.html", "--items", *(tmp_path / n / "scores.items.jsonl" for n in "ab"))
    said = capsys.readouterr().out
    assert re.search(r"^accuracy +50.0 +50.0 +\+0.0", said, re.MULTILINE)
    template, rows = mmhal_file(tmp_path / "mmhal")
    cases = {"chair": ([*coco_files(tmp_path), "--extractor", "{}.jsonl"], CAPTIONS,
                       {"0": '["gull"]', "1": "?"}, "chair_s"),
             "mmhal": (["--template", template, "--judge", "{}.jsonl"], mmhal_answers(rows),
                       {str(i): "?" if i == 3 else f"Rating: {i % 7}" for i in range(8)},
                       "hallucination_rate"),
             "amber": (["--data", amber_folder(tmp_path / "amber")],
                       [{"id": i + 1, "response": "A dog. No."} for i in range(8)], {}, "cover")}
    for name, (arguments, answers, replies, measure) in cases.items():
        files = [write_json(tmp_path / n / f"{name}.json", answers) for n in "ab"]
        for n, path in zip("ab", files, strict=True):
            given = {i: reply if n == "a" else reply.replace("gull", "dog").replace("Rating: 0", "Rating: 6")
                     for i, reply in replies.items()}
            write_json(path.parent / "replies.jsonl", [{"id": i, "reply": reply} for i,
                                                       reply in given.items()])
            score(path.parent, name, path,
                  *(path.parent / "replies.jsonl" if a == "{}.jsonl" else a for a in arguments))
        capsys.readouterr()
        run("compare", *files, "--out", tmp_path / "page.html", "--items",
            *(tmp_path / n / "scores.items.jsonl" for n in "ab"))
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(measure + " "))
        changes = {"chair": "-50.0", "mmhal": "-28.6", "amber": "+0.0"}
        assert row.split()[3] == changes[name], row
