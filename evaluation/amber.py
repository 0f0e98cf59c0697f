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
    exit("A part of eval_hallu.py; run: python eval_hallu.py --help")

from data import UserError
from evaluation.readers import strict_yes_no, yes_no
from evaluation.stats import choice, intervals, join, ratios, read, remarks, same_id, tally
from evaluation.words import rules

PARTS = "generative existence attribute state number action relation all".split()
TYPES = {part: (part,) for part in PARTS}                                  # of what a part is made
TYPES |= {"attribute": "state number action".split(),
          "all": "existence state number action relation".split()}
# The official names of the counters of a measure, and of a part.
COUNTERS = dict(rules("""chair:chair cover:safe_cover cog:hallu_cover clean:non_hallu
accuracy:correct precision:ans_no recall:no"""))
COUNTS = "hal mentions cover cover_num cog cog_num non_hallu".split()          # and those of a caption
CODES = dict(rules("""generative: all:qa_ state:as_qa_ number:an_qa_ action:aa_qa_
relation:asso_qa_ existence:ha_qa_"""))
ADDED = 1e-3                                               # to each sum that the official scorer divides by


def measures(queries, answers, annotations, relation, safe_words, nouns, similarity=None, mode="robust",
             partial=False):
    """-> {"chair", "cover", "hal", "cog"} of the captions; {"accuracy", "precision", "recall", "f1"} of the
    questions where all three dimensions are answered; the same by dimension and type under "by_type";
    "amber_score" of both; "unparsed", "n", "counts" under the official names, ...; and the items. Parts that
    are not answered at all have no key.

    queries: AMBER's query files {"id", "image", "query"} in one list, for the images and the questions'
    words; may be []. annotations, relation: its files. nouns: a function text -> nouns in the singular, or
    {id: nouns}. similarity: see similar_words.
    """
    added = ADDED if mode == "official" else 0
    query = {same_id(line["id"]): line for line in queries}
    asked = {}
    for line in annotations:
        name = same_id(line["id"])
        about = query.get(name, {"query": ""})
        asked[name] = about | line | {"part": kind_of(line["type"]), "text": about["query"]}
    found, items = read(answers, "amber"), []
    coverage = join([answer.id for answer in found], found, asked, partial)
    words, near = vocabulary(relation), similar_words(similarity or {})
    for name, text, _ in found:
        line = asked[name]
        kind = line["part"]
        item = {"id": name, "image": line.get("image", name), "type": kind}
        if kind == "generative":
            named = nouns(text) if callable(nouns) else nouns.get(name)
            if named is None:
                raise UserError(f"the file of nouns has none for answer {name}; extract them again")
            named = [noun for noun in named if noun in words]
            item |= credits(named, line, relation, safe_words, near)
        else:
            said = strict_yes_no(text) if added else yes_no(text, line["text"])
            item |= {"truth": line["truth"]} | choice(said, line["truth"], "no", said == "no")
        items.append(item)
    total, draws = tally(items, _parts)
    by_type, drawn = by_part(total, added), by_part(draws, 0)
    for part, points in by_type.items():
        points["intervals"] = intervals(points, drawn[part])
        points["unparsed"], points["n"] = total[part, "items"]
    captions, questions = by_type.pop("generative", {}), by_type.pop("all", {})
    return {"mode": mode,
            **captions,
            **questions,
            "intervals": captions.get("intervals", {}) | questions.get("intervals", {}),
            "n": len(items),
            "unparsed": total["all", "items"].top,
            "by_type": by_type,
            "counts": counters(total, added),
            "coverage": coverage,
            "remarks": remarks(total, found)}, items


def kind_of(annotated):
    """The `type` of an annotation -> generative, existence, state, number, action or relation."""
    last = annotated.rsplit("-", 1)[-1]
    return {"hallucination": "existence", "discriminative": "relation"}.get(last, last)


# ---- captions ----
def vocabulary(relation):
    """The nouns that AMBER knows: keys and values of its relation.json."""
    return {*relation, *(word for words in relation.values() for word in words)}


def credits(nouns, line, relation, safe_words, near):
    """The nouns of a caption that AMBER knows -> what they credit: its counts, and the "nouns". line: the
    caption's annotation.

    The associations of all truths come before the truths themselves, and a noun credits the first entry that
    it is: so "tree" may credit "forest". Likewise the words `hallu` that models tend to add. A noun found
    among those is still compared with both lists, and is forgiven if it resembles a truth: the official
    code does so, whatever was meant. A safe word is a mention and nothing else. near: see similar_words.
    """
    truth, hallu = line["truth"], line.get("hallu", ())
    present, added = _entries(truth, relation), _entries(hallu, relation)
    covered, cognised, misses = set(), set(), 0
    for noun in nouns:
        if noun in safe_words or _credit({noun}, present, covered):
            continue
        alike = near.get(noun, {noun})
        _credit({noun}, added, cognised)
        _credit(alike, added, cognised)
        misses += not _credit(alike, present, covered)
    sums = {"chair": (misses, len(nouns)),
            "cover": (len(covered), len(truth)),
            "cog": (len(cognised), len(hallu)),
            "clean": (int(not misses), 1)}
    counts = [count for share in sums.values() for count in share]
    return dict(zip(COUNTS, counts, strict=False)) | {"nouns": nouns, "sums": sums}


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


def similar_words(similarity):
    """{noun: itself and nouns more similar to it than 0.8}, by a table {"word word": number}."""
    near = {}
    for key, value in similarity.items():
        words = key.split(" ")
        if len(words) != 2 or not isinstance(value, int | float):
            raise UserError(f"{key!r} in the similarity file is not a pair of words with a number; fix it")
        if value > 0.8:
            for word in words:
                near.setdefault(word, {word}).update(words)
    return near


# ---- sums ----
def _parts(item):
    """The type of an item, its dimension, and all questions."""
    return [part for part, types in TYPES.items() if item["type"] in types]


def by_part(sums, added):
    """{"generative", a dimension, a type or "all": its measures} of what was asked as a whole.

    added: ADDED in official mode, else 0.
    """
    asked = {part for part, _ in sums}
    found = {part: _measured(part, sums.of(part), added)
             for part, types in TYPES.items() if asked.issuperset(types)}
    if "generative" in found and "all" in found:
        kept = 100 - found["generative"]["chair"]
        found["all"]["amber_score"] = (kept + found["all"]["f1"]) / 2         # the paper's, not in the code
    return found


def _measured(part, sums, added):
    """A part's measures in percent. The official scorer adds a little to each sum that it divides by, for the
    attributes once for each type, rounds to one decimal, and makes F1 of the rounded numbers."""
    if part == "attribute":
        added *= 3
    found = {measure: 100 * share for measure, share in ratios(sums, added=added).items()}
    if "clean" in found:
        found["hal"] = 100 - found.pop("clean")
    if not added:
        return found
    found = {measure: round(value, 1) for measure, value in found.items()}
    if "f1" in found:
        small = 1e-3 if part == "existence" else 1e-4
        p, r = found["precision"] / 100, found["recall"] / 100
        found["f1"] = round(2 * p * r / (p + r + small) * 100, 1)
    return found


def counters(total, added):
    """The official scorer's counters by their names, with its additions to those that it divides by."""
    found = {}
    for part, code in CODES.items():
        sums = total.of(part)
        for measure, name in COUNTERS.items():
            if measure in sums:
                found[f"{code}{name}_score"], bottom = sums[measure]
                found[f"{code}{name}_num"] = bottom + added
    return found
