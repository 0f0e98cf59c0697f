"""A run as one HTML file.

    python report.py runs/NAME         writes runs/NAME/report.html, in a second

train_dpo.py does it by itself. It shows what the folder holds: the table before and after (summary.json),
curves and held-out pairs with other images (log.jsonl), the reward of words with their own and another image
(words.json), and the first dozen images with both answers (before.jsonl, after.jsonl).
"""
import sys
from html import escape
from pathlib import Path

import numpy as np

import data
import metrics
import page

CURVES = (                                                 # title, what it says, {key of a log line: label}
    ("Loss", "", {"loss": "loss"}),
    ("Margins", "reward of chosen minus rejected; of the true image minus the other",
     {"rewards/margins": "answers", "rewards/image_margins": "images"}),
    ("Accuracies", "share of pairs with a positive margin",
     {"rewards/accuracies": "answers", "rewards/image_accuracies": "images"}),
    ("Rewards", "β × (log p − the reference’s); chosen below 0: the good answer became less likely",
     {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/image_rejected": "other image"}),
    ("log p of the answers", "", {"logps/chosen": "chosen", "logps/rejected": "rejected"}),
    ("Gradient norm", "unclipped", {"grad_norm": "norm"}), ("Speed", "", {"tokens_per_second": "tokens/s"}))
IMAGES = {"true": "true image", "same_theme": "same theme", "other": "other image", "blank": "blank"}
ONCE = {"logps_chosen": "log p of the chosen answer", "kl": "KL of an answer from the reference"}


# ---- the table ----
def measures(side):
    """{name: (value, interval or None)} of a side of a summary, or of its difference."""
    found = {}
    for name, value in {**side, **side.get("by_kind", {})}.items():
        if isinstance(value, dict) and "interval" in value:
            found[name] = value.get("acc", value.get("change")), value["interval"]
        elif page.num(value) != "–":
            found[name] = value, side.get("intervals", {}).get(name)
    return found


def rows(summary):
    """[(measure, before, after, change)], each a (value, interval or None), for what both sides have."""
    before, after, change = (measures(summary.get(part) or {}) for part in ("before", "after", "difference"))
    found = []
    for name in after:
        if name in before and name not in ("n", "images", "unparsed"):
            (old, _), (new, _) = before[name], after[name]
            difference = change.get(name, (new - old, None))
            found.append((metrics.CLASSROOM.get(name, name), before[name], after[name], difference))
    return found


def table(summary):
    """Before and after as lines of text, for the terminal."""
    lines = [f"{'':30}{'before':>9}{'after':>9}{'change':>9}   95% interval of the change"]
    for measure, (old, _), (new, _), (change, interval) in rows(summary):
        form = "9.1f" if interval else "9.4f"
        spread = "{:10.1f} to {:.1f}".format(*interval) if interval else ""
        lines.append(f"{measure:30}{old:{form}}{new:{form}}{change:+{form}}{spread}")
    return lines


def before_and_after(summary):
    images, note = (summary.get("after") or {}).get("images"), "On held-out pairs."
    digits = ".1f" if images else ".4g"
    if images:
        note = (f"Percent, on {page.num(images)} images apart from the pairs, with 95% intervals. "
                "The change is paired by image, and bold where its interval leaves out 0.")
    body = []
    for measure, before, after, change in rows(summary):
        body.append((measure, cell(*before, f"z{digits}"), cell(*after, f"z{digits}"),
                     cell(*change, f"+z{digits}", bold=True)))
    return page.section("Before and after", note, page.table(("", "before", "after", "change"), body))


def cell(value, interval, form, bold=False):
    """A number with its interval in small print, as page.table takes them; bold where that leaves out 0."""
    low, high = interval or (0, 0)
    spread = f"{page.num(low, form)} to {page.num(high, form)}" if interval else ""
    return page.num(value, form), spread, "clear" if bold and (low > 0 or high < 0) else ""


# ---- curves ----
def path(points, kind, box):
    """A line in a box of 290 by 120; box: the (left, right, low, high) that it shows."""
    left, right, low, high = box
    wide, tall = 290 / (right - left or 1), 120 / (high - low or 1)
    some = points[::max(1, len(points) // 600)]
    places = " ".join(f"{(x - left) * wide:.1f} {130 - (y - low) * tall:.1f}" for x, y in some)
    return f'<path class="{kind}" d="M{places}"/>'


def figure(title, says, series):
    """Lines over the steps, {label: [(step, value)]}: faint as logged, strong as a running mean."""
    steps, values = zip(*sum(series.values(), []), strict=True)
    box = left, right, low, high = min(steps), max(steps), min(values), max(values)
    keys, body = "", path([(left, low), (right, low)], "rule", box)
    if low < 0 < high:
        body += path([(left, 0), (right, 0)], "rule", box)
    for place, value in (('x="-6" y="134" text-anchor="end"', low), ('x="-6" y="14" text-anchor="end"', high),
                         ('y="147"', left), ('x="290" y="147" text-anchor="end"', right)):
        body += f"<text {place}>{page.num(value)}</text>"
    for k, (label, points) in enumerate(series.items()):
        steps, values = zip(*points, strict=True)
        wide = 1 + len(points) // 40 * 2
        means = np.convolve(values, np.ones(wide) / wide, "valid").tolist()
        body += path(points, f"s{k} raw", box)
        body += path([*zip(steps[wide // 2:], means, strict=False)], f"s{k}", box)
        keys += (f'<span><svg viewBox="0 0 26 4"><path class="s{k}" d="M0 2H26"/></svg>{label} '
                 f'{page.num(means[0])} → {page.num(means[-1])}</span>')
    return (f'<figure class="card"><h3>{title}</h3><svg viewBox="-54 0 348 152" role="img" '
            f'aria-label="{title}">{body}</svg><div class="key">{keys}{says}</div></figure>')


def curves(steps):
    figures = ""
    for title, says, labels in CURVES:
        series = {}
        for key, label in labels.items():
            points = [(line["step"], line[key]) for line in steps if page.num(line.get(key)) != "–"]
            if points:
                series[label] = points
        figures += figure(title, says, series) if series else ""
    note = "Faint: each step on its own batch. Strong: a running mean, whose first and last values are below."
    return page.section("Training", note, figures and f'<div class="grid">{figures}</div>')


# ---- does the model look? ----
def held_out(lines):
    """What `look` found first and last, in tables. lines: those of log.jsonl."""
    found = [line["look"] for line in lines if line.get("look")]
    if not found:
        return ""
    first, *_, last = found * 2
    sides = {"before": first, "after": last} if len(found) > 1 else {"before": first}
    head, body = ["log p(chosen) − log p(rejected), by the image shown", *sides], []
    if len(found) > 1:
        head += ["margin", "true image’s margin minus it"]
    for kind in first["preference"]:
        cells = [mean(look["preference"][kind], "+z.2f") for look in sides.values()]
        cells += [mean(last[key].get(kind), "+z.2f", bold=True) for key in ("margin", "margin_true_minus")]
        body.append((IMAGES[kind], *cells[:len(head) - 1]))
    for key, name in ONCE.items():
        body.append((name, *(mean(look[key], "z.2f") for look in sides.values())))
    note = (f"{page.num(first['n'])} held-out pairs with their own and other images, in nats, with 95% "
            "intervals. The margin is what training added, × β. Last column, pair by pair: above 0 where "
            "training taught the model to look; at 0 it changed words alone.")
    return f'<p class="soft">{note}</p>{page.table(head, body)}'


def mean(values, form, bold=False):
    """cell() of [mean, low, high], or of None."""
    value, *interval = values or [None]
    return cell(value, interval, form, bold)


def word_rewards(run):
    """Answers word by word: the reward of each with its own and with another image."""
    entries = data.read_json(run / "words.json", [])
    most = max((abs(word[k]) for e in entries for word in e["words"] for k in ("true", "other")), default=0)
    form, body = "+z.2f" if most >= .2 else "+z.3f", ""
    for e in entries:
        pictures, words = "", '<div class="w soft">image<i>true</i><i>other</i></div>'
        for word in e["words"]:
            said = page.marked(word["word"], metrics.hallucinated(word["word"], e["truth"]))
            words += f'<div class="w">{said}'
            for k in ("true", "other"):
                colour, strength = "pos" if word[k] > 0 else "neg", .6 * abs(word[k]) / (most or 1)
                words += (f'<i style="background:rgba(var(--{colour}),{strength:.2f})" '
                          f'title="{k}: {word[k]:+.4f}">{page.num(word[k], form)}</i>')
            words += "</div>"
        for key, k in (("image", "true"), ("other_image", "other")):
            if key in e:
                total = page.num(sum(word[k] for word in e["words"]), form)
                pictures += page.picture(run, e[key], f"{k}: {total}")
        body += f'<div class="card row">{pictures}<div>{words}</div></div>'
    note = ("The reward β (log p − the reference’s) of each word of an answer after training, with its own "
            "and with another image. Blue: training made the word likelier; orange: less likely. Where the "
            "rows differ, the model looks; where they agree, it learned words. Below the images: the sums.")
    return body and f'<p class="soft">{note}</p><div class="grid" style="--w:100%">{body}</div>'


# ---- answers ----
def answers(run, images=12):
    """The first images, each with the answers to its first three questions before and after."""
    (first, *before), (_, *after) = (data.read_jsonl(run / f"{name}.jsonl") for name in ("before", "after"))
    root, shown, body = (run / first["settings"]["scenes"]).parent, {}, ""
    for old, new in zip(before, after, strict=False):
        if new["image"] in shown or len(shown) < images:
            shown.setdefault(new["image"], []).append((old, new))
    for image, pairs in shown.items():
        said = ""
        for old, new in pairs[:3]:
            said += f'<dl><dt class="ask">{escape(new["question"])}</dt>'
            for side, line in (("before", old), ("after", new)):
                invented = metrics.hallucinated(line["answer"], new["truth"])
                said += f'<dt>{side}</dt><dd>{page.marked(line["answer"], invented)}</dd>'
            said += "</dl>"
        _, caption = pairs[0]
        there = ", ".join(caption["truth"].get("present", ()))
        body += f'<div class="card row">{page.picture(root, image, there)}<div>{said}</div></div>'
    note = ("The first images examined, in their order: nothing is picked. Below each, what is in it. "
            "<mark>Underlined in red</mark>: words that the image denies.")
    return page.section("Answers", note, f'<div class="grid" style="--w:440px">{body}</div>')


# ---- the page ----
def write(run):
    """Write report.html into a run's folder and return its path. Raises UserError where no run is."""
    run = Path(run)
    first, *more = list(data.read_jsonl(run / "log.jsonl", torn_ok=True)) or [{}]
    steps = [line for line in more if "step" in line]
    summary = data.read_json(run / "summary.json", {})
    done = {"options": {}, **first, **(steps[-1] if steps else {}), **summary}
    o = done["options"]
    said = [f"{o.get('loss', 'a loss')} on {page.num(done.get('pairs'))} pairs",
            f"{page.num(summary.get('steps', done.get('step')))} steps in "
            f"{page.num(done.get('seconds'))} seconds"]
    said += [f"{k} {o[k]}" for k in ("beta", "image_rejected", "model", "lora_r", "lr", "seed") if k in o]
    said.append(f"commit {first.get('commit', '–')}")
    if not summary:
        said.append("not finished")
    body = f"<p>{escape(', '.join(said))}.</p>{before_and_after(summary)}{curves(steps)}"
    body += page.section("Does the model look?", "", held_out([first, *more]) + word_rewards(run))
    if "difference" in summary:
        body += answers(run)
    data.atomic_write(run / "report.html", page.page(run.resolve().name, body))
    return run / "report.html"


def main():
    parser = data.Parser(prog="report.py", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run")
    try:
        print(write(parser.parse_args().run))
    except data.UserError as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()
