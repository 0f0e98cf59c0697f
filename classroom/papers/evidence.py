"""What reproduce.py's runs say: means, differences, intervals over scenes in seeds in bases; the blind judge.

Intervals respect the nesting of seeds in bases: a base's value is the mean over its seeds, the interval is
Student's over the bases' values (two degrees of freedom for three bases), so that it speaks of a further base
and not of these three. A difference is taken within a base and seed, where both arms have the same pairs, the
same order and the same scenes. With one base (reproduce.py --quick) the interval is over its seeds.

"A is lower than B": the 95% interval of A - B lies below 0. "Equal": the 90% interval lies within the margin,
which is two one-sided tests at 5%. An arm that does not train equals everything near its base. So "no
difference" can be claimed only where one of the two arms trains: it changes its base's CHAIR_s by more than
the margin, and the 95% interval of that change does not contain 0.

A difference has Student's interval as it is. A mean has it on the scale of what is possible: a share on the
logit scale, so that it ends within 0 and 100; what cannot be negative, such as KL, on the logarithm's.
"""
if __name__ == "__main__":
    exit("A part of reproduce.py; run: python classroom/papers/reproduce.py --help")

import math
import statistics

MARGIN = 5                        # points of CHAIR_s that count as no difference, a tenth of the bases'
T = {95: (0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262),       # Student's, by degrees
     90: (0, 6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)}        # of freedom


def nested(values, level=95):
    """{base: [a run's value]} -> (mean, low, high) over bases, or over one's seeds; None: no interval."""
    units = [statistics.mean(v) for v in values.values()] if len(values) > 1 else [*values.values()][0]
    mean = statistics.mean(units)
    if len(units) < 2 or math.isnan(mean):
        return mean, None, None
    half = T[level][min(len(units), 10) - 1] * statistics.stdev(units) / len(units) ** .5
    return mean, mean - half, mean + half


POSITIVE, ANY_SIGN = ("kl", "words"), ("look", "chosen")               # all others are shares in percent


def possible(values, measure):
    """{base: [a run's value]} -> (mean, low, high), of what is possible for the measure. Runs in which it is
    undefined (nan) are left out; a mean of nan: it is undefined in all, or cannot be right."""
    defined = {base: kept for base, v in values.items() if (kept := [x for x in v if not math.isnan(x)])}
    if not defined:
        return math.nan, None, None
    mean, low, high = nested(defined)
    if low is None or low == high or measure in ANY_SIGN:
        return mean, low, high
    if measure in POSITIVE and mean <= 0:               # below 0 by chance: draw more answers
        return math.nan, None, None
    if measure in POSITIVE:
        ratio = math.exp(min(50, (high - mean) / mean))
        return mean, mean / ratio, mean * ratio
    odds = mean / (100 - mean)
    ratio = math.exp(min(50, 100 * (high - mean) / (mean * (100 - mean))))      # d logit p = dp / (p (1 - p))
    return mean, *(100 * x / (1 + x) for x in (odds / ratio, odds * ratio))


class Runs:
    """The finished runs, by arm: what the rules ask."""

    def __init__(self, lines):
        self.lines, self.by = lines, {}
        for number, line in enumerate(lines, 1):
            self.by.setdefault(line["arm"], {})[line["base"], line["seed"]] = line | {"number": number}

    def values(self, arm, measure, when="after"):
        """{base: [value of each seed]}, seeds in order; an arm called `before` is the bases themselves."""
        if arm == "before":
            arm, when = self.any(), "before"
        out = {}
        for (base, _), line in sorted(self.by[arm].items()):
            out.setdefault(base, []).append(value(line, measure, when))
        return out

    def any(self):
        return max(self.by, key=lambda arm: len(self.by[arm]))

    def mean(self, arm, measure):
        return nested(self.values(arm, measure))

    def difference(self, a, b, measure="chair_s", level=95):
        """A - B within a base and seed -> (mean, low, high). `before` is A's own base."""
        out = {}
        for (base, seed), line in sorted(self.by[a].items()):
            other = line if b == "before" else self.by[b].get((base, seed))
            if other:
                theirs = value(other, measure, "before" if b == "before" else "after")
                out.setdefault(base, []).append(value(line, measure, "after") - theirs)
        return nested(out, level)

    def lower(self, a, b, measure="chair_s"):
        high = self.difference(a, b, measure)[2]
        return high is not None and high < 0

    def trains(self, arm):
        """Does the arm change its base's CHAIR_s, by more than counts as no difference?"""
        mean, low, high = self.difference(arm, "before")
        return low is not None and abs(mean) > MARGIN and not low <= 0 <= high

    def either_trains(self, a, b):
        return any(self.trains(arm) for arm in (a, b) if arm != "before")

    def equal(self, a, b, measure="chair_s", margin=MARGIN):
        """No difference beyond the margin; only where one of the two trains."""
        _, low, high = self.difference(a, b, measure, 90)
        return self.either_trains(a, b) and low is not None and -margin < low and high < margin

    def no_lower(self, a, b, measure="chair_s", margin=MARGIN):
        """A is not lower than B by the margin; only where one of the two trains."""
        low = self.difference(a, b, measure)[1]
        return self.either_trains(a, b) and low is not None and -margin < low


LOOK = {"kl": ("kl",), "look": ("margin_true_minus", "same_theme"), "chosen": ("logps_chosen_change",)}


def value(line, measure, when):
    """A number of a run: a score, or one of training/look.py's means: `kl`, `look` (the margin with the true
    image minus with another of its theme), `chosen` (how far log p of the chosen moved). nan: not measured,
    or undefined, as CHAIR_i is where no caption names an object.
    """
    if measure == "chair_i" and set(line[when].get("scenes", "")) == {"0"}:
        return math.nan
    if measure not in LOOK:
        return line[when][measure]
    found = line[when].get("look") or {}
    for part in LOOK[measure]:
        found = found.get(part, {})
    return found[0] if found else math.nan


def judged(line, other):
    """The blind judge: scene by scene, the caption that invents less wins, then the one that names more of
    what is there. -> percent {"win", "tie", "loss"} of line against other."""
    counts = {1: 0, 0: 0, -1: 0}
    for a, b in zip(line["after"]["scenes"], other["after"]["scenes"], strict=True):
        (false, true), (false_b, true_b) = divmod(int(a, 36), 6), divmod(int(b, 36), 6)
        mine, theirs = (-false, true), (-false_b, true_b)
        counts[(mine > theirs) - (mine < theirs)] += 1
    total = sum(counts.values())
    return {"win": 100 * counts[1] / total, "tie": 100 * counts[0] / total, "loss": 100 * counts[-1] / total}
