"""The measures of hallucination, as pure functions of answers: no model, no torch, no file is read here.

    metrics.pope(questions, answers)              accuracy, precision, recall, F1, share of yes; by split
    metrics.amber(queries, answers, ...)          CHAIR, Cover, Hal, Cog; accuracy, F1 by type; AMBER score
    metrics.chair(answers, truth, ...)            CHAIR and Object HalBench: CHAIR_s, CHAIR_i, recall
    metrics.mmhal(template, answers, replies)     score, hallucination rate, by category
    metrics.classroom(answers)                    the built-in world's CHAIR, Cover, POPE, accuracy by kind
    metrics.difference(before, after)             the change of each classroom measure, paired by image
    metrics.hallucinated(answer, truth)           the words of one answer that its image does not bear out

All measures are ratios of sums over images, with bootstrap 95% intervals that draw images with replacement:

    CHAIR_s = captions that name an absent object / captions             https://arxiv.org/abs/1809.02156
    CHAIR_i = mentions of absent objects / mentions of objects           (a word said twice is two mentions)
    Cover   = present objects that are named / present objects           https://arxiv.org/abs/2311.07397
    POPE    = accuracy, and F1 of "yes" = 2 tp / (said yes + true yes)   https://arxiv.org/abs/2305.10355
    Object HalBench's CHAIR_s leaves captions without objects out        https://arxiv.org/abs/2312.00849
    MMHal   = a judge's 0..6; below 3 is a hallucination                 https://arxiv.org/abs/2309.14525

An answer to a benchmark is {"question_id" or "id", "answer" or "response" or "text"}. In mode "official" the
numbers equal the official scorers' to the digit, faults included; "robust", the default, departs from them:
  1. Yes and no are understood in any spelling and in sentences; what says neither is `unparsed`, and wrong.
  2. Ratings are understood in the forms that judges use; a reply without one is `unparsed`, and left out.
  3. Nothing is rounded, and no 0.001 stands in a denominator (AMBER's does).
And in both modes:
  4. Answers join their questions by id (the POPE and MMHal scripts join by line), and duplicates, strangers
     and gaps are refused.
  5. 0/0 is 0 with a remark, where POPE's script stops with an error.

A classroom answer is a line of answers.jsonl, {"id", "image", "question", "kind", "truth", "answer"}, with
the truth by kind:

    caption      {"present": [words of the objects in the image], "absent": [the world's other object words]}
    existence    {"answer": "yes"|"no", "choices": ["yes", "no"], "set": "random"|"adversarial"|[both]}
    any other    {"answer": word, "choices": [words]}

The words are that world's own (only a plural -s or -es is understood), the measures percents, and a measure
of a kind that was never asked is None. An answer with none or several of its choices is wrong and unparsed.
"""

import re
from functools import lru_cache

import numpy as np

from data import UserError
from objects import amber_caption, amber_vocabulary, coco_objects, joined, similar_words
from replies import object_list, official_yes_no, rating, strict_yes_no, yes_no
from tally import add_up, few, first, image_number, interval, intervals, join, ratio, read

POPE_SETS = ("random", "adversarial")
CLASSROOM = {
    "chair_s": "CHAIR_s, lower is better", "chair_i": "CHAIR_i, lower is better", "cover": "Cover",
    "pope_random_acc": "POPE random, accuracy", "pope_random_f1": "POPE random, F1",
    "pope_adversarial_acc": "POPE adversarial, accuracy", "pope_adversarial_f1": "POPE adversarial, F1"}


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
    """An UserError where what is known of a question would not do to score an answer to it."""
    for key, types in (("id", (str, int)), ("kind", str), ("truth", dict)):
        if not isinstance(item, dict) or not isinstance(item.get(key), types):
            raise UserError(f"{where} has no usable `{key}`; make the scenes and their answers again.")
        where += f" (id {item['id']})" if key == "id" else ""
    truth = item["truth"]

    def words(key):
        return isinstance(truth.get(key), list) and all(isinstance(w, str) and w for w in truth[key])

    if item["kind"] == "caption":
        if not (words("present") and words("absent")):
            raise UserError(f"{where}: a caption needs `present` and `absent`; make the scenes again.")
    elif not (words("choices") and truth.get("answer") in truth["choices"]):
        raise UserError(f"{where}: the truth needs `choices` with its `answer`; make the scenes again.")
    elif item["kind"] == "existence" and (set(truth["choices"]) != {"yes", "no"}
                                          or not set(_sets(truth)) <= set(POPE_SETS)):
        raise UserError(f"{where}: an existence question needs the choices yes and no, and a `set` out of "
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
        raise UserError("there are no answers to score; write them with `eval_hallu.py answers classroom`.")
    seen, rows, behind, unparsed = set(), {}, {}, 0
    for number, item in enumerate(items, 1):
        check_truth(item, f"answer {number}")
        if not isinstance(item.get("answer"), str):
            raise UserError(f"answer {number} (id {item['id']}) has no text in `answer`; answer it again.")
        name = (item["id"], item.get("question"), item["kind"], tuple(_sets(item["truth"])))
        if name in seen:
            raise UserError(f"answer {number} (id {item['id']}) stands there twice; keep one of the two.")
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
            result[key], result["intervals"][key] = point, interval(draws[:, k], point)
        elif behind[k]:
            result["by_kind"][key] = {"acc": point, "n": behind[k], "interval": interval(draws[:, k], point)}
    result["n"] = behind[0] + sum(kind["n"] for kind in result["by_kind"].values())
    return result


def difference(before, after, seed=0, resamples=1000):
    """The change of each measure between two sets of answers to the same questions, in points, with its 95%
    interval: {key: {"change", "interval"}, "by_kind": {kind: {"change", "interval"}}}."""
    def asked(answers):
        return sorted(repr([a.get(key) for key in ("id", "image", "question", "kind", "truth")])
                      for a in answers if "settings" not in a)

    if asked(before) != asked(after):
        raise UserError("the two files answer different questions; compare answers to the same scenes.")
    (keys, images, first, behind, _), (_, others, second, *_) = _table(before), _table(after)
    place = {image: i for i, image in enumerate(others)}
    second = second[[place[image] for image in images]]
    old, new = _resample([first, second], seed, resamples)
    change = np.nan_to_num(_percent(second.sum(0))) - np.nan_to_num(_percent(first.sum(0)))
    result = {"by_kind": {}}
    for k, key in enumerate(keys):
        if behind[k]:
            home, point = result if key in CLASSROOM else result["by_kind"], float(change[k])
            home[key] = {"change": point, "interval": interval(new[:, k] - old[:, k], point)}
    return result


# ---------------------------------------------------------------------------------------------- POPE
def pope(questions, answers, mode="robust", partial=False, seed=0, resamples=1000):
    """-> {"tp", "fp", "tn", "fn", "accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed", "n",
    "version", "by_split", ...} in fractions, and the items. Over several splits the counts are sums, and the
    ratios means of the splits. An unparsed answer counts as the wrong one; it is no yes in yes_ratio.

    questions: one split's lines {"question_id", "image", "text", "label"}, or {split: lines}. An answer is to
    the split that it names in `split`; without one, to the only split whose questions all the answers repeat.
    """
    splits = questions if isinstance(questions, dict) else {"pope": questions}
    asked = {}
    for split, lines in splits.items():
        for line in lines:
            if line.get("label") not in ("yes", "no") or "question_id" not in line:
                raise UserError(f"a question of {split} lacks a `question_id` or a `label` yes or no; give "
                                  "POPE's question file.")
            if (split, line["question_id"]) in asked:
                raise UserError(f"question {line['question_id']} of {split} stands there twice; give one "
                                  "split a file.")
            asked[split, line["question_id"]] = line
    found = read(answers, "pope")
    names = [(line["split"], name) for name, _, line in found if "split" in line]
    if len(names) < len(found):
        split = _split_of(found, splits, asked)
        names = [(split, name) for name, _, _ in found]
    coverage = join(names, {name: name[0] for name in asked}, partial)
    items = []
    for (split, name), (_, text, _) in zip(names, found, strict=True):
        line = asked[split, name]
        said = official_yes_no(text) if mode == "official" else yes_no(text, line.get("text", ""))
        items.append({"id": name, "split": split, "image": line.get("image", name), "label": line["label"],
                      "said": said, "right": said == line["label"]})

    def counts(item):
        cell = ("t" if item["right"] else "f") + ("p" if (item["label"] == "yes") == item["right"] else "n")
        return {(item["split"], key): 1 for key in (cell, "n", f"said {item['said']}")}

    def measure(sums):
        precision = ratio(sums["tp"], sums["tp"] + sums["fp"])
        recall = ratio(sums["tp"], sums["tp"] + sums["fn"])
        return {"accuracy": ratio(sums["tp"] + sums["tn"], sums["n"]), "precision": precision,
                "recall": recall, "f1": ratio(2 * precision * recall, precision + recall),
                "yes_ratio": ratio(sums["said yes"], sums["n"])}

    total, draws = add_up(items, counts, seed, resamples)
    by_split, resampled, remarks = {}, [], []
    for split in dict.fromkeys(item["split"] for item in items):
        sums, points = total.of(split), measure(total.of(split))
        resampled.append(measure(draws.of(split)))
        by_split[split] = {key: sums[key] for key in ("tp", "fp", "tn", "fn")} | points | {
            "unparsed": sums["said None"], "n": sums["n"], "intervals": intervals(points, resampled[-1]),
            "version": f"{split}, {len(splits[split]):,} questions"}
        remarks += [f"{split}: {what}, so {key} is 0/0; it and F1 are given as 0" for what, key, n in (
            ("no answer is a yes", "precision", sums["tp"] + sums["fp"]),
            ("no true answer is a yes", "recall", sums["tp"] + sums["fn"])) if not n]
    parts, points = list(by_split.values()), {}
    scores = {key: sum(part[key] for part in parts) for key in ("tp", "fp", "tn", "fn", "unparsed", "n")}
    for key in resampled[0]:
        points[key] = float(np.mean([part[key] for part in parts])) if len(parts) > 1 else parts[0][key]
    means = {key: np.mean([draw[key] for draw in resampled], axis=0) for key in points}
    return {"mode": mode} | scores | points | {
        "version": "; ".join(part["version"] for part in parts), "by_split": by_split, "coverage": coverage,
        "remarks": remarks, "intervals": intervals(points, means)}, items


def _split_of(found, splits, asked):
    """The one split whose questions these answers can be to."""
    def repeats(split, name, line):
        given = first(line, "question", "prompt", *["text"] * ("answer" in line))
        question = asked.get((split, name), {}).get("text")
        return question is not None and (given is None or question.strip() in str(given))

    if len(splits) == 1:
        return next(iter(splits))
    fitting = [split for split in splits if all(repeats(split, name, line) for name, _, line in found)]
    if len(fitting) != 1:
        raise UserError(f"the answers fit {len(fitting)} of the splits {', '.join(splits)}; write its "
                          "`split` into each answer, or give one split's question file.")
    return fitting[0]


# ---------------------------------------------------------------------------------------------- AMBER
DIMENSIONS = {"existence": ("existence",), "attribute": ("state", "number", "action"),
              "relation": ("relation",)}
QUESTIONS = {"all": "qa", "state": "as_qa", "number": "an_qa", "action": "aa_qa", "relation": "asso_qa",
             "existence": "ha_qa"}                           # what begins the official counters' names
CAPTIONS = {"chair": ("hal", "mentions"), "cover": ("cover", "cover_num"), "cog": ("cog", "cog_num")}


def amber_part(kind):
    """The `type` of an annotation -> generative, existence, state, number, action or relation."""
    last = kind.rsplit("-", 1)[-1]
    return {"hallucination": "existence", "discriminative": "relation"}.get(last, last)


def _amber_counts(item):
    """What an item adds to {(part, key): count}, for its type, its dimension and all questions."""
    part = item["type"]
    if part == "generative":
        keys = [key for pair in CAPTIONS.values() for key in pair] + ["non_hallu"]
        return {(part, "n"): 1} | {(part, key): item[key] for key in keys}
    no, said_no = item["truth"] == "no", item["said"] == "no"
    counts = {"n": 1, "correct": item["right"], "no": no, "said_no": said_no, "no_right": no and said_no,
              "unparsed": item["said"] is None}
    homes = {part, "all", *(name for name, types in DIMENSIONS.items() if part in types)}
    return {(home, key): int(value) for home in homes for key, value in counts.items()}


def _amber_measures(sums, official):
    """Sums of _amber_counts -> (scores, those by type), in percent. The official scorer adds 0.001 to every
    sum that it divides by, rounds to one decimal, and makes F1 of the rounded precision and recall."""
    def percent(top, bottom, sums_added=1, rest=False):
        if not official:
            return 100 * (ratio(bottom - top, bottom) if rest else ratio(top, bottom))
        share = float(top / (bottom + 1e-3 * sums_added) * 100)
        return round(100 - share if rest else share, 1)

    def questions(name, sums_added=1):
        s = sums.of(name)
        p, r = (percent(s["no_right"], s[key], sums_added) for key in ("said_no", "no"))
        if official:
            small = 1e-3 if name == "existence" else 1e-4
            f1 = round(2 * (p / 100) * (r / 100) / (p / 100 + r / 100 + small) * 100, 1)
        else:
            f1 = ratio(2 * p * r, p + r)
        return {"accuracy": percent(s["correct"], s["n"], sums_added), "precision": p, "recall": r, "f1": f1}

    asked, scores, by_type = {part for part, key in sums if key == "n"}, {}, {}
    if "generative" in asked:
        s = sums.of("generative")
        scores = {key: percent(s[top], s[bottom]) for key, (top, bottom) in CAPTIONS.items()}
        scores["hal"] = percent(s["non_hallu"], s["n"], rest=True)
    for name, types in DIMENSIONS.items():
        if set(types) <= asked:
            by_type[name] = questions(name, sums_added=len(types))
        by_type |= {part: questions(part) for part in types if len(types) > 1 and part in asked}
    if set(DIMENSIONS) <= set(by_type):
        scores |= questions("all")
    if "chair" in scores and "f1" in scores:
        scores["amber_score"] = (100 - scores["chair"] + scores["f1"]) / 2      # the paper's, not in the code
    return scores, by_type


def amber(queries, answers, annotations, relation, safe_words, nouns, similarity=None, mode="robust",
          partial=False, seed=0, resamples=1000):
    """-> percents {"chair", "cover", "hal", "cog"} of the captions; {"accuracy", "precision", "recall", "f1"}
    of the questions, "no" being the positive class, where all three dimensions are answered; the same by
    dimension and type under "by_type"; "amber_score" of both; "unparsed", "n", "counts" under the official
    names, ...; and the items. What is not answered at all has no key.

    queries: AMBER's query files {"id", "image", "query"} in one list, for the images and the questions'
    words; may be []. annotations, relation: its files. nouns: a function text -> nouns in the singular, or
    {id: nouns}. similarity: see objects.similar_words.
    """
    query, known = {line["id"]: line for line in queries}, {line["id"]: line for line in annotations}
    vocabulary, near = amber_vocabulary(relation), similar_words(similarity)
    found, items, safe_words = read(answers, "amber"), [], set(safe_words)
    parts = {name: amber_part(line["type"]) for name, line in known.items()}
    coverage = join([name for name, *_ in found], parts, partial)
    for name, text, _ in found:
        asked, truth = query.get(name, {}), known[name]["truth"]
        item = {"id": name, "image": asked.get("image", name), "type": parts[name]}
        if parts[name] == "generative":
            named = nouns(text) if callable(nouns) else nouns.get(name)
            if named is None:
                raise UserError(f"the file of nouns has none for answer {name}; extract them again.")
            named = [noun for noun in named if noun in vocabulary]
            item |= amber_caption(named, truth, known[name]["hallu"], relation, safe_words, near)
            item["nouns"] = named
        else:
            said = strict_yes_no(text) if mode == "official" else yes_no(text, asked.get("query", ""))
            item |= {"truth": truth, "said": said, "right": said == truth}
        items.append(item)
    total, draws = add_up(items, _amber_counts, seed, resamples)
    scores, by_type = _amber_measures(total, mode == "official")
    resampled, resampled_by_type = _amber_measures(draws, False)
    for name, points in by_type.items():
        by_type[name] = points | {"n": total[name, "n"], "unparsed": total[name, "unparsed"],
                                  "intervals": intervals(points, resampled_by_type[name])}
    return {"mode": mode} | scores | {
        "unparsed": total["all", "unparsed"], "n": len(items), "by_type": by_type,
        "counts": _amber_counters(total, 1e-3 if mode == "official" else 0), "coverage": coverage,
        "remarks": [f"{name}: no answer is a no, so precision is 0/0; it and F1 are given as 0"
                    for name in by_type if not total[name, "said_no"]],
        "intervals": intervals(scores, resampled)}, items


def _amber_counters(total, added):
    """The official scorer's counters by their names, with what it adds to those that it divides by."""
    kinds = {"correct": ("correct", "n"), "no": ("no_right", "no"), "ans_no": ("no_right", "said_no")}
    pairs = {f"{code}_{kind}": (home, *pair)
             for home, code in QUESTIONS.items() for kind, pair in kinds.items()}
    names = {"chair": "chair", "cover": "safe_cover", "cog": "hallu_cover"}
    pairs |= {names[key]: ("generative", *pair) for key, pair in CAPTIONS.items()}
    pairs["non_hallu"] = ("generative", "non_hallu", "n")
    counters = {}
    for name, (home, top, bottom) in pairs.items():
        if (home, "n") in total:
            counters |= {f"{name}_score": total[home, top], f"{name}_num": total[home, bottom] + added}
    return counters


# ---------------------------------------------------------------------------------------------- CHAIR
def _captions(answers):
    """[(id, text, caption, line)], the captions being the texts without "Assistant:"."""
    return [(name, text, text.replace("Assistant:", "").strip(), line)
            for name, text, line in read(answers, "objhal")]


def extraction_requests(answers):
    """The captions that an extractor is asked about, [{"id", "question", "answer"}]: one of at most three
    words has no objects, unasked."""
    return [{"id": name, "question": str(first(line, "prompt", "question", "query") or ""), "answer": caption}
            for name, _, caption, line in _captions(answers) if len(caption.split()) > 3]


def chair(answers, truth, table, words, replies=None, phrase=None, mode="robust", partial=False, seed=0,
          resamples=1000):
    """CHAIR, and Object HalBench, which is CHAIR with other synonyms and lemmas and often an extractor's
    replies. -> fractions {"chair_s", "chair_s_refine" (of the captions with an object), "chair_i", "recall"},
    "n", "n_with_objects", "mean_words", "unparsed", "counts", ...;
    and the items.

    answers: {"question_id", "image_id", "prompt", "text"}. truth, table: from objects.py. words: a function
    text -> its words in the singular: nouns.lemmas for the scorer objhal, nouns.singulars for the original.
    replies: {id: an extractor's reply}, with phrase: a function of one object's name -> its words in the
    singular, and its runs of nouns (nouns.phrase). A caption whose reply cannot be read is left out and
    counted as unparsed; in official mode that is refused, since the official code asks until it can read.
    """
    found, items, unread = _captions(answers), [], []
    join([name for name, *_ in found], {name: "captions" for name, *_ in found}, partial)
    images = {name: image_number(first(line, "image_id", "image")) for name, *_, line in found}
    if strangers := [name for name in images if images[name] not in truth]:
        raise UserError(f"{len(strangers)} answers are about images that the annotations do not hold (ids "
                          f"{few(strangers)}); give COCO's 2014 annotations, or the right answers.")
    asked = {name for name, _, caption, _ in found if replies is not None and len(caption.split()) > 3}
    if replies is not None:
        join([name for name in replies if name in asked or name not in images],
             dict.fromkeys(asked, "replies"), partial, "replies", "captions")
        found = [line for line in found if line[0] not in asked or line[0] in replies]
    for name, text, caption, _ in found:
        item, named = {"id": name, "image": images[name]}, joined(words(text), table)
        if replies is not None:
            listed = object_list(replies[name], mode) if name in asked else []
            if listed is None:
                unread.append(name)
                items.append(item | {"unparsed": True})
                continue
            named = [joined(lemmas, table, alone=False) or runs for lemmas, runs in map(phrase, listed)]
            item["objects"] = named = list(dict.fromkeys(noun for nouns in named for noun in nouns))
        named = coco_objects(named, table)
        misses = [kind for _, kind in named if kind not in truth[images[name]]]
        items.append(item | {
            "generated": named, "hallucinated": misses, "chair_s": int(bool(misses)),
            "chair_i": ratio(len(misses), len(named)), "words": len(caption.split(" ")),
            "covered": len({kind for _, kind in named} - set(misses)), "present": len(truth[images[name]])})
    if unread and mode == "official" and not partial:
        raise UserError(f"{len(unread)} replies are no list of objects (ids {few(unread)}); ask for them "
                          "again, or score the others with --partial.")

    def counts(item):
        if "unparsed" in item:
            return {"unparsed": 1}
        return {"n": 1, "with": int(bool(item["generated"])), "captions": item["chair_s"],
                "mentions": len(item["generated"]), "misses": len(item["hallucinated"]),
                "covered": item["covered"], "present": item["present"], "words": item["words"]}

    def measure(sums):
        return {"chair_s": ratio(sums["captions"], sums["n"]),
                "chair_s_refine": ratio(sums["captions"], sums["with"]),
                "chair_i": ratio(sums["misses"], sums["mentions"]),
                "recall": ratio(sums["covered"], sums["present"]),
                "mean_words": ratio(sums["words"], sums["n"])}

    total, draws = add_up(items, counts, seed, resamples)
    scores = measure(total)
    return {"mode": mode} | scores | {
        "n": total["n"], "n_with_objects": total["with"], "unparsed": total["unparsed"],
        "counts": {key: total[key] for key in ("captions", "mentions", "misses", "covered", "present")},
        "coverage": {"answered": len(items), "of": len(images)},
        "remarks": [] if total["mentions"] else ["no caption names an object: CHAIR_i is 0/0, given as 0"],
        "intervals": intervals(scores, measure(draws))}, items


# ---------------------------------------------------------------------------------------------- MMHal-Bench
MMHAL = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")


def _mmhal_answers(template, answers, partial):
    """-> {place in the template: response}, joined by image and question, else by id; and the coverage."""
    places = {}
    for place, record in enumerate(template):
        if not isinstance(record, dict) or not {"image_content", "question", "gt_answer"} <= record.keys():
            raise UserError(f"record {place} of the template lacks its question, contents or answer; give "
                              "MMHal-Bench's template.")
        places.setdefault((record.get("image_id"), record["question"].strip()), place)
    texts = []
    for name, text, line in read(answers, "mmhal"):
        key = (line.get("image_id"), str(first(line, "question", "prompt") or "").strip())
        merged = "model_answer" in line and "answer" not in line                # has been through this before
        texts.append((places.get(key, name), text if merged else text.replace("Assistant:", "").strip()))
    coverage = join([place for place, _ in texts], dict.fromkeys(range(len(template)), "all"), partial)
    return dict(sorted(texts)), coverage


def mmhal_prompts(template, answers, prompt, partial=False):
    """{place: what the judge is asked}: the prompt, its four {} filled with contents, question, human answer
    and response."""
    *parts, last = prompt.split("{}")
    if len(parts) != 4:
        raise UserError(f"the judge's prompt has {len(parts)} places {{}} and needs four, for contents, "
                          "question, answer and response; mend the prompt.")
    asked = {}
    for place, text in _mmhal_answers(template, answers, partial)[0].items():
        record = template[place]
        values = (", ".join(record["image_content"]), record["question"], record["gt_answer"], text)
        asked[place] = "".join(part + value for part, value in zip(parts, values, strict=True)) + last
    return asked


def mmhal(template, answers, replies, mode="robust", partial=False, seed=0, resamples=1000):
    """-> {"score", "hallucination_rate" (fraction), "informativeness" (percent), "by_category", "unparsed",
    "n", ...}, and the items. A reply that cannot be read is a 0 in official mode, and left out in robust
    mode.

    template: the 96 records; answers: lines with image_id and question, or with question_id = place in the
    template; or the template with its model_answer filled in. replies: {place: the judge's reply}.
    """
    texts, coverage = _mmhal_answers(template, answers, partial)
    join([place for place in replies if place in texts or place not in range(len(template))],
         dict.fromkeys(texts, "replies"), partial, "replies", "answers")
    items = []
    for place in (place for place in texts if place in replies):
        score = rating(replies[place], mode)
        items.append({"id": place, "image": template[place].get("image_id", place), "type": MMHAL[place % 8],
                      "score": 0 if score is None and mode == "official" else score,
                      "unparsed": score is None, "reply": replies[place]})

    def counts(item):
        score, found = item["score"], {"unparsed": int(item["unparsed"])}
        if score is not None:
            found |= {"n": 1, "score": score, "hallucinated": int(score < 3),
                      "informative": score - 3 if score >= 3 else score}
        return {(home, key): value for home in ("all", item["type"]) for key, value in found.items()}

    def measure(sums):
        return {"score": ratio(sums["score"], sums["n"]),
                "hallucination_rate": ratio(sums["hallucinated"], sums["n"]),
                "informativeness": ratio(sums["informative"], sums["n"]) / 3 * 100}

    total, draws = add_up(items, counts, seed, resamples)
    scores, by_category = measure(total.of("all")), {}
    for kind in (kind for kind in MMHAL if total[kind, "n"]):
        points = measure(total.of(kind))
        by_category[kind] = points | {"n": total[kind, "n"],
                                      "intervals": intervals(points, measure(draws.of(kind)))}
    return {"mode": mode} | scores | {
        "by_category": by_category, "unparsed": total["all", "unparsed"], "n": total["all", "n"],
        "coverage": coverage | {"answered": len(items)},
        "remarks": ["no reply can be read, so there is no score"] * (not total["all", "n"]),
        "intervals": intervals(scores, measure(draws.of("all")))}, items
