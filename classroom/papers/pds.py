"""PDS-DPO's analyses of the synthesis itself, for reproduce.py: claims, rules, verdicts, as in findings.py.

Read from results/synthesis.json: what analyses.py and scorers.py found on the run behind the pairs.
The paper's models and judge are large; here all are the classroom's small ones. What the pairs are worth to
DPO, the paper's Tables 2 and 3, are runs like all others, defined in findings.py.
"""
if __name__ == "__main__":
    exit("A part of reproduce.py; run: python classroom/papers/reproduce.py --help")

import math

import data
from classroom.papers import study

ANALYSIS = study.HERE / "results" / "synthesis.json"


def analysis():
    return data.read_json(ANALYSIS, {})


def wilson(k, n, z=1.96):
    """95% interval of a share k of n; of none (0, 1)."""
    middle, total = k + z * z / 2, n + z * z
    width = z * math.sqrt(k * (n - k) / max(n, 1) + z * z / 4)
    return [(middle - width) / total, (middle + width) / total]


def share(k, n):
    """A share of n in percent with Wilson's 95% interval."""
    low, high = wilson(k, n)
    return 100 * k / n, 100 * low, 100 * high


def part(what, share, bound, claimed):
    """A comparison for the page's figure: how far a share's interval is above a bound, in points."""
    difference = tuple(x - bound for x in share)
    low, high = claimed
    holds = (low is None or difference[1] > low) and (high is None or difference[2] < high)
    return {"what": what, "holds": holds, "difference": difference, "claimed": claimed, "paper": None,
            "note": ""}


def row(arm, runs, **more):
    return {"arm": arm, "runs": runs, "bases": {}, "paper": {}} | more


# ---------------------------------------------------------------------------------------- verdicts
def fig4(found):
    topics, n = found["guidance"], found["agreement"][0]["n"]
    shares = {scale: share(round(part * n), n) for scale, part in topics["all"].items()}
    most = part("the most frequent scale's share, minus half", max(shares.values()), 50, (None, 0))
    differ = {max(parts, key=parts.get) for topic, parts in topics.items() if topic != "all"}
    told = ", ".join(f"{scale} in {x:.0f}%" for scale, (x, *_) in shares.items())
    text = (f"The best picture of a prompt was drawn at guidance {told}; of {len(topics) - 1} topics the "
            f"most frequent scale is {' or '.join(sorted(differ))}.")
    rows = [row(f"guidance {scale}", n, values={"picked": x}) for scale, x in shares.items()]
    return most["holds"], text, rows, {"figure": "bars", "metric": "picked", "columns": ["picked"],
                                       "parts": [most]}


def table4(found):
    rows, above, two = [], [], []
    for f in found["agreement"]:
        point = share(f["agree"] * f["n"], f["n"])                 # as if all or nothing: wide for k > 1
        above.append(part(f"top {f['k']} of {' and '.join(f['rankers'])}, minus chance", point,
                          100 * f["chance"], (0, None)))
        rows.append(row(f"top {f['k']}, {' and '.join(f['rankers'])}", f["n"],
                        values={"agree": point, "chance": (100 * f["chance"], None, None)}))
        if len(f["rankers"]) == 2:
            two.append(f"{' and '.join(f['rankers'])} share {100 * f['agree']:.0f}% of their top {f['k']} of "
                       f"four (chance {100 * f['chance']:.0f}%)")
    return bool(above) and all(each["holds"] for each in above), "; ".join(two) + ".", rows, {
        "figure": "bars", "metric": "agree", "columns": ["agree", "chance"], "parts": above}


def table5(found):
    judge = found["judge"]
    wins, losses, alike, (ours, other) = judge["wins"], judge["losses"], judge["same_pick"], judge["rankers"]
    point = share(wins, wins + losses)
    text = (f"Of {wins + losses + judge['ties'] + alike} prompts both pick the same picture in {alike}. In "
            f"the others the judge prefers {ours}'s in {wins}, {other}'s in {losses}, neither in "
            f"{judge['ties']}: a win rate of {point[0]:.0f}% ({point[1]:.0f} to {point[2]:.0f}). The judge "
            "is a rule that counts the asked objects and colours that a recogniser finds.")
    rows = [row(f"{ours}'s pick wins", wins + losses, values={"win rate": point})]
    most = part("the win rate, minus half", point, 50, (0, None))
    return most["holds"], text, rows, {"figure": "bars", "metric": "win rate", "columns": ["win rate"],
                                       "parts": [most]}


def fig6(found):
    parts = found["similarity"]
    prompts, responses = parts["prompts"], parts["responses"]
    text = (f"A prompt's mean similarity with the others is {prompts['mean']:.2f} on average (nine in ten "
            f"below {prompts['deciles'][-1]:.2f}); that of a response with the others to the same picture "
            f"{responses['mean']:.2f} (one in ten below {responses['deciles'][0]:.2f}). Word counts weighted "
            "by rarity stand for the paper's sentence encoder.")
    rows = [row(name, part["n"], points=part["deciles"], values={"similarity": (part["mean"], None, None)})
            for name, part in parts.items()]
    return prompts["deciles"][-1] < .5 and responses["deciles"][0] < .9, text, rows, {
        "figure": "histogram", "metric": "similarity", "columns": ["similarity"]}


TABLES = {     # name: (what of the analysis it needs, paper, title, verdict, claim, rule)
    "pds-fig4": (
        "guidance", "PDS-DPO, Fig. 4", "Which guidance scale is picked", fig4,
        "No guidance scale is best for all prompts, so that drawing at several pays.",
        "No scale is picked for half of the prompts: the 95% interval of the most frequent one's share lies "
        "below 50%."),
    "pds-table4": (
        "agreement", "PDS-DPO, Table 4", "Do scorers agree", table4,
        "ImageReward and other scorers pick alike.",
        "Every two scorers' (and all three's) top 1, 2 and 3 of four agree more than by chance: the 95% "
        "interval lies above it."),
    "pds-table5": (
        "judge", "PDS-DPO, Table 5", "Reward model or CLIP", table5,
        "A judge prefers the reward model's picture to CLIP's.",
        "Of the prompts where the picks differ and the judge decides, the reward model's wins more than half "
        "(95%)."),
    "pds-fig6": (
        "similarity", "PDS-DPO, Fig. 6", "How diverse prompts and responses are", fig6,
        "Prompts differ from each other, and so do the responses to one picture.",
        "Nine in ten prompts have a mean similarity below 0.5 with the others, and a tenth of the responses "
        "one below 0.9 with the others to their picture."),
}


def findings():
    """The findings that there are data for; the others say "not run"."""
    there, out = analysis(), []
    for name, (needs, paper, title, work, claim, rule) in TABLES.items():
        found = {"name": name, "paper": paper, "title": title, "claim": claim, "rule": rule, "links": {},
                 "exploratory": False, "contrasts": [], "paper_measure": None, "xlabel": "", "xlog": False,
                 "rows": [], "columns": [], "metric": "chair_s", "figure": None, "parts": [],
                 "trace": "results/synthesis.json", "verdict": "not run",
                 "found": "Not run: python classroom/papers/scorers.py."}
        if there.get(needs):
            held, text, rows, more = work(there)
            found |= {"verdict": "appears" if held else "does not appear", "found": text, "rows": rows} | more
        out.append(found)
    return out
