"""The objects that an answer names, beside those that its image holds: the built-in world's words, COCO's
classes.

    objects.hallucinated(answer, truth)                              the words of an answer that are not there
    table = objects.synonyms(text of a synonyms file)                {word: class}
    objects.coco_objects(words, table)                               [(word, class)], "hot dog" is not a dog

Pure functions for metrics.py; the words of a caption come from words.py or from NLTK, the vocabularies from
the benchmarks' files. A question of the built-in world has a `truth`, by its
kind:

    caption      {"present": [words of the objects in the image], "absent": [the world's other object words]}
                 and, of a world with several words for a thing, "names": {"mug": "cup"}, in lower case
    existence    {"answer": "yes"|"no", "choices": ["yes", "no"], "set": "random"|"adversarial"|[both]}
    any other    {"answer": word, "choices": [words]}

Besides these words, only a plural -s or -es is understood.
"""
if __name__ == "__main__":
    exit("A part of eval_hallu.py; run: python eval_hallu.py --help")

import re
from functools import lru_cache

from data import UserError
from model.command import NAME, fits

SETS = {"random", "adversarial"}                        # of existence questions, as in POPE


# ---- the built-in world ----
@lru_cache(maxsize=1024)
def _pattern(words, plural):
    """Whole words of a vocabulary, the longest first: "fire truck" is one mention, and none of "truck"."""
    longest_first = sorted(map(re.escape, words), key=len, reverse=True)
    ending = "(?:e?s)?" if plural else ""
    return re.compile(rf"(?<!\w)({'|'.join(longest_first)}){ending}(?!\w)")


def mentions(text, words, plural=False):
    """-> [(word of the vocabulary, the word as the text has it)], in order, repeats included."""
    if not words:
        return []
    pattern = _pattern(frozenset(map(str.lower, words)), plural)
    return [(found[1], found[0]) for found in pattern.finditer(text.lower())]


def mentioned(answer, truth):
    """-> (the mentions of a caption's objects, or of a question's choices; {the right ones})."""
    if "present" in truth:
        names = truth.get("names", {})
        found = mentions(answer, [*names] + truth["present"] + truth["absent"], plural=True)
        named = [(names.get(word, word), written) for word, written in found]
        return named, set(map(str.lower, truth["present"]))
    return mentions(answer, truth["choices"]), {truth["answer"].lower()}


def hallucinated(answer, truth):
    """The words of an answer to mark, as written: a caption's absent objects, an answer's wrong choices."""
    found, right = mentioned(answer, truth)
    return list(dict.fromkeys(written for word, written in found if word not in right))


def check_truth(item, where):
    """Raise UserError if an answer to a question cannot be scored by its `truth`."""
    if not (fits(item, {"id": NAME, "kind": str, "truth": {}}) and _fits(item["kind"], item["truth"])):
        raise UserError(f"{where} (id {item.get('id')}) lacks a usable `kind` or `truth`: a caption needs "
                        "`present` and `absent`, another kind `choices` with their `answer`, existence also "
                        "a `set` out of random, adversarial; make the scenes again")


def _fits(kind, truth):
    """Whether a truth is that of its kind; a word is not empty."""
    if kind == "caption":
        truth = {"names": {}} | truth
        usable = fits(truth, {"present": [str], "absent": [str], "names": {str: str}})
        return usable and all([*truth["names"]] + truth["present"] + truth["absent"])
    if "present" in truth or not fits(truth, {"choices": [str], "answer": str, "set": (str, [str], None)}):
        return False
    choices = {*truth["choices"]}
    right = kind != "existence" or choices == {"yes", "no"} and SETS.issuperset(sets(truth))
    return right and truth["answer"] in choices and all(choices)


def sets(truth):
    """The sets of existence questions that a question belongs to."""
    named = truth.get("set") or []
    return [named] if isinstance(named, str) else named


# ---- COCO ----
def synonyms(text, literal=False):
    """The text of a synonyms file -> {word or words: its COCO class, the first of its line}. literal: as the
    first CHAIR reads it, to which a word behind two spaces is unknown; for that scorer's official mode."""
    table = {}
    for line in text.splitlines():
        kind, *others = line.strip().split(", ")
        for word in (kind, *others) if kind else ():
            table[word if literal else word.strip()] = kind.strip()
    return table


@lru_cache(maxsize=8)
def _pairs(words):
    """{two words that are one: what they are}: a table's own, and those that would fire for a wrong class (a
    baby bear is not a person). "wine glas" is the first CHAIR's singular of wine glass."""
    stripped = [word.strip() for word in (*words, "home plate", "train track")]
    pairs = {word: word for word in stripped if " " in word}
    for animal in "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split():
        pairs[f"baby {animal}"] = pairs[f"adult {animal}"] = animal
    return pairs | {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie",
                    "toilet seat": "toilet", "wine glas": "wine glass"}


def joined(words, table, alone=True):
    """Words with the pairs made one, from the left; alone=False leaves the other words out."""
    pairs, found, at = _pairs(tuple(table)), [], 0
    while at < len(words):
        pair = pairs.get(" ".join(words[at:at + 2]))
        if pair:
            found.append(pair)
        elif alone:
            found.append(words[at])
        at += 2 if pair else 1
    return found


def coco_objects(words, table):
    """[(word, its class)] of the words that a table knows; a seat beside a toilet is not a chair."""
    aside = "seat" if "toilet" in words else None
    return [(word, table[word]) for word in words if word in table and word != aside]
