"""training/plan.py as specification: exact sizes, runs that cannot fit, refusals and their advice."""
import dataclasses
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import write_llava
from rehearse import sizes, write_original

import data
import lora
from model import (
    command,
    import_checkpoint,  # noqa: E402
    vlm,
)
from training import options, plan

NEEDS = {"chosen", "rejected", "image_rejected"}


def kept_bytes(m, pairs, features):
    """Bytes of the storages that autograd keeps in a packed forward, the model's own weights apart."""
    own = {p.untyped_storage().data_ptr() for p in [*m.model.parameters(), *m.model.buffers()]}
    found, alive = {}, []

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            alive.append(x)                            # or its address would be given to another
        return x
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        vlm.packed(m, pairs, features, NEEDS)
    return sum(found.values())


@pytest.fixture(scope="module", params=["llama", "phi"])
def family(request, tmp_path_factory):
    """folder(layers): a small model of a family, with 100 image tokens."""
    def folder(layers):
        here = tmp_path_factory.mktemp(request.param)
        if request.param == "llama":
            return write_llava(here, hidden=128, layers=layers, kv_heads=2, image_size=140)
        size = sizes((160, 640, layers, 4, 4, 270, 256, 256, 256), (24, 40, 3, 4, 140, 14))
        src, tower = write_original("bunny", here / "src", size, torch.float32)
        import_checkpoint.run(src, here / "dst", tower, report=lambda line: None)
        return here / "dst"
    return folder


@pytest.mark.parametrize("rank", [8, 0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_floor_for_activations_is_no_more_than_autograd_keeps(family, dtype, rank, checkpointing):
    m = vlm.load(family(3), dtype=getattr(torch, dtype))
    lora.add_lora(m.model, r=8, alpha=16) if rank else vlm.train_whole(m)
    if checkpointing:
        m.model.model.language_model.train()
        m.model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    front, one = m.front, ((1, 1),)
    prompt = front.prompt_ids("what is this ?", one)
    chosen, rejected = front.response_ids("a red cat " * 30), front.response_ids("a blue dog " * 20)
    nothing = torch.zeros(front.image_tokens, front.config.text_config.hidden_size, dtype=m.model.dtype)
    pair, features = data.Pair("", prompt, prompt, chosen, rejected, one, one), ([nothing], [nothing])
    measured = kept_bytes(m, [pair], vlm.Features(*features))
    row = sum(map(len, (prompt, chosen, rejected, prompt, chosen)))
    o = options.Options(lora_r=rank, device="cpu", checkpointing=checkpointing, dtype=dtype)
    planned = plan.memory(front.config, o, [row])["activations"]
    assert 0 < planned <= measured


def test_weights_lora_and_optimiser_are_counted_as_they_are(tmp_path):
    m = vlm.load(write_llava(tmp_path), dtype=torch.float32)
    o, row = options.Options(lora_r=8, device="cpu", dtype="float32"), [20 + 5 + 5 + 20 + 5]
    got = plan.memory(m.front.config, o, row)
    assert got["weights"] == sum(p.nbytes for p in m.model.parameters())
    lora.add_lora(m.model, r=8, alpha=16)
    adapter = sum(p.numel() for p in lora.lora_parameters(m.model).values())
    assert (got["LoRA"], got["optimiser"]) == (8 * adapter, 12 * adapter)
    two = plan.memory(m.front.config, dataclasses.replace(o, shard=True), row, world=2)
    layers = sum(p.nbytes for p in m.model.model.language_model.layers.parameters() if not p.requires_grad)
    assert two["weights"] == got["weights"] - layers / 2 and two["optimiser"] == got["optimiser"] / 2
    some = dataclasses.replace(o, lora_targets="q_proj,multi_modal_projector.linear_1")
    m = vlm.load(write_llava(tmp_path), dtype=torch.float32)
    lora.add_lora(m.model, 8, 16, some.lora_targets.split(","))
    adapter = sum(p.numel() for p in lora.lora_parameters(m.model).values())
    assert plan.memory(m.front.config, some, row)["LoRA"] == 8 * adapter


def test_without_lora_the_copy_the_masters_and_their_moments_are_counted_as_they_are(tmp_path):
    from training.optimiser import Zero2
    row = [20 + 5 + 5 + 20 + 5]
    for dtype in ("float32", "bfloat16"):
        o = options.Options(lora_r=0, device="cpu", dtype=dtype)
        m = vlm.load(write_llava(tmp_path), dtype=getattr(torch, dtype))
        vlm.train_whole(m)
        got = plan.memory(m.front.config, o, row)
        assert got["weights"] == sum(p.nbytes for p in {*m.model.parameters(), *m.frozen.model.parameters()})
        trained = {n: p for n, p in m.model.named_parameters() if p.requires_grad}
        adam = Zero2(trained, torch.optim.AdamW, command.Ranks())
        adam.step(0.0)
        assert got["gradients"] == adam.grad.nbytes
        held = [adam.mine.grad, *list(adam.optimiser.state[adam.mine].values())[1:]]
        held += [adam.mine] * (dtype == "bfloat16")                    # in float32 it is the weights' memory
        assert got["optimiser"] == sum(x.nbytes for x in held)
    two = plan.memory(m.front.config, dataclasses.replace(o, shard=True), row, world=2)
    layers = sum(p.numel() for p in m.model.model.language_model.layers.parameters())
    assert two["weights"] == got["weights"] - 4 * layers + (4 + 2) * layers / 2
    assert two["gradients"] == got["gradients"] - 4 * layers / 2


class Seven:
    """LLaVA-1.5-7B's sizes by their config, and rows as long as mDPO's."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
                                       num_attention_heads=16, image_size=336, patch_size=14),
        text_config=LlamaConfig(vocab_size=32064))
    rows = [640 + 200 + 180 + 640 + 200] * 5 + [640 + 900 + 700 + 640 + 900]
    o = options.Options(**{**options.PRESETS["mdpo-llava"], "preset": "mdpo-llava", "dtype": "bfloat16"})


def test_a_7b_weighs_what_it_is_known_to_weigh():
    got = plan.memory(Seven.config, Seven.o, Seven.rows[:4])
    assert got["weights"] / plan.GIB == pytest.approx(13.2, abs=0.1)          # 7.06e9 numbers of two bytes
    assert got["LoRA"] / 8 == pytest.approx(160e6, rel=0.01)                   # rank 64 on all linear layers
    assert got["activations"] == 2 * 32 * 4096 * 4 * (640 + 200 + 180 + 640 + 200)


NEEDED = {}                                            # bytes of a run, which takes half a second to count


def refused(monkeypatch, room, o, world):
    def memory(config, o, *more, count=plan.memory):
        key = repr((dataclasses.replace(o, check_memory=True), more))
        if key not in NEEDED:
            NEEDED[key] = count(config, o, *more)
        return NEEDED[key]
    monkeypatch.setattr(plan, "memory", memory)
    monkeypatch.setattr(plan, "capacity", lambda device: (room * plan.GIB, "the GPU"))
    return plan.refuse(Seven.config, o, Seven.rows, command.Ranks(0, world, torch.device("cpu")))


@pytest.mark.parametrize("room, changes, world, said", [
    (18, {"micro_batch": 32}, 1, "pass --micro_batch 1;"),
    (20, {"dtype": "float32"}, 1, "pass --dtype bfloat16;"),
    (40, {"lora_r": 0}, 1, "pass --lora_r 64;"),
    (14, {}, 4, "pass --shard;"),
    (20, {"checkpointing": False, "dtype": "float32"}, 4,
     "pass --set checkpointing=true --dtype bfloat16 --shard;"),
    (12, {}, 1, r"shorten the pairs .*, shard the base over more GPUs .torchrun, --shard.*;")])
def test_what_cannot_fit_is_refused_and_told_what_saves_memory(monkeypatch, room, changes, world, said):
    o = dataclasses.replace(Seven.o, **{"checkpointing": True, "micro_batch": 1, **changes})
    said = rf"the run needs at least \d+\.\d GiB, the GPU has {room}\.0: {said}.* --set check_memory=false"
    with pytest.raises(data.UserError, match=said):
        refused(monkeypatch, room, o, world)
    refused(monkeypatch, room, dataclasses.replace(o, check_memory=False), world)
    refused(monkeypatch, 400, o, world)


def test_out_of_memory_names_what_is_not_set_yet():
    o = dataclasses.replace(Seven.o, checkpointing=False, micro_batch=4)
    assert plan.advice(o, 1) == "pass --set checkpointing=true --micro_batch 1"
    slim = dataclasses.replace(o, checkpointing=True, micro_batch=1)
    assert plan.advice(slim, 2) == "pass --shard"
    assert plan.advice(slim, 1).startswith("shorten the pairs (--set max_length), shard")


def test_the_hours_are_near_what_the_steps_compute(tmp_path, monkeypatch, capsys):
    """By PyTorch's own count, over half of the rate; with LoRA, and each of 12 pairs is seen three times."""
    from test_train_dpo import write_pairs
    from torch.utils.flop_counter import FlopCounterMode

    import train_dpo
    from training import batches

    class Timer:
        def __init__(self, *arguments, **options):
            pass

        def blocked_autorange(self):
            return SimpleNamespace(median=2 ** 34 / 1e6)               # a million FLOP per second
    monkeypatch.setattr(plan.benchmark, "Timer", Timer)
    model, pairs = write_llava(tmp_path / "model", hidden=256, image_size=140), write_pairs(tmp_path)
    words = ["--model", str(model), "--data", str(pairs), "--batch", "6", "--lora_r", "4"]
    monkeypatch.setattr(sys, "argv", ["train_dpo.py", "--dry_run", *words, "--set", "device=cpu"])
    train_dpo.main()
    said = capsys.readouterr().out
    hours = float(re.search(r"^hours           about (\S+) on 1 cpu: an estimate, half", said, re.M)[1])

    m = vlm.load(model)
    lora.add_lora(m.model, r=4, alpha=8)
    o = options.Options(data=str(pairs), device="cpu")
    read = batches.checked(m.front, str(pairs), o, NEEDS, command.Ranks())
    with FlopCounterMode(display=False) as counted:
        for place in range(len(read)):
            batch = read.read(place)
            features = vlm.encode_images(m, batch)
            with torch.no_grad():
                vlm.packed(m, batch.pairs, features, NEEDS)
            policy = vlm.packed(m, batch.pairs, features, NEEDS)
            (policy.chosen + policy.rejected + policy.image_rejected).sum().backward()
    measured = 3 * counted.get_total_flops() / (1e6 / 2) / 3600
    assert 0.4 < hours / measured < 2.5
    tokens, numbers = 3 * sum(read.tokens), sum(p.numel() for p in m.model.parameters())
    assert hours == pytest.approx(8 * numbers * tokens / (1e6 / 2) / 3600, rel=0.05)


def test_dry_run_prints_the_plan(tmp_path, monkeypatch, capsys):
    from test_train_dpo import write_pairs

    import train_dpo
    write_llava(tmp_path / "model")
    pairs = write_pairs(tmp_path)
    words = ["train_dpo.py", "--dry_run", "--model", str(tmp_path / "model"), "--preset", "mdpo-llava"]
    monkeypatch.setattr(sys, "argv", [*words, "--data", str(pairs)])
    train_dpo.main()
    said = capsys.readouterr().out
    assert said.startswith("folder          ") and "missing         nothing" in said
    assert "pairs           12 of 12" in said
    assert "steps           3 of 32 pairs (4 a forward), 3 epochs" in said
    assert "memory          at least 0.0 GiB" in said and "weights 0.0, LoRA 0.0, optimiser 0.0" in said
    hours = r"^hours           about \S+ on \d \w+: an estimate, half of the [1-9][\d,]* GFLOP/s of a product"
    assert re.search(hours, said, re.MULTILINE)
    monkeypatch.setenv("RANK", "1")                             # under torchrun, rank 0 alone prints it
    train_dpo.main()
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(sys, "argv", [*words[:5], "nothing"])
    with pytest.raises(SystemExit, match="train_dpo.py: --preset nothing: give one of"):
        train_dpo.main()
