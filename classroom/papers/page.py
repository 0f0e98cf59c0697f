"""The findings of reproduce.py as a page for people and as Markdown: results.html and RESULTS.md.

    page.write(findings, about, folder)      reproduce.py calls it; all that both say comes from what it gives

First one figure of all claims (forest.py), on the HTML page, and an overview: every table and figure, its
claim, the verdict, the primary numbers. Then where mDPO does not win, which is computed here and cannot be
left out. Then a section for each. A verdict is a sign and a word, and nothing is said by colour alone. The
same findings give the same bytes.
"""
if __name__ == "__main__":
    exit("A part of reproduce.py; run: python classroom/papers/reproduce.py --help")

import re
from html import escape
from importlib.util import find_spec
from pathlib import Path

import data
from classroom.papers import figures, forest
from classroom.papers.finding import (  # noqa: F401
    METRICS,
    complete,
    contrasts,
    defeats,
    flat,
    primary,
    said,
    table,
    tally,
    verdict,
)
from evaluation import page

TITLE = "The papers’ tables and figures, in miniature"
LEGEND = (
    "✓ the claim appears here, ✗ it does not appear, ◐ it appears when a condition holds, ○ not run: each by "
    "its rule. “No difference” can be claimed only where an arm trains: it changes its base’s CHAIR_s by "
    "more than 5 points. Exploratory: of fewer seeds, or by a rule written after a first look. ↓ lower is "
    "better, ↑ higher is better. The papers’ models and data are not these: compare the order and the "
    "direction with theirs, not the height.")
DEFEATS = ("Each difference to mDPO whose interval is not wholly on mDPO’s good side, and each arm without "
           "a difference whose own interval is wholly better than mDPO’s.")
NO_FIGURES = ("Figures are not drawn, since matplotlib is not installed: `pip install matplotlib`, and run "
              "the command again. Their numbers are in the tables.")
CSS = """
path{fill:inherit;stroke-width:inherit}svg{stroke-width:1;stroke-linejoin:round}text{font-size:12px}
h2{margin:0}h2 small{display:block;font-weight:400}section{border-top:1px solid var(--line);margin-top:2.6em;
padding-top:1.5em}code{font:.88em ui-monospace,"DejaVu Sans Mono",monospace}a{color:var(--c0)}
.chip{display:inline-block;border:2px solid;border-radius:7px;padding:.1em .5em;margin:.1em .3em .4em 0;
font:600 .84rem/1.35 system-ui,"Segoe UI",Roboto,sans-serif}.yes{color:var(--c2)}.no{color:var(--bad);
border:4px double}.part{color:var(--c1);border-style:dashed}.none{color:var(--soft);border-style:dotted}
.free{color:var(--soft);border-width:1px;font-weight:400}.finding{display:grid;gap:4px 28px;
grid-template-columns:minmax(0,1fr)}.finding figure{max-width:560px;align-self:start;margin:.4em 0 .8em}
figcaption{font-size:.84rem;line-height:1.4;color:var(--soft)}th{vertical-align:bottom}th:first-child{
text-align:left;padding-left:0}.scroll{overflow-x:auto;margin:.6em 0 1em}.scroll table{width:auto;
max-width:none;font-size:.84rem;overflow-wrap:normal;border-collapse:separate;border-spacing:0}
.scroll small{font-size:.93em}.scroll td{white-space:nowrap;border-top:1px solid var(--line)}.scroll th,
.scroll td{border-bottom:0}.scroll .wide,.scroll .paper{min-width:8em}.scroll tr>:first-child{padding-left:0}
.scroll td:first-child{
white-space:normal;min-width:7.5em;position:sticky;left:0;background:var(--bg)}.paper{font-style:italic}
.over table{max-width:none}.over td,.over th{text-align:left;padding-left:0;
padding-right:1.2em}
.over tr>:nth-child(1){width:20%}.over tr>:nth-child(2){width:33%}.over tr>:nth-child(3):nth-last-child(2){
width:18%}
@media(min-width:900px){.finding{grid-template:"head plot" auto "rest plot" 1fr/minmax(0,1fr) 470px}
.head{grid-area:head}.rest{grid-area:rest}.finding figure{grid-area:plot}
.scroll{margin-right:min(0px,calc((1088px - 100vw)/2))}}
@media(max-width:640px){.over table,.over tbody,.over tbody tr,.over td{display:block;width:auto!important}
.over thead{display:none}.over td{border:0;padding:.12em 0}.over tr{padding:.7em 0;
border-bottom:1px solid var(--line)}.card{padding:8px}.scroll .wide,.scroll .paper{min-width:13em}}
@media print{:root{color-scheme:light;--bg:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--c0:#1f6cb0;
--c1:#b4541a;--c2:#3b7d4f;--bad:#b3261e}body{font-size:10.5pt}main{padding:0;max-width:none}h2,.head{
break-after:avoid}figure,tr,.head{break-inside:avoid}.scroll{overflow:visible;margin-right:0}
.scroll th,.scroll td,
.scroll .wide,.scroll .paper{font-size:.68rem;padding-left:.5em;min-width:5em}
.finding{display:block}thead{break-after:avoid}
.finding figure{max-width:400px}}
@page{margin:15mm}
"""


def history(about):
    """[(label, paragraph)]: how all this was made."""
    counts = [f"{page.num(about[key])} {words}" for key, words in (
        ("runs", "runs"), ("bases", "bases"), ("seeds", "seeds"), ("scenes", "scenes to examine a run on"))
        if key in about]
    parts = {"Made": ", ".join([*filter(None, [about.get("made")]), *counts]),
             "Intervals": about.get("intervals"), "Seeds and scenes": about.get("seeds_used"),
             "Machine": about.get("machine"), "Versions": about.get("versions")}
    return [pair for pair in parts.items() if pair[1]]


def opening(findings, about, written):
    """How many of each verdict, and where there are few runs what that means."""
    return " ".join(filter(None, (tally(findings), written(about.get("few", "")))))


def settings(about):
    return [["method", "options"], *([s["method"], f"`{s['options']}`"] for s in about.get("settings") or [])]


# ---------------------------------------------------------------------------- HTML
def rich(text):
    """Escaped, with `code` in its letters."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(str(text)))


def html_table(lines, kind="scroll"):
    """[head, *rows] -> HTML, "" where there is no row. `kind`: `scroll`s sideways, or lies `over` the width
    and stacks its cells on a narrow page."""
    kinds = [' class="paper"' if title.startswith("paper: ") else ' class="wide"' * (len(title) >= 30)
             for title in lines[0]]
    rows = ""
    for k, line in enumerate(lines):
        cells = (f"{rich(first)}<small>{rich(second)}</small>" if second else rich(first)
                 for first, _, second in (cell.partition("\n") for cell in line))
        tag = "td" if k else "th"
        row = f"<tr>{''.join(f'<{tag}{x}>{y}</{tag}>' for x, y in zip(kinds, cells, strict=True))}</tr>"
        rows += row if k else f"<thead>{row}</thead>"
    return f'<div class="{kind}" tabindex="0"><table>{rows}</table></div>' if len(lines) > 1 else ""


def paragraphs(parts):
    return "".join(f"<p><b>{label}.</b> {rich(text)}</p>" for label, text in parts)


def chips(finding):
    return "".join(f'<span class="chip {kind}">{escape(words)}</span>' for kind, words in verdict(finding))


def figure(finding):
    svg, says = figures.svg(finding), rich(figures.caption(finding))
    return f'<figure class="card">{svg}<figcaption>{says}</figcaption></figure>' if svg else ""


def overview(finding):
    """A row of the first table: links and chips are why html_table does not write it."""
    name, numbers = escape(finding["name"]), "<br>".join(map(rich, primary(finding))) or "–"
    return (f'<tr><td><a href="#{name}">{rich(finding["paper"])}</a><br>{rich(finding["title"])}</td>'
            f'<td>{rich(finding["claim"])}</td><td>{chips(finding)}</td><td>{numbers}</td></tr>')


def html_section(f):
    first, rest = ([part for part in said(f) if (part[0] == "Found") == last] for last in (False, True))
    links = "".join(f' <a href="{escape(to)}">{rich(words)}</a>' for words, to in f["links"].items())
    return f"""<section id="{escape(f["name"])}"><div class="finding"><div class="head">
<h2>{rich(f["title"] or f["paper"])}<small>{rich(f["paper"]) * bool(f["title"])}</small></h2><p>{chips(f)}</p>
{paragraphs(first)}</div>{figure(f)}<div class="rest">{paragraphs(rest)}{html_table(contrasts(f))}</div></div>
{html_table(table(f))}
<p class="soft"><small>{"Trace: " * bool(f["trace"])}{rich(f["trace"])}</small>{links}</p></section>"""


def html(findings, about):
    body = f"""<p>{opening(findings, about, rich)} <a href="#defeats">Where mDPO does not win</a></p>
<p class="soft">{LEGEND}</p>
{forest.figure(findings)}
{"" if find_spec("matplotlib") else f"<p>{rich(NO_FIGURES)}</p>"}
<div class="over"><table>
<thead><tr><th>table or figure</th><th>claim</th><th>verdict</th><th>primary measure</th></tr></thead>
{"".join(map(overview, findings))}</table></div>
<section id="defeats"><h2>Where mDPO does not win</h2><p class="soft">{DEFEATS}</p>
{html_table(defeats(findings), "over") or "<p>Nowhere.</p>"}</section>{"".join(map(html_section, findings))}
<section><h2>How it was made</h2>{paragraphs(history(about))}
{html_table(settings(about), "over")}</section>"""
    return page.page(TITLE, body, CSS + forest.CSS)


# ---------------------------------------------------------------------------- Markdown
def plain(text):
    """A text that Markdown leaves as it is, outside of `code`."""
    parts = re.split(r"(`[^`]+`)", " ".join(str(text).split()))
    return "".join(part if k % 2 else re.sub(r"([\\*<\[\]])", r"\\\1", part) for k, part in enumerate(parts))


def md_table(lines):
    head, *rows = (f"| {' | '.join(plain(flat(cell)).replace('|', chr(92) + '|') for cell in line)} |"
                   for line in lines)
    return [head, "|" + "---|" * len(lines[0]), *rows, ""] if rows else []


def md_paragraphs(parts):
    return [line for label, text in parts for line in (f"**{label}.** {plain(text)}", "")]


def md_section(f):
    links = [f"[{plain(words)}]({to})" for words, to in f["links"].items()]
    return [f"## {plain(named(f))}", "", f"**{plain(words_of(f))}**", "",
            *md_paragraphs(said(f)), *md_table(table(f)), *md_table(contrasts(f)),
            " ".join([f"Trace: {plain(f['trace'])}"] * bool(f["trace"]) + links), ""]


def named(finding):
    return ": ".join(filter(None, (finding["paper"], finding["title"])))


def words_of(finding):
    return ", ".join(words for _, words in verdict(finding))


def markdown(findings, about):
    first = [["table or figure", "claim", "verdict", "primary measure"], *(
        [named(f), f["claim"], words_of(f), "; ".join(primary(f)) or "–"]
        for f in findings)]
    text = [f"# {TITLE}", "", opening(findings, about, plain), "", LEGEND, "", *md_table(first),
            "## Where mDPO does not win", "", DEFEATS, "", *(md_table(defeats(findings)) or ["Nowhere."]), "",
            *(line for f in findings for line in md_section(f)),
            "## How it was made", "", *md_paragraphs(history(about)), *md_table(settings(about))]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(text)).strip() + "\n"


def write(findings, about, folder):
    """Write folder/RESULTS.md and folder/results.html, each in one move. What about["missing"] names and no
    finding describes is listed as not run."""
    there = {finding["name"] for finding in findings}
    missing = [{"name": name} for name in about.get("missing") or [] if name not in there]
    findings = [complete(finding) for finding in [*findings, *missing]]
    data.atomic_write(Path(folder) / "RESULTS.md", markdown(findings, about))
    data.atomic_write(Path(folder) / "results.html", html(findings, about))
