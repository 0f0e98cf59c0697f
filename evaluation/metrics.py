"""The measures of hallucination that eval_hallu.py prints, as pure functions of answers: no model, no file.

    metrics.pope(questions, answers)              accuracy, precision, recall, F1, share of yes; by split
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
  4. Answers join their questions by id (the POPE and MMHal scripts join by line), and duplicates, unknown
     ids and gaps are refused.
  5. 0/0 is 0 with a remark, where POPE's script stops with an error.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of eval_hallu.py; run: python eval_hallu.py --help"))

import re

import numpy as np

from data import UserError
from evaluation.objects import check_truth, coco_objects, hallucinated, joined, mentions, sets
from evaluation.readers import object_list, official_yes_no, rating, yes_no
from evaluation.stats import (
    add_up,
    few,
    first,
    image_number,
    join,
    join_replies,
    once,
    paired,
    parts,
    percent,
    ratio,
    read,
    scored,
    under,
)

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
    """Checked answers -> [{"id", "image", "asked", "kind", "answer", "hallucinated", "sums", "readable"}].

    sums: what an answer adds to each measure, {measure: (top, bottom)}. asked: what was asked.
    An answer with none or several of its choices is wrong and cannot be read.
    """
    items, found = [], read(answers, "classroom")
    once(answer.id for answer in found)
    for name, text, line in found:
        check_truth(line, "answer")
        truth, kind = line["truth"], line["kind"]
        item = {"id": name,
                "image": line.get("image", name),
                "asked": repr([name, line.get("image"), line.get("question"), kind, truth]),
                "kind": kind,
                "answer": text,
                "hallucinated": hallucinated(text, truth),
                "readable": True}
        if kind == "caption":
            item["sums"] = _caption_sums(text, truth)
        else:
            said = {word for word, _ in mentions(text, truth["choices"])}
            item["readable"] = len(said) == 1
            item["sums"] = _choice_sums(said, truth, kind)
        items.append(item)
    return items


def _caption_sums(text, truth):
    said = [word for word, _ in mentions(text, truth["present"] + truth["absent"], plural=True)]
    present = set(map(str.lower, truth["present"]))
    misses = sum(word not in present for word in said)
    return {"chair_s": (int(misses > 0), 1),
            "chair_i": (misses, len(said)),
            "cover": (len(present.intersection(said)), len(present))}


def _choice_sums(said, truth, kind):
    right = int(said == {truth["answer"].lower()})
    sums = {kind: (right, 1)}
    if kind == "existence":
        yes, true = int(said == {"yes"}), int(truth["answer"] == "yes")
        for name in sets(truth):
            sums[f"pope_{name}_acc"] = (right, 1)
            sums[f"pope_{name}_f1"] = (2 * yes * true, yes + true)           # 2PR/(P+R), as one ratio of sums
    return sums


def classroom(answers, resamples=1000):
    """-> {"chair_s", ..., "pope_adversarial_f1", "by_kind": {kind: {"acc", "n", "interval"}}, "n", "images",
    "unparsed", "intervals": {key: [low, high]}}. A measure without a question is None."""
    items, by_kind = classroom_items(answers), {}
    total, draws = add_up(items, lambda item: parts(item["sums"]), resamples=resamples)
    found = scored(lambda sums: {key: percent(sums, key) for key, _ in total}, total, draws)
    spread = found.pop("intervals")
    for kind in sorted(found.keys() - CLASSROOM):
        by_kind[kind] = {"acc": found.pop(kind), "n": total[kind, "n"], "interval": spread.pop(kind)}
    return dict.fromkeys(CLASSROOM) | found | {
        "by_kind": by_kind,
        "n": len(items),
        "images": len({item["image"] for item in items}),
        "unparsed": sum(not item["readable"] for item in items),
        "intervals": spread}


def difference(before, after):
    """The change of each measure between two sets of answers to the same questions, in points, with its 95%
    interval: {key: {"change", "interval"}, "by_kind": {kind: {"change", "interval"}}}."""
    old, new = classroom_items(before), classroom_items(after)
    if {item["asked"] for item in old} != {item["asked"] for item in new}:
        raise UserError("the two files answer different questions; compare answers to the same scenes")
    found = {}
    for key, row in paired(old, new, lambda item: item["sums"]).items():
        found[key] = {"change": row["change"], "interval": row["interval"]}
    by_kind = {kind: found.pop(kind) for kind in sorted(found.keys() - CLASSROOM)}
    return found | {"by_kind": by_kind}


# ---- POPE ----
SPLITS = ("random", "popular", "adversarial")             # as published
COUNTS = ("tp", "fp", "tn", "fn", "unparsed", "n")


def pope(questions, answers, mode="robust", partial=False, resamples=1000):
    """-> {"tp", "fp", "tn", "fn", "accuracy", "precision", "recall", "f1", "yes_ratio", "unparsed", "n",
    "version", "by_split", ...} in fractions, and the items. Over several splits the counts are sums, and the
    ratios means of the splits. An unparsed answer is wrong, and not a yes in yes_ratio.

    questions: one split's lines {"question_id", "image", "text", "label"}, or {split: lines}. An answer is to
    the split that it names in `split`, which may be absent where there is only one.
    """
    splits = questions if isinstance(questions, dict) else {"pope": questions}
    asked = _pope_questions(splits)
    found = read(answers, "pope")
    names = _pope_names(found, splits)
    coverage = join(names, {name: line["split"] for name, line in asked.items()}, partial)
    items = []
    for name, answer in zip(names, found, strict=True):
        line = asked[name]
        said = yes_no(answer.text, line.get("text", ""))
        if mode == "official":
            said = official_yes_no(answer.text)
        items.append({"id": answer.id,
                      "split": line["split"],
                      "image": line.get("image", answer.id),
                      "label": line["label"],
                      "said": said,
                      "right": said == line["label"]})
    total, draws = add_up(items, _pope_counts, resamples=resamples)
    by_split, remarks = {}, []
    for split in dict.fromkeys(item["split"] for item in items):
        sums = total.of(split)
        by_split[split] = {key: sums[key] for key in COUNTS} | scored(_pope_ratios, sums, draws.of(split))
        by_split[split]["version"] = f"{split}, {len(splits[split]):,} questions"
        for key, wrong, of in (("precision", "fp", "answer"), ("recall", "fn", "true answer")):
            if not sums["tp"] + sums[wrong]:
                remarks.append(f"{split}: no {of} is a yes, so {key} is 0/0; it and F1 are given as 0")

    def mean(sums):
        each = [_pope_ratios(sums.of(split)) for split in by_split]
        return {key: np.mean([one[key] for one in each], axis=0) for key in each[0]}

    return {"mode": mode,
            **{key: sum(part[key] for part in by_split.values()) for key in COUNTS},
            **scored(mean, total, draws),
            "version": "; ".join(part["version"] for part in by_split.values()),
            "by_split": by_split,
            "coverage": coverage,
            "remarks": remarks}, items


def _pope_questions(splits):
    """{"split id": the question's line, with its split}. Raises UserError for lines that are none, and for
    duplicates."""
    asked = []
    for split, lines in splits.items():
        for line in lines:
            if "question_id" not in line or line.get("label") not in ("yes", "no"):
                raise UserError(f"a question of {split} lacks a `question_id` or a `label` yes or no; give "
                                "POPE's question file")
            asked.append((f"{split} {line['question_id']}", line | {"split": split}))
    once([name for name, _ in asked], "questions")
    return dict(asked)


def _pope_names(found, splits):
    """["split id"] of the answers: by their `split`, which may be absent where there is only one. Questions
    of one's own make one split, whatever the answers call theirs."""
    only = next(iter(splits))
    if len(splits) == 1 and only not in SPLITS:
        return [f"{only} {answer.id}" for answer in found]
    if len(splits) > 1 and not all("split" in answer.line for answer in found):
        raise UserError(f"answers to the splits {', '.join(splits)} do not all name theirs: write its "
                        "`split` into each answer, or give the question file of one split")
    return [f"{answer.line.get('split', only)} {answer.id}" for answer in found]


def _pope_counts(item):
    cells = {"yes": ("fn", "tp"), "no": ("fp", "tn")}[item["label"]]
    counts = {"n": 1,
              cells[item["right"]]: 1,
              "yes": item["said"] == "yes",
              "unparsed": item["said"] is None}
    return under([item["split"]], counts)


def _pope_ratios(sums):
    precision = ratio(sums["tp"], sums["tp"] + sums["fp"])
    recall = ratio(sums["tp"], sums["tp"] + sums["fn"])
    return {"accuracy": ratio(sums["tp"] + sums["tn"], sums["n"]),
            "precision": precision,
            "recall": recall,
            "f1": ratio(2 * precision * recall, precision + recall),
            "yes_ratio": ratio(sums["yes"], sums["n"])}


# ---- CHAIR ----
CHAIR = {"chair_s": ("captions", "n"),
         "chair_s_refine": ("captions", "with"),
         "chair_i": ("misses", "mentions"),
         "recall": ("covered", "present"),
         "mean_words": ("words", "n")}


def _caption(text):
    return text.replace("Assistant:", "").strip()


def _is_asked_about(answer):
    """Whether an extractor is asked for a caption's objects: one of at most three words has none."""
    return len(_caption(answer.text).split()) > 3


def extraction_prompts(answers, prompt):
    """{id: what an extractor is asked about a caption}: the prompt with {question} and {answer} filled in."""
    asked = {}
    for answer in filter(_is_asked_about, read(answers, "objhal")):
        asked[answer.id] = _filled(prompt, question=answer.question, answer=_caption(answer.text))
    return asked


def _filled(prompt, **values):
    """A prompt with {name} replaced by its value, in one pass: an answer may contain such a name, too."""
    return re.sub(r"\{(question|answer)\}", lambda found: values[found[1]], prompt)


def chair(answers, truth, table, lemmatize, replies=None, phrase=None, mode="robust", partial=False,
          resamples=1000):
    """CHAIR, and Object HalBench, which is CHAIR with other synonyms and lemmas and often an extractor's
    replies. -> fractions {"chair_s", "chair_s_refine" (of the captions with an object), "chair_i", "recall"},
    "n", "n_with_objects", "mean_words", "unparsed", "counts", ...; and the items.

    answers: {"question_id", "image_id", "prompt", "text"}. truth, table: from objects.py. lemmatize: a
    function text -> its words in the singular: words.lemmas for the scorer objhal, words.singulars for the
    original. replies: {id: an extractor's reply}, with phrase: a function of one object's name -> its words
    in the singular, and its runs of nouns (words.phrase). A caption whose reply cannot be read is left out
    and counted as unparsed; in official mode that is refused, as the official code asks until it can read.
    """
    found = read(answers, "objhal")
    items, unread = [], []
    images = {answer.id: image_number(first(answer.line, "image_id", "image")) for answer in found}
    join([answer.id for answer in found], dict.fromkeys(images, "captions"), partial)
    if strangers := [name for name in images if images[name] not in truth]:
        raise UserError(f"{len(strangers)} answers are about images that the annotations do not hold (ids "
                        f"{few(strangers)}); give COCO's 2014 annotations, or the right answers")
    if replies is not None:
        asked = {answer.id for answer in found if _is_asked_about(answer)}
        join_replies(replies, asked, images, partial, "captions")
        replies = replies | dict.fromkeys(images.keys() - asked, "[]")
        found = [answer for answer in found if answer.id in replies]
    for name, text, _ in found:
        item, more = {"id": name, "image": images[name]}, {}
        if replies is None:
            named = joined(lemmatize(text), table)
        else:
            named = _extracted(replies[name], table, phrase, mode)
            more = {"objects": named}
        if named is None:
            unread.append(name)
            more = {"unparsed": True}
        else:
            more |= _chair_item(coco_objects(named, table), truth[images[name]], _caption(text))
        items.append(item | more)
    if unread and mode == "official" and not partial:
        raise UserError(f"{len(unread)} replies are not a list of objects (ids {few(unread)}); ask for them "
                        "again, or score the others with --partial")
    total, draws = add_up(items, _chair_counts, resamples=resamples)
    return {"mode": mode,
            **scored(_chair_ratios, total, draws),
            "n": total["n"],
            "n_with_objects": total["with"],
            "unparsed": len(unread),
            "counts": {key: total[key] for key in ("captions", "mentions", "misses", "covered", "present")},
            "coverage": {"answered": len(items), "of": len(images)},
            "remarks": [] if total["mentions"] else ["no caption names an object: CHAIR_i is 0/0, given as 0"]
            }, items


def _extracted(reply, table, phrase, mode):
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
    return {"generated": named,
            "hallucinated": misses,
            "chair_s": int(bool(misses)),
            "chair_i": ratio(len(misses), len(named)),
            "words": len(caption.split(" ")),
            "covered": len(present.intersection(kinds)),
            "present": len(present)}


def _chair_counts(item):
    if "unparsed" in item:
        return {"unparsed": 1}
    return {"n": 1,
            "with": bool(item["generated"]),
            "captions": item["chair_s"],
            "mentions": len(item["generated"]),
            "misses": len(item["hallucinated"]),
            "covered": item["covered"],
            "present": item["present"],
            "words": item["words"]}


def _chair_ratios(sums):
    return {key: ratio(sums[top], sums[bottom]) for key, (top, bottom) in CHAIR.items()}


# ---- MMHal-Bench ----
MMHAL = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")


def _mmhal_answers(template, answers, partial):
    """{place in the template: response}, joined by image, else by id; and the coverage."""
    places = {record.get("image_id"): place for place, record in enumerate(template)}
    texts, names = {}, []
    for name, text, line in read(answers, "mmhal"):
        place = places.get(line.get("image_id", ""), name)
        names.append(place)
        texts[place] = _caption(text)
    coverage = join(names, dict.fromkeys(range(len(template)), "all"), partial)
    return {place: texts[place] for place in sorted(texts)}, coverage


def mmhal_prompts(template, answers, prompt, partial=False):
    """{place: what the judge is asked}: the prompt, its four {} filled with contents, question, human answer
    and response."""
    pieces, asked = prompt.split("{}"), {}
    for place, text in _mmhal_answers(template, answers, partial)[0].items():
        record = template[place]
        values = (", ".join(record["image_content"]), record["question"], record["gt_answer"], text, "")
        asked[place] = "".join(piece + value for piece, value in zip(pieces, values, strict=True))
    return asked


def mmhal(template, answers, replies, mode="robust", partial=False, resamples=1000):
    """-> {"score", "hallucination_rate" (fraction), "informativeness" (percent), "by_category", "unparsed",
    "n", ...}, and the items. A reply that cannot be read is a 0 in official mode, and left out in robust
    mode.

    template: the 96 records; answers: lines with image_id and question, or with question_id = place in the
    template; or the template with its model_answer filled in. replies: {place: the judge's reply}.
    """
    texts, coverage = _mmhal_answers(template, answers, partial)
    join_replies(replies, texts, range(len(template)), partial, "answers")
    items = []
    for place in texts:
        if place in replies:
            score = rating(replies[place], mode)
            items.append({"id": place,
                          "image": template[place].get("image_id", place),
                          "type": MMHAL[place % 8],
                          "score": 0 if score is None and mode == "official" else score,
                          "unparsed": score is None,
                          "reply": replies[place]})
    total, draws = add_up(items, _mmhal_counts, resamples=resamples)
    by_category = {}
    for kind in MMHAL:
        if n := total[kind, "n"]:
            by_category[kind] = scored(_mmhal_ratios, total.of(kind), draws.of(kind)) | {"n": n}
    return {"mode": mode,
            **scored(_mmhal_ratios, total.of("all"), draws.of("all")),
            "by_category": by_category,
            "unparsed": total["all", "unparsed"],
            "n": total["all", "n"],
            "coverage": coverage | {"answered": len(items)}}, items


def _mmhal_counts(item):
    score, counts = item["score"], {"unparsed": item["unparsed"]}
    if score is not None:
        counts |= {"n": 1,
                   "score": score,
                   "hallucinated": score < 3,
                   "informative": score - 3 if score >= 3 else score}
    return under(["all", item["type"]], counts)


def _mmhal_ratios(sums):
    return {"score": ratio(sums["score"], sums["n"]),
            "hallucination_rate": ratio(sums["hallucinated"], sums["n"]),
            "informativeness": ratio(sums["informative"], sums["n"]) / 3 * 100}
