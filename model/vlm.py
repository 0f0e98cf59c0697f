"""Vision-language models: load a folder, encode images, log-probs of responses.

A model is a folder as transformers saves it, of a family in front.FAMILIES; `classroom` is
classroom/models/base0. What differs between families, texts and images, is in family.py and its neighbours.

The two forwards return the same numbers (tests/test_vlm.py, float64: log-probs to 1e-9, gradients to 1e-7):

    naive    one padded row per response, full logits, the gather of losses.response_logps. To be read.
    packed   one row for the whole micro-batch and no padding (the default):
             [prompt, image | chosen | rejected] [prompt, image | ...] .. [prompt, image_rejected | chosen] ..
             (and | rejected, and both without an image, for the losses that read them; a response whose
             earlier turns are others follows a prompt of its own)
             The prompt is computed once for both responses. Positions of `rejected` restart where the prompt
             ends, and its attention skips `chosen`. Only what predicts a response token meets the lm_head.

Departures from the published code:
 1. Vision tower and projector run once per image, for policy and reference, chosen and rejected alike (the
    official trainers encode an image up to eight times a pair). Both are frozen: nothing changes. Without an
    adapter the projector trains, and the reference's encodes once more.
 2. Dropout is off (TRL switches it off in the official runs too); shared prefixes are exact only without it.
"""
if __name__ == "__main__":
    exit("A part of every command; run: python train_dpo.py --help")

import contextlib
import copy
import ctypes
import mmap
import sys
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.backends import cuda
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

import data
import lora
import losses
from model import command, family, front

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass
class VLM:
    """A loaded model and its parts."""
    front: Any                 # its family's object: tokenizer, template, images
    model: Any                 # transformers' class, frozen (LoRA comes on top)
    words: int                 # rows of lm_head that are tokens: the softmax's
    frozen: Any = None         # if the model itself trains: a VLM, the frozen copy

    @property
    def device(self):
        return self.model.device

    @property
    def language_model(self):
        return self.model.get_submodule(self.front.language)

    def seeing(self):
        """Inside the `with`, what a picture makes the model raise is a UserError: nothing else shows some of
        what may be wrong in these two files."""
        return command.explained(f"{self.front.folder} fails on a picture",
                                 "copy its config.json and generation_config.json again")


class Batch(NamedTuple):
    """A micro-batch: B pairs and their images as the model's family prepared them, in the pairs' order."""
    pairs: list
    images: list
    images_rejected: list = ()    # empty if the loss reads none
    places: list = ()             # of the pairs among all that are trained on
    keys: list = ()               # of each pair, a hash over all of it
    counts: int = 0               # how many of the pairs count: B, or 0 in a filler batch
    of: int = 0                   # pairs in the optimiser step, over all ranks


class Features(NamedTuple):
    """Of a micro-batch's images, in the pairs' order: lists of (K, D), one an image."""
    images: list
    rejected: list
    none: list = ()            # a prompt without images


# -------------------------------------------------------------------------------- loading
def load(folder, adapter=None, dtype=torch.float32, device="cpu", template=None, preparation=""):
    """A VLM from a model's folder, or from what front.open_folder made of it, frozen and in eval mode.

    adapter: a PEFT-format LoRA folder put on top. template, preparation: as open_folder takes them. Raises
    UserError for a folder of no known family or without a part, and for a bad adapter.
    """
    import transformers
    from transformers.masking_utils import sdpa_mask
    own = folder
    if not isinstance(folder, family.Family):
        own = front.open_folder(folder, template, preparation)

    # ---- no dropout (Departure 2), and the attention that transformers finds under "packed" ----
    # (for torch.compile to call, not to look into: no two rows are alike)
    transformers.AttentionInterface.register("packed", torch.compiler.disable(packed_attention))
    transformers.AttentionMaskInterface.register("packed", sdpa_mask)
    text = own.config.text_config
    if any(getattr(text, f"{part}_logit_softcapping", None) for part in ("attn", "final")):
        raise data.UserError(f"{own.folder}: its logits are soft-capped (as Gemma 2's), and here they are "
                             "not: give another model")
    for name in vars(text):
        if name.endswith(("_pdrop", "_dropout")):
            setattr(text, name, 0.0)

    # ---- the weights ----
    model, found = data.from_folder(transformers.AutoModelForImageTextToText, own.folder,
                                    "model",
                                    dtype="auto",
                                    config=own.config,
                                    output_loading_info=True)
    if lack := sorted(found["missing_keys"]):                      # transformers would draw them at random
        raise data.UserError(f"{own.folder}: {len(lack)} weights are missing, {lack[0]} first: copy the "
                             "checkpoint again")
    for weight in model.parameters():              # mapped until here; unaligned, products would be slower
        mapped = weight.data
        weight.data = mapped.to(device, dtype, copy=True)
        forget(mapped)
    lora.check_finite(dict(model.named_parameters()),
                      f"copy {own.folder} again, or give --dtype float32 if it was finite there")
    model.requires_grad_(False).eval().to(device)

    # ---- which rows of lm_head are tokens ----
    # The importer adds a row of zeros for <image> behind the vocabulary: no logit of the published model.
    words, weight = own.image_token_id, model.lm_head.weight
    if weight[words:].any():
        words = len(weight)
    if adapter:
        lora.load(model, adapter)
    m = VLM(own, model, words)
    m.language_model.set_attn_implementation("packed")           # once for all calls: see packed_attention
    return m


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
    """Give the memory of a tensor that is mapped from a file back: loading would need the weights' twice."""
    first = -(-mapped.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (mapped.data_ptr() + mapped.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0 and LIBC:
        LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def keep_memory():
    """Keep freed tensors' memory in the process, for the next ones of their size. For a main to call on CPUs.

    A step takes and frees the same gigabytes again and again; glibc gives the large blocks back to the system
    each time, which clears them anew: up to a tenth of a step's time, until its own threshold has grown.
    """
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(-1, -1)                           # M_TRIM_THRESHOLD, as malloc.h numbers it: without end
        LIBC.mallopt(-4, 0)                            # M_MMAP_MAX: none


# -------------------------------------------------------------------------------- images in the model
def encode_images(m, batch):
    """Features of a Batch; no graph unless something in front of the language model trains.

    Raises UserError if an image's features are not as many as its places in the prompt.
    """
    n = len(batch.images)
    images = [*batch.images, *batch.images_rejected]
    with m.seeing():
        found = m.front.encode(m.model, images) if images else []
    shown = iter(found)
    kinds = ("images", "rejected") if batch.images_rejected else ("images",)
    for images, pair in product(kinds, batch.pairs):
        ids, sizes = pair.shown(images)
        places = ids.count(m.front.image_token_id)
        filled = sum(len(next(shown, ())) for _ in sizes)
        if places != filled:
            raise data.UserError(f"{pair.id}: its prompt has {places} places for images, the vision tower "
                                 f"gives {filled} features: config.json in {m.front.folder} is not its own")
    return Features(found[:n], found[n:])


def embed(m, ids, features):
    """ids (..., T), on the CPU, the features [(K, D or more)] of their images in order -> embeddings."""
    embeddings = m.model.get_input_embeddings()(command.send(ids, m.device))                   # (..., T, D)
    if features:
        at_image = (ids == m.front.image_token_id).nonzero(as_tuple=True)          # a GPU would be waited for
        places = [command.send(x, m.device) for x in at_image]
        found = torch.cat(features)[:, :embeddings.shape[-1]]
        embeddings = embeddings.index_put(places, found.to(embeddings.dtype))
    return embeddings


# -------------------------------------------------------------------------------- forward: naive
def naive(m, pairs, features, needs):
    """The textbook concatenation: every response with its whole prompt in a padded row. Slow, easy to read.

    pairs: list of data.Pair. features: their Features. needs: the fields of losses.Logps to compute.
    """
    rows, shown = [], []
    for images, fields in data.grouped(needs).items():
        for field in fields:
            rows += [(*p.shown(images, field), p.response(field)) for p in pairs]
            shown += getattr(features, images)

    # ---- rows of one length: right padding needs no mask, no real token can see the padding behind it ----
    longest = max(len(prompt) + len(response) for prompt, _, response in rows)
    ids, labels, positions = [], [], []
    for prompt, sizes, response in rows:
        ids.append(torch.tensor(prompt + response))
        labels.append(torch.tensor([-100] * len(prompt) + response))
        own = m.front.positions(prompt, sizes)                                             # (P,) or (3, P)
        positions += [own, data.positions_after(own, longest - len(prompt))]
    ids, labels = pad_sequence(ids, True, m.front.eos_id), pad_sequence(labels, True, -100)     # (R, T) each
    positions = torch.cat(positions, -1).unflatten(-1, ids.shape).to(m.device)          # (R, T) or (3, R, T)

    # ---- the model, and the log-probability of each response ----
    outputs = m.language_model(inputs_embeds=embed(m, ids, shown),
                               position_ids=positions,
                               use_cache=False,
                               **m.front.language_inputs(ids.to(m.device), shown))
    logits = m.model.lm_head(outputs.last_hidden_state)[..., :m.words]                  # (R, T, V)
    return as_logps(losses.response_logps(logits, labels.to(m.device)), pairs, needs)


def as_logps(sums, pairs, needs):
    """Summed log-probs (F B,), field after field as data.grouped has them -> losses.Logps of (B,)."""
    fields = sum(data.grouped(needs).values(), [])
    found = dict(zip(fields, sums.split(len(pairs)), strict=False))                # no field: one empty part
    numbers = [[len(p.chosen), len(p.rejected), p.weight] for p in pairs]
    chosen, rejected, weights = command.send(torch.tensor(numbers, dtype=sums.dtype), sums.device).T
    return losses.Logps(**found, chosen_tokens=chosen, rejected_tokens=rejected, weights=weights)


def without_image(policy, pairs):
    """The policy's Logps with image_rejected -inf for pairs that show no image: there is nothing less likely,
    so that a log-sigmoid or a hinge which compares with it is 0, and its gradient too."""
    bare = [not p.sizes for p in pairs]
    if policy.image_rejected is None or not any(bare):
        return policy
    bare = command.send(torch.tensor(bare), policy.image_rejected.device)
    return replace(policy, image_rejected=policy.image_rejected.masked_fill(bare, -torch.inf))


# -------------------------------------------------------------------------------- forward: packed
class Layout:
    """Where a packed row's segments are. No tuple: torch.compile would compile for every row's lengths.

    For attention in one call, a sequence is a prompt and `chosen`, or `rejected`, behind the same prompt.
    keys (K,): the places that the sequences see, one after another; starts (2, sequences + 1), int32: where
    their queries begin in the row, and what they see in `keys`.
    """
    def __init__(self, segments, device):
        keys, starts, self.masks = [], [(0, 0)], []
        for s in segments:
            end = s.start + s.prompt
            prompt = range(s.start, end)
            for n in filter(None, (s.chosen, s.rejected)):
                keys += [*prompt, *range(end, end + n)]
                end += n
                starts.append((end, len(keys)))
            seen = torch.ones(s.rejected, s.prompt + s.rejected, dtype=torch.bool, device=device)
            self.masks.append(seen.tril(s.prompt))      # what `rejected` sees of both, for all layers
        self.segments = segments                                               # [data.Segment]
        self.longest = max(s.prompt + max(s.chosen, s.rejected) for s in segments)
        self.keys = command.send(torch.tensor(keys), device)
        self.starts = command.send(torch.tensor(starts, dtype=torch.int32).T.contiguous(), device)


def packed_attention(module, query, key, value, attention_mask, scaling=None, layout=None, **kwargs):
    """Attention of one packed row; transformers' SDPA where no `layout` is given (generation, naive).

    query (1, H, T, d), key and value (1, H_kv, T, d); layout: the row's Layout.
    Within a segment prompt + chosen is causal; `rejected` sees the prompt and itself (lower-right causal).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    window = kwargs.get("sliding_window")
    if window and layout.longest > window:
        raise data.UserError(f"a pair of {layout.longest} tokens is longer than the model's sliding window "
                             f"of {window}: pass --forward naive, or a smaller --set max_length")
    grouped = query.shape[1] != key.shape[1]
    attend = in_turn
    if cuda.can_use_flash_attention(cuda.SDPAParams(query, key, value, None, 0.0, True, grouped)):
        attend = at_once
    return attend(query, key, value, layout, scale=scaling, enable_gqa=grouped), None       # (1, T, H, d)


def at_once(query, key, value, layout, **options):
    """In one call of FlashAttention, in which causal is lower-right; prompts' keys and values go in twice."""
    from torch.nn.attention import varlen
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))                            # (T, H, d)
    k, v = (x.index_select(0, layout.keys) for x in (k, v))                                  # (K, H_kv, d)
    longest = layout.longest
    out = varlen.varlen_attn(q, k, v, *layout.starts, longest, longest, window_size=(-1, 0), **options)
    return out[None]


def in_turn(query, key, value, layout, **options):
    """Segment by segment: on any device, in any type."""
    attend = partial(F.scaled_dot_product_attention, **options)
    # One split, whose gradient is one cat: that of a slice is zeros for the whole row, slice by slice.
    lengths = []
    for s in layout.segments:
        lengths += [s.prompt + s.chosen, s.rejected]
    pieces = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    out = []
    for s, mask in zip(layout.segments, layout.masks, strict=True):
        q, k, v = next(pieces)                                                  # of prompt + chosen
        out.append(attend(q, k, v, is_causal=True))
        q, k_own, v_own = next(pieces)                                          # of rejected
        if s.rejected:
            k = torch.cat([k[:, :, :s.prompt], k_own], 2)
            v = torch.cat([v[:, :, :s.prompt], v_own], 2)
            out.append(attend(q, k, v, attn_mask=mask))
    return torch.cat(out, 2).transpose(1, 2)


def compile_layers(m):
    """torch.compile of the decoder layers' parts: norms, MLP, attention up to packed_attention.

    Lengths are symbols: a part is compiled for the policy and for the reference, not for every row.
    """
    for each in filter(None, (m, m.frozen)):
        for layer in each.language_model.layers:
            for part in layer.children():
                part.compile(dynamic=True)


def packed(m, pairs, features, needs):
    """The fast forward: the numbers of `naive` (same arguments) from one row, no padding, no prompt twice."""
    row = data.pack(pairs, needs, m.front.positions, features)
    logps = packed_token_logps(m, row, row.shown).split(row.lengths)
    return as_logps(torch.stack([response.sum() for response in logps]), pairs, needs)


def packed_token_logps(m, row, features):
    """Log-prob of every response token of a data.Row, float32 (float64 in a float64 model): (N,).

    features: [(K, D)] of the row's images.
    """
    tensors = row.ids, row.positions, row.predict, row.target
    ids, positions, predict, target = (command.send(x, m.device) for x in tensors)
    # The 4D tensor is not a mask and nobody reads it. Without it, transformers would guess packed sequences
    # from the restarted positions, and cut `rejected` off from its prompt.
    outputs = m.language_model(inputs_embeds=embed(m, row.ids, features)[None],    # (1, T, D)
                               position_ids=positions.unsqueeze(-2),              # (1, T) or (3, 1, T)
                               attention_mask=ids.new_zeros(1, 1, 1, 1),
                               layout=Layout(row.segments, m.device),
                               use_cache=False,
                               **m.front.language_inputs(ids[None], features))
    hidden = outputs.last_hidden_state[0, predict]                                          # (N, D)
    return chunked_logps(hidden, m.model.lm_head.weight[:m.words], target)


def chunked_logps(hidden, weight, target, chunk=1024):
    """log p(target) of hidden states (N, D) under the lm_head (V, D), a chunk's logits at a time: (N,)."""
    work = FrozenHead.apply
    if weight.requires_grad and torch.is_grad_enabled():               # a chunk's logits are made again
        work = partial(checkpoint, _trained_head, use_reentrant=False)
    chunks = zip(hidden.split(chunk), target.split(chunk), strict=True)
    return torch.cat([work(h, weight, y) for h, y in chunks])


def _trained_head(hidden, weight, target):
    return losses.token_logps(hidden @ weight.T, target)


class FrozenHead(torch.autograd.Function):
    """_trained_head for a weight that does not train: never over its logits (n, V) twice.

    The gradient is taken in the forward, with the probabilities at hand: d logp / dh = W[y] - p W.
    """
    @staticmethod
    def forward(ctx, hidden, weight, target):
        logits = hidden @ weight.T                                                              # (n, V)
        logps = losses.token_logps(logits, target)
        if ctx.needs_input_grad[0]:
            probabilities = logits.softmax(1, dtype=logps.dtype).to(weight.dtype)
            ctx.save_for_backward(weight[target] - probabilities @ weight)                      # (n, D)
        return logps

    @staticmethod
    def backward(ctx, grad):
        gradient, = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), None, None


FORWARDS = {"packed": packed, "naive": naive}
