"""What tests/fuzz.py spoils, a function for each kind of input: it copies sound files of fuzz_world.py into
case/, spoils one of them, and says which command is to read it and what must come out.

case.draw chooses among commands and files, case.rng what is spoiled. case.same: the result must be that of the
sound input, because nothing but the writing was changed, or because no change may go unnoticed.
"""
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import fuzz_mutate as mutate
from fuzz_world import EPS, SYNTH, TRAIN

MODELS = ("llava15", "llava15", "llava16")
DRY = ["train_dpo.py", "--dry_run", "--batch", "2", "--micro_batch", "2", "--set", "device=cpu"]


# ---- what came out ----
def text_of(case):
    return case.printed


def contents(*names):
    """A function that reads the result of a case from files in its output."""
    def read(case):
        found = {}
        for name in names:
            for path in sorted(Path("case/out").glob(name)):
                content = path.read_bytes()
                if path.suffix == ".json":
                    content = json.dumps(json.loads(content), sort_keys=True)
                found[str(path)] = content if len(content) < 9_999 else hashlib.sha256(content).hexdigest()
        assert found, "the command made nothing"
        return found
    return read


ADAPTER = contents("adapter/*")
MERGED = contents("*.safetensors")
SCORES = contents("scores.json")


# ---- training's inputs ----
def records(case):
    source = case.draw.choice(sorted(Path("data").iterdir()))
    path = Path(case.take(source, f"data{source.suffix}"))
    if source.suffix == ".parquet":
        case.spoil(path, mutate.raw)
    else:
        layout = case.draw.choice(("as it is", "array"))
        if layout == "array" and source.suffix == ".jsonl":
            rows = mutate.parsed(path.read_bytes())[0]
            path = path.with_suffix(".json")
            path.write_text(json.dumps(rows))
        case.spoil(path, mutate.a_json, neutral=True)
    more = case.draw.choice(([], [], ["--skip_bad"], ["--loss", "dpo", "--image_rejected", "none"], ["--set", "max_length=60"]))
    argv = ["--model", case.draw.choice(MODELS), "--data", path, "--image_root", "images", *more]
    if case.draw.random() < .05 and not case.same:
        more = ["--set", "check_memory=false"] if "max_length=60" in more else []
        case.run("train_dpo.py", *argv, *TRAIN[4:], "--max_steps", "1", "--out", "case/out", *more)
    else:
        case.run(*DRY, *argv, result=text_of)


def images(case):
    source = case.draw.choice(sorted(Path("pictures").iterdir()))
    path = Path(case.take(source))
    special = case.rng.random()
    if special < .03 and not case.clean:
        path.unlink()
        (os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p), lambda p: os.symlink("../../../..", p),
         lambda p: p.write_bytes(EPS), lambda p: os.symlink(p.name, p))[case.rng.randrange(6)](path)
    elif special < .035 and not case.clean:
        huge(path)
    elif special < .25 and not case.clean:
        content = bytearray(path.read_bytes())                            # the header, where sizes are
        content[case.rng.randrange(8, 40)] = case.rng.choice((0, 1, 127, 255))
        path.write_bytes(content)
    else:
        case.spoil(path, mutate.raw)
    record = {"id": "p", "image": path.name, "question": "what is this ?", "chosen": "a dog", "rejected": "a cat"}
    how = case.draw.random()
    if how < .6:
        Path("case/pairs.jsonl").write_text(json.dumps(record) + "\n")
        case.run(*DRY, "--model", case.draw.choice(MODELS), "--data", "case/pairs.jsonl")
    else:
        path = path.rename("case/COCO_val2014_000000000000.jpg")
        for k in range(1, 4):
            case.take(f"coco/COCO_val2014_{k:012}.jpg")
        if how < .9:
            case.run("eval_hallu.py", "compare", "pope.a.jsonl", "pope.b.jsonl", "--images", "case", "--out", "case/page.html")
        else:
            case.run("eval_hallu.py", "answers", "pope", "--model", "llava15", "--data", "pope", "--images", "case",
                     "--out", "case/answers.jsonl", "--max_new_tokens", "1")


def huge(path):
    """A PNG of 13,000 x 13,000 grey pixels of 16 bits: a third of a megabyte."""
    import struct
    import zlib
    packer, rows = zlib.compressobj(9), b""
    for _ in range(130):
        rows += packer.compress(bytes(26_001 * 100))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 13_000, 13_000, 16, 0, 0, 0, 0)), (b"IDAT", rows + packer.flush()),
              (b"IEND", b""))
    parts = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


# ---- model folders ----
def uses_model(case, model):
    """A command that reads a model folder, and how its result is read."""
    how = case.draw.random()
    if how < .6:
        case.run(*DRY, "--model", model, "--data", "pairs.jsonl", result=text_of)
    elif how < .8 and "15" in model:
        case.run("lora.py", "merge", "--model", model, "--adapter", "adapter", "--out", "case/out", result=MERGED)
    else:
        case.run("eval_hallu.py", "answers", "pope", "--model", model, "--data", "pope", "--images", "coco",
                 "--out", "case/out/answers.jsonl", "--max_new_tokens", "1")


def configs(case):
    model = case.take(case.draw.choice(MODELS))
    names = [name for name in ("config.json", "preprocessor_config.json", "generation_config.json", "processor_config.json")
             if Path(model, name).exists()]
    case.spoil(Path(model, case.draw.choice([*names, "config.json"])), mutate.a_json, neutral=True)
    uses_model(case, model)


def tokenizers(case):
    model = case.take(case.draw.choice(MODELS))
    case.spoil(Path(model, case.draw.choice(("tokenizer.json", "tokenizer_config.json"))), mutate.a_json, neutral=True)
    uses_model(case, model)


def templates(case):
    model = case.take(case.draw.choice(MODELS))
    file = next(Path(model).glob("*.jinja"))
    case.spoil(file, mutate.a_template)
    if case.draw.random() < .2:
        given = file.read_bytes().decode("utf-8", "replace")
        case.run(*DRY, "--model", "llava15", "--data", "pairs.jsonl", "--set", f"template={given}")
    else:
        uses_model(case, model)


def safetensors(case):
    if case.draw.random() < .3:
        model = case.take("bunny")
        files = [*sorted(Path(model).glob("*.safetensors")), Path(model, "config.json")]
        file = case.draw.choice([*files, *Path(model).glob("*.index.json"), Path(model, "vocab.json")])
        case.spoil(file, mutate.a_safetensors if file.suffix == ".safetensors" else mutate.a_json)
        case.run("model.import_checkpoint", model, "case/out", "--vision_tower", "case/bunny/siglip")
        return
    model = case.take("llava15")
    case.spoil(Path(model, "model.safetensors"), mutate.a_safetensors)
    uses_model(case, model)


def adapters(case):
    adapter = case.take("adapter")
    if case.draw.random() < .5:
        case.spoil(Path(adapter, "adapter_config.json"), mutate.a_json, neutral=True)
    else:
        case.spoil(Path(adapter, "adapter_model.safetensors"), mutate.a_safetensors)
    if case.draw.random() < .7:
        case.run("lora.py", "merge", "--model", "llava15", "--adapter", adapter, "--out", "case/out", result=MERGED)
    else:
        case.run("eval_hallu.py", "answers", "pope", "--model", "llava15", "--adapter", adapter, "--data", "pope", "--images",
                 "coco", "--out", "case/out/answers.jsonl", "--max_new_tokens", "1")


# ---- the state of a run: a resumed one ends as the undisturbed, or is refused ----
def checkpoints(case):
    out = case.take("runs/half", "out")
    file = Path(out, "last/checkpoint.safetensors")
    how = case.draw.random()
    if how < .15 and not case.clean:
        shutil.copy(f"runs/{case.draw.choice(('early', 'other'))}/last/checkpoint.safetensors", file)
    else:
        case.spoil(file, mutate.a_safetensors)
    case.same = True
    case.run("train_dpo.py", *TRAIN, "--out", out, result=ADAPTER)


def logs(case):
    if case.draw.random() < .5:
        out = case.take("runs/half", "out")
        case.spoil(Path(out, "log.jsonl"), mutate.a_json)
        case.same = True
        case.run("train_dpo.py", *TRAIN, "--out", out, result=ADAPTER)
    else:
        out = case.take("runs/whole", "out")
        case.spoil(Path(out, case.draw.choice(("log.jsonl", "log.jsonl", "summary.json"))), mutate.a_json, neutral=True)
        case.run("training.report", out, result=contents("report.html"))


def states(case):
    """before.json, after.json, checked/, summary.json."""
    out = case.take(case.draw.choice(("runs/half", "runs/whole")), "out")
    files = [path for path in sorted(Path(out).rglob("*.json")) if "adapter" not in path.parts]
    file = case.draw.choice(files)
    if "whole" in str(case.sources) and case.draw.random() < .5:
        Path(out, "report.html").unlink()
    case.spoil(file, mutate.a_json if case.draw.random() < .5 else mutate.raw)
    case.same = True
    case.run("train_dpo.py", *TRAIN, "--out", out, result=ADAPTER)


# ---- evaluation ----
SCORE = {
    "pope": ["--questions", "pope"], "amber": ["--data", "amber"], "mmhal": ["--template", "mmhal/template.json", "--judge",
             "replies/judge.ours.jsonl"], "chair": ["--annotations", "annotations", "--synonyms", "synonyms.txt"],
    "classroom": []}
ANSWERS = {"pope": "pope.a.jsonl", "amber": "amber.jsonl", "mmhal": "mmhal.jsonl", "chair": "chair.jsonl",
           "classroom": "classroom.jsonl"}


def score(case, benchmark, answers, *more):
    words = [*SCORE[benchmark], *more]
    if benchmark != "classroom" and case.draw.random() < .4:
        words += [case.draw.choice(("--partial", "--mode=official"))]
    case.run("eval_hallu.py", "score", benchmark, "--answers", answers, "--out", "case/out/scores.json", *words, result=SCORES)
    Path("case/out").mkdir(exist_ok=True)


def answers(case):
    benchmark = case.draw.choice(sorted(SCORE))
    path = Path(case.take(ANSWERS[benchmark]))
    case.spoil(path, mutate.a_json, neutral=True)
    if benchmark in ("pope", "classroom") and case.draw.random() < .3:
        case.run("eval_hallu.py", "compare", path, ANSWERS[benchmark], "--out", "case/page.html", result=text_of)
    else:
        score(case, benchmark, path)


def questions(case):
    """The benchmarks' own files."""
    folder = case.draw.choice(("pope", "amber", "mmhal", "annotations", "synonyms.txt"))
    path = Path(case.take(folder))
    file = path if path.is_file() else case.draw.choice(sorted(path.iterdir()))
    case.spoil(file, mutate.a_text if file.suffix == ".txt" else mutate.a_json, neutral=file.suffix != ".txt")
    benchmark = {"annotations": "chair", "synonyms.txt": "chair"}.get(folder, folder)
    score(case, benchmark, ANSWERS[benchmark])
    case.argv = [str(word).replace(folder, f"case/{folder}", 1) if str(word).startswith(folder) and word != benchmark
                 and not str(word).endswith(".jsonl") else word for word in case.argv]
    if benchmark == "pope":
        case.argv[case.argv.index("--questions") + 1] = "case/pope"
    if benchmark == "amber":
        case.argv[case.argv.index("--data") + 1] = "case/amber"


def replies(case):
    who, form = case.draw.choice(("judge", "extractor", "one", "writer")), case.draw.choice(("ours", "server", "batch"))
    source = next(Path("replies").glob(f"{who}.{form}.*"))
    path = case.take(source)
    case.spoil(path, mutate.a_json, neutral=True)
    if who == "judge":
        score(case, "mmhal", ANSWERS["mmhal"], "--judge", path)
    elif who == "extractor":
        score(case, "chair", ANSWERS["chair"], "--extractor", path)
    elif who == "one":
        case.take("synth", "out")
        case.run("synth.py", "respond", *SYNTH, "--responders", path, result=contents("responses.jsonl"))
        if not case.clean:                                                # the file's hash is in the journals' keys
            case.same = False
    else:
        Path("case/out").mkdir()
        case.run("synth.py", "prompts", *SYNTH, "--writer", path, "--per_topic", "2", "--set", "topics=cats",
                 result=contents("prompts.jsonl"))


def votes(case):
    path = case.take("votes-ann.json")
    if case.draw.random() < .3:
        content = json.loads(Path(path).read_text())
        import base64
        key = mutate.a_json(case.rng, base64.b64decode(content["key"])) if not case.clean else base64.b64decode(content["key"])
        Path(path).write_text(json.dumps(content | {"key": base64.b64encode(key).decode()}))
    else:
        case.spoil(path, mutate.a_json, neutral=True)
    more = ["votes-bob.json"] if case.draw.random() < .5 else []
    case.run("eval_hallu.py", "score", "votes", path, *more, "--out", "case/out/scores.json", result=SCORES)
    Path("case/out").mkdir()


# ---- synthesis ----
def prompts(case):
    source = case.draw.choice(("topics", "questions.txt"))
    path = Path(case.take(source))
    file = path if path.is_file() else case.draw.choice(sorted(path.iterdir()))
    case.spoil(file, mutate.a_text)
    if source == "topics":
        Path("case/out").mkdir()
        case.run("synth.py", "prompts", *SYNTH, "--prompts", path)
    else:
        case.take("synth", "out")
        case.run("synth.py", "instruct", *SYNTH, "--instruct", path)


STAGES = {"instruct": ("ranked",), "respond": ("ranked", "instructions"), "score": ("instructions", "responses"),
          "pairs": ("ranked", "instructions", "responses", "scores-length"),
          "analyse": ("ranked", "prompts", "responses", "pairs", "faults", "dropped", "scores-length")}


def journals(case):
    """The files of a synthesis run between its stages, and parts/: what was made before."""
    out = case.take("synth", "out")
    stage = case.draw.choice(sorted(STAGES))
    if stage == "score" and case.draw.random() < .6:
        part = case.draw.choice(("score-length.jsonl", "score-length.jsonl.rank0"))
        file = Path(out, "parts", part)
        file.write_bytes(Path(out, "parts/score-length.jsonl").read_bytes())
        if case.rng.random() < .5 and not case.clean:                     # a kill tears the last line
            content = file.read_bytes()
            last = content.rstrip().rfind(b"\n")
            file.write_bytes(content[:case.rng.randrange(last, len(content))])
            case.same = True
        else:
            case.spoil(file, mutate.a_json)
    else:
        case.spoil(Path(out, f"{case.draw.choice(STAGES[stage])}.jsonl"), mutate.a_json, neutral=True)
    made = {"instruct": "instructions.jsonl", "respond": "responses.jsonl", "score": "scores-length.jsonl",
            "pairs": "pairs.jsonl", "analyse": "analysis.json"}[stage]
    case.run("synth.py", stage, *SYNTH, result=contents(made))


# ---- options ----
COMMANDS = (
    [*DRY, "--model", "llava15", "--data", "pairs.jsonl"],
    [*DRY, "--model", "llava15", "--data", "pairs.jsonl", "--preset", "mdpo-llava"],
    ["train_dpo.py", *TRAIN, "--max_steps", "1", "--out", "case/out"],
    ["lora.py", "merge", "--model", "llava15", "--adapter", "adapter", "--out", "case/out"],
    ["training.report", "case/out"],
    ["model.import_checkpoint", "bunny", "case/out", "--vision_tower", "bunny/siglip"],
    ["synth.py", "prompts", *SYNTH], ["synth.py", "score", *SYNTH], ["synth.py", "pairs", *SYNTH],
    ["synth.py", "analyse", *SYNTH], ["synth.py", "instruct", *SYNTH],
    ["eval_hallu.py", "compare", "pope.a.jsonl", "pope.b.jsonl", "--images", "coco", "--out", "case/out/page.html"],
    ["eval_hallu.py", "score", "votes", "votes-ann.json", "--out", "case/out/scores.json"],
    *(["eval_hallu.py", "score", name, "--answers", ANSWERS[name], "--out", "case/out/scores.json", *more]
      for name, more in SCORE.items()))
LONGER = {"--epochs", "--max_steps", "--max_new_tokens", "--lora_r", "scenes", "pairs", "questions"}    # more work is no fault


def options(case):
    argv = list(case.draw.choice(COMMANDS))
    if argv[0] == "synth.py":
        case.take("synth", "out")
    elif argv[0] == "training.report":
        case.take("runs/whole", "out")
    case.run(*argv)
    if argv[0].startswith(("synth", "train", "eval")):
        help = case.help(argv)
        flags = sorted({flag for flag in re.findall(r"--\w+", help)} - {"--help", "--set"} - LONGER)
        keys = sorted(set(re.findall(r"^  (\w+)=", help, re.MULTILINE)) - LONGER)
    else:
        flags, keys = [word for word in argv if word.startswith("--")], []
    if case.clean:
        return
    for _ in range(case.rng.choice((1, 1, 2))):
        value = case.rng.choice(mutate.OPTIONS)
        places = [k for k, word in enumerate(argv) if k > 1 and not word.startswith("-")]
        how = case.rng.random()
        if how < .4 and flags:
            argv += [f"{case.rng.choice(flags)}={value}"]
        elif how < .6 and keys:
            argv += ["--set", f"{case.rng.choice(keys)}={value}"]
        elif places:
            argv[case.rng.choice(places)] = value
    case.argv = argv
    case.anywhere = True                               # --out may say so


KINDS = {                       # kind: (its function, its share of the inputs of a mixed run)
    "records": (records, 16), "images": (images, 12), "configs": (configs, 4), "tokenizers": (tokenizers, 4),
    "templates": (templates, 4), "safetensors": (safetensors, 3), "adapters": (adapters, 3), "checkpoints": (checkpoints, 2),
    "logs": (logs, 3), "states": (states, 2), "answers": (answers, 12), "questions": (questions, 9), "replies": (replies, 10),
    "votes": (votes, 8), "prompts": (prompts, 7), "journals": (journals, 9), "options": (options, 12)}
