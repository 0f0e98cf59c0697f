"""The backgrounds of the second world: procedural layers, a function for every setting.

    picture = ground.ground("beach", rng)       a PIL image of SIZE pixels, drawn at twice the size

A background shows walls, floors, waves, hills and trunks, in colours and numbers that a random.Random
decides; it never shows anything that is one of the things. HORIZON says where the floor begins, as a share of
the height.
"""
if __name__ == "__main__":
    exit(print("A part of classroom/pairs.py; run: python classroom/pairs.py --help"))

import math

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFilter

SIZE, BIG = 224, 448
HORIZON = {"kitchen": .46, "market": .40, "living room": .58, "bedroom": .56, "office": .50, "workshop": .52,
           "street": .56, "farm": .42, "beach": .48, "sea": .86, "forest": .50, "park": .44, "savanna": .46,
           "snowy hill": .44, "stage": .60, "sports hall": .50, "café": .52}


# ---- strokes ----
def shade(colour, by):
    """A colour as numbers, lighter by so much or darker."""
    return tuple(max(0, min(255, c + by)) for c in rgb(colour))


def rgb(colour):
    """#rrggbb, or numbers as they are."""
    return ImageColor.getrgb(colour) if isinstance(colour, str) else colour


def near(rng, colour, by=10):
    """A colour a little lighter or darker, a little warmer or colder."""
    shift, found = rng.uniform(-by, by), []
    for c in rgb(colour):
        c += shift + rng.uniform(-by / 3, by / 3)
        found.append(int(max(0, min(255, c))))
    return tuple(found)


def fade(top, bottom, height, width=BIG):
    """A vertical gradient as an image."""
    share = np.linspace(0, 1, height)[:, None, None]
    top, bottom = (np.array(rgb(colour)) for colour in (top, bottom))
    column = top + (bottom - top) * share                                            # (height, 1, 3)
    return Image.fromarray(column.astype(np.uint8)).resize((width, height))


def split(rng, name, upper, lower):
    """The picture with an upper and a lower gradient, its pen, and the horizon in its pixels."""
    line = int(BIG * HORIZON[name])
    image = Image.new("RGB", (BIG, BIG))
    image.paste(fade(*(near(rng, c) for c in upper), line), (0, 0))
    image.paste(fade(*(near(rng, c) for c in lower), BIG - line), (0, line))
    return image, ImageDraw.Draw(image), line


def boards(pen, rng, line, colour, number=7):
    """Floorboards that run towards a vanishing point."""
    for i in range(-number, 2 * number):
        foot = BIG * i / number + rng.uniform(-6, 6)
        head = BIG / 2 + (foot - BIG / 2) * .45
        pen.line([(head, line), (foot, BIG)], fill=near(rng, colour, 5), width=2)


def tiles(pen, line, colour, side):
    """A grid of tiles on a wall."""
    for x in range(0, BIG, side):
        pen.line([(x, 0), (x, line)], fill=colour, width=2)
    for y in range(line % side, line, side):
        pen.line([(0, y), (BIG, y)], fill=colour, width=2)


def window(pen, rng, left, top, width, height, sky="#bcdcf0"):
    frame = near(rng, "#f4f0e8", 5)
    pen.rectangle([left, top, left + width, top + height], fill=near(rng, sky), outline=frame, width=8)
    pen.line([(left + width / 2, top), (left + width / 2, top + height)], fill=frame, width=5)
    pen.line([(left, top + height / 2), (left + width, top + height / 2)], fill=frame, width=5)


def hills(pen, rng, base, height, colour, number=4):
    """Rounded hills whose feet are at `base`."""
    for _ in range(number):
        middle, half = rng.uniform(0, BIG), rng.uniform(.22, .5) * BIG
        tall = height * rng.uniform(.5, 1)
        pen.ellipse([middle - half, base - tall, middle + half, base + tall], fill=near(rng, colour, 8))


def clouds(image, rng, low, number=3):
    """Soft white clouds above the line `low`."""
    layer = Image.new("L", image.size)
    pen = ImageDraw.Draw(layer)
    for _ in range(number):
        x, y, width = rng.uniform(0, BIG), rng.uniform(.05, .7) * low, rng.uniform(50, 110)
        for _ in range(5):
            a, b, r = x + rng.uniform(-.5, .5) * width, y + rng.uniform(-.1, .1) * width, width * .22
            pen.ellipse([a - r * 1.4, b - r * .7, a + r * 1.4, b + r * .7], fill=rng.randint(120, 190))
    image.paste("#ffffff", (0, 0), layer.filter(ImageFilter.GaussianBlur(6)))


def tufts(pen, rng, line, colour, number=60):
    """Short strokes on the ground, larger towards the viewer."""
    for _ in range(number):
        y = rng.uniform(line + 4, BIG)
        x, size = rng.uniform(0, BIG), 4 + 10 * (y - line) / (BIG - line)
        for lean in (-.5, 0, .5):
            pen.line([(x, y), (x + lean * size, y - size)], fill=near(rng, colour, 12), width=2)


def stipple(pen, rng, top, bottom, colour, number=240):
    for _ in range(number):
        x, y, r = rng.uniform(0, BIG), rng.uniform(top, bottom), rng.uniform(1, 2.4)
        pen.ellipse([x - r, y - r, x + r, y + r], fill=near(rng, colour, 12))


def crown(pen, rng, x, base, height, colour, trunk="#70543e"):
    """A leafy tree in the distance."""
    pen.rectangle([x - height * .05, base - height * .5, x + height * .05, base], fill=near(rng, trunk))
    for _ in range(6):
        a, b = x + rng.uniform(-.22, .22) * height, base - height * rng.uniform(.55, .85)
        r = height * rng.uniform(.17, .25)
        pen.ellipse([a - r, b - r, a + r, b + r], fill=near(rng, colour, 9))


# ---- settings: name, rng -> the picture at twice its size ----
def kitchen(name, rng):
    wall = rng.choice(["#e2ece8", "#f0e4ce", "#d6e2ee"])
    image, pen, line = split(rng, name, (wall, wall), ("#ceac84", "#b08a64"))
    tiles(pen, line, shade(wall, -18), rng.choice([40, 52, 64]))
    window(pen, rng, rng.randint(20, 260), rng.randint(12, 30), 130, 110)
    pen.rectangle([0, line, BIG, line + 14], fill=near(rng, "#ece2d2", 6))
    for y in range(line + 40, BIG, 46):
        pen.line([(0, y), (BIG, y + rng.randint(-6, 6))], fill=near(rng, "#b6926c", 8), width=2)
    return image


def market(name, rng):
    image, pen, line = split(rng, name, ("#d0e2f0", "#e2e6e2"), ("#be9e74", "#a07e58"))
    for i in range(4):
        x = i * BIG / 4 + rng.uniform(-12, 12)
        pen.rectangle([x, 90, x + BIG / 4 - 18, line], fill=near(rng, "#cebca6", 16))
    stripe, width = rng.choice(["#ce544c", "#548e6e", "#567ab0"]), 38
    for i, x in enumerate(range(0, BIG, width)):
        fill = stripe if i % 2 else "#f6f2e8"
        pen.rectangle([x, 0, x + width, 62], fill=fill)
        pen.pieslice([x, 42, x + width, 82], 0, 180, fill=fill)
    for y in range(line, BIG, 58):
        pen.rectangle([0, y, BIG, y + 6], fill=near(rng, "#806040", 8))
    for x in range(0, BIG, 75):
        pen.line([(x, line), (x + rng.randint(-4, 4), BIG)], fill=near(rng, "#8c6a48", 8), width=4)
    return image


def living_room(name, rng):
    wall = rng.choice(["#e4d6c4", "#cedcd6", "#ded0da", "#d4dae6"])
    image, pen, line = split(rng, name, (wall, wall), ("#b28a64", "#96704e"))
    for x in range(rng.randint(0, 30), BIG, 34):
        pen.line([(x, 0), (x, line)], fill=shade(wall, -7), width=3)
    window(pen, rng, rng.choice([24, 290]), 30, 124, 140)
    boards(pen, rng, line, "#8c6848")
    pen.rectangle([0, line - 12, BIG, line], fill="#f4f0e8")
    rug = near(rng, rng.choice(["#aa605c", "#5c7496", "#788c68"]))
    pen.ellipse([50, line + 50, BIG - 50, BIG - 10], fill=rug, outline=shade(rug, 40), width=8)
    return image


def bedroom(name, rng):
    wall = rng.choice(["#d6deee", "#ecdade", "#dee8da"])
    low = shade(wall, -8)
    image, pen, line = split(rng, name, (wall, low), ("#cebcaa", "#b8a492"))
    stipple(pen, rng, 8, line - 20, shade(wall, 12), 130)
    sky = rng.choice(["#465482", "#bcdcf0", "#bcdcf0"])
    window(pen, rng, rng.randint(150, 190), 24, 110, 120, sky)
    curtain = near(rng, rng.choice(["#a8788c", "#788cb0", "#96a078"]))
    for left in (0, BIG - 60):
        for i in range(5):
            pen.rectangle([left + i * 12, 0, left + i * 12 + 10, line - 14], fill=near(rng, curtain, 12))
    pen.rectangle([0, line - 8, BIG, line], fill="#f6f4f0")
    stipple(pen, rng, line + 4, BIG, "#c0ac9a", 300)
    return image


def office(name, rng):
    image, pen, line = split(rng, name,
                             ("#d8dee4", "#e2e6ea"), ("#baa082", "#a08466"))
    for i in range(3):
        window(pen, rng, 16 + i * 146, 18, 122, 110)
        for _ in range(4):
            x, tall = 24 + i * 146 + rng.uniform(0, 90), rng.uniform(20, 74)
            pen.rectangle([x, 124 - tall, x + 20, 124], fill=near(rng, "#96a8bc", 14))
    for y in range(26, 90, 9):
        pen.line([(0, y), (BIG, y)], fill="#e8ecf0", width=2)
    pen.rectangle([0, line - 16, BIG, line], fill=near(rng, "#ccced2", 6))
    pen.rectangle([0, line, BIG, line + 10], fill=near(rng, "#d6bea0", 6))
    return image


def workshop(name, rng):
    image, pen, line = split(rng, name, ("#b0a494", "#a49686"), ("#967656", "#7a5e42"))
    for y in range(0, line, 28):
        for x in range(-40, BIG, 66):
            left = x + 33 * (y // 28 % 2)
            pen.rectangle([left, y, left + 62, y + 25], fill=near(rng, "#a88470", 9))
    board = near(rng, "#ccb896", 6)
    pen.rectangle([26, 40, BIG - 26, line - 40], fill=board, outline="#786046", width=5)
    for y in range(58, line - 48, 18):
        for x in range(46, BIG - 36, 18):
            pen.point([(x, y), (x + 1, y), (x, y + 1)], fill="#8c785c")
    for y in range(line + 30, BIG, 40):
        pen.line([(0, y), (BIG, y)], fill=near(rng, "#70543a", 8), width=3)
    return image


def street(name, rng):
    image, pen, line = split(rng, name,
                             ("#a8cce8", "#d6e4ee"), ("#7e8086", "#686a70"))
    clouds(image, rng, line * .4, 2)
    x = -20
    while x < BIG:
        width, top = rng.randint(70, 120), rng.randint(30, 120)
        front = near(rng, rng.choice(["#c49a80", "#d2c4ac", "#a0a6b2", "#b88070"]))
        pen.rectangle([x, top, x + width, line - 20], fill=front)
        for a in range(x + 12, x + width - 18, 28):
            for b in range(top + 14, line - 50, 34):
                pen.rectangle([a, b, a + 14, b + 20], fill=near(rng, "#dce0d2", 18))
        x += width + 2
    pen.rectangle([0, line - 20, BIG, line + 6], fill=near(rng, "#bebcb8", 6))
    for x in range(rng.randint(-60, 0), BIG, 96):
        pen.polygon([(x, 350), (x + 54, 350), (x + 50, 358), (x - 6, 358)], fill="#e0ded2")
    return image


def farm(name, rng):
    image, pen, line = split(rng, name, ("#96c8ec", "#dcecf0"), ("#8cb860", "#6c9a48"))
    clouds(image, rng, line)
    hills(pen, rng, line, 70, "#7eac64")
    pen.rectangle([0, line, BIG, BIG], fill=near(rng, "#82b05a", 8))
    left = rng.randint(20, 250)
    wall = near(rng, rng.choice(["#a8463c", "#966e54"]))
    pen.rectangle([left, line - 74, left + 120, line + 8], fill=wall)
    roof = [(left - 12, line - 70), (left + 60, line - 126), (left + 132, line - 70)]
    pen.polygon(roof, fill="#68544e")
    pen.rectangle([left + 42, line - 44, left + 78, line + 8], fill="#ece4d6")
    for y in (line + 16, line + 32):
        pen.line([(0, y), (BIG, y)], fill="#e2d8c4", width=5)
    for x in range(rng.randint(0, 40), BIG, 56):
        pen.rectangle([x, line + 4, x + 7, line + 46], fill="#d8ceba")
    tufts(pen, rng, line + 50, "#609042")
    return image


def beach(name, rng):
    image, pen, line = split(rng, name,
                             ("#80c2ee", "#d6ecf6"), ("#f0dcaa", "#e0c48c"))
    clouds(image, rng, line * .6)
    water = int(line * .58)
    image.paste(fade(near(rng, "#2e80b4"), near(rng, "#70c8d0"), line - water), (0, water))
    for _ in range(26):
        x, y = rng.uniform(0, BIG), rng.uniform(water + 6, line - 8)
        pen.arc([x, y, x + 36, y + 9], 200, 340, fill="#e2f4f8", width=2)
    for x in range(-40, BIG, 60):
        pen.ellipse([x + rng.uniform(-8, 8), line - 14, x + 84, line + 10], fill="#f4f8f4")
    pen.rectangle([0, line + 2, BIG, line + 14], fill=near(rng, "#e2cc98", 4))
    stipple(pen, rng, line + 16, BIG, "#ceb27c", 320)
    return image


def sea(name, rng):
    image, pen, line = split(rng, name, ("#46aad6", "#185c98"), ("#cebe92", "#b09c70"))
    light = Image.new("L", image.size)
    rays = ImageDraw.Draw(light)
    for _ in range(4):
        x, width = rng.uniform(0, BIG), rng.uniform(20, 60)
        rays.polygon([(x, 0), (x + width, 0), (x + width * 2.2 - 90, line), (x - 110, line)], fill=46)
    image.paste("#d6f0fa", (0, 0), light.filter(ImageFilter.GaussianBlur(9)))
    hills(pen, rng, line + 6, 50, "#466880", 3)
    pen.rectangle([0, line + 4, BIG, BIG], fill=near(rng, "#c4b286", 6))
    for _ in range(14):
        x, tall = rng.uniform(0, BIG), rng.uniform(26, 110)
        wave = [(x + 7 * math.sin(i / 3), line + 14 - tall * i / 15) for i in range(16)]
        pen.line(wave, fill=near(rng, "#3a885c", 18), width=7, joint="curve")
    for _ in range(22):
        x, y, r = rng.uniform(0, BIG), rng.uniform(10, line), rng.uniform(2, 6)
        pen.ellipse([x - r, y - r, x + r, y + r], outline="#bee2f0", width=2)
    stipple(pen, rng, line + 10, BIG, "#a69268", 120)
    return image


def forest(name, rng):
    image, pen, line = split(rng, name, ("#b0ceb4", "#84ac82"), ("#6e7c46", "#566236"))
    for distance, colour in ((0, "#7ea07c"), (1, "#5c7c5c"), (2, "#425c42")):
        for _ in range(7 - distance):
            x, width = rng.uniform(0, BIG), 8 + 9 * distance + rng.uniform(0, 6)
            foot = line + 10 * distance
            bark = (112 - 16 * distance, 92 - 12 * distance, 70)
            pen.rectangle([x, 0, x + width, foot], fill=near(rng, bark, 8))
        for _ in range(9):
            x, y, r = rng.uniform(0, BIG), rng.uniform(-30, 54 - 16 * distance), rng.uniform(36, 70)
            pen.ellipse([x - r, y - r * .7, x + r, y + r * .7], fill=near(rng, colour, 10))
    for _ in range(12):
        x, r = rng.uniform(0, BIG), rng.uniform(14, 30)
        pen.pieslice([x - r, line - r, x + r, line + r], 180, 360, fill=near(rng, "#527442", 14))
    stipple(pen, rng, line + 6, BIG, "#867440", 160)
    tufts(pen, rng, line + 6, "#4e6e38", 70)
    return image


def park(name, rng):
    image, pen, line = split(rng, name, ("#8cc8f0", "#deeef4"), ("#88be68", "#68a250"))
    clouds(image, rng, line)
    for _ in range(7):
        crown(pen, rng, rng.uniform(0, BIG), line + 8, rng.uniform(80, 150), "#609c58")
    x = rng.uniform(.3, .7) * BIG
    path = near(rng, "#e2d0aa", 6)
    pen.polygon([(x - 16, line + 6), (x + 16, line + 6), (x + 150, BIG), (x - 130, BIG)], fill=path)
    stipple(pen, rng, line + 10, BIG, "#70a854", 120)
    tufts(pen, rng, line + 10, "#5c9446", 60)
    return image


def savanna(name, rng):
    image, pen, line = split(rng, name, ("#f6ca82", "#fae8be"), ("#d6b468", "#bc944e"))
    x, y, r = rng.uniform(60, 390), rng.uniform(40, 110), rng.uniform(24, 36)
    pen.ellipse([x - r, y - r, x + r, y + r], fill="#fff4d6")
    hills(pen, rng, line, 50, "#cca46e", 3)
    pen.rectangle([0, line, BIG, BIG], fill=near(rng, "#cca85e", 8))
    for _ in range(3):
        a, tall = rng.uniform(20, 430), rng.uniform(70, 120)
        pen.line([(a, line + 6), (a + 4, line - tall * .7)], fill="#705436", width=7)
        for _ in range(4):
            b = a + rng.uniform(-.3, .3) * tall
            leaves = [b - tall * .4, line - tall, b + tall * .4, line - tall * .68]
            pen.ellipse(leaves, fill=near(rng, "#7a8646"))
    tufts(pen, rng, line + 6, "#aa8440", 110)
    return image


def snowy_hill(name, rng):
    image, pen, line = split(rng, name,
                             ("#9ebede", "#dce8f2"), ("#f0f6fc", "#d6e2f0"))
    for i in range(5):
        x, tall = i * 110 + rng.uniform(-40, 20), rng.uniform(90, 170)
        slope = [(x - 90, line), (x + 20, line - tall), (x + 140, line)]
        pen.polygon(slope, fill=near(rng, "#8ea0b8", 10))
        tip = [(x - 13, line - tall * .7), (x + 20, line - tall), (x + 56, line - tall * .7),
               (x + 20, line - tall * .78)]
        pen.polygon(tip, fill="#f6fafd")
    pen.ellipse([-140, line - 22, BIG * .8, BIG + 260], fill=near(rng, "#f0f6fc", 4))
    pen.ellipse([BIG * .3, line - 6, BIG + 220, BIG + 240], fill=near(rng, "#e6eff9", 4))
    for _ in range(8):
        x, y = rng.uniform(0, BIG), rng.uniform(line + 30, BIG)
        pen.arc([x, y, x + 90, y + 22], 190, 330, fill="#ccdaec", width=3)
    for _ in range(70):
        x, y, r = rng.uniform(0, BIG), rng.uniform(0, BIG), rng.uniform(1.5, 3.5)
        pen.ellipse([x - r, y - r, x + r, y + r], fill="#fcfdff")
    return image


def stage(name, rng):
    image, pen, line = split(rng, name, ("#3c2234", "#5c2e42"), ("#ac8058", "#8a6242"))
    curtain = near(rng, rng.choice(["#8c2834", "#3a427c", "#406854"]))
    for i in range(0, BIG, 16):
        dark = 26 if i // 16 % 2 else 0
        pen.rectangle([i, 0, i + 15, line], fill=shade(near(rng, curtain, 6), -dark - 14))
    for left in (0, BIG - 70):
        for i in range(5):
            pen.rectangle([left + 14 * i, 0, left + 14 * i + 12, line + 6], fill=near(rng, curtain, 22))
    for i in range(9):
        pen.pieslice([i * 52 - 10, -34, i * 52 + 50, 36], 0, 180, fill=near(rng, curtain, 14))
    boards(pen, rng, line, "#805c3e", 9)
    light = Image.new("L", image.size)
    beams = ImageDraw.Draw(light)
    for x in (90, 224, 358):
        foot = x + rng.uniform(-60, 60)
        beams.polygon([(x - 8, 0), (x + 8, 0), (foot + 70, BIG - 40), (foot - 70, BIG - 40)], fill=44)
    image.paste("#fff4d6", (0, 0), light.filter(ImageFilter.GaussianBlur(8)))
    return image


def sports_hall(name, rng):
    image, pen, line = split(rng, name, ("#deded6", "#cecec8"), ("#d6a46c", "#bc8854"))
    for i in range(4):
        window(pen, rng, 12 + i * 110, 14, 92, 54)
    mats = rng.choice(["#5c7ca0", "#789878", "#aa6e60"])
    pen.rectangle([0, line - 46, BIG, line], fill=near(rng, mats))
    for x in range(0, BIG, 44):
        pen.line([(x, 84), (x, line - 46)], fill="#beb098", width=5)
    boards(pen, rng, line, "#b48250", 10)
    mark = rng.choice(["#f0f0ec", "#3c6096", "#aa3c38"])
    pen.ellipse([110, line + 56, BIG - 110, BIG - 36], outline=mark, width=6)
    pen.line([(0, line + 26), (BIG, line + 26)], fill=mark, width=5)
    return image


def cafe(name, rng):
    wall = rng.choice(["#967660", "#708076", "#ac8e76"])
    image, pen, line = split(rng, name, (wall, wall), ("#ceb292", "#b29270"))
    pen.rectangle([28, 40, 210, 150], fill="#343a38", outline="#a07a54", width=7)
    for i in range(5):
        y = 60 + 18 * i
        pen.line([(46, y), (46 + rng.randint(60, 140), y)], fill="#ced0ca", width=3)
    window(pen, rng, 252, 34, 160, 120, "#ece0c4")
    for x in range(40, BIG, 118):
        pen.line([(x, 0), (x, 20)], fill="#2c2828", width=3)
        pen.pieslice([x - 20, 10, x + 20, 46], 180, 360, fill=near(rng, "#e2ba6e"))
    pen.rectangle([0, line, BIG, line + 12], fill=near(rng, "#78543c", 6))
    for _ in range(20):
        y, x = rng.uniform(line + 16, BIG), rng.uniform(-100, BIG)
        pen.line([(x, y), (x + rng.uniform(60, 160), y)], fill=near(rng, "#b69674", 6), width=2)
    return image


DRAW = {"kitchen": kitchen, "market": market, "living room": living_room, "bedroom": bedroom,
        "office": office, "workshop": workshop, "street": street, "farm": farm, "beach": beach, "sea": sea,
        "forest": forest, "park": park, "savanna": savanna, "snowy hill": snowy_hill, "stage": stage,
        "sports hall": sports_hall, "café": cafe}


def ground(name, rng):
    """A setting's background, RGB, SIZE pixels."""
    return DRAW[name](name, rng).resize((SIZE, SIZE), Image.Resampling.BOX)
