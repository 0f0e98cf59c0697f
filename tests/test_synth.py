"""synth.py as specification: every stage, kills, ranks, the real data, the published faults, the analyses."""
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SHARED, need, pairs_of, picture, write_llava
from test_rewards import PATTERN, tiny_armorm, tiny_imagereward

import data
import synth
from classroom.papers import analyses, pds
from model import ask, command
from synthesis import images, pairing, prompts

PDS10 = SHARED / "real" / "pds10"


def tiny_sd3(folder, t5=True, size=16):
    """A random Stable Diffusion 3 of diffusers' own classes: letters as tokens, 16-pixel images."""
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )
    torch.manual_seed(0)
    letters = [f"{c}{e}" for c in "abcdefghijklmnopqrstuvwxyz.," for e in ("", "</w>")]
    vocab = {w: k for k, w in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    words = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    text = CLIPTextConfig(vocab_size=len(vocab), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                          num_attention_heads=2, projection_dim=16, eos_token_id=len(vocab) - 1)
    clips = [CLIPTextModelWithProjection(text).eval() for _ in range(2)]
    pieces = [*(("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.)), *((c, -2.) for c in "▁.,abcdeghiknorstuw")]
    t5_model = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=1,
                                       num_heads=2)).eval()
    transformer = SD3Transformer2DModel(
        sample_size=size // 2, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        out_channels=4, pos_embed_max_size=16)
    for name, weight in transformer.named_parameters():     # else its last layer, all zeros, hides the prompt
        if weight.ndim > 1 and "pos_embed" not in name:
            torch.nn.init.normal_(weight, std=.2)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4,
                        scaling_factor=1.5, shift_factor=.06, use_quant_conv=False, use_post_quant_conv=False)
    StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.), vae=vae,
        text_encoder=clips[0], tokenizer=words, text_encoder_2=clips[1], tokenizer_2=words,
        text_encoder_3=t5_model if t5 else None,
        tokenizer_3=T5Tokenizer(vocab=pieces, extra_ids=0) if t5 else None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Random components of every kind, and prompts and questions in their few words."""
    folder = tmp_path_factory.mktemp("components")
    for name in ("sd3", "imagereward", "armorm", "prompts"):
        (folder / name).mkdir()
    tiny_sd3(folder / "sd3")
    tiny_imagereward(folder / "imagereward", size=16)
    tiny_armorm(folder / "armorm", max_position_embeddings=4096)
    (folder / "armorm" / "token_pattern.json").write_text(json.dumps(PATTERN))
    for k in range(3):
        write_llava(folder / f"llava{k}", seed=2 * k)           # some of their answers end, some are cut off
    for topic in ("cats", "bikes"):
        ends = ("a blue dog", "two dog", "no bike", "one cat , a dog")
        text = "\n".join(f"a red {topic[:-1]} and {end}" for end in ends)
        (folder / "prompts" / f"{topic}.txt").write_text(text)
    (folder / "questions.txt").write_text("what is this ?\nis there a dog ?\n")
    return folder


def arguments(parts, out, *more):
    folders = {"prompts": "prompts", "generator": "sd3", "imagereward": "imagereward", "armorm": "armorm",
               "instruct": "questions.txt"}
    given = {"out": out, "preset": "pds-dpo", "steps": 2, "size": 0, "threshold": -1000, "batch": 3,
             "margin": 0, "device": "cpu", "responders": ",".join(str(parts / f"llava{k}") for k in range(3)),
             **{k: parts / name for k, name in folders.items()}}
    given = [f"--{k}={v}" for k, v in given.items()]
    return [*given, "--set", "similar=0.9", "--set", "max_new_tokens=24", *more]


def run(stage, parts, out, *more):
    synth.main([stage, *arguments(parts, out, *more)])
    return Path(out)


def lines(out, name):
    return list(data.read_jsonl(out / f"{name}.jsonl"))


FILES = ("prompts", "images", "ranked", "responses", "scores-armorm", "pairs", "dropped")


def contents(out):
    """{file: bytes} of all that a run leaves, logs and journals apart."""
    return {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*"))
            if f.is_file() and not f.name.startswith(".") and f.name not in ("log.jsonl",)}


@pytest.fixture(scope="module")
def whole(parts, tmp_path_factory):
    return run("all", parts, tmp_path_factory.mktemp("synth") / "run")


# ---- the stages ----

def test_all_makes_every_file_and_keeps_every_candidate(whole):
    made = {name: lines(whole, name) for name in FILES}
    assert len(made["prompts"]) == 8 and len(made["images"]) == 32 and len(made["ranked"]) == 8
    assert [r["guidance"] for r in made["images"][:4]] == [5, 7, 9, 11]
    assert [r["seed"] for r in made["images"][4:8]] == [2001, 2002, 2003, 2004]
    for row in made["ranked"]:
        scores = row["scores"]["imagereward"]
        assert row["image"] == row["candidates"][scores.index(max(scores))]["image"]
    assert len(made["responses"]) == 24 and len(made["scores-armorm"]) == 24
    assert {r["model"] for r in made["responses"]} == {"llava0", "llava1", "llava2"}
    assert len(made["scores-armorm"][0]["rewards"]) == 5
    assert len(made["pairs"]) + len(made["dropped"]) == 8


def test_the_trainer_reads_both_files(whole):
    from training.records import Records, check
    native, published = (Records(str(whole / name)) for name in ("pairs.jsonl", "pds_dpo.json"))
    assert len(check(native)) == len(check(published)) == len(lines(whole, "pairs")) > 0
    for field in ("question", "chosen", "rejected"):
        assert [r[field] for r in pairs_of(native)] == [r[field] for r in pairs_of(published)]


def test_a_second_call_makes_nothing_and_changes_nothing(parts, whole):
    before, logged = contents(whole), len(lines(whole, "log"))
    run("all", parts, whole)
    assert contents(whole) == before
    assert sum(line.get("made", 0) for line in lines(whole, "log")[logged:]) == 0


def test_paired_seeds_differ_by_prompt_alone(parts, tmp_path):
    run("prompts", parts, tmp_path)
    run("images", parts, tmp_path, "--paired_seeds", "--guidance", "1,5")
    assert [r["seed"] for r in lines(tmp_path, "images")[:4]] == [1000, 1000, 2000, 2000]


def test_a_threshold_leaves_prompts_out_and_says_how_many(parts, whole, tmp_path):
    scores = sorted(max(r["scores"]["imagereward"]) for r in lines(whole, "ranked"))
    run("prompts", parts, tmp_path)
    run("images", parts, tmp_path)
    run("rank", parts, tmp_path, f"--threshold={(scores[2] + scores[3]) / 2}")
    assert lines(tmp_path, "log")[-1] | {"seconds": 0} == {"stage": "rank", "prompts": 8, "kept": 5,
                                                           "below_threshold": 3, "seconds": 0}
    assert sum(r["dropped"] is not None for r in lines(tmp_path, "ranked")) == 3
    run("instruct", parts, tmp_path)
    assert len(lines(tmp_path, "instructions")) == 5


def test_generator_reward_and_responders_are_never_in_memory_together(parts, tmp_path, monkeypatch):
    """Whenever a model is about to be loaded, none is there."""
    from model import vlm
    from synthesis import rewards
    seen = []

    def alone(f):
        def g(*args, **options):
            models = [m for m in gc.get_objects() if isinstance(m, torch.nn.Module) and hasattr(m, "config")]
            seen.append(len(models) - before)
            return f(*args, **options)
        return g
    gc.collect()
    before = len([m for m in gc.get_objects() if isinstance(m, torch.nn.Module) and hasattr(m, "config")])
    monkeypatch.setattr(images, "_load", alone(images._load))
    for module, name in ((rewards.ImageReward, "load"), (rewards.ArmoRM, "load"), (vlm, "load")):
        monkeypatch.setattr(module, name, alone(getattr(module, name)))
    run("all", parts, tmp_path, "--guidance=5")
    assert seen == [0] * (2 + 1 + 3 + 1)


# ---- the generator ----

def plain(folder, prompt, scale, seed, steps=3):
    """The image of one call of diffusers' own pipeline."""
    from diffusers import StableDiffusion3Pipeline
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, guidance_scale=float(scale), num_inference_steps=steps,
                    generator=torch.Generator().manual_seed(seed)).images[0]


def steps_apart(a, b):
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def test_four_scales_in_one_call_equal_four_calls_of_diffusers(parts):
    """And with it: texts encoded apart from the transformer equal the plain call."""
    prompt, scales, seeds = "a red cat and a blue dog", [5, 7, 9, 11], [1001, 1002, 1003, 1004]
    encoded = images.encode(parts / "sd3", [prompt])
    ours = images.Painter(parts / "sd3")(encoded[prompt], encoded[""], scales, seeds, steps=3)
    theirs = [plain(parts / "sd3", prompt, g, s) for g, s in zip(scales, seeds, strict=True)]
    assert max(map(steps_apart, ours, theirs)) <= 1
    assert min(steps_apart(ours[0], other) for other in ours[1:]) > 1            # the test can fail
    assert steps_apart(ours[0], plain(parts / "sd3", "two bikes", 5, 1001)) > 1


def test_a_generator_saved_without_t5_is_loaded_without_it(tmp_path):
    tiny_sd3(tmp_path, t5=False)
    encoded = images.encode(tmp_path, ["a red cat"])
    ours, = images.Painter(tmp_path)(encoded["a red cat"], encoded[""], [7], [3], steps=2)
    from diffusers import StableDiffusion3Pipeline
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    theirs = pipeline("a red cat", guidance_scale=7., num_inference_steps=2,
                      generator=torch.Generator().manual_seed(3)).images[0]
    assert steps_apart(ours, theirs) <= 1


def test_a_generator_saved_in_fp16_alone_is_read_from_that(parts, tmp_path):
    """diffusers' variant="fp16": of all parts, or of some beside whole ones; the weights are its own."""
    import diffusers
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(parts / "sd3", dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    shutil.copytree(parts / "sd3", tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "transformer")
    shutil.copytree(tmp_path / "half" / "transformer", tmp_path / "some" / "transformer")
    encoded = images.encode(parts / "sd3", ["a red cat"])
    for name in ("half", "some"):
        words, pooled = images.encode(tmp_path / name, ["a red cat"])["a red cat"]
        for ours, theirs in zip((words, pooled), encoded["a red cat"], strict=True):
            assert torch.equal(ours, theirs) == (name == "some")
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
        painter = images.Painter(tmp_path / name)
        for ours, theirs in zip(painter.pipeline.transformer.parameters(),
                                pipeline.transformer.parameters(), strict=True):
            assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("part", ["text_encoder_3", "vae"])
def test_a_generator_that_lacks_a_part_is_a_sentence(parts, tmp_path, part):
    shutil.copytree(parts / "sd3", tmp_path / "sd3", ignore=shutil.ignore_patterns(part))
    with pytest.raises(data.UserError, match=f"sd3 lacks the part {part}: .*T5 alone can be left out"):
        images.encode(tmp_path / "sd3", ["a red cat"])


# ---- kills, ranks ----

def forked(argv, env=(), wait=None):
    """synth.main(argv) in a fork, where the imports are done; its id, or killed after `wait` seconds."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        gc.freeze()
        os.environ.update(env)
        code = 1
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        try:
            synth.main(argv)
            code = 0
        finally:
            os._exit(code)
    if wait is None:
        return child
    deadline = time.time() + wait
    while time.time() < deadline:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return None
        time.sleep(.005)
    os.kill(child, signal.SIGKILL)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def test_twenty_kills_leave_the_same_files_and_make_nothing_twice(parts, tmp_path, monkeypatch):
    """At random moments of runs that are called again until they come through, and then begun anew."""
    def argv(out):
        return ["all", *arguments(parts, out / "run", "--guidance=5,7", "--set", "max_new_tokens=3")]

    def finish(out):
        assert os.waitpid(forked(argv(out)), 0)[1] == 0
        return contents(out / "run"), lines(out / "run", "log")
    add = command.Store.add

    def noted(store, rows):
        add(store, rows)
        with open(store.path.parents[2].with_suffix(".made"), "a") as file:
            file.writelines(f"{store.path} {row['id']} {row['hash']}\n" for row in rows)
    monkeypatch.setattr(command.Store, "add", noted)
    start, rng, killed, runs, log = time.time(), random.Random(7), 0, 0, []
    whole, _ = finish(tmp_path / "whole")
    length = time.time() - start
    while killed < 20:
        out, runs = tmp_path / str(runs), runs + 1
        while killed < 20 and forked(argv(out), wait=rng.uniform(0, .6 * length)):
            killed += 1
        left, logged = finish(out)
        assert left == whole
        log += logged
    made = [line for file in tmp_path.glob("*.made") for line in file.read_text().splitlines()]
    assert len(made) == len(set(made)) > 8 + 8 + 3 * 8 + 8      # of one whole run: nothing is made twice
    assert [line for line in log if line.get("there")]          # killed runs left something to go on from


def test_two_ranks_write_the_bytes_of_one(parts, whole, tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    argv = ["all", *arguments(parts, tmp_path / "run")]
    children = [forked(argv, env | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert contents(tmp_path / "run") == contents(whole)


def test_a_second_run_on_the_folder_is_refused(parts, whole):
    import fcntl
    with open(whole / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="in use by another run"):
            run("pairs", parts, whole)


# ---- as official, and the real sample ----

def test_as_official_scores_echoes_and_filters_nothing(parts, tmp_path):
    run("all", parts, tmp_path, "--as_official")
    asked = {r["id"]: r["question"] for r in lines(tmp_path, "instructions")}
    for row in lines(tmp_path, "responses"):
        assert row["response"].startswith(asked[row["id"]]) and "\n" not in row["response"]
    pairs = lines(tmp_path, "pairs")
    assert len(pairs) == 8 and not lines(tmp_path, "faults") and not lines(tmp_path, "dropped")
    assert not any(p[role].startswith(p["question"]) for p in pairs for role in ("chosen", "rejected"))


MODELS = ("mistral-7b", "vicuna-7b", "vicuna-13b")


@pytest.fixture
def pds10(tmp_path):
    """A run's files from the published sample: its questions, images and three models' raw responses."""
    published = json.loads(need(PDS10 / "step3_sanity.json").read_text())
    questions = (PDS10 / "instructions.txt").read_text().splitlines()
    prompts = (PDS10 / "prompts.txt").read_text().splitlines()
    said = {m: (PDS10 / "responses" / f"{m}.txt").read_text().splitlines() for m in MODELS}
    out = synth.Run(None, tmp_path)
    ids = [row["id"] for row in published]
    out.write("ranked", [{"id": i, "topic": "art", "prompt": p, "image": row["image"], "guidance": 7.,
                          "dropped": None} for i, p, row in zip(ids, prompts, published, strict=True)])
    out.write("instructions", [{"id": i, "question": q.replace("<image>", "").strip()}
                               for i, q in zip(ids, questions, strict=True)])
    out.write("responses", [{"id": i, "model": m, "response": said[m][k], "finished": None}
                            for k, i in enumerate(ids) for m in MODELS])
    scores = []
    for k, row in enumerate(published):
        wanted = [row[role][1]["value"] for role in ("conversations", "rejected_conversations")]
        for m in MODELS:                # 2 for what was chosen, 0 for what was rejected, 1 for the third
            text = said[m][k][len(questions[k].replace("<image>", "").strip()):].strip()
            scores.append({"id": row["id"], "model": m, "score": float(2 * (text == wanted[0])
                                                                        + (text not in wanted))})
    out.write("scores-given", scores)
    return tmp_path, published


def test_the_published_sample_is_reproduced_with_its_faults(pds10):
    out, published = pds10
    synth.main(["pairs", "--out", str(out), "--scorer", "given", "--as_official"])
    assert json.loads((out / "pds_dpo.json").read_text()) == published


def test_the_published_samples_faults_are_named(pds10):
    out, published = pds10
    synth.main(["pairs", "--out", str(out), "--scorer", "given"])
    named = {(r["id"], r["model"]): r["faults"] for r in lines(out, "faults")}
    assert len(named) == 30 and all("echoed" in f for f in named.values())
    assert {k for k, f in named.items() if "empty" in f} == {("art-2", "mistral-7b"), ("art-3", "mistral-7b")}
    assert {k for k, f in named.items() if "foreign" in f} == {("art-4", "vicuna-7b")}
    assert {k for k, f in named.items() if "cut off" in f} == {("art-5", "vicuna-13b")}   # "... then using"
    assert lines(out, "pairs") == [] and len(lines(out, "dropped")) == 10


def test_without_their_echo_the_faulty_four_are_not_rejected_but_left_out(pds10):
    """With the echo taken off beforehand the empty, foreign and cut-off responses go, a third one stays."""
    out, published = pds10
    asked = {r["id"]: r["question"] for r in lines(out, "instructions")}
    rows = [r | {"response": pairing.unecho(asked[r["id"]], r["response"]).strip()}
            for r in lines(out, "responses")]
    synth.Run(None, out).write("responses", rows)
    synth.main(["pairs", "--out", str(out), "--scorer", "given", "--margin", "0"])
    assert len(lines(out, "faults")) == 4
    official = {p["id"]: p["rejected_conversations"][1]["value"] for p in published}
    kept = {p["id"]: p["rejected"] for p in lines(out, "pairs")}
    changed = [i for i in official if kept[i] != official[i]]
    assert len(kept) == 10 and changed == ["art-2", "art-3", "art-4", "art-5"]


def test_the_forty_real_candidates_are_ranked(parts, tmp_path):
    folder = need(PDS10 / "candidates")
    chosen, out = json.loads((folder / "selection.json").read_text()), synth.Run(None, tmp_path)
    (tmp_path / "images").symlink_to(folder.resolve())
    out.write("prompts", [{"id": c["id"], "number": k + 1, "topic": "art", "prompt": c["prompt"]}
                          for k, c in enumerate(chosen)])
    out.write("images", [{"id": f"{c['id']}-{k + 1}", "prompt_id": c["id"], "guidance": x["guidance_scale"],
                          "seed": x["seed"], "image": f"images/{x['file']}"}
                         for c in chosen for k, x in enumerate(c["candidates"])])
    run("rank", parts, tmp_path)
    ranked = lines(tmp_path, "ranked")
    scores = [r["scores"]["imagereward"] for r in ranked]
    assert [len(s) for s in scores] == [4] * 10 and len({x for s in scores for x in s}) == 40
    assert len({r["guidance"] for r in ranked}) > 1


# ---- faults and pairs ----

@pytest.mark.parametrize("response, finished, found", [
    ("A cup stands on the table.", None, []),
    ("", None, ["empty"]), (" \n . ", None, ["empty"]),
    ("What is on\nthe table? A cup.", None, ["echoed"]),
    ("<image> what is on the table?", None, ["echoed", "empty"]),
    ("стол", None, ["foreign"]), ("A cup of tea. Чашка.", None, []), ("一个杯子", None, ["foreign"]),
    ("42", None, []), ("Yes", None, []), ("A cup, and beside it", False, ["cut off"]),
    ("A cup stands on the table and beside it there is a plate with an", None, ["cut off"]),
    ("A cup stands on the table and beside it there is a plate with an", True, []),
    ("<think>They ask for a cup.</think> A cup.", True, ["thoughts"]),
    ("A table, so </reasoning> A cup.", True, ["thoughts"]),
    ("<thinking>They ask for", False, ["cut off", "thoughts"])])
def test_faults_of_a_response(response, finished, found):
    assert pairing.faults("What is on the table?", response, finished) == found


def select(scores, responses=None, **options):
    rows = [{"id": "a", "model": m, "response": (responses or {}).get(m, f"It is the answer {m}."),
             "finished": True} for m in scores]
    prompt = {"id": "a", "image": "a.png", "question": "What is it?", "topic": "art", "prompt": "A cup.",
              "guidance": 5.}
    scores = {("a", m): s for m, s in scores.items() if s is not None}
    return pairing.select([prompt], {"a": rows}, scores, **options)


def test_the_best_is_chosen_and_the_worst_rejected_the_first_of_equals():
    (pair,), dropped, faulty = select({"x": 1., "y": 3., "z": 3., "w": 1.})
    assert pair["meta"] == {"topic": "art", "prompt": "A cup.", "guidance": 5., "models": ["y", "x"],
                            "scores": [3., 1.]}
    assert pair["chosen"] == "It is the answer y." and not dropped and not faulty


@pytest.mark.parametrize("scores, responses, options, reason", [
    ({"x": 1., "y": 1.}, {}, {}, "nearly tied"),
    ({"x": 1., "y": 1.1, "z": 1.2}, {}, {"margin": 3.}, "nearly tied"),
    ({"x": 2., "y": 1.}, {"x": "It is.", "y": "It  is."}, {}, "identical"),
    ({"x": 2., "y": 1.}, {"x": ""}, {}, "fewer than two responses without fault"),
    ({"x": 2., "y": None}, {}, {}, "fewer than two responses without fault")])
def test_what_makes_no_pair_and_why(scores, responses, options, reason):
    pairs, dropped, _ = select(scores, responses, **options)
    assert not pairs and [d["reason"] for d in dropped] == [reason]


def test_a_response_that_the_scorer_did_not_see_is_named():
    for official in (False, True):
        *_, faulty = select({"x": 2., "y": None, "z": 1.}, official=official)
        assert [(row["model"], row["faults"]) for row in faulty] == [("y", ["not scored"])]


def test_official_takes_ties_and_empty_responses():
    (pair,), dropped, faulty = select({"x": 1., "y": 1.}, {"y": ""}, official=True)
    assert pair["chosen"] == pair["rejected"] and not dropped and not faulty


def test_a_length_gap_is_warned_of():
    even = [{"chosen": "a b c", "rejected": "a b c"}, {"chosen": "a", "rejected": "a b"},
            {"chosen": "a b", "rejected": "a"}]
    assert "longer in 50% of the pairs" in pairing.length_report(even)
    assert "WARNING" not in pairing.length_report(even)
    assert "80%" in pairing.length_report(even[2:] * 4 + even[1:2])
    assert "shorter answers" in pairing.length_report(even[1:2] * 3)


def test_the_papers_five_attributes_in_place_of_the_gated_score(parts, whole, tmp_path):
    for name in ("ranked", "instructions", "responses", "scores-armorm"):
        (tmp_path / f"{name}.jsonl").write_bytes((whole / f"{name}.jsonl").read_bytes())
    run("pairs", parts, tmp_path, "--set", "attributes=paper")
    rows = {(r["id"], r["model"]): sum(r["rewards"][:5]) / 5 for r in lines(tmp_path, "scores-armorm")}
    for pair in lines(tmp_path, "pairs"):
        assert pair["meta"]["scores"] == [rows[pair["id"], m] for m in pair["meta"]["models"]]


@pytest.mark.parametrize("scorer", ["length", "random"])
def test_controls_score_without_a_model(parts, whole, tmp_path, scorer):
    for name in ("ranked", "instructions", "responses"):
        (tmp_path / f"{name}.jsonl").write_bytes((whole / f"{name}.jsonl").read_bytes())
    (tmp_path / "images").symlink_to(whole / "images")
    run("score", parts, tmp_path, "--scorer", scorer)
    run("pairs", parts, tmp_path, "--scorer", scorer)
    scores, said = lines(tmp_path, f"scores-{scorer}"), lines(tmp_path, "responses")
    assert len(scores) == len(said)
    if scorer == "length":
        assert [s["score"] for s in scores] == [len(r["response"].split()) for r in said]


def test_the_card_names_models_revisions_licences_and_counts(parts, whole):
    card = (whole / "card.md").read_text()
    for text in ("- generator sd3: ", "- responders llava2: ", "not stated in its folder", "- margin: 0"):
        assert text in card
    (parts / "armorm" / "README.md").write_text("---\nlicense: llama3\n---\n")
    assert pairing.licence(str(parts / "armorm")) == "llama3"
    (parts / "armorm" / "README.md").unlink()
    assert f"- generator sd3: files {command.identity(parts / 'sd3')}, licence " in card


# ---- prompts ----

def test_ten_topics_of_thirty_prompts_of_our_own_without_near_duplicates():
    both = prompts.read(ROOT / "synthesis" / "topics")
    named = ("art culinary daily_activities holidays industrial nature school transportation urban "
             "weather").split()
    assert sorted({t for t, _ in both}) == named
    assert all(sum(t == name for t, _ in both) >= 30 for name in named)
    texts = [text for _, text in both]
    assert len(prompts.distinct(texts, .25)) == len(texts) >= 300
    assert all(8 <= len(text.split()) <= 30 and text.endswith(".") for text in texts)
    assert max(analyses.alike([texts])) < .15


def test_a_byte_order_mark_goes_and_emoji_are_a_prompt(parts, tmp_path):
    lines_of = ("\ufefftwo red balls beside a blue box", "🐶🐱🐚", "🐶🐱🐚", "a green cup on a table")
    (tmp_path / "odd.txt").write_text("\r\n".join(lines_of), encoding="utf-8")
    run("prompts", parts, tmp_path, f"--prompts={tmp_path / 'odd.txt'}")
    assert [row["prompt"] for row in lines(tmp_path, "prompts")] == [
        "two red balls beside a blue box", "🐶🐱🐚", "a green cup on a table"]


def test_near_duplicates_are_dropped_and_the_first_is_kept():
    texts = ["A red bike on a beach.", "a red  bike on a beach", "A blue bike in a garden.", "",
             "A red bike on a hill."]
    assert prompts.distinct(texts, .5) == [0, 2]             # the hill shares four of six word pairs
    assert prompts.distinct(texts, .7) == [0, 2, 4]


def test_saved_replies_write_prompts_and_questions(parts, tmp_path):
    lists = "1. A horse of clay on a sill.\n2. A horse of clay on a sill!\n\n- Two masks."
    said = [{"id": "art/0", "reply": lists},
            {"id": "art/1", "reply": "Two masks.\nA chalk fish on a wet street."}]
    said += [{"id": f"art/{k}", "reply": "Two masks."} for k in range(2, 6)]
    (tmp_path / "said.jsonl").write_text("".join(json.dumps(x) + "\n" for x in said))
    writer = f"--writer={tmp_path / 'said.jsonl'}"
    run("prompts", parts, tmp_path, writer, "--set", "topics=art", "--per_topic=20")
    assert [(r["id"], r["prompt"]) for r in lines(tmp_path, "prompts")] == [
        ("art-1", "A horse of clay on a sill."), ("art-2", "Two masks."),
        ("art-3", "A chalk fish on a wet street.")]


class Server:
    """An OpenAI-compatible server of one thread: `fails` answers of each kind before a good one."""
    def __init__(self, reply, fails=(), broken=()):
        import http.server
        import threading
        self.asked, plan = [], list(fails)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                text = json.dumps(body["messages"])
                self.asked.append(text)
                status, content = plan.pop(0) if plan else (200, None)
                if any(word in text for word in broken):
                    status, content = 200, "{not json"
                if content is None:
                    content = json.dumps({"choices": [{"message": {"content": reply(text)}}]})
                handler.send_response(status)
                handler.send_header("Content-Type", "application/json")
                handler.send_header("Retry-After", "0")
                handler.end_headers()
                handler.wfile.write(content.encode())

            def log_message(handler, *_):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def test_a_servers_failures_are_retried_then_counted(parts, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(ask, "BACKOFF", .01)
    for name in ("prompts", "images", "ranked"):
        (tmp_path / f"{name}.jsonl").write_bytes((whole / f"{name}.jsonl").read_bytes())
    (tmp_path / "images").symlink_to(whole / "images")
    fails = [(429, "{}"), (500, "{}"), (200, "<html>")]
    server = Server(lambda text: "what is this ?", fails, broken=["two dog"])
    run("instruct", parts, tmp_path, f"--instruct={server.url}")
    log = lines(tmp_path, "log")[-1]
    assert (log["questions"], log["failed"]) == (6, 2)      # two of the eight prompts are of "two dog"
    assert len(lines(tmp_path, "instructions")) == 6
    asked = len(server.asked)
    assert asked <= 6 + 3 + 2 * 4                           # bounded: four attempts of each
    server.close()
    again = Server(lambda text: "is there a dog ?")
    run("instruct", parts, tmp_path, f"--instruct={again.url}")
    again.close()
    first = Server(lambda text: "a red cat .")              # another port is another source: asked anew
    run("respond", parts, tmp_path, f"--responders={first.url}")
    assert {r["response"] for r in lines(tmp_path, "responses")} == {"a red cat ."}
    assert all("data:image/png;base64," in text for text in first.asked)
    made = len(first.asked)
    run("respond", parts, tmp_path, f"--responders={first.url}")
    assert len(first.asked) == made
    first.close()


def test_a_servers_replies_are_kept_as_they_come(parts, whole, tmp_path):
    """Killed while the server is silent, a run keeps every reply: called again, it asks only for the rest."""
    import threading
    for name in ("ranked", "instructions"):
        shutil.copy(whole / f"{name}.jsonl", tmp_path)
    (tmp_path / "images").symlink_to(whole / "images")
    silent = threading.Event()

    def reply(text):
        if len(server.asked) > 5:
            silent.wait(60)
        return "a red cat ."
    server = Server(reply)
    argv = ["respond", *arguments(parts, tmp_path, f"--responders={server.url}")]
    child, deadline = forked(argv), time.time() + 60
    part = tmp_path / "parts" / f"respond-127.0.0.1-{server.server.server_address[1]}-v1.jsonl"
    while time.time() < deadline and not (part.exists() and len(part.read_text().splitlines()) == 5):
        time.sleep(.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(data.read_jsonl(part))) == 5
    silent.set()
    server.asked.clear()
    synth.main(argv)
    server.close()
    assert len(server.asked) == 3 and len(lines(tmp_path, "responses")) == 8


@pytest.mark.slow
def test_a_real_server_answers_prompts_instruct_and_respond(parts, whole, tmp_path):
    """`transformers serve` on loopback with a tiny LLaVA, where its packages are installed."""
    import socket
    import subprocess
    import urllib.request

    from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor
    for name in ("fastapi", "uvicorn", "openai", "typer"):
        pytest.importorskip(name, reason=f"`transformers serve` needs {name} (transformers[serving])")
    model = shutil.copytree(parts / "llava0", tmp_path / "llava")
    words = AutoTokenizer.from_pretrained(model)
    LlavaProcessor(CLIPImageProcessorPil.from_pretrained(model), words, patch_size=14,
                   vision_feature_select_strategy="default", num_additional_image_tokens=1,
                   chat_template=words.chat_template).save_pretrained(model)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    server = subprocess.Popen([*program, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"])
    url, out = f"http://127.0.0.1:{port}/v1", tmp_path / "run"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None
                time.sleep(.5)
        served = ["--set", f"model_name={model}"]
        run("prompts", parts, out, f"--writer={url}", "--set", "topics=art,urban", "--per_topic=1", *served)
        assert {r["topic"] for r in lines(out, "prompts")} <= {"art", "urban"} and lines(out, "prompts")
        for name in ("prompts", "images", "ranked"):
            (out / f"{name}.jsonl").write_bytes((whole / f"{name}.jsonl").read_bytes())
        (out / "images").symlink_to(whole / "images")
        run("instruct", parts, out, f"--instruct={url}", *served)
        assert lines(out, "log")[-1]["failed"] == 8 - len(lines(out, "instructions"))
        (out / "instructions.jsonl").write_bytes((whole / "instructions.jsonl").read_bytes())
        run("respond", parts, out, f"--responders={url}", *served)
        assert len(lines(out, "responses")) + lines(out, "log")[-1]["failed"] == 8
        assert any(r["response"] for r in lines(out, "responses"))
    finally:
        server.kill()
        server.wait()


# ---- responders ----

def write_llava_next(folder):
    """LLaVA-1.6's own classes with random weights, and an old processor's missing patch size -> its parts."""
    from conftest import word_tokenizer
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
    )
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                       num_attention_heads=2, image_size=28, patch_size=14),
        text_config=LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                num_attention_heads=2, vocab_size=len(tokenizer), bos_token_id=2,
                                eos_token_id=3, pad_token_id=1),
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]], image_token_index=4)
    model = LlavaNextForConditionalGeneration(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=.4)
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=size,
                                        image_grid_pinpoints=config.image_grid_pinpoints)
    processor = LlavaNextProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                                   num_additional_image_tokens=1, chat_template=tokenizer.chat_template)
    processor.save_pretrained(folder)
    text = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(text | {"patch_size": None}))
    return model, processor


def test_llava_next_answers_as_transformers_does_alone_and_in_a_batch(tmp_path):
    """It is loaded and asked as LLaVA-1.5 is: left padding, one BOS, images of several sizes in a batch."""
    model, processor = write_llava_next(tmp_path)
    questions, texts = [], ["what is this ?", "is there a red dog and a blue cat ?", "what ?"]
    for k, shape in enumerate(((40, 30), (30, 60), (28, 28))):
        picture(k, shape).save(tmp_path / f"{k}.png")
        questions.append(ask.Question(str(k), texts[k], [tmp_path / f"{k}.png"]))
    together = ask.ask(tmp_path, questions, max_tokens=8)
    for question in questions:
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}]
        text = processor.apply_chat_template(asked, add_generation_prompt=True)
        image = data.read_image(question.images[0])
        inputs = processor(images=[image], text=[text], add_special_tokens=False, return_tensors="pt")
        new = model.generate(**inputs, do_sample=False, max_new_tokens=8, pad_token_id=1)
        new = new[0, inputs["input_ids"].shape[1]:].tolist()
        said = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        assert together[question.id]["reply"] == said
        assert (together[question.id]["finish"] == "stop") == (3 in new)
        alone = ask.ask(tmp_path, [question], max_tokens=8)
        assert alone[question.id] == together[question.id]
    assert len({row["reply"] for row in together.values()}) > 1


def test_as_official_the_prompt_is_raw_and_the_response_begins_with_the_question(parts, whole, tmp_path):
    from model import generation, vlm
    for name in ("ranked", "instructions"):
        shutil.copy(whole / f"{name}.jsonl", tmp_path)
    (tmp_path / "images").symlink_to(whole / "images")
    run("respond", parts, tmp_path, f"--responders={parts / 'llava0'}", "--as_official")
    asked = {r["id"]: r["question"] for r in lines(tmp_path, "instructions")}
    images = {r["id"]: r["image"] for r in lines(tmp_path, "ranked")}
    m = vlm.load(parts / "llava0", template=prompts.RAW)
    assert "USER" not in m.front.template
    for row in lines(tmp_path, "responses"):
        question = asked[row["id"]]
        said, = generation.generate(m, [[data.read_image(tmp_path / images[row["id"]])]], [question], 24)
        assert row["response"] == f"{question} {said}".replace("\n", " ")


@pytest.mark.parametrize("finish, finished", [("stop", True), ("length", False), (None, None), ("odd", None)])
def test_a_response_says_whether_the_model_ended_it(finish, finished):
    row = synth.response("What?", {"reply": "A\ndog.", "finish": finish}, as_official=False)
    assert row == {"response": "A\ndog.", "finished": finished}


def test_a_urls_secrets_are_in_no_name():
    assert synth.named("http://me:pw@host:8000/v1?key=k,a/llava") == {
        "host-8000-v1": "http://me:pw@host:8000/v1?key=k", "llava": "a/llava"}


# ---- analyses ----

def ranked_row(id, topic, pick, **scores):
    return {"id": id, "topic": topic, "prompt": f"<b>{id}</b>", "image": f"images/{pick}.png",
            "guidance": [5., 7., 9., 11.][pick], "dropped": None, "scores": scores,
            "candidates": [{"image": f"images/{k}.png", "guidance": g, "seed": k}
                           for k, g in enumerate([5., 7., 9., 11.])]}


def test_guidance_shares_and_agreement_by_hand():
    rows = [ranked_row("a", "art", 3, imagereward=[1, 2, 3, 4], clip=[4, 3, 2, 1], blip=[1, 2, 3, 4]),
            ranked_row("b", "urban", 0, imagereward=[4, 3, 2, 1], clip=[4, 3, 2, 1], blip=[4, 3, 2, 1])]
    assert analyses.guidance(rows) == {"all": {5.: .5, 7.: 0, 9.: 0, 11.: .5},
                                      "art": {5.: 0, 7.: 0, 9.: 0, 11.: 1},
                                      "urban": {5.: 1, 7.: 0, 9.: 0, 11.: 0}}
    table = {(tuple(r["rankers"]), r["k"]): (r["agree"], r["chance"]) for r in analyses.agreement(rows)}
    assert table[("imagereward", "clip"), 1] == (.5, .25)
    assert table[("imagereward", "clip"), 3] == pytest.approx((5 / 6, .75))
    assert table[("imagereward", "blip"), 2] == (1., .5)
    assert [table[("imagereward", "clip", "blip"), k][1] for k in (1, 2, 3)] == [.0625, .25, .5625]


def test_similarity_is_the_mean_cosine_with_the_others_of_a_group():
    """Of word counts weighted by rarity in all texts; an empty text is like none."""
    texts = ["a red red cat", "a red cat", "two dogs and a bike"]
    words = sorted({word for text in texts for word in text.split()} | {"more"})
    counts = np.array([[text.split().count(word) for word in words] for text in [*texts, "more", ""]])
    weighted = counts * np.log(6 / (counts > 0).sum(0))
    unit = weighted / np.maximum(1e-9, np.linalg.norm(weighted, axis=1, keepdims=True))
    cosines = unit @ unit.T
    means = [(cosines[k, :3].sum() - 1) / 2 for k in range(3)]
    assert analyses.alike([texts, ["more"], [""]]) == pytest.approx(means)
    assert analyses.alike([["a cat", "", "A cat!"]]) == pytest.approx([.5, 0, .5])


@pytest.mark.parametrize("k, n, low, high", [(0, 10, 0, .2775), (5, 10, .2366, .7634), (10, 10, .7225, 1)])
def test_wilsons_interval(k, n, low, high):
    """Values of Wilson's score interval at 95%, as tables print them."""
    assert pds.wilson(k, n) == pytest.approx([low, high], abs=5e-5)


def test_prompts_keep_emoji_and_lose_a_byte_order_mark(tmp_path):
    (tmp_path / "odd.txt").write_bytes("\ufefftwo red balls\r\n🐶🐱🚗\r\na green cup\r\n".encode())
    kept = [line for _, line in prompts.read(tmp_path)]
    assert kept == ["two red balls", "🐶🐱🚗", "a green cup"] and prompts.distinct(kept, .5) == [0, 1, 2]


def test_of_a_chat_models_replies_thoughts_and_cut_off_ones_make_no_question():
    rows = {"a": {"reply": "<think>What, or where?</think>\nWhere is it?", "finish": "stop"},
            "b": {"reply": "What is the", "finish": "length"}, "c": {"reply": "<think>Hm", "finish": None}}
    assert prompts.said(rows) == {"a": "Where is it?", "c": ""}
    for finish, faults in (("stop", []), ("length", ["cut off"]), ("content_filter", ["cut off"]), ({}, [])):
        found = synth.response("What?", {"reply": "A red cat.", "finish": finish}, False)
        assert pairing.faults("What?", found["response"], found["finished"]) == faults


def test_a_judge_reads_both_pictures_in_random_order_ties_apart(parts, whole, tmp_path):
    """A judge that always says A prefers the first ranker as often as it stands first; C means nothing."""
    rows = [ranked_row(f"p{k}", "art", 0, imagereward=[4, 3, 2, 1], clip=[1, 2, 3, 4]) for k in range(40)]
    rows[0]["scores"]["clip"] = [4, 3, 2, 1]
    (tmp_path / "images").mkdir()
    for k in range(4):
        picture(k).save(tmp_path / "images" / f"{k}.png")
    said = ["A"] * 30 + ["tie"] * 5 + ["neither"] * 5
    (tmp_path / "said.jsonl").write_text("".join(json.dumps({"id": f"p{k}", "reply": said[k]}) + "\n"
                                                 for k in range(40)))
    o = synth.Options()
    found = analyses.judged(synth.Run(o, tmp_path), rows, str(tmp_path / "said.jsonl"))
    assert found["same_pick"] == 1 and found["ties"] == 5 and found["unread"] == 5
    assert found["wins"] + found["losses"] == 29 and 5 < found["wins"] < 24
    assert found["win_rate"] == found["wins"] / 29 and found["interval"] == pds.wilson(found["wins"], 29)
    (tmp_path / "said.jsonl").write_text('{"id": "p1", "reply": "A, since it", "finish": "length"}\n'
                                         '{"id": "p2", "reply": "<think>B? No.</think>\\ntie"}\n')
    found = analyses.judged(synth.Run(o, tmp_path), rows, str(tmp_path / "said.jsonl"))
    assert (found["ties"], found["not_answered"], found["win_rate"]) == (1, 38, None)
    assert found["interval"] == [0, 1]


def test_the_papers_analyses_of_a_run(whole, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analyses.py", str(whole)])
    analyses.main()
    found = json.loads((whole / "analysis.json").read_text())
    assert sum(found["guidance"]["all"].values()) == 1 and {*found["guidance"]} == {"all", "cats", "bikes"}
    assert found["agreement"] == [] and found["similarity"]["prompts"]["n"] == 8         # of one ranker
    (whole / "analysis.json").unlink()
    monkeypatch.setattr(sys, "argv", ["analyses.py", str(whole / "none")])
    with pytest.raises(SystemExit, match="analyses.py: .*ranked.jsonl is missing"):
        analyses.main()


def test_the_gallery_needs_nothing_else_and_escapes_what_it_shows(own_programs, parts, whole):
    run("analyse", parts, whole)
    page = (whole / "gallery.html").read_text()
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.count("data:image/png;base64,") >= 32 and page.count("picked</small>") == 8
    pairs = lines(whole, "pairs")
    assert page.count("<td>chosen</td>") == page.count("<td>rejected</td>") == len(pairs) > 0
    assert all(f"<th>{pair['question']}</th>" in page for pair in pairs)
    assert page.count("<h2>") == 8 and "<h2>a red cat and two dog</h2>" in page
    row = ranked_row("x", "art", 0, imagereward=[4, 3, 2, 1])
    pair = {"question": "<script>q", "chosen": "<img src=x>", "rejected": "<m>"}
    card = analyses.entry(synth.Run(None, whole), row, pair)
    assert "&lt;script&gt;q" in card
    assert not any(tag in card for tag in ("<script", "<img src=x", "<b>", "<m>"))
    tables = json.loads((whole / "analysis.json").read_text())
    assert {*tables} == {"guidance", "agreement", "judge", "similarity"}
    (whole / "gallery.html").unlink()
    (whole / "analysis.json").unlink()


# ---- the built-in default ----

def test_the_built_in_models_are_what_their_statistics_say():
    """Their size, the threshold by its rule, guidance that matters, a reward that prefers what is asked."""
    assert sum(f.stat().st_size for f in synth.BUILT_IN.rglob("*") if f.is_file()) < 14e6
    told = json.loads((synth.BUILT_IN / "statistics.json").read_text())
    true, other = (told[k]["imagereward"] for k in ("true pictures", "another prompt's picture"))
    assert told["threshold"] == pytest.approx((true + other) / 2, abs=.02)
    assert synth.PRESETS["classroom"]["threshold"] == pytest.approx(told["threshold"], abs=.05)
    scales = {float(g): row for g, row in told["guidance"].items()}
    best = max(scales, key=lambda g: scales[g]["imagereward"])
    assert 1 < best < max(scales)
    assert scales[0]["recall"] < 20 < scales[1]["recall"] < scales[best]["recall"]
    assert scales[best]["distance"] < scales[max(scales)]["distance"]
    assert told["imagereward prefers the true picture"] > 90


def test_the_tables_of_the_built_in_synthesis_are_what_its_files_say():
    """Line by line in classroom/README.md."""
    sys.path.insert(0, str(ROOT))
    from classroom import synthesis
    page = (ROOT / "classroom" / "README.md").read_text()
    assert all(line in page for line in synthesis.table())


def test_the_oracle_and_its_judge_go_by_the_prompt(tmp_path):
    """Its score is objects asked for minus others; its judge prefers the picture with the right object, and
    counts ties and prompts where both picked the same picture apart."""
    sys.path.insert(0, str(ROOT))
    from PIL import Image

    from classroom import world
    from classroom.papers import scorers
    for k, colour in enumerate(("red", "blue")):
        s = world.Scene("street", (world.Thing("car", colour, ((0, 0, 17, 1, 1),)),))
        Image.fromarray(world.draw(s)).save(tmp_path / f"{k}.png")
    row = ranked_row("a", "street", 0, imagereward=[2, 1], clip=[1, 2])
    row |= {"prompt": "street with red car", "candidates": [{"image": "0.png"}, {"image": "1.png"}]}
    run = synth.Run(synth.Options(), tmp_path)
    tie = row | {"id": "b", "prompt": "street with red house"}
    same = row | {"id": "c", "scores": {"imagereward": [1, 2], "clip": [1, 2]}}
    run.write("ranked", [row, tie, same])
    run.write("responses", [{"id": "a", "model": m, "response": f"you can see {text} ."}
                            for m, text in (("x", "a car"), ("y", "a car , a house"), ("z", "two lamps"))])
    scorers.oracle(run)
    assert [r["score"] for r in run.rows("scores-oracle")] == [1, 0, -1]
    assert scorers.judge(run) == {"rankers": ["imagereward", "clip"], "wins": 1, "losses": 0, "ties": 1,
                                  "same_pick": 1}
    swapped = {"clip": [1, 2], "imagereward": [2, 1]}
    run.write("ranked", [row | {"scores": swapped}])
    assert scorers.judge(run)["losses"] == 1


# ---- the command line ----

@pytest.mark.parametrize("argv, says", [
    (["images", "--generator", "OUT", "--out", "OUT"], "prompts.jsonl is missing: run `python synth"),
    (["pairs", "--out", "OUT"], "ranked.jsonl is missing: run `python synth.py rank`"),
    (["all", "--preset", "mine", "--out", "OUT"], "give one of classroom, pds-dpo"),
    (["all", "--guidance", "5,x", "--out", "OUT"], "numbers with commas"),
    (["all", "--steps", "0", "--out", "OUT"], "must be a number above 0"),
    (["all", "--as_official", "perhaps", "--out", "OUT"], "unrecognized arguments: perhaps"),
    (["all", "--set", "dtype=int8", "--out", "OUT"], "give one of auto"),
    (["all", "--set", "nothing=1", "--out", "OUT"], "with KEY one of attributes, "),
    (["all", "--prompts", "/nowhere", "--out", "OUT"], "could not be read"),
    (["paint", "--out", "OUT"], "stage: paint: give one of all, prompts, images"),
    (["prompts", "--out", "/proc/nothing"], "cannot be written")])
def test_a_users_mistake_is_one_sentence(tmp_path, argv, says):
    with pytest.raises(SystemExit, match=says):
        synth.main([str(tmp_path) if word == "OUT" else word for word in argv])


@pytest.mark.parametrize("stage, option, says", [
    ("images", "--generator=", "--generator is missing"), ("images", "--generator=/nowhere", "no such file"),
    ("rank", "--imagereward=", "--imagereward is missing"), ("rank", "--ranker=best", "--ranker best is not"),
    ("respond", "--responders=", "--responders is missing"), ("score", "--armorm=", "--armorm is missing"),
    ("score", "--scorer=taste", "--scorer taste is not")])
def test_a_missing_model_is_one_sentence(parts, whole, stage, option, says):
    with pytest.raises(SystemExit, match=says):
        run(stage, parts, whole, option)


def test_help_names_every_option_within_the_limit():
    import dataclasses
    import io
    from contextlib import redirect_stdout
    with redirect_stdout(io.StringIO()) as text, pytest.raises(SystemExit):
        synth.main(["--help"])
    fields = dataclasses.fields(synth.Options)
    behind = [f.name for f in fields if f.metadata.get("behind_set")]
    assert len(fields) - len(behind) == 24 and all(f.metadata["help"] for f in fields)
    for field in fields:
        assert (f"  {field.name}=" if field.name in behind else f"  --{field.name}") in text.getvalue()
    assert max(map(len, text.getvalue().splitlines())) <= 80
