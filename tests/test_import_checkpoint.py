"""The import as specification: the official codes' numbers through an imported folder, and what is refused.

The goldens hold bare state dicts of the official classes; each is first written as its folder is published
(shards of safetensors or of pickles, an index, tokenizer files), then imported, then loaded by vlm.load.
"""
import hashlib
import json
import math
import re
import shutil
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, SHARED, need, run_script, write_llava
from PIL import Image
from rehearse import TINY, rehearse, write_original
from safetensors.torch import load_file, save_file

import data
import lora
import losses
from model import front, import_checkpoint, llava, vlm
from model.generation import generate
from training import batches

# ---- the goldens, as published folders ----

def cases(*files):
    """The golden folders that hold all these files; `none` where there is no golden at all."""
    found = sorted(p.parent for p in GOLDEN.rglob(files[0]) if all((p.parent / f).exists() for f in files))
    return [pytest.param(p, id="-".join(p.relative_to(GOLDEN).parts)) for p in found] or [
        pytest.param(None, id="none", marks=pytest.mark.skip(reason=f"{GOLDEN} holds no such case"))]


def models():
    return cases("state_dict.safetensors", "expected.json", "expected.safetensors", "tokenizer")


def publish(case, folder, form):
    """Write a golden as its folder is published, in two shards; returns (folder, tower's folder)."""
    shutil.copytree(case / "tokenizer", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    shutil.copyfile(case / "config.json", folder / "config.json")
    shards(load_file(case / "state_dict.safetensors"), folder, form)
    tower = folder / "tower"
    tower.mkdir()
    if (case / "clip_tower").exists():
        for name in ("config.json", "preprocessor_config.json"):
            shutil.copyfile(case / "clip_tower" / name, tower / name)
        shards(load_file(case / "clip_tower" / "state_dict.safetensors"), tower, form)
    else:
        shutil.copyfile(case / "vision_config.json", tower / "config.json")
    return folder, tower


def shards(tensors, folder, form):
    stem, suffix = ("pytorch_model", "bin") if form == "bin" else ("model", "safetensors")
    names, weight_map = list(tensors), {}
    for i, part in enumerate((names[:len(names) // 2], names[len(names) // 2:])):
        file = f"{stem}-{i + 1:05}-of-00002.{suffix}"
        some = {n: tensors[n] for n in part}
        torch.save(some, folder / file) if form == "bin" else save_file(some, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """imported(case): the golden's imported folder, made once."""
    made = {}

    def get(case, form="safetensors"):
        if (case, form) not in made:
            folder = tmp_path_factory.mktemp("golden")
            src, tower = publish(case, folder / "published", form)
            import_checkpoint.run(src, folder / "imported", tower, report=lambda line: None)
            made[case, form] = folder / "imported"
        return made[case, form]
    return get


def parts(case):
    about = json.loads((case / "expected.json").read_text())
    return about, load_file(case / "expected.safetensors"), about["cases"]


def question_of(prompt):
    return re.search(r"USER: <image>\n(.*) ASSISTANT:$", prompt, re.DOTALL)[1]


def expanded(m, ids):
    return [t for i in ids for t in (m.front.image_ids(ONE[0]) if i == -200 else [i])]


ONE = ((1, 1),)                               # of a picture: its size decides nothing in these families


def features_of(m, pairs, images, rejected=()):
    return vlm.encode_images(m, vlm.Batch(pairs, images, rejected))


def pixels_of(tensors, file):
    return tensors.get(f"pixel_values.{file}", tensors.get(f"pixel_values.pad.{file}"))


@pytest.mark.golden
@pytest.mark.parametrize("case", models())
def test_texts_and_pictures_are_those_of_the_official_code(imported, case):
    m = vlm.load(imported(case))
    _, tensors, asked = parts(case)
    for row in asked:
        ids = m.front.prompt_ids(question_of(row["prompt"]), ONE) + m.front.response_ids(row["response"])
        assert ids == expanded(m, row["input_ids"])
        assert ids.count(m.front.image_token_id) == m.front.image_tokens == row["n_image_tokens"]
        assert len(m.front.response_ids(row["response"])) == row["response_tokens"]
        prepared = m.front.prepare([data.read_image(case / "images" / row["image"])])
        pixels = prepared[0]["pixel_values"]
        torch.testing.assert_close(pixels, pixels_of(tensors, row["image"]), rtol=0, atol=2e-7)
        features = m.front.encode(m.model, prepared)
        torch.testing.assert_close(features[0], tensors[f"projected.{row['image']}"], rtol=0, atol=1e-5)
    assert m.front.template_name == "folder" and m.front.preparation.startswith("padded to a square with (12")


@pytest.mark.golden
@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("case", models())
def test_logits_and_logps_are_those_of_the_official_code(imported, case, form):
    """Logits to 1e-4 absolute, summed log-probs to 1e-3, by transformers' own call, naive and packed."""
    m = vlm.load(imported(case, form))
    _, tensors, asked = parts(case)
    for row in asked:
        prompt = m.front.prompt_ids(question_of(row["prompt"]), ONE)
        response = m.front.response_ids(row["response"])
        prepared = m.front.prepare([data.read_image(case / "images" / row["image"])])
        pixels = prepared[0]["pixel_values"][None]
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            mask = torch.ones_like(ids)
            logits = m.model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[0]
        expected = tensors[row["logits"]]
        assert m.words == expected.shape[1]
        torch.testing.assert_close(logits[:, :m.words], expected, rtol=0, atol=1e-4)
        pair = data.Pair("", prompt, prompt, response, [], ONE)
        for forward in (vlm.naive, vlm.packed):
            got = forward(m, [pair], features_of(m, [pair], prepared), {"chosen"}).chosen.item()
            assert got == pytest.approx(row["logp_sum"], abs=1e-3)


@pytest.mark.golden
@pytest.mark.parametrize("case", models())
def test_a_text_alone_has_the_official_logits(imported, case):
    m = vlm.load(imported(case))
    about, tensors, _ = parts(case)
    if "text_only" not in about:
        pytest.skip("this golden has no text of its own")
    text = about["text_only"]
    assert m.front.tokenizer(text["text"], add_special_tokens=False).input_ids == text["input_ids"]
    with torch.no_grad():
        logits = m.model(input_ids=torch.tensor([text["input_ids"]])).logits[0, :, :m.words]
    torch.testing.assert_close(logits, tensors[text["logits"]], rtol=0, atol=1e-4)


@pytest.mark.golden
@pytest.mark.parametrize("case", models())
def test_pictures_of_the_published_size_are_the_official_ones(imported, case):
    """The processor at 384 or 336 pixels: the bytes before normalising by their sum, and probes after."""
    m = vlm.load(imported(case))
    about, _, _ = parts(case)
    name = next(k for k in about if k.startswith("preprocess_"))
    side, wanted = int(name.split("_")[1]), about[name].get("pad", about[name])
    processor = m.front.image_processor
    processor.size = processor.crop_size = type(processor.size)(height=side, width=side)
    image = data.read_image(case / "images" / about[name]["image"])
    pixels = m.front.prepare([image])[0]["pixel_values"]
    assert list(pixels.shape) == wanted["shape"]
    mean, std = (torch.tensor(x)[:, None, None] for x in (processor.image_mean, processor.image_std))
    raw = ((pixels * std + mean) * 255).round().to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(raw).hexdigest() == wanted["sha256_uint8_chw"]
    got = [pixels[channel, y, x].item() for channel, y, x, _ in wanted["probes"]]
    assert got == pytest.approx([p[3] for p in wanted["probes"]], abs=1e-5)


@pytest.mark.golden
@pytest.mark.parametrize("case", cases("clip_tower", "expected.json"))
def test_a_llava_hf_folders_own_way_and_pad_are_the_official_two(imported, tmp_path, case):
    """The same weights with llava-hf's published processor: its centre crop, or, if asked for, the square."""
    folder = shutil.copytree(imported(case), tmp_path / "hf")
    about = json.loads((folder / "processor_config.json").read_text())
    del about["image_processor"]
    (folder / "processor_config.json").write_text(json.dumps(about))
    shutil.copyfile(case / "clip_tower" / "preprocessor_config.json", folder / "preprocessor_config.json")
    tensors = load_file(case / "expected.safetensors")
    ways = ("", "hf_default_crop", "the middle cut out"), ("pad", "pad", "to a square with (122, 116, 104)")
    for preparation, name, words in ways:
        m = front.open_folder(folder, preparation=preparation)
        assert words in m.preparation
        for file in sorted((case / "images").iterdir()):
            pixels = m.prepare([data.read_image(file)])[0]["pixel_values"]
            torch.testing.assert_close(pixels, tensors[f"pixel_values.{name}.{file.name}"], rtol=0, atol=2e-7)


@pytest.mark.golden
@pytest.mark.parametrize("forward", [vlm.naive, vlm.packed])
@pytest.mark.parametrize("case", cases("grads_and_step.safetensors", "lora.safetensors", "expected.json"))
def test_the_whole_mdpo_step_is_the_official_one(imported, tmp_path, case, forward):
    """Log-probs, losses, rewards, gradient, norm and the weights after one step, each to 1e-3 and better."""
    about = json.loads((case / "expected.json").read_text())
    m = vlm.load(imported((case / about["base_weights"]).resolve()))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file({f"base_model.model.{k}": v for k, v in load_file(case / "lora.safetensors").items()},
              adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": about["lora"]["r"], "lora_alpha": about["lora"]["alpha"]}))
    lora.load(m.model, adapter)
    for p in lora.lora_parameters(m.model).values():
        p.requires_grad_(True)

    pixels, pairs = load_file(case / "pixel_values.safetensors"), []
    for i, row in enumerate(about["rows"]):
        prompt = m.front.prompt_ids(question_of(row["prompt"]), ONE)
        both = (m.front.response_ids(row[role]) for role in ("chosen", "rejected"))
        pairs.append(data.Pair(str(i), prompt, prompt, *both, ONE, ONE))
        for role in ("chosen", "rejected"):
            ids, labels = about["collated"][f"{role}_input_ids"][i], about["collated"][f"{role}_labels"][i]
            length = len(getattr(pairs[-1], role))
            assert prompt + getattr(pairs[-1], role) == expanded(m, ids)[:len(prompt) + length]
            assert [t for t in labels if t != -100][:length] == getattr(pairs[-1], role)
        image = data.read_image(case / row["img_path"])
        shown = m.front.prepare([image])[0]["pixel_values"]
        torch.testing.assert_close(shown, pixels[f"image.{i}"], rtol=0, atol=2e-7)
        box = [about["crop"]["boxes"][i][k] for k in ("left", "top", "width", "height")]
        cropped = batches.crop_pixels(pixels[f"image.{i}"], lambda w, h, box=box: box)   # --set official=true
        torch.testing.assert_close(cropped, pixels[f"image_rejected.{i}"], rtol=0, atol=1e-6)
    shown, shown_rejected = ([{"pixel_values": pixels[f"{kind}.{i}"]} for i in range(len(pairs))]
                             for kind in ("image", "image_rejected"))
    features, needs = features_of(m, pairs, shown, shown_rejected), {"chosen", "rejected", "image_rejected"}

    def step():
        policy = forward(m, pairs, features, needs)
        with torch.no_grad(), lora.lora_disabled(m.model):
            reference = forward(m, pairs, features, needs)
        return policy, reference, losses.mdpo(policy, reference, about["beta"])
    policy, reference, loss = step()
    for got, wanted in ((policy, about["policy"]), (reference, about["reference"])):
        for field in needs:
            assert getattr(got, field).tolist() == pytest.approx(wanted[field], abs=1e-3)
    assert loss.tolist() == pytest.approx(about["losses"], abs=1e-4)
    assert loss.mean().item() == pytest.approx(about["loss"], abs=1e-4)
    rewards = losses.rewards(policy, reference, about["beta"])
    for got, field in zip(rewards, ("chosen", "rejected", "image_rejected"), strict=True):
        assert got.tolist() == pytest.approx(about["rewards"][field], abs=1e-4)

    loss.mean().backward()
    expected, ours = load_file(case / "grads_and_step.safetensors"), lora.lora_parameters(m.model)
    for name, p in ours.items():
        name = name.replace("model.language_model.", "model.") + ".weight"
        torch.testing.assert_close(p.grad.T, expected[f"grad.{name}"], rtol=1e-3, atol=1e-4)
    how = about["optimizer"]
    norm = torch.nn.utils.clip_grad_norm_(list(ours.values()), how["clip_grad_norm"])
    assert norm.item() == pytest.approx(about["grad_norm_before_clip"], rel=1e-4)
    torch.optim.AdamW(ours.values(), how["lr"], how["betas"], how["eps"], how["weight_decay"]).step()
    for name, p in ours.items():
        name = name.replace("model.language_model.", "model.") + ".weight"
        torch.testing.assert_close(p.detach().T, expected[f"after_step.{name}"], rtol=0, atol=1e-4)
    assert step()[2].mean().item() == pytest.approx(about["loss_after_step"], abs=1e-3)


# ---- tiny checkpoints of our own ----

@pytest.fixture(scope="module", params=["bunny", "llava"])
def original(request, tmp_path_factory):
    """(kind, folder, tower's folder), as published: Bunny's safetensors, LLaVA's pickles, several shards."""
    folder = tmp_path_factory.mktemp(request.param)
    src, tower = write_original(request.param, folder / "src", TINY[request.param], torch.float32,
                                shard=40_000)
    return request.param, src, tower


@pytest.fixture
def copy(original, tmp_path):
    kind, src, tower = original
    shutil.copytree(src, tmp_path / "src")
    return kind, tmp_path / "src", tmp_path / "src" / tower.name


def refused(said, src, tower, tmp_path):
    with pytest.raises(data.UserError, match=said) as e:
        import_checkpoint.run(src, tmp_path / "dst", tower, report=lambda line: None)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "dst").exists() and not list(tmp_path.glob(".dst*"))


def test_every_tensor_arrives_bit_for_bit_in_shards_of_the_asked_size(original, tmp_path, monkeypatch):
    kind, src, tower = original
    monkeypatch.setattr(import_checkpoint, "SHARD", 30_000)
    todo = import_checkpoint.run(src, tmp_path / "dst", tower, report=lambda line: None)
    files = sorted((tmp_path / "dst").glob("*.safetensors"))
    assert len(files) > 3
    got = {k: v for file in files for k, v in load_file(file).items()}
    assert got.keys() == import_checkpoint.expected(todo.config).keys()
    for name, weight in todo.tensors.items():
        wanted = (load_file if weight.file.suffix == ".safetensors" else torch.load)(weight.file)[weight.name]
        assert torch.equal(got[name][:len(wanted)], wanted)
        assert not got[name][len(wanted):].any()
    grown = {n for n in got if len(got[n]) > todo.tensors[n].shape[0]}
    assert grown == {"lm_head.weight", "model.language_model.embed_tokens.weight"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(an imported folder with the published tokenizer, its SentencePiece)"""
    import sentencepiece
    folder = tmp_path_factory.mktemp("llama")
    file = need(SHARED / "official" / "llama_tokenizer" / "tokenizer.model")
    size = {**TINY["llava"], "text": TINY["llava"]["text"] | {"vocab_size": 32000}}
    src, tower = write_original("llava", folder / "src", size, torch.float16)
    shutil.copyfile(file, src / "tokenizer.model")
    import_checkpoint.run(src, folder / "dst", tower, report=lambda line: None)
    return front.open_folder(folder / "dst"), sentencepiece.SentencePieceProcessor(str(file))


@pytest.mark.parametrize("question", ["What color?", "Describe.\nBe brief.", "two  spaces   three", "é 🦤"])
def test_the_published_tokenizer_gives_the_official_pieces(llama, question):
    """LLaVA's tokenizer_image_token: split at <image>, SentencePiece on each piece, BOS once."""
    m, pieces = llama
    system = llava.TEMPLATES["vicuna"].partition("{%")[0]
    before, after = pieces.encode(f"{system}USER: "), pieces.encode(f"\n{question} ASSISTANT:")
    assert m.image_token_id == 32000
    assert m.prompt_ids(question, ONE) == [1, *before, *[32000] * m.image_tokens, *after]
    answer = "The car is red.  It has two doors."
    assert m.response_ids(answer) == [*pieces.encode(answer), 2]


def test_a_tower_in_float32_takes_the_language_models_type(tmp_path):
    """So that a folder has one type, and is mapped when it is loaded."""
    src, tower = write_original("llava", tmp_path / "src", TINY["llava"], torch.float16)
    import_checkpoint.run(src, tmp_path / "dst", tower, report=lambda line: None)
    got = load_file(tmp_path / "dst" / "model.safetensors")
    assert {t.dtype for t in got.values()} == {torch.float16}
    assert front.open_folder(tmp_path / "dst").config.dtype == torch.float16
    whole = torch.load(tower / "pytorch_model.bin")
    for name in ("pre_layrnorm.bias", "encoder.layers.1.mlp.fc1.weight"):
        assert torch.equal(got[f"model.vision_tower.{name}"], whole[f"vision_model.{name}"].half())


def test_transformers_alone_answers_as_vlm_does(original, tmp_path):
    """The imported folder through AutoProcessor and AutoModel: the same ids, pixels and logits."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    _, src, tower = original
    import_checkpoint.run(src, tmp_path / "dst", tower, report=lambda line: None)
    m = vlm.load(tmp_path / "dst")
    processor = AutoProcessor.from_pretrained(tmp_path / "dst", backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "dst").eval()
    image = Image.radial_gradient("L").convert("RGB").resize((50, 31))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=text, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == m.front.prompt_ids("What is this?", ONE)
    torch.testing.assert_close(inputs.pixel_values[0], m.front.prepare([image])[0]["pixel_values"],
                               rtol=0, atol=1e-7)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, m.model(**inputs).logits, rtol=0, atol=0)
        new = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1]:]
    assert m.front.image_token_id not in new
    answer = generate(m, [[image]], ["What is this?"], max_new_tokens=12)
    assert answer == [m.front.tokenizer.decode(new, skip_special_tokens=True).strip()]


@pytest.mark.parametrize("preset, start, colour", [("mdpo-bunny", 3, "(127, 127, 127)"),
                                                   ("pds-llava", 1, "(122, 116, 104)")])
def test_a_papers_run_goes_from_the_published_form_to_two_steps(monkeypatch, tmp_path, preset, start, colour):
    """The rehearsal at tiny sizes: write, import, train; the log says how pictures were prepared."""
    def forked(words, check):
        code, said = run_script(*words[1:])
        assert code == 0, said
    monkeypatch.setattr("rehearse.subprocess", SimpleNamespace(run=forked))
    first, *steps = rehearse(preset, tmp_path, sizes=TINY[preset.partition("-")[2]])
    assert len(steps) == 2 and steps[0]["loss"] == pytest.approx(start * math.log(2), abs=1e-5)
    assert first["images"].startswith(f"padded to a square with {colour}") and first["template"] == "vicuna"
    assert first["options"]["preset"] == preset and not (tmp_path / "original").exists()


def test_a_tower_inside_the_checkpoint_is_found_and_one_apart_is_asked_for(copy, tmp_path):
    kind, src, tower = copy
    if kind == "llava":
        refused("holds no vision tower: give --vision_tower DIR", src, None, tmp_path)
        stem = "model.vision_tower.vision_tower."
        whole = {k: v for file in tower.glob("*.bin") for k, v in torch.load(file).items()}
        inside = {f"{stem}{k}": v for k, v in whole.items() if k.startswith("vision_model.")}
        torch.save(inside, src / "pytorch_model-tower.bin")
        index = src / "pytorch_model.bin.index.json"
        about = json.loads(index.read_text())
        about["weight_map"] |= dict.fromkeys(inside, "pytorch_model-tower.bin")
        index.write_text(json.dumps(about))
        for file in tower.glob("*.bin*"):
            file.unlink()
    refused("not the published one, and its number of heads", src, None, tmp_path)
    import_checkpoint.run(src, tmp_path / "dst", tower, report=lambda line: None)
    assert front.open_folder(tmp_path / "dst").image_tokens == 4


def test_a_whole_siglip_folder_serves_bunny_without_its_last_layer(tmp_path):
    src, tower = write_original("bunny", tmp_path / "src", TINY["bunny"], torch.float32)
    tensors = load_file(src / "model.safetensors")
    stem = "model.vision_tower.vision_tower."
    whole = {k.removeprefix(stem): tensors.pop(k) for k in list(tensors) if k.startswith(stem)}
    for name in [k for k in whole if ".layers.1." in k]:
        whole[name.replace(".layers.1.", ".layers.2.")] = whole[name] * 2
    whole["vision_model.head.probe"] = torch.zeros(1, 1, 24)
    save_file(tensors, src / "model.safetensors")
    save_file(whole, tower / "model.safetensors")
    import_checkpoint.run(src, tmp_path / "dst", tower, report=lambda line: None)
    assert len(vlm.load(tmp_path / "dst").model.model.vision_tower.encoder.layers) == 2


@pytest.mark.parametrize("change, said", [
    ({"mm_vision_tower": None, "model_type": "llama"}, "text-only model"),
    ({"text_config": {}}, "a transformers folder already"),
    ({"mm_projector_type": "linear"}, "mm_projector_type 'linear'"),
    ({"mm_patch_merge_type": "spatial_unpad"}, "only LLaVA-1.5 and Bunny"),
    ({"model_type": "bunny-qwen"}, "model_type 'bunny-qwen'"),
    ({"vocab_size": 405}, "one of the two is not this model's"),
    ({"vocab_size": 100}, "one of the two is not this model's"),
    ({"intermediate_size": 50}, r"by config.json it is"),
    ({"num_hidden_layers": 3}, "weights are missing"),
    ({"num_hidden_layers": 1}, "have no place in the model"),
    ({"eos_token_id": 5}, "the tokenizer's eos_token_id"),
    ("{", "broken JSON"), ("[1]", "not a JSON object"), (None, "missing or empty")])
def test_what_is_no_such_checkpoint_is_one_sentence_and_leaves_nothing(copy, tmp_path, change, said):
    _, src, tower = copy
    path = src / "config.json"
    if isinstance(change, dict):
        config = {k: v for k, v in (json.loads(path.read_text()) | change).items() if v is not None}
        path.write_text(json.dumps(config))
    elif change is None:
        path.unlink()
    else:
        path.write_text(change)
    refused(said, src, tower, tmp_path)


@pytest.mark.parametrize("spoil, said", [
    (lambda f: f.write_bytes(f.read_bytes()[:-100]), "torn"),
    (lambda f: f.write_bytes(f.read_bytes()[:5]), "torn"),
    (lambda f: f.write_bytes(b""), "torn"),
    (lambda f: f.write_bytes(struct.pack("<Q", 1 << 60) + b"{}"), "torn"),
    (lambda f: f.unlink(), "names 1 files that are not there")])
def test_a_torn_or_absent_shard_is_named(copy, tmp_path, spoil, said):
    _, src, tower = copy
    file = sorted(f for f in src.iterdir() if "-of-" in f.name)[1]
    spoil(file)
    refused(f"{file.name}.*{said}|{said}.*{file.name}", src, tower, tmp_path)


def test_a_pickle_that_would_run_code_is_not_opened(tmp_path):
    src, tower = write_original("llava", tmp_path / "src", TINY["llava"], torch.float32)

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "owned"), "w")
    torch.save({"model.norm.weight": Evil()}, src / "pytorch_model.bin")
    refused("is not opened", src, tower, tmp_path)
    assert not (tmp_path / "owned").exists()


def test_a_tokenizer_model_without_its_packages_says_what_to_install(original, tmp_path, monkeypatch):
    kind, src, tower = original
    if kind == "bunny":
        pytest.skip("Bunny's tokenizer is JSON")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    refused("`pip install sentencepiece protobuf`", src, tower, tmp_path)


def test_an_interrupted_import_leaves_no_half_folder(original, tmp_path, monkeypatch):
    _, src, tower = original

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(import_checkpoint, "content", full)
    refused("No space left on device", src, tower, tmp_path)
    monkeypatch.undo()
    (tmp_path / ".dst.unfinished").mkdir()             # of a run that was killed
    (tmp_path / ".dst.unfinished" / "old").touch()
    import_checkpoint.run(src, tmp_path / "dst", tower, report=lambda line: None)
    assert not (tmp_path / "dst" / "old").exists()
    with pytest.raises(data.UserError, match="exists and is not empty"):
        import_checkpoint.run(src, tmp_path / "dst", tower)


def test_the_command_line_says_faults_in_one_sentence(tmp_path, monkeypatch):
    arguments = [str(tmp_path / "absent"), str(tmp_path / "dst")]
    monkeypatch.setattr(sys, "argv", ["model/import_checkpoint.py", *arguments])
    with pytest.raises(SystemExit, match="import_checkpoint.py: .*absent: no such folder"):
        import_checkpoint.main()
    assert Path(import_checkpoint.__file__).parent.name == "model"


# ---- a LoRA as LLaVA's scripts write it ----

def write_lora(folder, src, base_name, pickled=False, **config):
    """A LoRA on every layer of the original language model, the projector beside it, trained and random; the
    base without its projector, as a language model is published -> (folder, base, {original name: weight
    that PEFT's merge_and_unload leaves})."""
    from peft import LoraConfig, get_peft_model
    files = [*src.glob("pytorch_model*.bin"), *src.glob("model*.safetensors")]
    state = {k: v for f in files for k, v in (torch.load if f.suffix == ".bin" else load_file)(f).items()}
    targets = [name.removesuffix(".weight") for name, weight in state.items()
               if re.match(r"model\.layers\..*\.weight$", name) and weight.ndim == 2]
    model = torch.nn.Module()                          # plain linear layers under the original names
    for name, weight in state.items():
        at, path = model, name.split(".")
        for i in range(1, len(path)):
            linear, part = ".".join(path[:i]) in targets, path[i - 1]
            if not hasattr(at, part):
                new = torch.nn.Linear(*state[".".join([*path[:i], "weight"])].shape[::-1]) if linear else None
                at.add_module(part, new or torch.nn.Module())
            at = getattr(at, part)
        at.register_parameter(path[-1], torch.nn.Parameter(weight.clone()))
        if f"{name.removesuffix('weight')}bias" not in state and isinstance(at, torch.nn.Linear):
            at.bias = None
    torch.manual_seed(3)
    wrapped = get_peft_model(model, LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 8, **config}))
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=.3)
    wrapped.peft_config["default"].base_model_name_or_path = base_name
    wrapped.save_pretrained(folder, safe_serialization=not pickled)
    assert (folder / "adapter_model.bin").exists() == pickled
    whole = {f"base_model.model.{k}": torch.randn_like(v) for k, v in state.items() if "mm_projector" in k}
    torch.save(whole, folder / "non_lora_trainables.bin")
    shutil.copyfile(src / "config.json", folder / "config.json")
    merged = dict(wrapped.merge_and_unload().state_dict())
    return folder, merged | {k.removeprefix("base_model.model."): v for k, v in whole.items()}


def language_model(src, folder):
    """The folder of what a LoRA's projector was trained on: no projector, a config.json of its own."""
    folder.mkdir()
    for file in src.iterdir():
        if file.is_file() and ".index." not in file.name:
            shutil.copyfile(file, folder / file.name)
    config = json.loads((src / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "mm_" not in k}))
    state = {}
    for file in [*folder.glob("*.bin"), *folder.glob("*.safetensors")]:
        state |= (torch.load if file.suffix == ".bin" else load_file)(file)
        file.unlink()
    save_file({k: v.contiguous() for k, v in state.items() if "mm_projector" not in k},
              folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("pickled, config", [(True, {}), (False, {
    "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}})])
def test_a_lora_of_llavas_scripts_is_merged_as_peft_merges_it(original, tmp_path, pickled, config):
    """On the language model's folder, on the whole model's, and on the one that the adapter names."""
    kind, src, tower = original
    base = language_model(src, tmp_path / "base") if kind == "llava" else src
    folder, wanted = write_lora(tmp_path / "lora", src, str(base), pickled, **config)
    for name, given in (("named", None), ("given", src)):
        todo = import_checkpoint.run(folder, tmp_path / name, tower, lambda line: None, given)
        got = load_file(tmp_path / name / "model.safetensors")
        for at, weight in todo.tensors.items():
            if weight.name.removeprefix("base_model.model.") in wanted and "vision" not in at:
                expected = wanted[weight.name.removeprefix("base_model.model.")]
                torch.testing.assert_close(got[at][:len(expected)], expected, rtol=0, atol=1e-5)
    base = load_file(tmp_path / "named" / "model.safetensors")
    assert len(base) == len(got) and sum(bool(weight.delta) for weight in todo.tensors.values()) > 10
    image = Image.radial_gradient("L").convert("RGB")
    m = vlm.load(tmp_path / "named")
    assert len(generate(m, [[image]], ["What is this?"], max_new_tokens=4)) == 1


def factors(layer, value=1.):
    stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
    return {f"{stem}A.weight": torch.full((4, 32), value), f"{stem}B.weight": torch.ones(32, 4)}


@pytest.mark.parametrize("spoil, given, said", [
    (lambda f: None, None, "is a LoRA on lmsys/vicuna-7b-v1.5, .*give --base DIR"),
    (lambda f: (f / "adapter_config.json").unlink(), ".", "is no LoRA, it has no adapter_config.json"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "src", "needs adapter_config.json and"),
    (lambda f: (f / "non_lora_trainables.bin").write_bytes(b"x"), "src", "non_lora_trainables.bin"),
    (lambda f: (f / "config.json").unlink(), "src", "lora/config.json"),
    (lambda f: save_file(factors(9), f / "adapter_model.safetensors"), "src", "adapts model.layers.9"),
    (lambda f: save_file({"base_model.model.model.norm.weight": torch.ones(32)},
                         f / "adapter_model.safetensors"), "src", "no plain LoRA"),
    (lambda f: save_file(factors(0, float("inf")), f / "adapter_model.safetensors"), "src",
     "q_proj is not finite")])
def test_a_lora_that_lacks_something_is_one_sentence(original, tmp_path, spoil, given, said):
    kind, src, tower = original
    if kind == "bunny":
        pytest.skip("the same code")
    folder, _ = write_lora(tmp_path / "lora", src, "lmsys/vicuna-7b-v1.5")
    spoil(folder)
    with pytest.raises(data.UserError, match=said):
        import_checkpoint.run(folder, tmp_path / "dst", tower, print, src if given == "src" else given)
    assert not (tmp_path / "dst").exists()


# ---- what the command prints in the end ----

def test_describe_says_what_a_folder_is(tmp_path):
    folder = write_llava(tmp_path)
    lines = "\n".join(import_checkpoint.describe(folder))
    assert "clip_vision_model + llama" in lines and "28 pixels, 4 tokens" in lines
    assert "template        folder: '<s> USER: <image>" in lines and "missing         nothing" in lines
    count = sum(p.numel() for p in vlm.load(folder).model.parameters())
    assert f"parameters      {count:,} in F32" in lines


def test_describe_says_what_is_torn_and_missing_and_raises_nothing(tmp_path):
    folder = write_llava(tmp_path)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:900])
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')
    said = import_checkpoint.describe(folder)[-1]
    for words in ("missing  ", "model.safetensors is torn", "not there, model-00002.safetensors first",
                  "image processor cannot be read"):
        assert words in said


def test_a_weight_that_is_not_finite_is_named(copy, tmp_path):
    _, src, tower = copy
    file = sorted(f for f in src.iterdir() if "-of-" in f.name)[1]
    tensors = import_checkpoint.mapped(file)
    tensors = {name: weight.clone() for name, weight in tensors.items()}
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[3] = float("nan")
    torch.save(tensors, file) if file.suffix == ".bin" else save_file(tensors, file)
    refused(f"{file.name}: {re.escape(name)} is not finite", src, tower, tmp_path)
