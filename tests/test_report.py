"""training/report.py: one page that needs nothing else, whatever the run holds."""
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

import data
import eval_hallu
from classroom import runs as runs_page
from evaluation import compare, metrics, page
from training import report

EVIL = "<script>alert('1')</script>\"'&"
LOG = {"loss": 2., "lr": 1e-4, "grad_norm": 1., "rewards/chosen": .1, "rewards/rejected": -.2,
       "rewards/margins": .3, "rewards/accuracies": .5,
       "rewards/image_rejected": -.1, "rewards/image_accuracies": .6,
       "rewards/image_margins": .2, "logps/chosen": -9., "logps/rejected": -11., "tokens_per_second": 9000}


def lines(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def make_run(run, evil="x", images=14, steps=30):
    """A finished run of the classroom: a caption and a question an image; training corrects the captions."""
    (run / "scenes" / "images").mkdir(parents=True)
    options = {"loss": "mdpo", "beta": .1, "model": evil, "lr": 1e-4, "seed": 0}
    lines(run / "log.jsonl", [{"options": options, "commit": evil, "losses_source": "def dpo(): ..."}]
          + [{"step": s, **LOG, "loss": 2 - s / 30, "seconds": s} for s in range(1, steps + 1)])
    sides = {"before": [], "after": []}
    for i in range(images):
        Image.new("RGB", (80, 80), (i * 15, 90, 90)).save(run / "scenes" / "images" / f"{i}.png")
        for name, side in sides.items():
            caption = "a dog , a cat" if name == "before" else "a dog"
            base = {"id": f"{i}{evil}", "image": f"images/{i}.png"}
            side.append(base | {"question": f"describe {evil}", "kind": "caption",
                                "answer": f"{caption} {evil}",
                                "truth": {"present": ["dog"], "absent": ["cat"]}})
            side.append(base | {"id": f"{i}q{evil}", "question": "is there a cat ?", "kind": "existence",
                                "answer": "yes" + evil,
                                "truth": {"answer": "no", "choices": ["yes", "no"], "set": "random"}})
    for name, side in sides.items():
        lines(run / f"{name}.jsonl", [{"settings": {"scenes": "scenes/scenes.jsonl"}}, *side])
    summary = {name: metrics.classroom(side) for name, side in sides.items()}
    summary |= {"difference": metrics.difference(*sides.values()), "pairs": 1000, "steps": steps,
                "seconds": 90.5, "options": options}
    (run / "summary.json").write_text(json.dumps(summary))
    return run


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text."""
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open += [tag] if tag not in ("meta", "img", "path") else []

    def handle_endtag(self, tag):
        if tag != "path":
            assert self.open.pop() == tag                             # every element is closed, in order

    def handle_data(self, text):
        self.text += text if self.open and self.open[-1] != "style" else ""


def read(run):
    assert report.write(run) == run / "report.html"
    return (run / "report.html").read_text()


def test_the_page_needs_nothing_else(tmp_path):
    html = read(make_run(tmp_path / "run"))
    seen = Page(html)
    assert seen.open == [] and not {"script", "link", "iframe", "object"} & set(seen.tags)
    assert "url(" not in html and "@import" not in html and "default-src 'none'" in html
    sources = [value for name, value in seen.attributes if name in ("src", "href", "xlink:href")]
    assert sources and all(value.startswith("data:image/png;base64,") for value in sources)
    assert "prefers-color-scheme:dark" in html and "width=device-width" in html


def test_the_table_has_both_sides_the_change_and_intervals(tmp_path):
    text = Page(read(make_run(tmp_path / "run"))).text
    assert re.search(r"CHAIR_s, lower is better100\.00\.0-100\.0 +-100\.0 to -100\.0", text)
    assert "mdpo on 1,000 pairs, 30 steps in 90.5 seconds, beta 0.1" in text
    assert "existence0.0" in text


def test_the_tables_columns_never_touch_whatever_the_users_data_are_called():
    long = "a_kind_of_question_with_a_longer_name"
    one, other = ({"by_kind": {long: {"acc": acc}}, "loss": loss}
                  for acc, loss in ((99.95, -12345678.25), (0.5, 12345678.75)))
    for line in report.table({"before": one, "after": other})[1:]:
        assert len(line.split()) == 4, line
    lines = eval_hallu.table("amber", {long: -1234567890.0, "intervals": {long: (-1e9, 1e9)}})
    assert lines[1].split() == [*long.split("_"), "-1234567890.0", "-1000000000.0", "to", "1000000000.0"]
    found = {long: {"a": 1e9, "b": -1e9, "change": -2e9, "interval": (0, 0)}}
    line = compare.table(found, SimpleNamespace(a="a", b="b"))[-1]
    assert line.split() == [long, "1000000000.0", "-1000000000.0", "-2000000000.0", "0.0", "to", "0.0"]


def test_the_table_as_text(tmp_path):
    run = make_run(tmp_path / "run")
    head, first, *_ = report.table(json.loads((run / "summary.json").read_text()))
    assert head.split()[:3] == ["before", "after", "change"]
    assert first.split()[4:] == ["100.0", "0.0", "-100.0", "-100.0", "to", "-100.0"]
    loss = report.table({"before": {"loss": .5}, "after": {"loss": .25}})[1]
    assert loss.split() == ["loss", "0.5000", "0.2500", "-0.2500"]
    assert len(report.table({"before": {}, "after": {}})) == 1
    silent = json.loads((run / "summary.json").read_text())
    silent["after"]["remarks"] = ["all: chair_i is 0/0, given as 0"]
    rows = {line[:8].strip(): line for line in report.table(silent)}
    assert rows["CHAIR_i,"].endswith("undefined: 0 of 0") and "undefined" not in rows["CHAIR_s,"]
    answers = [json.loads(line) for line in (run / "after.jsonl").read_text().splitlines()]
    answers = [line | {"answer": " "} if "id" in line else line for line in answers]
    silent["after"] = metrics.classroom(answers)
    said = ("after: 28 answers are empty (ids 0x, 0qx, 1x, 1qx, 2x, and 23 more): a broken model writes such "
            "answers")
    assert report.table(silent)[-1] == said
    (run / "summary.json").write_text(json.dumps(silent))
    assert said in Page(read(run)).text


def test_every_curve_is_drawn_with_its_ends(tmp_path):
    html = read(make_run(tmp_path / "run"))
    assert all(f"<h3>{title}</h3>" in html for title, *_ in report.CURVES)
    assert 'aria-label="Loss"' in html and "loss 1.967 → 1.000" in Page(html).text
    assert "nan" not in html and "inf" not in html


def test_a_dozen_images_with_hallucinated_words_marked(tmp_path):
    html = read(make_run(tmp_path / "run"))
    answers = html[html.index("<h2>Answers"):]
    assert answers.count("<img") == 12
    assert '<dt>before</dt><dd>a dog , a <mark title="not in the image">cat</mark> x</dd>' in answers
    assert "<dt>after</dt><dd>a dog x</dd>" in answers
    wrong = page.marked("yes .", metrics.hallucinated("yes .", {"answer": "no", "choices": ["yes", "no"]}))
    assert wrong == '<mark title="not in the image">yes</mark> .'


def found(shift):
    """What training/look.py would have found, all numbers moved by `shift`."""
    def means(**values):
        return {k: [x + shift, x + shift - .5, x + shift + .25] for k, x in values.items()}
    own, minus = means(true=2., blank=-1, other=1, same_theme=.5), means(blank=3., other=1, same_theme=-1)
    return {"n": 200, "preference": own, "preference_true_minus": minus, "margin": own,
            "margin_true_minus": minus, "logps_chosen": [-4., -5., -3.], "kl": [shift, shift, shift + 1]}


def test_margins_with_each_image_before_and_after_with_their_intervals(tmp_path):
    run = make_run(tmp_path / "run")
    first, *steps = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert "held-out pairs with" not in read(run)                     # a run of before there was look.py
    lines(run / "log.jsonl", [first | {"look": found(0)}, *steps])
    assert "held-out pairs with" not in read(run)                     # under way: nothing is after
    lines(run / "log.jsonl", [first | {"look": found(0)}, *steps[:-1], steps[-1] | {"look": found(4)}])
    html = read(run)
    seen = Page(html)
    assert seen.open == [] and "nan" not in html and "200 held-out pairs" in seen.text
    # by the image: before and after, the margin, and the true image's minus it, each with its interval
    assert ("true image+2.00+1.50 to +2.25+6.00+5.50 to +6.25+6.00+5.50 to +6.25–"
            "blank−1.00−1.50 to −0.75+3.00+2.50 to +3.25+3.00+2.50 to +3.25+7.00+6.50 to +7.25"
            "other image+1.00+0.50 to +1.25+5.00+4.50 to +5.25+5.00+4.50 to +5.25+5.00+4.50 to +5.25"
            "same theme+0.50+0.00 to +0.75+4.50+4.00 to +4.75+4.50+4.00 to +4.75+3.00+2.50 to +3.25"
            ) in seen.text
    assert "log p of the chosen answer−4.00−5.00 to −3.00−4.00−5.00 to −3.00" in seen.text
    assert "KL of an answer from the reference0.000.00 to 1.004.004.00 to 5.00" in seen.text
    lines(run / "log.jsonl", [first | {"look": found(0)}, *steps, {"evaluation": "after", "look": found(4)}])
    assert "true image+2.00+1.50 to +2.25+6.00" in Page(read(run)).text            # a line of their own
    lines(run / "log.jsonl", [first | {"look": found(0)}, *steps, {"evaluation": "after", "look": found(-4)}])
    assert "reference0.000.00 to 1.00undefinedall below 0" in Page(read(run)).text  # no KL is negative


def test_hostile_text_is_escaped_everywhere(tmp_path):
    html = read(make_run(tmp_path / "run", evil=EVIL))
    seen = Page(html)
    assert "<script" not in html and "script" not in seen.tags and seen.open == []
    assert not any(name.startswith("on") for name, _ in seen.attributes)
    assert seen.text.count(EVIL) >= 2 + 2 * 12                        # it stands there, as text


def test_an_image_outside_the_run_is_not_read(tmp_path):
    run = make_run(tmp_path / "run")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    after = (run / "after.jsonl").read_text()
    (run / "after.jsonl").write_text(after.replace("images/1.png", "../../secret.png"))
    html = read(run)
    assert "image: ../../secret.png leaves the folder" in html
    (run / "scenes" / "images" / "0.png").unlink()
    assert "0.png is missing" in read(run)                            # a sentence in its place, not an error


def test_large_images_are_made_small(tmp_path):
    Image.effect_noise((1600, 1200), 90).convert("RGB").save(tmp_path / "big.png")
    figure = page.picture(tmp_path, "big.png")
    assert "image/jpeg" in figure and 'class=""' in figure and len(figure) < 120_000


def test_a_run_without_a_classroom_has_its_loss_and_no_answers(tmp_path):
    run = make_run(tmp_path / "run")
    for name in ("before.jsonl", "after.jsonl"):
        (run / name).unlink()
    sides = {"before": {"loss": .6931, "margin": 0, "n": 9}, "after": {"loss": .5, "margin": .75, "n": 9}}
    (run / "summary.json").write_text(json.dumps({**sides, "pairs": 10, "steps": 2, "seconds": 1}))
    seen = Page(read(run))
    assert "loss0.69310.5000-0.1931" in seen.text and "held-out pairs" in seen.text
    assert "Answers" not in seen.text
    (run / "summary.json").write_text(json.dumps({"before": {}, "after": {}}))
    assert "Before and after" not in read(run) and "Training" in read(run)


def test_a_run_that_is_under_way_or_diverged(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(data.UserError, match="log.jsonl could not be read"):
        report.write(run)
    lines(run / "log.jsonl", [{"options": {"loss": "sft"}}, {"step": 1, "loss": 1.5},
                              {"step": 2, "loss": float("nan")}])
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')                                  # killed while writing
    seen = Page(read(run))
    assert "not finished" in seen.text and "loss 1.500 → 1.500" in seen.text


def test_long_runs_stay_small(tmp_path):
    assert len(read(make_run(tmp_path / "run", steps=20_000))) < 600_000


# ---- several runs, and the card ----
def test_runs_side_by_side_on_one_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one, two = make_run(Path("one")), make_run(Path("<b>two"), evil=EVIL)
    said = list(data.read_jsonl(one / "after.jsonl"))                 # the same questions, other answers
    for line in said[1::2]:
        line["answer"] = f"a dog , a cat {EVIL}"
    lines(two / "after.jsonl", said)
    monkeypatch.setattr(sys, "argv", ["report.py", str(one), str(two), "--out", str(tmp_path / "page.html")])
    runs_page.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    seen = Page(html)
    assert seen.open == [] and "script" not in seen.tags and "<b>two − one" in seen.text
    assert html.count("<mark title") == 12                            # a cat in each of two's captions
    assert "CHAIR_s, lower is better0.00.0+100.0+100.0 to +100.0" in seen.text    # summary.json says 0
    paths = [value for name, value in seen.attributes if name == "d"]
    assert len(paths) > 6                                            # both runs' curves


def test_the_report_of_several_runs_starts_the_page_of_several(tmp_path, monkeypatch, capsys):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two")]
    page = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, runs), "--out", str(page)])
    report.main()
    assert str(page) in capsys.readouterr().out and page.read_text().startswith("<!doctype html>")
    monkeypatch.setattr(sys, "argv", ["report.py", str(runs[0]), str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="report.py: runs.py: .*none"):
        report.main()


def test_runs_that_answer_different_questions_are_refused(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", images=3)]
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, runs), "--out", str(tmp_path / "page.html")])
    with pytest.raises(SystemExit, match="different questions"):
        runs_page.main()
    monkeypatch.setattr(sys, "argv", ["report.py", str(runs[0]), str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="runs.py: .*none"):
        runs_page.main()


def test_the_card_has_pefts_layout_and_the_runs_numbers(tmp_path):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["options"] |= {"lora_r": 64, "data": "pairs.jsonl"}
    text = report.card("run", summary, "abc-def")
    _, head, body = text.split("---\n", 2)
    assert "library_name: peft\n" in head and "base_model: x\n" in head and "license:  " in head
    assert "hash abc-def" in body and "`pairs.jsonl`" in body and "lora_r `64`" in body
    assert "| CHAIR_s, lower is better | 100.0 | 0.0 | -100.0 |" in body
    summary["options"]["lora_r"] = 0
    assert "library_name: transformers\n" in report.card("run", summary, "")


# ---- the verdict, and what was measured as it trained ----
def changed(run, **intervals):
    """The page's text, where the change of some measures has other intervals."""
    summary = json.loads((run / "summary.json").read_text())
    for name, interval in intervals.items():
        summary["difference"][name]["interval"] = interval
    (run / "summary.json").write_text(json.dumps(summary))
    return Page(read(run)).text


def test_the_verdict_is_one_sentence_that_is_sure_only_where_the_interval_leaves_out_0(tmp_path):
    run = make_run(tmp_path / "run")
    assert ("Compared with before training, captions name things that are not in the picture clearly less, "
            "and they name what is in it clearly more.") in changed(run, chair_s=[-9, -1], cover=[1, 2])
    text = changed(run, chair_s=[-9, 0], cover=[-2, -1])
    assert "that are not in the picture neither clearly more nor clearly less (the 95%" in text
    assert "they name what is in it clearly less." in text
    summary = {"before": {}, "after": {"look": found(4)}}
    assert "held-out pairs clearly more.</b>" in report.verdict(summary)
    assert report.verdict({"before": {}, "after": {"loss": 1}}) == report.verdict({}) == ""


def test_what_was_measured_as_it_trained_is_drawn_between_before_and_after(tmp_path):
    run = make_run(tmp_path / "run")
    assert "Evaluations" not in Page(read(run)).text
    (run / "before.json").write_text('{"loss": 3, "n": 9, "look": {}}')
    (run / "summary.json").write_text('{"after": {"loss": 1}}')
    with open(run / "log.jsonl", "a") as log:
        log.write('{"evaluation": "step-9", "eval": {"loss": 2, "n": 9}}\n')
    html = read(run)
    figure = html[html.index("<h2>Evaluations"):html.index("<h2>Training")]
    assert figure.count("<figure") == 1 and "3.000 → 1.000" in figure and figure.count("<svg") == 2
    line, = re.findall(r'<path class="s0" d="(M0.0 [^"]+)"', figure)
    assert line.split() == ["M0.0", "10.0", "145.0", "70.0", "290.0", "130.0"]
