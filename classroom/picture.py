"""README's picture: one scene of a finished run, with its caption before and after training.

    python train_dpo.py --out runs/main
    python classroom/picture.py runs/main docs/before-after.png

The scene is the first whose caption named one object that is not there, and
afterwards names exactly what is.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

# isort: split
from PIL import Image, ImageDraw, ImageFont  # noqa: E402

from classroom import world  # noqa: E402

WIDTH, MARGIN, SCENE = 1080, 28, 320                # pixels; a scene of 80 is shown four times as large
SPACE, LINE = 9, 46                                 # between words, from line to line
INK, GREY, PAPER, EDGE = (32, 36, 42), (105, 112, 122), (255, 255, 255), (208, 212, 218)
WRONG, PINK = (190, 24, 40), (253, 222, 224)


def answers(file):
    """{id: line} of a run's captions."""
    lines = data.read_jsonl(file)
    return {line["id"]: line for line in lines if line.get("kind") == "caption"}


def example(run):
    """(the scene's picture, its caption before, its caption after, the invented object). Raises UserError."""
    captions = answers(run / "after.jsonl")
    for id, line in answers(run / "before.jsonl").items():
        before, after = line["answer"], captions[id]["answer"]
        present = sorted(line["truth"]["present"])
        named = sorted(world.mentions(before))
        invented = [word for word in named if word not in present]
        right = sorted(world.mentions(after)) == present
        if right and len(invented) == 1 and named == sorted(present + invented):
            return Image.open(run / "scenes" / line["image"]), before, after, invented[0]
    raise data.UserError(f"{run}: no caption lost an invented object; choose a run that was trained longer")


def font(size):
    return ImageFont.load_default(size)                     # Pillow's own: the same on every machine


def write(canvas, x, y, text, marked=""):
    """A caption, one line for each sentence, with one word marked. Returns the y below it."""
    for sentence in text.removesuffix(" .").split(" . "):
        right = x - SPACE                                   # where the last word ended
        for word in [*sentence.split(), "."]:
            left = right if word in ",." else right + SPACE
            right = left + canvas.textlength(word, font(30))
            if word == marked:
                canvas.rounded_rectangle((left - 5, y - 2, right + 5, y + 38), 6, PINK, WRONG, 2)
                canvas.text((left, y), word, WRONG, font(30))
                right += 7
            else:
                canvas.text((left, y), word, INK, font(30))
        y += LINE
    return y


def draw(image, before, after, invented):
    """The page: the scene on the left, both captions beside it."""
    page = Image.new("RGB", (WIDTH, SCENE + 2 * MARGIN), PAPER)
    canvas = ImageDraw.Draw(page)
    canvas.rounded_rectangle((0, 0, WIDTH - 1, page.height - 1), 12, outline=EDGE, width=2)
    scene = image.convert("RGB").resize((SCENE, SCENE), Image.Resampling.NEAREST)
    page.paste(scene, (MARGIN, MARGIN))
    x = SCENE + 2 * MARGIN + 14
    canvas.text((x, 40), "Before training", GREY, font(22))
    below = write(canvas, x, 72, before, invented)
    canvas.text((x, below), f"There is no {invented}.", WRONG, font(22))
    canvas.text((x, 220), "After training", GREY, font(22))
    write(canvas, x, 252, after)
    return page


def main():
    parser = data.Parser(prog="picture.py", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run of the built-in world")
    parser.add_argument("out", type=Path, help="the picture, a PNG file")
    o = parser.parse_args()
    try:
        draw(*example(o.run)).quantize(128).save(o.out, optimize=True)
    except data.UserError as error:
        sys.exit(f"picture.py: {error}")


if __name__ == "__main__":
    main()
