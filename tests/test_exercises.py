"""classroom/EXERCISES.md as specification: every command starts, every solution says what is true.

The commands are read from the document and run in its order, in one folder and in this process, each made
tiny: two steps of training, eight scenes. Scenes and pairs of equal options are made once and copied.
"""
import importlib
import math
import re
import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import data
import losses

PAGE = (ROOT / "classroom" / "EXERCISES.md").read_text()
PARTS = dict(re.findall(r"^### (.*?)\n(.*?)(?=^##? |^### |\Z)", PAGE, re.DOTALL | re.MULTILINE))
LAB = [name for name in PARTS if name[0].isdigit()]
EXERCISES = [name for name in PARTS if name.startswith("Exercise")]
TINY = {"train_dpo.py": "--max_steps 2 --batch 8 --set pairs=16 --set scenes=8 --set questions=20 "
                        "--set max_new_tokens=8 --set look=4",
        "classroom/pairs.py": "--n 8",
        "synth.py": "--per_topic 1 --guidance 1,4 --threshold -1000 --set steps=1 --set max_new_tokens=4"}


def blocks(text, kind=""):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [inside for found, inside in fenced if found == kind]


def commands(text):
    """Every command that starts with python, in fenced blocks, as words."""
    lines = "".join(blocks(text)).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("python ")]


PROGRAMS = {re.search(r"runs/\w+\.py", code)[0]: code for code in blocks(PAGE, "python")
            if code.startswith('"""python runs/')}


def part(number):
    return next(PARTS[name] for name in EXERCISES if name.startswith(f"Exercise {number}:"))


def solution(number, opening):
    """The Python block of an exercise's solution that opens so."""
    return next(code for code in blocks(part(number), "python") if code.lstrip().startswith(opening))


# ---------------------------------------------------------------------------------------- the commands
def execute(words):
    """One command of the document, made tiny, in this process; --help ends with SystemExit(0)."""
    script, *rest = words[words[0] == "-m":]
    if script == "-c":
        return exec(rest[0], {})
    tiny = [] if "--help" in rest or rest[:1] == ["analyse"] else shlex.split(TINY.get(script, ""))
    sys.argv = [script, *("16" if word in ("200", "1000") else word for word in rest), *tiny]
    if script in PROGRAMS:
        Path(script).write_text(PROGRAMS[script])
        return runpy.run_path(script, run_name="__main__")
    if script == "train_dpo.py":
        share(rest)
    importlib.import_module(script.removesuffix(".py").replace("/", ".")).main()


def first_step(run):
    """What a run logged of its first step."""
    return next(line for line in data.read_jsonl(run / "log.jsonl") if "loss" in line)


def share(rest):
    """What step 1 made is put in place for a later run that would make the same: it only saves time."""
    out, first = Path(rest[rest.index("--out") + 1]), Path("runs/mdpo")
    if out.exists() or not first.exists():
        return
    shutil.copytree(first / "scenes", out / "scenes")
    for file in first.glob("before.json*"):
        shutil.copy(file, out)
    if not any("pair_options" in word for word in rest):
        for name in ("data", "held_out"):
            shutil.copytree(first / name, out / name)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(folder, {part: its commands that failed, and why}, {part: what its commands printed})."""
    from contextlib import chdir, redirect_stderr, redirect_stdout
    from io import StringIO
    folder, ended, said = tmp_path_factory.mktemp("lab"), {}, {}
    argv, handlers = sys.argv, {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    with chdir(folder):
        (folder / "runs").mkdir()
        for name, text in PARTS.items():
            ended[name] = []
            with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()):
                for words in commands(text):
                    try:
                        execute(words)
                    except SystemExit as stop:
                        ended[name] += [f"{shlex.join(words)}: {stop}"] if stop.code else []
                    except Exception as fault:                # told by the part's own test
                        ended[name].append(f"{shlex.join(words)}: {type(fault).__name__}: {fault}")
            said[name] = out.getvalue()
    sys.argv = argv
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder, ended, said


@pytest.mark.parametrize("name", PARTS)
def test_its_commands_work(name, lab):
    assert commands(PARTS[name]) and lab[1][name] == []


def test_the_lab_leaves_what_its_questions_ask_about(lab):
    """Reports, the first loss of mDPO and of DPO, the page to choose on, equal bytes of a run made twice."""
    runs = lab[0] / "runs"
    mdpo, dpo = first_step(runs / "mdpo"), first_step(runs / "one")
    assert mdpo["step"] == dpo["step"] == 1
    assert (round(mdpo["loss"], 4), round(dpo["loss"], 4), dpo["rewards/accuracies"]) == (2.0794, 0.6931, 0)
    assert (runs / "mdpo" / "report.html").exists() and (runs / "choose.html").exists()
    once, again = (runs / name / "adapter" / "adapter_model.safetensors" for name in ("mdpo", "again"))
    assert once.read_bytes() == again.read_bytes()
    assert "2.0794" in PARTS[LAB[2]] and "0.6931" in PARTS[LAB[2]]


def test_the_tables_of_the_lab_show_what_its_text_is_about(lab):
    """Pairs with the invented word in stars, and the first losses beside each other; no line of raw JSON."""
    said = {name.split()[0]: lab[2][name] for name in LAB}
    assert re.search(r"rejected +.* \*bike\* ", said["1"])
    assert re.search(r"chosen +[^*]+$", said["1"], re.MULTILINE)
    assert re.findall(r"^loss +(\S+)$", said["3"], re.MULTILINE) == ["2.0794", "0.6931"]
    assert said["7"].count("end on speculation, %") == 4
    assert [line for text in lab[2].values() for line in text.splitlines() if line.startswith("{")] == []


def test_the_commands_of_the_teachers_page_work(lab, monkeypatch, capsys):
    """Those that the lab has not run already."""
    teaching = re.sub("^ {3}", "", (ROOT / "classroom" / "TEACHING.md").read_text(), flags=re.MULTILINE)
    done = [words for text in PARTS.values() for words in commands(text)]
    new = [words for words in commands(teaching) if words not in done]
    assert [words[0] for words in new] == ["classroom/slides.py"]
    monkeypatch.chdir(lab[0])
    for words in new:
        monkeypatch.setattr(sys, "argv", [])
        execute(words)
    drawn = {path.name: path for path in (lab[0] / "runs" / "slides").iterdir()}
    kept = {path.name: path for path in (ROOT / "classroom" / "pictures").iterdir()}
    assert drawn.keys() == kept.keys()
    assert drawn["loss.svg"].read_text() == kept["loss.svg"].read_text()
    for name in ("pair.png", "rejected.png"):
        assert data.image_size(drawn[name]) == data.image_size(kept[name])
    for name in ("rewards.svg", "look.svg"):
        svg = drawn[name].read_text()
        assert "mdpo" in svg and "dpo" in svg and "nan" not in svg


def test_the_random_rejected_image_of_the_slide_is_another_pairs():
    from classroom import slides
    record, shown, another, invented = slides.first_pair()
    assert shown.tobytes() != another.tobytes() and invented in record["rejected"]
    assert data.REJECTED["random"](record, shown, lambda: another, None).tobytes() == another.tobytes()


def test_show_refuses_what_it_cannot_show(tmp_path, monkeypatch):
    from classroom import show
    (tmp_path / "pairs.jsonl").write_text('{"id": "a", "question": "q", "chosen": "c", "rejected": "r"}\n')
    (tmp_path / "log.jsonl").write_text("")
    for words, says in ((["pairs", tmp_path / "pairs.jsonl"], "meta.present"),
                        (["log", tmp_path, "--steps", "1-x"], "--steps 1-x: give steps")):
        monkeypatch.setattr(sys, "argv", ["show.py", *map(str, words)])
        with pytest.raises(SystemExit, match=says):
            show.main()


def test_look_prints_three_margins_of_each_adapter(lab):
    said = next(text for name, text in lab[2].items() if "look" in name)
    found = re.findall(r"^(own|grey|another's) +[+-]\d\.\d\d, above 0 in \d+%$", said, re.MULTILINE)
    assert found == ["own", "grey", "another's"] * 3


def test_the_built_in_models_run_every_stage_of_synthesis(lab):
    made = {name: list(data.read_jsonl(lab[0] / "runs" / "synth" / f"{name}.jsonl"))
            for name in ("prompts", "images", "ranked", "scores-armorm")}
    assert len(made["prompts"]) == 4 and len(made["images"]) == 8
    for row in made["ranked"]:
        assert set(row["scores"]) == {"imagereward", "clip"}
    scored = made["scores-armorm"]
    assert len({row["model"] for row in scored}) >= 3 and len(scored[0]["rewards"]) == 5


# ---------------------------------------------------------------------------------------- the parts
def test_there_are_eight_steps_and_eleven_exercises():
    assert [int(name.split()[0]) for name in LAB] == list(range(1, 9))
    assert [int(re.search(r"\d+", name)[0]) for name in EXERCISES] == list(range(1, 12))
    ends = [int(m) for m in re.findall(r"^\| \d+ - (\d+) \|", PAGE, re.MULTILINE)]
    starts = [int(m) for m in re.findall(r"^\| (\d+) - \d+ \|", PAGE, re.MULTILINE)]
    assert (starts, ends[-1], len(ends)) == ([0, *ends[:-1]], 90, 8)              # the timetable has no gap


@pytest.mark.parametrize("name", PARTS)
def test_it_says_what_to_do_how_long_and_what_to_look_for(name):
    text, lesson = PARTS[name], name in LAB
    for word in ["Look for", "Question.", "</details>"] + ([] if lesson else ["Hints."]):
        assert word in text, word
    assert f"<summary>{'Answer' if lesson else 'Solution'}</summary>\n\n" in text     # GitHub wants the gap
    assert lesson or re.search(r"\*\*Start\*\* \(\d+ (s|minutes)\b", text)


def test_links_and_anchors_lead_somewhere():
    def anchor(title):
        return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    links = re.findall(r"\]\((?!https?://)([^)]+)\)", PAGE)
    for file, _, place in (link.partition("#") for link in links):
        path = ROOT / "classroom" / file if file else ROOT / "classroom" / "EXERCISES.md"
        assert path.exists(), file
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if place else []
        assert not place or place in map(anchor, titles), place


# ---------------------------------------------------------------------------------------- what it says is so
def row(run):
    """A line of papers/results/exercises.jsonl as a row of the document's tables."""
    side = run["after"]
    chair_i = f"{side['chair_i']:.1f}" if side["cover"] or side["chair_s"] else "undefined"    # 0 of 0 names
    return (f"| {run['name']} | {side['chair_s']:.1f} | {chair_i} | {side['cover']:.1f} | "
            f"{side['pope_adversarial_acc']:.1f} | {side['by_kind']['counting']['acc']:.1f} |")


def test_every_row_of_a_table_is_a_run_of_the_log():
    runs = data.read_records(ROOT / "classroom" / "papers" / "results" / "exercises.jsonl")
    runs += [run | {"name": f"before, {run['split']}", "after": run["before"]} for run in runs]
    known = set(map(row, runs))
    number = r"(?:\d+\.\d|undefined) \|"
    shown = [line for text in PARTS.values() for line in text.splitlines()
             if re.match(rf"\| .*\| {' '.join([number] * 5)}$", line)]
    assert len(shown) > 25 and [line for line in shown if line not in known] == []


def test_exercise_1_and_2_losses_by_hand(lab, monkeypatch):
    """The values worked out in the document; then all three as one sum, for a step."""
    made = {"logsigmoid": losses.logsigmoid}
    exec(solution(1, "def hinge"), made)
    exec(solution(2, "def dpo_mean"), made)
    policy = losses.Logps(*torch.tensor([[-10.], [-14.]]))
    frozen = losses.Logps(*torch.tensor([[-9.], [-11.]]))
    assert made["hinge"](policy, frozen, 0.1).item() == pytest.approx(0.8)
    assert made["ipo"](policy, frozen, 0.1).item() == pytest.approx(9)
    tokens = dict(chosen_tokens=torch.tensor([4.]), rejected_tokens=torch.tensor([8.]))
    policy, frozen = (losses.Logps(chosen=torch.tensor([c]), rejected=torch.tensor([r]), **tokens)
                      for c, r in ((-8., -22.), (-10., -20.)))
    value = made["dpo_mean"](policy, frozen, 1.)
    assert value.item() == pytest.approx(math.log1p(math.exp(-.75)))                 # -log sigmoid(0.75)
    assert losses.needs(made["hinge"]) == losses.needs(made["ipo"]) == {"chosen", "rejected"}

    for name in ("hinge", "ipo", "dpo_mean"):
        monkeypatch.setitem(losses.LOSSES, name, made[name])
    monkeypatch.chdir(lab[0])
    monkeypatch.setattr(sys, "argv", [])
    execute(shlex.split("train_dpo.py --loss hinge+ipo+dpo_mean --set split=tune --out runs/three"))
    assert first_step(lab[0] / "runs/three")["loss"] == pytest.approx(1 + 25 + 0.6931, abs=1e-3)


def test_exercise_4_changes_every_picture_in_one_object(lab):
    """The chosen answer becomes false: an object that it names is gone, or one that it denies has come."""
    from classroom import pairs, world
    folder = lab[0] / "runs" / "edited"
    rows = list(data.read_jsonl(folder / "pairs.jsonl"))
    assert {r["meta"]["kind"] for r in rows} == {"caption", "existence"} and len(rows) == 16
    for record, (_, s) in zip(rows, pairs.made(0, 16, pairs.Recipe()), strict=True):
        own, edited = (data.read_image(folder / record[key]) for key in ("image", "image_rejected"))
        assert own == data.Image.fromarray(world.draw(s)) and own.tobytes() != edited.tobytes()
        fewer = [tuple(t for t in s.things if t is not gone) for gone in s.things]
        drawn = {world.draw(world.Scene(s.theme, things)).tobytes() for things in fewer}
        assert (edited.tobytes() in drawn) != record["chosen"].startswith("no")


def test_exercise_6_the_merged_weights_are_the_adapter(lab):
    said = next(text for name, text in lab[2].items() if name.startswith("Exercise 6"))
    assert float(re.search(r"by hand and by adapter differ by (\S+),", said)[1]) < 1e-3


def test_exercise_7_the_packing_by_hand_and_the_fault_that_shows(lab):
    stated = {key: [int(x) for x in re.findall(r"\d+", cells)]
              for key, cells in re.findall(r"^\| `(\w+)` \| (.*) \|$", part(7), re.MULTILINE)}
    row = data.pack([data.Pair("", [1, 9, 2], [1, 9, 2], [5, 6], [7, 8, 3])], {"chosen", "rejected"})
    flat = {"segments": list(row.segments[0]), "lengths": row.lengths}
    flat |= {key: getattr(row, key).tolist() for key in ("ids", "positions", "predict", "target")}
    assert stated == flat
    said = next(text for name, text in lab[2].items() if name.startswith("Exercise 7"))
    far = {name: [float(x) for x in re.findall(r"\de[+-]\d+", line)]
           for name, line in re.findall(r"^(packed|careless) (.*)$", said, re.MULTILINE)}
    assert max(far["packed"]) < 1e-3 and max(far["careless"][::2]) < 1e-3 and far["careless"][1] > 1


def test_exercise_8_shuffle_keeps_the_cells_and_moves_them():
    from classroom import pairs, world
    made = {}
    exec(solution(8, "def shuffle"), made)
    picture = data.Image.fromarray(world.draw(pairs.made(0, 1, pairs.Recipe())[0][1]))

    def cells(image):
        corners = ((x, y) for y in range(0, 80, 20) for x in range(0, 80, 20))
        return [image.crop((x, y, x + 20, y + 20)).tobytes() for x, y in corners]
    once, again = (made["shuffle"]({}, picture, None, data.draw(0, "shuffle", "a")) for _ in range(2))
    assert sorted(cells(once)) == sorted(cells(picture)) and cells(once) != cells(picture)
    assert once.tobytes() == again.tobytes()


def test_exercise_11_the_formula_by_hand_is_the_papers_code(lab):
    """The value worked out in the document, five pairs that the authors' code was run on, and ours."""
    made = {"__name__": "mine"}
    exec(PROGRAMS["runs/mine.py"], made)
    fields = ("chosen", "rejected", "image_rejected", "rejected_image_rejected")
    gained = losses.Logps(**{f: torch.tensor([x]) for f, x in zip(fields, (-1., -3., 1., -4.), strict=True)})
    zero = losses.Logps(**{f: torch.zeros(1) for f in fields})
    by_hand = made["mine"](gained, zero, .1, 0.).item()
    assert f"{by_hand:.4f}" == "3.0466" and "= 3.0466" in part(11)
    stored = data.read_json(ROOT / "tests" / "data" / "objectives.json")
    case = next(c for c in stored["cases"] if c["name"] == "symmpo" and c["how"] == "official")
    sides = (losses.Logps(**{f: torch.tensor(stored[side][f], dtype=torch.float64) for f in fields})
             for side in ("policy", "reference"))
    assert made["mine"](*sides, case["beta"], 0.).tolist() == pytest.approx(case["loss"])
    said = next(text for name, text in lab[2].items() if name.startswith("Exercise 11"))
    far, begins = re.search(r"mine and ours differ by (\S+); mine begins at (\S+)", said).groups()
    assert float(far) < 1e-5 and begins == "2.7726" and "4 ln 2 = 2.7726" in part(11)


def test_exercise_11_each_caption_is_true_of_its_own_picture_and_false_of_the_other(lab):
    from classroom import pairs, world
    folder = lab[0] / "runs" / "swapped"
    rows = list(data.read_jsonl(folder / "pairs.jsonl"))
    assert len(rows) == 16
    for record, (_, s) in zip(rows, pairs.made(0, 16, pairs.Recipe(questions=0)), strict=True):
        chosen, rejected = (set(world.mentions(record[role])) for role in ("chosen", "rejected"))
        assert chosen == set(s.counts) and len(chosen - rejected) == len(rejected - chosen) == 1
        (gone,), (come,) = chosen - rejected, rejected - chosen
        things = tuple(world.Thing(come if t.type == gone else t.type, t.colour, t.places) for t in s.things)
        drawn = data.Image.fromarray(world.draw(world.Scene(s.theme, things)))
        assert data.read_image(folder / record["image_rejected"]) == drawn
