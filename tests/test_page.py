"""classroom/papers/page.py: what reproduce.py found, as a page and as Markdown, whatever is missing."""
import copy
import re
import sys
from html.parser import HTMLParser

import pytest

from classroom.papers import figures, finding, findings, forest, page, reproduce

pytestmark = pytest.mark.usefixtures("settings")
NAMES = ["table1", "fig5", "fig4", "pds_fig6", "table4", "table2"]
EVIL = "<script>alert('1')</script>\"'&|*x*"
PAPER = "Object HalBench CHAIR_s, Bunny-3B"
ABOUT = {"made": "2026-11-21", "runs": 60, "missing": ["table4", "table2"], "bases": 3, "seeds": 5,
         "scenes": 1000, "intervals": "Bases are drawn, then seeds.", "seeds_used": "Seeds 0 to 4.",
         "machine": "two cores", "versions": "torch 2.13.0",
         "settings": [{"method": "mDPO", "options": "--loss mdpo --lr 2e-4"}]}


def arm(name, mean, spread=2., **more):
    values = {"chair_s": [mean, mean - spread, mean + spread], "cover": [95., None, None], "kl": [1.234]}
    bases = {"chair_s": {"base0": mean - 1, "base1": mean, "base2": mean + 1.5}}
    return {"arm": name, "runs": 15, "values": values, "bases": bases, "paper": {}} | more


def contrast(what, mean, low, high, key="chair_s"):
    return {"what": what, "metric": key, "difference": [mean, low, high], "level": 95}


FINDINGS = [
    {"name": "table1", "paper": "mDPO, Table 1", "title": "Base, DPO, mDPO",
     "claim": "mDPO hallucinates less.", "rule": "The interval lies below 0.", "verdict": "appears",
     "found": "It does; `--gap 1` undoes it.", "metric": "chair_s", "exploratory": False,
     "paper_measure": PAPER, "figure": "bars",
     "rows": [arm("base", 50., paper={PAPER: 43.}),
              arm("SFT on the chosen", 18.5), arm("SFT, on policy", 9.),
              arm("DPO", 43.25, paper={PAPER: 44.3, "MMHal score": 2.28}),
              arm("mDPO", 19., paper={PAPER: 27.})],
     "contrasts": [contrast("mDPO - DPO", -24.25, -28, -20),
                   contrast("mDPO - SFT on the chosen", .5, -2.5, 3.2)],
     "columns": ["chair_s", "cover", "hal"], "trace": "lines 1-60 of results/reproduce.jsonl"},
    {"name": "fig5", "paper": "mDPO, Figure 5", "title": "Data", "claim": "More helps.", "rule": "It falls.",
     "verdict": "appears when there are 500 pairs", "found": "It falls.", "metric": "chair_s",
     "figure": "lines", "paper_measure": "MMHal score", "xlabel": "pairs", "xlog": True,
     "columns": ["chair_s", "kl"],
     "rows": [arm(f"{name}, {n}", mean, x=n, series=name, paper={"MMHal score": 2.5})
              for name, means in (("mDPO", (30., 16.)), ("DPO", (45., 10.)))
              for n, mean in zip((250, 1000), means, strict=True)]},
    {"name": "fig4", "paper": "mDPO, Figure 4", "title": "Blind", "claim": "It wins.", "rule": "Votes.",
     "verdict": "does not appear", "found": "No.", "metric": "win", "columns": ["win", "loss"],
     "figure": "stacked", "rows": [{"arm": "mDPO against DPO", "runs": 1, "values": {
         "win": [30., 25., 35.], "tie": [40.], "loss": [30., 24., 36.]}}],
     "links": {"the page for people": "fig4.html"}},
    {"name": "pds_fig6", "paper": "PDS-DPO, Figure 6", "title": "Diversity", "exploratory": True,
     "figure": "histogram", "metric": "similarity",
     "rows": [{"arm": "prompts", "values": {"similarity": [.3]}, "points": [.1, .3, .5]},
              {"arm": "answers", "values": {}, "points": [.4, .4, .7]}]},
    {"name": "table4", "paper": "mDPO, Table 4", "title": "Anchors", "claim": "The chosen's is enough.",
     "verdict": "not run"}]


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text; every element is closed, in order."""
    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open += [tag] if tag not in ("meta", "br") else []

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.text += text if self.open and self.open[-1] != "style" else ""


def write(folder, findings=FINDINGS, about=ABOUT):
    page.write(findings, about, folder)
    return (folder / "results.html").read_text(), (folder / "RESULTS.md").read_text().replace("\u00a0", " ")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write(tmp_path_factory.mktemp("page"))


def part(html, name):
    """A section's HTML."""
    return html[html.index(f'<section id="{name}"'):].split("</section>")[0]


def test_the_page_needs_nothing_else(written):
    html = written[0]
    seen = Page(html)
    assert not {"script", "link", "iframe", "object", "img", "image", "foreignobject"} & set(seen.tags)
    assert "default-src 'none'" in html and "@import" not in html and not re.search("https?:", html)
    assert set(re.findall(r"url\((.)", html)) == {"#"}                  # hatches and clips of its own figures
    used = re.findall(r'url\(#(\w+)\)|xlink:href="#(\w+)"', html)
    identities = [value for name, value in seen.attributes if name == "id"]
    assert {a or b for a, b in used} <= set(identities) and len(set(identities)) == len(identities)
    links = {value for name, value in seen.attributes if name == "href"}
    assert links == {"fig4.html", "#defeats", *(f"#{name}" for name in NAMES)}
    assert "prefers-color-scheme:dark" in html and "@media print" in html and "width=device-width" in html


def test_every_table_and_figure_is_in_the_overview_with_its_verdict(written):
    html, text = written
    head, rows = html[html.index("<table"):].split("<section")[0], text.split("## Where")[0]
    assert re.findall(r'<a href="#(\w+)">', head) == NAMES
    assert re.findall(r'class="chip (\w+)">([^<]*)<', head) == [
        ("yes", "✓ appears"), ("part", "◐ appears when there are 500 pairs"), ("no", "✗ does not appear"),
        ("free", "exploratory"), ("none", "○ not run"), ("none", "○ not run")]
    assert "mDPO hallucinates less.</td>" in head and "mDPO 19.0 (17.0 to 21.0)" in head
    assert ("| mDPO, Table 1: Base, DPO, mDPO | mDPO hallucinates less. | ✓ appears | CHAIR_s ↓; "
            "base 50.0 (48.0 to 52.0); SFT on the chosen 18.5 (16.5 to 20.5); ") in rows
    assert "mDPO 30.0 (28.0 to 32.0) at 250, 16.0 (14.0 to 18.0) at 1,000; DPO 45.0" in rows
    assert "mDPO against DPO: win 30.0 (25.0 to 35.0), tie 40.0, loss 30.0 (24.0 to 36.0)" in rows
    assert "| table2 |  | ○ not run | – |" in rows
    assert "Not run: `python classroom/papers/reproduce.py table2`" in text
    assert ("6 tables and figures: 1 ✓ appear, 1 ◐ appear under a condition, 1 ✗ do not appear, 2 ○ not run, "
            "1 without a verdict; 1 of them exploratory.") in text


def test_the_page_opens_with_one_figure_of_all_claims():
    """Before any table: each claim, its verdict in a sign and words, a mark for each of its comparisons."""
    lines = reproduce.lines()
    found = [findings.finding(name, lines) for name in findings.TABLES]
    html = page.html([finding.complete(f) for f in found], {})
    opening = html[html.index("<main>"):html.index("<table")]
    rows = re.findall(r'<div class="claim (\w+)">(.*?)</div>', opening, re.DOTALL)
    assert len(rows) == len(found) and opening.count("<figure") == 1
    for f, (kind, row) in zip(found, rows, strict=True):
        sign = {"yes": "✓", "no": "✗", "part": "◐"}[kind]
        assert f"<em>{sign} {f['verdict']}" in row.replace("&#x27;", "'")
        assert f'href="#{f["name"]}"' in row
        drawn = [part for part in f["parts"] if part["difference"]]
        assert row.count("<g><title>") == row.count('class="shade"') == len(drawn)
        for kind, shape in (("holds", forest.DISC), ("fails", forest.CROSS)):
            wanted = sum(part["holds"] == (kind == "holds") for part in drawn)
            assert row.count(f'<path class="{kind}" d="{shape}"') == wanted
        assert row.count('class="theirs"') == sum(part["paper"] is not None for part in drawn)
    places = [float(x) for x in re.findall(r'\b(?:x|x1|x2)="([\d.]+)%"', opening)]
    assert 0 <= min(places) and max(places) <= 100
    assert 'aria-label="against DPO −29.0 (−41.2 to −16.8), as claimed; the paper: −17.3' in opening


def test_few_runs_are_called_a_look_first_of_all(tmp_path):
    rows = [{"base": "base0", "seed": seed} for seed in (10, 11)]
    about = findings.about(rows)
    assert "1 of 3 bases and 2 seeds" in about["few"] and "seeds of one base" in about["intervals"]
    write(tmp_path, about=about)
    for name in ("results.html", "RESULTS.md"):
        text = (tmp_path / name).read_text()
        assert text.index("A look, not a result") < text.index("Table 1")
    whole = [{"base": f"base{k}", "seed": seed} for k in range(3) for seed in range(10, 15)]
    assert findings.about(whole)["few"] == "" and "bases' means" in findings.about(whole)["intervals"]


def test_a_verdict_beside_exploratory_says_both():
    words = finding.verdict(finding.complete({"name": "x", "verdict": "appears", "exploratory": True}))
    assert words == [("yes", "✓ appears"), ("free", "exploratory")]


def test_where_mdpo_does_not_win_cannot_be_left_out(written):
    lines = [line for line in written[1].split("## mDPO, Table 1")[0].split("\n") if line.startswith("| ")]
    assert lines[lines.index("| where | mDPO is | numbers |") + 1:] == [
        "| mDPO, Table 1 (CHAIR_s ↓) | not told apart from SFT on the chosen | "
        "mDPO - SFT on the chosen: +0.5 (−2.5 to +3.2) |",
        "| mDPO, Table 1 (CHAIR_s ↓) | worse than SFT, on policy | "
        "mDPO 19.0 (17.0 to 21.0); SFT, on policy 9.0 (7.0 to 11.0) |",
        "| mDPO, Figure 5 (CHAIR_s ↓) | worse than DPO, 1000 | "
        "mDPO, 1000 16.0 (14.0 to 18.0); DPO, 1000 10.0 (8.0 to 12.0) |",
        "| mDPO, Figure 4 (votes) | not told apart | "
        "mDPO against DPO: win 30.0 (25.0 to 35.0), loss 30.0 (24.0 to 36.0) |"]
    assert "not told apart from SFT on the chosen" in part(written[0], "defeats")


@pytest.mark.parametrize("what, key, difference, says", [
    ("mDPO - DPO", "chair_s", (-5, -6, -4), None), ("mDPO - DPO", "chair_s", (5, 4, 6), "worse than DPO"),
    ("DPO - mDPO", "chair_s", (5, 4, 6), None), ("DPO - mDPO", "chair_s", (-5, -6, -4), "worse than DPO"),
    ("mDPO − DPO, lr 4e-4", "cover", (5, 4, 6), None),
    ("mDPO - DPO", "cover", (-5, -6, -4), "worse than DPO"),
    ("mDPO, 2 epochs - SFT", "cover", (1, -1, 3), "not told apart from SFT"),
    ("DPO - mDPO", "cover", (1, None, None), "no interval against DPO"),
    ("mDPO - DPO", "kl", (5, 4, 6), None), ("DPO + CoPO - DPO", "chair_s", (5, 4, 6), None)])
def test_a_defeat_knows_whose_difference_it_is_and_which_way_is_better(what, key, difference, says):
    f = finding.complete({"name": "x", "contrasts": [contrast(what, *difference, key)]})
    assert [row[1] for row in finding.defeats([f])[1:]] == [says] * bool(says)


def test_a_section_has_all_that_was_found(written):
    html, text = written
    section, lines = part(html, "table1"), text.split("## mDPO, Figure 5")[0].split("## mDPO, Table 1")[1]
    for words in ("<b>Claim.</b> mDPO hallucinates less.", "<b>Rule.</b> The interval lies below 0.",
                  "<b>Found.</b> It does; <code>--gap 1</code> undoes it.", "Trace: ", "lines 1-60", "<svg",
                  "<td>43.2<small>41.2 to 45.2</small></td>", '<td class="paper">44.3</td>'):
        assert words in section
    head, base = (line for line in lines.split("\n") if line.startswith(("|  |", "| base")))
    assert head == ("|  | CHAIR_s ↓ | Cover ↑ | CHAIR_s of base0, base1, base2 | "
                    f"paper: {PAPER} | paper: MMHal score |")                     # no Hal: no row has it
    assert base == "| base (15 runs) | 50.0 (48.0 to 52.0) | 95.0 | 49.0 · 50.0 · 51.5 | 43 | – |"
    assert "| mDPO - DPO (CHAIR_s ↓) | −24.2 (95%: −28.0 to −20.0) | better |" in lines
    assert '<a href="fig4.html">the page for people</a>' in part(html, "fig4")
    assert "[the page for people](fig4.html)" in text
    assert "<b>Rule.</b> none was fixed beforehand" in part(html, "pds_fig6")
    assert "| pairs | CHAIR_s ↓ | KL, nats an answer | " in text
    assert "| DPO, 250 (15 runs) | 250 | 45.0" in text
    for words in ("60 runs", "1,000 scenes", "Bases are drawn", "Seeds 0 to 4.", "two cores", "torch 2.13.0"):
        assert words in text and words in html
    assert "| mDPO | `--loss mdpo --lr 2e-4` |" in text


def test_figures_are_drawn_in_the_pages_colours_and_say_what_their_marks_are(written):
    html = written[0]
    assert html.count("<svg") == html.count("<figcaption>") == 4
    assert "#0a0b" not in html and "stroke: var(--c0)" in html and "DejaVu Sans'" not in html
    assert "○ base0, □ base1, △ base2; ◆ the paper: " + PAPER in part(html, "table1")
    assert "◆ paper: MMHal score" in part(html, "fig5")                # of another unit: an axis of its own
    assert "◆ paper:" not in part(html, "table1").split("<figcaption>")[0]
    assert ">win</text>" in part(html, "fig4") and ">prompts</text>" in part(html, "pds_fig6")
    assert "<svg" not in part(html, "table4")


def test_series_differ_without_colour():
    assert all(len({look[k] if k != 2 else str(look[k]) for look in figures.LOOKS}) == len(figures.LOOKS)
               for k in (1, 2, 3))


def test_text_is_escaped(tmp_path):
    findings = copy.deepcopy(FINDINGS)
    for f in findings:
        f |= dict.fromkeys(("paper", "title", "claim", "rule", "found", "trace", "paper_measure"), EVIL)
        for row in f.get("rows", ()):
            row["arm"] += EVIL
            row["paper"] = {EVIL: 20.}
        f["contrasts"] = [contrast(EVIL, 1, 0, 2)]
    settings = [{"method": EVIL, "options": EVIL}]
    html, text = write(tmp_path, findings, ABOUT | {"machine": EVIL, "settings": settings})
    seen = Page(html)
    assert "script" not in seen.tags and "alert('1')" in seen.text
    assert "alert" in text and not re.search(r"(?<!\\)(<|\*x)", re.sub("`[^`]*`", "", text))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):             # all rows as wide as their head
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1


def test_the_same_findings_give_the_same_bytes_and_stay_as_they_were(tmp_path, written):
    before = copy.deepcopy(FINDINGS)
    assert write(tmp_path) == written and before == FINDINGS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESULTS.md", "results.html"]


def test_whatever_is_missing_is_a_dash_and_no_fault(tmp_path):
    empty = {"chair_s": [None, None, None], "win": [float("nan")], "cover": None}
    nothing = [{"name": kind or "none", "figure": kind, "metric": "chair_s", "verdict": None,
                "rows": [{"arm": "a", "x": 1}, {"arm": "b", "values": empty}]}
               for kind in (None, "bars", "lines", "stacked", "histogram")]
    html, text = write(tmp_path, [*nothing, {"name": "bare"}], {})
    Page(html)
    assert "<svg" not in html and "nan" not in text and "None" not in text and "| a " in text


def test_one_mean_without_interval_is_drawn(tmp_path):
    """Whatever else the row has that is no number: a base, the paper's, an x that has no logarithm."""
    row = {"arm": "a $x_1$", "x": 0, "values": {"chair_s": [5.], "win": [50.]}, "points": [.5, None],
           "bases": {"chair_s": {"base0": None}}, "paper": {"p": None}}
    html, _ = write(tmp_path, [{"name": kind, "figure": kind, "metric": "chair_s", "xlog": True,
                                "paper_measure": "p", "rows": [row]}
                               for kind in ("bars", "lines", "stacked", "histogram")], {})
    assert html.count("<svg") == 4 and "a $x_1$" in html and "Nowhere." in html


def test_without_matplotlib_the_page_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    html, text = write(tmp_path)
    assert "<svg" not in html and "pip install matplotlib" in html and "43.2" in html and "43.2" in text


def test_an_unknown_metric_goes_by_its_own_name_and_known_ones_by_their_label():
    assert page.METRICS["chair_s"][0] == "CHAIR_s" and finding.heading("top_1_agreement") == "top_1_agreement"
    assert finding.heading("cover").startswith("Cover") and finding.heading("words") == "words a caption"


def test_numbers_that_are_no_percents_have_three_digits_and_no_more_than_a_thousandth():
    assert finding.three([-.000772, -.00609, .00454], "look") == "−0.001\n−0.006 to 0.005"
    assert finding.three([-.0001, None, None], "kl") == "0"
    assert finding.three([14.7496, 1.7149, .45678], "kl") == "14.7\n1.71 to 0.457"
    assert finding.three([.04, -.04, 12.345], "chair_s") == "0.0\n0.0 to 12.3"


def test_a_difference_has_the_digits_that_show_its_sign():
    assert finding.three([1, -.01, 2], "chair_s", "+") == "+1.00\n−0.01 to +2.00"
    assert finding.three([-.004, -1, 1], "cover", "+") == "−0.004\n−1.000 to +1.000"
    assert finding.three([0, 0, 0], "cover", "+") == "+0.0\n+0.0 to +0.0"
    assert finding.three([-1, -2, 1e-15], "cover", "+") == "−1.0\n−2.0 to +0.0"
