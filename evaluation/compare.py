"""Which of two models answers better? The paired difference of two answers files.

    python eval_hallu.py compare a.jsonl b.jsonl --out page.html --images val2014/

It prints B - A of each measure. If the answers files hold no truth themselves (POPE, AMBER, CHAIR, MMHal),
--items takes what `score` wrote per item for each of them. Intervals: 95%, bootstrap over images, both files
seeing the same draws. The page for people to vote on is made by classroom/papers/votes.py.
"""
if __name__ == "__main__":
    exit("A part of eval_hallu.py; run: python eval_hallu.py --help")

import data
from data import UserError
from evaluation import benchmarks, metrics, stats
from model.command import NAME


# ---- the paired difference ----
def by_id(path):
    """{(split, id): Answer} of an answers file. Raises UserError."""
    found = {}
    try:
        for answer in stats.read(data.read_records(path, check=benchmarks.ANSWER)):
            key = answer.line.get("split"), answer.id
            if key in found:
                raise UserError(f"id {answer.id} is there twice; keep one of the two")
            found[key] = answer._replace(text=answer.text.strip())
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return found


def pairs(a, b):
    """-> [(key, A's Answer, B's)] of what both answer, in A's order. a, b: of by_id."""
    both = [(key, a[key], b[key]) for key in a if key in b]
    if not both:
        raise UserError("the two files have no question in common; compare answers to the same file")
    if other := [old.id for _, old, new in both if old.question != new.question]:
        raise UserError(f"the two files ask different questions under {len(other)} ids (first: {other[0]}); "
                        "compare answers to the same file")
    return both


def table(found, o):
    """What stats.paired found, as lines of text."""
    lines = [f"A {o.a}",
             f"B {o.b}",
             f"{'percent':26}       A       B   B - A   95% interval"]
    for measure, row in found.items():
        low, high = row["interval"]
        points = f"{row['a']:7.1f} {row['b']:7.1f} {row['change']:+7.1f}"
        lines.append(f"{measure:26} {points}   {low:.1f} to {high:.1f}")
    return lines


def difference(o):
    """The paired difference by the command's options, as lines of text."""
    a, b = by_id(o.a), by_id(o.b)
    both = pairs(a, b)
    old, new = [answer.line for _, answer, _ in both], [answer.line for *_, answer in both]
    items = o.items and [benchmarks.records(path, "file of what `score` wrote", id=NAME, image=NAME,
                                            sums={str: [float, float]}) for path in o.items]
    if not items and all("truth" in line for line in old + new):
        items = map(metrics.classroom_items, (old, new))
    lines = ["The files hold no truth to compare them by: score both, and give --items A.items.jsonl "
             "B.items.jsonl for the paired difference."]
    if items:
        lines = table(stats.paired(*items), o)
    for side, found in (("A", a), ("B", b)):
        lines += [f"{side}: {says}" for says in stats.empty(found.values())]
    if {len(a), len(b)} != {len(both)}:
        lines.append(f"{len(both)} questions that both answer; A answers {len(a)}, B {len(b)}")
    return lines
