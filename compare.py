"""Which of two models answers better? The paired difference of two answers files.

    python eval_hallu.py compare a.jsonl b.jsonl --out page.html --images val2014/

prints B - A of each measure and writes a page for people to choose on (ballot.py). Where the answers files
hold no truth themselves (AMBER, CHAIR, MMHal), --items takes what `score` wrote per item for each of them.

Intervals: 95%, bootstrap over images, both files seeing the same draws. The sign test asks how often a fair
coin would part the items on which the two differ as unevenly as this: exact, two-sided.
"""
import json
from collections import Counter
from pathlib import Path

import numpy as np

import ballot
import data
import metrics
import tally

LOWER = {"chair", "hal", "cog", "chair_s", "chair_s_refine", "chair_i", "hallucination_rate"}    # the less


def pairs(a_path, b_path):
    """-> [(id, line of A, line of B)] of what both files answer, in A's order; how many each answers."""
    def by_id(path):
        found = {}
        for number, line in enumerate(data.read_records(path), 1):
            if "settings" in line:
                continue
            key = (line.get("split"), line.get("question_id", line.get("id", line.get("image_id"))))
            if key[1] is None or not isinstance(ballot.text(line), str):
                raise data.UserError(f"{path}, record {number} has no id or no answer in text; give what "
                                     "`answers` wrote")
            if key in found:
                raise data.UserError(f"{path}: id {key[1]} stands there twice; keep one of the two")
            found[key] = line
        return found
    a, b = by_id(a_path), by_id(b_path)
    shared = [key for key in a if key in b]
    if not shared:
        raise data.UserError(f"{a_path} and {b_path} have no question in common; compare answers to the same "
                             "file")
    if other := [key[1] for key in shared if ballot.question(a[key]) != ballot.question(b[key])]:
        raise data.UserError(f"{a_path} and {b_path} ask different questions under {len(other)} ids (first: "
                             f"{other[0]}); compare answers to the same file")
    return [(key, a[key], b[key]) for key in shared], (len(a), len(b))


def items_of(lines):
    """Per-item results of answers that carry their truth (the classroom's, POPE's); None of others."""
    if all("truth" in line and "kind" in line for line in lines):
        return [{"id": n["id"], "image": n.get("image"), "sums": metrics.judge(n)[0]} for n in lines]
    if all("label" in line and "question_id" in line for line in lines):
        splits = {}
        for line in lines:
            splits.setdefault(line.get("split", "questions"), []).append({**line, "text": line["question"]})
        return metrics.pope(splits, [{"split": "questions", **line} for line in lines])[1]
    return None


def sums(item):
    """What an item adds to each measure, {measure: (numerator, denominator)}, of whatever benchmark it is."""
    if "sums" in item:
        return item["sums"]
    if "label" in item:
        yes, true = item["said"] == "yes", item["label"] == "yes"
        return {"accuracy": (item["right"], 1), "f1": (2 * (yes and true), yes + true)}
    if "cover_num" in item:
        return {"chair": (item["hal"], item["mentions"]), "cover": (item["cover"], item["cover_num"]),
                "hal": (1 - item["non_hallu"], 1), "cog": (item["cog"], item["cog_num"])}
    if "chair_s" in item:
        n = len(item["generated"])
        return {"chair_s": (item["chair_s"], 1), "chair_s_refine": (item["chair_s"], int(n > 0)),
                "chair_i": (len(item["hallucinated"]), n)}
    if "score" in item:                                               # MMHal's: shown as it is, no percent
        n = int(item["score"] is not None)
        score = item["score"] or 0
        return {"score": (score / 100, n), "hallucination_rate": (n * (score < 3), n)}
    return {"accuracy": (item["right"], 1)} if "right" in item else {}                 # {}: could not be read


def paired(a_items, b_items, seed=0, resamples=1000):
    """-> {measure: {"a", "b", "change", "interval", "better", "worse", "p", "n"}} of items with equal ids."""
    def key(item):
        return item.get("split"), item["id"]
    b_items = {key(item): item for item in b_items}
    both = [(a, b_items[key(a)]) for a in a_items if key(a) in b_items]
    if not both:
        raise data.UserError("the two files of items have no id in common; give items of the same benchmark")
    units = {unit: n for n, unit in enumerate(dict.fromkeys(a.get("image") or a["id"] for a, _ in both))}
    rows = [(units[a.get("image") or a["id"]], sums(a), sums(b)) for a, b in both]
    measures = list(dict.fromkeys(measure for _, a, _ in rows for measure in a))
    tables = np.zeros((2, len(units), len(measures), 2))
    signs = {measure: Counter() for measure in measures}
    for unit, *sides in rows:
        for side, found in enumerate(sides):
            for measure, parts in found.items():
                tables[side, unit, measures.index(measure)] += np.array(parts, dtype=float)
        for measure in sides[0]:
            (a, n), (b, m) = (side.get(measure, (0, 0)) for side in sides)
            if n and m:
                signs[measure][np.sign(b / m - a / n) * (-1 if measure in LOWER else 1)] += 1
    draws = metrics._resample(list(tables), seed, resamples)
    points = np.nan_to_num(metrics._percent(tables.sum(1)))                              # (2, measures)
    out = {}
    for k, measure in enumerate(measures):
        change, better, worse = float(points[1, k] - points[0, k]), signs[measure][1], signs[measure][-1]
        out[measure] = {"a": float(points[0, k]), "b": float(points[1, k]), "change": change,
                        "interval": tally.interval(draws[1][:, k] - draws[0][:, k], change),
                        "better": better, "worse": worse, "p": ballot.sign_test(better, worse),
                        "n": len(both)}
    return out


def table(found, names):
    """paired()'s result as lines of text."""
    lines = [f"A {names[0]}", f"B {names[1]}",
             f"{'percent':26}{'A':>8}{'B':>8}{'B - A':>8}   95% interval       better  worse  p of sign test"]
    for measure, row in found.items():
        low, high = row["interval"]
        signs = "" if measure.endswith("f1") else f"{row['better']:8}{row['worse']:7}  {row['p']:.2g}"
        lines.append(f"{measure:26}{row['a']:8.1f}{row['b']:8.1f}{row['change']:+8.1f}   "
                     f"{f'{low:.1f} to {high:.1f}':16}{signs}")
    return "\n".join(lines)


def run_compare(o):
    (both, sizes), names = pairs(o.a, o.b), (str(o.a), str(o.b))
    items = [data.read_records(path) for path in o.items or ()] or [items_of([side[k] for side in both])
                                                                    for k in (1, 2)]
    shown, equal = ballot.write(both, names, o.out, o.images, o.n, o.seed)
    if all(items):
        print(table(paired(*items), names))
    else:
        print("The files hold no truth to compare them by: score both, and give --items A.items.jsonl "
              "B.items.jsonl for the paired difference.")
    if set(sizes) != {len(both)}:
        print(f"{len(both)} questions that both answer; A answers {sizes[0]}, B {sizes[1]}")
    print(f"{o.out}: {shown} pairs to choose from" + f", {equal} equal pairs left out" * (equal > 0)
          + ("" if o.images else "; without pictures, for want of --images"))


def run_votes(o):
    found = ballot.preference(*ballot.read_votes(o.votes))
    data.atomic_write(o.out, json.dumps(found, indent=1) + "\n")
    print(ballot.table(found))


def positive(text):
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError
    return int(text)


def add_parser(steps):
    p = steps.add_parser("compare", help="two answers files: the paired difference, and a page to choose on")
    p.set_defaults(run=run_compare)
    p.add_argument("a", type=Path, help="answers of the one model")
    p.add_argument("b", type=Path, help="answers of the other to the same questions")
    p.add_argument("--out", required=True, type=Path, help="page.html")
    p.add_argument("--images", type=Path, help="the folder of the images, to be shown [no images]")
    p.add_argument("--items", type=Path, nargs=2, metavar=("A.items.jsonl", "B.items.jsonl"),
                   help="what `score` wrote per item, where the answers do not hold the truth themselves")
    p.add_argument("--n", type=positive, default=100, help="pairs on the page, drawn at random [100]")
    p.add_argument("--seed", type=int, default=0, help="of the pairs and of their sides [0]")


def add_votes_parser(kinds):
    p = kinds.add_parser("votes", help="what people chose on a page of `compare`")
    p.set_defaults(run=run_votes)
    p.add_argument("votes", type=Path, nargs="+", help="votes-NAME.json as downloaded, one a rater")
    p.add_argument("--out", required=True, type=Path, help="preference.json")
