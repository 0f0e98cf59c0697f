"""Language of the second world: noun phrases, templates, captions, and a reader of free text.

    caption(rng, s, [("cup", 2), ("egg", 1)])  "This picture shows a kitchen. There are two mugs and an egg."
    mentions("Two mugs beside the sofas.")     ["cup", "sofa"]: the things that a text names, in its order

The templates are lines of words/*.txt. In them {is|are} is the first word for one thing and the second for
several; {list}, {the} and so on are filled in by the functions here and in asking.py. A thing is called by
its name or by one of its other names (things.py), the same throughout a caption.
"""
if __name__ == "__main__":
    exit("A part of classroom/pairs.py; run: python classroom/pairs.py --help")

import re
from functools import cache
from pathlib import Path

from classroom.smol import things
from classroom.world import arrange

WORDS = Path(__file__).resolve().parent / "words"
NUMBERS = ("no", "one", "two", "three")
INTO = {"in": "into", "on": "onto", "at": "to", "under": "under"}
# How often, where it is possible: another name, a colour, a place; a comparison and a last line in a caption.
OTHER_NAME, COLOURED, PLACED, RELATED, CLOSED = .35, .6, .4, .4, .3
APART = 34                           # pixels between two middles for one to be called left of the other
MIDDLE, ASIDE, NEARLY = 112, 28, 16  # pixels: the middle line; how far on a side is; how near the middle is


# ---- templates ----
@cache
def lines(name):
    """The templates of words/NAME.txt."""
    text = (WORDS / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def fill(template, number=1, /, **words):
    """A template with its fields filled in, its sentences beginning with capitals."""
    def found(match):
        field = match[1]
        if "|" not in field:
            return words[field.replace(" ", "_")]
        one, several = field.split("|")
        return one if number == 1 else several
    text = re.sub(r"\{([^}]*)\}", found, template)
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def say(rng, name, number=1, /, **words):
    """One of words/NAME.txt, filled in."""
    template = rng.choice(lines(name))
    return fill(template, number, **words)


# ---- noun phrases ----
def called(rng, name):
    """(singular, plural) of one of a thing's names."""
    own, *others = things.THINGS[name].names
    if others and rng.random() < OTHER_NAME:
        return rng.choice(others)
    return own


def article(phrase):
    """a cup, an egg."""
    vowel = phrase[0].lower() in "aeiou"
    return f"an {phrase}" if vowel else f"a {phrase}"


def phrase(names, count, colour=""):
    """names: (singular, plural) -> "a red cup", "two cups"."""
    one, several = names
    noun = one if count == 1 else several
    if colour:
        noun = f"{colour} {noun}"
    return article(noun) if count == 1 else f"{NUMBERS[count]} {noun}"


def listed(phrases):
    """a, b and c."""
    *first, last = phrases
    return f"{', '.join(first)} and {last}" if first else last


# ---- the reader ----
@cache
def names():
    """{every name of a thing, in lower case, singular and plural: the thing}."""
    found = {}
    for thing in things.THINGS.values():
        for one, several in (*thing.names, *thing.understood):
            found[one.lower()] = thing.name
            found[several.lower()] = thing.name
    return found


@cache
def _pattern():
    longest_first = sorted(map(re.escape, names()), key=len, reverse=True)
    either = "|".join(longest_first)
    return re.compile(rf"(?<![\w'])({either})(?!\w)", re.IGNORECASE)


def _thing(match):
    """The thing that a match of the pattern names."""
    return names()[match[1].lower()]


def mentions(text):
    """The things that a text names, in its order, once for each mention: "hot dog" is no dog."""
    return [_thing(match) for match in _pattern().finditer(text)]


def spans(text):
    """Where a text names things: [(start, end)]."""
    return [match.span() for match in _pattern().finditer(text)]


# ---- where a thing is ----
def side_of(s, name):
    """left, right or middle of the picture if all of a kind are there, else ""."""
    across = [place.x - MIDDLE for place in s.kinds[name].places]
    leftmost, rightmost = min(across), max(across)
    if rightmost < -ASIDE:
        return "left"
    if leftmost > ASIDE:
        return "right"
    if -NEARLY < leftmost and rightmost < NEARLY:
        return "middle"
    return ""


def beside(s, a, b):
    """The words that are true of a with respect to b, both there once: some of left, right, above, below."""
    p, = s.kinds[a].places
    q, = s.kinds[b].places
    found = []
    if abs(p.x - q.x) >= APART:
        found.append("left" if p.x < q.x else "right")
    if abs(p.y - q.y) >= APART:
        found.append("above" if p.y < q.y else "below")
    return found


def of(side):
    """left -> to the left of; above -> above."""
    return f"to the {side} of" if side in ("left", "right") else side


# ---- captions ----
DESCRIBE = lines("describe")
CLOSERS = lines("closers")


def tempt(rng, s, level):
    """Absent things that a careless observer of this scene would add: each by its typicality times
    `level`."""
    return [(name, 1) for name, w in s.tempting if rng.random() < level * w]


def opener(rng, theme):
    """The first sentence, which names the setting."""
    setting = things.SETTINGS[theme]
    where = f"{setting.preposition} {setting.article}"
    into = f"{INTO[setting.preposition]} {setting.article}"
    return say(rng, "openers", setting=setting.article, where=where, into=into)


def colour_of(rng, s, name):
    """The colour to mention, or "": the true one, of what is not there any; more often where it can vary."""
    own = things.THINGS[name].colour
    if own == "-":
        return ""
    often = COLOURED if own == "any" else COLOURED / 3
    if rng.random() > often:
        return ""
    if own != "any":
        return own
    if name in s.counts:
        return s.kinds[name].colour
    return rng.choice(list(things.TINTS))


def groups(rng, named):
    """Pairs (name, count) cut into sentences of one to three."""
    found = []
    rest = list(named)
    while rest:
        size = rng.choice((1, 2, 2, 3))
        found.append(rest[:size])
        rest = rest[size:]
    return found


def sentence(rng, s, group, nouns, first):
    """A sentence that names a group of things; one alone sometimes with its place."""
    number = sum(count for _, count in group)
    phrases = []
    for name, count in group:
        colour = colour_of(rng, s, name)
        phrases.append(phrase(nouns[name], count, colour))
    text = listed(phrases)
    first_name, _ = group[0]
    side = told_side(rng, s, first_name)
    if len(group) == 1 and side and rng.random() < PLACED:
        return placed(rng, number, text, side)
    kind = "lists" if first or rng.random() < .4 else "more"
    return say(rng, kind, number, list=text)


def told_side(rng, s, name):
    """The side to tell of a thing, or "": the true one, any of what is not there."""
    if name in s.counts:
        return side_of(s, name)
    return rng.choice(("left", "right", "middle", ""))


def placed(rng, number, text, side):
    """A sentence that says on which side something is."""
    at, to = f"on the {side}", f"to the {side}"
    if side == "middle":
        at, to = "in the middle", "towards the middle"
    return say(rng, "placed", number, list=text, at_the_side=at, to_the_side=to)


def relation(rng, s, named, nouns):
    """A sentence that compares two of the named things, or ""."""
    once = [name for name, count in named if count == 1 and s.counts.get(name, 1) == 1]
    if len(once) < 2:
        return ""
    a, b = rng.sample(once, 2)
    sides = ["left", "right", "above", "below"]
    if a in s.counts and b in s.counts:
        sides = beside(s, a, b)
    if not sides:
        return ""
    side = of(rng.choice(sides))
    first, _ = nouns[a]
    second, _ = nouns[b]
    return say(rng, "relations", first=f"the {first}", beside=side, second=f"the {second}")


def caption(rng, s, named, closer=False):
    """Several sentences about a scene; `named`: pairs (name, count) in the order in which they are said."""
    nouns = {name: called(rng, name) for name, _ in named}
    said = [opener(rng, s.theme)]
    for i, group in enumerate(groups(rng, named)):
        said.append(sentence(rng, s, group, nouns, i == 0))
    if rng.random() < RELATED:
        said.append(relation(rng, s, named, nouns))
    if closer:
        said.append(rng.choice(CLOSERS))
    return " ".join(filter(None, said))


def careless_caption(rng, s, level=0., omit=0., order="random", closer=CLOSED):
    """What a base learns to write: with level 0 and omit 0 it is complete and true."""
    there = list(s.counts.items())
    kept = [pair for pair in there if rng.random() >= omit]
    added = tempt(rng, s, level)
    named = arrange(rng, kept or there, added, order)
    closed = rng.random() < closer
    return caption(rng, s, named, closed)
