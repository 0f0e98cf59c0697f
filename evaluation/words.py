"""The nouns of a caption without a package or a download, for eval_hallu.py's CHAIR and AMBER.

    words.nouns("A dog chases two mice.")     ["A", "dog", "chase", ...]: words that may be nouns, for AMBER
    words.lemmas("Dogs on the BEACHES")       ["dog", "on", "the", "beach"]: for CHAIR's scorer objhal
    words.singulars("Dogs on the BEACHES")    the same as the first CHAIR knew it, for its scorer original
    words.phrase("red traffic lights")        an object out of an extractor's reply: words, and runs of nouns
    words.nltk_nouns, nltk_lemmas             the official functions, where NLTK and its data are

The official scorers cut text with NLTK's tokenizer, drop what its part-of-speech tagger calls no noun, and
look up lemmas in WordNet. Here rules do all three; words that no scorer's vocabulary holds need not come out
right. The departures:
  1. No tagger. A word counts unless its neighbours show a verb ("to drink", "they watch") or an adjective;
     `can` and `hot` never count, `cans` do. Words like "the" stay, since no vocabulary holds them.
  2. The official tagger learnt from newspapers, and takes many a noun that is rare there for an adjective
     where "next to" follows ("a sofa next to a bed"). So do we, but for a list of nouns that fill newspapers.
  3. Plurals come from rules and lists. WordNet's oddities that reach a vocabulary are kept: "vases" gives
     "vas", and plurals of words that WordNet does not know ("hairdryers", "smartphones") stay as they are.
  4. A sentence ends at a full stop that is not an abbreviation's; NLTK learnt its abbreviations from text.
bench/nouns.py prints how far the scores, and these lemmas, are from the official ones.
"""
if __name__ == "__main__":
    exit("A part of eval_hallu.py; run: python eval_hallu.py --help")

import re
from functools import lru_cache
from itertools import pairwise

from data import UserError


def _set(text):
    return set(text.split())


def rules(text):
    """[(an ending, what becomes of it)], or other pairs, out of a text of ENDING:WHAT with blanks between."""
    return [rule.rsplit(":", 1) for rule in text.split()]


# ---- tokens ----
ABBREVIATIONS = _set("mr mrs ms dr st jr sr vs etc prof gen col inc ltd co corp no dept fig approx ave blvd "
                     "jan feb mar apr aug sept oct nov dec")
CLITICS = r"(?i)(?<=[^' ])('ll|'re|'ve|n't|'s|'m|'d|')$"
GLUED = _set("cannot gonna gotta wanna gimme lemme")                                        # can|not
SPLIT = r"""(\.{2,}|--|(?<=\.)'|[;@\#$%&?!*()\[\]{}<>"“”«»„`’‘]|''|[:,](?!\d))"""


def tokens(text):
    """Words and punctuation marks in order, as NLTK's word_tokenize cuts them."""
    found, chunks = [], text.split()
    for chunk, following in pairwise([*chunks, ""]):
        listed = bool(re.fullmatch(r"\d+\.", chunk)) and following[:1].islower()                # 1. first
        parts = [part for part in re.split(SPLIT, chunk) if part]
        for i, part in enumerate(parts):
            # A stop is cut off where a sentence ends, closing quotes and brackets aside.
            closing = all(mark in ")]}>\"'”’''" for mark in parts[i + 1:])
            ends = not following or not listed and not _abbreviation(part)
            if closing and ends and re.search(r"[^.]\.$", part):
                found += [*_cut(part[:-1], i), "."]
            else:
                found += _cut(part, i)
    return found


def _cut(word, place):
    """A piece of a chunk -> its tokens: an opening quote, the word, a clitic."""
    if word == '"':
        return ["''" if place else "``"]
    found = []
    if word[:1] == "'" and len(word) > 2 and word[1:].lower() not in ("re", "ve", "ll"):
        found.append("'")                                                       # 'quoted
        word = word[1:]
    clitic = re.search(CLITICS, word)
    if clitic:
        word = word[:clitic.start()]
    if word.lower() in GLUED:
        found += [word[:3], word[3:]]
    elif word:
        found.append(word)
    return found + [clitic[0]] if clitic else found


def _abbreviation(word):
    """U.S. and p.m., an initial, a listed one."""
    return "." in word[:-1] or (len(word) == 2 and word[0].isalpha()) or word[:-1].lower() in ABBREVIATIONS


# ---- lemmas ----
IRREGULAR = dict(rules("""children:child grandchildren:grandchild brethren:brother
oxen:ox oxens:oxen geese:goose mice:mouse lice:louse dice:die feet:foot teeth:tooth men:men vases:vas axes:ax
cookies:cooky uses:us doggies:doggy leaves:leaf quizzes:quiz busses:bus taxies:taxi menus:menu emus:emu
zebus:zebu gnus:gnu less:le has:ha was:wa as:a us:u pass:pas"""))
KEEP = _set("""scissors clothes christmas lens gas canvas atlas rhinoceros news series perhaps always towards
iris yes pancreas pajamas tennis this his its is various famous""")
# Compounds, brands and misspellings that vocabularies hold and WordNet does not: no lemma for their plural.
UNLISTED = _set("""bedsheet bluejay cann cathole closestool cooktop doghole e-book earing ebook electrombile
firetruck hairdryer iphone kiwifruit lenovo longboard macbook netbook paddleboat paraglider pissoir pitbull
riverboat rpoe sailboard sanitizer scoon seegull shortboard showerpuff skimboard smartphone solider stovetop
streetlamp teddybear televison waterfont air-conditioning biker coworker brindle baconic children hot potted
rpo""")


def _first(endings, word):
    """A word by the first of such rules whose ending it has."""
    for ending, to in endings:
        found, fits = re.subn(ending, to, word)
        if fits:
            return found
    return word


# In this order: men; -ies, -oes, -ches and -is that come from -ie, -oe, -che and -i; what stays; -ves; and
# sibilants that take -es, since every other -ses and -zes loses only its -s (horses, sizes).
LEMMAS = rules(r"""
((?:wo|police|fire|sports|gentle|snow|fisher|sales|business|camera|work|service|crafts|door|post|mail)m)en$:\1an
((?:fresh|horse|country|chair|weather|spokes|ferry|milk|patrol|gun|bar|noble|boat|states|dober|clergy)m)en$:\1an
((?:congress|stunt|lines|trades|repair)m)en$:\1an
^(tie|necktie|pie|magpie|collie|pixie|movie|selfie|brownie|zombie|calorie|genie|prairie|birdie|hippie)s$:\1
^(rookie|auntie|hoodie|smoothie|veggie|lie|die|shoe|snowshoe|horseshoe|canoe|toe|oboe|hoe|foe|tiptoe)s$:\1
^(headache|mustache|moustache|avalanche|niche|cache|quiche|ache|toothache|ski|taxi|kiwi|bikini|safari)s$:\1
^(corgi|broccoli|zucchini|martini|khaki|yeti|panini|rabbi|tsunami|sari|chili|mini)s$:\1
(?:ss|us|is)$:\g<0>
^(kni|wi|li|midwi|housewi|pocketkni|penkni)ves$:\1fe
^(lea|loa|shel|wol|hal|cal|scar|hoo|el|thie|sel|shea|dwar|bookshel|kerchie|handkerchie|behal)ves$:\1f
^(whar|tur|bee|ree|ser)ves$:\1f
(..)ies$:\1y oes$:o
(ss|x|sh|ch|zz|tz|bus|lens|gas|canvas|atlas|iris|virus|octopus|cactus|walrus|campus|bonus|chorus)es$:\1
(circus|crocus|mus|status|trellis|rhinoceros|christmas|tennis)es$:\1
s$:""")


@lru_cache(maxsize=65536)
def lemma(word):
    """The noun that a word is a form of, as WordNet has it; case matters there, so "Dogs" has none."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) < 3 or not word.islower() or word in KEEP:
        return word
    found = _first(LEMMAS, word)
    return word if found in UNLISTED else found


# The plurals of the first CHAIR, which knew no dictionary.
SINGULARS = rules(r"""
(?:dogg|coll|cook|bird|hoag|roo?k|zomb|pix|aunt|vegg|goon|cut|newb|bean)ies$:\g<0>
^(?:scissors|series|species|news|headquarters|pliers|shears|measles|innings|gallows)$:\g<0>
children$:child geese$:goose feet$:foot teeth$:tooth men$:man leaves$:leaf loaves$:loaf people$:person
oxen$:ox oxens$:oxs axes$:axe moves$:move kine$:cow brethren$:brother opera$:opus shoes$:shoe oes$:o
buses$:bus movies$:movie erves$:erve
(.)ae$:\1a ([octpvir])i$:\1us (cris|test)es$:\1is ([ml])ice$:\1ouse (x|ch|ss|sh)es$:\1 ([^aeiouy]|qu)ies$:\1y
([aeo]l|[^d]ea|ar)ves$:\1f ([nlw]i)ves$:\1fe ([lr])ves$:\1f ([aeost]|ti|hi|si)ves$:\1ve ([^f])ves$:\1fe
(ba|analy|the)ses$:\1sis ([hdronbp]|cl)oses$:\1ose oses$:osis ([ti])a$:\1um s$:""")


@lru_cache(maxsize=65536)
def singular(word):
    """The singular that the first CHAIR's rules make of any word: "buses" and "glasses" come out right, "bus"
    gives "bu" and "ties" "ty", so they do not count as mentions there."""
    return singular(word[:-1]) + "'s" if word.endswith("'") else _first(SINGULARS, word)


def lemmas(text):
    """Every token of a text, lower-cased, as a noun in the singular: for CHAIR's scorer `objhal`."""
    return [lemma(word) for word in tokens(text.lower())]


def singulars(text):
    """The same with the first CHAIR's singulars: for its scorer `original`."""
    return [singular(word) for word in tokens(text.lower())]


# ---- nouns ----
BEFORE_A_VERB = _set("can could may might will would shall should must wo ca cannot 'll i you he she it we "
                     "they who which")
NO_INFINITIVE = _set("next close closer adjacent due addition similar attached connected near leading leads "
                     "belonging proximity relation contrast compared opposite")                 # ... to water
# Nouns of captions that are verbs too.
VERBS = _set("""bear board bridge brush cage camp cash cook cream cup dock drain draw drink duck fence file
fish flag flower fork frame glove grill ground guard hang hold house ice iron ladder leave light line lock
lounge mask match milk mirror monitor net note open pack pad paddle paint park pen phone picture pipe plant
plate play plug pot race rack range rest ring ride rock row saddle sail shell shelter ship shop shovel sign
signal sink skate ski sled snack snow sound spoon spray stage star stone string support surf switch table
tap tape telephone tie toast tour track train view walk wall watch water wave""")
# The second word is the thing, the first says which.
OF_ITS_KIND = dict(rules("""laptop:computer notebook:computer ski:resort wine:glass
broccoli:toppings"""))
# Adjectives too, or ending like them (deep, nearest): before a verb the official tagger sees no noun here.
LIKE_ADJECTIVES = _set("light individual forest sheep")
IN_THE_NEWS = _set("""person people man woman house home building car truck bus train plane road street water
sea island mountain beach board line ground floor door wall sign phone telephone computer television camera
coffee horse dog court stage glass desk ball football range path apple chair drug bank bill""")


def _counts(word, two_before, before, after, two_after):
    """Whether a word is to count as a noun, by the words around it, lower-cased."""
    if word in ("can", "hot") or after == OF_ITS_KIND.get(word, "-"):
        return False
    if word in LIKE_ADJECTIVES and re.search(r"...ing$|[^ia]s$", after):           # a sheep grazing, appears
        return False
    if word in VERBS:
        if before in BEFORE_A_VERB or before == "to" and two_before not in NO_INFINITIVE:
            return False
    rare = word == lemma(word) and word not in IN_THE_NEWS
    return not (rare and before in ("a", "an", "the") and (after, two_after) == ("next", "to"))


def nouns(text):
    """The words of a text that may be nouns, in the singular and in order, repeats included: for AMBER."""
    words = tokens(text)
    low = ["", "", *map(str.lower, words), "", ""]
    places = zip(words, low, low[1:], low[3:], low[4:], strict=False)
    return [lemma(word) for word, *around in places if _counts(word, *around)]


# What comes before the noun in an object's name, and what the official tagger takes for that.
ADJECTIVES = _set("""red blue green yellow black white brown grey gray pink purple small large big tall short
long old new young little tiny huge wide narrow round square wooden metallic open closed empty full clean hot
cold wet dry bright dark beautiful colorful various several many two three four five other different same
first second third top present remote modern electric electronic parked white-and-black umbrellas utensils
senses others""")
BREAKS = _set("a an the of with in on at to for from by near and or is are 's")


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


# ---- NLTK ----
@lru_cache(maxsize=1)
def _nltk():
    """NLTK's tokenizer, tagger and lemmatizer; imported here, since it is slow and no dependency."""
    try:
        import nltk
        lemmatize = nltk.stem.WordNetLemmatizer().lemmatize
        nltk.pos_tag(nltk.word_tokenize("two dogs"))
        lemmatize("dogs")
    except ImportError as error:
        raise UserError("NLTK is not installed; pip install nltk, or take the nouns `builtin`") from error
    except LookupError as error:
        raise UserError("NLTK's data are not installed; python -m nltk.downloader punkt_tab wordnet "
                        "averaged_perceptron_tagger_eng, or take the nouns `builtin`") from error
    return nltk.word_tokenize, nltk.pos_tag, lemmatize


def nltk_nouns(text):
    """The official extraction for AMBER. Raises UserError if NLTK or its data are missing."""
    tokenize, tag, lemmatize = _nltk()
    return [lemmatize(word) for word, kind in tag(tokenize(text)) if kind.startswith("NN")]


def nltk_lemmas(text):
    """The official words for Object HalBench without an extractor. Raises UserError as above."""
    tokenize, _, lemmatize = _nltk()
    return [lemmatize(word) for word in tokenize(text.lower())]
