"""A run as one HTML file, and the model card of what it made.

    python -m training.report runs/NAME
            writes runs/NAME/report.html
    python -m training.report runs/A runs/B ...
            writes runs.html, by classroom/runs.py

train_dpo.py does the first by itself. It shows what the folder holds: the table before and after
(summary.json), curves and held-out pairs with other images (log.jsonl), and the first dozen images with both
answers (before.jsonl, after.jsonl).
"""
import sys
from collections import ChainMap
from html import escape
from pathlib import Path

import data

# isort: split
import numpy as np

from evaluation import metrics, page, stats
from model import command

CURVES = (                                                 # title, what it says, {key of a log line: label}
    ("Loss", "", {"loss": "loss"}),
    ("Margins", "reward of chosen minus rejected; of the true image minus the other",
     {"rewards/margins": "answers", "rewards/image_margins": "images"}),
    ("Accuracies", "share of pairs with a positive margin",
     {"rewards/accuracies": "answers", "rewards/image_accuracies": "images"}),
    ("Rewards", "β × (log p − the reference’s); chosen below 0: the good answer became less likely",
     {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/image_rejected": "other image"}))
IMAGES = {"true": "true image", "same_theme": "same theme", "other": "other image", "blank": "blank"}
COUNTS = ("n", "images", "unparsed")                      # no measures
VERDICT = {"chair_s": "captions name things that are not in the picture",
           "cover": "they name what is in it",
           "margin": "the model prefers the chosen responses of held-out pairs"}
UNFINISHED = ', not finished<meta http-equiv="refresh" content="10">'             # loads the page anew
SIDES = ("before", "after")
HEAD = ("", *SIDES, "change", "95% interval of the change")
ONCE = {"logps_chosen": "log p of the chosen answer", "kl": "KL of an answer from the reference"}


# ---- the table ----
def values(side):
    """{measure: number} of a side of a summary."""
    found = {name: value for name, value in side.items() if page.num(value) != "–" and name not in COUNTS}
    for kind, about in side.get("by_kind", {}).items():
        found[kind] = about["acc"]
    return found


def rows(summary):
    """[(name, before, after, change, its 95% interval)], texts, of the measures that both sides have."""
    before, after = (values(summary.get(side, {})) for side in SIDES)
    paired = summary.get("difference", {})
    paired = paired | paired.get("by_kind", {})
    found = []
    for name, new in after.items():
        if name in before:
            form, spread = ".4f", ""
            if name in paired:
                form = ".1f"
                spread = "{:7.1f} to {:.1f}".format(*paired[name]["interval"])
            title = metrics.CLASSROOM.get(name, name)
            if any(stats.undefined(summary[side], name) for side in SIDES):
                spread = "undefined: 0 of 0"
            change = f"{new - before[name]:+{form}}"
            found.append((title, f"{before[name]:{form}}", f"{new:{form}}", change, spread))
    return found


def told(summary):
    """What a finished run prints."""
    return [*table(summary),
            f"{summary['pairs']} pairs, {summary['steps']} steps, {summary['seconds']:.0f} s"]


def table(summary):
    """Before and after as lines of text, for the terminal."""
    lines = ["{:30} {:>8} {:>8} {:>8}   {}".format(*row).rstrip() for row in (HEAD, *rows(summary))]
    return lines + remarks(summary)


def remarks(summary):
    """What both sides' scores say beside their numbers, a line each."""
    found = [*summary.get("remarks", ())]
    for side in SIDES:
        found += [f"{side}: {says}" for says in summary.get(side, {}).get("remarks", ())]
    return found


def verdict(summary):
    """What the run changed, in one sentence: of what has an interval."""
    changes = summary.get("difference", {})
    if look := summary.get("after", {}).get("look"):
        changes = changes | {"margin": {"interval": look["margin"]["true"][1:]}}
    parts = []
    for name, says in VERDICT.items():
        if name in changes:
            low, high = changes[name]["interval"]
            how = "clearly more" if low > 0 else "clearly less"
            if low <= 0 <= high:
                how = "neither clearly more nor clearly less (the 95% interval of the change includes 0)"
            parts.append(f"{says} {how}")
    return f"<p><b>Compared with before training, {', and '.join(parts)}.</b></p>" if parts else ""


def before_and_after(summary):
    images = summary.get("after", {}).get("images")
    note = "On held-out pairs."
    if images:
        note = (f"Percent, on {page.num(images)} images that are in no pair. CHAIR_s: captions that name an "
                "object which is not in the picture. CHAIR_i: such objects among all that captions name. "
                "Cover: objects in the picture that its caption names. POPE: right answers to whether there "
                "is an object; the absent ones are drawn at random, or (adversarial) often come with those "
                "in the picture. The last rows are right answers to other kinds of questions. The change is "
                "paired by image; it is clear where its interval does not include 0.")
    note = " ".join([note, *map(escape, remarks(summary))])
    return page.section("Before and after", note, page.table(HEAD, rows(summary)))


def cell(measure, form, positive=False):
    """[mean, low, high] as page.table takes it, the interval in small print. positive: it must reach 0."""
    value, *interval = measure
    if positive and interval[-1] < 0:
        return "undefined", "all below 0, by chance: draw more answers"
    return page.num(value, form), " to ".join(page.num(bound, form) for bound in interval)


# ---- curves ----
def evaluations(run, lines, summary):
    """What was measured before, as it trained, and after. lines: those of log.jsonl."""
    found = [line["eval"] for line in lines if "eval" in line]
    if found:
        found = [data.read_json(run / "before.json", {}), *found, summary.get("after", {})]
    table = [(metrics.CLASSROOM.get(name, name), "", {name: ""}) for name in ChainMap(*found)
             if name not in COUNTS]
    note = "Before it trained, as it trained, and at the end: the same questions. The axis counts them."
    return curves("Evaluations", note, found, table)


def curves(title, note, lines, table=CURVES):
    """Figures of numbers that lines hold, as the table lists them."""
    figures = ""
    for name, says, labels in table:
        figures += curve(name, says, {label: means(lines, key) for key, label in labels.items()}, len(lines))
    return page.section(title, note, figures and f'<div class="grid" style="--w:440px">{figures}</div>')


def means(steps, key):
    """A measure's means over stretches of steps."""
    values = [line[key] for line in steps if page.num(line.get(key)) != "–"]
    stretches = np.array_split(values, min(60, len(values))) if values else ()
    return [float(np.mean(some)) for some in stretches]


def curve(title, says, series, steps):
    """One figure, in a box of 290 by 120. series: {label: means over so many steps}."""
    series = {label: means for label, means in series.items() if means}
    if not series:
        return ""
    low, high = min(map(min, series.values())), max(map(max, series.values()))
    keys, body = "", f"""<path class="rule" d="M0 130H290"/>
<text x="-6" y="134" text-anchor="end">{page.num(low, "z.2f")}</text>
<text x="-6" y="14" text-anchor="end">{page.num(high, "z.2f")}</text>
<text x="290" y="147" text-anchor="end">{page.num(steps)}</text>"""
    for k, (label, means) in enumerate(series.items()):
        line = "M"
        for x, mean in zip(np.linspace(0, 290, len(means)), means, strict=True):
            line += f"{x:.1f} {130 - 120 * (mean - low) / (high - low or 1):.1f} "
        body += f'<path class="s{k}" d="{line}"/>'
        keys += (f'<span><svg viewBox="0 0 26 4"><path class="s{k}" d="M0 2H26"/></svg>{escape(str(label))} '
                 f'{page.num(means[0], "z.3f")} → {page.num(means[-1], "z.3f")}</span>')
    return (f'<figure class="card"><h3>{title}</h3><svg viewBox="-54 0 348 152" role="img" '
            f'aria-label="{title}">{body}</svg><div class="key">{keys}{says}</div></figure>')


# ---- does the model look? ----
def held_out(lines):
    """What `look` found first and last, in a table. lines: those of log.jsonl."""
    found = [line["look"] for line in lines if line.get("look")]
    if len(found) < 2:
        return ""
    first, last, body = found[0], found[-1], []
    columns = first["preference"], last["preference"], last["margin"], last["margin_true_minus"]
    head = ("log p(chosen) − log p(rejected), by the image shown", "before", "after", "margin",
            "true image’s margin minus it")
    for kind in first["preference"]:
        body.append((IMAGES[kind], *(cell(column.get(kind, [None]), "+z.2f") for column in columns)))
    for key, name in ONCE.items():
        body.append((name, *(cell(look[key], "z.2f", key == "kl") for look in (first, last))))
    note = (f"{page.num(first['n'])} held-out pairs with their own and other images, in nats, with 95% "
            "intervals. The margin is what training added, × β. Last column, pair by pair: above 0 where "
            "training taught the model to look; at 0 it changed words alone. The blank image can score "
            "highest, before training too: it shows nothing that a response names, so a longer response "
            "loses more by it, and rejected ones are often longer.")
    return page.section("Does the model look?", note, page.table(head, body))


# ---- answers ----
def said_by(run, side):
    """The lines of a run's answers, before or after."""
    _, *lines = data.read_jsonl(run / f"{side}.jsonl")
    return lines


def answers(run, sides):
    """The first dozen images, each with the answers to its first three questions. run: it has the images.
    sides: {whose: lines}."""
    shown, body = {}, ""
    for lines in zip(*sides.values(), strict=False):
        shown.setdefault(lines[-1]["image"], []).append(lines)
    for image, asked in list(shown.items())[:12]:
        said = ""
        for lines in asked[:3]:
            said += f'<dl><dt class="ask">{escape(lines[0]["question"])}</dt>'
            for side, line in zip(sides, lines, strict=True):
                invented = metrics.hallucinated(line["answer"], line["truth"])
                said += f'<dt>{escape(str(side))}</dt><dd>{page.marked(line["answer"], invented)}</dd>'
            said += "</dl>"
        (caption, *_), *_ = asked
        there = ", ".join(caption["truth"].get("present", ()))
        body += f'<div class="card row">{page.picture(run / "scenes", image, there)}<div>{said}</div></div>'
    note = ("The first images of the evaluation, in order: none was picked. Below each, the objects in it. "
            "<mark>Underlined in red</mark>: words that the image contradicts.")
    return page.section("Answers", note, body and f'<div class="grid" style="--w:440px">{body}</div>')


# ---- the model card ----
CARD = """---
base_model: {base}
library_name: {library}
pipeline_tag: image-text-to-text
tags: [{tags}]
license:   # left open: whoever publishes the weights decides; the base's and the data's licences apply, too
---
# {title}

Trained with nanoVPO: loss `{loss}`, {pairs} preference pairs, {steps} steps. Data: `{data}`, hash {digest}.

| | before | after | change | 95% interval of the change |
|---|---|---|---|---|
{measures}

Options: {options}.

Left open: the licence of the data, the intended use, known limits.
"""


def card(name, summary, digest):
    """README.md of a run's adapter, or of its whole model, in PEFT's layout. digest: of its data."""
    o = summary["options"]
    library = "peft" if o["lora_r"] else "transformers"
    return CARD.format_map(o | summary | {
        "base": o["model"],
        "library": library,
        "tags": f"{library}, dpo, nanovpo",
        "title": name,
        "digest": digest or "none, it is made from the options",
        "measures": "\n".join(f"| {' | '.join(row)} |" for row in rows(summary)),
        "options": ", ".join(f"{name} `{value}`" for name, value in o.items() if value not in ("", 0))})


# ---- the page ----
def write(run):
    """Write report.html into a run's folder and return its path. Raises UserError if there is no run."""
    first, *more = list(data.read_jsonl(run / "log.jsonl", torn_ok=True)) or [{}]
    summary = data.read_json(run / "summary.json", {}, data.as_record)
    with command.explained(f"{run}: a file of the run is damaged", "train again, to be sure with --restart"):
        body = content(run, first, more, summary)
    data.atomic_write(run / "report.html", page.page(run.resolve().name, body, page.TABLES))
    return run / "report.html"


def content(run, first, more, summary):
    """The page's HTML, of the lines of the log and the summary."""
    steps = [line for line in more if "step" in line]
    done = ChainMap(summary, *steps[-1:], first)
    o = done.get("options", {})
    said = (f"{o.get('loss', 'a loss')} on {page.num(done.get('pairs'))} pairs, "
            f"{page.num(done.get('step'))} steps in {page.num(done.get('seconds'))} seconds")
    for name in "beta image_rejected model lora_r lr seed".split():
        if name in o:
            said += f", {name} {o[name]}"
    unfinished = "" if summary else UNFINISHED
    sides = {line["evaluation"]: line["answers"] for line in more if "answers" in line}
    if "difference" in summary and not sides:
        sides = {side: said_by(run, side) for side in SIDES}
    said += f", commit {first.get('commit', '–')}"
    note = "The axis counts steps. Means over stretches of them, at most 60; the first and last are below."
    return (f"<p>{escape(said)}{unfinished}.</p>{verdict(summary)}{before_and_after(summary)}"
            f"{evaluations(run, more, summary)}{curves('Training', note, steps)}"
            f"{held_out([first, *more])}{answers(run, sides)}")


def main():
    parser = data.Parser(prog="report.py", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="the folder of a run, or of several")
    parser.add_argument("--out", type=Path, default="runs.html", help="the page of several runs [runs.html]")
    o = parser.parse_args()
    try:
        if len(o.runs) > 1:
            print(command.classroom("runs.py", *sys.argv[1:]), end="")
        else:
            print(write(o.runs[0]))
    except (data.UserError, OSError) as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()
