"""What a step costs as its sizes grow, what opening data costs as it grows, and two ranks beside one.

    python bench/scale.py                                   four minutes
    python bench/scale.py --only images,rank --shape prop   some of the parts
    python bench/scale.py --only reading                    1024-pixel pictures
    python bench/scale.py --only images,rank --shape 7b --device cuda

Without options it measures one pinned core in float32. One size is changed at a time, all else is as
--shape says (`half` has half the width of bench/vs_trl.py's). The step is the product's, DPO with the
reference scored, as in the first epoch. Ranks are processes over gloo, one pinned thread each, on the same
global batch of four pairs: each rank takes its micro-batches, then the gradient is reduced, the shard
stepped, the weights gathered, as in training.

Reading is the product's (batches.Batches): 10,000 mDPO pairs over 200 different JPEGs of 1024 x 1024 pixels,
each decoded, cropped, resized to 336 twice, tokenised and hashed. The step beside it is a sleep, as an
accelerator's is to the processor; `waiting` is the share of the seconds that the loop waits for pairs.
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
from limit import Ours, as_train_dpo, batch_of, middle, pin, random_records, rounds, write_model
from section import SHAPES, arguments, command, heading, machine, report

from model import front
from model.command import Ranks
from training import batches, options
from training.records import Records

HERE = Path(__file__).resolve().parent
PARTS = {"images": "image tokens", "response": "response tokens", "pairs": "pairs a micro-batch",
         "rank": "LoRA rank", "vocabulary": "vocabulary"}
SIZES = {"images": (168, 336, 672), "response": (30, 120, 480), "pairs": (1, 2, 4, 8), "rank": (8, 32, 128),
         "vocabulary": (512, 8192, 32768)}
TINY = {"images": (28, 56), "response": (9, 18), "pairs": (1, 2), "rank": (4, 8), "vocabulary": (64, 128)}
FIELD = {"images": "pixels", "response": "response", "rank": "rank", "vocabulary": "vocabulary"}
SIDE, STEPS, WORKERS, PACES = 1024, 6, (1, 2, 4, 8), (8, 16, 32)      # pixels, steps, threads, pairs a second
TURNS = 2                                                # of one rank and of two
RECORDS = (1_000, 10_000, 100_000, 1_000_000)


def sweep(part, shape, o):
    """[{"size", "seconds": (median, least, most), "pairs_per_second"}] of a step as one size grows."""
    found, sizes = [], (TINY if o.shape == "tiny" else SIZES)[part]
    sides, pairs, folders = {}, {}, []
    for size in sizes:                                   # all in memory, so that they can be interleaved
        changed = shape._replace(**{FIELD[part]: size}) if part in FIELD else shape
        folders.append(tempfile.TemporaryDirectory())
        side = Ours(write_model(folders[-1].name, changed, o.dtype, o.device), changed, o.dtype, o.device)
        pairs[size] = size if part == "pairs" else 2
        batch = batch_of(side.m, random_records(changed, pairs[size]), {"chosen", "rejected"})
        sides[size] = lambda side=side, batch=batch: side.step(batch, "dpo", False)
        tokens = side.m.front.image_tokens
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
                    "from training.records import Records\n"
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


def pictures(folder, n, different=200):
    """A model that reads 336 pixels, and n pairs over JPEGs of shapes and noise; returns the pairs' file."""
    import numpy as np
    from PIL import Image, ImageFilter
    rng = np.random.default_rng(0)
    write_model(folder / "model", SHAPES["tiny"]._replace(pixels=336))
    (folder / "images").mkdir()
    for i in range(min(n, different)):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((SIDE, SIDE))
        grain = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        grain = grain.filter(ImageFilter.GaussianBlur(1))
        Image.blend(coarse, grain, 0.25).save(folder / "images" / f"{i}.jpg", quality=90)
    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(n):
            if i >= different:
                os.link(folder / "images" / f"{i % different}.jpg", folder / "images" / f"{i}.jpg")
            said = [" ".join(f"w{k}" for k in rng.integers(5, 64, 120)) for _ in range(2)]
            file.write(json.dumps({"id": f"pair-{i}", "image": f"images/{i}.jpg", "question": "w7 w8 w9",
                                   "chosen": said[0], "rejected": said[1]}) + "\n")
    return folder / "pairs.jsonl"


def reading(n):
    """[{"workers", "processor_ms" a pair, "pairs_per_second", "waiting": {pace: share}}] of n pairs.

    The rate is without a step; the shares are beside steps that take so many pairs a second.
    """
    found, needs = [], {"chosen", "rejected", "image_rejected"}
    with tempfile.TemporaryDirectory() as folder:
        path = pictures(Path(folder), n)
        family, records = front.open_folder(Path(folder) / "model"), Records(path)
        for count in WORKERS:
            o = options.Options(data=str(path), batch=16, micro_batch=4, workers=count)
            pairs = batches.Pairs(records, range(n), [1] * n, family, o, frozenset(needs))

            def steps(busy, pairs=pairs, o=o):
                return waiting(batches.Batches(pairs, o, Ranks(), STEPS + 1), busy)
            processor = time.process_time()
            row = {"workers": count, "pairs_per_second": o.batch / steps(0)[1], "waiting": {}}
            row["processor_ms"] = (time.process_time() - processor) * 1000 / o.batch / (STEPS + 1)
            row["waiting"] = {pace: steps(o.batch / pace)[0] for pace in PACES}
            found.append(row)
    return found


def waiting(feed, busy):
    """(share of waiting, seconds a step) of steps that sleep; before the first nothing could be read."""
    for step in range(STEPS + 1):
        for _ in feed(step):
            pass
        if step == 0:
            waited, start = 0.0, time.perf_counter()
        else:
            waited += feed.waited
        if step < STEPS:
            time.sleep(busy)
    seconds = time.perf_counter() - start
    feed.pool.shutdown(cancel_futures=True)
    return waited / seconds, seconds / STEPS


def rank_process(rank, kind, folder, meeting, o, told):
    """One rank: sends `told` its seconds per step of four pairs, after one that does not count."""
    pin(1, sorted(os.sched_getaffinity(0))[-1 - rank] if hasattr(os, "sched_getaffinity") else None)
    world, shares = (2 if kind == "two" else 1), (1 if kind == "one" else 2)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    as_train_dpo("cpu")
    side = Ours(folder, SHAPES[o.shape], o.dtype, "cpu", rank * (world > 1), world)
    records = random_records(SHAPES[o.shape], 4)
    mine = [batch_of(side.m, records[at:at + 2], {"chosen", "rejected"}, at) for at in (0, 2)][rank::shares]
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
    """Seconds of one rank and of two, and how much faster two are; runs of each take turns.

    "apart": two processes that do a rank's share each without a word to each other. What they fall short of
    twice as fast is the machine's (caches, memory, clock), not the ranks'.
    """
    if len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())) < 2:
        print("ranks: one core alone is allowed here, the second rank has none", file=sys.stderr)
        return {}
    fork, taken = multiprocessing.get_context("fork"), {"one": [], "two": [], "apart": []}    # imported once
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, SHAPES[o.shape], o.dtype)
        for turn in range(TURNS):
            for kind in taken:
                ends = [fork.Pipe(duplex=False) for _ in range(1 if kind == "one" else 2)]
                shared = (kind, folder, f"{folder}/meeting{turn}", o)
                processes = [fork.Process(target=rank_process, args=(rank, *shared, end), daemon=True)
                             for rank, (_, end) in enumerate(ends)]
                for process in processes:
                    process.start()
                for process in processes:
                    process.join()
                if any(process.exitcode for process in processes):
                    sys.exit("bench/scale.py: a rank failed; its output is above")
                taken[kind] += ends[0][0].recv()
    one, two, apart = map(middle, taken.values())
    return {"one": one, "two": two, "apart": apart, "ratio": one[0] / two[0],
            "ratio_apart": one[0] / apart[0], "spread": [one[1] / two[2], one[2] / two[1]]}


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
    if found["reading"]:
        paces = list(found["reading"][0]["waiting"])
        lines += [f"\n| threads that read | 1024-pixel pairs/s | the processor's ms a pair | waiting, beside "
                  f"steps of {paces[0]} pairs/s | " + " | ".join(map(str, paces[1:])) + " |",
                  "|---" * (3 + len(paces)) + "|"]
        lines += [f"| {r['workers']} | {r['pairs_per_second']:.1f} | {r['processor_ms']:.0f} | "
                  + " | ".join(f"{share:.1%}" for share in r["waiting"].values()) + " |"
                  for r in found["reading"]]
    if found["ranks"]:
        both = found["ranks"]
        lines.append("\nTwo gloo ranks of one pinned thread each, on one global batch of four pairs: "
                     f"{both['ratio']:.2f} x one rank ({both['two'][0]:.3f} s beside {both['one'][0]:.3f} s "
                     f"a step; medians of {TURNS} runs of {o.rounds} steps each, in turns; from the least "
                     f"and most of the steps: {both['spread'][0]:.2f} to {both['spread'][1]:.2f}). Two "
                     "processes that do the same shares without a word to each other: "
                     f"{both['ratio_apart']:.2f} x.")
    return lines


def main():
    parser = arguments(__doc__, 3)
    parser.set_defaults(shape="half")
    parser.add_argument("--only", default=",".join([*PARTS, "records", "reading", "ranks"]),
                        help="which parts, with commas (%(default)s)")
    parser.add_argument("--records", type=int, default=RECORDS[-1],
                        help="how many to open and to read, at most (%(default)s)")
    o = parser.parse_args()
    parts = o.only.split(",")
    if unknown := sorted(set(parts) - {*PARTS, "records", "reading", "ranks"}):
        parser.error(f"--only {','.join(unknown)}: give some of {', '.join(PARTS)}, records, reading, ranks")
    about, found = machine(o.device), {"step": {}, "records": [], "reading": [], "ranks": {}}
    if "ranks" in parts:                               # before this process is pinned: children inherit it
        found["ranks"] = ranks(o)
    if "records" in parts:
        found["records"] = opening([n for n in RECORDS if n <= o.records] or [o.records])
    if "reading" in parts:
        found["reading"] = reading(min(o.records, 10_000))
    threads = pin(o.threads, o.core) if o.device == "cpu" else o.device
    as_train_dpo(o.device)
    for part in PARTS:
        if part in parts:
            found["step"][part] = sweep(part, SHAPES[o.shape], o)
    report(table(found, o, about, threads), {**found, **about, "threads": threads}, o)


if __name__ == "__main__":
    main()
