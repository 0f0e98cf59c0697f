"""The backgrounds of the second world: procedural layers, a function for every setting.

    picture = ground.ground("beach", rng)       a PIL image of SIZE pixels, drawn at twice the size

A background shows walls, floors, waves, hills and trunks, in colours and numbers that a random.Random
decides; it never shows anything that is one of the things. The functions are in indoors.py and outdoors.py,
their strokes in canvas.py. HORIZON says where the floor begins, as a share of the height.
"""
if __name__ == "__main__":
    exit("A part of classroom/pairs.py; run: python classroom/pairs.py --help")

from PIL import Image

from classroom.smol import canvas, indoors, outdoors

SIZE = canvas.BIG // 2
HORIZON = {"kitchen": .46, "market": .40, "living room": .58, "bedroom": .56, "office": .50, "workshop": .52,
           "street": .56, "farm": .42, "beach": .48, "sea": .86, "forest": .50, "park": .44, "savanna": .46,
           "snowy hill": .44, "stage": .60, "sports hall": .50, "café": .52}
DRAW = {
    "kitchen": indoors.kitchen,
    "market": outdoors.market,
    "living room": indoors.living_room,
    "bedroom": indoors.bedroom,
    "office": indoors.office,
    "workshop": indoors.workshop,
    "street": outdoors.street,
    "farm": outdoors.farm,
    "beach": outdoors.beach,
    "sea": outdoors.sea,
    "forest": outdoors.forest,
    "park": outdoors.park,
    "savanna": outdoors.savanna,
    "snowy hill": outdoors.snowy_hill,
    "stage": indoors.stage,
    "sports hall": indoors.sports_hall,
    "café": indoors.cafe,
}


def ground(name, rng):
    """A setting's background, RGB, SIZE pixels."""
    line = int(canvas.BIG * HORIZON[name])
    picture = DRAW[name](rng, line)
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)
