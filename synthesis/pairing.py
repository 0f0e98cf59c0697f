"""From scored responses to preference pairs, for synth.py: faults, choice, length gap, formats, data card.

A response's faults, each found after an echo of the question is removed:
    echoed   it begins with the question           empty    no letter and no digit
    foreign  most letters are of another script    cut off  the model ran into its limit (if that is not
             than the question's                            known: a long text that ends within a sentence)
A prompt gives no pair if fewer than two of its responses are without fault, if the best and the worst are
the same text, or if their scores lie within `margin` standard deviations of the scorer's scores.

`official=True` is the published pipeline: nothing is filtered, the first maximum is chosen and the first
minimum rejected, whatever they are; the echo is taken off after it was scored, and newlines become blanks.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of synth.py; run: python synth.py --help"))

import json
import re
import statistics
import unicodedata
from collections import Counter
from pathlib import Path

import data
from model import command

LONG = 12                               # words: a text this long without a full stop counts as cut off
TELLING = .65                           # warn if length alone decides this share of the pairs


def grouped(rows, field):
    """{value of the field: the rows that have it}, in their order."""
    groups = {}
    for row in rows:
        groups.setdefault(row[field], []).append(row)
    return groups


# ---- faults of one response ----

def unecho(question, response):
    """(what follows an echo of the question, whether there was one): blanks, case, <image> do not count."""
    words = [re.escape(word) for word in question.replace("<image>", " ").split()]
    echo = re.match(r"\s*(?:<image>\s*)?" + r"\s+".join(words), response, re.I) if words else None
    return (response[echo.end():], True) if echo else (response, False)


def scripts(text):
    """How many letters of each script: {"LATIN": 12, ...}."""
    return Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())


def is_foreign(question, text):
    """Whether less than half of the text's letters are of the question's most frequent script."""
    own, there = scripts(question), scripts(text)
    return bool(own) and 2 * there[max(own, key=own.get)] < there.total()


def faults(question, response, finished=None):
    """The faults of a response. finished: whether the model ended it by itself; None if not known."""
    text, echoed = unecho(question, response)
    text = text.strip()
    if finished is None:
        ends_within = text and (text[-1].isalnum() or text[-1] in ",;-–")
        finished = len(text.split()) < LONG or not ends_within
    found = {"echoed": echoed, "empty": not any(c.isalnum() for c in text),
             "foreign": is_foreign(question, text), "cut off": not finished}
    return [reason for reason, there in found.items() if there]


# ---- the choice ----

def best_image(prompt, candidates, scores, threshold=None):
    """The row of ranked.jsonl: the first ranker's best image (the first of equals), `dropped` if it scores
    below the threshold. scores: {ranker: those of the candidates}."""
    picks, dropped = next(iter(scores.values())), None
    image = candidates[picks.index(max(picks))]
    if threshold is not None and max(picks) < threshold:
        dropped = f"best image scores below {threshold}"
    row = {name: prompt[name] for name in ("id", "topic", "prompt")}
    row |= {"image": image["image"], "guidance": image["guidance"], "dropped": dropped, "scores": scores}
    tried = [{name: each[name] for name in ("image", "guidance", "seed")} for each in candidates]
    return row | {"candidates": tried}


def select(asked, responses, scores, margin=0., official=False):
    """-> (pairs, dropped, faulty), lists of dicts in the prompts' order.

    asked: rows with id, image, question (and what `meta` is to hold); responses: {id: rows with model,
    response, finished}, in the models' order; scores: {(id, model): number}.
    """
    known = [score for score in scores.values() if score is not None]
    gap = margin * statistics.pstdev(known) if len(known) > 1 else 0.
    pairs, dropped, faulty = [], [], []
    for prompt in asked:
        id, sound = prompt["id"], []
        for row in responses.get(id, ()):
            found = [] if official else faults(prompt["question"], row["response"], row.get("finished"))
            if found:
                faulty.append({"id": id, "model": row["model"], "faults": found, "response": row["response"]})
            else:
                sound.append(row | {"score": scores.get((id, row["model"]))})
        reason, best, worst = choose(sound, gap, official)
        if reason:
            dropped.append({"id": id, "reason": reason})
        else:
            pairs.append(pair(prompt, best, worst, official))
    return pairs, dropped, faulty


def choose(rows, gap, official):
    """(why there is no pair or None, the best row, the worst row); of equals the first."""
    scored, reason = [row for row in rows if row["score"] is not None], None
    if len(scored) < 2:
        return "not scored" if len(rows) > 1 else "fewer than two responses without fault", None, None
    best = max(scored, key=lambda row: row["score"])
    worst = min(scored, key=lambda row: row["score"])
    if best["score"] - worst["score"] <= gap:
        reason = "nearly tied"
    elif best["response"].split() == worst["response"].split():
        reason = "identical"
    return None if official else reason, best, worst


def pair(prompt, best, worst, official):
    """The native record of a prompt's best and worst response."""
    id, question, texts = prompt["id"], prompt["question"], []
    for row in (best, worst):
        text = row["response"].strip()
        if official:
            text = unecho(question, text)[0].replace("\n", " ").strip()
        texts.append(text)
    meta = {name: prompt[name] for name in ("topic", "prompt", "guidance") if name in prompt}
    meta |= {"models": [best["model"], worst["model"]], "scores": [best["score"], worst["score"]]}
    return {"id": id, "image": prompt["image"], "question": question, "chosen": texts[0],
            "rejected": texts[1], "meta": meta}


def conversations(pair):
    """A pair in the JSON that PDS-DPO publishes (and LLaVA's trainers read)."""
    asked = {"from": "human", "value": f"<image> {pair['question'].replace('<image>', '').strip()}"}
    return {"id": pair["id"], "image": pair["image"],
            "conversations": [asked, {"from": "gpt", "value": pair["chosen"]}],
            "rejected_conversations": [asked, {"from": "gpt", "value": pair["rejected"]}]}


# ---- about the pairs, before training on them ----

def lengths(pairs):
    """Words in the mean, and how often the chosen response is the longer one (ties count half)."""
    chosen = [len(pair["chosen"].split()) for pair in pairs]
    rejected = [len(pair["rejected"].split()) for pair in pairs]
    longer = [1. if c > r else .5 if c == r else 0. for c, r in zip(chosen, rejected, strict=True)]
    return {"chosen_words": statistics.mean(chosen), "rejected_words": statistics.mean(rejected),
            "chosen_longer": statistics.mean(longer)}


def length_report(pairs):
    """The lengths in one or two sentences."""
    if not pairs:
        return "no pairs"
    gap = lengths(pairs)
    text = (f"chosen {gap['chosen_words']:.1f} words, rejected {gap['rejected_words']:.1f}; the chosen one "
            f"is longer in {100 * gap['chosen_longer']:.0f}% of the pairs")
    share = max(gap["chosen_longer"], 1 - gap["chosen_longer"])
    if share < TELLING:
        return text
    more = "longer" if gap["chosen_longer"] > .5 else "shorter"
    return (f"{text}.\nWARNING: length alone tells the chosen response in {100 * share:.0f}% of the pairs: "
            f"DPO will learn to write {more} answers. Compare with --scorer length, or balance the pairs")


# ---- the stage ----

def make(run, models, settings):
    """From a run's files to pairs.jsonl, pds_dpo.json, dropped.jsonl, faults.jsonl and card.md."""
    o, scores = run.o, {}
    ranked = {row["id"]: row for row in run.rows("ranked", "rank")}
    asked = [ranked[row["id"]] | row for row in run.rows("instructions", "instruct")]
    said = grouped(run.rows("responses", "respond"), "id")
    for row in run.rows(f"scores-{o.scorer}", f"score --scorer {o.scorer}"):
        score = row["score"]
        if o.attributes == "paper" and o.scorer == "armorm":
            score = sum(row["rewards"][:5]) / 5
        scores[row["id"], row["model"]] = score
    pairs, unpaired, faulty = select(asked, said, scores, o.margin, o.as_official)
    dropped = [{"id": id, "reason": row["dropped"]} for id, row in ranked.items() if row["dropped"]]
    dropped += unpaired
    run.write("pairs", pairs)
    run.write("dropped", dropped)
    run.write("faults", faulty)
    published = [conversations(pair) for pair in pairs]
    text = json.dumps(published, indent=1, ensure_ascii=False)
    data.atomic_write(run.out / "pds_dpo.json", text + "\n")
    counts = Counter(prompts=len(ranked), questions=len(asked), pairs=len(pairs))
    counts["responses"] = sum(map(len, said.values()))
    counts.update(row["reason"] for row in dropped)
    counts.update(fault for row in faulty for fault in row["faults"])
    run.say("pairs", **counts)
    data.atomic_write(run.out / "card.md", card(run.out.name, models, settings, counts, pairs))
    print(length_report(pairs))


CARD = """# {title}

Preference pairs made by `synth.py`: text-to-image prompts, candidate images ranked by a reward model,
responses of several vision-language models ranked by a scorer.

## Files

- `pairs.jsonl`: id, image, question, chosen, rejected, meta (topic, models, scores)
- `pds_dpo.json`: the same in PDS-DPO's format
- `images/`: every candidate
- `dropped.jsonl`, `faults.jsonl`: what was left out, and why

## Models

{models}

Images and texts are their outputs: the models' licences decide what may be done with them.

## Settings

{settings}

## Counts

{counts}

## Length

{length}
"""


def card(title, models, settings, counts, pairs):
    """The data card, Markdown. models: (role, name, source) of each; its files say its hash and licence."""
    rows = [(role, name, command.identity(source), licence(source)) for role, name, source in models]
    return CARD.format(
        title=title, models=markdown(("role", "model", "files", "licence"), rows),
        settings=markdown(("setting", "value"), settings.items()),
        counts=markdown(("what", "n"), counts.items()), length=length_report(pairs))


def licence(source):
    """What the README.md of a model's folder says."""
    readme = Path(source) / "README.md"
    text = readme.read_text(errors="replace") if readme.is_file() else ""
    found = re.findall(r"^license(?:_name)?:\s*(.+)$", text, re.M)
    return ", ".join(found) or "not stated in its folder"


def markdown(head, rows):
    """A table."""
    lines = []
    for row in (head, ["---"] * len(head), *rows):
        cells = [str(cell).replace("|", "/") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
