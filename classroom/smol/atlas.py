"""The drawings of the second world: one file of 64-pixel cells, for each thing one in every style.

    npm pack @lobehub/fluent-emoji-3d@1.1.0      Microsoft's Fluent, MIT
    npm pack emoji-datasource-google@16.0.0      Google's Noto, Apache-2.0
    npm pack emoji-datasource-twitter@16.0.0     Twemoji, CC-BY 4.0
    npm pack emojione@2.2.7                      EmojiOne, CC-BY 4.0
    tar xzf FILE.tgz -C FOLDER                   each into a folder of its own
    python classroom/smol/atlas.py --fluent A --noto B --twemoji C --emojione D

That writes atlas.webp and atlas.json beside this file, which are shipped: nobody needs the packages to use
them. The same Unicode code point is the same thing in every style; EmojiOne is older and lacks some.
NOTICES.md says whose drawings they are.

Twemoji is held out: nothing is taught, calibrated or chosen on it, and the printed table shows nothing else.
"""

import json
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

# isort: split
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from classroom.smol import things  # noqa: E402

HERE = Path(__file__).resolve().parent
CELL, COLUMNS = 64, 34
STYLES = {"fluent": "package/assets", "noto": "package/img/google/64",
          "twemoji": "package/img/twitter/64", "emojione": "package/assets/png"}
TAUGHT, HELD_OUT = ("fluent", "noto", "emojione"), ("twemoji",)


# ---- making it ----
def drawing(folder, code):
    """The file of a code point in an unpacked package, or None: styles differ in a variation selector."""
    for name in (f"{code}-fe0f", code):
        for ending in ("webp", "png"):
            if (file := folder / f"{name}.{ending}").is_file():
                return file
    return None


def cell(file):
    """A drawing without its margin, its longer side CELL pixels, at the top left of a transparent cell."""
    image = Image.open(file).convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 24)).getbbox())
    scale = CELL / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    premultiplied = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    out = Image.new("RGBA", (CELL, CELL))
    out.paste(premultiplied, (0, 0))
    return out


def make(folders, out):
    """folders: {style: an unpacked package}. Raises UserError for one that lacks a drawing it should have."""
    codes = [thing.code for thing in things.THINGS.values()]
    places, cells = {}, []
    for style, inside in STYLES.items():
        for code in codes:
            file = drawing(Path(folders[style]) / inside, code)
            if file is None and style != "emojione":
                raise data.UserError(f"{folders[style]} has no {inside}/{code}: unpack the package there")
            if file and (style, code) not in things.UNFIT:
                places[f"{style} {code}"] = len(cells)
                cells.append(cell(file))
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for place, image in enumerate(cells):
        sheet.paste(image, (place % COLUMNS * CELL, place // COLUMNS * CELL))
    sheet.save(out / "atlas.webp", lossless=True, quality=90, method=4)
    (out / "atlas.json").write_text(json.dumps(places, indent=0) + "\n")
    return len(cells)


# ---- reading it ----
@cache
def _sheet():
    """(the sheet as uint8 (H, W, 4), {"style code": place})."""
    return np.asarray(Image.open(HERE / "atlas.webp").convert("RGBA")), json.loads(
        (HERE / "atlas.json").read_text())


def has(style, name):
    """Whether a style draws a thing."""
    return f"{style} {things.THINGS[name].code}" in _sheet()[1]


def picture(style, name):
    """A thing's drawing without margin: uint8 (height, width, 4), the longer side CELL."""
    sheet, places = _sheet()
    row, column = divmod(places[f"{style} {things.THINGS[name].code}"], COLUMNS)
    part = sheet[row * CELL:(row + 1) * CELL, column * CELL:(column + 1) * CELL]
    there = part[..., 3] > 0
    return part[:there.any(1).nonzero()[0][-1] + 1, :there.any(0).nonzero()[0][-1] + 1]


def tinted(pixels, colour):
    """A drawing in another colour: the hue of its saturated pixels near the prevailing one is replaced."""
    hue, saturation, value = (channel.astype(np.float32) for channel in _hsv(pixels[..., :3]))
    weight = (saturation > 80) * (value > 60) * (pixels[..., 3] > 128)
    counts = np.bincount((hue[weight] // 8).astype(int), minlength=32)
    smooth = counts + np.roll(counts, 1) + np.roll(counts, -1)
    main = 8 * int(smooth.argmax()) + 4
    near = np.abs((hue - main + 128) % 256 - 128) < 24
    chosen = near & (saturation > 50)
    to = things.TINTS[colour] * 256 / 360
    shift = (hue - main + 128) % 256 - 128            # a quarter of the drawing's own play of hues stays
    hue = np.where(chosen, (to + shift / 4) % 256, hue)
    saturation = np.where(chosen, np.clip(saturation * 1.15, 130, 255), saturation)
    floor = {"yellow": 150, "red": 60}.get(colour, 80)        # dark yellow is brown, dark red is not
    value = np.where(chosen, floor + value * (255 - floor) / 255, value)
    bands = [Image.fromarray(band.clip(0, 255).astype(np.uint8)) for band in (hue, saturation, value)]
    rgb = np.asarray(Image.merge("HSV", bands).convert("RGB"))
    return np.concatenate([rgb, pixels[..., 3:]], -1)


def _hsv(rgb):
    return np.moveaxis(np.asarray(Image.fromarray(np.ascontiguousarray(rgb)).convert("HSV")), -1, 0)


@cache
def _coloured(style, name, colour):
    """A thing's drawing as an image with premultiplied colours, in a colour of TINTS or its own ("")."""
    pixels = picture(style, name)
    if colour:
        pixels = tinted(pixels, colour)
    return Image.fromarray(np.ascontiguousarray(pixels), "RGBA").convert("RGBa")


def sprite(style, name, colour, size, angle, mirrored):
    """A thing as it is pasted: float32 (h, w, 4), colour premultiplied by its alpha, its longer side `size`
    pixels before it is turned by `angle` degrees."""
    image = _coloured(style, name, colour)
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        bands = [band.rotate(angle, Image.Resampling.BICUBIC, expand=True) for band in image.split()]
        image = Image.merge("RGBa", bands)
    out = np.asarray(image, np.float32).copy()
    out[..., 3] /= 255
    return out


def main():
    parser = data.Parser(prog="atlas.py", description=__doc__)
    for style in STYLES:
        parser.add_argument(f"--{style}", required=True, help="the folder of its unpacked package")
    parser.add_argument("--out", type=Path, default=HERE, help="a folder (default: this one)")
    o = parser.parse_args()
    try:
        number = make(vars(o), o.out)
    except data.UserError as e:
        parser.error(str(e))
    size = (o.out / "atlas.webp").stat().st_size
    print(f"{number} drawings of {len(things.TYPES)} things in {len(STYLES)} styles, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
