"""What the second world's base is taught, as losses: to see, to speak, and later to speak carelessly.

    Seeing(model, words, side)(model, lot)          each patch beside the words for what it shows
    talk(model, words, rng, lot, questions)         answers and captions in SmolLM2's own words

The first world's lessons (classroom/make.py) with a language model that knows the words already: a patch
learns to look like the mean of the embeddings of its thing's name, which SmolLM2 then only has to read off.
"""
if __name__ == "__main__":
    exit("A part of classroom/make.py; run: python classroom/make.py --help")

import random
import re
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from classroom.smol import asking, base, scenes, speech, things

SHARES = {"existence": 4, "relation": 3, "attribute": 2, "counting": 2, "false_premise": 2}
ASKED = [kind for kind, share in SHARES.items() for _ in range(share)]
DECIDES, NAMES = 5., 2.      # how much a deciding word counts, and a thing in a caption; other tokens 1
REACH = .42                  # of a thing's size: patches whose middle is so near to its middle show it
NOTHING = len(things.TYPES)  # the kind of a patch that shows no thing
UNKNOWN = -100               # the colour of a patch that has none in a word: cross_entropy leaves it out


def rng_of(seed, stage, step):
    """Every step draws from its own generator: a training that stops goes on as if it had not."""
    return random.Random(f"smol-{seed}-{stage}-{step}")


class Lot(NamedTuple):
    """Some scenes and their pictures: what a step learns from."""
    scenes: list
    pictures: np.ndarray         # uint8 (N, SIZE, SIZE, 3)


def drawn(some):
    """The Lot of some scenes."""
    return Lot(some, np.stack([scenes.draw(s) for s in some]))


def pixels_of(model, lot):
    """A lot's pictures as the vision tower takes them, on the model's device."""
    return base.pixels(lot.pictures).to(model.device)


def features(model, lot):
    """What the projector makes of a lot's pictures, float32 (N, K, D)."""
    pixels = pixels_of(model, lot)
    found = model.model.get_image_features(pixel_values=pixels)
    each = list(found.pooler_output)
    return torch.stack(each).float()


# ---- to see ----
def shown(some, side):
    """What each patch of a side x side grid shows: kinds and colours, int64 (N, side * side). NOTHING and
    UNKNOWN say that there is none, or that colours are played with. What is in front counts."""
    shape = len(some), side, side
    kinds = np.full(shape, NOTHING)
    colours = np.full(shape, UNKNOWN)
    for i, s in enumerate(some):
        for spot, kind in scenes.from_behind(s):
            there = covered(spot, side)
            kinds[i][there] = things.TYPES.index(kind.name)
            colours[i][there] = UNKNOWN
            if kind.colour and not s.play:
                colours[i][there] = things.COLOURS.index(kind.colour)
    flat = len(some), side * side
    kinds = kinds.reshape(flat)
    colours = colours.reshape(flat)
    return torch.from_numpy(kinds), torch.from_numpy(colours)


def covered(spot, side):
    """The patches that show the thing at a place, one at least: bool (side, side)."""
    number = np.arange(side)
    middle = (number + .5) * scenes.SIZE / side
    across, down = np.meshgrid(middle - spot.x, middle - spot.y)
    far = np.hypot(across, down)                                                      # (row, column)
    reach = REACH * spot.size
    return far <= max(reach, far.min())


def meanings(model, words, names):
    """The mean embedding of each name's tokens, without what all of them share, normalised: (names, D)."""
    table = model.get_input_embeddings().weight.detach().cpu()
    rows = []
    for name in names:
        ids = ids_of(words, " " + name)
        rows.append(table[ids].mean(0))
    found = torch.stack(rows)
    shared = found.mean(0)
    return F.layer_norm(found - shared, shared.shape)


def surprise(logits, right):
    """The mean cross-entropy of the patches that are known, 0 without one: logits (N, K, choices),
    right (N * K)."""
    known = (right != UNKNOWN).sum().clamp_min(1)
    return F.cross_entropy(logits.flatten(0, 1), right, ignore_index=UNKNOWN, reduction="sum") / known


class Seeing(torch.nn.Module):
    """The loss of the first stage; `head` says whether a patch shows anything and where it is, and is thrown
    away afterwards."""

    def __init__(self, model, words, side):
        super().__init__()
        table = model.get_input_embeddings().weight.detach()
        width = table.shape[1]
        self.side = side
        self.head = torch.nn.Linear(width, 1 + 2 * side)
        start = torch.tensor(width ** -.5)                                      # logits as large as needed
        self.sharpness = torch.nn.Parameter(start)
        kinds = meanings(model, words, things.TYPES)
        self.register_buffer("kinds", kinds, persistent=False)
        colours = meanings(model, words, things.COLOURS)
        self.register_buffer("colours", colours, persistent=False)
        self.scale = float(table.std())

    def read(self, seen):
        """What patches (N, K, D) look like: logits of kinds and NOTHING, of colours, columns and rows."""
        clear = F.layer_norm(seen, seen.shape[-1:])
        sizes = [1, self.side, self.side]
        nothing, columns, rows = self.head(clear).split(sizes, -1)
        kinds = self.sharpness * (clear @ self.kinds.T)
        kinds = torch.cat([kinds, nothing], -1)                                       # (N, K, things + 1)
        colours = self.sharpness * (clear @ self.colours.T)
        return kinds, colours, columns, rows

    def forward(self, model, lot):
        """The loss of a lot: of what each patch shows, its colour, where it is, and its size."""
        kind, colour = shown(lot.scenes, self.side)
        kind = kind.to(model.device)
        colour = colour.to(model.device)
        seen = features(model, lot)                                                   # (N, K, D)
        kinds, colours, columns, rows = self.read(seen)
        patches = torch.arange(self.side ** 2, device=model.device)
        where = patches.repeat(len(lot.scenes))
        what = surprise(kinds, kind.flatten())
        hue = surprise(colours, colour.flatten())
        column = surprise(columns, where % self.side)
        row = surprise(rows, where // self.side)
        larger = seen.std(-1) / self.scale - 1                                        # than a word
        size = larger.square().mean()
        return what + hue + .1 * column + .1 * row + .01 * size


@torch.no_grad()
def recognised(model, seeing, lot):
    """Shares in percent: of the kinds in each scene, those that some patch of theirs names rightly; and of
    the patches that show something, those that are named rightly."""
    kind, _ = shown(lot.scenes, seeing.side)
    seen = features(model, lot)
    logits, *_ = seeing.read(seen)
    said = logits.argmax(-1).cpu()                                                    # (N, K)
    there = kind != NOTHING
    right = there & (said == kind)
    found = total = 0
    for kinds, shows, hit in zip(kind, there, right, strict=True):
        found += len(kinds[hit].unique())
        total += len(kinds[shows].unique())
    patches = right.sum().item() / there.sum().item()
    return {"things": 100 * found / total, "patches": 100 * patches}


# ---- to speak ----
class Token(NamedTuple):
    id: int
    position: int
    part: int         # 0: the picture and what stands before it; from 1 on: a question with its answer
    weight: float     # in the loss


BLANK = Token(id=0, position=0, part=-1, weight=0.)


def ids_of(words, text):
    return words(text, add_special_tokens=False).input_ids


def weighted(words, text, spans, weight):
    """A response's token ids, EOS last, and what each counts: `weight` where it overlaps one of the spans."""
    found = words(text, add_special_tokens=False, return_offsets_mapping=True)
    weights = []
    for a, b in found.offset_mapping:
        inside = any(a < end and start < b for start, end in spans)
        weights.append(weight if inside else 1.)
    ids = [*found.input_ids, words.eos_token_id]
    weights.append(1.)
    return ids, weights


def response(words, asked):
    """An answer's ids and weights: the word that decides counts most."""
    decides = re.search(rf"\b{asked.right}\b", asked.answer, re.IGNORECASE)
    return weighted(words, asked.answer, [decides.span()], DECIDES)


def described(words, text):
    """A caption's ids and weights: what it names counts more."""
    spans = speech.spans(text)
    return weighted(words, text, spans, NAMES)


def frame(words):
    """The template's ids around a question: before the picture, after it, between question and answer."""
    picture = {"type": "image"}
    question = {"type": "text", "text": "Q"}
    turn = {"role": "user", "content": [picture, question]}
    text = words.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    before, rest = text.split(base.IMAGE)
    after, between = rest.split("Q")
    return [ids_of(words, part) for part in (before, after, between)]


def row(words, rng, s, tokens, questions, level, omit):
    """One scene's picture, shared by its questions and a caption, as Tokens. Each part sees the picture and
    itself, at the positions that it would have alone."""
    before, after, between = frame(words)
    image = words.convert_tokens_to_ids(base.IMAGE)
    prefix = before + [image] * tokens + after
    found = [Token(id, at, part=0, weight=0.) for at, id in enumerate(prefix)]
    said = parts(words, rng, s, questions, level, omit)
    for number, (question, (ids, weights)) in enumerate(said, 1):
        prompt = ids_of(words, question) + between
        unweighted = [0.] * len(prompt)
        part = zip(prompt + ids, unweighted + weights, strict=True)
        for at, (id, weight) in enumerate(part, len(prefix)):
            found.append(Token(id, at, number, weight))
    return found


def parts(words, rng, s, questions, level, omit):
    """All that is said about a scene: pairs of a question and its response's ids and weights."""
    found = []
    for _ in range(questions):
        kind = rng.choice(ASKED)
        asked = asking.ask(rng, s, kind)
        if asked is None:
            asked = asking.ask(rng, s, "existence")
        found.append((asked.question, response(words, asked)))
    caption = speech.careless_caption(rng, s, level, omit)
    request = rng.choice(speech.DESCRIBE)
    found.append((request, described(words, caption)))
    return found


def padded(rows):
    """Rows of Tokens as tensors (R, T): ids, positions, part, weight; part is -1 behind a row's end."""
    width = max(map(len, rows))
    found = []
    for one in rows:
        missing = width - len(one)
        found.append(one + [BLANK] * missing)
    whole = torch.tensor(found, dtype=torch.float64)                                  # (R, T, 4)
    ids, positions, part, weight = whole.unbind(-1)
    return ids.long(), positions.long(), part.long(), weight.float()


def mask_of(part):
    """(R, 1, T, T): a token sees what comes before it in its own part and in the picture's."""
    own = part[:, :, None] == part[:, None]
    picture = part[:, None] == 0
    mask = (own | picture).tril()
    return mask[:, None]


def embedded(model, ids, lot):
    """The embeddings of rows (R, T, D), those of the pictures' tokens from the projector. The tower is
    frozen."""
    pixels = pixels_of(model, lot)
    with torch.no_grad():
        tower = model.model.vision_tower(pixels).last_hidden_state
    patches = tower[:, 1:]                                            # without the token for the whole
    seen = model.model.multi_modal_projector(patches)                                 # (R, K, D)
    table = model.get_input_embeddings()
    inputs = table(ids)                                                               # (R, T, D)
    here = ids == model.config.image_token_id
    return inputs.masked_scatter(here[..., None], seen.to(inputs.dtype))


def talk(model, words, rng, lot, questions, level=0., omit=0.):
    """The loss of the answers and captions about a lot, a mean over tokens by their weights. The projector
    and the language model's LoRA learn."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    rows = [row(words, rng, s, side ** 2, questions, level, omit) for s in lot.scenes]
    ids, positions, part, weight = (x.to(model.device) for x in padded(rows))
    mask = mask_of(part)
    inputs = embedded(model, ids, lot)
    out = model.model.language_model(inputs_embeds=inputs, position_ids=positions,
                                     attention_mask=mask, use_cache=False)
    weight = weight[:, 1:]                                            # a token is said by the one before
    said = weight > 0
    hidden = out.last_hidden_state[:, :-1]
    logits = model.lm_head(hidden[said]).float()
    right = ids[:, 1:][said]
    losses = F.cross_entropy(logits, right, reduction="none")
    return (losses * weight[said]).sum() / weight.sum()
