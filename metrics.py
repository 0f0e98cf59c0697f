"""The measures of hallucination, as pure functions of answers: no model, no torch, no file is read here.

    metrics.classroom(answers)           CHAIR, Cover, POPE and accuracy by kind, each with a 95% interval
    metrics.difference(before, after)    the change of each of them, paired by image
    metrics.hallucinated(answer, truth)  the words of one answer that its image does not bear out

An answer is a line of answers.jsonl: {"id", "image", "question", "kind", "truth", "answer"}. Truth by kind:

    caption      {"present": [words of the objects in the image], "absent": [the world's other object words]}
    existence    {"answer": "yes"|"no", "choices": ["yes", "no"], "set": "random"|"adversarial"|[both]}
    any other    {"answer": word, "choices": [words]}

All measures are ratios of sums over images, in percent:

    CHAIR_s = captions that name an absent object / captions             https://arxiv.org/abs/1809.02156
    CHAIR_i = mentions of absent objects / mentions of objects           (a word said twice is two mentions)
    Cover   = present objects that are named / present objects           https://arxiv.org/abs/2311.07397
    POPE    = accuracy, and F1 of "yes" = 2 tp / (said yes + true yes)   https://arxiv.org/abs/2305.10355

Departures from the official scorers, which read open vocabulary:
  1. The words are the world's own: no lemmas, no synonyms; only an object's plural -s or -es is understood.
  2. An answer is right when, of the choices offered, it says the true one and no other. One that says none or
     several is wrong and is counted in `unparsed`; POPE's own parser takes it for a "yes".
  3. 0/0 (no object named, nobody said yes) is 0, where POPE's own script stops with an error. A measure of a
     kind that was never asked is None.
"""

import re
from functools import lru_cache

import numpy as np

POPE_SETS = ("random", "adversarial")
CLASSROOM = {
    "chair_s": "CHAIR_s, lower is better", "chair_i": "CHAIR_i, lower is better", "cover": "Cover",
    "pope_random_acc": "POPE random, accuracy", "pope_random_f1": "POPE random, F1",
    "pope_adversarial_acc": "POPE adversarial, accuracy", "pope_adversarial_f1": "POPE adversarial, F1"}


class AnswerError(ValueError):
    """Answers that cannot be scored: one sentence with what, where and the mend."""


@lru_cache(maxsize=1024)
def _pattern(words, plural):
    """Whole words of a vocabulary, the longest first: "fire truck" is one mention, and none of "truck"."""
    either = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    return re.compile(rf"(?<!\w)({either}){'(?:e?s)?' if plural else ''}(?!\w)")


def mentions(text, words, plural=False):
    """-> [(word of the vocabulary, the word as the text has it)], in order, repeats included."""
    if not words:
        return []
    return [(m[1], m[0]) for m in _pattern(frozenset(map(str.lower, words)), plural).finditer(text.lower())]


def hallucinated(answer, truth):
    """The words of an answer to mark, as written: a caption's absent objects, an answer's wrong choices."""
    if "present" in truth:
        absent = set(map(str.lower, truth["absent"]))
        said = mentions(answer, truth["present"] + truth["absent"], plural=True)
        wrong = [written for word, written in said if word in absent]
    else:
        wrong = [word for word, _ in mentions(answer, truth["choices"]) if word != truth["answer"].lower()]
    return list(dict.fromkeys(wrong))


def check_truth(item, where):
    """An AnswerError where what is known of a question would not do to score an answer to it."""
    for key, types in (("id", (str, int)), ("kind", str), ("truth", dict)):
        if not isinstance(item, dict) or not isinstance(item.get(key), types):
            raise AnswerError(f"{where} has no usable `{key}`; make the scenes and their answers again.")
        where += f" (id {item['id']})" if key == "id" else ""
    truth = item["truth"]

    def words(key):
        return isinstance(truth.get(key), list) and all(isinstance(w, str) and w for w in truth[key])

    if item["kind"] == "caption":
        if not (words("present") and words("absent")):
            raise AnswerError(f"{where}: a caption needs `present` and `absent`; make the scenes again.")
    elif not (words("choices") and truth.get("answer") in truth["choices"]):
        raise AnswerError(f"{where}: the truth needs `choices` with its `answer`; make the scenes again.")
    elif item["kind"] == "existence" and (set(truth["choices"]) != {"yes", "no"}
                                          or not set(_sets(truth)) <= set(POPE_SETS)):
        raise AnswerError(f"{where}: an existence question needs the choices yes and no, and a `set` out of "
                          f"{', '.join(POPE_SETS)}; make the scenes again.")


def _sets(truth):
    named = truth.get("set") or []
    return [named] if isinstance(named, str) else named


def judge(item):
    """One answer -> what it adds to the sums, {measure: (numerator, denominator)}; whether it can be read."""
    truth, kind = item["truth"], item["kind"]
    if kind == "caption":
        present, absent = ({w.lower() for w in truth[key]} for key in ("present", "absent"))
        said = [word for word, _ in mentions(item["answer"], present | absent, plural=True)]
        misses = sum(word in absent for word in said)
        return {"chair_s": (int(misses > 0), 1), "chair_i": (misses, len(said)),
                "cover": (len(present & set(said)), len(present))}, True
    said = {word for word, _ in mentions(item["answer"], truth["choices"])}
    right = int(said == {truth["answer"].lower()})
    counts = {kind: (right, 1)}
    if kind == "existence":
        yes, true = said == {"yes"}, truth["answer"] == "yes"
        for name in _sets(truth):
            counts[f"pope_{name}_acc"] = (right, 1)
            counts[f"pope_{name}_f1"] = (2 * (yes and true), yes + true)     # 2PR/(P+R), as one ratio of sums
    return counts, len(said) == 1


def _table(answers):
    """-> keys, images, sums (images, keys, 2), the answers behind each key, and how many cannot be read."""
    items = [a for a in answers if not (isinstance(a, dict) and "settings" in a)]
    if not items:
        raise AnswerError("there are no answers to score; write them with `eval_hallu.py answers classroom`.")
    seen, rows, behind, unparsed = set(), {}, {}, 0
    for number, item in enumerate(items, 1):
        check_truth(item, f"answer {number}")
        if not isinstance(item.get("answer"), str):
            raise AnswerError(f"answer {number} (id {item['id']}) has no text in `answer`; answer it again.")
        name = (item["id"], item.get("question"), item["kind"], tuple(_sets(item["truth"])))
        if name in seen:
            raise AnswerError(f"answer {number} (id {item['id']}) stands there twice; keep one of the two.")
        seen.add(name)
        counts, readable = judge(item)
        unparsed += not readable
        row = rows.setdefault(item.get("image", item["id"]), {})
        for key, (top, bottom) in counts.items():
            row[key] = np.add(row.get(key, (0, 0)), (top, bottom))
            behind[key] = behind.get(key, 0) + 1
    keys = [*CLASSROOM, *sorted(set(behind) - set(CLASSROOM))]
    sums = np.array([[row.get(key, (0, 0)) for key in keys] for row in rows.values()], dtype=np.float64)
    return keys, list(rows), sums, [behind.get(key, 0) for key in keys], unparsed


def _percent(sums):
    """(..., keys, 2) -> (..., keys); 0/0 is nan."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 100 * sums[..., 0] / sums[..., 1]


def _resample(tables, seed, resamples):
    """The bootstrap: images drawn with replacement, and every ratio formed anew. All tables (images, keys, 2)
    see the same draws, which is what pairs them. -> for each (resamples, keys)"""
    n, rng, out = len(tables[0]), np.random.default_rng(seed), [[] for _ in tables]
    for start in range(0, resamples, 100):                               # in blocks, for the memory's sake
        draws = rng.integers(n, size=(min(100, resamples - start), n))
        times = np.stack([np.bincount(draw, minlength=n) for draw in draws]) * 1.0           # (block, images)
        for table, results in zip(tables, out, strict=True):
            results.append(_percent((times @ table.reshape(n, -1)).reshape(len(draws), -1, 2)))
    return [np.concatenate(results) for results in out]


def _interval(values, point):
    """The middle 95% of the resamples in which the ratio exists."""
    values = values[~np.isnan(values)]
    return [float(v) for v in np.percentile(values, (2.5, 97.5))] if len(values) else [point, point]


def classroom(answers, seed=0, resamples=1000):
    """-> {"chair_s", ..., "pope_adversarial_f1", "by_kind": {kind: {"acc", "n", "interval"}}, "n", "images",
    "unparsed", "intervals": {key: [low, high]}}. A line of settings among the answers is passed over."""
    keys, images, sums, behind, unparsed = _table(answers)
    points, (draws,) = np.nan_to_num(_percent(sums.sum(0))), _resample([sums], seed, resamples)
    result = dict.fromkeys(CLASSROOM) | {"by_kind": {}, "n": 0, "images": len(images), "unparsed": unparsed}
    result["intervals"] = {}
    for k, key in enumerate(keys):
        point = float(points[k])
        if behind[k] and key in CLASSROOM:
            result[key], result["intervals"][key] = point, _interval(draws[:, k], point)
        elif behind[k]:
            result["by_kind"][key] = {"acc": point, "n": behind[k], "interval": _interval(draws[:, k], point)}
    result["n"] = behind[0] + sum(kind["n"] for kind in result["by_kind"].values())
    return result


def difference(before, after, seed=0, resamples=1000):
    """The change of each measure between two sets of answers to the same questions, in points, with its 95%
    interval: {key: {"change", "interval"}, "by_kind": {kind: {"change", "interval"}}}."""
    def asked(answers):
        return sorted(repr([a.get(key) for key in ("id", "image", "question", "kind", "truth")])
                      for a in answers if "settings" not in a)

    if asked(before) != asked(after):
        raise AnswerError("the two files answer different questions; compare answers to the same scenes.")
    (keys, images, first, behind, _), (_, others, second, *_) = _table(before), _table(after)
    place = {image: i for i, image in enumerate(others)}
    second = second[[place[image] for image in images]]
    old, new = _resample([first, second], seed, resamples)
    change = np.nan_to_num(_percent(second.sum(0))) - np.nan_to_num(_percent(first.sum(0)))
    result = {"by_kind": {}}
    for k, key in enumerate(keys):
        if behind[k]:
            home, point = result if key in CLASSROOM else result["by_kind"], float(change[k])
            home[key] = {"change": point, "interval": _interval(new[:, k] - old[:, k], point)}
    return result
