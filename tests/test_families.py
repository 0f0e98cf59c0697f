"""Every family as specification: transformers' prompts, logits and answers; packed, PEFT, merged, resumed."""
import json
import re
import signal
import sys
from types import SimpleNamespace

import families
import numpy as np
import pytest
import torch
from conftest import ROOT, picture
from PIL import Image

import data
import lora
import losses
import train_dpo
from model import command, front, generation, vlm
from training import batches, options

SIZES = ((90, 60), (60, 120), (33, 45))                # (width, height)
NEEDS = {"chosen", "rejected", "image_rejected"}
# (question, history, sizes): one image and two, in front, between texts and in an earlier turn, and none
ASKED = [("What is this?", [], SIZES[:1]),
         ("What are these?", [], SIZES[1:]),
         ("Here is <image>. What differs in <image>?", [], SIZES[:2]),
         ("And here?\n<image>\nSay it.", [["What is this? <image>", "A dog."]], SIZES[::2]),
         ("What is red?", [["Who are you?", "A model."]], ())]


@pytest.fixture(scope="module", params=families.FAMILIES)
def world(request, tmp_path_factory):
    """A family's folder, our model of it in float64, and transformers' own model and processor."""
    folder = tmp_path_factory.mktemp(request.param)
    families.FAMILIES[request.param](folder)
    m = vlm.load(folder, dtype=torch.float64)
    return SimpleNamespace(name=request.param, folder=folder, theirs=transformers_own(folder, m), m=m,
                           processor=families.processor(folder))


def transformers_own(folder, m):
    """transformers' model of a folder in float64, with our buffers: Gemma 3 has one of the folder's type."""
    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    for name, buffer in m.model.named_buffers():
        model.get_buffer(name).data = buffer
    return model


def pictures(sizes, seed=0):
    return [picture(seed + i, size) for i, size in enumerate(sizes)]


def inputs_of(processor, question, history, images, response=()):
    """What transformers' processor makes of a dialogue; then the tokens of a response."""
    said, messages = [("user", question)], []
    for user, assistant in reversed(history):
        said = [("user", user), ("assistant", assistant), *said]
    leading = len(images) - sum(text.count("<image>") for _, text in said)
    # LLaVA-OneVision's template moves images in front of a turn's text; in the text <image> is the token.
    kept = "Onevision" in type(processor).__name__
    for role, text in said:
        content = []
        for n, piece in enumerate([text] if kept else text.split("<image>")):
            content += [{"type": "image"}] * (n > 0)
            content += [{"type": "text", "text": piece}] * (piece != "")
        messages.append({"role": role, "content": [{"type": "image"}] * leading + content})
        leading = 0
    text = processor.tokenizer.apply_chat_template(messages, chat_template=processor.chat_template,
                                                   tokenize=False, add_generation_prompt=True)
    begun = text.startswith(processor.tokenizer.bos_token or " ")
    inputs = processor(text=[text], images=[images] if images else None, return_tensors="pt",
                       add_special_tokens=not begun)
    shape = inputs["input_ids"].shape
    for name, x in inputs.items():
        if x.shape == shape:
            more = {"input_ids": [*response], "attention_mask": [1] * len(response)}
            added = torch.tensor([more.get(name, [0] * len(response))], dtype=x.dtype)
            inputs[name] = torch.cat([x, added], 1)
    return inputs.to(dtype=torch.float64)


def pairs_of(m):
    """The pairs of ASKED, whose rejected images are turned, and the features of all images."""
    pairs, true, turned = [], [], []
    for i, (question, history, sizes) in enumerate(ASKED):
        other = tuple(size[::-1] for size in sizes)
        prompts = [m.front.prompt_ids(question, shape, history) for shape in (sizes, other)]
        responses = m.front.response_ids("A red cat."), m.front.response_ids("Two dogs, no cat" * (i % 2 + 1))
        pairs.append(data.Pair(str(i), *prompts, *responses, sizes, other))
        true += m.front.prepare(pictures(sizes))
        turned += m.front.prepare(pictures(other, seed=5))
    return pairs, vlm.encode_images(m, vlm.Batch(pairs, true, turned))


def with_adapter(world):
    """The model with a random adapter."""
    m = vlm.load(world.folder, dtype=torch.float64)
    lora.add_lora(m.model, r=4, alpha=8)
    draw = torch.Generator().manual_seed(0)
    for p in lora.lora_parameters(m.model).values():
        p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.1
    return m


# ---- the prompt, and what is in it ----

@pytest.mark.parametrize("question, history, sizes", ASKED, ids=["one", "two", "between", "earlier", "none"])
def test_a_prompt_is_the_processors_own(world, question, history, sizes):
    for shapes in {sizes, sizes[::-1], tuple(size[::-1] for size in sizes)}:
        own = inputs_of(world.processor, question, history, pictures(shapes))["input_ids"]
        ids = world.m.front.prompt_ids(question, shapes, history)
        assert ids == own[0].tolist()
        prepared = world.m.front.prepare(pictures(shapes))
        features = world.m.front.encode(world.m.model, prepared) if prepared else []
        assert ids.count(world.m.front.image_token_id) == sum(map(len, features))


def test_an_image_becomes_as_many_tokens_as_the_processor_says(world):
    sizes = np.random.default_rng(0).integers(2, 200, (40, 2)).tolist()
    for size in [(40, 40), (16, 100), *map(tuple, sizes)]:
        own = inputs_of(world.processor, "What?", [], [Image.new("RGB", size)])["input_ids"]
        assert world.m.front.prompt_ids("What?", [size]) == own[0].tolist()


def test_an_image_of_any_shape_has_as_many_features_as_places(world):
    for size in [(20, 20), (300, 40), (31, 200), (640, 480)]:
        feature, = world.m.front.encode(world.m.model, world.m.front.prepare(pictures([size])))
        assert world.m.front.image_ids(size).count(world.m.front.image_token_id) == len(feature)


def test_a_response_ends_as_the_template_ends_a_turn(world):
    f = world.m.front
    said = [*f.messages("Who?", 0), {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]
    ids = f.tokenizer(f.render(said), add_special_tokens=False).input_ids
    response = f.response_ids("A dog.")
    assert any(ids[at:at + len(response)] == response for at in range(len(ids)))
    assert f.response_ids(f"A dog.{f.tokenizer.decode([response[-1]])}") == response


def test_a_marker_in_a_response_or_too_many_in_a_question_are_refused(world):
    f = world.m.front
    for marker in ("<image>", f.tokenizer.decode([f.image_token_id])):
        with pytest.raises(data.UserError, match="remove the marker"):
            f.response_ids(f"a {marker} dog")
        with pytest.raises(data.UserError, match="image places for 1 images"):
            f.prompt_ids(f"a {marker} {marker} dog", SIZES[:1])


# ---- the numbers ----

@torch.no_grad()
def test_naive_equals_transformers_own_forward(world):
    pairs, features = pairs_of(world.m)
    got = vlm.naive(world.m, pairs, features, NEEDS)
    expected = {name: [] for name in NEEDS}
    for pair, (question, history, sizes) in zip(pairs, ASKED, strict=True):
        other = pictures(pair.sizes_rejected, seed=5)
        for name, images, response in (("chosen", pictures(sizes), pair.chosen),
                                       ("rejected", pictures(sizes), pair.rejected),
                                       ("image_rejected", other, pair.chosen)):
            inputs = inputs_of(world.processor, question, history, images, response)
            labels = torch.full_like(inputs["input_ids"], -100)
            labels[0, -len(response):] = torch.tensor(response)
            logits = world.theirs(**inputs).logits[..., :world.m.words]
            expected[name].append(losses.response_logps(logits, labels)[0])
    for name, values in expected.items():
        torch.testing.assert_close(getattr(got, name), torch.stack(values), rtol=1e-9, atol=0)


RECORD = {"id": "two", "images": ["0.png", "1.png"], "rejected_images": ["2.png", "3.png"],
          "messages": [("user", "What is <image>?"), ("assistant", "A dog."),
                       ("user", "And <image>? Say it."), ("assistant", "A red cat.")],
          "rejected_messages": [("user", "What differs in <image> and <image>?"), ("assistant", "It is red."),
                                ("user", "Is it a dog?"), ("assistant", "Two dogs, no cat")]}
TURNS = ("messages", "rejected_messages")


def test_a_response_after_turns_of_its_own_is_scored_as_transformers_does(world, tmp_path):
    """A record as ms-swift has it: naive to 1e-9, packed as naive, log-probs and gradients."""
    record, shapes = dict(RECORD), [SIZES[0], SIZES[1], SIZES[1], SIZES[2]]
    for name in TURNS:
        record[name] = [{"role": role, "content": text} for role, text in RECORD[name]]
    for i, image in enumerate(pictures(shapes)):
        image.save(tmp_path / f"{i}.png")
    data.write_jsonl(tmp_path / "d.jsonl", [record])
    needs, m = NEEDS | {"rejected_image_rejected"}, with_adapter(world)
    o = options.Options(data=str(tmp_path / "d.jsonl"), forward="packed" if m.front.packs else "naive")
    batch = batches.checked(m.front, o.data, o, needs, command.Ranks()).read(0)
    expected, images = {}, pictures(shapes)
    for name, response, shown in (("chosen", batch.pairs[0].chosen, images[:2]),
                                  ("rejected", batch.pairs[0].rejected, images[:2]),
                                  ("image_rejected", batch.pairs[0].chosen, images[2:]),
                                  ("rejected_image_rejected", batch.pairs[0].rejected, images[2:])):
        *history, (_, question), _ = RECORD[TURNS[name.startswith("rejected")]]
        history = data.chunks([text for _, text in history], 2)
        inputs = inputs_of(world.processor, question, history, shown, response)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[0, -len(response):] = torch.tensor(response)
        with torch.no_grad():
            logits = world.theirs(**inputs).logits[..., :m.words]
        expected[name] = losses.response_logps(logits, labels)
    found = []
    for forward in [vlm.FORWARDS[name] for name in ("naive", "packed")[:1 + m.front.packs]]:
        with torch.no_grad(), vlm.base_of(m) as base:
            logps = forward(base, batch.pairs, vlm.encode_images(base, batch), needs)
        for name, value in expected.items():
            torch.testing.assert_close(getattr(logps, name), value, rtol=1e-9, atol=0)
        m.model.zero_grad()
        logps = forward(m, batch.pairs, vlm.encode_images(m, batch), needs)
        sum((k + 1) * getattr(logps, name).sum() for k, name in enumerate(sorted(needs))).backward()
        found.append(torch.cat([p.grad.flatten() for p in lora.lora_parameters(m.model).values()]))
    naive, packed = found[0], found[-1]
    assert (packed - naive).norm() / naive.norm() < 1e-7


def test_packed_equals_naive(world):
    """Log-probs to 1e-9, gradients to 1e-7, of pairs of several images, one, and none; and checkpointed."""
    if not world.m.front.packs:
        pytest.skip("its attention is not that of a packed row; see the test that refuses it")
    m = with_adapter(world)
    pairs, features = pairs_of(m)
    found = []
    for forward in (vlm.naive, vlm.packed, vlm.packed):
        if len(found) == 2:
            m.language_model.train()
            m.language_model.activation_checkpointing_enable({"use_reentrant": False})
        m.model.zero_grad()
        logps = forward(m, pairs, features, NEEDS)
        logps = torch.stack([getattr(logps, name) for name in sorted(NEEDS)])
        (logps * torch.linspace(0.5, 2, logps.numel()).view_as(logps)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in lora.lora_parameters(m.model).values()])
        found.append((logps.detach(), gradient))
    naive, naive_gradient = found.pop(0)
    for packed, gradient in found:
        torch.testing.assert_close(packed, naive, rtol=1e-9, atol=0)
        assert (gradient - naive_gradient).norm() / naive_gradient.norm() < 1e-7


@torch.no_grad()
def test_an_answer_is_transformers_own(world):
    """Of a batch of prompts with different numbers of images."""
    asked = [(question, sizes) for question, history, sizes in ASKED if not history] + [("Who?", ())]
    got = generation.generate(world.m, [pictures(sizes) for _, sizes in asked], [q for q, _ in asked],
                       max_new_tokens=8)
    expected = []
    for question, sizes in asked:
        inputs = inputs_of(world.processor, question, [], pictures(sizes))
        new = world.theirs.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = new[0, inputs["input_ids"].shape[1]:]
        expected.append(world.processor.decode(new, skip_special_tokens=True).strip())
    assert got == expected and len({*got}) > 1


# ---- the adapter ----

@torch.no_grad()
def logits_of(model, processor):
    question, history, sizes = ASKED[2]
    return model(**inputs_of(processor, question, history, pictures(sizes))).logits


def test_the_adapter_loads_in_peft(world, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForImageTextToText
    m = with_adapter(world)
    lora.save(m.model, tmp_path, str(world.folder))
    model = AutoModelForImageTextToText.from_pretrained(world.folder, dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    ours = logits_of(m.model, world.processor)
    assert not torch.allclose(ours, logits_of(world.theirs, world.processor))
    torch.testing.assert_close(ours, logits_of(model, world.processor), rtol=1e-5, atol=1e-5)


def test_a_merged_folder_loads_in_transformers(world, tmp_path):
    from transformers import AutoModelForImageTextToText
    m = with_adapter(world)
    lora.save(m.model, tmp_path / "adapter", str(world.folder))
    lora.merge_folder(str(world.folder), tmp_path / "adapter", tmp_path / "merged", "float32")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    processor = families.processor(tmp_path / "merged")
    ours = logits_of(m.model, world.processor)
    torch.testing.assert_close(logits_of(model, processor), ours, rtol=0, atol=1e-4 * ours.abs().max().item())
    again = front.open_folder(tmp_path / "merged")
    assert (again.template, again.preparation) == (m.front.template, m.front.preparation)


def test_without_an_adapter_all_but_the_tower_trains_and_is_written(world, tmp_path):
    m = vlm.load(world.folder, dtype=torch.float64)
    vlm.train_whole(m)
    frozen = {id(p) for p in m.model.get_submodule(m.front.tower).parameters()}
    assert {p.requires_grad for p in m.model.parameters() if id(p) in frozen} == {False}
    with torch.no_grad():
        for p in m.model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(logits_of(m.frozen.model, world.processor), logits_of(world.theirs, world.processor))
    lora.write_folder(m.model, world.folder, tmp_path / "model")
    model = transformers_own(tmp_path / "model", m)
    torch.testing.assert_close(logits_of(model, world.processor), logits_of(m.model, world.processor))


# ---- a run ----

def train(world, out, *options):
    """The command, in this process."""
    words = ["train_dpo.py", "--model", str(world.folder), "--data", str(out.parent / "pairs.jsonl"),
             "--batch", "2", "--micro_batch", "2", "--max_steps", "2", "--lora_r", "4",
             "--forward", "packed" if world.m.front.packs else "naive",
             "--set", "warmup=0", "--out", str(out), *options]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        try:
            train_dpo.main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def write_pairs(folder):
    """Four records with images in their places: three of ASKED, and docs/data.md's with rejected images."""
    records = []
    for i, (question, history, sizes) in enumerate(ASKED[:3]):
        names = [f"{i}-{n}.png" for n in range(len(sizes))]
        records.append({"id": str(i), "image": names, "question": question, "history": history,
                        "chosen": "A red cat.", "rejected": "Two dogs."})
    shown = re.search(r'^{"id": "rooms-3".*', (ROOT / "docs" / "data.md").read_text(), re.MULTILINE)[0]
    records.append(json.loads(shown))
    (folder / "images").mkdir()
    for record in records:
        for i, name in enumerate([*record["image"], *record.get("image_rejected", [])]):
            picture(i, SIZES[i % 3]).save(folder / name)
    data.write_jsonl(folder / "pairs.jsonl", records)


def test_a_stopped_run_ends_with_the_same_bytes(world, tmp_path, monkeypatch, capsys):
    """On records with images in their places. Its first loss is mDPO's at the start."""
    write_pairs(tmp_path)
    train(world, tmp_path / "whole")
    train(world, tmp_path / "whole", "--dry_run", "--set", "device=cpu")
    assert f"model           {world.m.front.config.model_type}: " in capsys.readouterr().out
    step = train_dpo.step

    def stopping(run, t):
        run.stop.asked = run.stop.asked or t == 0                          # what SIGTERM does
        return step(run, t)
    monkeypatch.setattr(train_dpo, "step", stopping)
    with pytest.raises(SystemExit, match="stopped"):
        train(world, tmp_path / "resumed")
    train(world, tmp_path / "resumed")
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "resumed" / file).read_bytes()
    said = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert said[1]["loss"] == pytest.approx(3 * 0.693147, abs=1e-4) and said[2]["loss"] != said[1]["loss"]


# ---- what a family refuses ----

def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_gemma3_refuses_the_packed_forward_before_anything_loads(tmp_path, monkeypatch):
    families.gemma3(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    picture(0).save(tmp_path / "0.png")
    record = {"id": "0", "image": "0.png", "question": "Who?", "chosen": "A cat.", "rejected": "A dog."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record))
    words = ["train_dpo.py", "--model", str(tmp_path), "--data", str(tmp_path / "pairs.jsonl"),
             "--out", str(tmp_path / "run")]
    for more in ([], ["--dry_run"]):
        monkeypatch.setattr(sys, "argv", words + more)
        with pytest.raises(SystemExit, match="see each other in both directions.*pass --forward naive"):
            train_dpo.main()


def test_gemma3_refuses_pan_and_scan(tmp_path):
    families.gemma3(tmp_path)
    edit(tmp_path / "preprocessor_config.json", do_pan_and_scan=True)
    with pytest.raises(data.UserError, match="set do_pan_and_scan to false in its preprocessor_config.json"):
        front.open_folder(tmp_path)


def test_onevision_refuses_an_unknown_rule_for_its_tiles(tmp_path):
    families.onevision(tmp_path)
    edit(tmp_path / "config.json", vision_aspect_ratio="pad")
    with pytest.raises(data.UserError, match="only anyres_max_N is known .* not pad"):
        front.open_folder(tmp_path)


def test_qwen_refuses_patches_that_are_not_its_towers(tmp_path):
    families.qwen2_5_vl(tmp_path)
    edit(tmp_path / "preprocessor_config.json", patch_size=16)
    with pytest.raises(data.UserError, match=r"patches are \(16, 2, 2\) .* takes \(14, 2, 2\)"):
        front.open_folder(tmp_path)


@pytest.mark.parametrize("name", ["smolvlm", "idefics3"])
def test_tiles_of_which_an_image_is_no_whole_number_are_refused(tmp_path, name):
    families.FAMILIES[name](tmp_path)
    edit(tmp_path / "preprocessor_config.json", size={"longest_edge": 40})
    with pytest.raises(data.UserError, match="size.longest_edge is no multiple of max_image_size.longest"):
        front.open_folder(tmp_path)


def test_patches_are_not_cropped(world):
    """--set crop_pixels=true is for pixels that are one picture."""
    prepared, = world.m.front.prepare(pictures(SIZES[:1]))
    with pytest.raises(data.UserError, match="pixels cannot be cropped"):
        batches.crop_pixels(prepared["pixel_values"], None)


@pytest.mark.parametrize("name", ["smolvlm", "internvl", "gemma3"])
def test_a_folder_without_its_template_is_refused(tmp_path, name):
    families.FAMILIES[name](tmp_path)
    (tmp_path / "chat_template.json").unlink()
    with pytest.raises(data.UserError, match="has no chat template"):
        front.open_folder(tmp_path)
