"""vlm.py as specification: one naive forward, one packed forward, the same numbers; templates; generation."""
import numpy as np
import pytest
import torch
from conftest import SHARED, need, write_llava
from PIL import Image

import data
import losses
import vlm

EVERYTHING = {"chosen", "rejected", "image_rejected"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def model(folder):
    return vlm.load(folder, dtype=torch.float64)


def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def ragged(m):
    """Four ragged pairs of one, two, no and one image; the features of the true and the damaged images."""
    rows = [("what is this ?", 1, "a red cat", "a blue dog and two cat on a dog ."),
            ("is there a dog ?", 2, "yes , there is", "no"),
            ("what is a cat ?", 0, "one", "two , two , two , two"),
            ("is this red ?", 1, "no , no , no , a blue dog .", "yes")]
    pairs = []
    for i, (question, n, chosen, rejected) in enumerate(rows):
        prompt = vlm.prompt_ids(m, question, n)
        pairs.append(data.Pair(str(i), prompt, prompt,
                               vlm.response_ids(m, chosen), vlm.response_ids(m, rejected)))
    images = [picture(i) for i in range(8)]                          # four true, four damaged
    return pairs, vlm.encode_images(m, vlm.prepare(m, images).double())


def with_lora(folder, seed=0):
    import lora
    m = vlm.load(folder, dtype=torch.float64)
    lora.add_lora(m.model, r=4, alpha=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for p in lora.lora_parameters(m.model).values():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2
    return m


@pytest.mark.parametrize("needs", [EVERYTHING, {"chosen", "rejected"},
                                   {"chosen", "image_rejected"}, {"chosen"}])
def test_packed_equals_naive_on_ragged_batches_with_several_images(folder, needs):
    """The product's promise: log-probs to 1e-9 relative, LoRA gradients to 1e-7, in float64."""
    import lora
    m = with_lora(folder)
    pairs, features = ragged(m)
    if "image_rejected" not in needs:
        features = features[:4]
    results = []
    for forward in (vlm.naive, vlm.packed):
        m.model.zero_grad()
        logps = forward(m, pairs, features, needs)
        got = torch.stack([x for x in logps[:3] if x is not None])
        (got * torch.linspace(0.5, 2, got.numel(), dtype=got.dtype).view_as(got)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in lora.lora_parameters(m.model).values()])
        results.append((got.detach(), gradient))
    (naive, naive_grad), (packed, packed_grad) = results
    assert len(naive) == len(needs)
    torch.testing.assert_close(packed, naive, rtol=1e-9, atol=0)
    assert (packed_grad - naive_grad).norm() / naive_grad.norm() < 1e-7


def test_packed_equals_naive_with_gradient_checkpointing(folder):
    import lora
    m = with_lora(folder)
    pairs, features = ragged(m)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            m.model.model.language_model.train()      # transformers checkpoints in train mode only
            m.model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
        m.model.zero_grad()
        vlm.packed(m, pairs, features, EVERYTHING).chosen.sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in lora.lora_parameters(m.model).values()]))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_rejected_sees_its_prompt_and_not_the_chosen(model):
    """Changing `chosen` must leave the log-prob of `rejected` as it was; changing the prompt must not."""
    pairs, features = ragged(model)
    other = [p._replace(chosen=vlm.response_ids(model, "dog dog dog dog dog")) for p in pairs]
    before, after = (vlm.packed(model, x, features[:4], {"chosen", "rejected"}).rejected
                     for x in (pairs, other))
    torch.testing.assert_close(before, after, rtol=1e-12, atol=0)
    blind = vlm.packed(model, pairs, features[:4] * 0, {"chosen", "rejected"}).rejected
    assert (blind - before).abs().max() > 1e-3


def test_forwards_equal_transformers_own_forward(model):
    """One pair, one image: the whole model called the way its own documentation calls it."""
    prompt = vlm.prompt_ids(model, "what is this ?")
    response = vlm.response_ids(model, "a red cat")
    pixels = vlm.prepare(model, [picture(3)]).double()
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logits = model.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits
    expected = losses.response_logps(logits, torch.tensor([[-100] * len(prompt) + response]))
    pair = data.Pair("", prompt, prompt, response, [])
    for forward in (vlm.naive, vlm.packed):
        got = forward(model, [pair], vlm.encode_images(model, pixels), {"chosen"}).chosen
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("chunk", [1, 3, 1024])
def test_chunked_logps_equal_log_softmax(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight, target = torch.randn(11, 5, dtype=torch.float64), torch.randint(11, (7,))
    expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(7), target]
    up = torch.randn(7, dtype=torch.float64)
    wanted, = torch.autograd.grad(expected, hidden, up)
    got = vlm.ChunkedLogps.apply(hidden, weight, target, chunk)
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
    ids = vlm.prompt_ids(model, "what is this ?")
    assert ids.count(model.tokenizer.bos_token_id) == 1 and ids[0] == model.tokenizer.bos_token_id
    assert ids.count(model.image_token_id) == model.image_tokens == 4
    assert model.image_token_id not in vlm.prompt_ids(model, "what is this ?", n_images=0)


def test_history_keeps_earlier_turns_and_puts_the_image_first(model):
    ids = vlm.prompt_ids(model, "is there a dog ?", 1, history=[["what is this ?", "a cat"]])
    text = model.tokenizer.decode([t for t in ids if t != model.image_token_id])
    assert text == "<s> USER: what is this ? ASSISTANT: a cat </s> USER: is there a dog ? ASSISTANT:"
    assert ids.index(model.image_token_id) == 2


def test_a_response_ends_in_one_eos_and_holds_no_image_marker(model):
    cat = model.tokenizer.convert_tokens_to_ids("cat")
    assert vlm.response_ids(model, "a cat </s>")[-2:] == [cat, model.eos_id]
    with pytest.raises(data.UserError, match="holds <image>"):
        vlm.response_ids(model, "a <image> cat")
    with pytest.raises(data.UserError, match="no token"):
        vlm.response_ids(model, "  ")


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
    m = vlm.load(write_llava(tmp_path, tokenizer=llama_tokenizer()), template=template)
    prompt = vlm.prompt_ids(m, "What is this?")
    text = m.tokenizer.decode(prompt[1:]).split("<image>")[-1]
    assert text.endswith("ASSISTANT:")
    joint = m.tokenizer(f"What is this? ASSISTANT: {response}", add_special_tokens=False).input_ids
    apart = vlm.response_ids(m, response)
    colon = m.tokenizer("ASSISTANT:", add_special_tokens=False).input_ids[-1]
    at = len(joint) - joint[::-1].index(colon)
    assert joint[at:] == apart[:-1] and apart[-1] == m.eos_id == 2
    assert prompt[0] == 1 and prompt.count(1) == 1


def test_generation_is_the_same_alone_and_in_a_batch(folder):
    m = vlm.load(folder)
    images = [[picture(i)] for i in range(5)] + [[]]
    questions = ["what is this ?", "is there a dog ?", "a cat ?",
                 "what is a red cat and a blue dog ?", "is this one ?", "what ?"]
    together = vlm.generate(m, images, questions, max_new_tokens=8, batch_size=6)
    alone = [vlm.generate(m, [i], [q], max_new_tokens=8)[0] for i, q in zip(images, questions, strict=True)]
    assert together == alone and any(together)


def test_sampling_is_seeded_and_leaves_the_global_generator_alone(folder):
    m = vlm.load(folder)
    state = torch.get_rng_state()
    asked = [[picture(1)]] * 4, ["what is this ?"] * 4
    draw = [vlm.generate(m, *asked, max_new_tokens=8, sample_seed=seed) for seed in (1, 1, 2)]
    assert draw[0] == draw[1] != draw[2] and len(set(draw[0])) > 1
    assert torch.equal(state, torch.get_rng_state())


def test_word_logps_are_the_chosen_logps_by_word(model):
    prompt = vlm.prompt_ids(model, "what is this ?")
    features = vlm.encode_images(model, vlm.prepare(model, [picture(2)]).double())
    words = vlm.word_logps(model, features, "what is this ?", "a red cat .")
    assert [w for w, _ in words] == ["a", "red", "cat", "."]
    pair = data.Pair("", prompt, prompt, vlm.response_ids(model, "a red cat .")[:-1], [])
    total = vlm.packed(model, [pair], features, {"chosen"}).chosen
    assert sum(logp for _, logp in words) == pytest.approx(total.item(), rel=1e-9)


def test_word_logps_join_the_pieces_of_a_word(tmp_path):
    m = vlm.load(write_llava(tmp_path, tokenizer=llama_tokenizer()))
    features = vlm.encode_images(m, vlm.prepare(m, [picture(2)]))
    words = vlm.word_logps(m, features, "What is this?", "An extraordinarily red  car, isn't it?")
    assert [w for w, _ in words] == ["An", "extraordinarily", "red", "car,", "isn't", "it?"]
    words = vlm.word_logps(m, features, "What is this?", " A \n\n 🦤  car. \n")  # 🦤: 4 byte tokens
    assert [w for w, _ in words] == ["A", "🦤", "car."]
    assert vlm.word_logps(m, features, "What is this?", " ") == []


def test_what_is_not_a_llava_hf_folder_is_said_in_a_sentence(tmp_path, folder):
    with pytest.raises(data.UserError, match="no such folder"):
        vlm.load(tmp_path / "absent")
    with pytest.raises(data.UserError, match="config.json is missing"):
        vlm.load(tmp_path)
    original = '{"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}'
    (tmp_path / "config.json").write_text(original)
    with pytest.raises(data.UserError, match="only llava-hf folders"):
        vlm.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(data.UserError, match="not valid JSON"):
        vlm.load(tmp_path)


def test_torn_weights_and_an_absent_tokenizer_are_said_in_a_sentence(tmp_path):
    weights = write_llava(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(data.UserError, match="the model cannot be read .*: copy the checkpoint again"):
        vlm.load(tmp_path)
    for path in tmp_path.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(data.UserError, match="the tokenizer cannot be read .*: copy its files"):
        vlm.load(tmp_path)


def test_info_says_what_a_folder_is(folder):
    lines = "\n".join(vlm.info(folder))
    assert "clip_vision_model + llama" in lines and "28 pixels, 4 tokens" in lines
    assert "missing         nothing" in lines


def test_identity_changes_when_a_weight_changes(tmp_path):
    from safetensors.torch import load_file, save_file
    m = vlm.load(write_llava(tmp_path))
    before = vlm.identity(m)
    assert vlm.identity(m) == before == vlm.identity(vlm.load(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert vlm.identity(m) != before
