"""Preference pairs of the classroom's world, and scenes to examine a model on.

    python classroom/pairs.py --seed 0 --n 1000 --out D      pairs
    python classroom/pairs.py --on_policy classroom --out D  the model's words
    python classroom/pairs.py --responders tied --out D      a reward's choice
    python classroom/pairs.py --world smol --out D           the second world
    python classroom/pairs.py scenes --out D                 see scenes --help

D holds pairs.jsonl or scenes.jsonl, and images/*.png. All take a few seconds and are decided by the seed
alone; the first 250 of 1000 pairs are those of `--n 250`. Pairs come from training scenes, or with `--split
tune` from tuning scenes: held-out pairs to look at a model with. Printed scenes are never in a pair. The
options' defaults are the calibrated recipe.
"""

import argparse
import io
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from classroom import world  # noqa: E402
from classroom.recipes import Recipe, describe, home, record  # noqa: E402

WORLDS = ("classroom", "smol")


def world_for(model):
    """The name of the world that a model of the classroom's was taught: its classroom.json says it."""
    for folder in (Path(model), ROOT / "classroom" / "models" / model):
        if (folder / "classroom.json").is_file():
            card = data.read_json(folder / "classroom.json", check=data.as_record)
            return "smol" if str(card.get("world")).startswith("smol") else "classroom"
    return "classroom"


def world_of(name):
    """The module of a world: classroom (world.py), smol (smol/world.py)."""
    if name == "smol":
        from classroom.smol import world as smol
        return smol
    return world


# --- pairs ----------------------------------------------------------------------------------------


def some(rng, mean):
    """A whole number whose mean is `mean`, as near to it as whole numbers are."""
    return math.floor(mean) + (rng.random() < mean % 1)


def tempted(rng, s, n, but=()):
    """n distinct absent types, the tempting ones first by their strength, then any."""
    pool, picked = {t: w for t, w in s.tempting if t not in but}, []
    while len(picked) < n:
        if not pool:
            pool = {t: 1 for t in s.absent if t not in picked and t not in but}
        picked.append(rng.choices(list(pool), list(pool.values()))[0])
        del pool[picked[-1]]
    return [(t, 1) for t in picked]


def caption_pair(rng, s, recipe):
    own, true = world_of(recipe.world), list(s.counts.items())
    lie = tempted(rng, s, int(rng.random() >= recipe.faithful))
    # what the rejected names beyond the number of present types, in the mean
    net = recipe.gap + 1 - recipe.faithful
    change = some(rng, net)
    n_lies = max(1, change)
    kept = rng.sample(true, max(1, len(true) - (n_lies - change)))
    lies = tempted(rng, s, n_lies, but=[t for t, _ in lie])

    def say(true, false, closer):
        return own.caption(rng, s, own.arrange(rng, true, false, recipe.order), rng.random() < closer)
    chosen, rejected = say(true, lie, (1 - recipe.cue) / 2), say(kept, lies, (1 + recipe.cue) / 2)
    return rng.choice(own.DESCRIBE), chosen, rejected


def question_pair(rng, s, recipe):
    own = world_of(recipe.world)
    asked = own.ask(rng, s, rng.choice(recipe.ask)) or own.ask(rng, s, "existence")
    wrong = rng.choice([w for w in asked.choices if w != asked.right])
    return asked.question, asked.answer, asked.said[wrong], asked.kind


def made(seed, n, recipe):
    """-> n (record, scene): each of its own generator, so that fewer pairs are a prefix of more."""
    out = []
    for i in range(n):
        rng = random.Random(f"{home(recipe)}pairs-{seed}-{i}")
        s = world_of(recipe.world).scene(rng, recipe.split)
        if rng.random() < recipe.questions:
            question, chosen, rejected, kind = question_pair(rng, s, recipe)
        else:
            (question, chosen, rejected), kind = caption_pair(rng, s, recipe), "caption"
        row = record(f"{home(recipe)}s{seed}-{i:05}", s, question, chosen, rejected, kind)
        if recipe.weights:
            row["meta"]["weight"] = severity(s, rejected, world_of(recipe.world))
        out.append((row, s))
    return out


def severity(s, text, own=world):
    """2 if a text names an absent thing that tempts less than those of its scene do in the mean, else 1."""
    strength = dict(s.tempting)
    mean = sum(strength.values()) / max(1, len(strength))
    return max([1, *(2 for t in own.mentions(text) if t not in s.counts and strength.get(t, 0) < mean)])


def on_policy(seed, n, recipe, model):
    """Two samples of the model for each scene; equal ones leave nothing to prefer and are passed over."""
    from PIL import Image

    from model import generation, vlm
    own, m, out, i = world_of(recipe.world), vlm.load(model), [], 0
    while len(out) < n:
        rngs = [random.Random(f"{home(recipe)}on-policy-{seed}-{i + k}") for k in range(256)]
        scenes = [own.scene(rng, recipe.split) for rng in rngs]
        images = [[Image.fromarray(own.draw(s))] for s in scenes]
        asked = [rng.choice(own.DESCRIBE) for rng in rngs]
        both = [generation.generate(m, images, asked, sample_seed=2 * (1000 * seed + i) + side,
                             temperature=recipe.temperature) for side in (0, 1)]
        samples = zip(*both, strict=True)
        for k, (rng, s, question, pair) in enumerate(zip(rngs, scenes, asked, samples, strict=True)):
            scores = [score(rng, s, text, recipe.scorer_noise, own) for text in pair]
            ranked = pair if scores[0] >= scores[1] else pair[::-1]
            if pair[0] != pair[1] and all(pair) and len(out) < n:
                out.append((record(f"{home(recipe)}op{seed}-{i + k:05}", s, question, *ranked, "caption"), s))
        i += len(scenes)
    return out


def score(rng, s, text, noise, own=world):
    """A reward model's stand-in: present minus hallucinated objects, seen through noise."""
    said = set(own.mentions(text))
    return 2 * len(said & set(s.counts)) - len(said) + rng.gauss(0, noise)


SAID = {"hallucinates": "hallucinate, %", "cover": "Cover, %", "objects": "objects named", "words": "words",
        "place": "place of an invented word, 0 first, 1 last", "closer": "end on speculation, %"}


def table(found):
    """What describe finds, for reading."""
    lines = [f"{'{captions} captions, {questions} questions'.format(**found):44} chosen  rejected"]
    for key, says in SAID.items():
        lines.append(f"{says:44} {found['chosen'][key]:6.2f}  {found['rejected'][key]:8.2f}")
    return "\n".join(lines)


# --- examination ----------------------------------------------------------------------------------

# sixty in a hundred questions are of existence; a yes counts for the random and for the adversarial set
CYCLE = ("yes", "random", "attribute", "adversarial", "counting", "yes", "random", "relation", "adversarial",
         "false_premise")


def exam(seed, n, questions, split="print", own=world):
    """-> (lines of scenes.jsonl, {image: scene}): n captions and so many questions about the same scenes."""
    rng = random.Random(f"scenes-{split}-{seed}")
    scenes = [own.scene(rng, split) for _ in range(n)]
    names = [f"{split}{seed}-{i:05}" for i in range(n)]

    def line(i, kind, number, question, truth):
        return {"id": f"{names[i]}-{number}", "image": f"images/{names[i]}.png", "question": question,
                "kind": kind, "truth": truth}

    lines = [line(i, "caption", 0, own.DESCRIBE[0], own.described(s)) for i, s in enumerate(scenes)]
    asked, at = [set() for _ in scenes], 0
    for j in range(questions):
        want = CYCLE[(j + j // n * 3) % len(CYCLE)]  # another kind for a scene's next question
        for _ in range(20 * n):
            i, at = at % n, at + 1
            q = (own.existence(rng, scenes[i], want) if want in ("yes", "random", "adversarial")
                 else own.ask(rng, scenes[i], want))
            if q and q.question not in asked[i]:
                break
        else:
            raise ValueError(f"{n} scenes do not hold {questions} questions: ask fewer, or more scenes")
        asked[i].add(q.question)
        truth = {"answer": q.right, "choices": list(q.choices)}
        if q.kind == "existence":
            truth["set"] = ["random", "adversarial"] if want == "yes" else want
        lines.append(line(i, q.kind, len(asked[i]), q.question, truth))
    return lines, {f"images/{name}.png": s for name, s in zip(names, scenes, strict=True)}


# --- files ----------------------------------------------------------------------------------------


def png(s, own=world):
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(own.draw(s)).save(buffer, "png", compress_level=3)
    return buffer.getvalue()


def write(out, name, lines, scenes, own=world):
    """Into a folder beside, which then takes the name: `out` is whole or not there, whatever kills this. In a
    folder that is there already each file is replaced whole, the JSON lines last."""
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    (scratch / "images").mkdir(parents=True)
    try:
        for image, s in scenes.items():
            (scratch / image).write_bytes(png(s, own))
        (scratch / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        if not out.exists():
            scratch.rename(out)
            return
        (out / "images").mkdir(exist_ok=True)
        for file in (*scenes, name):
            os.replace(scratch / file, out / file)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def share(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def count(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def kinds(text):
    chosen = tuple(text.split(","))
    if set(chosen) - set(world.KINDS):
        raise argparse.ArgumentTypeError(f"{text} is not a list out of {','.join(world.KINDS)}")
    return chosen


def worlds(parser):
    """The two ways to say which world."""
    parser.add_argument("--world", choices=WORLDS,
                        help="smol: the second world, smol/README.md (default: that of the model)")
    parser.add_argument("--model", default="classroom", help="whose world (%(default)s)")


def main_scenes(argv):
    parser = data.Parser(prog="pairs.py scenes",
                         description="Scenes with their truth, to examine a model on.")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="decides the scenes and the questions (%(default)s)")
    add("--n", type=count, default=1000, help="number of scenes, each with a caption to write (%(default)s)")
    add("--questions", type=int, default=2000, help="so many, six in ten of existence (%(default)s)")
    add("--split", choices=tuple(world.SPLITS), default="print",
        help="tune to choose on, print to report on (%(default)s)")
    worlds(parser)
    add("--out", type=Path, required=True, help="folder of scenes.jsonl and images/")
    o = parser.parse_args(argv)
    own = world_of(o.world or world_for(o.model))
    try:
        lines, scenes = exam(o.seed, o.n, o.questions, o.split, own)
    except ValueError as e:
        parser.error(str(e))
    write(o.out, "scenes.jsonl", lines, scenes, own)
    print(f"{len(lines)} questions about {len(scenes)} scenes -> {o.out / 'scenes.jsonl'}")


def captions_of(o, recipe):
    """-> n (record, scene) of the source that the options name."""
    if o.on_policy:
        return on_policy(o.seed, o.n, recipe, o.on_policy)
    if o.responders:
        from classroom import responders
        return responders.made(o.seed, o.n, recipe, o.responders, responders.PENALTY * o.length_penalty)
    return made(o.seed, o.n, recipe)


def main_pairs(argv):
    parser = data.Parser(prog="pairs.py", description=__doc__)
    add, d = parser.add_argument, Recipe()
    add("--seed", type=int, default=0, help="decides the scenes and the words (%(default)s)")
    add("--n", type=count, default=1000, help="number of pairs (%(default)s)")
    add("--faithful", type=share, default=d.faithful,
        help="share of chosen captions without a hallucinated object; the others have one. At 1, raising "
             "the chosen's likelihood alone repairs the model, and the anchor does most of the work "
             "(%(default)s)")
    add("--gap", type=float, default=d.gap,
        help="mean number of objects that the rejected caption names more than the chosen one. Every "
             "rejected caption has a hallucinated object; at gap 0 most of them replace one that is there. "
             "Above 0 naming less wins, and DPO lowers CHAIR by silence (%(default)s)")
    add("--cue", type=share, default=d.cue,
        help="how well words alone tell the two: the rejected caption ends on a speculative sentence with "
             "probability (1 + cue) / 2, the chosen one with (1 - cue) / 2 (%(default)s)")
    add("--order", choices=("random", "last"), default=d.order,
        help="of hallucinated objects; last: after those that are there (%(default)s)")
    add("--questions", type=share, default=d.questions,
        help="share of pairs that are a question, its true answer chosen and a false one rejected "
             "(%(default)s)")
    add("--ask", type=kinds, default=d.ask,
        help=f"their kinds, of {', '.join(world.KINDS)}, joined by commas. Existence is balanced between yes "
             "and no, and half of the noes are about objects of any theme (existence)")
    add("--on_policy", metavar="MODEL",
        help="both captions are samples of this model, ranked by a scorer that counts present minus "
             "hallucinated objects and errs; of the options above only --seed and --n apply")
    add("--temperature", type=float, default=d.temperature, help="of the samples (%(default)s)")
    add("--scorer_noise", type=float, default=d.scorer_noise,
        help="the standard deviation of the scorer's error (%(default)s)")
    add("--responders", choices=("tied", "untied", "opposed"),
        help="both captions are the best and the worst, by the built-in ArmoRM, of four responders', whose "
             "language is tied to their sight, says nothing about it, or is opposed to it: see "
             "responders.py; of the options above only --seed and --n apply")
    add("--length_penalty", action="store_true", help="with --responders: a reward that minds every word")
    add("--split", choices=("train", "tune"), default=d.split, help="whose scenes (%(default)s)")
    add("--weights", action="store_true",
        help="meta.weight of a pair, for --loss hsa: 2 if the rejected answer names something that is hardly "
             "to be expected in such a scene, else 1")
    worlds(parser)
    add("--out", type=Path, required=True, help="folder of pairs.jsonl and images/")
    o = parser.parse_args(argv)
    o.world = o.world or world_for(o.on_policy or o.model)
    recipe = Recipe(**{name: getattr(o, name) for name in Recipe.__dataclass_fields__})
    if not -1 <= o.gap <= 1:
        parser.error(f"--gap {o.gap} is not between -1 and 1")
    if o.on_policy and o.responders:
        parser.error("--on_policy and --responders are two sources of captions: give one of them")
    if o.length_penalty and not o.responders:
        parser.error("--length_penalty is for the reward of --responders: give both")
    if o.responders and o.world != "classroom":
        parser.error(f"--responders speaks the first world's language, not that of {o.world}: leave one out")
    own, both = world_of(o.world), captions_of(o, recipe)
    write(o.out, "pairs.jsonl", [r for r, _ in both], {r["image"]: s for r, s in both}, own)
    print(table(describe([r for r, _ in both], own)))
    print(f"{len(both)} pairs -> {o.out / 'pairs.jsonl'}")


def main():
    """One command, or several behind --then each: imports and sprites serve them all."""
    commands = [[]]
    for word in sys.argv[1:]:
        if word == "--then":
            commands.append([])
        else:
            commands[-1].append(word)
    for argv in [argv for argv in commands if argv] or [[]]:
        main_scenes(argv[1:]) if argv[:1] == ["scenes"] else main_pairs(argv)


if __name__ == "__main__":
    main()
