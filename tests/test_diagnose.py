"""look.py as specification: margins by hand, a blind model, partners, intervals, KL, and a run's log."""
import json
import random
import signal

import numpy as np
import pytest
import torch
from conftest import pairs_of, picture, write_llava
from test_train_dpo import adapter, arguments, kill_at, lines_of, log_of, run, trained, write_pairs

import data
import lora
from model import generation, vlm
from training import look as diagnose
from training import options
from training.records import Records

KINDS = ["true", "blank", "other", "same_theme"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(model folder, pairs): twelve pairs of three themes."""
    folder = tmp_path_factory.mktemp("diagnose")
    pairs = write_pairs(folder)
    rows = [json.loads(line) | {"meta": {"theme": "abc"[i % 3]}}
            for i, line in enumerate(pairs.read_text().splitlines())]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_llava(folder / "model"), pairs


@pytest.fixture(scope="module")
def tuned(world):
    """The model with an adapter that says something else than the base."""
    m = vlm.load(world[0], dtype=torch.float64)
    lora.add_lora(m.model, 4, 8)
    draw = torch.Generator().manual_seed(0)
    for p in lora.lora_parameters(m.model).values():
        p.data += 0.1 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    return m


def opts(world, **more):
    more = {"max_new_tokens": 5, "micro_batch": 5} | more
    return options.Options(model=str(world[0]), data=str(world[1]), **more)


def by_hand(m, record, image, role):
    """log p of a response with an image in the prompt, one token after another, of policy and reference."""
    ids = m.front.prompt_ids(record["question"], [image.size], record["history"])
    answer = m.front.response_ids(record[role])
    features = m.front.encode(m.model, m.front.prepare([image]))
    out = []
    with torch.no_grad():
        for _ in range(2):
            row = torch.tensor([ids + answer])
            logits = m.model(inputs_embeds=vlm.embed(m, row, features), use_cache=False).logits[0]
            at = range(len(ids) - 1, row.shape[1] - 1)
            out.append(sum(logits[t, :m.words].log_softmax(0)[row[0, t + 1]].item() for t in at))
            m.model.apply(lambda layer: setattr(layer, "enabled", False) if hasattr(layer, "enabled") else 0)
    m.model.apply(lambda layer: setattr(layer, "enabled", True) if hasattr(layer, "enabled") else None)
    return out


@pytest.mark.parametrize("forward", ["packed", "naive"])
def test_every_margin_is_the_one_by_hand(world, tuned, forward):
    records, o = Records(world[1]), opts(world, forward=forward, beta=.3, look=7)
    found = diagnose.look(tuned, records, range(12), o, "after")
    rows = [records[i] for i in range(7)]
    other, alike = diagnose.partners([r["meta"]["theme"] for r in rows], o.eval_seed)
    true = [data.read_image(r["images"][0]) for r in rows]
    images = {"true": true, "blank": [data.rejected_image("blank", x, 0, "") for x in true],
              "other": [true[other[i]] for i in range(7)],
              "same_theme": [true[alike[i]] if i in alike else None for i in range(7)]}
    assert found["n"] == 7 and list(found["margin"]) == list(found["preference"]) == KINDS
    want = {}
    for kind in KINDS:
        both = [(by_hand(tuned, r, x, "chosen"), by_hand(tuned, r, x, "rejected"))
                for r, x in zip(rows, images[kind], strict=True) if x]
        want[kind] = [.3 * ((c[0] - c[1]) - (r[0] - r[1])) for c, r in both]
        assert found["margin"][kind][0] == pytest.approx(np.mean(want[kind]), abs=1e-5)
        plain = np.mean([c[0] - r[0] for c, r in both])
        assert found["preference"][kind][0] == pytest.approx(plain, abs=1e-5)
        if kind == "true":
            policy, reference = np.mean([c for c, _ in both], 0)
            assert found["logps_chosen"][0] == pytest.approx(policy, abs=1e-5)
            assert found["logps_chosen_change"][0] == pytest.approx(policy - reference, abs=1e-5)
    gap = np.mean(want["true"]) - np.mean(want["other"])
    assert found["margin_true_minus"]["other"][0] == pytest.approx(gap, abs=1e-5) and abs(gap) > 1e-3
    assert all(low <= mean <= high for mean, low, high in found["margin"].values())
    json.dumps(found, allow_nan=False)


def test_a_blind_model_has_the_same_margins_with_every_image(world, tuned, monkeypatch):
    see = vlm.encode_images

    def blind(*args):
        return vlm.Features(*([torch.zeros_like(x) for x in side] for side in see(*args)))
    monkeypatch.setattr(vlm, "encode_images", blind)
    found = diagnose.look(tuned, Records(world[1]), range(12), opts(world), "after")
    assert len({tuple(found["margin"][kind]) for kind in KINDS}) == 1 and found["margin"]["true"][0] != 0
    for name in ("margin_true_minus", "preference_true_minus"):
        assert list(found[name]) == KINDS[1:]
        assert np.abs(list(found[name].values())).max() < 1e-6


def test_before_training_policy_and_reference_are_one_and_no_answer_is_drawn(world, monkeypatch):
    m = vlm.load(world[0])
    lora.add_lora(m.model, 4, 8)
    after = diagnose.look(m, Records(world[1]), range(12), opts(world), "after")
    monkeypatch.setattr(generation, "generate", None)
    scored, score = [], diagnose.scores
    monkeypatch.setattr(diagnose, "scores", lambda *args: scored.append(1) or score(*args))
    before = diagnose.look(m, Records(world[1]), range(12), opts(world), "before")
    assert before == after and len(scored) == 1                      # what is not scored twice would be 0
    assert before["margin"]["true"] == before["kl"] == [0, 0, 0] != before["preference"]["true"]


def test_the_reference_is_scored_once_a_run(world, tuned, tmp_path):
    """`before` leaves its log p in a file, `after` reads them: the numbers of scoring it again."""
    records, o, kept = Records(world[1]), opts(world), tmp_path / "before.look.json"
    with lora.lora_disabled(tuned.model):
        diagnose.look(tuned, records, range(12), o, "before", kept)
    plain, found = (diagnose.look(tuned, records, range(12), o, "after", *file) for file in ((), (kept,)))
    assert found == plain
    logps = np.array(json.loads(kept.read_text()))                           # (kinds, pairs, 2)
    kept.write_text(json.dumps((logps + [1, 0]).tolist()))
    moved = diagnose.look(tuned, records, range(12), o, "after", kept)
    assert moved["margin"]["true"][0] == pytest.approx(plain["margin"]["true"][0] - o.beta, abs=2e-6)


def test_what_is_looked_at_leaves_the_worlds_random_numbers_and_the_adapter_alone(world, tuned):
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first, again = (diagnose.look(tuned, Records(world[1]), range(12), opts(world), "after") for _ in "12")
    assert first == again
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert all(layer.enabled for layer in lora.layers(tuned.model).values())


def test_partners_are_one_to_one_of_another_and_of_the_same_group():
    groups = ["a"] * 5 + ["b"] * 3 + ["c"] * 2 + ["d"]
    other, alike = diagnose.partners(groups, 0)
    assert sorted(other) == sorted(other.values()) == list(range(11))
    assert all(groups[i] != groups[j] for i, j in other.items())
    assert sorted(alike) == sorted(alike.values()) == list(range(10))        # "d" is alone
    assert all(groups[i] == groups[j] and i != j for i, j in alike.items())
    assert diagnose.partners(groups, 1) != (other, alike) == diagnose.partners(groups, 0)
    for groups in (["a"] * 2, ["a"] * 7, "ab", "aab", range(9)):         # one group of more than half, too
        other, _ = diagnose.partners(list(groups), 3)
        assert all(i != j for i, j in other.items()) and sorted(other.values()) == list(range(len(groups)))


def test_the_interval_is_the_bootstraps_over_images():
    values = np.random.default_rng(0).normal(3, 2, 400)
    mean, low, high = diagnose.interval(values, range(400), 0)
    assert mean == pytest.approx(values.mean(), abs=1e-6) and low < mean < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=.1)
    four = np.repeat(values[:100], 4)                                        # four pairs an image: alike
    mean, low, high = diagnose.interval(four, np.repeat(range(100), 4).tolist(), 0)
    assert high - low == pytest.approx(2 * 1.96 * values[:100].std() / 10, rel=.1)
    some = np.where(np.arange(400) < 200, values, np.nan)
    assert diagnose.interval(some, range(400), 0)[0] == pytest.approx(values[:200].mean(), abs=1e-6)
    assert diagnose.interval(np.full(9, 1.5), range(9), 0) == [1.5, 1.5, 1.5]


def test_kl_is_the_log_ratio_of_the_tokens_that_were_drawn(world, tuned, tmp_path, monkeypatch):
    """With the pair's history. No text is made of them: tokenised again, it might be other tokens."""
    pairs = write_pairs(tmp_path, n=3)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[1]["history"] = [["what is this ?", "a dog"]]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, o = Records(pairs), opts(world, look=3, max_new_tokens=4)
    front, eos = tuned.front, tuned.front.eos_id
    drawn = [[8, 9, 10, eos], [eos], [0, 0, 1, 2]]           # no text is one of <unk> and <pad>
    continued, prompts = generation.continued, []

    def noting(m, asked, images, *more, **how):
        assert how == {"sample_seed": o.eval_seed} and more[0] == 4
        assert all(len(tokens) <= 4 for tokens in continued(m, asked, images, *more, **how))
        prompts.extend(asked)
        return drawn
    monkeypatch.setattr(generation, "continued", noting)
    found = diagnose.look(tuned, records, range(3), o, "after")
    ratios = []
    for record, tokens in zip(pairs_of(records), drawn, strict=True):
        monkeypatch.setattr(front, "response_ids", lambda _, tokens=tokens: tokens)
        mine, frozen = by_hand(tuned, record, data.read_image(record["images"][0]), "chosen")
        ratios.append(mine - frozen)
    assert found["kl"][0] == pytest.approx(np.mean(ratios), abs=1e-5)
    assert "a dog" in front.tokenizer.decode(prompts[1]) and "a dog" not in front.tokenizer.decode(prompts[0])


def test_records_without_an_image_are_passed_over_and_themes_may_lack(world, tuned, tmp_path):
    pairs = write_pairs(tmp_path, n=5)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[1]["image"], rows[2]["image"] = None, rows[3]["image"]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = diagnose.look(tuned, Records(pairs), range(5), opts(world), "after")
    assert found["n"] == 4 and list(found["margin"]) == KINDS[:3]
    assert diagnose.look(tuned, Records(pairs), [0, 1], opts(world), "after") == {}


# ---------------------------------------------------------------------------------------- in a run
def looks(out):
    return [(line["evaluation"], line["look"]) for line in lines_of(out) if "look" in line]


@pytest.mark.parametrize("more", [("--loss", "sft"), ("--loss", "copo"),
                                  ("--loss", "dpo", "--image_rejected", "none")])
def test_every_loss_is_looked_at_before_midway_and_after(world, tmp_path, more):
    """Each in a line of the log of its own."""
    trained(arguments(world, tmp_path / "run", "--val_data", str(world[1]), "--eval_every", "2",
                      "--epochs", "1", "--set", "max_new_tokens=4", *more))
    found = looks(tmp_path / "run")
    assert [name for name, _ in found] == ["before", "step-2", "after"]
    assert [line.get("step") for line in lines_of(tmp_path / "run")[1:]] == [None, 1, 2, None, 3, None]
    assert found[0][1]["margin"]["true"] == [0, 0, 0] != found[-1][1]["margin"]["true"]
    assert found[-1][1]["n"] == 12 and list(found[-1][1]["margin"]) == KINDS
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [summary[name]["look"] for name in ("before", "after")] == [found[0][1], found[-1][1]]


def test_a_run_killed_while_it_trains_or_looks_has_the_same_log_in_the_end(world, tmp_path):
    """And the adapter of a run that never looked."""
    def while_looking():
        import os
        original, calls = diagnose.look, []

        def look(*args):
            calls.append(args[4])
            if calls[-1] == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)
        diagnose.look = look
    argv = ["--val_data", str(world[1]), "--set", "save_every=2", "--set", "max_new_tokens=4"]
    whole, parts = ("never", None), (kill_at(6), while_looking, None)
    for name, breaks in (whole, *(("killed", each) for each in parts)):
        code, text = run(arguments(world, tmp_path / name, *argv), breaks)
        assert code == (-signal.SIGKILL if breaks else 0), text
    assert adapter(tmp_path / "never") == adapter(tmp_path / "killed")
    assert looks(tmp_path / "never") == looks(tmp_path / "killed") and len(looks(tmp_path / "killed")) == 2
    assert [line["step"] for line in log_of(tmp_path / "killed")[1]] == list(range(1, 10))
    trained(arguments(world, tmp_path / "off", *argv, "--set", "look=0"))
    assert adapter(tmp_path / "off") == adapter(tmp_path / "never")
    assert looks(tmp_path / "off") == [] and "look" not in (tmp_path / "off" / "after.json").read_text()


def test_the_classrooms_runs_look_at_pairs_of_tuning_scenes_by_the_same_recipe(tmp_path):
    tiny = ["--max_steps", "1", *(
        x for field in ("pairs=16", "scenes=4", "questions=8", "max_new_tokens=9", "look=6",
                        "pair_options=--questions=0") for x in ("--set", field))]
    trained(["--out", str(tmp_path / "run"), *tiny])
    held_out, pairs = (Records(tmp_path / "run" / name / "pairs.jsonl") for name in ("held_out", "data"))
    assert len(held_out) == 6 and len(pairs) == 16
    assert all(held_out[i]["meta"]["kind"] == "caption" for i in range(6))
    assert held_out[0]["id"].startswith("tune-") and pairs[0]["id"].startswith("s0-")
    (start, before), (end, after) = looks(tmp_path / "run")
    assert (start, end, after["n"], before["kl"]) == ("before", "after", 6, [0, 0, 0])
    own = str(tmp_path / "run" / "data" / "pairs.jsonl")                 # a file, and no --val_data
    trained(["--out", str(tmp_path / "own"), "--model", "classroom", "--data", own, *tiny])
    assert looks(tmp_path / "own") == looks(tmp_path / "run")


def test_a_picture_of_any_size_is_looked_at_by_a_llava_1_6(tmp_path):
    from test_vlm import SIZES, write_next
    m = vlm.load(write_next(tmp_path / "model"))
    pairs = write_pairs(tmp_path, n=len(SIZES))
    for i, size in enumerate(SIZES):
        picture(i, size).save(tmp_path / "images" / f"{i}.png")
    lora.add_lora(m.model, 4, 8)
    o = options.Options(data=str(pairs), max_new_tokens=3, micro_batch=2)
    found = [diagnose.look(m, Records(pairs), range(len(SIZES)), o, name) for name in ("before", "after")]
    assert found[0]["n"] == len(SIZES)
    for kind, mean in found[0]["preference"].items():
        assert mean == pytest.approx(found[1]["preference"][kind], abs=1e-4)
