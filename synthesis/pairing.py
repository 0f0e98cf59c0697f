"""From scored responses to preference pairs, for synth.py: faults, choice, length gap, formats, data card.

A response's faults, each found after an echo of the question is removed:
    echoed   it begins with the question           empty    no letter and no digit
    foreign  most letters are of another script    cut off  the model ran into its limit (if that is not
             than the question's                            known: a long text that ends within a sentence)
    thoughts it shows its thinking (<think>)       not scored   it is not in the scorer's file
A prompt gives no pair if fewer than two of its responses are without fault, if the best and the worst are
the same text, or if their scores lie within `margin` standard deviations of the scorer's scores.

`official=True` is the published pipeline: nothing is filtered, the first maximum is chosen and the first
minimum rejected, whatever they are; the echo is taken off after it was scored, and newlines become blanks.
"""
if __name__ == "__main__":
    exit("A part of synth.py; run: python synth.py --help")

import json
import re
import statistics
import unicodedata
from collections import Counter
from operator import itemgetter
from pathlib import Path

import data
from evaluation.readers import THOUGHT

LONG = 12                               # words: a text this long without a full stop counts as cut off
TELLING = .65                           # warn if length alone decides this share of the pairs


def only(row, names):
    """The fields of a row that have these names."""
    return {name: row[name] for name in names.split()}


def grouped(rows, field):
    """{value of the field: the rows that have it}, in their order."""
    groups = {}
    for row in rows:
        groups.setdefault(row[field], []).append(row)
    return groups


# ---- faults of one response ----

def unecho(question, response):
    """What follows an echo of the question, else all of it: blanks, case, <image> do not count."""
    words = [re.escape(word) for word in question.replace("<image>", " ").split()]
    echo = re.match(r"\s*(?:<image>\s*)?" + r"\s+".join(words), response, re.I) if words else None
    return response[echo.end():] if echo else response


def scripts(text):
    """How many letters of each script: {"LATIN": 12, ...}."""
    return Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())


def is_foreign(question, text):
    """Whether less than half of the text's letters are of the question's most frequent script."""
    own, there = scripts(question), scripts(text)
    return bool(own) and 2 * there[max(own, key=own.get)] < there.total()


def faults(question, response, finished):
    """The faults of a response. finished: whether the model ended it by itself; None if not known."""
    answer = unecho(question, response)
    text = answer.strip()
    if finished is None:
        finished = len(text.split()) < LONG or not re.search(r"[\w,;–-]$", text)
    found = {"echoed": answer != response, "empty": not any(c.isalnum() for c in text),
             "foreign": is_foreign(question, text), "cut off": not finished,
             "thoughts": THOUGHT.search(text)}
    return [reason for reason, there in found.items() if there]


# ---- the choice ----

def best_image(prompt, threshold):
    """A prompt with its candidates and {ranker: their scores} -> its row of ranked.jsonl: the first ranker's
    best image (the first of equals), `dropped` if it scores below the threshold."""
    first, *_ = prompt["scores"].values()
    candidates, best, dropped = prompt["candidates"], max(first), None
    if best < threshold:
        dropped = f"best image scores below {threshold}"
    row = only(prompt, "id topic prompt") | only(candidates[first.index(best)], "image guidance")
    tried = [only(image, "image guidance seed") for image in candidates]
    return row | {"dropped": dropped, "scores": prompt["scores"], "candidates": tried}


def select(asked, responses, scores, margin=0., official=False):
    """-> (pairs, dropped, faulty), lists of dicts in the prompts' order.

    asked: rows of ranked.jsonl with a question; responses: {id: rows of responses.jsonl}, in the models'
    order; scores: {(id, model): number}.
    """
    gap = margin * statistics.pstdev(scores.values()) if scores else 0.
    pairs, dropped, faulty = [], [], []
    for prompt in asked:
        id, sound = prompt["id"], []
        for row in responses.get(id, ()):
            found = [] if official else faults(prompt["question"], row["response"], row.get("finished"))
            score = scores.get((id, row["model"]))
            if score is None:
                found.append("not scored")
            if found:
                faulty.append(only(row, "id model response") | {"faults": found})
            else:
                sound.append(row | {"score": score})
        if len(sound) < 2:
            reason = "fewer than two responses without fault"
        else:
            best, worst = max(sound, key=itemgetter("score")), min(sound, key=itemgetter("score"))
            reason = "" if official else too_alike(best, worst, gap)
        if reason:
            dropped.append({"id": id, "reason": reason})
        else:
            pairs.append(pair(prompt, best, worst, official))
    return pairs, dropped, faulty


def too_alike(best, worst, gap):
    """Why two responses make no pair, else ""."""
    if best["score"] - worst["score"] <= gap:
        return "nearly tied"
    same = best["response"].split() == worst["response"].split()
    return "identical" if same else ""


def pair(prompt, best, worst, official):
    """The native record of a prompt's best and worst response."""
    texts = []
    for row in (best, worst):
        text = row["response"]
        if official:
            text = unecho(prompt["question"], text).replace("\n", " ")
        texts.append(text.strip())
    chosen, rejected = texts
    meta = only(prompt, "topic prompt guidance")
    meta |= {"models": [best["model"], worst["model"]], "scores": [best["score"], worst["score"]]}
    return only(prompt, "id image question") | {"chosen": chosen, "rejected": rejected, "meta": meta}


def conversations(pair):
    """A pair in the JSON that PDS-DPO publishes (and LLaVA's trainers read)."""
    asked = {"from": "human", "value": f"<image> {pair['question'].replace('<image>', '').strip()}"}
    return only(pair, "id image") | {
        "conversations": [asked, {"from": "gpt", "value": pair["chosen"]}],
        "rejected_conversations": [asked, {"from": "gpt", "value": pair["rejected"]}]}


# ---- about the pairs, before training on them ----

def length_report(pairs):
    """How long they are in the mean and how often the chosen one is the longer, ties counting half."""
    if not pairs:
        return "no pairs"
    chosen, rejected = ([len(pair[side].split()) for pair in pairs] for side in ("chosen", "rejected"))
    longer = statistics.mean((c > r) + (c == r) / 2 for c, r in zip(chosen, rejected, strict=True))
    text = (f"chosen {statistics.mean(chosen):.1f} words, rejected {statistics.mean(rejected):.1f}; the "
            f"chosen one is longer in {100 * longer:.0f}% of the pairs")
    for share, more in ((longer, "longer"), (1 - longer, "shorter")):
        if share >= TELLING:
            text += (f".\nWARNING: length alone tells the chosen response in {100 * share:.0f}% of pairs: "
                     f"DPO will learn to write {more} answers. Balance them, or compare with --scorer length")
    return text


# ---- the stage ----

def make(run, settings):
    """From a run's files to pairs.jsonl, pds_dpo.json, dropped.jsonl, faults.jsonl and card.md, which
    lists the settings {name: value}."""
    o, scores = run.o, {}
    ranked, asked = run.rows("ranked", "rank"), run.asked()
    said = run.rows("responses", "respond")
    for row in run.rows(f"scores-{o.scorer}", f"score --scorer {o.scorer}"):
        score = row["score"]
        if o.attributes == "paper" and o.scorer == "armorm":
            score = sum(row["rewards"][:5]) / 5
        scores[row["id"], row["model"]] = score
    pairs, dropped, faulty = select(asked, grouped(said, "id"), scores, o.margin, o.as_official)
    low = [{"id": row["id"], "reason": row["dropped"]} for row in ranked if row.get("dropped")]
    dropped = low + dropped
    run.write("pairs", pairs)
    run.write("dropped", dropped)
    run.write("faults", faulty)
    text = json.dumps([*map(conversations, pairs)], indent=1, ensure_ascii=False)
    data.atomic_write(run.out / "pds_dpo.json", text + "\n")
    gone = sum((row["faults"] for row in faulty), [row["reason"] for row in dropped])
    counts = {"prompts": len(ranked), "questions": len(asked), "responses": len(said), "pairs": len(pairs)}
    counts |= Counter(gone)
    run.say("pairs", **counts)
    length = length_report(pairs)
    print(length)
    card = CARD.format(title=run.out.name, settings=listed(settings), counts=listed(counts), length=length)
    data.atomic_write(run.out / "card.md", card)


CARD = """# {title}

Preference pairs made by `synth.py`: text-to-image prompts, candidate images ranked by a reward model,
responses of several vision-language models ranked by a scorer.

## Files

- `pairs.jsonl`: id, image, question, chosen, rejected, meta (topic, models, scores)
- `pds_dpo.json`: the same in PDS-DPO's format
- `images/`: every candidate
- `dropped.jsonl`, `faults.jsonl`: what was left out, and why

## Settings and models

{settings}

Images and texts are the models' outputs: their licences decide what may be done with them.

## Counts

{counts}

## Length

{length}
"""


def licence(source):
    """What the README.md of a model's folder says."""
    readme = Path(source) / "README.md"
    text = readme.read_text(errors="replace") if readme.is_file() else ""
    found = re.findall(r"^license(?:_name)?:\s*(.+)$", text, re.M)
    return ", ".join(found) or "not stated in its folder"


def listed(found):
    """{name: value} as a list in Markdown."""
    return "\n".join(f"- {name}: {value}" for name, value in found.items())
