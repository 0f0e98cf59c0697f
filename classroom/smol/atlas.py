"""The drawings of the second world: one file of 64-pixel cells, for each thing one in every style.

    npm pack @lobehub/fluent-emoji-3d@1.1.0      Microsoft's Fluent, MIT
    npm pack @lobehub/fluent-emoji-flat@1.1.0    the same, flat
    npm pack emoji-datasource-google@16.0.0      Google's Noto, Apache-2.0
    npm pack emoji-datasource-google@3.0.0       Noto as it was in 2017
    npm pack emoji-datasource-twitter@16.0.0     Twemoji, CC-BY 4.0
    npm pack emojione@2.2.7                      EmojiOne, CC-BY 4.0
    tar xzf FILE.tgz -C FOLDER                   each into a folder of its own
    pip install resvg-py                         which draws the flat ones
    python classroom/smol/atlas.py --fluent A --flat B --noto C --noto2017 D \\
        --twemoji E --emojione F

That writes atlas.webp and atlas.json beside this file, which are shipped: nobody needs the packages to use
them. The same Unicode code point is the same thing in every style; EmojiOne and Noto of 2017 lack some.
NOTICES.md says whose drawings they are.

Twemoji is held out: nothing is taught, calibrated or chosen on it, and the printed table shows nothing else.
"""

import io
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
STYLES = {"fluent": "package/assets", "flat": "package/assets", "noto": "package/img/google/64",
          "noto2017": "package/img/google/64", "twemoji": "package/img/twitter/64",
          "emojione": "package/assets/png"}
TAUGHT, HELD_OUT = ("fluent", "flat", "noto", "noto2017", "emojione"), ("twemoji",)
OLDER = ("noto2017", "emojione")                    # than some things' code points


# ---- making it ----
def drawing(folder, code):
    """The file of a code point in an unpacked package, or None: styles differ in a variation selector."""
    for name in (f"{code}-fe0f", code):
        for ending in ("webp", "png", "svg"):
            file = folder / f"{name}.{ending}"
            if file.is_file():
                return file
    return None


def cell(file):
    """A drawing without its margin, its longer side CELL pixels, at the top left of a transparent cell."""
    image = opened(file)
    solid = image.getchannel("A").point(lambda a: 255 * (a > 24))
    image = image.crop(solid.getbbox())
    premultiplied = image.convert("RGBa")
    small = scaled(premultiplied, CELL).convert("RGBA")
    out = Image.new("RGBA", (CELL, CELL))
    out.paste(small, (0, 0))
    return out


def opened(file):
    """A drawing as an RGBA image; SVG is drawn 256 pixels wide. Raises UserError if nothing can draw it."""
    if file.suffix != ".svg":
        return Image.open(file).convert("RGBA")
    try:
        import resvg_py
    except ImportError as error:
        raise data.UserError(f"{file} needs resvg-py: pip install resvg-py") from error
    drawn = resvg_py.svg_to_bytes(svg_string=file.read_text(), width=256)
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


def scaled(image, longer):
    """An image whose longer side is so many pixels."""
    scale = longer / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


def make(folders, out):
    """folders: {style: an unpacked package}. Raises UserError for one that lacks a drawing it should have."""
    places, cells = {}, []
    for style, inside in STYLES.items():
        folder = Path(folders[style]) / inside
        for thing in things.THINGS.values():
            file = drawing(folder, thing.code)
            if file is None and style not in OLDER:
                raise data.UserError(f"{folders[style]} has no {inside}/{thing.code}: "
                                     "unpack the package there")
            if file and (style, thing.code) not in things.UNFIT:
                places[f"{style} {thing.code}"] = len(cells)
                cells.append(cell(file))
    sheet = joined(cells)
    sheet.save(out / "atlas.webp", lossless=True, quality=90, method=4)
    text = json.dumps(places, indent=0)
    (out / "atlas.json").write_text(text + "\n")
    return len(cells)


def joined(cells):
    """The cells as one image, COLUMNS in a row."""
    rows = -(-len(cells) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for place, image in enumerate(cells):
        row, column = divmod(place, COLUMNS)
        sheet.paste(image, (column * CELL, row * CELL))
    return sheet


# ---- reading it ----
@cache
def _sheet():
    """(the sheet as uint8 (H, W, 4), {"style code": place})."""
    image = Image.open(HERE / "atlas.webp").convert("RGBA")
    text = (HERE / "atlas.json").read_text()
    return np.asarray(image), json.loads(text)


def has(style, name):
    """Whether a style draws a thing."""
    _, places = _sheet()
    return f"{style} {things.THINGS[name].code}" in places


def picture(style, name):
    """A thing's drawing without margin: uint8 (height, width, 4), the longer side CELL."""
    sheet, places = _sheet()
    place = places[f"{style} {things.THINGS[name].code}"]
    row, column = divmod(place, COLUMNS)
    top, left = row * CELL, column * CELL
    part = sheet[top:top + CELL, left:left + CELL]
    there = part[..., 3] > 0
    rows, = there.any(1).nonzero()
    columns, = there.any(0).nonzero()
    return part[:rows[-1] + 1, :columns[-1] + 1]


def tinted(pixels, colour):
    """A drawing in another colour: the hue of its saturated pixels near the prevailing one is replaced."""
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    hue, saturation, value = _hsv(rgb).astype(np.float32)
    strong = (saturation > 80) & (value > 60) & (alpha[..., 0] > 128)
    main = prevailing(hue[strong])
    shift = (hue - main + 128) % 256 - 128                    # the way round the circle of hues
    chosen = (np.abs(shift) < 24) & (saturation > 50)
    to = things.TINTS[colour] * 256 / 360
    new_hue = (to + shift / 4) % 256                          # a quarter of the drawing's own play stays
    new_saturation = np.clip(saturation * 1.15, 130, 255)
    floor = {"yellow": 150, "red": 60}.get(colour, 80)        # dark yellow is brown, dark red is not
    new_value = floor + value * (255 - floor) / 255
    hue = np.where(chosen, new_hue, hue)
    saturation = np.where(chosen, new_saturation, saturation)
    value = np.where(chosen, new_value, value)
    rgb = _rgb(hue, saturation, value)
    return np.concatenate([rgb, alpha], -1)


def prevailing(hues):
    """The middle of the eight hues of 256 that, with those beside them, are there most often."""
    eighths = (hues // 8).astype(int)
    counts = np.bincount(eighths, minlength=32)
    smooth = counts + np.roll(counts, 1) + np.roll(counts, -1)
    return 8 * int(smooth.argmax()) + 4


def _hsv(rgb):
    """uint8 (H, W, 3) -> hue, saturation and value, uint8 (3, H, W)."""
    image = Image.fromarray(np.ascontiguousarray(rgb))
    channels = np.asarray(image.convert("HSV"))
    return np.moveaxis(channels, -1, 0)


def _rgb(*channels):
    """Hue, saturation and value, float32 (H, W) each -> uint8 (H, W, 3)."""
    bands = []
    for channel in channels:
        whole = channel.clip(0, 255).astype(np.uint8)
        bands.append(Image.fromarray(whole))
    image = Image.merge("HSV", bands)
    return np.asarray(image.convert("RGB"))


@cache
def _coloured(style, name, colour):
    """A thing's drawing as an image with premultiplied colours, in a colour of TINTS or its own ("")."""
    pixels = picture(style, name)
    if colour:
        pixels = tinted(pixels, colour)
    pixels = np.ascontiguousarray(pixels)
    return Image.fromarray(pixels, "RGBA").convert("RGBa")


def sprite(style, name, colour, size, angle, mirrored):
    """A thing as it is pasted: float32 (h, w, 4), colour premultiplied by its alpha, its longer side `size`
    pixels before it is turned by `angle` degrees."""
    image = _coloured(style, name, colour)
    image = scaled(image, size)
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if angle:
        smooth = Image.Resampling.BICUBIC
        bands = [band.rotate(angle, smooth, expand=True) for band in image.split()]
        image = Image.merge("RGBa", bands)
    out = np.array(image, np.float32)
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
