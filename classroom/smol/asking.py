"""Questions about a scene of the second world, in many words: POPE's, AMBER's and MMHal-Bench's kinds.

existence      "Is there a cup in the picture?"         yes, no
attribute      "What colour is the car?"                a colour; "Is the car red?" (AMBER's form): yes, no
counting       "How many spoons are there?"             a number; "Are there two spoons?": yes, no
relation       "Is the cup above or below the knife?"   a side; "Is it above?": yes, no; and on which side of
               the picture a thing is
false_premise  a colour or a side of what is not there, in the words of the questions above: the form of a
               question does not tell that its premise is false

As in the first world a question has the word that decides, the words that it is one of, and a sentence for
each.
"""
if __name__ == "__main__":
    exit("A part of classroom/pairs.py; run: python classroom/pairs.py --help")

from itertools import permutations

from classroom.smol import speech, things
from classroom.world import KINDS, Asked  # noqa: F401

AS_YES_OR_NO, AS_SIDE = .35, .3      # shares of a kind's questions
COLOUR_CHOICES = (*things.COLOURS, "no")
NUMBER_CHOICES = speech.NUMBERS
YES_NO = ("yes", "no")


def nouns(rng, name):
    """The fields of templates that name one thing: {a}, {one}, {many}, {the}."""
    one, many = speech.called(rng, name)
    a_one = speech.article(one)
    return {"a": a_one, "one": one, "many": many, "the": f"the {one}"}


def anything_absent(rng, s, fits=lambda name: True):
    """An absent thing, one time in two a tempting one; only those that fit."""
    tempting = [name for name, _ in s.tempting if fits(name)]
    if tempting and rng.random() < .5:
        return rng.choice(tempting)
    absent = [name for name in s.absent if fits(name)]
    return rng.choice(absent)


def existence(rng, s, what):
    """`what`: yes, random (any absent thing) or adversarial (an absent thing that the setting suggests)."""
    tempting = [name for name, _ in s.tempting]
    pool = {"yes": list(s.counts),
            "random": s.absent,
            "adversarial": tempting[:2]}
    name = rng.choice(pool[what])
    words = nouns(rng, name)
    yes = speech.say(rng, "yes_there", **words)
    no = speech.say(rng, "no_there", **words)
    question = speech.say(rng, "existence", **words)
    right = "yes" if what == "yes" else "no"
    return yes_or_no("existence", question, right, yes, no)


def yes_or_no(kind, question, right, yes, no):
    """A question with the sentences for yes and for no."""
    return Asked(kind, question, right, YES_NO, {"yes": yes, "no": no})


# ---- colours ----
def has_colour(name):
    return things.THINGS[name].colour != "-"


def a_coloured(words, colour):
    """a red car."""
    phrase = f"{colour} {words['one']}"
    return speech.article(phrase)


def colour_words(words, colour):
    """The fields that name a thing, with those for a colour: {colour}, {a_colour_one}."""
    phrase = a_coloured(words, colour)
    return words | {"colour": colour, "a_colour_one": phrase}


def attribute(rng, s):
    """The colour of a thing that is there once; None if there is none with a colour."""
    able = [kind for kind in s.things if kind.colour and len(kind.places) == 1]
    if not able:
        return None
    kind = rng.choice(able)
    words = nouns(rng, kind.name)
    if rng.random() < AS_YES_OR_NO:
        return attribute_yes(rng, kind, words)
    return colour_question(rng, "attribute", words, kind.colour)


def colour_question(rng, kind, words, right):
    """What colour a thing is; `right` is no if it is not there."""
    said = {"no": speech.say(rng, "premise_answers", **words)}
    for colour in things.COLOURS:
        fields = colour_words(words, colour)
        said[colour] = speech.say(rng, "coloured", **fields)
    question = speech.say(rng, "attribute", **words)
    return Asked(kind, question, right, COLOUR_CHOICES, said)


def attribute_yes(rng, kind, words):
    """Is the car red?"""
    pool = things.TINTS if kind.tint else things.COLOURS
    others = [colour for colour in pool if colour != kind.colour]
    other = rng.choice(others)
    right = rng.choice(YES_NO)
    asked, instead = other, kind.colour
    if right == "yes":
        asked, instead = kind.colour, other
    words = colour_words(words, asked)
    phrase = a_coloured(words, instead)
    words |= {"right": instead, "a_right_one": phrase}
    yes = speech.say(rng, "coloured_yes", **words)
    no = speech.say(rng, "coloured_no", **words)
    question = speech.say(rng, "attribute_yes", **words)
    return yes_or_no("attribute", question, right, yes, no)


# ---- numbers ----
def say_number(rng, name, count, words):
    """A sentence about so many of a thing."""
    noun = words["one"] if count == 1 else words["many"]
    number = speech.NUMBERS[count]
    return speech.say(rng, name, count, number=number, things=noun, **words)


def counting(rng, s):
    """How many there are: of none, one, two or three, the rarer ones as often as they are there."""
    there = {0: [anything_absent(rng, s)]}
    for name, count in s.counts.items():
        there.setdefault(count, []).append(name)
    n = rng.choice(sorted(there))
    name = rng.choice(there[n])
    words = nouns(rng, name)
    if rng.random() < AS_YES_OR_NO:
        return counting_yes(rng, n, words)
    said = {}
    for count, number in enumerate(speech.NUMBERS):
        said[number] = say_number(rng, "counted", count, words)
    question = speech.say(rng, "counting", **words)
    return Asked("counting", question, speech.NUMBERS[n], NUMBER_CHOICES, said)


def counting_yes(rng, n, words):
    """Are there two cups?"""
    others = [count for count in range(4) if count != n]
    several = [count for count in others if count > 1]
    right = "yes" if n > 1 and rng.random() < .6 else "no"
    if right == "yes":
        asked, instead = n, rng.choice(others)
    else:
        asked, instead = rng.choice(several), n
    yes = say_number(rng, "counted_yes", asked, words)
    no = say_number(rng, "counted_no", instead, words)
    question = say_number(rng, "counting_yes", asked, words)
    return yes_or_no("counting", question, right, yes, no)


# ---- places ----
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


def relation(rng, s):
    """Two things that are there once, apart from each other, or one and its side; None without such."""
    once = [kind.name for kind in s.things if len(kind.places) == 1]
    sides = {name: speech.side_of(s, name) for name in once}
    aside = [name for name, side in sides.items() if side in ("left", "right")]
    if aside and rng.random() < AS_SIDE:
        name = rng.choice(aside)
        return side_question(rng, "relation", name, sides[name])
    pairs = list(related(s, once))
    if not pairs:
        return None
    a, b, side = rng.choice(pairs)
    first = nouns(rng, a)["the"]
    second = nouns(rng, b)["the"]
    words = {"first": first, "second": second}
    if rng.random() < AS_YES_OR_NO:
        return relation_yes(rng, side, words)
    return relation_question(rng, side, words)


def related(s, names):
    """Each (a, b, side) such that a is on that side of b."""
    for a, b in permutations(names, 2):
        for side in speech.beside(s, a, b):
            yield a, b, side


def relation_question(rng, side, words):
    """Is the cup above or below the knife?"""
    both = [side, OPPOSITE[side]]
    low, high = rng.sample(both, 2)
    first = speech.of(low).removesuffix(" of")
    words |= {"low": first, "high": speech.of(high)}
    question = speech.say(rng, "relation", **words)
    said = {}
    for word in (low, high):
        where = speech.of(word)
        said[word] = speech.say(rng, "related", side=where, **words)
    choices = tuple(sorted(both))
    return Asked("relation", question, side, choices, said)


def relation_yes(rng, side, words):
    """Is the cup to the left of the knife?"""
    right = rng.choice(YES_NO)
    asked = side if right == "yes" else OPPOSITE[side]
    here = speech.of(asked)
    there = speech.of(OPPOSITE[asked])
    yes = speech.say(rng, "related_yes", side=here, **words)
    no = speech.say(rng, "related_no", side=there, **words)
    question = speech.say(rng, "relation_yes", side=here, **words)
    return yes_or_no("relation", question, right, yes, no)


def side_question(rng, kind, name, right):
    """On which side of the picture a thing is; `right` is no if it is not there."""
    words = nouns(rng, name)
    said = {"no": speech.say(rng, "premise_answers", **words)}
    for side in ("left", "right"):
        said[side] = speech.say(rng, "sided", side=side, **words)
    question = speech.say(rng, "side", **words)
    return Asked(kind, question, right, ("left", "right", "no"), said)


def false_premise(rng, s):
    """The colour or the side of what is not there."""
    if rng.random() < .4:
        name = anything_absent(rng, s)
        return side_question(rng, "false_premise", name, "no")
    name = anything_absent(rng, s, has_colour)
    words = nouns(rng, name)
    return colour_question(rng, "false_premise", words, "no")


def ask(rng, s, kind):
    """A question of a kind, existence balanced, half of the absent things tempting; None if none can be
    asked."""
    if kind == "existence":
        what = rng.choice(("yes", "yes", "random", "adversarial"))
        return existence(rng, s, what)
    return ASK[kind](rng, s)


ASK = {
    "attribute": attribute,
    "counting": counting,
    "relation": relation,
    "false_premise": false_premise,
}
