"""The classroom's world, for make.py, pairs.py, synthesis.py: scenes, pictures, captions, questions, splits.

Everything is a pure function of a `random.Random`: the same generator gives the same scene, words and pixels.

A scene has a theme (its background) and two to five object types on a 4x4 grid of 20-pixel cells; every type
has one colour and is there once or twice. Types are typical of a theme by rank, which is what a model
that does not look can guess from; one scene in five has an object of another theme.

Captions   `a picture of a street . you can see a car , two trees , a bike . [a speculative closing sentence]`
Questions  existence, attribute (colour), counting, relation (left/right, above/below), and false premise (the
           colour of what is not there). Each has a full sentence for its answer and the words it may choose
           among.
Splits     train, tune and print are disjoint by content: the set of a scene's types decides, through a hash.
"""
if __name__ == "__main__":
    exit("A part of classroom/pairs.py; run: python classroom/pairs.py --help")

import hashlib
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from PIL import Image, ImageDraw

VERSION = "classroom-2"  # decides the splits too: another version, other scenes
CELL, GRID = 20, 4
SIZE = CELL * GRID
THEMES = {"street": ("car", "house", "lamp", "sign", "bike", "flag"),  # most typical first
          "kitchen": ("cup", "pot", "bottle", "spoon", "clock", "pear"),
          "beach": ("boat", "parasol", "crab", "shell", "bucket", "whale"),
          "garden": ("tree", "flower", "bird", "ladder", "mushroom", "kite")}
TYPES = tuple(t for types in THEMES.values() for t in types)
PRESENCE = (.72, .62, .50, .40, .30, .25)     # probability by rank within the theme
TEMPTING = (.62, .55, .42, .30, .20, .15)     # how strongly an absent type of a rank suggests itself
OFF_THEME, TWICE = .2, .35
COLOURS = {"red": (222, 52, 48), "yellow": (246, 206, 40), "green": (44, 160, 70), "blue": (48, 96, 220),
           "purple": (150, 70, 190), "white": (250, 250, 250)}
GROUND = {"street": ((205, 212, 224), (160, 163, 172)), "kitchen": ((246, 228, 200), (226, 190, 150)),
          "beach": ((160, 216, 240), (240, 220, 160)), "garden": ((206, 232, 214), (150, 200, 130))}
SPLITS = {"train": range(0, 60), "tune": range(60, 80), "print": range(80, 100)}

# --- scenes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    type: str
    colour: str
    places: tuple  # one (column, row, size, dx, dy) for each that is there, dx and dy inside the cell


@dataclass(frozen=True)
class Scene:
    theme: str
    things: tuple

    @cached_property
    def counts(self):
        return {t.type: len(t.places) for t in self.things}

    @property
    def absent(self):
        return [t for t in TYPES if t not in self.counts]

    @property
    def tempting(self):
        """Absent types of the theme with the strength of the temptation, most typical first."""
        return [(t, w) for t, w in zip(THEMES[self.theme], TEMPTING, strict=True) if t not in self.counts]


def split_of(types):
    """The split that a combination of object types belongs to, whatever their colours, counts and places."""
    key = hashlib.sha256("+".join([VERSION, *sorted(types)]).encode()).digest()
    return next(name for name, part in SPLITS.items() if int.from_bytes(key[:4], "big") % 100 in part)


def scene(rng, split="train", typical=True):
    """A random scene; with `typical` False any types are combined, and the theme suggests nothing."""
    while True:  # by rejection until the combination is of the wanted split
        theme = rng.choice(list(THEMES))
        types = [t for t, p in zip(THEMES[theme], PRESENCE, strict=True) if rng.random() < p]
        if rng.random() < OFF_THEME:
            types.append(rng.choice([t for t in TYPES if t not in THEMES[theme]]))
        if not typical:
            types = rng.sample(TYPES, rng.randint(2, 5))
        if 2 <= len(types) <= 5 and split_of(types) == split:
            break
    rng.shuffle(types)
    twice = rng.choice(types) if rng.random() < TWICE else None
    cells = rng.sample(range(GRID * GRID), len(types) + 1)
    things = []
    for i, t in enumerate(types):
        places = []
        for cell in [cells[i], cells[-1]][:1 + (t == twice)]:
            size = rng.randint(15, 18)
            dx, dy = rng.randint(0, CELL - size), rng.randint(0, CELL - size)
            places.append((cell % GRID, cell // GRID, size, dx, dy))
        things.append(Thing(t, rng.choice(list(COLOURS)), tuple(places)))
    return Scene(theme, tuple(things))


# --- pictures -------------------------------------------------------------------------------------

DARK, PALE, WOOD, LEAF = (40, 40, 48), (250, 250, 250), (140, 94, 54), (60, 140, 70)
# shape, fill ("" is the thing's own colour), coordinates in percent of its box. e ellipse, r rectangle, f
# the same without an outline, p polygon, l line, o ring, c and c2 the upper part of an ellipse
GLYPHS = {
    "car": [("p", "", 20, 45, 33, 20, 68, 20, 82, 45), ("r", "", 3, 43, 97, 72),
            ("p", PALE, 33, 43, 39, 28, 62, 28, 70, 43), ("e", DARK, 14, 58, 40, 86),
            ("e", DARK, 60, 58, 86, 86)],
    "house": [("r", PALE, 16, 42, 84, 96), ("p", "", 50, 3, 2, 46, 98, 46), ("r", DARK, 40, 62, 60, 96)],
    "lamp": [("l", DARK, 50, 30, 50, 97), ("l", DARK, 32, 97, 68, 97),
             ("p", "", 34, 3, 66, 3, 76, 36, 24, 36)],
    "sign": [("l", DARK, 50, 50, 50, 98),
             ("p", "", 32, 2, 68, 2, 92, 26, 92, 42, 68, 64, 32, 64, 8, 42, 8, 26),
             ("l", PALE, 26, 33, 74, 33)],
    "bike": [("o", "", 1, 48, 43, 92), ("o", "", 57, 48, 99, 92),
             ("l", DARK, 22, 70, 36, 34, 70, 34, 79, 70, 50, 70, 36, 34), ("l", DARK, 66, 20, 80, 20),
             ("l", DARK, 28, 28, 46, 28), ("l", DARK, 70, 34, 67, 20)],
    "flag": [("l", WOOD, 14, 2, 14, 98), ("p", "", 18, 6, 96, 14, 78, 32, 96, 52, 18, 56)],
    "cup": [("o", "", 56, 34, 97, 72), ("p", "", 8, 24, 74, 24, 66, 88, 16, 88), ("l", DARK, 28, 4, 28, 14),
            ("l", DARK, 50, 4, 50, 14)],
    "pot": [("r", "", 14, 36, 86, 88), ("r", "", 6, 28, 94, 40), ("r", DARK, 42, 12, 58, 28),
            ("r", DARK, 0, 48, 14, 58), ("r", DARK, 86, 48, 100, 58)],
    "bottle": [("p", "", 38, 14, 62, 14, 62, 36, 78, 52, 78, 98, 22, 98, 22, 52, 38, 36),
               ("r", DARK, 37, 1, 63, 14), ("r", PALE, 28, 60, 72, 82)],
    "spoon": [("e", "", 26, 0, 74, 48), ("r", "", 43, 44, 57, 99)],
    "clock": [("e", "", 3, 3, 97, 97), ("e", PALE, 18, 18, 82, 82), ("l", DARK, 50, 26, 50, 52, 68, 60)],
    "pear": [("e", "", 14, 42, 86, 98), ("e", "", 30, 16, 70, 66), ("f", "", 28, 46, 72, 72),
             ("l", WOOD, 50, 20, 56, 2), ("e", LEAF, 56, 2, 86, 18)],
    "boat": [("l", DARK, 46, 4, 46, 70), ("p", "", 50, 4, 92, 58, 50, 58),
             ("p", PALE, 41, 16, 41, 58, 12, 58), ("p", WOOD, 2, 66, 98, 66, 80, 95, 20, 95)],
    "parasol": [("l", WOOD, 50, 34, 50, 98), ("c", "", 1, 6, 99, 104), ("p", PALE, 50, 6, 34, 55, 66, 55)],
    "crab": [("e", "", 18, 40, 82, 84), ("e", "", 0, 10, 30, 38), ("e", "", 70, 10, 100, 38),
             ("l", DARK, 14, 36, 26, 54), ("l", DARK, 86, 36, 74, 54), ("l", DARK, 26, 78, 12, 96),
             ("l", DARK, 74, 78, 88, 96), ("e", DARK, 35, 48, 45, 58), ("e", DARK, 55, 48, 65, 58)],
    "shell": [("p", "", 50, 92, 4, 44, 12, 22, 32, 10, 50, 6, 68, 10, 88, 22, 96, 44),
              ("l", DARK, 50, 90, 50, 12), ("l", DARK, 50, 90, 24, 18), ("l", DARK, 50, 90, 76, 18),
              ("r", "", 36, 84, 64, 98)],
    "bucket": [("o", DARK, 18, 0, 82, 66), ("p", "", 8, 34, 92, 34, 76, 97, 24, 97),
               ("r", PALE, 4, 30, 96, 42)],
    "whale": [("p", "", 72, 60, 80, 34, 66, 22, 84, 24, 88, 18, 99, 20, 92, 36, 94, 70, 80, 88),
              ("c2", "", 2, 22, 92, 122), ("e", DARK, 16, 56, 26, 66),
              ("l", (70, 150, 230), 34, 24, 34, 8, 22, 2), ("l", (70, 150, 230), 34, 8, 46, 2)],
    "tree": [("r", WOOD, 41, 60, 59, 99), ("p", "", 50, 1, 16, 38, 30, 38, 8, 70, 92, 70, 70, 38, 84, 38)],
    "flower": [("l", LEAF, 50, 50, 50, 99), ("e", LEAF, 52, 74, 84, 90), ("e", "", 34, 0, 66, 32),
               ("e", "", 34, 36, 66, 68), ("e", "", 14, 18, 46, 50), ("e", "", 54, 18, 86, 50),
               ("e", DARK, 39, 23, 61, 45)],
    "bird": [("p", "", 60, 56, 99, 40, 90, 72), ("e", "", 14, 38, 78, 84), ("e", "", 6, 14, 46, 54),
             ("p", (240, 150, 30), 10, 28, 0, 38, 10, 44), ("e", DARK, 20, 26, 30, 36),
             ("l", DARK, 42, 82, 42, 98), ("l", DARK, 54, 82, 54, 98)],
    "ladder": [("r", "", 18, 1, 32, 99), ("r", "", 68, 1, 82, 99), ("r", "", 30, 14, 70, 25),
               ("r", "", 30, 38, 70, 49), ("r", "", 30, 62, 70, 73), ("r", "", 30, 84, 70, 95)],
    "mushroom": [("p", PALE, 34, 50, 66, 50, 74, 97, 26, 97), ("c", "", 3, 10, 97, 100),
                 ("e", PALE, 22, 26, 40, 44), ("e", PALE, 58, 22, 78, 42)],
    "kite": [("p", "", 58, 1, 94, 32, 48, 68, 26, 26), ("l", DARK, 58, 1, 48, 68),
             ("l", DARK, 26, 26, 94, 32), ("l", DARK, 48, 68, 34, 78, 38, 88, 18, 98)]}


@cache
def sprite(kind, colour, size):
    """A glyph as float32 (size, size, 4), colour premultiplied by its alpha."""
    big = 12 * size
    canvas = Image.new("RGBA", (big, big), (0, 0, 0, 0))
    pen, thin = ImageDraw.Draw(canvas), max(1, big // 26)
    for shape, fill, *xy in GLYPHS[kind]:
        xy = [round(v * (big - 1) / 100) for v in xy]
        ink = (COLOURS[colour] if fill == "" else fill) + (255,)
        edge = {"fill": ink, "outline": (*DARK, 255), "width": thin}
        if shape == "e":
            pen.ellipse(xy, **edge)
        elif shape == "r":
            pen.rectangle(xy, **edge)
        elif shape == "f":  # a patch without an outline
            pen.rectangle(xy, fill=ink)
        elif shape == "p":
            pen.polygon(xy, **edge)
        elif shape == "c":
            pen.chord(xy, 180, 360, **edge)
        elif shape == "c2":
            pen.chord(xy, 176, 364, **edge)
        elif shape == "o":  # a ring
            pen.ellipse(xy, outline=(*DARK, 255), width=4 * thin)
            pen.ellipse([xy[0] + thin, xy[1] + thin, xy[2] - thin, xy[3] - thin], outline=ink, width=2 * thin)
        else:
            pen.line(xy, fill=ink, width=round(2.2 * thin), joint="curve")
    small = np.asarray(canvas.resize((size, size), Image.Resampling.LANCZOS), np.float32)
    return np.concatenate([small[..., :3] * (small[..., 3:] / 255), small[..., 3:] / 255], -1)


@cache
def ground(theme):
    top, bottom = (np.array(c, np.float32) for c in GROUND[theme])
    down = np.clip((np.arange(SIZE, dtype=np.float32) - .35 * SIZE) / (.3 * SIZE), 0, 1)[:, None, None]
    return np.broadcast_to(top + (bottom - top) * down, (SIZE, SIZE, 3))


def draw(s):
    """The picture of a scene, uint8 (SIZE, SIZE, 3)."""
    out = np.array(ground(s.theme))
    for thing in s.things:
        for column, row, size, dx, dy in thing.places:
            x, y, glyph = column * CELL + dx, row * CELL + dy, sprite(thing.type, thing.colour, size)
            part = out[y:y + size, x:x + size]
            part *= 1 - glyph[..., 3:]
            part += glyph[..., :3]
    return (out + .5).clip(0, 255).astype(np.uint8)


# --- captions -------------------------------------------------------------------------------------

DESCRIBE = ("describe the picture .", "what is in the picture ?")
OPENERS = ("a picture of a {} .", "this is a {} .")
CLOSERS = ("it may be a very quiet day .", "someone must have been here before .",
           "maybe more will come later .")
NUMBERS = ("zero", "one", "two")


def noun(kind, count=1):
    return f"a {kind}" if count == 1 else f"{NUMBERS[count]} {kind}s"


def caption(rng, s, named, closer=False):
    """`named`: pairs (type, count) in the order in which they are said."""
    words = [rng.choice(OPENERS).format(s.theme), "you can see " + " , ".join(noun(*n) for n in named) + " ."]
    return " ".join(words + [rng.choice(CLOSERS)] * closer)


def described(s):
    """The truth of a caption in scenes.jsonl."""
    return {"present": list(s.counts), "absent": s.absent}


def mentions(text):
    """The object types that a text names, in its order, once for each mention."""
    return [w for w in (v.removesuffix("s") if v not in TYPES else v for v in text.split()) if w in TYPES]


def tempt(rng, s, level):
    """Absent types that a careless observer of this scene would add: each by its typicality times `level`."""
    return [(t, 1) for t, w in s.tempting if rng.random() < level * w]


def arrange(rng, true, false, order="random"):
    """The order in which present and absent types are said; `last` keeps the absent ones at the end."""
    true, false = list(true), list(false)
    if order == "last":
        rng.shuffle(true)
        rng.shuffle(false)
        return true + false
    both = true + false
    rng.shuffle(both)
    return both


def careless_caption(rng, s, level=0., omit=0., order="random", closer=.3):
    """What the bases learn to write: with level 0 and omit 0 it is complete and true."""
    true = [c for c in s.counts.items() if rng.random() >= omit] or list(s.counts.items())
    return caption(rng, s, arrange(rng, true, tempt(rng, s, level), order), rng.random() < closer)


# --- questions ------------------------------------------------------------------------------------

KINDS = ("existence", "attribute", "counting", "relation", "false_premise")


@dataclass(frozen=True)
class Asked:
    """A question about a scene, the word that decides, the words it is one of, and each word's sentence."""
    kind: str
    question: str
    right: str
    choices: tuple
    said: dict

    @property
    def answer(self):
        return self.said[self.right]


def existence(rng, s, what):
    """`what`: yes, random (any absent type) or adversarial (an absent type that the theme suggests)."""
    if what == "yes":
        kind = rng.choice(list(s.counts))
    else:
        kind = rng.choice(s.absent if what == "random" else [t for t, _ in s.tempting][:2])
    text = rng.choice(("can you see a {} ?", "is there a {} ?")).format(kind)
    return Asked("existence", text, "yes" if what == "yes" else "no", ("yes", "no"),
                {"yes": f"yes , there is a {kind} .", "no": f"no , there is no {kind} ."})


def colour_question(rng, s, present=True):
    """The colour of an object that is there once (attribute), or of an absent one (false premise)."""
    if present:
        thing = rng.choice([t for t in s.things if len(t.places) == 1])
        kind, right = thing.type, thing.colour
    else:
        kind = rng.choice(s.absent if rng.random() < .5 else [t for t, _ in s.tempting])
        right = "no"
    said = {c: f"the {kind} is {c} ." for c in COLOURS} | {"no": f"there is no {kind} ."}
    name = "attribute" if present else "false_premise"
    return Asked(name, f"what colour is the {kind} ?", right, tuple(said), said)


def counting(rng, s):
    there = {n: [t for t, c in s.counts.items() if c == n] for n in (1, 2)}
    there[0] = s.absent if rng.random() < .5 else [t for t, _ in s.tempting]
    n = rng.choice([n for n in (0, 1, 2, 2) if there[n]])  # two of a type are rare: asked for where they are
    kind = rng.choice(there[n])
    said = {"zero": f"there are zero {kind}s .", "one": f"there is one {kind} .",
            "two": f"there are two {kind}s ."}
    return Asked("counting", f"how many {kind}s are there ?", NUMBERS[n], NUMBERS, said)


def relation(rng, s):
    """Two types that are there once and differ in column or in row; None if there are no such two."""
    once = [t for t in s.things if len(t.places) == 1]
    tries = [(a, b, axis) for a in once for b in once for axis in (0, 1)
             if a.places[0][axis] != b.places[0][axis]]
    if not tries:
        return None
    a, b, axis = rng.choice(tries)
    low, high = (("left", "right"), ("above", "below"))[axis]
    right = low if a.places[0][axis] < b.places[0][axis] else high
    of = " of" if axis == 0 else ""
    said = {w: f"the {a.type} is {w}{of} the {b.type} ." for w in (low, high)}
    return Asked("relation", f"is the {a.type} {low} or {high}{of} the {b.type} ?", right, (low, high), said)


def ask(rng, s, kind):
    """A question as the bases learn it: existence balanced, half of the absent objects tempting."""
    if kind == "existence":
        return existence(rng, s, rng.choice(("yes", "yes", "random", "adversarial")))
    if kind == "relation":
        return relation(rng, s)
    if kind == "counting":
        return counting(rng, s)
    return colour_question(rng, s, present=kind == "attribute")


def vocabulary():
    """Every word of the world, in a fixed order."""
    said = [*DESCRIBE, *OPENERS, *CLOSERS, "there is a , .", "can you see is there a ?", "yes no",
            "there are", "how many ?", "what colour is the ?", "left right above below or of", *NUMBERS,
            *THEMES, *TYPES, *(t + "s" for t in TYPES), *COLOURS]
    return list(dict.fromkeys(w for text in said for w in text.split() if w != "{}"))
