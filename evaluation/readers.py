"""What a text says: yes or no, a rating, a list of objects. A reader returns None if it cannot read.

    readers.yes_no("There isn't a dog.", "Is there a dog in the image?")    "no"
    readers.rating("**Rating:** 4, no hallucination")                       4
    readers.object_list('Sure! ["dog", "ball"]')                            ["dog", "ball"]

For eval_hallu.py. Evaluators differ most in this: beside each reader of ours is the official one, with its
faults. Ours read a text without its thoughts, markdown, code fences and tags, and nothing where it says two
things.
"""
if __name__ == "__main__":
    exit("A part of eval_hallu.py; run: python eval_hallu.py --help")

import html
import json
import re
import unicodedata

MIND = "(?:think|thinking|thoughts?|reason|reasoning|analysis|reflection|summary|caption|scratchpad|details)"
OPEN, CLOSE = rf"[<\[◁]{MIND}[>\]▷]", rf"[<\[◁]/{MIND}[>\]▷]"
THOUGHT = re.compile(rf"(?is)^.*<\|channel\|>final<\|message\|>|"
                     rf"{OPEN}(?:(?!{CLOSE}).)*{CLOSE}(?:(?:(?!{OPEN}).)*{CLOSE})?|"
                     rf"^.*{CLOSE}|{OPEN}.*")                                         # these lack one end
FINAL = r"(?is)<(answer|conclusion)>(.*?)</\1>|\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
DRESS = (r"(?i)(?:```|~~~)[`~]*\w*(?:[ \t]+\w+=[^\n]*)?|</?[a-z][^<>]*>|<\|[^<>]*\|>|\*\*|"
                   r"\\(?:boxed|text\w*|math\w+)\b\s*\{?|(?<![a-z0-9])_+|_+(?![a-z0-9])|[\u200b-\u200f\ufeff]")
QUOTES = str.maketrans("“”„‘’", "\"\"\"''")


def plain(text):
    """A reply without thoughts and dress; of one that marks its final answer, that alone."""
    text = unicodedata.normalize("NFKC", html.unescape(text)).translate(QUOTES)
    text = THOUGHT.sub("", text)
    finals = [tagged or boxed for _, tagged, boxed in re.findall(FINAL, text)]
    return re.sub(DRESS, "", "\n".join(finals) or text)


# ---- yes or no ----
KINDS = {"yes": "yes yeah yep yup yea y affirmative",
         "no": "no nope nah n none nobody nothing never not neither cannot without absent lack lacks false "
               "incorrect negative",
         "sure": "sure certainly definitely absolutely indeed correct true",
         "one": "one",
         "aside": "is s are was were be do does did can could has have any some there a an the this that "
                  "these those in on at of to it its they i my so think and or image picture photo scene "
                  "visible present shown you see seen contain contains show shows feature features include "
                  "includes depict depicts here really answer final response assistant"}
KIND = {word: kind for kind, words in KINDS.items() for word in words.split()}
UNSURE = (
    r"\b(?:(?:can(?:no|')t|can not|could(?:n't| not)|(?:not |un)able to|hard to|difficult to|impossible to)"
    r"(?: \w+)? (?:tell|say|answer|determined?|know|identify|assist|help|describe)|(?:don't|do not) know|n/a|"
    r"maybe|perhaps|possibly|not (?:\w+ )?(?:sure|certain|clear)|unclear|unsure|unknown)\b")
POINTS = r"(?:i (?:can )?see|i think so|i do|(?:it|they|there)(?:'s| is| are| does| do))\b"
ASKS = r"(?<![^.!?\n])[^.!?\n]*\?|^\W*[a-h][).:]|[*_`#~>]"   # a question, an option, markdown
STOPS = r"[,;:.!\n\"(){}\[\]]| but | however | although | while "


def official_yes_no(text):
    """POPE's parser: a token No, no or not before the first stop makes a no; all else, even "", a yes."""
    return "no" if {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split(" ")) else "yes"


def strict_yes_no(text):
    """AMBER's parser: Yes or No to the letter."""
    return {"Yes": "yes", "No": "no"}.get(text)


def yes_no(text, question=""):
    """"yes" or "no": what its clauses say, if they agree; a polite word counts where no clause says more."""
    asked = {root for root, _ in _words(question.lower())}
    said = set()
    for clause in re.split(STOPS, re.sub(ASKS, "", plain(text).lower())):
        said |= _said(clause.strip(" -"), asked)
    if said == {"sure"}:
        return "yes"
    said.discard("sure")
    return said.pop() if len(said) == 1 else None


def _words(text):
    """[(root, kind)] of the words that say something. A root: at most five letters, no plural's ending."""
    found = []
    for word in re.findall("[a-z]+n't|[a-z]+", text):
        kind = "no" if word.endswith("n't") else KIND.get(word, "other")
        if kind != "aside":
            found.append((word.rstrip("es")[:5], kind))
    return found


def _said(clause, asked):
    """What a clause says, out of yes, no and sure. It is about what was asked if it has all of those words; a
    denial then counts before them, or as the last word: a dog without a collar is a dog."""
    words = _words(clause)
    roots, kinds = [root for root, _ in words], [kind for _, kind in words]
    if re.search(UNSURE, clause):
        return set()
    if asked and asked.issubset(roots):
        last = max(map(roots.index, asked))
        return {"no" if "no" in [*kinds[:last], kinds[-1]] else "yes"}
    points = re.match(POINTS, clause)
    if "other" in kinds and (asked or not points):
        return set()
    said = {"yes", "no", "sure"}.intersection(kinds)
    return {"yes"} if points and not said else said


# ---- ratings ----
SCALE = r"\(?\b0\s*(?:-|–|to)\s*6\b\)?|(?:/|out of)\s*6\b"
NUMBER = r"(-?\d++(?:\.\d++)?+)(?:\s*(?:or|to|and|[-–~/])\s*(\d+))?(?!\s*:)"                 # 4, or 3 or 4
LABELLED = rf"\b(?:rating|score|评分)s?\b[\W_]{{0,20}}?(?:[:=]|-\s)[\W_]{{0,20}}?{NUMBER}"
GIVEN = rf"\b(?:rating|score|rate|give)s?\b(?: (?:it|this|is|of|as|an?))*[\W_]{{0,20}}?{NUMBER}"
BARE = rf"\A[^\w-]*{NUMBER}\W*\Z"
NAMES = {name: str(n) for n, name in enumerate("zero one two three four five six".split())}


def rating(reply, mode="robust"):
    """A judge's reply -> 0..6, or None. Official: the one s for which "rating: s" is in it, so that 10 is 1.
    Robust: the number behind "rating:"; else the one that a sentence gives; else nothing but a number."""
    if mode == "official":
        found = {score for score in range(7) if f"rating: {score}" in reply.lower()}
    else:
        text = re.sub(SCALE, "", plain(reply).lower())
        text = re.sub("[a-z]+", lambda word: NAMES.get(word[0], word[0]), text)
        pairs = re.findall(LABELLED, text) or re.findall(GIVEN, text) or re.findall(BARE, text)
        found = {float(number) for pair in pairs for number in pair if number}
    score = found.pop() if len(found) == 1 else None
    return int(score) if score in range(7) else None


# ---- lists of objects ----
STRING = r'"(?!\[)(?:[^"\\\n]|\\.)*"'
ITEM = rf"(?:{STRING}|-?\d+(?:\.\d+)?|null)"
LIST = rf"\[\s*(?:{ITEM}\s*,?\s*)*+\]"
LISTS = re.compile(rf"(?i)(objects?\W*)?({LIST}(?:[\s,\[\]]*{LIST})*)")  # a list of lists, of lines, is one
BULLET = r'(?m)^[ \t>#]*(?:(?:[-*•]|\d+[.)])[ \t>]+)+"?(.+?)[^\w)\]\n]*$'
QUOTED = rf'(?:[^"\[]*:)?[\s>#]*({STRING}(?:\s*,\s*{STRING})*)[^\w"]*'       # names under a head
NOTHING = r"(?i)[\W\d]*(?:there are )?no (?:\w+ )?(?:objects|things)\W*|\(\)\s*"


def object_list(reply, mode="robust"):
    """An extractor's reply -> the objects that it lists, or None. Official: JSON, or JSON in the last line.
    Robust: a list anywhere, of several that behind "objects"; bullets; names in quotes; or "no objects"."""
    if mode == "official":
        return _official_list(reply)
    text = plain(reply)
    if re.fullmatch(NOTHING, text):
        return []
    if '"' not in text:
        text = re.sub(r"(?<![a-zA-Z])'|'(?![a-zA-Z])", '"', text)
    found = LISTS.findall(text)
    if not found:
        text = re.sub(BULLET, r'"\1",', text)
        if quoted := re.fullmatch(QUOTED, text):
            found = LISTS.findall(f"[{quoted[1]}]")
    found = [row for row in found if row[0]] or found
    lists = []
    for _, run in found:
        named = [item.strip('"') for item in re.findall(ITEM, run) if item != "null"]
        if named not in lists:
            lists.append(named)
    return lists[0] if len(lists) == 1 else None


def _official_list(reply):
    last = reply.strip().split("\n")[-1] if '["' in reply else ""
    for text in (reply, last):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, list) and all(isinstance(thing, str | int | float) for thing in found):
            return [str(thing) for thing in found]
