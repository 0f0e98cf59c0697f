"""Seconds and peak memory of opening preference pairs: python bench/open_records.py [FILE] [--n 1000000]

Without FILE it writes n records (JSON lines, then a JSON array) to a temporary folder and opens those."""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--n", type=int, default=1_000_000)
    o = parser.parse_args()
    if o.file:
        from records import Records
        start = time.time()
        records = Records(o.file)
        seconds, peak = time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        size = Path(o.file).stat().st_size >> 20
        return print(f"{o.file}: {len(records)} records, {size} MiB, {seconds:.1f} s, peak {peak} MiB")
    with tempfile.TemporaryDirectory() as folder:
        for name, opening, between, closing in (("a.jsonl", "", "\n", "\n"), ("a.json", "[", ",\n", "]\n")):
            with open(Path(folder) / name, "w") as file:
                for i in range(o.n):
                    file.write((between if i else opening) + json.dumps(
                        {"id": f"pair-{i}", "image": f"{i}.png", "question": 'What is on the sign? "[...]"',
                         "chosen": "A dog lies on the grass, " * 10, "rejected": "A cat sits here, " * 10}))
                file.write(closing)
            subprocess.run([sys.executable, __file__, file.name], check=True)


if __name__ == "__main__":
    main()
