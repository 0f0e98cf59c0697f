"""The backgrounds of the second world under an open sky, or under water: a function for each setting.

    image = outdoors.beach(random.Random(0), line=215)           BIG x BIG pixels, RGB

`line` is the row of pixels where the ground begins.
"""
if __name__ == "__main__":
    exit("A part of classroom/pairs.py; run: python classroom/pairs.py --help")

import math

from classroom.smol.canvas import BIG, Canvas, anywhere, gradient, mask, near, near_one_of, spots


# ---- what several places have ----
def hills(canvas, base, height, colour, number=4):
    """Rounded hills whose feet are at the row `base`."""
    rng = canvas.rng
    for _ in range(number):
        middle = anywhere(rng)
        half = rng.uniform(.22, .5) * BIG
        tall = height * rng.uniform(.5, 1)
        fill = near(rng, colour, by=8)
        start = middle - half, base - tall
        end = middle + half, base + tall
        canvas.oval(start, end, fill)


def clouds(canvas, low, number=3):
    """Soft white clouds above the row `low`."""
    rng = canvas.rng
    layer, pen = mask()
    for _ in range(number):
        x = anywhere(rng)
        y = rng.uniform(.05, .7) * low
        width = rng.uniform(50, 110)
        for _ in range(5):
            puff(pen, rng, x, y, width)
    canvas.haze(layer, "#ffffff", blur=6)


def puff(pen, rng, x, y, width):
    """One of the ovals of a cloud of `width` around a point."""
    x += rng.uniform(-.5, .5) * width
    y += rng.uniform(-.1, .1) * width
    radius = width * .22
    across, down = radius * 1.4, radius * .7
    thick = rng.randint(120, 190)
    pen.ellipse([x - across, y - down, x + across, y + down], fill=thick)


def tufts(canvas, top, colour, number):
    """Short strokes on the ground below the row `top`, larger towards the viewer."""
    rng = canvas.rng
    for _ in range(number):
        y = rng.uniform(top + 4, BIG)
        x = anywhere(rng)
        size = 4 + 10 * (y - top) / (BIG - top)
        for lean in (-.5, 0, .5):
            blade = near(rng, colour, by=12)
            start = x, y
            end = x + lean * size, y - size
            canvas.stroke(start, end, fill=blade, width=2)


# ---- streets and fields ----
def market(rng, line):
    """Stalls under a striped awning, and a wooden table."""
    sky = ("#d0e2f0", "#e2e6e2")
    ground = ("#be9e74", "#a07e58")
    canvas = Canvas(rng, line, sky, ground)
    stall = BIG / 4
    for i in range(4):
        left = i * stall + rng.uniform(-12, 12)
        right = left + stall - 18
        front = near(rng, "#cebca6", by=16)
        start = left, 90
        end = right, line
        canvas.box(start, end, fill=front)
    stripe = rng.choice(["#ce544c", "#548e6e", "#567ab0"])
    awning(canvas, stripe)
    for y in range(line, BIG, 58):
        beam = near(rng, "#806040", by=8)
        canvas.band(y, y + 6, fill=beam)
    for x in range(0, BIG, 75):
        foot = x + rng.randint(-4, 4)
        joint = near(rng, "#8c6a48", by=8)
        start = x, line
        end = foot, BIG
        canvas.stroke(start, end, fill=joint, width=4)
    return canvas.image


def awning(canvas, colour, width=38):
    """A striped roof of cloth along the top."""
    stripes = range(0, BIG, width)
    for i, left in enumerate(stripes):
        right = left + width
        stripe = colour if i % 2 else "#f6f2e8"
        start = left, 0
        end = right, 62
        canvas.box(start, end, fill=stripe)
        scallop = [left, 42, right, 82]
        canvas.pen.pieslice(scallop, 0, 180, fill=stripe)


def street(rng, line):
    """A row of houses, the pavement, the road's dashes."""
    sky = ("#a8cce8", "#d6e4ee")
    ground = ("#7e8086", "#686a70")
    canvas = Canvas(rng, line, sky, ground)
    clouds(canvas, line * .4, number=2)
    left = -20
    while left < BIG:
        width = rng.randint(70, 120)
        house(canvas, left, left + width)
        left += width + 2
    pavement = near(rng, "#bebcb8", by=6)
    canvas.band(line - 20, line + 6, fill=pavement)
    first = rng.randint(-60, 0)
    for x in range(first, BIG, 96):
        far = [(x, 350), (x + 54, 350)]
        close = [(x + 50, 358), (x - 6, 358)]
        canvas.pen.polygon(far + close, fill="#e0ded2")
    return canvas.image


def house(canvas, left, right):
    """A front with rows of windows."""
    rng, bottom = canvas.rng, canvas.line - 20
    top = rng.randint(30, 120)
    front = near_one_of(rng, "#c49a80", "#d2c4ac", "#a0a6b2", "#b88070")
    start = left, top
    end = right, bottom
    canvas.box(start, end, fill=front)
    for x in range(left + 12, right - 18, 28):
        for y in range(top + 14, bottom - 30, 34):
            glass = near(rng, "#dce0d2", by=18)
            start = x, y
            end = x + 14, y + 20
            canvas.box(start, end, fill=glass)


def farm(rng, line):
    """Hills, a barn and a fence in a meadow."""
    sky = ("#96c8ec", "#dcecf0")
    ground = ("#8cb860", "#6c9a48")
    canvas = Canvas(rng, line, sky, ground)
    clouds(canvas, line)
    hills(canvas, line, height=70, colour="#7eac64")
    meadow = near(rng, "#82b05a", by=8)
    canvas.band(line, BIG, fill=meadow)
    barn(canvas, rng.randint(20, 250))
    for y in (line + 16, line + 32):
        canvas.level(y, fill="#e2d8c4", width=5)
    first = rng.randint(0, 40)
    for x in range(first, BIG, 56):
        start = x, line + 4
        end = x + 7, line + 46
        canvas.box(start, end, fill="#d8ceba")
    tufts(canvas, line + 50, "#609042", number=60)
    return canvas.image


def barn(canvas, left):
    """A barn with a roof and a gate, whose foot is at the horizon."""
    line = canvas.line
    foot, eaves, ridge = line + 8, line - 70, line - 126
    wall = near_one_of(canvas.rng, "#a8463c", "#966e54")
    start = left, line - 74
    end = left + 120, foot
    canvas.box(start, end, fill=wall)
    roof = [(left - 12, eaves), (left + 60, ridge), (left + 132, eaves)]
    canvas.pen.polygon(roof, fill="#68544e")
    start = left + 42, line - 44
    end = left + 78, foot
    canvas.box(start, end, fill="#ece4d6")


# ---- water ----
def beach(rng, line):
    """The sea with waves, foam, and sand."""
    sky = ("#80c2ee", "#d6ecf6")
    ground = ("#f0dcaa", "#e0c48c")
    canvas = Canvas(rng, line, sky, ground)
    clouds(canvas, line * .6)
    water = int(line * .58)
    waves = gradient(rng, "#2e80b4", "#70c8d0", height=line - water)
    canvas.image.paste(waves, (0, water))
    for _ in range(26):
        x = anywhere(rng)
        y = rng.uniform(water + 6, line - 8)
        box = [x, y, x + 36, y + 9]
        canvas.pen.arc(box, 200, 340, fill="#e2f4f8", width=2)
    for x in range(-40, BIG, 60):
        left = x + rng.uniform(-8, 8)
        start = left, line - 14
        end = x + 84, line + 10
        canvas.oval(start, end, fill="#f4f8f4")
    wet = near(rng, "#e2cc98", by=4)
    canvas.band(line + 2, line + 14, fill=wet)
    canvas.stipple(line + 16, BIG, "#ceb27c", number=320)
    return canvas.image


def sea(rng, line):
    """Under water: sunbeams, rocks, weeds, bubbles."""
    sky = ("#46aad6", "#185c98")
    ground = ("#cebe92", "#b09c70")
    canvas = Canvas(rng, line, sky, ground)
    sunbeams(canvas)
    hills(canvas, line + 6, height=50, colour="#466880", number=3)
    sand = near(rng, "#c4b286", by=6)
    canvas.band(line + 4, BIG, fill=sand)
    for _ in range(14):
        weed(canvas)
    bubbles = spots(rng, 22, top=10, bottom=line, least=2, most=6)
    for x, y, radius in bubbles:
        canvas.disc(x, y, radius, outline="#bee2f0", width=2)
    canvas.stipple(line + 10, BIG, "#a69268", number=120)
    return canvas.image


def sunbeams(canvas):
    """Light that falls into the water."""
    rng, line = canvas.rng, canvas.line
    layer, pen = mask()
    for _ in range(4):
        x = anywhere(rng)
        width = rng.uniform(20, 60)
        foot = x + width * 2.2 - 90
        top = [(x, 0), (x + width, 0)]
        bottom = [(foot, line), (x - 110, line)]
        pen.polygon(top + bottom, fill=46)
    canvas.haze(layer, "#d6f0fa", blur=9)


def weed(canvas):
    """A winding plant on the bottom of the sea."""
    rng, foot = canvas.rng, canvas.line + 14
    x = anywhere(rng)
    tall = rng.uniform(26, 110)
    stem = []
    for i in range(16):
        aside = 7 * math.sin(i / 3)
        stem.append((x + aside, foot - tall * i / 15))
    green = near(rng, "#3a885c", by=18)
    canvas.pen.line(stem, fill=green, width=7, joint="curve")


# ---- trees and snow ----
def forest(rng, line):
    """Trunks and leaves in three depths, bushes, undergrowth."""
    sky = ("#b0ceb4", "#84ac82")
    ground = ("#6e7c46", "#566236")
    canvas = Canvas(rng, line, sky, ground)
    for nearness, colour in enumerate(["#7ea07c", "#5c7c5c", "#425c42"]):
        trunks(canvas, nearness)
        foliage(canvas, nearness, colour)
    for _ in range(12):
        x = anywhere(rng)
        radius = rng.uniform(14, 30)
        box = [x - radius, line - radius, x + radius, line + radius]
        bush = near(rng, "#527442", by=14)
        canvas.pen.pieslice(box, 180, 360, fill=bush)
    canvas.stipple(line + 6, BIG, "#867440", number=160)
    tufts(canvas, line + 6, "#4e6e38", number=70)
    return canvas.image


def trunks(canvas, nearness):
    """Trunks from the ground to the top of the picture; nearness 0, 1 or 2: fewer, wider, darker."""
    rng = canvas.rng
    bark = (112 - 16 * nearness, 92 - 12 * nearness, 70)
    foot = canvas.line + 10 * nearness
    for _ in range(7 - nearness):
        x = anywhere(rng)
        width = 8 + 9 * nearness + rng.uniform(0, 6)
        fill = near(rng, bark, by=8)
        start = x, 0
        end = x + width, foot
        canvas.box(start, end, fill)


def foliage(canvas, nearness, colour):
    """Leaves at the top of the picture."""
    low = 54 - 16 * nearness
    found = spots(canvas.rng, 9, top=-30, bottom=low, least=36, most=70)
    for x, y, radius in found:
        leaves = near(canvas.rng, colour, by=10)
        canvas.disc(x, y, radius, leaves, flat=.7)


def park(rng, line):
    """Trees and a path that comes nearer."""
    sky = ("#8cc8f0", "#deeef4")
    ground = ("#88be68", "#68a250")
    canvas = Canvas(rng, line, sky, ground)
    clouds(canvas, line)
    for _ in range(7):
        x = anywhere(rng)
        height = rng.uniform(80, 150)
        tree(canvas, x, line + 8, height)
    x = rng.uniform(.3, .7) * BIG
    gravel = near(rng, "#e2d0aa", by=6)
    far = [(x - 16, line + 6), (x + 16, line + 6)]
    close = [(x + 150, BIG), (x - 130, BIG)]
    canvas.pen.polygon(far + close, fill=gravel)
    canvas.stipple(line + 10, BIG, "#70a854", number=120)
    tufts(canvas, line + 10, "#5c9446", number=60)
    return canvas.image


def tree(canvas, x, base, height):
    """A leafy tree in the distance, whose foot is at x, `base`."""
    rng = canvas.rng
    half, crown = height * .05, base - height * .5
    bark = near(rng, "#70543e")
    start = x - half, crown
    end = x + half, base
    canvas.box(start, end, fill=bark)
    for _ in range(6):
        aside = x + rng.uniform(-.22, .22) * height
        y = base - height * rng.uniform(.55, .85)
        radius = height * rng.uniform(.17, .25)
        leaves = near(rng, "#609c58", by=9)
        canvas.disc(aside, y, radius, leaves)


def savanna(rng, line):
    """A low sun, hills, and trees with flat crowns in dry grass."""
    sky = ("#f6ca82", "#fae8be")
    ground = ("#d6b468", "#bc944e")
    canvas = Canvas(rng, line, sky, ground)
    x = rng.uniform(60, 390)
    y = rng.uniform(40, 110)
    radius = rng.uniform(24, 36)
    canvas.disc(x, y, radius, fill="#fff4d6")
    hills(canvas, line, height=50, colour="#cca46e", number=3)
    plain = near(rng, "#cca85e", by=8)
    canvas.band(line, BIG, fill=plain)
    for _ in range(3):
        acacia(canvas)
    tufts(canvas, line + 6, "#aa8440", number=110)
    return canvas.image


def acacia(canvas):
    """A tree with a flat crown."""
    rng, line = canvas.rng, canvas.line
    x = rng.uniform(20, 430)
    tall = rng.uniform(70, 120)
    fork = line - tall * .7
    start = x, line + 6
    end = x + 4, fork
    canvas.stroke(start, end, fill="#705436", width=7)
    half = tall * .4
    top, bottom = line - tall, line - tall * .68
    for _ in range(4):
        middle = x + rng.uniform(-.3, .3) * tall
        leaves = near(rng, "#7a8646")
        start = middle - half, top
        end = middle + half, bottom
        canvas.oval(start, end, fill=leaves)


def snowy_hill(rng, line):
    """Mountains behind white slopes, and snow that falls."""
    sky = ("#9ebede", "#dce8f2")
    ground = ("#f0f6fc", "#d6e2f0")
    canvas = Canvas(rng, line, sky, ground)
    for left in (0, 110, 220, 330, 440):
        mountain(canvas, left + rng.uniform(-40, 20))
    left_hill = near(rng, "#f0f6fc", by=4)
    start = -140, line - 22
    end = BIG * .8, BIG + 260
    canvas.oval(start, end, fill=left_hill)
    right_hill = near(rng, "#e6eff9", by=4)
    start = BIG * .3, line - 6
    end = BIG + 220, BIG + 240
    canvas.oval(start, end, fill=right_hill)
    for _ in range(8):
        x = anywhere(rng)
        y = rng.uniform(line + 30, BIG)
        box = [x, y, x + 90, y + 22]
        canvas.pen.arc(box, 190, 330, fill="#ccdaec", width=3)
    flakes = spots(rng, 70, top=0, bottom=BIG, least=1.5, most=3.5)
    for x, y, radius in flakes:
        canvas.disc(x, y, radius, fill="#fcfdff")
    return canvas.image


def mountain(canvas, x):
    """A mountain with snow on its top."""
    rng, line = canvas.rng, canvas.line
    tall = rng.uniform(90, 170)
    top = (x + 20, line - tall)
    rock = near(rng, "#8ea0b8", by=10)
    slopes = [(x - 90, line), top, (x + 140, line)]
    canvas.pen.polygon(slopes, fill=rock)
    edge, fold = line - tall * .7, line - tall * .78
    snow = [(x - 13, edge), top, (x + 56, edge), (x + 20, fold)]
    canvas.pen.polygon(snow, fill="#f6fafd")
