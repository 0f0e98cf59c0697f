"""PDS-DPO's condition as a knob: four responders of stated skill, whose answers the built-in ArmoRM ranks.

    python classroom/pairs.py --responders tied --out D     makes pairs
    python classroom/responders.py                papers/results/ties.json
    python classroom/responders.py D/pairs.jsonl  of pairs that synth.py made

ArmoRM reads words and no picture. Its best answer is the truest one only as far as good language comes with
good sight, which the paper takes for granted of its responders. Here it is stated.

Sight has four grades. The first sees everything; from grade to grade an absent thing that tempts is added
more often (`level` 0, 1/3, 2/3, 1 of world.TEMPTING) and one that is there is left out more often (0, 5, 10,
15%).

Language has four grades: 0, 1/3, 2/3 or all of the answers break off without a full stop. It says nothing
about what was seen, and it is what this ArmoRM marks down most.

    tied      who sees best speaks best, grade for grade
    untied    the grades of language are dealt anew for each picture
    opposed   who sees best speaks worst

Everything else is the synthesis' own: a question of its two about a scene's own picture, four answers, the
rewards of rewards.ArmoRM with the built-in weights, pairing.select with synth.py's margin, 256 pictures at a
time. With --length_penalty, PENALTY is taken off the reward for each word.

Calibrated on words alone, before any model was trained on these pairs: how often the chosen answer invents
less than the rejected one (equal ones count half) and how often it is the longer one. The grades are linear
and were not adjusted. Of the faults that ArmoRM was trained to see, a thing named twice was tried first, and
tied it to sight in vain: without a penalty the truer answer won 30% of the pairs that were tied, 29% of the
others. PENALTY is the first of 0.01, 0.02, 0.04, 0.08 at which, untied, the chosen answer is the longer one
in at most half of the pairs.
"""
import random
import statistics
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from classroom import recipes, world  # noqa: E402

ARMORM = ROOT / "classroom" / "synthesis" / "armorm"
FOUND = ROOT / "classroom" / "papers" / "results" / "ties.json"
SIGHT = ((0, 0), (1 / 3, .05), (2 / 3, .1), (1, .15))      # level and omit of world.careless_caption
LANGUAGE = (0, 1 / 3, 2 / 3, 1)                            # how often an answer breaks off
TIES = ("tied", "untied", "opposed")
PENALTY = .02                                              # of reward, a word
MARGIN = .1                                                # synth.py's
BLOCK = 256                                                # pictures at a time


def spoken(rng, tie):
    """The grade of language of each grade of sight."""
    grades = [*range(len(LANGUAGE))]
    if tie == "untied":
        rng.shuffle(grades)
    return grades[::-1] if tie == "opposed" else grades


def answers(rng, s, tie):
    """What the four say about a scene, the one that sees best first."""
    said = []
    for (level, omit), grade in zip(SIGHT, spoken(rng, tie), strict=True):
        text = world.careless_caption(rng, s, level, omit)
        breaks_off = rng.random() < LANGUAGE[grade]
        said.append(text.removesuffix(" .") if breaks_off else text)
    return said


@cache
def armorm():
    from synthesis import rewards
    return rewards.ArmoRM.load(ARMORM)


def scored(asked, said, penalty):
    """{(id, responder): ArmoRM's score, less the penalty}; all answers to one question at once."""
    found = {}
    for question in world.DESCRIBE:
        rows = [row for prompt in asked if prompt["question"] == question for row in said[prompt["id"]]]
        judged = armorm().judge(question, [row["response"] for row in rows]) if rows else []
        for row, verdict in zip(rows, judged, strict=True):
            words = len(row["response"].split())
            found[row["id"], row["model"]] = verdict["score"] - penalty * words
    return found


def made(seed, n, recipe, tie, penalty=0.):
    """-> n (record, scene), as pairs.made: fewer pairs are a prefix of more. meta.models are the chosen and
    the rejected answer's grades of sight, meta.scores their rewards."""
    from synthesis import pairing
    out, first = [], 0
    while len(out) < n:
        scenes, asked, said = {}, [], {}
        for i in range(first, first + BLOCK):
            rng = random.Random(f"{recipes.home(recipe)}responders-{seed}-{i}")
            s = world.scene(rng, recipe.split)
            id = f"{recipes.home(recipe)}r{seed}-{i:05}"
            scenes[id] = s
            asked.append({"id": id, "image": "", "question": rng.choice(world.DESCRIBE), "topic": s.theme,
                          "prompt": "", "guidance": None})
            said[id] = [{"id": id, "model": grade, "response": text, "finished": True}
                        for grade, text in enumerate(answers(rng, s, tie))]
        chosen, _, _ = pairing.select(asked, said, scored(asked, said, penalty), MARGIN)
        for pair in chosen:
            s = scenes[pair["id"]]
            row = recipes.record(pair["id"], s, pair["question"], pair["chosen"], pair["rejected"], "caption")
            row["meta"] |= {name: pair["meta"][name] for name in ("models", "scores")}
            out.append((row, s))
        first += BLOCK
    return out[:n]


def invented(record, role):
    """How many absent types an answer names."""
    return len(set(world.mentions(record[role])) - set(record["meta"]["present"]))


def more(a, b):
    """1 where a > b, 1/2 where they are equal."""
    return (a > b) + (a == b) / 2


def describe(records):
    """recipes.describe, and in percent how often the chosen answer is the truer and the longer of the two; by
    how many words it is longer; how many of its things are invented."""
    def mean(value):
        return round(statistics.mean(map(value, records)), 2)

    def words(record, role):
        return len(record[role].split())
    return recipes.describe(records) | {
        "truer": mean(lambda r: 100 * more(invented(r, "rejected"), invented(r, "chosen"))),
        "longer": mean(lambda r: 100 * more(words(r, "chosen"), words(r, "rejected"))),
        "words longer": mean(lambda r: words(r, "chosen") - words(r, "rejected")),
        "invented": {role: mean(lambda r, role=role: invented(r, role)) for role in ("chosen", "rejected")}}


def conditions():
    """{name: (tie, penalty)} of the sweep."""
    return {tie + says: (tie, penalty) for says, penalty in (("", 0.), (", length penalty", PENALTY))
            for tie in TIES}


def of_synthesis(path):
    """Pairs of synth.py as records whose truth is what the prompt asks for. Raises UserError."""
    records = []
    for number, record in enumerate(data.read_jsonl(path), 1):
        prompt = (record.get("meta") or {}).get("prompt")
        if not prompt:
            raise data.UserError(f"{path}: pair {number} has no meta.prompt to be compared with; give the "
                                 "pairs.jsonl of a run of synth.py")
        truth = {"kind": "caption", "present": dict.fromkeys(world.mentions(prompt), 1)}
        records.append(record | {"meta": record["meta"] | truth})
    if not records:
        raise data.UserError(f"{path} holds no pairs")
    return records


def main():
    parser = data.Parser(prog="responders.py", description=__doc__)
    parser.add_argument("pairs", nargs="?", help="pairs.jsonl of a run of synth.py")
    o = parser.parse_args()
    try:
        if o.pairs:
            return print("\n".join(table({o.pairs: describe(of_synthesis(o.pairs))})))
    except data.UserError as error:
        sys.exit(f"responders.py: {error}")
    import json

    import torch
    torch.set_num_threads(1)
    found = {name: describe([record for record, _ in made(0, 1000, recipes.Recipe(), tie, penalty)])
             for name, (tie, penalty) in conditions().items()}
    data.atomic_write(FOUND, json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found)))


def table(found):
    """ties.json as Markdown."""
    lines = ["| | the chosen is truer, % | it is longer, % | by words | invented: chosen, rejected | "
             "Cover: chosen, rejected |", "|" + "---|" * 6]
    for name, row in found.items():
        chosen, rejected = (f"{row['invented'][role]:.2f}" for role in ("chosen", "rejected"))
        cover = ", ".join(f"{row[role]['cover']:.1f}" for role in ("chosen", "rejected"))
        lines.append(f"| {name} | {row['truer']:.1f} | {row['longer']:.1f} | {row['words longer']:+.1f} | "
                     f"{chosen}, {rejected} | {cover} |")
    return lines


if __name__ == "__main__":
    main()
