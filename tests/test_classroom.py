"""The classroom: scenes are functions of a seed, splits are disjoint by content, knobs do what they say,
bases are as calibrated."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from classroom import make, pairs, world

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "classroom" / "models"
BASES = ("base0", "base1", "base2")


def scenes(split="train", n=300, seed=0):
    rng = random.Random(seed)
    return [world.scene(rng, split) for _ in range(n)]


def run(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


# --- the world ------------------------------------------------------------------------------------


def test_a_seed_decides_scenes_and_pixels():
    assert scenes(seed=1) == scenes(seed=1) != scenes(seed=2)
    first, again = world.draw(scenes(n=1)[0]), world.draw(scenes(n=1)[0])
    assert first.dtype == np.uint8 and first.shape == (80, 80, 3) and (first == again).all()


def test_no_combination_of_objects_is_in_two_splits():
    seen = {split: {frozenset(s.counts) for s in scenes(split, 2000)} for split in world.SPLITS}
    assert not any(seen[a] & seen[b] for a, b in (("train", "tune"), ("train", "print"), ("tune", "print")))
    assert all(len(combinations) > 100 for combinations in seen.values())


def test_test_scenes_hold_no_combination_of_the_pairs_or_the_tuning_scenes():
    def of(exam):
        return {frozenset(s.counts) for s in exam[1].values()}
    shown = of(pairs.exam(0, 1000, 0, "print"))
    assert not shown & {frozenset(s.counts) for _, s in pairs.made(0, 1000, pairs.Recipe())}
    assert not shown & of(pairs.exam(0, 1000, 0, "tune")) and not shown & of(pairs.exam(0, 1000, 0, "train"))


def test_every_pixel_outside_the_glyphs_is_the_themes_ground():
    s = scenes(n=1)[0]
    free = np.ones((world.SIZE, world.SIZE), bool)
    for thing in s.things:
        for column, row, size, dx, dy in thing.places:
            x, y = column * world.CELL + dx, row * world.CELL + dy
            free[y:y + size, x:x + size] = False
    empty = world.draw(world.Scene(s.theme, ()))
    assert (world.draw(s)[free] == empty[free]).all() and (world.draw(s) != empty).any()


def test_a_true_caption_parses_back_to_the_scene():
    rng = random.Random(0)
    for s in scenes():
        text = world.careless_caption(rng, s)
        body = text.split("you can see ")[1].split(" .")[0]
        counts = {}
        for part in body.split(" , "):
            number, word = part.split()
            counts[word if number == "a" else word[:-1]] = {"a": 1, "two": 2}[number]
        assert counts == s.counts and f"a {s.theme} ." in text
        assert sorted(world.mentions(text)) == sorted(s.counts)


def test_questions_are_true_of_the_scene():
    rng = random.Random(0)
    for s in scenes():
        things = {t.type: t for t in s.things}
        for kind in world.KINDS:
            q = world.ask(rng, s, kind)
            if q is None:
                assert kind == "relation"
                continue
            about = world.mentions(q.question)
            assert q.kind == kind and set(q.choices) & set(q.answer.split()) == {q.right}
            if kind == "existence":
                assert (q.right == "yes") == (about[0] in things)
            elif kind == "attribute":
                assert things[about[0]].colour == q.right
            elif kind == "counting":
                assert world.NUMBERS[s.counts.get(about[0], 0)] == q.right
            elif kind == "false_premise":
                assert about[0] not in things and q.right == "no"
            else:
                (ax, ay, *_), (bx, by, *_) = things[about[0]].places[0], things[about[1]].places[0]
                assert {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}[q.right]


def test_every_word_is_in_the_vocabulary():
    rng, words = random.Random(0), set(world.vocabulary())
    assert len(words) < 110
    for s in scenes():
        asked = [world.ask(rng, s, kind) for kind in world.KINDS]
        said = [world.careless_caption(rng, s, 1., .1)] + [t for q in asked if q
                                                            for t in (q.question, *q.said.values())]
        assert not set(" ".join(said).split()) - words


def test_hallucinated_words_stand_anywhere_or_last():
    rng = random.Random(0)
    assert {world.arrange(rng, "ab", "X").index("X") for _ in range(50)} == {0, 1, 2}
    assert {world.arrange(rng, "ab", "X", "last").index("X") for _ in range(50)} == {2}


# --- pairs ----------------------------------------------------------------------------------------


def statistics(n=1500, **knobs):
    return pairs.describe([r for r, _ in pairs.made(3, n, pairs.Recipe(**knobs))])


@pytest.mark.parametrize("faithful, gap", [(.8, 0.), (1., 0.), (.5, .5), (.8, -.4), (.8, 1.)])
def test_faithfulness_and_gap_are_what_the_knobs_say(faithful, gap):
    table = statistics(faithful=faithful, gap=gap)
    assert abs(table["chosen"]["hallucinates"] - 100 * (1 - faithful)) < 4
    assert table["rejected"]["hallucinates"] == 100 and table["chosen"]["cover"] == 100
    assert abs(table["rejected"]["objects"] - table["chosen"]["objects"] - gap) < .12


def test_cue_order_and_questions_are_what_the_knobs_say():
    telling, silent = statistics(cue=1.), statistics(cue=0.)
    assert (telling["chosen"]["closer"], telling["rejected"]["closer"]) == (0, 100)
    assert abs(silent["chosen"]["closer"] - silent["rejected"]["closer"]) < 5
    assert statistics(order="last")["rejected"]["place"] == 1 and .4 < statistics()["rejected"]["place"] < .6
    asked = [r for r, _ in pairs.made(3, 1500, pairs.Recipe(questions=.4))]
    yes = [r["chosen"].startswith("yes") for r in asked if r["meta"]["kind"] == "existence"]
    assert abs(len(yes) / len(asked) - .4) < .04 and abs(sum(yes) / len(yes) - .5) < .06


def test_fewer_pairs_are_the_first_of_more_and_another_seed_gives_others():
    few, more = (pairs.made(0, n, pairs.Recipe()) for n in (20, 50))
    assert few == more[:20] and few != pairs.made(1, 20, pairs.Recipe())


def test_held_out_pairs_are_of_tuning_scenes_and_never_of_printed_ones(tmp_path):
    held_out = pairs.made(0, 300, pairs.Recipe(split="tune"))
    trained, shown = pairs.made(0, 1000, pairs.Recipe()), pairs.exam(0, 1000, 0, "print")[1].values()
    combinations = {frozenset(s.counts) for _, s in held_out}
    assert {world.split_of(c) for c in combinations} == {"tune"}
    assert not combinations & {frozenset(s.counts) for s in (*shown, *(s for _, s in trained))}
    assert not {r["id"] for r, _ in held_out} & {r["id"] for r, _ in trained}
    ask = ("classroom/pairs.py", "--split", "print", "--n", 2, "--out", tmp_path / "a")
    done = run(*ask)
    assert done.returncode == 1 and "--split" in done.stderr and not (tmp_path / "a").exists()


def test_the_program_writes_the_same_pairs_and_pictures_again(tmp_path):
    for name in ("a", "b"):
        done = run("classroom/pairs.py", "--seed", 5, "--n", 20, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) == 21
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    for line in (tmp_path / "a" / "pairs.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert set(record) == {"id", "image", "question", "chosen", "rejected", "meta"}
        assert record["chosen"] != record["rejected"]
        assert (tmp_path / "a" / record["image"]).exists()


def test_several_commands_in_one_process_write_what_each_writes_alone(tmp_path, monkeypatch):
    commands = ["scenes --n 3 --questions 4", "--seed 5 --n 4", "--split tune --seed 1 --n 3"]
    joined = ["pairs.py"]
    for name, command in zip("abc", commands, strict=True):
        alone = str(tmp_path / "alone" / name)
        monkeypatch.setattr(sys, "argv", ["pairs.py", *command.split(), "--out", alone])
        pairs.main()
        joined += ["--then", *command.split(), "--out", str(tmp_path / "together" / name)]
    monkeypatch.setattr(sys, "argv", joined)
    pairs.main()
    alone, together = ({file.relative_to(root): file.read_bytes() for file in root.rglob("*.*")}
                       for root in (tmp_path / "alone", tmp_path / "together"))
    assert alone == together and len(alone) == 3 + 3 + 4 + 3


def test_a_wrong_knob_is_one_sentence_and_exit_1(tmp_path):
    done = run("classroom/pairs.py", "--faithful", 2, "--out", tmp_path / "a")
    assert done.returncode == 1 and "--faithful" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_exam_has_its_kinds_and_metrics_can_score_it():
    from evaluation import metrics
    lines, shown = pairs.exam(0, 1000, 2000)
    kinds = [line["kind"] for line in lines]
    assert len(shown) == kinds.count("caption") == 1000 and kinds.count("existence") == 1200
    assert all(kinds.count(k) == 200 for k in ("attribute", "counting", "relation", "false_premise"))
    assert {line["question"] for line in lines if line["kind"] == "caption"} == {world.DESCRIBE[0]}
    perfect = [line | {"answer": line["truth"].get("answer") or
                       world.careless_caption(random.Random(0), shown[line["image"]])} for line in lines]
    table = metrics.classroom(perfect, resamples=10)
    assert (table["chair_s"], table["cover"]) == (0, 100)
    assert (table["pope_random_acc"], table["pope_adversarial_acc"]) == (100, 100)
    assert pairs.exam(0, 50, 50) == pairs.exam(0, 50, 50) != pairs.exam(1, 50, 50)


# --- models ---------------------------------------------------------------------------------------


def test_a_base_is_made_equal_byte_for_byte(tmp_path, monkeypatch):
    """In a process of its own and in this one."""
    words = ["classroom/make.py", "--seed", "7", "--scale", ".001", "--scenes", "0", "--out"]
    done = run(*words, tmp_path / "a")
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "b")])
    make.main()
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_all_bases_together_are_under_6_mb():
    assert sum(p.stat().st_size for name in BASES for p in (MODELS / name).rglob("*")) < 6e6


@pytest.mark.parametrize("name", BASES)
def test_transformers_alone_loads_a_base(name):
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaForConditionalGeneration
    model = LlavaForConditionalGeneration.from_pretrained(MODELS / name)
    tokenizer, processor = (c.from_pretrained(MODELS / name) for c in (AutoTokenizer, CLIPImageProcessorPil))
    s = scenes("tune", 1)[0]
    seen = processor(Image.fromarray(world.draw(s)), return_tensors="pt").pixel_values
    assert (seen - make.pixels([s])).abs().max() < 1e-5
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": world.DESCRIBE[0]}]}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert text == f"<s> USER: <image> {world.DESCRIBE[0]} ASSISTANT:"
    text = text.replace("<image>", " ".join(["<image>"] * make.IMAGE_TOKENS))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**ids, pixel_values=seen, max_new_tokens=40, do_sample=False)
    assert "you can see" in tokenizer.decode(out[0, ids.input_ids.shape[1]:], skip_special_tokens=True)


@pytest.mark.parametrize("name", BASES)
def test_a_base_hallucinates_and_sees_as_calibrated(name):
    card = json.loads((MODELS / name / "classroom.json").read_text())
    table = card["statistics"]
    assert card["world"] == world.VERSION and table["split"] == "print"
    assert 45 <= table["chair_s"] <= 55 and 12 <= table["chair_i"] <= 20 and table["pope_random_acc"] > 88
    above = {kind: row["acc"] - row["prior"] for kind, row in table["by_kind"].items()}
    above.pop("relation")  # nothing is claimed: these models do not learn them (classroom/README.md)
    assert min(above.values()) > 25


def test_on_policy_pairs_are_the_bases_own_words_and_are_the_same_again():
    first, again = (pairs.on_policy(0, 12, pairs.Recipe(), MODELS / "base0") for _ in range(2))
    assert first == again and len(first) == 12
    assert all(r["chosen"] != r["rejected"] and "you can see" in r["chosen"] for r, _ in first)


def test_a_scorer_without_noise_prefers_the_truer_caption():
    s = scenes(n=1)[0]
    true = world.caption(random.Random(0), s, list(s.counts.items()))
    false = world.caption(random.Random(0), s, [*s.counts.items(), (s.absent[0], 1)])
    assert pairs.score(random.Random(0), s, true, 0) > pairs.score(random.Random(0), s, false, 0)
