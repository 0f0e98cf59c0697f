"""What tests/fuzz.py spoils: the table of all kinds, and those of evaluation, synthesis and options.

See fuzz_inputs.py, which has those of training, for what such a function does.
"""
import base64
import contextlib
import json
import re
import socket
import threading
from pathlib import Path

import fuzz_inputs as inputs
import fuzz_mutate as mutate
from fuzz_inputs import DRY, MERGE, contents, text_of
from fuzz_world import OUT, SYNTH, TRAIN

MODELS = {"llava15", "llava16"}                                 # in fuzz_world's folder
SCORES = contents("scores.json")

# ---- evaluation ----
ANSWERS = {"pope": "pope.a.jsonl", "amber": "amber.jsonl", "mmhal": "mmhal.jsonl", "chair": "chair.jsonl",
           "classroom": "classroom.jsonl"}
FILES = {"pope": "--questions {pope}", "amber": "--data {amber}", "classroom": "",
         "mmhal": "--template {mmhal}/template.json --judge {judge}",
         "chair": "--annotations {annotations} --synonyms {synonyms}"}


class Sound(dict):
    """Where a benchmark's file is: what was not spoiled is where it was."""
    def __missing__(self, name):
        return {"judge": "replies/judge.ours.jsonl", "synonyms": "synonyms.txt"}.get(name, name)


def score(case, benchmark, answers="", more="", **spoiled):
    words = FILES[benchmark].format_map(Sound(spoiled))
    if benchmark != "classroom":
        more += case.draw.choice(("", "", " --partial", " --mode official"))
    answers = answers or ANSWERS[benchmark]
    case.run(f"eval_hallu.py score {benchmark} --answers {answers} --out {OUT}/scores.json {words} {more}",
             result=SCORES)
    Path(OUT).mkdir(exist_ok=True)


def answers(case):
    benchmark = case.draw.choice(sorted(ANSWERS))
    path = Path(case.take(ANSWERS[benchmark]))
    case.spoil(path, mutate.a_json, neutral=True)
    if benchmark in ("pope", "classroom") and case.draw.random() < .3:
        case.run(f"eval_hallu.py compare {path} {ANSWERS[benchmark]} --out {OUT}/page.html", result=text_of)
        Path(OUT).mkdir()
    else:
        score(case, benchmark, path)


def questions(case):
    """The benchmarks' own files."""
    source = case.draw.choice(("pope", "amber", "mmhal", "annotations", "synonyms.txt"))
    path = Path(case.take(source))
    file = path if path.is_file() else case.draw.choice(sorted(path.iterdir()))
    case.spoil(file, mutate.a_text if file.suffix == ".txt" else mutate.a_json, neutral=file.suffix != ".txt")
    benchmark = {"annotations": "chair", "synonyms.txt": "chair"}.get(source, source)
    score(case, benchmark, **{source.removesuffix(".txt"): path})


def replies(case):
    who = case.draw.choice(("judge", "extractor", "one", "writer"))
    forms = ("ours", "batch", "server")[:2 if who == "writer" else 3]         # a server's replies have no ids
    source, = Path("replies").glob(f"{who}.{case.draw.choice(forms)}.*")
    path = case.take(source)
    case.spoil(path, mutate.a_json, neutral=who != "one")       # there, the file's hash is a key of journals
    if who == "judge":
        score(case, "mmhal", judge=path)
    elif who == "extractor":
        score(case, "chair", more=f"--extractor {path}")
    elif who == "one":
        case.take("synth", "out")
        case.run(f"synth.py respond {SYNTH} --responders {path}")
    else:
        case.run(f"synth.py prompts {SYNTH} --writer {path} --per_topic 2 --set topics=cats",
                 result=contents("prompts.jsonl"))


def votes(case):
    path = Path(case.take("votes-ann.json"))
    if case.draw.random() < .7:
        case.spoil(path, mutate.a_json, neutral=True)
    elif not case.clean:                                        # whose side is whose
        content = json.loads(path.read_text())
        key = mutate.a_json(case.rng, base64.b64decode(content["key"]))
        path.write_text(json.dumps(content | {"key": base64.b64encode(key).decode()}))
    more = case.draw.choice(("", "votes-bob.json"))
    case.run(f"eval_hallu.py score votes {path} {more} --out {OUT}/scores.json", result=SCORES)
    Path(OUT).mkdir()


# ---- a judge that is a server ----
SERVER = []


def serve():
    """A server in a thread of this process; the next answer is SERVER[0]'s -> its port."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer():
        while True:                                         # also without memory, or without a free socket:
            with contextlib.suppress(Exception):            # a server that has ended is a hang of its own
                one, _ = listening.accept()
                with one:
                    one.settimeout(1)
                    one.recv(1 << 16)
                    one.sendall(SERVER[0])
    SERVER[:] = [b"", listening.getsockname()[1]]
    threading.Thread(target=answer, daemon=True).start()


def servers(case):
    from model import ask
    ask.BACKOFF = .001                                          # seconds between attempts
    if not SERVER:
        serve()
    body = json.dumps({"choices": [{"message": {"content": "Rating: 3"}}], "data": [{"id": "m"}]}).encode()
    SERVER[0] = mutate.a_reply(case.rng, body)
    score(case, "mmhal", judge=f"http://127.0.0.1:{SERVER[1]}/v1")


# ---- synthesis ----
def prompts(case):
    source = case.draw.choice(("topics", "questions.txt"))
    path = Path(case.take(source))
    file = path if path.is_file() else case.draw.choice(sorted(path.iterdir()))
    case.spoil(file, mutate.a_text)
    if source == "topics":
        case.run(f"synth.py prompts {SYNTH} --prompts {path}")
    else:
        case.take("synth", "out")
        case.run(f"synth.py instruct {SYNTH} --instruct {path}")


STAGES = {                      # stage: what it reads, what it makes
    "instruct": ("ranked", "instructions.jsonl"), "respond": ("ranked instructions", "responses.jsonl"),
    "score": ("instructions responses", "scores-length.jsonl"),
    "pairs": ("ranked instructions responses scores-length", "pairs.jsonl"),
    "analyse": ("ranked pairs", "gallery.html")}


def journals(case):
    """The files of a synthesis run between its stages, and parts/: what was made before."""
    out = Path(case.take("synth", "out"))
    stage = case.draw.choice(sorted(STAGES))
    reads, makes = STAGES[stage]
    kept = out / "parts/score-length.jsonl"
    if stage == "score" and case.draw.random() < .6:
        if case.draw.random() < .5:
            kept = kept.rename(out / "parts/score-length.jsonl.rank0")
        content = kept.read_bytes()
        if case.rng.random() < .5 and not case.clean:                     # a kill tears the last line
            last = content.rstrip().rfind(b"\n")
            kept.write_bytes(content[:case.rng.randrange(last, len(content))])
            case.same = True
        else:
            case.spoil(kept, mutate.a_json)
    else:
        case.spoil(out / f"{case.draw.choice(reads.split())}.jsonl", mutate.a_json, neutral="blanks")
    case.run(f"synth.py {stage} {SYNTH}", result=contents(makes))


# ---- options ----
COMMANDS = [f"{DRY} --model llava15 --data pairs.jsonl", f"train_dpo.py {TRAIN} --max_steps 1 --out {OUT}",
            f"{DRY} --model llava15 --data pairs.jsonl --preset mdpo-llava", f"training.report {OUT}",
            f"{MERGE} --model llava15 --adapter adapter", f"model.import_checkpoint bunny {OUT}",
            *(f"synth.py {stage} {SYNTH}" for stage in ("prompts", *STAGES)),
            f"eval_hallu.py compare pope.a.jsonl pope.b.jsonl --images coco --out {OUT}/page.html",
            f"eval_hallu.py score votes votes-ann.json --out {OUT}/scores.json", *ANSWERS]
SOURCES = ["--judge", "--extractor", "--writer", "--responders", "--instruct"]
LONGER = {"--epochs", "--max_steps", "--max_new_tokens", "--lora_r", "scenes", "pairs", "questions"}


def options(case):
    command = case.draw.choice(COMMANDS)
    if command in ANSWERS:
        score(case, command)
    else:
        case.run(command)
    argv = case.argv
    if argv[0] == "synth.py":
        case.take("synth", "out")
    elif argv[0] == "training.report":
        case.take("runs/whole", "out")
    text = case.help()
    flags = sorted({*re.findall(r"--\w+", text)} - {"--help", "--set"} - LONGER)
    keys = sorted({*re.findall(r"^  (\w+)=", text, re.MULTILINE)} - LONGER)
    sources = [flag for flag in SOURCES if flag in flags]
    for _ in range(0 if case.clean else case.rng.choice((1, 1, 2))):
        value, how = case.rng.choice(mutate.OPTIONS), case.rng.random()
        places = [k for k, word in enumerate(argv) if k > 1 and not word.startswith("-")]
        if how < .05 and sources:                                         # what must not be shown
            argv += [f"{case.rng.choice(sources)}=http://user:secret@127.0.0.1:9/v1?key=secret"]
        elif how < .4 and flags:
            argv += [f"{case.rng.choice(flags)}={value}"]
        elif how < .6 and keys:
            argv += ["--set", f"{case.rng.choice(keys)}={value}"]
        elif places:
            argv[case.rng.choice(places)] = value
    # --out may say so; but in the world's own folder a run's adapter/ would replace the sound one
    case.anywhere = True
    case.argv = [re.sub(r"^(--out=)?\.$", r"\1elsewhere", word) for word in argv]


KINDS = {                       # kind: (its function, its share of the inputs of a mixed run)
    "records": (inputs.records, 16), "images": (inputs.images, 12), "configs": (inputs.configs, 4),
    "tokenizers": (inputs.tokenizers, 4), "templates": (inputs.templates, 4),
    "safetensors": (inputs.safetensors, 3), "adapters": (inputs.adapters, 3),
    "checkpoints": (inputs.checkpoints, 2), "logs": (inputs.logs, 3), "states": (inputs.states, 2),
    "answers": (answers, 12), "questions": (questions, 9), "replies": (replies, 10), "votes": (votes, 8),
    "servers": (servers, 4), "prompts": (prompts, 7), "journals": (journals, 9), "options": (options, 12)}
