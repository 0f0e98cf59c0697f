"""What a step costs as its sizes grow, what opening data costs as it grows, and two ranks beside one.

    python bench/scale.py                                   one pinned core, float32: four minutes
    python bench/scale.py --only images,rank --shape prop   some of the parts, at another shape
    python bench/scale.py --shape 7b --device cuda --dtype bfloat16 --only images,response,pairs,rank

One size is changed at a time, all else is as --shape says (`half` has half the width of bench/vs_trl.py's).
The step is the product's, DPO with the reference scored, as in the first epoch. Ranks are processes over
gloo, one pinned thread each, on the same global batch of four pairs: each rank takes its micro-batches, then
the gradient is reduced, the shard stepped, the weights gathered, as in training.
"""
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist
from limit import (
    SHAPES,
    Ours,
    arguments,
    batch_of,
    command,
    heading,
    machine,
    middle,
    pin,
    random_records,
    report,
    rounds,
    write_model,
)

HERE = Path(__file__).resolve().parent
PARTS = {"images": "image tokens", "response": "response tokens", "pairs": "pairs a micro-batch",
         "rank": "LoRA rank", "vocabulary": "vocabulary"}
SIZES = {"images": (168, 336, 672), "response": (30, 120, 480), "pairs": (1, 2, 4, 8), "rank": (8, 32, 128),
         "vocabulary": (512, 8192, 32768)}
TINY = {"images": (28, 56), "response": (9, 18), "pairs": (1, 2), "rank": (4, 8), "vocabulary": (64, 128)}
FIELD = {"images": "pixels", "response": "response", "rank": "rank", "vocabulary": "vocabulary"}
TURNS = 2                                                # of one rank and of two
RECORDS = (1_000, 10_000, 100_000, 1_000_000)


def sweep(part, shape, o):
    """[{"size", "seconds": (median, least, most), "pairs_per_second"}] of a step as one size grows."""
    found, sizes = [], (TINY if o.shape == "tiny" else SIZES)[part]
    sides, pairs, folders = {}, {}, []
    for size in sizes:                                   # all stand at once, so that they can be interleaved
        changed = shape._replace(**{FIELD[part]: size}) if part in FIELD else shape
        folders.append(tempfile.TemporaryDirectory())
        side = Ours(write_model(folders[-1].name, changed, o.dtype, o.device), changed, o.dtype, o.device)
        pairs[size] = size if part == "pairs" else 2
        batch = batch_of(side.m, random_records(changed, pairs[size]), {"chosen", "rejected"})
        sides[size] = lambda side=side, batch=batch: side.step(batch, "dpo", False)
        tokens = side.m.image_tokens
        found.append({"size": tokens if part == "images" else size})
    taken = rounds(sides, o.rounds, o.device)
    for row, size in zip(found, sizes, strict=True):
        row["seconds"] = middle(taken[size])
        row["pairs_per_second"] = pairs[size] / row["seconds"][0]
    for folder in folders:
        folder.cleanup()
    return found


def opening(counts):
    """[{"records", "mib", "seconds", "peak_mib"}] of opening JSON lines, each in a process of its own."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for n in counts:
            path = Path(folder) / f"{n}.jsonl"
            with open(path, "w") as file:
                for i in range(n):
                    file.write(json.dumps({"id": f"pair-{i}", "image": f"{i}.png", "question": "What is it?",
                                           "chosen": "A dog lies on the grass, " * 10,
                                           "rejected": "A cat sits here, " * 10}) + "\n")
            code = ("import json, resource, sys, time; sys.path.insert(0, sys.argv[2])\n"
                    "from records import Records\n"
                    "start = time.perf_counter(); n = len(Records(sys.argv[1]))\n"
                    "seconds = time.perf_counter() - start\n"
                    "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
                    "print(json.dumps([n, seconds, peak]))")
            # ru_maxrss outlives exec: a shell in between keeps this process's own size out of the figure
            done = subprocess.run(["/bin/sh", "-c", '"$0" "$@"; exit $?', sys.executable, "-c", code, path,
                                   str(HERE.parent)], capture_output=True, text=True, check=True)
            seen, seconds, peak = json.loads(done.stdout)
            assert seen == n
            found.append({"records": n, "mib": path.stat().st_size / 2 ** 20, "seconds": seconds,
                          "peak_mib": peak})
            path.unlink()
    return found


def rank_process(rank, world, folder, meeting, o, told):
    """One rank: sends `told` its seconds per step of four pairs, after one that does not count."""
    pin(1, sorted(os.sched_getaffinity(0))[-1 - rank] if hasattr(os, "sched_getaffinity") else None)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    side = Ours(folder, SHAPES[o.shape], o.dtype, "cpu", rank, world)
    records = random_records(SHAPES[o.shape], 4)
    mine = [batch_of(side.m, records[at:at + 2], {"chosen", "rejected"}, at) for at in (0, 2)][rank::world]
    taken = []
    for _ in range(o.rounds + 1):
        if world > 1:
            dist.barrier()
        start = time.perf_counter()
        for batch in mine:
            side.loss(batch, "dpo", False)
        side.optimiser.step(1e-6)
        if world > 1:
            dist.barrier()
        taken.append(time.perf_counter() - start)
    told.send(taken[1:])
    if world > 1:
        dist.destroy_process_group()


def ranks(o):
    """Seconds of one rank and of two, and how much faster two are; runs of each take turns."""
    if len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())) < 2:
        print("ranks: one core alone is allowed here, the second rank has none", file=sys.stderr)
        return {}
    fork, taken = multiprocessing.get_context("fork"), {1: [], 2: []}    # nothing is imported a second time
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, SHAPES[o.shape], o.dtype)
        for turn in range(TURNS):
            for world in (1, 2):
                ends = [fork.Pipe(duplex=False) for _ in range(world)]
                shared = (world, folder, f"{folder}/meeting{turn}", o)
                processes = [fork.Process(target=rank_process, args=(rank, *shared, end), daemon=True)
                             for rank, (_, end) in enumerate(ends)]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join()
                if any(process.exitcode for process in processes):
                    sys.exit("bench/scale.py: a rank failed; what it said stands above")
                taken[world] += ends[0][0].recv()
    one, two = middle(taken[1]), middle(taken[2])
    return {"one": one, "two": two, "ratio": one[0] / two[0], "spread": [one[1] / two[2], one[2] / two[1]]}


def table(found, o, about, threads):
    lines = heading("What a step costs as its sizes grow", about, command())
    lines += [f"Shape {o.shape}, two pairs unless said, {o.dtype}, {threads}; medians of {o.rounds} "
              "interleaved rounds (least, most)."]
    for part, rows in found["step"].items():
        lines += [f"\n| {PARTS[part]} | seconds a step | pairs/s |", "|---|---|---|"]
        for row in rows:
            seconds, least, most = row["seconds"]
            lines.append(f"| {row['size']} | {seconds:.3f} ({least:.3f}, {most:.3f}) | "
                         f"{row['pairs_per_second']:.2f} |")
    if found["records"]:
        lines += ["\n| records opened | size of the file, MiB | seconds | peak memory of the process, MiB |",
                  "|---|---|---|---|"]
        lines += [f"| {r['records']:,} | {r['mib']:,.0f} | {r['seconds']:.2f} | {r['peak_mib']:,.0f} |"
                  for r in found["records"]]
    if found["ranks"]:
        both = found["ranks"]
        lines.append("\nTwo gloo ranks of one pinned thread each, on one global batch of four pairs: "
                     f"{both['ratio']:.2f} x one rank ({both['two'][0]:.3f} s beside {both['one'][0]:.3f} s "
                     f"a step; medians of {TURNS} runs of {o.rounds} steps each, in turns; from the least "
                     f"and most of the steps: {both['spread'][0]:.2f} to {both['spread'][1]:.2f}).")
    return lines


def main():
    parser = arguments(__doc__, 3)
    parser.set_defaults(shape="half")
    parser.add_argument("--only", default=",".join([*PARTS, "records", "ranks"]), help="parts [%(default)s]")
    parser.add_argument("--records", type=int, default=RECORDS[-1], help="at most [%(default)s]")
    o = parser.parse_args()
    parts = o.only.split(",")
    if unknown := sorted(set(parts) - {*PARTS, "records", "ranks"}):
        sys.exit(f"bench/scale.py: --only {','.join(unknown)}: give some of {', '.join(PARTS)}, records, "
                 "ranks")
    about, found = machine(o.device), {"step": {}, "records": [], "ranks": {}}
    if "ranks" in parts:                               # before this process is pinned: children inherit it
        found["ranks"] = ranks(o)
    if "records" in parts:
        found["records"] = opening([n for n in RECORDS if n <= o.records] or [o.records])
    threads = pin(o.threads, o.core) if o.device == "cpu" else o.device
    for part in PARTS:
        if part in parts:
            found["step"][part] = sweep(part, SHAPES[o.shape], o)
    report(table(found, o, about, threads), {**found, **about, "threads": threads}, o)


if __name__ == "__main__":
    main()
