"""The papers in miniature: re-runs the tables and figures of mDPO and PDS-DPO on the built-in world.

    python classroom/papers/reproduce.py all            4 hours on two cores
    python classroom/papers/reproduce.py table2 fig5    some of them, by name
    python classroom/papers/reproduce.py all --quick    20 minutes
    python classroom/papers/reproduce.py all --out D    from nothing
    python classroom/papers/reproduce.py objectives     the field's losses
    python classroom/papers/reproduce.py page           the page again
    python classroom/papers/reproduce.py verify --n 3   a few runs again

`page` writes RESULTS.md and results.html of the runs there are; `verify` compares every number of the runs
that it makes again. What is claimed, and by which rule it appears or not, is in findings.py. A cell is one
run of train_dpo.py as a user would start it: two go at a time, one thread each. A finished cell is a line
of results/reproduce.jsonl and is not run again; the lines of the printed page come with the repository, so
that without --out only what has none is run. A cell's run stays in runs/reproduce; what it shares with a
finished one is linked from there and not made twice: the pairs of a seed, the scenes, a base's own answers.

Nothing here was chosen on: each method's settings come from tuning scenes (study.py settings), and the
seeds and the printed scenes (--eval_seed) are used nowhere else.
"""
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

HERE = Path(__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[2]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

# isort: split
from tqdm import tqdm  # noqa: E402

from classroom import pairs, world  # noqa: E402
from classroom.papers import findings, objectives, pds, scorers, study  # noqa: E402

LINES = "results/reproduce.jsonl"                                # in HERE, or where --out says
RUNS = ROOT / "runs" / "reproduce"
SEEDS, EVAL_SEED = tuple(range(10, 15)), 1
QUICK = {"bases": study.BASES[:1], "seeds": SEEDS[:2]}
EXAM = ("model", "eval_seed", "split", "scenes", "questions", "max_new_tokens", "look", "pair_options")
EXAM_FILES = ("scenes", "held_out", "before.jsonl", "before.json", "before.look.json")
PAIRS = ("seed", "pairs", "pair_options", "data")
lock, making = Lock(), {what: Lock() for what in (*study.BASES, "synthetic")}


# ---------------------------------------------------------------------------------------- cells
def cells(names, quick=False, most=None):
    """The runs that tables need, each once, seed after seed, so that every table has something early.
    -> [{"arm", "base", "seed", "options"}]"""
    settings, out = study.best_settings(), {}
    for name in names:
        table = findings.TABLES[name]
        bases, seeds = study.BASES, SEEDS[:table.seeds][:most]
        if quick:
            bases, seeds = QUICK["bases"], QUICK["seeds"]
        for arm in table.arms:
            for seed in seeds:
                for base in bases:
                    cell = {"arm": arm, "base": base, "seed": seed, "options": line_of(arm, base, settings)}
                    out.setdefault(key(cell), cell)
    return sorted(out.values(), key=lambda cell: cell["seed"])


def line_of(arm, base, settings):
    """An arm's options: its method's best setting, then what the arm changes."""
    method, changed = findings.ARMS[arm]
    return f"{settings[method]} {changed.format(base=base)} --eval_seed {EVAL_SEED}".replace("  ", " ")


def key(line):
    return line["options"], line["base"], line["seed"]


def lines(out=HERE, file=LINES):
    return data.read_records(out / file) if (out / file).exists() else []


# ---------------------------------------------------------------------------------------- one run
def arguments(cell):
    return ["--model", cell["base"], "--seed", str(cell["seed"]), *shlex.split(cell["options"])]


def folder(cell):
    return RUNS / hashlib.sha256(json.dumps(key(cell)).encode()).hexdigest()[:12]


def careless(base):
    """A base that affirms what it is asked about: SFT on questions whose answer, where the thing is missing,
    is the false one in two cases of three. Made once; the bases themselves hardly ever err on these."""
    out = RUNS / f"careless-{base}"
    with making[base]:
        if out.exists():
            return out
        work = RUNS / f".{out.name}"
        shutil.rmtree(work, ignore_errors=True)
        started(["classroom/pairs.py", "--seed", "200", "--questions", "1", "--out", str(work / "pairs"),
                 "--ask", "existence,attribute,counting,false_premise"])
        rows = list(data.read_jsonl(work / "pairs" / "pairs.jsonl"))
        for number, row in enumerate(rows):
            absent = row["meta"]["kind"] == "false_premise" or row["chosen"].startswith("no ,")
            if absent and number % 3:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        data.atomic_write(work / "pairs" / "careless.jsonl", text)
        started(["train_dpo.py", "--model", base, "--loss", "sft", "--seed", "200", "--set", "split=tune",
                 "--out", str(work / "run"), "--data", str(work / "pairs" / "careless.jsonl")])
        started(["lora.py", "merge", "--model", base, "--adapter", str(work / "run" / "adapter"),
                 "--out", str(out)])
        shutil.rmtree(work)
    return out


def synthetic():
    """The pairs of every scorer, unless they are there: minutes."""
    with making["synthetic"]:
        made = [ROOT / scorers.OUT / f"pairs-{scorer}.jsonl" for scorer in scorers.SCORERS]
        if not all(path.exists() for path in made):
            tqdm.write("making the synthetic pairs: some minutes", file=sys.stderr)
            started([str(HERE / "scorers.py")])


def started(command):
    """Run one of the project's scripts on one thread. Raises UserError with its last word where it fails."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        why = (done.stderr.strip() or "no message").splitlines()[-1]
        raise data.UserError(f"{' '.join(command)} failed: {why}")


def shared(o):
    """Where runs find what they have in common: (folder of the exam, folder of the pairs)."""
    def name(fields):
        values = [getattr(o, field, None) for field in fields]
        return hashlib.sha256(repr(values).encode()).hexdigest()[:12]
    return RUNS / f"exam-{name(EXAM)}", RUNS / f"pairs-{name(PAIRS)}"


def link(source, target):
    """A folder or a file under a second name; the bytes are there once. What is there already stays."""
    if source.exists() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        if source.is_dir():
            shutil.copytree(source, scratch, copy_function=os.link)
        else:
            os.link(source, scratch)
        scratch.rename(target)


def run(cell, out=None):
    """Train and examine; -> its line. What runs share is linked: before, from others, after, to them."""
    from training import options
    out = out or folder(cell)
    if f"careless-{cell['base']}" in cell["options"]:
        careless(cell["base"])
    if str(scorers.OUT) in cell["options"]:
        synthetic()
    exam, made = shared(options.parse(arguments(cell), ""))
    files = [(exam / name, out / name) for name in EXAM_FILES]
    files.append((made, out / "data"))
    with lock:
        for there, here in files:
            link(there, here)
    started(["train_dpo.py", "--out", str(out), *arguments(cell)])
    with lock:
        for there, here in files:
            link(here, there)
    shutil.rmtree(out / "last", ignore_errors=True)
    return cell | measures(out)


def measures(out):
    """What a run's folder says, in numbers: {"before", "after", "scenes", "look", ...}."""
    summary = data.read_json(out / "summary.json")
    *_, last = (line for line in data.read_jsonl(out / "log.jsonl") if "loss" in line)
    o = summary["options"]
    _, scenes = pairs.exam(o["eval_seed"], o["scenes"], o["questions"], o["split"])
    found = {"steps": summary["steps"], "seconds": summary["seconds"], "run": out.name}
    for when in ("before", "after"):
        scores, look = summary[when], summary[when].get("look", {})
        code, more = captions(data.read_jsonl(out / f"{when}.jsonl"), scenes)
        kinds = {kind: score["acc"] for kind, score in scores["by_kind"].items()}
        numbers = {k: scores[k] for k in study.KEYS} | kinds | more | {"scenes": code, "look": look}
        found[when] = {k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}
    return found | {"logps/chosen": last["logps/chosen"], "loss": last["loss"]}


def captions(answers, scenes):
    """-> a letter a scene, in base 36: 6 x hallucinated + present objects named, each at most 5; and {"cog":
    tempting absent types named, in percent (AMBER's Cog, with the theme's absent types for its hallucinations
    that people expect), "words": of a caption, in the mean}."""
    code, named, tempting, words = "", 0, 0, []
    for item in answers:
        if item.get("kind") != "caption":
            continue
        scene = scenes[item["image"]]
        said = world.mentions(item["answer"])
        false = sum(t not in scene.counts for t in said)
        true = len(set(said) & set(scene.counts))
        code += "0123456789abcdefghijklmnopqrstuvwxyz"[6 * min(5, false) + min(5, true)]
        expected = {t for t, _ in scene.tempting}
        named, tempting = named + len(expected & set(said)), tempting + len(expected)
        words.append(len(item["answer"].split()))
    return code, {"cog": 100 * named / max(1, tempting), "words": sum(words) / max(1, len(words))}


# ---------------------------------------------------------------------------------------- commands
def go(wanted, out=HERE, file=LINES, at_once=2):
    """Run the cells that have no line yet, some at a time, with the time left."""
    there = {key(line) for line in lines(out, file)}
    todo = [cell for cell in wanted if key(cell) not in there]
    if not todo:
        if wanted:
            print(f"All {len(wanted)} runs have a line in {os.path.relpath(out / file)}; --out DIR makes "
                  "them from nothing.")
        return
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(wanted), initial=len(wanted) - len(todo), unit="run", smoothing=0.05)

    def one(cell):
        line = run(cell)
        with lock:
            data.append_jsonl(out / file, line)
            bar.set_postfix_str(f"{cell['arm']}, {cell['base']}, seed {cell['seed']}: CHAIR_s "
                                f"{line['before']['chair_s']:.1f} -> {line['after']['chair_s']:.1f}")
            bar.update()
    with ThreadPoolExecutor(at_once) as pool:
        for future in [pool.submit(one, cell) for cell in todo]:
            future.result()
    bar.close()


def verify(n, out=HERE, seed=0):
    """Run n lines again, in folders of their own, and compare all but the time."""
    import random
    rows = lines(out)
    for line in random.Random(seed).sample(rows, min(n, len(rows))):
        cell = {k: line[k] for k in ("arm", "base", "seed", "options")}
        fresh = RUNS / f"again-{line['run']}"
        shutil.rmtree(fresh, ignore_errors=True)
        again = run(cell, fresh)
        differ = [k for k in line if k not in ("seconds", "run") and again.get(k) != line[k]]
        print(f"{cell['arm']}, {cell['base']}, seed {cell['seed']}:",
              f"differs in {differ}" if differ else "the same")


def for_people(rows, out):
    """The blind page of Fig. 4: captions of two runs of the same base and seed. Its path, if it is there."""
    page = out / "people.html"
    first = {row["arm"]: RUNS / row["run"] for row in reversed(rows) if row["base"] == study.BASES[0]}
    runs = [first.get(arm, RUNS / "-") for arm in ("mDPO", "DPO")]
    if all((run / "after.jsonl").exists() for run in runs):
        ours, theirs = (os.path.relpath(run, ROOT) for run in runs)      # the page keeps these names
        started(["eval_hallu.py", "compare", f"{ours}/after.jsonl", f"{theirs}/after.jsonl",
                 "--out", str(page), "--images", f"{ours}/scenes"])
    return page if page.exists() else None


def write_page(rows, out=HERE):
    from classroom.papers import page
    found = [findings.finding(name, rows) for name in findings.TABLES] + pds.findings()
    out.mkdir(parents=True, exist_ok=True)
    if people := for_people(rows, out):
        says = "Judge the captions yourself, without knowing which model wrote them"
        next(f for f in found if f["name"] == "fig4")["links"] = {says: people.name}
    page.write(found, findings.about(rows), out)
    for f in found:
        print(f"{f['name']:16} {f['verdict']}")
    print(", ".join(os.path.relpath(out / name) for name in ("results.html", "RESULTS.md")))


def main():
    known = ", ".join([*findings.TABLES, *pds.TABLES])
    parser = data.Parser(prog="reproduce.py", description=__doc__)
    parser.add_argument("what", nargs="+", help=f"all, objectives, page, verify, or some of {known}")
    parser.add_argument("--quick", action="store_true", help="one base, two seeds, the main tables")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="so many of each base's (%(default)s)")
    parser.add_argument("--out", type=Path,
                        help="folder of the lines, RESULTS.md and results.html; a new one starts from "
                             "nothing (classroom/papers, whose lines come with it; --quick: runs/quick)")
    parser.add_argument("--n", type=int, default=3, help="verify: how many lines to run again (%(default)s)")
    parser.add_argument("--at_once", type=pairs.count, default=2, help="runs at a time (%(default)s)")
    o = parser.parse_args()
    unknown = set(o.what) - {"all", "objectives", "page", "verify", *findings.TABLES, *pds.TABLES}
    if unknown or len(o.what) > 1 and {"all", "objectives", "verify"} & set(o.what):
        parser.error(f"{' '.join(o.what)}: give all, objectives, page, verify, or some of {known}")
    try:
        reproduce(o)
    except data.UserError as error:
        sys.exit(f"reproduce.py: {error}")
    except KeyboardInterrupt:
        sys.exit("reproduce.py: stopped; the same command goes on from its last finished run")


def reproduce(o):
    names, out = o.what, (o.out or (RUNS.parent / "quick" if o.quick else HERE)).resolve()
    if names == ["verify"]:
        return verify(o.n, out)
    if names == ["objectives"]:
        return side_by_side(objectives.QUICK if o.quick else objectives.FULL, out, o.at_once)
    if names == ["all"]:
        names = [name for name, table in findings.TABLES.items() if table.main or not o.quick]
        names += [] if o.quick else list(pds.TABLES)
    go(cells([name for name in names if name in findings.TABLES], o.quick, o.seeds), out, at_once=o.at_once)
    if set(names) & set(pds.TABLES) and not pds.ANALYSIS.exists():
        synthetic()
    write_page(lines(out), out)


def side_by_side(extent, out=HERE, at_once=2):
    """The objectives: the runs that choose their rates, the printed runs, OBJECTIVES.md."""
    go(objectives.tuning_cells(extent), out, objectives.TUNING, at_once)
    tuned = lines(out, objectives.TUNING)
    go(objectives.cells(extent, tuned), out, objectives.LINES, at_once)
    page = objectives.write(lines(out, objectives.LINES), out, tuned)
    print(os.path.relpath(page))


if __name__ == "__main__":
    main()
