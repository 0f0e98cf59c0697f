"""A run's report: one HTML file that needs nothing else, bright or dark, wide or narrow.

    python report.py runs/NAME      writes runs/NAME/report.html, in a second; train_dpo.py does it by itself

It shows what the folder holds: the table before and after (summary.json), curves and what diagnose.py found
(log.jsonl), the reward of words with their own and another image (words.json), and the first dozen images
with both answers (before.jsonl, after.jsonl). Text is escaped, images are encoded anew, no script may run.
"""
import base64
import io
import json
import math
import os
import re
import sys
from html import escape
from itertools import accumulate
from pathlib import Path

import data
import metrics

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
CSS = """
:root{color-scheme:light dark;--bg:#fbfaf7;--card:#fff;--ink:#22252a;--soft:#62666e;--line:#e2ded5;
--c0:#1f6cb0;--c1:#b4541a;--c2:#3b7d4f;--bad:#b3261e;--pos:31,108,176;--neg:200,96,30}
@media(prefers-color-scheme:dark){:root{--bg:#16181b;--card:#1d2024;--ink:#e4e2dd;--soft:#a3a6ac;
--line:#363a41;--c0:#74b2ee;--c1:#eda06a;--c2:#86c99a;--bad:#ff8b80;--pos:70,140,210;--neg:205,105,45}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.55 Charter,"Iowan Old Style",Georgia,serif}p{max-width:72ch;margin:.3em 0 .9em}
main{max-width:1120px;margin:auto;padding:28px clamp(14px,3vw,36px) 60px}h1{font-size:1.7rem;line-height:1.2}
h2{font-size:1.22rem;margin:2.4em 0 .3em}h3{font-size:1rem;margin:0}table,small,.key,.w i,dl,text{
font-family:system-ui,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
small,.key,.soft,th,dt{color:var(--soft)}text{fill:var(--soft);font-size:11px}small,.key{font-size:.8rem}
table{border-collapse:collapse;width:100%;max-width:760px;font-size:.92rem}th{font-weight:500}
th,td{text-align:right;padding:.4em 0 .4em .7em;border-bottom:1px solid var(--line);vertical-align:top}
td:first-child{text-align:left;padding-left:0}td small,.key span{display:block}.clear{font-weight:700}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px;margin:0;min-width:0}
.grid{display:grid;gap:18px;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--w,310px)),1fr))}
.row{display:flex;gap:16px;flex-wrap:wrap}.row figure{margin:0;width:112px}.row>div{flex:1 1 220px}
svg{display:block;width:100%;margin:.3em 0}path{fill:none;stroke-width:2}.rule{stroke:var(--line)}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1);stroke-dasharray:7 3}.s2{stroke:var(--c2);stroke-dasharray:2 3}
rect{stroke-width:1.5;stroke:var(--c0);fill:none}.after{fill:var(--c0)}.ends{stroke:var(--ink);stroke-width:1.4}
.grid+table{margin:14px 0 22px}
.raw{stroke-width:1;opacity:.3;stroke-dasharray:none}.key svg{width:26px;display:inline;margin:0 .5em 3px 0}
img{display:block;width:100%;border-radius:5px}.pixel{image-rendering:pixelated}dd{margin:0}
dl{display:grid;grid-template-columns:auto 1fr;gap:.1em .7em;margin:0 0 .7em;font-size:.88rem}
.w{display:inline-block;min-width:46px;margin:0 5px 9px 0;text-align:center;font-size:.92rem}.w i{
display:block;font-style:normal;font-size:.74rem;padding:2px 4px;border-radius:3px;margin-top:2px}
mark{background:0;color:var(--bad);font-weight:600;text-decoration:underline wavy 1.5px}.ask{grid-column:1/3}
"""


def num(x, form=None):
    """A number for reading, with the digits that matter unless told otherwise; "–" for what is none."""
    if isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x):
        return "–"
    short = ",.0f" if abs(x) >= 100 or x == int(x) else ".1f" if abs(x) >= 10 else ".3g"
    return f"{x:{form or short}}".replace("-", "−")


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
        body += f"<text {place}>{num(value)}</text>"
    for k, (label, points) in enumerate(series.items()):
        if points:
            n, total = len(points), [0, *accumulate(y for _, y in points)]
            ends = [(max(0, i - n // 40), min(n, i + n // 40 + 1)) for i in range(n)]
            means = [(p[0], (total[j] - total[i]) / (j - i)) for p, (i, j) in zip(points, ends, strict=True)]
            body += path(points, f"s{k} raw") + path(means, f"s{k}")
            keys += (f'<span><svg viewBox="0 0 26 4"><path class="s{k}" d="M0 2H26"/></svg>{label} '
                     f'{num(means[0][1])} → {num(means[-1][1])}</span>')
    return (f'<figure class="card"><h3>{title}</h3><svg viewBox="-54 0 348 152" role="img" aria-label='
            f'"{title}">{body}</svg><div class="key">{keys}{says}</div></figure>')


def curves(steps):
    figures = ""
    for title, says, keys in CURVES:
        series = {v: [(s["step"], s[k]) for s in steps if num(s.get(k)) != "–"] for k, v in keys.items()}
        figures += figure(title, says, series) if any(series.values()) else ""
    note = "Faint: each step on its own batch. Strong: a running mean, whose ends stand below it."
    return section("Training", note, figures and f'<div class="grid">{figures}</div>')


def rows(summary):
    """[(measure, before, after, change)], each a (value, interval or None), for what both sides have."""
    def flat(part):
        side = summary.get(part) or {}
        out = {k: (v, side.get("intervals", {}).get(k)) for k, v in side.items() if num(v) != "–"}
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
        note = (f"Percent, on {num(images)} images apart from the pairs, with 95% intervals. "
                "The change is paired by image, and bold where its interval leaves out 0.")
    for measure, *cells in rows(summary):
        body += f"<tr><td>{escape(measure)}</td>"
        for (value, interval), form in zip(cells, ("z", "z", "+z"), strict=True):
            form += ".1f" if images else ".4g"
            clear = form[0] == "+" and interval and (interval[0] > 0 or interval[1] < 0)
            body += (f'<td class="{"clear" if clear else ""}">{num(value, form)}'
                     f'<small>{" to ".join(num(x, form) for x in interval or ())}</small></td>')
        body += "</tr>"
    head = "<table><tr><th></th><th>before</th><th>after</th><th>change</th></tr>"
    return section("Before and after", note, body and f"{head}{body}</table>")


def picture(root, image, says=""):
    """A figure that holds its picture: decoded, made small, encoded anew. Nothing outside `root` is read."""
    root, path = os.path.realpath(root), os.path.realpath(os.path.join(root, image))
    try:
        if os.path.commonpath([root, path]) != root:
            raise data.UserError(f"image {image} leaves its folder")
        pixels = data.read_image(path)
    except data.UserError as error:
        return f"<figure><small>{escape(str(error))}</small></figure>"
    small, buffer = max(pixels.size) <= 160, io.BytesIO()                # then its pixels are shown
    pixels.thumbnail((320, 320))
    pixels.save(buffer, kind := "png" if small else "jpeg")
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    img = f'<img class="{"pixel" * small}" alt="{escape(says)}" src="{source}">'
    return f"<figure>{img}<small>{escape(says)}</small></figure>"


def marked(text, truth):
    """Escaped text in which the words that the image denies stand out."""
    words = "|".join(map(re.escape, metrics.hallucinated(text, truth)))
    parts = re.split(rf"(?<!\w)({words})(?!\w)", text, flags=re.I) if words else [text]
    return "".join(f'<mark title="not in the image">{escape(part)}</mark>' if k % 2 else escape(part)
                   for k, part in enumerate(parts)) or "–"


def answers(run, images=12):
    """The first images, each with the answers to its first three questions before and after."""
    (first, *before), (_, *after) = (data.read_jsonl(run / f"{name}.jsonl") for name in ("before", "after"))
    root, shown, body = (run / first["settings"]["scenes"]).parent, {}, ""
    for old, new in zip(before, after, strict=False):
        if new["image"] in shown or len(shown) < images:
            shown.setdefault(new["image"], []).append((old, new))
    for image, pairs in shown.items():
        there = ", ".join(pairs[0][1]["truth"].get("present", ()))
        body += f'<div class="card row">{picture(root, image, there)}<div>'
        for old, new in pairs[:3]:
            body += (f'<dl><dt class="ask">{escape(new["question"])}</dt><dt>before</dt><dd>'
                     f'{marked(old["answer"], new["truth"])}</dd><dt>after</dt><dd>'
                     f'{marked(new["answer"], new["truth"])}</dd></dl>')
        body += "</div></div>"
    note = ("The first images examined, in their order: nothing is picked. Below each, what is in it. "
            "<mark>Underlined in red</mark>: words that the image denies.")
    return section("Answers", note, f'<div class="grid" style="--w:440px">{body}</div>')


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
                 f'<text x="322" y="{y + 9}" text-anchor="end">{num(values[0], "+z.2f")}</text>')
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
            mean, *ends = (num(x, "z.2f") for x in look[key])
            body += f"<td>{mean}<small>{' to '.join(ends)}</small></td>"
        body += "</tr>"
    head = "".join(f"<th>{side}</th>" for side in sides)
    note = (f"{num(found[0]['n'])} held-out pairs with their own and other images, and 95% intervals. "
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
            words += f'<div class="w">{marked(w["word"], e["truth"])}'
            for k in ("true", "other"):
                shade = f"rgba(var(--{'pos' if w[k] > 0 else 'neg'}),{.6 * abs(w[k]) / most:.2f})"
                words += f'<i style="background:{shade}" title="{k}: {w[k]:+.4f}">{num(w[k], form)}</i>'
            words += "</div>"
        for image, k in (("image", "true"), ("other_image", "other")):
            total = num(sum(w[k] for w in e["words"]), form)
            pictures += picture(run, e[image], f"{k}: {total}") if image in e else ""
        body += f'<div class="card row">{pictures}<div>{words}</div></div>'
    note = ("The reward β (log p − the reference’s) of each word of an answer after training, with its own "
            "and with another image. Blue: training made the word likelier; orange: less likely. Where the "
            "rows differ, the model looks; where they agree, it learned words. Below the images: the sums.")
    words = body and f'<p class="soft">{note}</p><div class="grid" style="--w:100%">{body}</div>'
    return section("Does the model look?", "", held_out(lines) + words)


def section(title, note, body):
    note = note and f'<p class="soft">{note}</p>'
    return f"<h2>{title}</h2>{note}{body}" if body else ""


def page(title, body):
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="default-src 'none';img-src data:;style-src 'unsafe-inline'"><style>{CSS}</style></head>
<body><main><h1>{escape(title)}</h1>{body}</main></body></html>
"""


def write(run_folder):
    """Write run_folder/report.html in one move; returns its path. Raises UserError where no run is."""
    run = Path(run_folder)
    first, *steps = list(data.read_jsonl(run / "log.jsonl", torn_ok=True)) or [{}]
    summary = json.loads((run / "summary.json").read_text()) if (run / "summary.json").exists() else {}
    done = {"options": {}, **first, **(steps[-1] if steps else {}), **summary}
    said = [f"{(o := done['options']).get('loss', 'a loss')} on {num(done.get('pairs'))} pairs",
            f"{num(summary.get('steps', done.get('step')))} steps in {num(done.get('seconds'))} seconds",
            *(f"{k} {o[k]}" for k in ("beta", "image_rejected", "model", "lora_r", "lr", "seed") if k in o),
            f"commit {first.get('commit', '–')}", *([] if summary else ["not finished"])]
    body = curves(steps) + looks(run, [first, *steps]) + (answers(run) if "difference" in summary else "")
    body = f"<p>{escape(', '.join(said))}.</p>{before_and_after(summary)}{body}"
    data.atomic_write(run / "report.html", page(run.resolve().name, body))
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
