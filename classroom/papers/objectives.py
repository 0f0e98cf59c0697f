"""The field's objectives side by side, in one world, under one rule: `reproduce.py objectives`.

Every objective of losses.py and training/objectives.py is an arm, with the beta and the rejected image of its
paper where those are at hand. First each is tried at the same five learning rates, on the first base and on
tuning scenes, and its rate is chosen by study.py's rule: the lowest CHAIR_s among those that cost at most 6
points of Cover. Then it is trained at that rate, 3 bases x 5 seeds, and examined on printed scenes that no
tuning run saw:

    equal pairs      1000 pairs, 3 epochs: as many steps for all
    equal compute    as many sequences as mDPO has in these steps, of 3 a pair: DPO, of 2, takes half as many
                     steps again, S-VCO, of 6, half as many. Those with 3 are not run twice.

A run is a line of results/objectives-tuning.jsonl or results/objectives.jsonl and is not run again; the table
is OBJECTIVES.md. All this was written before any of the runs. --quick: two rates, 250 pairs, fewer scenes,
one base, two seeds, equal pairs alone.

What the classroom lacks: pictures for which the rejected response is the right one, which SymMPO and S-VCO
are made for (another pair's picture stands in), and severities by a judge (HSA's weight is 2 where the
rejected caption invents what is hardly to be expected in such a scene, else 1).
"""
if __name__ == "__main__":
    exit("A part of reproduce.py; run: python classroom/papers/reproduce.py --help")

from dataclasses import dataclass

import data
from classroom.papers import study
from classroom.papers.evidence import Runs, possible
from classroom.world import KINDS

TUNING, LINES = "results/objectives-tuning.jsonl", "results/objectives.jsonl"
PAGE = "OBJECTIVES.md"
RATES = study.RATES
STEPS, SEQUENCES = 189, 3                           # of mDPO: 1000 pairs by 16, three epochs
CHANGES = {                                         # beta and rejected image of the papers; o: ours
    "simpo": "--beta 2",
    "realign": "--image_rejected random",           # o: the paper retrieves a picture that is alike
    "chip": "--image_rejected noise",
    "vdpo": "--loss dpo+vdpo --image_rejected blank",
    "symmpo": "--image_rejected random",            # o
    "svco": "--image_rejected random",              # o
    "hsa": "--set pair_options=--weights",          # o
}
FAMILIES = {                                        # what a family changes: its arms
    "The baselines: the chosen response alone, the margin of two, and the image's margin and anchor with it.":
        ("sft", "dpo", "mdpo"),
    "Another curve over DPO's margin: how hard a pair is pulled once it is right, or may be wrong.":
        ("hinge", "ipo", "cdpo", "robust", "exo"),
    "Another margin: a penalty where the chosen falls, length, severity.": ("dpop", "r_dpo", "hsa"),
    "Each response by itself: the two rewards are held on their sides of 0.":
        ("apo_zero", "apo_down", "nca", "sppo", "bco"),
    "No reference: means over tokens, with a margin or an odds ratio.": ("simpo", "orpo"),
    "DPO with imitation: the chosen response cannot fall.": ("rpo", "mpo"),
    "A second image: the chosen response is to be likelier with its own.":
        ("realign", "chip", "vdpo", "symmpo", "svco"),
}
ARMS = {name: f"--loss {name}" if name != "vdpo" else "" for arms in FAMILIES.values() for name in arms}
ARMS = {name: f"{loss} {CHANGES.get(name, '')}".strip() for name, loss in ARMS.items()}
COLUMNS = {"chair_s": "CHAIR_s ↓", "chair_i": "CHAIR_i ↓", "cover": "Cover ↑",
           "pope_random_acc": "POPE random ↑", "pope_adversarial_acc": "POPE adversarial ↑",
           **{kind: f"{kind.replace('_', ' ')} ↑" for kind in KINDS},
           "chosen": "log p of the chosen, change", "kl": "KL", "look": "look ↑"}


@dataclass(frozen=True)
class Extent:
    """How much is run."""
    rates: tuple
    tuning_bases: tuple
    tuning_seeds: tuple
    bases: tuple
    seeds: tuple
    tuning: str                    # options of a tuning run
    print: str                     # of a printed one
    compute: bool                  # equal compute too


FULL = Extent(RATES, study.BASES[:1], (100,), study.BASES, tuple(range(10, 15)), study.TUNE, "--eval_seed 1",
              True)
QUICK = Extent(("5e-5", "2e-4"), study.BASES[:1], (100,), study.BASES[:1], (10, 11),
               "--set split=tune --set pairs=250 --set scenes=100 --set questions=100 --set look=0",
               "--eval_seed 1 --set pairs=250 --set scenes=200 --set questions=400 --set look=60", False)


# ---------------------------------------------------------------------------------------- cells
def tuning_cells(extent):
    """Every objective at every rate. -> [{"arm", "base", "seed", "options"}]"""
    return [cell(f"{arm}, lr {rate}", base, seed, f"{options} --lr {rate} {extent.tuning}")
            for seed in extent.tuning_seeds for rate in extent.rates for arm, options in ARMS.items()
            for base in extent.tuning_bases]


def cells(extent, tuned):
    """The printed runs, each objective at the rate that the tuning lines choose: seed after seed, first all
    of equal pairs, then those of equal compute."""
    alike, more = [], []
    for seed in extent.seeds:
        for arm, options in ARMS.items():
            line = f"{options} --lr {best_rate(arm, tuned)} {extent.print}"
            alike += [cell(arm, base, seed, line) for base in extent.bases]
            if extent.compute and sequences(arm) != SEQUENCES:
                line = f"{line} {equal_compute(arm)}"
                more += [cell(f"{arm}, equal compute", base, seed, line) for base in extent.bases]
    return alike + more


def cell(arm, base, seed, options):
    return {"arm": arm, "base": base, "seed": seed, "options": options}


def best_rate(arm, tuned):
    """By study.py's rule. Raises UserError where nothing was tried."""
    rates = study.ranked([row | {"name": row["arm"]} for row in tuned], arm)
    if not rates:
        raise data.UserError(f"{arm} has no line in {TUNING}: run reproduce.py objectives")
    return rates[0].removeprefix("lr ")


def sequences(arm):
    """How many sequences of a pair the policy runs: what a step costs."""
    import losses
    from training import objectives
    words = ARMS[arm].split()
    needs = losses.needs(objectives.resolve(words[words.index("--loss") + 1]))
    return sum(map(len, data.grouped(needs | {"chosen"}).values()))


def equal_compute(arm):
    """The options of as many sequences as mDPO's."""
    steps = round(STEPS * SEQUENCES / sequences(arm))
    return f"--epochs {-(-steps * 3 // STEPS)} --max_steps {steps}"


# ---------------------------------------------------------------------------------------- the table
def write(lines, folder, tuned):
    """OBJECTIVES.md of the lines there are. Returns its path."""
    runs = Runs(lines)
    text = ["# The field's objectives side by side", "", __doc__.strip().partition("\n\n")[2], "",
            f"{len(lines)} runs. Intervals are 95%, Student's over the bases' means (over the seeds of one "
            "base); differences are taken within a base and seed. An objective looks if its margin is larger "
            "with the true image than with another of the same theme: the interval lies above 0.", ""]
    for title, suffix in (("Equal pairs", ""), ("Equal compute", ", equal compute")):
        arms = {arm: arm if sequences(arm) == SEQUENCES else arm + suffix for arm in ARMS}
        if not suffix or any(suffix in arm for arm in runs.by):
            text += [f"## {title}", "", *table(runs, arms, tuned), ""]
    text += ["## By family", ""]
    for what, arms in FAMILIES.items():
        text += [paragraph(runs, what, [arm for arm in arms if arm in runs.by]), ""]
    data.atomic_write(folder / PAGE, "\n".join(text))
    return folder / PAGE


def table(runs, arms, tuned):
    """Markdown, sorted by CHAIR_s. arms: {objective: the arm of its runs}; those without a run come last."""
    there = {arm: of for arm, of in arms.items() if of in runs.by}
    order = sorted(there, key=lambda arm: runs.mean(there[arm], "chair_s")[0])
    rows = [["", *COLUMNS.values(), "looks", "CHAIR_s - DPO's", "CHAIR_s - SFT's", "seconds", "lr", "runs"]]
    for arm in order:
        of = there[arm]
        means = {measure: possible(runs.values(of, measure), measure) for measure in COLUMNS}
        low = means["look"][1]
        looks = "–" if low is None else "yes" if low > 0 else "no"
        against = [span(runs.difference(of, there[other])) if other in there and other != arm else "–"
                   for other in ("dpo", "sft")]
        seconds = [line["seconds"] for line in runs.by[of].values()]
        rows.append([arm, *map(number, means.values()), looks, *against, f"{sum(seconds) / len(seconds):.0f}",
                     best_rate(arm, tuned), str(len(seconds))])
    missing = [arm for arm in arms if arm not in there]
    if missing:
        rows.append([f"not run: {', '.join(missing)}", *[""] * (len(rows[0]) - 1)])
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "|" + "---|" * len(rows[0]), *body]


def paragraph(runs, what, arms):
    """What a family changes, what was found, what it costs."""
    if not arms:
        return f"**{what}** Not run."
    chair = {arm: runs.mean(arm, "chair_s")[0] for arm in arms}
    best = min(chair, key=chair.get)
    shown = {measure: number(possible(runs.values(best, measure), measure))
             for measure in ("chair_s", "cover")}
    lower = [arm for arm in arms if arm != "dpo" and "dpo" in runs.by and runs.lower(arm, "dpo")]
    costs = ", ".join(f"{arm} {sequences(arm)}" for arm in arms)
    return (f"**{what}** CHAIR_s is lowest with {best}: {shown['chair_s']}, at a Cover of "
            f"{shown['cover']}. Lower than DPO's: {', '.join(lower) or 'none'}. It costs, "
            f"in sequences a pair: {costs}.")


def number(interval):
    mean, low, high = interval
    if mean != mean:
        return "undefined"
    return f"{mean:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def span(interval):
    mean, low, high = interval
    return f"{mean:+.2f}" + ("" if low is None else f" ({low:+.2f} to {high:+.2f})")
