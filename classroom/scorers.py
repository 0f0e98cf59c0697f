"""What synthetic pairs are worth: DPO of the classroom's base on the pairs of every scorer, and of fewer.

    python classroom/scorers.py pairs       400 prompts through synth.py; every scorer's pairs     20 minutes
    python classroom/scorers.py tuning      the learning rate, on tuning scenes                      5 minutes
    python classroom/scorers.py print       every scorer, and ArmoRM's pairs at 1/4 and 1/2: five seeds     30
    python classroom/scorers.py table F     means, intervals and what was trained on, as Markdown

Call it in the repository's root. Prompts, images and responses are made once, in runs/synth-scorers; only
scores, pairs and training differ. A line that stands in classroom/results/NAME.jsonl is not run again.

    armorm  random  length  clip    synth.py's scorers
    oracle  of the objects that a response names, how many the prompt asks for minus how many it does not.
            It goes by the prompt, not by the picture: where the generator failed, it is wrong

The rule for the learning rate, written before any of it was run: DPO on the oracle's pairs is tried at
study.RATES on tuning scenes, two seeds each, and the rate is chosen as study.py chooses: lowest mean CHAIR_s
among those that cost at most 6 points of Cover (mean and two standard deviations), else the one that costs
least. All scorers are trained at that rate: it is the one at which right pairs do most, and favours none of
the scorers that a user can have. All else is the preset's, as the pairs' margin and threshold are synth.py's;
500 captions and 200 questions are scored, half and a tenth of what the preset asks.
"""
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from classroom import study, synthesis, world  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("runs/synth-scorers")
SCORERS = ("armorm", "clip", "length", "random", "oracle")
SHARES = {"armorm, a quarter": 4, "armorm, half": 2}    # every fourth, every second pair: all themes alike


def oracle(run):
    """scores-oracle.jsonl: 1 for each object of the prompt that a response names, -1 for each other one."""
    asked = {r["id"]: set(world.mentions(r["prompt"])) for r in run.rows("ranked")}
    rows = []
    for r in run.rows("responses"):
        said = set(world.mentions(r["response"]))
        rows.append({"id": r["id"], "model": r["model"], "score": 2 * len(said & asked[r["id"]]) - len(said)})
    run.write("scores-oracle", rows)


def judge(run):
    """judge.jsonl, replies for `synth.py analyse --set judge=...`: of two rankers' picks the one that shows
    more of the prompt by synthesis.recognise (objects in their colours, then objects at all), else tie."""
    from PIL import Image

    import gallery
    rows = []
    for r in run.rows("ranked"):
        words, shown, pair = r["prompt"].split(), [], gallery.duel(r, run.o.seed)
        things = {(t, c) for c, t in zip(words, words[1:], strict=False) if t in world.TYPES}
        for k in pair[:2] if pair else ():
            with Image.open(run.out / r["candidates"][k]["image"]) as image:
                cells = set(synthesis.recognise(image, words[0])[0]) - {None}
            shown.append((len(things & cells), len({t for t, _ in things} & {t for t, _ in cells})))
        if not pair:
            continue
        a, b = shown
        rows.append({"id": r["id"], "reply": "A" if a > b else "B" if b > a else "tie"})
    run.write("judge", rows)


def pairs(n=100):
    """n prompts a theme through every stage, and pairs-NAME.jsonl of every scorer and share."""
    import synth
    synthesis.prompts(n, OUT)
    given = ["--out", str(OUT), "--prompts", str(OUT / "prompts")]
    synth.main(["all", *given])
    run = synth.begin(synth.options(["all", *given])[1], OUT)
    oracle(run)
    judge(run)
    run.lock.close()
    synth.main(["analyse", *given, "--set", f"judge={OUT}/judge.jsonl"])
    shutil.copyfile(OUT / "analysis.json", study.HERE / "results" / "synthesis.json")          # for pds.py
    for scorer in SCORERS:
        for stage in ("score", "pairs") if scorer != "oracle" else ("pairs",):
            synth.main([stage, *given, "--scorer", scorer])
        rows = run.rows("pairs")
        run.write(f"pairs-{scorer}", rows)
        for name, share in SHARES.items():
            if name.startswith(scorer):
                run.write(f"pairs-{scorer}-{share}", rows[::share])


def cell(name, file, seed, options):
    return {"name": name, "base": "base0", "seed": seed,
            "options": f"--loss dpo --data {OUT}/{file}.jsonl --set questions=200 --set scenes=500 {options}"}


def rate():
    """The learning rate that the rule chooses."""
    rows = [r | {"name": r["name"].replace("oracle", "DPO")} for r in study.read("scorers-tuning")]
    return study.ranked_rates(rows)["DPO"][0]


def cells(name):
    if name == "tuning":
        return [cell(f"oracle, lr {rate}", "pairs-oracle", seed, f"--lr {rate} --set split=tune")
                for rate in study.RATES for seed in (100, 101)]
    files = {s: f"pairs-{s}" for s in SCORERS} | {s: f"pairs-armorm-{n}" for s, n in SHARES.items()}
    return [cell(s, file, seed, f"--lr {rate()}") for seed in range(5) for s, file in files.items()]


def train(argv):
    """`train_dpo.py argv`, in a process of its own."""
    import torch

    import train_dpo
    torch.set_num_threads(1)
    sys.argv = ["train_dpo.py", *argv]
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        train_dpo.main()


def run(cell, results):
    """One training run; appends the cell and its scores to the results. The process is forked: most of a
    short run's time would go into imports."""
    out = OUT / f"dpo-{cell['name'].replace(', ', '-').replace(' ', '-')}-{cell['seed']}"
    argv = ["--model", cell["base"], "--out", str(out), "--seed", str(cell["seed"]), *cell["options"].split()]
    child = multiprocessing.get_context("fork").Process(target=train, args=(argv,))
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"scorers.py: train_dpo.py {' '.join(argv)} failed; run it alone to see why")
    done = json.loads((out / "summary.json").read_text())
    scores = {when: {k: v for k, v in done[when].items() if k in (*study.KEYS, "by_kind")}
              for when in ("before", "after")}
    with open(results, "a") as file:
        file.write(json.dumps(cell | scores | {k: done[k] for k in ("pairs", "steps", "seconds")}) + "\n")
    shutil.rmtree(out)
    print(cell["name"], cell["seed"], *(f"{k} {scores['before'][k]:.1f} -> {scores['after'][k]:.1f}"
                                        for k in study.KEYS), flush=True)


def table(path):
    """Markdown: means over the seeds with 95% intervals (Student's t), of differences from the base."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    keys = ("chair_s", "chair_i", "cover", "pope_random_acc")
    before = rows[0]["before"]
    lines = ["| pairs of | pairs | runs | CHAIR_s | CHAIR_i | Cover | POPE random |", "|" + "---|" * 7,
             "| (before) | | | " + " | ".join(f"{before[k]:.1f}" for k in keys) + " |"]
    for name in dict.fromkeys(row["name"] for row in rows):
        runs = [row for row in rows if row["name"] == name]
        scores = []
        for key in keys:
            values = [row["after"][key] for row in runs]
            spread = f" ± {T[len(values)] * statistics.stdev(values) / len(values) ** .5:.1f}" if len(
                values) in T else ""
            scores.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {name} | {runs[0]['pairs']} | {len(runs)} | {' | '.join(scores)} |")
    return lines


T = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}       # Student's t, 97.5%, by the number of runs


def main():
    wanted = sys.argv[1:]
    if wanted[:1] == ["table"] and len(wanted) == 2:
        print("\n".join(table(wanted[1])))
    elif wanted == ["pairs"]:
        pairs()
    elif wanted in (["tuning"], ["print"]):
        file = "scorers-tuning" if wanted == ["tuning"] else "scorers"
        there = {(row["name"], row["seed"]) for row in study.read(file)}
        todo = [c for c in cells(wanted[0]) if (c["name"], c["seed"]) not in there]
        import train_dpo  # noqa: F401, so that the forks need not
        for c in todo:
            run(c, study.HERE / "results" / f"{file}.jsonl")
    else:
        sys.exit(f"scorers.py: {' '.join(wanted) or 'nothing'} is no study; see the top of this file")


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
