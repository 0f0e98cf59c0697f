"""Prompts and questions for synth.py: from files, a template or a chat model, without near-duplicates."""
if __name__ == "__main__":
    exit("A part of synth.py; run: python synth.py --help")

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import data
from data import UserError
from evaluation.readers import THOUGHT
from model import ask, command

SHIPPED = Path(__file__).resolve().parent / "topics"
ASK_PROMPTS = (
    "Write ten descriptions of pictures about this topic: {topic}. One a line, 10 to 25 words, no "
    "numbering. Each shows another place and other things, says how many there are and where "
    "they stand. This is list {k} of several: leave out what comes to mind first.")
ASK_QUESTION = (
    "A picture was made from this description:\n{prompt}\nWrite one question about the picture that only "
    "someone who sees it can answer well. Do not give the description away. Reply with the question alone.")
QUESTIONS = ("Describe this picture in detail.",
             "What is going on in this picture, and where does it take place?",
             "Which things are in this picture, how many of each, and where do they stand?",
             "What stands out most in this picture, and what is around it?",
             "Which colours and materials does this picture show, and on what?",
             "What might have happened just before this picture was taken? Say what in it points there.")
# The published PDS-DPO prompts of responders, as they are: no roles, no template.
RAW = ("{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> "
       "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}")


def grams(text):
    """The word pairs of a text (of a single word: the word; without words: its characters)."""
    words = re.findall(r"\w+", text.lower())
    return set(pairwise(words)) or set(words) or set(text)


def distinct(texts, similar):
    """Indices of the texts that share at most `similar` of their word pairs, of both together, with every one
    kept before. Compares each with all: ten thousand take seconds, a hundred thousand many minutes."""
    kept = {}
    for i, text in enumerate(texts):
        own = grams(text)
        alike = [other for other in kept.values() if not own.isdisjoint(other)]
        if own and all(len(own & other) <= similar * len(own | other) for other in alike):
            kept[i] = own
    return list(kept)


def read(source):
    """[(topic, line)] of a text file or of a folder of them; a file's name is its topic. Raises UserError."""
    path, found = Path(source), []
    for file in sorted(path.glob("*.txt")) if path.is_dir() else [path]:
        lines = map(str.strip, command.read_text(file).splitlines())
        found += [(file.stem, line) for line in lines if line]
    if not found:
        raise UserError(f"{source} holds no lines; write one a line into TOPIC.txt")
    return found


def numbered(lines, per_topic):
    """[{"id", "number", "topic", "prompt"}] of (topic, prompt) lines, at most `per_topic` of each topic."""
    rows, count = [], Counter()
    for topic, text in lines:
        if count[topic] < per_topic:
            count[topic] += 1
            rows.append({"id": f"{topic}-{count[topic]}", "number": len(rows) + 1, "topic": topic,
                         "prompt": text})
    return rows


def written(run):
    """[(topic, prompt)] by the chat model --writer: lists of ten, twice as many as --per_topic would need,
    for they repeat each other."""
    o, asked, found = run.o, [], []
    for topic in o.topics.split(",") if o.topics else dict(read(SHIPPED)):           # its keys are topics
        for k in range(-(-o.per_topic // 5)):
            text = ASK_PROMPTS.format(topic=topic.replace("_", " "), k=k + 1)
            asked.append(ask.Question(f"{topic}/{k}", text))
    for id, text in said(run.ask("writer", o.writer, asked, temperature=1., seed=o.seed)).items():
        topic, _, _ = id.rpartition("/")
        found += [(command.file_name(topic), line) for line in listed(text)]       # a part of ids
    return found


def said(rows):
    """{id: reply, without its thoughts} of a chat model's rows, without those that were cut off."""
    return {id: THOUGHT.sub("", row["reply"]).strip() for id, row in rows.items() if ask.whole(row)}


def listed(text):
    """The lines of a list, without numbers, bullets and quotes."""
    lines = [re.sub(r"^\s*(?:[-*•]|\d+[.):])\s*", "", line).strip(' "') for line in text.splitlines()]
    return [line for line in lines if line]


def template(path, ids, seed):
    """{id: question}, by a hash of the id, of QUESTIONS ("template") or of a text file's lines."""
    asked = QUESTIONS if path == "template" else [line for _, line in read(path)]
    return {id: asked[data.hash64(seed, "question", id) % len(asked)] for id in ids}
