"""Several runs on one page, beside the first of them.

    python -m training.report runs/A runs/B ...     starts it
    python classroom/runs.py runs/A runs/B ...      the same: writes runs.html

Curves are drawn on each other; a table has the measures after training, with
paired differences from the first run; answers stand next to each other.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))          # the repository
import data  # noqa: E402
from evaluation import metrics, page  # noqa: E402
from model import command  # noqa: E402
from training import report  # noqa: E402


def beside(runs):
    """The page of the folders of runs, whose first is the one that the others are compared with."""
    logs, after, changes, said = {}, {}, {}, {}
    first, *others = dict.fromkeys(runs)
    for run in (first, *others):
        logs[run] = [line for line in data.read_jsonl(run / "log.jsonl", torn_ok=True) if "step" in line]
        after[run] = report.values(data.read_json(run / "summary.json")["after"])
        changes[run] = {}
        if (run / "after.jsonl").exists():
            said[run] = report.said_by(run, "after")
            paired = metrics.difference(said[first], said[run])
            changes[run] = paired | paired["by_kind"]
    figures, body, longest = "", [], max(map(len, logs.values()))
    for title, says, labels in report.CURVES:
        for key, label in labels.items():
            series = {run: report.means(steps, key) for run, steps in logs.items()}
            figures += report.curve(f"{title}: {label}", says, series, longest)
    for key in after[first]:
        row = [metrics.CLASSROOM.get(key, key)]
        row += [page.num(found.get(key), ".1f") for found in after.values()]
        for run in others:
            change = changes[run].get(key, {"change": None, "interval": ()})
            row.append(report.cell([change["change"], *change["interval"]], "+.1f"))
        body.append(row)
    note = "After training. Differences are paired by image, with 95% intervals."
    head = ["", *after, *(f"{run} − {first}" for run in others)]
    found = page.section("Measures", note, page.table(head, body))
    found += page.section("Training", "", f'<div class="grid" style="--w:440px">{figures}</div>')
    return found + report.answers(first, said)


def main():
    parser = data.Parser(prog="runs.py", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="the folders of the runs")
    parser.add_argument("--out", type=Path, default="runs.html", help="the page [runs.html]")
    o = parser.parse_args()
    try:
        with command.explained("a file of a run is missing or damaged", "give folders of finished runs"):
            body = beside(o.runs)
        data.atomic_write(o.out, page.page("Runs side by side", body, page.TABLES))
        print(o.out)
    except (data.UserError, OSError) as error:
        sys.exit(f"runs.py: {error}")


if __name__ == "__main__":
    main()
