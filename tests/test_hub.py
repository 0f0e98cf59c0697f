"""ORG/NAME as a model or as pairs: a small hub on loopback, as huggingface_hub asks one, and none at all."""
import hashlib
import json
import os
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, run_forked, write_llava
from test_train_dpo import write_pairs

import eval_hallu
import lora
import synth
import train_dpo

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """{repository, with datasets/ in front of a data set: its folder}; a gated one shows only what it has."""
    repositories, gated, asked = {}, set(), []

    def do_GET(self):
        self.asked.append(self.path)
        path = self.path.partition("?")[0].removeprefix("/api").lstrip("/").removeprefix("models/")
        name = next((name for name in self.repositories if path.startswith(f"{name}/")), None)
        if not name:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        kind, _, rest = path.removeprefix(f"{name}/").partition("/")
        folder = self.repositories[name]
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if kind == "revision":
            if rest not in ("main", "v1", SHA):
                return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            return self.json({"id": name, "sha": SHA, "siblings": []})
        if kind == "tree":
            return self.json([{"type": "file", "path": str(file.relative_to(folder)), "oid": etag(file),
                               "size": file.stat().st_size} for file in files])
        assert kind == "resolve"
        if name in self.gated:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        file = folder / rest.partition("/")[2]
        return self.answer(200, file.read_bytes(), {"ETag": f'"{etag(file)}"', "X-Repo-Commit": SHA})

    do_HEAD = do_GET

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, code, body, headers):
        self.send_response(code)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def etag(file):
    return hashlib.sha1(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """(start, folder). start(main, words, environment): a command in a fork whose huggingface_hub reads the
    environment anew, in the folder. The hub has a model and pairs, and gated ones."""
    folder = tmp_path_factory.mktemp("hub")
    model = write_llava(folder / "model")
    for file in ("modeling_own.py", "pytorch_model.bin", "README.md"):
        (model / file).write_text("raise SystemExit('what the hub has ran')")
    table_of(write_pairs(folder / "pairs"), folder / "set" / "data")
    Hub.repositories = {"org/tiny": model, "org/gated": model, "datasets/org/pairs": folder / "set",
                        "datasets/org/gated": folder / "set"}
    Hub.repositories |= {f"made/{name}": ROOT / "classroom" / "synthesis" / name for name in MODELS}
    Hub.gated = {"org/gated", "datasets/org/gated"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
             "HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1"}

    def start(main, words, **environment):
        return run_forked(main, words, partial(prepare, folder, there | environment))
    yield start, folder
    server.shutdown()


def prepare(folder, environment):
    os.chdir(folder)
    os.environ |= environment
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        del sys.modules[name]


def table_of(pairs, folder):
    """Pairs as the hub has them: one parquet file, with the images in it."""
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: it is in requirements-dev.txt")
    from pyarrow import parquet
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        row["image"] = {"bytes": (pairs.parent / row["image"]).read_bytes(), "path": None}
    folder.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")


MODELS = ("sd3", "imagereward", "armorm", "llava0", "llava1")
SMALL = ["--batch", "4", "--micro_batch", "2", "--max_steps", "2", "--lora_r", "4", "--set", "look=0"]


def test_every_command_takes_a_model_of_the_hub_and_training_its_pairs(hub):
    """Fetched once, said first, without what runs; afterwards nobody is asked."""
    start, folder = hub
    (folder / "questions.jsonl").write_text(json.dumps(
        {"question_id": 1, "image": "0.png", "text": "what is this ?", "label": "yes"}) + "\n")
    train = ["--model", "org/tiny", "--data", "org/pairs@v1", *SMALL, "--out"]
    merge = ["merge", "--model", "org/tiny", "--adapter", "run/adapter", "--out", "merged"]
    ask = ["answers", "pope", "--model", "org/tiny", "--data", "questions.jsonl", "--images", "pairs/images",
           "--out", "pope.jsonl"]
    code, said = start(train_dpo.main, [*train, "run"])
    assert code == 0, said
    lines = [line for line in said.splitlines() if line.startswith("fetching ")]
    cache = folder / "home" / "hub"
    assert [line.split(":")[0] for line in lines] == ["fetching org/tiny", "fetching org/pairs@v1"]
    assert all(line.endswith(f"GB, into {cache}") for line in lines) and ": 1 files, 0.0" in lines[1]
    names = {file.name for file in (cache / "models--org--tiny" / "snapshots" / SHA).iterdir()}
    assert "model.safetensors" in names and "tokenizer.json" in names
    assert not names & {"modeling_own.py", "pytorch_model.bin", "README.md"}

    del Hub.asked[:]
    for main, words in ((lora.main, merge), (eval_hallu.main, ask)):
        code, said = start(main, words)
        assert code == 0 and "fetching" not in said, said
    assert (folder / "merged" / "model.safetensors").exists() and (folder / "pope.jsonl").exists()
    code, said = start(train_dpo.main, [*train, "more"], HF_HUB_OFFLINE="1")
    assert code == 0 and Hub.asked == [], said
    run, more = (folder / name / "adapter" / "adapter_model.safetensors" for name in ("run", "more"))
    assert run.read_bytes() == more.read_bytes()


def test_a_folder_of_that_name_comes_first(hub):
    start, folder = hub
    write_llava(folder / "org" / "missing")
    del Hub.asked[:]
    code, said = start(train_dpo.main, ["--dry_run", "--model", "org/missing", "--data", "pairs/pairs.jsonl"])
    assert code == 0 and "folder          org/missing" in said and Hub.asked == []


def test_synthesis_takes_each_of_its_models_of_the_hub(hub):
    """Generator, reward models and responders; each is fetched once, and called by its own name."""
    start, folder = hub
    (folder / "art.txt").write_text("a red ball on a blue box\na green cup\n")
    words = ["all", "--preset", "pds-dpo", "--prompts", "art.txt", "--out", "synth",
             "--generator", "made/sd3", "--imagereward", "made/imagereward", "--armorm", "made/armorm",
             "--responders", "made/llava0,made/llava1", "--size", "0", "--steps", "2", "--guidance", "1,4",
             "--threshold=-99", "--set", "max_new_tokens=8"]
    code, said = start(synth.main, words)
    assert code == 0, said
    names = [line.split(":")[0] for line in said.splitlines() if line.startswith("fetching ")]
    assert sorted(names) == sorted(f"fetching made/{name}" for name in MODELS)
    rows = [json.loads(line) for line in (folder / "synth" / "responses.jsonl").read_text().splitlines()]
    assert {row["model"] for row in rows} == {"llava0", "llava1"}
    card = (folder / "synth" / "card.md").read_text()
    for role in ("generator sd3", "imagereward imagereward", "armorm armorm", "responders llava0"):
        assert f"- {role}: files " in card

    del Hub.asked[:]
    code, said = start(synth.main, ["pairs", *words[1:]], HF_HUB_OFFLINE="1")
    assert code == 0 and Hub.asked == [], said


OWN = ["--data", "pairs/pairs.jsonl", *SMALL, "--out", "none"]


@pytest.mark.parametrize("main, words, reason", [
    (train_dpo.main, ["--model", "org/gated", *OWN], "Cannot access gated repo"),
    (train_dpo.main, ["--model", "org/absent", *OWN], "Repository Not Found"),
    (train_dpo.main, ["--model", "org/tiny@v9", *OWN], "Revision Not Found"),
    (train_dpo.main, ["--model", "model", *OWN, "--data", "org/gated"], "Cannot access gated repo"),
    (lora.main, ["merge", "--adapter", "a", "--out", "m", "--model", "org/absent"], "Repository Not Found"),
    (synth.main, ["instruct", "--out", "made", "--instruct", "org/absent"], "Repository Not Found"),
    (synth.main, ["images", "--out", "made", "--generator", "org/gated"], "Cannot access gated repo"),
    (synth.main, ["rank", "--out", "made", "--imagereward", "org/absent"], "Repository Not Found"),
    (synth.main, ["score", "--out", "made", "--armorm", "org/absent"], "Repository Not Found"),
    (train_dpo.main, ["--model", "org/absent", *OWN], "offline"),
    (train_dpo.main, ["--model", "org/absent", *OWN], "refused")])
def test_what_the_hub_does_not_give_is_one_sentence_with_the_command_to_fetch_it(hub, main, words, reason):
    start, folder = hub
    (folder / "made").mkdir(exist_ok=True)
    for file in ("prompts", "images", "ranked", "responses"):
        (folder / "made" / f"{file}.jsonl").write_text("")
    name = next(word for word in words if word.startswith("org/")).partition("@")[0]
    kind = "dataset" if "model" in words else "model"
    there = {"offline": {"HF_HUB_OFFLINE": "1"}, "refused": {"HF_ENDPOINT": "http://127.0.0.1:9"}}
    code, said = start(main, words, **there.get(reason, {}))
    last = said.strip().splitlines()[-1]
    assert code == 1 and reason in last and "Traceback" not in said, said
    assert f"`hf download {name} --repo-type {kind} --local-dir DIR`, after `hf auth login` if it is" in last
