"""readers.py: what answers, judges and extractors say, beside what the official readers make of it."""
import json
import time

import pytest
from conftest import GOLDEN, SHARED

from evaluation import readers

DOG = "Is there a dog in the image?"


@pytest.mark.parametrize("text, official", [
    ("No", "no"), ("no.", "no"), ("There is no dog", "no"), ("No,there is not", "no"),
    ("It is not there. Yes", "no"),                                      # what stands before the first stop
    ("", "yes"), ("NO", "yes"), ("No!", "yes"), ("\nNo", "yes"), ("Nope", "yes"), ("It isn't.", "yes"),
    ("cannot tell", "yes"), ("There is a dog. No.", "yes"), ("maybe", "yes")])
def test_the_official_reader_takes_all_but_three_tokens_for_a_yes(text, official):
    assert readers.official_yes_no(text) == official


def test_ambers_reader_wants_the_word_and_nothing_else():
    read = [readers.strict_yes_no(text) for text in ("Yes", "No", "yes", "No.", "")]
    assert read == ["yes", "no", None, None, None]


@pytest.mark.parametrize("says, texts", [
    ("yes", ["Yes", "YES!", " yes.", "**Yes**", "Yeah, sure", "Sure, a dog can be seen.", "Certainly",
             "Answer: Yes", "The answer is yes.", "<answer>Yes</answer>", '{"answer": "yes"}', "It is.",
             "The dog is visible, yes.", "There is a dog.", "There are two dogs here", "I think so.",
             "There is a dog but no cat.", "Yes, but there is no cat.",
             "The image shows a dog. It is not clear how old it is."]),
    ("no", ["No", "NO!", "\nno", "Nope.", "None.", "Certainly not.", "There isn't any dog.",
            "It isn’t there.", "There is no dog.", "The image does not contain a dog.", "I do not see one.",
            "Not in this image.",
            "There is a cat, not a dog.", "The answer is: no", "There isn't a dog. No.",
            "I can't see any dog."]),
    (None, ["", " ", "...", "maybe", "Yes and no.", "yes, no", "yes or no", "I cannot tell.", "Not sure.",
            "unknown", "N/A", "Yesterday", "There is a cat.", "I'm sorry, I can't help with that.",
            "cannot tell if a dog is there", "A photo of a street."])])
def test_our_reader_understands_or_says_that_it_does_not(says, texts):
    assert {text: readers.yes_no(text, DOG) for text in texts} == dict.fromkeys(texts, says)


def test_a_statement_must_be_about_all_that_was_asked():
    sunny = "Is the sky sunny in this image?"
    assert readers.yes_no("The sky is sunny.", sunny) == "yes"
    assert readers.yes_no("The sky is not sunny.", sunny) == "no"
    assert readers.yes_no("The sky is cloudy.", sunny) is None
    assert readers.yes_no("There are two dogs.", "Are there three dogs in this image?") is None
    assert readers.yes_no("There is a dog.") == "yes"                # without a question, its form must do


@pytest.mark.golden
@pytest.mark.parametrize("path", [pytest.param(path, id=f"{path.parent.name}-{path.stem}")
                                  for path in sorted((GOLDEN / "pope").glob("parse_forms*.json"))])
def test_the_official_reader_on_every_golden_form(path):
    forms = json.loads(path.read_text())
    assert {text: readers.official_yes_no(text) for text in forms} == {
        text: form["official"] for text, form in forms.items()}


@pytest.mark.parametrize("text, official, ours", [
    ("Rating: 4", 4, 4), ("RATING: 0", 0, 0), ("**Rating: 3, not informative**", 3, 3),
    ("Rating: 10", 1, None), ("Rating: 4.5", 4, None), ("Rating: 7", None, None),       # off the scale
    ("Rating:5", None, 5), ("**Rating:** 4", None, 4), ("Rating = 2", None, 2), ("rating is 6", None, 6),
    ("Score: 3/6", None, 3), ("[[2]]", None, 2), ("5", None, 5), ('{"rating": 1}', None, 1),
    ("Rating (0-6): 4", None, 4), ("I give it a rating of 3.", None, 3), ("Final score - 5", None, 5),
    ("Rating: 4. Rating: 4.", 4, 4), ("Rating: 4 or rating: 5", None, None), ("Rating: -1", None, None),
    ("", None, None), ("<html>500</html>", None, None), ("accurate 3", None, None), ("no idea", None, None)])
def test_ratings(text, official, ours):
    assert readers.rating(text, "official") == official
    assert readers.rating(text) == ours


CASES = [json.loads(line) for path in SHARED.glob("cases/readers.jsonl")
         for line in path.read_text().splitlines()]
WRAPPERS = {"as it is": "{}", "thought": "<think>No, wait. Rating: 2? [\"bird\"]</think>\n{}",
            "a thought's end": "Yes or no? Rating: 3\n</think>\n\n{}",
            "reasoning": "<reasoning>Yes.</reasoning>{}",
            "capitals": "<THINKING>\nIt is a 1.\n</THINKING>\n\n{}", "kimi": "◁think▷No.◁/think▷{}",
            "an answer": "<answer>{}</answer>",
            "a conclusion": "There is no 2.\n<conclusion>\n{}\n</conclusion>",
            "boxed": "\\boxed{{{}}}", "fence": "```\n{}\n```", "json": "```json\n{}\n```", "bold": "**{}**",
            "tag": "<b>{}</b>", "quoted": "> {}", "heading": "## {}", "blank": "\n  {}\n\n",
            "thoughts in thoughts": "<think>Yes <think>No. Rating: 2</think> [\"bird\"]</think>\n{}",
            "two thoughts": "<think>No.</think>\n<reasoning>Rating: 2</reasoning>\n{}",
            "a thought without an end": "{}\n<think>No. Rating: 2 [\"bird\"]",
            "channels": "<|channel|>analysis<|message|>No. Rating: 2<|end|><|channel|>final<|message|>{}",
            "folded": "<details><summary>Thoughts</summary>No. Rating: 2</details>\n{}",
            "special tokens": "<|im_start|>\n{}<|im_end|>", "nested fence": "````text\n```\n{}\n```\n````",
            "tildes": "~~~\n{}\n~~~", "a fence with a title": "```json title=\"a.json\"\n{}\n```",
            "text in a box": "It is no 2.\n$\\boxed{{\\text{{{}}}}}$", "underscores": "__{}__",
            "an entity": "&nbsp;{}&nbsp;"}
# What stands around a text here may make it unreadable, but never something else.
AROUND = {"Answer": "Answer: {}", "of full width": "Answer：{}", "Chinese": "答案：{}", "brackets": "「{}」",
          "in quotes": "\"{}\"", "curly": "“{}”", "single": "'{}'", "guillemets": "«{}»", "code": "`{}`",
          "bullet": "- {}", "number": "1. {}", "star": "* {}", "option": "B) {}", "italics": "_{}_",
          "stars": "*{}*", "struck": "~~{}~~", "formula": "${}$", "displayed": "\\[{}\\]",
          "a row": "| {} |", "a table": "| answer |\n|---|\n| {} |", "rules": "---\n{}\n---",
          "an object": "{{\"answer\": \"{}\"}}", "in a list in a quotation": "> - {}",
          "sections": "### Reasoning\nhm\n### Answer\n{}", "emoji": "✅ {} 👍", "dots": "{} …"}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_thoughts_and_dress_change_nothing_of_what_is_read(wrapper):
    wrong = []
    for case in CASES:
        more = [case["question"]] if "question" in case else []
        found = getattr(readers, case["reader"])(WRAPPERS[wrapper].format(case["text"]), *more)
        if found != case["value"] and not (found is None and case.get("unread_is_fine")):
            wrong.append((case["text"], case["value"], found))
    assert wrong == []


@pytest.mark.parametrize("around", AROUND)
def test_what_stands_around_a_text_never_makes_it_say_something_else(around):
    for case in CASES:
        more = [case["question"]] if "question" in case else []
        found = getattr(readers, case["reader"])(AROUND[around].format(case["text"]), *more)
        assert case["text"] == "" or found in (case["value"], None), case["text"]


def test_no_text_takes_long_to_read():
    """A line of tags, fences or marks of 60,000 characters, each of which could begin something."""
    for piece in ("</think>", "<think>", "<think></think>", "```", "_", "* ", '"', "[", "&", "\\boxed{"):
        text, start = piece * (60_000 // len(piece)), time.process_time()
        readers.yes_no(text, DOG), readers.rating(text), readers.object_list(text)
        assert time.process_time() - start < 3, piece


@pytest.mark.parametrize("text, value", [
    ("A dog without a collar is in the image.", "yes"), ("There is a dog, but it isn't barking.", "yes"),
    ("The dog is not visible.", "no"), ("A dog can't be seen here.", "no"), ("Is there a dog? No.", "no"),
    ("Is there a dog in the image? Yes, there is.", "yes"), ("I don't see one.", "no"),
    ("There's a dog.", "yes"), ("Correct.", "yes"), ("That is not correct. There is a dog.", None),
    ("No, there is a dog.", None),
    ("<think>There is a dog", None), ("<answer>Yes</answer><answer>No</answer>", None), ("One.", None)])
def test_a_denial_counts_for_what_it_denies(text, value):
    assert readers.yes_no(text, DOG) == value


@pytest.mark.parametrize("text, official, ours", [
    ('["dog", "ball"]', ["dog", "ball"], ["dog", "ball"]), ("[]", [], []),
    ('Here they are:\n["dog"]', ["dog"], ["dog"]),                                    # JSON in the last line
    ('["dog"]\nThat is all.', None, ["dog"]), ('```json\n["dog"]\n```', None, ["dog"]),
    ("['dog', 'man\\'s hat']".replace("\\", ""), None, ["dog", "man's hat"]), ("()", None, []),
    ("a dog and a ball", None, None), ('{"dog": 1}', None, None), ("[[1]]", None, ["1"]), ("", None, None)])
def test_lists_of_objects(text, official, ours):
    assert readers.object_list(text, "official") == official
    assert readers.object_list(text) == ours
