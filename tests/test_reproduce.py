"""The papers in miniature: intervals, the judge, the rules, one whole cell, and what was kept apart."""
import base64
import json
import math
import random
import re
import statistics
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from conftest import ROOT, run_script

from classroom import pairs, world
from classroom.papers import evidence, findings, pds, reproduce, rules, study, ties

LINES = reproduce.lines()
pytestmark = pytest.mark.usefixtures("settings")
BLANK = dict.fromkeys(("chair_i", "cover", "pope_random_acc", "pope_adversarial_acc", "cog", "words",
                       *findings.KINDS), 90.0)


def line(arm, base, seed, chair, before=50.0, scenes="", **more):
    def scores(x):
        return BLANK | {"chair_s": x, "scenes": scenes, "look": {}} | more
    return {"arm": arm, "base": base, "seed": seed, "before": scores(before), "after": scores(chair)}


def world_of(chairs):
    """{arm: {base: [CHAIR_s of each seed]}} -> lines."""
    return [line(arm, base, seed, x) for arm, bases in chairs.items() for base, values in bases.items()
            for seed, x in enumerate(values)]


# --- evidence ---------------------------------------------------------------------------------------


def test_an_interval_is_students_over_the_bases_means():
    mean, low, high = evidence.nested({"a": [1, 3], "b": [4, 4], "c": [5, 7]})
    half = 4.303 * statistics.stdev([2, 4, 6]) / 3 ** .5
    assert (mean, low, high) == (4, pytest.approx(4 - half), pytest.approx(4 + half))
    assert evidence.nested({"a": [1, 3]}) == (2, pytest.approx(2 - 12.706), pytest.approx(2 + 12.706))
    assert evidence.nested({"a": [1]}) == (1, None, None)


def test_more_seeds_of_the_same_bases_do_not_narrow_what_bases_differ_by():
    few, many = ({b: [m] * n for b, m in zip("abc", (2, 4, 6), strict=True)} for n in (2, 50))
    assert evidence.nested(few) == evidence.nested(many)


def test_a_difference_is_taken_within_a_base_and_seed():
    runs = evidence.Runs(world_of({"A": {"x": [10, 20], "y": [30]}, "B": {"x": [9, 18], "y": [27, 99]}}))
    assert runs.difference("A", "B")[0] == statistics.mean([statistics.mean([1, 2]), 3])
    assert runs.difference("A", "before")[0] == statistics.mean([-35, -20])


def test_lower_and_equal_need_the_whole_interval():
    near = {b: [m] for b, m in zip("abc", (40, 41, 42), strict=True)}
    far = {b: [m + d] for b, m, d in zip("abc", (40, 41, 42), (20, 21, 22), strict=True)}
    wild = {b: [m + d] for b, m, d in zip("abc", (40, 41, 42), (-20, 5, 30), strict=True)}
    runs = evidence.Runs(world_of({"near": near, "same": near, "far": far, "wild": wild}))
    assert runs.lower("near", "far") and not runs.lower("far", "near") and not runs.lower("near", "wild")
    assert runs.equal("near", "same") and not runs.equal("near", "far") and not runs.equal("near", "wild")


def test_the_judge_prefers_less_invented_then_more_named():
    def code(false, true):
        return "0123456789abcdefghijklmnopqrstuvwxyz"[6 * false + true]
    a, b = [(0, 1), (1, 5), (0, 3), (2, 2)], [(1, 5), (0, 1), (0, 2), (2, 2)]
    shares = evidence.judged(*(line("", "", 0, 0, scenes="".join(code(*x) for x in side)) for side in (a, b)))
    assert shares == {"win": 50, "tie": 25, "loss": 25}


def test_a_captions_letter_cog_and_words():
    s = world.Scene("street", tuple(world.Thing(t, "red", ((0, 0, 15, 0, 0),)) for t in ("car", "crab")))
    answers = [{"settings": {}}, {"kind": "existence", "image": "i", "answer": "yes"},
               {"kind": "caption", "image": "i",
                "answer": "a picture of a street . you can see a car , a house , a whale ."}]
    code, more = reproduce.captions(answers, {"i": s})
    assert code == "d"                                                   # 6 x 2 invented + 1 named = 13
    assert more == {"cog": 20.0, "words": 18.0}                          # the house, of five tempting types


# --- rules ------------------------------------------------------------------------------------------

SPREAD = {"base0": 0, "base1": 1, "base2": 2}


def verdict(name, chair):
    """A table's verdict for arms of this CHAIR_s, the bases a point apart from each other."""
    assert set(chair) == set(findings.TABLES[name].arms)
    lines = world_of({arm: {b: [x + d, x + d] for b, d in SPREAD.items()} for arm, x in chair.items()})
    return findings.finding(name, lines)["verdict"]


def test_fig1_is_a_test_of_equivalence():
    assert verdict("fig1", {"DPO": 40, "DPO without image": 43}) == "appears"
    assert verdict("fig1", {"DPO": 40, "DPO without image": 50}) == "does not appear"


def test_table1_needs_both_comparisons():
    assert verdict("table1", {"mDPO": 20, "DPO": 40}) == "appears"
    assert verdict("table1", {"mDPO": 45, "DPO": 40}) == "appears against the base"
    assert verdict("table1", {"mDPO": 60, "DPO": 40}) == "does not appear"


def test_fig5_needs_dpo_not_to_gain():
    sizes = {findings.sized(m, n): x for m, xs in (("mDPO", (30, 20, 10)), ("DPO", (40, 40, 40)))
             for n, x in zip(findings.SIZES, xs, strict=True)}
    assert verdict("fig5", sizes) == "appears"
    assert verdict("fig5", sizes | {"DPO": 30}) == (
        "appears at 250, 500 and 1,000 pairs; for mDPO's gain from more pairs")


def test_table2_says_which_part_appears():
    arms = {"mDPO": 20, "DPO": 50, "DPO + AncPO": 40, "DPO + CoPO": 30}
    assert verdict("table2", arms) == "appears"
    assert verdict("table2", arms | {"DPO + AncPO": 20}) == "appears for AncPO and both together"


def test_table4_is_about_improvement_alone():
    more = ("anchors y_w, y_l", "anchors y_w, y_l, m_l")
    assert verdict("table4", {"mDPO": 20} | dict.fromkeys(more, 40)) == "appears"
    assert verdict("table4", {"mDPO": 20} | dict.fromkeys(more, 10)) == "does not appear"


# --- "no difference" requires an arm that trains ------------------------------------------------------


NEAR = {"base0": -1, "base1": 1, "base2": 0}


@pytest.mark.parametrize("name", findings.TABLES)
def test_where_no_arm_trains_no_claim_appears(name):
    """Every arm ends where its base is, a little up or down: equal, and worth no claim of equality."""
    lines = [line(arm, base, seed, 50 + d, scenes="05") for arm in findings.TABLES[name].arms
             for base, d in NEAR.items() for seed in (0, 1)]
    assert findings.finding(name, lines)["verdict"] == "does not appear"


@pytest.mark.parametrize("name", ["fig1", "table4", "control-crop"])
@pytest.mark.parametrize("from_base", [0, -4])
def test_the_same_difference_counts_only_where_an_arm_trains(name, from_base):
    """The arms are a point apart in both worlds; in the first they are also near their bases."""
    first, *others = findings.TABLES[name].arms
    chair = {first: 50 + from_base} | dict.fromkeys(others, 49 + from_base)
    lines = world_of({arm: {b: [x + d / 9] * 2 for b, d in NEAR.items()} for arm, x in chair.items()})
    idle = findings.finding(name, lines)
    assert idle["verdict"] == "does not appear" and "does not train" in idle["parts"][0]["note"]
    for line in lines:
        line["after"]["chair_s"] -= 25
    trained = findings.finding(name, lines)
    assert trained["verdict"] == "appears" and trained["parts"][0]["note"] == ""
    assert trained["parts"][0]["difference"] == pytest.approx(idle["parts"][0]["difference"])


def test_no_printed_claim_of_equality_is_about_arms_that_do_not_train():
    """A part whose claim has room on both sides of 0 says "no difference"."""
    found = [findings.finding(name, LINES) for name in findings.TABLES]
    equal = [part for f in found for part in f["parts"] if (part["claimed"][0] or 0) < 0]
    assert len(equal) == 5 and all(part["holds"] <= (part["note"] == "") for part in equal)
    assert [f["verdict"] for f in found if f["name"] == "fig1"] == ["does not appear"]


# --- what is possible ---------------------------------------------------------------------------------


def test_an_interval_ends_where_the_measure_does():
    wild = {"a": [2.], "b": [60.], "c": [99.]}
    mean, low, high = evidence.possible(wild, "cover")
    assert 0 < low < mean < high < 100 and mean == pytest.approx(161 / 3)
    near = {"a": [50.0], "b": [50.2], "c": [50.4]}                     # far from the ends nothing changes
    assert evidence.possible(near, "cover") == pytest.approx(evidence.nested(near), abs=.01)
    assert 0 < evidence.possible({"a": [.1], "b": [9.], "c": [2.]}, "kl")[1]
    assert math.isnan(evidence.possible({"a": [-.1], "b": [.05]}, "kl")[0])            # by chance: undefined
    assert evidence.possible({"a": [-1.], "b": [2.]}, "look") == evidence.nested({"a": [-1.], "b": [2.]})
    assert evidence.possible({"a": [100.], "b": [100.]}, "cover") == (100, 100, 100)


def test_every_printed_interval_is_possible_and_holds_its_mean():
    for name in findings.TABLES:
        for row in findings.finding(name, LINES)["rows"]:
            for measure, (mean, low, high) in row["values"].items():
                if low is not None:
                    assert low <= mean <= high, (name, row["arm"], measure)
                    assert measure in evidence.ANY_SIGN or low >= 0
                    assert measure in (*evidence.ANY_SIGN, *evidence.POSITIVE) or high <= 100


def test_chair_i_of_captions_that_name_nothing_is_undefined():
    silent = line("A", "x", 0, 0.0, scenes="000", chair_i=0.0)
    assert math.isnan(evidence.value(silent, "chair_i", "after"))
    assert evidence.value(silent, "chair_s", "after") == 0
    other = line("A", "x", 1, 10.0, scenes="700", chair_i=8.0)
    values = evidence.Runs([silent, other]).values("A", "chair_i")
    assert evidence.possible(values, "chair_i")[0] == 8 and findings.undefined(values, "chair_i") == 1
    text = (ROOT / "classroom" / "papers" / "RESULTS.md").read_text()
    assert "undefined in 3 of 6 runs" in text


def by_rate(method, points, base="base0", seed=0):
    """Runs at the five learning rates: [(KL, CHAIR_s)]."""
    return [line(f"{method}, lr {rate}", base, seed, chair, look={"kl": [kl, None, None]})
            for rate, (kl, chair) in zip(study.RATES, points, strict=True)]


def test_equal_kl_is_read_between_runs_and_from_the_base():
    runs = evidence.Runs(by_rate("mDPO", [(1, 30), (3, 20), (2, 40), (6, 10), (5, 12)])
                         + by_rate("mDPO", [(.1, 40)] * 5, seed=1))
    for nats, chair in ((.5, 40), (1.5, 35), (2, 40), (4, 16)):           # the base is at 50, at KL 0
        assert rules.at_kl(runs, "mDPO", nats, "chair_s") == {("base0", 0): pytest.approx(chair)}


def test_equal_kl_compares_where_both_methods_go():
    ours, theirs = ([(kl, 50 - slope * kl) for kl in (.3, .6, 1.5, 2.5, 5)] for slope in (6, 3))
    both = [one for base, d in SPREAD.items() for one in by_rate("mDPO", ours, base)
            + by_rate("DPO", [(kl, chair + d / 9) for kl, chair in theirs], base)]
    assert findings.finding("equal-kl", both)["verdict"] == "appears"
    near = [(kl / 2, chair) for kl, chair in theirs]                       # never at 4 nats
    both = [one for base, d in SPREAD.items() for one in by_rate("mDPO", ours, base)
            + by_rate("DPO", [(kl, chair + d / 9) for kl, chair in near], base)]
    assert "KL is 4" not in findings.finding("equal-kl", both)["verdict"]


def test_a_table_with_a_missing_arm_is_not_run():
    lines = world_of({"mDPO": {"base0": [1]}})
    found = findings.finding("table3", lines)
    assert found["verdict"] == "not run" and "MoCo v2" in found["found"]


@pytest.mark.parametrize("name", findings.TABLES)
def test_every_table_gives_a_verdict_and_rows_on_any_full_set_of_lines(name):
    rng = random.Random(name)
    lines = [line(arm, base, seed, rng.uniform(10, 60), scenes="".join(rng.choices("0345bc", k=20)))
             for arm in findings.TABLES[name].arms for base in study.BASES for seed in (10, 11)]
    found = findings.finding(name, lines)
    assert found["verdict"].startswith(("appears", "does not appear")) and found["rows"] and found["found"]
    assert all(findings.TABLES[name].metric in row["values"] for row in found["rows"])
    json.dumps(found)


# --- apart ------------------------------------------------------------------------------------------


def test_no_seed_and_no_scene_of_the_printed_results_was_tuned_on():
    tuned = [row for name in ("tuning", "settings", "causes", "scorers-tuning") for row in study.read(name)]
    assert tuned and all("split=tune" in row["options"] for row in tuned)
    used = {row["seed"] for row in tuned + study.read("print")}
    assert not used & set(reproduce.SEEDS)
    for seed in reproduce.SEEDS:
        made = [s for _, s in pairs.made(seed, 50, pairs.Recipe())]
        assert {world.split_of(s.counts) for s in made} == {"train"}
    _, scenes = pairs.exam(reproduce.EVAL_SEED, 200, 400)
    assert {world.split_of(s.counts) for s in scenes.values()} == {"print"}
    _, others = pairs.exam(0, 200, 400)
    assert not {repr(s) for s in scenes.values()} & {repr(s) for s in others.values()}


def test_every_line_was_run_as_the_tables_say():
    asked = {reproduce.key(cell): cell["arm"] for cell in reproduce.cells(findings.TABLES)}
    for row in LINES:
        assert asked.get(reproduce.key(row)) == row["arm"], row["run"]
        assert row["before"]["look"]["n"] == row["after"]["look"]["n"] == 200, row["run"]
    assert len({reproduce.key(row) for row in LINES}) == len(LINES)


def test_the_results_are_what_the_lines_say(tmp_path, monkeypatch, capsys):
    """From results/, RESULTS.md byte for byte, and results.html without matplotlib's figures."""
    here = ROOT / "classroom" / "papers"
    monkeypatch.setattr(reproduce, "for_people", lambda rows, out: here / "people.html")
    reproduce.write_page(LINES, tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == (here / "RESULTS.md").read_text()
    written, kept = (undrawn((folder / "results.html").read_text()) for folder in (tmp_path, here))
    assert written == kept


def undrawn(html):
    """What a results.html says, without matplotlib's figures and the sentence that there are none."""
    html = html[html.index("<body>"):]
    html = re.sub(r'<figure class="card">.*?</figure>', "", html, flags=re.DOTALL)
    return re.sub(r"\n<p>Figures are not drawn.*?</p>", "\n", html)


def test_the_readme_says_what_the_results_say():
    """Its sentence on Fig. 1, and the verdict there."""
    fig1 = findings.finding("fig1", LINES)
    sentence = re.search(r"[^.]*\(Fig\. 1\)[^.]*\.", (ROOT / "README.md").read_text())[0]
    assert fig1["verdict"] in sentence
    kept = (ROOT / "classroom" / "papers" / "RESULTS.md").read_text()
    assert f"## mDPO, Fig. 1: {fig1['title']}\n\n**✗ {fig1['verdict']}**" in kept


# --- the harness ------------------------------------------------------------------------------------


class InTurn(ThreadPoolExecutor):
    """Works at once in this thread, since a fork of a pool's thread cannot end."""
    def submit(self, work, *arguments):
        done = Future()
        done.set_result(work(*arguments))
        return done


def test_a_cell_is_a_run_of_the_trainer_and_shares_its_pairs_and_scenes(tmp_path, monkeypatch, capsys):
    """The trainer runs in forks of this process, which spares its imports; the page's command does not."""
    started = reproduce.started

    def forked(command):
        if command[0] != "train_dpo.py":
            return started(command)
        code, said = run_script(ROOT / command[0], *command[1:])
        assert code == 0, said
    monkeypatch.setattr(reproduce, "started", forked)
    monkeypatch.setattr(reproduce, "ThreadPoolExecutor", InTurn)
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    tiny = "--max_steps 2 --set pairs=16 --set scenes=10 --set questions=20 --set look=6"
    first, second = ({"arm": loss, "base": "base0", "seed": 10, "options": f"--loss {loss} {tiny}"}
                     for loss in ("dpo", "mdpo"))
    reproduce.go([first], tmp_path)
    reproduce.go([first, second], tmp_path)                              # the first is not run again
    capsys.readouterr()
    reproduce.go([first, second], tmp_path)
    assert "All 2 runs have a line" in capsys.readouterr().out
    rows = reproduce.lines(tmp_path)
    assert [row["arm"] for row in rows] == ["dpo", "mdpo"] and rows[0]["before"] == rows[1]["before"]
    assert len(rows[0]["after"]["scenes"]) == 10
    a, b = (reproduce.folder(cell) for cell in (first, second))
    for shared in ("before.jsonl", "before.look.json", "scenes/scenes.jsonl", "data/pairs.jsonl"):
        assert (a / shared).stat().st_ino == (b / shared).stat().st_ino
    rows_of_fig4 = [row | {"arm": arm} for row, arm in zip(rows, ("DPO", "mDPO"), strict=True)]
    page = reproduce.for_people(rows_of_fig4, tmp_path).read_text()
    key = json.loads(base64.b64decode(re.search('"key": "(.*?)"', page)[1]))
    compared = [(reproduce.ROOT / key[x]).resolve() for x in "ab"]
    assert compared == [b / "after.jsonl", a / "after.jsonl"]
    assert str(reproduce.ROOT) not in json.dumps(key)             # the same page on every machine
    again = reproduce.run(second, tmp_path / "again")
    assert all(again[k] == rows[1][k] for k in rows[1] if k not in ("seconds", "run"))


# --- the synthesis half -------------------------------------------------------------------------------


def test_synthetic_pairs_must_lower_chair_and_keep_pope():
    others = dict.fromkeys(findings.SYNTHETIC[1:], 45)
    assert verdict("pds-table2", {"ArmoRM's pairs": 40} | others) == "appears"
    assert verdict("pds-table2", {"ArmoRM's pairs": 55} | others) == "does not appear"
    for pope, words in ((89.5, "appears"), (88.0, "does not appear")):
        lines = world_of({arm: {b: [40 + d] for b, d in SPREAD.items()} for arm in findings.SYNTHETIC})
        for one in lines:
            one["after"]["pope_random_acc"] = pope
        assert findings.finding("pds-table2", lines)["verdict"] == words


def test_more_synthetic_pairs_must_do_more():
    arms = findings.TABLES["pds-table3"].arms
    assert verdict("pds-table3", dict(zip(arms, (40, 35, 30), strict=True))) == "appears"
    found = verdict("pds-table3", dict(zip(arms, (30, 35, 40), strict=True)))
    assert found == "does not appear"


def test_the_recipe_helps_where_tied_and_hurts_where_opposed():
    arms = dict.fromkeys(ties.ARMS, 40)
    opposed = {arm: 70 for arm in arms if arm.startswith("opposed")}
    assert verdict("pds-tied", arms | opposed) == "appears"
    assert verdict("pds-tied", arms) == (
        "appears where language is tied to sight, with ArmoRM alone and with a length penalty")
    assert verdict("pds-tied", arms | opposed | {"tied": 49.5, "opposed": 51}) == (
        "appears where language is tied to sight, with a length penalty; where it is opposed, with a length "
        "penalty")


def test_a_fall_of_cover_is_no_help():
    for cover, does, word in ((90, "helps", "helps"), (82, "less", "makes the model say less")):
        lines = world_of({arm: {b: [40 + d] for b, d in SPREAD.items()} for arm in ties.ARMS})
        for one in lines:
            one["after"]["cover"] = cover
        assert ties.effect(evidence.Runs(lines), "tied") == does
        told = findings.finding("pds-tied", lines)["found"]
        assert re.search(f"sees better, with ArmoRM alone the recipe {word} \\(the truer .*?by −9.0 ", told)


def test_a_length_penalty_has_to_help_at_every_tie():
    plain = {arm: 50 for arm in ties.ARMS if "penalty" not in arm}
    better = {arm: 40 for arm in ties.ARMS if "penalty" in arm}
    assert verdict("pds-penalty", plain | better) == "appears"
    assert verdict("pds-penalty", plain | better | {"untied": 40}) == (
        "appears where sight and language are tied and opposed")


ANALYSIS = {"guidance": {"all": {"5.0": .3, "7.0": .3, "9.0": .2, "11.0": .2}, "street": {"5.0": .6}},
            "agreement": [{"rankers": ["imagereward", "clip"], "k": k, "agree": x, "chance": k / 4, "n": 400}
                          for k, x in ((1, .4), (2, .6), (3, .8))],
            "judge": {"rankers": ["imagereward", "clip"], "wins": 70, "losses": 30, "ties": 5,
                      "same_pick": 20},
            "similarity": {"prompts": {"n": 9, "mean": .1, "deciles": [.1] * 9},
                           "responses": {"n": 9, "mean": .5, "deciles": [.3] * 9}}}


def test_the_analyses_have_rules_that_can_fail():
    for work in (pds.fig4, pds.table4, pds.table5, pds.fig6):
        assert work(ANALYSIS)[0]
    one = ANALYSIS["guidance"] | {"all": {"5.0": .9, "7.0": .1}}
    assert not pds.fig4(ANALYSIS | {"guidance": one})[0]
    chance = [found | {"agree": found["chance"]} for found in ANALYSIS["agreement"]]
    assert not pds.table4(ANALYSIS | {"agreement": chance})[0]
    assert not pds.table5(ANALYSIS | {"judge": ANALYSIS["judge"] | {"wins": 30}})[0]
    alike = ANALYSIS["similarity"] | {"prompts": {"n": 9, "mean": .9, "deciles": [.9] * 9}}
    assert not pds.fig6(ANALYSIS | {"similarity": alike})[0]


def test_what_has_no_data_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(pds, "ANALYSIS", tmp_path / "none.json")
    assert {found["verdict"] for found in pds.findings()} == {"not run"}
