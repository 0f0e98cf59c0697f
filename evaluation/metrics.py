"""The measures of hallucination that eval_hallu.py prints, as pure functions of answers: no model, no file.

    metrics.pope({split: questions}, answers)     accuracy, precision, recall, F1, share of yes; by split
    metrics.chair(answers, truth, ...)            CHAIR and Object HalBench: CHAIR_s, CHAIR_i, recall
    metrics.mmhal(template, answers, replies)     score, hallucination rate, by category
    metrics.classroom(answers)                    the built-in world's CHAIR, Cover, POPE, accuracy by kind
    metrics.difference(before, after)             the change of each classroom measure, paired by image

AMBER's are in amber.py. All are ratios of sums over images, with 95% intervals (stats.py):

    CHAIR_s = captions that name an absent object / captions             https://arxiv.org/abs/1809.02156
    CHAIR_i = mentions of absent objects / mentions of objects           (a word said twice is two mentions)
    Cover   = present objects that are named / present objects           https://arxiv.org/abs/2311.07397
    POPE    = accuracy, and F1 of "yes" = 2 tp / (said yes + true yes)   https://arxiv.org/abs/2305.10355
    Object HalBench's CHAIR_s leaves captions without objects out        https://arxiv.org/abs/2312.00849
    MMHal   = a judge's 0..6; below 3 is a hallucination                 https://arxiv.org/abs/2309.14525

An answer to a benchmark is {"question_id" or "id", "answer" or "response" or "text"}. In mode "official" the
numbers equal the official scorers' to the digit, faults included; "robust", the default, departs from them:
  1. Yes and no are understood in any spelling and in sentences; any other answer is `unparsed`, and wrong.
  2. Ratings are understood in the forms that judges use; a reply without one is `unparsed`, and left out.
  3. Nothing is rounded, and no 0.001 is added to a denominator (AMBER's code does both).
And in both modes:
  4. Answers join their questions by id (the POPE and MMHal scripts join by line; so do we where no line has
     an id), and duplicates, unknown ids, gaps and answers to other questions are refused.
  5. 0/0 is 0 with a remark, where POPE's script stops with an error.
"""
if __name__ == "__main__":
    exit("A part of eval_hallu.py; run: python eval_hallu.py --help")

from collections import Counter, defaultdict

import numpy as np

from data import UserError
from evaluation.objects import check_truth, coco_objects, hallucinated, joined, mentioned, sets
from evaluation.readers import object_list, official_yes_no, rating, yes_no
from evaluation.stats import (
    choice,
    few,
    first,
    image_name,
    image_number,
    intervals,
    join,
    once,
    paired,
    ratios,
    read,
    remarks,
    same_id,
    scored,
    tally,
)
from evaluation.words import phrase

# ---- classroom: an answer is a line of answers.jsonl with its `truth` (objects.py); in percent ----
CLASSROOM = {
    "chair_s": "CHAIR_s, lower is better",
    "chair_i": "CHAIR_i, lower is better",
    "cover": "Cover",
    "pope_random_acc": "POPE random, accuracy",
    "pope_random_f1": "POPE random, F1",
    "pope_adversarial_acc": "POPE adversarial, accuracy",
    "pope_adversarial_f1": "POPE adversarial, F1"}


def classroom_items(answers):
    """Checked answers -> items with "kind", "answer" and "hallucinated".

    An answer with none or several of its choices is wrong and cannot be read.
    """
    items, found = [], read(answers, "classroom")
    once(answer.id for answer in found)
    for name, text, line in found:
        check_truth(line, "answer")
        truth, kind = line["truth"], line["kind"]
        mentions, right = mentioned(text, truth)
        words = [word for word, _ in mentions]
        sums = _caption_sums(words, right) if kind == "caption" else _choice_sums({*words}, right, line)
        items.append({"id": name,
                      "image": line.get("image", name),
                      "kind": kind,
                      "answer": text,
                      "hallucinated": hallucinated(text, truth),
                      "unparsed": kind != "caption" and len({*words}) != 1,
                      "sums": sums})
    return items


def _caption_sums(words, present):
    misses = sum(word not in present for word in words)
    return {"chair_s": (int(misses > 0), 1),
            "chair_i": (misses, len(words)),
            "cover": (len(present.intersection(words)), len(present))}


def _choice_sums(words, answer, line):
    right = int(words == answer)
    sums = {line["kind"]: (right, 1)}
    if line["kind"] == "existence":
        yes, true = int(words == {"yes"}), int(answer == {"yes"})
        for name in sets(line["truth"]):
            sums[f"pope_{name}_acc"] = (right, 1)
            sums[f"pope_{name}_f1"] = (2 * yes * true, yes + true)           # 2PR/(P+R), as one ratio of sums
    return sums


def classroom(answers, resamples=None):
    """-> {"chair_s", ..., "pope_adversarial_f1", "by_kind": {kind: {"acc", "n", "interval"}}, "n", "images",
    "unparsed", "intervals": {key: [low, high]}}. A measure without a question is None."""
    items, by_kind = classroom_items(answers), {}
    total, draws = tally(items, resamples=resamples)
    found = scored(total, draws, scale=100)
    spread = found["intervals"]
    for kind in sorted(spread.keys() - CLASSROOM):
        n = total["all", kind].bottom
        by_kind[kind] = {"acc": found.pop(kind), "n": n, "interval": spread.pop(kind)}
    return dict.fromkeys(CLASSROOM) | found | {
        "by_kind": by_kind,
        "n": len(items),
        "images": len({item["image"] for item in items}),
        "unparsed": total["all", "items"].top,
        "remarks": remarks(total, read(answers))}


def difference(before, after):
    """The change of each measure between two sets of answers to the same questions, in points, with its 95%
    interval: {key: {"change", "interval"}, "by_kind": {kind: {"change", "interval"}}}."""
    if _asked(before) != _asked(after):
        raise UserError("the two files answer different questions; compare answers to the same scenes")
    found = paired(classroom_items(before), classroom_items(after))
    found = {key: {name: row[name] for name in ("change", "interval")} for key, row in found.items()}
    by_kind = {kind: found.pop(kind) for kind in sorted(found.keys() - CLASSROOM)}
    return found | {"by_kind": by_kind}


def _asked(answers):
    return {repr(line | {"answer": None}) for line in answers if "settings" not in line}


# ---- POPE ----
SPLITS = "random popular adversarial".split()             # as published


def pope(splits, answers, mode="robust", partial=False):
    """-> {"tp", "fp", "tn", "fn", "accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed", "n",
    "version", "by_split", ...} in fractions, and the items. Over several splits the counts are sums, and the
    ratios means of the splits. An unparsed answer is wrong, and not a yes in yes_ratio.

    splits: {split: its questions {"question_id", "image", "text", "label"}}. An answer is to the split that
    it names in `split`, which may be absent where there is only one; those without an id join by image and
    text, or are in the questions' order, as POPE's own script takes them.
    """
    asked = _pope_questions(splits)
    found = read(answers, "pope")
    names = _pope_names(found, splits, asked)
    coverage = join(names, found, asked, partial)
    items = [_pope_item(answer, asked[name], mode) for name, answer in zip(names, found, strict=True)]
    total, draws = tally(items, lambda item: [item["split"]])
    by_split, counts = {}, Counter()
    for split in dict.fromkeys(item["split"] for item in items):
        confusion = _confusion(total.of(split))
        counts.update(confusion)
        version = {"version": f"{split}, {len(splits[split]):,} questions"}
        by_split[split] = confusion | scored(total, draws, split) | version

    def mean(sums):
        each = [ratios(sums.of(split)) for split in by_split]
        return {key: np.mean([one[key] for one in each], axis=0) for key in each[0]}

    means = mean(total)
    return {"mode": mode,
            **counts,
            **means,
            "intervals": intervals(means, mean(draws)),
            "version": "; ".join(part["version"] for part in by_split.values()),
            "by_split": by_split,
            "coverage": coverage,
            "remarks": remarks(total, found)}, items


def _pope_questions(splits):
    """{"split id": the question's line, its split as its part}. Raises UserError for another label, and for
    duplicates."""
    asked = {}
    for split, lines in splits.items():
        once([line["question_id"] for line in lines], f"questions of {split}")
        for line in lines:
            if line["label"] not in ("yes", "no"):
                raise UserError(f"question {line['question_id']} of {split} has a `label` that is not yes or "
                                "no; give POPE's question file")
            asked[f"{split} {line['question_id']}"] = line | {"part": split}
    return asked


def _pope_names(found, splits, asked):
    """["split id"] of the answers; questions of one's own are one split, whatever the answers call theirs.

    Where a line has no question_id: by the questions' own `id`, else by image and text, else by its place.
    """
    only, *others = splits
    unsaid = "without `split`:" if others else only
    known, waiting, names = defaultdict(list), {split: iter(lines) for split, lines in splits.items()}, []
    for name, line in asked.items():
        for key in (same_id(line.get("id")), (line["part"], image_name(line), line["text"].strip())):
            known[key].append(name)
    for answer in found:
        line, key, name = answer.line, answer.id, answer.id
        split = first(line, "split", "category") or unsaid
        if not others and only not in SPLITS:
            split = only
        if split in waiting and not line.keys() & {"question_id", "id"}:
            name = next(waiting[split], {}).get("question_id", f"at place {name}")
            key = split, image_name(line), answer.question.strip()
        unique = "question_id" not in line and len(known[key]) == 1
        names.append(known[key][0] if unique else f"{split} {name}")
    return names


def _pope_item(answer, line, mode):
    """An answer beside its question. What cannot be read counts as called a yes where that is wrong."""
    said = official_yes_no(answer.text) if mode == "official" else yes_no(answer.text, line["text"])
    label = line["label"]
    item = {"id": answer.id,
            "split": line["part"],
            "image": line.get("image", answer.id),
            "label": label} | choice(said, label, "yes", (said == label) == (label == "yes"))
    item["sums"]["yes_ratio"] = (int(said == "yes"), 1)
    return item


def _confusion(sums):
    """The counts behind the measures of a split."""
    (tp, called), (_, true), (unparsed, n) = sums["precision"], sums["recall"], sums["items"]
    return {"tp": tp,
            "fp": called - tp,
            "tn": n - called - true + tp,
            "fn": true - tp,
            "unparsed": unparsed,
            "n": n}


# ---- CHAIR ----
def _caption(text):
    return text.replace("Assistant:", "").strip()


def _is_asked_about(answer):
    """Whether an extractor is asked for a caption's objects: one of at most three words has none."""
    return len(_caption(answer.text).split()) > 3


def extraction_prompts(answers, prompt):
    """{id: what an extractor is asked about a caption}: the prompt with {question} and {answer} filled in."""
    asked = {}
    for answer in filter(_is_asked_about, read(answers, "objhal")):
        parts = prompt.split("{answer}")                       # first: a question or an answer may contain it
        parts = [part.replace("{question}", answer.question) for part in parts]
        asked[answer.id] = _caption(answer.text).join(parts)
    return asked


def chair(answers, truth, table, lemmatize, replies=None, mode="robust"):
    """CHAIR, and Object HalBench, which is CHAIR with other synonyms and lemmas and often an extractor's
    replies. -> fractions {"chair_s", "chair_s_refine" (of the captions with an object), "chair_i", "recall"},
    "n", "n_with_objects", "mean_words", "unparsed", "counts", ...; and the items.

    answers: {"question_id", "image_id", "prompt", "text"}. truth, table: from objects.py. lemmatize: a
    function text -> its words in the singular: words.lemmas for the scorer objhal, words.singulars for the
    original. replies: {id: an extractor's reply}; a caption without one is not scored, and one whose reply
    cannot be read is left out and counted as unparsed.
    """
    found = read(answers, "objhal")
    once(answer.id for answer in found)
    images = {answer.id: image_number(first(answer.line, "image_id", "image")) for answer in found}
    if strangers := [name for name in images if images[name] not in truth]:
        raise UserError(f"{len(strangers)} answers are about images that the annotations do not hold (ids "
                        f"{few(strangers)}); give COCO's 2014 annotations, or the right answers")
    if replies is not None:
        replies = replies | {answer.id: "[]" for answer in found if not _is_asked_about(answer)}
        found = [answer for answer in found if answer.id in replies]
    items = []
    for name, text, _ in found:
        item = {"id": name, "image": images[name]}
        if replies is None:
            named = joined(lemmatize(text), table)
        else:
            named = item["objects"] = _extracted(replies[name] or "", table, mode)
        if named is None:
            item |= {"unparsed": True, "sums": {}}
        else:
            item |= _chair_item(coco_objects(named, table), truth[images[name]], _caption(text))
        items.append(item)
    total, draws = tally(items)
    sums = total.of("all")
    return {"mode": mode,
            **scored(total, draws),
            "n": sums["chair_s"].bottom,
            "n_with_objects": sums["chair_s_refine"].bottom,
            "unparsed": sums["items"].top,
            "counts": {"captions": sums["chair_s"].top,
                       "mentions": sums["chair_i"].bottom,
                       "misses": sums["chair_i"].top,
                       "covered": sums["recall"].top,
                       "present": sums["recall"].bottom},
            "coverage": {"answered": len(items), "of": len(images)},
            "remarks": remarks(total, found)}, items


def _extracted(reply, table, mode):
    """The nouns that an extractor lists, each once; None if its reply cannot be read."""
    listed = object_list(reply, mode)
    if listed is None:
        return None
    found = []
    for lemmas, runs in map(phrase, listed):
        found += joined(lemmas, table, alone=False) or runs
    return list(dict.fromkeys(found))


def _chair_item(named, present, caption):
    """named: [(word, class)] that a caption names; present: the classes in its image."""
    kinds = [kind for _, kind in named]
    misses = [kind for kind in kinds if kind not in present]
    wrong = int(bool(misses))
    return {"generated": named,
            "hallucinated": misses,
            "sums": {"chair_s": (wrong, 1),
                     "chair_s_refine": (wrong, int(bool(named))),
                     "chair_i": (len(misses), len(named)),
                     "recall": (len(present.intersection(kinds)), len(present)),
                     "mean_words": (len(caption.split(" ")), 1)}}


# ---- MMHal-Bench ----
MMHAL = "attribute adversarial comparison counting relation environment holistic other".split()


def _mmhal_answers(template, answers, partial):
    """{place in the template: response}, joined by image, else by id; and the coverage."""
    places = {record.get("image_id"): place for place, record in enumerate(template)}
    found, names = read(answers, "mmhal"), []
    for answer in found:
        image = answer.line.get("image_id", "")
        names.append(places.get(image, f"image {image}" if image else answer.id))
    asked = {place: {"part": "all", "text": record["question"]} for place, record in enumerate(template)}
    coverage = join(names, found, asked, partial)
    said = {name: _caption(answer.text) for name, answer in zip(names, found, strict=True)}
    return dict(sorted(said.items())), coverage


def mmhal_prompts(template, answers, prompt, partial=False):
    """{place: what the judge is asked}: the prompt, its four {} filled with contents, question, human answer
    and response."""
    pieces, asked = prompt.split("{}"), {}
    for place, text in _mmhal_answers(template, answers, partial)[0].items():
        record = template[place]
        values = (", ".join(record["image_content"]), record["question"], record["gt_answer"], text, "")
        asked[place] = "".join(piece + value for piece, value in zip(pieces, values, strict=True))
    return asked


def mmhal(template, answers, replies, mode="robust", partial=False):
    """-> {"score", "hallucination_rate" (fraction), "informativeness" (percent), "by_category", "unparsed",
    "n", ...}, and the items. A reply that cannot be read is a 0 in official mode, and left out in robust
    mode; an answer without a reply is not scored.

    template: the 96 records; answers: lines with image_id and question, or with question_id = place in the
    template; or the template with its model_answer filled in. replies: {place: the judge's reply, None if it
    was cut off}, to what mmhal_prompts asks.
    """
    _, coverage = _mmhal_answers(template, answers, partial)
    items = []
    for place, reply in replies.items():
        said = rating(reply or "", mode)
        score = 0 if said is None and mode == "official" and reply is not None else said
        sums = {}
        if score is not None:
            told = score - 3 if score >= 3 else score
            sums = {"score": (score, 1),
                    "hallucination_rate": (int(score < 3), 1),
                    "informativeness": (100 * told, 3)}
        items.append({"id": place,
                      "image": template[place].get("image_id", place),
                      "type": MMHAL[place % 8],
                      "score": score,
                      "unparsed": said is None,
                      "sums": sums,
                      "reply": reply})
    total, draws = tally(items, lambda item: ["all", item["type"]])
    by_category = {}
    for kind in MMHAL:
        if n := total[kind, "score"].bottom:
            by_category[kind] = scored(total, draws, kind) | {"n": n}
    return {"mode": mode,
            **scored(total, draws),
            "by_category": by_category,
            "unparsed": total["all", "items"].top,
            "n": total["all", "score"].bottom,
            "coverage": coverage | {"answered": len(items)},
            "remarks": remarks(total, read(answers))}, items
