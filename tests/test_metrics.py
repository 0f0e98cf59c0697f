"""The measures: worked examples by hand, and the official scorers' own results."""

import ast
import hashlib
import json
import time

import pytest
from conftest import GOLDEN, ROOT, SHARED, need

from data import UserError
from evaluation import amber as ambers
from evaluation import benchmarks, metrics, objects, stats
from evaluation import words as nouns

WORLD = ["dog", "cat", "bus", "truck", "fire truck", "cup"]


def caption(id, answer, present, **more):
    truth = {"present": present, "absent": [w for w in WORLD if w not in present]}
    return {"id": id, "image": f"{id}.png", "question": "describe", "kind": "caption", "truth": truth,
            "answer": answer} | more


def question(id, answer, true, kind="existence", choices=("yes", "no"), set="random", **more):
    truth = {"answer": true, "choices": list(choices)} | ({"set": set} if kind == "existence" else {})
    return {"id": id, "image": f"{id}.png", "question": "q ?", "kind": kind, "truth": truth,
            "answer": answer} | more


def test_chair_and_cover_of_three_captions_by_hand():
    got = metrics.classroom([
        caption("a", "there is a dog , a cat .", ["dog", "cup"]),  # 1 miss of 2 mentions, 1 of 2 present
        caption("b", "there is a bus , a bus .", ["bus"]),        # 0 of 2, 1 of 1: named twice, covered once
        caption("c", "a dog , a dog , a cup .", ["cup"])])        # 2 of 3, 1 of 1: each mention is a miss
    assert got["chair_s"] == pytest.approx(100 * 2 / 3)
    assert got["chair_i"] == pytest.approx(100 * 3 / 7)
    assert got["cover"] == pytest.approx(100 * 3 / 4)
    assert got["pope_random_acc"] is None and got["by_kind"] == {}
    assert (got["n"], got["images"], got["unparsed"]) == (3, 3, 0)


def test_pope_accuracy_and_f1_by_hand():
    got = metrics.classroom([
        question("a", "yes , there is a dog .", "yes"),                       # tp
        question("b", "yes .", "yes"),                                        # tp
        question("c", "yes , there is a cat .", "no"),                        # fp
        question("d", "no , there is no cup .", "yes"),                       # fn
        question("e", "no .", "no"),                                          # tn
        question("f", "no .", "no", set=["random", "adversarial"]),           # tn, in both
        question("g", "yes .", "no", set="adversarial")])                     # fp
    assert got["pope_random_acc"] == pytest.approx(100 * 4 / 6)
    assert got["pope_random_f1"] == pytest.approx(100 * 2 * 2 / (3 + 3))      # P = R = 2/3
    assert got["pope_adversarial_acc"] == pytest.approx(50)
    assert got["pope_adversarial_f1"] == 0
    assert got["by_kind"]["existence"]["acc"] == pytest.approx(100 * 4 / 7)
    assert got["by_kind"]["existence"]["n"] == 7


def test_an_answer_is_right_only_if_it_says_the_true_choice_and_no_other():
    def right(answer, true="red", choices=("red", "blue")):
        got = metrics.classroom([question("a", answer, true, "attribute", choices)])
        return got["by_kind"]["attribute"]["acc"] == 100

    assert right("the dog is Red.")
    assert right("red red")
    assert not right("the dog is blue .")
    assert not right("red or blue .")
    assert not right("redder")
    assert not right("")
    assert right("two .", "two", ("one", "two"))
    assert not right("reds")                                  # a plural counts for objects in captions only


def test_what_says_no_single_choice_is_wrong_and_counted():
    got = metrics.classroom([question("a", "maybe", "yes"), question("b", "yes and no", "no"),
                             question("c", "NO!", "no")])
    assert got["unparsed"] == 2
    assert got["pope_random_acc"] == pytest.approx(100 / 3)
    assert got["pope_random_f1"] == 0                                         # 0/0 is 0, not an error


def test_words_are_whole_plural_and_the_longest():
    got = metrics.classroom([caption("a", "Two dogs, a concatenation, three buses and a Fire Truck.",
                                     ["dog", "bus", "fire truck"])])
    assert (got["chair_s"], got["chair_i"], got["cover"]) == (0, 0, 100)


def test_a_caption_without_objects_is_clean():
    got = metrics.classroom([caption("a", "", ["dog"])])
    assert (got["chair_s"], got["chair_i"], got["cover"]) == (0, 0, 0)
    assert got["intervals"]["chair_i"] == [0, 0]


def test_words_to_mark():
    truth = caption("a", "", ["dog"])["truth"]
    assert objects.hallucinated("a dog , a Cat , two cups , a cat", truth) == ["cat", "cups"]
    assert objects.hallucinated("a dog", truth) == []
    assert objects.hallucinated("yes , a dog", {"answer": "no", "choices": ["yes", "no"]}) == ["yes"]
    assert objects.hallucinated("no .", {"answer": "no", "choices": ["yes", "no"]}) == []


def test_a_thing_may_have_several_names():
    """The names that a truth brings stand for its words, in captions and in what CHAIR and Cover count."""
    truth = {"present": ["cup"], "absent": ["fire truck"],
             "names": {"mug": "cup", "knives": "knife", "fire engine": "fire truck"}}
    assert objects.mentioned("Two mugs .", truth) == ([("cup", "mugs")], {"cup"})
    assert objects.hallucinated("A mug, a cup and two Fire Engines.", truth) == ["fire engines"]
    scores = metrics.classroom([caption("a", "a mug and a fire engine", ["cup"], truth=truth),
                                caption("b", "a mug", ["cup"], truth=truth)])
    assert (scores["chair_s"], scores["chair_i"], scores["cover"]) == (50, pytest.approx(100 / 3), 100)


def many(shift=0):
    """1000 images: a caption and two questions each; `shift` of ten captions no longer hallucinate."""
    out = []
    for i in range(1000):
        out.append(caption(f"c{i}", "a dog , a cat ." if i % 10 < 5 - shift else "a dog .", ["dog"]))
        for k in range(2):
            out.append(question(f"q{i}-{k}", "yes ." if (i + k) % 4 else "no .", "yes" if i % 2 else "no",
                                image=f"c{i}.png", set=["random", "adversarial"][k]))
    return out


def test_intervals_are_the_binomial_ones_and_quick():
    answers = many()
    start = time.process_time()
    got = metrics.classroom(answers)
    assert time.process_time() - start < 1
    low, high = got["intervals"]["chair_s"]
    assert got["chair_s"] == 50
    assert (low, high) == pytest.approx((50 - 3.1, 50 + 3.1), abs=.6)         # 1.96 sqrt(.5 .5 / 1000)
    assert metrics.classroom(answers) == got                                  # the seed is fixed
    items = metrics.classroom_items(answers)
    one, other = (stats.tally(items, seed=seed)[1] for seed in (0, 1))
    assert (one["all", "chair_s"] != other["all", "chair_s"]).any()


def test_resampling_is_by_image_not_by_question():
    """100 questions on one image are one draw: with two images the interval is as wide as it can be."""
    answers = [question(f"{image}{i}", said, "yes", image=image)
               for image, said in (("a", "yes"), ("b", "no")) for i in range(100)]
    got = metrics.classroom(answers)
    assert got["pope_random_acc"] == 50 and got["intervals"]["pope_random_acc"] == [0, 100]


def test_difference_is_paired():
    same = metrics.difference(many(), many())
    assert same["chair_s"] == {"change": 0, "interval": [0, 0]}       # unpaired, this would be about +- 4
    got = metrics.difference(many(), list(reversed(many(shift=2))))           # joined by id, not by order
    assert got["chair_s"]["change"] == pytest.approx(-20)
    assert got["chair_s"]["interval"] == pytest.approx([-22.5, -17.5], abs=.5)  # 1.96 sqrt(.2 .8 / 1000)
    assert got["by_kind"]["existence"]["change"] == 0
    with pytest.raises(UserError, match="different questions"):
        metrics.difference(many(), many()[:-1])


def test_settings_are_passed_over():
    item = caption("a", "a dog", ["dog"])
    assert metrics.classroom([{"settings": {"model": "m"}}, item]) == metrics.classroom([item])


@pytest.mark.parametrize("answers, says", [
    ([], "no answers"),
    ([{"settings": {}}], "no answers"),
    ([{"id": "x", "answer": "a"}], "id x.*`kind`"),
    ([caption("x", None, ["dog"])], "id x.*no text.*answer it again"),
    ([caption("x", "a", ["dog"], truth={"present": ["dog"]})], "id x.*absent"),
    ([caption("x", "a", [], truth={"present": [], "absent": [], "names": {"": "dog"}})], "id x.*absent"),
    ([caption("x", "a", [], truth={"present": [], "absent": [], "names": ["pup"]})], "id x.*absent"),
    ([caption("x", "a", ["dog"], kind="attribute",
              truth={"present": ["dog"], "answer": "red", "choices": ["red"]})], "id x.*choices"),
    ([question("x", "a", "red", "attribute", ["blue"])], "id x.*choices"),
    ([question("x", "yes", "yes", set="popular")], "id x.*random, adversarial"),
    ([caption("x", "a", ["dog"]), caption("x", "b", ["dog"])], "twice .ids x"),
])
def test_malformed_answers_are_named(answers, says):
    with pytest.raises(UserError, match=says):
        metrics.classroom(answers)


def test_scoring_imports_numpy_and_nothing_heavier():
    for name in ("metrics", "amber", "objects", "readers", "stats", "words"):
        tree = ast.parse((ROOT / "evaluation" / f"{name}.py").read_text())
        names = {a.name for node in tree.body if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert names <= {"re", "functools", "itertools", "collections", "typing", "json", "html",
                         "unicodedata", "numpy", "data", "evaluation", "model"}
        assert "torch" not in names and (name == "objects" or "model" not in names)


# ------------------------------------------------------------------------------------------------- POPE
def pope_questions(labels, split="random"):
    """One question an image, ids from 1, about the objects o1, o2, ..."""
    return [{"question_id": i, "image": f"{i}.jpg", "label": label,
             "text": f"Is there a {split}{i} in the image?"} for i, label in enumerate(labels, 1)]


def score_pope(questions, answers, **more):
    """Of one split or of several."""
    return metrics.pope(questions if isinstance(questions, dict) else {"pope": questions}, answers, **more)


def pope_answers(texts, **more):
    return [{"question_id": i, "answer": text} | more for i, text in enumerate(texts, 1)]


def test_pope_by_hand():
    scores, items = score_pope(pope_questions(["yes", "yes", "yes", "no", "no"]),
                                 pope_answers(["Yes", "yes.", "No", "Yes", "No, there is not."]))
    assert [scores[key] for key in ("tp", "fp", "tn", "fn", "unparsed", "n")] == [2, 1, 1, 1, 0, 5]
    assert scores["accuracy"] == 3 / 5 and scores["yes_ratio"] == 3 / 5
    assert scores["precision"] == scores["recall"] == 2 / 3 and scores["f1"] == pytest.approx(2 / 3)
    assert [item["right"] for item in items] == [True, True, False, False, True]
    assert scores["version"] == "pope, 5 questions" and scores["coverage"] == {"answered": 5, "of": 5}


def test_pope_an_unread_answer_is_the_wrong_one_and_no_yes():
    questions, answers = pope_questions(["yes", "no"]), pope_answers(["maybe", ""])
    ours, items = score_pope(questions, answers)
    assert [ours[key] for key in ("tp", "fp", "tn", "fn", "unparsed")] == [0, 1, 0, 1, 2]
    assert ours["accuracy"] == ours["yes_ratio"] == 0 and [item["said"] for item in items] == [None, None]
    official, _ = score_pope(questions, answers, mode="official")          # all but No, no, not is a yes
    assert [official[key] for key in ("tp", "fp", "tn", "fn", "unparsed")] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("mode", ["official", "robust"])
def test_pope_nobody_says_yes(mode):
    """The official script divides by zero."""
    scores, _ = score_pope(pope_questions(["yes", "no"]), pope_answers(["No", "No"]), mode=mode)
    assert (scores["accuracy"], scores["precision"], scores["recall"], scores["f1"]) == (.5, 0, 0, 0)
    assert scores["intervals"]["precision"] == [0, 0] and "precision is 0/0" in scores["remarks"][0]


def test_pope_answers_join_by_id_not_by_line():
    questions, answers = pope_questions(["yes", "no", "yes"]), pope_answers(["Yes", "No", "Yes"])
    assert score_pope(questions, answers[::-1])[0]["accuracy"] == 1


def test_pope_several_splits_give_the_mean_of_their_ratios():
    splits = {"random": pope_questions(["yes", "no"]), "popular": pope_questions(["yes"] * 4, "popular")}
    answers = (pope_answers(["Yes", "No"], split="random") + pope_answers(["No"] * 4, split="popular"))
    scores, _ = score_pope(splits, answers)
    assert scores["accuracy"] == .5 and scores["n"] == 6 and scores["fn"] == 4
    assert scores["by_split"]["random"]["accuracy"] == 1 and scores["by_split"]["popular"]["accuracy"] == 0
    assert scores["version"] == "random, 2 questions; popular, 4 questions"


def test_pope_of_several_splits_each_answer_names_its_own():
    splits = {name: pope_questions(["yes", "no"], name) for name in ("random", "popular")}
    scores, items = score_pope(splits, pope_answers(["Yes", "No"], split="popular"))
    assert list(scores["by_split"]) == ["popular"] and {item["split"] for item in items} == {"popular"}
    with pytest.raises(UserError, match="2 answers belong to none of the questions .ids without `split`: 1"):
        score_pope(splits, pope_answers(["Yes", "No"]))


def test_pope_answers_to_questions_of_ones_own_may_call_their_split_anything():
    """A file's name that holds the name of a split says nothing there; to a published split it does."""
    questions, answers = pope_questions(["yes", "no"]), pope_answers(["Yes", "No"], split="random")
    assert score_pope({"my_pope": questions}, answers)[0]["accuracy"] == 1
    with pytest.raises(UserError):
        score_pope({"adversarial": questions}, answers)


def test_pope_intervals_are_by_image():
    """Two images with 100 questions each, all right and all wrong: an interval as wide as can be."""
    questions = [{"question_id": i, "image": f"{i // 100}.jpg", "text": "q", "label": "yes"}
                 for i in range(200)]
    answers = [{"question_id": i, "answer": "Yes" if i < 100 else "No"} for i in range(200)]
    scores, _ = score_pope(questions, answers)
    assert scores["accuracy"] == .5 and scores["intervals"]["accuracy"] == [0, 1]
    assert score_pope(questions, answers)[0] == scores                                # the seed is fixed


# ------------------------------------------------------------------------------------- what is refused
TWO = pope_questions(["yes", "no"])


@pytest.mark.parametrize("answers, says", [
    ([], "no answers"), ([{"settings": {}}], "no answers"),
    (pope_answers(["Yes"]), "1 of 2 questions have no answer .ids pope 2.*--partial"),
    (pope_answers(["Yes", "No", "No"]), "1 answers belong to none of the questions .ids pope 3"),
    (pope_answers(["Yes", "No"]) + pope_answers(["Yes"]), "1 answers appear twice .ids pope 1"),
    ([{"question_id": 1, "answer": None}], "answer 1 .id 1. has no text"),
    ([{"question_id": 1, "answer": ["Yes"]}], "answer 1 .id 1. has no text"),
    ([{"answer": "Yes"}], "1 of 2 questions have no answer .ids pope 2"),        # without ids, in their order
    ([{"answer": "Yes"}] * 4, "2 answers belong to none .* .ids pope at place 2, pope at place 3"),
    ([{"question_id": 1, "question": TWO[1]["text"], "answer": "Yes"},
      {"question_id": 2, "answer": "No"}], "1 answers are to other questions under these ids .ids pope 1"),
    ([{"question_id": [1], "answer": "Yes"}], "no usable `question_id`"),
    ([{"settings": {"benchmark": "amber"}}, *pope_answers(["Yes", "No"])], "are to amber, not to pope")])
def test_answers_that_cannot_be_scored_are_refused(answers, says):
    with pytest.raises(UserError, match=says):
        score_pope(TWO, answers)


def test_what_is_there_is_scored_if_asked_for():
    scores, _ = score_pope(TWO, pope_answers(["Yes"]), partial=True)
    assert scores["accuracy"] == 1 and scores["coverage"] == {"answered": 1, "of": 2}
    with pytest.raises(UserError, match="none of the questions"):           # strangers they remain
        score_pope(TWO, pope_answers(["Yes", "No", "No"]), partial=True)


@pytest.mark.parametrize("questions, says", [
    ([{"question_id": 1, "text": "q", "label": "Yes"}], "question 1 of pope has a `label` that is not yes"),
    (TWO + TWO, "2 questions of pope appear twice .ids 1")])
def test_questions_that_are_none_of_popes(questions, says):
    with pytest.raises(UserError, match=says):
        score_pope(questions, pope_answers(["Yes", "No"]))


def test_the_names_of_coco_images():
    for name in (285, "285", "000000000285.jpg", "COCO_val2014_000000000285.jpg"):
        assert stats.image_number(name) == 285
    assert [stats.image_number(name) for name in ("df62a56fdc1bb12b", "dog.jpg", None)] == [None] * 3


# ------------------------------------------------------------------------------------------------- AMBER
RELATION = {"forest": ["tree"], "tree": ["forest"], "dog": ["puppy"]} | {
    word: [] for word in ("cat", "sky", "sun", "cup")}


def amber(texts, truth, hallu, similarity=None, mode="robust", **more):
    """One caption an image, its nouns being its words."""
    annotations = [{"id": i, "type": "generative", "truth": truth, "hallu": hallu}
                   for i, _ in enumerate(texts, 1)]
    answers = [{"id": i, "response": text} for i, text in enumerate(texts, 1)]
    return ambers.measures([], answers, annotations, RELATION, ["cup"], str.split, similarity, mode, **more)


def test_amber_captions_by_hand():
    scores, items = amber(["dog dog cat", "sky", ""], ["dog", "sky"], ["cat", "sun"])
    assert scores["chair"] == pytest.approx(100 * 1 / 4)              # cat, of four mentions; repeats count
    assert scores["cover"] == pytest.approx(100 * 2 / 6)              # dog, then sky
    assert scores["cog"] == pytest.approx(100 * 1 / 6)                # cat
    assert scores["hal"] == pytest.approx(100 * 1 / 3)                # the first; an empty caption is clean
    assert items[0]["nouns"] == ["dog", "dog", "cat"] and "f1" not in scores and "amber_score" not in scores


def test_amber_adds_a_thousandth_and_rounds():
    scores, _ = amber(["dog"], ["dog"], ["cat"], mode="official")
    assert scores["cover"] == round(1 / 1.001 * 100, 1) == 99.9
    assert scores["counts"] == {"chair_score": 0, "chair_num": 1.001, "safe_cover_score": 1,
                                "safe_cover_num": 1.001, "hallu_cover_score": 0, "hallu_cover_num": 1.001,
                                "non_hallu_score": 1, "non_hallu_num": 1.001}
    assert amber(["dog"], ["dog"], ["cat"])[0]["cover"] == 100


@pytest.mark.parametrize("said, similarity, hal, cover, cog", [
    ("tree", None, 0, 1, 0),                        # stands for "forest" too, and credits that one alone
    ("forest tree", None, 0, 2, 0),                 # forest is a word of tree's, tree one of forest's
    ("puppy", None, 1, 0, 1),                       # a word of the hallu dog's
    ("cup", None, 0, 0, 0),                         # safe: a mention, and nothing else
    ("sun", None, 1, 0, 0),                         # neither
    ("sun", {"dog sun": .81}, 1, 0, 1),             # like a hallu
    ("sun", {"dog sun": .8}, 1, 0, 0),              # more than 0.8
    ("sun", {"sun tree": .9}, 0, 1, 0),             # like a truth, in either order
    ("sun", {"sun tree": .9, "dog sun": .9}, 0, 1, 1),        # like both: credits both, and is forgiven
    ("dog", {"dog tree": .9}, 0, 1, 1),             # a hallu itself, and like a truth: the same
    ("stone", {"stone tree": .9}, 0, 0, 0)])        # no word of the vocabulary: not even a mention
def test_amber_what_a_noun_credits(said, similarity, hal, cover, cog):
    _, [item] = amber([said], ["tree", "forest"], ["dog"], similarity)
    assert (item["hal"], item["cover"], item["cog"]) == (hal, cover, cog)
    assert item["mentions"] == (0 if said == "stone" else len(said.split()))


def test_amber_a_repeated_truth_is_never_covered_twice():
    _, [item] = amber(["dog dog"], ["dog", "dog"], [])
    assert (item["cover"], item["cover_num"]) == (1, 2)


TYPES = {"discriminative-hallucination": "existence", "discriminative-attribute-state": "state",
         "discriminative-attribute-number": "number", "discriminative-attribute-action": "action",
         "discriminative-relation": "relation", "relation": "relation", "generative": "generative"}


def amber_questions(rows, mode="official", **more):
    """rows: (type, truth, response)"""
    annotations = [{"id": i, "type": kind, "truth": truth} for i, (kind, truth, _) in enumerate(rows, 1)]
    answers = [{"id": i, "response": response} for i, (*_, response) in enumerate(rows, 1)]
    queries = [{"id": i, "image": f"{i}.jpg", "query": "Is the sky sunny in this image?"} for i in range(9)]
    return ambers.measures(queries, answers, annotations, RELATION, [], {}, mode=mode, **more)


def test_ambers_types():
    assert {kind: ambers.kind_of(kind) for kind in TYPES} == TYPES


def test_amber_questions_by_hand():
    kind = "discriminative-attribute-state"
    said = (("no", "No"), ("no", "Yes"), ("yes", "No"), ("yes", "yes"), ("no", "No"))
    rows = [(kind, *row) for row in said]
    scores, items = amber_questions(rows)
    state = scores["by_type"]["state"]
    assert list(scores["by_type"]) == ["state"] and "f1" not in scores          # one type, no whole dimension
    assert [state[key] for key in ("accuracy", "precision", "recall")] == [40, 66.6, 66.6]
    assert (state["n"], state["unparsed"]) == (5, 1)
    assert state["f1"] == round(2 * .666 * .666 / (.666 + .666 + 1e-4) * 100, 1)         # of the rounded ones
    assert [item["said"] for item in items] == ["no", "yes", "no", None, "no"]
    ours = amber_questions(rows, mode="robust")[0]["by_type"]["state"]                  # "yes" is understood
    assert (ours["accuracy"], ours["precision"], ours["unparsed"]) == (60, pytest.approx(200 / 3), 0)


def test_amber_existence_has_an_f1_of_its_own():
    scores, _ = amber_questions([("discriminative-hallucination", "no", "No")])
    p = round(1 / 1.001, 3)
    assert scores["by_type"]["existence"]["f1"] == round(2 * p * p / (2 * p + 1e-3) * 100, 1)


def test_amber_all_dimensions_give_the_overall_numbers_and_with_captions_the_score():
    kinds = [kind for kind in TYPES if kind != "generative"]
    rows = [(kind, "no", "No") for kind in kinds] + [(kinds[0], "no", "Yes")]
    scores, _ = amber_questions(rows)
    assert scores["accuracy"] == round(6 / 7.001 * 100, 1) and "amber_score" not in scores
    assert scores["by_type"]["attribute"]["accuracy"] == round(3 / 3.003 * 100, 1)        # three times 0.001
    annotations = [{"id": 1, "type": "generative", "truth": ["dog"], "hallu": []}] + [
        {"id": i, "type": kind, "truth": truth} for i, (kind, truth, _) in enumerate(rows, 2)]
    texts = ["dog cat", *(row[-1] for row in rows)]
    answers = [{"id": i, "response": text} for i, text in enumerate(texts, 1)]
    both, _ = ambers.measures([], answers, annotations, RELATION, [], {1: ["dog", "cat"]}, mode="official")
    assert both["amber_score"] == (100 - both["chair"] + both["f1"]) / 2 and both["f1"] == scores["f1"]


def test_amber_no_answer_is_a_no():
    scores, _ = amber_questions([("relation", "no", "Yes")], mode="robust")
    assert scores["by_type"]["relation"]["f1"] == 0 and "relation: precision is 0/0" in scores["remarks"][0]


def test_amber_a_part_that_is_begun_is_to_be_whole():
    annotations = [{"id": 1, "type": "generative", "truth": [], "hallu": []},
                   {"id": 2, "type": "relation", "truth": "no"}, {"id": 3, "type": "relation", "truth": "no"}]
    answers = [{"id": 2, "response": "No"}]
    with pytest.raises(UserError, match="1 of 2 questions have no answer .ids 3"):
        ambers.measures([], answers, annotations, RELATION, [], {})
    scores, _ = ambers.measures([], answers, annotations, RELATION, [], {}, partial=True)
    assert scores["coverage"] == {"answered": 1, "of": 2} and scores["by_type"]["relation"]["accuracy"] == 100


@pytest.mark.parametrize("more, says", [
    ({"similarity": {"dog": .9}}, "'dog' in the similarity file"),
    ({"similarity": {"dog cat": "x"}}, "'dog cat' in the similarity file")])
def test_amber_a_similarity_file_that_is_none(more, says):
    with pytest.raises(UserError, match=says):
        amber(["dog"], ["dog"], [], **more)


def test_amber_a_file_of_nouns_must_hold_every_caption():
    annotations = [{"id": 1, "type": "generative", "truth": [], "hallu": []}]
    with pytest.raises(UserError, match="none for answer 1"):
        ambers.measures([], [{"id": 1, "response": "a"}], annotations, RELATION, [], {})


# ------------------------------------------------------------------------------------------------- CHAIR
SYNONYMS = """person, man, woman
bicycle, bike
motorcycle,  motor bike
dog, puppy
bear
chair, seat
toilet
tie, bow
wine glass
hot dog
train
"""
TABLE = objects.synonyms(SYNONYMS)


def test_synonyms_and_what_the_first_chair_does_not_see():
    assert TABLE["motor bike"] == "motorcycle" and TABLE["person"] == "person" and len(TABLE) == 18
    literal = objects.synonyms(SYNONYMS, literal=True)
    assert "motor bike" not in literal and literal[" motor bike"] == "motorcycle"
    assert objects.coco_objects(objects.joined(["a", "motor", "bike"], literal), literal) == []


@pytest.mark.parametrize("words, found", [
    ("hot dog", ["hot dog"]), ("dog hot dog", ["dog", "hot dog"]),
    ("motor bike bike", ["motorcycle", "bicycle"]),
    ("baby bear", ["bear"]), ("adult dog man", ["dog", "person"]), ("passenger train", ["train"]),
    ("train track", []), ("home plate", []), ("bow tie bow", ["tie", "tie"]), ("toilet seat", ["toilet"]),
    ("seat of the toilet", ["toilet"]), ("seat", ["chair"]), ("wine glas", ["wine glass"]),
    ("man woman man", ["person"] * 3), ("stone", [])])
def test_pairs_are_one_word_and_words_are_classes(words, found):
    assert [kind for _, kind in objects.coco_objects(objects.joined(words.split(), TABLE), TABLE)] == found


def test_the_truth_is_instances_and_captions(tmp_path):
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in (1, 2)]
    instances = {"images": images, "categories": [{"id": 7, "name": "dog"}],
                 "annotations": [{"image_id": 1, "category_id": 7}, {"image_id": 3, "category_id": 7}]}
    captions = {"images": images[:1], "annotations": [{"image_id": 1, "caption": "A man."}]}
    nothing = {"images": [], "annotations": []}
    for name, part in (("instances_val", instances), ("captions_val", captions),
                       ("instances_train", nothing), ("captions_train", nothing)):
        (tmp_path / f"{name}2014.json").write_text(json.dumps(part))
    answers = [{"image_id": image} for image in (1, 2, 4)]
    truth = benchmarks.coco_truth(tmp_path, answers, TABLE, nouns.lemmas)
    assert truth == {1: {"dog", "person"}, 2: set()}
    instances["categories"][0]["name"] = "cat"
    (tmp_path / "instances_val2014.json").write_text(json.dumps(instances))
    with pytest.raises(UserError, match="category 'cat'"):
        benchmarks.coco_truth(tmp_path, answers, TABLE, nouns.lemmas)


def chair_answers(*texts, image=1):
    return [{"question_id": i, "image_id": image, "prompt": "What is it?", "text": text}
            for i, text in enumerate(texts)]


def test_chair_by_hand():
    answers = chair_answers("A dog and a dog.", "Assistant: Two men on bikes, one bike.", "A nice day it is.")
    scores, items = metrics.chair(answers, {1: {"dog", "person"}}, TABLE, nouns.lemmas)
    assert scores["chair_s"] == 1 / 3 and scores["chair_s_refine"] == 1 / 2       # the last names no object
    assert scores["chair_i"] == 2 / 4                       # dog dog bike bike: WordNet's "men" is no plural
    assert scores["recall"] == 1 / 6 and scores["mean_words"] == (5 + 6 + 5) / 3
    assert (scores["n"], scores["n_with_objects"]) == (3, 2)
    assert items[1]["generated"] == [("bike", "bicycle")] * 2 and items[1]["hallucinated"] == ["bicycle"] * 2
    singulars, _ = metrics.chair(answers, {1: {"dog", "person"}}, TABLE, nouns.singulars)
    assert singulars["chair_i"] == 2 / 5 and singulars["recall"] == 2 / 6               # and there it is


def test_chair_with_an_extractor():
    answers = chair_answers("A red hot dog, a man, a woman.", "A bike.", "A seat beside the toilet, twice.")
    asked = metrics.extraction_prompts(answers, "{question} {answer}")
    assert asked == {0: f"What is it? {answers[0]['text']}",
                     2: f"What is it? {answers[2]['text']}"}                        # three words: not asked
    replies = {0: '["red hot dog", "man", "woman", "man"]', 2: '["seat", "toilets", "price tag"]'}
    scores, items = metrics.chair(answers, {1: {"person"}}, TABLE, nouns.lemmas, replies)
    assert [kind for _, kind in items[0]["generated"]] == ["hot dog", "person", "person"]  # "man" counts once
    assert items[1]["generated"] == [] and items[2]["objects"] == ["seat", "toilet", "price tag"]
    assert [kind for _, kind in items[2]["generated"]] == ["toilet"]
    assert scores["chair_i"] == 2 / 4 and scores["chair_s_refine"] == 2 / 2 and scores["chair_s"] == 2 / 3


def test_chair_replies_that_are_missing_strange_or_unreadable():
    answers, truth = chair_answers("A dog on a bike.", "A man on a bike."), {1: {"dog"}}

    def score(replies, **more):
        return metrics.chair(answers, truth, TABLE, nouns.lemmas, replies, **more)

    assert score({0: '["dog"]'})[0]["coverage"] == {"answered": 1, "of": 2}
    for mode in ("robust", "official"):
        scores, items = score({0: '["dog"]', 1: "I see a man."}, mode=mode)   # left out, and counted
        assert (scores["unparsed"], scores["n"], scores["chair_s"]) == (1, 1, 0) and items[1]["unparsed"]


def test_chair_answers_about_other_images_and_without_objects():
    with pytest.raises(UserError, match="1 answers are about images.*ids 0"):
        metrics.chair(chair_answers("A dog.", image=2), {1: {"dog"}}, TABLE, nouns.lemmas)
    scores, _ = metrics.chair(chair_answers("Nothing."), {1: {"dog"}}, TABLE, nouns.lemmas)
    assert scores["chair_i"] == scores["chair_s_refine"] == 0 and "0/0" in scores["remarks"][0]
    plain = [{"image_id": "COCO_val2014_000000000001.jpg", "question": "q", "answer": "A dog."}] * 2
    _, items = metrics.chair(plain, {1: {"dog"}}, TABLE, nouns.lemmas)           # official files name no id
    assert [item["id"] for item in items] == [0, 1]


# ------------------------------------------------------------------------------------------------- MMHal
TEMPLATE = [{"image_id": f"{i:016x}a", "image_content": ["Dog", "Cat"], "question": f"What is {i}?",
             "gt_answer": "A dog.", "model_answer": ""} for i in range(16)]
MMHAL_ANSWERS = [{"question_id": i, "image_id": record["image_id"], "prompt": record["question"],
                  "text": "Assistant: a dog "} for i, record in enumerate(TEMPLATE)]


def test_mmhal_by_hand():
    replies = dict.fromkeys(range(16), "Rating: 5") | {0: "Rating: 2", 8: "Rating: 3", 1: "none"}
    scores, items = metrics.mmhal(TEMPLATE, MMHAL_ANSWERS, replies)
    assert scores["score"] == (13 * 5 + 2 + 3) / 15 and (scores["n"], scores["unparsed"]) == (15, 1)
    assert scores["hallucination_rate"] == 1 / 15
    assert scores["informativeness"] == pytest.approx(100 * (13 * 2 + 2 + 0) / 15 / 3)
    assert scores["by_category"]["attribute"] | {"intervals": 0} == {
        "score": 2.5, "hallucination_rate": .5, "informativeness": pytest.approx(100 / 3), "n": 2,
        "intervals": 0}
    assert scores["by_category"]["adversarial"]["n"] == 1 and items[1]["score"] is None
    official, items = metrics.mmhal(TEMPLATE, MMHAL_ANSWERS, replies, mode="official")
    assert official["score"] == (13 * 5 + 2 + 3) / 16 and official["n"] == 16 and items[1]["score"] == 0
    assert official["hallucination_rate"] == 2 / 16


def test_mmhal_prompts_in_any_order_of_answers():
    prompts = metrics.mmhal_prompts(TEMPLATE, MMHAL_ANSWERS[::-1], "{}|{}|{}|{}|{x}")
    assert prompts[3] == "Dog, Cat|What is 3?|A dog.|a dog|{x}" and list(prompts) == list(range(16))
    merged = [record | {"model_answer": "{} or {}"} for record in TEMPLATE]
    assert metrics.mmhal_prompts(TEMPLATE, merged, "{}|{}|{}|{}")[0] == "Dog, Cat|What is 0?|A dog.|{} or {}"


def test_mmhal_what_is_missing():
    replies = dict.fromkeys(range(16), "Rating: 5")
    with pytest.raises(UserError, match="1 of 16 questions have no answer .ids 15"):
        metrics.mmhal(TEMPLATE, MMHAL_ANSWERS[:-1], replies)
    del replies[4]                                             # eval_hallu.py refuses it without --partial
    scores, _ = metrics.mmhal(TEMPLATE, MMHAL_ANSWERS, replies)
    assert scores["coverage"] == {"answered": 15, "of": 16} and scores["score"] == 5


# ----------------------------------------------------------------------------- the official scorers' results
def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_json(path):
    return json.loads(path.read_text())


def cases(kind):
    """Every case of every expected.json of a kind, wherever in the folder it lies."""
    return [pytest.param(path.parent, case, id=f"{path.parent.relative_to(GOLDEN)}-{case}")
            for path in sorted((GOLDEN / kind).rglob("expected.json")) for case in read_json(path)]


@pytest.mark.golden
@pytest.mark.parametrize("folder, split", cases("pope"))
def test_pope_equals_the_official_script(folder, split, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 0)
    expected = read_json(folder / "expected.json")[split]
    questions = read_lines(need(SHARED / expected["label_file"]))
    answers = read_lines(folder / f"responses_{split}.jsonl")
    scores, _ = score_pope({split: questions}, answers, mode="official")
    names = {"tp": "TP", "fp": "FP", "tn": "TN", "fn": "FN"} | {
        key: key for key in ("accuracy", "precision", "recall", "f1", "yes_ratio")}
    official = {key: expected["official"][name] for key, name in names.items()}
    assert {key: scores[key] for key in names} == official


@pytest.mark.golden
@pytest.mark.parametrize("folder, case", cases("amber"))
def test_amber_equals_the_official_script(folder, case, monkeypatch):
    """A case is FILE|type=..|similarity=.. or all(FILE+FILE)|..., or the paper's AMBER score of all."""
    monkeypatch.setattr(stats, "RESAMPLES", 0)
    official, expected = need(SHARED / "official" / "amber"), read_json(folder / "expected.json")[case]
    if "formula" in expected:
        case = next(name for name in read_json(folder / "expected.json") if name.startswith("all("))
    files, *options = case.split("|")
    answers, found = [], {}
    for name in files.removeprefix("all(").removesuffix(")").split("+"):
        answers += read_json(folder / f"{name}.json")
        if (path := folder / f"nouns.{name}.jsonl").exists():
            found |= {line["id"]: line["nouns_in_vocab"] for line in read_lines(path)}
    table = read_json(folder / "similarity_table.json") if "similarity=table" in options else None
    scores, items = ambers.measures(
        [], answers, read_json(official / "annotations.json"), read_json(official / "relation.json"),
        (official / "safe_words.txt").read_text().split("\n"), found, table, mode="official")
    if "formula" in expected:
        assert scores["amber_score"] == pytest.approx(expected["value"], abs=1e-9)
        return
    for title, numbers in expected["printed"].items():
        part = {"exsitence": "existence"}.get(title.lower(), title.lower())                 # as it is printed
        found = scores if "task" in part else scores["by_type"][part]
        assert {key: found[key.lower()] for key in numbers} == numbers, title
    counts = expected.get("raw_counts", {})
    assert {key: scores["counts"][key] for key in counts} == counts
    per_item = folder / f"per_item.{files}.{'table' if table else 'exact'}.jsonl"
    if per_item.exists():
        lines = read_lines(per_item)
        assert [{key: item[key] for key in lines[0]} for item in items] == lines


@pytest.mark.golden
@pytest.mark.parametrize("folder, case", [case for case in cases("chair") if "opera" not in case.values[1]])
def test_chair_equals_the_official_scripts(folder, case):
    scorer, name = case.split("|")
    kinds = {"rlhfv_nogpt": ("rlhfv", "synonyms_refine.rlhfv.txt", nouns.lemmas),
             "rlhfv_gpt_canned": ("rlhfv", "synonyms_refine.rlhfv.txt", nouns.lemmas),
             "original_chair(pattern)": ("original", "synonyms.chair.txt", nouns.singulars)}
    (kind, file, words), expected = kinds[scorer], read_json(folder / "expected.json")[case]
    text = (need(SHARED / "official" / "objhal") / file).read_text()
    table = objects.synonyms(text, literal=kind != "rlhfv")
    answers = read_lines(folder / f"responses_{name}.jsonl")
    truth = benchmarks.coco_truth(folder / "coco80", answers, table, words)
    theirs = read_json(folder / "gt_objects.json")[kind]
    assert {image: sorted(truth[image]) for image in truth} == {image: theirs[str(image)] for image in truth}
    replies = None
    if "gpt" in scorer and "nogpt" not in scorer:
        replies = {line["question_id"]: line["judge_reply"]
                   for line in read_lines(folder / f"extractor_replies.{name}.jsonl")}
        asked = metrics.extraction_prompts(answers, "")
        replies = {key: reply for key, reply in replies.items() if key in asked}
    scores, items = metrics.chair(answers, truth, table, words, replies, "official")
    names = {"CHAIRs": "chair_s", "CHAIRs_refine": "chair_s_refine", "CHAIRi": "chair_i", "obj_rec": "recall",
             "sentence_num": "n", "coco_sentence_num": "n_with_objects", "avg_word_len": "mean_words"}
    assert {key: scores[names[key]] for key in expected if key in names} == {
        key: expected[key] for key in expected if key in names}
    if "coco_word_count" in expected:
        assert (scores["counts"]["covered"], scores["counts"]["present"]) == (
            expected["coco_word_count"], expected["gt_word_count"])

    def plain(line):
        kinds = [word if isinstance(word, str) else word[1] for word in line["generated"]]
        return line.get("image_id", line.get("image")), kinds, line["hallucinated"]

    per_item = read_lines(folder / f"per_item.{kind if kind != 'rlhfv' else scorer}.{name}.jsonl")
    assert sorted(map(plain, items)) == sorted(map(plain, per_item))      # an extractor's come in any order


@pytest.mark.golden
@pytest.mark.parametrize("folder, case", [case for case in cases("mmhal") if
                                          (case.values[0] / f"reviews_{case.values[1]}.json").exists()])
def test_mmhal_equals_the_official_scripts(folder, case, monkeypatch):
    monkeypatch.setattr(stats, "RESAMPLES", 0)
    expected = read_json(folder / "expected.json")
    template = read_json(need(SHARED / "official" / "mmhal" / "mmhal-bench_answer_template.json"))
    prompt = (SHARED / "official" / "mmhal" / "judge_prompt.txt").read_text()
    replies = {place: reply["choices"][0]["message"]["content"]
               for place, reply in enumerate(read_json(folder / f"reviews_{case}.json"))}
    wanted = expected[case]
    for answers in (read_lines(folder / "answers.jsonl"), read_json(folder / "answers_merged.json")):
        scores, items = metrics.mmhal(template, answers, replies, mode="official")
        assert [item["score"] for item in items] == wanted["scores"]
        assert scores["score"] == wanted["average"]
        assert scores["hallucination_rate"] == wanted["hallucination_rate"]
        assert scores["informativeness"] == pytest.approx(wanted["informativeness_mean"], abs=1e-9)
        for key, per_type in (("score", "per_type"), ("hallucination_rate", "hallucination_rate_per_type")):
            assert {kind: part[key] for kind, part in scores["by_category"].items()} == wanted[per_type]
        prompts = metrics.mmhal_prompts(template, answers, prompt).values()
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in prompts]
        assert hashes == expected["prompts"]["sha256"]


# ------------------------------------------------------------------------------------------------- speed
def test_a_whole_amber_and_a_whole_pope_take_no_time():
    """15,220 and 9,000 answers, intervals included; 5 seconds is what the whole command may take."""
    kinds = ["discriminative-hallucination", "discriminative-attribute-state", "relation"]
    some, rest = range(1, 1005), range(1005, 15221)
    annotations = [{"id": i, "type": "generative", "truth": ["dog", "sky"], "hallu": ["cat"]} for i in some]
    annotations += [{"id": i, "type": kinds[i % 3], "truth": "no"} for i in rest]
    text = "A dog is next to a cat under the sky, and a cup can be seen. " * 6
    answers = [{"id": i, "response": text if i in some else "No, it is not."} for i in (*some, *rest)]
    queries = [{"id": i, "image": f"{i % 1004}.jpg", "query": "Is the sky sunny in this image?"}
               for i in range(1, 15221)]
    start = time.process_time()
    scores, _ = ambers.measures(queries, answers, annotations, RELATION, [], nouns.nouns)
    assert scores["n"] == 15220 and time.process_time() - start < 4
    splits = {name: [{"question_id": i, "image": f"{i // 6}.jpg", "label": "yes",
                      "text": f"Is there a thing{i} in the image?"} for i in range(3000)]
              for name in ("random", "popular", "adversarial")}
    answers = [{"question_id": i, "split": name, "answer": f"I can see a thing{i} in it."} for name in splits
               for i in range(3000)]
    start = time.process_time()
    assert score_pope(splits, answers)[0]["accuracy"] == 1 and time.process_time() - start < 3
