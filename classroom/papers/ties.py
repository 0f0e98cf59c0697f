"""Where PDS-DPO's recipe helps and where it hurts: DPO on the pairs of classroom/responders.py, by how far
the language of the responders is tied to their sight. For reproduce.py: pds-tied, pds-penalty.

All that follows was written before any model was trained on these pairs.

What is run. 3 ties (tied, untied, opposed) x 2 rewards (ArmoRM as it is, ArmoRM less a penalty a word) x 3
bases x seeds 10 to 14: 90 runs of train_dpo.py, each on 1000 pairs of its own seed, examined on the printed
scenes of --eval_seed 1.

Settings. Those of all synthetic pairs (study.py synthetic): DPO at the rate that the oracle's pairs chose on
tuning scenes, 2e-5, and the preset's beta, epochs and batch. Nothing is tuned on these pairs, and all six
conditions have the same.

What was calibrated, on the words of the pairs alone: see classroom/responders.py. results/ties.json has the
statistics.

Helps: CHAIR_s falls (the 95% interval of the change from the base lies below 0) and Cover falls by less than
6 points, study.py's bound (the interval of its change lies above -6). Hurts: CHAIR_s rises (its interval lies
above 0). Says less: CHAIR_s falls and Cover is not shown to be kept. Shows no change: none of these, which is
not to say that there is none. Intervals are over the three bases, as everywhere.

pds-tied     the recipe helps where language is tied to sight, and hurts where it is opposed, with either
             reward: four parts. Nothing is claimed of untied; what it does is reported.
pds-penalty  CHAIR_s is lower with the penalty than without, for each of the three ties: three parts.
"""
if __name__ == "__main__":
    exit("A part of reproduce.py; run: python classroom/papers/reproduce.py --help")

import data
from classroom.papers import rules, study
from classroom.responders import FOUND, TIES

REWARDS = {"": ("", "with ArmoRM alone"),
           ", length penalty": (" --length_penalty", "with a length penalty")}
ARMS = {f"{tie}{says}": f"--set 'pair_options=--responders={tie}{option}'"
        for says, (option, _) in REWARDS.items() for tie in TIES}
CORRELATION = {"tied": 1, "untied": 0, "opposed": -1}      # of the grades of language and of sight
WHERE = {"tied": "where language is tied to sight, {}", "opposed": "where it is opposed, {}"}
SENTENCES = {"tied": "Where the better speaker sees better",
             "untied": "Where language says nothing about sight",
             "opposed": "Where the better speaker sees worse"}
DOES = {"helps": "helps", "hurts": "hurts", "less": "makes the model say less", "": "shows no change"}


def statistics():
    return data.read_json(FOUND, {})


def effect(runs, arm):
    """helps, hurts, less or "", by the rule above."""
    _, low, high = runs.difference(arm, "before")
    if low is None or low <= 0 <= high:
        return ""
    kept = runs.difference(arm, "before", "cover")[1] > -study.COVER
    return "hurts" if low > 0 else "helps" if kept else "less"


def claimed(runs, tie, says, wanted):
    """The part of the claim that is made of an arm."""
    arm, (_, at) = tie + says, REWARDS[says]
    found, bounds = effect(runs, arm), (None, 0) if wanted == "helps" else (0, None)
    note = f"Cover is not shown to be kept within {study.COVER} points" if found == "less" else ""
    return rules.Part(WHERE[tie], at, found == wanted, runs.difference(arm, "before"), bounds,
                      (arm, "before"), note)


def tied(runs):
    parts = [claimed(runs, tie, says, wanted) for tie, wanted in (("tied", "helps"), ("opposed", "hurts"))
             for says in REWARDS]
    found = statistics()
    told = []
    for tie, words in SENTENCES.items():
        does = []
        for says, (_, where) in REWARDS.items():
            arm = tie + says
            truer = f"the truer answer is chosen in {found[arm]['truer']:.0f}%; " if arm in found else ""
            does.append(f"{where} the recipe {DOES[effect(runs, arm)]} ({truer}CHAIR_s changes by "
                        f"{rules.said(runs, arm, 'before')}, Cover by "
                        f"{rules.said(runs, arm, 'before', 'cover')})")
        told.append(f"{words}, {' and '.join(does)}.")
    return parts, " ".join(told)


def penalty(runs):
    parts = [rules.lower(runs, f"{tie}, length penalty", tie, "where sight and language are {}", tie)
             for tie in TIES]
    changes = ", ".join(f"{rules.points(part.difference)} where they are {part.at} (Cover "
                        f"{rules.said(runs, *part.arms, 'cover')})" for part in parts)
    return parts, f"With the penalty minus without, CHAIR_s: {changes}."
