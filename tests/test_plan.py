"""plan.py as specification: what autograd keeps, what fits, what is refused and with which mend."""
import dataclasses
import sys

import pytest
import torch
from conftest import ROOT, write_llava
from rehearse import sizes, write_original

import data
import kernels
import lora
import options
import plan
import vlm

sys.path.insert(0, str(ROOT / "tools"))
import import_checkpoint  # noqa: E402

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
def test_the_activations_of_a_layer_are_what_autograd_keeps(family, dtype, rank, monkeypatch):
    """Two models that differ by two layers: the plan's difference is autograd's to 5%."""
    monkeypatch.setattr(kernels, "LARGE", 0)           # as in a model of true size
    measured, planned = [], []
    for layers in (1, 3):
        m = vlm.load(family(layers), dtype=getattr(torch, dtype))
        lora.add_lora(m.model, r=8, alpha=16) if rank else vlm.train_whole(m)
        front, one = m.front, ((1, 1),)
        prompt = front.prompt_ids("what is this ?", one)
        chosen, rejected = front.response_ids("a red cat " * 30), front.response_ids("a blue dog " * 20)
        nothing = torch.zeros(front.image_tokens, front.config.text_config.hidden_size, dtype=m.model.dtype)
        pair, features = data.Pair("", prompt, prompt, chosen, rejected, one, one), ([nothing], [nothing])
        measured.append(kept_bytes(m, [pair], vlm.Features(*features)))
        row = len(prompt), len(chosen), len(rejected), len(prompt), 2
        o = options.Options(lora_r=rank, device="cpu")
        planned.append(plan.memory(m.front.config, o, [row], dtype)["activations"])
    assert planned[1] - planned[0] == pytest.approx(measured[1] - measured[0], rel=0.05)


def test_weights_lora_and_optimiser_are_counted_as_they_are(tmp_path):
    m = vlm.load(write_llava(tmp_path), dtype=torch.float32)
    o, row = options.Options(lora_r=8, device="cpu"), [(20, 5, 5, 20, 2)]
    got = plan.memory(m.front.config, o, row, "float32")
    assert got["weights"] == sum(p.nbytes for p in m.model.parameters())
    lora.add_lora(m.model, r=8, alpha=16)
    adapter = sum(p.numel() for p in lora.lora_parameters(m.model).values())
    assert (got["LoRA"], got["optimiser"]) == (8 * adapter, 12 * adapter)
    two = plan.memory(m.front.config, dataclasses.replace(o, shard=True), row, "float32", world=2)
    layers = sum(p.nbytes for p in m.model.model.language_model.layers.parameters() if not p.requires_grad)
    assert two["weights"] == got["weights"] - layers / 2 and two["optimiser"] == got["optimiser"] / 2
    slim = plan.memory(m.front.config, dataclasses.replace(o, checkpointing=True), row, "float32")
    assert slim["activations"] < got["activations"]


def test_without_lora_the_copy_the_masters_and_their_moments_are_counted_as_they_are(tmp_path):
    import command
    from ranks import Zero2
    o, row = options.Options(lora_r=0, device="cpu"), [(20, 5, 5, 20, 2)]
    for dtype in ("float32", "bfloat16"):
        m = vlm.load(write_llava(tmp_path), dtype=getattr(torch, dtype))
        vlm.train_whole(m)
        got = plan.memory(m.front.config, o, row, dtype)
        assert got["weights"] == sum(p.nbytes for p in {*m.model.parameters(), *m.frozen.model.parameters()})
        trained = {n: p for n, p in m.model.named_parameters() if p.requires_grad}
        adam = Zero2(trained, torch.optim.AdamW, command.Ranks())
        adam.step(0.0)
        assert got["gradients"] == adam.grad.nbytes
        held = [adam.mine.grad, *list(adam.optimiser.state[adam.mine].values())[1:]]
        held += [adam.mine] * (dtype == "bfloat16")                    # in float32 it is the weights' memory
        assert got["optimiser"] == sum(x.nbytes for x in held)
    two = plan.memory(m.front.config, dataclasses.replace(o, shard=True), row, "bfloat16", world=2)
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
    rows = [(640, 200, 180, 640, 2)] * 5 + [(640, 900, 700, 640, 2)]
    o = options.Options(**{**options.PRESETS["mdpo-llava"], "preset": "mdpo-llava"})


def test_a_7b_weighs_what_it_is_known_to_weigh():
    got = plan.memory(Seven.config, Seven.o, Seven.rows[:4], "bfloat16")
    assert got["weights"] / plan.GIB == pytest.approx(13.2, abs=0.1)          # 7.06e9 numbers of two bytes
    assert got["LoRA"] / 8 == pytest.approx(160e6, rel=0.01)                   # rank 64 on all linear layers
    assert 30 < got["activations"] / plan.GIB < 60


@pytest.mark.parametrize("room, said", [
    (60, "pass --set checkpointing=true;"), (22, "pass --set checkpointing=true --micro_batch 1;"),
    (12, "shorten the pairs .*, deal the base to several GPUs .*, or take a larger one")])
def test_what_cannot_fit_is_refused_with_the_first_mend_that_makes_it_fit(monkeypatch, room, said):
    monkeypatch.setattr(plan, "capacity", lambda device: (room * plan.GIB, "the GPU"))
    said = rf"the run needs about \d+\.\d GiB, the GPU has {room}\.0: .*{said}"
    with pytest.raises(data.UserError, match=said):
        plan.refuse(Seven.config, Seven.o, Seven.rows, "bfloat16", torch.device("cpu"))
    plan.refuse(Seven.config, dataclasses.replace(Seven.o, check_memory=False), Seven.rows, "bfloat16",
                torch.device("cpu"))
    monkeypatch.setattr(plan, "capacity", lambda device: (200 * plan.GIB, "the GPU"))
    plan.refuse(Seven.config, Seven.o, Seven.rows, "bfloat16", torch.device("cpu"))


def test_several_gpus_are_told_to_share_the_base(monkeypatch):
    monkeypatch.setattr(plan, "capacity", lambda device: (14 * plan.GIB, "the GPU"))
    with pytest.raises(data.UserError, match="pass --shard --set checkpointing=true --micro_batch 1"):
        plan.refuse(Seven.config, Seven.o, Seven.rows, "bfloat16", torch.device("cpu"), world=4)


def test_dry_run_prints_the_plan(tmp_path, monkeypatch, capsys):
    from test_train_dpo import write_pairs

    import train_dpo
    write_llava(tmp_path / "model")
    pairs = write_pairs(tmp_path)
    command = ["train_dpo.py", "--dry_run", "--model", str(tmp_path / "model"), "--preset", "mdpo-llava"]
    monkeypatch.setattr(sys, "argv", [*command, "--data", str(pairs)])
    train_dpo.main()
    said = capsys.readouterr().out
    assert "pairs           12 of 12" in said
    assert "steps           3 of 32 pairs (4 a forward), 3 epochs" in said
    assert "memory " in said and "weights 0.0, LoRA 0.0, optimiser 0.0" in said and "fits  " in said
    monkeypatch.setattr(sys, "argv", [*command[:5], "nothing"])
    with pytest.raises(SystemExit, match="train_dpo.py: --preset nothing: give one of"):
        train_dpo.main()
