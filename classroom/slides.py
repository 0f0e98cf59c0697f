"""The pictures of the course, for slides: a few KB each.

    python classroom/slides.py --out slides
            a pair, its rejected images, the loss
    python classroom/slides.py runs/mdpo runs/dpo --out slides
            and what these runs did

pair.png      a scene with its two captions, the invented word marked
rejected.png  what each --image_rejected makes of that scene
loss.svg      the loss on one pair, as its margin grows
rewards.svg   of the runs: where the rewards of chosen and rejected answers go
look.svg      of the runs: the margin with the true picture, and with others
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from classroom import chart, pairs, picture, world  # noqa: E402

SEED, SCENE, MARGIN = 0, 240, 24                    # the pairs' seed; pixels
IMAGES = {"true": "its own picture", "same_theme": "another, same theme", "other": "another theme",
          "blank": "a blank one"}                   # of training/look.py


def first_pair():
    """The first pair of captions whose chosen one is true and whose rejected one invents one single thing.
    -> (its record, its picture, another's picture, the invented word)"""
    made = pairs.made(SEED, 100, pairs.Recipe())
    for (record, scene), (_, other) in zip(made, made[1:], strict=False):
        false = [word for word in world.mentions(record["rejected"]) if word not in scene.counts]
        true = all(word in scene.counts for word in world.mentions(record["chosen"]))
        if record["meta"]["kind"] == "caption" and true and len(false) == 1:
            shown, another = (data.Image.fromarray(world.draw(s)) for s in (scene, other))
            return record, shown, another, false[0]
    raise AssertionError("the built-in pairs have such a pair")


def enlarged(image, side):
    return image.convert("RGB").resize((side, side), data.Image.Resampling.NEAREST)


def paper(width, height):
    from PIL import ImageDraw
    page = data.Image.new("RGB", (width, height), picture.PAPER)
    canvas = ImageDraw.Draw(page)
    canvas.rounded_rectangle((0, 0, width - 1, height - 1), 12, outline=picture.EDGE, width=2)
    return page, canvas


def draw_pair(record, image, invented):
    page, canvas = paper(1080, 344)
    page.paste(enlarged(image, SCENE), (MARGIN, MARGIN))
    x = SCENE + 2 * MARGIN
    canvas.text((x, MARGIN), "Chosen", picture.GREY, picture.font(20))
    below = picture.write(canvas, x, MARGIN + 24, record["chosen"])
    canvas.text((x, below + 4), f"Rejected: there is no {invented}", picture.WRONG, picture.font(20))
    picture.write(canvas, x, below + 28, record["rejected"], invented)
    return page


def draw_rejected(record, image, another):
    """The picture itself, then every rejected image there is, five in a row."""
    side, row = 120, 154
    made = {"the picture": image}
    for name, function in data.REJECTED.items():
        made[name] = function(record, image, lambda: another, data.rng_of(name, SEED, record["id"]))
    page, canvas = paper(5 * (side + MARGIN) + MARGIN, 2 * row + MARGIN)
    for k, (name, found) in enumerate(made.items()):
        x, y = MARGIN + k % 5 * (side + MARGIN), MARGIN + k // 5 * row
        page.paste(enlarged(found, side), (x, y))
        canvas.text((x, y + side + 3), name, picture.INK, picture.font(18))
    return page


def draw_loss():
    import math
    xs = [k / 10 for k in range(-40, 61)]
    dpo = [(x, math.log1p(math.exp(-x))) for x in xs]
    hinge = [(x, max(0, 1 - x)) for x in xs]
    notes = [(0, math.log(2), "0.693 before training"), (2.5, math.log1p(math.exp(-2.5)), "more still pays")]
    return chart.lines("The loss on one pair", "margin: reward of the chosen minus of the rejected answer",
                       {"DPO, −log sigmoid(margin)": dpo, "hinge, max(0, 1 − margin)": hinge}, notes)


def draw_rewards(runs):
    series = {}
    for run in runs:
        steps = [line for line in data.read_jsonl(run / "log.jsonl") if "rewards/rejected" in line]
        for role in ("chosen", "rejected"):
            values = [(line["step"], line[f"rewards/{role}"]) for line in steps]
            series[f"{run.name}, {role}"] = smooth(values)
    return chart.lines("Where the rewards go", "step", series)


def smooth(values, width=9):
    """Means over a few neighbouring steps."""
    out = []
    for k in range(0, len(values), width):
        some = values[k:k + width]
        out.append(tuple(sum(side) / len(some) for side in zip(*some, strict=True)))
    return out


def draw_look(runs):
    """Raises UserError for a run without its look."""
    bars = {}
    for run in runs:
        look = data.read_json(run / "summary.json")["after"].get("look")
        if not look:
            raise data.UserError(f"{run}: this run did not measure whether the model looks (--set look=0)")
        bars[run.name] = {IMAGES[key]: look["margin"][key] for key in IMAGES if key in look["margin"]}
    return chart.bars("Does it look? The margin on new pairs, by the picture shown", bars)


def main():
    parser = data.Parser(prog="slides.py", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs of the built-in world")
    parser.add_argument("--out", type=Path, required=True, help="the folder that gets the pictures")
    o = parser.parse_args()
    record, image, another, invented = first_pair()
    try:
        drawn = {"loss": draw_loss()}
        if o.runs:
            drawn |= {"rewards": draw_rewards(o.runs), "look": draw_look(o.runs)}
        o.out.mkdir(parents=True, exist_ok=True)
        for name, svg in drawn.items():
            data.atomic_write(o.out / f"{name}.svg", svg)
    except data.UserError as error:
        sys.exit(f"slides.py: {error}")
    for name, page in (("pair", draw_pair(record, image, invented)),
                       ("rejected", draw_rejected(record, image, another))):
        page.quantize(32).save(o.out / f"{name}.png", optimize=True)
    print("\n".join(str(file) for file in sorted(o.out.iterdir()) if file.suffix in (".png", ".svg")))


if __name__ == "__main__":
    main()
