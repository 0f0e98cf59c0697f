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
    exit(print("A part of classroom/pairs.py; run: python classroom/pairs.py --help"))

from classroom.smol import speech, things
from classroom.world import KINDS, Asked  # noqa: F401

AS_YES_OR_NO, AS_SIDE = .35, .3      # shares of a kind's questions
COLOUR_CHOICES = (*things.COLOURS, "no")
NUMBER_CHOICES = speech.NUMBERS
YES_NO = ("yes", "no")


def nouns(rng, name):
    """The fields of templates that name one thing: {a}, {one}, {many}, {the}."""
    one, many = speech.called(rng, name)
    return {"a": speech.article(one), "one": one, "many": many, "the": f"the {one}"}


def either(rng, yes, no):
    """The sentences for yes and for no; each: (a file of templates, the number, its words)."""
    sentences = {}
    for word, (name, number, words) in (("yes", yes), ("no", no)):
        sentences[word] = speech.say(rng, name, number, **words)
    return sentences


def anything_absent(rng, s, fits=lambda name: True):
    """An absent thing, one time in two a tempting one; only those that fit."""
    tempting = [name for name, _ in s.tempting if fits(name)]
    if tempting and rng.random() < .5:
        return rng.choice(tempting)
    return rng.choice([name for name in s.absent if fits(name)])


def existence(rng, s, what):
    """`what`: yes, random (any absent thing) or adversarial (an absent thing that the setting suggests)."""
    tempting = [name for name, _ in s.tempting]
    pool = {"yes": list(s.counts), "random": s.absent, "adversarial": tempting[:2]}
    words = nouns(rng, rng.choice(pool[what]))
    said = either(rng, ("yes_there", 1, words), ("no_there", 1, words))
    right = "yes" if what == "yes" else "no"
    return Asked("existence", speech.say(rng, "existence", **words), right, YES_NO, said)


# ---- colours ----
def has_colour(name):
    return things.THINGS[name].colour != "-"


def colour_words(words, colour):
    return words | {"colour": colour, "a_colour_one": speech.article(f"{colour} {words['one']}")}


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
        said[colour] = speech.say(rng, "coloured", **colour_words(words, colour))
    return Asked(kind, speech.say(rng, "attribute", **words), right, COLOUR_CHOICES, said)


def attribute_yes(rng, kind, words):
    """Is the car red?"""
    pool = things.TINTS if kind.tint else things.COLOURS
    other = rng.choice([colour for colour in pool if colour != kind.colour])
    right = rng.choice(YES_NO)
    asked = kind.colour if right == "yes" else other
    instead = other if right == "yes" else kind.colour
    more = {"right": instead, "a_right_one": speech.article(f"{instead} {words['one']}")}
    words = colour_words(words, asked) | more
    said = either(rng, ("coloured_yes", 1, words), ("coloured_no", 1, words))
    return Asked("attribute", speech.say(rng, "attribute_yes", **words), right, YES_NO, said)


# ---- numbers ----
def number_words(words, count):
    things_ = words["one"] if count == 1 else words["many"]
    return words | {"number": speech.NUMBERS[count], "things": things_}


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
    for k, number in enumerate(speech.NUMBERS):
        said[number] = speech.say(rng, "counted", k, **number_words(words, k))
    question = speech.say(rng, "counting", **words)
    return Asked("counting", question, speech.NUMBERS[n], NUMBER_CHOICES, said)


def counting_yes(rng, n, words):
    """Are there two cups?"""
    right = "yes" if n > 1 and rng.random() < .6 else "no"
    others = [k for k in range(4) if k != n]
    if right == "yes":
        asked, instead = n, rng.choice(others)
    else:
        asked, instead = rng.choice([k for k in others if k > 1]), n
    said = either(rng, ("counted_yes", asked, number_words(words, asked)),
                  ("counted_no", instead, number_words(words, instead)))
    question = speech.say(rng, "counting_yes", asked, **number_words(words, asked))
    return Asked("counting", question, right, YES_NO, said)


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
    pairs = [(a, b, side) for a in once for b in once if a != b for side in speech.beside(s, a, b)]
    if not pairs:
        return None
    a, b, side = rng.choice(pairs)
    words = {"first": nouns(rng, a)["the"], "second": nouns(rng, b)["the"]}
    if rng.random() < AS_YES_OR_NO:
        return relation_yes(rng, side, words)
    low, high = rng.sample((side, OPPOSITE[side]), 2)
    words |= {"low": speech.of(low).removesuffix(" of"), "high": speech.of(high)}
    question = speech.say(rng, "relation", **words)
    said = {}
    for word in (low, high):
        said[word] = speech.say(rng, "related", side=speech.of(word), **words)
    return Asked("relation", question, side, tuple(sorted((low, high))), said)


def relation_yes(rng, side, words):
    """Is the cup to the left of the knife?"""
    right = rng.choice(YES_NO)
    asked = side if right == "yes" else OPPOSITE[side]
    said = either(rng, ("related_yes", 1, words | {"side": speech.of(asked)}),
                  ("related_no", 1, words | {"side": speech.of(OPPOSITE[asked])}))
    question = speech.say(rng, "relation_yes", side=speech.of(asked), **words)
    return Asked("relation", question, right, YES_NO, said)


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
        return side_question(rng, "false_premise", anything_absent(rng, s), "no")
    words = nouns(rng, anything_absent(rng, s, has_colour))
    return colour_question(rng, "false_premise", words, "no")


def ask(rng, s, kind):
    """A question of a kind, existence balanced, half of the absent things tempting; None if none can be
    asked."""
    if kind == "existence":
        return existence(rng, s, rng.choice(("yes", "yes", "random", "adversarial")))
    return {"attribute": attribute, "counting": counting, "relation": relation,
            "false_premise": false_premise}[kind](rng, s)
