"""What a synthesis run's images say, and a page of examples.

    python synth.py analyse --out D         analysis.json and gallery.html

    guidance     share of the prompts whose best image has each guidance scale, by topic
    agreement    two (three) rankers' top k of the candidates, mean share in common, beside chance

They are Fig. 4 and Table 4 of PDS-DPO (arXiv 2412.17417).
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of synth.py; run: python synth.py --help"))

import json
from html import escape
from itertools import combinations

import data
from evaluation import page
from model import command
from synthesis import pairing


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
    for rankers in (*combinations(names, 2), *combinations(names, 3)):
        for k in range(1, many):
            common = 0.
            for row in ranked:
                tops = [top(row["scores"][name], k) for name in rankers]
                common += len(set.intersection(*tops)) / k
            chance = (k / many) ** (len(rankers) - 1)
            found.append({"rankers": rankers, "k": k, "agree": common / n, "chance": chance, "n": n})
    return found


# ---- the page ----
def entry(run, row, pair):
    """A prompt on the page: its pictures with their scores, then its pair, if there is one."""
    body = ""
    for place, image in enumerate(row["candidates"]):
        says = [f"guidance {image['guidance']:g}"]
        says += [f"{name} {scores[place]:.2f}" for name, scores in row["scores"].items()]
        if image["image"] == row["image"]:
            says.append("picked")
        body += page.picture(run.out, image["image"], ", ".join(says))
    body = f'<div class="row">{body}</div>'
    if pair:
        sides = [[side, pair[side]] for side in ("chosen", "rejected")]
        body += page.table(["", pair["question"]], sides)
    return page.section(escape(row["prompt"]), "", body)


def gallery(run, ranked):
    """The page of --set gallery= prompts, evenly spaced through the run: none was picked."""
    body, most = "", run.o.gallery
    pairs = {row["id"]: row for row in run.rows("pairs")}
    apart = max(1, len(ranked) // max(1, most))
    for row in ranked[::apart][:most]:
        body += entry(run, row, pairs.get(row["id"]))
    return page.page(f"Synthesis: {run.out.name}", body)


def analyse(run):
    """Writes analysis.json and gallery.html into the run's folder."""
    ranked, file = run.rows("ranked", "rank"), run.out / "gallery.html"
    with command.explained(f"{file.parent}: its files are not those of one run", "run the stages again"):
        found = {"guidance": guidance(ranked), "agreement": agreement(ranked)}
        html = gallery(run, ranked)
    data.atomic_write(run.out / "analysis.json", json.dumps(found, indent=1) + "\n")
    data.atomic_write(file, html)
    run.say("analyse", prompts=len(ranked), page=str(file))
