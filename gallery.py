"""What a synthesis run made: the paper's analyses (arXiv 2412.17417) on its files, and a page of examples.

    python synth.py analyse --out D         analysis.json and gallery.html

    guidance     Fig. 4: share of the prompts whose best image has each guidance scale, by topic
    agreement    Table 4: two (three) rankers' top k of the candidates, mean share in common, beside chance
    judge        Table 5: how often --judge prefers the first ranker's pick to the second's; the two in random
                 order, ties apart, prompts where both picked the same image apart
    similarity   Fig. 6: each prompt's mean similarity to the other prompts, each response's to the others
                 that answer the same question; cosines of --encoder, else of weighted word counts
"""
import itertools
import json
import math
import re
from collections import Counter
from html import escape
from typing import NamedTuple

import numpy as np

import chat
import data
import page
import pairing

ASK_JUDGE = ("Two pictures were made from this description:\n{prompt}\nWhich shows it better: the first (A) "
             "or the second (B)? Reply with A, B or tie.")
WORDS = 4096                            # places of a vector of word counts


# ---- numbers ----
def guidance(ranked):
    """{topic: {scale: share}}, `all` first."""
    scales = sorted({image["guidance"] for row in ranked for image in row["candidates"]})
    shares, topics = {}, sorted({row["topic"] for row in ranked})
    for topic in ("all", *topics) if ranked else ():
        picked = [row["guidance"] for row in ranked if topic in ("all", row["topic"])]
        shares[topic] = {scale: picked.count(scale) / len(picked) for scale in scales}
    return shares


def top(scores, k):
    """The k best places; of equal scores the earlier."""
    places = sorted(range(len(scores)), key=lambda place: -scores[place])
    return set(places[:k])


def agreement(ranked):
    """[{"rankers", "k", "agree", "chance", "n"}] of every two, and every three, rankers that scored."""
    found, names = [], dict.fromkeys(name for row in ranked for name in row["scores"])
    twos, threes = itertools.combinations(names, 2), itertools.combinations(names, 3)
    for rankers in (*twos, *threes):
        scores = []
        for row in ranked:
            if row["scores"].keys() >= set(rankers):
                scores.append([row["scores"][name] for name in rankers])
        scores = [each for each in scores if len(each[0]) > 1]
        sizes = [len(first) for first, *_ in scores]
        for k in range(1, max(sizes, default=1)):
            common = 0.
            for each in scores:
                tops = [top(one, k) for one in each]
                common += len(set.intersection(*tops)) / k
            chance = sum((k / size) ** (len(rankers) - 1) for size in sizes)
            found.append({"rankers": list(rankers), "k": k, "agree": common / len(sizes),
                          "chance": chance / len(sizes), "n": len(sizes)})
    return found


class Duel(NamedTuple):
    a: int                              # the picture shown first, by its place among the candidates
    b: int
    first: str                          # the ranker that picked a
    second: str


def duel(row, seed):
    """The Duel of two rankers' picks, in random order; None where they picked the same picture."""
    picks = []
    for name, scores in list(row["scores"].items())[:2]:
        picks.append((scores.index(max(scores)), name))
    if data.draw(seed, "judge", row["id"]).integers(2) == 0:
        picks.reverse()
    (a, first), (b, second) = picks
    return Duel(a, b, first, second) if a != b else None


def judged(run, ranked):
    """Table 5's counts, or None without --judge or with one ranker."""
    o, names = run.o, []
    duels, asked, count = {}, [], Counter()
    if ranked:
        names = list(ranked[0]["scores"])[:2]
    if not o.judge or len(names) < 2:
        return None
    for row in ranked:
        if shown := duel(row, o.seed):
            files = [run.out / row["candidates"][place]["image"] for place in (shown.a, shown.b)]
            text = ASK_JUDGE.format(prompt=row["prompt"])
            asked.append(chat.Question(row["id"], text, files))
            duels[row["id"]] = {"a": shown.first, "b": shown.second, "tie": "tie"}
    replies = run.out / "parts" / "judge.jsonl"
    said = chat.replies(o.judge, asked, replies, model=o.model_name or None, max_tokens=16,
                        description="judge")
    for id, text in said.items():
        vote = re.match(r"\W*(?:answer\W+)?(a|b|tie)\b", text, re.I)
        meant = duels[id][vote[1].lower()] if vote else "unread"
        count[meant] += 1
    wins, losses = count[names[0]], count[names[1]]
    decided = wins + losses
    return {"rankers": names, "wins": wins, "losses": losses, "ties": count["tie"],
            "unread": count["unread"], "not_answered": len(asked) - len(said),
            "same_pick": len(ranked) - len(asked),
            "win_rate": wins / decided if decided else None, "interval": wilson(wins, decided)}


def wilson(k, n, z=1.96):
    """95% interval of a share k of n."""
    if not n:
        return [0., 1.]
    centre = (k + z * z / 2) / (n + z * z)
    spread = math.sqrt(k * (n - k) / n + z * z / 4)
    width = z * spread / (n + z * z)
    return [centre - width, centre + width]


def vectors(texts, encoder="", device="cpu"):
    """Unit vectors (N, D): a sentence encoder's mean over tokens, or word counts weighted by rarity."""
    found = encoded(texts, encoder, device) if encoder else counted(texts)
    length = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.maximum(length, 1e-9)


def encoded(texts, encoder, device):
    import torch
    from transformers import AutoModel, AutoTokenizer
    tokenizer = data.from_folder(AutoTokenizer, encoder, "tokenizer", "give a sentence encoder's folder")
    model = data.from_folder(AutoModel, encoder, "model", "give a sentence encoder's folder").to(device)
    means = []
    for at in range(0, len(texts), 64):
        x = tokenizer(texts[at:at + 64], padding=True, truncation=True, return_tensors="pt").to(device)
        with torch.no_grad():
            hidden = model(**x).last_hidden_state                                                 # (B, T, D)
        mask = x["attention_mask"][..., None]
        means.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(means).float().cpu().numpy()


def counted(texts):
    words = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    seen = Counter(word for count in words for word in count)
    found = np.zeros((len(texts), WORDS), np.float32)
    for row, count in zip(found, words, strict=True):
        for word, n in count.items():
            rarity = math.log((1 + len(texts)) / seen[word])
            row[data.hash64(word) % WORDS] += n * rarity
    return found


def mean_similarity(unit):
    """Each vector's mean cosine with the others: (N,)."""
    n = len(unit)
    if n < 2:
        return np.zeros(0)
    own = (unit * unit).sum(1)
    return (unit @ unit.sum(0) - own) / (n - 1)


def similarity(texts, responses, encoder="", device="cpu"):
    """{"prompts": [each one's mean similarity to the others], "responses": [... of the same question]}.
    Responses to a question follow each other."""
    alike = {"prompts": [], "responses": []}
    if texts:
        alike["prompts"] = mean_similarity(vectors(texts, encoder, device)).tolist()
    if responses:
        unit = vectors([row["response"] for row in responses], encoder, device)
        for _, own in itertools.groupby(range(len(unit)), key=lambda place: responses[place]["id"]):
            alike["responses"] += mean_similarity(unit[list(own)]).tolist()
    return alike


# ---- the page ----
SHOWN = ("instructions", "responses", "scores", "faults", "pairs", "dropped")


def candidates(run, row):
    """The candidates with their scores; under each the rankers that picked it."""
    body = ""
    for place, image in enumerate(row["candidates"]):
        says, picked = [f"guidance {image['guidance']:g}"], []
        for name, scores in row["scores"].items():
            says.append(f"{name} {scores[place]:.2f}")
            if scores.index(max(scores)) == place:
                picked.append(name)
        by = f" ← picked by {' and '.join(picked)}" if picked else ""
        body += page.picture(run.out, image["image"], ", ".join(says) + by)
    return f'<div class="row">{body}</div>'


def entry(run, row, made):
    """One prompt's card. made: {name of SHOWN: {a prompt's id: its rows}}."""
    id, terms = row["id"], []
    roles, notes = {}, {}
    here = {name: made[name].get(id, ()) for name in SHOWN}
    for dropped in here["dropped"]:
        terms.append(("dropped", f"<mark>{escape(dropped['reason'])}</mark>"))
    for asked in here["instructions"]:
        terms.append(("question", escape(asked["question"])))
    for pair in here["pairs"]:
        roles = dict(zip(pair["meta"]["models"], ("chosen", "rejected"), strict=True))
    for scored in here["scores"]:
        notes[scored["model"]] = [page.num(scored["score"])]
    for fault in here["faults"]:
        notes.setdefault(fault["model"], []).extend(fault["faults"])
    for said in here["responses"]:
        model, text = said["model"], escape(said["response"]) or "–"
        note = ", ".join([model, *notes.get(model, ())])
        terms.append((roles.get(model, "neither"), f"{text} <small>{escape(note)}</small>"))
    body = "".join(f"<dt>{term}</dt><dd>{says}</dd>" for term, says in terms)
    head = f"<h3>{escape(row['prompt'])}</h3><small>{escape(id)}</small>"
    return f'<div class="card">{head}{candidates(run, row)}<dl>{body}</dl></div>'


def percent(*shares):
    return [f"{100 * share:.0f}" for share in shares]


def tables(analysis):
    """The analyses as sections of the page."""
    shares, judge = analysis["guidance"], analysis["judge"]
    scales = [f"{scale:g}" for scale in shares.get("all", ())]
    rows = [[topic, *percent(*row.values())] for topic, row in shares.items()]
    body = page.section("Guidance", "Share of the prompts whose best image has this scale, in percent.",
                        page.table(["topic", *scales], rows))
    rows = []
    for row in analysis["agreement"]:
        names = " and ".join(row["rankers"])
        agree, chance = percent(row["agree"], row["chance"])
        rows.append([names, row["k"], agree, chance, row["n"]])
    body += page.section("Agreement", "Share in common of the rankers' top k, in percent.",
                         page.table(("rankers", "k", "agree", "chance", "prompts"), rows))
    if judge:
        counts = ("wins", "losses", "ties", "same_pick", "unread", "not_answered")
        row = [judge[name] for name in counts]
        row += percent(judge["win_rate"] or 0., *judge["interval"])
        head = [name.replace("_", " ") for name in counts]
        note = "How often {}'s pick is preferred to {}'s; the rate is of the decided, with its 95% interval."
        body += page.section("Judge", note.format(*judge["rankers"]),
                             page.table([*head, "rate, %", "from", "to"], [row]))
    rows = []
    for name, of in analysis["similarity"].items():
        cosines = [f"{cosine:.2f}" for cosine in (of["mean"], *of["deciles"])]
        rows.append([name, of["n"], *cosines])
    tenths = [f"{tenth}0%" for tenth in range(1, 10)]
    return body + page.section("Similarity", "Cosines with the others: their mean, and its deciles.",
                               page.table(["of", "n", "mean", *tenths], rows))


def analyse(run):
    """Writes analysis.json and gallery.html into the run's folder."""
    o, ranked, alike = run.o, run.rows("ranked", "rank"), {}
    texts = [row["prompt"] for row in run.rows("prompts")]
    found = similarity(texts, run.rows("responses"), o.encoder, run.ranks.device)
    for name, values in found.items():
        if values:
            deciles = np.quantile(values, np.arange(1, 10) / 10).tolist()
            alike[name] = {"n": len(values), "mean": float(np.mean(values)), "deciles": deciles}
    analysis = {"guidance": guidance(ranked), "agreement": agreement(ranked), "judge": judged(run, ranked),
                "similarity": alike}
    data.atomic_write(run.out / "analysis.json", json.dumps(analysis, indent=1) + "\n")
    data.atomic_write(run.out / "gallery.html", whole_page(run, ranked, analysis))
    for row in analysis["agreement"]:
        print(f"top {row['k']}: {' and '.join(row['rankers'])} agree {100 * row['agree']:.1f}%, "
              f"chance {100 * row['chance']:.1f}%")
    run.say(stage="analyse", prompts=len(ranked), page=str(run.out / "gallery.html"))


def whole_page(run, ranked, analysis):
    made = {}
    for name in SHOWN:
        rows = run.rows(f"scores-{run.o.scorer}" if name == "scores" else name)
        made[name] = pairing.grouped(rows, "id")
    reasons = Counter(row["reason"] for row in run.rows("dropped"))
    reasons.update(f"response {fault}" for row in run.rows("faults") for fault in row["faults"])
    apart = len(ranked) // max(1, run.o.gallery)
    shown = ranked[::max(1, apart)][:run.o.gallery]
    cards = "".join(entry(run, row, made) for row in shown)
    body = page.section("What was left out", f"{len(ranked)} prompts, {len(made['pairs'])} pairs.",
                        page.table(("reason", "n"), reasons.items()))
    body += tables(analysis)
    body += page.section("Prompts", "Evenly spaced through the run: nothing is picked.",
                         cards and f'<div class="grid" style="--w:560px">{cards}</div>')
    return page.page(f"Synthesis: {run.out.name}", body)
