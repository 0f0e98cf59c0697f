"""What a text says: yes or no, a rating, a list of objects. A reader returns None if it cannot read.

    readers.yes_no("There isn't a dog.", "Is there a dog in the image?")    "no"
    readers.rating("**Rating:** 4, no hallucination")                       4
    readers.object_list('Sure! ["dog", "ball"]')                            ["dog", "ball"]

For eval_hallu.py. Evaluators differ most in this: beside each reader of ours is the official one, with its
faults.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of eval_hallu.py; run: python eval_hallu.py --help"))

import json
import re

YES = set("yes yeah yep yup yea sure certainly definitely absolutely indeed correct affirmative true".split())
NO = set("no nope nah none nobody nothing never not neither false incorrect negative".split())
BOTH = re.compile(r"yes\W+(?:and |or )?no\b|no\W+(?:and |or )?yes\b")
UNSURE = re.compile(
    r"\b(?:(?:can(?:no|')t|can not|could(?:n't| not)|(?:not |un)able to|hard to|difficult to|impossible to)"
    r"(?: \w+)? (?:tell|say|determined?|answer|know|identify|assist|help|describe)|(?:don't|do not) know|n/a|"
    r"maybe|perhaps|possibly|not (?:\w+ )?(?:sure|certain|clear)|unclear|unsure|unknown)\b")
NEGATION = re.compile(r"\b(?:no|not|none|never|nothing|nobody|neither|cannot|without|absent|lacks?)\b|n't\b")
POINTS = re.compile(
    r"(?:i think so|i do|i (?:can )?see (?:it|one|some|them)|"
    r"(?:it|they|there) (?:is|are|does|do)(?: indeed| one| some)*)"
    r"(?: (?:visible|present|there|(?:in|on) .*))?")
STATES = re.compile(
    r"\b(?:there (?:is|are)|i (?:can )?see|(?:is|are|be) (?:\w+ )?(?:visible|present|seen|shown)|"
    r"(?:image|picture|photo|scene)(?: \w+)? "
    r"(?:shows?|features?|contains?|includes?|depicts?|has))\b")
ASIDE = set("is are was were be do does did can could has have any some there a an the this that these those "
            "in on at of to it its and or image picture photo scene visible you see".split())


def official_yes_no(text):
    """POPE's parser: a token No, no or not before the first stop makes a no; all else, even "", a yes."""
    return "no" if {"No", "no", "not"} & set(text.split(".")[0].replace(",", "").split(" ")) else "yes"


def strict_yes_no(text):
    """AMBER's parser: Yes or No to the letter."""
    return {"Yes": "yes", "No": "no"}.get(text)


def yes_no(text, question=""):
    """"yes", "no", or None if an answer says neither. Its first word decides; else a clause that is a yes
    or a no; else a statement in the question's own words, or one that points at them ("there is one", "I see
    it")."""
    text = re.sub(r"<[^<>]*>", " ", text.lower().replace("\u2019", "'"))
    text = re.sub(r"[*_`\"#]+", "", text).strip()
    text = re.sub(r"^(?:(?:the |my |final )*answer(?: is)?|assistant|response)\s*[:\-]?\s+(?=\w)", "", text)
    text = re.sub(r"\b(is no|are no),", r"\1", text)                                # "there is no, person"
    word, second, *_ = [*re.findall(r"[a-z']+", text), "", ""]
    if not word or BOTH.match(text) or UNSURE.match(text):
        return None
    if word in YES | NO:
        return "no" if word in NO or second == "not" else "yes"
    clauses = re.split(r"[,;:.!?\n]| but | however | although | while ", text)
    clauses = [clause.strip(" ()[]{}'") for clause in clauses]
    if len(said := {"yes", "no"} & set(clauses)) == 1:
        return said.pop()
    asked = _roots(question) - _roots(" ".join(ASIDE))
    about = [clause for clause in clauses if asked and asked <= _roots(clause)]
    clause = (about or clauses)[0]
    if UNSURE.search(clause if about else text):
        return None
    if NEGATION.search(clause):
        return "no"
    return "yes" if about or POINTS.fullmatch(clause) or not question and STATES.search(clause) else None


def _roots(text):
    """The words of a text without a plural's s and cut to five letters, enough to know them again."""
    return {(word[:-1] if word.endswith("s") else word)[:5] for word in re.findall(r"[a-z]+", text.lower())}


RATING = re.compile(r"\b(?:rating|score|rate)\b\W{0,6}?(?:is|of|as|at)?[\s*_`:=\[(\"'-]{0,6}"
                    r"(?<!-)(\d+(?:\.\d+)?)")


def rating(reply, mode="robust"):
    """A judge's reply -> 0..6, or None. Official: the one s for which "rating: s" is in it, so that 10 is 1.
    Robust: whole numbers behind "rating" or "score" in whatever dress, if they agree; or nothing but a
    number."""
    text = reply.lower()
    if mode == "official":
        found = {score for score in range(7) if f"rating: {score}" in text}
    else:
        text = re.sub(r"\(?\b0\s*(?:-|\u2013|to)\s*6\b\)?", "", text)                         # the scale
        found = {float(number) for number in RATING.findall(text)}
        if bare := re.fullmatch(r"[^\w-]*(\d+)(?:\s*/\s*6)?\W*", text):
            found = {float(bare[1])}
    score = found.pop() if len(found) == 1 else None
    return int(score) if score in range(7) else None


def object_list(reply, mode="robust"):
    """An extractor's reply -> the objects that it lists, or None. Official: JSON, or JSON in the last line.
    Robust: also the last list anywhere in the text, in single quotes too, and "()" for none."""
    candidates = [reply]
    if '["' in reply:
        candidates.append(reply.strip().split("\n")[-1])
    if mode != "official":
        lists = re.findall(r"\[[^\[\]]*\]", reply)[-1:]
        candidates += lists + [re.sub(r"(?<![a-zA-Z])'|'(?![a-zA-Z])", '"', text) for text in lists]
        candidates += ["[]"] * (reply.strip() == "()")
    for text in candidates:
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, list) and all(isinstance(thing, str | int | float) for thing in found):
            return [str(thing) for thing in found]
    return None
