"""What makes a step fast on a GPU, as far as a CPU can tell: the same numbers, and nothing waits."""
import sys
from functools import partial, partialmethod
from itertools import product

import pytest
import torch
from conftest import ROOT, write_llava
from test_train_dpo import ALL, arguments, batch_of, read_pairs, weights_of_a_sine, write_pairs
from test_vlm import EVERYTHING, picture, ragged, with_lora
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import data
import lora
import train_dpo
from model import command, front, generation, vlm
from training import batches, options
from training.optimiser import Zero2

sys.path.append(str(ROOT / "bench"))
from gpu_parts import plain_varlen  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return write_llava(folder / "model"), write_pairs(folder)


def gradient_of(m, logps):
    """Of numbers that tell all responses apart; cleared afterwards."""
    weights = lora.lora_parameters(m.model).values()
    total = logps.chosen.sum() - 2 * logps.rejected.sum() + 3 * logps.image_rejected.sum()
    found = torch.autograd.grad(total, [*weights])
    return torch.cat([x.flatten() for x in found])


# ---- attention in one call

def test_the_sequences_of_a_row_see_what_its_segments_say():
    """Every token of every row of two pairs with one to three tokens of each kind."""
    for lengths in product((1, 2, 3), repeat=3):
        pairs = [data.Pair("", [1] * p, [1] * p, [1] * c, [1] * r) for p, c, r in (lengths, (2, 3, 1))]
        for needs in (EVERYTHING, {"chosen"}):
            row = data.pack(pairs, needs)
            layout = vlm.Layout(row.segments, CPU)
            expected = torch.zeros(len(row.ids), len(row.ids), dtype=torch.bool)
            for s in row.segments:
                for place in range(s.start, s.start + s.prompt + s.chosen + s.rejected):
                    expected[place, s.start:place + 1] = True
                behind = s.start + s.prompt + s.chosen
                expected[behind:behind + s.rejected, s.start + s.prompt:behind] = False
            found = torch.zeros_like(expected)
            starts = layout.starts.tolist()
            for q, end_q, k, end_k in zip(starts[0], starts[0][1:], starts[1], starts[1][1:], strict=False):
                for place in range(q, end_q):                            # the last one sees all
                    found[place, layout.keys[k:end_k - (end_q - 1 - place)]] = True
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_in_one_call_equals_that_in_turn(tmp_path, monkeypatch, kv_heads):
    """In float64, with what FlashAttention is documented to compute in its place."""
    m = with_lora(write_llava(tmp_path, kv_heads=kv_heads))
    pairs, features = ragged(m)
    results, calls = [], []
    for once in (False, True):
        if once:
            monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda asked: True)
            monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn",
                                lambda *args, **more: calls.append(1) or plain_varlen(*args, **more))
        logps = vlm.packed(m, pairs, features, EVERYTHING)
        results.append((logps, gradient_of(m, logps)))
    (one, grad), (other, other_grad) = results
    for name in EVERYTHING:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-10, atol=0)
    assert (grad - other_grad).norm() < 1e-9 * grad.norm()
    assert len(calls) == len(m.language_model.layers)


def test_a_model_whose_logits_are_soft_capped_is_refused(world):
    own = front.open_folder(world[0])
    own.config.text_config.final_logit_softcapping = 30.0
    with pytest.raises(data.UserError, match="soft-capped"):
        vlm.load(own)


# ---- torch.compile

def test_compiled_layers_give_the_same_numbers_and_ten_lengths_compile_nothing_new(world, monkeypatch):
    """Policy and reference, with checkpointing; and generation compiles nothing. By Dynamo alone, which
    decides what is compiled: making kernels takes a minute."""
    torch._dynamo.reset()                                                  # of what other tests compiled
    torch._dynamo.utils.counters.clear()
    counters = torch._dynamo.utils.counters["stats"]
    compiler = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(compiler, backend="eager"))
    both = [with_lora(world[0]) for _ in range(2)]
    for m in both:
        m.language_model.train()
        m.language_model.activation_checkpointing_enable({"use_reentrant": False})
    vlm.compile_layers(both[1])
    pairs, features = ragged(both[0])
    graphs = []
    for n in range(10):
        longer = both[0].front.response_ids("a red dog " * (n + 1))
        some = [pair._replace(chosen=longer) for pair in pairs[:2 + n % 3]]
        images = sum(len(pair.sizes) for pair in some)
        shown = vlm.Features(features.images[:images], features.rejected[:images])
        results = []
        for m in both:
            with torch.no_grad(), vlm.base_of(m) as base:
                reference = vlm.packed(base, some, shown, EVERYTHING).chosen
            policy = vlm.packed(m, some, shown, EVERYTHING)
            results.append((reference, policy.chosen.detach(), gradient_of(m, policy)))
        for plain, compiled in zip(*results, strict=True):
            assert torch.equal(plain, compiled)
        graphs.append(counters["unique_graphs"])
    assert 0 < graphs[0] == graphs[9] <= 12
    texts = [generation.generate(m, [[picture(1)]], ["what is this ?"], 6) for m in both]
    assert texts[0] == texts[1] and counters["unique_graphs"] == graphs[9]


def test_the_frozen_copy_of_a_model_that_trains_is_compiled_too(world):
    o = options.Options(lora_r=0, compile=True)
    m = train_dpo.load(vlm.load(world[0]).front, o, torch.float32, CPU)
    for each in (m, m.frozen):
        parts = [part for layer in each.language_model.layers for part in layer.children()]
        assert all(part._compiled_call_impl for part in parts)


# ---- nothing waits

WAIT = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2",
        "repeat_interleave"}


class Waiting(TorchDispatchMode):
    """Notes in `found` where the host would wait for a device that has some tensors and all made of them.

    A copy to the device counts as well, unless it is command.send's.
    """
    def __init__(self, patch, tensors):
        super().__init__()
        self.there, self.kept, self.found = set(), [], []
        self.mark(tensors)
        for name in ("cpu", "tolist", "numpy", "new_tensor", "to"):
            patch.setattr(torch.Tensor, name, self.noting(name, getattr(torch.Tensor, name)))
        patch.setattr(command, "send", lambda x, device: self.mark(x.clone()))

    def mark(self, found):
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.numel():
                self.kept.append(x)                            # else its memory would soon be another's
                self.there.add(x.untyped_storage().data_ptr())
        return found

    def has(self, values):
        return any(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() in self.there
                   for x in tree_leaves(values))

    def noting(self, name, method):
        def noted(x, *args, **options):
            moves = "device" in options or any(isinstance(value, torch.device) for value in args)
            if self.has(x) if name != "to" else moves and not self.has(x):
                self.found.append(name)
                with _disable_current_modes():
                    x = x.clone()                              # what is fetched is no longer there
            return method(x, *args, **options)
        return noted

    def varlen(self, *tensors, **options):
        with _disable_current_modes():
            return self.mark(plain_varlen(*tensors, **options))

    def __torch_dispatch__(self, function, types, args=(), options=None):
        options = options or {}
        name, there = function.__name__.partition(".")[0], self.has((args, options))
        if there and name in WAIT:
            self.found.append(name)
        out = function(*args, **options)
        return self.mark(out) if there else out


def begun(world, out, *more):
    o = options.parse(arguments(world, out, "--loss", "mdpo", *more), "")
    return train_dpo.prepare(o, out, command.Ranks(device=CPU))


@pytest.mark.parametrize("more", [(), ("--no-lora",)], ids=["lora", "whole"])
def test_a_step_waits_for_the_device_twice_however_many_micro_batches_it_has(world, tmp_path, monkeypatch,
                                                                             more):
    """For the log's numbers and for the gradient's norm: in the first epoch, and with the reference kept."""
    for micro_batch in ("4", "1"):
        run = begun(world, tmp_path / micro_batch, "--micro_batch", micro_batch, "--set", "workers=1", *more)
        models = [each.model for each in (run.model, run.model.frozen) if each]
        for t in (0, 3):
            [future.result() for futures, *_ in run.batches.begin(t) for future in futures]
            with monkeypatch.context() as patch:
                device = [[*model.parameters(), *model.buffers()] for model in models]
                zero = run.optimiser
                waiting = Waiting(patch, [device, run.reference.logps, zero.flat, zero.grad, zero.mine,
                                          zero.mine.grad])
                patch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda asked: True)
                patch.setattr("torch.nn.attention.varlen.varlen_attn", waiting.varlen)
                with waiting:
                    train_dpo.step(run, t)
            assert waiting.found == ["tolist", "_local_scalar_dense"]


def test_pixels_are_pinned_where_a_gpu_reads_them_and_are_the_same(world, monkeypatch):
    front, pinned = vlm.load(world[0]).front, []
    plain = read_pairs(front, world[1])
    assert not plain.pinned
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    there = batches.checked(front, world[1], plain.o, ALL, command.Ranks(device=torch.device("cuda")))
    one, other = (batch_of(pairs, [0, 1]) for pairs in (plain, there))
    assert len(pinned) == 4 and one.keys == other.keys
    for name in ("images", "images_rejected"):
        for image, same in zip(getattr(one, name), getattr(other, name), strict=True):
            assert torch.equal(image["pixel_values"], same["pixel_values"])


# ---- the optimiser

def test_fused_adamw_steps_as_the_plain_one_and_goes_on_from_its_checkpoint():
    """And from plain AdamW's: a run may go on elsewhere."""
    found = []
    for kinds in ((False, False), (True, True), (False, True)):
        weights, state = weights_of_a_sine(), None
        for fused in kinds:
            weights = {name: torch.nn.Parameter(p.detach().clone()) for name, p in weights.items()}
            adamw = partial(torch.optim.AdamW, weight_decay=0.1, fused=fused)
            optimiser = Zero2(weights, adamw, command.Ranks(), clip=1.0)
            if state:
                optimiser.load(state)
            for _ in range(3):
                sum(p.sin().sum() for p in weights.values()).backward()
                optimiser.step(0.1)
            state = optimiser.state()
        found.append(torch.cat([p.detach().flatten() for p in weights.values()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-7)


def test_adamw_is_fused_on_a_gpu_alone(world, tmp_path):
    assert not begun(world, tmp_path).optimiser.optimiser.defaults["fused"]
