"""The objects that a caption names, beside those that its image holds: COCO's classes, and AMBER's nouns.

    table = objects.synonyms(text of a synonyms file)                {word: class}
    truth = objects.coco_truth(instances, captions, table, words, images)
    objects.coco_objects(words, table)                               [(word, class)], "hot dog" being no dog
    objects.amber_caption(nouns, truth, hallu, relation, safe_words, near)

A file of its own so that metrics.py holds nothing but measures. Pure functions; the words of a caption come
from nouns.py or from NLTK, the vocabularies from the benchmarks' files. Errors are UserError.
"""
import re
from functools import lru_cache

import numpy as np

from data import UserError
from tally import first, image_number


# ---------------------------------------------------------------------------------------------- COCO
def synonyms(text, literal=False):
    """The text of a synonyms file -> {word or words: its COCO class, the first of its line}. literal: as the
    first CHAIR reads it, to which a word behind two spaces is unknown; for that scorer's official mode."""
    lines = [line.strip().split(", ") for line in text.splitlines() if line.strip()]
    return {word if literal else word.strip(): line[0].strip() for line in lines for word in line}


@lru_cache(maxsize=8)
def _pairs(words):
    """{two words that are one: what they are}: a table's own, and those that would fire for a wrong class (a
    baby bear is no person). "wine glas" is what the first CHAIR's singular leaves of a wine glass."""
    words = [word.strip() for word in (*words, "home plate", "train track")]
    animals = "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub".split()
    return {word: word for word in words if " " in word} | {
        f"{age} {animal}": animal for age in ("baby", "adult") for animal in animals} | {
        "passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet",
        "wine glas": "wine glass"}


def joined(words, table, alone=True):
    """Words with the pairs made one, from the left; alone=False leaves the other words out."""
    pairs, out, i = _pairs(tuple(table)), [], 0
    while i < len(words):
        pair = pairs.get(" ".join(words[i:i + 2]))
        out += [pair] if pair else [words[i]] * alone
        i += 2 if pair else 1
    return out


def coco_objects(words, table):
    """[(word, its class)] of the words that a table knows; a seat beside a toilet is no chair."""
    aside = "seat" if "toilet" in words else None
    return [(word, table[word]) for word in words if word in table and word != aside]


def image_ids(answers):
    """The COCO images that answers to CHAIR or Object HalBench are about; settings are passed over."""
    lines = [line for line in answers if isinstance(line, dict) and "settings" not in line]
    return {image_number(first(line, "image_id", "image")) for line in lines} - {None}


def coco_truth(instances, captions, table, words, images):
    """What is in the images, as CHAIR has it: the classes of COCO's instances, and those that its captions
    name.

    instances, captions: lists of COCO's annotation files (train and val 2014) as json has them; words: as for
    metrics.chair. -> {image id: set of classes} for those of the images that the files hold.
    """
    truth = {image["id"]: set() for part in (*instances, *captions) for image in part["images"]
             if image["id"] in images}
    for part in instances:
        names = {category["id"]: category["name"] for category in part.get("categories", [])}
        for mark in part["annotations"]:
            if mark["image_id"] in images:
                name = names.get(mark["category_id"])
                if name not in table:
                    raise UserError(f"COCO's category {name!r} is not among the synonyms; give the file of "
                                      "CHAIR or of Object HalBench.")
                truth.setdefault(mark["image_id"], set()).add(table[name])
    for part in captions:
        for mark in part["annotations"]:
            if mark["image_id"] in images:
                named = coco_objects(joined(words(mark["caption"]), table), table)
                truth.setdefault(mark["image_id"], set()).update(kind for _, kind in named)
    return truth


# ---------------------------------------------------------------------------------------------- AMBER
def amber_vocabulary(relation):
    """The nouns that AMBER knows: keys and values of its relation.json."""
    return {*relation, *(word for words in relation.values() for word in words)}


def similar_words(similarity, threshold=0.8):
    """-> a function noun -> the set of it and of what is more similar to it than the threshold. similarity:
    None (nothing is), a table {"a b": number} in either order, or vectors {word: [numbers]}, compared by
    cosine."""
    similarity, near = similarity or {}, {}
    if any(isinstance(value, list | tuple) for value in similarity.values()):
        try:
            rows = np.array(list(similarity.values()), dtype=np.float64)
            rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        except (ValueError, TypeError) as error:
            raise UserError("the vectors of the similarity file differ in length; mend it.") from error
        words = list(similarity)
        pairs = [(words[i], words[j]) for i, j in np.argwhere(rows @ rows.T > threshold)]
    else:
        pairs = [key.split(" ") for key, value in similarity.items()
                 if _number(key, value) and value > threshold]
    for one, other in pairs:
        near.setdefault(one, {one}).add(other)
        near.setdefault(other, {other}).add(one)
    return lambda noun: near.get(noun, {noun})


def _number(key, value):
    if not isinstance(value, int | float) or not re.fullmatch(r"\S+ \S+", key):
        raise UserError(f"{key!r} in the similarity file is no pair \"word word\" with a number; mend the "
                          "file.")
    return True


def amber_caption(nouns, truth, hallu, relation, safe_words, near):
    """One caption -> {"hal", "mentions", "cover", "cover_num", "cog", "cog_num", "non_hallu"}, all counts.

    The associations of all truths stand in front of the truths themselves, and a noun credits the first entry
    that it is: so "tree" may credit "forest". Likewise the words `hallu` that models tend to add. A noun
    found among those is still compared with both lists, and is forgiven where it resembles a truth: the
    official code does so, whatever was meant. A safe word is a mention and nothing else.
    """
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
