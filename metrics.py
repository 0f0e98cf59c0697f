"""The measures of hallucination, as pure functions of answers: no model, no torch, no file is read here.

    metrics.pope(questions, answers)              accuracy, precision, recall, F1, share of yes; by split
    metrics.amber(queries, answers, ...)          CHAIR, Cover, Hal, Cog; accuracy and F1 by type; AMBER score
    metrics.chair(answers, truth, ...)            CHAIR and Object HalBench: CHAIR_s, CHAIR_i, recall
    metrics.mmhal(template, answers, replies)     score, hallucination rate, by category
    metrics.classroom(answers)                    CHAIR, Cover, POPE and accuracy by kind of the built-in world
    metrics.difference(before, after)             the change of each classroom measure, paired by image
    metrics.hallucinated(answer, truth)           the words of one answer that its image does not bear out

All measures are ratios of sums over images, with bootstrap 95% intervals that draw images with replacement:

    CHAIR_s = captions that name an absent object / captions             https://arxiv.org/abs/1809.02156
    CHAIR_i = mentions of absent objects / mentions of objects           (a word said twice is two mentions)
    Cover   = present objects that are named / present objects           https://arxiv.org/abs/2311.07397
    POPE    = accuracy, and F1 of "yes" = 2 tp / (said yes + true yes)   https://arxiv.org/abs/2305.10355
    Object HalBench's CHAIR_s leaves captions without objects out        https://arxiv.org/abs/2312.00849
    MMHal   = a judge's 0..6; below 3 is a hallucination                 https://arxiv.org/abs/2309.14525

The four benchmarks answer {"question_id" or "id", "answer", "response" or "text"}; `mode`: "official" equals the
official scorers to the digit, faults included; "robust", the default, departs from them:
  1. Answers join their questions by id (the POPE and MMHal scripts join by line). Duplicates, strangers and gaps
     are refused, in both modes.
  2. Yes and no are understood in any spelling and in sentences; what says neither is `unparsed`, and wrong.
  3. Ratings are understood in the forms that judges use; a reply without one is `unparsed`, and left out.
  4. Nothing is rounded, and no 0.001 stands in a denominator (AMBER's does).
  5. 0/0 is 0 with a remark, where POPE's script stops with an error; also in official mode.

A classroom answer is a line of answers.jsonl: {"id", "image", "question", "kind", "truth", "answer"}, truth by kind:

    caption      {"present": [words of the objects in the image], "absent": [the world's other object words]}
    existence    {"answer": "yes"|"no", "choices": ["yes", "no"], "set": "random"|"adversarial"|[both]}
    any other    {"answer": word, "choices": [words]}

Its words are the world's own (only a plural -s or -es is understood), its measures are percents, and a measure of a
kind that was never asked is None.
"""

import json
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


# ---------------------------------------------------------------------------------------------- benchmarks
TEXTS = ("answer", "response", "model_answer", "text")     # the first that is there; a question may be a `text`


def _first(record, *keys):
    return next((record[key] for key in keys if key in record), None)


def _few(ids):
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")


def _benchmark(record):
    """Which benchmark's answer a line looks like, or None."""
    settings = record.get("settings")
    if isinstance(settings, dict):
        return settings.get("benchmark")
    if {"kind", "truth"} <= record.keys():
        return "classroom"
    if {"image_content", "gt_answer"} & record.keys():
        return "mmhal"
    if "response" in record or "query" in record:
        return "amber"
    if "image_id" in record:
        return "objhal" if image_number(record["image_id"]) is not None else "mmhal"
    return "pope" if {"question_id", "question", "answer"} <= record.keys() else None


def image_number(image):
    """285, "000000000285.jpg" and "COCO_val2014_000000000285.jpg" are COCO's image 285; else None."""
    found = re.fullmatch(r"(?:.*_)?(\d+)(?:\.\w+)?", str(image))
    return int(found[1]) if found else None


def _read(answers, benchmark):
    """-> [(id, text, line)] of the answers. Settings are passed over; another benchmark's file, a line without id
    or text, and an id that stands there twice are refused."""
    out = []
    for number, line in enumerate(answers, 1):
        if not isinstance(line, dict):
            raise AnswerError(f"answer {number} is no JSON object; give the file that holds the answers.")
        found = _benchmark(line)
        if found not in (None, benchmark):
            raise AnswerError(f"answer {number} is one to {found}, not to {benchmark}; score it as {found}.")
        if "settings" in line:
            continue
        name, text = _first(line, "question_id", "id"), _first(line, *TEXTS)
        if name is None and benchmark in ("objhal", "mmhal"):
            name = len(out)                                                # their official files name no id
        if not isinstance(name, int | str) or isinstance(name, bool):
            raise AnswerError(f"answer {number} has no usable `question_id` or `id`; answer it again.")
        if not isinstance(text, str):
            raise AnswerError(f"answer {number} (id {name}) has no text under any of {', '.join(TEXTS)}; answer "
                              "it again.")
        out.append((name, text, line))
    if not out:
        raise AnswerError("there are no answers to score; write them with `eval_hallu.py answers`.")
    return out


def _join(names, parts, partial, what="answers", of="questions"):
    """Refuse duplicates, strangers and gaps among the names. `parts` maps each id that can be answered to its part;
    a part that is answered at all is to be answered whole, unless `partial`. -> the coverage"""
    seen, twice = set(), []
    for name in names:
        (twice.append if name in seen else seen.add)(name)
    if twice:
        raise AnswerError(f"{len(twice)} {what} stand there twice (ids {_few(twice)}); keep one of each.")
    if strangers := [name for name in names if name not in parts]:
        raise AnswerError(f"{len(strangers)} {what} belong to none of the {of} (ids {_few(strangers)}); give the "
                          f"{of} that they belong to.")
    begun = {parts[name] for name in names}
    asked = [name for name, part in parts.items() if part in begun]
    missing = [name for name in asked if name not in seen]
    if missing and not partial:
        raise AnswerError(f"{len(missing)} of {len(asked)} {of} have no answer (ids {_few(missing)}); complete "
                          "them, or score what is there with --partial.")
    return {"answered": len(names), "of": len(asked)}


def _ratio(top, bottom):
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


def _sum(items, counts, seed, resamples):
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
    return (Sums({name: int(total[k]) if total[k] % 1 == 0 else float(total[k]) for name, k in columns.items()}),
            Sums({name: draws[:, k] for name, k in columns.items()}))


def _intervals(points, draws):
    """95% intervals for every number of `points` that `draws` holds resamples of."""
    return {key: _interval(np.atleast_1d(draws[key]), point) for key, point in points.items()
            if isinstance(point, float) and key in draws}


# ---------------------------------------------------------------------------------------------- yes and no
YES = set("yes yeah yep yup yea sure certainly definitely absolutely indeed correct affirmative true".split())
NO = set("no nope nah none nobody nothing never not neither false incorrect negative".split())
BOTH = re.compile(r"(?:yes\W+(?:and |or )?no|no\W+(?:and |or )?yes)\b")
UNSURE = re.compile(r"\b(?:(?:can(?:no|')t|can not|could(?:n't| not)|(?:not |un)able to|hard to|difficult to|"
                    r"impossible to)(?: \w+)? (?:tell|say|determined?|answer|know|identify|assist|help|describe)|"
                    r"not (?:\w+ )?(?:sure|certain|clear)|unclear|unsure|unknown|maybe|perhaps|possibly|"
                    r"(?:don't|do not) know|n/a)\b")
NEGATION = re.compile(r"\b(?:no|not|none|never|nothing|nobody|neither|cannot|without|absent|lacks?)\b|n't\b")
POINTS = re.compile(r"\s*(?:i think so|i do|i (?:can )?see (?:it|one|some|them)|(?:it|they|there) (?:is|are|does|do)"
                    r"(?: indeed| one| some)*)(?: (?:visible|present|there|(?:in|on) .*))?\s*")
STATES = re.compile(r"\b(?:there (?:is|are)|i (?:can )?see|(?:is|are|be) (?:\w+ )?(?:visible|present|seen|shown)|"
                    r"(?:image|picture|photo|scene)(?: \w+)? (?:shows?|features?|contains?|includes?|depicts?|has))\b")
ASIDE = set("is are was were be do does did can could has have any some there a an the this that these those in on "
            "at of to it its and or image picture photo scene visible you see".split())


def official_yes_no(text):
    """POPE's parser: a token No, no or not before the first stop makes a no; all else, even nothing, is a yes."""
    return "no" if {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split(" ")) else "yes"


def yes_no(text, question=""):
    """"yes", "no", or None where an answer says neither. Its first word decides; else a clause that is a yes or no;
    else a statement with the question's own words, or one that points at them ("there is one", "I see it")."""
    text = re.sub(r"[*_`\"#]+", "", text.lower().replace("\u2019", "'")).strip()
    text = re.sub(r"^(?:(?:the |my |final )*answer(?: is)?|assistant|response)\s*[:\-]?\s+(?=\w)", "", text)
    first, second, *_ = [*re.findall(r"[a-z']+", text), "", ""]
    if not first or BOTH.match(text):
        return None
    if first in NO or first in YES and second == "not":
        return "no"
    if first in YES:
        return "yes"
    if UNSURE.search(text):
        return None
    clauses = [clause.strip() for clause in re.split(r"[,;:.!?\n]| but | however | although | while ", text)]
    if len(said := {"yes", "no"} & set(clauses)) == 1:
        return said.pop()
    stems = {word[:4] for word in re.findall(r"[a-z]+", question.lower()) if word not in ASIDE}
    about = [clause for clause in clauses if stems and stems <= {word[:4] for word in re.findall(r"[a-z]+", clause)}]
    clause = (about or clauses)[0]
    if NEGATION.search(clause):
        return "no"
    return "yes" if about or POINTS.fullmatch(clause) or not stems and STATES.search(clause) else None


# ---------------------------------------------------------------------------------------------- POPE
def pope(questions, answers, mode="robust", partial=False, seed=0, resamples=1000):
    """questions: one split's lines {"question_id", "image", "text", "label"}, or {split: lines}. An answer is for the
    split that it names in `split`; without one, for the only split whose questions all the answers repeat.
    -> {"tp", "fp", "tn", "fn", "accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed", "n", "version",
    "by_split", ...} in fractions. Over several splits the counts are sums and the ratios means of the splits.
    An unparsed answer counts as the wrong one; it is no yes in yes_ratio."""
    splits = questions if isinstance(questions, dict) else {"pope": questions}
    asked = {}
    for split, lines in splits.items():
        for line in lines:
            if not isinstance(line, dict) or line.get("label") not in ("yes", "no") or "question_id" not in line:
                raise AnswerError(f"a question of {split} has no `question_id` or no `label` yes or no; give POPE's "
                                  "question file.")
            if asked.setdefault((split, line["question_id"]), line) is not line:
                raise AnswerError(f"question {line['question_id']} of {split} stands there twice; give one split a "
                                  "file.")
    read = _read(answers, "pope")
    names = [(line["split"], name) for name, _, line in read if "split" in line]
    if len(names) < len(read):
        split = _split_of(read, splits, asked)
        names = [(split, name) for name, _, _ in read]
    coverage = _join(names, {name: name[0] for name in asked}, partial)
    items = []
    for name, (_, text, _) in zip(names, read, strict=True):
        line = asked[name]
        said = official_yes_no(text) if mode == "official" else yes_no(text, line.get("text", ""))
        items.append({"id": name[1], "split": name[0], "image": line.get("image", name[1]), "label": line["label"],
                      "said": said, "right": said == line["label"]})

    def counts(item):
        cell = ("t" if item["right"] else "f") + ("p" if (item["label"] == "yes") == item["right"] else "n")
        return {(item["split"], key): 1 for key in (cell, "n", f"said {item['said']}")}

    def measure(sums):
        precision = _ratio(sums["tp"], sums["tp"] + sums["fp"])
        recall = _ratio(sums["tp"], sums["tp"] + sums["fn"])
        return {"accuracy": _ratio(sums["tp"] + sums["tn"], sums["n"]), "precision": precision, "recall": recall,
                "f1": _ratio(2 * precision * recall, precision + recall), "yes_ratio": _ratio(sums["said yes"],
                                                                                           sums["n"])}
    total, draws = _sum(items, counts, seed, resamples)
    by_split, drawn, remarks = {}, [], []
    for split in dict.fromkeys(item["split"] for item in items):
        sums, size = total.of(split), len(splits[split])
        drawn.append(measure(draws.of(split)))
        by_split[split] = {key: sums[key] for key in ("tp", "fp", "tn", "fn")} | measure(sums) | {
            "unparsed": sums["said None"], "n": sums["n"], "version": f"{split}, {size:,} questions"}
        by_split[split]["intervals"] = _intervals(by_split[split], drawn[-1])
        if not sums["tp"] + sums["fp"]:
            remarks.append(f"{split}: no answer counts as a yes, so precision is 0/0; it and F1 are given as 0")
    parts, scores = list(by_split.values()), {"mode": mode}
    for key in parts[0]:
        if isinstance(parts[0][key], int | float):
            scores[key] = (sum if isinstance(parts[0][key], int) else np.mean)([part[key] for part in parts])
            scores[key] = scores[key] if isinstance(scores[key], int) else float(scores[key])
    scores |= {"version": "; ".join(part["version"] for part in parts), "by_split": by_split, "coverage": coverage,
               "remarks": remarks}
    return scores | {"intervals": _intervals(scores, {k: np.mean([d[k] for d in drawn], 0) for k in drawn[0]})}, items


def _split_of(read, splits, asked):
    """The one split whose questions these answers can be to."""
    def repeats(split, name, line):
        given = _first(line, "question", "prompt", *["text"] * ("answer" in line))
        question = asked.get((split, name), {}).get("text")
        return question is not None and (given is None or question.strip() in str(given))

    fitting = [split for split in splits if all(repeats(split, name, line) for name, _, line in read)]
    if len(splits) > 1 and len(fitting) != 1:
        raise AnswerError(f"the answers fit {len(fitting)} of the splits {', '.join(splits)}; write its `split` into "
                          "each answer, or give one split's question file.")
    return (fitting or list(splits))[0]


# ---------------------------------------------------------------------------------------------- AMBER
DIMENSIONS = {"existence": ("existence",), "attribute": ("state", "number", "action"), "relation": ("relation",)}
COUNTERS = {"all": "qa", "state": "as_qa", "number": "an_qa", "action": "aa_qa", "relation": "asso_qa",
            "existence": "ha_qa"}                                        # what the official scorer calls its counters
CAPTION = {"chair": ("hal", "mentions"), "cover": ("cover", "cover_num"), "cog": ("cog", "cog_num")}


def amber_part(kind):
    """The `type` of an annotation -> generative, existence, state, number, action or relation."""
    last = kind.rsplit("-", 1)[-1]
    return {"hallucination": "existence"}.get(last, last if last in ("generative", "state", "number", "action")
                                              else "relation")


def amber_vocabulary(relation):
    """The nouns that AMBER knows: keys and values of its relation.json."""
    return {*relation, *(word for words in relation.values() for word in words)}


def similar_words(similarity, threshold=0.8):
    """-> a function noun -> the noun and what is more similar to it than the threshold. similarity: None for nothing
    but itself, a table {"a b": number} in either order, or vectors {word: [numbers]}, compared by cosine."""
    similarity, near = similarity or {}, {}
    if any(isinstance(value, list | tuple) for value in similarity.values()):
        words, rows = list(similarity), np.array(list(similarity.values()), dtype=np.float64)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        pairs = [(words[i], words[j]) for i, j in np.argwhere(rows @ rows.T > threshold)]
    else:
        pairs = [key.split(" ") for key, value in similarity.items() if value > threshold]
    for one, other in pairs:
        near.setdefault(one, {one}).add(other)
        near.setdefault(other, {other}).add(one)
    return lambda noun: near.get(noun, {noun})


def amber_caption(nouns, truth, hallu, relation, safe_words, near):
    """One caption -> {"hal", "mentions", "cover", "cover_num", "cog", "cog_num", "non_hallu"}.

    The associations of all truths stand in front of the truths themselves, and a noun credits the first entry that
    it is: so "tree" may credit "forest". Likewise the words `hallu` that models tend to add. A noun found among those
    is still compared with both lists, and forgiven where it resembles a truth: so the official code has it."""
    def entries(words):
        return [(other, i) for i, word in enumerate(words) for other in relation.get(word, [])] + [
            (word, i) for i, word in enumerate(words)]

    def credit(words, entries, credited):
        hit = next((i for word, i in entries if word in words), None)
        credited |= {hit} - {None}
        return hit is not None

    present, added, covered, cognised, misses = entries(truth), entries(hallu), set(), set(), 0
    for noun in nouns:
        if noun in safe_words or credit({noun}, present, covered):
            continue
        credit({noun}, added, cognised)
        credit(near(noun), added, cognised)
        misses += not credit(near(noun), present, covered)
    return {"hal": misses, "mentions": len(nouns), "cover": len(covered), "cover_num": len(truth),
            "cog": len(cognised), "cog_num": len(hallu), "non_hallu": int(not misses)}


def _amber_measures(sums, official):
    """Sums of _amber_counts -> the scores. The official scorer adds 0.001 to what it divides by, rounds to one
    decimal, and makes F1 of the rounded precision and recall."""
    def percent(top, bottom, rest=False, counters=1):
        if official:
            return round(100 * rest + (-1) ** rest * float(top / (bottom + 1e-3 * counters) * 100), 1)
        return 100 * (_ratio(bottom - top, bottom) if rest else _ratio(top, bottom))

    def questions(name, counters=1):
        s = sums.of(name)
        p, r = (percent(s["no_right"], s[key], counters=counters) for key in ("said_no", "no"))
        f1 = (round(2 * (p / 100) * (r / 100) / (p / 100 + r / 100 + (1e-3 if name == "existence" else 1e-4)) * 100, 1)
              if official else _ratio(2 * p * r, p + r))
        return {"accuracy": percent(s["correct"], s["n"], counters=counters), "precision": p, "recall": r, "f1": f1}

    asked, scores, by_type = {part for part, key in sums if key == "n"}, {}, {}
    if "generative" in asked:
        s = sums.of("generative")
        scores = {key: percent(s[top], s[bottom]) for key, (top, bottom) in CAPTION.items()}
        scores["hal"] = percent(s["non_hallu"], s["n"], rest=True)
    for name, types in DIMENSIONS.items():
        if set(types) <= asked:
            by_type[name] = questions(name, len(types))
        by_type |= {part: questions(part) for part in types if len(types) > 1 and part in asked}
    if set(DIMENSIONS) <= set(by_type):
        scores |= questions("all")
    if "chair" in scores and "f1" in scores:
        scores["amber_score"] = (100 - scores["chair"] + scores["f1"]) / 2                 # the paper's, not the code's
    return scores, by_type


def _amber_counts(item):
    """What an item adds to (part, key), for its type, its dimension and all questions."""
    part = item["type"]
    if part == "generative":
        keys = ("hal", "mentions", "cover", "cover_num", "cog", "cog_num", "non_hallu")
        return {(part, "n"): 1} | {(part, key): item[key] for key in keys}
    no, said_no = item["truth"] == "no", item["said"] == "no"
    counts = {"n": 1, "correct": item["right"], "no": no, "said_no": said_no, "no_right": no and said_no,
              "unparsed": item["said"] is None}
    homes = {part, "all", *(name for name, types in DIMENSIONS.items() if part in types)}
    return {(home, key): int(value) for home in homes for key, value in counts.items()}


def amber(queries, answers, annotations, relation, safe_words, nouns, similarity=None, mode="robust", partial=False,
          seed=0, resamples=1000):
    """queries: AMBER's query lines {"id", "image", "query"} (for the images and the questions' words; may be []).
    nouns: a function text -> its nouns in the singular, or {id: nouns}. similarity: see similar_words.
    -> percents: {"chair", "cover", "hal", "cog"} of the captions; {"accuracy", "precision", "recall", "f1"} of the
    questions, "no" being the positive class, where all dimensions are answered, and by dimension and type under
    "by_type"; "amber_score" = (100 - CHAIR + F1) / 2 of both; "unparsed", "n", "counts" under the official names, ..."""
    query, known = {line["id"]: line for line in queries}, {line["id"]: line for line in annotations}
    vocabulary, near, read, items = amber_vocabulary(relation), similar_words(similarity), _read(answers, "amber"), []
    coverage = _join([name for name, *_ in read], {name: amber_part(line["type"]) for name, line in known.items()},
                     partial)
    for name, text, _ in read:
        asked, truth = query.get(name, {}), known[name]["truth"]
        item = {"id": name, "image": asked.get("image", name), "type": amber_part(known[name]["type"])}
        if item["type"] == "generative":
            found = nouns(text) if callable(nouns) else nouns.get(name)
            if found is None:
                raise AnswerError(f"the file of nouns has none for answer {name}; extract them again.")
            found = [noun for noun in found if noun in vocabulary]
            item |= amber_caption(found, truth, known[name]["hallu"], relation, safe_words, near) | {"nouns": found}
        else:
            said = ({"Yes": "yes", "No": "no"}.get(text) if mode == "official"
                    else yes_no(text, asked.get("query", "")))
            item |= {"truth": truth, "said": said, "right": said == truth}
        items.append(item)
    total, draws = _sum(items, _amber_counts, seed, resamples)
    scores, by_type = _amber_measures(total, mode == "official")
    resampled, by_type_resampled = _amber_measures(draws, False)
    for name, found in by_type.items():
        found |= {"n": total[name, "n"], "unparsed": total[name, "unparsed"],
                  "intervals": _intervals(found, by_type_resampled[name])}
    add = 1e-3 if mode == "official" else 0
    counts = {f"{code}_{key}_{end}": total[name, source] + (add if end == "num" else 0)
              for name, code in COUNTERS.items() if (name, "n") in total for key, end, source in (
                  ("correct", "score", "correct"), ("correct", "num", "n"), ("no", "score", "no_right"),
                  ("no", "num", "no"), ("ans_no", "score", "no_right"), ("ans_no", "num", "said_no"))}
    if "chair" in scores:
        counts |= {f"{code}_{end}": total["generative", source] + (add if end == "num" else 0)
                   for code, top, bottom in (("chair", "hal", "mentions"), ("safe_cover", "cover", "cover_num"),
                                             ("hallu_cover", "cog", "cog_num"), ("non_hallu", "non_hallu", "n"))
                   for end, source in (("score", top), ("num", bottom))}
    remarks = [f"{name}: no answer is a no, so precision is 0/0; it and F1 are given as 0"
               for name in by_type if not total[name, "said_no"]]
    return {"mode": mode} | scores | {"unparsed": total["all", "unparsed"], "n": len(items), "by_type": by_type,
                                      "counts": counts, "coverage": coverage, "remarks": remarks,
                                      "intervals": _intervals(scores, resampled)}, items


# ---------------------------------------------------------------------------------------------- CHAIR
ANIMALS = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()


def synonyms(text, literal=False):
    """The text of a synonyms file -> {word or words: its COCO class, the first of its line}. literal: as the first
    CHAIR reads it, which finds no word that stands behind two spaces; for its official mode."""
    lines = [line.strip().split(", ") for line in text.splitlines() if line.strip()]
    return {word if literal else word.strip(): line[0].strip() for line in lines for word in line}


@lru_cache(maxsize=4)
def _pairs(words):
    """Two words that are one: those of the table, and what would fire for another class (a baby bear is no person).
    "wine glas" is what the first CHAIR's singular makes of wine glass."""
    pairs = {word.strip(): word.strip() for word in (*words, "home plate", "train track") if " " in word.strip()}
    pairs |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in ANIMALS}
    return pairs | {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet",
                    "wine glas": "wine glass"}


def joined(words, table, alone=True):
    """Words with the pairs made one, from the left; `alone=False` gives the pairs only."""
    pairs, out, i = _pairs(tuple(table)), [], 0
    while i < len(words):
        pair = pairs.get(" ".join(words[i:i + 2]))
        out += [pair] if pair else [words[i]] * alone
        i += 2 if pair else 1
    return out


def coco_objects(words, table):
    """[(word, its class)] of the words that the table knows; a seat beside a toilet is no chair."""
    seat = "seat" if "toilet" in words else None
    return [(word, table[word]) for word in words if word in table and word != seat]


def image_ids(answers):
    """The COCO images that answers to CHAIR or Object HalBench speak of; settings are passed over."""
    lines = [line for line in answers if isinstance(line, dict) and "settings" not in line]
    return {image_number(_first(line, "image_id", "image")) for line in lines} - {None}


def coco_truth(instances, captions, table, words, images):
    """What is in the images: the classes of COCO's instances and those that its captions name. instances, captions:
    lists of COCO's annotation files as json has them. -> {image id: set of classes}, for the images asked for that
    the files hold."""
    truth = {image["id"]: set() for part in (*instances, *captions) for image in part["images"] if image["id"] in images}
    for part in instances:
        names = {category["id"]: category["name"] for category in part.get("categories", [])}
        for mark in part["annotations"]:
            if mark["image_id"] in images:
                name = names.get(mark["category_id"])
                if name not in table:
                    raise AnswerError(f"COCO's category {name!r} is not in the synonyms; give the file that CHAIR or "
                                      "Object HalBench comes with.")
                truth.setdefault(mark["image_id"], set()).add(table[name])
    for part in captions:
        for mark in part["annotations"]:
            if mark["image_id"] in images:
                said = coco_objects(joined(words(mark["caption"]), table), table)
                truth.setdefault(mark["image_id"], set()).update(name for _, name in said)
    return truth


def object_list(reply, mode="robust"):
    """An extractor's reply -> the objects that it lists, or None. Official: JSON, or JSON in the last line where
    there is a [\"; robust: also a list anywhere in the text, "()", and single quotes."""
    candidates = [reply, *[reply.strip().split("\n")[-1]] * ('["' in reply)]
    if mode != "official":
        lists = re.findall(r"\[[^\[\]]*\]", reply)
        candidates += [*lists[-1:], *[re.sub(r"(?<![a-zA-Z])'|'(?![a-zA-Z])", '"', text) for text in lists[-1:]]]
        candidates += ["[]"] * (reply.strip() in ("()", "[ ]", ""))
    for text in candidates:
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, list):
            return [str(thing) for thing in found]
    return None


def extraction_requests(answers):
    """The captions that an extractor is asked about, {"id", "question", "answer"}: one of at most three words has no
    objects, unasked."""
    return [{"id": name, "question": str(_first(line, "prompt", "question", "query") or ""), "answer": caption}
            for name, caption, line in _captions(answers) if len(caption.split()) > 3]


def _captions(answers):
    """[(id, caption, line)], without a leading "Assistant:"."""
    return [(name, text.replace("Assistant:", "").strip(), line) for name, text, line in _read(answers, "objhal")]


def chair(answers, truth, table, words, replies=None, objects=None, mode="robust", partial=False, seed=0,
          resamples=1000):
    """CHAIR, and Object HalBench, which is CHAIR with other synonyms and lemmas and often an extractor's replies.

    answers: {"question_id", "image_id", "prompt", "text"}; the line's number where there is no id. truth: see
    coco_truth. table: see synonyms. words: a function text -> its words in the singular (nouns.lemmas for objhal,
    nouns.singulars for original). replies: {id: an extractor's reply}, with objects: a function of one object's name
    -> its words in the singular, and its runs of nouns (nouns.phrase). -> fractions {"chair_s", "chair_s_refine" (of captions with an object), "chair_i", "recall",
    "n", "n_with_objects", "mean_words", "unparsed", "counts", ...}. A caption whose reply cannot be read is left out
    and counted; in official mode it is refused, as the official code asks until it can read."""
    read, items, unread = _captions(answers), [], []
    _join([name for name, *_ in read], {name: "captions" for name, *_ in read}, partial)
    images = {name: image_number(_first(line, "image_id", "image")) for name, _, line in read}
    if strangers := [name for name in images if images[name] not in truth]:
        raise AnswerError(f"{len(strangers)} answers are about images that the annotations do not hold (ids "
                          f"{_few(strangers)}); give COCO's 2014 annotations of these images.")
    if replies is not None:
        asked = {name for name, caption, _ in read if len(caption.split()) > 3}
        _join([name for name in replies if name in asked or name not in images], dict.fromkeys(asked, "replies"),
              partial, "replies", "captions")
        read = [line for line in read if line[0] not in asked or line[0] in replies]
    for name, caption, _ in read:
        item = {"id": name, "image": images[name]}
        if replies is None:
            said = joined(words(caption), table)
        else:
            listed = object_list(replies[name], mode) if name in asked else []
            if listed is None:
                unread.append(name)
                items.append(item | {"said": None, "objects": None})
                continue
            said = [joined(lemmas, table, alone=False) or runs for lemmas, runs in map(objects, listed)]
            said = list(dict.fromkeys(noun for thing in said for noun in thing))
            item["objects"] = said
        found = coco_objects(said, table)
        misses = [kind for _, kind in found if kind not in truth[images[name]]]
        items.append(item | {
            "generated": found, "hallucinated": misses, "chair_s": int(bool(misses)),
            "chair_i": _ratio(len(misses), len(found)), "covered": len({kind for _, kind in found} - set(misses)),
            "present": len(truth[images[name]]), "words": len(caption.split(" "))})
    if unread and mode == "official" and not partial:
        raise AnswerError(f"{len(unread)} replies are no list of objects (ids {_few(unread)}); ask for them again, or "
                          "score the others with --partial.")

    def counts(item):
        if "generated" not in item:
            return {"unparsed": 1}
        return {"n": 1, "with": int(bool(item["generated"])), "captions": item["chair_s"], "words": item["words"],
                "mentions": len(item["generated"]), "misses": len(item["hallucinated"]), "covered": item["covered"],
                "present": item["present"]}

    def measure(sums):
        return {"chair_s": _ratio(sums["captions"], sums["n"]), "chair_s_refine": _ratio(sums["captions"], sums["with"]),
                "chair_i": _ratio(sums["misses"], sums["mentions"]), "recall": _ratio(sums["covered"], sums["present"]),
                "mean_words": _ratio(sums["words"], sums["n"])}

    total, draws = _sum(items, counts, seed, resamples)
    scores = measure(total)
    return {"mode": mode} | scores | {
        "n": total["n"], "n_with_objects": total["with"], "unparsed": total["unparsed"],
        "counts": {key: total[key] for key in ("captions", "mentions", "misses", "covered", "present")},
        "coverage": {"answered": len(items), "of": len(images)}, "remarks": [] if total["mentions"] else [
            "no caption names an object, so CHAIR_i is 0/0; it is given as 0"],
        "intervals": _intervals(scores, measure(draws))}, items


# ---------------------------------------------------------------------------------------------- MMHal-Bench
MMHAL = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
RATING = re.compile(r"(?:rating|score|rate)\W{0,6}?(?:is|of|as|:|=|-)?[\s*_`:=\[(\"']{0,6}(\d+(?:\.\d+)?)")


def rating(reply, mode="robust"):
    """A judge's reply -> 0..6, or None. Official: the only s for which "rating: s" stands in it. Robust: whole
    numbers after rating or score in whatever dress, if they agree, or a reply that is but a number."""
    text = reply.lower()
    if mode == "official":
        found = {score for score in range(7) if f"rating: {score}" in text}
    else:
        found = {float(number) for number in RATING.findall(text)}
        if bare := re.fullmatch(r"\W*(\d+)(?:\s*/\s*6)?\W*", text):
            found = {float(bare[1])}
    score = found.pop() if len(found) == 1 else None
    return int(score) if score in range(7) else None


def _mmhal_answers(template, answers, partial):
    """-> {place in the template: response}, joined by place, else by image and question; and the coverage."""
    places, read = {}, _read(answers, "mmhal")
    for place, record in enumerate(template):
        if not isinstance(record, dict) or not {"image_content", "question", "gt_answer"} <= record.keys():
            raise AnswerError(f"record {place} of the template lacks a question, contents or an answer; give "
                              "MMHal-Bench's template.")
        places[record.get("image_id"), record["question"].strip()] = place
    names, texts = [], []
    for name, text, line in read:
        key = (line.get("image_id"), str(_first(line, "question", "prompt") or "").strip())
        names.append(places.get(key, name))
        texts.append(text if "model_answer" in line and "answer" not in line
                     else text.replace("Assistant:", "").strip())
    coverage = _join(names, dict.fromkeys(range(len(template)), "all"), partial)
    return dict(zip(names, texts, strict=True)), coverage


def mmhal_prompts(template, answers, prompt, partial=False):
    """{place: what the judge is asked}: the prompt with contents, question, human answer and response in its four {}."""
    if prompt.count("{}") != 4:
        raise AnswerError(f"the judge's prompt has {prompt.count('{}')} places {{}} where it needs four, for contents, "
                          "question, answer and response; mend the prompt.")
    texts, _ = _mmhal_answers(template, answers, partial)
    parts, asked = prompt.split("{}"), {}
    for place in sorted(texts):
        record = template[place]
        filled = (", ".join(record["image_content"]), record["question"], record["gt_answer"], texts[place])
        asked[place] = parts[0] + "".join(word + part for word, part in zip(filled, parts[1:], strict=True))
    return asked


def mmhal(template, answers, replies, mode="robust", partial=False, seed=0, resamples=1000):
    """template: the 96 records; answers: lines with {"question_id": place in the template}, or with image_id and
    question, or the template with its model_answer filled in; replies: {place: the judge's reply}.
    -> {"score", "hallucination_rate" (fraction), "informativeness" (percent), "by_category", "unparsed", "n", ...}.
    Unreadable replies are zeros in official mode; in robust mode they are left out."""
    texts, coverage = _mmhal_answers(template, answers, partial)
    _join([place for place in replies if place in texts or place not in range(len(template))],
          dict.fromkeys(texts, "replies"), partial, "replies", "answers")
    items = []
    for place in sorted(set(texts) & set(replies)):
        score = rating(replies[place], mode)
        items.append({"id": place, "image": template[place].get("image_id", place), "type": MMHAL[place % 8],
                      "score": 0 if score is None and mode == "official" else score, "readable": score is not None,
                      "reply": replies[place]})

    def counts(item):
        score = item["score"]
        if score is None:
            return {("all", "unparsed"): 1}
        found = {"n": 1, "score": score, "hallucinated": int(score < 3), "unparsed": int(not item["readable"]),
                 "informative": score - 3 if score >= 3 else score}
        return {(home, key): value for home in ("all", item["type"]) for key, value in found.items()}

    def measure(sums):
        return {"score": _ratio(sums["score"], sums["n"]),
                "hallucination_rate": _ratio(sums["hallucinated"], sums["n"]),
                "informativeness": _ratio(sums["informative"], sums["n"]) / 3 * 100}

    total, draws = _sum(items, counts, seed, resamples)
    scores, by_category = measure(total.of("all")), {}
    for kind in MMHAL:
        if total[kind, "n"]:
            found = measure(total.of(kind))
            by_category[kind] = found | {"n": total[kind, "n"], "intervals": _intervals(
                found, measure(draws.of(kind)))}
    return {"mode": mode} | scores | {
        "by_category": by_category, "unparsed": total["all", "unparsed"], "n": total["all", "n"],
        "coverage": coverage | {"answered": len(items)}, "remarks": [], "intervals": _intervals(
            scores, measure(draws.of("all")))}, items
