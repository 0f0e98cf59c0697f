"""A finding of reproduce.py: its keys, and its texts, for page.py and figures.py.

A finding is a dict with the keys of FINDING, its rows with those of ROW; reproduce.py leaves out what it has
not. A number is (mean, low, high), or as much of it as there is. A cell of a table may have a second line.
"""
if __name__ == "__main__":
    exit("A part of reproduce.py; run: python classroom/papers/reproduce.py --help")

import re
from collections import Counter

from classroom.world import KINDS
from evaluation import page

FINDING = {"paper": "", "title": "", "claim": "", "rule": "", "verdict": "", "found": "", "metric": "",
           "exploratory": False, "rows": [], "contrasts": [], "paper_measure": "", "figure": "", "xlabel": "",
           "xlog": False, "columns": [], "trace": "", "links": {}, "parts": []}       # where nothing is given
ROW = {"runs": None, "x": None, "series": "", "values": {}, "bases": {}, "paper": {}, "points": [],
       "undefined": {}}                # {measure: in how many of the runs it is 0/0}
METRICS = {key: (key.replace("_", " "), 1, "%") for key in KINDS} | {   # label, better (-1: lower), unit
    "chair_s": ("CHAIR_s", -1, "%"), "chair_i": ("CHAIR_i", -1, "%"), "cover": ("Cover", 1, "%"),
    "hal": ("Hal", -1, "%"), "cog": ("Cog", -1, "%"), "pope_random_acc": ("POPE random", 1, "%"),
    "pope_adversarial_acc": ("POPE adversarial", 1, "%"), "words": ("words a caption", 0, ""),
    "kl": ("KL, nats an answer", 0, ""), "logps_chosen": ("log p of the chosen", 0, ""),
    "chosen": ("change of log p of the chosen", 0, ""),
    "look": ("margin, true minus same theme", 1, ""), "win": ("win", 1, "%"), "tie": ("tie", 0, "%"),
    "loss": ("loss", -1, "%")}
SIGNS = {"appears": ("✓", "yes"), "does not appear": ("✗", "no"), "not run": ("○", "none")}  # CSS's class


def numbers(values):
    """-> (mean, low, high), None for each that is absent."""
    values = values if isinstance(values, list | tuple) else [values]
    return tuple(None if page.num(x) == "–" else x for x in (*values, None, None, None)[:3])


def complete(finding):
    """A finding with every key there, and in each row's values only those that have a mean."""
    def fill(defaults, given):
        return defaults | {key: value for key, value in given.items() if value is not None}
    finding = fill(FINDING, finding)
    rows = [fill(ROW, row) for row in finding["rows"]]
    rows = [row | {"values": {k: numbers(v) for k, v in row["values"].items() if numbers(v)[0] is not None},
                   "points": [x for x in row["points"] if numbers(x)[0] is not None]} for row in rows]
    return finding | {"rows": rows, "paper": finding["paper"] or finding["name"]}


def metric(key):
    """-> (label, better, unit); a key unknown here goes by its own name."""
    return METRICS.get(key, (key, 0, ""))


def heading(key):
    label, better, _ = metric(key)
    return label + {-1: "\u00a0↓", 0: "", 1: "\u00a0↑"}[better]


def digits(values):
    """How many digits show the sign of every number: one, or more where it would read +0.0."""
    seen = [abs(x) for x in values if x is not None and abs(x) > 1e-9]
    return next((n for n in (1, 2) if all(round(x, n) for x in seen)), 3)


def three(values, key, sign=""):
    """(mean, low, high) for reading, the interval in a second line: percents to a tenth, others to .001."""
    mean, low, high = numbers(values)
    if metric(key)[2] == "%":
        form = f"{sign}z.{digits((mean, low, high)) if sign else 1}f"
    else:
        form = "+.3g" if sign else None
        mean, low, high = (x if x is None or abs(x) >= 1 else round(x, 3) + 0.0         # + 0.0: never -0
                           for x in (mean, low, high))
    spread = "" if None in (low, high) else f"\n{page.num(low, form)} to {page.num(high, form)}"
    return page.num(mean, form) + spread


def flat(cell):
    """A cell of two lines in one, the second in brackets."""
    first, *second = cell.split("\n")
    return first + "".join(f" ({line})" for line in second)


def means(finding, row):
    """[(base, its mean)] of the primary measure."""
    found = sorted(row["bases"].get(finding["metric"], {}).items())
    return [(base, mean) for base, mean in found if numbers(mean)[0] is not None]


def paper(finding, row):
    """The paper's number beside a row, or None."""
    return numbers(row["paper"].get(finding["paper_measure"]))[0]


def verdict(finding):
    """[(CSS's class, sign and words)]: the verdict, and beside it that it is exploratory."""
    words = finding["verdict"] or (
        "exploratory" if finding["exploratory"] else "no verdict" if finding["rows"] else "not run")
    sign, kind = SIGNS.get(words, ("◐", "part") if words.startswith("appears") else ("", "free"))
    also = [("free", "exploratory")] * bool(finding["exploratory"] and words != "exploratory")
    return [(kind, f"{sign} {words}".strip()), *also]


def table(finding):
    """[head, *rows]: every arm with its intervals, its bases, and the paper's numbers beside."""
    rows, main = finding["rows"], finding["metric"]
    bases = sorted({base for row in rows for base, _ in means(finding, row)})
    runs = [f"\n{page.num(row['runs'])} run{'s' * (row['runs'] != 1)}" * bool(row["runs"]) for row in rows]
    columns = {"": [row["arm"] + more for row, more in zip(rows, runs, strict=True)]}
    if any(row["series"] not in row["arm"] for row in rows):
        columns["series"] = [row["series"] for row in rows]
    if any(row["x"] is not None for row in rows):
        columns[finding["xlabel"] or "x"] = [page.num(row["x"]) for row in rows]
    columns |= {heading(key): [cell(row, key) for row in rows]
                for key in finding["columns"] or [main] if any(key in row["values"] or key in row["undefined"]
                                                         for row in rows)}
    if bases:
        columns[f"{metric(main)[0]} of {', '.join(bases)}"] = [
            " · ".join(three(dict(means(finding, row)).get(base), main) for base in bases)
            for row in rows]
    columns |= {f"paper: {key}": [page.num(row["paper"].get(key)) for row in rows]
                for key in dict.fromkeys(key for row in rows for key in row["paper"])}
    return [list(columns), *map(list, zip(*columns.values(), strict=True))]


def cell(row, key):
    """A row's measure for reading. Where it is 0/0 in a run it is undefined, and the mean leaves it out."""
    text, lacking = three(row["values"].get(key), key), row["undefined"].get(key)
    if not lacking:
        return text
    says = f"undefined in {lacking} of {row['runs']} runs"
    return f"{text}, {says}" if key in row["values"] else says


def reading(difference, key):
    """What a difference says of its first arm, by its interval alone."""
    _, low, high = numbers(difference)
    if None in (low, high):
        return "no interval"
    if low <= 0 <= high:
        return "not told apart"
    better = metric(key)[1]
    return ("better" if low * better > 0 else "worse") if better else "more" if low > 0 else "less"


def contrasts(finding):
    """[head, *rows]: the differences."""
    return [["difference", "points", "the\u00a0first\u00a0is"], *(
        [f"{c['what']}\n{heading(c['metric'])}",
         three(c["difference"], c["metric"], "+").replace("\n", f"\n{page.num(c.get('level'))}%: "),
         reading(c["difference"], c["metric"])] for c in finding["contrasts"])]


def primary(finding):
    """[text]: the primary numbers, an arm each; of a line its first and its last."""
    kind, key, rows = finding["figure"], finding["metric"], finding["rows"]
    if kind == "stacked":
        return [f"{row['arm']}: " + ", ".join(f"{key} {flat(three(row['values'].get(key), key))}"
                                              for key in ("win", "tie", "loss")) for row in rows]
    texts = {}
    if kind == "lines":
        rows = sorted((row for row in rows if row["x"] is not None), key=lambda row: row["x"])
    for row in rows:
        at = f" at {page.num(row['x'])}" if kind == "lines" else ""
        texts.setdefault(row["series"] if at else row["arm"], []).append(
            f"{flat(three(row['values'].get(key), key))}{at}")
    said = [f"{name} {', '.join(mine[:1] + mine[1:][-1:])}" for name, mine in texts.items()]
    return [heading(key), *said] if said else []


def apart(first, second, better):
    """Is the first interval wholly better than the second? A mean without one is a point."""
    first, second = ([better * x for x in values if x is not None] for values in (first, second))
    return better != 0 and min(first) > max(second)


def method(row):
    return row["series"] or row["arm"]


def place(row):
    """What two rows must share to be compared."""
    return row["x"] if row["x"] is not None else row["arm"] if row["series"] else None


def compared_with(c):
    """-> (the arm that a contrast compares mDPO with, what it says of mDPO); (None, None) without mDPO."""
    sides = re.split(r" [-−–] ", c["what"])
    ours = [re.split(r", | \(", side)[0] == "mDPO" for side in sides]
    if len(sides) != 2 or sum(ours) != 1 or not metric(c["metric"])[1]:
        return None, None
    mean, low, high = numbers(c["difference"])
    if ours[1] and None not in (low, high):                                # mDPO is what is taken away
        mean, low, high = -mean, -high, -low
    return sides[ours[0]], reading((mean, low, high), c["metric"])


def behind(rows, key, compared):
    """("worse than ...", numbers) of each arm of mDPO's behind others that no contrast compares it with."""
    for ours in (row for row in rows if method(row) == "mDPO" and key in row["values"]):
        ahead = [row for row in rows if key in row["values"] and place(row) == place(ours)
                 and not compared & {(key, method(row)), (key, row["arm"])}
                 and apart(row["values"][key], ours["values"][key], metric(key)[1])]
        if ahead:
            yield (f"worse than {', '.join(row['arm'] for row in ahead)}",
                   "; ".join(f"{row['arm']} {flat(three(row['values'][key], key))}"
                             for row in (ours, *ahead)))


def defeats(findings):
    """[head, *rows]: each comparison that mDPO does not win. An arm of votes names first whose wins count."""
    found = []
    for f in findings:
        compared, keys = set(), dict.fromkeys([f["metric"], *f["columns"]])
        for c in f["contrasts"]:
            other, says = compared_with(c)
            compared.add((c["metric"], other))
            if says not in ("better", None):
                against = {"worse": "than", "not told apart": "from"}.get(says, "against")
                found.append([f"{place_of(f)}\n{heading(c['metric'])}", f"{says} {against} {other}",
                              f"{c['what']}: {flat(three(c['difference'], c['metric'], '+'))}"])
        for row in f["rows"] if f["figure"] == "stacked" else ():
            win, loss = (row["values"].get(key) for key in ("win", "loss"))
            if row["arm"].startswith("mDPO") and win and loss and not apart(win, loss, 1):
                says = "worse" if apart(loss, win, 1) else "not told apart"
                votes = f"win {flat(three(win, 'win'))}, loss {flat(three(loss, 'loss'))}"
                found.append([f"{place_of(f)}\nvotes", says, f"{row['arm']}: {votes}"])
        for key in keys if f["figure"] != "stacked" else ():
            found += [[f"{place_of(f)}\n{heading(key)}", *texts]
                      for texts in behind(f["rows"], key, compared)]
    return [["where", "mDPO is", "numbers"], *found]


def place_of(finding):
    """The table or figure of a paper, or which control or sweep it is."""
    paper = finding["paper"]
    return paper if re.search(r"\d", paper) or not finding["title"] else f"{paper}: {finding['title']}"


def said(finding):
    """[(label, paragraph)] of a finding: what was claimed, how it is decided, what was found."""
    rule = finding["rule"] or "none was fixed beforehand: this is exploratory." * finding["exploratory"]
    found = finding["found"] or (f"Not run: `python classroom/papers/reproduce.py {finding['name']}` runs it."
                                 * (not finding["rows"]))
    return [pair for pair in (("Claim", finding["claim"]), ("Rule", rule), ("Found", found)) if pair[1]]


def tally(findings):
    """One sentence: how many of each verdict."""
    signs = Counter(verdict(finding)[0][0] for finding in findings)
    counts = [f"{signs[kind]}\u00a0{words}" for kind, words in (
        ("yes", "✓\u00a0appear"), ("part", "◐\u00a0appear under a condition"), ("no", "✗\u00a0do not appear"),
        ("none", "○\u00a0not run"), ("free", "without a verdict")) if signs[kind]]
    free = sum(bool(finding["exploratory"]) for finding in findings)
    return f"{len(findings)} tables and figures: {', '.join(counts)}; {free} of them exploratory."
