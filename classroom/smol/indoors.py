"""The backgrounds of the second world that are rooms: a function for each, of rng and the floor's first row.

    image = indoors.kitchen(random.Random(0), line=206)          BIG x BIG pixels, RGB
"""
if __name__ == "__main__":
    exit("A part of classroom/pairs.py; run: python classroom/pairs.py --help")

from classroom.smol.canvas import BIG, Canvas, mask, near, near_one_of, shade


# ---- what several rooms have ----
def boards(canvas, colour, number=7):
    """Floorboards that run towards a vanishing point."""
    middle = BIG / 2
    for i in range(-number, 2 * number):
        shift = canvas.rng.uniform(-6, 6)
        foot = BIG * i / number + shift
        head = middle + (foot - middle) * .45
        joint = near(canvas.rng, colour, by=5)
        start = head, canvas.line
        end = foot, BIG
        canvas.stroke(start, end, fill=joint, width=2)


def tiles(canvas, colour, side):
    """A grid of tiles on a wall."""
    line = canvas.line
    for x in range(0, BIG, side):
        canvas.upright(x, top=0, bottom=line, fill=colour, width=2)
    for y in range(line % side, line, side):
        canvas.level(y, fill=colour, width=2)


def drape(canvas, left, bottom, colour, step, by):
    """A curtain of five folds, each `step` pixels wide and its colour varied by `by`."""
    for i in range(5):
        x = left + step * i
        fold = near(canvas.rng, colour, by)
        start = x, 0
        end = x + step - 2, bottom
        canvas.box(start, end, fill=fold)


# ---- at home ----
def kitchen(rng, line):
    """A tiled wall with a window, a counter, and boards below it."""
    wall = rng.choice(["#e2ece8", "#f0e4ce", "#d6e2ee"])
    walls = (wall, wall)
    floor = ("#ceac84", "#b08a64")
    canvas = Canvas(rng, line, walls, floor)
    joint = shade(wall, -18)
    side = rng.choice([40, 52, 64])
    tiles(canvas, joint, side)
    left = rng.randint(20, 260)
    top = rng.randint(12, 30)
    canvas.window(left, top, width=130, height=110)
    counter = near(rng, "#ece2d2", by=6)
    canvas.band(line, line + 14, fill=counter)
    for y in range(line + 40, BIG, 46):
        slope = rng.randint(-6, 6)
        joint = near(rng, "#b6926c", by=8)
        start = 0, y
        end = BIG, y + slope
        canvas.stroke(start, end, fill=joint, width=2)
    return canvas.image


def living_room(rng, line):
    """Striped wallpaper, a window, floorboards, an oval rug."""
    wall = rng.choice(["#e4d6c4", "#cedcd6", "#ded0da", "#d4dae6"])
    walls = (wall, wall)
    floor = ("#b28a64", "#96704e")
    canvas = Canvas(rng, line, walls, floor)
    stripe = shade(wall, -7)
    first = rng.randint(0, 30)
    for x in range(first, BIG, 34):
        canvas.upright(x, top=0, bottom=line, fill=stripe, width=3)
    left = rng.choice([24, 290])
    canvas.window(left, top=30, width=124, height=140)
    boards(canvas, "#8c6848")
    canvas.band(line - 12, line, fill="#f4f0e8")
    rug = near_one_of(rng, "#aa605c", "#5c7496", "#788c68")
    start = 50, line + 50
    end = BIG - 50, BIG - 10
    fringe = shade(rug, 40)
    canvas.oval(start, end, fill=rug, outline=fringe, width=8)
    return canvas.image


def bedroom(rng, line):
    """A window by night or by day between two curtains, and a carpet."""
    wall = rng.choice(["#d6deee", "#ecdade", "#dee8da"])
    low = shade(wall, -8)
    walls = (wall, low)
    floor = ("#cebcaa", "#b8a492")
    canvas = Canvas(rng, line, walls, floor)
    pattern = shade(wall, 12)
    canvas.stipple(8, line - 20, pattern, number=130)
    sky = rng.choice(["#465482", "#bcdcf0", "#bcdcf0"])
    left = rng.randint(150, 190)
    canvas.window(left, top=24, width=110, height=120, sky=sky)
    curtain = near_one_of(rng, "#a8788c", "#788cb0", "#96a078")
    hem = line - 14
    for left in (0, BIG - 60):
        drape(canvas, left, hem, curtain, step=12, by=12)
    canvas.band(line - 8, line, fill="#f6f4f0")
    canvas.stipple(line + 4, BIG, "#c0ac9a", number=300)
    return canvas.image


# ---- at work ----
def office(rng, line):
    """Three windows with blinds, a town behind them, the edge of a desk."""
    wall = ("#d8dee4", "#e2e6ea")
    floor = ("#baa082", "#a08466")
    canvas = Canvas(rng, line, wall, floor)
    for left in (16, 162, 308):
        canvas.window(left, top=18, width=122, height=110)
        skyline(canvas, left + 8)
    for y in range(26, 90, 9):
        canvas.level(y, fill="#e8ecf0", width=2)
    sill = near(rng, "#ccced2", by=6)
    canvas.band(line - 16, line, fill=sill)
    desk = near(rng, "#d6bea0", by=6)
    canvas.band(line, line + 10, fill=desk)
    return canvas.image


def skyline(canvas, left):
    """Four blocks of a town in an office's window."""
    for _ in range(4):
        x = left + canvas.rng.uniform(0, 90)
        tall = canvas.rng.uniform(20, 74)
        front = near(canvas.rng, "#96a8bc", by=14)
        start = x, 124 - tall
        end = x + 20, 124
        canvas.box(start, end, fill=front)


def workshop(rng, line):
    """A brick wall, a board with holes, a floor of planks."""
    wall = ("#b0a494", "#a49686")
    floor = ("#967656", "#7a5e42")
    canvas = Canvas(rng, line, wall, floor)
    bricks(canvas)
    board = near(rng, "#ccb896", by=6)
    start = 26, 40
    end = BIG - 26, line - 40
    canvas.box(start, end, fill=board, outline="#786046", width=5)
    for y in range(58, line - 48, 18):
        for x in range(46, BIG - 36, 18):
            hole = [(x, y), (x + 1, y), (x, y + 1)]
            canvas.pen.point(hole, fill="#8c785c")
    for y in range(line + 30, BIG, 40):
        joint = near(rng, "#70543a", by=8)
        canvas.level(y, fill=joint, width=3)
    return canvas.image


def bricks(canvas):
    """A wall of bricks, every other row half a brick further."""
    rows = range(0, canvas.line, 28)
    for row, y in enumerate(rows):
        first = -7 if row % 2 else -40
        for x in range(first, first + BIG + 40, 66):
            brick = near(canvas.rng, "#a88470", by=9)
            start = x, y
            end = x + 62, y + 25
            canvas.box(start, end, fill=brick)


# ---- in town ----
def stage(rng, line):
    """A curtain with swags, floorboards, three spotlights."""
    wall = ("#3c2234", "#5c2e42")
    floor = ("#ac8058", "#8a6242")
    canvas = Canvas(rng, line, wall, floor)
    curtain = near_one_of(rng, "#8c2834", "#3a427c", "#406854")
    folds = range(0, BIG, 16)
    for i, x in enumerate(folds):
        darker = -40 if i % 2 else -14
        fold = near(rng, curtain, by=6)
        start = x, 0
        end = x + 15, line
        fold = shade(fold, darker)
        canvas.box(start, end, fill=fold)
    hem = line + 6
    for left in (0, BIG - 70):
        drape(canvas, left, hem, curtain, step=14, by=22)
    for x in range(-10, 458, 52):
        swag = near(rng, curtain, by=14)
        box = [x, -34, x + 60, 36]
        canvas.pen.pieslice(box, 0, 180, fill=swag)
    boards(canvas, "#805c3e", number=9)
    spotlights(canvas)
    return canvas.image


def spotlights(canvas):
    """Three beams that fall onto a stage."""
    layer, pen = mask()
    low = BIG - 40
    for x in (90, 224, 358):
        foot = x + canvas.rng.uniform(-60, 60)
        top = [(x - 8, 0), (x + 8, 0)]
        bottom = [(foot + 70, low), (foot - 70, low)]
        pen.polygon(top + bottom, fill=44)
    canvas.haze(layer, "#fff4d6", blur=8)


def sports_hall(rng, line):
    """High windows, wall bars above mats, a floor with lines."""
    wall = ("#deded6", "#cecec8")
    floor = ("#d6a46c", "#bc8854")
    canvas = Canvas(rng, line, wall, floor)
    for left in (12, 122, 232, 342):
        canvas.window(left, top=14, width=92, height=54)
    mats = near_one_of(rng, "#5c7ca0", "#789878", "#aa6e60")
    canvas.band(line - 46, line, mats)
    foot = line - 46
    for x in range(0, BIG, 44):
        canvas.upright(x, top=84, bottom=foot, fill="#beb098", width=5)
    boards(canvas, "#b48250", number=10)
    mark = rng.choice(["#f0f0ec", "#3c6096", "#aa3c38"])
    start = 110, line + 56
    end = BIG - 110, BIG - 36
    canvas.oval(start, end, outline=mark, width=6)
    canvas.level(line + 26, fill=mark, width=5)
    return canvas.image


def cafe(rng, line):
    """A blackboard, a window, hanging lamps, a bar."""
    wall = rng.choice(["#967660", "#708076", "#ac8e76"])
    walls = (wall, wall)
    floor = ("#ceb292", "#b29270")
    canvas = Canvas(rng, line, walls, floor)
    start = 28, 40
    end = 210, 150
    canvas.box(start, end, fill="#343a38", outline="#a07a54", width=7)
    for y in (60, 78, 96, 114, 132):
        right = 46 + rng.randint(60, 140)
        canvas.level(y, fill="#ced0ca", width=3, left=46, right=right)
    canvas.window(252, top=34, width=160, height=120, sky="#ece0c4")
    for x in range(40, BIG, 118):
        hanging_lamp(canvas, x)
    bar = near(rng, "#78543c", by=6)
    canvas.band(line, line + 12, fill=bar)
    for _ in range(20):
        y = rng.uniform(line + 16, BIG)
        left = rng.uniform(-100, BIG)
        right = left + rng.uniform(60, 160)
        grain = near(rng, "#b69674", by=6)
        canvas.level(y, fill=grain, width=2, left=left, right=right)
    return canvas.image


def hanging_lamp(canvas, x):
    """A lampshade on a short cord from the ceiling."""
    canvas.upright(x, top=0, bottom=20, fill="#2c2828", width=3)
    light = near(canvas.rng, "#e2ba6e")
    box = [x - 20, 10, x + 20, 46]
    canvas.pen.pieslice(box, 180, 360, fill=light)
