"""The one look of all pages (report.html, the blind page of `compare`, the gallery of synth.py's `analyse`).

    page.page("My run", page.section("Answers", "On held-out pairs.", page.table(head, rows)))

A page is one HTML file that needs nothing else, bright or dark, wide or narrow. Text is escaped, images are
re-encoded, and its policy lets it load nothing and run no script but the one it is given.
"""
if __name__ == "__main__":
    exit("A part of eval_hallu.py; run: python eval_hallu.py --help")

import base64
import hashlib
import re
from html import escape

import data
from model import ask

CSS = """
:root{color-scheme:light dark;--bg:#fbfaf7;--card:#fff;--ink:#22252a;--soft:#62666e;--line:#e2ded5;
--c0:#1f6cb0;--c1:#b4541a;--c2:#3b7d4f;--c3:#8a4fa3;--c4:#6b6b6b;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--bg:#16181b;--card:#1d2024;--ink:#e4e2dd;--soft:#a3a6ac;
--line:#363a41;--c0:#74b2ee;--c1:#eda06a;--c2:#86c99a;--c3:#c795db;--c4:#a8a8a8;--bad:#ff8b80}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);overflow-wrap:anywhere;
font:16px/1.55 Charter,"Iowan Old Style",Georgia,serif}p{max-width:72ch;margin:.3em 0 .9em}
main{max-width:1120px;margin:auto;padding:28px clamp(14px,3vw,36px) 60px}h1{font-size:1.7rem;line-height:1.2}
h2{font-size:1.22rem;margin:2.4em 0 .3em}h3{font-size:1rem;margin:0}h3::first-letter{text-transform:uppercase}
table,small,.key,dl,text{font-family:system-ui,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
small,.key,.soft,th,dt{color:var(--soft)}text{fill:var(--soft);font-size:11px}small,.key{font-size:.8rem}
table{border-collapse:collapse;width:100%;max-width:760px;font-size:.92rem}th{font-weight:500}
th,td{text-align:right;padding:.4em 0 .4em .7em;border-bottom:1px solid var(--line);vertical-align:top}
td:first-child{text-align:left;padding-left:0}td small,.key span{display:block}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px;margin:0;min-width:0}
.grid{display:grid;gap:18px;grid-template-columns:repeat(auto-fill,minmax(min(100%,var(--w,310px)),1fr))}
.row{display:flex;gap:16px;flex-wrap:wrap}.row figure{margin:0;width:112px}.row>div{flex:1 1 220px}
svg{display:block;width:100%;margin:.3em 0}path{fill:none;stroke-width:2}.rule{stroke:var(--line)}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1);stroke-dasharray:7 3}.s2{stroke:var(--c2);stroke-dasharray:2 3}
.s3{stroke:var(--c3);stroke-dasharray:9 2 2 2}.s4{stroke:var(--c4);stroke-dasharray:1 2}
rect{stroke-width:1.5;stroke:var(--c0);fill:none}.after{fill:var(--c0)}.ends{stroke:var(--ink);stroke-width:1.4}
.grid+table{margin:14px 0 22px}
.key svg{width:26px;display:inline;margin:0 .5em 3px 0}
img{display:block;width:100%;border-radius:5px}.pixel{image-rendering:pixelated}dd{margin:0}
dl{display:grid;grid-template-columns:auto 1fr;gap:.1em .7em;margin:0 0 .7em;font-size:.88rem}
mark{background:0;color:var(--bad);font-weight:600;text-decoration:underline wavy 1.5px}.ask{grid-column:1/3}
@media print{:root{--bg:#fff}h2,h3{break-after:avoid}figure,tr,.card{break-inside:avoid}}
"""
TABLES = "td,th{overflow-wrap:normal}th:first-child{text-align:left;padding-left:0}"     # no number is broken


def num(x, form=None):
    """A number for reading, with the digits that matter unless `form` is given; "–" for None and nan."""
    if type(x) not in (int, float) or not abs(x) < 1e300:
        return "–"
    if form is None:
        form = ".3g" if abs(x) < 10 else ".1f"
        if abs(x) >= 100 or x == int(x):
            form = ",.0f"
    return f"{x:{form}}".replace("-", "−")


def page(title, body, style="", script=""):
    """A whole HTML file. style: CSS after the common one. script: the only one that the page may run."""
    policy = "default-src 'none';img-src data:;style-src 'unsafe-inline'"
    if script:
        allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f";script-src 'sha256-{allowed}'"
        script = f"<script>{script}</script>"
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy"
content="{policy}"><style>{CSS}{style}</style></head>
<body><main><h1>{escape(title)}</h1>{body}</main>{script}</body></html>
"""


def section(title, note, body):
    """A heading, a note and a body in HTML; nothing if the body is empty."""
    note = note and f'<p class="soft">{note}</p>'
    return f"<h2>{title}</h2>{note}{body}" if body else ""


def table(head, rows):
    """A table, "" without rows. A cell is a text, or (text, small print under it)."""
    titles = "".join(f"<th>{escape(str(title))}</th>" for title in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>" if body else ""


def _cell(cell):
    text, small = cell if isinstance(cell, tuple) else (cell, "")
    below = f"<small>{escape(small)}</small>" if small else ""
    return f"<td>{escape(str(text))}{below}</td>"


def picture(root, image, says=""):
    """A figure that holds the picture of a file in `root`, or says why there is none."""
    try:
        path = data.inside(root, image, "image")
        size, url = data.image_size(path), ask.image_url(path, 320)
    except data.UserError as error:
        return f"<figure><small>{escape(str(error))}</small></figure>"
    kind = "pixel" if max(size) <= ask.SMALL else ""
    img = f'<img class="{kind}" alt="{escape(says)}" src="{url}">'
    return f"<figure>{img}<small>{escape(says)}</small></figure>"


def marked(text, words):
    """Escaped text in which `words` are marked as invented."""
    parts, body = [text], ""
    if words:
        parts = re.split(rf"(?<!\w)({'|'.join(map(re.escape, words))})(?!\w)", text, flags=re.I)
    for k, part in enumerate(parts):
        invented = k % 2 == 1                                # re.split puts its matches in between
        body += f'<mark title="not in the image">{escape(part)}</mark>' if invented else escape(part)
    return body or "–"
