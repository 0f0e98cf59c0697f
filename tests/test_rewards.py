"""synthesis/rewards.py as specification: the published models' numbers from the published files' names."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, ROOT, need, picture
from safetensors.torch import load_file, save_file

import data
from classroom.synthesis import to_published
from synthesis import rewards

# float32's noise with random weights, on any processor. The mildest wrong choice errs by 0.8 in ImageReward
# (another epsilon of its layer norms), by 0.3 in ArmoRM (a transposed matrix).
NOISE = dict(abs=5e-4)
CLOSE = dict(abs=1e-4)


def cases(*names):
    """Every golden folder that holds files of these patterns, its name as the test's id."""
    found = [f for f in sorted(GOLDEN.glob("*")) if all(any(f.glob(name)) for name in names)]
    return [pytest.param(f, id=f.name) for f in found] or [pytest.param(GOLDEN, id="absent")]


# ---- ImageReward ----

@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """Loads a golden folder as the published files come: ImageReward.pt and vocab.txt."""
    loaded = {}

    def load(folder):
        if folder not in loaded:
            expected = json.loads(need(folder / "expected.json").read_text())
            out = tmp_path_factory.mktemp("imagereward")
            torch.save(load_file(folder / "state_dict.safetensors"), out / "ImageReward.pt")
            vision = expected["vision"] | {k: expected[k] for k in ("image_size", "patch_size")}
            config = {"vision": vision, "text": json.loads((folder / "med_config.json").read_text())}
            model = rewards.ImageReward.load(out / "ImageReward.pt", config, folder / "vocab.txt")
            loaded[folder] = model, expected
        return loaded[folder]
    return load


@pytest.mark.golden
@pytest.mark.parametrize("folder", cases("state_dict.safetensors", "med_config.json", "expected.json"))
def test_imagereward_equals_the_official_package(reward, folder):
    model, expected = reward(folder)
    for case in expected["cases"]:
        encoded = model.tokenizer(case["prompt"], padding="max_length", truncation=True, max_length=35)
        assert encoded["input_ids"] == case["input_ids"]
        score, = model.score(case["prompt"], [folder / case["image"]])
        assert score == pytest.approx(case["score"], **NOISE), (case["prompt"], case["image"])


@pytest.mark.golden
@pytest.mark.parametrize("folder", cases("state_dict.safetensors", "med_config.json", "expected.json"))
def test_a_batch_of_images_scores_as_its_images_do(reward, folder):
    model, expected = reward(folder)
    for prompt in {case["prompt"]: 0 for case in expected["cases"]}:
        mine = [c for c in expected["cases"] if c["prompt"] == prompt]
        scores = model.score(prompt, [folder / c["image"] for c in mine])
        assert scores == pytest.approx([c["score"] for c in mine], **NOISE)


@pytest.mark.golden
@pytest.mark.parametrize("folder", cases("pixel_values.safetensors", "med_config.json", "expected.json"))
def test_pixels_equal_the_official_preparation(reward, folder):
    _, expected = reward(folder)
    for name, pixels in load_file(folder / "pixel_values.safetensors").items():
        ours = rewards.preprocess(rewards.opened(folder / name), expected["image_size"])
        assert torch.equal(ours, pixels.reshape(ours.shape)), name


@pytest.mark.parametrize("size", [(31, 47), (32, 33), (33, 32), (200, 67), (32, 32), (7, 5), (101, 32)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK"])
def test_every_size_and_mode_becomes_a_square(size, mode):
    assert rewards.preprocess(picture(1, size).convert(mode), 32).shape == (3, 32, 32)


def test_the_published_file_has_625_tensors_and_our_names_go_there_and_back():
    sys.path.append(str(ROOT / "bench"))
    from imagereward import UNUSED, published_shapes
    shapes = published_shapes()
    assert len(shapes) == 625
    numbers = [torch.Size(s).numel() for k, s in shapes.items() if not k.endswith("position_ids")]
    assert sum(numbers) == pytest.approx(446.67e6, rel=1e-5)
    assert shapes["blip.visual_encoder.blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert shapes["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"] == (768, 1024)
    assert shapes["mlp.layers.7.weight"] == (1, 16)
    assert {name for name in shapes if name.startswith(rewards.DROPPED)} == {*UNUSED}
    for name in shapes.keys() - UNUSED.keys():
        assert to_published(rewards.to_ours(name)) == name


def tiny_imagereward(folder, size=32, **options):
    """A random ImageReward in the published names, with config.json and vocab.txt beside it."""
    torch.manual_seed(3)
    config = {"vision": {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "intermediate_size": 32, "image_size": size, "patch_size": 16},
              "text": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 14,
                       "intermediate_size": 24, "encoder_hidden_size": 24, "max_position_embeddings": 40}}
    model = rewards.ImageReward(config["vision"], config["text"])
    state = {to_published(k): torch.randn_like(x) * .3 for k, x in model.state_dict().items()}
    torch.save(state | options, folder / "ImageReward.pt")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(("[PAD] [UNK] [CLS] [SEP] [MASK] a red blue cat dog and "
                                                 "bike").split()))
    return folder


def test_a_config_is_a_path_or_a_dict_and_need_not_tell_a_pictures_size(tmp_path):
    folder = tiny_imagereward(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for name in ("image_size", "patch_size"):
        del config["vision"][name]
    pictures = [picture(k) for k in range(3)]
    scores = rewards.ImageReward.load(folder).score("a red cat", pictures)
    for given in (config, folder / "config.json", str(folder / "config.json")):
        model = rewards.ImageReward.load(folder / "ImageReward.pt", given, folder)
        assert model.score("a red cat", pictures) == scores
        assert model.score("a blue dog", pictures) != scores
    assert len(set(scores)) == 3


@pytest.mark.parametrize("spoil, says", [
    (lambda f: (f / "vocab.txt").unlink(), "vocab.txt is missing"),
    (lambda f: (f / "ImageReward.pt").write_bytes(b"torn"), "cannot be read as weights"),
    (lambda f: (f / "ImageReward.pt").unlink(), "not ImageReward's state dict"),
    (lambda f: (f / "config.json").write_text("{"), "broken JSON"),
    (lambda f: torch.save({"a": torch.ones(1)}, f / "ImageReward.pt"), "not ImageReward's state dict"),
    (lambda f: torch.save({"a": subprocess.run}, f / "ImageReward.pt"), "cannot be read as weights"),
    (lambda f: tiny_imagereward(f, extra=torch.ones(1)), "does not fit its config"),
    (lambda f: (f / "config.json").write_text('{"vision": {}, "text": {}}'), "does not fit its config"),
    (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace(
        '"intermediate_size": 32', '"intermediate_size": 48')), "does not fit its config")])
def test_what_does_not_fit_is_a_sentence(tmp_path, spoil, says):
    folder = tiny_imagereward(tmp_path)
    spoil(folder)
    with pytest.raises(data.UserError, match=says):
        rewards.ImageReward.load(folder)


def test_a_broken_picture_is_a_sentence(tmp_path):
    model = rewards.ImageReward.load(tiny_imagereward(tmp_path))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for name, says in (("bad.png", "is unreadable"), ("none.png", "is missing")):
        with pytest.raises(data.UserError, match=says):
            model.score("a red cat", [tmp_path / name])


# ---- CLIP and BLIP ----

def bert_words(folder):
    from transformers import BertTokenizer
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue cat dog and bike".split()
    return BertTokenizer(vocab={w: k for k, w in enumerate(words)}, model_max_length=40)


@pytest.fixture
def clip(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    torch.manual_seed(0)
    letters = {c: k for k, c in enumerate([f"{x}{e}" for x in "abcdeiklorgtu" for e in ("", "</w>")])}
    vocab = letters | {"<|startoftext|>": len(letters), "<|endoftext|>": len(letters) + 1}
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small | {"vocab_size": len(vocab), "max_position_embeddings": 12,
                                             "eos_token_id": len(letters) + 1},
                        vision_config=small | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size),
                  CLIPTokenizer(vocab=vocab, merges=[])).save_pretrained(tmp_path)
    return tmp_path


def test_clip_scores_are_the_models_own_cosines_and_long_texts_are_cut(clip):
    from transformers import CLIPModel
    ours, theirs = rewards.Similarity.load(clip), CLIPModel.from_pretrained(clip).eval()
    pictures = [picture(k) for k in range(3)]
    inputs = ours.processor(text=["red cat"], images=pictures, return_tensors="pt")
    cosines = theirs(**inputs).logits_per_image[:, 0] / theirs.logit_scale.exp()
    assert ours.score("red cat", pictures) == pytest.approx(cosines.tolist(), abs=1e-6)
    texts = ["red cat", "a " * 40 + "dog"]
    first, _ = ours.cosines(pictures[:1], texts)[0].tolist()
    assert first == pytest.approx(cosines[0].item(), abs=1e-6)


def test_blip_scores_are_the_models_own_cosines(tmp_path):
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(
        text_config=small | {"vocab_size": 14, "max_position_embeddings": 40, "bos_token_id": 2,
                             "sep_token_id": 3},
        vision_config=small | {"image_size": 32, "patch_size": 16, "initializer_range": .2},
        image_text_hidden_size=8)
    model = BlipForImageTextRetrieval(config).eval()
    model.save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), bert_words(tmp_path)).save_pretrained(tmp_path)
    ours, pictures = rewards.Similarity.load(tmp_path), [picture(k) for k in range(3)]
    inputs = ours.processor(text=["a red cat"], images=pictures, return_tensors="pt")
    cosines = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask,
                    pixel_values=inputs.pixel_values, use_itm_head=False).itm_score[:, 0]
    assert ours.score("a red cat", pictures) == pytest.approx(cosines.tolist(), abs=1e-6)
    texts = ["a red cat", "a dog and a bike and a cat"]
    assert ours.cosines(pictures[:1], texts)[0, 0].item() == pytest.approx(cosines[0].item(), abs=1e-6)


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(data.UserError, match="neither clip nor blip"):
        rewards.Similarity.load(tmp_path)


# ---- ArmoRM ----

@pytest.fixture(scope="module")
def armorm(tmp_path_factory):
    """Loads every golden NAME of a folder as a published folder: config.json and model.safetensors."""
    def load(folder):
        for path in sorted(folder.glob("*_expected.json")) or [need(folder / "small_expected.json")]:
            name, out = path.name.removesuffix("_expected.json"), tmp_path_factory.mktemp("armorm")
            (out / "config.json").write_text((folder / f"{name}_config.json").read_text())
            (out / "model.safetensors").write_bytes((folder / f"{name}.safetensors").read_bytes())
            expected = json.loads(path.read_text())
            pattern = expected.get("token_pattern", rewards.LLAMA3)
            yield rewards.ArmoRM.load(out, token_pattern=pattern), expected
    return load


def check(out, row, case):
    assert out["rewards"][row].tolist() == pytest.approx(case["rewards"], **CLOSE)
    assert out["gating"][row].tolist() == pytest.approx(case["gating_output"], **CLOSE)
    assert out["score"][row].item() == pytest.approx(case["score"], **CLOSE)


@pytest.mark.golden
@pytest.mark.parametrize("folder", cases("*_expected.json", "*_config.json"))
@pytest.mark.parametrize("side", ["single", "right", "left"])
def test_armorm_equals_the_published_code(armorm, folder, side):
    for model, expected in armorm(folder):
        rows, pad = list(expected["cases"].values()), expected["pad_token_id"]
        if side == "single":
            for case in rows:
                ids = torch.tensor([case["input_ids"]])
                assert model.prompt_end(ids, ids == ids) == [case["gating_position"]]
                check(model(ids), 0, case)
                check(model(ids, torch.ones_like(ids)), 0, case)
            continue
        width = 3 + max(len(case["input_ids"]) for case in rows)
        gaps = [[0] * (width - len(case["input_ids"])) for case in rows]
        order = (lambda ids, gap: ids + gap) if side == "right" else (lambda ids, gap: gap + ids)
        both = list(zip([c["input_ids"] for c in rows], gaps, strict=True))
        ids = torch.tensor([order(real, [pad] * len(gap)) for real, gap in both])
        out = model(ids, torch.tensor([order([1] * len(real), gap) for real, gap in both]))
        for row, case in enumerate(rows):
            check(out, row, case)


WORDS = "<pad> <s> <end> <u> <a> <sep> what is this ? a cup cat red I see . no yes".split()
PATTERN = (2, 4, 5)


def tiny_armorm(folder, **config):
    """A random ArmoRM of five objectives in the published names, with a tokenizer and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, pad_token_id=0, **config)
    sizes = {"regression_layer.weight": (5, 16), "reward_transform_matrix": (5, 5),
             "gating.layers.0.weight": (8, 16), "gating.layers.0.bias": (8,), "gating.logit_scale": (1,),
             "gating.layers.1.weight": (5, 8), "gating.layers.1.bias": (5,)}
    state = {k: torch.randn(size) for k, size in sizes.items()}
    state |= {f"model.{k}": x.clone() for k, x in LlamaModel(config).state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict() | {"gating_temperature": 10}))
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="."))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>")
    tokenizer.chat_template = ("<s>{% for m in messages %} {{ '<u>' if m.role == 'user' else '<a>' }} <sep> "
                               "{{ m.content }} <end>{% endfor %}")
    tokenizer.save_pretrained(folder)
    return folder


def test_answers_are_judged_in_batches_as_alone(tmp_path):
    model = rewards.ArmoRM.load(tiny_armorm(tmp_path), token_pattern=PATTERN)
    answers = ["a cup .", "", "I see a red cup . yes . a red cup .", "no"]
    together = model.judge("what is this ?", answers)
    assert [len(row["rewards"]) for row in together] == [5] * 4
    for answer, row in zip(answers, together, strict=True):
        alone, = model.judge("what is this ?", [answer])
        assert alone["rewards"] == pytest.approx(row["rewards"], abs=1e-5)
        assert alone["gating"] == pytest.approx(row["gating"], abs=1e-5)
        assert alone["gating"] == pytest.approx(together[0]["gating"], abs=1e-5)    # of the prompt alone
        assert alone["score"] == pytest.approx(row["score"], abs=1e-5)


def test_the_tower_has_the_wanted_type_and_the_heads_are_float32(tmp_path):
    folder, ids = tiny_armorm(tmp_path), torch.tensor([[1, 3, 5, 6, 2, 4, 5, 9]])
    state = load_file(folder / "model.safetensors")
    halves = {k: x.bfloat16() if k.startswith("model.") else x for k, x in state.items()}
    save_file(halves, folder / "model.safetensors")            # as published: a bfloat16 tower, float32 heads
    full = rewards.ArmoRM.load(folder, token_pattern=PATTERN)
    assert {x.dtype for x in full.parameters()} == {torch.float32}
    half = rewards.ArmoRM.load(folder, token_pattern=PATTERN, dtype=torch.bfloat16)
    assert {x.dtype for x in half.llama.parameters()} == {torch.bfloat16}
    assert half(ids)["score"].dtype == torch.float32
    assert half(ids)["rewards"][0].tolist() == pytest.approx(full(ids)["rewards"][0].tolist(), abs=.2)


def test_a_prompt_whose_end_was_cut_off_is_a_sentence(tmp_path):
    model = rewards.ArmoRM.load(tiny_armorm(tmp_path), token_pattern=PATTERN)
    whole, cut = [1, 3, 5, 6, 2, 4, 5, 9], [1, 3, 5, 6, 6, 6, 2, 4]
    with pytest.raises(data.UserError, match="conversation 2 of 2 has no assistant header.*cut it off"):
        model(torch.tensor([whole, cut]), torch.ones(2, 8))
    with pytest.raises(data.UserError, match="conversation 1 of 1"):
        model(torch.tensor([whole]), torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]]))      # masked: not there
    with pytest.raises(data.UserError, match="conversation 1 of 1"):
        model(torch.tensor([[1, 2]]))
    with pytest.raises(data.UserError, match="shorten the prompt"):
        model.judge("what is this ? " * 40, ["a cup"], max_length=30)


@pytest.mark.parametrize("spoil, says", [
    (lambda f: (f / "config.json").unlink(), "config.json could not be read"),
    (lambda f: save_file({"model.norm.weight": torch.ones(16)}, f / "model.safetensors"), "names differ"),
    (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace(
        '"hidden_size": 16', '"hidden_size": 32')), "does not fit")])
def test_an_armorm_that_does_not_fit_is_a_sentence(tmp_path, spoil, says):
    folder = tiny_armorm(tmp_path)
    spoil(folder)
    with pytest.raises(data.UserError, match=says):
        rewards.ArmoRM.load(folder, token_pattern=PATTERN)


@pytest.mark.parametrize("missing", ["chat_template.jinja", "tokenizer_config.json"])
def test_an_armorm_without_a_chat_template_is_a_sentence(tmp_path, missing):
    (tiny_armorm(tmp_path) / missing).unlink()
    with pytest.raises(data.UserError, match="no tokenizer with a chat template"):
        rewards.ArmoRM.load(tmp_path, token_pattern=PATTERN).judge("what is this ?", ["a cup"])


def test_the_folder_may_name_the_ids_that_end_a_prompt(tmp_path):
    folder = tiny_armorm(tmp_path)
    assert rewards.ArmoRM.load(folder).pattern == list(rewards.LLAMA3)
    (folder / "token_pattern.json").write_text(json.dumps(PATTERN))
    assert rewards.ArmoRM.load(folder).pattern == list(PATTERN)
