"""The things and the settings of the second world, as data: their names, their looks, where they belong.

A setting has eight things, the most typical first; a thing belongs to one setting. A line says

    name ; code point ; size ; where it is ; colour ; other names ; names that are only understood

size     s, m or l: how large it is drawn, so that an elephant is larger than a ladybird
where    floor (it stands on the ground or the table), air, or wall
colour   a word: in every style it has this colour; any: it is drawn in a colour of TINTS; -: no one word fits
names    with commas; the plural is regular, or follows after a slash. Captions and questions use the name and
         the other names; a reader (speech.py) understands the last column too, which a model may say

The same code point is drawn in every style (atlas.py), which is what makes it one class of things.
"""
if __name__ == "__main__":
    exit("A part of classroom/pairs.py; run: python classroom/pairs.py --help")

import re
from dataclasses import dataclass
from functools import cache

TABLE = """
# a kitchen, in
cup ; 2615 ; s ; floor ; - ; mug, coffee cup, cup of coffee/cups of coffee ;
frying pan ; 1f373 ; m ; floor ; - ; skillet ; pan
knife/knives ; 1f52a ; m ; floor ; - ; kitchen knife/kitchen knives ;
spoon ; 1f944 ; m ; floor ; - ;  ; teaspoon, tablespoon
teapot ; 1fad6 ; m ; floor ; any ;  ; tea pot
salt shaker ; 1f9c2 ; s ; floor ; - ; salt cellar ;
piece of cheese/pieces of cheese ; 1f9c0 ; s ; floor ; yellow ; chunk of cheese/chunks of cheese ; cheese
bottle ; 1f37e ; m ; floor ; green ; wine bottle ;
# a market, at
apple ; 1f34e ; s ; floor ; red ;
banana ; 1f34c ; m ; floor ; yellow ;
carrot ; 1f955 ; m ; floor ; orange ;
tomato/tomatoes ; 1f345 ; s ; floor ; red ;
lemon ; 1f34b ; s ; floor ; yellow ;
pineapple ; 1f34d ; m ; floor ; - ;
strawberry/strawberries ; 1f353 ; s ; floor ; red ;
broccoli floret ; 1f966 ; s ; floor ; green ; piece of broccoli/pieces of broccoli ; broccoli/broccolis
# a living room, in
sofa ; 1f6cb ; l ; floor ; - ; couch/couches, settee ;
television ; 1f4fa ; m ; floor ; - ; TV, television set ;
painting ; 1f5bc ; m ; wall ; - ; framed picture ;
chair ; 1fa91 ; l ; floor ; - ; wooden chair ; seat
candle ; 1f56f ; s ; floor ; - ; burning candle ;
cat ; 1f408 ; m ; floor ; - ; kitten ; kitty/kitties
telephone ; 260e ; s ; floor ; any ; phone ;
radio ; 1f4fb ; m ; floor ; - ;  ; transistor
# a bedroom, in
bed ; 1f6cf ; l ; floor ; - ;  ; single bed
teddy bear ; 1f9f8 ; m ; floor ; brown ; stuffed bear ; teddy/teddies
alarm clock ; 23f0 ; s ; floor ; - ; clock ;
dress/dresses ; 1f457 ; m ; wall ; any ; frock ; gown
T-shirt ; 1f455 ; m ; wall ; any ; tee shirt ; tee, shirt, tshirt
backpack ; 1f392 ; m ; floor ; any ; rucksack ; knapsack
boot ; 1f462 ; m ; floor ; any ; ankle boot ;
book ; 1f4d5 ; s ; floor ; any ;  ; hardback
# an office, in
laptop ; 1f4bb ; m ; floor ; - ; laptop computer ; notebook computer
printer ; 1f5a8 ; m ; floor ; - ; office printer ;
light bulb ; 1f4a1 ; s ; floor ; yellow ; bulb ; lightbulb
calendar ; 1f4c5 ; m ; wall ; - ; wall calendar ;
briefcase ; 1f4bc ; m ; floor ; - ;  ; attaché case
pencil ; 270f ; m ; floor ; - ; lead pencil ;
envelope ; 2709 ; s ; floor ; - ;  ; letter
magnifying glass/magnifying glasses ; 1f50d ; m ; floor ; - ; magnifier ;
# a workshop, in
hammer ; 1f528 ; m ; floor ; - ; claw hammer ;
toolbox/toolboxes ; 1f9f0 ; m ; floor ; any ; tool box/tool boxes ;
spanner ; 1f527 ; m ; floor ; - ; wrench/wrenches ;
ladder ; 1fa9c ; l ; floor ; - ;  ; stepladder
bucket ; 1faa3 ; m ; floor ; any ; pail ;
screwdriver ; 1fa9b ; m ; floor ; - ;
axe ; 1fa93 ; m ; floor ; - ; hatchet ; ax/axes
padlock ; 1f512 ; s ; floor ; - ;  ; lock
# a street, on
car ; 1f697 ; l ; floor ; any ; automobile, motor car ;
bus/buses ; 1f68c ; l ; floor ; - ; city bus/city buses ;
bicycle ; 1f6b2 ; m ; floor ; - ; bike ; pushbike
traffic light ; 1f6a6 ; m ; floor ; - ; traffic signal, stoplight ; street light
truck ; 1f69a ; l ; floor ; - ; lorry/lorries, delivery truck ;
tram ; 1f68b ; l ; floor ; - ; streetcar ; trolley
scooter ; 1f6f5 ; m ; floor ; any ; motor scooter ; moped, motorbike
stop sign ; 1f6d1 ; m ; floor ; red ;  ; traffic sign
# a farm, on
cow ; 1f404 ; l ; floor ; - ; dairy cow ;
pig ; 1f416 ; m ; floor ; pink ;  ; hog, piglet
horse ; 1f40e ; l ; floor ; brown ;  ; pony/ponies, stallion
sheep/sheep ; 1f411 ; m ; floor ; - ;  ; lamb, ewe, ram
rooster ; 1f413 ; m ; floor ; - ; cockerel ; hen, chicken
tractor ; 1f69c ; l ; floor ; - ; farm tractor ;
goat ; 1f410 ; m ; floor ; - ;  ; billy goat
duck ; 1f986 ; s ; floor ; - ; mallard ;
# a beach, on
parasol ; 26f1 ; l ; floor ; - ; beach umbrella, sunshade ; umbrella
palm tree ; 1f334 ; l ; floor ; - ; palm ; coconut palm
crab ; 1f980 ; s ; floor ; - ;
shell ; 1f41a ; s ; floor ; - ; seashell, sea shell ;
sailing boat ; 26f5 ; m ; floor ; - ; sailboat, yacht ; boat
volleyball ; 1f3d0 ; s ; floor ; - ;
ice cream ; 1f366 ; s ; floor ; - ; ice cream cone ; ice-cream cone, ice-cream, cone
coconut ; 1f965 ; s ; floor ; - ;
# the sea, under
shrimp/shrimp ; 1f990 ; s ; air ; - ; prawn ; shrimps/shrimps
dolphin ; 1f42c ; m ; air ; blue ;
whale ; 1f433 ; l ; air ; - ;
octopus/octopuses ; 1f419 ; m ; air ; - ;  ; octopi/octopi
shark ; 1f988 ; m ; air ; - ;
turtle ; 1f422 ; m ; air ; - ; sea turtle ; tortoise
anchor ; 2693 ; m ; floor ; - ; ship's anchor ;
squid/squid ; 1f991 ; m ; air ; - ;  ; squids/squids
# a forest, in
mushroom ; 1f344 ; s ; floor ; - ; toadstool ;
deer/deer ; 1f98c ; l ; floor ; - ;  ; stag
fox/foxes ; 1f98a ; m ; floor ; orange ;  ; vixen
owl ; 1f989 ; s ; air ; - ;
squirrel ; 1f43f ; s ; floor ; - ;  ; chipmunk
bear ; 1f43b ; m ; floor ; brown ;  ; grizzly/grizzlies
hedgehog ; 1f994 ; s ; floor ; - ;
tent ; 26fa ; l ; floor ; - ; camping tent ;
# a park, in
dog ; 1f415 ; m ; floor ; - ;  ; puppy/puppies, doggy/doggies, pup
sunflower ; 1f33b ; m ; floor ; yellow ;
butterfly/butterflies ; 1f98b ; s ; air ; - ;
balloon ; 1f388 ; m ; air ; any ; toy balloon ;
fountain ; 26f2 ; l ; floor ; - ; water fountain ;
ladybird ; 1f41e ; s ; floor ; red ; ladybug ;
bee ; 1f41d ; s ; air ; - ; honeybee ; bumblebee, wasp
tulip ; 1f337 ; m ; floor ; - ;
# the savanna, on
elephant ; 1f418 ; l ; floor ; grey ;
giraffe ; 1f992 ; l ; floor ; - ;
lion ; 1f981 ; m ; floor ; - ;
zebra ; 1f993 ; m ; floor ; - ;
monkey ; 1f412 ; m ; floor ; brown ;  ; ape
rhinoceros/rhinoceroses ; 1f98f ; l ; floor ; grey ; rhino ;
crocodile ; 1f40a ; m ; floor ; green ;  ; croc, alligator
camel ; 1f42a ; l ; floor ; - ; dromedary/dromedaries ;
# a snowy hill, on
snowman/snowmen ; 26c4 ; l ; floor ; white ;
penguin ; 1f427 ; m ; floor ; - ;
sledge ; 1f6f7 ; m ; floor ; - ; sled, toboggan ; sleigh
gift ; 1f381 ; m ; floor ; - ; wrapped gift, gift box/gift boxes ; parcel
Christmas tree ; 1f384 ; l ; floor ; green ; decorated fir tree ; xmas tree
coat ; 1f9e5 ; m ; floor ; any ; winter coat ; overcoat, jacket
ice skate ; 26f8 ; m ; floor ; - ;  ; skate
seal ; 1f9ad ; m ; floor ; - ;  ; sea lion
# a stage, on
guitar ; 1f3b8 ; l ; floor ; any ; electric guitar ;
drum ; 1f941 ; m ; floor ; - ; snare drum ;
violin ; 1f3bb ; m ; floor ; - ; fiddle ;
microphone ; 1f3a4 ; s ; floor ; - ; mic ; mike
trumpet ; 1f3ba ; m ; floor ; - ;  ; bugle
saxophone ; 1f3b7 ; m ; floor ; - ; sax/saxes ;
accordion ; 1fa97 ; m ; floor ; - ; squeezebox/squeezeboxes ;
piano ; 1f3b9 ; m ; floor ; - ;  ; piano keyboard
# a sports hall, in
basketball ; 1f3c0 ; s ; floor ; orange ;
football ; 26bd ; s ; floor ; - ; soccer ball ;
trophy/trophies ; 1f3c6 ; m ; floor ; - ;
boxing glove ; 1f94a ; m ; floor ; any ;  ; glove
medal ; 1f3c5 ; s ; wall ; - ; sports medal ;
running shoe ; 1f45f ; m ; floor ; any ; trainer, sneaker ; shoe
dartboard ; 1f3af ; m ; wall ; - ; dart board ;
stopwatch/stopwatches ; 23f1 ; s ; floor ; - ;  ; stop watch/stop watches
# a café, in
croissant ; 1f950 ; s ; floor ; - ;
cookie ; 1f36a ; s ; floor ; - ; biscuit ;
doughnut ; 1f369 ; s ; floor ; - ; donut ;
slice of pizza/slices of pizza ; 1f355 ; m ; floor ; - ; pizza slice ; pizza
hamburger ; 1f354 ; s ; floor ; - ; burger, cheeseburger ;
hot dog ; 1f32d ; m ; floor ; - ; hotdog ;
sandwich/sandwiches ; 1f96a ; m ; floor ; - ; toasted sandwich/toasted sandwiches ;
wine glass/wine glasses ; 1f377 ; m ; floor ; - ; glass of wine/glasses of wine ;
"""
PRESENCE = (.60, .52, .44, .37, .30, .24, .19, .15)    # probability by rank within the setting
TEMPTING = (.62, .55, .47, .38, .30, .23, .17, .12)    # how strongly an absent one suggests itself
TINTS = {"red": 0, "yellow": 50, "green": 125, "blue": 215, "purple": 275}            # hues in degrees
COLOURS = (*TINTS, "orange", "pink", "brown", "grey", "white")   # an answer is one of these
SIDES = {"s": (40, 52), "m": (52, 70), "l": (68, 92)}   # pixels, before perspective
LETTERED = {"1f4c5", "23f0", "23f1"}    # with writing or hands: not drawn as in a mirror
# Drawings that a style draws too differently from the others, or in colours that no tint can change.
UNFIT = {("emojione", code) for code in ("260e", "1f3b8", "1f45f", "26fa", "1f392", "26f8", "1f6cf")}
UNFIT |= {("noto2017", code) for code in ("1f4bb", "1f3c0", "1f418", "26c4", "1f455", "1f462")}
UNFIT |= {("flat", "1f45f")}


@dataclass(frozen=True)
class Thing:
    name: str
    setting: str
    code: str
    size: str
    where: str
    colour: str
    names: tuple     # (singular, plural) as they are said, its own first
    understood: tuple  # more of them that are only read


@dataclass(frozen=True)
class Setting:
    name: str        # street
    article: str     # a street
    preposition: str  # on
    things: tuple    # names, the most typical first


def plural(word):
    """The regular plural of a noun, or of a phrase by its last word."""
    if re.search(r"(s|x|ch|sh)$", word):
        return word + "es"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + "s"


def both(entry):
    """`knife/knives` or `spoon` -> (singular, plural)."""
    one, _, many = entry.partition("/")
    return one, many or plural(one)


@cache
def _read():
    """TABLE -> ({setting: Setting}, {thing: Thing})."""
    settings, things, article, preposition = {}, {}, "", ""
    for line in TABLE.strip().splitlines():
        if line.startswith("# "):
            article, preposition = line[2:].split(", ")
            setting = article.split(" ", 1)[1]
            settings[setting] = Setting(setting, article, preposition, ())
            continue
        own, code, size, where, colour, spoken, *understood = re.split(" ;(?: |$)", line)
        names, more = (tuple(both(name) for name in filter(None, re.split(", ", some)))
                       for some in (f"{own}, {spoken}", "".join(understood)))
        thing = Thing(names[0][0], setting, code, size, where, colour, names, more)
        things[thing.name] = thing
        old = settings[setting]
        settings[setting] = Setting(setting, article, preposition, (*old.things, thing.name))
    return settings, things


SETTINGS, THINGS = _read()
TYPES = tuple(THINGS)
