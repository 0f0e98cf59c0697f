"""Vision-language models of the LLaVA type: load a folder, encode images, log-probs of responses, generate.

    python vlm.py info MODEL          what a folder is: size, template, image tokens, what is missing

A model is a llava-hf folder, as transformers' LlavaForConditionalGeneration saves it: config.json (model_type
"llava"), safetensors, tokenizer, chat template, image processor. `classroom` is classroom/models/base0.

The two forwards return the same numbers (tests/test_vlm.py, float64: log-probs to 1e-9, gradients to 1e-7):

    naive    one padded row per response, full logits, the gather of losses.response_logps. To be read.
    packed   one row for the whole micro-batch and no padding (the default):
             [prompt, image | chosen | rejected] [prompt, image | ...] .. [prompt, image_rejected | chosen] ..
             The prompt is computed once for both responses. Positions of `rejected` restart where the prompt
             ends, and its attention skips `chosen`. Only what predicts a response token meets the lm_head.

Departures from the published code:
 1. Vision tower and projector run once per image under no_grad, for policy and reference, chosen and rejected
    alike (the official trainers encode an image up to eight times a pair). Both are frozen: nothing changes.
 2. Dropout is off (TRL switches it off in the official runs too); shared prefixes are exact only without it.
"""
import bisect
import hashlib
import json
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence

import data
import lora
import losses

CLASSROOM = Path(__file__).resolve().parent / "classroom" / "models"
IMAGE = "<image>"
# Jinja templates for folders that bring none, and for presets that ask for one by name. `vicuna`: LLaVA-1.5
# as liuhaotian trains and serves it (conversation.py, "vicuna_v1"). `plain`: llava-hf's own, no system text.
_TURNS = ("{% for message in messages %}{% if message['role'] == 'user' %}USER: "
          "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
          "{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
          "{% else %}ASSISTANT: {{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
           "The assistant gives helpful, detailed, and polite answers to the user's questions. ")
TEMPLATES = {"plain": _TURNS, "vicuna": _SYSTEM + _TURNS}


@dataclass
class VLM:
    """A loaded model and what belongs to it."""
    model: Any                 # LlavaForConditionalGeneration, frozen (LoRA comes on top)
    tokenizer: Any
    image_processor: Any
    template: str              # Jinja
    template_name: str         # "folder", "plain", "vicuna" or "given": what the log says
    image_token_id: int
    image_tokens: int          # K: tokens an image becomes
    eos_id: int
    folder: Path
    is_classroom: bool         # made by classroom/make.py: before/after are classroom metrics

    @property
    def device(self):
        return self.model.device


# -------------------------------------------------------------------------------- loading
def resolve(folder):
    """The folder behind a name: `classroom`, a path, or a name in classroom/models/. Raises UserError."""
    classroom = str(folder) == "classroom"
    for path in [CLASSROOM / "base0"] if classroom else [Path(folder), CLASSROOM / str(folder)]:
        if path.is_dir():
            return path
    raise data.UserError(f"--model {folder}: no such folder; give a llava-hf folder or `classroom`")


def read_config(folder):
    """config.json of a llava-hf checkpoint. Raises UserError, naming what the folder is instead."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise data.UserError(f"{path} is missing: {folder} is no folder of a transformers model") from None
    except ValueError as e:
        raise data.UserError(f"{path} is not valid JSON ({e}): copy the checkpoint again") from None
    # The original LLaVA's model_type is "llava" as well, but it has no text_config.
    if "text_config" not in config or config.get("model_type") != "llava":
        raise data.UserError(f"{path} says model_type {config.get('model_type')!r}, "
                             f"{config.get('architectures')}: only llava-hf folders "
                             "(LlavaForConditionalGeneration) can be loaded")
    return config


def load(folder, adapter=None, dtype=torch.float32, device="cpu", template=None):
    """A VLM from a llava-hf folder, frozen and in eval mode.

    adapter: a PEFT-format LoRA folder put on top. template: None for the folder's own, a name in TEMPLATES or
    Jinja. Raises UserError for a folder that is not llava-hf or lacks a part, AdapterError for a bad adapter.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration
    folder = resolve(folder)
    read_config(folder)
    _register_attention()
    tokenizer = _part(folder, AutoTokenizer, "tokenizer",
                      "copy its files; a tokenizer.model needs `pip install sentencepiece protobuf`")
    image_processor = _part(folder, AutoImageProcessor, "image processor",
                            "copy preprocessor_config.json", backend="pil")
    model = _part(folder, LlavaForConditionalGeneration, "model", "copy the checkpoint again", dtype=dtype)
    model.requires_grad_(False).eval().to(device)
    model.model.language_model.set_attn_implementation("packed")    # once for all calls: see packed_attention

    own, image_id = tokenizer.chat_template, model.config.image_token_id
    name = template if template in TEMPLATES else "given" if template else "folder" if own else "vicuna"
    template = own if name == "folder" else TEMPLATES.get(name, template)
    if (found := tokenizer.convert_tokens_to_ids(IMAGE)) != image_id:
        raise data.UserError(f"{folder}: the tokenizer gives {IMAGE} the id {found}, config.json "
                             f"says {image_id}: one of the two files is not this model's")
    vision, select = model.config.vision_config, model.config.vision_feature_select_strategy
    class_token = select == "full" and vision.model_type == "clip_vision_model"
    if adapter:
        lora.load(model, adapter)
    return VLM(model, tokenizer, image_processor, template, name, image_id,
               image_tokens=(vision.image_size // vision.patch_size) ** 2 + class_token,
               eos_id=tokenizer.eos_token_id, folder=folder,
               is_classroom=(folder / "classroom.json").exists())


def _part(folder, kind, what, mend, **options):
    from safetensors import SafetensorError
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as e:    # the last: a torn file
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise data.UserError(f"{folder}: the {what} cannot be read ({reason}): {mend}") from None


def identity(m):
    """What tells one base from another: 16 hex digits of a hash over config.json and the weights files.

    Of each file the name, the size and 64 spread blocks of 64 KiB (all of it, up to 4 MiB): a tuned model
    differs nearly everywhere, and 14 GB are not read a second time.
    """
    digest = hashlib.sha256((m.folder / "config.json").read_bytes())
    for path in sorted([*m.folder.glob("*.safetensors"), *m.folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for block in range(64):
                file.seek(size * block // 64)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()[:16]


# -------------------------------------------------------------------------------- text and images
def prompt_ids(m, question, n_images=1, history=()):
    """Token ids of a prompt, up to where the response starts; each image is a run of m.image_tokens tokens.

    history: earlier [user, assistant] turns; the images stand in the first user turn. BOS comes once, whether
    the template writes it or the tokenizer adds it. Raises UserError where the text holds IMAGE.
    """
    messages, images = [], [{"type": "image"}] * n_images
    for user, assistant in [*history, (question, None)]:
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": user}]})
        images = []
        if assistant is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": assistant}]})
    text = m.tokenizer.apply_chat_template(messages, chat_template=m.template, tokenize=False,
                                           add_generation_prompt=True)
    bos = m.tokenizer.bos_token
    ids = m.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids
    if ids and ids[-1] == m.eos_id:                                    # some tokenizers close every text
        ids = ids[:-1]
    if (places := ids.count(m.image_token_id)) != n_images:
        raise data.UserError(f"the template {m.template_name!r} makes {places} image places for {n_images} "
                             f"images in {text[:80]!r}: question or template holds {IMAGE}")
    return [t for i in ids for t in ([i] * m.image_tokens if i == m.image_token_id else [i])]


def response_ids(m, text):
    """Token ids of a response, EOS last: tokenised apart from the prompt, as both official codes do.

    An EOS inside the text is removed. Raises UserError for a text with the image marker or without a token.
    """
    ids = m.tokenizer(text.replace(m.tokenizer.eos_token, "").strip(), add_special_tokens=False).input_ids
    if m.image_token_id in ids:
        raise data.UserError(f"the response {text[:60]!r} holds {IMAGE}: remove the marker")
    if not ids:
        raise data.UserError(f"the response {text[:60]!r} has no token: drop the record or pass --skip_bad")
    return [*ids, m.eos_id]


def prepare(m, images):
    """PIL images -> pixel values (N, 3, H, W) float32, as the folder's image processor makes them."""
    return m.image_processor(images=list(images), return_tensors="pt").pixel_values


@torch.no_grad()
def encode_images(m, pixels):
    """Pixel values (N, 3, H, W) -> features (N, K, D) in the language model's space, or UserError."""
    pixels = pixels.to(m.device, m.model.dtype)
    if not len(pixels):
        return pixels.new_zeros(0, m.image_tokens, m.model.config.text_config.hidden_size)
    features = torch.stack(m.model.get_image_features(pixel_values=pixels).pooler_output)       # (N, K, D)
    if features.shape[1] != m.image_tokens:
        raise data.UserError(f"{m.folder}: its vision tower gives {features.shape[1]} tokens an image, its "
                             f"config.json makes it {m.image_tokens}: the config is not this model's")
    return features


def embed(m, ids, features):
    """ids (..., T), features (N, K, D) -> embeddings (..., T, D), the features at the image places."""
    at_image = ids == m.image_token_id
    embeddings = m.model.get_input_embeddings()(ids.masked_fill(at_image, 0))
    return embeddings.masked_scatter(at_image[..., None], features.to(embeddings.dtype))


# -------------------------------------------------------------------------------- forward: naive
def naive(m, pairs, features, needs):
    """The textbook concatenation: every response with its whole prompt in a padded row. Slow, easy to read.

    pairs: list of data.Pair. features: (N, K, D), the images of every pair, then (where the loss reads
    `image_rejected`) the rejected images of every pair. needs: the fields of losses.Logps to compute.
    """
    rows = [(p.prompt, p.chosen) for p in pairs]
    rows += [(p.prompt, p.rejected) for p in pairs] if "rejected" in needs else []
    rows += [(p.prompt_rejected, p.chosen) for p in pairs] if "image_rejected" in needs else []
    if "rejected" in needs:                             # its rows show the true images a second time
        n = sum(p.prompt.count(m.image_token_id) for p in pairs) // m.image_tokens
        features = torch.cat([features[:n], features])
    ids = _pad([prompt + response for prompt, response in rows], m.eos_id)                      # (R, T)
    labels = _pad([[-100] * len(prompt) + response for prompt, response in rows], -100)         # (R, T)
    positions = torch.arange(ids.shape[1], device=m.device)[None]                               # (1, T)
    # Right padding needs no mask under causal attention: no real token can see the padding behind it.
    logits = m.model(inputs_embeds=embed(m, ids.to(m.device), features), position_ids=positions,
                     use_cache=False).logits                                                    # (R, T, V)
    return _logps(losses.response_logps(logits, labels.to(m.device)), pairs, needs)


def _pad(rows, value, side="right"):
    rows = [torch.tensor(row) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def _logps(sums, pairs, needs):
    """Summed log-probs (R,): all chosen, all rejected, all image_rejected -> losses.Logps of (B,)."""
    part = iter(sums.split(len(pairs)))
    return losses.Logps(chosen=next(part),
                        rejected=next(part) if "rejected" in needs else None,
                        image_rejected=next(part) if "image_rejected" in needs else None,
                        chosen_tokens=sums.new_tensor([len(p.chosen) for p in pairs]),
                        rejected_tokens=sums.new_tensor([len(p.rejected) for p in pairs]))


# -------------------------------------------------------------------------------- forward: packed
def packed_attention(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
    """Attention of one packed row; transformers' SDPA where no `segments` are given (generation, naive).

    query (1, H, T, d), key and value (1, H_kv, T, d); segments: [(start, prompt, chosen, rejected)], tokens.
    Within a segment prompt + chosen is causal; `rejected` sees the prompt and itself (lower-right causal).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    gqa = key.shape[1] != query.shape[1]
    attend = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=gqa)
    out = []
    for start, prompt, chosen, rejected in segments:
        middle, end = start + prompt + chosen, start + prompt + chosen + rejected
        out.append(attend(*(x[:, :, start:middle] for x in (query, key, value)), is_causal=True))
        if rejected:
            k, v = (torch.cat([x[:, :, start:start + prompt], x[:, :, middle:end]], 2) for x in (key, value))
            out.append(attend(query[:, :, middle:end], k, v,
                              attn_mask=causal_lower_right(rejected, prompt + rejected)))
    return torch.cat(out, 2).transpose(1, 2), None                     # (1, T, H, d)


def _register_attention():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)


def packed(m, pairs, features, needs):
    """The fast forward: the numbers of `naive` (same arguments) from one row, no padding, no prompt twice."""
    row = data.pack(pairs, needs)
    logps = packed_token_logps(m, row, features)
    return _logps(torch.stack([response.sum() for response in logps.split(row.lengths)]), pairs, needs)


def packed_token_logps(m, row, features):
    """Log-prob of every response token of a data.Row, float32 (float64 in a float64 model): (N,)."""
    ids = row.ids.to(m.device)
    # The 4D tensor is no mask: transformers hands it through, where it would else guess packed sequences from
    # the restarted positions and cut `rejected` off from its prompt. packed_attention does not read it.
    hidden = m.model.model.language_model(
        inputs_embeds=embed(m, ids, features)[None], position_ids=row.positions.to(m.device)[None],
        attention_mask=ids.new_zeros(1, 1, 1, 1), segments=row.segments, use_cache=False).last_hidden_state[0]
    hidden = hidden[row.predict.to(m.device)]                          # (T, D) -> (N, D)
    return ChunkedLogps.apply(hidden, m.model.lm_head.weight, row.target.to(m.device), 1024)


class ChunkedLogps(torch.autograd.Function):
    """log p(target) of hidden states (N, D) under the frozen lm_head (V, D): never over chunk x V logits.

    The gradient is taken in the forward, with a chunk's probabilities at hand: d logp / dh = W[y] - p W.
    """
    @staticmethod
    def forward(ctx, hidden, weight, target, chunk):
        logps, gradients = [], []
        for h, y in zip(hidden.split(chunk), target.split(chunk), strict=True):
            logits = (h @ weight.T).to(torch.promote_types(h.dtype, torch.float32))             # (n, V)
            logps.append(logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(1))
            if ctx.needs_input_grad[0]:
                gradients.append(weight[y] - logits.softmax(1).to(weight.dtype) @ weight)       # (n, D)
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        gradient, = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), None, None, None


FORWARDS = {"packed": packed, "naive": naive}


@torch.no_grad()
def word_logps(m, features, question, answer):
    """[(word, log-prob)] of an answer given an image's features (1, K, D); white space parts words."""
    words = list(re.finditer(r"\S+", answer))
    if not words:
        return []
    encoded = m.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    prompt = prompt_ids(m, question)
    row = data.pack([data.Pair("", prompt, prompt, encoded.input_ids, [])], {"chosen"})
    logps = packed_token_logps(m, row, features).tolist()
    # A token belongs to the first word that ends behind its start: white space goes with what follows it.
    ends, sums = [word.end() for word in words], [0.0] * len(words)
    for (start, _), logp in zip(encoded.offset_mapping, logps, strict=True):
        sums[min(bisect.bisect_right(ends, start), len(words) - 1)] += logp
    return [(word.group(), logp) for word, logp in zip(words, sums, strict=True)]


# -------------------------------------------------------------------------------- generation
@torch.no_grad()
def generate(m, images, questions, max_new_tokens=64, batch_size=64, sample_seed=None, temperature=1.0,
             progress=None):
    """Answers (list of str) to questions about images (a list of PIL images each, possibly empty).

    Greedy; with sample_seed drawn at `temperature` (the same seed, inputs and batch size give the same draw).
    Batches are left-padded, prompts of similar length together. progress: called with each batch's size.
    """
    options = dict(do_sample=False, pad_token_id=m.eos_id, max_new_tokens=max_new_tokens)
    if sample_seed is not None:
        options |= dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    prompts = [prompt_ids(m, q, len(i)) for q, i in zip(questions, images, strict=True)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    with torch.random.fork_rng(devices=[m.device] if m.device.type == "cuda" else []):
        torch.manual_seed(sample_seed or 0)
        for at in range(0, len(order), batch_size):
            batch = order[at:at + batch_size]
            ids = _pad([prompts[i] for i in batch], m.eos_id, "left")                           # (R, T)
            mask = _pad([[1] * len(prompts[i]) for i in batch], 0, "left")                      # (R, T)
            pictures = [picture for i in batch for picture in images[i]]
            pixels = {"pixel_values": prepare(m, pictures).to(m.device, m.model.dtype)} if pictures else {}
            out = m.model.generate(input_ids=ids.to(m.device), attention_mask=mask.to(m.device),
                                   **pixels, **options)                                         # (R, T + new)
            texts = m.tokenizer.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text.strip()
            if progress:
                progress(len(batch))
    return answers


# -------------------------------------------------------------------------------- python vlm.py info
def info(folder):
    """Lines that say what a model folder is, read from its files alone (no weights are loaded)."""
    from safetensors import safe_open
    folder = resolve(folder)
    config = read_config(folder)
    vision, text = config["vision_config"], config["text_config"]
    parameters, size, types = 0, 0, set()
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():
                piece = tensors.get_slice(name)
                parameters += torch.Size(piece.get_shape()).numel()
                types.add(piece.get_dtype())
    parts = {"weights": ["*.safetensors", "*.bin"],
             "tokenizer": ["tokenizer.json", "tokenizer.model", "vocab.json"],
             "chat template (the vicuna one is used)": ["chat_template.j*", "tokenizer_config.json"],
             "image processor": ["preprocessor_config.json", "processor_config.json"]}
    missing = [what for what, names in parts.items() if not any(any(folder.glob(n)) for n in names)]
    patches = (vision.get("image_size", 224) // vision.get("patch_size", 32)) ** 2
    return [f"folder          {folder}",
            f"model           llava: {vision.get('model_type')} + {text.get('model_type')}",
            f"parameters      {parameters:,} in {', '.join(sorted(types)) or '-'}, {size / 2**20:,.1f} MiB",
            f"image           {vision.get('image_size')} pixels, {patches} tokens",
            f"vocabulary      {text.get('vocab_size')}",
            f"missing         {', '.join(missing) or 'nothing'}"]


def main():
    parser = data.Parser(prog="vlm.py", description=__doc__.split("\n")[0])
    command = parser.add_subparsers(dest="command", required=True)
    info_parser = command.add_parser("info", help="what a model folder is")
    info_parser.add_argument("model", help="llava-hf folder, or classroom")
    try:
        print("\n".join(info(parser.parse_args().model)))
    except data.UserError as e:
        sys.exit(f"vlm.py: {e}")


if __name__ == "__main__":
    main()
