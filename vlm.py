"""Vision-language models of the LLaVA type: load a folder, encode images, log-probs of responses, generate.

    python vlm.py info MODEL          what a folder is: size, template, image tokens, what is missing

A model is a llava-hf folder (config.json with model_type "llava", safetensors, tokenizer, chat template, image
processor), as transformers' LlavaForConditionalGeneration saves it. `classroom` is an alias of classroom/models/base0.

The two forwards return the same numbers (tests/test_vlm.py: log-probs to 1e-9, gradients to 1e-7 in float64):

    naive    one padded row per response, full logits, the explicit gather of losses.response_logps. To be read.
    packed   one row for the whole micro-batch and no padding (the default):

             [prompt + image | chosen | rejected] [prompt + image | ...]  ...  [prompt + image_rejected | chosen] ...

             The prompt is computed once for both responses. Positions of `rejected` restart where the prompt ends, and
             its attention skips `chosen`. Only the hidden states that predict a response token meet the lm_head.

Departures from the published code:
 1. The vision tower and the projector run once per image under no_grad, for policy and reference, chosen and
    rejected alike (the official trainers encode an image up to eight times per pair). Both are frozen, so nothing changes.
 2. Dropout is off (TRL switches it off in the official runs too); shared prefixes are exact only without it.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

import lora
import losses

CLASSROOM = Path(__file__).resolve().parent / "classroom" / "models"
IMAGE = "<image>"
# Templates for folders that bring none, and for presets that ask for one by name (Jinja, as tokenizers keep them).
# `vicuna`: LLaVA-1.5 as liuhaotian trains and serves it (conversation.py, "vicuna_v1"). `plain`: llava-hf's own, without system text.
_TURNS = ("{% for message in messages %}{% if message['role'] == 'user' %}USER: {% for part in message['content'] %}"
          "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} "
          "{% else %}ASSISTANT: {{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
           "and polite answers to the user's questions. ")
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


# ---------------------------------------------------------------------------------------------- loading
def resolve(folder):
    """The folder behind a name: `classroom` and the names in classroom/models/, or a path. Raises UserError."""
    path = CLASSROOM / "base0" if str(folder) == "classroom" else Path(folder)
    if not path.is_dir() and (CLASSROOM / str(folder)).is_dir():
        path = CLASSROOM / str(folder)
    if not path.is_dir():
        raise data.UserError(f"--model {folder}: no such folder; give a llava-hf folder or `classroom`")
    return path


def read_config(folder):
    """config.json of a folder that is a llava-hf checkpoint. Raises UserError, naming what the folder is instead."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise data.UserError(f"{path} is missing: {folder} is not a model folder in transformers' format") from None
    except ValueError as e:
        raise data.UserError(f"{path} is not valid JSON ({e}): copy the checkpoint again") from None
    if "text_config" not in config or config.get("model_type") != "llava":      # original LLaVA says "llava" as well
        raise data.UserError(f"{path} says model_type {config.get('model_type')!r} in {config.get('architectures')}: only "
                             "llava-hf folders (LlavaForConditionalGeneration) can be loaded")
    return config


def load(folder, adapter=None, dtype=torch.float32, device="cpu", template=None):
    """A VLM from a llava-hf folder, frozen and in eval mode.

    adapter: a PEFT-format LoRA folder put on top. template: None for the folder's own, a name in TEMPLATES, or Jinja.
    Raises data.UserError for what is not a llava-hf folder or lacks a part, lora.AdapterError for a bad adapter.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration
    folder = resolve(folder)
    config = read_config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except ImportError as e:
        raise data.UserError(f"{folder}: its tokenizer.model needs `pip install sentencepiece protobuf` ({e})") from None
    except (OSError, ValueError) as e:
        raise data.UserError(f"{folder}: the tokenizer cannot be read ({_line(e)}): copy its tokenizer files") from None
    try:
        image_processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    except (OSError, ValueError) as e:
        raise data.UserError(f"{folder}: the image processor cannot be read ({_line(e)}): "
                             "copy preprocessor_config.json") from None
    _register_attention()
    try:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (OSError, RuntimeError) as e:
        raise data.UserError(f"{folder}: the weights cannot be read ({_line(e)}): copy the checkpoint again") from None
    model.requires_grad_(False).eval().to(device)
    model.model.language_model.set_attn_implementation("packed")       # once, and never toggled: see packed_attention
    own = tokenizer.chat_template
    name = "given" if template and template not in TEMPLATES else template or ("folder" if own else "vicuna")
    vision = model.config.vision_config
    image_tokens = (vision.image_size // vision.patch_size) ** 2
    image_tokens += model.config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model"
    m = VLM(model, tokenizer, image_processor, own if name == "folder" else TEMPLATES.get(name, template), name,
            model.config.image_token_id, image_tokens, tokenizer.eos_token_id, folder, (folder / "classroom.json").exists())
    if tokenizer.convert_tokens_to_ids(IMAGE) != m.image_token_id:
        raise data.UserError(f"{folder}: the tokenizer gives {IMAGE} the id {tokenizer.convert_tokens_to_ids(IMAGE)}, "
                             f"config.json says {m.image_token_id}: one of the two files is not this model's")
    if adapter:
        lora.load(model, adapter)
    return m


def _line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---------------------------------------------------------------------------------------------- text and images
def prompt_ids(m, question, n_images=1, history=()):
    """Token ids of a prompt up to where the response starts; each image is a run of m.image_tokens image tokens.

    history: earlier [user, assistant] turns; the images stand in the first user turn. The tokenizer's BOS comes once,
    whether the template writes it or the tokenizer adds it.
    """
    messages, image_parts = [], [{"type": "image"}] * n_images
    for user, assistant in [*history, (question, None)]:
        messages.append({"role": "user", "content": [*image_parts, {"type": "text", "text": user}]})
        image_parts = []
        if assistant is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": assistant}]})
    text = m.tokenizer.apply_chat_template(messages, chat_template=m.template, tokenize=False, add_generation_prompt=True)
    bos = m.tokenizer.bos_token
    ids = m.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids
    if ids and ids[-1] == m.eos_id:                                    # tokenizers that close every text
        ids = ids[:-1]
    if ids.count(m.image_token_id) != n_images:
        raise data.UserError(f"the template {m.template_name!r} makes {ids.count(m.image_token_id)} image places for "
                             f"{n_images} images in {text[:80]!r}: question or template holds {IMAGE}")
    return [t for i in ids for t in ([i] * m.image_tokens if i == m.image_token_id else [i])]


def response_ids(m, text):
    """Token ids of a response, end-of-sequence last: tokenised apart from the prompt, as both official codes do.

    An EOS inside the text is removed. Raises UserError for a text with the image marker or without a token.
    """
    ids = m.tokenizer(text.replace(m.tokenizer.eos_token, "").strip(), add_special_tokens=False).input_ids
    if m.image_token_id in ids:
        raise data.UserError(f"the response {text[:60]!r} holds {IMAGE}: remove the marker")
    if not ids:
        raise data.UserError(f"the response {text[:60]!r} has no token: remove the record, or pass --skip_bad")
    return [*ids, m.eos_id]


def prepare(m, images):
    """PIL images -> pixel values (N, 3, H, W) float32, as the folder's image processor makes them."""
    return m.image_processor(images=list(images), return_tensors="pt").pixel_values


@torch.no_grad()
def encode_images(m, pixels):
    """Pixel values (N, 3, H, W) -> features (N, K, D) in the language model's space. Identical images may share a row."""
    if not len(pixels):
        return torch.zeros(0, m.image_tokens, m.model.config.text_config.hidden_size, device=m.device, dtype=m.model.dtype)
    features = torch.stack(m.model.get_image_features(pixel_values=pixels.to(m.device, m.model.dtype)).pooler_output)
    if features.shape[1] != m.image_tokens:
        raise data.UserError(f"{m.folder}: its vision tower gives {features.shape[1]} tokens an image, its config.json "
                             f"makes it {m.image_tokens}: the config is not this model's")
    return features


def embed(m, ids, features):
    """ids (..., T) and image features (N, K, D) -> embeddings (..., T, D), the features at the image places in order."""
    at_image = ids == m.image_token_id
    embeddings = m.model.get_input_embeddings()(ids.masked_fill(at_image, 0))
    return embeddings.masked_scatter(at_image[..., None], features.to(embeddings.dtype))


# ---------------------------------------------------------------------------------------------- forward: naive
def naive(m, pairs, features, needs):
    """The textbook concatenation: every response with its whole prompt in a right-padded row. Slow, and easy to read.

    pairs: list of data.Pair. features: (N, K, D), the images of every pair, then (where the loss reads
    `image_rejected`) the rejected images of every pair. needs: the fields of losses.Logps to compute.
    """
    rows = [(p.prompt, p.chosen) for p in pairs]
    rows += [(p.prompt, p.rejected) for p in pairs] if "rejected" in needs else []
    rows += [(p.prompt_rejected, p.chosen) for p in pairs] if "image_rejected" in needs else []
    of_pair = features.split([p.prompt.count(m.image_token_id) // m.image_tokens for p in pairs]
                             + [p.prompt_rejected.count(m.image_token_id) // m.image_tokens for p in pairs]
                             * ("image_rejected" in needs))
    true, damaged = of_pair[:len(pairs)], of_pair[len(pairs):]
    features = torch.cat([*true, *(true if "rejected" in needs else ()), *damaged])      # one image run a row
    length = max(len(p) + len(r) for p, r in rows)
    ids = torch.full((len(rows), length), m.eos_id)                                       # (R, T)
    labels = torch.full((len(rows), length), -100)
    for i, (prompt, response) in enumerate(rows):
        ids[i, :len(prompt) + len(response)] = torch.tensor(prompt + response)
        labels[i, len(prompt):len(prompt) + len(response)] = torch.tensor(response)
    # Right padding needs no mask under causal attention: no real token can see the padding behind it.
    logits = m.model(inputs_embeds=embed(m, ids.to(m.device), features), use_cache=False,
                     position_ids=torch.arange(length, device=m.device)[None]).logits    # (R, T, V)
    return _logps(losses.response_logps(logits, labels.to(m.device)), pairs, needs)


def _logps(sums, pairs, needs):
    """Sums of log-probs, all chosen, then all rejected, then all image_rejected -> losses.Logps of (B,) tensors."""
    part = iter(sums.split(len(pairs)))
    chosen = next(part)
    return losses.Logps(chosen, next(part) if "rejected" in needs else None, next(part) if "image_rejected" in needs else None,
                        chosen.new_tensor([len(p.chosen) for p in pairs]), chosen.new_tensor([len(p.rejected) for p in pairs]))


# ---------------------------------------------------------------------------------------------- forward: packed
def packed_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, segments=None, **kwargs):
    """Attention of one packed row; a plain SDPA call where no `segments` are given (generation, the naive forward).

    query (1, H, T, d), key and value (1, H_kv, T, d); segments: [(start, prompt, chosen, rejected)] lengths in tokens.
    Within a segment prompt + chosen is plainly causal; `rejected` sees the prompt and itself (lower-right causal).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    gqa = key.shape[1] != query.shape[1]
    out = []
    for start, prompt, chosen, rejected in segments:
        fork, middle, end = start + prompt, start + prompt + chosen, start + prompt + chosen + rejected
        first = slice(start, middle)
        out.append(F.scaled_dot_product_attention(query[:, :, first], key[:, :, first], value[:, :, first], is_causal=True,
                                                  scale=scaling, enable_gqa=gqa))
        if rejected:
            k, v = (torch.cat([x[:, :, start:fork], x[:, :, middle:end]], 2) for x in (key, value))
            out.append(F.scaled_dot_product_attention(query[:, :, middle:end], k, v, scale=scaling, enable_gqa=gqa,
                                                      attn_mask=causal_lower_right(rejected, prompt + rejected)))
    return torch.cat(out, 2).transpose(1, 2), None                    # (1, T, H, d)


def _register_attention():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)


def packed(m, pairs, features, needs):
    """The fast forward: the numbers of `naive` (same arguments) from one row without padding or repeated prompts."""
    row = data.pack(pairs, needs)
    logps = packed_token_logps(m, row, features)
    return _logps(torch.stack([response.sum() for response in logps.split(row.lengths)]), pairs, needs)


def packed_token_logps(m, row, features):
    """Log-prob of every response token of a data.Row, float32 (float64 in a float64 model): (N,)."""
    ids = row.ids.to(m.device)
    # The 4D tensor is not a mask: it makes transformers hand it through instead of guessing packed sequences from the
    # restarted positions, which would cut `rejected` off from its prompt. packed_attention does not read it.
    hidden = m.model.model.language_model(
        inputs_embeds=embed(m, ids, features)[None], position_ids=row.positions.to(m.device)[None],
        attention_mask=ids.new_zeros(1, 1, 1, 1), segments=row.segments, use_cache=False).last_hidden_state[0]   # (T, D)
    head = m.model.lm_head
    return ChunkedLogps.apply(hidden[row.predict.to(m.device)], head.weight, row.target.to(m.device), 1024)


class ChunkedLogps(torch.autograd.Function):
    """log p(target) from hidden states (N, D) and the frozen lm_head (V, D), never holding more than chunk x V logits.

    The gradient is taken in the forward, while a chunk's probabilities are at hand: d logp / dh = W[y] - p W.
    """
    @staticmethod
    def forward(ctx, hidden, weight, target, chunk):
        logps, gradients = [], []
        for h, y in zip(hidden.split(chunk), target.split(chunk), strict=True):
            logits = (h @ weight.T).to(torch.promote_types(h.dtype, torch.float32))       # (n, V)
            logps.append(logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(1))
            if ctx.needs_input_grad[0]:
                gradients.append(weight[y] - logits.softmax(1).to(weight.dtype) @ weight)
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        gradient, = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), None, None, None


FORWARDS = {"packed": packed, "naive": naive}


@torch.no_grad()
def word_logps(m, features, question, answer):
    """[(word, log-prob)] of an answer's words given one image's features (1, K, D); a word is what white space parts."""
    encoded = m.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    prompt = prompt_ids(m, question)
    pair = data.Pair("", prompt, prompt, encoded.input_ids, [])
    logps = packed_token_logps(m, data.pack([pair], {"chosen"}), features).tolist()
    words = []
    for (start, end), logp in zip(encoded.offset_mapping, logps, strict=True):
        if words and not answer[words[-1][1]:start].strip() and words[-1][1] == start and not answer[start:start + 1].isspace():
            words[-1][1:] = [end, words[-1][2] + logp]
        else:
            words.append([start, end, logp])
    return [(answer[start:end].strip(), logp) for start, end, logp in words]


# ---------------------------------------------------------------------------------------------- generation
@torch.no_grad()
def generate(m, images, questions, max_new_tokens=64, batch_size=64, sample_seed=None, temperature=1.0, progress=None):
    """Answers (list of str) to questions about images (a list of PIL images each, possibly empty).

    Greedy; with sample_seed drawn at `temperature` (the same seed, inputs and batch size give the same draw). Batches
    are left-padded, questions of similar length together. progress: called with the number of answers done at once.
    """
    prompts = [prompt_ids(m, q, len(i)) for q, i in zip(questions, images, strict=True)]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    devices = [m.device] if m.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(sample_seed or 0)
        for at in range(0, len(order), batch_size):
            batch = order[at:at + batch_size]
            length = max(len(prompts[i]) for i in batch)
            ids = torch.tensor([[m.eos_id] * (length - len(prompts[i])) + prompts[i] for i in batch])
            mask = torch.tensor([[0] * (length - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
            pictures = [picture for i in batch for picture in images[i]]
            pixels = {"pixel_values": prepare(m, pictures).to(m.device, m.model.dtype)} if pictures else {}
            sampling = {"do_sample": False} if sample_seed is None else {
                "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            out = m.model.generate(input_ids=ids.to(m.device), attention_mask=mask.to(m.device), pad_token_id=m.eos_id,
                                   max_new_tokens=max_new_tokens, **sampling, **pixels)
            texts = m.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text.strip()
            if progress:
                progress(len(batch))
    return answers


# ---------------------------------------------------------------------------------------------- python vlm.py info
def info(folder):
    """Lines that say what a model folder is, read from its files alone (no weights are loaded)."""
    from safetensors import safe_open
    folder = resolve(folder)
    config = read_config(folder)
    vision, text = config["vision_config"], config["text_config"]
    parameters, types = 0, set()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not a dict)
                piece = tensors.get_slice(name)
                parameters += torch.Size(piece.get_shape()).numel()
                types.add(piece.get_dtype())
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    missing = [what for what, names in {
        "weights": ["*.safetensors", "*.bin"], "tokenizer": ["tokenizer.json", "tokenizer.model", "vocab.json"],
        "chat template (the vicuna one is used)": ["chat_template.jin*", "chat_template.json", "tokenizer_config.json"],
        "image processor": ["preprocessor_config.json", "processor_config.json"],
    }.items() if not any(any(folder.glob(n)) for n in names)]
    patches = (vision.get("image_size", 224) // vision.get("patch_size", 32)) ** 2
    return [f"folder          {folder}", f"model           llava: {vision.get('model_type')} + {text.get('model_type')}",
            f"parameters      {parameters:,} in {', '.join(sorted(types)) or '-'}, {size / 2**20:,.1f} MiB",
            f"image           {vision.get('image_size')} pixels, {patches} tokens",
            f"vocabulary      {text.get('vocab_size')}", f"missing         {', '.join(missing) or 'nothing'}"]


def main():
    parser = data.Parser(prog="vlm.py", description=__doc__.split("\n")[0])
    command = parser.add_subparsers(dest="command", required=True)
    command.add_parser("info", help="what a model folder is").add_argument("model", help="llava-hf folder, or classroom")
    arguments = parser.parse_args()
    try:
        print("\n".join(info(arguments.model)))
    except data.UserError as e:
        sys.exit(f"vlm.py: {e}")


if __name__ == "__main__":
    main()
