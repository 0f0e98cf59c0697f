"""Synthetic pairs of every scorer from the same responses, for the PDS-DPO half of reproduce.py.

    python classroom/papers/scorers.py    some minutes; see reproduce.py

400 prompts go through synth.py; every scorer's pairs are then in runs/synth-scorers/. Prompts, images and
responses are made once; only scores and pairs differ. What ImageReward and CLIP picked, how alike prompts
and responses are, and how often a scorer's chosen response is the longer one goes into
classroom/papers/results/synthesis.json, for pds.py.

The scorers are synth.py's (armorm, random, length, clip) and an oracle: of the objects that a response
names, how many the prompt asks for minus how many it does not. It goes by the prompt, not by the picture:
where the generator failed, it is wrong.
"""
import json
import os
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[2]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from classroom import synthesis, world  # noqa: E402
from classroom.papers import analyses  # noqa: E402

OUT, RESULTS = Path("runs/synth-scorers"), HERE / "results" / "synthesis.json"
SCORERS = ("armorm", "clip", "length", "random", "oracle")
SHARES = (4, 2)                            # of ArmoRM's, every fourth and every second pair: all themes alike


def oracle(run):
    """scores-oracle.jsonl: 1 for each object of the prompt that a response names, -1 for each other one."""
    asked = {r["id"]: set(world.mentions(r["prompt"])) for r in run.rows("ranked")}
    rows = []
    for r in run.rows("responses"):
        said = set(world.mentions(r["response"]))
        rows.append({"id": r["id"], "model": r["model"], "score": 2 * len(said & asked[r["id"]]) - len(said)})
    run.write("scores-oracle", rows)


def judge(run):
    """Table 5's counts: of the first two rankers' picks the better is the one that shows more of the prompt
    by synthesis.recognise (objects in their colours, then objects at all)."""
    from PIL import Image
    ranked, count = run.rows("ranked"), Counter()
    names = list(ranked[0]["scores"])[:2]
    for r in ranked:
        words, shown = r["prompt"].split(), []
        picks = [min(analyses.top(r["scores"][name], 1)) for name in names]
        things = {(t, c) for c, t in zip(words, words[1:], strict=False) if t in world.TYPES}
        for k in picks:
            with Image.open(run.out / r["candidates"][k]["image"]) as image:
                cells = set(synthesis.recognise(image, words[0])[0]) - {None}
            shown.append((len(things & cells), len({t for t, _ in things} & {t for t, _ in cells})))
        ours, other = shown
        outcome = "wins" if ours > other else "losses" if other > ours else "ties"
        count["same_pick" if picks[0] == picks[1] else outcome] += 1
    return {"rankers": names} | {name: count[name] for name in ("wins", "losses", "ties", "same_pick")}


def pairs(n=100):
    """n prompts a theme through every stage, and pairs-NAME.jsonl of every scorer and share."""
    import synth
    synthesis.prompts(n, OUT)
    given = ["--out", str(OUT), "--prompts", str(OUT / "prompts")]
    synth.main(["all", *given])
    run = synth.Run(synth.options(["all", *given])[1], OUT)
    oracle(run)
    found = analyses.tables(run, run.rows("ranked")) | {"judge": judge(run), "longer": {}}
    for scorer in SCORERS:
        for stage in ("score", "pairs") if scorer != "oracle" else ("pairs",):
            synth.main([stage, *given, "--scorer", scorer])
        rows = run.rows("pairs")
        run.write(f"pairs-{scorer}", rows)
        longer = [len(r["chosen"].split()) > len(r["rejected"].split()) for r in rows]
        found["longer"][scorer] = {"pairs": len(rows), "chosen_longer": sum(longer) / len(rows)}
        for share in SHARES if scorer == "armorm" else ():
            run.write(f"pairs-{scorer}-{share}", rows[::share])
    data.atomic_write(RESULTS, json.dumps(found, indent=1))


def main():
    data.Parser(prog="scorers.py", description=__doc__).parse_args()
    os.chdir(ROOT)
    try:
        pairs()
    except data.UserError as error:
        sys.exit(f"scorers.py: {error}")


if __name__ == "__main__":
    main()
