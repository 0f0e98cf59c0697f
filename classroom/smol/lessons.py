"""What the second world's base is taught, as losses: to see, to speak, and later to speak carelessly.

    Seeing(model, words, side)(model, scenes)       each patch beside the words for what it shows
    talk(model, words, rng, scenes, questions)      answers and captions in SmolLM2's own words

The first world's lessons (classroom/make.py) with a language model that knows the words already: a patch
learns to look like the mean of the embeddings of its thing's name, which SmolLM2 then only has to read off.
"""
if __name__ == "__main__":
    exit(print("A part of classroom/make.py; run: python classroom/make.py --help"))

import random
import re

import numpy as np
import torch
from torch.nn import functional as F

from classroom.smol import asking, base, scenes, speech, things

ASKED = ("existence",) * 4 + ("relation",) * 3 + ("attribute", "attribute", "counting", "counting",
                                                  "false_premise", "false_premise")
DECIDES, NAMES = 5., 2.      # how much a deciding word counts, and a thing in a caption; other tokens 1
REACH = .42                  # of a thing's size: patches whose middle is so near to its middle show it


def rng_of(seed, stage, step):
    """Every step draws from its own generator: a training that stops goes on as if it had not."""
    return random.Random(f"smol-{seed}-{stage}-{step}")


def pictures(model, some):
    """The pictures of scenes as the vision tower takes them, on the model's device."""
    return base.pixels([scenes.draw(s) for s in some]).to(model.device)


def features(model, some):
    """What the projector makes of the pictures of scenes, float32 (N, K, D)."""
    found = model.model.get_image_features(pixel_values=pictures(model, some)).pooler_output
    return torch.stack(list(found)).float()


# ---- to see ----
def shown(some, side):
    """What each patch of a side x side grid shows: kinds and colours, int64 (N, side * side); -100 for a
    patch whose thing has no colour in a word, len(TYPES) for a patch that shows nothing. What is in front
    counts."""
    kinds = np.full((len(some), side, side), len(things.TYPES))
    colours = np.full((len(some), side, side), -100)
    middle = (np.arange(side) + .5) * scenes.SIZE / side
    for i, s in enumerate(some):
        spots = [(place, kind) for kind in s.things for place in kind.places]
        for place, kind in sorted(spots, key=lambda both: both[0].foot):
            far = np.hypot(*np.meshgrid(middle - place.x, middle - place.y))          # (row, column)
            there = far <= max(REACH * place.size, far.min())
            kinds[i][there] = things.TYPES.index(kind.name)
            colours[i][there] = things.COLOURS.index(kind.colour) if kind.colour else -100
    return (torch.from_numpy(x.reshape(len(some), -1)) for x in (kinds, colours))


def meanings(model, words, names):
    """The mean embedding of each name's tokens, without what all of them share, normalised: (names, D)."""
    table = model.get_input_embeddings().weight.detach().cpu()
    rows = [table[words(" " + name, add_special_tokens=False).input_ids].mean(0) for name in names]
    found = torch.stack(rows)
    return F.layer_norm(found - found.mean(0), rows[0].shape)


class Seeing(torch.nn.Module):
    """The loss of the first stage; `head` says whether a patch shows anything and where it is, and is thrown
    away afterwards."""

    def __init__(self, model, words, side):
        super().__init__()
        width = model.get_input_embeddings().weight.shape[1]
        self.side = side
        self.head = torch.nn.Linear(width, 1 + 2 * side)
        self.sharpness = torch.nn.Parameter(torch.tensor(width ** -.5))         # logits as large as needed
        self.register_buffer("kinds", meanings(model, words, things.TYPES), persistent=False)
        self.register_buffer("colours", meanings(model, words, things.COLOURS), persistent=False)
        self.scale = float(model.get_input_embeddings().weight.detach().std())

    def forward(self, model, some):
        kind, colour = (x.to(model.device) for x in shown(some, self.side))
        seen = features(model, some)                                                  # (N, K, D)
        width = seen.shape[-1]
        clear = F.layer_norm(seen, (width,))
        nothing, columns, rows = self.head(clear).split([1, self.side, self.side], -1)
        logits = torch.cat([self.sharpness * (clear @ self.kinds.T), nothing], -1)    # (N, K, things + 1)
        hues = self.sharpness * (clear @ self.colours.T)
        where = torch.arange(self.side ** 2, device=model.device).repeat(len(some))
        size = (seen.std(-1) / self.scale - 1).square().mean()                        # as large as a word
        return (F.cross_entropy(logits.flatten(0, 1), kind.flatten())
                + F.cross_entropy(hues.flatten(0, 1), colour.flatten())
                + .1 * F.cross_entropy(columns.flatten(0, 1), where % self.side)
                + .1 * F.cross_entropy(rows.flatten(0, 1), where // self.side) + .01 * size)


@torch.no_grad()
def recognised(model, seeing, some):
    """Shares in percent: of the kinds in each scene, those that some patch of theirs names rightly; and of
    the patches that show something, those that are named rightly."""
    kind, _ = shown(some, seeing.side)
    seen = features(model, some)
    clear = F.layer_norm(seen, seen.shape[-1:])
    nothing = seeing.head(clear)[..., :1]
    logits = torch.cat([seeing.sharpness * (clear @ seeing.kinds.T), nothing], -1)
    said = logits.argmax(-1).cpu()                                                    # (N, K)
    there = kind < len(things.TYPES)
    right = there & (said == kind)
    found = total = 0
    for scene, hit in zip(kind, right, strict=True):
        found += len(scene[hit].unique())
        total += len(scene[scene < len(things.TYPES)].unique())
    return {"things": 100 * found / total,
            "patches": 100 * right.sum().item() / there.sum().item()}


# ---- to speak ----
def weighted(words, text, spans, weight):
    """A response's token ids, EOS last, and what each counts: `weight` where it overlaps one of the spans."""
    found = words(text, add_special_tokens=False, return_offsets_mapping=True)
    counts = []
    for a, b in found.offset_mapping:
        inside = any(a < end and start < b for start, end in spans)
        counts.append(weight if inside else 1.)
    return [*found.input_ids, words.eos_token_id], [*counts, 1.]


def response(words, asked):
    """An answer's ids and weights: the word that decides counts most."""
    found = re.search(rf"\b{asked.right}\b", asked.answer, re.IGNORECASE)
    return weighted(words, asked.answer, [found.span()], DECIDES)


def described(words, text):
    """A caption's ids and weights: what it names counts more."""
    return weighted(words, text, speech.spans(text), NAMES)


def frame(words):
    """The template's ids around a question: before the picture, after it, between question and answer."""
    content = [{"type": "image"}, {"type": "text", "text": "Q"}]
    text = words.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                     add_generation_prompt=True)
    before, rest = text.split(base.IMAGE)
    after, answer = rest.split("Q")
    return [words(part, add_special_tokens=False).input_ids for part in (before, after, answer)]


def row(words, rng, s, tokens, questions, level, omit):
    """One scene's picture, shared by its questions and a caption: [(token, position, part, weight)]. Each
    part sees the picture and itself, at the positions that it would have alone."""
    before, after, answer = frame(words)
    prefix = [*before, *[words.convert_tokens_to_ids(base.IMAGE)] * tokens, *after]
    found = [(token, at, 0, 0.) for at, token in enumerate(prefix)]
    parts = []
    for _ in range(questions):
        asked = asking.ask(rng, s, rng.choice(ASKED)) or asking.ask(rng, s, "existence")
        parts.append((asked.question, response(words, asked)))
    caption = speech.careless_caption(rng, s, level, omit)
    parts.append((rng.choice(speech.DESCRIBE), described(words, caption)))
    for number, (question, (ids, weights)) in enumerate(parts, 1):
        asked = words(question, add_special_tokens=False).input_ids + answer
        counts = [0.] * len(asked) + weights
        for at, token in enumerate(asked + ids):
            found.append((token, len(prefix) + at, number, counts[at]))
    return found


def padded(rows):
    """Rows of (token, position, part, weight) as tensors (R, T): tokens, positions, part, weight; part is -1
    behind a row's end."""
    width, found = max(map(len, rows)), []
    for one in rows:
        blank = [(0, 0, -1, 0.)] * (width - len(one))
        found.append(one + blank)
    whole = torch.tensor(found, dtype=torch.float64)                                  # (R, T, 4)
    tokens, positions, part, weight = whole.unbind(-1)
    return tokens.long(), positions.long(), part.long(), weight.float()


def mask_of(part):
    """(R, 1, T, T): a token sees what comes before it in its own part and in the picture's."""
    own = part[:, :, None] == part[:, None]
    picture = part[:, None] == 0
    mask = (own | picture).tril()
    return mask[:, None]


def talk(model, words, rng, some, questions, level=0., omit=0.):
    """The loss of the answers and captions about scenes, a mean over tokens by their weights. The tower is
    frozen; the projector and the language model's LoRA learn."""
    vision = model.config.vision_config
    tokens_of_picture = (vision.image_size // vision.patch_size) ** 2
    rows = padded([row(words, rng, s, tokens_of_picture, questions, level, omit) for s in some])
    tokens, positions, part, weight = (x.to(model.device) for x in rows)
    with torch.no_grad():
        tower = model.model.vision_tower(pictures(model, some)).last_hidden_state[:, 1:]
    seen = model.model.multi_modal_projector(tower)                                   # (R, K, D)
    inputs = model.get_input_embeddings()(tokens)                                     # (R, T, D)
    here = tokens == model.config.image_token_id
    inputs = inputs.masked_scatter(here[..., None], seen.to(inputs.dtype))
    hidden = model.model.language_model(inputs_embeds=inputs, position_ids=positions,
                                        attention_mask=mask_of(part), use_cache=False).last_hidden_state
    said = weight[:, 1:] > 0
    logits = model.lm_head(hidden[:, :-1][said]).float()
    losses = F.cross_entropy(logits, tokens[:, 1:][said], reduction="none")
    return (losses * weight[:, 1:][said]).sum() / weight.sum()
