"""Prompts and questions: from text files, a template or a chat model; near-duplicates dropped.

A file of its own because it is all about words: synth.py's `prompts` and `instruct` stages, without files of
their own to resume, for chat.replies keeps what was said.
"""
import re
from collections import Counter
from pathlib import Path

import chat
import data
from data import UserError

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
TURNS = 3                       # lists are asked for so many times before a topic stays short of prompts


def grams(text):
    """The word pairs of a text (of a single word: the word)."""
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:], strict=False)) or set(words)


def distinct(texts, similar):
    """Indices of the texts that share at most `similar` of their word pairs (of both together) with every one
    that was kept before. By an index of pairs: a hundred thousand texts take a minute, not a day."""
    kept, having, sizes = [], {}, {}
    for i, text in enumerate(texts):
        own = grams(text)
        shared = Counter(j for gram in own for j in having.get(gram, ()))
        if not own or any(n > similar * (len(own) + sizes[j] - n) for j, n in shared.items()):
            continue
        kept.append(i)
        sizes[i] = len(own)
        for gram in own:
            having.setdefault(gram, []).append(i)
    return kept


def read(source, flag="--prompts"):
    """[(topic, line)] of a text file or of a folder of them; a file's name is its topic, or UserError."""
    path = Path(source)
    try:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        found = [(f.stem, line.strip()) for f in files for line in f.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {source} cannot be read ({error}); give a text file or a folder of "
                        "them") from error
    if not any(line for _, line in found):
        raise UserError(f"{flag} {source} holds no lines; write one a line into TOPIC.txt")
    return [(topic, line) for topic, line in found if line]


def written(source, topics, n, similar, folder, model=None, seed=0):
    """[(topic, prompt)] by a chat model: lists of ten until each topic has n, or TURNS are over."""
    found, lists = {t: [] for t in topics}, -(-n // 10)
    for turn in range(TURNS):
        asked = []
        for topic in (topic for topic in topics if len(distinct(found[topic], similar)) < n):
            for k in range(turn * lists, (turn + 1) * lists):
                text = ASK_PROMPTS.format(topic=topic.replace("_", " "), k=k + 1)
                asked.append(chat.Question(f"{topic}/{k}", text))
        if not asked:
            break
        said = chat.replies(source, asked, folder / f"writer-{turn}.jsonl", model=model or None,
                            temperature=1., seed=seed, description="prompts")
        for name, text in said.items():
            lines = (re.sub(r"^\s*(?:[-*•]|\d+[.):])\s*", "", line).strip(' "') for line in text.splitlines())
            found[name.rpartition("/")[0]] += [line for line in lines if line]
    return [(topic, text) for topic, texts in found.items() for text in texts]


def template(path, ids, seed=0):
    """{id: question}, by a hash of the id, of QUESTIONS or of a text file's lines."""
    asked = QUESTIONS if path == "template" else [line for _, line in read(path, "--instruct")]
    return {id: asked[data.hash64(seed, "question", id) % len(asked)] for id in ids}


def ask(writer, prompts):
    """{id: question} by a chat.connect from {id: prompt}; what got no reply is absent, and counted there."""
    asked = [chat.Question(id, ASK_QUESTION.format(prompt=text)) for id, text in prompts.items()]
    said = chat.replies(writer, asked, description="instruct")
    return {id: " ".join(text.split()) for id, text in said.items() if text.strip()}
