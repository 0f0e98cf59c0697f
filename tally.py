"""Answers joined to their questions, counts added up, and intervals: what the benchmarks of metrics.py share.

    found = tally.read(answers, "pope")                 [(id, text, line)], another benchmark's file refused
    tally.join(names, {id: part}, partial)              duplicates, strangers and gaps refused
    total, draws = tally.add_up(items, counts, ...)     sums over all items, and over draws of their images
    tally.intervals(measure(total), measure(draws))     the same measure of both gives the 95% intervals

A file of its own so that metrics.py holds nothing but measures. Pure functions; errors are UserError.
"""
import re

import numpy as np

from data import UserError


def interval(values, point):
    """The middle 95% of the resamples in which the ratio exists."""
    values = values[~np.isnan(values)]
    return [float(v) for v in np.percentile(values, (2.5, 97.5))] if len(values) else [point, point]


TEXTS = ("answer", "response", "model_answer", "text")    # the first that is there; a question may be a text


def first(record, *keys):
    return next((record[key] for key in keys if key in record), None)


def few(ids):
    """The first of some ids, for a message; one of several parts is (part, id)."""
    names = [" ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in ids[:5]]
    return ", ".join(names) + (", ..." if len(ids) > 5 else "")


def image_number(image):
    """285, "000000000285.jpg" and "COCO_val2014_000000000285.jpg" are COCO's image 285; else None."""
    found = re.fullmatch(r"(?:.*_)?0*(\d{1,7})(?:\.\w+)?", str(image))
    return int(found[1]) if found else None


def read(answers, benchmark):
    """-> [(id, text, line)] of the answers. Settings are passed over; another benchmark's file, and a line
    without id or text, are refused."""
    out = []
    for number, line in enumerate(answers, 1):
        if not isinstance(line, dict):
            raise UserError(f"answer {number} is no JSON object; give the file that holds the answers.")
        if "settings" in line:
            _check_benchmark(line["settings"], benchmark)
            continue
        name, text = first(line, "question_id", "id"), first(line, *TEXTS)
        if name is None and benchmark in ("objhal", "mmhal"):
            name = len(out)                                                # their official files name no id
        if not isinstance(name, int | str) or isinstance(name, bool):
            raise UserError(f"answer {number} has no usable `question_id` or `id`; answer it again.")
        if not isinstance(text, str):
            raise UserError(f"answer {number} (id {name}) has no text under any of {', '.join(TEXTS)}; "
                              "answer it again.")
        out.append((name, text, line))
    if not out:
        raise UserError("there are no answers to score; write them with `eval_hallu.py answers`.")
    return out


def _check_benchmark(settings, benchmark):
    other = settings.get("benchmark", benchmark) if isinstance(settings, dict) else benchmark
    if other != benchmark:
        raise UserError(f"the answers are to {other}, not to {benchmark}; score them as {other}")


def join(names, parts, partial, what="answers", of="questions"):
    """Refuse duplicates, strangers and gaps among the names. `parts` maps each id that can be answered to its
    part; a part that is answered at all is to be answered whole, unless `partial`. -> the coverage"""
    seen, twice = set(), []
    for name in names:
        (twice.append if name in seen else seen.add)(name)
    if twice:
        raise UserError(f"{len(twice)} {what} stand there twice (ids {few(twice)}); keep one of each.")
    if strangers := [name for name in names if name not in parts]:
        raise UserError(f"{len(strangers)} {what} belong to none of the {of} (ids {few(strangers)}); give "
                          f"the {of} that they belong to.")
    begun = {parts[name] for name in names}
    asked = [name for name, part in parts.items() if part in begun]
    missing = [name for name in asked if name not in seen]
    if missing and not partial:
        raise UserError(f"{len(missing)} of {len(asked)} {of} have no answer (ids {few(missing)}); "
                          "complete them, or score what is there with --partial.")
    return {"answered": len(names), "of": len(asked)}


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


def add_up(items, counts, seed, resamples):
    """-> the Sums of all items' counts, and of `resamples` draws of their images with replacement."""
    columns, images, table = {}, {}, []
    for item in items:
        image = images.setdefault(item["image"], len(images))
        table += [(image, columns.setdefault(name, len(columns)), n) for name, n in counts(item).items()]
    image, column, n = np.array(table or [(0, 0, 0)]).T
    sums = np.zeros((len(images), len(columns) or 1))
    np.add.at(sums, (image.astype(int), column.astype(int)), n)
    draws, rng = [np.zeros((0, sums.shape[1]))], np.random.default_rng(seed)
    for start in range(0, resamples, 100):
        drawn = rng.integers(len(images), size=(min(100, resamples - start), len(images)))
        draws.append(np.stack([np.bincount(draw, minlength=len(images)) for draw in drawn]) @ sums)
    draws, total = np.concatenate(draws), sums.sum(0)
    return (Sums({name: int(total[k]) for name, k in columns.items()}),
            Sums({name: draws[:, k] for name, k in columns.items()}))


def intervals(points, draws):
    """95% intervals for every number of `points` that `draws` holds resamples of."""
    return {key: interval(np.atleast_1d(draws[key]), point) for key, point in points.items()
            if isinstance(point, float) and key in draws}
