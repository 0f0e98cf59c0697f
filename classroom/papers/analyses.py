"""PDS-DPO's analyses (arXiv 2412.17417) of a run of synth.py.

    python classroom/papers/analyses.py runs/synth     writes analysis.json and
                                                       gallery.html

`synth.py analyse` runs it. The page shows prompts from all over the run: their
pictures with scores and guidance, and their pairs. The tables:

    guidance     Fig. 4: share of the prompts whose best image has each
                 guidance scale, by topic
    agreement    Table 4: two (three) rankers' top k of the candidates, mean
                 share in common, beside chance
    judge        Table 5: how often --judge prefers the first ranker's pick to
                 the second's (wins); the two in random order, ties apart,
                 prompts where both picked the same image apart
    similarity   Fig. 6: each prompt's mean similarity to the other prompts,
                 each response's to the others that answer the same question:
                 cosines of word counts weighted by rarity (the paper: of a
                 sentence encoder)
"""
import json
import math
import re
import statistics
import sys
from collections import Counter
from html import escape
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))          # the repository
import data  # noqa: E402
from classroom.papers.pds import wilson  # noqa: E402
from evaluation import page  # noqa: E402
from model import ask, command  # noqa: E402
from synthesis import pairing, prompts  # noqa: E402

ASK_JUDGE = ("Two pictures were made from this description:\n{prompt}\nWhich shows it better: the first (A) "
             "or the second (B)? Reply with A, B or tie.")


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


# ---- Table 5 ----
def duel(row, seed):
    """{ranker: the place of its pick} of the first two rankers, in random order."""
    names = list(row["scores"])[:2]
    if data.draw(seed, "judge", row["id"]).integers(2) == 0:
        names.reverse()
    return {name: min(top(row["scores"][name], 1)) for name in names}


def judged(run, ranked, judge):
    """Table 5's counts, or None without a judge or with one ranker."""
    asked, meant, count = [], {}, Counter()
    names = list(ranked[0]["scores"])[:2]
    if not judge or len(names) < 2:
        return None
    for row in ranked:
        id, picks = row["id"], duel(row, run.o.seed)
        meant[id] = dict(zip("ab", picks, strict=True))
        files = [run.out / row["candidates"][place]["image"] for place in picks.values()]
        if files[0] != files[1]:
            asked.append(ask.Question(id, ASK_JUDGE.format(prompt=row["prompt"]), files))
    said = prompts.said(run.ask("judge", judge, asked))
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


# ---- the page ----
STYLE = """.grid figure{margin:0}.grid+table{max-width:none}td,th{text-align:left}
td:first-child,th:first-child{white-space:nowrap;width:5.5em}
@media print{.grid{grid-template-columns:repeat(4,1fr)}}"""
LEGEND = ("Each prompt has its pictures, then its pair. Under a picture are the guidance scale and what each "
          "ranker scores: the higher, the better the picture shows the prompt. A ranker’s scores compare the "
          "pictures of one prompt; two rankers have two scales. <b>Picked</b>: the first ranker’s best. "
          "Choose your own before you read the scores.")


def entry(run, row, pair):
    """A prompt on the page: its pictures with their scores, then its pair, if there is one."""
    body = ""
    for place, image in enumerate(row["candidates"]):
        says = [f"guidance {image['guidance']:g}"]
        says += [f"{name} {scores[place]:.2f}" for name, scores in row["scores"].items()]
        if image["image"] == row["image"]:
            says.append("picked")
        body += page.picture(run.out, image["image"], ", ".join(says))
    body = f'<div class="grid" style="--w:320px">{body}</div>'
    if pair:
        sides = [[side, pair[side]] for side in ("chosen", "rejected")]
        body += page.table(["", pair["question"]], sides)
    return page.section(escape(row["prompt"]), "", body)


def gallery(run, ranked, most):
    """The page of so many prompts, evenly spaced through the run, so that none was picked."""
    body, pairs = f'<p class="soft">{LEGEND}</p>', {row["id"]: row for row in run.rows("pairs")}
    apart = max(1, len(ranked) // max(1, most))
    for row in ranked[::apart][:most]:
        body += entry(run, row, pairs.get(row["id"]))
    return page.page(f"Synthesis: {run.out.name}", body, STYLE)


# ---- the command ----
def tables(run, ranked, judge=""):
    """What analysis.json holds of a synth.Run. Raises UserError."""
    return {"guidance": guidance(ranked),
            "agreement": agreement(ranked),
            "judge": judged(run, ranked, judge),
            "similarity": similarity(run)}


def main():
    parser = data.Parser(prog="analyses.py", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder of the run")
    parser.add_argument("--judge", default="", help="a vision-language model, or saved replies")
    parser.add_argument("--model_name", default="", help="the server's name for it [its choice]")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the two pictures [0]")
    parser.add_argument("--gallery", type=int, default=24, help="prompts on the page [24]")
    given = parser.parse_args()
    import synth
    try:
        run = synth.Run(synth.Options(seed=given.seed, model_name=given.model_name), given.out)
        ranked = run.rows("ranked", "rank")
        with command.explained(f"{run.out}: its files are not those of one run", "run the stages again"):
            html, found = gallery(run, ranked, given.gallery), tables(run, ranked, given.judge)
        data.atomic_write(given.out / "analysis.json", json.dumps(found, indent=1) + "\n")
        data.atomic_write(given.out / "gallery.html", html)
    except (data.UserError, OSError) as error:
        sys.exit(f"analyses.py: {error}")
    print(given.out / "analysis.json", given.out / "gallery.html", sep="\n")


if __name__ == "__main__":
    main()
