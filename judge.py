"""Have answers judged, or captions' objects listed, by a chat model: our prompts, and how they are sent.

    text = judge.prompt(o.judge_prompt, judge.JUDGE, ["{}"] * 4)
    replies, said = judge.ask(o, "judge", o.judge, {"0": text with its places filled, ...}, accept, ...)

A file of its own so that the two prompts can be read, and changed, without anything around them. They are our
own words: the published ones are no part of this repository, and --judge_prompt and --extraction_prompt read
them from a file. A rating means what MMHal's means, above 2 without and up to 2 with a hallucination, so that
the official reader of ratings understands it; numbers from two prompts are still not comparable.
"""
import hashlib
import json
import re
from pathlib import Path

import chat
import data

JUDGE = """\
You grade an answer that a vision-language model gave to a question about an image. You do not see the image.
You know some of the things in it, and what a person answered who looked at it.

Things in the image: {}
Question: {}
The person's answer: {}
The model's answer, which you grade: {}

Decide two things.
First, does the model's answer claim anything about the image that the list, the person's answer and plain
reasoning from them do not support? That is a hallucination. Correct general knowledge is none, and neither is
a guess that is called a guess. To agree that something is there which the person denies is one.
Second, how much of what was asked does the answer tell: much, something, or nothing?

Explain your decision in at most three sentences. End with a line of its own, "Rating: N", where N is
6 - no hallucination, tells much and reasons well
5 - no hallucination, tells much
4 - no hallucination, tells something
3 - no hallucination, tells nothing of what was asked
2 - a hallucination, though it tells much
1 - a hallucination, and it tells something
0 - a hallucination, and it tells nothing of what was asked
"""
EXTRACTION = """\
Somebody answered a question about a picture. Which things does the answer say are to be seen in the picture?
Take its word for it, right or wrong.

Question: {question}
Answer: {answer}

Reply with one line: a JSON list of strings such as ["dog", "wine glass"], or [] where it names nothing.
Name each thing with the noun that the answer uses, without its colour, number, material, place or action.
Leave out what the answer does not name, and what it says is absent.
"""


def prompt(path, own, places):
    """The prompt of a file, or our own. places: what it must hold, as often as it stands there. UserError."""
    text = data.read_text(path) if path else own
    if any(text.count(place) != places.count(place) for place in places):
        raise data.UserError(f"{path} must hold {' '.join(places)}, where the question and the answer go; "
                             "mend it")
    return text


def filled(text, values):
    """A prompt with {name} replaced by values[name], in one pass: an answer may hold such a name, too."""
    return re.sub("|".join(f"{{{name}}}" for name in values), lambda found: values[found[0][1:-1]], text)


def ask(o, who, source, prompts, accept, path, text, max_tokens=1024):
    """-> ({id: reply} of prompts {id: text}; what the report says of who replied, and to which prompt).

    Replies are kept beside --out. accept: reads a reply, None where it cannot: a server is then asked again.
    path, text: the prompt's file, or None for our own, and its text. Raises UserError where a reply is
    missing, unless o.partial.
    """
    requests = [{"id": i, "messages": [{"role": "user", "content": filled}]} for i, filled in prompts.items()]
    kept = o.out.with_suffix(f".{who}.jsonl")
    replies = chat.replies(source, requests, kept, model=o.chat_model, max_tokens=max_tokens, description=who,
                           accept=lambda reply: accept(reply) is not None)
    if len(replies) < len(requests) and not o.partial:
        raise data.UserError(f"the {who} did not reply to {len(requests) - len(replies)} of {len(requests)} "
                             "requests (why stands above); call again, or score what is there with --partial")
    file = Path(source) if Path(source).is_file() else kept
    lines = data.read_records(file) if file.exists() else []
    models = sorted({line["model"] for line in lines if isinstance(line.get("model"), str)})
    said = {who: source.partition("?")[0] + f" ({', '.join(models)})" * bool(models)}
    if all("asked" in line for line in lines):          # then these very prompts were replied to
        name = str(path) if path else "built-in, in our own words: no match for the published one's scores"
        digest = hashlib.sha256(text.encode()).hexdigest()
    else:
        name, digest = "the replies do not say which", None
    return replies, said | {f"{who}_prompt": name, f"{who}_prompt_sha256": digest}


def keep(path, prompts):
    """Write the prompts to a file, for a judge that is asked elsewhere."""
    lines = ({"id": i, "messages": [{"role": "user", "content": filled}]} for i, filled in prompts.items())
    data.atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
