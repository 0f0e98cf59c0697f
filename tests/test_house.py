"""The house as specification: the tree, who imports whom, how much code there is, one of each, --help."""
import ast
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, run_script

SCRIPTS = ("data", "eval_hallu", "lora", "losses", "synth", "train_dpo")
FOLDERS = ("model", "evaluation", "training", "synthesis")
ROOM = {*(f"{name}.py" for name in SCRIPTS), *FOLDERS, "classroom", "docs", "bench", "tests", "README.md",
        "LICENSE", "requirements.txt", "requirements-dev.txt", "pyproject.toml"}
RUN = {"train_dpo.py", "lora.py", "synth.py", "eval_hallu.py", "model/import_checkpoint.py",
       "training/report.py"}
# A command of its own, which no other file imports: the budget does not count it.
OUTSIDE = {"model/import_checkpoint.py"}
# Who may import whom, also inside functions. A folder may import itself; nobody imports the root's commands.
LEFT = {"losses": "", "data": "", "lora": "data",
        "model": "losses data lora",
        "evaluation": "losses data lora model",
        "training": "losses data lora model evaluation",
        "synthesis": "losses data lora model evaluation",
        "train_dpo": "losses data lora model evaluation training",
        "synth": "losses data lora model evaluation synthesis",
        "eval_hallu": "losses data lora model evaluation"}
OURS = {*SCRIPTS, *FOLDERS, "classroom", "bench", "tests"}
LIGHT = {"torch", "safetensors", "PIL", "numpy", "tqdm"}        # what a file may import at its top
HEAVY = ("transformers", "diffusers", "peft", "trl", "matplotlib", "torch._dynamo")
TOKENS, PER_LINE, LINES, FUNCTION = 68_000, 11, 480, 60       # tokens: 60,000 when the house was rebuilt

FILES = [f"{name}.py" for name in SCRIPTS]
FILES += sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
CODE = [name for name in FILES if not name.endswith("__init__.py")]
CLASSROOM = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "classroom").glob("**/*.py"))
BENCH = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "bench").glob("*.py"))


@cache
def tree_of(name):
    return ast.parse((ROOT / name).read_text())


def module_of(name):
    """model.vlm, of model/vlm.py."""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def place(name):
    """Which row of LEFT a file is in: its folder, or its own name at the root."""
    return name.split("/")[0].removesuffix(".py")


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def imported(tree):
    """Every module that is imported anywhere in it: model and model.vlm for `from model import vlm`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides which folder it comes from"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tops(tree):
    return {module.split(".")[0] for module in imported(tree)}


# ---- the tree ----------------------------------------------------------------------------------------


def test_the_root_has_nineteen_entries():
    """Of what belongs to the repository; what commands leave behind does not."""
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: there is no list of what belongs to the repository")
    there = {name.split("/")[0] for name in listed.stdout.splitlines()}
    assert {name for name in there if not name.startswith(".")} == ROOM
    assert len(ROOM) == 19


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folders_init_is_its_map_and_nothing_else(folder):
    """A line for every part: four spaces, its name, what it is."""
    tree = tree_of(f"{folder}/__init__.py")
    assert len(tree.body) == 1
    named = re.findall(r"^    (\w+\.\w+|\w+/) +\S", ast.get_docstring(tree, clean=False), re.MULTILINE)
    there = {path.name + "/" * path.is_dir() for path in (ROOT / folder).iterdir()}
    assert sorted(named) == sorted(there - {"__init__.py", "__pycache__/"})


@pytest.mark.parametrize("name", FILES)
def test_no_file_has_the_name_of_a_standard_module(name):
    assert Path(name).stem not in sys.stdlib_module_names


# ---- who imports whom --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_imports_go_leftwards_only(name):
    allowed = {*LEFT[place(name)].split()} | {place(name)} & {*FOLDERS}
    assert tops(tree_of(name)) & OURS <= allowed


def test_no_file_imports_itself_by_a_detour():
    """Within the folders, too."""
    graph = {module_of(name): {*imported(tree_of(name))} for name in CODE}
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in sorted(graph[module] & graph.keys()):
                visit(other, [*path, module])
            done.add(module)
    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("name", CODE)
def test_importing_a_file_runs_nothing_and_loads_nothing_heavy(name):
    """At the top: a docstring, light imports, definitions, and guards for who starts it."""
    tree = tree_of(name)
    assert ast.get_docstring(tree)
    guards = [node for node in tree.body if isinstance(node, ast.If)]
    who = {"__name__ == '__main__'"}
    if name == "data.py":                           # which every command imports first
        who.add("(missing := [name for name in 'numpy PIL safetensors torch tqdm'.split() "
                "if not find_spec(name)])")
    assert {ast.unparse(node.test) for node in guards} <= who
    rest = [node for node in tree.body[1:] if node not in guards]
    imports = [node for node in rest if isinstance(node, ast.Import | ast.ImportFrom)]
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)
    others = [node for node in rest if node not in imports and not isinstance(node, kinds)]
    assert [ast.unparse(node)[:60] for node in others] == []
    assert tops(ast.Module(imports, [])) <= sys.stdlib_module_names | OURS | LIGHT


def python(*words, **options):
    """A finished process of this Python, with its output."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, **options)


def test_all_files_import_in_silence_at_once_and_metrics_without_torch():
    """Within three seconds of the processor beyond torch's own, and nothing heavy."""
    modules = ", ".join(map(module_of, CODE))
    code = ("import sys, time, evaluation.metrics; assert 'torch' not in sys.modules; import torch; "
            f"start = time.process_time(); import {modules}; assert time.process_time() - start < 3; "
            f"print(sorted({{*{HEAVY}}} & {{*sys.modules}}))")
    done = python("-c", code, cwd=ROOT)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_the_folders_win_over_installed_packages_of_their_names(tmp_path):
    """Started from another working directory, with a package of such a name installed."""
    for folder in FOLDERS:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise SystemExit('the wrong one')")
    for script in ("eval_hallu.py", "synth.py", "train_dpo.py", "classroom/papers/reproduce.py"):
        code, said = run_script(ROOT / script, "--help", folder=tmp_path, path=[tmp_path], forget=OURS)
        assert code == 0, said


# ---- how much there is -------------------------------------------------------------------------------


@cache
def count(name):
    """(tokens, numbers of the code lines) of a file, without comments, docstrings and newlines."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENCODING, tokenize.ENDMARKER)
    docs = set()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            docs |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    tokens, lines = 0, set()
    for token in tokenize.generate_tokens(io.StringIO((ROOT / name).read_text()).readline):
        if token.type not in layout and token.start[0] not in docs:
            tokens += 1
            lines |= {*range(token.start[0], token.end[0] + 1)}
    return tokens, lines


def test_the_budget_in_tokens(capsys):
    rows = {name: count(name) for name in FILES}
    counted = [name for name in FILES if name not in OUTSIDE]
    total, lines = sum(rows[name][0] for name in counted), sum(len(rows[name][1]) for name in counted)
    with capsys.disabled():
        print()
        for name, (tokens, code) in rows.items():
            note = "" if name in counted else "  (not counted)"
            density = tokens / max(1, len(code))
            print(f"{name:30}{len(code):6} code lines{tokens:8} tokens{density:6.1f} a line{note}")
        print(f"{'in all':30}{lines:6} code lines{total:8} tokens{total / lines:6.1f} a line")
    assert total / lines <= PER_LINE
    assert total <= TOKENS, "when a feature does not fit, something else must go"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_can_be_read_in_one_sitting(name):
    _, code = count(name)
    long = {}
    for node in functions(tree_of(name)):
        size = len(code & {*range(node.lineno, node.end_lineno + 1)})
        if size > FUNCTION:
            long[node.name] = size
    lines = (ROOT / name).read_text().count("\n")
    assert long == {}
    assert lines <= LINES


def bound(function):
    """The values that a function's body names: arguments, assignments, loops; not imports, not functions."""
    found = {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}
    for node in ast.walk(ast.Module(function.body, [])):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            found.add(node.name)
    return found


@pytest.mark.parametrize("name", FILES)
def test_an_inner_function_reads_at_most_two_names_of_the_outer_one(name):
    crowded = {}
    for outer in functions(tree_of(name)):
        for inner in functions(ast.Module(outer.body, [])):
            used = {node.id for node in ast.walk(inner) if isinstance(node, ast.Name)}
            names = used & bound(outer) - bound(inner)
            if len(names) > 2:
                crowded[f"{outer.name}.{inner.name}"] = sorted(names)
    assert crowded == {}


# ---- one of each -------------------------------------------------------------------------------------


def calls(name):
    """The last name of every call in a file: flock for fcntl.flock(...)."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func).split(".")[-1]


def classes(name):
    """(its name, its bases as text) of every class in a file."""
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.ClassDef):
            yield node.name, ", ".join(map(ast.unparse, node.bases))


@pytest.mark.parametrize("call, home", [
    ("flock", "model/command.py"),                    # one lock
    ("init_process_group", "model/command.py"),       # one way to be one of several processes
    ("commonpath", "data.py"),                        # one check that a path stays in its folder
    ("percentile", "evaluation/stats.py"),            # one bootstrap
    ("HTTPConnection", "model/ask.py"), ("urlopen", "model/ask.py")])            # one client
def test_there_is_one_place_for(call, home):
    assert {name for name in CODE if call in calls(name)} <= {home}


def test_there_is_one_parser_one_store_one_error():
    parsers, errors, stores = [], [], []
    for name in CODE:
        for kind, bases in classes(name):
            parsers += [(name, kind)] * ("ArgumentParser" in bases)
            errors += [(name, kind)] * bool(re.search("Error|Exception", bases))
            stores += [(name, kind)] * bool(re.search("Store$|Journal$", kind))
    assert (parsers, errors) == ([("data.py", "Parser")], [("data.py", "UserError")])
    assert stores == [("model/command.py", "Store")]
    assert [name for name in [*CODE, *CLASSROOM, *BENCH] if "ArgumentParser" in calls(name)] == []


def test_models_are_loaded_without_a_network_in_one_place():
    """data.from_folder; a model that is given its weights (None for a folder) reads no file."""
    found = {}
    for name in CODE:
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained"):
                if ast.unparse(node.args[0]) != "None":
                    found.setdefault(name, []).append(ast.unparse(node.func))
    assert found == {"data.py": ["kind.from_pretrained"]}


def test_there_is_one_style_of_pages():
    assert [name for name in CODE if "<style" in (ROOT / name).read_text()] == ["evaluation/page.py"]


# ---- commands ----------------------------------------------------------------------------------------

SCORES = ("classroom", "pope", "amber", "chair", "mmhal", "votes")
SCRIPTS_OF = [name for name in [*CLASSROOM, *BENCH]
              if any(node.name == "main" for node in tree_of(name).body if isinstance(node, ast.FunctionDef))]
COMMANDS = ["train_dpo.py", "lora.py", "lora.py merge", "synth.py", "eval_hallu.py",
            *(f"eval_hallu.py {name}" for name in ("answers", "score", "compare")),
            *(f"eval_hallu.py score {name}" for name in SCORES),
            "-m model.import_checkpoint", "-m training.report", "classroom/pairs.py scenes", *SCRIPTS_OF]
TORCH = {"train_dpo.py", "lora.py", "bench/limit.py", "bench/scale.py", "bench/vs_trl.py"}   # may load torch


def words_of(command):
    """A command's words, its script with its whole path."""
    script, *words = command.split()
    return [script if script == "-m" else str(ROOT / script), *words]


def started(commands, *modules):
    """What tests/start.py tells of each [folder, words]."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "start.py", *modules], input=json.dumps(commands),
                          capture_output=True, text=True,
                          env={**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{(command, an argument): (what it said, its folder)} of all commands.

    Those whose help shall not load torch are asked for it where torch is not; for the others it is there,
    and what most of them import.
    """
    asked = [(command, word) for command in COMMANDS for word in ("--help", "--no_such_option")]
    without = [(command, word) for command, word in asked
               if word == "--help" and command.split()[0] not in TORCH]
    found = {}
    others = [each for each in asked if each not in without]
    for some, more in ((without, []), (others, ["torch", "train_dpo"])):
        folders = [tmp_path_factory.mktemp("empty") for _ in some]
        told = started([[str(folder), [*words_of(command), word]]
                        for folder, (command, word) in zip(folders, some, strict=True)],
                       *more, "evaluation.compare")
        found |= zip(some, zip(told, folders, strict=True), strict=True)
    return found


def undescribed(text):
    """The options, commands and keys of a help text that say nothing about themselves."""
    _, listed = re.split(r"^(?:positional arguments|options):\n", text, maxsplit=1, flags=re.MULTILINE)
    entries = re.findall(r"^ {2,4}([^ {].*(?:\n {5,}.*)*)", listed, re.MULTILINE)
    assert entries
    return [entry for entry in entries if not re.search(r"(\S {2,}|\n *|=\S*: )(?=.*[a-z]{2})", entry)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_complete_narrow_and_light(command, outcomes):
    """From any folder: 80 columns, each option described, at once, and nothing is started or written."""
    told, folder = outcomes[command, "--help"]
    assert (told["code"], told["err"]) == (0, "")
    assert told["out"].startswith("usage:")
    assert undescribed(told["out"]) == []
    assert [line for line in told["out"].splitlines() if len(line) > 80] == []
    allowed = {"torch"} if command.split()[0] in TORCH else set()
    assert {*HEAVY, "torch"} & {*told["loaded"]} <= allowed
    assert told["seconds"] < 1
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_argument_is_refused_with_a_sentence(command, outcomes):
    told, folder = outcomes[command, "--no_such_option"]
    assert told["code"] in (1, 2) and told["out"] == ""
    assert len(told["err"].splitlines()) == 1 and "Traceback" not in told["err"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("command", ["train_dpo.py", "lora.py merge", "synth.py", "eval_hallu.py score",
                                     "-m training.report", "-m model.import_checkpoint",
                                     *(name for name in SCRIPTS_OF if name in CLASSROOM)])
def test_outside_the_virtual_environment_one_line_says_what_to_run(command):
    """-S: without the installed packages."""
    done = python("-S", *words_of(command), cwd=ROOT)
    said, = done.stderr.splitlines()
    assert done.returncode == 1
    assert "has no numpy, PIL, safetensors, torch, tqdm: " in said and "run python3 -m venv .venv &&" in said


PARTS = [name for name in [*CODE, *CLASSROOM, *BENCH] if name not in {*RUN, *SCRIPTS_OF}]


@pytest.fixture(scope="module")
def parts():
    """{a part: what it said, started by its path and with -m}."""
    told = iter(started([[str(ROOT), [*words, "--help"]]
                         for name in PARTS for words in ([name], ["-m", module_of(name)])]))
    return {name: (next(told), next(told)) for name in PARTS}


@pytest.mark.parametrize("name", PARTS)
def test_a_part_says_which_command_it_belongs_to(name, parts):
    """Started by mistake, by its path or with -m, it is refused in one line that names a command."""
    for told in parts[name]:
        assert (told["code"], told["out"]) == (1, "")
        said, = told["err"].splitlines()
        script, = re.findall(r"run: python (\S+\.py) --help$", said)
        assert script in {*RUN, *SCRIPTS_OF}
