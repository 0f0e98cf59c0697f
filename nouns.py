"""The nouns of a caption without a package or a download, for CHAIR and AMBER; a file of its own because it is about
English and not about measures.

    nouns.nouns("A dog chases two mice.")       ["A", "dog", "mouse"]: may be nouns; for metrics.amber
    nouns.lemmas("Dogs on the BEACHES")         ["dog", "on", "the", "beach"]: for metrics.chair, scorer objhal
    nouns.singulars("Dogs on the BEACHES")      the same with the plurals that the first CHAIR understood
    nouns.phrase("red traffic lights")          one object out of an extractor's reply: its words, its runs of nouns
    nouns.nltk_nouns(), nouns.nltk_lemmas()     the official functions, where NLTK and its data are installed

The official scorers cut text with NLTK's tokenizer, drop what its part-of-speech tagger calls no noun, and look up
lemmas in WordNet. Here rules stand for all three. Words that no scorer's vocabulary holds need not come out right.

Departures from the official extraction:
  1. No tagger. A word counts unless its neighbours show a verb ("to drink", "a man watches the sea") or an adjective;
     `can` and `hot` are never nouns, `cans` are. Words such as "the" are kept, since no vocabulary holds them.
  2. The official tagger learnt from newspapers and takes many a noun that is rare there for an adjective where
     "next to" follows ("a sofa next to a bed"). So do we, with a list of nouns that newspapers are full of.
  3. Plurals come from rules and lists. WordNet's oddities that reach a vocabulary are kept: "vases" gives "vas", and
     the plurals of words that WordNet does not know ("hairdryers", "smartphones") stay what they are.
  4. Sentences end at a full stop that is no abbreviation's; NLTK learnt its abbreviations from text.
"""
import re
from functools import lru_cache


class NounError(ValueError):
    """NLTK or its data are absent: one sentence with the mend."""


# ---------------------------------------------------------------------------------------------- tokens
ABBREVIATIONS = set("mr mrs ms dr st jr sr vs etc prof gen col inc ltd co corp no dept fig approx ave blvd "
                    "jan feb mar apr aug sept oct nov dec".split())
CLITICS = re.compile(r"(?i)(?<=[^' ])('ll|'re|'ve|n't|'s|'m|'d|')$")
GLUED = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3}          # can|not
SPLIT = re.compile(r"""(\.{2,}|--|[;@\#$%&?!*()\[\]{}<>"“”«»„`’‘]|''|[:,](?!\d))""")


def tokens(text):
    """Words and punctuation marks in order, as NLTK's word_tokenize cuts them."""
    found = []
    chunks = text.split()
    for place, chunk in enumerate(chunks):
        parts = [part for part in SPLIT.split(chunk) if part]
        for i, part in enumerate(parts):
            # A stop is cut off where a sentence ends, closing quotes and brackets aside.
            closing = all(p in ")]}>\"'”’''" for p in parts[i + 1:])
            last = closing and place == len(chunks) - 1
            stop = len(part) > 1 and part.endswith(".") and closing and (last or not _abbreviation(part))
            word = part[:-1] if stop else part
            if word[:1] == "'" and len(word) > 2 and word[1:].lower() not in ("re", "ve", "ll"):
                found.append("'")                                               # 'quoted
                word = word[1:]
            tail = []
            if match := CLITICS.search(word):
                word, tail = word[:match.start()], [match[0]]
            cut = GLUED.get(word.lower())
            if word == '"':
                word = "''" if i else "``"
            found += ([word[:cut], word[cut:]] if cut else [word] if word else []) + tail + ["."] * stop
    return found


def _abbreviation(word):
    """U.S. and p.m., an initial, a listed one."""
    return "." in word[:-1] or (len(word) == 2 and word[0].isalpha()) or word[:-1].lower() in ABBREVIATIONS


# ---------------------------------------------------------------------------------------------- lemmas
IRREGULAR = {
    "children": "child", "grandchildren": "grandchild", "brethren": "brother", "oxen": "ox", "oxens": "oxen",
    "geese": "goose", "mice": "mouse", "lice": "louse", "dice": "die", "feet": "foot", "teeth": "tooth",
    "men": "men", "vases": "vas", "axes": "ax", "cookies": "cooky", "uses": "us", "doggies": "doggy",
    "leaves": "leaf", "quizzes": "quiz", "busses": "bus", "taxies": "taxi", "menus": "menu", "emus": "emu",
    "zebus": "zebu", "gnus": "gnu", "less": "le", "has": "ha", "was": "wa", "as": "a", "us": "u", "pass": "pas"}
KEEP = set("""scissors clothes christmas lens gas canvas atlas rhinoceros news series perhaps always towards iris yes
pancreas pajamas tennis this his its is various famous""".split())
VES = {"kni": "knife", "wi": "wife", "li": "life", "midwi": "midwife", "housewi": "housewife", "lea": "leaf",
       "loa": "loaf", "shel": "shelf", "wol": "wolf", "hal": "half", "cal": "calf", "scar": "scarf", "hoo": "hoof",
       "el": "elf", "thie": "thief", "sel": "self", "shea": "sheaf", "bookshel": "bookshelf", "dwar": "dwarf",
       "pocketkni": "pocketknife", "penkni": "penknife", "kerchie": "kerchief", "handkerchie": "handkerchief",
       "behal": "behalf", "whar": "wharf", "tur": "turf", "bee": "beef", "ree": "reef", "ser": "serf"}
# -ies, -oes, -ches and -is that come from -ie, -oe, -che and -i.
ONLY_S = set("""ties neckties pies magpies collies pixies movies selfies brownies zombies calories genies prairies birdies
hippies rookies aunties hoodies smoothies veggies lies dies shoes snowshoes horseshoes canoes toes oboes hoes foes tiptoes
headaches mustaches moustaches avalanches niches caches quiches aches toothaches skis taxis kiwis bikinis safaris corgis
broccolis zucchinis martinis khakis yetis paninis rabbis tsunamis saris chilis minis""".split())
# Singulars in a sibilant that takes -es; every other -ses and -zes loses only its -s (horses, sizes).
TAKES_ES = re.compile(r"(?:ss|x|sh|ch|zz|tz|bus|lens|gas|canvas|atlas|iris|virus|octopus|cactus|walrus|campus|"
                      r"bonus|chorus|circus|crocus|mus|status|trellis|rhinoceros|christmas|tennis)$")
MEN = re.compile(r"(?:wo|police|fire|sports|gentle|snow|fisher|sales|business|camera|work|service|crafts|door|post|"
                 r"mail|fresh|horse|country|chair|weather|spokes|ferry|milk|patrol|gun|bar|noble|boat|states|dober|"
                 r"clergy|congress|stunt|lines|trades|repair)men$")
# Compounds, brands and misspellings that vocabularies hold and WordNet does not: no lemma for their plural.
UNLISTED = set("""bedsheet bluejay cann cathole closestool cooktop doghole e-book earing ebook electrombile firetruck
hairdryer iphone kiwifruit lenovo longboard macbook netbook paddleboat paraglider pissoir pitbull riverboat rpoe
sailboard sanitizer scoon seegull shortboard showerpuff skimboard smartphone solider stovetop streetlamp teddybear
televison waterfont air-conditioning biker coworker brindle""".split())


@lru_cache(maxsize=65536)
def lemma(word):
    """The noun that a word is a form of, as WordNet has it; case matters there, so "Dogs" has none."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if MEN.search(word):
        return word[:-2] + "an"
    if not word.islower() or len(word) < 3 or not word.endswith("s") or word in KEEP or word.endswith(("ss", "us")):
        return word
    if word.endswith("ves") and word[:-3] in VES:
        return VES[word[:-3]]
    if word in ONLY_S:
        single = word[:-1]
    elif word.endswith("is"):
        return word
    elif word.endswith("ies") and len(word) > 4:
        single = word[:-3] + "y"
    elif word.endswith("oes") or TAKES_ES.search(word[:-2]) and word.endswith("es"):
        single = word[:-2]
    elif re.search(r"[bcdfghkmtwy]ses$", word):                      # doubled: "adultses", as WordNet undoes it
        return lemma(word[:-2])
    else:
        single = word[:-1]
    return word if single in UNLISTED else single


# The plurals of the first CHAIR, which knew no dictionary: the first rule that fits, at a word's end.
SINGULAR = [(re.compile(pattern), to) for pattern, to in (
    (r"(?:dogg|coll|cook|bird|hoag|roo?k|zomb|pix|aunt|vegg|goon|cut|newb|bean)ies$", None),     # stay plural
    (r"^(?:scissors|series|species|news|headquarters|pliers|shears|measles|innings|gallows)$", None),
    (r"children$", "child"), (r"geese$", "goose"), (r"feet$", "foot"), (r"teeth$", "tooth"), (r"men$", "man"),
    (r"leaves$", "leaf"), (r"loaves$", "loaf"), (r"people$", "person"), (r"oxen$", "ox"), (r"^oxens$", "oxs"),
    (r"axes$", "axe"), (r"moves$", "move"), (r"kine$", "cow"), (r"brethren$", "brother"), (r"opera$", "opus"),
    (r"(.)ae$", r"\1a"), (r"([octpvir])i$", r"\1us"), (r"(cris|test)es$", r"\1is"), (r"shoes$", "shoe"),
    (r"oes$", "o"), (r"buses$", "bus"), (r"([ml])ice$", r"\1ouse"), (r"(x|ch|ss|sh)es$", r"\1"),
    (r"movies$", "movie"), (r"([^aeiouy]|qu)ies$", r"\1y"), (r"([aeo]l|[^d]ea|ar)ves$", r"\1f"),
    (r"([nlw]i)ves$", r"\1fe"), (r"erves$", "erve"), (r"([lr])ves$", r"\1f"), (r"([aeost]|ti|hi|si)ves$", r"\1ve"),
    (r"([^f])ves$", r"\1fe"), (r"(ba|analy|the)ses$", r"\1sis"), (r"([hdronbp]|cl)oses$", r"\1ose"),
    (r"oses$", "osis"), (r"([ti])a$", r"\1um"), (r"s$", ""))]


@lru_cache(maxsize=65536)
def singular(word):
    """The singular that the first CHAIR's rules make of any word: "buses" and "glasses" come out right, "bus"
    gives "bu" and "ties" "ty", so they are no mentions there."""
    if word.endswith("'"):
        return singular(word[:-1]) + "'s"
    for pattern, to in SINGULAR:
        if pattern.search(word):
            return word if to is None else pattern.sub(to, word)
    return word


def lemmas(text):
    """Every token of a text, lower-cased, as a noun in the singular: for CHAIR's scorer `objhal`."""
    return [lemma(word) for word in tokens(text.lower())]


def singulars(text):
    """The same with the first CHAIR's singulars: for its scorer `original`."""
    return [singular(word) for word in tokens(text.lower())]


# ---------------------------------------------------------------------------------------------- which words are nouns
MODALS = set("can could may might will would shall should must wo ca cannot 'll".split())
SUBJECTS = set("i you he she it we they who which".split())
STAYS_NOUN_AFTER_TO = set("next close closer adjacent due addition similar attached connected near leading leads "
                          "belonging proximity relation contrast compared opposite".split())
AFTER_A_VERB = set("a an the his her its their some several at on over through across along down with by".split())
# Nouns of captions that are verbs too.
VERBS = set("""bat bear bill board bridge brush buoy cage camp can cash clock cook cord core court cream cup curtain desert
dock drain draw drink duck egg fan fence file fish flag floor flower fork frame glove grill ground guard hang hat hold hose
house ice iron juice kite lamp leave light line lock lounge mask mat match milk mirror monitor mushroom net note open pack
pad paddle paint pan paper park path pen phone pipe plant plate play plug pole pot quilt race rack rail range rest ring
ride rock roof rope row saddle sail sandwich shampoo shelf shell shelter ship shop shore shovel sign signal sink skate ski
sled snack snow soap sound spade spoon sponge spray stage star stone stool string support surf switch table tank tap tape
telephone tie tire toast tour toy track train trim tub turtle tv umbrella vase view walk wall warp watch water wave wire
worm yacht""".split())
ANIMATE = set("man woman boy girl child person player individual someone everyone dog cat horse bird he she it who "
              "skier surfer rider lady guy kid".split())
SHADES = set("blue green brown gray grey pink yellow purple red orange tan colored coloured".split())
IN_THE_NEWS = set("""person people man woman house home building car truck bus train plane road street water sea island
mountain beach board line ground floor door wall sign phone telephone computer television camera coffee horse dog court
stage glass desk ball football range path apple chair drug bank bill""".split())


def _is_noun(words, i):
    """Whether the i-th token is to count; the words of a vocabulary are what matters here."""
    word, before, after = words[i], words[i - 1].lower() if i else "", words[i + 1].lower() if i + 1 < len(words) else ""
    two_before = words[i - 2].lower() if i > 1 else ""
    if word in ("can", "hot"):
        return False
    single = lemma(word)
    if single in VERBS and word == single:
        if before in MODALS or before in SUBJECTS:
            return False
        if before == "to" and two_before not in STAYS_NOUN_AFTER_TO:
            return False
    if single in VERBS and word != single and before in SUBJECTS | ANIMATE and after in AFTER_A_VERB:
        return False                                                            # a man watches the sea
    if word == "light" and after in SHADES:
        return False
    return not (after == "next" and before in ("a", "an", "the") and word == single and word not in IN_THE_NEWS
                and words[i + 2:i + 3] == ["to"])


def nouns(text):
    """The words of a text that may be nouns, in the singular and in order, repeats included: for AMBER."""
    words = tokens(text)
    return [lemma(word) for i, word in enumerate(words) if _is_noun(words, i)]


# Words that stand before the noun in an object's name, and those that the official tagger takes for such alone.
ADJECTIVES = set("""red blue green yellow black white brown grey gray pink purple small large big tall short long old new
young little tiny huge wide narrow round square wooden metallic open closed empty full clean hot cold wet dry bright dark
beautiful colorful various several many two three four five other different same first second third top present remote
modern electric electronic parked white-and-black umbrellas utensils senses others""".split())
BREAKS = set("a an the of with in on at to for from by near and or is are 's".split())


def phrase(text):
    """One object's name out of an extractor's reply -> its words in the singular, and its runs of nouns."""
    runs, singles = [[]], []
    for word in tokens(text.lower()):
        singles.append(lemma(word))
        leading = not runs[-1] and word in ADJECTIVES                       # a top oven, but a stove top oven
        if leading or word in BREAKS or word.isascii() and not re.search("[a-z]", word):
            runs.append([])
        else:
            runs[-1].append(singles[-1])
    return singles, [" ".join(run) for run in runs if run]


# ---------------------------------------------------------------------------------------------- NLTK
def _nltk():
    """NLTK, after a try of what is needed of it: import here, because it is slow and no dependency."""
    try:
        import nltk
        nltk.pos_tag(nltk.word_tokenize("two dogs"))
        nltk.stem.WordNetLemmatizer().lemmatize("dogs")
    except ImportError as error:
        raise NounError("NLTK is not installed; pip install nltk, or use the nouns `builtin`.") from error
    except LookupError as error:
        raise NounError("NLTK's data are not installed; python -m nltk.downloader punkt_tab "
                        "averaged_perceptron_tagger_eng wordnet, or use the nouns `builtin`.") from error
    return nltk


def nltk_nouns():
    """-> the official extraction for AMBER, a function text -> nouns. NounError where NLTK or its data are absent."""
    nltk = _nltk()
    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
    return lambda text: [lemmatize(word) for word, tag in nltk.pos_tag(nltk.word_tokenize(text)) if tag[:2] == "NN"]


def nltk_lemmas():
    """-> the official words of Object HalBench, a function text -> lemmas. NounError as above."""
    nltk = _nltk()
    lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
    return lambda text: [lemmatize(word) for word in nltk.word_tokenize(text.lower())]
