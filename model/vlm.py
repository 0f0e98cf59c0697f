"""Vision-language models of the LLaVA type: load a folder, encode images, log-probs of responses, generate.

A model is a llava-hf folder, as transformers' LlavaForConditionalGeneration (LLaVA-1.5, imported Bunny) or
LlavaNextForConditionalGeneration (LLaVA-1.6) saves it; `classroom` is classroom/models/base0. What differs
between them, texts and images, is in front.py.

The two forwards return the same numbers (tests/test_vlm.py, float64: log-probs to 1e-9, gradients to 1e-7):

    naive    one padded row per response, full logits, the gather of losses.response_logps. To be read.
    packed   one row for the whole micro-batch and no padding (the default):
             [prompt, image | chosen | rejected] [prompt, image | ...] .. [prompt, image_rejected | chosen] ..
             The prompt is computed once for both responses. Positions of `rejected` restart where the prompt
             ends, and its attention skips `chosen`. Only what predicts a response token meets the lm_head.

Departures from the published code:
 1. Vision tower and projector run once per image, for policy and reference, chosen and rejected alike (the
    official trainers encode an image up to eight times a pair). Both are frozen: nothing changes. Without an
    adapter the projector trains, and the reference's encodes once more.
 2. Dropout is off (TRL switches it off in the official runs too); shared prefixes are exact only without it.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of every command; run: python train_dpo.py --help"))

import bisect
import contextlib
import copy
import ctypes
import mmap
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import data
import lora
import losses
from model import front


@dataclass
class VLM:
    """A loaded model and what belongs to it."""
    front: Any                 # its family's object: tokenizer, template, images
    model: Any                 # transformers' class, frozen (LoRA comes on top)
    words: int                 # rows of lm_head that are tokens: the softmax's
    frozen: Any = None         # where the model itself trains: a VLM, the copy that does not

    @property
    def device(self):
        return self.model.device

    @property
    def language_model(self):
        return self.front.language_model(self.model)


class Features(NamedTuple):
    """Of a micro-batch's images, in the pairs' order: lists of (K, D), one an image."""
    images: list
    rejected: list


# -------------------------------------------------------------------------------- loading
def load(folder, adapter=None, dtype=torch.float32, device="cpu", template=None, preparation=""):
    """A VLM from a llava-hf folder, or from what front.open_folder made of it, frozen and in eval mode.

    adapter: a PEFT-format LoRA folder put on top. template, preparation: as open_folder takes them. Raises
    UserError for a folder that is not llava-hf or lacks a part, and for a bad adapter.
    """
    import transformers
    opened = isinstance(folder, front.Llava)
    family = folder if opened else front.open_folder(folder, template, preparation)
    _register_attention()
    for name in ("resid_pdrop", "embd_pdrop", "attention_dropout"):        # Departure 2
        if hasattr(family.config.text_config, name):
            setattr(family.config.text_config, name, 0.0)
    kind = getattr(transformers, family.architecture)
    model, found = data.from_folder(kind, family.folder, "model", "copy the checkpoint again",
                                    dtype="auto", config=family.config, output_loading_info=True)
    if lack := sorted(found["missing_keys"]):                      # transformers would draw them at random
        raise data.UserError(f"{family.folder}: {len(lack)} weights are missing, {lack[0]} first: copy the "
                             "checkpoint again")
    for weight in model.parameters():      # mapped until here, not read; in the file they lie unaligned, and
        mapped, weight.data = weight.data, weight.data.to(device, dtype, copy=True)    # products are slower
        forget(mapped)
    model.requires_grad_(False).eval().to(device)
    family.language_model(model).set_attn_implementation("packed")  # once for all calls: see packed_attention
    # The importer adds a row of zeros for <image> behind the vocabulary: no logit of the published model.
    words, weight = family.image_token_id, model.lm_head.weight
    if weight[words:].any():
        words = len(weight)
    if adapter:
        lora.load(model, adapter)
    return VLM(family, model, words)


def train_whole(m):
    """Without an adapter: all but the vision tower trains, as in LLaVA's own fine-tuning.

    m.frozen becomes a copy of what trains, and shares the tower.
    """
    tower = m.model.get_submodule(m.front.tower)
    m.frozen = replace(m, model=copy.deepcopy(m.model, {id(tower): tower}))
    m.model.requires_grad_(True)
    tower.requires_grad_(False)


@contextlib.contextmanager
def base_of(m):
    """The model as it was before training, inside the `with`: m without its adapter, or its frozen copy."""
    if m.frozen:
        yield m.frozen
    else:
        with lora.lora_disabled(m.model):
            yield m


def forget(mapped):
    """Give the memory of a tensor that is mapped from a file back to the system; the file keeps the bytes.

    Without it loading would need the memory of the weights twice.
    """
    page = mmap.PAGESIZE
    first, last = -(-mapped.data_ptr() // page) * page, (mapped.data_ptr() + mapped.nbytes) // page * page
    if sys.platform == "linux" and last > first:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def keep_memory():
    """Keep freed tensors' memory in the process, for the next ones of their size. For a main to call on CPUs.

    A step takes and frees the same gigabytes again and again; glibc gives the large blocks back to the system
    each time, which clears them anew: up to a tenth of a step's time, until its own threshold has grown.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        trim_threshold, mmap_max = -1, -4                                          # as malloc.h numbers them
        mallopt(trim_threshold, -1)
        mallopt(mmap_max, 0)


# -------------------------------------------------------------------------------- images in the model
def encode_images(m, batch):
    """Features of a data.Batch; no graph unless something in front of the language model trains.

    Raises UserError if an image's features are not as many as its places in the prompt.
    """
    n = len(batch.images)
    found = m.front.encode(m.model, [*batch.images, *batch.images_rejected])
    features = Features(found[:n], found[n:])
    check_places(m, [(p.id, p.prompt, p.sizes) for p in batch.pairs], features.images)
    if batch.images_rejected:
        check_places(m, [(p.id, p.prompt_rejected, p.sizes_rejected) for p in batch.pairs], features.rejected)
    return features


def check_places(m, prompts, features):
    """Raise UserError for a prompt whose places its images' features do not fill."""
    lengths = iter([len(x) for x in features])
    for id, ids, sizes in prompts:
        places, filled = ids.count(m.front.image_token_id), sum(next(lengths, 0) for _ in sizes)
        if places != filled:
            raise data.UserError(f"{id}: its prompt has {places} places for images, the vision tower gives "
                                 f"{filled} features: config.json in {m.front.folder} is not this model's")


def embed(m, ids, features):
    """ids (..., T), the features [(K, D)] of their images in order -> embeddings (..., T, D)."""
    at_image = ids == m.front.image_token_id
    embeddings = m.model.get_input_embeddings()(ids.masked_fill(at_image, 0))
    if not features:
        return embeddings
    return embeddings.masked_scatter(at_image[..., None], torch.cat(features).to(embeddings.dtype))


# -------------------------------------------------------------------------------- forward: naive
def naive(m, pairs, features, needs):
    """The textbook concatenation: every response with its whole prompt in a padded row. Slow, easy to read.

    pairs: list of data.Pair. features: their Features. needs: the fields of losses.Logps to compute.
    """
    rows, shown = [(p.prompt, p.sizes, p.chosen) for p in pairs], [*features.images]
    if "rejected" in needs:
        rows += [(p.prompt, p.sizes, p.rejected) for p in pairs]
        shown += features.images
    if "image_rejected" in needs:
        rows += [(p.prompt_rejected, p.sizes_rejected, p.chosen) for p in pairs]
        shown += features.rejected
    ids = _pad([prompt + response for prompt, _, response in rows], m.front.eos_id)             # (R, T)
    labels = _pad([[-100] * len(prompt) + response for prompt, _, response in rows], -100)      # (R, T)
    positions = []
    for prompt, sizes, _ in rows:
        own = m.front.positions(prompt, sizes)                                             # (P,) or (3, P)
        after = data.positions_after(own, ids.shape[1] - len(prompt))
        positions.append(torch.cat([own, after], -1))
    positions = torch.stack(positions, -2).to(m.device)                              # (R, T) or (3, R, T)
    # Right padding needs no mask under causal attention: no real token can see the padding behind it.
    logits = m.model(inputs_embeds=embed(m, ids.to(m.device), shown), position_ids=positions,
                     use_cache=False).logits[..., :m.words]                                     # (R, T, V)
    return _logps(losses.response_logps(logits, labels.to(m.device)), pairs, needs)


def _pad(rows, value, side="right"):
    rows = [torch.tensor(row) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def _logps(sums, pairs, needs):
    """Summed log-probs (R,): all chosen, all rejected, all image_rejected -> losses.Logps of (B,)."""
    fields = [name for name in ("chosen", "rejected", "image_rejected") if name == "chosen" or name in needs]
    parts = dict(zip(fields, sums.split(len(pairs)), strict=True))
    return losses.Logps(**parts, chosen_tokens=sums.new_tensor([len(p.chosen) for p in pairs]),
                        rejected_tokens=sums.new_tensor([len(p.rejected) for p in pairs]))


# -------------------------------------------------------------------------------- forward: packed
def packed_attention(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
    """Attention of one packed row; transformers' SDPA where no `segments` are given (generation, naive).

    query (1, H, T, d), key and value (1, H_kv, T, d); segments: [data.Segment].
    Within a segment prompt + chosen is causal; `rejected` sees the prompt and itself (lower-right causal).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    window = kwargs.get("sliding_window")
    longest = max(s.prompt + max(s.chosen, s.rejected) for s in segments)
    if window and longest > window:
        raise data.UserError(f"a pair of {longest} tokens is longer than the model's sliding window of "
                             f"{window}: pass --forward naive, or a smaller --set max_length")
    attend = partial(F.scaled_dot_product_attention, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    # One split, whose gradient is one cat: that of a slice is zeros for the whole row, slice by slice.
    lengths, out = [n for s in segments for n in (s.prompt + s.chosen, s.rejected)], []
    queries, keys, values = (x.split(lengths, 2) for x in (query, key, value))
    for i, segment in enumerate(segments):
        q, k, v = queries[2 * i], keys[2 * i], values[2 * i]                         # prompt + chosen
        out.append(attend(q, k, v, is_causal=True))
        if segment.rejected:
            k = torch.cat([k[:, :, :segment.prompt], keys[2 * i + 1]], 2)
            v = torch.cat([v[:, :, :segment.prompt], values[2 * i + 1]], 2)
            mask = causal_lower_right(segment.rejected, k.shape[2])
            out.append(attend(queries[2 * i + 1], k, v, attn_mask=mask))
    return torch.cat(out, 2).transpose(1, 2), None                                          # (1, T, H, d)


def _register_attention():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask
    AttentionInterface.register("packed", packed_attention)
    AttentionMaskInterface.register("packed", sdpa_mask)


def packed(m, pairs, features, needs):
    """The fast forward: the numbers of `naive` (same arguments) from one row, no padding, no prompt twice."""
    row = data.pack(pairs, needs, m.front.positions)
    shown = [*features.images, *(features.rejected if "image_rejected" in needs else [])]
    logps = packed_token_logps(m, row, shown)
    return _logps(torch.stack([response.sum() for response in logps.split(row.lengths)]), pairs, needs)


def packed_token_logps(m, row, features):
    """Log-prob of every response token of a data.Row, float32 (float64 in a float64 model): (N,).

    features: [(K, D)] of the row's images.
    """
    ids, positions = row.ids.to(m.device), row.positions.to(m.device)
    # The 4D tensor is not a mask and nobody reads it. Without it, transformers would guess packed sequences
    # from the restarted positions, and cut `rejected` off from its prompt.
    hidden = m.language_model(
        inputs_embeds=embed(m, ids, features)[None], position_ids=positions.unsqueeze(-2),
        attention_mask=ids.new_zeros(1, 1, 1, 1), segments=row.segments, use_cache=False,
        **m.front.language_inputs(row, features)).last_hidden_state[0]
    hidden = hidden[row.predict.to(m.device)]                          # (T, D) -> (N, D)
    weight, target, chunk = m.model.lm_head.weight[:m.words], row.target.to(m.device), 1024
    if weight.requires_grad and torch.is_grad_enabled():               # a chunk's logits are made again
        return torch.cat([checkpoint(_token_logps, h, weight, y, use_reentrant=False)
                          for h, y in zip(hidden.split(chunk), target.split(chunk), strict=True)])
    return ChunkedLogps.apply(hidden, weight, target, chunk)


def _token_logps(hidden, weight, target):
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))           # (n, V)
    return logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)


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
def word_logps(m, image, question, answer):
    """[(word, log-prob)] of an answer about one PIL image; white space parts words."""
    words = list(re.finditer(r"\S+", answer))
    if not words:
        return []
    encoded = m.front.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    prompt = m.front.prompt_ids(question, [image.size])
    pair = data.Pair("", prompt, prompt, encoded.input_ids, [], (image.size,))
    features = encode_images(m, data.Batch([pair], m.front.prepare([image])))
    row = data.pack([pair], {"chosen"}, m.front.positions)
    logps = packed_token_logps(m, row, features.images).tolist()
    # A token belongs to the first word that ends behind its start: white space goes with what follows it.
    ends, sums = [word.end() for word in words], [0.0] * len(words)
    for (start, _), logp in zip(encoded.offset_mapping, logps, strict=True):
        sums[min(bisect.bisect_right(ends, start), len(words) - 1)] += logp
    return [(word.group(), logp) for word, logp in zip(words, sums, strict=True)]


# -------------------------------------------------------------------------------- generation
class Completion(NamedTuple):
    """What a model said."""
    text: str
    finished: bool             # it ended by itself; else it was cut at max_new_tokens


@torch.no_grad()
def complete(m, images, questions, max_new_tokens=64, batch_size=64, sample_seed=None, temperature=1.0):
    """A Completion for each question about images (a list of PIL images each, possibly empty).

    Greedy; with sample_seed drawn at `temperature` (the same seed, inputs and batch size give the same draw).
    Batches are left-padded, prompts of similar length together. An answer ends at any token that
    generation_config.json calls an end, or the tokenizer.
    """
    ends = end_ids(m)
    options = dict(do_sample=False, eos_token_id=ends, pad_token_id=m.front.eos_id,
                   max_new_tokens=max_new_tokens)
    if sample_seed is not None:
        options |= dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    prompts = [m.front.prompt_ids(question, [picture.size for picture in shown])
               for question, shown in zip(questions, images, strict=True)]
    order, found = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), {}
    with torch.random.fork_rng(devices=[m.device] if m.device.type == "cuda" else []):
        torch.manual_seed(sample_seed or 0)
        for at in range(0, len(order), batch_size):
            batch = order[at:at + batch_size]
            ids = _pad([prompts[i] for i in batch], m.front.eos_id, "left")                     # (R, T)
            mask = _pad([[1] * len(prompts[i]) for i in batch], 0, "left")                      # (R, T)
            inputs = {"input_ids": ids.to(m.device), "attention_mask": mask.to(m.device)}
            if pictures := [picture for i in batch for picture in images[i]]:
                inputs |= m.front.on_device(m.model, m.front.prepare(pictures))
            new = m.model.generate(**inputs, **options)[:, ids.shape[1]:].tolist()              # (R, new)
            texts = m.front.tokenizer.batch_decode(new, skip_special_tokens=True)
            for i, text, tokens in zip(batch, texts, new, strict=True):
                found[i] = Completion(text.strip(), not set(ends).isdisjoint(tokens))
    return [found[i] for i in range(len(prompts))]


def generate(*arguments, **options):
    """The texts of complete(), which takes the same arguments."""
    return [completion.text for completion in complete(*arguments, **options)]


def end_ids(m):
    own = m.model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return sorted({m.front.eos_id, *own} - {None})
