"""What eval_hallu.py's measures share: answers joined to questions, counts added up, intervals.

    found = stats.read(answers, "pope")                 [Answer(id, text, line)]
    stats.join(names, found, {id: {"part", "text"}})    duplicates, unknown ids and gaps are refused
    total, draws = stats.tally(items, parts)            sums over all items, and over draws of their images
    stats.scored(total, draws, part)                    a part's measures, with 95% intervals
    stats.paired(a_items, b_items)                      B - A of each measure, with 95% intervals

An item is a scored answer: a dict with an `id`, the `image` that it is about, and `sums`, what it adds to
each measure: {measure: (top, bottom)}. A measure is the sum of the tops over the sum of the bottoms.
Intervals are bootstrap intervals over images: images are drawn with replacement, and every ratio is taken
again. Pure functions; errors are UserError.
"""
if __name__ == "__main__":
    exit("A part of eval_hallu.py; run: python eval_hallu.py --help")

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


FEW = 5                                                                   # of what is listed in a message
RESAMPLES = 1000                                                          # draws behind an interval
TEXTS = "response model_answer answer text caption".split()               # the first; `answer` may be a label


def few(found, between=", "):
    """The first five of a list as a text, and how many more there are."""
    text = between.join(map(str, found[:FEW]))
    return f"{text}{between}and {len(found) - FEW} more" if found[FEW:] else text


def first(record, *keys):
    """The value of the first of these keys that a record has, else None."""
    return next((record[key] for key in keys if key in record), None)


def image_number(image):
    """285, "000000000285.jpg" and "COCO_val2014_000000000285.jpg" are COCO's image 285; else None."""
    found = re.fullmatch(r"(?:.*[_/])?0*(\d{1,7})(?:\.\w+)?", str(image))
    return int(found[1]) if found else None


def image_name(record):
    """What an image is told by in a question or an answer: COCO's number, else its file's name; or None."""
    name = first(record, "image_source", "image", "image_id")
    number = image_number(name)
    if name is None or number is not None:
        return number
    return re.sub(r"\.\w+$", "", str(name).rpartition("/")[2])


def same_id(name):
    """An id as it is joined: "1" and 1 are the same."""
    number = isinstance(name, str) and re.fullmatch("0|[1-9][0-9]*", name)
    return int(name) if number else name


def read(answers, benchmark=None):
    """-> [Answer]. Settings are skipped; another benchmark's file, and a line without id or text, are
    refused. benchmark: None for any."""
    found = []
    for number, line in enumerate(answers, 1):
        if "settings" in line:
            other = line["settings"].get("benchmark", benchmark)
            if benchmark not in (None, other):
                raise UserError(f"the answers are to {other}, not to {benchmark}; score them as {other}")
            continue
        name, text = same_id(first(line, "question_id", "id")), first(line, *TEXTS)
        if name is None and benchmark != "amber":
            name = len(found)                                       # other official files name no id
        if not (isinstance(name, int | str) and isinstance(text, str)):
            raise UserError(f"answer {number} (id {name}) has no text under any of {', '.join(TEXTS)}, or no "
                            "usable `question_id` or `id`; answer it again")
        found.append(Answer(name, text, line))
    if not found:
        raise UserError("there are no answers to score; write them with `eval_hallu.py answers`")
    return found


def once(names, what="answers"):
    """Refuse names that appear twice."""
    if twice := [name for name, n in Counter(names).items() if n > 1]:
        raise UserError(f"{len(twice)} {what} appear twice (ids {few(twice)}); keep one of each")


def join(names, found, asked, partial=False):
    """Refuse duplicates, strangers and gaps among the names of the answers found, and answers that were given
    to another text or about another image. -> the coverage.

    asked: {name: {"part" of the benchmark, "text", "" if it is unknown, "image" if it is known}}. A part that
    is answered at all must be answered whole, unless `partial`. What an answer says that it was asked may be
    more than the question.
    """
    once(names)
    if strangers := [name for name in names if name not in asked]:
        raise UserError(f"{len(strangers)} answers belong to none of the questions (ids {few(strangers)}); "
                        "give the questions that they belong to")
    begun = {asked[name]["part"] for name in names}
    whole = [name for name, question in asked.items() if question["part"] in begun]
    answered = set(names)
    missing = [name for name in whole if name not in answered]
    if missing and not partial:
        raise UserError(f"{len(missing)} of {len(whole)} questions have no answer (ids {few(missing)}); "
                        "complete them, or score the others with --partial")
    others = []
    for name, answer in zip(names, found, strict=True):
        text, images = asked[name]["text"].strip(), {image_name(asked[name]), image_name(answer.line)}
        if answer.question and text not in answer.question or len(images - {None}) > 1:
            others.append(name)
    if others:
        raise UserError(f"{len(others)} answers are to other questions under these ids (ids {few(others)}); "
                        "give the questions that they answer")
    return {"answered": len(names), "of": len(whole)}


# ---- sums ----
def ratio(top, bottom):
    """top / bottom; 0/0 is 0, and nan among the resamples."""
    if np.ndim(bottom):
        with np.errstate(invalid="ignore", divide="ignore"):
            return top / bottom
    return float(top / bottom) if bottom else 0.0


class Share(NamedTuple):
    """The sums whose ratio a measure is."""
    top: object = 0
    bottom: object = 0


class Sums(dict):
    """Shares by (part, measure), and by (part, "items") how many cannot be read, of all; of the resamples,
    arrays (2, resamples). What was never counted is zero."""
    def __missing__(self, key):
        return Share()

    def of(self, part):
        """The shares of one part, by measure."""
        return Sums({measure: share for (home, measure), share in self.items() if home == part})


def choice(said, truth, sought, claimed):
    """What an item holds of a yes or a no, of which `sought` is to be found. claimed: whether the answer
    counts as that."""
    right, there = said == truth, truth == sought
    found = int(right and there)
    return {"said": said,
            "right": right,
            "unparsed": said is None,
            "sums": {"accuracy": (int(right), 1),
                     "precision": (found, int(claimed)),
                     "recall": (found, int(there))}}


def tally(items, parts=lambda item: ["all"], seed=0, resamples=None):
    """-> the Sums of what all items add to their parts, and of `resamples` draws of their images with
    replacement.

    parts: an item -> their names. The counts of items are whole numbers.
    """
    images = {}
    for item in items:
        images.setdefault(item["image"], len(images))
    columns = defaultdict(lambda: np.zeros((2, len(images))))                   # name -> its sums by image
    for item in items:
        place = images[item["image"]]
        shares = item["sums"] | {"items": (item.get("unparsed", False), 1)}
        for part in parts(item):
            for measure, share in shares.items():
                columns[part, measure][:, place] += share
    table, rng = np.stack(list(columns.values())), np.random.default_rng(seed)  # (names, 2, images)
    draws = np.zeros((*table.shape[:2], resamples or RESAMPLES))
    for place in range(draws.shape[-1]):
        drawn = rng.integers(len(images), size=len(images))
        draws[..., place] = table @ np.bincount(drawn, minlength=len(images))
    total = {name: Share(*map(int, share)) for name, share in zip(columns, table.sum(2), strict=True)}
    return Sums(total), Sums(zip(columns, draws, strict=True))


# ---- measures ----
PLAIN = ("score", "informativeness", "mean_words")                        # no shares: shown as they are


def ratios(sums, scale=1, added=0):
    """{measure: top / bottom} of a part's sums; F1 beside precision. scale: 100 for shares in percent.
    added: to each bottom."""
    found = {}
    for measure, (top, bottom) in sums.items():
        if measure != "items":
            found[measure] = ratio(top if measure in PLAIN else scale * top, bottom + added)
    if "precision" in found:
        precision, recall = found["precision"], found["recall"]
        found["f1"] = ratio(2 * precision * recall, precision + recall)
    return found


def remarks(total, answers):
    """Which measures are 0/0, and which Answers say nothing."""
    undefined = [f"{part}: {measure} is 0/0, given as 0" for (part, measure), share in total.items()
                 if not share.bottom]
    return undefined + empty(answers)


def empty(answers):
    """[a remark] that counts and names the Answers that say nothing; [] if none do."""
    ids = [answer.id for answer in answers if not answer.text.strip()]
    says = f"{len(ids)} answers are empty (ids {few(ids)}): a broken model writes such answers"
    return [says] if ids else []


def undefined(scores, measure):
    """Whether a measure is 0/0, as CHAIR_i is where no object is named: its 0 says nothing."""
    said = scores.get("remarks", ())
    return any(f"{part}: {measure} is 0/0, given as 0" in said for part in ("all", "generative"))


def interval(values, point):
    """The middle 95% of the resamples in which the ratio exists."""
    values = values[~np.isnan(values)]
    return np.percentile(values, (2.5, 97.5)).tolist() if len(values) else [point, point]


def intervals(points, draws):
    """95% intervals for every number of `points`, by its resamples in `draws`."""
    return {key: interval(draws[key], point) for key, point in points.items()}


def scored(total, draws, part="all", scale=1):
    """The ratios of a part of what `tally` gives, with their intervals under "intervals"."""
    points, drawn = (ratios(sums.of(part), scale) for sums in (total, draws))
    return points | {"intervals": intervals(points, drawn)}


# ---- two models ----
def _key(item):
    return item.get("split"), item["id"]


def paired(a_items, b_items):
    """-> {measure: {"a", "b", "change", "interval"}} of items with equal ids, shares in percent. Both sides
    see the same draws of images, which is what pairs them."""
    others = {_key(item): item for item in b_items}
    both = []
    for item in a_items:
        if other := others.get(_key(item)):
            both += [item | {"side": "a"}, other | {"side": "b"}]
    if not both:
        raise UserError("the two files of items have no id in common; give items of the same benchmark")
    total, draws = tally(both, lambda item: item["side"])
    old, new, old_draws, new_draws = (ratios(sums.of(side), 100) for sums in (total, draws) for side in "ab")
    found = {}
    for measure in old:
        if measure in new:
            change = new[measure] - old[measure]
            found[measure] = {"a": old[measure],
                              "b": new[measure],
                              "change": change,
                              "interval": interval(new_draws[measure] - old_draws[measure], change)}
    return found
