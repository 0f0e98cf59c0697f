"""Five recipes of the README and one of docs/design.md: each diff is applied to a copy, and run."""
import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, picture, run_script, write_llava

README = (ROOT / "README.md").read_text()
RECIPES = dict(re.findall(r"^\*\*([\w ]+)\.\*\*(?:(?!^\*\*).)*?^```diff\n(.*?)^```", README,
                          re.DOTALL | re.MULTILINE))
FOLDERS = ("model", "training", "evaluation", "synthesis")
TESTS = ("conftest", "families", "test_families")
OURS = {*FOLDERS, *TESTS, *(path.stem for path in ROOT.glob("*.py"))}
QUICK = ("--max_steps 3 --batch 8 --set pairs=24 --set scenes=4 --set questions=20 --set look=0 "
         "--set max_new_tokens=8 --out run")


@pytest.fixture
def copy(tmp_path):
    """The code in a folder of its own, which a diff may change."""
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "classroom").symlink_to(ROOT / "classroom")
    return tmp_path


def change(folder, name):
    """Apply a recipe of the README, of at most six lines."""
    apply(folder, RECIPES[name], 6, "--recount")


def apply(folder, diff, most, *options):
    assert 1 <= len(re.findall(r"^[+-](?![+-]{2} )", diff, re.MULTILINE)) <= most
    subprocess.run(["git", "apply", *options, "-"], cwd=folder, input=diff, text=True, check=True)


def python(folder, *words):
    """Run a script of the folder, in a fork of this process that knows none of our modules yet."""
    script, *arguments = words
    code, said = run_script(folder / script, *arguments, folder=folder, forget=OURS)
    assert code == 0, said
    return said


def steps_of(run):
    """What a run logged of its steps."""
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def train(folder, options=""):
    """Three steps on the built-in pairs; what was logged of them."""
    python(folder, "train_dpo.py", *QUICK.split(), *options.split())
    steps = steps_of(folder / "run")
    assert [line["step"] for line in steps] == [1, 2, 3]
    return steps


def test_there_are_five():
    assert list(RECIPES) == ["The loss", "The rejected image", "Where LoRA goes", "The optimiser",
                             "A model family"]


def test_the_loss(copy):
    change(copy, "The loss")
    steps = train(copy, "--loss mine")
    assert steps[0]["loss"] == pytest.approx(1, abs=1e-5)                   # a hinge of margin 0
    first = json.loads((copy / "run" / "log.jsonl").read_text().splitlines()[0])
    assert "def mine" in first["losses_source"]


def test_the_rejected_image(copy):
    change(copy, "The rejected image")
    steps = train(copy, "--image_rejected upside_down")
    assert steps[0]["rewards/image_margins"] == pytest.approx(0, abs=1e-5)
    assert steps[2]["rewards/image_margins"] != 0
    picture(0).save(copy / "a.png")
    (copy / "turned.py").write_text("import data; image = data.read_image('a.png'); "
                                    "turned = data.rejected_image('upside_down', image, 0, 'a'); "
                                    "print(turned == image.rotate(180), turned == image)")
    assert python(copy, "turned.py").split() == ["True", "False"]


def test_where_lora_goes(copy):
    from safetensors import safe_open
    change(copy, "Where LoRA goes")
    train(copy)
    with safe_open(copy / "run" / "adapter" / "adapter_model.safetensors", "pt") as file:
        layers = {name.split(".")[-3] for name in file.keys()}
    assert layers == {"q_proj", "v_proj"}


def test_the_optimiser(copy):
    """Another one is seen by the losses that follow the first step."""
    usual = train(copy)
    change(copy, "The optimiser")
    shutil.rmtree(copy / "run")
    steps = train(copy)
    assert steps[0]["loss"] == usual[0]["loss"] and steps[2]["loss"] != usual[2]["loss"]


def write_vip_llava(folder):
    """A random ViP-LLaVA of transformers' own class, whose projector reads two layers of the vision tower."""
    import torch
    from transformers import LlavaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration
    usual = LlavaConfig.from_pretrained(write_llava(folder))
    config = VipLlavaConfig(vision_config=usual.vision_config, text_config=usual.text_config,
                            image_token_index=usual.image_token_id, vision_feature_layer=[-1, -2])
    torch.manual_seed(0)
    VipLlavaForConditionalGeneration(config).save_pretrained(folder)


def test_a_model_family(copy):
    """Two steps on pairs with pictures: packed and naive log the same log-probabilities."""
    change(copy, "A model family")
    write_vip_llava(copy / "vip")
    with open(copy / "pairs.jsonl", "w") as file:
        for i in range(8):
            picture(i).save(copy / f"{i}.png")
            file.write(json.dumps({"id": str(i), "image": f"{i}.png", "question": "what is this ?",
                                   "chosen": "a red cat .", "rejected": "two blue dog , no cat ."}) + "\n")
    logged = {}
    for forward in ("packed", "naive"):
        python(copy, "train_dpo.py", "--model", "vip", "--data", "pairs.jsonl", "--batch", "4",
               "--micro_batch", "2", "--max_steps", "2", "--forward", forward, "--out", forward)
        logged[forward] = [{key: value for key, value in step.items() if key.startswith("logps/")}
                           for step in steps_of(copy / forward)]
    assert len(logged["packed"]) == 2 and len(logged["packed"][0]) >= 2
    for packed, naive in zip(logged["packed"], logged["naive"], strict=True):
        assert packed == pytest.approx(naive, rel=1e-5)


def test_a_family_that_needs_more(copy):
    """At most sixty lines of docs/design.md: its prompts, log-probs and answers are transformers' own."""
    (copy / "tests").mkdir()
    for name in TESTS:
        shutil.copy(ROOT / "tests" / f"{name}.py", copy / "tests")
    design = (ROOT / "docs" / "design.md").read_text()
    diff, = re.findall(r"^```diff\n(.*?)^```", design, re.DOTALL | re.MULTILINE)
    apply(copy, diff, 60)
    (copy / "check.py").write_text("import pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))\n")
    said = python(copy, "check.py", "tests/test_families.py", "-q", "-rA", "-p", "no:cacheprovider", "-k",
                  "glm4v and (prompt or equals or answer)")
    passed = set(re.findall(r"^PASSED .*::(\w+)\[glm4v", said, re.MULTILINE))
    assert {"test_a_prompt_is_the_processors_own", "test_naive_equals_transformers_own_forward",
            "test_packed_equals_naive", "test_an_answer_is_transformers_own"} <= passed
