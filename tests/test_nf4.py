"""--dtype nf4: the weights under LoRA in 4 bits. Without bitsandbytes most of this skips.
"""
import dataclasses
import math
import sys

import pytest
import torch
from conftest import write_llava
from test_train_dpo import (
    ALL,
    adapter,
    arguments,
    batch_of,
    kill_at,
    log_of,
    read_pairs,
    run,
    trained,
    write_pairs,
)

import lora
import train_dpo
from model import front, vlm
from training import options, plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4")
    return write_llava(folder / "model", hidden=64), write_pairs(folder)


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes", reason="not installed: pip install bitsandbytes")


def loaded(world, dtype):
    """The model with a LoRA that changes its answers, drawn from a seed."""
    o = options.Options(dtype=dtype, lora_r=4, lora_alpha=8)
    m = train_dpo.load(front.open_folder(world[0]), o, torch.float32, CPU)
    draw = torch.Generator().manual_seed(0)
    for p in lora.lora_parameters(m.model).values():
        p.data += 0.1 * torch.randn(p.shape, generator=draw)
    return m


def rounded(weight, code):
    """A matrix as NF4 has it (arXiv 2305.14314): in blocks of 64, the nearest of 16 times the largest."""
    blocks = weight.reshape(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    return (code[((blocks / largest)[..., None] - code).abs().argmin(-1)] * largest).view_as(weight)


def scored(m, batch, forward=vlm.packed):
    found = forward(m, batch.pairs, vlm.encode_images(m, batch), ALL)
    return torch.stack([found.chosen, found.rejected, found.image_rejected])


def test_it_computes_with_each_weight_rounded_to_nf4_and_merging_gives_those_weights(world, bitsandbytes):
    m, plain = loaded(world, "nf4"), loaded(world, "float32")
    layers = lora.layers(m.model)
    assert len(layers) == 14 and {layer.weight.dtype for layer in layers.values()} == {torch.uint8}
    for name, layer in lora.layers(plain.model).items():
        layer.weight.data = rounded(layer.weight.data, layers[name].packed.code)
    batch = batch_of(read_pairs(m.front, world[1]), range(4))
    with torch.no_grad():
        want, whole = scored(plain, batch), scored(loaded(world, "float32"), batch)
        torch.testing.assert_close(scored(m, batch), want, rtol=1e-5, atol=1e-4)
        assert (want - whole).abs().max() > 0.1
        lora.merge(m.model)
        assert {type(m.model.get_submodule(name)) for name in layers} == {torch.nn.Linear}
        assert m.model.get_submodule(next(iter(layers))).weight.dtype == torch.float32
        torch.testing.assert_close(scored(m, batch), want, rtol=1e-5, atol=1e-4)


def test_packed_equals_naive_with_gradients(world, bitsandbytes):
    found = {}
    for forward in (vlm.packed, vlm.naive):
        m = loaded(world, "nf4")
        sums = scored(m, batch_of(read_pairs(m.front, world[1]), range(4)), forward)
        sums.sum().backward()
        found[forward] = sums.detach(), {n: p.grad for n, p in lora.lora_parameters(m.model).items()}
    (packed, theirs), (naive, ours) = found.values()
    torch.testing.assert_close(packed, naive, rtol=1e-5, atol=1e-4)
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


def test_it_trains_from_ln_2_and_a_resumed_run_has_the_same_bytes(world, tmp_path, bitsandbytes):
    argv = [*arguments(world, tmp_path / "run", "--dtype", "nf4", "--loss", "dpo", "--set", "warmup=0")]
    trained(argv)
    _, steps = log_of(tmp_path / "run")
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and steps[-1]["rewards/margins"] > 0
    again = [word.replace(str(tmp_path / "run"), str(tmp_path / "again")) for word in argv]
    assert run([*again, "--set", "save_every=2"], kill_at(6))[0] != 0
    trained([*again, "--set", "save_every=2"])
    assert adapter(tmp_path / "again") == adapter(tmp_path / "run")


def test_the_plan_counts_four_and_a_half_bits(world, bitsandbytes):
    m = loaded(world, "nf4")
    layers = lora.layers(m.model).values()
    held = sum(p.nbytes for p in m.model.parameters() if not p.requires_grad)
    scales = sum(layer.packed.absmax.nbytes for layer in layers)
    o = options.Options(dtype="nf4", lora_r=4)
    assert plan.memory(m.front.config, o, [100])["weights"] == held + scales
    o = dataclasses.replace(o, dtype="float32")
    assert plan.memory(m.front.config, o, [100])["weights"] >= 1.5 * held


def test_without_bitsandbytes_a_sentence_says_what_to_install(world, tmp_path):
    def hide():
        sys.modules["bitsandbytes"] = sys.modules["bitsandbytes.functional"] = None
    code, text = run(arguments(world, tmp_path / "run", "--dtype", "nf4"), hide)
    assert code == 1 and "--dtype nf4 needs bitsandbytes: pip install bitsandbytes" in text
    assert "Traceback" not in text


@pytest.mark.parametrize("more", ["--no-lora", "--shard"])
def test_without_lora_or_in_shards_it_is_refused(world, tmp_path, more):
    code, text = run([*arguments(world, tmp_path / "run", "--dtype", "nf4"), more])
    assert code == 1 and "--dtype nf4 needs LoRA, and goes without --shard" in text
