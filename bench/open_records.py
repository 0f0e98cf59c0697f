"""Seconds and peak memory of opening preference pairs.

    python bench/open_records.py          a million JSON lines, then an array
    python bench/open_records.py FILE     a file of your own

JSON lines are indexed (a second for a million); an array is read whole.
"""
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

LAYOUTS = {"a.jsonl": ("", "\n", "\n"), "a.json": ("[", ",\n", "]\n")}      # before, between, after records


def measure(path):
    from training.records import Records
    start = time.time()
    records = Records(path)
    seconds, peak = time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    size = Path(path).stat().st_size >> 20
    print(f"{path}: {len(records):,} records, {size} MiB, {seconds:.2f} s, peak {peak} MiB")


def write(path, n):
    before, between, after = LAYOUTS[path.name]
    with open(path, "w") as file:
        file.write(before)
        for i in range(n):
            file.write(between if i else "")
            file.write(json.dumps({"id": f"pair-{i}", "image": f"{i}.png",
                                   "question": 'What is on the sign? "[...]"',
                                   "chosen": "A dog lies on the grass, " * 10,
                                   "rejected": "A cat sits here, " * 10}))
        file.write(after)


def main():
    parser = data.Parser(prog="bench/open_records.py", description=__doc__)
    parser.add_argument("file", nargs="?", help="preference pairs [written anew]")
    parser.add_argument("--n", type=int, default=1_000_000, help="records to write [%(default)s]")
    o = parser.parse_args()
    if o.file:
        return measure(o.file)
    with tempfile.TemporaryDirectory() as folder:
        for name in LAYOUTS:
            write(Path(folder) / name, o.n)
            # a process of its own, whose peak is the opening's alone
            subprocess.run([sys.executable, __file__, str(Path(folder) / name)], check=True)


if __name__ == "__main__":
    main()
