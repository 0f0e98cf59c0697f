"""The second world as classroom/pairs.py reads a world: the names that classroom/world.py has, of this one.

    pairs.py --world smol ...     pairs and scenes of things in settings, in many words
"""
if __name__ == "__main__":
    exit("A part of classroom/pairs.py; run: python classroom/pairs.py --help")

from classroom.smol.asking import KINDS, Asked, ask, existence
from classroom.smol.scenes import SIZE, SPLITS, VERSION, Kind, Scene, draw, scene, split_of
from classroom.smol.speech import (
    CLOSERS,
    DESCRIBE,
    arrange,
    caption,
    careless_caption,
    mentions,
    names,
    tempt,
)
from classroom.smol.things import TYPES

__all__ = ["CLOSERS", "DESCRIBE", "KINDS", "SIZE", "SPLITS", "TYPES", "VERSION", "Asked", "Kind", "Scene",
           "arrange", "ask", "caption", "careless_caption", "described", "draw", "existence", "mentions",
           "scene", "split_of", "tempt"]


def described(s):
    """The truth of a caption. `names` has the other names of all things: {"mug": "cup", "knives": "knife"},
    in lower case, without the plurals in -s and -es, which a reader of `present` and `absent` knows."""
    known = names()
    plurals = {word + ending for word in known for ending in ("s", "es")}
    others = {word: name.lower() for word, name in known.items()
              if word != name.lower() and word not in plurals}
    return {"present": list(s.counts), "absent": s.absent, "names": others}
