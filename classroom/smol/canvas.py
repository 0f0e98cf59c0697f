"""The canvas of a background: colours that vary a little, and strokes that more than one setting needs.

    canvas = Canvas(rng, line, sky, ground)
    canvas.band(line, BIG, near(rng, "#82b05a"))
    canvas.image                                          BIG x BIG pixels, RGB

`line` is the row of pixels where the floor begins, `sky` and `ground` are the colours of a gradient, the top
one first. A point is (x, y); a colour is "#rrggbb" or three numbers.
"""
if __name__ == "__main__":
    exit("A part of classroom/pairs.py; run: python classroom/pairs.py --help")

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

BIG = 448


# ---- colours ----
def rgb(colour):
    """A colour as three numbers."""
    if isinstance(colour, str):
        return ImageColor.getrgb(colour)
    return colour


def bounded(value):
    """A number as a colour can have it."""
    return max(0, min(255, value))


def shade(colour, by):
    """A colour as numbers, lighter by so much or darker."""
    return tuple(bounded(c + by) for c in rgb(colour))


def near(rng, colour, by=10):
    """A colour a little lighter or darker, a little warmer or colder."""
    shift = rng.uniform(-by, by)
    found = []
    for c in rgb(colour):
        own = rng.uniform(-by / 3, by / 3)
        c += shift + own
        found.append(int(bounded(c)))
    return tuple(found)


def near_one_of(rng, *colours, by=10):
    """One of some colours, varied."""
    colour = rng.choice(colours)
    return near(rng, colour, by)


def gradient(rng, top, bottom, height):
    """An image of BIG x `height` pixels that goes from one colour to the other, both varied."""
    top = np.array(near(rng, top))
    bottom = np.array(near(rng, bottom))
    share = np.linspace(0, 1, height)
    share = share[:, None, None]
    column = top + (bottom - top) * share                                            # (height, 1, 3)
    image = Image.fromarray(column.astype(np.uint8))
    return image.resize((BIG, height))


# ---- where ----
def anywhere(rng):
    """A random place between the left and the right."""
    return rng.uniform(0, BIG)


def spots(rng, number, top, bottom, least, most):
    """Random spots between two rows, one after the other: x, y and a radius from `least` to `most`."""
    for _ in range(number):
        x = anywhere(rng)
        y = rng.uniform(top, bottom)
        radius = rng.uniform(least, most)
        yield x, y, radius


def mask():
    """An empty layer of a canvas, and the pen that draws on it how much of a colour is let through."""
    layer = Image.new("L", (BIG, BIG))
    return layer, ImageDraw.Draw(layer)


class Canvas:
    """A picture with an upper and a lower gradient, and the pen that draws on it."""

    def __init__(self, rng, line, above, below):
        """`above` and `below` the row `line`: the colour at the top and the one at the bottom."""
        self.rng = rng
        self.line = line
        self.image = Image.new("RGB", (BIG, BIG))
        upper = gradient(rng, *above, line)
        self.image.paste(upper, (0, 0))
        lower = gradient(rng, *below, BIG - line)
        self.image.paste(lower, (0, line))
        self.pen = ImageDraw.Draw(self.image)

    def box(self, start, end, fill, **outline):
        """A rectangle between two corners."""
        self.pen.rectangle([start, end], fill=fill, **outline)

    def band(self, top, bottom, fill):
        """A rectangle from the left of the picture to its right."""
        self.box((0, top), (BIG, bottom), fill)

    def stroke(self, start, end, fill, width):
        """A straight line between two points."""
        self.pen.line([start, end], fill=fill, width=width)

    def upright(self, x, top, bottom, fill, width):
        """A vertical line."""
        head = x, top
        foot = x, bottom
        self.stroke(head, foot, fill, width)

    def level(self, y, fill, width, left=0, right=BIG):
        """A horizontal line."""
        start = left, y
        end = right, y
        self.stroke(start, end, fill, width)

    def oval(self, start, end, fill=None, **outline):
        """An ellipse inside the rectangle between two corners."""
        self.pen.ellipse([start, end], fill=fill, **outline)

    def disc(self, x, y, radius, fill=None, flat=1, **outline):
        """A disc around a point; `flat` is its height as a share of its width."""
        high = radius * flat
        start = x - radius, y - high
        end = x + radius, y + high
        self.oval(start, end, fill, **outline)

    def stipple(self, top, bottom, colour, number):
        """Dots between two rows."""
        found = spots(self.rng, number, top, bottom, least=1, most=2.4)
        for x, y, radius in found:
            fill = near(self.rng, colour, by=12)
            self.disc(x, y, radius, fill)

    def haze(self, layer, colour, blur):
        """Lay a colour over the picture where a mask lets it through, blurred by so many pixels."""
        soft = layer.filter(ImageFilter.GaussianBlur(blur))
        self.image.paste(colour, (0, 0), soft)

    def window(self, left, top, width, height, sky="#bcdcf0"):
        """A window of four panes."""
        frame = near(self.rng, "#f4f0e8", by=5)
        glass = near(self.rng, sky)
        right = left + width
        bottom = top + height
        start = left, top
        end = right, bottom
        self.box(start, end, glass, outline=frame, width=8)
        middle = left + width / 2
        self.upright(middle, top, bottom, frame, width=5)
        middle = top + height / 2
        self.level(middle, frame, width=5, left=left, right=right)
