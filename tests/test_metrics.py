"""metrics.classroom: worked examples by hand."""

import ast
import time
from pathlib import Path

import pytest

import metrics

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
    assert metrics.hallucinated("a dog , a Cat , two cups , a cat", truth) == ["cat", "cups"]
    assert metrics.hallucinated("a dog", truth) == []
    assert metrics.hallucinated("yes , a dog", {"answer": "no", "choices": ["yes", "no"]}) == ["yes"]
    assert metrics.hallucinated("no .", {"answer": "no", "choices": ["yes", "no"]}) == []


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
    start = time.perf_counter()
    got = metrics.classroom(answers)
    assert time.perf_counter() - start < 1
    low, high = got["intervals"]["chair_s"]
    assert got["chair_s"] == 50
    assert (low, high) == pytest.approx((50 - 3.1, 50 + 3.1), abs=.6)         # 1.96 sqrt(.5 .5 / 1000)
    assert metrics.classroom(answers) == got                                  # the seed is fixed
    assert metrics.classroom(answers, seed=1)["intervals"] != got["intervals"]


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
    with pytest.raises(metrics.AnswerError, match="different questions"):
        metrics.difference(many(), many()[:-1])


def test_settings_are_passed_over():
    item = caption("a", "a dog", ["dog"])
    assert metrics.classroom([{"settings": {"model": "m"}}, item]) == metrics.classroom([item])


@pytest.mark.parametrize("answers, says", [
    ([], "no answers"),
    ([{"settings": {}}], "no answers"),
    ([{"id": "x"}], "id x.*`kind`"),
    (["text"], "answer 1 has no"),
    ([caption("x", None, ["dog"])], "id x.*`answer`"),
    ([caption("x", "a", ["dog"], truth={"present": ["dog"]})], "id x.*absent"),
    ([question("x", "a", "red", "attribute", ["blue"])], "id x.*choices"),
    ([question("x", "yes", "yes", set="popular")], "id x.*random, adversarial"),
    ([caption("x", "a", ["dog"]), caption("x", "b", ["dog"])], "id x.*twice"),
])
def test_malformed_answers_are_named(answers, says):
    with pytest.raises(metrics.AnswerError, match=says):
        metrics.classroom(answers)


def test_metrics_imports_neither_torch_nor_our_scripts():
    tree = ast.parse((Path(metrics.__file__)).read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= {"re", "functools", "numpy"}
