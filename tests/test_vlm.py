"""vlm.py as specification: one naive forward, one packed forward, the same numbers; templates; generation."""
import json
import shutil
import sys
from itertools import chain, product

import numpy as np
import pytest
import torch
from conftest import SHARED, need, word_tokenizer, write_llava
from PIL import Image

import data
import losses
from model import command, front, generation, llava, vlm

FIELDS = ("chosen", "rejected", "image_rejected")
EVERYTHING = set(FIELDS)
SCORED = sum(data.FIELDS.values(), ())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def model(folder):
    return vlm.load(folder, dtype=torch.float64)


def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


ONE = ((40, 30),)                                                   # the sizes of one picture()


def one_pair(m, prompt, chosen, rejected=(), sizes=ONE):
    return data.Pair("", prompt, prompt, chosen, [*rejected], sizes, sizes)


def features_of(m, pairs, images, rejected=()):
    """Features of PIL images."""
    return vlm.encode_images(m, vlm.Batch(pairs, m.front.prepare(images), m.front.prepare(rejected)))


def ragged(m, damaged=True):
    """Four ragged pairs of one, two, no and one image; the features of the true and the damaged images."""
    rows = [("what is this ?", 1, "a red cat", "a blue dog and two cat on a dog ."),
            ("is there a dog ?", 2, "yes , there is", "no"),
            ("what is a cat ?", 0, "one", "two , two , two , two"),
            ("is this red ?", 1, "no , no , no , a blue dog .", "yes")]
    pairs = []
    for i, (question, n, chosen, rejected) in enumerate(rows):
        prompt = m.front.prompt_ids(question, ONE * n)
        responses = m.front.response_ids(chosen), m.front.response_ids(rejected)
        bare = m.front.prompt_ids(question, ())
        pairs.append(data.Pair(str(i), prompt, prompt, *responses, ONE * n, ONE * n, bare, 0.5 * i))
    images = [picture(i) for i in range(8)]                          # four true, four damaged
    return pairs, features_of(m, pairs, images[:4], images[4:] if damaged else ())


def with_other_turns(m, pairs):
    """The pairs, of which two have a rejected response that follows turns of its own."""
    found, turns = list(pairs), [["what is a dog ?", "red"], ["is it ?", "no , no"]]
    for k, p in ((1, pairs[1]), (3, pairs[3])):
        prompts = [m.front.prompt_ids("is this a cat ?", sizes, turns[:k]) for sizes in (p.sizes, ())]
        own = p._replace(prompt=prompts[0], prompt_rejected=prompts[0], prompt_bare=prompts[1])
        found[k] = p._replace(apart=own)
    return found


def with_lora(folder, seed=0):
    import lora
    m = vlm.load(folder, dtype=torch.float64)
    lora.add_lora(m.model, r=4, alpha=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for p in lora.lora_parameters(m.model).values():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2
    return m


@pytest.mark.parametrize("needs", [EVERYTHING, {"chosen", "rejected"},
                                   {"chosen", "image_rejected"}, {"chosen"}, {*SCORED},
                                   EVERYTHING | {"rejected_image_rejected", "weights"},
                                   {"rejected_image_rejected"}, {"chosen", "rejected_no_image"}])
def test_packed_equals_naive_on_ragged_batches_with_several_images(folder, needs):
    """The product's promise: log-probs to 1e-9 relative, LoRA gradients to 1e-7, in float64."""
    m = with_lora(folder)
    pairs, features = ragged(m, "rejected" in data.grouped(needs))
    packed_equals_naive(m, pairs, features, needs)


@pytest.mark.parametrize("needs", [{*SCORED}, {"chosen", "rejected"}, {"rejected"}], ids=len)
def test_packed_equals_naive_where_each_response_follows_turns_of_its_own(folder, needs):
    m = with_lora(folder)
    pairs, features = ragged(m, "rejected" in data.grouped(needs))
    packed_equals_naive(m, with_other_turns(m, pairs), features, needs)


def packed_equals_naive(m, pairs, features, needs):
    import lora
    results = []
    for forward in (vlm.naive, vlm.packed):
        m.model.zero_grad()
        logps = forward(m, pairs, features, needs)
        assert logps.weights.tolist() == [0, 0.5, 1, 1.5]
        found = [field for field in SCORED if getattr(logps, field) is not None]
        assert {*found} == needs - {"weights"}
        got = torch.stack([getattr(logps, field) for field in found])
        (got * torch.linspace(0.5, 2, got.numel(), dtype=got.dtype).view_as(got)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in lora.lora_parameters(m.model).values()])
        results.append((got.detach(), gradient))
    (naive, naive_grad), (packed, packed_grad) = results
    torch.testing.assert_close(packed, naive, rtol=1e-9, atol=0)
    assert (packed_grad - naive_grad).norm() / naive_grad.norm() < 1e-7


def test_each_field_is_its_response_behind_its_prompt(model):
    """By hand, one at a time: the same response behind the own image, the rejected one, and none."""
    plain, features = ragged(model)
    with torch.no_grad():
        for pairs, field in product((plain, with_other_turns(model, plain)), SCORED):
            together = vlm.packed(model, pairs, features, {*SCORED})
            images = "rejected" if "image_" in field else "none" if "no_" in field else "images"
            response = field.partition("_")[0].replace("image", "chosen")
            shown = {"images": features.images, "rejected": features.rejected, "none": []}[images]
            alone = []
            for p in pairs:
                prompt, sizes = (p.apart or p if response == "rejected" else p).shown(images)
                alone.append(one_pair(model, prompt, getattr(p, response), (), sizes))
            expected = vlm.naive(model, alone, vlm.Features(shown, []), {"chosen"}).chosen
            torch.testing.assert_close(getattr(together, field), expected, rtol=1e-9, atol=0)


def test_what_a_loss_does_not_read_is_not_packed(model):
    """mDPO's and DPO's rows are what they were: not a segment and not a token more."""
    pairs, _ = ragged(model)
    mdpo, dpo, everything = (data.pack(pairs, needs, model.front.positions) for needs in (
        EVERYTHING, {"chosen", "rejected", "weights"}, {*SCORED}))
    prompts, chosen, rejected = (sum(len(getattr(p, name)) for p in pairs)
                                 for name in ("prompt", "chosen", "rejected"))
    assert [s.rejected > 0 for s in mdpo.segments] == [True] * 4 + [False] * 4
    assert len(dpo.ids) == prompts + chosen + rejected
    assert len(mdpo.ids) == len(dpo.ids) + prompts + chosen
    assert len(everything.segments) == 12 and all(s.rejected for s in everything.segments)


def test_packed_equals_naive_with_gradient_checkpointing(folder):
    import lora
    m = with_lora(folder)
    pairs, features = ragged(m)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            m.language_model.train()      # transformers checkpoints in train mode only
            m.language_model.activation_checkpointing_enable({"use_reentrant": False})
        m.model.zero_grad()
        vlm.packed(m, pairs, features, EVERYTHING).chosen.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in lora.lora_parameters(m.model).values()]))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_rejected_sees_its_prompt_and_not_the_chosen(model):
    """Changing `chosen` must leave the log-prob of `rejected` as it was; changing the prompt must not."""
    pairs, features = ragged(model)
    other = [p._replace(chosen=model.front.response_ids("dog dog dog dog dog")) for p in pairs]
    before, after = (vlm.packed(model, x, features, {"chosen", "rejected"}).rejected for x in (pairs, other))
    torch.testing.assert_close(before, after, rtol=1e-12, atol=0)
    nothing = vlm.Features([x * 0 for x in features.images], [])
    blind = vlm.packed(model, pairs, nothing, {"chosen", "rejected"}).rejected
    assert (blind - before).abs().max() > 1e-3


def test_forwards_equal_transformers_own_forward(model):
    """One pair, one image: the whole model called the way its own documentation calls it."""
    prompt = model.front.prompt_ids("what is this ?", ONE)
    response = model.front.response_ids("a red cat")
    pixels = model.front.prepare([picture(3)])[0]["pixel_values"][None].double()
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
    expected = losses.response_logps(logits, torch.tensor([[-100] * len(prompt) + response]))
    pair = one_pair(model, prompt, response)
    for forward in (vlm.naive, vlm.packed):
        got = forward(model, [pair], features_of(model, [pair], [picture(3)]), {"chosen"}).chosen
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


def test_a_loaded_model_leaves_transformers_as_it_is(folder):
    """No function of a module and no forward of a layer is replaced."""
    from transformers.models.llama import modeling_llama
    m = vlm.load(folder)
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__
    assert not any("forward" in vars(module) for module in m.model.modules())


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_chunked_logps_equal_log_softmax(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight, target = torch.randn(11, 5, dtype=torch.float64), torch.randint(11, (7,))
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(7), target]
    up = torch.randn(7, dtype=torch.float64)
    wanted, = torch.autograd.grad(expected, hidden, up)
    got = vlm.chunked_logps(hidden, weight, target, chunk)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, hidden, up)[0], wanted)


def test_bfloat16_logps_are_summed_in_float32(folder):
    m = vlm.load(folder, dtype=torch.bfloat16)
    pairs, features = ragged(m)
    got = vlm.packed(m, pairs, features, EVERYTHING)
    assert got.chosen.dtype == torch.float32
    exact = vlm.load(folder, dtype=torch.float64)
    wanted = vlm.packed(exact, pairs, ragged(exact)[1], EVERYTHING).chosen
    torch.testing.assert_close(got.chosen.double(), wanted, rtol=0.05, atol=0.2)


def test_prompt_has_one_bos_and_a_run_of_image_tokens(model):
    front = model.front
    ids, bos = front.prompt_ids("what is this ?", ONE), front.tokenizer.bos_token_id
    assert ids.count(bos) == 1 and ids[0] == bos
    assert ids.count(front.image_token_id) == front.image_tokens == 4
    assert front.image_token_id not in front.prompt_ids("what is this ?", [])


def test_history_keeps_earlier_turns_and_puts_the_image_first(model):
    front = model.front
    ids = front.prompt_ids("is there a dog ?", ONE, history=[["what is this ?", "a cat"]])
    text = front.tokenizer.decode([t for t in ids if t != front.image_token_id])
    assert text == "<s> USER: what is this ? ASSISTANT: a cat </s> USER: is there a dog ? ASSISTANT:"
    assert ids.index(front.image_token_id) == 2


def test_a_response_ends_in_one_eos_and_holds_no_image_marker(model):
    front = model.front
    cat = front.tokenizer.convert_tokens_to_ids("cat")
    assert front.response_ids("a cat </s>")[-2:] == [cat, front.eos_id]
    with pytest.raises(data.UserError, match="contains <image>"):
        front.response_ids("a <image> cat")
    with pytest.raises(data.UserError, match="no token"):
        front.response_ids("  ")


def llama_tokenizer():
    """The published Llama tokenizer with LLaVA's two extra tokens, as llava-hf ships it."""
    from transformers import LlamaTokenizer
    path = need(SHARED / "official" / "llama_tokenizer")
    tokenizer = LlamaTokenizer.from_pretrained(path, legacy=True, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    return tokenizer


@pytest.mark.parametrize("template", ["vicuna", "plain"])
@pytest.mark.parametrize("response", ["The car is red.", "Yes, \"two\" of them.", "2 dogs", "the"])
def test_the_boundary_between_assistant_and_response_is_that_of_the_joint_text(tmp_path, template, response):
    """With the real Llama tokenizer, prompt and response apart are the tokens of `ASSISTANT: response`."""
    m = front.open_folder(write_llava(tmp_path, tokenizer=llama_tokenizer()), template=template)
    prompt = m.prompt_ids("What is this?", ONE)
    text = m.tokenizer.decode(prompt[1:]).split("<image>")[-1]
    assert text.endswith("ASSISTANT:")
    joint = m.tokenizer(f"What is this? ASSISTANT: {response}", add_special_tokens=False).input_ids
    apart = m.response_ids(response)
    colon = m.tokenizer("ASSISTANT:", add_special_tokens=False).input_ids[-1]
    at = len(joint) - joint[::-1].index(colon)
    assert joint[at:] == apart[:-1] and apart[-1] == m.eos_id == 2
    assert prompt[0] == 1 and prompt.count(1) == 1


def test_generation_is_the_same_alone_and_in_a_batch(folder):
    m = vlm.load(folder)
    images = [[picture(i)] for i in range(5)] + [[]]
    questions = ["what is this ?", "is there a dog ?", "a cat ?",
                 "what is a red cat and a blue dog ?", "is this one ?", "what ?"]
    together = generation.generate(m, images, questions, max_new_tokens=8, batch_size=6)
    alone = [generation.generate(m, [i], [q], max_new_tokens=8)[0]
             for i, q in zip(images, questions, strict=True)]
    assert together == alone and any(together)


@pytest.mark.parametrize("batch_size", [3, 12, 64])
def test_a_batch_of_many_pads_as_many_small_ones_do(folder, batch_size, monkeypatch):
    """NEIGHBOURS are padded to their longest, whatever runs at once: the answers of batches of so many."""
    m = vlm.load(folder)
    questions = ["what is this ?", "a cat ?", "what is a red cat and a blue dog ?", "is this one ?",
                 "is there a dog ?", "what ?", "a red cat ?", "is this a dog ?", "a ?"]
    images = [[picture(i)] for i in range(9)]
    prompts = [[0] * length for length in (5, 2, 9, 4, 6, 1, 5, 5, 2)]
    monkeypatch.setattr(generation, "NEIGHBOURS", 3)
    padded = list(generation.padded(prompts, batch_size))
    assert sorted(i for batch, _ in padded for i in batch) == list(range(len(prompts)))
    order = range(len(prompts))
    if batch_size < len(prompts):
        order = sorted(order, key=lambda i: len(prompts[i]))
    width = {i: max(len(prompts[j]) for j in some) for some in data.chunks(order, 3) for i in some}
    assert all(width[i] == longest for batch, longest in padded for i in batch)
    assert all(len(batch) <= batch_size for batch, _ in padded)

    naive = []
    for at in range(0, 9, 3):
        naive += generation.generate(m, images[at:at + 3], questions[at:at + 3], 8, batch_size=3)
    if batch_size > 9:                                                              # else sorted first
        assert generation.generate(m, images, questions, 8, batch_size=batch_size) == naive


def test_a_picture_that_is_prepared_once_is_the_image(folder, tmp_path, monkeypatch):
    m = vlm.load(folder)
    picture(1).save(tmp_path / "a.png")
    read, prepared = m.front.read, m.front.prepare([picture(1)])
    made = read(str(tmp_path / "a.png"))
    assert made is read(str(tmp_path / "a.png")) and made.size == picture(1).size
    assert torch.equal(made.inputs["pixel_values"], prepared[0]["pixel_values"])
    asked = ["what is this ?", "a cat ?"]
    expected = generation.generate(m, [[picture(1)]] * 2, asked, 8)
    assert generation.generate(m, [[made]] * 2, asked, 8) == expected


def test_an_untrained_adapter_changes_no_bit(folder):
    """So `before` is asked of the base alone."""
    import lora
    m = vlm.load(folder)
    lora.add_lora(m.model, r=4, alpha=8)
    pairs, features = ragged(m)
    with torch.no_grad():
        ours = vlm.packed(m, pairs, features, EVERYTHING)
        with vlm.base_of(m):
            base = vlm.packed(m, pairs, features, EVERYTHING)
    assert all(torch.equal(getattr(ours, name), getattr(base, name)) for name in FIELDS)


def test_the_masks_of_a_row_are_lower_right(model):
    from torch.nn.attention.bias import causal_lower_right
    segments = [data.Segment(0, 5, 3, 4), data.Segment(12, 2, 3), data.Segment(17, 1, 1, 1)]
    for s, mask in zip(segments, vlm.Layout(segments, torch.device("cpu")).masks, strict=True):
        assert mask.shape == (s.rejected, s.prompt + s.rejected)
        want = causal_lower_right(*mask.shape)._materialize("cpu")
        assert torch.equal(mask, want)


def test_an_answer_ends_at_any_end_of_generation_config_and_says_whether_it_did(folder, tmp_path):
    """LLaVA-1.6 on Llama 3 has two ends; an answer that is cut is not finished."""
    m = vlm.load(folder)
    asked = [[picture(i)] for i in range(8)], ["what is this ?"] * 8
    whole = generation.complete(m, *asked, max_new_tokens=6)
    at = next(i for i, c in enumerate(whole) if len(c.text.split()) == 6)         # cut, all of it words
    assert not whole[at].finished
    words = whole[at].text.split()
    shutil.copytree(folder, tmp_path / "ends")
    end = m.front.tokenizer.convert_tokens_to_ids(words[2])
    about = tmp_path / "ends" / "generation_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"eos_token_id": [m.front.eos_id, end]}))
    again = generation.complete(vlm.load(tmp_path / "ends"), *asked, max_new_tokens=6)[at]
    assert again.finished and again.text.split() == words[:words.index(words[2]) + 1]
    assert generation.generate(m, *asked, max_new_tokens=6) == [c.text for c in whole]


@pytest.mark.parametrize("name, token", [("bos_token_id", "x"), ("eos_token_id", "x"),
                                         ("eos_token_id", {"a": 1}), ("eos_token_id", [1, "x"])])
def test_a_token_of_generation_config_that_is_no_number_is_said_in_a_sentence(folder, tmp_path, name, token):
    shutil.copytree(folder, tmp_path / "a")
    about = tmp_path / "a" / "generation_config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {name: token}))
    with pytest.raises(data.UserError, match="a .*generation_config.json"):
        generation.generate(vlm.load(tmp_path / "a"), [[picture(0)]], ["what is this ?"])


def test_what_is_drawn_is_what_is_scored_and_no_image_marker(folder):
    """The tokens with their end; a sum of probabilities over all first tokens that can be drawn is 1."""
    m = vlm.load(folder)
    prompts = [m.front.prompt_ids("what is this ?", ())] * 40
    drawn = generation.continued(m, prompts, [[]] * 40, 3, sample_seed=1)
    assert m.front.image_token_id not in {token for tokens in drawn for token in tokens}
    ends = generation.ends_of(m)
    assert all(len(tokens) == 3 or tokens[-1] in ends for tokens in drawn)
    assert all(ends.isdisjoint(tokens[:-1]) for tokens in drawn)
    said = generation.complete(m, [[]] * 40, ["what is this ?"] * 40, 3, sample_seed=1)
    assert [one.finished for one in said] == [tokens[-1] in ends for tokens in drawn]
    assert said[0].text == m.front.tokenizer.decode(drawn[0], skip_special_tokens=True).strip()


def test_a_batch_does_not_wait_for_its_longest_answers_and_they_are_the_same(tmp_path, monkeypatch):
    """Of 40 the few that have not ended when the others have go on in a batch of their own, or in two."""
    m = vlm.load(write_llava(tmp_path), dtype=torch.float64)
    words = ["what", "is", "this", "a", "red", "dog", "cat", "no"]
    prompts = [m.front.prompt_ids(" ".join([*words[i % 8:], *words[:i // 8]]) + " ?", ()) for i in range(40)]
    images = [[]] * 40
    whole = generation.continued(m, prompts, images, 20, 1)
    for longest in whole:                                      # ends that all have soon, but one or two
        ends = {*chain(*(tokens[:8] for tokens in whole))} - {*longest}
        if sum(ends.isdisjoint(tokens[:8]) for tokens in whole) <= 2:
            break
    monkeypatch.setattr(generation, "ends_of", lambda m: ends)
    alone = [*chain(*(generation.continued(m, [prompt], [[]], 20, 1) for prompt in prompts))]
    assert max(map(len, alone)) == 20 and sum(len(tokens) <= 8 for tokens in alone) >= 38
    batches, generate = [], m.model.generate

    def counted(**options):
        new = generate(**options)
        batches.append(len(new))
        return new

    monkeypatch.setattr(m.model, "generate", counted)
    assert generation.continued(m, prompts, images, 20, 64) == alone
    assert batches[0] == 40 and len(batches) > 1 and batches[-1] <= 2


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(folder):
    m = vlm.load(folder)
    state = torch.get_rng_state()
    asked = [[picture(1)]] * 4, ["what is this ?"] * 4
    draw = [generation.generate(m, *asked, max_new_tokens=8, sample_seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2] and len(set(draw[0])) > 1
    assert torch.equal(state, torch.get_rng_state())


def test_what_is_not_a_llava_hf_folder_is_said_in_a_sentence(tmp_path, folder):
    with pytest.raises(data.UserError, match="no such folder"):
        vlm.load(tmp_path / "absent")
    with pytest.raises(data.UserError, match="config.json could not be read"):
        vlm.load(tmp_path)
    original = '{"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}'
    (tmp_path / "config.json").write_text(original)
    with pytest.raises(data.UserError, match="only folders of llava"):
        vlm.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(data.UserError, match="config.json, line 1: broken JSON"):
        vlm.load(tmp_path)


def test_torn_weights_and_an_absent_tokenizer_are_said_in_a_sentence(tmp_path):
    weights = write_llava(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(data.UserError, match="the model cannot be read .*; copy it again"):
        vlm.load(tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(data.UserError, match="the tokenizer cannot be read .*; copy tokenizer.json"):
        vlm.load(tmp_path)


def test_identity_changes_when_a_weight_changes(tmp_path):
    from safetensors.torch import load_file, save_file
    before = command.identity(write_llava(tmp_path))
    assert command.identity(tmp_path) == before
    weights = load_file(tmp_path / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert command.identity(tmp_path) != before


# ---- LLaVA-1.6 and imported Bunny ----

def write_next(folder, text="mistral", tokenizer=None, patch=14, image=28):
    """A tiny llava-hf folder of LLaVA-1.6: tiles of 28 pixels, its template beside the processor."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessorPil,
        LlavaNextProcessor,
        MistralConfig,
    )
    tokenizer = tokenizer or word_tokenizer()
    tiles = [[image * h, image * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    kind = {"mistral": MistralConfig, "llama": LlamaConfig}[text]
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(LlavaNextConfig(
        vision_config=CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                       num_attention_heads=2, image_size=image, patch_size=patch),
        text_config=kind(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=len(tokenizer) + 5, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=tiles))
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    pictures = LlavaNextImageProcessorPil(size={"shortest_edge": image}, image_grid_pinpoints=tiles,
                                          crop_size={"height": image, "width": image})
    LlavaNextProcessor(pictures, tokenizer, patch_size=patch, vision_feature_select_strategy="default",
                       num_additional_image_tokens=1,
                       chat_template=tokenizer.chat_template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["mistral", "llama", "bunny"])
def other(request, tmp_path_factory):
    """A folder of another family than LLaVA-1.5."""

    from rehearse import TINY, write_original

    from model import import_checkpoint
    folder = tmp_path_factory.mktemp(request.param)
    if request.param != "bunny":
        return write_next(folder, request.param)
    src, tower = write_original("bunny", folder / "src", TINY["bunny"], torch.float32, scale=0.2)
    import_checkpoint.run(src, folder / "dst", tower, report=lambda line: None)
    return folder / "dst"


SIZES = (40, 30), (90, 20), (20, 90), (60, 59), (28, 28), (57, 28)


def pairs_of(m):
    """Three pairs of one image each, of other shapes, the rejected ones of yet others; and the features."""
    shown, pairs = [picture(i, size) for i, size in enumerate(SIZES)], []
    for i, answers in enumerate((("a red cat", "a blue dog ."), ("yes", "no , no"), ("two", "one"))):
        sizes = (SIZES[i],), (SIZES[i + 3],)
        prompts = (m.front.prompt_ids("what is this ?", size) for size in sizes)
        responses = (m.front.response_ids(answer) for answer in answers)
        pairs.append(data.Pair(str(i), *prompts, *responses, *sizes))
    return pairs, shown


def test_packed_equals_naive_for_the_other_families(other):
    """float64: log-probs to 1e-9 relative, LoRA gradients to 1e-7; pictures and prompts of unequal length."""
    import lora
    m = with_lora(other)
    pairs, shown = pairs_of(m)
    features = features_of(m, pairs, shown[:3], shown[3:])
    results = []
    for forward in (vlm.naive, vlm.packed):
        m.model.zero_grad()
        logps = forward(m, pairs, features, EVERYTHING)
        got = torch.stack([getattr(logps, field) for field in FIELDS])
        (got * torch.linspace(0.5, 2, 9, dtype=got.dtype).view(3, 3)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in lora.lora_parameters(m.model).values()])
        results.append((got.detach(), gradient))
    (naive, naive_grad), (packed, packed_grad) = results
    torch.testing.assert_close(packed, naive, rtol=1e-9, atol=0)
    assert (packed_grad - naive_grad).norm() / naive_grad.norm() < 1e-7
    assert naive.std() > 0.1                                     # the numbers differ at all


def test_the_other_families_equal_transformers_own_processor_and_forward(other):
    """Ids, pixels and logits as AutoProcessor and the model's own call make them, for every shape."""
    from transformers import AutoProcessor
    m, processor = vlm.load(other), AutoProcessor.from_pretrained(other, backend="pil")
    response = m.front.response_ids("a red cat")
    for i, size in enumerate(SIZES):
        image = picture(i, size)
        content = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=image, text=text, return_tensors="pt")
        prompt = m.front.prompt_ids("what is this ?", [size])
        assert inputs.pop("input_ids")[0].tolist() == prompt
        inputs.pop("attention_mask")
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = m.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
        labels = torch.tensor([[-100] * len(prompt) + response])
        expected = losses.response_logps(logits[..., :m.words], labels)
        pair = one_pair(m, prompt, response, sizes=(size,))
        features = features_of(m, [pair], [image])
        assert len(features.images[0]) == len(m.front.image_ids(size))
        for forward in (vlm.naive, vlm.packed):
            got = forward(m, [pair], features, {"chosen"}).chosen
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_the_other_families_generate_the_same_alone_and_in_a_batch(other):
    m = vlm.load(other)
    asked = [[picture(i, size)] for i, size in enumerate(SIZES)], ["what is this ?", "is there a dog ?"] * 3
    together = generation.generate(m, *asked, max_new_tokens=6, batch_size=6)
    alone = [generation.generate(m, [i], [q], max_new_tokens=6)[0] for i, q in zip(*asked, strict=True)]
    assert together == alone and any(together)
    lengths = {len(m.front.image_ids(size)) for size in SIZES}
    assert (len(lengths) > 1) == isinstance(m.front, llava.LlavaNext)


@pytest.mark.parametrize("patch, image", [(14, 336), (14, 30)])
def test_the_tokens_of_a_picture_are_counted_as_transformers_counts_them(tmp_path, patch, image):
    from transformers import AutoProcessor
    folder = write_next(tmp_path, patch=patch, image=image)
    m, processor = front.open_folder(folder), AutoProcessor.from_pretrained(folder, backend="pil")
    sizes = np.random.default_rng(0).integers(8, 1500, (400, 2)).tolist()
    counted = processor._get_num_multimodal_tokens([(h, w) for w, h in sizes])["num_image_tokens"]
    assert [len(m.image_ids(size)) for size in sizes] == counted and len(set(counted)) > 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_folder_of_another_family_needs_transformers_alone(other, tmp_path, dtype, monkeypatch):
    """In shards with processor and template beside them: transformers' logits are the policy's."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import lora
    m = with_lora(other)
    lora.save(m.model, tmp_path / "adapter", str(other))
    monkeypatch.setattr(lora, "SHARD", "40KB")
    lora.merge_folder(str(other), tmp_path / "adapter", tmp_path / "merged", dtype)
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 1
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert merged.dtype == getattr(torch, dtype)
    processor = AutoProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": "what is this ?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=picture(0, (90, 20)), text=text, return_tensors="pt")
    with torch.no_grad():
        policy = m.model(**{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}).logits
        got = merged(**inputs | {"pixel_values": inputs["pixel_values"].to(merged.dtype)}).logits
    error = 1e-4 if dtype == "float32" else 0.05 * policy.abs().max().item()
    torch.testing.assert_close(got.double(), policy, rtol=0, atol=error)
    again = vlm.load(tmp_path / "merged")
    assert again.words == m.words
    assert (again.front.template, again.front.preparation) == (m.front.template, m.front.preparation)
    assert command.identity(again.front.folder) != command.identity(other)


def test_a_pair_longer_than_a_sliding_window_is_refused(tmp_path):
    m = vlm.load(write_next(tmp_path))
    for layer in m.language_model.layers:
        layer.self_attn.config.sliding_window = 8
    pairs, shown = pairs_of(m)
    with pytest.raises(data.UserError, match="sliding window of 8"):
        vlm.packed(m, pairs[:1], features_of(m, pairs[:1], shown[:1]), {"chosen"})


# ---- templates: the prompts that the official codes and the model cards write ----

VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
          "helpful, detailed, and polite answers to the user's questions. ")
LLAMA3 = ("<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. "
          "You are able to understand the visual content that the user provides, and assist the user with a "
          "variety of tasks using natural language.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
          "<image>\nWho?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize("name, said", [
    ("vicuna", VICUNA + "USER: <image>\nWho? ASSISTANT:"), ("plain", "USER: <image>\nWho? ASSISTANT:"),
    ("mistral", "[INST] <image>\nWho? [/INST]"), ("llama3", LLAMA3)])
def test_a_template_writes_the_published_prompt(model, name, said):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}]
    template = {"chat_template": llava.TEMPLATES[name], "tokenize": False}
    assert model.front.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **template) == said
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Me."}]}
    text = model.front.tokenizer.apply_chat_template(messages + [answer], **template)
    end = "<|eot_id|>" if name == "llama3" else "</s>"
    assert text == said + ("" if name == "llama3" else " ") + "Me." + end


# llava-hf's folders hold the template as a file of the processor, in this form: images first, then the texts.
PUBLISHED = ("{% for message in messages %}{% if message['role'] != 'system' %}"
             "{{ message['role'].upper() + ': '}}{% endif %}"
             "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
             "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
             "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
             "{{ content['text'] + ' '}}{% endfor %}{% else %}"
             "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
             "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
             "{% endfor %}"
             "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json", "chat_template.jinja"])
def test_the_folders_own_template_is_found_where_llava_hf_puts_it(tmp_path, file):
    """With the published Llama tokenizer: BOS once, the template's text, one run of image tokens."""
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = None
    write_llava(tmp_path, tokenizer=tokenizer)
    about = tmp_path / file
    if file.endswith("jinja"):
        about.write_text(PUBLISHED)
    else:
        old = json.loads(about.read_text()) if about.exists() else {}
        about.write_text(json.dumps(old | {"chat_template": PUBLISHED}))
    m = front.open_folder(tmp_path)
    assert m.template_name == "folder"
    ids = m.prompt_ids("Who?", ONE)
    assert ids[0] == 1 and ids.count(1) == 1 and ids.count(m.image_token_id) == m.image_tokens == 4
    plain = front.open_folder(tmp_path, template="plain")
    assert ids == plain.prompt_ids("Who?", ONE) and plain.template_name == "plain"


@pytest.mark.parametrize("text, end, name", [("mistral", "</s>", "mistral"), ("llama", "</s>", "vicuna"),
                                             ("llama", "<|eot_id|>", "llama3")])
def test_a_folder_without_a_template_gets_that_of_its_language_model(tmp_path, text, end, name):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = None
    tokenizer.add_special_tokens({"eos_token": end})
    m = front.open_folder(write_next(tmp_path, text, tokenizer))
    assert (m.template_name, m.template) == (name, llava.TEMPLATES[name])


# ---- faults of a folder ----

def test_a_text_only_model_and_an_original_folder_are_told_apart(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(data.UserError, match="model_type 'llama'.*only folders of llava"):
        vlm.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bunny-phi", "mm_vision_tower": "siglip"}')
    with pytest.raises(data.UserError, match="run `python -m model.import_checkpoint .* NEW_FOLDER`"):
        vlm.load(tmp_path)


def test_a_tokenizer_without_the_image_token_or_of_another_size_is_refused(tmp_path, folder):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["another"])
    shutil.copytree(folder, tmp_path / "a")
    tokenizer.save_pretrained(tmp_path / "a")
    with pytest.raises(data.UserError, match=r"has \d+ tokens, its model's embedding only \d+ rows"):
        vlm.load(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer.json"
    path.write_text(path.read_text().replace("<image>", "<picture>"))
    config = tmp_path / "a" / "tokenizer_config.json"
    config.write_text(config.read_text().replace("<image>", "<picture>"))
    with pytest.raises(data.UserError, match="gives <image> the id 0, config.json says 4"):
        vlm.load(tmp_path / "a")


def test_an_embedding_of_another_size_than_the_config_says_and_missing_weights_are_refused(tmp_path, folder):
    from safetensors.torch import load_file, save_file
    shutil.copytree(folder, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["text_config"]["vocab_size"] += 7
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(data.UserError, match="the model cannot be read") as e:
        vlm.load(tmp_path / "a")
    assert "\n" not in str(e.value)
    shutil.copytree(folder, tmp_path / "b")
    weights = load_file(tmp_path / "b" / "model.safetensors")
    del weights[next(k for k in weights if "q_proj" in k)]
    save_file(weights, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(data.UserError, match="1 weights are missing, .*q_proj.* first"):
        vlm.load(tmp_path / "b")


def changed(folder, **changes):
    """config.json with other values; a dict's are those of a part."""
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("layer", [99, [10 ** 30]])
@pytest.mark.parametrize("work", ["train", "answer"])
def test_a_config_that_only_a_picture_proves_wrong_is_refused_when_one_is_seen(tmp_path, folder, layer, work):
    shutil.copytree(folder, tmp_path / "a")
    changed(tmp_path / "a", vision_feature_layer=layer)
    m = vlm.load(tmp_path / "a")
    pair = one_pair(m, m.front.prompt_ids("what is this ?", ONE), m.front.response_ids("a red cat"))
    with pytest.raises(data.UserError, match=r"a fails on a picture \(.*\); copy its config.json and gen"):
        if work == "train":
            features_of(m, [pair], [picture(0)])
        else:
            generation.generate(m, [[picture(0)]], ["what is this ?"])


def test_a_gpu_that_is_out_of_memory_is_not_taken_for_a_wrong_config(model):
    with pytest.raises(torch.OutOfMemoryError), model.seeing():
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_config_of_a_million_layers_is_refused_at_once(tmp_path, folder, part):
    shutil.copytree(folder, tmp_path / "a")
    changed(tmp_path / "a", **{part: {"num_hidden_layers": 10 ** 6}})
    with pytest.raises(data.UserError, match="config.json says that a part has a thousand layers or more"):
        vlm.load(tmp_path / "a")


def test_a_tokenizer_model_alone_is_refused_with_what_to_do(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").unlink()
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"")
    with pytest.raises(data.UserError, match="the tokenizer cannot be read .*; copy tokenizer.json"):
        vlm.load(tmp_path / "a")


def test_a_folder_without_a_processor_is_refused(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "a")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "a" / name).unlink(missing_ok=True)
    with pytest.raises(data.UserError, match="image processor cannot be read .*; copy preprocessor_config"):
        vlm.load(tmp_path / "a")


def test_padding_to_a_square_is_refused_where_it_makes_no_sense(tmp_path, folder):
    with pytest.raises(data.UserError, match="leave out images=pad"):
        front.open_folder(write_next(tmp_path), preparation="pad")
    padded = front.open_folder(folder, preparation="pad")
    assert padded.preparation.startswith("padded to a square with (122, 116, 104), resized to 28")
    assert front.open_folder(folder).preparation.startswith("resized to 28, the middle cut out")


# ---- memory ----

MEASURE = """
import sys
import torch, transformers
from model import generation, vlm
from transformers import AutoImageProcessor, LlavaForConditionalGeneration
def peak():                          # of this program; ru_maxrss would begin at what its parent had
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
before = peak()
m = vlm.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
total = sum(float(p.sum(dtype=torch.float32)) for p in m.model.parameters())        # every page is read
weights = sum(p.nbytes for p in m.model.parameters())
print((peak() - before) / weights, weights / 2**20, total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_a_checkpoint_is_read_once_straight_into_its_type(tmp_path):
    """Peak memory at most 1.15 x the weights, in the files' own type and in others; a 7B scaled down."""
    import subprocess
    import sys

    from conftest import ROOT
    write_llava(tmp_path, hidden=512, layers=40, dtype="float16")
    for dtype in ("float16", "bfloat16"):
        done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path, dtype], cwd=ROOT, text=True,
                              capture_output=True)
        assert done.returncode == 0, done.stderr
        ratio, size, _ = map(float, done.stdout.split())
        assert size > 150 and ratio <= 1.15
