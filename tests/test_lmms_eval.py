"""LMMs-Eval itself on a merged folder: it answers a local task of eight questions as eval_hallu.py does.

Runs where LMMs-Eval 0.7.3 is installed as well (docs/evaluation.md says how), and is skipped elsewhere.
"""
import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import llama_tokenizer, picture, write_llava
from rehearse import TINY, write_original

import lora
from evaluation import answers, benchmarks
from model import import_checkpoint, llava, vlm

TASK = """
task: eight
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: label
generation_kwargs: {{max_new_tokens: 6, temperature: 0}}
process_results: !function utils.results
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
import os
from PIL import Image
def visual(doc): return [Image.open(os.path.join(os.path.dirname(__file__), doc["image"])).convert("RGB")]
def text(doc, kwargs=None): return doc["text"]
def results(doc, found): return {"right": float(found[0].strip().lower() == doc["label"])}
"""


def published(folder):
    """A llava-hf folder of today, whose template is in a file of its own."""
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = llava.TEMPLATES["plain"]
    return write_llava(folder, tokenizer, seed=5)


def as_it_was(folder):
    """A llava-hf folder of 2024: the template is the processor's alone."""
    (published(folder) / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": llava.TEMPLATES["plain"]}))
    return folder


def imported(folder):
    """What model/import_checkpoint.py makes of an original LLaVA: pictures are padded to a square."""
    src, tower = write_original("llava", folder.with_name("src"), TINY["llava"], torch.float32, scale=.3)
    import_checkpoint.run(src, folder, tower, report=print)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"),
                    reason="lmms_eval is not installed here: docs/evaluation.md says how")
@pytest.mark.parametrize("made", [published, as_it_was, imported])
def test_lmms_eval_answers_as_we_do(tmp_path, made):
    folder = made(tmp_path / "model")
    policy = vlm.load(folder)
    lora.add_lora(policy.model, 4, 8)
    torch.manual_seed(1)
    for weight in lora.lora_parameters(policy.model).values():
        weight.data.normal_(std=.2)
    lora.save(policy.model, tmp_path / "adapter", str(folder))
    rows = []
    for i, thing in enumerate("dog cat bus cup car bird boat horse".split()):
        picture(i).save(tmp_path / f"{i}.png")
        rows.append({"question_id": i, "image": f"{i}.png", "text": f"Is there a {thing} in the image?",
                     "label": ("yes", "no")[i % 2]})
    questions = tmp_path / "eight.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers.answer_questions(policy, "pope", benchmarks.questions("pope", [questions]), tmp_path / "a.jsonl",
                             max_new_tokens=6)
    ours = [json.loads(line).get("answer") for line in (tmp_path / "a.jsonl").read_text().splitlines()[1:]]
    lora.merge_folder(folder, tmp_path / "adapter", tmp_path / "merged")

    (tmp_path / "eight.yaml").write_text(TASK.format(data=questions))
    (tmp_path / "utils.py").write_text(UTILS)
    command = [sys.executable, "-m", "lmms_eval", "--model", "llava_hf", "--model_args",
               f"pretrained={tmp_path / 'merged'},device_map=auto,device=cpu", "--tasks", "eight",
               "--include_path", tmp_path, "--batch_size", "1", "--log_samples",
               "--output_path", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, stdin=subprocess.DEVNULL,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"),
                               "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""})
    path = next((tmp_path / "out").rglob("*samples_eight.jsonl"), None)
    assert path, (done.stdout + done.stderr)[-2000:]                         # its exit code is 0 all the same
    samples = {line["doc_id"]: line for line in map(json.loads, path.read_text().splitlines())}
    theirs = ["".join(samples[i]["filtered_resps"]).strip() for i in range(8)]
    assert theirs == ours and len(set(ours)) > 1, (done.stdout + done.stderr)[-2000:]
