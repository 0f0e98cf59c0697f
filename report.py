"""A run's report: one HTML file that needs nothing else, bright or dark, wide or narrow.

    python report.py runs/NAME      writes runs/NAME/report.html, in a second; train_dpo.py does it by itself

It shows what the folder holds: the table before and after (summary.json), curves and what diagnose.py found
(log.jsonl), the reward of words with their own and another image (words.json), and the first dozen images
with both answers (before.jsonl, after.jsonl). Text is escaped, images are encoded anew, no script may run.
"""
import json
import sys
from html import escape
from itertools import accumulate
from pathlib import Path

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


def figure(title, says, series):
    """Lines over the steps, {label: [(step, value)]}: faint as logged, strong as a running mean."""
    steps, values = zip(*sum(series.values(), []), strict=True)
    left, right, low, high = min(steps), max(steps), min(values), max(values)

    def path(points, kind):
        at = ((290 * (x - left) / (right - left or 1), 130 - 120 * (y - low) / (high - low or 1))
              for x, y in points[::max(1, len(points) // 600)])
        return f'<path class="{kind}" d="M{" ".join(f"{x:.1f} {y:.1f}" for x, y in at)}"/>'

    keys, body = "", "".join(path([(left, y), (right, y)], "rule") for y in [low] + [0] * (low < 0 < high))
    for place, value in (('x="-6" y="134" text-anchor="end"', low), ('x="-6" y="14" text-anchor="end"', high),
                         ('y="147"', left), ('x="290" y="147" text-anchor="end"', right)):
        body += f"<text {place}>{page.num(value)}</text>"
    for k, (label, points) in enumerate(series.items()):
        if points:
            n, total = len(points), [0, *accumulate(y for _, y in points)]
            ends = [(max(0, i - n // 40), min(n, i + n // 40 + 1)) for i in range(n)]
            means = [(p[0], (total[j] - total[i]) / (j - i)) for p, (i, j) in zip(points, ends, strict=True)]
            body += path(points, f"s{k} raw") + path(means, f"s{k}")
            keys += (f'<span><svg viewBox="0 0 26 4"><path class="s{k}" d="M0 2H26"/></svg>{label} '
                     f'{page.num(means[0][1])} → {page.num(means[-1][1])}</span>')
    return (f'<figure class="card"><h3>{title}</h3><svg viewBox="-54 0 348 152" role="img" aria-label='
            f'"{title}">{body}</svg><div class="key">{keys}{says}</div></figure>')


def curves(steps):
    figures = ""
    for title, says, keys in CURVES:
        series = {v: [(s["step"], s[k]) for s in steps if page.num(s.get(k)) != "–"] for k, v in keys.items()}
        figures += figure(title, says, series) if any(series.values()) else ""
    note = "Faint: each step on its own batch. Strong: a running mean, whose ends stand below it."
    return page.section("Training", note, figures and f'<div class="grid">{figures}</div>')


def rows(summary):
    """[(measure, before, after, change)], each a (value, interval or None), for what both sides have."""
    def flat(part):
        side = summary.get(part) or {}
        out = {k: (v, side.get("intervals", {}).get(k)) for k, v in side.items() if page.num(v) != "–"}
        return out | {k: (v.get("acc", v.get("change")), v["interval"]) for k, v in
                      {**side, **side.get("by_kind", {})}.items() if isinstance(v, dict) and "interval" in v}
    before, after, change = map(flat, ("before", "after", "difference"))
    return [(metrics.CLASSROOM.get(k, k), before[k], after[k],
             change.get(k, (after[k][0] - before[k][0], None)))
            for k in after if k in before and k not in ("n", "images", "unparsed")]


def table(summary):
    """Before and after as lines of text, for the terminal."""
    lines = [f"{'':30}{'before':>9}{'after':>9}{'change':>9}   95% interval of the change"]
    for measure, (old, _), (new, _), (change, interval) in rows(summary):
        form, spread = ("9.1f", "{:10.1f} to {:.1f}".format(*interval)) if interval else ("9.4f", "")
        lines.append(f"{measure:30}{old:{form}}{new:{form}}{change:+{form}}{spread}")
    return lines


def before_and_after(summary):
    images, body, note = (summary.get("after") or {}).get("images"), "", "On held-out pairs."
    if images:
        note = (f"Percent, on {page.num(images)} images apart from the pairs, with 95% intervals. "
                "The change is paired by image, and bold where its interval leaves out 0.")
    for measure, *cells in rows(summary):
        body += f"<tr><td>{escape(measure)}</td>"
        for (value, interval), form in zip(cells, ("z", "z", "+z"), strict=True):
            form += ".1f" if images else ".4g"
            clear = form[0] == "+" and interval and (interval[0] > 0 or interval[1] < 0)
            body += (f'<td class="{"clear" if clear else ""}">{page.num(value, form)}'
                     f'<small>{" to ".join(page.num(x, form) for x in interval or ())}</small></td>')
        body += "</tr>"
    head = "<table><tr><th></th><th>before</th><th>after</th><th>change</th></tr>"
    return page.section("Before and after", note, body and f"{head}{body}</table>")


def answers(run, images=12):
    """The first images, each with the answers to its first three questions before and after."""
    (first, *before), (_, *after) = (data.read_jsonl(run / f"{name}.jsonl") for name in ("before", "after"))
    root, shown, body = (run / first["settings"]["scenes"]).parent, {}, ""
    for old, new in zip(before, after, strict=False):
        if new["image"] in shown or len(shown) < images:
            shown.setdefault(new["image"], []).append((old, new))
    for image, pairs in shown.items():
        there = ", ".join(pairs[0][1]["truth"].get("present", ()))
        body += f'<div class="card row">{page.picture(root, image, there)}<div>'
        for old, new in pairs[:3]:
            body += f'<dl><dt class="ask">{escape(new["question"])}</dt>'
            for side, line in (("before", old), ("after", new)):
                invented = metrics.hallucinated(line["answer"], new["truth"])
                body += f'<dt>{side}</dt><dd>{page.marked(line["answer"], invented)}</dd>'
            body += "</dl>"
        body += "</div></div>"
    note = ("The first images examined, in their order: nothing is picked. Below each, what is in it. "
            "<mark>Underlined in red</mark>: words that the image denies.")
    return page.section("Answers", note, f'<div class="grid" style="--w:440px">{body}</div>')


def bars(title, says, sides):
    """Bars with their intervals: {side: {image: [mean, low, high]}}; `before` is hollow, `after` filled."""
    rows = [(kind, side, *sides[side][kind]) for kind in IMAGES for side in sides if kind in sides[side]]
    low, high = min(0, *(row[3] for row in rows)), max(0, *(row[4] for row in rows))
    scale, body, y, last = 180 / (high - low or 1), "", -8, ""
    zero = 88 - low * scale
    for kind, side, *values in rows:
        y += 14 if kind == last else 22
        mean, left, right = (zero + x * scale for x in values)
        body += (f'<text y="{y + 9}">{IMAGES[kind] if kind != last else ""}</text><rect class="{side}" '
                 f'x="{min(zero, mean):.1f}" y="{y}" width="{abs(mean - zero):.1f}" height="10"/>'
                 f'<path class="ends" d="M{left:.1f} {y + 1}v8m0-4H{right:.1f}m0-4v8"/>'
                 f'<text x="322" y="{y + 9}" text-anchor="end">{page.num(values[0], "+z.2f")}</text>')
        last = kind
    keys = "".join('<span><svg viewBox="0 0 26 10"><rect x="1" y="1" width="24" height="8" '
                   f'class="{side}"/></svg>{side}</span>' for side in sides)
    return (f'<figure class="card"><h3>{title}</h3><svg viewBox="0 0 324 {y + 20}" role="img" aria-label="'
            f'{title}"><path class="rule" d="M{zero:.1f} 6V{y + 18}"/>{body}</svg><div class="key">{keys}'
            f"{says}</div></figure>")


def held_out(lines):
    """What diagnose.py found first and last, as figures and a table. lines: those of log.jsonl."""
    found = [line["look"] for line in lines if line.get("look")]
    if not found:
        return ""
    sides = dict(zip(("before", "after"), (found[0], *found[1:][-1:]), strict=False))
    body, figures = "", bars("Preference", "log p(chosen) − log p(rejected), nats, by the image shown",
                             {side: look["preference"] for side, look in sides.items()})
    if len(found) > 1:
        for title, key, says in (("Margin", "margin", "what training added to the preference, × β"),
                                 ("Margin, true image minus", "margin_true_minus", "pair by pair")):
            figures += bars(title, says, {"after": found[-1][key]})
    for key, label in (("logps_chosen", "log p of the chosen answer"),
                       ("kl", "KL of an answer from the reference")):
        body += f"<tr><td>{label}, nats</td>"
        for look in sides.values():
            mean, *ends = (page.num(x, "z.2f") for x in look[key])
            body += f"<td>{mean}<small>{' to '.join(ends)}</small></td>"
        body += "</tr>"
    head = "".join(f"<th>{side}</th>" for side in sides)
    note = (f"{page.num(found[0]['n'])} held-out pairs with their own and other images, and 95% intervals. "
            "Last figure: above 0 where training taught the model to look; at 0 it changed words alone.")
    return (f'<p class="soft">{note}</p><div class="grid">{figures}</div>'
            f"<table><tr><th></th>{head}</tr>{body}</table>")


def looks(run, lines):
    """Held-out pairs with their own and other images; the reward of each word of an answer with two."""
    entries = json.loads((run / "words.json").read_text()) if (run / "words.json").exists() else []
    most = max((abs(w[k]) for e in entries for w in e["words"] for k in ("true", "other")), default=0) or 1
    body, form = "", "+z.2f" if most >= .2 else "+z.3f"
    for e in entries:
        pictures, words = "", '<div class="w soft">image<i>true</i><i>other</i></div>'
        for w in e["words"]:
            words += f'<div class="w">{page.marked(w["word"], metrics.hallucinated(w["word"], e["truth"]))}'
            for k in ("true", "other"):
                shade = f"rgba(var(--{'pos' if w[k] > 0 else 'neg'}),{.6 * abs(w[k]) / most:.2f})"
                words += f'<i style="background:{shade}" title="{k}: {w[k]:+.4f}">{page.num(w[k], form)}</i>'
            words += "</div>"
        for image, k in (("image", "true"), ("other_image", "other")):
            total = page.num(sum(w[k] for w in e["words"]), form)
            pictures += page.picture(run, e[image], f"{k}: {total}") if image in e else ""
        body += f'<div class="card row">{pictures}<div>{words}</div></div>'
    note = ("The reward β (log p − the reference’s) of each word of an answer after training, with its own "
            "and with another image. Blue: training made the word likelier; orange: less likely. Where the "
            "rows differ, the model looks; where they agree, it learned words. Below the images: the sums.")
    words = body and f'<p class="soft">{note}</p><div class="grid" style="--w:100%">{body}</div>'
    return page.section("Does the model look?", "", held_out(lines) + words)


def write(run_folder):
    """Write run_folder/report.html in one move; returns its path. Raises UserError where no run is."""
    run = Path(run_folder)
    first, *steps = list(data.read_jsonl(run / "log.jsonl", torn_ok=True)) or [{}]
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
    done = {"options": {}, **first, **(steps[-1] if steps else {}), **summary}
    said = [f"{(o := done['options']).get('loss', 'a loss')} on {page.num(done.get('pairs'))} pairs",
            f"{page.num(summary.get('steps', done.get('step')))} steps in "
            f"{page.num(done.get('seconds'))} seconds",
            *(f"{k} {o[k]}" for k in ("beta", "image_rejected", "model", "lora_r", "lr", "seed") if k in o),
            f"commit {first.get('commit', '–')}", *([] if summary else ["not finished"])]
    body = curves(steps) + looks(run, [first, *steps]) + (answers(run) if "difference" in summary else "")
    body = f"<p>{escape(', '.join(said))}.</p>{before_and_after(summary)}{body}"
    data.atomic_write(run / "report.html", page.page(run.resolve().name, body))
    return run / "report.html"


def main():
    parser = data.Parser(prog="report.py", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a run")
    try:
        print(write(parser.parse_args().run))
    except data.UserError as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()
