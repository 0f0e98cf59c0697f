"""Have answers judged, or captions' objects listed, by a chat model: for `eval_hallu.py score`.

judge.txt and extraction.txt are the prompts, in our own words: the published ones are no part of this
repository; --judge_prompt and --extraction_prompt read them from a file. A rating means what MMHal's means,
above 2 without and up to 2 with a hallucination, so that the official reader of ratings understands it;
numbers from two prompts are still not comparable.
"""
import hashlib
import re
from pathlib import Path

import chat
import data
from data import UserError

HERE = Path(__file__).resolve().parent
JUDGE, EXTRACTION = HERE / "judge.txt", HERE / "extraction.txt"


def prompt(path, own, places):
    """The text of a prompt's file, or of our own. Raises UserError where a place is not as often in it as in
    `places`."""
    text = data.read_text(path or own)
    if any(text.count(place) != places.count(place) for place in places):
        raise UserError(f"{path} must hold {' '.join(places)}, where question and answer go; add them")
    return text


def filled(text, values):
    """A prompt with {name} replaced by values[name], in one pass: an answer may contain such a name, too."""
    return re.sub("|".join(f"{{{name}}}" for name in values), lambda found: values[found[0][1:-1]], text)


def ask(o, who, source, prompts, accept, path, text, max_tokens=1024):
    """-> ({id: reply} of prompts {id: text}; what the report says of who replied, and to which prompt).

    Replies are kept beside --out. accept: reads a reply, None where it cannot: a server is then asked again.
    path, text: the prompt's file, or None for our own, and its text. Raises UserError where a reply is
    missing, unless o.partial.
    """
    asked = [chat.Question(i, filled) for i, filled in prompts.items()]
    rows = chat.ask(source, asked, o.out.with_suffix(f".{who}.jsonl"), model=o.chat_model, description=who,
                    max_tokens=max_tokens, accept=lambda reply: accept(reply) is not None)
    if lost := len(asked) - len(rows):
        if not o.partial:
            raise UserError(f"the {who} did not reply to {lost} of {len(asked)} requests (the reason is "
                            "above); call again, or score what is there with --partial")
    names = {str(row["model"]) for row in rows.values() if row.get("model")}
    models = f" ({', '.join(sorted(names))})" if names else ""
    name, digest = str(path or "built-in, in our own words: no match for the published one's scores"), None
    if all(row["asked"] for row in rows.values()):      # then these very prompts were replied to
        digest = hashlib.sha256(text.encode()).hexdigest()
    else:
        name = "the replies do not say which"
    said = {who: chat.public(str(source)) + models, f"{who}_prompt": name, f"{who}_prompt_sha256": digest}
    return {i: row["reply"] for i, row in rows.items()}, said


def keep(path, prompts):
    """Write the prompts {id: text} to a file, for a judge that is asked elsewhere."""
    data.write_jsonl(path, [{"id": i, "messages": chat.messages(text)} for i, text in prompts.items()])
