"""All that there is to measure on a GPU, in one command of a few minutes, without a network.

    python bench/gpu.py --minutes 8 --out runs/gpu
    python bench/gpu.py --minutes 5 --out runs/gpu     again: what is missing
    python bench/gpu.py --minutes 0 --out runs/gpu --results bench/RESULTS.md
    python bench/gpu.py --tiny --out runs/tiny        does it run? a minute

First the hardware and whether the numbers are right; then LLaVA-1.5-7B's step in bfloat16 with random
weights, and TRL's beside it; then generation, the main command, Qwen2.5-VL-3B's step, and Stable Diffusion
3's sizes. The models are made on the device: about 40 GB of its memory at least, and little of the disk.

Each part appends a line to OUT/gpu.jsonl when it ends, so that a killed run loses one part. What does not fit
into the minutes is skipped. A part that fails leaves its reason; a later call tries it again, after the rest.
At the end OUT/gpu.md has the tables, --results appends them to a file, and --minutes 0 does nothing else.
Without a GPU, or with --tiny, the shapes are tiny, and no number says anything about a 7B.
"""
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

from section import command, heading, machine

import data

# Each part's function in gpu_parts.py with its arguments, and its minutes on an H100 or H200: a guess, until
# there is a run. The most valuable come first.
PARTS = {"hardware": 0.2, "packed": 0.2, "peft": 0.2, "trl_equality": 0.2, "cpu_log": 0.5, "resume": 0.3,
         "step dpo 2": 0.6, "step mdpo 2": 0.2, "trl 2": 0.5, "step dpo 8": 0.2, "step mdpo 8": 0.4,
         "attention": 0.1, "waits": 0.2, "compiled": 0.8,
         "step dpo 8 compile": 0.8, "step mdpo 8 compile": 0.4, "step dpo 2 compile": 0.2,
         "profile": 0.2, "generation": 0.4, "classroom": 1.2, "qwen": 0.3,
         "step dpo 8 checkpointing": 0.2, "step mdpo 8 checkpointing": 0.4, "trl 8": 0.6,
         "encode": 0.2, "paint": 0.5,
         "step dpo 4": 0.3, "step mdpo 4": 0.2, "step dpo 1": 0.1, "step mdpo 1": 0.1,
         "step dpo 4 checkpointing": 0.2, "step mdpo 4 checkpointing": 0.2,
         "step dpo 2 checkpointing": 0.1, "step mdpo 2 checkpointing": 0.2,
         "step dpo 1 checkpointing": 0.1, "step mdpo 1 checkpointing": 0.1,
         "trl 8 checkpointing": 0.6, "hours": 0}
REST = {"attention": "attention of a packed row, segment by segment (in turn) and in one call (at once)",
        "profile": "a DPO step of two pairs: where its time goes", "hours": "hours of training alone",
        "generation": "generation", "qwen": "Qwen2.5-VL-3B, a step of two pairs with mDPO",
        "classroom": "the main command", "encode": "Stable Diffusion 3's T5",
        "paint": "four images of Stable Diffusion 3"}
# What the papers' runs are: (loss, pairs, epochs), facts of the presets in training/options.py.
RUNS = {"PDS-DPO": ("dpo", 9000, 2), "mDPO": ("mdpo", 10000, 3)}


class OutOfTime(BaseException):
    """The minutes are over. No Exception, lest a library takes it for a fault of its own."""


# ---------------------------------------------------------------------------------------- the lines
def read(path):
    """{part: its line}: the last one that has numbers, else the last one."""
    found = {}
    for line in data.read_jsonl(path, torn_ok=True) if path.exists() else ():
        if "found" in line or "found" not in found.get(line["part"], {}):
            found[line["part"]] = line
    return found


def keep(path, line):
    """Append a line, on the disk when this returns."""
    data.append_jsonl(path, line)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def rows(lines, kind):
    """What the parts of a kind found, `step` or `trl`: in the order of loss, micro-batch, checkpointing."""
    found = [line["found"] for name, line in lines.items() if name.split()[0] == kind and "found" in line]
    return sorted(found, key=lambda row: (row.get("loss", ""), row["micro_batch"], row["checkpointing"],
                                         row.get("compile", False)))


def hours(lines):
    """{run: hours of training alone}, and TRL's: in the best of the measured settings of each."""
    found = {}
    for name, (loss, pairs, epochs) in RUNS.items():
        ours = []
        for row in rows(lines, "step"):
            if row["loss"] == loss:
                first, cached = (row[epoch]["pairs_per_second"] for epoch in ("first", "cached"))
                ours.append((pairs / first + (epochs - 1) * pairs / cached) / 3600)
        theirs = [epochs * pairs / row[loss]["pairs_per_second"] / 3600 for row in rows(lines, "trl")]
        if ours:
            found[name] = min(ours)
        if theirs:
            found[f"{name} with TRL"] = min(theirs)
    if not found:
        raise ValueError("no step was measured yet")
    return found


# ---------------------------------------------------------------------------------------- running
def run(o, path, start):
    """Every part that is missing and fits, most valuable first; those that failed before come last."""
    import gpu_parts
    warnings.simplefilter("ignore", FutureWarning)                     # of transformers about itself
    bench = gpu_parts.Bench(o.tiny)
    about = {**machine(bench.device), "command": command(), "tiny": bench.tiny,
             "device": "a GPU" if bench.device == "cuda" else "a CPU"}
    lines = read(path)
    for line in lines.values():
        for name in ("machine", "tiny"):
            if line["about"][name] != about[name]:
                sys.exit(f"bench/gpu.py: {path} was begun with {name} {line['about'][name]}, here it is "
                         f"{about[name]}: give another --out")
    missing = [name for name in PARTS if "found" not in lines.get(name, {}) and name != "hours"]
    missing.sort(key=lambda name: name in lines)
    signal.signal(signal.SIGALRM, out_of_time)
    signal.signal(signal.SIGTERM, signal.default_int_handler)          # as Ctrl-C
    for name in missing:
        left = o.minutes * 60 - (time.monotonic() - start)
        needs = 0 if bench.tiny else 60 * PARTS[name]
        if left > needs:
            work = partial(getattr(gpu_parts, name.split()[0]), bench, *name.split()[1:])
            line = line_of(name, work, left)
            keep(path, {**line, "about": about})
            bench.tidy(broken="failed" in line)
        else:
            print(f"{name}: skipped, {max(0, left):.0f} s are left", flush=True)
    keep(path, {**line_of("hours", partial(hours, read(path))), "about": about})


def out_of_time(*_):
    raise OutOfTime


def line_of(name, work, seconds=0):
    """A part's line: what work() found, or why it failed. seconds: that it may take, 0 for any."""
    began, found, failed = time.monotonic(), None, ""
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)    # again, if a library swallows the first
    try:
        found = work()
    except OutOfTime:
        failed = "the minutes were over"
    except (Exception, SystemExit) as error:            # whatever it is, the next part runs
        failed = f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    line = {"part": name, "seconds": time.monotonic() - began}
    line |= {"failed": failed} if failed else {"found": found}
    print(f"{name}: {line['seconds']:.1f} s {failed}", flush=True)
    return line


# ---------------------------------------------------------------------------------------- the section
def written(found):
    """Numbers with their names, in a row."""
    rows = []
    for name, value in found.items():
        if isinstance(value, dict):
            rows += [f"{name} {written(value)}"]
        elif name != "ok":
            shown = f"{value:.4g}" if isinstance(value, float) else value
            rows.append(f"{name.replace('_', ' ')} {shown}")
    return ", ".join(rows)


def section(lines):
    """The lines of a section of RESULTS.md."""
    about = next(iter(lines.values()))["about"]
    done = {name: line["found"] for name, line in lines.items() if "found" in line}
    title, model = "On a GPU", "LLaVA-1.5-7B in bfloat16"
    if about["tiny"]:
        title = f"bench/gpu.py rehearsed on {about['device']} with tiny shapes; figures for a GPU: not run"
        model = "a tiny LLaVA in bfloat16"
    out = heading(title, about, about["command"])
    if about["tiny"]:
        out.append("The command runs to its end. No number here says anything about a 7B or a GPU.\n")
    if "hardware" in done:
        out.append(f"Hardware: {written(done['hardware'])}.")

    out += head("is it right?", "relative differences", "within bounds")
    for name in ("packed", "peft", "trl_equality", "cpu_log", "resume", "waits", "compiled"):
        if name in done:
            out.append(row_of(name, written(done[name]), "yes" if done[name]["ok"] else "NO"))
    out += head(model, "micro-batch", "checkpointing", "torch.compile", "epoch", "pairs/s", "tokens/s",
                "GiB", "fraction of the matrix products' rate")
    for row in rows(lines, "step"):
        for epoch, words in (("first", "first"), ("cached", "later")):
            got = row[epoch]
            out.append(row_of(row["loss"], row["micro_batch"], on_off(row), on_off(row, "compile"), words,
                              f"{got['pairs_per_second']:.2f}", f"{got['tokens_per_second']:,.0f}",
                              f"{got['peak_gib']:.1f}", f"{got['fraction']:.0%}"))
    out += head("TRL", "micro-batch", "its checkpointing", "pairs/s", "GiB", "ours, GiB", "ours, first epoch",
                "ours, later epochs")
    for row in rows(lines, "trl"):
        for loss in ("dpo", "mdpo"):
            got = row[loss]
            out.append(row_of(f"{loss}, {got['setting']}", row["micro_batch"], on_off(row),
                              f"{got['pairs_per_second']:.2f}", f"{got['peak_gib']:.1f}",
                              f"{got['ours_peak_gib']:.1f}", f"{got['ours_first']:.2f} x",
                              f"{got['ours_cached']:.2f} x"))
    out += head("the rest", "")
    out += [row_of(words, written(done[name])) for name, words in REST.items() if name in done]
    lack = [f"{name} ({lines.get(name, {}).get('failed', 'skipped')})" for name in PARTS if name not in done]
    out.append(f"\nNot run: {', '.join(lack)}." if lack else "\nEvery part ran.")
    return out


def head(*names):
    return ["", row_of(*names), "|---" * len(names) + "|"]


def row_of(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def on_off(row, name="checkpointing"):
    return "on" if row[name] else "off"


# ---------------------------------------------------------------------------------------- the command
def main():
    start = time.monotonic()
    parser = data.Parser(prog="bench/gpu.py", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=8, help="so many at most; 0: only write the tables (%(default)s)")
    add("--out", default="runs/gpu", help="the folder of gpu.jsonl and gpu.md (%(default)s)")
    add("--results", help="a file to append the tables to")
    add("--tiny", action="store_true", help="tiny shapes on a GPU, too")
    o = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"                                 # before a library reads it
    path = Path(o.out) / "gpu.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    stopped = False
    if o.minutes > 0:
        try:
            run(o, path, start)
        except KeyboardInterrupt:
            stopped = True
    if lines := read(path):
        text = "\n".join(section(lines)) + "\n"
        print(text)
        data.atomic_write(path.with_name("gpu.md"), text)
        if o.results:
            with open(o.results, "a") as file:
                file.write(text)
    if stopped:
        sys.exit("bench/gpu.py: stopped; the same command continues")


if __name__ == "__main__":
    main()
