"""What eval_hallu.py's measures share: answers joined to questions, counts added up, intervals and tests.

    found = stats.read(answers, "pope")                 [Answer(id, text, line)]
    stats.join(names, {id: part}, partial)              duplicates, unknown ids and gaps are refused
    total, draws = stats.add_up(items, counts, ...)     sums over all items, and over draws of their images
    stats.scored(measure, total, draws)                 a measure of the sums, with 95% intervals
    stats.paired(a_items, b_items, sums)                B - A of each measure, with intervals and a sign test

An item is a scored answer: a dict with an `id` and the `image` that it is about. Intervals are
bootstrap intervals over images: images are drawn with replacement, and every ratio is taken again. Pure
functions; errors are UserError.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of eval_hallu.py; run: python eval_hallu.py --help"))

import re
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from data import UserError


# ---- answers ----
class Answer(NamedTuple):
    """An answer to a benchmark's question: its id, what was said, and the whole line of the file."""
    id: object
    text: str
    line: dict

    @property
    def question(self):
        """What was asked, "" where the line does not say."""
        return str(first(self.line, "prompt", "question", "query") or "")


TEXTS = ("answer", "response", "model_answer", "text")    # the first that is there; a question may be a text


def first(record, *keys):
    """The value of the first of these keys that a record has, else None."""
    return next((record[key] for key in keys if key in record), None)


def few(ids):
    """The first of some ids, for a message."""
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")


def image_number(image):
    """285, "000000000285.jpg" and "COCO_val2014_000000000285.jpg" are COCO's image 285; else None."""
    found = re.fullmatch(r"(?:.*_)?0*(\d{1,7})(?:\.\w+)?", str(image))
    return int(found[1]) if found else None


def read(answers, benchmark=None):
    """-> [Answer]. Settings are skipped; another benchmark's file, and a line without id or text, are
    refused. benchmark: None for any."""
    found = []
    for number, line in enumerate(answers, 1):
        if not isinstance(line, dict):
            raise UserError(f"answer {number} is not a JSON object; give the file that holds the answers")
        if "settings" in line:
            other = line["settings"].get("benchmark", benchmark)
            if benchmark and other != benchmark:
                raise UserError(f"the answers are to {other}, not to {benchmark}; score them as {other}")
            continue
        name, text = first(line, "question_id", "id"), first(line, *TEXTS)
        if name is None and benchmark in (None, "objhal", "mmhal"):
            name = len(found)                                              # their official files name no id
        if not (isinstance(name, int | str) and isinstance(text, str)):
            raise UserError(f"answer {number} (id {name}) has no text under any of {', '.join(TEXTS)}, or no "
                            "usable `question_id` or `id`; answer it again")
        found.append(Answer(name, text, line))
    if not found:
        raise UserError("there are no answers to score; write them with `eval_hallu.py answers`")
    return found


def once(names, what="answers"):
    """Refuse names that appear twice."""
    twice = [name for name, n in Counter(names).items() if n > 1]
    if twice:
        raise UserError(f"{len(twice)} {what} appear twice (ids {few(twice)}); keep one of each")


def join(names, parts, partial, what="answers", of="questions"):
    """Refuse duplicates, strangers and gaps among the names. `parts` maps each id that can be answered to its
    part; a part that is answered at all must be answered whole, unless `partial`. -> the coverage"""
    once(names, what)
    strangers = [name for name in names if name not in parts]
    if strangers:
        raise UserError(f"{len(strangers)} {what} belong to none of the {of} (ids {few(strangers)}); give "
                        f"the {of} that they belong to")
    begun = {parts[name] for name in names}
    asked = [name for name, part in parts.items() if part in begun]
    answered = set(names)
    missing = [name for name in asked if name not in answered]
    if missing and not partial:
        raise UserError(f"{len(missing)} of {len(asked)} {of} have no answer (ids {few(missing)}); "
                        "complete them, or score the others with --partial")
    return {"answered": len(names), "of": len(asked)}


def join_replies(replies, asked, known, partial, of):
    """Join the replies to what was `asked`; those to what was not, but is known, are passed over."""
    given = [name for name in replies if name in asked or name not in known]
    return join(given, dict.fromkeys(asked, "replies"), partial, "replies", of)


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


def under(parts, counts):
    """Counts of each of some parts: {(part, name): number}, for Sums.of."""
    return {(part, name): number for part in parts for name, number in counts.items()}


def add_up(items, counts, seed=0, resamples=1000):
    """-> the Sums of all items' counts, and of `resamples` draws of their images with replacement.

    counts: an item -> {name: number}, whole numbers if the total is read.
    """
    images = {}
    for item in items:
        images.setdefault(item["image"], len(images))
    columns = defaultdict(lambda: np.zeros(len(images)))                        # name -> its sum by image
    for item in items:
        for name, number in counts(item).items():
            columns[name][images[item["image"]]] += number
    if not columns:
        return Sums(), Sums()
    table = np.stack(list(columns.values()), 1)                                 # (images, names)
    draws, rng = [np.zeros((0, len(columns)))], np.random.default_rng(seed)
    for start in range(0, resamples, 100):                               # in blocks, to save memory
        drawn = rng.integers(len(images), size=(min(100, resamples - start), len(images)))
        times = [np.bincount(draw, minlength=len(images)) for draw in drawn]
        draws.append(np.stack(times) @ table)
    draws = np.concatenate(draws).T                                             # (names, resamples)
    total = Sums(zip(columns, map(int, table.sum(0)), strict=True))
    return total, Sums(zip(columns, draws, strict=True))


# ---- intervals ----
def interval(values, point):
    """The middle 95% of the resamples in which the ratio exists."""
    values = values[~np.isnan(values)]
    return np.percentile(values, (2.5, 97.5)).tolist() if len(values) else [point, point]


def intervals(points, draws):
    """95% intervals for every number of `points`, by its resamples in `draws`."""
    return {key: interval(np.atleast_1d(draws[key]), point) for key, point in points.items()}


def scored(measure, total, draws):
    """{name: number} that measure makes of the total, with the intervals by the draws under "intervals"."""
    points = measure(total)
    return points | {"intervals": intervals(points, measure(draws))}


# ---- measures that are ratios of sums, in percent: an item adds {measure: (top, bottom)} ----
def parts(sums):
    """What an item adds to the measures, as counts: {(measure, "top"): ..., "bottom": ..., "n": 1}."""
    found = {}
    for measure, (top, bottom) in sums.items():
        found |= under([measure], {"top": top, "bottom": bottom, "n": 1})
    return found


def percent(sums, measure):
    """100 top / bottom of sums of `parts`."""
    return ratio(100 * sums[measure, "top"], sums[measure, "bottom"])


def paired(a_items, b_items, sums, lower=()):
    """-> {measure: {"a", "b", "change", "interval", "better", "worse", "p"}} of items with equal ids.

    sums: an item -> {measure: (top, bottom)}. Both sides see the same draws of images, which is what pairs
    them. lower: the measures of which less is better, for the counts of items that got better and worse.
    """
    others = {(item.get("split"), item["id"]): item for item in b_items}
    both = []
    for item in a_items:
        other = others.get((item.get("split"), item["id"]))
        if other is not None:
            both.append({"image": item.get("image") or item["id"], "a": sums(item), "b": sums(other)})
    if not both:
        raise UserError("the two files of items have no id in common; give items of the same benchmark")
    total, draws = add_up(both, lambda pair: under("a", parts(pair["a"])) | under("b", parts(pair["b"])))
    old, new, old_draws, new_draws = total.of("a"), total.of("b"), draws.of("a"), draws.of("b")
    found = {}
    for measure in dict.fromkeys(measure for pair in both for measure in pair["a"]):
        a, b = percent(old, measure), percent(new, measure)
        changes = percent(new_draws, measure) - percent(old_draws, measure)
        better, worse = _signs(both, measure)
        if measure in lower:
            better, worse = worse, better
        found[measure] = {"a": a,
                          "b": b,
                          "change": b - a,
                          "interval": interval(changes, b - a),
                          "better": better,
                          "worse": worse,
                          "p": sign_test(better, worse)}
    return found


def _signs(both, measure):
    """-> (items of which B has more of a measure, of which it has less)."""
    more = less = 0
    for pair in both:
        top, bottom = pair["a"].get(measure, (0, 0))
        new_top, new_bottom = pair["b"].get(measure, (0, 0))
        if bottom and new_bottom:
            more += new_top / new_bottom > top / bottom
            less += new_top / new_bottom < top / bottom
    return more, less


def sign_test(better, worse):
    """The exact two-sided p of a split this uneven under a fair coin; ties do not count."""
    n, term, total = better + worse, 1, 0
    for k in range(min(better, worse) + 1):                     # term is n over k
        total += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2 ** n) if n else 1.0
