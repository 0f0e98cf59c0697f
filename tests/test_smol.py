"""The second world: drawings, scenes and their truth, language that says it, files of pairs and scenes."""

import json
import random
import re
import subprocess
import sys
from functools import cache
from itertools import combinations

import numpy as np
import pytest
from conftest import ROOT

from classroom import pairs
from classroom.smol import asking, atlas, ground, scenes, speech, things, world
from evaluation import metrics, objects

WORDS = ROOT / "classroom" / "smol" / "words"


def fresh(split="train", n=150, seed=0):
    """Some scenes of a split."""
    rng = random.Random(f"test-{split}-{seed}")
    return [scenes.scene(rng, split) for _ in range(n)]


some = cache(fresh)             # those that several tests look at


# ---- things and drawings ----------------------------------------------------------------------------


def test_at_least_a_hundred_things_in_at_least_ten_settings():
    assert len(things.TYPES) >= 100 and len(things.SETTINGS) >= 10
    assert {len(setting.things) for setting in things.SETTINGS.values()} == {len(things.TEMPTING)}
    assert set(ground.HORIZON) == set(ground.DRAW) == set(things.SETTINGS)


def test_every_name_means_one_thing():
    seen = {}
    for thing in things.THINGS.values():
        for both in (*thing.names, *thing.understood):
            for name in map(str.lower, both):
                assert seen.setdefault(name, thing.name) == thing.name
    assert set(speech.names().values()) == set(things.TYPES)


def test_no_name_that_is_said_holds_a_word_that_an_answer_is_read_by():
    deciding = {*things.COLOURS, *speech.NUMBERS, "yes", "left", "right", "above", "below"}
    for thing in things.THINGS.values():
        for both in thing.names:
            assert not deciding & set(re.findall(r"\w+", " ".join(both).lower())), thing.name


def test_every_style_but_the_older_ones_draws_every_thing():
    for style in atlas.STYLES:
        lacking = {things.THINGS[name].code for name in things.TYPES if not atlas.has(style, name)}
        unfit = {code for other, code in things.UNFIT if other == style}
        assert unfit <= lacking
        assert lacking == unfit if style not in atlas.OLDER else len(lacking) < 36


def test_a_drawing_fills_its_cell_and_a_mirrored_one_is_its_mirror_image():
    for name in ("cup", "car", "sheep"):
        pixels = atlas.picture("noto", name)
        assert max(pixels.shape[:2]) == atlas.CELL and pixels[..., 3].max() == 255
        plain, mirrored = (atlas.sprite("noto", name, "", 40, 0, flip) for flip in (False, True))
        assert (plain[:, ::-1] == mirrored).all() and max(plain.shape[:2]) == 40


def hue_of(style, name, colour):
    """The hue, in degrees, that most of a tinted drawing's strong pixels have."""
    pixels = atlas.tinted(atlas.picture(style, name), colour)
    hue, saturation, value = (band.astype(int) for band in atlas._hsv(pixels[..., :3]))
    strong = (saturation > 90) & (value > 70) & (pixels[..., 3] > 128)
    return 10 * np.bincount(hue[strong] * 36 // 256, minlength=36).argmax()


def test_a_tint_is_the_colour_that_is_said_in_every_style():
    for thing in things.THINGS.values():
        for style in atlas.STYLES if thing.colour == "any" else ():
            for colour, hue in things.TINTS.items() if atlas.has(style, thing.name) else ():
                off = abs((hue_of(style, thing.name, colour) - hue + 180) % 360 - 180)
                assert off <= 25, (style, thing.name, colour)


def test_the_notices_name_every_style():
    text = (ROOT / "classroom" / "smol" / "NOTICES.md").read_text()
    assert all(f"| {style} |" in text for style in atlas.STYLES)
    assert (ROOT / "classroom" / "smol" / "atlas.webp").stat().st_size < 4e6


# ---- scenes -----------------------------------------------------------------------------------------


def test_a_seed_decides_scenes_and_pixels():
    assert fresh(seed=1, n=20) == fresh(seed=1, n=20) != fresh(seed=2, n=20)
    first, again = scenes.draw(fresh(n=1)[0]), scenes.draw(fresh(n=1)[0])
    assert first.dtype == np.uint8 and first.shape == (224, 224, 3) and (first == again).all()


def test_no_combination_is_in_two_splits_and_print_alone_has_the_held_out_style():
    found = {split: some(split) for split in scenes.SPLITS}
    seen = {split: {frozenset(s.counts) for s in those} for split, those in found.items()}
    assert not any(seen[a] & seen[b] for a, b in combinations(seen, 2))
    assert {s.style for s in found["print"]} == set(atlas.HELD_OUT)
    assert not {s.style for split in ("train", "tune") for s in found[split]} & set(atlas.HELD_OUT)


def test_counts_colours_and_styles_are_as_promised():
    for s in some():
        assert 2 <= len(s.counts) <= 4 and sum(s.counts.values()) <= scenes.MOST
        assert set(s.counts.values()) <= {1, 2, 3}
        for kind in s.things:
            own = things.THINGS[kind.name].colour
            assert kind.colour == {"-": "", "any": kind.tint}.get(own, own)
            assert atlas.has(s.style, kind.name)


def visible(picture, lone, empty):
    """The share of a thing's pixels that the whole picture shows as the one of this thing alone does."""
    own = np.abs(lone - empty).max(-1) > 24
    same = np.abs(picture - lone).max(-1) < 24
    return (same & own).sum() / max(1, own.sum())


def test_everything_is_inside_the_picture():
    for s in some():
        for kind in s.things:
            for spot in kind.places:
                half = spot.size / 2
                assert half <= spot.x <= 224 - half
                assert spot.y <= 224 - half


def test_nothing_is_hidden():
    for s in some()[:12]:
        picture = scenes.draw(s).astype(int)
        empty = scenes.background(s.theme, s.ground).astype(int)
        for kind in s.things:
            for spot in kind.places:
                one = scenes.Kind(kind.name, "", kind.tint, (spot,))
                alone = scenes.Scene(s.theme, s.style, (one,), s.ground)
                lone = scenes.draw(alone).astype(int)
                assert visible(picture, lone, empty) > .5, (kind.name, spot)


def test_backgrounds_are_more_than_a_gradient():
    for theme in things.SETTINGS:
        picture = np.asarray(ground.ground(theme, random.Random(0)), int)
        assert np.abs(np.diff(picture, axis=1)).sum(-1).max() > 30                    # edges across
        other = np.asarray(ground.ground(theme, random.Random(1)), int)
        assert (picture != other).any()


# ---- language ---------------------------------------------------------------------------------------

KINDS = {"openers": 60, "lists": 60, "describe": 60, "existence": 60, "attribute": 60, "counting": 60,
         "relation": 43, "side": 30}


@pytest.mark.parametrize("name", sorted(path.stem for path in WORDS.glob("*.txt")))
def test_templates_are_distinct_sentences(name):
    lines = speech.lines(name)
    assert len(set(lines)) == len(lines) >= KINDS.get(name, 6)
    for line in lines:
        assert re.search(r"[.?!]$", line) and "  " not in line and line.count("{") == line.count("}")


def test_templates_themselves_name_no_thing():
    for path in WORDS.glob("*.txt"):
        for line in speech.lines(path.stem):
            assert speech.mentions(re.sub(r"\{[^}]*\}", "@", line)) == [], line
    for setting in things.SETTINGS.values():
        assert speech.mentions(setting.article) == []


def test_at_least_sixty_templates_for_each_kind_of_question():
    for kind, files in {"existence": "existence", "attribute": "attribute attribute_yes",
                        "counting": "counting counting_yes", "relation": "relation relation_yes side",
                        "false_premise": "attribute side"}.items():
        assert sum(len(speech.lines(name)) for name in files.split()) >= 60, kind


@pytest.mark.parametrize("text, said", [
    ("Two mugs and a frying pan beside the sofas.", ["cup", "frying pan", "sofa"]),
    ("A hot dog is no dog, and a teddy bear no bear.", ["hot dog", "dog", "teddy bear", "bear"]),
    ("KNIVES, children's toys, cupboards and a hatchet", ["knife", "axe"]),
    ("It is carried by careful catering.", []),
    ("Three slices of pizza, cups of coffee", ["slice of pizza", "cup"]),
    ("The lorry's wheels and a T-shirt", ["truck", "T-shirt"])])
def test_mentions_reads_other_names_and_plurals(text, said):
    assert speech.mentions(text) == said


def test_a_true_caption_names_what_is_there_and_nothing_else():
    rng = random.Random(0)
    for s in some():
        text = speech.careless_caption(rng, s)
        assert set(speech.mentions(text)) == set(s.counts), text
        assert len(re.findall(r"[.?!](?: |$)", text)) >= 2


def test_a_true_caption_says_numbers_colours_and_places_as_they_are():
    """Each claim of a caption is read back with patterns of its own and held against the scene."""
    rng, claims = random.Random(1), 0
    for s in some(n=220, seed=3):
        text = speech.careless_caption(rng, s).lower()
        for name, kind in s.kinds.items():
            for noun in {n.lower() for both in things.THINGS[name].names for n in both}:
                colours = "|".join(things.COLOURS)
                claim = rf"\b(a|an|two|three) ((?:{colours}) )?{re.escape(noun)}\b"
                for number, colour in re.findall(claim, text):
                    assert {"a": 1, "an": 1, "two": 2, "three": 3}[number] == s.counts[name], (noun, text)
                    assert not colour or colour.strip() == kind.colour, text
                    claims += 1
        told = re.search(r"the ([\w '-]+?) (?:is|can be seen|has been placed|appears|,? ?it is) "
                         r"(?:to the )?(left|right|above|below) (?:of )?the ([\w '-]+?)\.", text)
        if told:
            (a,), (b,) = map(speech.mentions, (told[1], told[3]))
            assert told[2] in speech.beside(s, a, b), text
            claims += 1
    assert claims > 600


def test_a_careless_caption_adds_what_is_typical_of_the_setting():
    rng, added, known = random.Random(0), [], 0
    for s in some():
        text = speech.careless_caption(rng, s, level=1., omit=.2)
        new = set(speech.mentions(text)) - set(s.counts)
        assert new <= {name for name, _ in s.tempting}
        added += new
        known += len(s.tempting)
    assert .2 < len(added) / known < .5


def test_questions_are_true_of_the_scene():
    rng = random.Random(0)
    for s in some():
        for kind in asking.KINDS:
            q = asking.ask(rng, s, kind)
            if q is None:
                assert kind in ("attribute", "relation")
                continue
            check_question(s, q)


def check_question(s, q):
    """The answer has the deciding word, each sentence its own word; the truth is read off the question."""
    assert q.kind in asking.KINDS and q.right in q.choices and set(q.said) == set(q.choices)
    for word, sentence in q.said.items():
        assert {found for found, _ in objects.mentions(sentence, q.choices)} == {word}, (q.choices, sentence)
    about = speech.mentions(q.question)
    assert about, q.question
    name = about[0]
    if q.kind == "existence":
        assert (q.right == "yes") == (name in s.counts)
    elif q.kind == "false_premise":
        assert name not in s.counts and q.right == "no"
    elif q.kind == "counting" and q.choices != asking.YES_NO:
        assert speech.NUMBERS.index(q.right) == s.counts.get(name, 0)
    elif q.kind == "counting":
        number = next(n for n in (2, 3) if re.search(rf"(?i)\b{speech.NUMBERS[n]}\b", q.question))
        assert (q.right == "yes") == (s.counts.get(name, 0) == number)
    elif q.kind == "attribute" and q.choices != asking.YES_NO:
        assert q.right == s.kinds[name].colour


def test_relations_are_true_of_the_places():
    rng, seen = random.Random(0), set()
    for s in some():
        q = asking.relation(rng, s)
        if q is None:
            continue
        names = list(dict.fromkeys(speech.mentions(q.question)))
        if len(names) == 1:
            assert q.right == speech.side_of(s, names[0])
        elif q.choices == asking.YES_NO:
            side, = re.findall(r"left|(?<=to the )right|above|below", q.question)
            first = q.question.startswith("Look at")          # "Look at the knife. Is the cup above it?"
            a, b = names[::-1] if first else names
            assert (q.right == "yes") == (side in speech.beside(s, a, b)), q.question
        elif q.question.startswith(("Is", "In", "Has", "Does", "Do")):
            a, b = names
            assert q.right in speech.beside(s, a, b), q.question
        seen.add((len(names), q.choices))
    assert len(seen) == 4


# ---- pairs and scenes as files ----------------------------------------------------------------------


def test_pairs_and_scenes_are_in_the_first_worlds_formats(tmp_path):
    words = [sys.executable, ROOT / "classroom" / "pairs.py", "--world", "smol", "--n", "12",
             "--questions", ".5", "--ask", ",".join(asking.KINDS), "--out", tmp_path / "pairs",
             "--then", "scenes", "--world", "smol", "--n", "10", "--questions", "20",
             "--out", tmp_path / "scenes"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "pairs" / "pairs.jsonl").read_text().splitlines()]
    assert {*rows[0]} == {"id", "image", "question", "chosen", "rejected", "meta"} and len(rows) == 12
    assert all((tmp_path / "pairs" / row["image"]).is_file() for row in rows)
    lines = [json.loads(line) for line in (tmp_path / "scenes" / "scenes.jsonl").read_text().splitlines()]
    for line in lines:
        objects.check_truth(line, "line")


def test_the_first_worlds_scorer_reads_right_answers_as_right():
    lines, found = pairs.exam(0, 40, 80, "print", world)
    rng, answers = random.Random(0), []
    for line in lines:
        s = found[line["image"]]
        if line["kind"] == "caption":
            text = speech.careless_caption(rng, s)
        else:
            text = f"{line['truth']['answer']}."
        answers.append(line | {"answer": text})
    table = metrics.classroom(answers, resamples=20)
    assert (table["chair_s"], table["cover"], table["pope_random_acc"]) == (0, 100, 100)
    assert all(row["acc"] == 100 for row in table["by_kind"].values())


def test_pairs_chosen_and_rejected_are_as_the_recipe_says():
    found = pairs.describe([r for r, _ in pairs.made(0, 200, pairs.Recipe(world="smol"))], world)
    assert found["rejected"]["hallucinates"] == 100 and 10 < found["chosen"]["hallucinates"] < 30
    assert found["chosen"]["cover"] == 100 and found["rejected"]["closer"] == 100


def test_the_world_is_that_of_the_model(tmp_path):
    (tmp_path / "classroom.json").write_text(json.dumps({"world": world.VERSION}))
    assert pairs.world_for(str(tmp_path)) == "smol"
    assert pairs.world_for("classroom") == pairs.world_for("base0") == "classroom"
