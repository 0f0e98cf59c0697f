"""Ask a model about a picture, in the terminal; classroom/ask.py serves the same as a page.

    eval_hallu.py ask --adapter runs/NAME/adapter          the answers before and after training, side by side

Below each answer stands what its words owe to the picture: a word's log p with the picture minus that with a
blank one of its size, in nats. 0: the word would have come without looking. A word that the picture
contradicts is marked where the truth is known: for scenes of the built-in world.
"""
if __name__ == "__main__":
    exit("A part of eval_hallu.py; run: python eval_hallu.py --help")

import contextlib
import shutil
import textwrap
from itertools import zip_longest

import torch

import data
import lora
from evaluation import objects
from model import generation, vlm


# ---- a model, a picture, a question ----
@torch.no_grad()
def token_logps(m, image, question, answer):
    """log p of each token of a model's answer, its end included: (N,). image: in RGB, or None."""
    images = [image] if image else []
    sizes = tuple(one.size for one in images)
    prompt, response = m.front.prompt_ids(question, sizes), m.front.response_ids(answer)
    pair = data.Pair("the question", prompt, prompt, response, response, sizes, sizes)
    features = vlm.encode_images(m, vlm.Batch([pair], m.front.prepared(images)))
    if m.front.packs:
        row = data.pack([pair], {"chosen"}, m.front.positions)
        return vlm.packed_token_logps(m, row, features.images)
    return vlm.naive(m, [pair], features, {"chosen"}).chosen


def owed(m, image, question, answer):
    """[(word of an answer, nats that it owes to the picture)]; [] of a family that does not pack."""
    if not image or not m.front.packs or not answer:
        return []
    blank = data.rejected_image("blank", image, 0, "")
    gains = token_logps(m, image, question, answer) - token_logps(m, blank, question, answer)
    words, tokens = answer.split(), m.front.response_ids(answer)
    found = [0.0] * len(words)
    for n, gain in enumerate(gains[:-1].tolist(), 1):                    # without the end
        begun = len(m.front.tokenizer.decode(tokens[:n], skip_special_tokens=True).split())
        found[min(max(begun, 1), len(words)) - 1] += gain
    return list(zip(words, found, strict=True))


def answers(m, image, question, known, length=64):
    """{"before" and "after" training, or "answer": {"text", "words": see owed, "invented": words that the
    picture contradicts}}. known: the picture's, see benchmarks.truths."""
    found, truth = {}, known.get(question, known.get(None))
    for name in ("before", "after") if lora.layers(m.model) else ("answer",):
        with lora.lora_disabled(m.model) if name == "before" else contextlib.nullcontext():
            text, = generation.generate(m, [[image] if image else []], [question], max_new_tokens=length)
            invented = objects.hallucinated(text, truth) if truth else []
            found[name] = {"text": text, "words": owed(m, image, question, text), "invented": invented}
    return found


# ---- in the terminal ----
def columns(found):
    """The answers as lines of text, next to each other; invented words are in *stars*."""
    room, parts = (shutil.get_terminal_size((100, 24)).columns - 4) // len(found), []
    for name, said in found.items():
        text = said["text"] or "(no answer)"
        for word in said["invented"]:
            text = text.replace(word, f"*{word}*")
        lines = [f"{name}:", *textwrap.wrap(text, room)]
        if said["words"]:
            words = " ".join(f"{word} {nats:+.1f}" for word, nats in said["words"])
            lines += ["owed to the picture, in nats:", *textwrap.wrap(words, room)]
        parts.append(lines)
    for row in zip_longest(*parts, fillvalue=""):
        yield " | ".join(line.ljust(room) for line in row).rstrip()


def talk(m, questions, path, known, length):
    """Prints each question, and below it what the model answers. path: of a picture, or None. known: as
    `answers` takes it."""
    image = data.read_image(path) if path else None
    print(f"about {path}" if path else "without a picture: give one with --image")
    if known:
        print(f"Questions that it knows: {' '.join(filter(None, known))}")
    for question in filter(None, map(str.strip, questions)):
        print(f"\n> {question}")
        found = answers(m, image, question, known, length)
        print(*columns(found), sep="\n", flush=True)
