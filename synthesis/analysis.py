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
    scales = sorted({image["guidance"] for row in ranked for image in row["candidates"]})
    topics, shares = {"all": ranked} | pairing.grouped(ranked, "topic"), {}
    for topic, rows in topics.items():
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
    names, n = first["scores"], len(ranked)
    twos, threes = itertools.combinations(names, 2), itertools.combinations(names, 3)
    for rankers in (*twos, *threes):
        for k in range(1, len(first["candidates"])):
            common = 0.
            for row in ranked:
                tops = [top(row["scores"][name], k) for name in rankers]
                common += len(set.intersection(*tops)) / k
            chance = (k / len(first["candidates"])) ** (len(rankers) - 1)
            found.append({"rankers": rankers,
                          "k": k,
                          "agree": common / n,
                          "chance": chance,
                          "n": n})
    return found


def duel(row, seed):
    """{ranker: the place of its pick} of the first two rankers, in random order."""
    picks = {}
    names = list(row["scores"])[:2]
    if data.draw(seed, "judge", row["id"]).integers(2) == 0:
        names.reverse()
    for name in names:
        picks[name], = top(row["scores"][name], 1)
    return picks


def judged(run, ranked):
    """Table 5's counts, or None without --judge or with one ranker."""
    o, asked, meant = run.o, [], {}
    names = list(ranked[0]["scores"])[:2]
    count = {"wins": 0, "losses": 0, "ties": 0, "unread": 0}
    if not o.judge or len(names) < 2:
        return None
    for row in ranked:
        id, picks = row["id"], duel(row, o.seed)
        shown = [row["candidates"][place] for place in picks.values()]
        files = [run.out / image["image"] for image in shown]
        if len(set(files)) == 2:
            text = ASK_JUDGE.format(prompt=row["prompt"])
            asked.append(ask.Question(id, text, files))
            meant[id] = {"a": "losses", "b": "wins", "tie": "ties"}
            if list(picks) == names:
                meant[id] |= {"a": "wins", "b": "losses"}
    replies = run.out / "parts" / "judge.jsonl"
    said = ask.replies(o.judge, asked, replies, model=o.model_name or None, max_tokens=16,
                        description="judge")
    for id, text in said.items():
        vote = re.match(r"\W*(?:answer\W+)?(a|b|tie)\b", text, re.I)
        outcome = meant[id][vote[1].lower()] if vote else "unread"
        count[outcome] += 1
    wins, decided = count["wins"], count["wins"] + count["losses"]
    return {"rankers": names,
            **count,
            "not_answered": len(asked) - len(said),
            "same_pick": len(ranked) - len(asked),
            "win_rate": wins / decided if decided else None,
            "interval": wilson(wins, decided)}


def wilson(k, n, z=1.96):
    """95% interval of a share k of n; of none (0, 1)."""
    middle, total = k + z * z / 2, n + z * z
    spread = k * (n - k) / max(n, 1) + z * z / 4
    width = z * math.sqrt(spread)
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
            rarity = math.log((1 + len(texts)) / seen[word])
            row[data.hash64(word) % WORDS] += rarity
    return found


def mean_similarity(unit):
    """Each vector's mean cosine with the others: (N,); empty for a single vector."""
    n = len(unit)
    if n < 2:
        return np.zeros(0)
    own = (unit * unit).sum(1)
    return (unit @ unit.sum(0) - own) / (n - 1)


def similarity(run):
    """{"prompts", "responses": {"n", "mean", "deciles"}} of each one's mean cosine with all others, of a
    response with those to the same question."""
    prompts = [row["prompt"] for row in run.rows("prompts")]
    groups, found = {"prompts": [prompts], "responses": []}, {}
    for rows in pairing.grouped(run.rows("responses"), "id").values():
        groups["responses"].append([row["response"] for row in rows])
    for name, some in groups.items():
        texts, cosines = sum(some, []), []
        unit = vectors(texts, run.o.encoder, run.ranks.device)
        for texts in some:
            cosines += mean_similarity(unit[:len(texts)]).tolist()
            unit = unit[len(texts):]
        if cosines:
            deciles = np.quantile(cosines, np.arange(1, 10) / 10).tolist()
            mean = float(np.mean(cosines))
            found[name] = {"n": len(cosines), "mean": mean, "deciles": deciles}
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
        chosen, rejected = pair["meta"]["models"]
        roles = {chosen: "chosen", rejected: "rejected"}
    for scored in here["scores"]:
        notes[scored["model"]] += f", {page.num(scored['score'])}"
    for fault in here["faults"]:
        notes[fault["model"]] += f", {', '.join(fault['faults'])}"
    for said in here["responses"]:
        model = said["model"]
        role = roles.get(model, "neither")
        lines.append([(said["response"] or "–", model + notes[model]), role])
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
        for row in rows[:1]:
            cells = [map(shown, each.values()) for each in rows]
            body += page.section(name.capitalize(), note, page.table(row, cells))
    return body


def shown(value):
    """A number, a text, or a list of them, in a table."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    return page.num(value)


def analyse(run):
    """Writes analysis.json and gallery.html into the run's folder."""
    ranked = run.rows("ranked", "rank")
    found = {"guidance": guidance(ranked),
             "agreement": agreement(ranked),
             "judge": judged(run, ranked),
             "similarity": similarity(run)}
    text = json.dumps(found, indent=1)
    data.atomic_write(run.out / "analysis.json", text + "\n")
    data.atomic_write(run.out / "gallery.html", whole_page(run, ranked, found))
    run.say("analyse", prompts=len(ranked), page=str(run.out / "gallery.html"))


def whole_page(run, ranked, analysis):
    made = {name: run.rows(name) for name in SHOWN}
    made["scores"] = run.rows(f"scores-{run.o.scorer}")
    reasons = Counter(row["reason"] for row in made["dropped"])
    for row in made["faults"]:
        reasons.update(row["faults"])
    apart = max(1, len(ranked) // max(1, run.o.gallery))
    shown = ranked[::apart][:run.o.gallery]
    cards = "".join(entry(run, row, made) for row in shown)
    body = page.section("What was left out", f"{len(ranked)} prompts, {len(made['pairs'])} pairs.",
                        page.table(("reason", "n"), reasons.items()))
    body += tables(analysis)
    body += page.section("Prompts", "Evenly spaced through the run: none was picked.",
                         f'<div class="grid" style="--w:560px">{cards}</div>')
    return page.page(f"Synthesis: {run.out.name}", body, page.TABLES)
