"""What eval_hallu.py's measures share: answers joined to questions, counts added up, intervals and tests.

    found = tally.read(answers, "pope")                 [Answer(id, text, line)]
    tally.join(names, {id: part}, partial)              duplicates, strangers and gaps are refused
    total, draws = tally.add_up(items, counts, ...)     sums over all items, and over draws of their images
    tally.scored(measure, total, draws)                 a measure of the sums, with 95% intervals
    tally.paired(a_items, b_items, sums)                B - A of each measure, with intervals and a sign test

An item is what is known of one answer: a dict with an `id` and the `image` that it is about. Intervals are
bootstrap intervals over images: images are drawn with replacement, and every ratio is formed anew. Pure
functions; errors are UserError.
"""
import re
from collections import Counter
from typing import NamedTuple

import numpy as np

from data import UserError


# ---- answers ----
class Answer(NamedTuple):
    """An answer to a benchmark's question: its id, what was said, and the whole line of the file."""
    id: object
    text: str
    line: dict


TEXTS = ("answer", "response", "model_answer", "text")    # the first that is there; a question may be a text


def first(record, *keys):
    """The value of the first of these keys that a record has, else None."""
    return next((record[key] for key in keys if key in record), None)


def few(ids):
    """The first of some ids, for a message; one of several parts is (part, id)."""
    names = []
    for name in ids[:5]:
        names.append(" ".join(map(str, name)) if isinstance(name, tuple) else str(name))
    return ", ".join(names) + (", ..." if len(ids) > 5 else "")


def image_number(image):
    """285, "000000000285.jpg" and "COCO_val2014_000000000285.jpg" are COCO's image 285; else None."""
    found = re.fullmatch(r"(?:.*_)?0*(\d{1,7})(?:\.\w+)?", str(image))
    return int(found[1]) if found else None


def read(answers, benchmark):
    """-> [Answer]. Settings are passed over; another benchmark's file, and a line without id or text, are
    refused."""
    found = []
    for number, line in enumerate(answers, 1):
        if not isinstance(line, dict):
            raise UserError(f"answer {number} is no JSON object; give the file that holds the answers")
        if "settings" in line:
            _check_benchmark(line["settings"], benchmark)
            continue
        name, text = first(line, "question_id", "id"), first(line, *TEXTS)
        if name is None and benchmark in ("objhal", "mmhal"):
            name = len(found)                                              # their official files name no id
        if not isinstance(name, int | str) or isinstance(name, bool):
            raise UserError(f"answer {number} has no usable `question_id` or `id`; answer it again")
        if not isinstance(text, str):
            raise UserError(f"answer {number} (id {name}) has no text under any of {', '.join(TEXTS)}; "
                            "answer it again")
        found.append(Answer(name, text, line))
    if not found:
        raise UserError("there are no answers to score; write them with `eval_hallu.py answers`")
    return found


def _check_benchmark(settings, benchmark):
    other = settings.get("benchmark", benchmark) if isinstance(settings, dict) else benchmark
    if other != benchmark:
        raise UserError(f"the answers are to {other}, not to {benchmark}; score them as {other}")


def join(names, parts, partial, what="answers", of="questions"):
    """Refuse duplicates, strangers and gaps among the names. `parts` maps each id that can be answered to its
    part; a part that is answered at all must be answered whole, unless `partial`. -> the coverage"""
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise UserError(f"{len(twice)} {what} appear twice (ids {few(twice)}); keep one of each")
    strangers = [name for name in names if name not in parts]
    if strangers:
        raise UserError(f"{len(strangers)} {what} belong to none of the {of} (ids {few(strangers)}); give "
                        f"the {of} that they belong to")
    begun, answered = {parts[name] for name in names}, set(names)
    asked = [name for name, part in parts.items() if part in begun]
    missing = [name for name in asked if name not in answered]
    if missing and not partial:
        raise UserError(f"{len(missing)} of {len(asked)} {of} have no answer (ids {few(missing)}); "
                        "complete them, or score what is there with --partial")
    return {"answered": len(names), "of": len(asked)}


# ---- sums ----
def ratio(top, bottom):
    """top / bottom; 0/0 is 0, and nan among the resamples."""
    if np.ndim(bottom):
        with np.errstate(invalid="ignore", divide="ignore"):
            return top / bottom
    return float(top / bottom) if bottom else 0.0


class Sums(dict):
    """Counts by name, numbers or (resamples,) arrays; what was never counted is zero."""
    def __missing__(self, key):
        return next(iter(self.values()), 0) * 0

    def of(self, part):
        """The counts of one part, their names without it."""
        return Sums({name: value for (home, name), value in self.items() if home == part})


def add_up(items, counts, seed=0, resamples=1000):
    """-> the Sums of all items' counts, and of `resamples` draws of their images with replacement.

    counts: an item -> {name: number}, whole numbers where the total is read.
    """
    columns, images, entries = {}, {}, []
    for item in items:
        image = images.setdefault(item["image"], len(images))
        for name, number in counts(item).items():
            entries.append((image, columns.setdefault(name, len(columns)), number))
    if not entries:
        return Sums(), Sums()
    table = np.zeros((len(images), len(columns)))
    for image, column, number in entries:
        table[image, column] += number
    draws, rng = np.zeros((resamples, len(columns))), np.random.default_rng(seed)
    for start in range(0, resamples, 100):                               # in blocks, for the memory's sake
        drawn = rng.integers(len(images), size=(min(100, resamples - start), len(images)))
        times = [np.bincount(draw, minlength=len(images)) for draw in drawn]
        draws[start:start + 100] = np.stack(times) @ table
    total = table.sum(0)
    return (Sums({name: int(total[column]) for name, column in columns.items()}),
            Sums({name: draws[:, column] for name, column in columns.items()}))


# ---- intervals ----
def interval(values, point):
    """The middle 95% of the resamples in which the ratio exists."""
    values = values[~np.isnan(values)]
    if not len(values):
        return [point, point]
    return [float(value) for value in np.percentile(values, (2.5, 97.5))]


def intervals(points, draws):
    """95% intervals for every number of `points` that `draws` holds resamples of."""
    return {key: interval(np.atleast_1d(draws[key]), point) for key, point in points.items()
            if isinstance(point, float) and key in draws}


def ratios(sums, table):
    """{name: top / bottom} of a table {name: (top, bottom)}."""
    return {name: ratio(sums[top], sums[bottom]) for name, (top, bottom) in table.items()}


def scored(measure, total, draws):
    """{name: number} that measure makes of the total, with the intervals by the draws under "intervals"."""
    points = measure(total)
    return points | {"intervals": intervals(points, measure(draws))}


# ---- measures that are ratios of sums, in percent: an item adds {measure: (top, bottom)} ----
def parts(sums):
    """What an item adds to the measures, as counts: {(measure, "top"): ..., "bottom": ..., "n": 1}."""
    found = {}
    for measure, (top, bottom) in sums.items():
        found |= {(measure, "top"): top, (measure, "bottom"): bottom, (measure, "n"): 1}
    return found


def percent(sums, measure):
    """100 top / bottom of sums of `parts`."""
    return ratio(100 * sums[measure, "top"], sums[measure, "bottom"])


def paired(a_items, b_items, sums, lower=()):
    """-> {measure: {"a", "b", "change", "interval", "better", "worse", "p", "n"}} of items with equal ids.

    sums: an item -> {measure: (top, bottom)}. Both sides see the same draws of images, which is what pairs
    them. lower: the measures of which less is better, for the counts of items that got better and worse.
    """
    others = {(item.get("split"), item["id"]): item for item in b_items}
    both = []
    for item in a_items:
        other = others.get((item.get("split"), item["id"]))
        if other is not None:
            image = item.get("image") or item["id"]
            both.append({"image": image, "a": sums(item), "b": sums(other)})
    if not both:
        raise UserError("the two files of items have no id in common; give items of the same benchmark")
    total, draws = add_up(both, _of_both)
    signs, found = _signs(both, lower), {}
    old, new, old_draws, new_draws = total.of("a"), total.of("b"), draws.of("a"), draws.of("b")
    for measure in dict.fromkeys(measure for pair in both for measure in pair["a"]):
        a, b = percent(old, measure), percent(new, measure)
        changes = percent(new_draws, measure) - percent(old_draws, measure)
        better, worse = signs[measure, 1], signs[measure, -1]
        found[measure] = {"a": a, "b": b, "change": b - a, "interval": interval(changes, b - a),
                          "better": better, "worse": worse, "p": sign_test(better, worse), "n": len(both)}
    return found


def _of_both(pair):
    return {(side, name): number for side in "ab" for name, number in parts(pair[side]).items()}


def _signs(both, lower):
    """{(measure, 1 or -1): items on which B is better, or worse}."""
    signs = Counter()
    for pair in both:
        for measure, (top, bottom) in pair["a"].items():
            new_top, new_bottom = pair["b"].get(measure, (0, 0))
            if bottom and new_bottom:
                sign = np.sign(new_top / new_bottom - top / bottom)
                signs[measure, -sign if measure in lower else sign] += 1
    return signs


def sign_test(better, worse):
    """The exact two-sided p of so uneven a split under a fair coin; ties do not count."""
    n, term, total = better + worse, 1, 0
    for k in range(min(better, worse) + 1):                     # term is n over k
        total += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2 ** n) if n else 1.0


def columns(cells, widths):
    """One line of a table of text: the first cell on the left of its column, the others on the right."""
    (name, *others), (width, *rest) = cells, widths
    return f"{name:{width}}" + "".join(f"{cell:>{w}}" for cell, w in zip(others, rest, strict=True))
