"""reproduce.py objectives: its cells, its rule, its table; no run is made here."""
import random

import pytest

import data
from classroom.papers import objectives, reproduce, study
from classroom.world import KINDS
from training import options
from training.objectives import OBJECTIVES

BLANK = dict.fromkeys(("chair_i", "pope_random_acc", "pope_adversarial_acc", *KINDS), 90.0)


def line(cell, chair, cover=90.0, look=0.2):
    looked = {"kl": [1.0], "margin_true_minus": {"same_theme": [look]}, "logps_chosen_change": [0.5]}
    after = BLANK | {"chair_s": chair, "cover": cover, "look": looked, "scenes": "5"}
    return cell | {"before": after | {"chair_s": 50.0, "cover": 95.0}, "after": after, "seconds": 20.0}


def tuned(extent, best="5e-5"):
    return [line(cell, 10.0 if cell["arm"].endswith(f"lr {best}") else 20.0)
            for cell in objectives.tuning_cells(extent)]


def test_every_objective_is_an_arm_that_the_trainer_takes():
    assert set(objectives.ARMS) == {*OBJECTIVES, "dpo", "sft", "mdpo"}
    for cell in objectives.tuning_cells(objectives.FULL):
        if cell["base"] == "base0":
            o = options.parse(reproduce.arguments(cell), "")
            assert o.split == "tune" and f", lr {o.lr:.0e}".replace("e-0", "e-") in cell["arm"]


def test_a_rate_is_chosen_by_the_rule():
    rows = tuned(objectives.FULL)
    assert {objectives.best_rate(arm, rows) for arm in objectives.ARMS} == {"5e-5"}
    for row in rows:
        if "lr 5e-5" in row["arm"]:
            row["after"] |= {"cover": 80.0}                              # costs 15 points of Cover
    assert objectives.best_rate("ipo", rows) != "5e-5"
    with pytest.raises(data.UserError, match="ipo has no line"):
        objectives.best_rate("ipo", [])


def test_equal_pairs_and_equal_compute():
    found = objectives.cells(objectives.FULL, tuned(objectives.FULL))
    equal = {cell["arm"] for cell in found}
    three = [arm for arm in objectives.ARMS if objectives.sequences(arm) == 3]
    assert three == ["mdpo", "realign", "chip", "vdpo"] and len(equal) == 2 * 25 - len(three)
    assert len(found) == 15 * len(equal) == len({reproduce.key(cell) for cell in found})
    assert not any("compute" in cell["arm"] for cell in found[:15 * 25])     # equal pairs come first
    for arm, count in {"sft": 1, "dpo": 2, "symmpo": 4, "svco": 6}.items():
        assert objectives.sequences(arm) == count
        words = next(cell for cell in found if cell["arm"] == f"{arm}, equal compute")
        o = options.parse(reproduce.arguments(words), "")
        assert count * options.steps_of(o, o.pairs) == pytest.approx(3 * objectives.STEPS, abs=3)
    o = options.parse(reproduce.arguments(next(cell for cell in found if cell["arm"] == "dpo")), "")
    assert options.steps_of(o, o.pairs) == objectives.STEPS and o.eval_seed == 1 and o.split == "print"


def test_no_seed_and_no_scene_was_tuned_on():
    cells = objectives.cells(objectives.FULL, tuned(objectives.FULL))
    assert {cell["seed"] for cell in cells} == set(reproduce.SEEDS)
    tuning = objectives.tuning_cells(objectives.FULL) + objectives.tuning_cells(objectives.QUICK)
    assert not {cell["seed"] for cell in tuning} & set(reproduce.SEEDS)
    assert all("split=tune" in cell["options"] for cell in tuning)


def test_the_table_is_sorted_and_says_which_look(tmp_path):
    rows, draw = tuned(objectives.FULL), random.Random(0)
    cells = objectives.cells(objectives.FULL, rows)
    chair = {arm: k for k, arm in enumerate(sorted(objectives.ARMS), 10)}
    lines = [line(cell, chair[cell["arm"].partition(",")[0]] + draw.random() / 100,
                  look=-0.1 if cell["arm"] == "sft" else 0.2 + draw.random() / 100) for cell in cells]
    text = objectives.write(lines, tmp_path, rows).read_text()
    pairs, compute = (part.splitlines() for part in text.split("## Equal ")[1:])
    shown = [row.split(" | ")[0].strip("| ") for row in pairs if row.startswith("| ")][1:]
    assert shown == sorted(objectives.ARMS) and any("| sft |" in row for row in compute)
    sft = next(row for row in pairs if row.startswith("| sft"))
    dpo = next(row for row in pairs if row.startswith("| dpo |"))
    assert "| no |" in sft and "| yes |" in dpo and " | – | -" in dpo           # not against itself
    assert text.count("**") == 2 * len(objectives.FAMILIES) and "svco 6" in text
    of_ipo = [line for line in lines if line["arm"] == "ipo, equal compute"]
    compute = objectives.write(lines[:375] + of_ipo, tmp_path, rows).read_text().split("## Equal compute")[1]
    shown = {row.split(" | ")[0].strip("| ") for row in compute.splitlines() if row.startswith("| ")}
    assert {"ipo", "mdpo", "chip"} < shown and "dpo" not in shown               # nothing of equal pairs
    few = objectives.write(lines[:3], tmp_path, rows).read_text()
    assert "not run: dpo, mdpo" in few and "Not run." in few


def test_the_command_runs_what_has_no_line_and_writes_the_table(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(objectives, "ARMS", {arm: objectives.ARMS[arm] for arm in ("sft", "dpo")})
    monkeypatch.setattr(reproduce, "run", lambda cell: made.append(cell) or line(cell, 10.0))
    for _ in range(2):
        reproduce.side_by_side(objectives.QUICK, tmp_path)
        assert len(made) == 2 * 2 + 2 * 2
    assert len(reproduce.lines(tmp_path, objectives.TUNING)) == 4
    assert "| dpo |" in (tmp_path / "OBJECTIVES.md").read_text()
    assert study.BASES[0] in {cell["base"] for cell in made}
