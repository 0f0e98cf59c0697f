"""The first figure of reproduce.py's page: every claim, what was found beside what is claimed.

    forest.figure(findings)

A claim is a row: its verdict in a sign and in words, and a small drawing with a line for each comparison that
it rests on. All drawings share one axis of points. Their places are percents of the drawing's width, so that
marks and letters keep their size from a phone to a wide screen. Nothing is said by colour alone: a comparison
that holds has a filled disc, one that does not a cross, and the paper's own number is a diamond.
"""
if __name__ == "__main__":
    exit("A part of reproduce.py; run: python classroom/papers/reproduce.py --help")

from html import escape

from classroom.papers.finding import flat, numbers, place_of, three, verdict
from evaluation import page

LOW, HIGH = -60, 95                                 # the axis, in points
STEP, FIRST = 13, 9                                 # heights of a line and of the first one, in pixels
CAPTION = (
    "Every claim, in points. Each line is a comparison that the claim rests on: ● it comes out as claimed, ✕ "
    "it does not. The mark is the mean, the line its interval (95%, or 90% where no difference is claimed). "
    "Shaded: where the whole interval has to be. ◇ the paper’s own difference. Most are differences of "
    "CHAIR_s, where less is better; the sections below name each comparison.")
CSS = """
.forest{margin:1.2em 0 2em;padding:0}.forest figcaption{max-width:72ch;margin:0 0 .8em}
.claim,.axis{display:grid;grid-template-columns:minmax(0,1fr);gap:2px 22px;padding:.42em 0;
border-top:1px solid var(--line)}.claim p{margin:0;max-width:none;font-size:.92rem;line-height:1.35}
.claim b{white-space:nowrap}.claim em{font-style:normal;font-weight:600}
.forest svg{margin:0;overflow:visible}.forest .shade{fill:currentColor;stroke:none;opacity:.13}
.forest .zero{stroke:var(--soft);stroke-width:1}.forest .grid-line{stroke:var(--line);stroke-width:1}
.forest .spread{stroke:currentColor;stroke-width:2}.forest .holds{fill:currentColor;stroke:none}
.forest .fails{fill:none;stroke:currentColor;stroke-width:2.2}
.forest .theirs{fill:var(--bg);stroke:var(--ink);stroke-width:1.3}
.forest .claim{border:0;border-top:1px solid var(--line)}
@media(min-width:760px){.claim,.axis{grid-template-columns:minmax(0,5fr) minmax(0,6fr);align-items:center}
.axis svg{grid-column:2}}
@media print{.claim{break-inside:avoid}}
"""


def at(x):
    """A place on the axis, in percent of the width; what is beyond it lies at its end."""
    share = (min(max(x, LOW), HIGH) - LOW) / (HIGH - LOW)
    return f"{100 * share:.2f}%"


def upright(x, high, kind):
    return f'<line class="{kind}" x1="{at(x)}" x2="{at(x)}" y1="0" y2="{high}"/>'


def shape(x, y, path, kind):
    """A mark of a few pixels around its place."""
    mark = f'<path class="{kind}" d="{path}"/>'
    return f'<svg x="{at(x)}" y="{y}" width="1" height="1" overflow="visible">{mark}</svg>'


DISC = "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0Z"
CROSS = "M-4-4L4 4M-4 4L4-4"
DIAMOND = "M-5 0L0-5L5 0L0 5Z"


def line(part, y):
    """One comparison: the shade of what is claimed, the interval, the mark, the paper's diamond."""
    mean, low, high = numbers(part["difference"])
    left, right = (side if given is None else given for given, side in
                   zip(part["claimed"], (LOW, HIGH), strict=True))
    share = 100 * (right - left) / (HIGH - LOW)
    drawn = f'<rect class="shade" x="{at(left)}" y="{y - 5}" width="{share:.2f}%" height="10"/>'
    if None not in (low, high):
        drawn += f'<line class="spread" x1="{at(low)}" x2="{at(high)}" y1="{y}" y2="{y}"/>'
    if part["paper"] is not None:
        drawn += shape(part["paper"], y, DIAMOND, "theirs")
    mark, kind = (DISC, "holds") if part["holds"] else (CROSS, "fails")
    return f"<g><title>{escape(says(part))}</title>{drawn}{shape(mean, y, mark, kind)}</g>"


def says(part):
    """A comparison in words, for who points at it or cannot see it."""
    theirs = "" if part["paper"] is None else f"; the paper: {three((part['paper'],), 'chair_s', '+')}"
    holds = "as claimed" if part["holds"] else "not as claimed"
    return f"{part['what']} {flat(three(part['difference'], 'chair_s', '+'))}, {holds}{theirs}".strip()


def drawing(finding):
    parts = [part for part in finding["parts"] if numbers(part["difference"] or ())[0] is not None]
    if not parts:
        return ""
    high = STEP * (len(parts) - 1) + 2 * FIRST
    rules = "".join(upright(x, high, "grid-line") for x in range(-40, HIGH, 20)) + upright(0, high, "zero")
    lines = "".join(line(part, FIRST + STEP * k) for k, part in enumerate(parts))
    label = escape("; ".join(map(says, parts)))
    return f'<svg role="img" aria-label="{label}" height="{high}">{rules}{lines}</svg>'


def row(finding):
    (kind, words), *also = verdict(finding)
    more = "".join(f", {text}" for _, text in also)
    notes = "".join(f" <i>({escape(note)})</i>" for note in dict.fromkeys(part["note"] for part in
                                                                           finding["parts"]) if note)
    return (f'<div class="claim {kind}"><p><em>{escape(words)}{more}</em> '
            f'<a href="#{escape(finding["name"])}">{escape(place_of(finding))}</a>: '
            f'<span class="soft">{escape(finding["claim"])}</span>{notes}</p>{drawing(finding)}</div>')


def axis():
    numbered = "".join(f'<text x="{at(x)}" y="13" text-anchor="middle">{page.num(x)}</text>'
                       for x in range(-40, HIGH, 20))
    return f'<div class="axis"><svg height="18" aria-hidden="true">{numbered}</svg></div>'


def figure(findings):
    """-> HTML, "" where no finding has a comparison to draw."""
    if not any(finding["parts"] for finding in findings):
        return ""
    rows = "".join(map(row, findings))
    says = f"<figcaption>{escape(CAPTION)}</figcaption>"
    return f'<figure class="forest">{says}{axis()}{rows}{axis()}</figure>'
