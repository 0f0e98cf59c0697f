"""synth.py as specification: every stage, kills, ranks, the real data, the published faults, the analyses."""
import json

import pytest
import torch
from conftest import SHARED, write_llava
from test_rewards import PATTERN, tiny_armorm, tiny_imagereward

import data
import synth

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
    pieces = [("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), *((c, -2.) for c in "▁abcdefghijklmnopqrstuvwxyz.,")]
    t5_model = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=32, d_kv=8, d_ff=32, num_layers=1,
                                       num_heads=2)).eval()
    transformer = SD3Transformer2DModel(
        sample_size=size // 2, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        out_channels=4, pos_embed_max_size=16)
    for name, weight in transformer.named_parameters():     # else its last layer, all zeros, hides the prompt
        if weight.ndim > 1 and "pos_embed" not in name:
            torch.nn.init.normal_(weight, std=.2)
    vae = AutoencoderKL(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1,
                        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
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
        write_llava(folder / f"llava{k}", seed=k)
    for topic in ("cats", "bikes"):
        ends = ("a blue dog", "two dog", "no bike", "one cat , a dog")
        (folder / "prompts" / f"{topic}.txt").write_text("\n".join(f"a red {topic[:-1]} and {e}" for e in ends))
    (folder / "questions.txt").write_text("what is this ?\nis there a dog ?\n")
    return folder


def arguments(parts, out, *more):
    folders = {"prompts": "prompts", "generator": "sd3", "imagereward": "imagereward", "armorm": "armorm",
               "instruct": "questions.txt"}
    given = {"out": out, "preset": "pds-dpo", "steps": 2, "size": 0, "threshold": -1000, "batch": 3,
             "margin": 0, "device": "cpu", "responders": ",".join(str(parts / f"llava{k}") for k in range(3)),
             **{k: parts / name for k, name in folders.items()}}
    given = [f"--{k}={v}" for k, v in given.items()]
    return [*given, "--set", "similar=0.9", "--set", "max_new_tokens=6", *more]


def run(stage, parts, out, *more):
    synth.main([stage, *arguments(parts, out, *more)])
    return Path(out)


def lines(out, name):
    return list(data.read_jsonl(out / f"{name}.jsonl"))


FILES = ("prompts", "images", "ranked", "instructions", "responses", "scores-armorm", "pairs")


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
    from records import Records, check
    native, published = (Records(str(whole / name)) for name in ("pairs.jsonl", "pds_dpo.json"))
    assert len(check(native)) == len(check(published)) == len(lines(whole, "pairs")) > 0
    for field in ("question", "chosen", "rejected"):
        assert [r[field] for r in native] == [r[field] for r in published]


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
    import responders
    import rewards
    seen = []

    def alone(f):
        def g(*args, **options):
            models = [m for m in gc.get_objects() if isinstance(m, torch.nn.Module) and hasattr(m, "config")]
            seen.append(len(models) - before)
            return f(*args, **options)
        return g
    gc.collect()
    before = len([m for m in gc.get_objects() if isinstance(m, torch.nn.Module) and hasattr(m, "config")])
    monkeypatch.setattr(sd3, "_load", alone(sd3._load))
    for module, name in ((rewards.ImageReward, "load"), (rewards.ArmoRM, "load"), (responders, "load")):
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
    encoded = sd3.encode(parts / "sd3", [prompt])
    ours = sd3.Painter(parts / "sd3")(encoded[prompt], encoded[""], scales, seeds, steps=3)
    theirs = [plain(parts / "sd3", prompt, g, s) for g, s in zip(scales, seeds, strict=True)]
    assert max(map(steps_apart, ours, theirs)) <= 1
    assert min(steps_apart(ours[0], other) for other in ours[1:]) > 1            # the test can fail
    assert steps_apart(ours[0], plain(parts / "sd3", "two bikes", 5, 1001)) > 1


def test_a_generator_saved_without_t5_is_loaded_without_it(tmp_path):
    tiny_sd3(tmp_path, t5=False)
    encoded = sd3.encode(tmp_path, ["a red cat"])
    ours, = sd3.Painter(tmp_path)(encoded["a red cat"], encoded[""], [7], [3], steps=2)
    from diffusers import StableDiffusion3Pipeline
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    theirs = pipeline("a red cat", guidance_scale=7., num_inference_steps=2,
                      generator=torch.Generator().manual_seed(3)).images[0]
    assert steps_apart(ours, theirs) <= 1


# ---- kills, ranks ----

def forked(argv, env=(), wait=None):
    """synth.main(argv) in a forked child (imports are done already); SIGKILL after `wait` seconds -> status."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
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


def test_twenty_kills_leave_the_same_files_and_make_nothing_twice(parts, whole, tmp_path):
    out, rng, killed = tmp_path / "run", random.Random(7), 0
    while killed < 20:
        killed += forked(["all", *arguments(parts, out)], wait=rng.uniform(.05, 1.)) == signal.SIGKILL
        if (out / "card.md").exists() and killed < 20:      # it came through: kill it in what is left to do
            stage = rng.choice(["images", "rank", "respond-llava1", "score-armorm"])
            (out / "parts" / f"{stage.split('-')[0] if stage == 'images' else stage}.jsonl").unlink()
            (out / "card.md").unlink()
    assert os.waitpid(forked(["all", *arguments(parts, out)]), 0)[1] == 0
    assert contents(out) == contents(whole)
    log = lines(out, "log")
    assert {line["twice"] for line in log if "twice" in line} == {0}
    assert len([line for line in log if line.get("there", 0) and line["there"] < line["items"]]) > 0


def test_two_ranks_write_the_bytes_of_one(parts, whole, tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children = [forked(["all", *arguments(parts, tmp_path / "run")], env | {"RANK": str(r), "LOCAL_RANK": str(r)})
                for r in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert contents(tmp_path / "run") == contents(whole)


def test_a_second_run_on_the_folder_is_refused(parts, whole):
    import fcntl
    with open(whole / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="in use by another run"):
            run("pairs", parts, whole)
