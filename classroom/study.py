"""Run train_dpo.py over bases and seeds, as a user would: where the README's figures come from.

    python classroom/study.py tuning      on tuning scenes, where settings are chosen         about 40 minutes
    python classroom/study.py print       the frozen settings on printed scenes: 3 bases x 5 seeds x 4 methods
    python classroom/study.py table F     means, spreads and the worst run of a file of results, as Markdown

A line that stands in classroom/results/NAME.jsonl is not run again. Two runs go at a time, one thread each.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
BASES = ("base0", "base1", "base2")
KEYS = ("chair_s", "chair_i", "cover", "pope_random_acc", "pope_adversarial_acc")
# Each method has the learning rate with the lowest CHAIR_s on tuning scenes among those that cost at most 6
# points of Cover; 4e-4 is the preset's.
METHODS = {"mDPO": "--loss mdpo", "DPO": "--loss dpo --lr 2e-5", "SFT on the chosen": "--loss sft",
           "DPO without image": "--loss dpo --image_rejected none --lr 2e-5"}
# What was looked at on tuning scenes, in this order: (name, base, options).
RANK_64 = "--lora_r 64 --set lora_alpha=128"
RATES = ("1e-4", "2e-4", "4e-4", "8e-4")
TUNING = [(f"lr {lr}", base, f"--lr {lr}") for base, lr in product(BASES[:2], RATES)] + [
    ("more epochs", "base0", "--lr 4e-4 --epochs 9"),
    ("more pairs", "base0", "--lr 4e-4 --set pairs=4000 --epochs 2"),
    ("beta .03", "base0", "--lr 4e-4 --beta .03"),
    ("beta .3", "base0", "--lr 4e-4 --beta .3"),
    ("rank 64", "base0", f"--lr 4e-4 {RANK_64}"),
    ("smaller batch", "base0", "--lr 4e-4 --batch 4 --micro_batch 4"),
    ("rank 64, lr 8e-4", "base0", f"--lr 8e-4 {RANK_64}"),
    ("rank 64, lr 2e-3", "base0", f"--lr 2e-3 {RANK_64}"),
    ("rank 64, copo alone", "base0", f"--lr 4e-4 {RANK_64} --loss copo"),
    ("rank 64, 3000 pairs", "base0", f"--lr 8e-4 {RANK_64} --set pairs=3000 --epochs 2"),
    ("rank 64, dpo + ancpo", "base0", f"--lr 4e-4 {RANK_64} --loss dpo+ancpo"),
    ("rank 64, no questions", "base0", f"--lr 4e-4 {RANK_64} --set pair_options=--questions=0"),
    ("rank 64, faithful 1", "base0", f"--lr 4e-4 {RANK_64} --set pair_options=--faithful=1"),
    ("rank 64, cue 0", "base0", f"--lr 4e-4 {RANK_64} --set pair_options=--cue=0"),
    ("rank 64, sft", "base0", f"--lr 4e-4 {RANK_64} --loss sft"),
    ("rank 64, delta 3", "base0", f"--lr 4e-4 {RANK_64} --delta 3"),
    ("rank 64, delta 3, 3000 pairs", "base0", f"--lr 8e-4 {RANK_64} --delta 3 --set pairs=3000 --epochs 2"),
    ("rank 64, 6000 pairs once", "base0", f"--lr 8e-4 {RANK_64} --set pairs=6000 --epochs 1"),
    ("rank 64, 4000 pairs 4 times", "base0", f"--lr 8e-4 {RANK_64} --set pairs=4000 --epochs 4"),
    ("rank 64, anchors wlm", "base0", f"--lr 4e-4 {RANK_64} --anchors wlm"),
    ("rank 64, 12000 pairs once", "base0", f"--lr 8e-4 {RANK_64} --set pairs=12000 --epochs 1"),
    ("rank 64, 12000 pairs once, batch 32", "base0",
     f"--lr 8e-4 {RANK_64} --set pairs=12000 --epochs 1 --batch 32"),
    ("rank 64, 6000 pairs once, lr 4e-4", "base0", f"--lr 4e-4 {RANK_64} --set pairs=6000 --epochs 1"),
    ("rank 64, 6000 pairs once, lr 4e-4", "base1", f"--lr 4e-4 {RANK_64} --set pairs=6000 --epochs 1"),
    ("rank 64", "base1", f"--lr 4e-4 {RANK_64}"),
    ("rank 128", "base0", "--lr 4e-4 --lora_r 128 --set lora_alpha=256"),
] + [(f"rank 64, {loss}, lr {lr}", "base0", f"--loss {loss} --lr {lr} {RANK_64}")
     for loss, lr in product(("dpo", "sft"), ("2e-5", "5e-5", "1e-4", "2e-4"))]


def cells(name):
    """The runs of a study. Those for tuning have seed 100, and name what the preset did not yet hold."""
    if name == "tuning":
        first = "--loss mdpo --lora_r 16 --set lora_alpha=32 --epochs 3 --set split=tune --eval_seed 50"
        size = "--set scenes=600 --set questions=1200"
        return [{"name": n, "base": base, "seed": 100, "options": f"{first} {size} {options}"}
                for n, base, options in TUNING]
    return [{"name": method, "base": base, "seed": seed, "options": options}
            for (method, options), seed, base in product(METHODS.items(), range(5), BASES)]


def run(cell, results):
    """One training run in a folder of its own; appends the cell and its scores to the results."""
    out = Path(tempfile.mkdtemp()) / "run"
    command = [sys.executable, str(HERE.parent / "train_dpo.py"), "--model", cell["base"], "--out", str(out),
               "--seed", str(cell["seed"]), *cell["options"].split()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"study.py: {' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    summary = json.loads((out / "summary.json").read_text())
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    before, after = ({k: v for k, v in summary[when].items() if k in (*KEYS, "by_kind")}
                     for when in ("before", "after"))
    with open(results, "a") as f:
        f.write(json.dumps({**cell, "before": before, "after": after, "steps": summary["steps"],
                            "seconds": summary["seconds"], "logps/chosen": last["logps/chosen"]}) + "\n")
    shutil.rmtree(out.parent)
    scores = [f"{k} {before[k]:.1f} -> {after[k]:.1f}" for k in KEYS]
    print(cell["name"], cell["base"], cell["seed"], *scores, flush=True)


def study(name):
    results = HERE / "results" / f"{name}.jsonl"
    results.parent.mkdir(exist_ok=True)
    lines = results.read_text().splitlines() if results.exists() else []
    there = {tuple(json.loads(x)[k] for k in ("name", "base", "seed")) for x in lines}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda cell: run(cell, results),
                      [c for c in cells(name) if (c["name"], c["base"], c["seed"]) not in there]))


def table(path):
    """Markdown: mean ± standard deviation over runs, and the worst run of each."""
    rows = [json.loads(x) for x in Path(path).read_text().splitlines()]

    def cell(values):
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread}"

    def line(name, runs, *more):
        scores = [cell([run[key] for run in runs]) for key in KEYS]
        counting = cell([run["by_kind"]["counting"]["acc"] for run in runs])
        return f"| {' | '.join([name, str(len(runs)), *scores, counting, *more])} |"

    bases = list({row["base"]: row["before"] for row in rows}.values())
    lines = ["| | runs | CHAIR_s | CHAIR_i | Cover | POPE random | POPE adversarial | counting | "
             "CHAIR_s / base's (worst) | Cover, worst change |",
             "|" + "---|" * 10, line("before", bases, "", "")]
    for name in dict.fromkeys(row["name"] for row in rows):
        runs = [row for row in rows if row["name"] == name]
        share = [row["after"]["chair_s"] / row["before"]["chair_s"] for row in runs]
        lost = min(row["after"]["cover"] - row["before"]["cover"] for row in runs)
        lines.append(line(name, [row["after"] for row in runs],
                          f"{statistics.mean(share):.2f} ({max(share):.2f})", f"{lost:+.1f}"))
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"] and len(sys.argv) == 3:
        print("\n".join(table(sys.argv[2])))
    elif sys.argv[1:] in (["tuning"], ["print"]):
        study(sys.argv[1])
    else:
        sys.exit(f"study.py: give tuning, print, or table FILE; not {' '.join(sys.argv[1:]) or 'nothing'}")
