"""Run train_dpo.py over bases and seeds, as a user would: where the README's figures come from.

    python classroom/papers/study.py tuning     half an hour
    python classroom/papers/study.py table FILE

`tuning` runs every method at every learning rate, on tuning scenes; `again` runs the two best rates of each
with a second seed; `print` runs each at the rate so chosen, on printed scenes: 3 bases x 5 seeds. `causes`
shows what POPE and counting fall by, on tuning scenes. `table` gives means, spreads and the worst run of a
file of results, as Markdown.

`synthetic` is for the learning rate of DPO on scorers.py's pairs. It tries the oracle's at the five rates,
two seeds each; all scorers' pairs are trained at the rate that the rule chooses: the one at which right
pairs do most, which favours no scorer that a user can have.

`settings` is for reproduce.py: it gives mDPO without one of its terms the same five rates, and a method
whose best rate is the last of the five one more beyond it; then each method, at its best rate, another beta
and a shorter run, one change at a time. reproduce.py takes what is best by the rule below, the defaults
among it.

A line that is in results/NAME.jsonl is not run again. Two runs go at a time, one thread each.

The rule: every method is tried at the same learning rates, on the same tuning scenes and bases; its rate is
the one with the lowest mean CHAIR_s among those that cost at most 6 points of Cover (if there is none, the
one that costs least). All else is the preset's. What `print` then shows is the result.

It was written before any of it was run, and sharpened twice before any run on printed scenes: each method's
two best rates get a second seed (`again`), since one does not tell neighbours apart; and the cost is the
mean plus two standard deviations, in place of the worst run's, since fifteen runs will have to keep within
it.
"""
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
ROOT = Path(__file__).resolve().parents[2]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

BASES = ("base0", "base1", "base2")
KEYS = ("chair_s", "chair_i", "cover", "pope_random_acc", "pope_adversarial_acc")
METHODS = {"mDPO": "--loss mdpo", "DPO": "--loss dpo",
           "DPO without image": "--loss dpo --image_rejected none", "SFT on the chosen": "--loss sft"}
RATES = ("2e-5", "5e-5", "1e-4", "2e-4", "4e-4")
COVER = 6
TUNE = "--set split=tune --set scenes=600 --set questions=1200"
# For reproduce.py: the ablations are methods too; what is tried beyond the best rate, where that is the last.
ABLATIONS = {"DPO + AncPO": "--loss dpo+ancpo", "DPO + CoPO": "--loss dpo+copo"}
BEYOND = {"2e-5": "1e-5", "4e-4": "8e-4"}
CHANGES = ("--beta 0.3", "--epochs 1")
# mDPO at the highest rate, where POPE and counting fall most, with one thing changed at a time.
CAUSES = {"lr 4e-4": "", "without CoPO": "--loss dpo+ancpo",
          "rejected image: random": "--image_rejected random",
          "rejected image: crop 20-50": "--image_rejected crop20-50",
          "no questions": "--set pair_options=--questions=0",
          "questions of all kinds":
              "--set pair_options=--ask=existence,attribute,counting,relation,false_premise"}


def read(name):
    file = HERE / "results" / f"{name}.jsonl"
    return data.read_records(file) if file.exists() else []


def ranked(rows, method):
    """-> a method's settings (what stands in a row's name behind the method's), best first by the rule."""
    tried = {}
    for row in rows:
        if row["name"].startswith(f"{method}, "):
            tried.setdefault(row["name"].removeprefix(f"{method}, "), []).append(row)
    cost = {x: [r["before"]["cover"] - r["after"]["cover"] for r in runs] for x, runs in tried.items()}
    spread = {x: statistics.stdev(c) if len(c) > 1 else 0 for x, c in cost.items()}
    lost = {x: statistics.mean(c) + 2 * spread[x] for x, c in cost.items()}
    chair = {x: statistics.mean(r["after"]["chair_s"] for r in runs) for x, runs in tried.items()}
    return sorted(lost, key=lambda x: (lost[x] > COVER, chair[x] if lost[x] <= COVER else lost[x]))


def ranked_rates(rows):
    """-> {method: its learning rates, best first by the rule}."""
    return {method: [x.removeprefix("lr ") for x in ranked(rows, method)] for method in METHODS}


def best_rate(method):
    """Of all rates tried; a method of METHODS starts from chosen_rates()."""
    tried = [row for row in read("settings") if " --" not in row["name"]]
    if method in METHODS:
        tried += [row for row in read("tuning") if row["name"] == f"{method}, lr {chosen_rates()[method]}"]
    return ranked(tried, method)[0].removeprefix("lr ")


def best_settings():
    """-> {method: options of its best setting}, for reproduce.py."""
    best = {}
    for method, options in (METHODS | ABLATIONS).items():
        rate = best_rate(method)
        rows = [row for row in read("tuning") + read("settings")
                if row["name"] == f"{method}, lr {rate}" or row["name"].startswith(f"{method}, lr {rate} --")]
        best[method] = f"{options} --{ranked(rows, method)[0]}"
    return best | {"DPO on synthetic pairs": f"--loss dpo --{ranked(read('scorers-tuning'), 'oracle')[0]}"}


def chosen_rates():
    """-> {method: learning rate}: the best of those that both seeds have tried."""
    rows = read("tuning")
    again = {row["name"] for row in rows if row["seed"] == 101}
    ranked = ranked_rates([row for row in rows if row["name"] in again])
    return {method: rates[0] for method, rates in ranked.items()}


def cells(name):
    """The runs of a study. Those on tuning scenes have a seed of their own."""
    if name == "tuning":
        return [{"name": f"{method}, lr {rate}", "base": base, "seed": 100,
                 "options": f"{options} --lr {rate} {TUNE}"}
                for (method, options), rate, base in product(METHODS.items(), RATES, BASES)]
    if name == "again":
        first = ranked_rates([row for row in read("tuning") if row["seed"] == 100])
        return [{"name": f"{method}, lr {rate}", "base": base, "seed": 101,
                 "options": f"{options} --lr {rate} {TUNE}"}
                for method, options in METHODS.items() for rate, base in product(first[method][:2], BASES)]
    if name == "scorers-tuning":
        few = TUNE.replace("=600", "=500").replace("=1200", "=200")
        return [{"name": f"oracle, lr {rate}", "base": "base0", "seed": seed,
                 "options": f"--loss dpo --data runs/synth-scorers/pairs-oracle.jsonl --lr {rate} {few}"}
                for rate in RATES for seed in (100, 101)]
    if name == "causes":
        return [{"name": cause, "base": base, "seed": 100, "options": f"{options} --lr 4e-4 {TUNE}"}
                for (cause, options), base in product(CAUSES.items(), BASES)]
    if name in ("settings", "beyond"):
        rates = product(ABLATIONS, RATES) if name == "settings" else [
            (method, BEYOND[rate]) for method, rate in chosen_rates().items() if rate in BEYOND] + [
            (method, BEYOND[rate]) for method in ABLATIONS if (rate := best_rate(method)) in BEYOND]
        return [{"name": f"{method}, lr {rate}", "base": base, "seed": 100,
                 "options": f"{(METHODS | ABLATIONS)[method]} --lr {rate} {TUNE}"}
                for (method, rate), base in product(rates, BASES)]
    if name == "changes":
        return [{"name": f"{method}, lr {best_rate(method)} {change}", "base": base, "seed": 100,
                 "options": f"{options} --lr {best_rate(method)} {change} {TUNE}"}
                for (method, options), change, base in product((METHODS | ABLATIONS).items(), CHANGES, BASES)
                if method != "SFT on the chosen" or "beta" not in change]
    rates = chosen_rates()
    return [{"name": method, "base": base, "seed": seed, "options": f"{options} --lr {rates[method]}"}
            for (method, options), seed, base in product(METHODS.items(), range(5), BASES)]


def run(cell, results):
    """One training run in a folder of its own; appends the cell and its scores to the results."""
    out = Path(tempfile.mkdtemp()) / "run"
    command = [sys.executable, str(ROOT / "train_dpo.py"), "--model", cell["base"], "--out", str(out),
               "--seed", str(cell["seed"]), *cell["options"].split()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise data.UserError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    summary = data.read_json(out / "summary.json")
    last = [line for line in data.read_jsonl(out / "log.jsonl") if "logps/chosen" in line][-1]
    before, after = ({k: v for k, v in summary[when].items() if k in (*KEYS, "by_kind")}
                     for when in ("before", "after"))
    data.append_jsonl(results, {**cell, "before": before, "after": after, "steps": summary["steps"],
                                "seconds": summary["seconds"], "logps/chosen": last["logps/chosen"]})
    shutil.rmtree(out.parent)
    scores = [f"{k} {before[k]:.1f} -> {after[k]:.1f}" for k in KEYS]
    print(cell["name"], cell["base"], cell["seed"], *scores, flush=True)


def study(name):
    file = {"again": "tuning", "beyond": "settings", "changes": "settings"}.get(name, name)
    results = HERE / "results" / f"{file}.jsonl"
    results.parent.mkdir(exist_ok=True)
    there = {tuple(row[k] for k in ("name", "base", "seed")) for row in read(file)}
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda cell: run(cell, results),
                      [c for c in cells(name) if (c["name"], c["base"], c["seed"]) not in there]))


def cell(values):
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def chair_i(runs):
    """The mean over the runs whose captions name an object: of no names no share can be false."""
    named = [run["chair_i"] for run in runs if run["cover"] or run["chair_s"]]
    lacking = f"undefined in {len(runs) - len(named)}" * (len(named) < len(runs))
    return ", ".join(filter(None, (cell(named) if named else "", lacking)))


def table(path):
    """Markdown: mean ± standard deviation over runs, and the worst run of each."""
    rows = data.read_records(path)

    def line(name, runs, *more):
        scores = [cell([run[key] for run in runs]) for key in KEYS]
        scores[KEYS.index("chair_i")] = chair_i(runs)
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


STUDIES = {"tuning": ("tuning",), "again": ("again",), "print": ("print",), "causes": ("causes",),
           "settings": ("settings", "beyond", "changes"), "synthetic": ("scorers-tuning",)}


def main():
    parser = data.Parser(prog="study.py", description=__doc__)
    parser.add_argument("study", choices=[*STUDIES, "table"], help="which runs to make; table makes none")
    parser.add_argument("file", nargs="?", help="for table: a file of results/")
    o = parser.parse_args()
    if (o.study == "table") != bool(o.file):
        parser.error("table needs a file of results, and nothing else takes one")
    try:
        if o.study == "table":
            print("\n".join(table(o.file)))
        for name in STUDIES.get(o.study, ()):
            study(name)
    except data.UserError as error:
        sys.exit(f"study.py: {error}")


if __name__ == "__main__":
    main()
