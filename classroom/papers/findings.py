"""The papers' tables and figures, for reproduce.py: what each claims, the rule by which it appears here, and
the verdict.

Every table has one primary measure and one rule, written before its runs were made; what else it shows is
exploratory, as is a table of fewer seeds, or whose rule came after a first look. The primary measure is
CHAIR_s on 1000 printed scenes unless it says otherwise; evidence.py says what "lower" and "equal" mean and
how intervals are made.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of reproduce.py; run: python classroom/papers/reproduce.py --help"))

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from classroom.papers import pds, study
from classroom.papers.evidence import MARGIN, Runs, judged, nested, value
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
         "the oracle's pairs": "pairs-oracle"}.items()}


# ---------------------------------------------------------------------------------------- tables
@dataclass(frozen=True)
class Table:
    paper: str                     # which table or figure
    title: str
    claim: str
    rule: str
    arms: tuple                    # what must be run
    verdict: Callable              # Runs -> (verdict, what was found)
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


def span(difference):
    mean, low, high = difference
    return f"{mean:+.1f}" + (f" ({low:+.1f} to {high:+.1f})" if low is not None else "")


def said(runs, a, b, measure="chair_s", level=95):
    return span(runs.difference(a, b, measure, level))


def parts(found, text):
    """{part: whether it holds} -> (the verdict, the text and what does not hold)."""
    held, lacking = ("; ".join(part for part, holds in found.items() if holds == wanted)
                     for wanted in (True, False))
    if not lacking:
        return "appears", text
    text = f"{text.strip()} Not shown when {lacking}."
    return f"appears when {held}" if held else "does not appear", text


def fig1(runs):
    equal = runs.equal("DPO", "DPO without image")
    text = (f"DPO minus DPO without images: {said(runs, 'DPO', 'DPO without image', level=90)} points of "
            f"CHAIR_s, 90% interval. DPO changes its base's CHAIR_s by {said(runs, 'DPO', 'before')}, DPO "
            f"without images by {said(runs, 'DPO without image', 'before')}. Each has the setting that "
            f"tuning "
            f"scenes chose for it, which trains it little. {at_equal_rates()}")
    return "appears" if equal else "does not appear", text


def at_equal_rates():
    """What tuning scenes show of DPO with and without images where both learn as fast (study.py tuning)."""
    found = []
    for rate in study.RATES:
        rows = {(row["name"], row["base"]): row for row in study.read("tuning") if row["seed"] == 100}
        both = [[rows[f"{method}, lr {rate}", base]["after"] for base in study.BASES]
                for method in ("DPO", "DPO without image")]
        chair, cover = ([statistics.mean(x[key] for x in side) for side in both]
                        for key in ("chair_s", "cover"))
        found.append(f"at {rate} {chair[0]:.0f} and {chair[1]:.0f} (Cover {cover[0]:.0f} and {cover[1]:.0f})")
    return ("At equal learning rates, on tuning scenes, CHAIR_s with and without images is "
            + ", ".join(found) + ": the faster both learn, the less they are equal.")


DPO_FAST = ("at higher rates it lowers CHAIR_s by naming less and then nothing (Cover falls with it: the "
            "table of "
            "learning rates in README.md), which the rule for settings does not allow.")


def table1(runs):
    held = {"asked against DPO": runs.lower("mDPO", "DPO"),
            "asked against the base": runs.lower("mDPO", "before")}
    near = runs.equal("DPO", "before")
    text = (f"mDPO minus DPO: {said(runs, 'mDPO', 'DPO')} points of CHAIR_s; minus the base: "
            f"{said(runs, 'mDPO', 'before')}. DPO minus the base: {said(runs, 'DPO', 'before')}, which "
            f"{'is' if near else 'is not shown to be'} within {MARGIN} points, where the paper's DPO ends. "
            f"mDPO changes Cover by {said(runs, 'mDPO', 'before', 'cover')}. DPO has the setting that tuning "
            f"scenes chose ({study.best_settings()['DPO']}): {DPO_FAST}")
    if fails := [f"{what} ({name})" for name, table in TABLES.items() for what, a, b in table.conditions
                 if set(table.arms) <= set(runs.by) and not runs.lower(a, b)]:
        text += f" Where the sweeps do not show mDPO lower than DPO: {', '.join(fails)}."
    return parts(held, text)


def fig4(runs):
    shares = judged_shares(runs, "mDPO", "DPO")
    difference = nested({b: [s["win"] - s["loss"] for s in v] for b, v in shares.items()})
    better = nested({b: [s["win"] + s["tie"] for s in v] for b, v in shares.items()})
    text = (f"mDPO's caption is better or as good in {better[0]:.0f}% of scenes (the paper: 89%); "
            f"wins minus losses {span(difference)} points.")
    return "appears" if (difference[1] or 0) > 0 else "does not appear", text


def judged_shares(runs, a, b):
    out = {}
    for (base, seed), line in sorted(runs.by[a].items()):
        if (base, seed) in runs.by[b]:
            out.setdefault(base, []).append(judged(line, runs.by[b][base, seed]))
    return out


SIZES = (250, 500, 1000)


def sized(method, n):
    return method if n == 1000 else f"{method}, {n} pairs"


def fig5(runs):
    held = {f"asked of {n} pairs": runs.lower(sized("mDPO", n), sized("DPO", n)) for n in SIZES}
    held["asked of mDPO's gain from more pairs"] = runs.lower("mDPO", sized("mDPO", 250))
    held["asked of DPO, which gains nothing"] = not runs.lower("DPO", sized("DPO", 250))
    text = (f"From 250 to 1000 pairs mDPO's CHAIR_s changes by {said(runs, 'mDPO', sized('mDPO', 250))}, "
            f"DPO's by {said(runs, 'DPO', sized('DPO', 250))}; Cover by "
            f"{said(runs, 'mDPO', sized('mDPO', 250), 'cover')} and "
            f"{said(runs, 'DPO', sized('DPO', 250), 'cover')}. mDPO minus DPO: "
            + ", ".join(f"{said(runs, sized('mDPO', n), sized('DPO', n))} at {n}" for n in SIZES) + ".")
    if (runs.difference("mDPO", sized("mDPO", 250), "cover")[1] or 0) > 0:
        text += " What mDPO gains from more pairs is Cover: with few it invents as little, and names less."
    return parts(held, text)


def table2(runs):
    without = {"CoPO": "DPO + AncPO", "AncPO": "DPO + CoPO", "both": "DPO"}
    held = {f"{term} is removed" if term != "both" else "both are removed": runs.lower("mDPO", arm)
            for term, arm in without.items()}
    held["CoPO's removal costs more than AncPO's"] = runs.lower("DPO + CoPO", "DPO + AncPO")
    text = "Against mDPO, CHAIR_s changes by " + ", ".join(
        f"{said(runs, arm, 'mDPO')} without {term}" for term, arm in without.items()) + (
        f". Without CoPO minus without AncPO: {said(runs, 'DPO + AncPO', 'DPO + CoPO')}."
        + where_half_is_true(runs, "DPO + AncPO"))
    return parts(held, text)


def crop_against(*others, text=""):
    """A verdict on the rejected image: where the crop is lower than another."""
    def verdict(runs):
        held = {f"the other is {arm}": runs.lower("mDPO", arm) for arm in others}
        told = ", ".join(f"{said(runs, arm, 'mDPO')} with {arm}" for arm in others)
        return parts(held, f"Against crop 0-20, CHAIR_s changes by {told}. {text}")
    return verdict


def table4(runs):
    more = ("anchors y_w, y_l", "anchors y_w, y_l, m_l")
    low = {arm: runs.difference(arm, "mDPO")[1] for arm in more}
    held = {arm.replace("anchors y_w, ", "the anchor is also on "): x is not None and x > -MARGIN
            for arm, x in low.items()}
    text = "Against an anchor on y_w alone, CHAIR_s changes by " + ", ".join(
        f"{said(runs, arm, 'mDPO')} with {arm}" for arm in more) + "."
    return parts(held, text)


def by_kind(mdpo, dpo):
    def verdict(runs):
        change = {kind: runs.difference(mdpo, dpo, kind) for kind in KINDS}
        better = [kind for kind in KINDS if change[kind][0] > 0]
        false = change["false_premise"][1] is not None and change["false_premise"][1] > 0
        base = {kind: nested(runs.values(mdpo, kind, "before"))[0] for kind in KINDS}
        text = "mDPO minus DPO, in points of accuracy: " + ", ".join(
            f"{kind} {said(runs, mdpo, dpo, kind)}" for kind in KINDS) + (
            ". Their bases answer " + ", ".join(f"{kind} {base[kind]:.0f}%" for kind in KINDS)
            + ": where a base makes no mistakes nothing can be gained.")
        held = {"the question's premise is false": false, "most kinds are counted": len(better) > 2}
        return parts(held, text)
    return verdict


def patch(runs):
    text = f"patch minus crop: {said(runs, 'patch', 'mDPO', level=90)} points of CHAIR_s, 90% interval."
    return "appears" if runs.equal("patch", "mDPO") else "does not appear", text


def against(a, b, text, more=lambda runs: ""):
    """A verdict for a control: whether A is lower than B."""
    def verdict(runs):
        return ("appears" if runs.lower(a, b) else "does not appear",
                f"{a} minus {b}: {said(runs, a, b)} points of CHAIR_s, {said(runs, a, b, 'cover')} of Cover. "
                + text + more(runs))
    return verdict


def at_kl(runs, method, nats, measure):
    """{(base, seed): the measure at this KL}: on straight lines between a method's runs at all learning
    rates, from the base at 0 nats; without those that never go so far."""
    out = {}
    for base, seed in runs.by[f"{method}, lr {study.RATES[0]}"]:
        lines = [runs.by[f"{method}, lr {rate}"].get((base, seed)) for rate in study.RATES]
        if all(lines):
            points = sorted((value(line, "kl", "after"), value(line, measure, "after")) for line in lines)
            kl, values = zip((0, value(lines[0], measure, "before")), *points, strict=True)
            if nats <= kl[-1]:
                out[base, seed] = np.interp(nats, kl, values).item()
    return out


def equal_kl(runs):
    """A verdict at equal KL, within a base and seed in which both methods go so far."""
    held, told = {}, []
    for nats in NATS:
        change = {}
        for measure in ("chair_s", "cover"):
            ours, theirs = (at_kl(runs, method, nats, measure) for method in ("mDPO", "DPO"))
            found = {}
            for base, seed in sorted(ours.keys() & theirs.keys()):
                found.setdefault(base, []).append(ours[base, seed] - theirs[base, seed])
            change[measure] = nested(found) if found else (math.nan, None, None)
        held[f"KL is {nats}"] = (change["chair_s"][2] or 0) < 0
        told.append(f"at {nats} {span(change['chair_s'])} points of CHAIR_s, {span(change['cover'])} of "
                    f"Cover ({sum(map(len, found.values()))} runs each)")
    rates = ", ".join(f"{said(runs, f'mDPO, lr {rate}', f'DPO, lr {rate}')} at {rate}"
                      for rate in study.RATES)
    return parts(held, f"mDPO minus DPO, by KL in nats an answer: {'; '.join(told)}. CHAIR_s by learning "
                       f"rate: {rates}.")


SHARES, IMITATORS = ("0.5", "0.8", "1"), ("mDPO", "DPO + AncPO", "SFT on the chosen")


def where_half_is_true(runs, method):
    """What a method is worth beside mDPO where half of the chosen captions are true: of sweep-imitation."""
    other, ours = (of_share(m, SHARES[0]) for m in (method, "mDPO"))
    if not {other, ours} <= set(runs.by):
        return ""
    return (f" Where half of the chosen captions are true, and not four in five, {method} minus mDPO is "
            f"{said(runs, other, ours)} (sweep-imitation).")


def of_share(method, share):
    return method if share == "0.8" else f"{method}, faithful {share}"


def both(pairs, text="", method="DPO"):
    """A verdict for a sweep of conditions: where mDPO is lower than another method."""
    def verdict(runs):
        held = {what: runs.lower(a, b) for what, a, b in pairs}
        told = "; ".join(f"{what}: {said(runs, a, b)} points of CHAIR_s, {said(runs, a, b, 'cover')} of Cover"
                         for what, a, b in pairs)
        return parts(held, f"mDPO minus {method}: {told}. {text}")
    return verdict


def sweep(title, label, arms, text="", claim="mDPO is lower than DPO whatever the pairs are like.", **more):
    """mDPO and DPO along one condition: {its value: (mDPO's arm, DPO's arm)}."""
    conditions = tuple((what, *two) for what, two in arms.items())
    return Table(
        "Sweep", title, claim, "CHAIR_s of mDPO is lower than DPO's at each value.",
        tuple(arm for two in arms.values() for arm in two), both(conditions, text), seeds=2,
        exploratory=True, figure="lines", xlabel=label, conditions=conditions, **more,
        x=tuple((arm, method, float(what.split()[-1])) for what, *two in conditions
                for method, arm in zip(("mDPO", "DPO"), two, strict=True)))


def along(knob, values, own):
    """{"knob value": (mDPO's arm, DPO's arm)}; own: each method's own value, where the arm is the method."""
    own = dict(zip(("mDPO", "DPO"), own, strict=True))
    return {f"{knob} {v}": tuple(m if own[m] == v else f"{m}, {knob} {v}" for m in own) for v in values}


def synthetic(runs):
    chair = runs.difference("ArmoRM's pairs", "before")
    pope = runs.difference("ArmoRM's pairs", "before", "pope_random_acc")
    held = None not in chair and chair[2] < 0 and pope[1] > -POPE
    others = ", ".join(f"{arm} {said(runs, arm, 'before')}" for arm in SYNTHETIC[1:])
    longer = {name: 100 * found["chosen_longer"] for name, found in pds.analysis().get("longer", {}).items()}
    why = (f" ArmoRM reads no picture, here as in the paper; as the classroom's was trained it prefers the "
           f"answer that says more: the chosen one is the longer in {longer['armorm']:.0f}% of its pairs, in "
           f"{longer['clip']:.0f}% of CLIP's, {longer['oracle']:.0f}% of the oracle's." if longer else "")
    text = (f"On ArmoRM's pairs CHAIR_s changes by {said(runs, SYNTHETIC[0], 'before')}, POPE random by "
            f"{said(runs, SYNTHETIC[0], 'before', 'pope_random_acc')}, Cover by "
            f"{said(runs, SYNTHETIC[0], 'before', 'cover')}. CHAIR_s on other pairs of the same responses: "
            f"{others}. ArmoRM's minus the longer response's: "
            f"{said(runs, SYNTHETIC[0], 'the longer response')}.{why} The oracle is told what the prompt "
            "asks for; it shows what right pairs would do.")
    return "appears" if held else "does not appear", text


def more_synthetic(runs):
    quarter = "a quarter of ArmoRM's pairs"
    text = (f"CHAIR_s with all pairs minus with a quarter of them: {said(runs, SYNTHETIC[0], quarter)}; a "
            f"quarter of them changes the base's by {said(runs, quarter, 'before')}.")
    if runs.lower(quarter, SYNTHETIC[0]):
        text += " More pairs of a reward that teaches hallucination (Table 2) teach more of it."
    return "appears" if runs.lower(SYNTHETIC[0], quarter) else "does not appear", text


NATS = (0.5, 1, 2, 4)                       # of KL from the reference, where methods are compared
POPE = 1                                    # points of POPE that synthetic pairs may cost
SYNTHETIC = ("ArmoRM's pairs", "CLIP's pairs", "the longer response", "random pairs", "the oracle's pairs")
HAL = "Object HalBench CHAIR_s, Bunny-3B"
MMHAL = "MMHal-Bench, adversarial (0-6), Bunny-3B"
TABLES = {
    "fig1": Table(
        "mDPO, Fig. 1", "DPO with and without the images",
        "DPO trained with the images taken away does about as well as DPO.",
        f"The two are equal: the 90% interval of the difference of CHAIR_s lies within {MARGIN} points.",
        ("DPO", "DPO without image"), fig1, main=True, shown=("before", "DPO", "DPO without image"),
        against="DPO"),
    "table1": Table(
        "mDPO, Table 1", "The base, DPO and mDPO", "mDPO hallucinates less than DPO and than the base.",
        "CHAIR_s of mDPO is lower than DPO's and than the base's.", ("mDPO", "DPO"), table1, main=True,
        shown=("before", "DPO", "mDPO"), against="mDPO",
        columns=("chair_s", "chair_i", "cover", "cog", *COLUMNS[3:]),
        published=(("before", {HAL: 43.0, "LLaVA-1.5-7B": 54.7}), ("DPO", {HAL: 44.3, "LLaVA-1.5-7B": 49.0}),
                   ("mDPO", {HAL: 27.0, "LLaVA-1.5-7B": 35.7})), published_measure=HAL),
    "fig4": Table(
        "mDPO, Fig. 4", "A blind comparison of captions",
        "People find mDPO's answer better than DPO's, or as good, in 89%.",
        "A judge by rule (less invented, then more named) sees mDPO win against DPO more often than lose: "
        "the interval of wins minus losses lies above 0.", ("mDPO", "DPO"), fig4, main=True, figure="stacked",
        metric="win", columns=("win", "tie", "loss")),
    "fig5": Table(
        "mDPO, Fig. 5", "How much data",
        "mDPO is better at every size and gains from more pairs; DPO does not gain.",
        "CHAIR_s of mDPO is lower than DPO's at 250, 500 and 1000 pairs, lower at 1000 than at 250; DPO's "
        "is not lower at 1000 than at 250.", tuple(sized(m, n) for m in ("mDPO", "DPO") for n in SIZES), fig5,
        figure="lines", x=tuple((sized(m, n), m, n) for m in ("mDPO", "DPO") for n in SIZES), xlabel="pairs",
        xlog=True),
    "table2": Table(
        "mDPO, Table 2", "Without CoPO, without AncPO", "Both terms help, CoPO more.",
        "CHAIR_s of mDPO is lower than without CoPO, than without AncPO and than without both; without AncPO "
        "it is lower than without CoPO.",
        ("mDPO", "DPO + AncPO", "DPO + CoPO", "DPO"), table2, main=True, against="mDPO",
        published=(("mDPO", {HAL: 27.0}), ("DPO + AncPO", {HAL: 40.3}), ("DPO + CoPO", {HAL: 34.3}),
                   ("DPO", {HAL: 44.3})), published_measure=HAL),
    "table3": Table(
        "mDPO, Table 3", "Which rejected image", "A crop that keeps 0-20% is the best rejected image.",
        "CHAIR_s with crop 0-20 is lower than with each of the others.",
        ("mDPO", "random image", "crop 20-50", "MoCo v2"),
        crop_against("random image", "crop 20-50", "MoCo v2",
                     text="The sweep over the crop's area goes on from here."), main=True, against="mDPO",
        published=(("random image", {HAL: 40.7}), ("mDPO", {HAL: 27.0}), ("crop 20-50", {HAL: 33.7}),
                   ("MoCo v2", {HAL: 32.3})), published_measure=HAL),
    "table4": Table(
        "mDPO, Table 4", "What is anchored", "Anchors on the rejected answer or image bring little.",
        f"With more anchors CHAIR_s is not {MARGIN} points lower: the 95% interval of the change lies above "
        f"-{MARGIN}.", ("mDPO", "anchors y_w, y_l", "anchors y_w, y_l, m_l"), table4, against="mDPO",
        published=(("mDPO", {HAL: 27.0}), ("anchors y_w, y_l", {HAL: 29.3}),
                   ("anchors y_w, y_l, m_l", {HAL: 34.7})), published_measure=HAL),
    "table5": Table(
        "mDPO, Table 5", "By kind of question",
        "mDPO is better than DPO on most kinds of question, most of all on false premises.",
        "Accuracy of mDPO on false premises is higher than DPO's (95%), and its mean is higher on more than "
        "half of the five kinds.", ("mDPO", "DPO"), by_kind("mDPO", "DPO"), metric="false_premise",
        shown=("before", "DPO", "mDPO"), columns=(*KINDS, "chair_s"), against="DPO",
        published=(("before", {MMHAL: .83}), ("DPO", {MMHAL: 1.50}), ("mDPO", {MMHAL: 4.17}))),
    "table5-careless": Table(
        "Control, for mDPO's Table 5", "By kind of question, on bases that say yes to everything",
        "Where the base errs on false premises, mDPO mends it and DPO does not.",
        "As for Table 5, on bases that were taught to affirm what is not there, with questions of all kinds "
        "among the pairs.", ("mDPO, careless base", "DPO, careless base"),
        by_kind("mDPO, careless base", "DPO, careless base"), metric="false_premise",
        columns=(*KINDS, "chair_s"), against="DPO, careless base"),
    "control-sft": Table(
        "Control", "Imitation alone", "mDPO does more than SFT on the chosen answers.",
        "CHAIR_s of mDPO is lower than SFT's.", ("mDPO", "SFT on the chosen"),
        against("mDPO", "SFT on the chosen", "Four in five chosen captions are true.",
                lambda runs: where_half_is_true(runs, "SFT on the chosen")),
        against="SFT on the chosen"),
    "control-onpolicy": Table(
        "Control", "The model's own samples, ranked by a noisy scorer",
        "mDPO is better than DPO on on-policy pairs too.",
        "CHAIR_s of mDPO is lower than DPO's on pairs of the base's own samples.",
        ("mDPO, on policy", "DPO, on policy"), against("mDPO, on policy", "DPO, on policy", ""),
        against="mDPO, on policy"),
    "control-place": Table(
        "Control", "Where the invented words stand",
        "mDPO's gain does not depend on where in the caption the invented words stand.",
        "CHAIR_s of mDPO is lower than DPO's with the words in random places and at the end.",
        ("mDPO", "DPO", "mDPO, invented words last", "DPO, invented words last"),
        both([("random places", "mDPO", "DPO"),
              ("at the end", "mDPO, invented words last", "DPO, invented words last")])),
    "control-crop": Table(
        "Control", "Content or magnification",
        "CoPO learns that content is missing, not that the picture is enlarged.",
        f"A patch (what the crop keeps, neither moved nor enlarged) does as well as the crop: the 90% "
        f"interval of the difference of CHAIR_s lies within {MARGIN} points.", ("mDPO", "patch"), patch,
        against="mDPO"),
    "equal-compute": Table(
        "Control", "Equal compute", "mDPO is better than DPO that runs as long.",
        "CHAIR_s of mDPO is lower than that of DPO with five epochs in place of three: a pair is three "
        "sequences of mDPO's, and two of DPO's.", ("mDPO", "DPO, equal compute"),
        against("mDPO", "DPO, equal compute", ""), against="mDPO"),
    "equal-kl": Table(
        "Control", "Equal distance from the reference", "At the same KL mDPO is better than DPO.",
        f"CHAIR_s of mDPO is lower than DPO's at {', '.join(map(str, NATS))} nats from the reference, read "
        "off straight lines between the runs of a base and seed at five learning rates, from the base at 0 "
        "nats. Written when the first of its seeds had been seen.",
        tuple(f"{m}, lr {rate}" for rate in study.RATES for m in ("mDPO", "DPO")), equal_kl,
        conditions=tuple((f"lr {rate}", f"mDPO, lr {rate}", f"DPO, lr {rate}") for rate in study.RATES),
        seeds=2, exploratory=True, figure="lines", xlabel="KL, nats an answer", xlog=True,
        x=tuple((f"{m}, lr {rate}", m, "kl") for rate in study.RATES for m in ("mDPO", "DPO"))),
    "sweep-gap": sweep("When the rejected names more objects", "objects named, rejected minus chosen",
                       along("gap", ("0", "0.5", "1"), own=("0", "0"))),
    "sweep-cue": sweep("When words alone tell the rejected", "cue: 1, words alone tell; 0, they tell nothing",
                       along("cue", ("0", "0.5", "1"), own=("1", "1"))),
    "sweep-faithful": sweep("When the chosen is true more or less often", "share of true chosen captions",
                            along("faithful", ("0.5", "0.8", "1"), own=("0.8", "0.8"))),
    "sweep-imitation": Table(
        "Sweep", "Where imitation is not enough",
        "The less the chosen captions are true, the more mDPO has over their imitation and over AncPO alone.",
        "CHAIR_s of mDPO is lower than SFT's on the chosen, and than without CoPO, at each share of true "
        "chosen captions.", tuple(of_share(m, x) for m in IMITATORS for x in SHARES),
        both([(f"{m} at {x}", of_share("mDPO", x), of_share(m, x)) for m in IMITATORS[1:] for x in SHARES],
             method="each"), seeds=2, exploratory=True, figure="lines",
        xlabel="share of true chosen captions",
        x=tuple((of_share(m, x), m, float(x)) for m in IMITATORS for x in SHARES)),
    "sweep-beta": sweep("Beta", "beta", along("beta", ("0.03", "0.1", "0.3", "1"), own=("0.1", "0.3")),
                        "Each method has its own learning rate.", "mDPO is lower than DPO whatever beta is.",
                        xlog=True),
    "sweep-crop": Table(
        "Sweep", "The crop's area", "The less of the image the crop keeps, the better.",
        "CHAIR_s with crop 0-20 is lower than with more of the image kept; all of it is mDPO without CoPO.",
        ("mDPO", "crop 20-50", "crop 50-80", "crop 80-100", "DPO + AncPO"),
        crop_against("crop 20-50", "crop 50-80", "crop 80-100", "DPO + AncPO"), seeds=2, exploratory=True,
        against="mDPO", figure="lines", xlabel="percent of the image kept",
        x=(("mDPO", "mDPO", 10), ("crop 20-50", "mDPO", 35), ("crop 50-80", "mDPO", 65),
           ("crop 80-100", "mDPO", 90), ("DPO + AncPO", "mDPO", 100))),
    "pds-table2": Table(
        "PDS-DPO, Table 2", "Synthetic pairs",
        "DPO on synthetic pairs makes the model hallucinate less and costs it nothing else.",
        "On ArmoRM's pairs CHAIR_s falls (the 95% interval of the change lies below 0) and POPE random falls "
        f"by less than {POPE} point (its interval lies above -{POPE}).", SYNTHETIC, synthetic,
        shown=("before", *SYNTHETIC), against=SYNTHETIC[0]),
    "pds-table3": Table(
        "PDS-DPO, Table 3", "How many synthetic pairs", "More synthetic pairs do more.",
        "CHAIR_s with all pairs is lower than with a quarter of them.",
        ("a quarter of ArmoRM's pairs", "half of ArmoRM's pairs", SYNTHETIC[0]), more_synthetic,
        figure="lines", xlabel="share of the pairs, %",
        x=tuple((arm, "DPO", x) for arm, x in (("a quarter of ArmoRM's pairs", 25),
                                               ("half of ArmoRM's pairs", 50), (SYNTHETIC[0], 100)))),
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
    verdict, text = t.verdict(runs)
    numbers = sorted(line["number"] for arm in wanted for line in runs.by[arm].values())
    return base | {"verdict": verdict, "found": text.strip(), "rows": rows(t, runs),
                   "contrasts": contrasts(t, runs),
                   "trace": f"lines {spans(numbers)} of results/reproduce.jsonl"}


def rows(t, runs):
    if t.figure == "stacked":
        shares = judged_shares(runs, "mDPO", "DPO")
        values = {k: nested({b: [s[k] for s in v] for b, v in shares.items()}) for k in t.columns}
        return [{"arm": "mDPO against DPO", "runs": sum(map(len, shares.values())), "values": values,
                 "bases": {}, "paper": {}}]
    published, out = dict(t.published), []
    for arm, series, x in t.x or [(arm, None, None) for arm in t.shown or t.arms]:
        measures = {m: runs.values(arm, m) for m in dict.fromkeys((t.metric, *t.columns))}
        row = {"arm": "crop 0-20 (mDPO)" if arm == "mDPO" and "random image" in t.arms else arm,
               "runs": sum(map(len, measures[t.metric].values())),
               "values": {m: nested(v) for m, v in measures.items()},
               "bases": {m: {b: statistics.mean(x) for b, x in v.items()} for m, v in measures.items()},
               "paper": published.get(arm, {})}
        if series:
            row |= {"series": series, "x": nested(runs.values(arm, "kl"))[0] if x == "kl" else x}
        out.append(row)
    return out


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
                         + "; differences are taken within a base and seed.",
            "settings": [{"method": m, "options": o} for m, o in study.best_settings().items()]}
