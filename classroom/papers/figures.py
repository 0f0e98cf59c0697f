"""The figures of reproduce.py's page: one function a kind, and `svg`, which draws one for the page.

Drawn by matplotlib in stand-in colours that become variables of the page's style sheet, so that a figure is
bright or dark with its page; letters stay letters. A filled mark is a mean with its interval, hollow ones are
the bases, a diamond is the paper's number; series differ in marker, dash and hatch beside their colour. The
same finding gives the same bytes. matplotlib is optional: `svg` returns None where it is not installed.
"""
if __name__ == "__main__":
    exit("A part of reproduce.py; run: python classroom/papers/reproduce.py --help")

import io
import re
import textwrap
from html import escape

from classroom.papers.finding import heading, means, metric, paper
from evaluation import page

INK = {name: f"#0a0b{k:02x}" for k, name in enumerate(("ink", "soft", "line", "card", "c0", "c1", "c2"), 16)}
BASES = (("o", "○"), ("s", "□"), ("^", "△"), ("v", "▽"), ("p", "⬠"))     # matplotlib's marker, a text's
LOOKS = (("c0", "o", "-", ""), ("c1", "s", "--", "////"), ("c2", "^", ":", "----"), ("ink", "P", "-.", "xx"),
         ("soft", "v", (0, (6, 2, 1, 2)), "\\\\\\\\"))           # a series' colour, marker, dash, hatch
WIDTH = 360                                                             # units, of which a letter has 12
STYLE = {"svg.fonttype": "none", "font.size": 12, "font.family": "DejaVu Sans", "text.parse_math": False,
         "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "hatch.linewidth": .7,
         "text.color": INK["ink"], "axes.labelcolor": INK["soft"], "axes.edgecolor": INK["soft"],
         "xtick.color": INK["soft"], "ytick.color": INK["soft"], "xtick.labelcolor": INK["ink"],
         "ytick.labelcolor": INK["ink"], "legend.frameon": False, "legend.fontsize": 12,
         "grid.color": INK["line"], "axes.facecolor": "none", "figure.facecolor": "none",
         "savefig.facecolor": "none"}


def error(values):
    """[mean, low, high] -> [below, above], 0 where there is no interval."""
    mean, low, high = values
    return [0 if low is None else max(0, mean - low), 0 if high is None else max(0, high - mean)]


def diamond(axes, x, y, colour="c1", **more):
    axes.plot(x, y, marker="D", ms=6.5, color=INK[colour], mec=INK["ink"], mew=.8, zorder=5, **more)


def arms(axes, rows):
    axes.set_yticks(range(len(rows)), [textwrap.fill(row["arm"], 17) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(rows) - .5, -.5)


def bars(axes, other, finding, rows, label):
    """A mean with its interval; above it the bases, below it the paper's number. Where all numbers are far
    from 0 there are no bars, whose length would say nothing, and the axis says so."""
    key = finding["metric"]
    seen = [x for row in rows for x in (*row["values"][key], *(mean for _, mean in means(finding, row)),
                                        None if other is not axes else paper(finding, row)) if x is not None]
    zero = min(seen) <= .8 * max(seen)
    for y, row in enumerate(rows):
        values = row["values"][key]
        if zero:
            axes.barh(y, values[0], .76, fc=INK["c0"] + "38", ec=INK["c0"], lw=1)
        axes.errorbar(values[0], y, xerr=[[x] for x in error(values)], fmt="o", ms=4.5, color=INK["ink"],
                      capsize=4, lw=1.5)
        for k, (_, mean) in enumerate(means(finding, row)):
            axes.plot(mean, y - .24, BASES[k % 5][0], ms=5, mfc="none", mec=INK["ink"], mew=1)
        if paper(finding, row) is not None:
            diamond(other, paper(finding, row), y + .24)
    if zero and other is not axes:                         # the paper's differences no larger than they are
        other.set_xlim(0, 1.1 * max(paper(finding, row) or 0 for row in rows))
    arms(axes, rows)
    axes.grid(axis="x")
    axes.set_xlabel(label if zero else f"{label}, not from 0")


def lines(axes, other, finding, rows, label):
    """One line a series over x, its points beside those of the others and not on top of them."""
    key, xs = finding["metric"], sorted({row["x"] for row in rows})
    log = finding["xlog"] and xs[0] > 0
    axes.set_xscale("log" if log else "linear")
    for k, name in enumerate(dict.fromkeys(row["series"] for row in rows)):
        colour, marker, dash, _ = LOOKS[k % 5]
        mine = sorted((row for row in rows if row["series"] == name), key=lambda row: row["x"])
        at = [row["x"] * 1.04 ** k if log else row["x"] + .012 * k * (xs[-1] - xs[0]) for row in mine]
        errors = list(zip(*(error(row["values"][key]) for row in mine), strict=True))
        axes.errorbar(at, [row["values"][key][0] for row in mine], yerr=errors, fmt=marker, ls=dash, ms=6,
                      color=INK[colour], lw=1.8, capsize=3, label=textwrap.fill(name, 22))
        for x, row in zip(at, mine, strict=True):
            for j, (_, mean) in enumerate(means(finding, row)):
                axes.plot(x, mean, BASES[j % 5][0], ms=4.5, mfc="none", mec=INK[colour], mew=.8)
        theirs = [(x, paper(finding, row)) for x, row in zip(at, mine, strict=True)
                  if paper(finding, row) is not None]
        diamond(other, *zip(*theirs, strict=True), colour, ls=dash, lw=.8) if theirs else None
    for side in (axes, other):
        low, high = side.get_ylim()
        if 0 < low < .8 * high:
            side.set_ylim(0, 1.05 * high)
    axes.minorticks_off()
    ticks = xs if len(xs) <= 6 else [m * 10.0 ** e for e in range(-4, 5) for m in (1, 2, 5)]
    ticks = [x for x in ticks if xs[0] <= x <= xs[-1]]
    axes.set_xticks(ticks, [page.num(x) for x in ticks])
    axes.set_xlabel(finding["xlabel"])
    axes.set_ylabel(label)
    axes.grid(axis="y")


def stacked(axes, other, finding, rows, label):
    """Win, tie and loss in percent, with the intervals of win and loss where they end. A hatch is drawn over
    its colour and not with it, since in print it would lose the colour's transparency."""
    looks = {"win": ("c0", "70", None), "tie": ("line", "30", "--"), "loss": ("c1", "50", "///")}
    for y, row in enumerate(rows):
        left = 0
        for key, (colour, shade, hatch) in looks.items():
            values = row["values"].get(key, (0, None, None))
            for fill, lines in [(INK[colour] + shade, None), *[("none", hatch)] * bool(hatch)]:
                axes.barh(y, values[0], .66, left, fc=fill, ec=INK["ink"], hatch=lines, lw=1,
                          label=key if y == 0 and lines == hatch else None)
            if values[0] >= 8:
                axes.text(left + values[0] / 2, y + .05, page.num(values[0]), ha="center", va="center",
                          bbox={"fc": INK["card"], "ec": "none", "boxstyle": "round,pad=.2"})
            if key != "tie":                                   # a longer loss begins further to the left
                end, sides = (left + values[0], 1) if key == "win" else (left, -1)
                axes.errorbar(end, y - .2, xerr=[[x] for x in error(values)[::sides]], fmt="none", capsize=4,
                              ecolor=INK["ink"], lw=1.5)
            left += values[0]
        if paper(finding, row) is not None:
            diamond(axes, paper(finding, row), y + .24)
    arms(axes, rows)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the comparisons")


def histogram(axes, other, finding, rows, label):
    """Each row's points in bins that all share, as percent of its own; a mark on top where their mean is."""
    import numpy as np
    every = [x for row in rows for x in row["points"]]
    edges = np.linspace(min(every), max(every) + 1e-9, 25)
    for k, row in enumerate(rows):
        colour, marker, dash, hatch = LOOKS[k % 5]
        share = 100 * np.histogram(row["points"], edges)[0] / len(row["points"])
        axes.stairs(share, edges, fill=True, fc=INK[colour] + "20", lw=0)
        axes.stairs(share, edges, fill=True, fc="none", ec=INK[colour] + "90", hatch=hatch, lw=0)
        axes.stairs(share, edges, color=INK[colour], ls=dash, lw=1.8)
        axes.plot(sum(row["points"]) / len(row["points"]), .97 - .06 * k, marker, ms=7, color=INK[colour],
                  ls=dash, transform=axes.get_xaxis_transform(), label=textwrap.fill(row["arm"], 22))
        if paper(finding, row) is not None:
            diamond(axes, paper(finding, row), 0, colour, clip_on=False)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    axes.set_ylabel("% of each")
    axes.set_xlabel(label)


DRAW = {"bars": bars, "lines": lines, "stacked": stacked, "histogram": histogram}


def drawable(finding):
    """-> the rows that a figure can show."""
    kind = finding["figure"]
    if kind == "histogram":
        return [row for row in finding["rows"] if row["points"]]
    key = "win" if kind == "stacked" else finding["metric"]
    there = [row for row in finding["rows"] if key in row["values"]]
    return [row for row in there if row["x"] is not None] if kind == "lines" else there


def caption(finding):
    """What the marks of a figure are."""
    rows, kind = drawable(finding), finding["figure"]
    filled = {"stacked": "Error bars: the intervals of win and of loss", "histogram": "Mark on top: the mean"}
    bases = sorted({base for row in rows for base, _ in means(finding, row)})
    hollow = ", ".join(f"{BASES[k % 5][1]} {base}" for k, base in enumerate(bases)) * (kind not in filled)
    theirs = f"◆ the paper: {finding['paper_measure']}{', in its series’ dash' * (kind == 'lines')}"
    parts = [filled.get(kind, "Filled mark: the mean, with its interval"), hollow,
             theirs * any(paper(finding, row) is not None for row in rows)]
    return "; ".join(filter(None, parts)) + "."


def inline(text, says):
    """matplotlib's file -> an element that scales with its place, in the page's colours and letters."""
    head, body = text.partition("<svg")[2].split(">", 1)
    size = re.search(r'viewBox="[0-9. ]+"', head)[0]
    body = re.sub(r"<defs>\s*<style.*?</defs>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("font-family: 'DejaVu Sans'; ", "")
    for name, colour in INK.items():
        body = body.replace(colour, f"var(--{name})")
    return f'<svg {size} role="img" aria-label="{escape(says)}">' + re.sub(r"\s*\n\s*", "\n", body).strip()


def svg(finding):
    """-> an <svg> for the page, or None: nothing to draw, or no matplotlib."""
    rows, kind, (_, _, unit) = drawable(finding), finding["figure"], metric(finding["metric"])
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not rows or kind not in DRAW:
        return None
    label, theirs = heading(finding["metric"]) + ", %" * (unit == "%"), finding["paper_measure"]
    flat = kind in ("bars", "stacked")
    # an axis of its own for the paper's numbers where they are of another unit than ours
    apart = (kind in ("bars", "lines") and any(paper(finding, row) is not None for row in rows)
             and (unit != "%" or "score" in theirs.lower()))
    with style.context(["default", STYLE | {"svg.hashsalt": finding["name"]}]):
        high = 74 + 48 * len(rows) + 32 * apart if flat else 260
        figure, out = Figure(figsize=(WIDTH / 72, high / 72), layout="constrained"), io.BytesIO()
        figure.get_layout_engine().set(w_pad=.1)
        axes = other = figure.add_subplot()
        if apart:
            other = axes.twiny() if flat else axes.twinx()
            other.spines["top" if flat else "right"].set_visible(True)
            says = textwrap.fill(f"◆ paper: {theirs}", 44 if flat else 32)
            (other.set_xlabel if flat else other.set_ylabel)(says, color=INK["ink"], labelpad=6)
        DRAW[kind](axes, other, finding, rows, label)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            figure.legend(handles, labels, loc="outside upper center", handlelength=3, ncols=3 if flat else 2)
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return inline(out.getvalue().decode(), f"{label}: {', '.join(row['arm'] for row in rows)}")
