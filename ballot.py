"""A page on which people choose the better of two answers without knowing whose it is, and what they chose.

    python eval_hallu.py compare a.jsonl b.jsonl --out page.html --images val2014/      writes it
    python eval_hallu.py score votes votes-ann.json votes-bob.json --out preference.json

One file that works offline: 100 questions with both answers, each on a side drawn from --seed. A rater
chooses with keys or buttons and downloads the votes, which become win, tie and loss: the human evaluation of
mDPO, section 4.3 of https://arxiv.org/abs/2406.11839. The page runs the one script that it needs and forbids
everything else. Whose side is whose is in it only encoded, for `score votes`.
"""
import base64
import hashlib
import json
from collections import Counter
from itertools import combinations

import numpy as np

import benchmarks
import data
import page

TEXTS = ("answer", "response", "model_answer", "text")      # where files keep the answer, the likeliest first


def text(line):
    """The answer in a line of whatever file."""
    return next((line[key] for key in TEXTS if key in line), None)


def question(line):
    """The question in a line of whatever file, "" where it does not say."""
    return next((line[key] for key in ("question", "prompt", "query") if isinstance(line.get(key), str)), "")


# ---------------------------------------------------------------------------------------------- the page
STYLE = """
main{padding:14px clamp(14px,3vw,36px) 24px}h1{font-size:1.25rem;margin:0}main>p{max-width:none;margin:.2em 0;
font-size:.9rem}.bar{height:6px;background:var(--line);border-radius:3px;overflow:hidden;margin:.5em 0}
.bar i{display:block;height:100%;width:0;background:var(--c0)}.see{display:grid;gap:8px 20px;margin-top:10px}
#picture{width:auto;max-width:100%;max-height:32vh;margin:auto}.two{display:grid;gap:14px;align-items:start;
grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr))}.two p,.ask{white-space:pre-wrap}
.ask{font-weight:600;margin-top:0}.two p{margin:.3em 0}
@media(min-width:900px){.see.with{grid-template-columns:minmax(0,36%) 1fr;align-items:start}
#picture{max-height:64vh;margin:0}}
nav{position:sticky;bottom:0;background:var(--bg);padding:10px 0;display:grid;gap:8px;margin-top:14px;
grid-template-columns:1fr auto 1fr;border-top:1px solid var(--line)}
button,input{font:inherit;color:inherit;background:var(--card);border:1px solid var(--soft);
border-radius:8px;padding:.45em .8em;min-height:44px}button{cursor:pointer}
button kbd{font-size:.75rem;color:var(--soft);display:block}
button[aria-pressed=true]{outline:3px solid var(--c0)}:focus-visible{outline:3px solid var(--c1)}
.tools{display:flex;gap:10px;flex-wrap:wrap;align-items:center;margin-top:12px}
input{flex:1 1 150px;min-width:0}[hidden]{display:none!important}
"""
BODY = """
<p class="soft">Look at the picture, read both answers, and choose the better one: first the one that claims
less of what is not there, then the one that tells more of what was asked. The sides change at random.</p>
<div class="bar"><i id="fill"></i></div>
<p class="soft" id="progress" role="status" aria-live="polite"></p>
<div id="item"><div class="see" id="see">
<img id="picture" alt="The picture that the question is about">
<div><p class="ask" id="question"></p><div class="two">
<section class="card" aria-labelledby="h1"><h3 id="h1">First answer</h3><p id="first"></p></section>
<section class="card" aria-labelledby="h2"><h3 id="h2">Second answer</h3><p id="second"></p></section>
</div></div></div>
<nav aria-label="Your choice">
<button data-choice="first" aria-keyshortcuts="1 ArrowLeft">First is better<kbd>1 or ←</kbd></button>
<button data-choice="tie" aria-keyshortcuts="2 ArrowDown">Tie<kbd>2 or ↓</kbd></button>
<button data-choice="second" aria-keyshortcuts="3 ArrowRight">Second is better<kbd>3 or →</kbd></button></nav>
</div>
<div class="tools"><label for="rater">Your name</label>
<input id="rater" autocomplete="name" maxlength="60"><button id="back">Back <kbd>Backspace</kbd></button>
<button id="save">Download votes <kbd>S</kbd></button>
<button id="anew">Start over <kbd>for another rater</kbd></button></div>
<noscript><p>This page needs JavaScript; it loads nothing and sends nothing.</p></noscript>
"""
SCRIPT = r"""
"use strict";
const $ = id => document.getElementById(id), page = JSON.parse($("data").textContent);
const store = "votes-" + page.page, n = page.items.length, keys = {"1": "first", ArrowLeft: "first",
  "2": "tie", ArrowDown: "tie", "3": "second", ArrowRight: "second"};
let state = {rater: "", votes: {}}, at = 0, since = Date.now();
try { state = JSON.parse(localStorage.getItem(store)) || state; } catch (e) { /* a page without a store */ }
function keep() { try { localStorage.setItem(store, JSON.stringify(state)); } catch (e) { /* as above */ } }
function show() {
  const done = Object.keys(state.votes).length, over = at >= n;
  $("fill").style.width = 100 * done / n + "%";
  $("item").hidden = over;
  $("back").disabled = at === 0;
  $("progress").textContent = over
    ? "All " + n + " are judged. Enter your name and download your votes. Thank you!"
    : "Question " + (at + 1) + " of " + n + ", " + done + " judged";
  if (over) { $("save").focus(); return; }
  const item = page.items[at];
  $("picture").hidden = !item.image;
  $("see").classList.toggle("with", item.image > 0);
  if (item.image) $("picture").src = page.images[item.image];
  for (const part of ["question", "first", "second"]) $(part).textContent = item[part];
  for (const button of document.querySelectorAll("[data-choice]"))
    button.setAttribute("aria-pressed", (state.votes[at] || {}).choice === button.dataset.choice);
  since = Date.now();
}
function choose(choice) {
  if (at >= n) return;
  state.votes[at] = {choice: choice, seconds: Math.round((Date.now() - since) / 100) / 10};
  keep(); at += 1; show(); scrollTo(0, 0);
}
function save() {
  state.rater = $("rater").value.trim();
  if (!state.rater) {
    $("progress").textContent = "Please enter your name first: votes are counted by rater.";
    $("rater").focus(); return;
  }
  keep();
  const votes = Object.entries(state.votes).map(([item, vote]) => Object.assign({item: Number(item)}, vote));
  const all = {rater: state.rater, page: page.page, key: page.key, of: n, votes: votes};
  const file = new Blob([JSON.stringify(all, null, 1)], {type: "application/json"});
  const link = document.createElement("a");
  link.href = URL.createObjectURL(file);
  link.download = "votes-" + state.rater.replace(/[^\p{L}\p{N}]+/gu, "-") + ".json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  $("progress").textContent = "Downloaded " + link.download + ": " + votes.length + " of " + n + " judged";
}
document.addEventListener("keydown", event => {
  if (event.target.tagName === "INPUT" || event.repeat) return;
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (keys[event.key]) { event.preventDefault(); choose(keys[event.key]); }
  else if (event.key === "Backspace" && at) { event.preventDefault(); at -= 1; show(); }
  else if (event.key === "s" || event.key === "S") { event.preventDefault(); save(); }
});
for (const button of document.querySelectorAll("[data-choice]"))
  button.addEventListener("click", () => choose(button.dataset.choice));
$("back").addEventListener("click", () => { if (at) { at -= 1; show(); } });
$("save").addEventListener("click", save);
$("anew").addEventListener("click", () => {
  if (!confirm("Forget these votes? Download them first.")) return;
  state = {rater: "", votes: {}}; at = 0; $("rater").value = ""; keep(); show();
});
$("rater").value = state.rater;
$("rater").addEventListener("change", () => { state.rater = $("rater").value.trim(); keep(); });
while (state.votes[at]) at += 1;
show();
"""


def a_is_first(seed, item):
    """The side of A, drawn for each item by itself: it cannot be told from its neighbours'."""
    return bool(data.hash64(seed, "side", *item) & 1)


def write(both, names, out, images=None, n=100, seed=0):
    """Write the page of n pairs drawn from `both` -> (pairs shown, pairs left out since they are equal)."""
    order = data.draw(seed, "pairs", len(both)).permutation(len(both))[:n]
    drawn = [both[i] for i in order]
    shown = [(key, a, b) for key, a, b in drawn if text(a).strip() != text(b).strip()]
    items, pictures = [], {}
    places = benchmarks.find_images(images, [a for _, a, _ in shown]) if images else [None] * len(shown)
    for (key, a, b), path in zip(shown, places, strict=True):
        if path and path not in pictures:
            pictures[path] = data.image_url(path, 640)
        first, second = (a, b) if a_is_first(seed, key) else (b, a)
        items.append({"question": question(a), "first": text(first).strip(), "second": text(second).strip(),
                      "image": list(pictures).index(path) + 1 if path else 0})
    key = {"a": names[0], "b": names[1], "seed": seed, "ids": [key for key, *_ in shown],
           "same": len(drawn) - len(shown)}
    content = {"key": base64.b64encode(json.dumps(key).encode()).decode(), "items": items,
               "images": ["", *pictures.values()]}
    content["page"] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    island = json.dumps(content).replace("<", "\\u003c")
    body = f'{BODY}<script type="application/json" id="data">{island}</script>'
    data.atomic_write(out, page.page("Which answer is better?", body, STYLE, SCRIPT))
    return len(shown), len(drawn) - len(shown)


# ---------------------------------------------------------------------------------------------- the votes
def read_votes(paths):
    """-> (what the page was, {rater: {item: "a" | "tie" | "b"}}). Raises UserError: nothing is guessed."""
    shown, key, raters = None, None, {}
    for path in paths:
        votes = benchmarks.read_json(path, dict)
        try:
            rater, this = votes["rater"], (votes["page"], votes["key"])
            key = json.loads(base64.b64decode(votes["key"], validate=True))
            ids, chosen = key["ids"], {}
            for vote in votes["votes"]:
                first = "a" if a_is_first(key["seed"], ids[vote["item"]]) else "b"
                side = {"first": first, "tie": "tie", "second": "ab".replace(first, "")}[vote["choice"]]
                if vote["item"] in chosen or vote["item"] < 0:
                    raise ValueError
                chosen[vote["item"]] = side
            key["a"], key["b"], key["same"] + 0
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise data.UserError(f"{path} is no file of votes as the page downloads it; ask its rater for it "
                                 "again") from error
        if shown not in (None, this):
            raise data.UserError(f"{path} holds votes on another page than {paths[0]}; score them apart")
        if rater in raters:
            raise data.UserError(f"{path} is a second file by {rater!r}; give one file a rater")
        shown, raters[rater] = this, chosen
    if not any(raters.values()):
        raise data.UserError(f"{paths[0]} holds no vote yet; choose on the page, then download the votes")
    return key, raters


def preference(key, raters, seed=0, resamples=1000):
    """Win, tie and loss of A against B as shares of all votes, with intervals over items, and agreement.

    Pairs with equal answers were left out of the page; they count as ties, once for every rater.
    """
    kinds = {"win": "a", "tie": "tie", "loss": "b"}
    counts = np.zeros((len(key["ids"]), 3))
    for votes in raters.values():
        for item, side in votes.items():
            counts[item, list(kinds.values()).index(side)] += 1
    judged = counts[counts.sum(1) > 0]
    judged = np.concatenate([judged, np.tile([[0, len(raters), 0]], (key["same"], 1))])         # (items, 3)
    draws = np.random.default_rng(seed).integers(len(judged), size=(resamples, len(judged)))
    resampled = judged[draws].sum(1)                                                            # (draws, 3)
    shares, spread = judged.sum(0) / judged.sum(), resampled / resampled.sum(1, keepdims=True)
    intervals = np.percentile(spread, (2.5, 97.5), axis=0).T.tolist()
    majority = Counter(int(np.sign(row[0] - row[2])) for row in judged)
    return {"a": key["a"], "b": key["b"], **dict(zip(kinds, shares.tolist(), strict=True)),
            "intervals": dict(zip(kinds, intervals, strict=True)), "n": len(judged),
            "votes": sum(map(len, raters.values())), "equal": key["same"],
            "majority": {"win": majority[1], "tie": majority[0], "loss": majority[-1],
                         "p": sign_test(majority[1], majority[-1])},
            "by_rater": {name: {kind: list(votes.values()).count(side) for kind, side in kinds.items()}
                         for name, votes in raters.items()},
            "agreement": agreement(list(raters.values()))}


def agreement(votes):
    """How far raters agree on the items that all of them judged: percent of pairs, and kappa above chance.

    Two raters: Cohen's (https://doi.org/10.1177/001316446002000104), each with habits of their own; more:
    Fleiss' (https://doi.org/10.1037/h0031619). None where it does not exist.
    """
    shared = sorted(set.intersection(*map(set, votes))) if len(votes) > 1 else []
    if not shared:
        return None
    rows = [[v[item] for v in votes] for item in shared]
    same = np.mean([x == y for row in rows for x, y in combinations(row, 2)])
    counts = [Counter(column) for column in zip(*rows, strict=True)]
    if len(votes) == 2:
        chance = sum(counts[0][k] * counts[1][k] for k in ("a", "tie", "b")) / len(rows) ** 2
    else:
        total = sum(counts, Counter())
        chance = sum((total[k] / (len(rows) * len(votes))) ** 2 for k in total)
    name = "Cohen" if len(votes) == 2 else "Fleiss"
    return {"items": len(rows), "percent": float(100 * same), "name": name,
            "kappa": float((same - chance) / (1 - chance)) if chance < 1 else None}


def table(found):
    """preference()'s result as lines of text."""
    lines = [f"A {found['a']}", f"B {found['b']}", f"{'percent of votes':18}{'':7}   95% interval"]
    for kind, says in (("win", "A is better"), ("tie", "tie"), ("loss", "B is better")):
        low, high = found["intervals"][kind]
        lines.append(f"{says:18}{100 * found[kind]:7.1f}   {100 * low:.1f} to {100 * high:.1f}")
    m, agreed = found["majority"], found["agreement"]
    lines.append(f"{found['n']} items, {found['votes']} votes, {len(found['by_rater'])} raters; by majority "
                 f"A wins {m['win']}, ties {m['tie']}, loses {m['loss']} (sign test p {m['p']:.2g})")
    if found["equal"]:
        lines.append(f"{found['equal']} of the items are pairs of equal answers: ties that nobody was shown")
    if agreed:
        kappa = "does not exist" if agreed["kappa"] is None else f"{agreed['kappa']:.2f}"
        lines.append(f"two raters agree on {agreed['percent']:.0f}% of {agreed['items']} items that all "
                     f"judged; {agreed['name']}'s kappa {kappa}")
    return "\n".join(lines)


def sign_test(better, worse):
    """The exact two-sided p of so uneven a split under a fair coin; ties do not count."""
    n, fewer, term, total = better + worse, min(better, worse), 1, 0
    for k in range(fewer + 1):                                  # term is n over k
        total, term = total + term, term * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2 ** n) if n else 1.0
