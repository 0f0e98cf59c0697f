"""By which rule a claim appears: the comparisons that it rests on, and what each table found.

A verdict is a function of the Runs that gives its Parts and a text. A Part is one comparison, which holds
where its whole interval is where the claim wants it. The claim appears if all its parts hold, appears in the
parts that do, or does not appear.
"""
if __name__ == "__main__":
    exit("A part of reproduce.py; run: python classroom/papers/reproduce.py --help")

import math
import statistics
from dataclasses import dataclass, replace

import numpy as np

from classroom.papers import pds, study
from classroom.papers.evidence import MARGIN, judged, nested, value
from classroom.papers.finding import flat, three
from classroom.world import KINDS


# ---------------------------------------------------------------------------------------- parts
@dataclass(frozen=True)
class Part:
    """One comparison that a claim rests on. `words` say where it is made, after "appears": "at {} pairs",
    with `at` in the braces. Its interval has to be within `claimed`; None there is no bound."""
    words: str
    at: str
    holds: bool
    difference: tuple | None                   # (mean, low, high) in points; None: it is no difference
    claimed: tuple = (None, 0)
    arms: tuple = ()                           # (A, B) of A - B
    note: str = ""


def lower(runs, a, b, words="", at=""):
    """A's CHAIR_s is lower than B's."""
    return Part(words, at, runs.lower(a, b), runs.difference(a, b), (None, 0), (a, b))


def idle(runs, a, b):
    """Why no difference can be claimed, "" where it can."""
    return "" if runs.either_trains(a, b) else f"no difference can be claimed: {a} does not train"


def same(runs, a, b, words="", at=""):
    """No difference between A and B, of which one trains."""
    difference = runs.difference(a, b, level=90)
    return Part(words, at, runs.equal(a, b), difference, (-MARGIN, MARGIN), (a, b), idle(runs, a, b))


def no_lower(runs, a, b, words="", at="", measure="chair_s", margin=MARGIN):
    """A is not lower than B by the margin, and one of the two trains."""
    holds = runs.no_lower(a, b, measure, margin)
    difference = runs.difference(a, b, measure)
    return Part(words, at, holds, difference, (-margin, None), (a, b), idle(runs, a, b))


def listed(words):
    """["a", "b", "c"] -> "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def phrase(parts):
    """Where these parts are made: those that differ in their value alone are named together."""
    values = {}
    for part in parts:
        values.setdefault(part.words, []).append(part.at)
    return "; ".join(words.format(listed(at)) for words, at in values.items())


def verdict_of(parts):
    held = [part for part in parts if part.holds]
    if len(held) == len(parts):
        return "appears"
    return f"appears {phrase(held)}" if held else "does not appear"


def told(parts, text):
    """The text, and which parts do not hold where others do."""
    lacking = [part for part in parts if not part.holds]
    if not lacking or len(lacking) == len(parts):
        return text.strip()
    return f"{text.strip()} It does not appear {phrase(lacking)}."


def points(difference):
    return flat(three(difference, "chair_s", "+"))


def said(runs, a, b, measure="chair_s", level=95):
    return points(runs.difference(a, b, measure, level))


# ---------------------------------------------------------------------------------------- mDPO
def does_it_train(runs, arm):
    says = "trains" if runs.trains(arm) else "does not train"
    return f"{arm} {says}: it changes its base's CHAIR_s by {said(runs, arm, 'before')}"


def fig1(runs):
    part = same(runs, "DPO", "DPO without image")
    why = "No difference can be claimed: neither arm trains at the setting that tuning scenes chose. "
    text = (f"{why * bool(part.note)}{does_it_train(runs, 'DPO')}. "
            f"{does_it_train(runs, 'DPO without image')}. DPO minus DPO without images: "
            f"{points(part.difference)} points of CHAIR_s, 90% interval. {at_equal_rates()}")
    return [part], text


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
    return ("At higher rates they train, and differ: on tuning scenes, CHAIR_s with and without images is "
            + ", ".join(found) + ".")


DPO_FAST = ("At higher rates DPO lowers CHAIR_s by naming less and finally nothing: Cover falls with it, "
            "which the rule for settings does not allow (see the learning rates in classroom/README.md).")


def table1(runs):
    parts = [lower(runs, "mDPO", "DPO", "against {}", "DPO"),
             lower(runs, "mDPO", "before", "against {}", "the base")]
    return parts, (
        f"mDPO minus DPO: {said(runs, 'mDPO', 'DPO')} points of CHAIR_s. mDPO minus the base: "
        f"{said(runs, 'mDPO', 'before')}. mDPO changes Cover by {said(runs, 'mDPO', 'before', 'cover')}. DPO "
        f"has the setting that tuning scenes chose (`{study.best_settings()['DPO']}`). "
        f"{does_it_train(runs, 'DPO')}. {DPO_FAST}")


def fig4(runs):
    shares = judged_shares(runs, "mDPO", "DPO")
    difference = nested({b: [s["win"] - s["loss"] for s in v] for b, v in shares.items()})
    better = nested({b: [s["win"] + s["tie"] for s in v] for b, v in shares.items()})
    part = Part("", "", (difference[1] or 0) > 0, difference, (0, None))
    return [part], (f"mDPO's caption is better or as good in {better[0]:.0f}% of scenes (the paper: 89%). "
                    f"Wins minus losses: {points(difference)} points.")


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
    few, few_dpo = sized("mDPO", 250), sized("DPO", 250)
    parts = [lower(runs, sized("mDPO", n), sized("DPO", n), "at {} pairs", f"{n:,}") for n in SIZES]
    parts += [lower(runs, "mDPO", few, "for mDPO's gain from more pairs"),
              no_lower(runs, "DPO", few_dpo, "for DPO's lack of one")]
    sizes = ", ".join(f"{points(part.difference)} at {part.at}" for part in parts[:3])
    text = (f"mDPO minus DPO: {sizes} pairs. From 250 to 1,000 pairs mDPO's CHAIR_s changes by "
            f"{said(runs, 'mDPO', few)}, DPO's by {said(runs, 'DPO', few_dpo)}; Cover by "
            f"{said(runs, 'mDPO', few, 'cover')} and {said(runs, 'DPO', few_dpo, 'cover')}.")
    if not runs.either_trains("DPO", few_dpo):
        text += (" That DPO does not gain cannot be claimed, since it does not train: at 1,000 pairs it "
                 f"changes its base's CHAIR_s by {said(runs, 'DPO', 'before')}.")
    if (runs.difference("mDPO", few, "cover")[1] or 0) > 0:
        text += " mDPO gains Cover from more pairs: with few it invents as little, and names less."
    return parts, text


def table2(runs):
    without = {"CoPO": "DPO + AncPO", "AncPO": "DPO + CoPO", "both together": "DPO"}
    parts = [lower(runs, "mDPO", arm, "for {}", term) for term, arm in without.items()]
    parts += [lower(runs, "DPO + CoPO", "DPO + AncPO", "for {}", "CoPO as the more important")]
    text = "Against mDPO, CHAIR_s changes by " + ", ".join(
        f"{said(runs, arm, 'mDPO')} without {term.split()[0]}" for term, arm in without.items()) + (
        f". Without CoPO minus without AncPO: {said(runs, 'DPO + AncPO', 'DPO + CoPO')}."
        + where_half_is_true(runs, "DPO + AncPO"))
    return parts, text


def crop_against(others, text=""):
    """A verdict on the rejected image: {an arm: its name}, where the crop is lower than another."""
    def verdict(runs):
        parts = [lower(runs, "mDPO", arm, "against {}", name) for arm, name in others.items()]
        changes = ", ".join(f"{said(runs, arm, 'mDPO')} with {name}" for arm, name in others.items())
        return parts, f"Against crop 0-20, CHAIR_s changes by {changes}. {text}"
    return verdict


def table4(runs):
    more = {"anchors y_w, y_l": "an anchor on y_l too", "anchors y_w, y_l, m_l": "anchors on y_l and m_l too"}
    parts = [no_lower(runs, arm, "mDPO", "with {}", name) for arm, name in more.items()]
    text = "Against an anchor on y_w alone, CHAIR_s changes by " + ", ".join(
        f"{said(runs, arm, 'mDPO')} with {name}" for arm, name in more.items()) + "."
    return parts, text


def by_kind(mdpo, dpo):
    def verdict(runs):
        change = {kind: runs.difference(mdpo, dpo, kind) for kind in KINDS}
        better = [kind for kind in KINDS if change[kind][0] > 0]
        false = change["false_premise"]
        base = {kind: nested(runs.values(mdpo, kind, "before"))[0] for kind in KINDS}
        parts = [Part("on {}", "false premises", false[1] is not None and false[1] > 0, false, (0, None)),
                 Part("on {}", "most kinds of question", len(better) > 2, None)]
        named = {kind: kind.replace("_", " ") for kind in KINDS}
        text = "mDPO minus DPO, in points of accuracy: " + ", ".join(
            f"{named[kind]} {points(change[kind])}" for kind in KINDS) + (
            ". Their bases are right on " + ", ".join(f"{named[kind]} {base[kind]:.0f}%" for kind in KINDS)
            + ". Where a base makes no mistakes, nothing can be gained.")
        return parts, text
    return verdict


def patch(runs):
    part = same(runs, "patch", "mDPO")
    return [part], (f"Patch minus crop: {points(part.difference)} points of CHAIR_s, 90% interval. "
                    f"{does_it_train(runs, 'mDPO')}.")


def against(a, b, text, more=lambda runs: ""):
    """A verdict for a control: whether A is lower than B."""
    def verdict(runs):
        return [lower(runs, a, b)], (
            f"{a} minus {b}: {said(runs, a, b)} points of CHAIR_s, {said(runs, a, b, 'cover')} of Cover. "
            + text + more(runs))
    return verdict


def both(pairs, text="", method="DPO"):
    """A verdict for a sweep of conditions, [(words, their value, A, B)]: where A is lower than B."""
    def verdict(runs):
        parts = [lower(runs, a, b, words, at) for words, at, a, b in pairs]
        changes = "; ".join(f"{phrase([part])} {points(part.difference)} points of CHAIR_s and "
                            f"{said(runs, *part.arms, 'cover')} of Cover" for part in parts)
        return parts, f"mDPO minus {method}: {changes}. {text}"
    return verdict


NATS = (0.5, 1, 2, 4)                       # of KL from the reference, where methods are compared


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
    parts, texts = [], []
    for nats in NATS:
        change = {}
        for measure in ("chair_s", "cover"):
            ours, theirs = (at_kl(runs, method, nats, measure) for method in ("mDPO", "DPO"))
            found = {}
            for base, seed in sorted(ours.keys() & theirs.keys()):
                found.setdefault(base, []).append(ours[base, seed] - theirs[base, seed])
            change[measure] = nested(found) if found else (math.nan, None, None)
        holds = (change["chair_s"][2] or 0) < 0
        parts.append(Part("at a KL of {} nats", str(nats), holds, change["chair_s"]))
        texts.append(f"at {nats} {points(change['chair_s'])} points of CHAIR_s and {points(change['cover'])} "
                     f"of Cover ({sum(map(len, found.values()))} runs each)")
    rates = ", ".join(f"{said(runs, f'mDPO, lr {rate}', f'DPO, lr {rate}')} at {rate}"
                      for rate in study.RATES)
    return parts, (f"mDPO minus DPO, by KL in nats an answer: {'; '.join(texts)}. The difference of CHAIR_s "
                   f"by learning rate: {rates}.")


SHARE_WORDS = {"0.5": "half", "0.8": "four fifths", "1": "all"}          # of the chosen captions are true
SHARES, IMITATORS = tuple(SHARE_WORDS), ("mDPO", "DPO + AncPO", "SFT on the chosen")
TRUE = "where {} of the chosen captions are true"


def where_half_is_true(runs, method):
    """What a method is worth beside mDPO where half of the chosen captions are true: of sweep-imitation."""
    other, ours = (of_share(m, SHARES[0]) for m in (method, "mDPO"))
    if not {other, ours} <= set(runs.by):
        return ""
    return (f" Where only half of the chosen captions are true, {method} minus mDPO is "
            f"{said(runs, other, ours)} (“Where imitation is not enough”, below).")


def of_share(method, share):
    return method if share == "0.8" else f"{method}, faithful {share}"


# ---------------------------------------------------------------------------------------- PDS-DPO
POPE = 1                                    # points of POPE that synthetic pairs may cost
SYNTHETIC = ("ArmoRM's pairs", "CLIP's pairs", "the longer response", "random pairs", "the oracle's pairs")


def synthetic(runs):
    ours = SYNTHETIC[0]
    falls = lower(runs, ours, "before")
    costs = no_lower(runs, ours, "before", measure="pope_random_acc", margin=POPE)
    others = ", ".join(f"{arm} {said(runs, arm, 'before')}" for arm in SYNTHETIC[1:])
    longer = {name: 100 * found["chosen_longer"] for name, found in pds.analysis().get("longer", {}).items()}
    why = (f" ArmoRM reads no picture, here as in the paper. The classroom's prefers the answer that says "
           f"more: the chosen one is the longer in {longer['armorm']:.0f}% of its pairs, in "
           f"{longer['clip']:.0f}% of CLIP's, {longer['oracle']:.0f}% of the oracle's." if longer else "")
    return [replace(falls, holds=falls.holds and costs.holds)], (
        f"On ArmoRM's pairs CHAIR_s changes by {points(falls.difference)}, POPE random by "
        f"{points(costs.difference)}, Cover by {said(runs, ours, 'before', 'cover')}. CHAIR_s on other pairs "
        f"of the same responses: {others}. ArmoRM's minus the longer response's: "
        f"{said(runs, ours, 'the longer response')}.{why} The oracle knows what the prompt asks for, and "
        "shows what right pairs would do.")


def more_synthetic(runs):
    quarter = "a quarter of ArmoRM's pairs"
    text = (f"CHAIR_s with all pairs minus with a quarter of them: {said(runs, SYNTHETIC[0], quarter)}. A "
            f"quarter of them changes the base's by {said(runs, quarter, 'before')}.")
    if runs.lower(quarter, SYNTHETIC[0]):
        text += " More pairs of a reward that teaches hallucination (Table 2) teach more of it."
    return [lower(runs, SYNTHETIC[0], quarter)], text
