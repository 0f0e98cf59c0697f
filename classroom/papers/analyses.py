"""PDS-DPO's analyses (arXiv 2412.17417) of a run of synth.py.

    python classroom/papers/analyses.py runs/synth     writes analysis.json

    guidance     Fig. 4: share of the prompts whose best image has each
                 guidance scale, by topic
    agreement    Table 4: two (three) rankers' top k of the candidates, mean
                 share in common, beside chance
    similarity   Fig. 6: each prompt's mean similarity to the other prompts,
                 each response's to the others that answer the same question:
                 cosines of word counts weighted by rarity (the paper: of a
                 sentence encoder)

Table 5's judge is in scorers.py: it knows the built-in world.
"""
import json
import math
import re
import statistics
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))          # the repository
import data  # noqa: E402
from model import command  # noqa: E402
from synthesis import pairing  # noqa: E402


# ---- Fig. 4 and Table 4 ----
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
    for rankers in (*combinations(names, 2), *combinations(names, 3)):
        for k in range(1, many):
            common = 0.
            for row in ranked:
                tops = [top(row["scores"][name], k) for name in rankers]
                common += len(set.intersection(*tops)) / k
            chance = (k / many) ** (len(rankers) - 1)
            found.append({"rankers": rankers, "k": k, "agree": common / n, "chance": chance, "n": n})
    return found


# ---- Fig. 6 ----
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
    response with those to the same question; words are counted and weighted by rarity."""
    prompts = [row["prompt"] for row in run.rows("prompts")]
    groups, found = {"prompts": [prompts], "responses": []}, {}
    for rows in pairing.grouped(run.rows("responses"), "id").values():
        groups["responses"].append([row["response"] for row in rows])
    for name, some in groups.items():
        if cosines := alike(some):
            deciles = statistics.quantiles(cosines, n=10, method="inclusive")
            found[name] = {"n": len(cosines), "mean": statistics.fmean(cosines), "deciles": deciles}
    return found


# ---- the command ----
def analyse(run):
    """What analysis.json holds of a synth.Run. Raises UserError."""
    ranked = run.rows("ranked", "rank")
    with command.explained(f"{run.out}: its files are not those of one run", "run the stages again"):
        return {"guidance": guidance(ranked), "agreement": agreement(ranked), "similarity": similarity(run)}


def main():
    parser = data.Parser(prog="analyses.py", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder of the run")
    out = parser.parse_args().out
    import synth
    try:
        found = analyse(synth.Run(synth.Options(), out))
        data.atomic_write(out / "analysis.json", json.dumps(found, indent=1) + "\n")
    except (data.UserError, OSError) as error:
        sys.exit(f"analyses.py: {error}")
    print(out / "analysis.json")


if __name__ == "__main__":
    main()
