"""evaluation/words.py: tokens, lemmas and nouns by hand, and against NLTK's own results."""
import json
import re

import pytest
from conftest import GOLDEN, SHARED, need

from data import UserError
from evaluation import amber, stats
from evaluation import words as nouns


def golden(pattern):
    return [pytest.param(path, id=f"{path.parent.name}-{path.name}") for path in sorted(GOLDEN.glob(pattern))]


# ------------------------------------------------------------------------------------------------- tokens
@pytest.mark.parametrize("text, tokens", [
    ("A dog.", ["A", "dog", "."]),
    ("A dog. A cat", ["A", "dog", ".", "A", "cat"]),
    ("the dog's bowl, the dogs' bowls", ["the", "dog", "'s", "bowl", ",", "the", "dogs", "'", "bowls"]),
    ("it isn't; I can't, he'll", ["it", "is", "n't", ";", "I", "ca", "n't", ",", "he", "'ll"]),
    ("a chain-link fence (red)", ["a", "chain-link", "fence", "(", "red", ")"]),
    ('reads "PRO MILK".', ["reads", "``", "PRO", "MILK", "''", "."]),
    ("at 3:30 p.m. in the U.S.A. today", ["at", "3:30", "p.m.", "in", "the", "U.S.A.", "today"]),
    ("one: two--three... four!", ["one", ":", "two", "--", "three", "...", "four", "!"]),
    ("cats/dogs cannot fly", ["cats/dogs", "can", "not", "fly"]),
    ("1. first 2. Then in 1999.", ["1.", "first", "2", ".", "Then", "in", "1999", "."]),
    ("", []), (" \n ", [])])
def test_tokens(text, tokens):
    assert nouns.tokens(text) == tokens


def test_tokens_of_single_sentences_are_nltks():
    """NLTK's tokenizer needs no data for one sentence."""
    word_tokenize = pytest.importorskip("nltk.tokenize").NLTKWordTokenizer().tokenize
    sentences = ["The man's dogs' bowls aren't (all) full, are they?", "It's 50% off; $5 & up #1.",
                 "He'd say we've 'won'", "A hot-dog stand, a 'quoted' word, and more...",
                 "cannot gonna [x] <b> *dog* a--b 1,000 x@y.z"]
    assert {s: nouns.tokens(s) for s in sentences} == {s: word_tokenize(s) for s in sentences}


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("lemma/tokenize_pos*.jsonl"))
def test_tokens_of_real_captions_are_nltks(path):
    for row in map(json.loads, path.read_text().splitlines()):
        assert nouns.tokens(row["text"]) == row["tokens"]
        assert nouns.tokens(row["text"].lower()) == row["tokens_lower"]


# ------------------------------------------------------------------------------------------------- lemmas
@pytest.mark.parametrize("word, single", [
    ("dogs", "dog"), ("benches", "bench"), ("buses", "bus"), ("horses", "horse"), ("boxes", "box"),
    ("skies", "sky"), ("glasses", "glass"), ("knives", "knife"), ("gloves", "glove"), ("shoes", "shoe"),
    ("tomatoes", "tomato"), ("women", "woman"), ("children", "child"), ("geese", "goose"), ("skis", "ski"),
    ("ties", "tie"), ("vans", "van"), ("bus", "bus"), ("grass", "grass"), ("tennis", "tennis"),
    ("scissors", "scissors"), ("people", "people"),
    ("men", "men"), ("vases", "vas"), ("oxens", "oxen"), ("hairdryers", "hairdryers"),    # WordNet's oddities
    ("Dogs", "Dogs"), ("TV", "TV"), ("TREES", "TREES")])                          # AMBER does not lower-case
def test_lemmas_are_wordnets(word, single):
    assert nouns.lemma(word) == single


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("lemma/nltk_noun_lemma*.json"))
def test_lemmas_of_the_vocabularies_are_wordnets(path):
    """Apart from plurals that nobody writes: "appleses", "buss", "rifves"."""
    golden = json.loads(path.read_text())
    english = {word: single for word, single in golden.items() if not re.search(
        "[a-z]{3}ses$|[^s]ss$|sss$|ves$", word) or word in (single + "s", single + "es")}
    wrong = {word: nouns.lemma(word) for word in english if nouns.lemma(word) != english[word]}
    assert len(english) > 1000 and len(wrong) < .03 * len(english), wrong


@pytest.mark.parametrize("word, single", [
    ("dogs", "dog"), ("buses", "bus"), ("glasses", "glass"), ("women", "woman"), ("men", "man"),
    ("people", "person"), ("knives", "knife"), ("lorries", "lorry"), ("vases", "vase"), ("mice", "mouse"),
    ("hairdryers", "hairdryer"), ("oxen", "ox"), ("leaves", "leaf"), ("moves", "move"), ("dogs'", "dog's"),
    ("bus", "bu"), ("glass", "glas"), ("ties", "ty"), ("doggies", "doggies"), ("canoes", "cano"),
    ("scissors", "scissors"), ("thieves", "thieve")])
def test_singulars_are_the_first_chairs(word, single):
    assert nouns.singular(word) == single


def test_lemmas_and_singulars_lower_case():
    assert nouns.lemmas("Dogs on the BEACHES.") == ["dog", "on", "the", "beach", "."]
    assert nouns.singulars("Two BUSES") == ["two", "bus"]


# ------------------------------------------------------------------------------------------------- nouns
@pytest.mark.parametrize("text, word, counts", [
    ("A dog can be seen.", "can", 0), ("two cans on a table", "can", 1),
    ("a hot dog", "hot", 0), ("a hot dog", "dog", 1),
    ("a glass to drink from", "drink", 0), ("a drink on the table", "drink", 1),
    ("next to water", "water", 1), ("they watch the game", "watch", 0),
    ("two watches", "watch", 1), ("it could light up", "light", 0), ("a traffic light", "light", 1),
    ("a laptop computer", "laptop", 0), ("a laptop on a desk", "laptop", 1),
    ("There is a sofa next to a bed.", "sofa", 0), ("There is a sofa next to a bed.", "bed", 1),
    ("There is a man next to a bed.", "man", 1), ("Two sofas next to a bed", "sofa", 1),
    ("Dogs and dogs", "dog", 1), ("the dog, the dog", "dog", 2)])
def test_a_word_counts_by_its_neighbours(text, word, counts):
    assert nouns.nouns(text).count(word) == counts


@pytest.mark.parametrize("text, words, runs", [
    ("dogs", ["dog"], ["dog"]), ("red cars", ["red", "car"], ["car"]),
    ("price tags", ["price", "tag"], ["price tag"]), ("orange plate", ["orange", "plate"], ["orange plate"]),
    ("pair of skis", ["pair", "of", "ski"], ["pair", "ski"]),
    ("stove top oven", ["stove", "top", "oven"], ["stove top oven"]),
    ("remote", ["remote"], []), ("UV rays", ["uv", "ray"], ["uv ray"]), ("", [], [])])
def test_a_phrase_is_its_words_and_its_runs_of_nouns(text, words, runs):
    assert nouns.phrase(text) == (words, runs)


AMBER = SHARED / "official" / "amber"


def distance(captions, official):
    """{CHAIR, Cover, Hal, Cog: how far our nouns are from the official ones}, captions {AMBER id: text}."""
    files = {name: json.loads((AMBER / f"{name}.json").read_text()) for name in ("annotations", "relation")}
    answers = [{"id": name, "response": text} for name, text in captions.items()]
    ours, theirs = (amber.measures([], answers, safe_words=(AMBER / "safe_words.txt").read_text().split("\n"),
                                  nouns=found, partial=True, **files)[0]
                    for found in (nouns.nouns, official))
    return {key: round(ours[key] - theirs[key], 2) for key in ("chair", "cover", "hal", "cog")}


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("amber/nouns.*.jsonl"))
def test_ambers_scores_are_within_a_point_of_the_official_extraction(path, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 0)
    need(AMBER)
    official = {row["id"]: row["nouns_in_vocab"] for row in map(json.loads, path.read_text().splitlines())}
    answers = json.loads((path.parent / f"{path.stem.removeprefix('nouns.')}.json").read_text())
    captions = {answer["id"]: answer["response"] for answer in answers if answer["id"] in official}
    assert max(map(abs, distance(captions, official).values())) <= 1


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("lemma/tokenize_pos*.jsonl"))
def test_real_captions_give_the_official_nouns_with_few_exceptions(path):
    """Of COCO images, so AMBER has no truth for them; the mentions themselves are compared."""
    vocabulary = amber.vocabulary(json.loads((need(AMBER) / "relation.json").read_text()))
    ours = theirs = both = 0
    for row in map(json.loads, path.read_text().splitlines()):
        found = sorted(word for word in nouns.nouns(row["text"]) if word in vocabulary)
        official = sorted(lemma for word, tag in zip(row["tokens"], row["tags"], strict=True)
                          if tag.startswith("NN") and (lemma := nouns.lemma(word)) in vocabulary)
        ours, theirs = ours + len(found), theirs + len(official)
        both += sum(min(found.count(word), official.count(word)) for word in set(found))
    assert both / ours > .97 and both / theirs > .99


# ------------------------------------------------------------------------------------------------- NLTK
def test_without_nltk_or_its_data_there_is_a_sentence(monkeypatch):
    nouns._nltk.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "nltk", None)
    with pytest.raises(UserError, match="pip install nltk"):
        nouns.nltk_nouns("two dogs")


def test_nltk_is_asked_where_it_is_installed():
    nltk = pytest.importorskip("nltk")
    nouns._nltk.cache_clear()
    try:
        nltk.pos_tag(nltk.word_tokenize("two dogs"))
        nltk.stem.WordNetLemmatizer().lemmatize("dogs")
    except LookupError:
        for extract in (nouns.nltk_nouns, nouns.nltk_lemmas):
            with pytest.raises(UserError, match="nltk.downloader"):
                extract("two dogs")
    else:
        assert nouns.nltk_nouns("Two dogs can run.") == ["dog"]
        assert nouns.nltk_lemmas("Two Dogs") == ["two", "dog"]
