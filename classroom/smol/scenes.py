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
    exit("A part of classroom/pairs.py; run: python classroom/pairs.py --help")

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
OFF_SETTING = .2                 # how often a kind comes from another setting
MOST = 7                         # things in a scene
HIDDEN = .25                     # of a thing's box, at most
TURN = 14                        # degrees to either side
MIXED = .18                      # the standard deviation by which channels are mixed in play
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
    play: str = ""    # not "": a seed, by which every thing is drawn in colours of no style

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
    text = "+".join([VERSION, *sorted(names)])
    key = hashlib.sha256(text.encode()).digest()
    number = int.from_bytes(key[:4], "big") % 100
    return next(name for name, part in SPLITS.items() if number in part)


# ---- what is there ----
def scene(rng, split="train", typical=True):
    """A random scene; with `typical` False any things are combined, and the setting suggests nothing."""
    while True:
        theme = rng.choice(list(things.SETTINGS))
        style = rng.choice(STYLES[split])
        names = combination(rng, theme, style, split, typical)
        counts = numbers(rng, names)
        wanted = [name for name in names for _ in range(counts[name])]
        found = arranged(rng, theme, wanted)
        if found:
            break
    kinds = []
    for name in names:
        both = zip(wanted, found, strict=True)
        places = tuple(spot for other, spot in both if other == name)
        colour, tint = coloured(rng, name)
        kinds.append(Kind(name, colour, tint, places))
    seed = f"{theme} {rng.randrange(GROUNDS)}"
    return Scene(theme, style, tuple(kinds), seed)


def numbers(rng, names):
    """How often each is there, MOST in all: what is there most often gives way."""
    counts = {name: rng.choice(COUNTS) for name in names}
    while sum(counts.values()) > MOST:
        most = max(counts, key=counts.get)
        counts[most] -= 1
    return counts


def combination(rng, theme, style, split, typical):
    """Two to four names that the style draws, whose set is of the split."""
    own = things.SETTINGS[theme].things
    foreign = [name for name in things.TYPES if name not in own]
    while True:
        ranked = zip(own, things.PRESENCE, strict=True)
        names = [name for name, p in ranked if rng.random() < p]
        if rng.random() < OFF_SETTING:
            names.append(rng.choice(foreign))
        if not typical:
            number = rng.randint(2, 4)
            names = rng.sample(things.TYPES, number)
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
    if colour == "-":
        return "", ""
    return colour, ""


# ---- where it is ----
def place(rng, theme, name):
    """A random place for a thing: on the floor, in the air or on the wall, larger towards the viewer."""
    thing = things.THINGS[name]
    line = SIZE * ground.HORIZON[theme]
    sides = things.SIDES[thing.size]
    size = rng.randint(*sides)
    angle = rng.randint(-TURN, TURN)
    mirrored = rng.random() < .5 and thing.code not in things.LETTERED
    if thing.where == "floor":
        size, y = on_the_floor(rng, size, line)
    elif theme == "sea":
        y = between(rng, size / 2 + 4, .80 * SIZE - size / 2)
    elif thing.where == "wall":
        y = between(rng, size / 2 + 6, line - size * .35)
    else:
        low = max(line, size + 12)
        y = between(rng, size / 2 + 4, low - size / 2)
    half = size / 2 + 3
    x = rng.uniform(half, SIZE - half)
    y = min(y, SIZE - half)
    return Place(round(x), round(y), size, angle, mirrored)


def on_the_floor(rng, size, line):
    """The size of what stands on the floor, and its y: `line` is where the floor begins."""
    floor = max(line + 12, size + 4)
    highest = min(floor, SIZE - 16)
    foot = rng.uniform(highest, SIZE - 6)
    depth = (foot - line) / (SIZE - line)
    size = round(size * (.84 + .26 * depth))
    return size, foot - size / 2


def between(rng, top, bottom):
    """A random y; if there is no room, just below `top`."""
    return rng.uniform(top, max(top + 2, bottom))


def hidden(behind, before):
    """The share of a place's box that another covers; a box is a little less than the drawing's square."""
    reach = .45 * (behind.size + before.size)
    most = .9 * min(behind.size, before.size)
    across = min(reach - abs(behind.x - before.x), most)
    down = min(reach - abs(behind.y - before.y), most)
    box = (.9 * behind.size) ** 2
    return max(0, across) * max(0, down) / box


def crowded(places):
    """Whether others hide too much of one of some places."""
    for one in places:
        before = [p for p in places if p is not one and p.foot >= one.foot]
        if sum(hidden(one, p) for p in before) > HIDDEN:
            return True
    return False


def arranged(rng, theme, names, tries=60):
    """A place for each name such that nothing hides too much of another; None if that was not found."""
    found = []
    for name in names:
        for _ in range(tries):
            new = place(rng, theme, name)
            if not crowded([*found, new]):
                found.append(new)
                break
        else:
            return None
    return found


# ---- the picture ----
def from_behind(s):
    """(place, kind) of all things of a scene; what stands lower is in front and comes later."""
    spots = [(spot, kind) for kind in s.things for spot in kind.places]
    return sorted(spots, key=lambda both: both[0].foot)


def shadow(canvas, spot):
    """A soft dark patch under what stands on the floor, float32 canvas (H, W, 3)."""
    wide = .42 * spot.size
    high = max(3., .10 * spot.size)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    across = (x - spot.x) / wide
    down = (y - spot.foot + high * .5) / high
    far = across ** 2 + down ** 2
    dark = np.clip(1.2 - far, 0, 1)
    canvas *= 1 - .30 * dark[..., None]


def paste(canvas, glyph, x, y):
    """Put a sprite's middle at x, y; what leaves the picture is cut off."""
    height, width = glyph.shape[:2]
    top = round(y - height / 2)
    left = round(x - width / 2)
    rows = slice(max(0, top), top + height)
    columns = slice(max(0, left), left + width)
    part = canvas[rows, columns]
    glyph = glyph[max(0, -top):, max(0, -left):]
    high, wide = part.shape[:2]
    glyph = glyph[:high, :wide]
    part *= 1 - glyph[..., 3:]
    part += glyph[..., :3]


def played(glyph, rng):
    """A sprite in other colours, float32 (h, w, 4): what it is must be seen by its shape. The three channels
    are mixed and scaled at random; a colour stays below its alpha, by which it is multiplied."""
    rows = [[rng.gauss(row == column, MIXED) for column in range(3)] for row in range(3)]
    gain = rng.uniform(.7, 1.3)
    alpha = glyph[..., 3:]
    mixed = glyph[..., :3] @ np.float32(rows) * gain
    return np.concatenate([mixed.clip(0, 255 * alpha), alpha], -1)


@lru_cache(maxsize=GROUNDS * len(things.SETTINGS))
def background(theme, seed):
    """A setting's background, uint8 (SIZE, SIZE, 3)."""
    picture = ground.ground(theme, random.Random(seed))
    return np.asarray(picture)


def draw(s):
    """The picture of a scene, uint8 (SIZE, SIZE, 3)."""
    canvas = background(s.theme, s.ground).astype(np.float32)
    rng = random.Random(s.play)
    for spot, kind in from_behind(s):
        glyph = atlas.sprite(s.style, kind.name, kind.tint, spot.size, spot.angle, spot.mirrored)
        if s.play:
            glyph = played(glyph, rng)
        y = spot.y
        if things.THINGS[kind.name].where == "floor":
            shadow(canvas, spot)
            y = spot.foot - lowest(glyph)
        paste(canvas, glyph, spot.x, y)
    rounded = (canvas + .5).clip(0, 255)
    return rounded.astype(np.uint8)


def lowest(glyph):
    """How far below its middle a sprite's lowest pixel is: a flat drawing stands on the floor, too."""
    solid = glyph[..., 3] > .5
    rows, = solid.any(1).nonzero()
    return rows[-1] + 1 - len(glyph) / 2
