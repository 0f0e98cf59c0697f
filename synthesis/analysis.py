"""The paper's analyses (arXiv 2412.17417) of a synthesis run's files, and a page of examples.

    python synth.py analyse --out D         analysis.json and gallery.html

    guidance     Fig. 4: share of the prompts whose best image has each guidance scale, by topic
    agreement    Table 4: two (three) rankers' top k of the candidates, mean share in common, beside chance
    judge        Table 5: how often --judge prefers the first ranker's pick to the second's; the two in random
                 order, ties apart, prompts where both picked the same image apart
    similarity   Fig. 6: each prompt's mean similarity to the other prompts, each response's to the others
                 that answer the same question; cosines of --encoder, else of weighted word counts
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of synth.py; run: python synth.py --help"))

import itertools
import json
import math
import re
from collections import Counter, defaultdict
from html import escape

import numpy as np

import data
from evaluation import page
from model import ask
from synthesis import pairing

ASK_JUDGE = ("Two pictures were made from this description:\n{prompt}\nWhich shows it better: the first (A) "
             "or the second (B)? Reply with A, B or tie.")
WORDS = 4096                            # places of a vector of word counts


# ---- numbers ----
def guidance(ranked):
    """{topic: {scale: share}}, `all` first."""
    shares, scales = {}, sorted({image["guidance"] for row in ranked for image in row["candidates"]})
    for topic, rows in ({"all": ranked} | pairing.grouped(ranked, "topic")).items():
        picked = [row["guidance"] for row in rows]
        shares[topic] = {scale: picked.count(scale) / len(rows) for scale in scales}
    return shares


def top(scores, k):
    """The k best places; of equal scores the earlier."""
    places = sorted(range(len(scores)), key=lambda place: -scores[place])
    return set(places[:k])


def agreement(ranked):
    """[{"rankers", "k", "agree", "chance", "n"}] of every two, and every three, rankers. All prompts have as
    many candidates, which all rankers scored."""
    found, (first, *_) = [], ranked
    names, n, size = first["scores"], len(ranked), len(first["candidates"])
    for rankers in (*itertools.combinations(names, 2), *itertools.combinations(names, 3)):
        for k in range(1, size):
            common = 0.
            for row in ranked:
                tops = [top(row["scores"][name], k) for name in rankers]
                common += len(set.intersection(*tops)) / k
            chance = (k / size) ** (len(rankers) - 1)
            found.append({"rankers": rankers, "k": k, "agree": common / n, "chance": chance, "n": n})
    return found


def duel(row, seed):
    """{ranker: the place of its pick} of the first two rankers, in random order."""
    names, picks = list(row["scores"])[:2], {}
    if data.draw(seed, "judge", row["id"]).integers(2) == 0:
        names.reverse()
    for name in names:
        picks[name], = top(row["scores"][name], 1)
    return picks


def judged(run, ranked):
    """Table 5's counts, or None without --judge or with one ranker."""
    o, asked, meant = run.o, [], {}
    names, count = list(ranked[0]["scores"])[:2], dict.fromkeys(("wins", "losses", "ties", "unread"), 0)
    if not o.judge or len(names) < 2:
        return None
    for row in ranked:
        id, picks = row["id"], duel(row, o.seed)
        files = [run.out / row["candidates"][place]["image"] for place in picks.values()]
        if len(set(files)) == 2:
            asked.append(ask.Question(id, ASK_JUDGE.format(prompt=row["prompt"]), files))
            first, second = ("wins", "losses") if [*picks] == names else ("losses", "wins")
            meant[id] = {"a": first, "b": second, "tie": "ties"}
    said = ask.replies(o.judge, asked, run.out / "parts" / "judge.jsonl", model=o.model_name or None,
                        max_tokens=16, description="judge")
    for id, text in said.items():
        vote = re.match(r"\W*(?:answer\W+)?(a|b|tie)\b", text, re.I)
        count[meant[id][vote[1].lower()] if vote else "unread"] += 1
    wins, decided = count["wins"], count["wins"] + count["losses"]
    return {"rankers": names, **count,
            "not_answered": len(asked) - len(said),
            "same_pick": len(ranked) - len(asked),
            "win_rate": wins / decided if decided else None,
            "interval": wilson(wins, decided)}


def wilson(k, n, z=1.96):
    """95% interval of a share k of n; of none (0, 1)."""
    middle, total = k + z * z / 2, n + z * z
    width = z * math.sqrt(k * (n - k) / max(n, 1) + z * z / 4)
    return [(middle - width) / total, (middle + width) / total]


def vectors(texts, encoder="", device="cpu"):
    """Unit vectors (N, D): a sentence encoder's mean over tokens, or word counts weighted by rarity."""
    found = encoded(texts, encoder, device) if encoder and texts else counted(texts)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.maximum(length, 1e-9)


def encoded(texts, encoder, device):
    import torch
    from transformers import AutoModel, AutoTokenizer
    fix, means = "give a sentence encoder's folder", []
    tokenizer = data.from_folder(AutoTokenizer, encoder, "tokenizer", fix)
    model = data.from_folder(AutoModel, encoder, "model", fix).to(device)
    for text in texts:
        x = tokenizer(text, truncation=True, return_tensors="pt").to(device)
        with torch.no_grad():
            means.append(model(**x).last_hidden_state[0].mean(0))
    return torch.stack(means).float().cpu().numpy()


def counted(texts):
    words = [re.findall(r"\w+", text.lower()) for text in texts]
    seen = Counter(word for own in words for word in set(own))
    found = np.zeros((len(texts), WORDS), np.float32)
    for row, own in zip(found, words, strict=True):
        for word in own:
            row[data.hash64(word) % WORDS] += math.log((1 + len(texts)) / seen[word])
    return found


def mean_similarity(unit):
    """Each vector's mean cosine with the others: (N,); empty for a single vector."""
    own, n = (unit * unit).sum(1), len(unit)
    return (unit @ unit.sum(0) - own) / (n - 1) if n > 1 else np.zeros(0)


def similarity(run):
    """{"prompts", "responses": {"n", "mean", "deciles"}} of each one's mean cosine with all others, of a
    response with those to the same question."""
    groups, found = {"prompts": [[row["prompt"] for row in run.rows("prompts")]], "responses": []}, {}
    for rows in pairing.grouped(run.rows("responses"), "id").values():
        groups["responses"].append([row["response"] for row in rows])
    for name, some in groups.items():
        unit = vectors(sum(some, []), run.o.encoder, run.ranks.device)
        cosines = []
        for texts in some:
            cosines += mean_similarity(unit[:len(texts)]).tolist()
            unit = unit[len(texts):]
        if cosines:
            deciles = np.quantile(cosines, np.arange(1, 10) / 10).tolist()
            found[name] = {"n": len(cosines), "mean": float(np.mean(cosines)), "deciles": deciles}
    return found


# ---- the page ----
SHOWN = ("instructions", "responses", "scores", "faults", "pairs", "dropped")
NOTES = {"guidance": "Share of the prompts whose best image has this scale.",
         "agreement": "Share in common of the rankers' top k.",
         "judge": "How often the first ranker's pick is preferred; the rate is of the decided.",
         "similarity": "Cosines with the others."}


def candidates(run, row):
    """The candidates with their scores; under each the rankers that picked it."""
    body = ""
    for place, image in enumerate(row["candidates"]):
        says = f"guidance {image['guidance']:g}"
        for name, scores in row["scores"].items():
            says += f", {name} {scores[place]:.2f}"
            if place in top(scores, 1):
                says += f" ← picked by {name}"
        body += page.picture(run.out, image["image"], says)
    return f'<div class="row">{body}</div>'


def entry(run, row, made):
    """One prompt's card. made: {name of SHOWN: its rows}."""
    here, roles, notes, question = {}, {}, defaultdict(str), ""
    for name, rows in made.items():
        here[name] = [line for line in rows if line["id"] == row["id"]]
    lines = [[gone["reason"], "dropped"] for gone in here["dropped"]]
    for asked in here["instructions"]:
        question = asked["question"]
    for pair in here["pairs"]:
        roles = dict(zip(pair["meta"]["models"], ("chosen", "rejected"), strict=True))
    for scored in here["scores"]:
        notes[scored["model"]] += f", {page.num(scored['score'])}"
    for fault in here["faults"]:
        notes[fault["model"]] += f", {', '.join(fault['faults'])}"
    for said in here["responses"]:
        model = said["model"]
        lines.append([(said["response"] or "–", model + notes[model]), roles.get(model, "neither")])
    body = candidates(run, row) + page.table((question, ""), lines)
    return f'<div class="card"><h3>{escape(row["prompt"])}</h3>{body}</div>'


def tables(analysis):
    """The analyses as sections of the page, a table each."""
    body = ""
    for name, note in NOTES.items():
        rows = analysis[name]
        if name == "judge":
            rows = [rows] if rows else []
        elif name != "agreement":
            rows = [{"of": key} | row for key, row in rows.items()]
        cells = [map(shown, row.values()) for row in rows]
        body += page.section(name.capitalize(), note, page.table(rows[0] if rows else (), cells))
    return body


def shown(value):
    """A number, a text, or a list of them, in a table."""
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return value if isinstance(value, str) else page.num(value)


def analyse(run):
    """Writes analysis.json and gallery.html into the run's folder."""
    ranked = run.rows("ranked", "rank")
    found = {"guidance": guidance(ranked),
             "agreement": agreement(ranked),
             "judge": judged(run, ranked),
             "similarity": similarity(run)}
    data.atomic_write(run.out / "analysis.json", json.dumps(found, indent=1) + "\n")
    data.atomic_write(run.out / "gallery.html", whole_page(run, ranked, found))
    run.say("analyse", prompts=len(ranked), page=str(run.out / "gallery.html"))


def whole_page(run, ranked, analysis):
    made = {name: run.rows(name) for name in SHOWN}
    made["scores"] = run.rows(f"scores-{run.o.scorer}")
    reasons = Counter(row["reason"] for row in made["dropped"])
    reasons.update(fault for row in made["faults"] for fault in row["faults"])
    apart = max(1, len(ranked) // max(1, run.o.gallery))
    cards = "".join(entry(run, row, made) for row in ranked[::apart][:run.o.gallery])
    body = page.section("What was left out", f"{len(ranked)} prompts, {len(made['pairs'])} pairs.",
                        page.table(("reason", "n"), reasons.items()))
    body += tables(analysis)
    body += page.section("Prompts", "Evenly spaced through the run: none was picked.",
                         f'<div class="grid" style="--w:560px">{cards}</div>')
    return page.page(f"Synthesis: {run.out.name}", body, page.TABLES)
