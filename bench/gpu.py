"""LLaVA-1.5-7B's step on a GPU in one command: speed, memory, fraction of the rate, and TRL's step beside it.

    python bench/gpu.py                15 GB of disk
    python bench/gpu.py --only limit   without TRL

Weights are random, in bfloat16; the micro-batch is 2. TRL's activations take the most memory. Runs
bench/limit.py and bench/vs_trl.py, each in a process of its own, and puts what they found into one table
behind theirs in bench/RESULTS.md. `--shape tiny --device cpu --dtype float32` tries the script itself.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from section import arguments, command, heading, machine, report

HERE = Path(__file__).resolve().parent
KINDS = {"dpo": "DPO, first epoch", "dpo_cached": "DPO, later epochs", "mdpo": "mDPO, first epoch",
         "mdpo_cached": "mDPO, later epochs"}


def table(found, o, about):
    limit, beside = found["limit"], found.get("vs_trl")
    lines = heading(f"On a GPU: shape {o.shape}, {o.dtype}", about, command())
    lines += ["| step of two pairs | pairs/s | tokens/s | fraction of the matrix products' rate | x TRL |",
              "|---|---|---|---|---|"]
    for kind, words in KINDS.items():
        step, ratio = limit["steps"][kind], f"{beside['ratios'][kind]:.2f}" if beside else "-"
        lines.append(f"| {words} | {step['pairs_per_second']:.2f} | {step['tokens_per_second']:,.0f} | "
                     f"{step['fraction']:.0%} | {ratio} |")
    lines.append(f"\nPeak memory {limit['peak_gib']:.1f} GiB.")
    if beside and beside["memory_ratio"]:
        lines.append(f"Ours over TRL's, DPO's first epoch, a process each: {beside['memory_ratio']:.2f}.")
    if "hours" in limit:
        said = ", ".join(f"{name} {hours:.1f}" for name, hours in limit["hours"].items())
        lines.append(f"Hours of training alone at these speeds: {said}.")
    return lines


def main():
    parser = arguments(__doc__, 3)
    parser.set_defaults(shape="7b", device="cuda", dtype="bfloat16")
    parser.add_argument("--only", default="limit,vs_trl", help="limit, vs_trl, or both (%(default)s)")
    o, found = parser.parse_args(), {}
    if unknown := set(o.only.split(",")) - {"limit", "vs_trl"}:
        parser.error(f"--only {min(unknown)}: give limit, vs_trl, or both with a comma")
    with tempfile.TemporaryDirectory() as folder:
        for name in o.only.split(","):
            out = Path(folder) / f"{name}.json"
            asked = [sys.executable, HERE / f"{name}.py", "--out", out]
            for field in ("shape", "device", "dtype", "rounds", "threads", "results"):
                asked += [f"--{field}", str(getattr(o, field))]
            if subprocess.run(asked).returncode:
                sys.exit(f"bench/gpu.py: bench/{name}.py failed; its output is above")
            found[name] = json.loads(out.read_text())
    about = {key: found["limit"][key] for key in machine(o.device)}
    report(table(found, o, about), {**found, **about}, o)


if __name__ == "__main__":
    main()
