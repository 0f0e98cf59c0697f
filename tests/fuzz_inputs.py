"""What tests/fuzz.py spoils of training: records, images, model folders, adapters, and the state of a run.

Each function copies sound files of fuzz_world.py into case/, spoils one, and says which command is to read it
and what must come out. case.draw chooses among commands and files, case.rng what is spoiled. case.same: the
result must be that of the sound input, because nothing but the writing was changed, or because no change may
go unnoticed.
"""
import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import fuzz_mutate as mutate
from fuzz_world import EPS, OUT, STEPS, TRAIN

MODELS = ("llava15", "llava15", "llava16")
DRY = "train_dpo.py --dry_run --batch 2 --micro_batch 2 --set device=cpu"
MERGE = f"lora.py merge --out {OUT}"
ASK = "eval_hallu.py answers pope --data pope --max_new_tokens 1"


# ---- what came out ----
def text_of(case):
    """What was printed; the plan's hours come from a rate that is measured in each call."""
    return re.sub(r"\bline \d+|^hours +about .*", "line N", case.printed, flags=re.MULTILINE)


def contents(pattern):
    """A function that reads the result of a case from files in its output."""
    def read(case):
        found = {}
        for path in sorted(Path(OUT).glob(pattern)):
            content = path.read_bytes()
            if path.suffix == ".json":
                content = json.dumps(json.loads(content), sort_keys=True).encode()
            found[str(path)] = hashlib.sha256(content).hexdigest()
        assert found, "the command made nothing"
        return found
    return read


ADAPTER, MERGED = contents("adapter/*"), contents("*.safetensors")


# ---- training's inputs ----
def records(case):
    source = case.draw.choice(sorted(Path("data").iterdir()))
    train, array = case.draw.random() < .05, case.draw.random() < .5
    path = Path(case.take(source, f"data{source.suffix}"))
    if source.suffix == ".parquet":
        case.spoil(path, mutate.raw)
    else:
        if array and source.suffix == ".jsonl":
            rows, _ = mutate.parsed(path.read_bytes())
            path = path.with_suffix(".json")
            path.write_text(json.dumps(rows))
        neutral = "blanks" if source.suffix == ".json" else True         # an object of records has an order
        case.spoil(path, mutate.a_json, neutral=not train and neutral)
    more = case.draw.choice(("", "", "--skip_bad", "--loss dpo --image_rejected none"))
    words = f"--model {case.draw.choice(MODELS)} --data {path} --image_root images {more}"
    if train:
        case.run(f"train_dpo.py {words} {STEPS} --max_steps 1 --out {OUT}")
    else:
        case.run(f"{DRY} {words}", result=text_of)


def images(case):
    path = Path(case.take(case.draw.choice(sorted(Path("pictures").iterdir()))))
    how = 1 if case.clean else case.rng.random()
    if how < .035:
        case.rng.choice(ODD)(path)
    elif how < .25:
        content = bytearray(path.read_bytes())                            # the header, where sizes are
        content[case.rng.randrange(8, 40)] = case.rng.choice((0, 1, 127, 255))
        path.write_bytes(content)
    else:
        case.spoil(path, mutate.raw)
    how = case.draw.random()
    if how < .6:
        record = {"id": "p", "image": path.name, "question": "what ?", "chosen": "dog", "rejected": "cat"}
        Path("case/pairs.jsonl").write_text(json.dumps(record) + "\n")
        case.run(f"{DRY} --model {case.draw.choice(MODELS)} --data case/pairs.jsonl")
        return
    shutil.move(path, "case/COCO_val2014_000000000000.jpg")
    for k in range(1, 4):
        case.take(f"coco/COCO_val2014_{k:012}.jpg")
    if how < .9:
        case.run(f"eval_hallu.py compare pope.a.jsonl pope.b.jsonl --images case --out {OUT}/page.html")
        Path(OUT).mkdir()
    else:
        case.run(f"{ASK} --model llava15 --images case --out {OUT}/answers.jsonl")


def huge(path):
    """A PNG of 13,000 x 13,000 grey pixels of 16 bits: a third of a megabyte."""
    packer, rows = zlib.compressobj(9), b""
    for _ in range(130):
        rows += packer.compress(bytes(26_001 * 100))
    about = struct.pack(">IIBBBBB", 13_000, 13_000, 16, 0, 0, 0, 0)
    found = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", about), (b"IDAT", rows + packer.flush()), (b"IEND", b"")):
        found += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(found)


def instead(make):
    """A function that puts something else in the place of a file."""
    def replaced(path):
        path.unlink()
        make(path)
    return replaced


ODD = [instead(os.mkfifo), instead(os.mkdir), instead(lambda path: path.symlink_to("/dev/zero")),
       instead(lambda path: path.symlink_to("../../../..")), instead(lambda path: path.symlink_to(path.name)),
       lambda path: path.write_bytes(EPS), huge]


# ---- model folders ----
def uses_model(case, model):
    """A command that reads a model folder, and how its result is read."""
    how = case.draw.random()
    if how < .6:
        case.run(f"{DRY} --model {model} --data pairs.jsonl", result=text_of)
    elif how < .8 and "15" in model:
        case.run(f"{MERGE} --model {model} --adapter adapter", result=MERGED)
    else:
        case.run(f"{ASK} --images coco --model {model} --out {OUT}/answers.jsonl")


def configs(case):
    model = case.take(case.draw.choice(MODELS))
    names = ("config.json", "config.json", "preprocessor_config.json", "generation_config.json",
             "processor_config.json")
    file = Path(model, case.draw.choice([name for name in names if Path(model, name).exists()]))
    if case.draw.random() < .05:
        bring_code(Path(model))
    else:
        case.spoil(file, mutate.a_json, neutral=True)
    uses_model(case, model)


def bring_code(model):
    """Code of the folder's own, which nobody may run: it would leave a file."""
    (model / "code.py").write_text("open('escape', 'w')\nclass Own: pass\n")
    kinds = ("AutoConfig", "AutoImageProcessor", "AutoProcessor", "AutoModelForImageTextToText")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (model / name).exists():
            content = json.loads((model / name).read_text())
            content["auto_map"] = dict.fromkeys(kinds, "code.Own") | {"AutoTokenizer": ["code.Own", None]}
            (model / name).write_text(json.dumps(content))


def tokenizers(case):
    model = case.take(case.draw.choice(MODELS))
    file = Path(model, case.draw.choice(("tokenizer.json", "tokenizer_config.json")))
    case.spoil(file, mutate.a_json, neutral=True)
    uses_model(case, model)


def templates(case):
    model = case.take(case.draw.choice(MODELS))
    file, = Path(model).glob("*.jinja")
    case.spoil(file, mutate.a_template)
    if case.draw.random() < .2:
        given = file.read_bytes().decode("utf-8", "replace")
        case.run(f"{DRY} --model llava15 --data pairs.jsonl --set", f"template={given}")
    else:
        uses_model(case, model)


def safetensors(case):
    if case.draw.random() < .7:
        model = case.take("llava15")
        case.spoil(Path(model, "model.safetensors"), mutate.a_safetensors)
        uses_model(case, model)
        return
    model = case.take("bunny")                                  # a checkpoint as it is published
    files = [path for path in sorted(Path(model).iterdir()) if path.suffix in (".safetensors", ".json")]
    file = case.draw.choice(files)
    case.spoil(file, mutate.a_safetensors if file.suffix == ".safetensors" else mutate.a_json)
    case.run(f"model.import_checkpoint {model} {OUT} --vision_tower {model}/siglip")


def adapters(case):
    adapter = case.take("adapter")
    if case.draw.random() < .5:
        case.spoil(Path(adapter, "adapter_config.json"), mutate.a_json, neutral=True)
    else:
        case.spoil(Path(adapter, "adapter_model.safetensors"), mutate.a_safetensors)
    if case.draw.random() < .7:
        case.run(f"{MERGE} --model llava15 --adapter {adapter}", result=MERGED)
    else:
        case.run(f"{ASK} --images coco --model llava15 --adapter {adapter} --out {OUT}/answers.jsonl")


# ---- the state of a run: a resumed one ends as the undisturbed, or is refused ----
def checkpoints(case):
    out = case.take("runs/half", "out")
    file = Path(out, "last/checkpoint.safetensors")
    how = case.draw.random()
    if how < .15:                                               # what a killed process leaves beside it
        torn = mutate.raw(case.rng, file.read_bytes())
        file.with_name(f".{file.name}.999999.tmp").write_bytes(torn)
    elif how < .3 and not case.clean:
        shutil.copy(f"runs/{case.rng.choice(('early', 'other'))}/last/checkpoint.safetensors", file)
    else:
        case.spoil(file, mutate.a_safetensors)
    case.same = True
    case.run(f"train_dpo.py {TRAIN} --out {out}", result=ADAPTER)


def logs(case):
    if case.draw.random() < .5:
        out = case.take("runs/half", "out")
        case.spoil(Path(out, "log.jsonl"), mutate.a_json)
        case.same = True
        case.run(f"train_dpo.py {TRAIN} --out {out}", result=ADAPTER)
    else:
        out = case.take("runs/whole", "out")
        file = Path(out, case.draw.choice(("log.jsonl", "log.jsonl", "summary.json")))
        case.spoil(file, mutate.a_json, neutral="blanks")
        case.run(f"training.report {out}", result=contents("report.html"))


def states(case):
    """before.json, after.json, checked/, summary.json of a run."""
    run = case.draw.choice(("half", "whole"))
    out = case.take(f"runs/{run}", "out")
    files = [path for path in sorted(Path(out).rglob("*.json")) if path.parent.name != "adapter"]
    if run == "whole" and case.draw.random() < .5:
        Path(out, "report.html").unlink()
    case.spoil(case.draw.choice(files), case.draw.choice((mutate.a_json, mutate.raw)))
    case.same = True
    case.run(f"train_dpo.py {TRAIN} --out {out}", result=ADAPTER)
