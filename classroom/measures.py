"""What a classroom's model is like, in numbers: for its classroom.json, and for statistics.json, by which the
bases and the pairs were calibrated.
"""
if __name__ == "__main__":
    exit("A part of classroom/make.py; run: python classroom/make.py --help")

import json
from pathlib import Path

import data
from classroom import pairs, world
from evaluation import metrics
from model import generation, vlm

ROOT = Path(__file__).resolve().parents[1]          # the repository


def statistics(folder, split, n, seed=0, own=world):
    """The stored model's measures on n scenes and 2n questions of a split, greedily answered.

    A kind's prior is the score of its most frequent answer; for relations and false premises a coin: a
    relation's question offers two words, and false premises are asked as often as colours, in the same words.
    own: the world, by its module.
    """
    from PIL import Image
    lines, scenes = pairs.exam(seed, n, 2 * n, split, own)
    pictures = {name: Image.fromarray(own.draw(s)) for name, s in scenes.items()}
    answers = generation.generate(vlm.load(folder), [[pictures[line["image"]]] for line in lines],
                           [line["question"] for line in lines])
    lines = [line | {"answer": answer} for line, answer in zip(lines, answers, strict=True)]
    table = metrics.classroom(lines, resamples=200)
    for kind, row in table["by_kind"].items():
        truths = [line["truth"]["answer"] for line in lines if line["kind"] == kind]
        usual = max(map(truths.count, set(truths))) / len(truths)
        row["prior"] = 100 * (.5 if kind in ("relation", "false_premise") else usual)
    captions = [line for line in lines if line["kind"] == "caption"]
    said = [(own.mentions(line["answer"]), line["truth"]["absent"]) for line in captions]
    last = [i == len(words) - 1 for words, absent in said for i, word in enumerate(words) if word in absent]
    table["last"] = 100 * sum(last) / max(1, len(last))  # of the hallucinated words, those that end the list
    table["words"] = sum(len(line["answer"].split()) for line in captions) / n
    table = json.loads(json.dumps(table), parse_float=lambda text: round(float(text), 2))
    return table | {"split": split, "scenes": n, "scene_seed": seed}


def measure(file):
    """Every shipped base on both splits, and the pairs of the default recipe and of the base itself."""
    shipped = [folder for folder in sorted((ROOT / "classroom" / "models").iterdir())
               if data.read_json(folder / "classroom.json")["world"] == world.VERSION]
    table = {"world": world.VERSION, "bases": {}}
    for folder in shipped:
        table["bases"][folder.name] = {split: statistics(folder, split, 1000) for split in ("tune", "print")}
    recipe = pairs.Recipe()
    made = {f"seed {seed}": pairs.made(seed, 1000, recipe) for seed in range(3)}
    made |= {f"on policy of {f.name}": pairs.on_policy(0, 1000, recipe, f) for f in shipped}
    table["pairs"] = {name: pairs.describe([r for r, _ in both]) for name, both in made.items()}
    file.write_text(json.dumps(table, indent=1) + "\n")
