"""What every test shares: the repository on the path, one thread, and where the published data lies."""
import gc
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path

import pytest
import start
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
SHARED = Path(os.environ.get("NANOVPO_SHARED", ROOT.parent / "shared"))
GOLDEN = Path(os.environ.get("GOLDEN", SHARED / "golden"))
os.environ["OMP_NUM_THREADS"] = "1"              # a fork of a process whose sums have threads waits for ever
os.environ["HF_HUB_OFFLINE"] = "1"               # nothing here may reach for a hub
# Forks share tqdm's lock: one that is killed while it holds it would let the next wait for ever.
os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))
CACHE = tempfile.mkdtemp(prefix="nanovpo-tests-")
os.environ.setdefault("XDG_CACHE_HOME", CACHE)   # nothing here may write into the user's ~/.cache


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """The garbage collector passes over what is there before a file's tests, which takes a quarter second."""
    gc.collect()
    gc.freeze()


def need(path):
    """The path, or a skip that says what is absent (published data is never part of the repository)."""
    if not Path(path).exists():
        pytest.skip(f"{path} is absent: this test reads published data that the repository does not hold")
    return Path(path)


WORDS = ("<unk> <pad> <s> </s> <image> USER: ASSISTANT: "
         "what is this ? a red blue cat dog and there two one no yes , . on").split()


def word_tokenizer():
    """A whole-word tokenizer of transformers' own class; the chat template writes the BOS."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"])
    tokenizer.chat_template = (
        "<s> {% for m in messages %}{% if m['role'] == 'user' %}USER: {% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
        "{% else %}ASSISTANT: {{ m['content'][0]['text'] }} </s> {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
    return tokenizer


def write_llava(folder, tokenizer=None, image_size=28, patch=14, hidden=32, layers=2, kv_heads=2, seed=0,
                tied=False, dtype="float32"):
    """Write a llava-hf folder with random weights: LLaVA-1.5's classes, any size. Returns the folder."""
    import torch
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )
    tokenizer = tokenizer or word_tokenizer()
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
                                       num_attention_heads=2, image_size=image_size, patch_size=patch),
        text_config=LlamaConfig(hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                                num_attention_heads=4, num_key_value_heads=kv_heads,
                                vocab_size=len(tokenizer), tie_word_embeddings=tied,
                                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                                pad_token_id=tokenizer.pad_token_id),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tie_word_embeddings=tied)
    model = LlavaForConditionalGeneration(config).to(getattr(torch, dtype))
    for name, weight in model.named_parameters():    # louder than the default: attention shall matter
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=(0.3 if "vision" in name else 1.5) / hidden ** 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    crop = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop).save_pretrained(folder)
    return folder


def picture(seed, size=(40, 30)):
    """A seeded picture of noise: (width, height) pixels, RGB."""
    import numpy as np
    from PIL import Image
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def pairs_of(records):
    """All pairs of training.records.Records, those of one record together."""
    n = len(records)
    return [records[k] for i in range(n) for k in range(i, i + n * records[i]["pairs"], n)]


def llama_tokenizer():
    """The published Llama tokenizer with LLaVA's two extra tokens, as llava-hf ships it."""
    from transformers import LlamaTokenizer
    path = need(SHARED / "official" / "llama_tokenizer")
    tokenizer = LlamaTokenizer.from_pretrained(path, legacy=True, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    return tokenizer


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


@cache
def warmed():
    """Import what commands import as they run, and load models: once, or each fork takes seconds for it."""
    from model import vlm
    for folder in (write_llava(Path(CACHE) / "warm"), "classroom"):
        vlm.load(folder)


def run_forked(main, argv, before=None, ranks=1):
    """A command in a fork of this process, or as some ranks: (exit code of the first, what all printed).

    `before` runs there first, to break things.
    """
    warmed()

    def child(rank):
        gc.freeze()                                       # a collection would copy all that is shared
        if ranks > 1:                                     # what torchrun sets, without its start-up time
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                           "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        with open(log, "a", buffering=1) as sys.stdout:
            sys.stderr = sys.stdout
            sys.argv = ["command", *argv]
            if before:
                before()
            try:
                main()
            except SystemExit as e:
                print(e.code if isinstance(e.code, str) else "")
                raise SystemExit(1 if isinstance(e.code, str) else e.code) from None
            except BaseException:
                traceback.print_exc()
                raise
    with tempfile.TemporaryDirectory() as folder:
        log, port = Path(folder) / "log", free_port()
        fork = multiprocessing.get_context("fork").Process
        processes = [fork(target=child, args=(rank,), daemon=True) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(240)
        return processes[0].exitcode, log.read_text().replace("\r", "\n")


start_program = subprocess.run                            # as the commands do
CAPTURED = {"capture_output": True, "text": True}


def run_here(words, *arguments, **options):
    """subprocess.run; but a program of classroom/ is a fork of this process, which spares its imports."""
    ours = isinstance(words, list) and str(words[1]).startswith(f"{ROOT / 'classroom'}/")
    if not ours or words[0] != sys.executable or arguments or options not in ({}, CAPTURED):
        return start_program(words, *arguments, **options)
    pipes = [os.pipe() for _ in options]
    child = os.fork()
    if child == 0:
        for number, (_, end) in enumerate(pipes, 1):
            os.dup2(end, number)
        sys.stdout, sys.stderr = [open(number, "w", closefd=False) for number in (1, 2)]
        code = start.code_of([*map(str, words[1:])])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    told = []
    for mine, its in pipes:
        os.close(its)
        with open(mine) as file:
            told.append(file.read())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return subprocess.CompletedProcess(words, code, *told)


@pytest.fixture(scope="session", autouse=True)
def programs():
    subprocess.run = run_here
    yield
    subprocess.run = start_program


@pytest.fixture(scope="session")
def chosen():
    """What study.best_settings() chooses from the repository's own lines."""
    from classroom.papers import study
    return study.best_settings()


@pytest.fixture
def settings(chosen, monkeypatch):
    """They are chosen once for all tests, not in a second for each."""
    from classroom.papers import study
    monkeypatch.setattr(study, "best_settings", lambda: dict(chosen))


@pytest.fixture
def own_programs(monkeypatch):
    """They are started as a user's command starts them, each with a Python of its own."""
    monkeypatch.setattr(subprocess, "run", start_program)


def run_script(script, *arguments, folder=ROOT, path=(), forget=()):
    """`python SCRIPT ARGUMENTS` in a folder, but in a fork of this process, as run_forked() does it.

    path: further places of modules, behind the script's own. forget: modules and packages that are to be
    found there, and not here.
    """
    def main():
        for name in [*sys.modules]:
            if name.partition(".")[0] in forget:
                del sys.modules[name]
        os.chdir(folder)
        others = [place for place in sys.path if Path(place or ".").resolve() not in (ROOT, ROOT / "tests")]
        sys.path[:] = [str(Path(script).resolve().parent), *map(str, path), *others]
        runpy.run_path(str(script), run_name="__main__")
    return run_forked(main, list(map(str, arguments)))
