"""Scenes of the second world: what is in them, where, in which style; their pictures and their split.

    s = scenes.scene(random.Random(0), "train")
    s.counts {"cup": 2, ...}    s.absent    s.tempting    s.things    scenes.draw(s): uint8 (224, 224, 3)

A scene has a setting and two to four kinds of things, each there once, twice or three times, seven things at
most; all of a kind have one colour. One scene in five has a kind from another setting. Things are turned by
up to TURN degrees, overlap, and hide at most HIDDEN of one another's boxes; what stands lower is in front.

Splits are disjoint by content, as in the first world: the set of a scene's kinds decides, by a hash. And they
are disjoint by style where it matters: print shows the held-out style alone, which nothing was taught, chosen
or calibrated on. Tune shows the taught styles in combinations that were not taught. An unseen style there
would be a part of what is printed, and its drawings would be known by the time of the table; so a number on
tune is better than the same number on print, by as much as recognising a class is harder than recognising a
picture.
"""
if __name__ == "__main__":
    exit(print("A part of classroom/pairs.py; run: python classroom/pairs.py --help"))

import hashlib
import random
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from classroom.smol import atlas, ground, things

VERSION = "smol-1"               # decides the splits too: another version, other scenes
SIZE = ground.SIZE
SPLITS = {"train": range(0, 60), "tune": range(60, 80), "print": range(80, 100)}
STYLES = {"train": atlas.TAUGHT, "tune": atlas.TAUGHT, "print": atlas.HELD_OUT}
OFF_SETTING, MOST, HIDDEN, TURN = .2, 7, .25, 14
COUNTS = (1, 1, 1, 1, 2, 2, 3)   # of a kind, as often as here
GROUNDS = 32                     # backgrounds of a setting: so many are drawn once and kept


@dataclass(frozen=True)
class Place:
    x: int            # of the middle, pixels from the left
    y: int            # of the middle, pixels from the top
    size: int         # the longer side, pixels
    angle: int        # degrees
    mirrored: bool

    @property
    def foot(self):
        return self.y + self.size / 2


@dataclass(frozen=True)
class Kind:
    name: str
    colour: str       # "" if no one word fits
    tint: str         # "" for the drawing's own colours
    places: tuple


@dataclass(frozen=True)
class Scene:
    theme: str        # the name of its setting
    style: str
    things: tuple     # of Kinds
    ground: str       # the seed of the background, one of GROUNDS for its setting

    @cached_property
    def counts(self):
        return {kind.name: len(kind.places) for kind in self.things}

    @cached_property
    def kinds(self):
        return {kind.name: kind for kind in self.things}

    @property
    def absent(self):
        return [name for name in things.TYPES if name not in self.counts]

    @property
    def tempting(self):
        """Absent things of the setting with the strength of the temptation, the most typical first."""
        typical = things.SETTINGS[self.theme].things
        both = zip(typical, things.TEMPTING, strict=True)
        return [(name, w) for name, w in both if name not in self.counts]


def split_of(names):
    """The split that a combination of things belongs to, whatever their colours, counts and places."""
    key = hashlib.sha256("+".join([VERSION, *sorted(names)]).encode()).digest()
    return next(name for name, part in SPLITS.items() if int.from_bytes(key[:4], "big") % 100 in part)


# ---- what is there ----
def scene(rng, split="train", typical=True):
    """A random scene; with `typical` False any things are combined, and the setting suggests nothing."""
    while True:
        theme = rng.choice(list(things.SETTINGS))
        style = rng.choice(STYLES[split])
        names = combination(rng, theme, style, split, typical)
        counts = [rng.choice(COUNTS) for _ in names]
        while sum(counts) > MOST:
            counts[counts.index(max(counts))] -= 1
        wanted = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        found = arranged(rng, theme, wanted)
        if found:
            break
    kinds = []
    for name in names:
        places = tuple(place for other, place in zip(wanted, found, strict=True) if other == name)
        colour, tint = coloured(rng, name)
        kinds.append(Kind(name, colour, tint, places))
    return Scene(theme, style, tuple(kinds), f"{theme} {rng.randrange(GROUNDS)}")


def combination(rng, theme, style, split, typical):
    """Two to four names that the style draws, whose set is of the split."""
    while True:
        own = things.SETTINGS[theme].things
        names = [name for name, p in zip(own, things.PRESENCE, strict=True) if rng.random() < p]
        if rng.random() < OFF_SETTING:
            names.append(rng.choice([name for name in things.TYPES if name not in own]))
        if not typical:
            names = rng.sample(things.TYPES, rng.randint(2, 4))
        drawn = all(atlas.has(style, name) for name in names)
        if 2 <= len(names) <= 4 and drawn and split_of(names) == split:
            rng.shuffle(names)
            return names


def coloured(rng, name):
    """A thing's colour in a word, and the tint that it is drawn in."""
    colour = things.THINGS[name].colour
    if colour == "any":
        colour = rng.choice(list(things.TINTS))
        return colour, colour
    return ("" if colour == "-" else colour), ""


# ---- where it is ----
def place(rng, theme, name):
    """A random place for a thing: on the floor, in the air or on the wall, larger towards the viewer."""
    thing, line = things.THINGS[name], SIZE * ground.HORIZON[theme]
    size = rng.randint(*things.SIDES[thing.size])
    where = "air" if theme == "sea" and thing.where != "floor" else thing.where
    angle = rng.randint(-TURN, TURN)
    mirrored = rng.random() < .5 and thing.code not in things.LETTERED
    if where == "floor":
        floor = max(line + 12, size + 4)
        foot = rng.uniform(min(floor, SIZE - 16), SIZE - 6)
        depth = (foot - line) / (SIZE - line)
        size = round(size * (.84 + .26 * depth))
        y = foot - size / 2
    elif where == "wall":
        y = rng.uniform(size / 2 + 6, max(size / 2 + 8, line - size * .35))
    else:
        low = .80 * SIZE if theme == "sea" else max(line, size + 12)
        y = rng.uniform(size / 2 + 4, max(size / 2 + 6, low - size / 2))
    half = size / 2 + 3
    return Place(round(rng.uniform(half, SIZE - half)), round(min(y, SIZE - half)), size, angle, mirrored)


def hidden(behind, before):
    """The share of a place's box that another covers; a box is a little less than the drawing's square."""
    reach = .45 * (behind.size + before.size)
    across = min(reach - abs(behind.x - before.x), .9 * min(behind.size, before.size))
    down = min(reach - abs(behind.y - before.y), .9 * min(behind.size, before.size))
    return max(0, across) * max(0, down) / (.9 * behind.size) ** 2


def arranged(rng, theme, names, tries=60):
    """A place for each name such that nothing hides too much of another; None if that was not found."""
    found = []
    for name in names:
        for _ in range(tries):
            new = place(rng, theme, name)
            behind = [sum(hidden(old, p) for p in [*found, new] if p is not old and p.foot >= old.foot)
                      for old in [*found, new]]
            if max(behind) <= HIDDEN:
                found.append(new)
                break
        else:
            return None
    return found


# ---- the picture ----
def shadow(canvas, spot, floor):
    """A soft dark patch under what stands on the floor, float32 canvas (H, W, 3)."""
    wide, high = .42 * spot.size, max(3., .10 * spot.size)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    far = ((x - spot.x) / wide) ** 2 + ((y - spot.foot + high * .5) / high) ** 2
    canvas *= 1 - (.30 if floor else 0) * np.clip(1.2 - far, 0, 1)[..., None]


def paste(canvas, glyph, x, y):
    """Put a sprite's middle at x, y; what leaves the picture is cut off."""
    height, width = glyph.shape[:2]
    top, left = round(y - height / 2), round(x - width / 2)
    up, cut = max(0, -top), max(0, -left)
    part = canvas[max(0, top):top + height, max(0, left):left + width]
    glyph = glyph[up:up + part.shape[0], cut:cut + part.shape[1]]
    part *= 1 - glyph[..., 3:]
    part += glyph[..., :3]


@lru_cache(maxsize=GROUNDS * len(things.SETTINGS))
def background(theme, seed):
    return np.asarray(ground.ground(theme, random.Random(seed)))


def draw(s):
    """The picture of a scene, uint8 (SIZE, SIZE, 3)."""
    canvas = background(s.theme, s.ground).astype(np.float32)
    spots = [(spot, kind) for kind in s.things for spot in kind.places]
    for spot, kind in sorted(spots, key=lambda both: both[0].foot):
        stands = things.THINGS[kind.name].where == "floor"
        glyph = atlas.sprite(s.style, kind.name, kind.tint, spot.size, spot.angle, spot.mirrored)
        if stands:
            shadow(canvas, spot, stands)
            low = spot.foot - lowest(glyph)
            paste(canvas, glyph, spot.x, low)
        else:
            paste(canvas, glyph, spot.x, spot.y)
    return (canvas + .5).clip(0, 255).astype(np.uint8)


def lowest(glyph):
    """How far below its middle a sprite's lowest pixel is: a flat drawing stands on the floor, too."""
    rows = (glyph[..., 3] > .5).any(1).nonzero()[0]
    return rows[-1] + 1 - glyph.shape[0] / 2
