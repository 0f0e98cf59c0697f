"""The documents as specification: what README.md and docs/ say of the code is true."""
import contextlib
import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, pairs_of

README = (ROOT / "README.md").read_text()
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
MANUAL = "\n".join([README, *PAGES.values()])
READ = ["README.md", *(f"docs/{name}.md" for name in PAGES), "classroom/README.md",
        *(f"classroom/{name}.md" for name in ("EXERCISES", "TEACHING", "QUESTIONS", "ANSWERS")),
        "classroom/papers/RESULTS.md", "bench/RESULTS.md"]

COURSE = "\n".join(path.read_text() for path in sorted((ROOT / "classroom").glob("*.md")))

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
FOLDERS = ("model", "training", "evaluation", "synthesis")
PARTS = sorted(str(path.relative_to(ROOT).with_suffix("")).replace("/", ".")
               for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")
PACKAGES = {"torch", "transformers", "diffusers", "safetensors", "PIL", "numpy", "tqdm"}


def section(title, page=README):
    """The text under a heading."""
    found = re.search(rf"^##+ {title}\n(.*?)(?=^##+ |\Z)", page, re.DOTALL | re.MULTILINE)
    assert found, f"there is no section {title!r}"
    return found[1]


def blocks(kind, text):
    """The fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


# --- the repository -------------------------------------------------------------------------------------


def test_requirements_are_pinned():
    product = (ROOT / "requirements.txt").read_text().splitlines()
    first, *more = (ROOT / "requirements-dev.txt").read_text().splitlines()
    assert first == "-r requirements.txt" and "torch==2.13.0" in product
    names = {"pillow" if package == "PIL" else package for package in PACKAGES}
    assert {line.partition("==")[0] for line in product} == names
    assert [line for line in product + more if not re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line)] == []


def test_the_repository_speaks_of_itself_alone():
    """No path of the machine that a text was written on."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of what belongs to the repository")
    paths = re.compile("/(" + "|".join(["work", "tmp", "home", "root", "Users"]) + ")/")
    texts = {name: (ROOT / name).read_text(errors="replace") for name in listed.stdout.split()
             if (ROOT / name).exists() and not name.endswith((".safetensors", ".png"))}
    assert [f"{name}: {found[0]}" for name, text in texts.items() if (found := paths.search(text))] == []


# --- the pages ----------------------------------------------------------------------------------------


def test_the_pages_have_no_gap_left():
    assert re.findall(r"RESULTS-TABLE|RESULTS-TEXT|MAIN-OUTPUT|TODO|FIXME", MANUAL) == []


def test_the_readme_is_short_and_begins_with_a_command_and_its_output():
    """Under 14 KB; one picture of at most 100 KB, the command and its table within the first 30 lines."""
    assert len(README.encode()) < 14 * 1024 and len(README.splitlines()) < 240
    picture, = re.findall(r"!\[.+\]\((\S+\.png)\)", README)
    assert (ROOT / picture).stat().st_size < 100 * 1024
    start = "\n".join(README.splitlines()[:30])
    for text in ("&& python train_dpo.py\n", "CHAIR_s, lower is better", "report.html"):
        assert text in start


def test_the_map_names_every_script_and_folder_and_nothing_else():
    tree = blocks("", section("What is where"))[0]
    named = [name for line in tree.splitlines() for name in re.match(r"((?:\S+ )+) ", line)[1].split()]
    folders = {f"{name}/" for name in (*FOLDERS, "classroom", "docs", "bench", "tests")}
    assert set(named) == {f"{name}.py" for name in SCRIPTS} | folders
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_page_of_docs_is_linked_from_the_readme():
    assert [name for name in PAGES if f"(docs/{name}.md" not in README] == []


def anchor(title):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_every_picture_of_the_course_is_there_and_small():
    shown = set(re.findall(r"!\[[^\]]{3,}\]\((pictures/[^)]+)\)", COURSE))
    there = {f"pictures/{path.name}": path.stat().st_size for path in (ROOT / "classroom/pictures").iterdir()}
    assert shown == set(there) and max(there.values()) < 16 * 1024


def test_the_questions_have_their_answers_in_a_file_of_their_own():
    numbers = {name: re.findall(r"^(\d+)\. ", (ROOT / f"classroom/{name}.md").read_text(), re.MULTILINE)
               for name in ("QUESTIONS", "ANSWERS")}
    assert numbers["QUESTIONS"] == numbers["ANSWERS"]
    assert numbers["QUESTIONS"] == [str(k + 1) for k in range(len(numbers["QUESTIONS"]))]
    assert "ANSWERS" not in (ROOT / "classroom/QUESTIONS.md").read_text()


def test_the_hour_and_a_half_of_the_teacher_is_that_of_the_students():
    texts = [(ROOT / f"classroom/{name}.md").read_text() for name in ("TEACHING", "EXERCISES")]
    plans = [re.findall(r"^\| (\d+ - \d+) \| \D*(\d)", text, re.MULTILINE) for text in texts]
    assert plans[0] == plans[1] and len(plans[0]) == 8


@pytest.mark.parametrize("file", READ)
def test_links_within_the_repository_lead_somewhere(file):
    """Files, and headings in them."""
    for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", (ROOT / file).read_text()):
        name, _, place = link.partition("#")
        path = (ROOT / file).parent / name if name else ROOT / file
        assert path.exists(), link
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE) if place else []
        assert not place or place in map(anchor, titles), link


def said_by(words, monkeypatch):
    """What a command prints, which must end well: `train_dpo.py --help`, `-m model.import_checkpoint ...`."""
    monkeypatch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
    monkeypatch.setattr(sys, "path", [*sys.path, str((ROOT / words[0]).parent)])    # as a script has it
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as stop:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    assert not stop.value.code, words
    return said.getvalue()


def test_every_option_in_the_pages_is_one_that_help_knows(monkeypatch):
    """Every --flag and every --set key that they mention; other programs' apart."""
    scores = [f"eval_hallu.py score {name}" for name in ("pope", "amber", "chair", "mmhal", "votes")]
    commands = ["train_dpo.py", "eval_hallu.py answers", *scores, "eval_hallu.py compare",
                "eval_hallu.py ask", "lora.py", "synth.py all", "synth.py analyse",
                "-m model.import_checkpoint", "-m training.report", "classroom/pairs.py",
                "classroom/pairs.py scenes", "classroom/make.py",
                "classroom/show.py pairs", "classroom/show.py log", "classroom/slides.py",
                "classroom/synthesis.py", "classroom/picture.py",
                "classroom/papers/study.py", "classroom/papers/reproduce.py",
                "bench/vs_trl.py", "tests/fuzz.py", "tests/kill.py"]
    helps = "".join(said_by([*command.split(), "--help"], monkeypatch) for command in commands)
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--local-dir",
              "--model_args", "--log_samples", "--output_path", "--tasks",      # torchrun, hf, lmms_eval
              "--no-deps"}
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", MANUAL + COURSE)) - others
    assert len(flags) > 15 and sorted(flag for flag in flags if not re.search(rf"{flag}\b", helps)) == []
    keys = re.findall(r"--set ([a-z_]+)=", MANUAL + COURSE)
    assert [key for key in keys if f"  {key}=" not in helps] == []


def test_every_command_in_the_pages_exists():
    """python FILE and python -m MODULE of this repository."""
    scripts = re.findall(r"(?:python3?|torchrun [^`\n]*?) ([\w/]+\.py)\b", MANUAL + COURSE)
    scripts = [name for name in scripts if not name.startswith("runs/")]         # which an exercise writes
    assert len(scripts) > 10 and [name for name in scripts if not (ROOT / name).exists()] == []
    modules = set(re.findall(r"python3? -m ([\w.]+)", MANUAL)) - {"venv", "pytest", "lmms_eval"}
    assert modules == {"model.import_checkpoint", "training.report"}
    assert [name for name in modules if name not in PARTS] == []


def test_the_loss_in_the_readme_is_the_loss_in_the_code():
    code = (ROOT / "losses.py").read_text().splitlines()
    shown, = blocks("python", section("The loss"))
    assert [line for line in shown.splitlines() if line not in code] == []


@pytest.mark.parametrize("text", [section("Your own pairs"), section("The native format", PAGES["data"])],
                         ids=["README", "docs"])
def test_the_native_records_are_read(text, tmp_path):
    from training import records
    (tmp_path / "pairs.jsonl").write_text("".join(blocks("json", text)))
    read = records.Records(tmp_path / "pairs.jsonl")
    assert (len(read), read.format) == (2, "native")
    for record in pairs_of(read):
        assert record["chosen"] and record["rejected"] and record["images"]
        assert len(record["images_rejected"]) in (0, len(record["images"]))


def test_the_rejected_images_of_the_page_are_those_of_the_code():
    import data
    table = section("The rejected image", PAGES["data"])
    rows = re.findall(r"^\| ((?:`[\w-]+`(?:, )?)+) \|", table, re.MULTILINE)
    assert re.findall(r"`([\w-]+)`", " ".join(rows)) == [*data.REJECTED, "none"]


def test_the_formats_of_the_page_are_those_of_the_code():
    from training import records
    named = re.findall(r"^\| ([\w-]+) \| `", PAGES["data"], re.MULTILINE)
    assert set(named) == set(records.FORMATS)


def test_the_presets_of_the_page_are_those_of_the_code():
    """A row is `field`, mDPO's `value` (tag), PDS-DPO's `value` (tag)."""
    from training import options
    row = re.compile(r"^\| `(\w+)` \| `([^`]*)` [^|]*\| `([^`]*)` [^|]*\|$", re.MULTILINE)
    rows = row.findall(PAGES["presets"])
    code = [vars(options.Options(**options.PRESETS[name])) for name in ("mdpo-llava", "pds-llava")]
    assert options.PRESETS["mdpo-bunny"] == options.PRESETS["mdpo-llava"]
    assert {name for name, *_ in rows} == {k for p in options.PRESETS.values() for k in p}
    assert [name for name, *said in rows for o, text in zip(code, said, strict=True)
            if type(o[name])(text) != o[name]] == []


def test_the_recipes_are_diffs_of_three_to_six_lines():
    """Five of them, each of one file; tests/test_recipes.py applies and runs them."""
    diffs = blocks("diff", section("Change something"))
    files = [re.search(r"^--- a/(\S+)\n\+\+\+ b/\1$", diff, re.MULTILINE)[1] for diff in diffs]
    assert files == ["losses.py", "data.py", "training/options.py", "train_dpo.py", "model/front.py"]
    for diff in diffs:
        assert len(re.findall(r"^[+-](?![+-])", diff, re.MULTILINE)) <= 6


def test_ci_runs_the_two_commands_of_the_readme():
    for ending in ("python train_dpo.py", "python -m pytest"):
        line = re.compile(rf"^python3 -m venv .* && {re.escape(ending)}$", re.MULTILINE)
        assert len(line.findall(README)) == len(line.findall(section("Quick start"))) == 1


# --- the main command ---------------------------------------------------------------------------------


@pytest.fixture
def main_run():
    """(summary of CI's main command, its seconds)."""
    if "NANOVPO_RUN" not in os.environ:
        pytest.skip("NANOVPO_RUN names no run: .ci/run makes one and sets it")
    summary = json.loads((Path(os.environ["NANOVPO_RUN"]) / "summary.json").read_text())
    return summary, float(os.environ["NANOVPO_SECONDS"])


def test_the_main_command_lowers_hallucination_in_three_minutes(main_run):
    """CHAIR_s at most 0.6 of the base's, its interval below zero, Cover at most 6 points less, in 180 s."""
    summary, seconds = main_run
    before, after = summary["before"], summary["after"]
    assert after["chair_s"] <= 0.6 * before["chair_s"]
    assert summary["difference"]["chair_s"]["interval"][1] < 0
    assert after["cover"] >= before["cover"] - 6
    assert seconds <= 180


def shown_table():
    """{measure: [before, after, change, low, high]} of the table in the README's quick start."""
    number = r"([+-]?\d+\.\d)"
    row = re.compile(rf"^(\S.*?) +{number} +{number} +{number} +{number} to {number}$", re.MULTILINE)
    return {name: [*map(float, numbers)] for name, *numbers in row.findall(section("Quick start"))}


def test_the_readme_names_the_folder_of_the_default_run(monkeypatch):
    """An option more, or an edit of a loss, gives it another name: then the second command finds nothing."""
    from training import options
    monkeypatch.chdir(ROOT)
    folder = str(options.run_folder(options.parse([], "")))
    assert {*re.findall(r"runs/classroom-mdpo-\S+?(?=/)", README)} == {folder}


def test_the_table_in_the_readme_adds_up():
    """As many rows as there are measures; change is after - before, to rounding, and inside its interval."""
    from evaluation import metrics
    rows = shown_table()
    assert set(metrics.CLASSROOM.values()) < set(rows) and len(rows) == 12
    for before, after, change, low, high in rows.values():
        assert abs(after - before - change) < 0.11 and low <= change <= high


def test_the_table_in_the_readme_is_what_the_main_command_prints(main_run):
    """The base to a point; each change within a distance that the processor's rounding explains: its interval
    and the README's overlap."""
    from evaluation import metrics
    summary, _ = main_run
    changes, found = summary["difference"], {}
    for key, name in metrics.CLASSROOM.items():
        found[name] = summary["before"][key], changes[key]["interval"]
    for name, about in summary["before"]["by_kind"].items():
        found[name] = about["acc"], changes["by_kind"][name]["interval"]
    rows = shown_table()
    assert rows.keys() == found.keys()
    for name, (before, (least, most)) in found.items():
        shown, _, _, low, high = rows[name]
        assert abs(before - shown) <= 1 and least <= high + .05 and most >= low - .05, name
    pairs, steps = re.search(r"^(\d+) pairs, (\d+) steps, \d+ s: runs/", README, re.MULTILINE).groups()
    assert (int(pairs), int(steps)) == (summary["pairs"], summary["steps"])


# --- the printed results ------------------------------------------------------------------------------


RESULTS = ROOT / "classroom" / "papers" / "results"
CLASSROOM = (ROOT / "classroom" / "README.md").read_text()


@pytest.fixture
def study():
    """classroom/papers/study.py, which is started by path."""
    return importlib.import_module("classroom.papers.study")


def test_every_printed_run_of_mdpo_keeps_the_goal():
    """3 bases x 5 seeds, by the log: CHAIR_s at most 0.6 of the base's, Cover at most 6 points less. And, as
    the README says, CHAIR_s is lower than DPO's on the same base and seed."""
    runs = [json.loads(line) for line in (RESULTS / "print.jsonl").read_text().splitlines()]
    dpo = {(row["base"], row["seed"]): row for row in runs if row["name"] == "DPO"}
    mdpo = {(row["base"], row["seed"]): row for row in runs if row["name"] == "mDPO"}
    assert len(mdpo) == sum(row["name"] == "mDPO" for row in runs) == 15
    for place, row in mdpo.items():
        assert row["after"]["chair_s"] <= 0.6 * row["before"]["chair_s"]
        assert row["after"]["cover"] >= row["before"]["cover"] - 6
        assert row["after"]["chair_s"] < dpo[place]["after"]["chair_s"]


def test_learning_rates_are_the_rules_choice(study):
    """The preset's and the printed runs', recomputed from the tuning runs."""
    from training import options
    rates = study.chosen_rates()
    assert options.Options().lr == float(rates["mDPO"])
    for row in study.read("print"):
        assert row["options"].endswith(f"--lr {rates[row['name']]}")


def test_the_settings_of_the_papers_tables_are_what_their_rule_chooses(chosen):
    for method, options in chosen.items():
        assert f"| {method} | `{options}` |" in CLASSROOM


@pytest.mark.parametrize("name", ["print", "tuning", "causes", "settings"])
def test_the_tables_of_results_are_what_the_study_makes_of_its_log(name, study):
    """classroom/README.md, line by line from classroom/papers/results/*.jsonl."""
    assert [line for line in study.table(RESULTS / f"{name}.jsonl") if line not in CLASSROOM] == []


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_five_rows_of_the_readme_are_columns_of_the_study(study):
    head, _, *rows = map(cells, study.table(RESULTS / "print.jsonl"))
    own, _, *shown = [cells(line) for line in section("Results").splitlines() if line.startswith("|")]
    columns = [head.index(name) for name in own]
    assert shown == [[row[k] for k in columns] for row in rows] and len(shown) == 5


def test_the_number_of_tables_and_figures_is_that_of_the_page():
    count, = re.findall(r"runs\s+(\d+)\s+tables", section("Results"))
    assert f"{count} tables and figures:" in (ROOT / "classroom" / "papers" / "RESULTS.md").read_text()


@pytest.mark.parametrize("text", [section("Speed"), section("Against TRL", PAGES["performance"])],
                         ids=["README", "docs"])
def test_the_speed_is_that_of_a_run_of_the_bench(text):
    """Each factor is a cell of bench/RESULTS.md, and so is the memory."""
    measured = (ROOT / "bench" / "RESULTS.md").read_text()
    factors = re.findall(r"\d\.\d\d \(\d\.\d\d, \d\.\d\d\)", text)
    assert len(factors) >= 4 and [factor for factor in factors if f"| {factor} |" not in measured] == []
    memory, = re.findall(r"\b(0\.\d\d)\b", text)
    assert f"(DPO, first epoch): {memory} of the process" in measured


def test_the_memory_of_synthesis_is_computed_from_the_published_sizes():
    from bench import synthesis as program
    assert [line for line in program.table() if line not in PAGES["synthesis"]] == []
