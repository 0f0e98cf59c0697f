"""A page for people to choose the better of two answers on, blindly, and the count of their votes.

    python eval_hallu.py compare a.jsonl b.jsonl --out page.html
    python eval_hallu.py score votes votes-ann.json ... --out preference.json
            start it; its options are theirs

The page works offline: 100 questions with both answers, each on a side drawn
from --seed. A rater chooses with keys or buttons and downloads the votes, which
become win, tie and loss: the human evaluation of mDPO, section 4.3 of
https://arxiv.org/abs/2406.11839. The page runs the one script that it needs and
forbids everything else. Whose side is whose is in it only encoded, for the
count.
"""
import base64
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))          # the repository
import data  # noqa: E402
import eval_hallu  # noqa: E402
from data import UserError  # noqa: E402
from evaluation import benchmarks, compare, page, stats  # noqa: E402
from model import ask  # noqa: E402
from model.command import explained, fits  # noqa: E402

MOST_EQUAL = 100_000        # pairs of equal answers that a page may have left out

STYLE = """
main{padding:14px clamp(14px,3vw,36px) 24px}h1{font-size:1.25rem;margin:0}main>p{max-width:none;margin:.2em 0;
font-size:.9rem}.bar{height:6px;background:var(--line);border-radius:3px;overflow:hidden;margin:.5em 0}
.bar i{display:block;height:100%;width:0;background:var(--c0)}.see{display:grid;gap:8px 20px;margin-top:10px}
#picture{width:auto;max-width:100%;max-height:max(320px,32vh);margin:auto}
#picture.pixel{width:min(100%,max(320px,32vh));max-height:none}.two{display:grid;gap:14px;align-items:start;
grid-template-columns:repeat(auto-fit,minmax(min(100%,290px),1fr))}.two p,.ask{white-space:pre-wrap}
.ask{font-weight:600;margin-top:0}.two p{margin:.3em 0}
@media(min-width:900px){.see.with{grid-template-columns:minmax(0,36%) 1fr;align-items:start}
#picture{max-height:64vh;margin:0}#picture.pixel{width:min(100%,64vh)}}
nav{position:sticky;bottom:0;background:var(--bg);padding:10px 0;display:grid;gap:8px;margin-top:14px;
grid-template-columns:1fr auto 1fr;border-top:1px solid var(--line)}
button,input{font:inherit;color:inherit;background:var(--card);border:1px solid var(--soft);
border-radius:8px;padding:.45em .8em;min-height:44px}button{cursor:pointer}
button kbd{font-size:.75rem;color:var(--soft);display:block}
button[aria-pressed=true]{outline:3px solid var(--c0)}:focus-visible{outline:3px solid var(--c1)}
.tools{display:flex;gap:10px;flex-wrap:wrap;align-items:center;margin-top:12px}
input{flex:1 1 150px;min-width:0}[hidden]{display:none!important}
@media print{nav{position:static}}
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
  $("see").classList.toggle("with", Boolean(item.image));
  if (item.image) $("picture").src = item.image;
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
$("picture").onload = e => e.target.classList.toggle("pixel", e.target.naturalHeight <= 160);
$("rater").value = state.rater;
$("rater").addEventListener("change", () => { state.rater = $("rater").value.trim(); keep(); });
while (state.votes[at]) at += 1;
show();
"""


def a_is_first(seed, item):
    """The side of A, drawn for each item by itself: its neighbours do not give it away."""
    return bool(data.hash64(seed, "side", *item) & 1)


def write(o):
    """Write the page of o.n pairs, drawn from what both files answer; returns a line about it."""
    both = compare.pairs(compare.by_id(o.a), compare.by_id(o.b))
    order = data.draw(o.seed, "pairs", len(both)).permutation(len(both))[:o.n]
    drawn = [both[i] for i in order]
    shown = [(key, a, b) for key, a, b in drawn if a.text != b.text]
    paths = [None] * len(shown)
    if o.images:
        paths = benchmarks.find_images(o.images, [a.line for _, a, _ in shown], o.follow_links)
    items = []
    for (key, a, b), path in zip(shown, paths, strict=True):
        first, second = (a, b) if a_is_first(o.seed, key) else (b, a)
        items.append({"question": a.question,
                      "first": first.text,
                      "second": second.text,
                      "image": path and ask.image_url(path, 640)})
    equal = len(drawn) - len(shown)
    key = {"a": str(o.a), "b": str(o.b), "seed": o.seed, "ids": [key for key, *_ in shown], "same": equal}
    content = {"key": base64.b64encode(json.dumps(key).encode()).decode(), "items": items}
    content["page"] = ask.hashed(content)
    island = json.dumps(content).replace("<", "\\u003c")
    body = f'{BODY}<script type="application/json" id="data">{island}</script>'
    data.atomic_write(o.out, page.page("Which answer is better?", body, STYLE, SCRIPT))
    without = "" if o.images else "; without pictures, as there is no --images"
    return f"{o.out}: {len(shown)} pairs to choose from, {equal} equal pairs left out{without}"


# ---- the votes ----
def read_votes(paths):
    """-> (what the page was, {rater: {item: "win", "tie" or "loss" of A}}). Raises UserError."""
    shown, raters = set(), {}
    for path in paths:
        votes = data.read_json(path)
        with explained(f"{path} is not a file of votes as the page downloads it", "ask its rater again"):
            rater, key = str(votes["rater"]), json.loads(base64.b64decode(votes["key"], validate=True))
            about = {"a": key["a"], "b": key["b"], "rater": rater}    # any of them may be absent
            if not (fits(about, {str: str}) and fits(key["same"], int) and 0 <= key["same"] <= MOST_EQUAL):
                raise ValueError
            shown.add((votes["page"], votes["key"]))
            found = _chosen(votes["votes"], key)
        if len(shown) > 1:
            raise UserError(f"{path} holds votes on another page than {paths[0]}; score them apart")
        if rater in raters:
            raise UserError(f"{path} is a second file by {rater!r}; give one file a rater")
        raters[rater] = found
    if not any(raters.values()):
        raise UserError(f"{paths[0]} holds no vote yet; choose on the page, then download the votes")
    return key, raters


def _chosen(votes, key):
    """{item: win, tie or loss of A}; any error if the votes are not the page's."""
    found = {}
    for vote in votes:
        item = vote["item"]
        first, second = ("win", "loss") if a_is_first(key["seed"], key["ids"][item]) else ("loss", "win")
        if item in found or item < 0:
            raise ValueError
        found[item] = {"first": first, "tie": "tie", "second": second}[vote["choice"]]
    return found


def preference(key, raters):
    """Win, tie and loss of A against B as shares of all votes, with intervals over items.

    Pairs with equal answers were left out of the page; they count as ties, once for every rater.
    """
    items = []
    for found in raters.values():
        unseen = {f"equal {n}": "tie" for n in range(key["same"])}
        for place, vote in (found | unseen).items():
            sums = {kind: (int(kind == vote), 1) for kind in ("win", "tie", "loss")}
            items.append({"image": place, "sums": sums})
    return {"a": key["a"],
            "b": key["b"],
            **stats.scored(*stats.tally(items)),
            "n": len({item["image"] for item in items}),
            "votes": sum(map(len, raters.values())),
            "raters": len(raters),
            "equal": key["same"]}


def count(o):
    """Write preference.json; yields lines about it."""
    found = preference(*read_votes(o.votes))
    data.atomic_write(o.out, json.dumps(found, indent=1) + "\n")
    yield from (f"A {found['a']}", f"B {found['b']}", *eval_hallu.table("votes", found))
    yield f"{found['n']} items, {found['votes']} votes, {found['raters']} raters"
    yield f"{found['equal']} of the items are pairs of equal answers: ties that nobody was shown"


def main():
    o = eval_hallu.parse()
    try:
        print(*(count(o) if o.step == "score" else [write(o)]), sep="\n")
    except (UserError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
