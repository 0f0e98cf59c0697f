"""The paper's analyses (arXiv 2412.17417) of a synthesis run's files, and a page of examples.

    python synth.py analyse --out D         analysis.json and gallery.html

    guidance     Fig. 4: share of the prompts whose best image has each guidance scale, by topic
    agreement    Table 4: two (three) rankers' top k of the candidates, mean share in common, beside chance
    judge        Table 5: how often --judge prefers the first ranker's pick to the second's (wins); the two in
                 random order, ties apart, prompts where both picked the same image apart
    similarity   Fig. 6: each prompt's mean similarity to the other prompts, each response's to the others
                 that answer the same question: cosines of word counts weighted by rarity (the paper: of a
                 sentence encoder)
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of synth.py; run: python synth.py --help"))

import itertools
import json
import math
import re
import statistics
from collections import Counter, defaultdict
from html import escape

import data
from evaluation import page
from model import ask, command
from synthesis import pairing, prompts

ASK_JUDGE = ("Two pictures were made from this description:\n{prompt}\nWhich shows it better: the first (A) "
             "or the second (B)? Reply with A, B or tie.")


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
    found, n, first = [], len(ranked), ranked[0]
    names, many = first["scores"], len(first["candidates"])
    for rankers in (*itertools.combinations(names, 2), *itertools.combinations(names, 3)):
        for k in range(1, many):
            common = 0.
            for row in ranked:
                tops = [top(row["scores"][name], k) for name in rankers]
                common += len(set.intersection(*tops)) / k
            chance = (k / many) ** (len(rankers) - 1)
            found.append({"rankers": rankers,
                          "k": k,
                          "agree": common / n,
                          "chance": chance,
                          "n": n})
    return found


def duel(row, seed):
    """{ranker: the place of its pick} of the first two rankers, in random order."""
    names = list(row["scores"])[:2]
    if data.draw(seed, "judge", row["id"]).integers(2) == 0:
        names.reverse()
    return {name: min(top(row["scores"][name], 1)) for name in names}


def judged(run, ranked):
    """Table 5's counts, or None without --judge or with one ranker."""
    o, asked, meant, count = run.o, [], {}, Counter()
    names = list(ranked[0]["scores"])[:2]
    if not o.judge or len(names) < 2:
        return None
    for row in ranked:
        id, picks = row["id"], duel(row, o.seed)
        meant[id] = dict(zip("ab", picks, strict=True))
        files = [run.out / row["candidates"][place]["image"] for place in picks.values()]
        if files[0] != files[1]:
            text = ASK_JUDGE.format(prompt=row["prompt"])
            asked.append(ask.Question(id, text, files))
    said = prompts.said(run.ask("judge", o.judge, asked))
    for id, text in said.items():
        vote = re.match(r"\W*(?:answer\W+)?(a|b|tie)\b", text, re.I)
        word = vote[1].lower() if vote else "unread"
        count[meant[id].get(word, word)] += 1
    wins, losses = (count[name] for name in names)
    decided = wins + losses
    return {"rankers": names,
            "wins": wins,
            "losses": losses,
            "ties": count["tie"],
            "unread": count["unread"],
            "not_answered": len(asked) - len(said),
            "same_pick": len(ranked) - len(asked),
            "win_rate": wins / decided if decided else None,
            "interval": wilson(wins, decided)}


def wilson(k, n, z=1.96):
    """95% interval of a share k of n; of none (0, 1)."""
    middle, total = k + z * z / 2, n + z * z
    width = z * math.sqrt(k * (n - k) / max(n, 1) + z * z / 4)
    return [(middle - width) / total, (middle + width) / total]


def words(text):
    return Counter(re.findall(r"\w+", text.lower()))


def unit(text, rarity):
    """A text as a vector of length 1: {word: weight}."""
    weights = {word: n * rarity[word] for word, n in words(text).items()}
    length = math.hypot(*weights.values())
    return {word: weight / length for word, weight in weights.items()}


def alike(groups):
    """Each text's mean cosine with the others of its group, in a list; of a text alone nothing."""
    texts, found = sum(groups, []), []
    seen = Counter(word for text in texts for word in words(text))
    rarity = {word: math.log((1 + len(texts)) / n) for word, n in seen.items()}
    for group in groups:
        units, total = [unit(text, rarity) for text in group], Counter()
        for own in units:
            total.update(own)
        for own in units if len(units) > 1 else ():
            cosines = sum(weight * (total[word] - weight) for word, weight in own.items())
            found.append(cosines / (len(units) - 1))
    return found


def similarity(run):
    """{"prompts", "responses": {"n", "mean", "deciles"}} of each one's mean cosine with all others, of a
    response with those to the same question."""
    prompts = [row["prompt"] for row in run.rows("prompts")]
    groups, found = {"prompts": [prompts], "responses": []}, {}
    for rows in pairing.grouped(run.rows("responses"), "id").values():
        groups["responses"].append([row["response"] for row in rows])
    for name, some in groups.items():
        if cosines := alike(some):
            deciles = statistics.quantiles(cosines, n=10, method="inclusive")
            found[name] = {"n": len(cosines), "mean": statistics.fmean(cosines), "deciles": deciles}
    return found


# ---- the page ----
NOTES = {"guidance": "Share of the prompts whose best image has this scale.",
         "agreement": "Share in common of the rankers' top k.",
         "judge": "How often the first ranker's pick is preferred (wins), and the second's (losses).",
         "similarity": "Cosines with the others."}


def answers(run):
    """{id: lines of a table}: the responses with what became of them, and why there is no pair."""
    notes, lines = defaultdict(list), defaultdict(list)
    for pair in run.rows("pairs"):
        chosen, rejected = pair["meta"]["models"]
        notes[pair["id"], chosen].append("chosen")
        notes[pair["id"], rejected].append("rejected")
    for row in run.rows(f"scores-{run.o.scorer}"):
        notes[row["id"], row["model"]].append(page.num(row["score"]))
    for row in run.rows("faults"):
        notes[row["id"], row["model"]] += row["faults"]
    for row in run.rows("responses"):
        id, model = row["id"], row["model"]
        says = ", ".join([model, *notes[id, model]])
        lines[id].append([(row["response"] or "–", says)])
    for row in run.rows("dropped"):
        lines[row["id"]].append([(row["reason"], "dropped")])
    return lines


def entry(run, row, question, lines):
    """One prompt's card: the candidates with their scores and who picked them, the question, the answers."""
    body = ""
    for place, image in enumerate(row["candidates"]):
        says = f"guidance {image['guidance']:g}"
        for name, scores in row["scores"].items():
            says += f", {name} {scores[place]:.2f}"
            if place in top(scores, 1):
                says += f" ← picked by {name}"
        body += page.picture(run.out, image["image"], says)
    body = f'<div class="row">{body}</div>{page.table([question], lines)}'
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


def gallery(run, ranked, analysis):
    """The page: the analyses, and prompts from all over the run."""
    cards, most, lines = "", run.o.gallery, answers(run)
    questions = {row["id"]: row["question"] for row in run.rows("instructions")}
    apart = max(1, len(ranked) // max(1, most))
    for row in ranked[::apart][:most]:
        id = row["id"]
        cards += entry(run, row, questions.get(id, ""), lines[id])
    body = tables(analysis)
    body += page.section("Prompts", "Evenly spaced through the run: none was picked.",
                         f'<div class="grid" style="--w:560px">{cards}</div>')
    return page.page(f"Synthesis: {run.out.name}", body, page.TABLES)


def analyse(run):
    """Writes analysis.json and gallery.html into the run's folder."""
    ranked, file = run.rows("ranked", "rank"), run.out / "gallery.html"
    with command.explained(f"{file.parent}: its files are not those of one run", "run the stages again"):
        found = {"guidance": guidance(ranked),
                 "agreement": agreement(ranked),
                 "judge": judged(run, ranked),
                 "similarity": similarity(run)}
    data.atomic_write(run.out / "analysis.json", json.dumps(found, indent=1) + "\n")
    data.atomic_write(file, gallery(run, ranked, found))
    run.say("analyse", prompts=len(ranked), page=str(file))
