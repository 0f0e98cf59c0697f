"""AMBER (https://arxiv.org/abs/2311.07397) for eval_hallu.py: captions by their nouns, questions by "no".

    scores, items = amber.measures(queries, answers, annotations, relation, safe_words, nouns)

    CHAIR = mentions of absent objects / mentions of objects
    Cover = present objects that are named / present objects
    Hal   = captions with an absent object / captions
    Cog   = words that models tend to add and that are named / all of them
    precision, recall, F1 of the answer "no", by type; AMBER score = (100 - CHAIR + F1) / 2

All in percent, as sums over images. In mode "official" they equal the official scorer's to the digit, which
adds 0.001 to each sum that it divides by and rounds to one decimal; "robust" does neither.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of eval_hallu.py; run: python eval_hallu.py --help"))

from data import UserError
from evaluation.readers import strict_yes_no, yes_no
from evaluation.stats import add_up, intervals, join, ratio, read, under

TYPES = {"existence": ("existence",),                                   # by what they make up
         "attribute": ("state", "number", "action"),
         "state": ("state",),
         "number": ("number",),
         "action": ("action",),
         "relation": ("relation",),
         "all": ("existence", "state", "number", "action", "relation")}
CAPTIONS = {"chair": ("hal", "mentions"),
            "cover": ("cover", "cover_num"),
            "cog": ("cog", "cog_num")}
CREDITS = ("hal", "mentions", "cover", "cover_num", "cog", "cog_num", "non_hallu")     # counts of a caption
COUNTERS = {"all": "qa",                                                # the official names of counters
            "state": "as_qa",
            "number": "an_qa",
            "action": "aa_qa",
            "relation": "asso_qa",
            "existence": "ha_qa",
            "chair": "chair",
            "cover": "safe_cover",
            "cog": "hallu_cover"}
ADDED = 1e-3                                               # to each sum that the official scorer divides by


def measures(queries, answers, annotations, relation, safe_words, nouns, similarity=None, mode="robust",
             partial=False, resamples=1000):
    """-> {"chair", "cover", "hal", "cog"} of the captions; {"accuracy", "precision", "recall", "f1"} of the
    questions where all three dimensions are answered; the same by dimension and type under "by_type";
    "amber_score" of both; "unparsed", "n", "counts" under the official names, ...; and the items. Parts that
    are not answered at all have no key.

    queries: AMBER's query files {"id", "image", "query"} in one list, for the images and the questions'
    words; may be []. annotations, relation: its files. nouns: a function text -> nouns in the singular, or
    {id: nouns}. similarity: see similar_words.
    """
    added = ADDED if mode == "official" else 0
    known = {line["id"]: line for line in annotations}
    query = {line["id"]: line for line in queries}
    kinds = {name: kind_of(line["type"]) for name, line in known.items()}
    found, items = read(answers, "amber"), []
    coverage = join([answer.id for answer in found], kinds, partial)
    words, near = vocabulary(relation), similar_words(similarity or {})
    for name, text, _ in found:
        asked, note = query.get(name, {}), known[name]
        item = {"id": name, "image": asked.get("image", name), "type": kinds[name]}
        if kinds[name] == "generative":
            named = nouns(text) if callable(nouns) else nouns.get(name)
            if named is None:
                raise UserError(f"the file of nouns has none for answer {name}; extract them again")
            named = [noun for noun in named if noun in words]
            item |= credits(named, note["truth"], note["hallu"], relation, safe_words, near)
        else:
            said = strict_yes_no(text) if added else yes_no(text, asked.get("query", ""))
            item |= {"truth": note["truth"], "said": said, "right": said == note["truth"]}
        items.append(item)
    total, draws = add_up(items, _counts, resamples=resamples)
    by_type, resampled = by_part(total, added), by_part(draws, 0)
    scores = by_type.pop("generative", {}) | by_type.pop("all", {})
    drawn = resampled.pop("generative", {}) | resampled.pop("all", {})
    remarks = []
    for part, points in by_type.items():
        points["intervals"] = intervals(points, resampled[part])
        points["n"] = total[part, "n"]
        points["unparsed"] = total[part, "unparsed"]
        if not total[part, "said_no"]:
            remarks.append(f"{part}: no answer is a no, so precision is 0/0; it and F1 are given as 0")
    return {"mode": mode,
            **scores,
            "intervals": intervals(scores, drawn),
            "n": len(items),
            "unparsed": total["all", "unparsed"],
            "by_type": by_type,
            "counts": counters(total, added),
            "coverage": coverage,
            "remarks": remarks}, items


def kind_of(annotated):
    """The `type` of an annotation -> generative, existence, state, number, action or relation."""
    last = annotated.rsplit("-", 1)[-1]
    return {"hallucination": "existence", "discriminative": "relation"}.get(last, last)


# ---- captions ----
def vocabulary(relation):
    """The nouns that AMBER knows: keys and values of its relation.json."""
    return {*relation, *(word for words in relation.values() for word in words)}


def credits(nouns, truth, hallu, relation, safe_words, near):
    """The nouns of a caption that AMBER knows -> what they credit: the counts CREDITS, and the "nouns".

    The associations of all truths come before the truths themselves, and a noun credits the first entry that
    it is: so "tree" may credit "forest". Likewise the words `hallu` that models tend to add. A noun found
    among those is still compared with both lists, and is forgiven if it resembles a truth: the official
    code does so, whatever was meant. A safe word is a mention and nothing else. near: see similar_words.
    """
    present, added = _entries(truth, relation), _entries(hallu, relation)
    covered, cognised, misses = set(), set(), 0
    for noun in nouns:
        if noun in safe_words or _credit({noun}, present, covered):
            continue
        alike = near.get(noun, {noun})
        _credit({noun}, added, cognised)
        _credit(alike, added, cognised)
        misses += not _credit(alike, present, covered)
    counts = (misses, len(nouns), len(covered), len(truth), len(cognised), len(hallu), int(not misses))
    return dict(zip(CREDITS, counts, strict=True)) | {"nouns": nouns}


def _entries(words, relation):
    """[(word, index of what it credits)]: the associations of all words, then the words themselves."""
    associated = [(other, i) for i, word in enumerate(words) for other in relation.get(word, [])]
    return associated + [(word, i) for i, word in enumerate(words)]


def _credit(words, entries, credited):
    """Credit the first entry that is one of the words; whether there is one."""
    for word, place in entries:
        if word in words:
            credited.add(place)
            return True
    return False


def similar_words(similarity, threshold=0.8):
    """{noun: itself and nouns more similar to it than the threshold}, by a table {"word word": number}."""
    near = {}
    for key, value in similarity.items():
        words = key.split(" ")
        if len(words) != 2 or not isinstance(value, int | float):
            raise UserError(f"{key!r} in the similarity file is not a pair of words with a number; fix it")
        if value > threshold:
            for word in words:
                near.setdefault(word, {word}).update(words)
    return near


# ---- sums ----
def _counts(item):
    """What an item adds to {(part, key): count}, for its type, its dimension and all questions."""
    part = item["type"]
    if part == "generative":
        return under([part], {"n": 1} | {key: item[key] for key in CREDITS})
    said_no = item["said"] == "no"
    counts = {"n": 1,
              "correct": item["right"],
              "no": item["truth"] == "no",
              "said_no": said_no,
              "no_right": said_no and item["right"],
              "unparsed": item["said"] is None}
    return under([home for home, types in TYPES.items() if part in types], counts)


def by_part(sums, added):
    """{"generative", a dimension, a type or "all": its measures} of what was asked as a whole.

    added: ADDED in official mode, else 0.
    """
    asked = {part for part, key in sums if key == "n"}
    found = {}
    if "generative" in asked:
        found["generative"] = _captions(sums.of("generative"), added)
    for part, types in TYPES.items():
        if asked.issuperset(types):
            found[part] = _questions(sums.of(part), added, part)
    if "generative" in found and "all" in found:
        kept = 100 - found["generative"]["chair"]
        found["all"]["amber_score"] = (kept + found["all"]["f1"]) / 2         # the paper's, not in the code
    return found


def _captions(sums, added):
    shares = {key: _share(sums[top], sums[bottom], added) for key, (top, bottom) in CAPTIONS.items()}
    shares["hal"] = _share(sums["n"] - sums["non_hallu"], sums["n"])
    if added:
        shares["hal"] = round(100 - sums["non_hallu"] / (sums["n"] + added) * 100, 1)
    return shares


def _questions(sums, added, part):
    """The official scorer makes F1 of rounded numbers, and adds once for each type of attributes."""
    if part == "attribute":
        added *= 3
    accuracy = _share(sums["correct"], sums["n"], added)
    precision = _share(sums["no_right"], sums["said_no"], added)
    recall = _share(sums["no_right"], sums["no"], added)
    f1 = ratio(2 * precision * recall, precision + recall)
    if added:
        small = 1e-3 if part == "existence" else 1e-4
        p, r = precision / 100, recall / 100
        f1 = round(2 * p * r / (p + r + small) * 100, 1)
    return {"accuracy": accuracy,
            "precision": precision,
            "recall": recall,
            "f1": f1}


def _share(top, bottom, added=0):
    """top / bottom in percent; the official scorer adds a little to the bottom, and rounds to one decimal."""
    return round(top / (bottom + added) * 100, 1) if added else 100 * ratio(top, bottom)


def counters(total, added):
    """The official scorer's counters by their names, with its additions to those that it divides by."""
    triples = {"non_hallu": ("generative", "non_hallu", "n")}
    for part, code in COUNTERS.items():
        if part in CAPTIONS:
            triples[code] = ("generative", *CAPTIONS[part])
        else:
            triples[f"{code}_correct"] = (part, "correct", "n")
            triples[f"{code}_no"] = (part, "no_right", "no")
            triples[f"{code}_ans_no"] = (part, "no_right", "said_no")
    found = {}
    for name, (part, top, bottom) in triples.items():
        if (part, "n") in total:
            found[f"{name}_score"] = total[part, top]
            found[f"{name}_num"] = total[part, bottom] + added
    return found
