"""The papers' tables and figures, for reproduce.py: what each claims, the rule by which it appears here, and
the verdict.

Every table has one primary measure and one rule, written before its runs were made; what else it shows is
exploratory, as is a table of fewer seeds, or whose rule came after a first look. One condition was added to
all rules afterwards, and can only take claims away: "no difference" can be claimed only where an arm trains.
The primary measure is CHAIR_s on 1000 printed scenes unless it says otherwise; evidence.py says what "lower"
and "equal" mean and how intervals are made, rules.py compares.
"""
if __name__ == "__main__":
    exit("A part of reproduce.py; run: python classroom/papers/reproduce.py --help")

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from classroom.papers import rules, study, ties
from classroom.papers.evidence import MARGIN, Runs, nested, possible
from classroom.papers.rules import (
    IMITATORS,
    NATS,
    POPE,
    SHARE_WORDS,
    SHARES,
    SIZES,
    SYNTHETIC,
    TRUE,
    of_share,
    sized,
)
from classroom.world import KINDS

COLUMNS = ("chair_s", "chair_i", "cover", "pope_random_acc", "counting", "words", "kl", "look", "chosen")

# arm: (method, whose best setting on tuning scenes it takes; what it changes). {base} is the run's base.
ARMS = {name: (name, "") for name in (*study.METHODS, *study.ABLATIONS)} | {
    "random image": ("mDPO", "--image_rejected random"),
    "crop 20-50": ("mDPO", "--image_rejected crop20-50"),
    "MoCo v2": ("mDPO", "--image_rejected moco"),
    "patch": ("mDPO", "--image_rejected patch"),
    "anchors y_w, y_l": ("mDPO", "--anchors wl"),
    "anchors y_w, y_l, m_l": ("mDPO", "--anchors wlm"),
    "DPO, equal compute": ("DPO", "--epochs 5"),
} | {f"{method}, {n} pairs": (method, f"--set pairs={n}") for method in ("mDPO", "DPO") for n in (250, 500)
} | {f"{method}, {what}": (method, f"--set pair_options={knob}")
     for what, knob in {"on policy": "--on_policy={base}", "invented words last": "--order=last",
                        "gap 0.5": "--gap=0.5", "gap 1": "--gap=1",
                        "cue 0": "--cue=0", "cue 0.5": "--cue=0.5",
                        "faithful 0.5": "--faithful=0.5", "faithful 1": "--faithful=1"}.items()
     for method in ("mDPO", "DPO")
} | {f"{method}, careless base": (method, "--model runs/reproduce/careless-{base} --set "
                                  "'pair_options=--ask=existence,attribute,counting,false_premise'")
     for method in ("mDPO", "DPO")
} | {f"{method}, {kind} {x}": (method, f"--{kind} {x}")
     for kind, values in (("lr", study.RATES), ("beta", ("0.03", "0.1", "0.3", "1")))
     for x in values for method in ("mDPO", "DPO")
} | {f"{method}, faithful {x}": (method, f"--set pair_options=--faithful={x}")
     for x in ("0.5", "1") for method in ("DPO + AncPO", "SFT on the chosen")
} | {f"crop {kept}": ("mDPO", f"--image_rejected crop{kept}") for kept in ("50-80", "80-100")
} | {name: ("DPO on synthetic pairs", f"--data runs/synth-scorers/{file}.jsonl")
     for name, file in {
         "ArmoRM's pairs": "pairs-armorm", "half of ArmoRM's pairs": "pairs-armorm-2",
         "a quarter of ArmoRM's pairs": "pairs-armorm-4", "CLIP's pairs": "pairs-clip",
         "the longer response": "pairs-length", "random pairs": "pairs-random",
         "the oracle's pairs": "pairs-oracle"}.items()
} | {name: ("DPO on synthetic pairs", options) for name, options in ties.ARMS.items()}


# ---------------------------------------------------------------------------------------- tables
@dataclass(frozen=True)
class Table:
    paper: str                     # which table or figure
    title: str
    claim: str
    rule: str
    arms: tuple                    # what must be run
    verdict: Callable              # Runs -> ([a Part], what was found)
    seeds: int = 5                 # how many of the seeds
    main: bool = False             # among --quick
    exploratory: bool = False
    metric: str = "chair_s"
    columns: tuple = COLUMNS
    figure: str = "bars"
    shown: tuple = ()              # the rows' arms, where they are not `arms`
    against: str = ""              # the arm that the contrasts are to
    published: tuple = ()          # (arm, {measure: the paper's number})
    published_measure: str | None = None
    x: tuple = ()                  # lines: (arm, series, x)
    xlabel: str = ""
    xlog: bool = False
    conditions: tuple = ()         # of a sweep: (value, mDPO's arm, DPO's arm)
    knob: str = ""                 # of a sweep: where in it, with the value in braces


WHATEVER = "mDPO is lower than DPO whatever the pairs are like."


def sweep(title, label, knob, arms, text="", claim=WHATEVER, **more):
    """mDPO and DPO along one condition: {its value: (mDPO's arm, DPO's arm)}. knob: "with a cue of {}"."""
    conditions = tuple((SHARE_WORDS.get(what, what) if "captions" in knob else what, *two)
                       for what, two in arms.items())
    return Table(
        "Sweep", title, claim, "CHAIR_s of mDPO is lower than DPO's at each value.",
        tuple(arm for two in arms.values() for arm in two),
        rules.both([(knob, *each) for each in conditions], text), seeds=2, exploratory=True,
        figure="lines", xlabel=label, conditions=conditions, knob=knob, **more,
        x=tuple((arm, method, float(what)) for what, two in arms.items()
                for method, arm in zip(("mDPO", "DPO"), two, strict=True)))


def along(knob, values, own):
    """{value: (mDPO's arm, DPO's arm)}; own: each method's own value, where the arm is the method."""
    own = dict(zip(("mDPO", "DPO"), own, strict=True))
    return {v: tuple(m if own[m] == v else f"{m}, {knob} {v}" for m in own) for v in values}


def with_more(found, text):
    parts, first = found
    return parts, first + text


def where_dpo_catches_up(runs):
    """Where the sweeps do not show mDPO lower than DPO, for Table 1."""
    places = []
    for table in TABLES.values():
        if set(table.arms) <= set(runs.by):
            values = [at for at, a, b in table.conditions if not runs.lower(a, b)]
            places += [table.knob.format(rules.listed(values))] if values else []
    if not places:
        return ""
    return f" mDPO is not shown to be lower than DPO {'; '.join(places)} (the sweeps, below)."


HAL = "Object HalBench CHAIR_s, Bunny-3B"
MMHAL = "MMHal-Bench, adversarial (0-6), Bunny-3B"
TABLES = {
    "fig1": Table(
        "mDPO, Fig. 1", "DPO with and without the images",
        "DPO trained with the images taken away does about as well as DPO.",
        f"The two are equal: the 90% interval of the difference of CHAIR_s lies within {MARGIN} points, and "
        "at least one of the two trains.", ("DPO", "DPO without image"), rules.fig1, main=True,
        shown=("before", "DPO", "DPO without image"),
        against="DPO"),
    "table1": Table(
        "mDPO, Table 1", "The base, DPO and mDPO", "mDPO hallucinates less than DPO and than the base.",
        "CHAIR_s of mDPO is lower than DPO's and than the base's.", ("mDPO", "DPO"),
        lambda runs: with_more(rules.table1(runs), where_dpo_catches_up(runs)), main=True,
        shown=("before", "DPO", "mDPO"), against="mDPO",
        columns=("chair_s", "chair_i", "cover", "cog", *COLUMNS[3:]),
        published=(("before", {HAL: 43.0, "LLaVA-1.5-7B": 54.7}), ("DPO", {HAL: 44.3, "LLaVA-1.5-7B": 49.0}),
                   ("mDPO", {HAL: 27.0, "LLaVA-1.5-7B": 35.7})), published_measure=HAL),
    "fig4": Table(
        "mDPO, Fig. 4", "A blind comparison of captions",
        "People find mDPO's answer better than DPO's, or as good, in 89%.",
        "A judge by rule (less invented, then more named) sees mDPO win against DPO more often than lose: "
        "the interval of wins minus losses lies above 0.", ("mDPO", "DPO"), rules.fig4, main=True,
        figure="stacked", metric="win", columns=("win", "tie", "loss")),
    "fig5": Table(
        "mDPO, Fig. 5", "How much data",
        "mDPO is better at every size and gains from more pairs; DPO does not gain.",
        "CHAIR_s of mDPO is lower than DPO's at 250, 500 and 1,000 pairs, and lower at 1,000 than at 250; "
        f"DPO's is not {MARGIN} points lower at 1,000 than at 250 (the 95% interval of the change lies above "
        f"-{MARGIN}), and DPO trains. The last part asked less before: that DPO's was not lower.",
        tuple(sized(m, n) for m in ("mDPO", "DPO") for n in SIZES), rules.fig5, figure="lines",
        x=tuple((sized(m, n), m, n) for m in ("mDPO", "DPO") for n in SIZES), xlabel="pairs", xlog=True),
    "table2": Table(
        "mDPO, Table 2", "Without CoPO, without AncPO", "Both terms help, CoPO more.",
        "CHAIR_s of mDPO is lower than without CoPO, than without AncPO and than without both; without AncPO "
        "it is lower than without CoPO.",
        ("mDPO", "DPO + AncPO", "DPO + CoPO", "DPO"), rules.table2, main=True, against="mDPO",
        published=(("mDPO", {HAL: 27.0}), ("DPO + AncPO", {HAL: 40.3}), ("DPO + CoPO", {HAL: 34.3}),
                   ("DPO", {HAL: 44.3})), published_measure=HAL),
    "table3": Table(
        "mDPO, Table 3", "Which rejected image", "A crop that keeps 0-20% is the best rejected image.",
        "CHAIR_s with crop 0-20 is lower than with each of the others.",
        ("mDPO", "random image", "crop 20-50", "MoCo v2"),
        rules.crop_against({"random image": "a random image", "crop 20-50": "a crop of 20-50%",
                            "MoCo v2": "MoCo v2"}, "The sweep over the crop's area (below) has more."),
        main=True, against="mDPO",
        published=(("random image", {HAL: 40.7}), ("mDPO", {HAL: 27.0}), ("crop 20-50", {HAL: 33.7}),
                   ("MoCo v2", {HAL: 32.3})), published_measure=HAL),
    "table4": Table(
        "mDPO, Table 4", "What is anchored", "Anchors on the rejected answer or image bring little.",
        f"With more anchors CHAIR_s is not {MARGIN} points lower: the 95% interval of the change lies above "
        f"-{MARGIN}, and at least one of the two trains.",
        ("mDPO", "anchors y_w, y_l", "anchors y_w, y_l, m_l"), rules.table4, against="mDPO",
        published=(("mDPO", {HAL: 27.0}), ("anchors y_w, y_l", {HAL: 29.3}),
                   ("anchors y_w, y_l, m_l", {HAL: 34.7})), published_measure=HAL),
    "table5": Table(
        "mDPO, Table 5", "By kind of question",
        "mDPO is better than DPO on most kinds of question, most of all on false premises.",
        "Accuracy of mDPO on false premises is higher than DPO's (95%), and its mean is higher on more than "
        "half of the five kinds.", ("mDPO", "DPO"), rules.by_kind("mDPO", "DPO"), metric="false_premise",
        shown=("before", "DPO", "mDPO"), columns=(*KINDS, "chair_s"), against="DPO",
        published=(("before", {MMHAL: .83}), ("DPO", {MMHAL: 1.50}), ("mDPO", {MMHAL: 4.17}))),
    "table5-careless": Table(
        "Control, for mDPO's Table 5", "By kind of question, on bases that say yes to everything",
        "Where the base errs on false premises, mDPO corrects it and DPO does not.",
        "As for Table 5, on bases that were taught to affirm what is not there, with questions of all kinds "
        "among the pairs.", ("mDPO, careless base", "DPO, careless base"),
        rules.by_kind("mDPO, careless base", "DPO, careless base"), metric="false_premise",
        columns=(*KINDS, "chair_s"), against="DPO, careless base"),
    "control-sft": Table(
        "Control", "Imitation alone", "mDPO does more than SFT on the chosen answers.",
        "CHAIR_s of mDPO is lower than SFT's.", ("mDPO", "SFT on the chosen"),
        rules.against("mDPO", "SFT on the chosen", "Four in five chosen captions are true.",
                      lambda runs: rules.where_half_is_true(runs, "SFT on the chosen")),
        against="SFT on the chosen"),
    "control-onpolicy": Table(
        "Control", "The model's own samples, ranked by a noisy scorer",
        "mDPO is better than DPO on on-policy pairs too.",
        "CHAIR_s of mDPO is lower than DPO's on pairs of the base's own samples.",
        ("mDPO, on policy", "DPO, on policy"), rules.against("mDPO, on policy", "DPO, on policy", ""),
        against="mDPO, on policy"),
    "control-place": Table(
        "Control", "Where the invented words are",
        "mDPO is better than DPO wherever in the caption the invented words are.",
        "CHAIR_s of mDPO is lower than DPO's with the words in random places and at the end.",
        ("mDPO", "DPO", "mDPO, invented words last", "DPO, invented words last"),
        rules.both([("{}", "in random places", "mDPO", "DPO"),
                    ("{}", "at the end", "mDPO, invented words last", "DPO, invented words last")])),
    "control-crop": Table(
        "Control", "Content or magnification",
        "CoPO learns that content is missing, not that the picture is enlarged.",
        f"A patch (what the crop keeps, neither moved nor enlarged) does as well as the crop: the 90% "
        f"interval of the difference of CHAIR_s lies within {MARGIN} points, and at least one of the two "
        "trains.",
        ("mDPO", "patch"), rules.patch, against="mDPO"),
    "equal-compute": Table(
        "Control", "Equal compute", "mDPO is better than DPO that runs as long.",
        "CHAIR_s of mDPO is lower than that of DPO with five epochs instead of three: a pair is three "
        "sequences of mDPO's, and two of DPO's.", ("mDPO", "DPO, equal compute"),
        rules.against("mDPO", "DPO, equal compute", ""), against="mDPO"),
    "equal-kl": Table(
        "Control", "Equal distance from the reference", "At the same KL mDPO is better than DPO.",
        f"CHAIR_s of mDPO is lower than DPO's at {', '.join(map(str, NATS))} nats from the reference, read "
        "off straight lines between the runs of a base and seed at five learning rates, from the base at 0 "
        "nats. Written when the first of its seeds had been seen.",
        tuple(f"{m}, lr {rate}" for rate in study.RATES for m in ("mDPO", "DPO")), rules.equal_kl,
        knob="at a learning rate of {}",
        conditions=tuple((rate, f"mDPO, lr {rate}", f"DPO, lr {rate}") for rate in study.RATES),
        seeds=2, exploratory=True, figure="lines", xlabel="KL, nats an answer", xlog=True,
        x=tuple((f"{m}, lr {rate}", m, "kl") for rate in study.RATES for m in ("mDPO", "DPO"))),
    "sweep-gap": sweep("When the rejected names more objects", "objects named, rejected minus chosen",
                       "with a gap of {} objects", along("gap", ("0", "0.5", "1"), own=("0", "0"))),
    "sweep-cue": sweep("When words alone tell the rejected", "cue: 1, words alone tell; 0, they tell nothing",
                       "with a cue of {}", along("cue", ("0", "0.5", "1"), own=("1", "1"))),
    "sweep-faithful": sweep("When the chosen is true more or less often", "share of true chosen captions",
                            TRUE, along("faithful", SHARES, own=("0.8", "0.8"))),
    "sweep-imitation": Table(
        "Sweep", "Where imitation is not enough",
        "The less the chosen captions are true, the more mDPO has over their imitation and over AncPO alone.",
        "CHAIR_s of mDPO is lower than SFT's on the chosen, and than without CoPO, at each share of true "
        "chosen captions.", tuple(of_share(m, x) for m in IMITATORS for x in SHARES),
        rules.both([(f"against {m} {TRUE}", SHARE_WORDS[x], of_share("mDPO", x), of_share(m, x))
                    for m in IMITATORS[1:] for x in SHARES], method="each"), seeds=2, exploratory=True,
        figure="lines", xlabel="share of true chosen captions",
        x=tuple((of_share(m, x), m, float(x)) for m in IMITATORS for x in SHARES)),
    "sweep-beta": sweep("Beta", "beta", "at a beta of {}",
                        along("beta", ("0.03", "0.1", "0.3", "1"), own=("0.1", "0.3")),
                        "Each method has its own learning rate.", "mDPO is lower than DPO whatever beta is.",
                        xlog=True),
    "sweep-crop": Table(
        "Sweep", "The crop's area", "The less of the image the crop keeps, the better.",
        "CHAIR_s with crop 0-20 is lower than with more of the image kept; all of it is mDPO without CoPO.",
        ("mDPO", "crop 20-50", "crop 50-80", "crop 80-100", "DPO + AncPO"),
        rules.crop_against({f"crop {kept}": f"a crop of {kept}%" for kept in ("20-50", "50-80", "80-100")} | {
                            "DPO + AncPO": "the whole image"}), seeds=2, exploratory=True,
        against="mDPO", figure="lines", xlabel="percent of the image kept",
        x=(("mDPO", "mDPO", 10), ("crop 20-50", "mDPO", 35), ("crop 50-80", "mDPO", 65),
           ("crop 80-100", "mDPO", 90), ("DPO + AncPO", "mDPO", 100))),
    "pds-table2": Table(
        "PDS-DPO, Table 2", "Synthetic pairs",
        "DPO on synthetic pairs makes the model hallucinate less and costs it nothing else.",
        "On ArmoRM's pairs CHAIR_s falls (the 95% interval of the change lies below 0) and POPE random falls "
        f"by less than {POPE} point (its interval lies above -{POPE}).", SYNTHETIC, rules.synthetic,
        shown=("before", *SYNTHETIC), against=SYNTHETIC[0]),
    "pds-table3": Table(
        "PDS-DPO, Table 3", "How many synthetic pairs", "More synthetic pairs do more.",
        "CHAIR_s with all pairs is lower than with a quarter of them.",
        ("a quarter of ArmoRM's pairs", "half of ArmoRM's pairs", SYNTHETIC[0]), rules.more_synthetic,
        figure="lines", xlabel="share of the pairs, %",
        x=tuple((arm, "DPO", x) for arm, x in (("a quarter of ArmoRM's pairs", 25),
                                               ("half of ArmoRM's pairs", 50), (SYNTHETIC[0], 100)))),
    "pds-tied": Table(
        "PDS-DPO, Table 2, under its condition", "Where the better speaker sees better",
        "DPO on pairs that a reward ranks by their words makes a model hallucinate less where good language "
        "comes with good sight, and more where it comes with bad sight.",
        "Four responders of stated skill (classroom/responders.py). Where language is tied to sight, CHAIR_s "
        f"falls from the base's and Cover falls by less than {study.COVER} points (95% intervals); where it "
        "is opposed, CHAIR_s rises; each with a length penalty and without. Nothing is claimed where "
        "language says nothing about sight.", tuple(ties.ARMS), ties.tied, against="before",
        figure="lines", xlabel="correlation of language with sight",
        x=tuple((tie + says, where.removeprefix("with "), ties.CORRELATION[tie])
                for says, (_, where) in ties.REWARDS.items() for tie in ties.TIES)),
    "pds-penalty": Table(
        "Control, for PDS-DPO's Table 2", "A reward that minds every word",
        "A length penalty makes the reward's pairs better, whatever language says about sight.",
        "CHAIR_s is lower with the penalty than without where language is tied to sight, untied and opposed.",
        tuple(ties.ARMS), ties.penalty),
}


# ---------------------------------------------------------------------------------------- findings
def finding(name, lines):
    """A table's finding for page.py, from the lines of its runs; "not run" where an arm has none."""
    t = TABLES[name]
    wanted = {arm for arm in t.arms}
    runs = Runs(lines)
    base = {"name": name, "paper": t.paper, "title": t.title, "claim": t.claim, "rule": t.rule,
            "metric": t.metric, "exploratory": t.exploratory, "rows": [], "contrasts": [], "figure": t.figure,
            "paper_measure": t.published_measure, "xlabel": t.xlabel, "xlog": t.xlog,
            "columns": list(t.columns), "trace": "", "links": {}}
    missing = wanted - set(runs.by)
    if missing:
        return base | {"verdict": "not run", "found": f"Not run: {', '.join(sorted(missing))}.",
                       "figure": None}
    parts, text = t.verdict(runs)
    numbers = sorted(line["number"] for arm in wanted for line in runs.by[arm].values())
    return base | {"verdict": rules.verdict_of(parts), "found": rules.told(parts, text),
                   "rows": rows(t, runs), "contrasts": contrasts(t, runs),
                   "parts": [shown(part, t) for part in parts],
                   "trace": f"lines {spans(numbers)} of results/reproduce.jsonl"}


def shown(part, t):
    """A part for the page, with the paper's own difference where it has one in the same measure."""
    theirs = [dict(t.published).get(arm, {}).get(HAL) for arm in part.arms]
    paper = theirs[0] - theirs[1] if len(theirs) == 2 and None not in theirs else None
    return {"what": part.words.format(part.at), "holds": part.holds, "difference": part.difference,
            "claimed": part.claimed, "paper": paper, "note": part.note}


def rows(t, runs):
    if t.figure == "stacked":
        shares = rules.judged_shares(runs, "mDPO", "DPO")
        values = {k: possible({b: [s[k] for s in v] for b, v in shares.items()}, k) for k in t.columns}
        return [{"arm": "mDPO against DPO", "runs": sum(map(len, shares.values())), "values": values,
                 "bases": {}, "paper": {}}]
    published, out = dict(t.published), []
    for arm, series, x in t.x or [(arm, None, None) for arm in t.shown or t.arms]:
        measures = {m: runs.values(arm, m) for m in dict.fromkeys((t.metric, *t.columns))}
        row = {"arm": "crop 0-20 (mDPO)" if arm == "mDPO" and "random image" in t.arms else arm,
               "runs": sum(map(len, measures[t.metric].values())),
               "values": {m: possible(v, m) for m, v in measures.items()},
               "bases": {m: {b: statistics.mean(x) for b, x in v.items()} for m, v in measures.items()},
               "undefined": {m: lacking for m, v in measures.items() if (lacking := undefined(v, m))},
               "paper": published.get(arm, {})}
        if series:
            row |= {"series": series, "x": nested(runs.values(arm, "kl"))[0] if x == "kl" else x}
        out.append(row)
    return out


def undefined(values, measure):
    """In how many runs a measure is 0/0, as CHAIR_i is where no caption names an object."""
    return sum(math.isnan(x) for v in values.values() for x in v) if measure == "chair_i" else 0


def contrasts(t, runs):
    if not t.against:
        return []
    compared = [(arm, t.against) for arm in t.shown or t.arms if arm not in (t.against, "before")]
    compared += [(t.against, "before")] if "before" in t.shown else []
    return [{"what": f"{a} - {b}", "metric": t.metric, "level": 95,
             "difference": runs.difference(a, b, t.metric)} for a, b in compared]


def spans(numbers):
    """[1, 2, 3, 7] -> "1-3, 7"."""
    out = []
    for n in numbers:
        if out and out[-1][1] == n - 1:
            out[-1][1] = n
        else:
            out.append([n, n])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in out)


def about(lines):
    """What holds for the whole page."""
    bases, seeds = ({line[k] for line in lines} for k in ("base", "seed"))
    few = len(bases) < len(study.BASES) or len(seeds) < 3
    return {"runs": len(lines), "bases": len(bases), "seeds": len(seeds), "scenes": 1000,
            "few": f"A look, not a result: intervals over {len(bases)} of {len(study.BASES)} bases and "
                   f"{len(seeds)} seeds are wide, and a claim that the data cannot tell from its contrary "
                   "“does not appear”." if few else "",
            "seeds_used": f"Seeds {spans(sorted(seeds))} and the printed scenes of --eval_seed 1, which no "
                          "tuning run and no other table uses.",
            "intervals": "95%, Student's over "
                         + ("the bases' means (scenes in seeds in bases)" if len(bases) > 1 else
                            "the seeds of one base")
                         + "; differences are taken within a base and seed. A share's interval is on the "
                         "logit scale, so that it ends within 0 and 100; that of KL and of a caption's words "
                         "on the logarithm's. A measure that is 0/0 is undefined, and no mean counts it.",
            "settings": [{"method": m, "options": o} for m, o in study.best_settings().items()]}
