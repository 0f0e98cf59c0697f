"""The README and the house rules as specification: what the documents say of the code holds."""
import ast
import contextlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
# Who may import whom; below this line nobody.
IMPORTS = {"losses": "", "lora": "", "data": "", "kernels": "", "tally": "data", "replies": "",
           "nouns": "data", "pairing": "data", "command": "data", "page": "data",
           "objects": "data tally", "amber": "data replies tally", "metrics": "data objects replies tally",
           "records": "data", "ranks": "data lora", "options": "data losses", "families": "data",
           "report": "data metrics", "vlm": "data families kernels lora losses plan",
           "chat": "command data vlm",
           "reference": "data lora losses plan ranks vlm",
           "benchmarks": "data nouns", "judge": "chat data",
           "answers": "benchmarks command data lora metrics nouns objects vlm",
           "compare": "benchmarks data metrics page tally",
           "eval_hallu": "amber answers benchmarks command compare data judge metrics nouns objects replies "
                         "tally vlm",
           "rewards": "data", "sd3": "command data", "topics": "chat data",
           "gallery": "chat data page pairing",
           "synth": "chat command data gallery pairing rewards sd3 topics",
           "plan": "data families losses options records",
           "diagnose": "data plan records tally vlm",
           "train_dpo": "answers data diagnose lora losses metrics options plan ranks records reference "
                        "report vlm"}
PACKAGES = {"torch", "transformers", "diffusers", "safetensors", "PIL", "numpy", "tqdm"}
HEAVY = {"transformers", "diffusers", "peft", "trl"}


def imports(nodes):
    """Top names of all modules that these nodes and what is inside them import."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def section(title):
    """The text under a heading of the README."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, f"README.md has no section {title!r}"
    return found[1]


def block(kind, text):
    """The first fenced block of a kind."""
    return re.search(rf"^```{kind}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)[1]


# --- the house ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_go_one_way(name):
    """Also inside functions; nobody imports classroom/, tools/ or bench/."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    ours = {*SCRIPTS, "classroom", "tools", "bench", "tests"}
    assert set(imports(tree.body)) & ours <= set(IMPORTS[name].split())


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_a_script_runs_nothing_and_loads_nothing_heavy(name):
    """Top level: light imports, definitions, and the guard of main()."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    *rest, last = tree.body[1:]
    assert isinstance(tree.body[0], ast.Expr) and ast.get_docstring(tree), "a script opens with a docstring"
    if isinstance(last, ast.If):
        assert ast.unparse(last) == "if __name__ == '__main__':\n    main()"
    else:
        rest.append(last)
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    assert [ast.unparse(node)[:60] for node in rest if not isinstance(node, kinds)] == []
    top = set(imports([node for node in rest if isinstance(node, ast.Import | ast.ImportFrom)]))
    assert top <= {*sys.stdlib_module_names, *SCRIPTS, *PACKAGES} - HEAVY


def test_all_scripts_import_in_silence_and_metrics_without_torch():
    code = (f"import sys; import metrics; assert 'torch' not in sys.modules; import {', '.join(SCRIPTS)}; "
            f"print(sorted({HEAVY} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


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


# --- the README ---------------------------------------------------------------------------------------


def test_the_readme_has_no_gap_left():
    assert re.findall(r"RESULTS-TABLE|RESULTS-TEXT|MAIN-OUTPUT|TODO|FIXME", README) == []


def test_the_file_map_names_every_script_and_nothing_else():
    blocks = re.findall(r"^```\n(.*?)^```", section("Files"), re.DOTALL | re.MULTILINE)
    named = re.findall(r"^(\S+)  ", "".join(blocks), re.MULTILINE)
    assert {f"{name}.py" for name in SCRIPTS} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("file", ["README.md", "classroom/README.md", "bench/RESULTS.md"])
def test_links_within_the_repository_lead_somewhere(file):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / file).read_text())
    assert [link for link in links if not (ROOT / file).parent.joinpath(link).exists()] == []


def test_every_option_in_the_readme_is_one_that_help_knows(monkeypatch):
    """Every --flag and every --set key that it mentions; torchrun's and Hugging Face's apart."""
    helps = ""
    scores = [f"eval_hallu.py score {name}" for name in ("pope", "amber", "chair", "mmhal", "votes")]
    for command in ("train_dpo.py", "eval_hallu.py answers", *scores, "eval_hallu.py compare",
                    "eval_hallu.py export", "lora.py", "synth.py all", "synth.py analyse",
                    "tools/import_checkpoint.py", "classroom/pairs.py", "classroom/pairs.py scenes",
                    "classroom/make.py", "classroom/synthesis.py", "classroom/reproduce.py"):
        script, *words = command.split()
        monkeypatch.setattr(sys, "argv", [script, *words, "--help"])
        monkeypatch.setenv("COLUMNS", "200")
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        assert not stop.value.code, command
        helps += said.getvalue()
    others = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id", "--local-dir",
              "--model_args", "--log_samples", "--output_path", "--tasks"}       # torchrun, hf, lmms_eval
    flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) - others
    assert len(flags) > 15 and sorted(flag for flag in flags if not re.search(rf"{flag}\b", helps)) == []
    assert [key for key in re.findall(r"--set ([a-z_]+)=", README) if f"  {key}=" not in helps] == []
    scripts = re.findall(r"(?:python3?|torchrun [^`\n]*?) ([\w/]+\.py)\b", README)
    assert len(scripts) > 10 and [name for name in scripts if not (ROOT / name).exists()] == []


def test_the_loss_in_the_readme_is_the_loss_in_the_code():
    code = (ROOT / "losses.py").read_text().splitlines()
    assert [line for line in block("python", section("The loss")).splitlines() if line not in code] == []


def test_the_native_record_in_the_readme_is_one(tmp_path):
    import records
    (tmp_path / "pairs.jsonl").write_text(block("json", section("Data")))
    read = records.Records(tmp_path / "pairs.jsonl")
    assert (len(read), read.format) == (1, "native")
    assert read[0]["chosen"] and read[0]["rejected"] and read[0]["images"]


def test_the_presets_in_the_readme_are_those_of_the_code():
    """A row is `field`, mDPO's `value` (tag), PDS-DPO's `value` (tag)."""
    import options
    row = re.compile(r"^\| `(\w+)` \| `([^`]*)` [^|]*\| `([^`]*)` [^|]*\|$", re.MULTILINE)
    rows = row.findall(section("Presets"))
    code = [vars(options.Options(**options.PRESETS[name])) for name in ("mdpo-llava", "pds-llava")]
    assert options.PRESETS["mdpo-bunny"] == options.PRESETS["mdpo-llava"]
    assert {name for name, *_ in rows} == {k for p in options.PRESETS.values() for k in p}
    assert [name for name, *said in rows for o, text in zip(code, said, strict=True)
            if type(o[name])(text) != o[name]] == []


def test_the_three_lines_of_change_the_loss_train(tmp_path):
    """The README's diff, applied to a copy, and `--loss mine` for three steps."""
    for script in SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    (tmp_path / "classroom").symlink_to(ROOT / "classroom")
    diff = block("diff", section("Change the loss"))
    assert len(re.findall(r"^\+(?!\+)", diff, re.MULTILINE)) == 3
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=diff, text=True, check=True)
    command = ("train_dpo.py --loss mine --max_steps 3 --out run "
               "--set pairs=48 --set scenes=8 --set questions=20 --set max_new_tokens=8")
    done = subprocess.run([sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *rest = (json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    steps = [line for line in rest if "step" in line]
    assert "def mine" in first["losses_source"] and len(steps) == 3
    assert steps[0]["loss"] == pytest.approx(1, abs=1e-5)                   # a hinge of margin 0


def test_ci_runs_the_two_commands_of_the_readme():
    for ending in ("python train_dpo.py", "python -m pytest"):
        line = re.compile(rf"^python3 -m venv .* && {re.escape(ending)}$", re.MULTILINE)
        assert len(line.findall(README)) == len(line.findall(section("Quick start"))) == 1


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


def test_every_printed_run_of_mdpo_keeps_the_goal():
    """3 bases x 5 seeds: CHAIR_s at most 0.6 of the base's, Cover at most 6 points less, by the log."""
    lines = (ROOT / "classroom" / "results" / "print.jsonl").read_text().splitlines()
    runs = [row for row in map(json.loads, lines) if row["name"] == "mDPO"]
    assert len({(row["base"], row["seed"]) for row in runs}) == len(runs) == 15
    for row in runs:
        assert row["after"]["chair_s"] <= 0.6 * row["before"]["chair_s"]
        assert row["after"]["cover"] >= row["before"]["cover"] - 6


def test_learning_rates_are_the_rules_choice():
    """The preset's and the printed runs', recomputed from the tuning runs."""
    import options
    sys.path.insert(0, str(ROOT / "classroom"))
    import study
    rates = study.chosen_rates()
    assert options.Options().lr == float(rates["mDPO"])
    for row in study.read("print"):
        assert row["options"].endswith(f"--lr {rates[row['name']]}")


def test_the_memory_of_synthesis_is_computed_from_the_published_sizes():
    from bench import synthesis as program
    assert [line for line in program.table() if line not in README] == []


def test_the_settings_of_the_papers_tables_are_what_their_rule_chooses():
    sys.path.insert(0, str(ROOT / "classroom"))
    import study
    page = (ROOT / "classroom" / "README.md").read_text()
    for method, options in study.best_settings().items():
        assert f"| {method} | `{options}` |" in page


@pytest.mark.parametrize("study", ["print", "tuning", "causes", "settings"])
def test_the_tables_of_results_are_what_the_study_makes_of_its_log(study):
    """README's table, and those of classroom/README.md, line by line from classroom/results/*.jsonl."""
    sys.path.insert(0, str(ROOT / "classroom"))
    import study as program
    page = README if study == "print" else (ROOT / "classroom" / "README.md").read_text()
    for line in program.table(ROOT / "classroom" / "results" / f"{study}.jsonl"):
        assert line in page
