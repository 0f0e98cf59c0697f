"""train_dpo.py as specification.

It starts at ln 2, resumes bit for bit, scales over ranks, and refuses in one sentence.
"""
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SHARED,
    WORDS,
    free_port,
    llama_tokenizer,
    need,
    picture,
    run_forked,
    write_llava,
)
from safetensors.torch import load_file
from test_command import both

import data
import losses
import train_dpo
from model import command, vlm
from training import batches, options
from training.optimiser import Zero2
from training.reference import Reference


def write_pairs(folder, n=12, seed=0):
    """n random pairs over n random pictures, in the native format."""
    draw = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "pairs.jsonl", "w") as f:
        for i in range(n):
            picture(i).save(folder / "images" / f"{i}.png")
            chosen, rejected = (" ".join(draw.choices(WORDS[8:], k=draw.randint(2, 6))) for _ in range(2))
            f.write(json.dumps({"id": f"pair-{i}", "image": f"images/{i}.png", "question": "what is this ?",
                                "chosen": chosen, "rejected": rejected}) + "\n")
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(model folder, pairs): a tiny random LLaVA and twelve pairs; 9 steps of 4 pairs in 3 epochs."""
    folder = tmp_path_factory.mktemp("world")
    return write_llava(folder / "model"), write_pairs(folder)


def arguments(world, out, *more):
    model, pairs = world
    return ["--model", str(model), "--data", str(pairs), "--out", str(out),
            "--batch", "4", "--micro_batch", "2", "--lr", "1e-3",
            "--lora_r", "16", "--set", "lora_alpha=32", *more]    # whatever the defaults are tuned to


run = partial(run_forked, train_dpo.main)


def trained(argv, before=None, ranks=1):
    code, text = run(argv, before, ranks)
    assert code == 0, text
    return text


def lines_of(out):
    return [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]


def log_of(out):
    """The log's first line, and those of the steps."""
    first, *rest = lines_of(out)
    return first, [line for line in rest if "step" in line]


ALL = frozenset({"chosen", "rejected", "image_rejected"})


def read_pairs(front, path, needs=ALL, **fields):
    return batches.checked(front, path, options.Options(**fields), needs, command.Ranks())


def batch_of(pairs, places, epoch=0):
    return batches.join([pairs.read(place, epoch) for place in places])


def adapter(out):
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("loss, start", [
    ("dpo", 1), ("mdpo", 3), ("copo", 1), ("ancpo", 1), ("dpo+copo", 2), ("sft", None),
    ("svco", 4), ("0.5*hsa+vdpo", 1.5), ("simpo", None)])
def test_every_loss_and_term_trains_and_starts_at_ln2_a_term(world, tmp_path, loss, start):
    trained(arguments(world, tmp_path / "run", "--loss", loss, "--epochs", "1", "--val_data", str(world[1]),
                      "--set", "look=2"))
    first, steps = log_of(tmp_path / "run")
    assert first["options"]["loss"] == loss and len(steps) == 3
    assert all(0 <= step["waiting"] <= 1 for step in steps)
    if start:
        assert steps[0]["loss"] == pytest.approx(start * math.log(2), abs=1e-6)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert ("rewards/image_margins" in steps[0]) == any(x in loss for x in ("copo", "mdpo", "svco", "vdpo"))
    assert ("rewards/chosen" in steps[0]) == (loss not in ("sft", "simpo")) and "logps/chosen" in steps[0]
    assert "margin" in summary["after"]
    assert (tmp_path / "run" / "report.html").exists()


def test_a_loss_without_a_reference_never_runs_one(world):
    m = vlm.load(world[0])
    pairs = read_pairs(m.front, world[1], {"chosen", "rejected"})
    batch = batch_of(pairs, range(2))
    unread = Reference(len(pairs), m, lambda *_: pytest.fail("it ran"), set(), command.Ranks())
    found = unread(batch, None)
    assert found.chosen is found.rejected is None and found.chosen_tokens.shape == (2,)
    unread.sync()


def test_a_step_of_symmpo_is_the_same_naive_and_packed_with_all_four_answers(world, tmp_path):
    for forward in ("naive", "packed"):
        trained(arguments(world, tmp_path / forward, "--forward", forward, "--dtype", "float64",
                          "--loss", "symmpo+svco", "--max_steps", "2"))
    one, two = (load_file(tmp_path / f / "adapter/adapter_model.safetensors") for f in ("naive", "packed"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-8)


def altered(world, folder, **change):
    """The pairs with other fields in the second one."""
    rows = [json.loads(line) for line in world[1].read_text().splitlines()]
    rows[1] |= change
    path = world[1].with_name(f"{folder.name}.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_weights_are_those_of_the_records(world, tmp_path):
    m = vlm.load(world[0])
    path = altered(world, tmp_path, meta={"weight": 2.5})
    for needs, weights in (({"chosen", "weights"}, [1, 2.5]), ({"chosen"}, [1, 1])):
        pairs = read_pairs(m.front, path, needs)
        batch = batch_of(pairs, range(2))
        for forward in (vlm.naive, vlm.packed):
            found = forward(m, batch.pairs, vlm.encode_images(m, batch), needs)
            assert found.weights.tolist() == weights


@pytest.mark.parametrize("change, loss, said", [
    ({"meta": {"weight": "heavy"}}, "hsa", "meta.weight 'heavy' is not a number"),
    ({"meta": {"weight": None}}, "hsa", "meta.weight None is not a number"),
    ({"image": None}, "svco", "it has no image, and this loss asks which image an answer is about")])
def test_records_that_a_loss_cannot_use_are_refused_by_name(world, tmp_path, capsys, change, loss, said):
    front, path = vlm.load(world[0]).front, altered(world, tmp_path, **change)
    needs = losses.needs(options.loss_of(options.Options(loss=loss))) | {"chosen"}
    with pytest.raises(data.UserError):
        read_pairs(front, path, needs)
    assert said in (text := capsys.readouterr().err) and "line 2 (id pair-1)" in text
    assert len(read_pairs(front, path, {"chosen", "rejected"})) == 12


def test_dpo_without_images_takes_the_image_out_of_the_prompt(world, tmp_path):
    trained(arguments(world, tmp_path / "none", "--loss", "dpo", "--image_rejected", "none", "--epochs", "1"))
    trained(arguments(world, tmp_path / "with", "--loss", "dpo", "--epochs", "1"))
    tokens = [log_of(tmp_path / name)[1][0]["logps/chosen"] for name in ("none", "with")]
    assert tokens[0] != pytest.approx(tokens[1], rel=1e-3)


def test_naive_and_packed_train_to_the_same_adapter(world, tmp_path):
    for forward in ("naive", "packed"):
        trained(arguments(world, tmp_path / forward, "--forward", forward, "--dtype", "float64"))
    one, two = (load_file(tmp_path / f / "adapter/adapter_model.safetensors") for f in ("naive", "packed"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-8)


def test_naive_and_packed_agree_at_the_default_rank_on_the_classrooms_model(own_programs, tmp_path):
    """One batch of mDPO in float64: log-probs to 1e-9 relative, LoRA gradients to 1e-7."""
    import lora
    o = options.Options(pairs=8, dtype="float64")
    assert o.lora_r == 64
    m = vlm.load("classroom", dtype=torch.float64)
    (tmp_path / "scenes").mkdir()                                # no printed scenes are needed
    path, _ = batches.classroom_files(o, tmp_path)
    pairs = read_pairs(m.front, path)
    lora.add_lora(m.model, o.lora_r, o.lora_alpha)
    draw = torch.Generator().manual_seed(0)
    for p in lora.lora_parameters(m.model).values():             # B starts at 0: let it do something
        p.data += 0.02 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    batch = batch_of(pairs, range(8))
    features, results = vlm.encode_images(m, batch), []
    for forward in (vlm.naive, vlm.packed):
        m.model.zero_grad()
        policy = forward(m, batch.pairs, features, ALL)
        zero = losses.Logps(*(torch.zeros_like(policy.chosen) - 20 for _ in range(5)))
        losses.mdpo(policy, zero, o.beta, o.delta).sum().backward()
        results.append((torch.stack([policy.chosen, policy.rejected, policy.image_rejected]).detach(),
                        torch.cat([p.grad.flatten() for p in lora.lora_parameters(m.model).values()])))
    (naive, naive_gradient), (packed, packed_gradient) = results
    torch.testing.assert_close(packed, naive, rtol=1e-9, atol=0)
    assert (packed_gradient - naive_gradient).norm() / naive_gradient.norm() < 1e-7


def test_lora_goes_where_lora_targets_says_and_a_name_of_nothing_is_refused(world, tmp_path):
    argv = arguments(world, tmp_path / "run", "--epochs", "1", "--set")
    trained([*argv, "lora_targets=v_proj,multi_modal_projector.linear_2"])
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert [name.split(".", 1)[1] for name in config["target_modules"]] == [
        *(f"language_model.layers.{i}.self_attn.v_proj" for i in range(2)), "multi_modal_projector.linear_2"]
    code, text = run([*arguments(world, tmp_path / "other", "--set"), "lora_targets=v_prj"])
    assert code == 1 and "no linear layer is called 'v_prj'" in text and "Traceback" not in text


def kill_at(step, where="step"):
    """SIGKILL in the given optimiser step, or in the middle of writing that step's checkpoint."""
    def arm():
        count, original, write = [0], Zero2.step, os.replace
        def counted(self, lr):
            count[0] += 1
            if count[0] == step and where == "step":
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, lr)
        def torn(source, target):
            if count[0] == step and where == "checkpoint" and "checkpoint" in str(target):
                os.kill(os.getpid(), signal.SIGKILL)
            return write(source, target)
        Zero2.step, os.replace = counted, torn
    return arm


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    trained(arguments(world, out, "--set", "save_every=2"))
    return out


@pytest.mark.parametrize("step, where", [
    (1, "step"), (2, "checkpoint"), (3, "step"), (4, "step"),
    (6, "checkpoint"), (8, "step"), (9, "checkpoint")])
def test_a_killed_run_called_again_ends_with_the_same_bytes(world, tmp_path, uninterrupted, step, where):
    """Also after the first epoch (3 steps), when the reference comes from the cache,
    and inside a checkpoint's write."""
    argv = arguments(world, tmp_path / "run", "--set", "save_every=2")
    code, _ = run(argv, kill_at(step, where))
    assert code == -signal.SIGKILL
    trained(argv)
    assert adapter(tmp_path / "run") == adapter(uninterrupted)
    steps, wanted = (log_of(x)[1] for x in (tmp_path / "run", uninterrupted))
    assert [x["step"] for x in steps] == list(range(1, 10))
    assert [x["loss"] for x in steps] == [x["loss"] for x in wanted]


def test_a_run_killed_twice_ends_with_the_same_bytes(world, tmp_path, uninterrupted):
    argv = arguments(world, tmp_path / "run", "--set", "save_every=2")
    for step in (5, 3):
        assert run(argv, kill_at(step))[0] == -signal.SIGKILL
    trained(argv)
    assert adapter(tmp_path / "run") == adapter(uninterrupted)


@pytest.fixture(scope="module")
def killed(world, tmp_path_factory):
    """A run that was killed in step 5: its checkpoint is of step 4, the one before of step 3."""
    out = tmp_path_factory.mktemp("killed") / "run"
    assert run(arguments(world, out, "--set", "save_every=2"), kill_at(5))[0] == -signal.SIGKILL
    return out


def flipped(content):
    """One bit of the last tensor's."""
    return content[:-9] + bytes([content[-9] ^ 16]) + content[-8:]


@pytest.mark.parametrize("spoil", [
    flipped, lambda b: b[:-100], lambda b: b[:9], lambda b: b"", lambda b: bytes(len(b)),
    lambda b: b.replace(b'"step\\": 4', b'"step\\": 3'), lambda b: b.replace(b"sha256", b"sha257")],
    ids=["a bit", "torn", "header torn", "empty", "zeros", "metadata", "without its hash"])
def test_a_checkpoint_that_is_not_as_it_was_written_is_refused(world, tmp_path, killed, uninterrupted, spoil):
    """And the one before it, put in its place, leads to the same bytes."""
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    file = out / "last" / "checkpoint.safetensors"
    before = file.read_bytes()
    file.write_bytes(spoil(before))
    assert file.read_bytes() != before
    argv = arguments(world, out, "--set", "save_every=2")
    code, text = run(argv)
    assert code == 1 and "checkpoint.safetensors is damaged" in text and "Traceback" not in text
    if spoil is flipped:
        (out / "last" / "previous.safetensors").replace(file)
        trained(argv)
        assert adapter(out) == adapter(uninterrupted)


def test_another_runs_checkpoint_is_refused(world, tmp_path, killed):
    out = tmp_path / "run"
    argv = arguments(world, out, "--set", "save_every=2", "--seed", "5")
    assert run(argv, kill_at(5))[0] == -signal.SIGKILL
    shutil.copy(killed / "last" / "checkpoint.safetensors", out / "last" / "checkpoint.safetensors")
    code, text = run(argv)
    assert code == 1 and "of a run with another base or other options" in text


def test_a_log_that_lost_lines_is_reported_and_not_filled_up(world, tmp_path, killed, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    log = out / "log.jsonl"
    first, *lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(first + lines[0])
    text = trained(arguments(world, out, "--set", "save_every=2"))
    assert "log.jsonl has lost lines" in text and b"\0" not in log.read_bytes()
    assert adapter(out) == adapter(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_next_call_goes_on(world, tmp_path, uninterrupted, number):
    def arm():
        original, count = Zero2.step, [0]
        def counted(self, lr):
            count[0] += 1
            if count[0] == 5:
                os.kill(os.getpid(), number)
            return original(self, lr)
        Zero2.step = counted
    argv = arguments(world, tmp_path / "run", "--set", "save_every=2")
    code, text = run(argv, arm)
    assert code == 1 and "the same command continues" in text
    assert len(log_of(tmp_path / "run")[1]) in (5, 6)     # this step or, if it was asking already, the next
    trained(argv)
    assert adapter(tmp_path / "run") == adapter(uninterrupted)


def test_a_finished_run_prints_its_table_again_and_trains_nothing(world, tmp_path):
    argv = arguments(world, tmp_path / "run", "--epochs", "1", "--val_data", str(world[1]), "--set", "look=0")
    first = trained(argv)
    stamp = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    again = trained(argv)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert "margin" in again and again.strip().splitlines()[-1] == first.strip().splitlines()[-1]


def forked_rank(torchrun):
    """From now on its rank is a fork of this process, with the environment that it gives to any other."""
    config_of = torchrun.config_from_args

    def script(_, *words):                                           # without the -u for a new Python
        sys.argv = [*words]
        runpy.run_path(words[0], run_name="__main__")

    def config_from_args(args):
        config, _, words = config_of(args)
        config.start_method = "fork"
        return config, script, words
    torchrun.config_from_args = config_from_args


def node(words, fork, log):
    """A torchrun in a fork of this process, where torch is imported. Its rank is a new Python, or a fork."""
    from torch.distributed import run as torchrun
    with open(log, "w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    if fork:
        forked_rank(torchrun)
    torchrun.main(words)


def two_nodes(argv, folder):
    """train_dpo.py under two torchruns that meet on the loopback, each a node of one rank."""
    meet = f"--nnodes 2 --rdzv_backend c10d --rdzv_id test --rdzv_endpoint localhost:{free_port()}".split()
    words = ["--nproc_per_node", "1", *meet, str(ROOT / "train_dpo.py"), *argv]
    logs = [folder / f"node-{i}.log" for i in range(2)]
    process = multiprocessing.get_context("fork").Process
    nodes = [process(target=node, args=(words, fork, log))
             for fork, log in zip((False, True), logs, strict=True)]
    try:
        for each in nodes:
            each.start()
        for each, log in zip(nodes, logs, strict=True):
            each.join(240)
            assert each.exitcode == 0, log.read_text()[-3000:]
    finally:
        for each in nodes:
            each.terminate()


def assert_equal_runs(one, two, steps):
    """Adapters to 1e-6 relative, the losses and margins of every step to rounding."""
    adapters = (load_file(run / "adapter/adapter_model.safetensors") for run in (one, two))
    a, b = (torch.cat([x.flatten() for _, x in sorted(weights.items())]) for weights in adapters)
    assert ((a - b).norm() / a.norm()).item() < 1e-6
    lines = [log_of(run)[1] for run in (one, two)]
    assert len(lines[0]) == len(lines[1]) == steps
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["rewards/margins"] == pytest.approx(b["rewards/margins"], rel=1e-3, abs=1e-6)


def test_two_ranks_equal_one(world, tmp_path):
    """Twenty steps with gloo, gradients and Adam's moments sharded: 1e-6 relative."""
    more = ("--epochs", "7", "--max_steps", "20")
    trained(arguments(world, tmp_path / "one", *more))
    trained(arguments(world, tmp_path / "two", *more), ranks=2)
    assert_equal_runs(tmp_path / "one", tmp_path / "two", 20)
    assert log_of(tmp_path / "two")[0]["ranks"] == 2


def test_a_small_pope_file_is_asked_before_midway_and_after(world, tmp_path):
    images = [f"images/{i}.png" for i in range(2)]
    asked = [{"question_id": i, "image": images[i % 2], "text": f"is there a {WORDS[8 + i]} ?",
              "label": "yes" if i % 2 else "no"} for i in range(4)]
    (tmp_path / "pope.json").write_text("".join(json.dumps(q) + "\n" for q in asked))
    more = ("--eval_every", "4", "--set", f"eval_data={tmp_path / 'pope.json'}",
            "--set", f"eval_images={Path(world[1]).parent}")
    trained(arguments(world, tmp_path / "run", *more))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    keys = {"questions_pope_accuracy", "questions_pope_f1", "questions_pope_yes_ratio"}
    assert keys <= set(summary["before"]) & set(summary["after"])
    midway = [line["eval"] for line in lines_of(tmp_path / "run") if "eval" in line]
    assert len(midway) == 2 and all(0 <= x[key] <= 100 for x in midway for key in keys)
    code, said = run(arguments(world, tmp_path / "other", "--set", f"eval_data={tmp_path / 'none.json'}"))
    assert code == 1 and "none.json" in said and "Traceback" not in said


# ---------------------------------------------------------------------------------------- --no-lora
def weights(out):
    """What --no-lora saves, in one vector."""
    found = load_file(out / "model" / "model.safetensors")
    return torch.cat([v.flatten().double() for _, v in sorted(found.items())])


def test_without_lora_naive_and_packed_train_to_the_same_model_that_transformers_loads(world, tmp_path):
    """Each step's reference is the untouched base: 3 ln 2 before a weight has moved; the loss falls."""
    from transformers import LlavaForConditionalGeneration
    for forward in ("naive", "packed"):
        trained(arguments(world, tmp_path / forward, "--no-lora", "--forward", forward, "--dtype", "float64",
                          "--val_data", str(world[1]), "--set", "look=0"))
    assert ((weights(tmp_path / "naive") - weights(tmp_path / "packed")).norm()
            / weights(tmp_path / "naive").norm()).item() < 1e-6
    summary = json.loads((tmp_path / "packed" / "summary.json").read_text())
    assert log_of(tmp_path / "packed")[1][0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-9)
    assert summary["before"]["loss"] == pytest.approx(3 * math.log(2), abs=1e-9)
    assert summary["after"]["loss"] < summary["before"]["loss"] and summary["after"]["accuracy"] == 100
    assert not (tmp_path / "packed" / "adapter").exists()
    saved, base = tmp_path / "packed" / "model", dict(vlm.load(world[0]).model.named_parameters())
    theirs, m = LlavaForConditionalGeneration.from_pretrained(saved), vlm.load(saved, dtype=torch.float64)
    ids = torch.tensor([m.front.prompt_ids("what is this ?", [])])
    torch.testing.assert_close(theirs(input_ids=ids).logits, m.model(input_ids=ids).logits)
    for name, p in m.model.named_parameters():
        assert torch.equal(p.float(), base[name]) == ("vision_tower" in name), name


@pytest.mark.parametrize("ranks, more", [(1, ["--dtype", "bfloat16"]),
                                         (2, ["--shard", "--set", "redraw=true"])])
def test_without_lora_a_killed_run_called_again_ends_with_the_same_bytes(world, tmp_path, ranks, more):
    """A bfloat16 model's masters are in the checkpoint; the frozen copy is read from the base again."""
    more = ("--no-lora", "--set", "save_every=2", *more)
    for name, breaks in (("never", None), ("killed", kill_at(8)), ("killed", None)):
        code, text = run(arguments(world, tmp_path / name, *more), breaks, ranks=ranks)
        assert code == (-signal.SIGKILL if breaks else 0), text
    assert torch.equal(weights(tmp_path / "never"), weights(tmp_path / "killed"))
    one, two = (log_of(tmp_path / name)[1] for name in ("never", "killed"))
    assert [x["loss"] for x in one] == [x["loss"] for x in two]


def test_without_lora_two_ranks_with_half_the_model_and_of_the_copy_equal_one(world, tmp_path):
    """Three micro-batches a step for two ranks; evaluation, in which rank 0 runs both models alone."""
    more = ("--no-lora", "--batch", "6", "--val_data", str(world[1]), "--eval_every", "4",
            "--set", "look=6", "--set", "max_new_tokens=4")
    for name, ranks, extra in (("one", 1, ()), ("two", 2, ("--shard",))):
        trained(arguments(world, tmp_path / name, *more, *extra), ranks=ranks)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert ((one - two).norm() / one.norm()).item() < 1e-6
    for a, b in zip(*(log_of(tmp_path / name)[1] for name in ("one", "two")), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    for name in ("before", "step-4", "after"):
        one, two = (json.loads((tmp_path / r / f"{name}.json").read_text()) for r in ("one", "two"))
        look, other = (found.pop("look")["preference"]["true"] for found in (one, two))
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6)
        assert look == pytest.approx(other, rel=1e-5, abs=1e-5)
    layers = vlm.load(world[0]).model.model.language_model.layers
    sharded = sum(p.nbytes for p in layers.parameters())
    whole, half = (log_of(tmp_path / name)[0]["base_bytes"] for name in ("one", "two"))
    assert half == whole - sharded // 2                                  # of the frozen copy


# ---------------------------------------------------------------------------------------- --shard
def test_two_nodes_with_half_the_base_each_equal_one_process(world, tmp_path):
    """Two torchruns that meet on the loopback, one rank each; every second step has an odd micro-batch."""
    deep = write_llava(tmp_path / "model", layers=6), world[1]
    more = ("--batch", "8", "--epochs", "3", "--val_data", str(world[1]), "--eval_every", "4",
            "--set", "look=6", "--set", "max_new_tokens=4")
    trained(arguments(deep, tmp_path / "one", *more, "--micro_batch", "4"))
    two_nodes(arguments(deep, tmp_path / "two", *more, "--micro_batch", "4", "--shard"), tmp_path)
    assert_equal_runs(tmp_path / "one", tmp_path / "two", 6)
    for name in ("before", "step-4", "after"):
        one, two = (json.loads((tmp_path / r / f"{name}.json").read_text()) for r in ("one", "two"))
        looks = [found.pop("look") for found in (one, two)]
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6)
        for kind in ("true", "blank", "other"):
            assert looks[0]["preference"][kind] == pytest.approx(looks[1]["preference"][kind], abs=1e-4)
            assert looks[0]["margin"][kind] == pytest.approx(looks[1]["margin"][kind], abs=1e-4)
        assert looks[0]["kl"] == pytest.approx(looks[1]["kl"], abs=1e-4)
    first = log_of(tmp_path / "two")[0]
    layers = vlm.load(deep[0]).model.model.language_model.layers
    sharded = sum(p.nbytes for p in layers.parameters())
    assert first["ranks"] == 2
    assert first["base_bytes"] == log_of(tmp_path / "one")[0]["base_bytes"] - sharded // 2


@pytest.mark.parametrize("more", [(), ("--forward", "naive", "--set", "checkpointing=true")])
def test_a_sharded_run_that_is_killed_and_called_again_ends_with_the_same_bytes(world, tmp_path, more):
    """Three micro-batches a step for two ranks; killed in the third epoch, when the reference is cached."""
    more = ("--shard", "--batch", "6", "--set", "save_every=1", *more)
    for name, breaks in (("never", None), ("killed", kill_at(6)), ("killed", None)):
        code, text = run(arguments(world, tmp_path / name, *more), breaks, ranks=2)
        assert code == (-signal.SIGKILL if breaks else 0), text
    assert adapter(tmp_path / "never") == adapter(tmp_path / "killed")
    trained(arguments(world, tmp_path / "whole", *[x for x in more if x != "--shard"]))
    assert_equal_runs(tmp_path / "whole", tmp_path / "never", 6)


def test_rank_0_answers_alone_from_everyones_shards(tmp_path):
    """Generation, whose number of forwards no other rank knows, before and after: the classroom's model."""
    fields = ("pairs=32", "scenes=6", "questions=12", "look=6", "max_new_tokens=9")
    argv = ["--max_steps", "2", *(x for field in fields for x in ("--set", field))]
    trained([*argv, "--out", str(tmp_path / "one")])
    trained([*argv, "--out", str(tmp_path / "two"), "--shard"], ranks=2)
    for name in ("before.jsonl", "before.json"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert_equal_runs(tmp_path / "one", tmp_path / "two", 2)


def test_one_process_with_shard_says_so_and_trains_whole(world, tmp_path, uninterrupted):
    text = trained(arguments(world, tmp_path / "run", "--set", "save_every=2", "--shard"))
    assert "torchrun" in text and adapter(tmp_path / "run") == adapter(uninterrupted)


def test_a_run_of_one_rank_goes_on_with_two_to_rounding(world, tmp_path, uninterrupted):
    argv = arguments(world, tmp_path / "run", "--set", "save_every=2")
    assert run(argv, kill_at(5))[0] == -signal.SIGKILL
    trained(argv, ranks=2)
    one, two = (load_file(x / "adapter/adapter_model.safetensors") for x in (tmp_path / "run", uninterrupted))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-7)


def pixels(prepared):
    return torch.stack([x["pixel_values"] for x in prepared])


def assert_same(one, other):
    """Two batches are of the same pairs, pixels and keys."""
    assert one.pairs == other.pairs and one.keys == other.keys
    assert torch.equal(pixels(one.images), pixels(other.images))
    assert torch.equal(pixels(one.images_rejected), pixels(other.images_rejected))


def test_pairs_are_read_ahead_and_are_the_same_with_any_number_of_threads(world):
    front, got = vlm.load(world[0]).front, []
    for workers in (1, 5):
        pairs = read_pairs(front, world[1], batch=4, micro_batch=2, workers=workers)
        feed, found = batches.Batches(pairs, pairs.o, command.Ranks(), 3), []
        for step in range(3):
            found += feed(step)
            assert list(feed.begun) == [step + 1] * (step < 2)
        assert all(batch.counts == 2 and batch.of == 4 for batch in found)
        got.append(found)
    assert sorted(place for batch in got[0] for place in batch.places) == list(range(12))
    for one, other in zip(*got, strict=True):
        assert one.places == other.places
        assert_same(one, other)


@pytest.mark.parametrize("built_in, redraw, reads", [(True, False, 12), (True, True, 24), (False, False, 24)])
def test_the_classrooms_pictures_are_read_once_for_all_epochs(world, built_in, redraw, reads):
    """And are what is read anew; not kept is what is drawn anew, or of another model."""
    seen, model = [], "classroom" if built_in else world[0]
    pairs = read_pairs(vlm.load(world[0]).front, world[1], model=model, batch=4, micro_batch=2, redraw=redraw,
                       workers=1)
    read = pairs.read
    pairs.read = lambda *args: seen.append(1) or read(*args)
    feed = batches.Batches(pairs, pairs.o, command.Ranks(), 6)
    pairs.read = read
    for step in range(6):
        for batch in feed(step):
            assert_same(batch, batch_of(pairs, batch.places, step // 3))
    assert len(seen) == reads


@pytest.mark.parametrize("shard", [False, True])
def test_ranks_take_all_micro_batches_and_much_the_same_number_of_tokens(shard):
    o, seen, loads = options.Options(batch=10, micro_batch=2, shard=shard), [], []
    tokens = [100, 900, 300, 500, 700, 200, 400, 600, 800, 50]
    for rank in range(2):
        pairs = batches.Pairs(None, range(10), tokens, None, o, frozenset())
        pairs.read = lambda place, epoch: vlm.Batch([place], [], [], [place], [place], 1, 1)
        found = list(batches.Batches(pairs, o, command.Ranks(rank, 2), 1)(0))
        assert len(found) == 3 if shard else len(found) in (2, 3)      # five, and a filler
        counting = [batch for batch in found if batch.counts]
        assert {batch.of for batch in found} == {10} and {batch.counts for batch in counting} == {2}
        seen += [place for batch in counting for place in batch.places]
        loads.append(sum(tokens[place] for batch in counting for place in batch.places))
    assert sorted(seen) == list(range(10))
    assert max(loads) - min(loads) < 1000                              # of 4,550


def test_policy_and_reference_see_the_same_rejected_crop_and_it_changes_only_with_redraw(world):
    """One draw per pair and run: both forwards get what Pairs.read gives, in every epoch and process."""
    import lora
    m, seen = vlm.load(world[0]), []
    def crop(epoch, **more):
        return pixels(read_pairs(m.front, world[1], **more).read(3, epoch).images_rejected)
    assert torch.equal(crop(0), crop(2)) and not torch.equal(crop(0), crop(0, seed=1))
    assert not torch.equal(crop(0, redraw=True), crop(1, redraw=True))
    def forward(m, pairs, features, needs):
        seen.append(torch.cat([*features.images, *features.rejected]))
        return vlm.packed(m, pairs, features, needs)
    lora.add_lora(m.model, 4, 8)
    batch = batch_of(read_pairs(m.front, world[1]), [0, 1])
    features = vlm.encode_images(m, batch)
    reference = Reference(12, m, forward, ALL, command.Ranks())(batch, features)
    policy = forward(m, batch.pairs, features, ALL)
    assert torch.equal(seen[0], seen[1])
    for field in ALL:                       # LoRA starts at zero: policy is the reference, crops included
        torch.testing.assert_close(getattr(policy, field), getattr(reference, field).to(policy.chosen.dtype))


def test_the_cached_reference_is_what_scoring_again_gives_and_notices_a_change(world):
    import lora
    m, calls = vlm.load(world[0]), []
    lora.add_lora(m.model, 4, 8)
    def forward(*args):
        calls.append(1)
        return vlm.packed(*args)
    cache, pairs = Reference(12, m, forward, ALL, command.Ranks()), read_pairs(m.front, world[1])
    batch = batch_of(pairs, [4, 5])
    first, again = (cache(batch, vlm.encode_images(m, batch)) for _ in range(2))
    assert len(calls) == 1
    assert all(torch.equal(getattr(first, field), getattr(again, field)) for field in ALL)
    other = batch_of(pairs, [4, 6])._replace(places=[4, 5])            # another pair at the same place
    changed = cache(other, vlm.encode_images(m, other))
    assert len(calls) == 2 and changed.chosen[1] != first.chosen[1]
    redrawn = read_pairs(m.front, world[1], redraw=True)
    for epoch in range(2):
        batch = batch_of(redrawn, [4, 5], epoch)
        cache(batch, vlm.encode_images(m, batch))
    assert len(calls) == 4


def test_with_lora_on_the_projector_the_reference_sees_the_bases_features(world, tmp_path):
    """A policy that has learned another projector: its features would make another reference."""
    import lora
    targets = "q_proj,multi_modal_projector.linear_1,multi_modal_projector.linear_2"
    argv = arguments(world, tmp_path, "--dtype", "float64", "--val_data", str(world[1]))
    run = train_dpo.prepare(options.parse([*argv, "--set", f"lora_targets={targets}"], ""), tmp_path,
                            command.Ranks(device=torch.device("cpu")))
    draw = torch.Generator().manual_seed(0)
    for p in lora.lora_parameters(run.model.model).values():
        p.data += 0.3 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
    base, batch = vlm.load(world[0], dtype=torch.float64), batch_of(run.pairs, [0, 1])
    want = vlm.naive(base, batch.pairs, vlm.encode_images(base, batch), ALL)
    for reference in (run.reference, run.val_reference):
        loss, _, found = train_dpo.step_loss(run, batch, reference)
        for field in ALL:
            torch.testing.assert_close(getattr(found, field), getattr(want, field), rtol=1e-9, atol=0)
    wrong = vlm.naive(base, batch.pairs, vlm.encode_images(run.model, batch), ALL)
    assert (wrong.rejected - want.rejected).abs().max() > 1
    loss.sum().backward()
    weights = lora.lora_parameters(run.model.model)
    assert all(p.grad.abs().max() > 0 for name, p in weights.items() if "projector" in name)


# --- going on from an adapter -----------------------------------------------------------------------------


def peft_logps(folder, adapter_folder, path):
    """(chosen (n,), rejected (n,)) of the pairs, by PEFT's model: the base of the folder with an adapter."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: it is in requirements-dev.txt")
    m = vlm.load(folder)
    peft.PeftModel.from_pretrained(m.model, adapter_folder)           # into m.model itself
    pairs = read_pairs(m.front, path, frozenset({"chosen", "rejected"}))
    batch = batch_of(pairs, range(len(pairs)))
    with torch.no_grad():
        found = vlm.naive(m, batch.pairs, vlm.encode_images(m, batch), pairs.needs)
    return found.chosen, found.rejected


@pytest.fixture(scope="module")
def after_sft(world, tmp_path_factory):
    """The two commands of docs/training.md on the tiny world: (the first's adapter, the words of the second,
    its folder)."""
    folder = tmp_path_factory.mktemp("after_sft")
    page = (ROOT / "docs" / "training.md").read_text()
    commands = re.findall(r"^python train_dpo.py (--loss .*)$", page, re.MULTILINE)
    sft, dpo = (command.replace("runs/", f"{folder}/").split() for command in commands)
    ours = ["--model", str(world[0]), "--data", str(world[1]), "--batch", "4", "--micro_batch", "2"]
    trained([*sft, *ours, "--epochs", "1", "--lr", "1e-2", "--lora_r", "16", "--set", "lora_alpha=32"])
    argv = [*dpo, *ours, "--lr", "1e-3", "--val_data", str(world[1]), "--set", "look=0", "--set", "warmup=0"]
    trained(argv)
    return folder / "sft" / "adapter", argv, folder / "dpo"


def test_dpo_after_sft_has_the_sft_model_as_its_reference_and_one_adapter_on_the_base(world, after_sft):
    """By PEFT's own model: the reference, the trained policy; and step 1 starts at ln 2."""
    start, _, out = after_sft
    frozen, policy = peft_logps(world[0], start, world[1]), peft_logps(world[0], out / "adapter", world[1])
    kept = load_file(out / "last" / "checkpoint.safetensors")["reference/logps"].T
    torch.testing.assert_close(kept.float(), torch.stack(frozen), rtol=1e-5, atol=1e-4)
    _, steps = log_of(out)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[-1]["rewards/margins"] > 0.01
    summary = json.loads((out / "summary.json").read_text())
    margin = 0.1 * ((policy[0] - policy[1]) - (frozen[0] - frozen[1])).mean().item()
    assert summary["before"]["margin"] == pytest.approx(0, abs=1e-6)
    assert summary["after"]["margin"] == pytest.approx(margin, abs=1e-4) and margin > 0.01
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 32)            # the first run's, not the preset's


def test_a_killed_run_that_began_with_an_adapter_ends_with_the_same_bytes(after_sft, tmp_path):
    start, argv, out = after_sft
    argv = [word if word != str(out) else str(tmp_path / "run") for word in argv] + ["--set", "save_every=2"]
    assert run(argv, kill_at(6))[0] == -signal.SIGKILL
    trained(argv)
    assert adapter(tmp_path / "run") == adapter(out)


def test_an_adapter_that_changed_is_another_base(after_sft, tmp_path):
    start, argv, out = after_sft
    shutil.copytree(start, tmp_path / "start")
    words = {str(out): str(tmp_path / "run"), str(start): str(tmp_path / "start")}
    argv = [words.get(word, word) for word in argv] + ["--set", "save_every=2"]
    assert run(argv, kill_at(6))[0] == -signal.SIGKILL
    shutil.copy(out / "adapter" / "adapter_model.safetensors", tmp_path / "start")
    code, text = run(argv)
    assert code == 1 and "is of a run with another base or other options" in text


@pytest.mark.parametrize("more, said", [
    (["--lora_r", "4"], "says what lora_r is: leave lora_r out"),
    (["--no-lora"], "says what lora_r is: leave lora_r out"),
    (["--set", "lora_targets=q_proj"], "says what lora_targets is: leave lora_targets out"),
    (["--adapter", "nowhere"], "nowhere needs adapter_config.json and adapter_model.safetensors"),
    (["--model", "classroom"], "load it into the model that it was trained on")])
def test_an_adapter_that_does_not_fit_is_refused_in_a_sentence(after_sft, tmp_path, more, said):
    _, argv, out = after_sft
    argv = [word if word != str(out) else str(tmp_path / "run") for word in argv]
    code, text = run([*argv, *more])
    assert code == 1 and said in text and "Traceback" not in text


@pytest.mark.parametrize("more", [["--shard"], []])
def test_two_ranks_that_begin_with_an_adapter_equal_one(after_sft, tmp_path, more):
    _, argv, out = after_sft
    trained([*[word if word != str(out) else str(tmp_path / "run") for word in argv], *more], ranks=2)
    torch.testing.assert_close(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"),
                               load_file(out / "adapter" / "adapter_model.safetensors"), rtol=1e-4, atol=1e-6)


# --- the reference, kept for other runs -------------------------------------------------------------------


def count_scored(file):
    """In a fork, before the command: each batch that the reference scores is a character in the file."""
    score = Reference.score
    def counted(self, *args):
        with open(file, "a") as log:
            log.write(".")
        return score(self, *args)
    Reference.score = counted


def scored(argv, tmp_path, ranks=1):
    """Run a command: how many batches its reference has scored."""
    file = tmp_path / "scored"
    file.write_text("")
    trained(argv, partial(count_scored, file), ranks)
    return len(file.read_text())


@pytest.fixture(scope="module")
def sweep(world, tmp_path_factory):
    """(arguments of a run, the same with a folder for its reference, which a first run has filled)."""
    folder = tmp_path_factory.mktemp("sweep")
    argv = arguments(world, folder / "first", "--epochs", "1", "--loss", "dpo", "--val_data", str(world[1]),
                     "--set", "look=0")
    kept = [*argv, "--set", f"reference_cache={folder / 'cache'}"]
    assert scored(kept, folder) == 6 + 6                               # pairs to train on, and held-out ones
    assert len([*(folder / "cache").iterdir()]) == 2
    return argv, kept


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_over_the_same_reference_scores_nothing_and_has_the_same_bits(sweep, tmp_path, ranks):
    argv, kept = sweep
    more = "--beta", "0.3", "--lr", "3e-4", "--loss", "dpo+ancpo", "--epochs", "2", "--lora_r", "8", "--out"
    assert scored([*kept, *more, str(tmp_path / "kept")], tmp_path, ranks) == 0
    assert scored([*argv, *more, str(tmp_path / "plain")], tmp_path, ranks) == 12
    assert adapter(tmp_path / "kept") == adapter(tmp_path / "plain")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("kept", "plain")]
    assert summaries[0]["before"] == summaries[1]["before"] and summaries[0]["after"] == summaries[1]["after"]


@pytest.mark.parametrize("more", [
    ["--loss", "mdpo"], ["--seed", "1"], ["--micro_batch", "4"], ["--forward", "naive"],
    ["--dtype", "bfloat16"]])
def test_another_reference_is_scored_anew(sweep, tmp_path, more):
    _, kept = sweep
    assert scored([*kept, "--out", str(tmp_path / "run"), *more], tmp_path) > 0


def test_another_model_adapter_or_pair_is_not_mixed_up(world, sweep, after_sft, tmp_path):
    argv, kept = sweep
    other = write_llava(tmp_path / "model", seed=5), write_pairs(tmp_path, seed=1)
    own = [word for word in kept if word not in ("--lora_r", "16", "lora_alpha=32")]
    own = own[:own.index("--set")] + own[own.index("--set") + 1:]
    for name, words, changed in (("model", kept, ["--model", str(other[0])]),
                                 ("pairs", kept, ["--data", str(other[1])]),
                                 ("adapter", own, ["--adapter", str(after_sft[0])])):
        assert scored([*words, *changed, "--out", str(tmp_path / name)], tmp_path) >= 6, name
    assert scored([*kept, "--out", str(tmp_path / "again")], tmp_path) == 0     # and the first is still there


def test_a_torn_reference_is_made_again(sweep, tmp_path):
    argv, kept = sweep
    folder = tmp_path / "cache"
    shutil.copytree(kept[-1].partition("=")[2], folder)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-40])
    argv = [*argv, "--out", str(tmp_path / "run"), "--set", f"reference_cache={folder}"]
    assert scored(argv, tmp_path) == 12
    assert scored([*argv, "--out", str(tmp_path / "more")], tmp_path) == 0


def test_two_runs_at_once_share_a_reference(sweep, tmp_path):
    import threading
    argv, _ = sweep
    told = [None, None]
    argv = [*argv, "--set", f"reference_cache={tmp_path / 'c'}"]
    def start(i):
        told[i] = run([*argv, "--out", str(tmp_path / f"run-{i}")])
    threads = [threading.Thread(target=start, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [code for code, _ in told] == [0, 0] and adapter(tmp_path / "run-0") == adapter(tmp_path / "run-1")
    assert sorted(file.suffix for file in (tmp_path / "c").iterdir()) == [".safetensors"] * 2
    assert scored([*argv, "--out", str(tmp_path / "more")], tmp_path) == 0


def test_redraw_scores_the_reference_anew_in_every_epoch(world, tmp_path):
    for name, more in (("redraw", ["--set", "redraw=true"]), ("once", [])):
        trained(arguments(world, tmp_path / name, "--epochs", "2", *more))
    redraw, once = (log_of(tmp_path / n)[1] for n in ("redraw", "once"))
    assert redraw[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-6)
    assert redraw[-1]["rewards/image_rejected"] != once[-1]["rewards/image_rejected"]


def test_a_non_finite_loss_stops_with_the_ids_of_its_pairs_and_keeps_the_checkpoint(world, tmp_path):
    def arm():
        original, count = losses.LOSSES["mdpo"], [0]
        def broken(policy, reference, beta, delta):
            count[0] += 1
            loss = original(policy, reference, beta, delta)
            return loss * math.nan if count[0] > 12 else loss
        losses.LOSSES["mdpo"] = broken
    argv = arguments(world, tmp_path / "run", "--set", "save_every=2")
    code, text = run(argv, arm)
    assert code == 1 and "not finite" in text and "pair-" in text and "Traceback" not in text
    assert (tmp_path / "run" / "last" / "checkpoint.safetensors").exists()


def test_a_step_that_runs_out_of_memory_is_told_what_to_change(world, tmp_path):
    def arm():
        def full(self, lr):
            raise torch.OutOfMemoryError("no room")
        Zero2.step = full
    code, text = run(arguments(world, tmp_path / "run"), arm)
    assert code == 1 and "Traceback" not in text
    assert "train_dpo.py: out of memory: pass --set checkpointing=true --micro_batch 1" in text


def test_the_learning_rate_warms_up_and_ends_at_zero():
    from transformers import get_cosine_schedule_with_warmup
    o = options.Options(lr=1.0, warmup=0.1)
    adam = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(adam, 5, 50)
    for step in range(50):
        assert train_dpo.learning_rate(step, 50, o) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        schedule.step()


OPTIMISERS = {"AdamW": partial(torch.optim.AdamW, betas=(0.9, 0.98), weight_decay=0.05),
              "SGD": partial(torch.optim.SGD, momentum=0.9), "Adagrad": torch.optim.Adagrad,
              "RMSprop": partial(torch.optim.RMSprop, momentum=0.5, centered=True)}


def weights_of_a_sine():
    """Three weights of seven numbers, which two ranks share as four and three."""
    start = torch.arange(1.0, 7).reshape(2, 3)
    return {"a": torch.nn.Parameter(start), "b": torch.nn.Parameter(-2 * start[0, :1]),
            "c": torch.nn.Parameter(torch.zeros(0))}


def optimised(make, ranks, clip, steps, resumed=0):
    """Weights after some steps of Zero2, taken up from its own state() after `resumed`; the norms."""
    def begin():
        weights = weights_of_a_sine()
        return weights, Zero2(weights, make, ranks, clip)
    (weights, optimiser), norms = begin(), []
    for step in range(steps):
        if step and step == resumed:
            state = ranks.first(optimiser.state) if ranks.world == 1 else ranks.gather(optimiser.state())[0]
            weights, optimiser = begin()
            optimiser.load(state)
        loss = sum((p.sin() * (step + 1)).sum() for p in weights.values())
        (loss / ranks.world).backward()
        norms.append(optimiser.step(0.01))
    return weights, norms


def plain(make, clip, steps):
    weights, norms = weights_of_a_sine(), []
    optimiser = make([*weights.values()], lr=0.01)
    for step in range(steps):
        sum((p.sin() * (step + 1)).sum() for p in weights.values()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), clip or math.inf).item())
        optimiser.step()
        optimiser.zero_grad()
    return weights, norms


@pytest.mark.parametrize("clip, resumed", [(0.0, 0), (1.0, 3)])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_zero2_steps_as_the_plain_optimiser_does_on_one_rank_and_on_two(name, clip, resumed, tmp_path):
    """And goes on from its own checkpoint."""
    make = OPTIMISERS[name]
    theirs, norms = plain(make, clip, 6)

    def equal(ranks, folder):
        ours, found = optimised(make, ranks, clip, 6, resumed)
        assert found == pytest.approx(norms, rel=1e-6)
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-7)
    equal(command.Ranks(), tmp_path)
    assert both(equal, tmp_path) == [0, 0]


@pytest.mark.parametrize("make", [
    torch.optim.Muon, torch.optim.LBFGS, torch.optim.SparseAdam, lambda p: torch.optim.Adafactor(p)])
def test_an_optimiser_that_needs_whole_matrices_is_refused_in_a_sentence(make):
    with pytest.raises(data.UserError, match="does not work element by element.*take AdamW"):
        Zero2(weights_of_a_sine(), make, command.Ranks())


def test_masters_of_bfloat16_weights_are_float32():
    """A hundred steps too small for bfloat16 move the weights all the same."""
    weights = {"a": torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))}
    optimiser = Zero2(weights, torch.optim.SGD, command.Ranks())
    for _ in range(100):
        weights["a"].sum().backward()
        optimiser.step(1e-3)
    assert weights["a"].dtype == torch.bfloat16 and weights["a"].grad is None
    torch.testing.assert_close(optimiser.whole("weight")["a"], torch.full((4,), 0.9))
    torch.testing.assert_close(weights["a"].float(), torch.full((4,), 0.9), rtol=0.005, atol=0)


# ---------------------------------------------------------------------------------------------- real input
def real_model(folder):
    """LLaVA-1.5's shape (CLIP 336/14: 576 image tokens, real Llama tokenizer) with small random weights."""
    return write_llava(folder, tokenizer=llama_tokenizer(), image_size=336, hidden=64, layers=2, kv_heads=4)


def test_real_pairs_two_empty_responses_are_named_and_the_rest_trains(tmp_path):
    """The ten PDS-DPO pairs: art-2 and art-3 have empty rejected responses.

    Two epochs of the others raise the margin.
    """
    pairs = need(SHARED / "real" / "pds10" / "step3_sanity.json")
    model = real_model(tmp_path / "model")
    rows = json.loads(pairs.read_text())
    some = [rows[i] for i in (0, 1, 4)]                                   # to evaluate on; art-2 among them
    (tmp_path / "some.json").write_text(json.dumps(some))
    for row in some:
        (tmp_path / row["image"]).parent.mkdir(exist_ok=True)
        shutil.copy(pairs.parent / row["image"], tmp_path / row["image"])
    argv = ["--model", str(model), "--data", str(pairs), "--val_data", str(tmp_path / "some.json"),
            "--batch", "4", "--micro_batch", "2", "--epochs", "2", "--lr", "3e-3", "--set", "template=vicuna",
            "--set", "look=0"]
    code, text = run([*argv, "--out", str(tmp_path / "refused")])
    faults = [x for x in text.splitlines() if "step3_sanity.json, line" in x]
    assert code == 1 and len(faults) == 2 and "art-2" in faults[0] and "art-3" in faults[1]
    assert "Traceback" not in text
    trained([*argv, "--out", str(tmp_path / "run"), "--skip_bad"])
    first, steps = log_of(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert first["pairs"] == 8 and first["template"] == "vicuna" and len(steps) == 4
    assert summary["before"]["margin"] == pytest.approx(0, abs=1e-5) and summary["after"]["margin"] > 0.05
    peft = pytest.importorskip("peft", reason="peft is in requirements-dev.txt")
    from transformers import LlavaForConditionalGeneration
    base = LlavaForConditionalGeneration.from_pretrained(model)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    ours = vlm.load(model, adapter=tmp_path / "run" / "adapter")
    ids = torch.tensor([ours.front.prompt_ids("What is this?", [])])
    theirs = loaded(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours.model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_the_official_mdpo_sample_names_both_absent_images_with_any_model(world, tmp_path):
    pairs = need(SHARED / "real" / "mdpo" / "sample_data.json")
    code, text = run(["--model", str(world[0]), "--data", str(pairs), "--out", str(tmp_path / "run")])
    assert code == 1 and "llava-reasoning-3730.jpg" in text and "llava-reasoning-5951.jpg" in text
    assert len([x for x in text.splitlines() if "missing" in x]) == 2 and "Traceback" not in text


# ---------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("argv, words", [
    (["--lose", "dpo"], "--lose"), (["--epochs", "three"], "three"), (["--set", "warmpu=1"], "warmpu"),
    (["--set", "redraw=true", "--set", "reference_cache=c"], "leave out reference_cache"),
    (["--set", "clip=high"], "'high' is not a number"), (["--set", "redraw=maybe"], "not true or false"),
    (["--loss", "mdop"], "mdop"), (["--anchors", "x"], "x"), (["--image_rejected", "blur"], "blur"),
    (["--image_rejected", "none"], "without the image"), (["--preset", "mdpo-bunny"], "needs --model"),
    (["--preset", "nope"], "nope"),
    (["--lr", "-1"], "above 0"), (["--lora_r", "-1"], "below 0"), (["--set", "workers=0"], "above 0"),
    (["--lr", "nan"], "above 0"), (["--dtype", "float8"], "float8"),
    (["--model", "/nowhere"], "no such folder"), (["--data", "/nowhere.jsonl"], "nowhere"),
])
def test_a_mistake_is_refused_in_one_sentence(tmp_path, argv, words):
    code, text = run([*argv, *([] if "--out" in argv else ["--out", str(tmp_path / "run")])])
    last = text.strip().splitlines()[-1]
    assert code == 1 and last.startswith("train_dpo.py: ") and words in last and "Traceback" not in text


def test_broken_json_is_named_with_its_line(world, tmp_path):
    lines = world[1].read_text().splitlines()
    broken = world[1].parent / "broken.jsonl"
    broken.write_text("\n".join([*lines[:3], lines[3][:-9], *lines[4:]]))
    code, text = run(["--model", str(world[0]), "--data", str(broken), "--out", str(tmp_path / "run")])
    assert code == 1 and "broken.jsonl, line 4" in text and "Traceback" not in text


def test_an_out_of_other_options_is_refused_and_the_options_named(world, tmp_path):
    trained(arguments(world, tmp_path / "run", "--epochs", "1"))
    code, text = run(arguments(world, tmp_path / "run", "--epochs", "1", "--beta", "0.2"))
    assert code == 1 and "beta 0.1 there, 0.2 here" in text


def test_an_out_of_other_pairs_in_the_same_file_is_refused(world, tmp_path):
    """Finished or stopped; a run of before the log knew its pairs is taken as it is."""
    pairs = write_pairs(tmp_path)
    argv = arguments((world[0], pairs), tmp_path / "run", "--epochs", "1")
    trained(argv)
    write_pairs(tmp_path, n=8, seed=1)
    code, text = run(argv)
    assert code == 1 and "pairs.jsonl has changed since" in text and "Traceback" not in text
    first, *rest = lines_of(tmp_path / "run")
    first.pop("data_identity")
    first["options"].pop("lora_targets")
    lines = [json.dumps(line) + "\n" for line in (first, *rest)]
    (tmp_path / "run" / "log.jsonl").write_text("".join(lines))
    assert "12 pairs, 3 steps" in trained(argv)


def test_responses_that_become_equal_when_they_are_cut_are_a_fault(world, tmp_path):
    pairs = write_pairs(tmp_path)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    rows[3] |= {"chosen": "a red cat and there", "rejected": "a red cat and two"}
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = arguments((world[0], pairs), tmp_path / "run", "--epochs", "1", "--set", "max_length=15")
    code, text = run(argv)
    assert code == 1 and "line 4" in text and "chosen and rejected are the same 4 tokens when cut" in text
    assert "11 pairs" in trained([*argv, "--skip_bad"])


def test_the_second_of_two_runs_on_one_folder_is_refused(world, tmp_path):
    lock = options.claim(tmp_path / "run", options.Options())
    code, text = run(arguments(world, tmp_path / "run"))
    lock.close()
    assert code == 1 and "in use by another run" in text


def test_a_full_disk_is_said_and_what_was_written_is_kept(world, tmp_path, uninterrupted):
    """The checkpoint of step 4 finds no room: the run says so, and goes on from step 2 once there is room."""
    def arm():
        import errno
        original, count = os.write, [0]
        def full(fd, content):
            if len(content) > 20_000:                     # checkpoints are; log lines are not
                count[0] += 1
                if count[0] > 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(fd, content)
        os.write = full
    argv = arguments(world, tmp_path / "run", "--set", "save_every=2")
    code, text = run(argv, arm)
    assert code == 1 and "No space left" in text and "Traceback" not in text
    trained(argv)
    assert adapter(tmp_path / "run") == adapter(uninterrupted)


@pytest.mark.parametrize("preset", ["mdpo-bunny", "mdpo-llava", "pds-llava"])
def test_official_takes_the_official_codes_values_and_names_each(preset):
    """An option that the user gave takes precedence, and is then not named."""
    argv = ["--preset", preset, "--model", "M", "--data", "D", "--set", "official=true"]
    o = options.parse(argv, "")
    wanted = options.OFFICIAL[preset]
    assert {k: getattr(o, k) for k in wanted} == wanted
    assert options.departures(o) == [f"{k} {v}" for k, v in wanted.items()]
    own = options.parse([*argv, "--set", "redraw=false", "--batch", "4"], "")
    assert not own.redraw and own.batch == 4 and len(options.departures(own)) == len(wanted) - 1
    assert options.departures(options.parse(argv[:-2], "")) == []
    assert (preset == "pds-llava") == (o.images == "pad") == (o.batch == 2)


def test_official_crops_the_prepared_pixels_anew_each_epoch_and_the_log_says_so(tmp_path, world):
    trained(arguments(world, tmp_path / "run", "--preset", "mdpo-llava", "--epochs", "2",
                      "--set", "official=true", "--set", "template=", "--lora_r", "4"))
    first, steps = log_of(tmp_path / "run")
    assert [x.split()[0] for x in first["official"]] == list(options.OFFICIAL["mdpo-llava"])
    assert first["images"] == "resized to 28, the middle cut out (CLIPImageProcessorPil)"
    assert steps[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-6)
    pairs = read_pairs(vlm.load(world[0]).front, world[1], crop_pixels=True, redraw=True)
    once, again, later = (pairs.read(3, epoch) for epoch in (0, 0, 1))
    crops = [pixels(x.images_rejected) for x in (once, again, later)]
    assert torch.equal(crops[0], crops[1]) and not torch.equal(crops[0], crops[2])
    assert torch.equal(pixels(once.images), pixels(later.images))
    assert crops[0].shape == pixels(once.images).shape


@pytest.mark.parametrize("rejected", ["crop", "random"])
def test_a_llava_1_6_trains_on_pictures_of_many_shapes(tmp_path, rejected):
    """Their tokens vary; with `random` the two prompts of a pair are of different lengths."""
    from test_vlm import SIZES, write_next
    write_next(tmp_path / "model")
    pairs = write_pairs(tmp_path, n=6)
    for i, size in enumerate(SIZES):
        picture(i, size).save(tmp_path / "images" / f"{i}.png")
    trained(arguments((tmp_path / "model", pairs), tmp_path / "run", "--image_rejected", rejected,
                      "--epochs", "2", "--set", "checkpointing=true", "--val_data", str(pairs),
                      "--set", "look=0"))
    first, steps = log_of(tmp_path / "run")
    assert steps[0]["loss"] == pytest.approx(3 * math.log(2), abs=1e-6) and len(steps) == 4
    assert first["images"].endswith("(LlavaNextImageProcessorPil)")
    trained(arguments((tmp_path / "model", pairs), tmp_path / "naive", "--image_rejected", rejected,
                      "--epochs", "2", "--forward", "naive"))
    for step, other in zip(steps, log_of(tmp_path / "naive")[1], strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_what_cannot_fit_is_refused_before_the_weights_are_read(world, tmp_path):
    def small():
        from training import plan
        plan.capacity = lambda device: (1 << 10, "this machine's memory")
        vlm.load = None                                 # nobody may call it
    code, said = run(arguments(world, tmp_path / "run"), before=small)
    assert code == 1 and "the run needs at least" in said and "check_memory=false" in said
    assert "Traceback" not in said


def test_help_lists_every_option():
    code, text = run(["--help"])
    assert code == 0 and "--image_rejected" in text and "max_length=2048" in text
