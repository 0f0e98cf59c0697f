"""Run train_dpo.py over bases and seeds, as a user would, and keep one line a run: where the README's figures come from.

    python classroom/study.py tuning      settings are chosen here: tuning scenes, seeds 100 and up    about an hour
    python classroom/study.py print       the frozen settings: printed scenes, 3 bases x 5 seeds       about an hour
    python classroom/study.py table F     means, spreads and the worst run of a file of results

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
METHODS = {"mDPO": "--loss mdpo", "DPO": "--loss dpo", "DPO, no image": "--loss dpo --image_rejected none",
           "SFT": "--loss sft", "DPO + CoPO": "--loss dpo+copo", "DPO + AncPO": "--loss dpo+ancpo"}


def tuning():
    """What was looked at, on tuning scenes and in this order."""
    def cell(study, base, options, scenes="scenes=600 --set questions=1200"):
        return {"study": study, "base": base, "seed": 100,
                "options": f"--loss mdpo --set split=tune --eval_seed 50 --set {scenes} {options}"}
    for base, lr in product(BASES[:2], ("1e-4", "2e-4", "4e-4", "8e-4")):
        yield cell(f"lr {lr}", base, f"--lr {lr} --epochs 3")
    for name, options in {
            "more epochs": "--lr 4e-4 --epochs 9", "more pairs": "--lr 4e-4 --set pairs=4000 --epochs 2",
            "beta .03": "--lr 4e-4 --beta .03", "beta .3": "--lr 4e-4 --beta .3", "rank 64": "--lr 4e-4 --lora_r 64 --set lora_alpha=128",
            "smaller batch": "--lr 4e-4 --batch 4 --micro_batch 4"}.items():
        yield cell(name, "base0", options)
    for name, options in {
            "rank 64, lr 8e-4": "--lr 8e-4 --lora_r 64 --set lora_alpha=128", "rank 64, lr 2e-3": "--lr 2e-3 --lora_r 64 --set lora_alpha=128",
            "rank 64, copo alone": "--lr 4e-4 --lora_r 64 --set lora_alpha=128 --loss copo",
            "rank 64, 3000 pairs": "--lr 8e-4 --lora_r 64 --set lora_alpha=128 --set pairs=3000 --epochs 2",
            "rank 64, dpo + ancpo": "--lr 4e-4 --lora_r 64 --set lora_alpha=128 --loss dpo+ancpo",
            "rank 64, no questions": "--lr 4e-4 --lora_r 64 --set lora_alpha=128 --set pair_options=--questions=0",
            "rank 64, faithful 1": "--lr 4e-4 --lora_r 64 --set lora_alpha=128 --set pair_options=--faithful=1",
            "rank 64, cue 0": "--lr 4e-4 --lora_r 64 --set lora_alpha=128 --set pair_options=--cue=0",
            "rank 64, sft": "--lr 4e-4 --lora_r 64 --set lora_alpha=128 --loss sft",
            "rank 64, delta 3": "--lr 4e-4 --lora_r 64 --set lora_alpha=128 --delta 3",
            "rank 64, delta 3, 3000 pairs": "--lr 8e-4 --lora_r 64 --set lora_alpha=128 --delta 3 --set pairs=3000 --epochs 2",
            "rank 64, 6000 pairs once": "--lr 8e-4 --lora_r 64 --set lora_alpha=128 --set pairs=6000 --epochs 1",
            "rank 64, 4000 pairs 4 times": "--lr 8e-4 --lora_r 64 --set lora_alpha=128 --set pairs=4000 --epochs 4",
            "rank 64, anchors wlm": "--lr 4e-4 --lora_r 64 --set lora_alpha=128 --anchors wlm",
            }.items():
        yield cell(name, "base0", options)
    many = "--lora_r 64 --set lora_alpha=128 --epochs 1"
    yield cell("rank 64, 12000 pairs once", "base0", f"--lr 8e-4 {many} --set pairs=12000")
    yield cell("rank 64, 12000 pairs once, batch 32", "base0", f"--lr 8e-4 {many} --set pairs=12000 --batch 32")
    yield cell("rank 64, 12000 pairs once", "base1", f"--lr 8e-4 {many} --set pairs=12000")
    yield cell("rank 64, 12000 pairs once", "base2", f"--lr 8e-4 {many} --set pairs=12000")


def printed():
    """The frozen settings: every method with the preset's own values."""
    for method, seed, base in product(METHODS, range(5), BASES):
        yield {"method": method, "base": base, "seed": seed, "options": METHODS[method]}


def run(cell, results):
    """One training run in a folder of its own; appends the cell with its summary to the results."""
    out = Path(tempfile.mkdtemp()) / "run"
    command = [sys.executable, str(HERE.parent / "train_dpo.py"), "--model", cell["base"], "--seed", str(cell["seed"]),
               "--out", str(out), *cell["options"].split()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"study.py: {' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    summary = json.loads((out / "summary.json").read_text())
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    keep = {k: {m: v for m, v in summary[k].items() if m in KEYS or m == "by_kind"} for k in ("before", "after")}
    with open(results, "a") as f:
        f.write(json.dumps({**cell, **keep, "logps/chosen": last["logps/chosen"], "rewards/chosen": last["rewards/chosen"],
                            "steps": summary["steps"], "seconds": summary["seconds"]}) + "\n")
    shutil.rmtree(out.parent)
    after, before = summary["after"], summary["before"]
    print(*(v for k, v in cell.items() if k != "options"), *(f"{k} {before[k]:.1f} -> {after[k]:.1f}" for k in KEYS), flush=True)


def study(name, cells):
    results = HERE / "results" / f"{name}.jsonl"
    results.parent.mkdir(exist_ok=True)
    lines = [json.loads(x) for x in results.read_text().splitlines()] if results.exists() else []
    there = [{k: line.get(k) for k in ("base", "seed", "options")} for line in lines]
    missing = [c for c in cells if {k: c[k] for k in ("base", "seed", "options")} not in there]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda cell: run(cell, results), missing))


def table(path):
    """Lines of a markdown table: mean ± standard deviation over runs, and the worst run's share of its base's CHAIR_s."""
    rows = [json.loads(x) for x in Path(path).read_text().splitlines()]
    groups = {}
    for row in rows:
        group = ", ".join(str(v) for k, v in row.items() if k in ("method", "study", "split"))
        groups.setdefault(group, []).append(row)
    lines = ["| | runs | CHAIR_s | CHAIR_i | Cover | POPE random | POPE adversarial | worst CHAIR_s, share of base | "
             "worst Cover change |", "|---|---|---|---|---|---|---|---|---|"]
    def cell(values):
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values) if len(values) > 1 else 0:.1f}"
    for when, chosen in [("before", {"base": rows}), ("after", groups)]:
        for group, members in chosen.items():
            worst = max(r["after"]["chair_s"] / r["before"]["chair_s"] for r in members)
            lost = min(r["after"]["cover"] - r["before"]["cover"] for r in members)
            lines.append(f"| {group} | {len(members)} | " + " | ".join(cell([r[when][k] for r in members]) for k in KEYS)
                         + (f" | {worst:.2f} | {lost:+.1f} |" if when == "after" else " | | |"))
    return lines


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"] and len(sys.argv) == 3:
        print("\n".join(table(sys.argv[2])))
    elif sys.argv[1:] in (["tuning"], ["print"]):
        study(sys.argv[1], list(tuning() if sys.argv[1] == "tuning" else printed()))
    else:
        sys.exit(f"study.py: give tuning, print, or table FILE; not {' '.join(sys.argv[1:]) or 'nothing'}")
