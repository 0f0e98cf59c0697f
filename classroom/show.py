"""What the lab looks at, as tables: pairs with their invented words marked, and stretches of a run's log.

    python classroom/show.py pairs runs/mdpo/data/pairs.jsonl --n 3
    python classroom/show.py log runs/mdpo runs/dpo --steps 1,1-30,160-189
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from classroom import world  # noqa: E402

MEASURES = {"loss": "loss", "rewards/chosen": "reward of the chosen answer",
            "rewards/rejected": "reward of the rejected answer",
            "rewards/image_rejected": "reward with the rejected image",
            "rewards/margins": "margin between the answers", "rewards/accuracies": "pairs above 0, %",
            "rewards/image_margins": "margin between the images",
            "rewards/image_accuracies": "pairs above 0 by image, %"}


# ---- pairs ----
def marked(text, present):
    """The text with *stars* around each object that is not in the picture."""
    words = []
    for word in text.split():
        invented = any(named not in present for named in world.mentions(word))
        words.append(f"*{word}*" if invented else word)
    return " ".join(words)


def pair(record):
    """A pair of the built-in world in four lines. Raises UserError for another."""
    present = record.get("meta", {}).get("present")
    if present is None:
        raise data.UserError(f"record {record.get('id')} does not say what its picture shows (meta.present): "
                             "this table is for pairs of classroom/pairs.py")
    shown = ", ".join(f"{n} {what}{'s' * (n > 1)}" for what, n in present.items())
    is_caption = record["meta"]["kind"] == "caption"
    answers = [(role, marked(record[role], present) if is_caption else record[role])
               for role in ("chosen", "rejected")]
    lines = [("picture", f"{shown} ({record['image']})"), ("question", record["question"]), *answers]
    return "\n".join([record["id"], *(f"  {name:9} {text}" for name, text in lines)])


def show_pairs(o):
    for number, record in enumerate(data.read_jsonl(o.file)):
        if number == o.n:
            break
        print(pair(record), end="\n\n")
    print("A word in *stars* is not in the picture.")


# ---- log ----
def stretches(text):
    """"1,31-60" -> [(1, 1), (31, 60)]"""
    found = re.findall(r"^(\d+)(?:-(\d+))?$", text.replace(",", "\n"), re.MULTILINE)
    if len(found) != text.count(",") + 1:
        raise data.UserError(f"--steps {text}: give steps and stretches of steps, such as 1,31-60")
    return [(int(first), int(last or first)) for first, last in found]


def column(steps, key, first, last):
    """The mean of a measure over a stretch of steps, for reading; "-" where there is none."""
    values = [line[key] for line in steps if first <= line["step"] <= last and key in line]
    if not values:
        return "-"
    mean = sum(values) / len(values)
    return f"{100 * mean:.0f}" if "accuracies" in key else f"{mean:.4f}" if key == "loss" else f"{mean:+.2f}"


def show_log(o):
    wanted = stretches(o.steps)
    heads = [f"{first}" if first == last else f"{first}-{last}" for first, last in wanted]
    for run in o.runs:
        steps = [line for line in data.read_jsonl(run / "log.jsonl") if "loss" in line]
        print(f"{f'{run}, steps':34}" + "".join(f"{head:>9}" for head in heads))
        for key, says in MEASURES.items():
            cells = [column(steps, key, *stretch) for stretch in wanted]
            if set(cells) != {"-"}:
                print(f"{says:34}" + "".join(f"{cell:>9}" for cell in cells))
        print()


def main():
    parser = data.Parser(prog="show.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ask = commands.add_parser("pairs", help="pairs, with the words that are not in the picture marked")
    ask.add_argument("file", type=Path, help="pairs.jsonl of classroom/pairs.py or of a run")
    ask.add_argument("--n", type=int, default=3, help="how many (%(default)s)")
    ask.set_defaults(show=show_pairs)
    ask = commands.add_parser("log", help="means over stretches of a run's steps")
    ask.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    ask.add_argument("--steps", default="1", help="steps and stretches, such as 1,31-60 (%(default)s)")
    ask.set_defaults(show=show_log)
    o = parser.parse_args()
    try:
        o.show(o)
    except data.UserError as error:
        sys.exit(f"show.py: {error}")


if __name__ == "__main__":
    main()
