"""The measuring scripts on tiny models: what they compute is right and complete; no time is tested."""
import importlib.util
import json
import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))
import limit  # noqa: E402
import scale  # noqa: E402

import data  # noqa: E402

TINY = limit.SHAPES["tiny"]


def run(script, monkeypatch, tmp_path, *arguments):
    """(JSON, the section) that a script writes with --shape tiny."""
    out, results = tmp_path / "out.json", tmp_path / "RESULTS.md"
    monkeypatch.setattr(sys, "argv", [script.__file__, "--shape", "tiny", "--rounds", "1", "--threads", "0",
                                      "--out", str(out), "--results", str(results), *arguments])
    script.main()
    return json.loads(out.read_text()), results.read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return limit.write_model(tmp_path_factory.mktemp("model"), TINY)


# ---- the minimum

def test_the_minimum_by_hand(folder):
    """Two layers of width 32; a pair of 10 + 9 + 9 tokens, of which 4 are an image of width 16."""
    side = limit.Ours(folder, TINY)
    pair = data.Pair("0", [2, 4, 4, 4, 4, 9, 9, 9, 9, 9], [2, 4, 4, 4, 4, 9, 9, 9, 9, 9], [9] * 9, [9] * 9)
    T, N, D, F, r = 28, 18, 32, 64, 4
    seen = 19 * 20 // 2 + 9 * 10 + 9 * 10 // 2                     # prompt + chosen, causal; rejected on both
    weights = 4 * D * D + 3 * D * F
    below = 3 * D * D                                              # q, k, v of the first layer: nothing below
    first, later = (limit.minimum(side.m, [pair], "dpo", cached) for cached in (False, True))
    assert first["layers"] == 2 * T * (2 * weights * 3 - below)    # reference and policy forward, policy back
    assert later["layers"] == 2 * T * (2 * weights * 2 - below)
    assert first["LoRA"] == later["LoRA"] == 2 * T * r * (3 * 2 * (4 * 2 * D + 3 * (D + F)) - 3 * D)
    assert (first["attention"], later["attention"]) == (2 * 8 * seen * D * 2, 2 * 6 * seen * D * 2)
    assert (first["lm_head"], later["lm_head"]) == (2 * N * D * 64 * 3, 2 * N * D * 64 * 2)
    tower = 2 * (2 * 5 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 25 * 16)      # the third layer is not read
    tower += 2 * 4 * 16 * 588                                            # patches of 14 x 14, three colours
    assert first["vision"] == later["vision"] == tower + 2 * 4 * (16 * 32 + 32 * 32)
    both = limit.minimum(side.m, [pair], "mdpo", False)            # one more segment, one more image
    assert both["vision"] == 2 * first["vision"]
    assert both["lm_head"] == 2 * (N + 9) * D * 64 * 3


def test_the_minimum_is_what_torch_counts_less_what_needs_not_be(folder):
    """Torch's own count of a step's products is a little more. SFT, for what the counter cannot follow."""
    from torch.utils.flop_counter import FlopCounterMode
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}        # LoRA's, of shapes
    side = limit.Ours(folder, TINY)
    batch = limit.batch_of(side.m, limit.random_records(TINY), {"chosen", "rejected"})
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        side.loss(batch, "sft", cached=False)
    parts = limit.minimum(side.m, batch.pairs, "sft", cached=False)
    linear = sum(n for part, n in parts.items() if part != "attention")
    assert linear <= counter.get_total_flops() < 1.1 * linear + parts["attention"]


def test_limit_reports_every_kind_of_step(monkeypatch, tmp_path):
    found, section = run(limit, monkeypatch, tmp_path)
    assert set(found["steps"]) == {"dpo", "dpo_cached", "mdpo", "mdpo_cached"}
    assert 0 < found["limit_fraction"] < 1 and sum(found["profile"].values()) == pytest.approx(1)
    assert found["products_at"] > 0 and found["versions"]["torch"] == torch.__version__
    assert "| DPO, first epoch |" in section and "tiny" in section


# ---- beside TRL

needs_trl = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("trl", "peft"))),
                               reason="TRL is not installed: it is in requirements-dev.txt")


@needs_trl
def test_vs_trl_finds_both_sides_equal_and_reports_every_ratio(monkeypatch, tmp_path):
    """The equality checks run inside: DPO and mDPO, the random pairs, and the real ones where they are."""
    import vs_trl
    monkeypatch.setattr(vs_trl, "real_records", lambda shape: (limit.random_records(shape, 4, seed=1), ""))
    found, section = run(vs_trl, monkeypatch, tmp_path, "--no_memory")
    assert set(found["ratios"]) == set(found["spread"]) == {"dpo", "dpo_cached", "mdpo", "mdpo_cached"}
    assert {"limit_fraction", "memory_ratio", "loss_difference", "gradient_difference"} <= set(found)
    assert found["loss_difference"] < 1e-5 and found["gradient_difference"] < 1e-4
    assert all(value > 0 for value in found["ratios"].values())
    random, real = (found["tables"][name] for name in ("random", "real"))
    assert set(random["dpo"]["ratios"]) == {*vs_trl.NAMES, "limit"}
    assert len(real["mdpo"]["rounds"]["ours"]) == 2                # batches of the four pairs
    assert section.count("**ours, first epoch**") == 2


@needs_trl
def test_vs_trl_times_nothing_that_is_not_equal(folder, monkeypatch):
    import vs_trl
    ours, options = limit.Ours(folder, TINY), Namespace(dtype="float32", device="cpu")
    theirs, records = vs_trl.TRL(folder, TINY, options, "dpo", ours), limit.random_records(TINY)
    batch, collated = limit.batch_of(ours.m, records, {"chosen"}), theirs.collate(records, "dpo")
    monkeypatch.setattr(vs_trl, "BETA", 0.1)
    monkeypatch.setattr(theirs.trainer, "beta", 0.2)
    with pytest.raises(SystemExit, match="do not compute the same"):
        vs_trl.equality(ours, theirs, batch, collated, "dpo")


def test_the_third_side_computes_what_the_product_does(folder):
    """The concatenation that shares no prompt: the same log-probs, so that its time can stand beside ours."""
    import vs_trl

    from model import vlm
    side = limit.Ours(folder, TINY)
    needs = {"chosen", "rejected", "image_rejected"}
    batch = limit.batch_of(side.m, limit.random_records(TINY, 3), needs)
    with torch.no_grad():
        features = vlm.encode_images(side.m, batch)
        one, other = (f(side.m, batch.pairs, features, needs) for f in (vlm.packed, vs_trl.concatenated))
    for field in ("chosen", "rejected", "image_rejected"):
        torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=1e-5, atol=0)


def test_peak_memory_is_above_what_stands_before_a_step(folder):
    import vs_trl
    got = vs_trl.memory("dpo/ours", folder, TINY, Namespace(dtype="float32", device="cpu"))
    assert 50 < got["before"] <= got["peak"]


def test_real_pairs_come_in_file_order_without_the_empty_ones(tmp_path):
    """Skipped with a reason where they are absent."""
    import vs_trl
    records, why = vs_trl.real_records(TINY, tmp_path)
    assert records == [] and "absent" in why
    records, why = vs_trl.real_records(TINY)
    if not records:
        pytest.skip(why)
    assert all(len(record[role].split()) > 1 for record in records for role in ("chosen", "rejected"))
    assert all(record["prompt"].count("<image>") == 1 for record in records)


# ---- scale

def test_scale_reads_pictures_ahead_of_a_step(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "STEPS", 1)
    monkeypatch.setattr(scale, "WORKERS", (1, 2))
    monkeypatch.setattr(scale, "PACES", (500,))
    monkeypatch.setattr(scale, "SIDE", 64)
    found, section = run(scale, monkeypatch, tmp_path, "--records", "40", "--only", "reading")
    assert [row["workers"] for row in found["reading"]] == [1, 2]
    assert all(row["pairs_per_second"] > 0 and 0 <= row["waiting"]["500"] <= 1 for row in found["reading"])
    assert "threads that read" in section


def test_scale_reports_each_size_the_records_and_two_ranks(monkeypatch, tmp_path):
    monkeypatch.setattr(scale, "TURNS", 1)
    found, section = run(scale, monkeypatch, tmp_path, "--records", "1000", "--only", "rank,records,ranks")
    assert [row["size"] for row in found["step"]["rank"]] == [4, 8]
    assert found["records"][0]["records"] == 1000 and found["records"][0]["peak_mib"] > 5
    assert found["ranks"]["ratio"] > 0 and "Two gloo ranks" in section
