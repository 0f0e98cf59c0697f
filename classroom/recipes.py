"""What pairs.py and responders.py share: the options that decide a pair, its record, and the statistics of
some pairs that no method is needed for.
"""
if __name__ == "__main__":
    exit("A part of classroom/pairs.py; run: python classroom/pairs.py --help")

from dataclasses import dataclass

from classroom import world


@dataclass(frozen=True)
class Recipe:
    """The options of pairs.py that decide a pair; its help says what they do."""
    faithful: float = .8
    gap: float = 0.
    cue: float = 1.
    order: str = "random"
    questions: float = .2
    ask: tuple = ("existence",)
    temperature: float = 1.
    scorer_noise: float = 1.
    split: str = "train"
    weights: bool = False
    world: str = "classroom"


def home(recipe):
    """What names and generators begin with outside the training split."""
    return "" if recipe.split == "train" else f"{recipe.split}-"


def record(name, s, question, chosen, rejected, kind):
    meta = {"kind": kind, "theme": s.theme, "present": s.counts}
    return {"id": name, "image": f"images/{name}.png", "question": question, "chosen": chosen,
            "rejected": rejected, "meta": meta}


def describe(records, own=world):
    """Method-blind statistics of caption pairs, by role: how often it hallucinates, how much of the scene it
    names, how long it is; where in the list the hallucinated word is (0 first, 1 last)."""
    captions, out = [r for r in records if r["meta"]["kind"] == "caption"], {}
    for role in ("chosen", "rejected"):
        said = [own.mentions(r[role]) for r in captions]
        both = list(zip(captions, said, strict=True))
        false = [[w not in r["meta"]["present"] for w in words] for r, words in both]
        named = sum(len(set(words) & set(r["meta"]["present"])) for r, words in both)
        places = [i / (len(f) - 1) for f in false for i, bad in enumerate(f) if bad and len(f) > 1]
        total = max(1, len(captions))
        out[role] = {"hallucinates": 100 * sum(map(any, false)) / total,
                     "cover": 100 * named / max(1, sum(len(r["meta"]["present"]) for r in captions)),
                     "objects": sum(map(len, said)) / total,
                     "words": sum(len(r[role].split()) for r in captions) / total,
                     "place": sum(places) / max(1, len(places)),
                     "closer": 100 * sum(any(c in r[role] for c in own.CLOSERS) for r in captions) / total}
    out = {role: {k: round(v, 2) for k, v in table.items()} for role, table in out.items()}
    return out | {"captions": len(captions), "questions": len(records) - len(captions)}
