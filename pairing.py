"""From scored responses to preference pairs: faults, choice, length gap, formats, data card. Pure functions.

A file of its own, so that what decides which pairs there are reads in one sitting: synth.py brings the rows.

A response's faults, each found on what is left when an echo of the question is taken off:
    echoed   it begins with the question           empty    no letter and no digit
    foreign  most letters are of another script    cut off  the model ran into its limit (where that is not
             than the question's                            known: a long text that ends within a sentence)
A prompt gives no pair where fewer than two of its responses are without fault, where the best and the worst
are the same text, or where their scores lie within `margin` standard deviations of the scorer's scores.

`official=True` is the published pipeline: nothing is filtered, the first maximum is chosen and the first
minimum rejected, whatever they are; the echo is taken off after it was scored, and newlines become blanks.
"""
import re
import statistics
import unicodedata
from collections import Counter

REASONS = ("echoed", "empty", "foreign", "cut off")
PER_PAIR = ("fewer than two responses without fault", "identical", "nearly tied", "not scored")


# ---- faults of one response ----

def unecho(question, response):
    """(what follows an echo of the question, whether there was one): blanks, case, <image> do not count."""
    words = [re.escape(w) for w in question.replace("<image>", " ").split()]
    echo = re.match(r"\s*(?:<image>\s*)?" + r"\s+".join(words), response, re.I) if words else None
    return (response[echo.end():], True) if echo else (response, False)


def scripts(text):
    """How many letters of each script: {"LATIN": 12, ...}."""
    return Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())


def faults(question, response, finished=None):
    """The faults of a response, of REASONS. finished: the model ended it by itself; None: not known."""
    rest, echoed = unecho(question, response)
    rest, own, there = rest.strip(), scripts(question), scripts(rest)
    found = {"echoed": echoed, "empty": not any(c.isalnum() for c in rest)}
    found["foreign"] = bool(own and there) and 2 * there[own.most_common(1)[0][0]] < there.total()
    guess = len(rest.split()) >= 12 and (rest[-1].isalnum() or rest[-1] in ",;-–")
    found["cut off"] = finished is False or (finished is None and guess)
    return [reason for reason in REASONS if found[reason]]


# ---- the choice ----

def select(prompts, responses, scores, margin=0., official=False):
    """-> (pairs, dropped, faulty), lists of dicts in the prompts' order.

    prompts: rows with id, image, question (and what `meta` shall hold); responses: {id: rows with model,
    response, finished}, in the models' order; scores: {(id, model): number}.
    """
    known = [s for s in scores.values() if s is not None]
    gap = margin * (statistics.pstdev(known) if len(known) > 1 else 0.)
    pairs, dropped, faulty = [], [], []
    for prompt in prompts:
        id, question = prompt["id"], prompt["question"]
        rows = [r | {"score": scores.get((id, r["model"]))} for r in responses.get(id, ())]
        if not official:
            found = [faults(question, r["response"], r.get("finished")) for r in rows]
            faulty += [{"id": id, "model": r["model"], "faults": f, "response": r["response"]}
                       for r, f in zip(rows, found, strict=True) if f]
            rows = [r for r, f in zip(rows, found, strict=True) if not f]
        scored = [r for r in rows if r["score"] is not None]
        if len(rows) > 1 and len(scored) < 2:
            reason = "not scored"
        elif len(scored) < 2:
            reason = "fewer than two responses without fault"
        else:
            best, worst = (pick(scored, key=lambda r: r["score"]) for pick in (max, min))  # first of equals
            reason = None if official else (
                "nearly tied" if best["score"] - worst["score"] <= gap else
                "identical" if best["response"].split() == worst["response"].split() else None)
        if reason:
            dropped.append({"id": id, "reason": reason})
            continue
        chosen, rejected = (r["response"].strip() for r in (best, worst))
        if official:
            chosen, rejected = (unecho(question, x)[0].replace("\n", " ").strip() for x in (chosen, rejected))
        meta = {k: v for k, v in prompt.items() if k not in ("id", "image", "question")}
        meta |= {"models": [best["model"], worst["model"]], "scores": [best["score"], worst["score"]]}
        pairs.append({"id": id, "image": prompt["image"], "question": question, "chosen": chosen,
                      "rejected": rejected, "meta": meta})
    return pairs, dropped, faulty


def conversations(pair):
    """A pair in the JSON that PDS-DPO publishes (and LLaVA's trainers read)."""
    asked = {"from": "human", "value": f"<image> {pair['question'].replace('<image>', '').strip()}"}
    return {"id": pair["id"], "image": pair["image"],
            "conversations": [asked, {"from": "gpt", "value": pair["chosen"]}],
            "rejected_conversations": [asked, {"from": "gpt", "value": pair["rejected"]}]}


# ---- what to know before training on them ----

def lengths(pairs):
    """Words in the mean, and how often the chosen response is the longer one (ties count half)."""
    both = [(len(p["chosen"].split()), len(p["rejected"].split())) for p in pairs]
    if not both:
        return {"pairs": 0}
    longer = sum(c > r for c, r in both) + sum(c == r for c, r in both) / 2
    return {"pairs": len(both), "chosen_words": sum(c for c, _ in both) / len(both),
            "rejected_words": sum(r for _, r in both) / len(both), "chosen_longer": longer / len(both)}


def length_report(gap):
    """The lengths in one or two sentences."""
    if not gap["pairs"]:
        return "no pairs"
    text = (f"chosen {gap['chosen_words']:.1f} words, rejected {gap['rejected_words']:.1f}; the chosen one "
            f"is longer in {100 * gap['chosen_longer']:.0f}% of the pairs")
    share = max(gap["chosen_longer"], 1 - gap["chosen_longer"])
    if share < .65:
        return text
    more = "longer" if gap["chosen_longer"] > .5 else "shorter"
    return (f"{text}.\nWARNING: length alone tells the chosen response in {100 * share:.0f}% of the pairs: "
            f"DPO will learn to write {more} answers. Compare with --scorer length, or balance the pairs")


def card(title, models, settings, counts, gap):
    """The data card, Markdown. models: rows of (role, name, revision, licence)."""
    def table(head, rows):
        lines = [[str(cell).replace("|", "/") for cell in row] for row in rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines))
    parts = {
        "": "Preference pairs made by `synth.py`: text-to-image prompts, candidate images ranked by a reward "
            "model, responses of several vision-language models ranked by a scorer.",
        "Files": "- `pairs.jsonl`: id, image, question, chosen, rejected, meta (topic, models, scores)\n"
                 "- `pds_dpo.json`: the same in PDS-DPO's format\n- `images/`: every candidate\n"
                 "- `dropped.jsonl`, `faults.jsonl`: what was left out, and why",
        "Models": table(("role", "model", "revision", "licence"), models) + "\n\nImages and texts are their "
                  "outputs: the models' licences decide what may be done with them.",
        "Settings": table(("setting", "value"), settings.items()),
        "Counts": table(("what", "n"), counts.items()), "Length": length_report(gap)}
    return "\n\n".join(f"## {head}\n\n{text}" if head else f"# {title}\n\n{text}"
                       for head, text in parts.items()) + "\n"
