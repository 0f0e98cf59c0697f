"""PDS-DPO's tables and figures on the built-in synthesis: claims, rules, verdicts, as findings.py has them.

Read from two files that scorers.py writes: results/scorers.jsonl, a line a run of DPO on synthetic pairs (one
base, so that intervals are Student's over seeds), and results/synthesis.json, what `synth.py analyse` found
on the run behind them. The paper's models and judge are large; here all are the classroom's small ones.
"""
import json
import statistics

from classroom import study
from classroom.evidence import nested

ANALYSIS = study.HERE / "results" / "synthesis.json"
COLUMNS = ("chair_s", "chair_i", "cover", "pope_random_acc", "pope_adversarial_acc")
SIZES = {"armorm, a quarter": .25, "armorm, half": .5, "armorm": 1}
POPE = 1                                    # points of POPE that may be lost


def values(lines, name, measure, when="after"):
    return {"base0": [line[when][measure] for line in lines if line["name"] == name]}


def change(lines, name, measure, other="before"):
    """A seed's value minus its base's, or minus another scorer's of the same seed -> (mean, low, high)."""
    mine = {line["seed"]: line for line in lines if line["name"] == name}
    theirs = {line["seed"]: line for line in lines if line["name"] == other}
    pairs = [(line["after"], line["before"] if other == "before" else theirs[seed]["after"])
             for seed, line in sorted(mine.items()) if other == "before" or seed in theirs]
    return nested({"base0": [a[measure] - b[measure] for a, b in pairs]})


def span(found, unit=""):
    mean, low, high = found
    return f"{mean:+.1f}{unit}" + (f" ({low:+.1f} to {high:+.1f})" if low is not None else "")


def row(lines, name, **more):
    measures = {m: values(lines, name, m) for m in COLUMNS}
    return {"arm": f"DPO on pairs of {name}", "runs": len(measures["chair_s"]["base0"]), "paper": {},
            "values": {m: nested(v) for m, v in measures.items()},
            "bases": {m: {"base0": statistics.mean(v["base0"])} for m, v in measures.items()}} | more


def before(lines):
    one = next(iter(lines))["before"]
    return {"arm": "before", "runs": 1, "paper": {}, "values": {m: (one[m], None, None) for m in COLUMNS},
            "bases": {}}


def share(k, n, z=1.96):
    """A share of n in percent with Wilson's 95% interval."""
    centre, width = (k + z * z / 2) / (n + z * z), z * (k * (n - k) / n + z * z / 4) ** .5 / (n + z * z)
    return 100 * k / n, 100 * (centre - width), 100 * (centre + width)


# ---------------------------------------------------------------------------------------- verdicts
def table2(lines, _):
    chair, pope = change(lines, "armorm", "chair_s"), change(lines, "armorm", "pope_random_acc")
    held = chair[2] is not None and chair[2] < 0 and pope[1] > -POPE
    text = (f"On ArmoRM's pairs CHAIR_s changes by {span(chair)}, POPE random by {span(pope)}. For "
            f"comparison, "
            "CHAIR_s on the pairs of " + ", ".join(
                f"{name}: "
                f"{span(change(lines, name, 'chair_s'))}" for name in ("clip", "length", "random", "oracle"))
            + ". The oracle is told what the prompt asks for; it shows what right pairs would do.")
    rows = [before(lines)] + [row(lines, name) for name in ("armorm", "clip", "length", "random", "oracle")]
    return held, text, rows, {"figure": "bars"}


def table3(lines, _):
    gain, first = change(lines, "armorm", "chair_s", "armorm, a quarter"), change(lines, "armorm, a "
                                                                                         "quarter", "chair_s")
    text = (f"CHAIR_s with all pairs minus with a quarter of them: {span(gain)}; a quarter of them changes "
            f"the base's by "
            f"{span(first)}.")
    sizes = {name: next(line["pairs"] for line in lines if line["name"] == name) for name in SIZES}
    rows = [row(lines, name, series="ArmoRM", x=sizes[name]) for name in SIZES]
    return gain[2] is not None and gain[2] < 0, text, rows, {"figure": "lines", "xlabel": "pairs"}


def fig4(_, analysis):
    topics, n = analysis["guidance"], analysis["agreement"][0]["n"]
    shares = {scale: share(round(part * n), n) for scale, part in topics["all"].items()}
    best = max(shares, key=lambda s: shares[s][0])
    differ = {max(parts, key=parts.get) for topic, parts in topics.items() if topic != "all"}
    text = ("The best picture of a prompt was drawn at guidance " + ", ".join(
        f"{scale} in {x:.0f}%" for scale, (x, *_) in shares.items()) + f"; of {len(topics) - 1} topics the "
                                                                       f"most frequent "
        f"scale is {' or '.join(sorted(differ))}.")
    rows = [{"arm": f"guidance {scale}", "runs": n, "values": {"picked": found}, "bases": {}, "paper": {}}
            for scale, found in shares.items()]
    return shares[best][2] < 50, text, rows, {"figure": "bars", "metric": "picked", "columns": ["picked"]}


def table4(_, analysis):
    rows, above = [], []
    for found in analysis["agreement"]:
        point = share(round(found["agree"] * found["n"] * found["k"]), found["n"] * found["k"])
        above.append(point[1] > 100 * found["chance"])
        rows.append({"arm": f"top {found['k']}, "
                            f"{' and '.join(found['rankers'])}", "runs": found["n"], "bases": {},
                     "values": {"agree": point, "chance": (100 * found["chance"], None, None)}, "paper": {}})
    two = [f for f in analysis["agreement"] if len(f["rankers"]) == 2]
    text = "; ".join(f"{' and '.join(f['rankers'])} share {100 * f['agree']:.0f}% of their top {f['k']} of "
                     f"four (chance "
                     f"{100 * f['chance']:.0f}%)" for f in two) + "."
    return bool(above) and all(above), text, rows, {
        "figure": "bars", "metric": "agree", "columns": ["agree", "chance"]}


def table5(_, analysis):
    found = analysis["judge"]
    wins, losses = found["wins"], found["losses"]
    point = share(wins, wins + losses)
    text = (f"Of {wins + losses + found['ties'] + found['same_pick']} prompts both pick the same picture in "
            f"{found['same_pick']}; else the judge prefers {found['rankers'][0]}'s in {wins}, "
            f"{found['rankers'][1]}'s in "
            f"{losses}, neither in {found['ties']}: a win rate of {point[0]:.0f}% ({point[1]:.0f} to "
            f"{point[2]:.0f}). "
            "The judge is a rule that counts the asked objects and colours that a recogniser finds.")
    rows = [{"arm": f"{found['rankers'][0]}'s pick wins", "runs": wins + losses, "bases": {}, "paper": {},
             "values": {"win rate": point}}]
    return point[1] > 50, text, rows, {"figure": "bars", "metric": "win rate", "columns": ["win rate"]}


def fig6(_, analysis):
    found = analysis["similarity"]
    prompts, responses = found["prompts"], found["responses"]
    text = (f"A prompt's mean similarity with the others is {prompts['mean']:.2f} in the mean (nine in ten "
            f"below "
            f"{prompts['deciles'][-1]:.2f}); that of a response with the others to the same picture "
            f"{responses['mean']:.2f} (one in ten below {responses['deciles'][0]:.2f}). Word counts "
            f"weighted by rarity "
            "stand for the paper's sentence encoder.")
    rows = [{"arm": name, "runs": part["n"], "bases": {}, "points": part["deciles"], "paper": {},
             "values": {"similarity": (part["mean"], None, None)}} for name, part in found.items()]
    return prompts["deciles"][-1] < .5 and responses["deciles"][0] < .9, text, rows, {
        "figure": "histogram", "metric": "similarity", "columns": ["similarity"]}


TABLES = {
    "pds-table2": ("PDS-DPO, Table 2", "Synthetic pairs", table2,
                   "DPO on synthetic pairs makes the model hallucinate less and costs it nothing else.",
                   "On ArmoRM's pairs CHAIR_s falls (the 95% interval of the change lies below 0) and POPE "
                   "random falls "
                   f"by less than {POPE} point (its interval lies above -{POPE})."),
    "pds-table3": ("PDS-DPO, Table 3", "How many synthetic pairs", table3, "More synthetic pairs do more.",
                   "CHAIR_s with all pairs is lower than with a quarter of them, seed by seed (95%)."),
    "pds-fig4": ("PDS-DPO, Fig. 4", "Which guidance scale is picked", fig4,
                 "No guidance scale is best for all prompts, so that drawing at several pays.",
                 "No scale is picked for half of the prompts: the 95% interval of the most frequent one's "
                 "share lies "
                 "below 50%."),
    "pds-table4": ("PDS-DPO, Table 4", "Do scorers agree", table4, "ImageReward and other scorers pick "
                                                                   "alike.",
                   "Every two scorers' (and all three's) top 1, 2 and 3 of four agree more than by chance: "
                   "the 95% "
                   "interval lies above it."),
    "pds-table5": ("PDS-DPO, Table 5", "Reward model or CLIP", table5, "A judge prefers the reward model's "
                                                                       "picture to "
                   "CLIP's.", "Of the prompts where the picks differ and the judge decides, the reward "
                              "model's wins more "
                   "than half (95%)."),
    "pds-fig6": ("PDS-DPO, Fig. 6", "How diverse prompts and responses are", fig6,
                 "Prompts differ from each other, and so do the responses to one picture.",
                 "Nine in ten prompts have a mean similarity below 0.5 with the others, and a tenth of the "
                 "responses one "
                 "below 0.9 with the others to their picture."),
}


def findings():
    """The findings that there are data for; the others say "not run"."""
    lines = study.read("scorers")
    analysis = json.loads(ANALYSIS.read_text()) if ANALYSIS.exists() else {}
    out = []
    for name, (paper, title, work, claim, rule) in TABLES.items():
        found = {"name": name, "paper": paper, "title": title, "claim": claim, "rule": rule, "links": {},
                 "metric": "chair_s", "exploratory": False, "contrasts": [], "paper_measure": None,
                 "xlabel": "", "xlog": False, "rows": [], "columns": list(COLUMNS), "figure": None,
                 "trace": "results/scorers.jsonl" if work in (table2, table3) else "results/synthesis.json",
                 "verdict": "not run", "found": "Not run: python classroom/scorers.py."}
        if {table2: lines, table3: lines, table5: analysis.get("judge")}.get(work, analysis):
            held, text, rows, more = work(lines, analysis)
            found |= {"verdict": "appears" if held else "does not appear", "found": text, "rows": rows} | more
        out.append(found)
    return out
