"""LoRA as specification: what trains and what does not, PEFT's format both ways, the merged folder."""
import copy
import json
import re
import sys

import pytest
import torch
from conftest import write_llava
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import lora
from data import UserError
from lora import LoRALinear, add_lora, load, lora_disabled, lora_parameters, merge, save

TYPES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llava(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def base(folder):
    from transformers import LlavaForConditionalGeneration
    return LlavaForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


def logits(model, grad=False):
    torch.manual_seed(1)
    image = model.config.image_token_id
    ids = torch.tensor([[2, *[image] * 4, 7, 8, 11, 12], [2, *[image] * 4, 9, 6, 3, 14]])
    pixels = torch.randn(2, 3, 28, 28, dtype=next(model.parameters()).dtype)
    with torch.set_grad_enabled(grad):
        return model(input_ids=ids, pixel_values=pixels).logits


def randomise(model, seed=5):
    """What training would do, in one stroke: every LoRA weight of ours or of PEFT's is drawn anew."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return model


def peft_model(model, **config):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: it is in requirements-dev.txt")
    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **config})).eval()


# ---- what trains, and where it starts

def test_it_is_linear_plus_scale_times_x_A_B():
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 7)
    x = torch.randn(2, 3, 5)
    expected = linear(x)
    LoRALinear.adapt(linear, r=2, alpha=6)
    torch.nn.init.normal_(linear.lora_B)
    assert_close(linear(x), expected + 3 * (x @ linear.lora_A @ linear.lora_B))


def test_it_adapts_the_language_model_and_nothing_else(model, base):
    names = add_lora(model, r=4, alpha=8)
    assert names == [n for n, m in base.named_modules()
                     if isinstance(m, torch.nn.Linear) and n.startswith("model.language_model.")]
    assert {n.split(".")[-1] for n in names} == TYPES and len(names) == 14
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == set(lora_parameters(model))
    assert trains == {f"{n}.{half}" for n in names for half in ("lora_A", "lora_B")}
    for name, weight in base.state_dict().items():                  # same names, same weights
        assert torch.equal(model.state_dict()[name], weight)


def test_at_init_the_model_is_unchanged_and_B_is_zero(model, base):
    add_lora(model, r=4, alpha=8)
    assert all((p == 0).all() for n, p in lora_parameters(model).items() if n.endswith("lora_B"))
    assert_close(logits(model), logits(base), rtol=0, atol=1e-6)


def test_targets_choose_layers_by_name(model):
    names = add_lora(model, r=4, alpha=8, targets=["q_proj", "v_proj"])
    assert len(names) == 4 and {n.split(".")[-1] for n in names} == {"q_proj", "v_proj"}
    assert all("language_model" in n for n in names)                # the vision tower has both, too


@pytest.mark.parametrize("target", ["q_prj", "linear_1", "or.linear_1", "lm_head", "model.lm_head"])
def test_a_target_that_names_nothing_is_refused(model, target):
    with pytest.raises(UserError, match=f"no linear layer is called '{target}'"):
        add_lora(model, r=4, alpha=8, targets=["q_proj", target])
    assert not lora_parameters(model)


def test_a_bare_language_model_is_adapted_but_for_its_lm_head(model):
    from transformers import LlamaForCausalLM
    bare = LlamaForCausalLM(model.config.text_config)
    assert len(add_lora(bare, r=2, alpha=2)) == 14
    assert type(bare.lm_head) is torch.nn.Linear


def test_the_draw_depends_on_seed_and_name_only(base):
    def drawn(seed=0, **options):
        model = copy.deepcopy(base)
        torch.manual_seed(torch.seed() % 2**31)                     # the global generator must not matter
        add_lora(model, r=4, alpha=8, seed=seed, **options)
        return {n: p.detach().clone() for n, p in lora_parameters(model).items() if n.endswith("lora_A")}
    first, again, other, few = drawn(), drawn(), drawn(seed=1), drawn(targets=["v_proj"])
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)
    assert few and all(torch.equal(first[n], few[n]) for n in few)
    assert len({p.sum().item() for p in first.values()}) == len(first)


def test_the_first_A_is_distributed_as_PEFTs():
    """Both uniform within 1 / sqrt(in): the same spread and bound over 64,000 draws."""
    torch.manual_seed(0)
    holder = torch.nn.ModuleDict({"proj": torch.nn.Linear(1000, 8)})
    theirs = peft_model(copy.deepcopy(holder), r=64, target_modules=["proj"])
    theirs, = (p for n, p in theirs.named_parameters() if "lora_A" in n)
    add_lora(holder, r=64, alpha=8)
    ours = holder["proj"].lora_A
    assert ours.abs().max() <= 1000 ** -0.5 and theirs.abs().max() <= 1000 ** -0.5
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.01)
    assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.001)


def test_masters_are_float32_beside_a_bf16_base(model):
    model.to(torch.bfloat16)
    add_lora(model, r=4, alpha=8)
    randomise(model)
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    out = logits(model, grad=True)
    out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    gradients = [p.grad for p in lora_parameters(model).values()]
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in gradients)


def test_a_float64_model_computes_in_float64(model):
    model.to(torch.float64)
    add_lora(model, r=4, alpha=8)
    assert {p.dtype for p in lora_parameters(model).values()} == {torch.float64}
    assert logits(model).dtype == torch.float64


# ---- the reference

def test_disabled_is_the_base_bit_for_bit_and_comes_back(model, base):
    add_lora(model, r=4, alpha=8)
    randomise(model)
    adapted = logits(model)
    with lora_disabled(model):
        with lora_disabled(model):
            assert torch.equal(logits(model), logits(base))
        assert torch.equal(logits(model), logits(base))             # the inner `with` does not switch it on
    assert torch.equal(logits(model), adapted) and not torch.equal(adapted, logits(base))
    with pytest.raises(KeyError), lora_disabled(model):
        raise KeyError
    assert torch.equal(logits(model), adapted)


# ---- PEFT

def test_peft_loads_what_we_save(model, base, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: it is in requirements-dev.txt")
    add_lora(model, r=4, alpha=8)
    save(randomise(model), tmp_path, "some/base")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    adapted = {n.split(".lora_A")[0] for n, _ in theirs.named_parameters() if ".lora_A." in n}
    assert {n.removeprefix("base_model.model.") for n in adapted} == set(lora.layers(model))


@pytest.mark.parametrize("config", [
    {"target_modules": ["q_proj", "v_proj"]},                       # the vision tower has these names too
    {"target_modules": "all-linear"},
    {"target_modules": r".*language_model.*\.(up|down)_proj", "use_rslora": True},
    {"target_modules": ["q_proj", "fc1"], "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp.fc1": 3},
     "alpha_pattern": {"language_model.layers.1.self_attn.q_proj": 32}}], ids=str)
def test_we_load_what_peft_saves(model, base, tmp_path, config):
    theirs = randomise(peft_model(copy.deepcopy(base), **config))
    theirs.save_pretrained(tmp_path)
    names = load(model, tmp_path)
    assert set(names) == {n.split(".lora_A")[0].removeprefix("base_model.model.")
                          for n, _ in theirs.named_parameters() if ".lora_A." in n}
    assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(model), logits(base), atol=1e-2)

    save(model, tmp_path / "again", None)                           # and patterns and scales survive ours
    again = copy.deepcopy(base)
    load(again, tmp_path / "again")
    assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-6)


def test_gradients_equal_pefts(model, base, tmp_path):
    add_lora(model, r=4, alpha=8)
    save(randomise(model), tmp_path, None)
    peft = pytest.importorskip("peft", reason="PEFT is not installed: it is in requirements-dev.txt")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    for which in (model, theirs):
        logits(which, grad=True).log_softmax(-1)[..., 5].sum().backward()
    expected = {n.removeprefix("base_model.model.").removesuffix(".default.weight"): p.grad.T
                for n, p in theirs.named_parameters() if "lora_" in n}
    got = {n: p.grad for n, p in lora_parameters(model).items()}
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5 * expected[name].abs().max().item())


# ---- our own files

def test_saving_is_deterministic_and_loading_gives_the_same_bits(model, base, tmp_path):
    add_lora(model, r=4, alpha=8)
    randomise(model)
    for name in ("a", "b"):
        save(model, tmp_path / name, "some/base")
    files = sorted(f.name for f in (tmp_path / "a").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    loaded = copy.deepcopy(base)
    load(loaded, tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(lora_parameters(loaded))


def test_loading_replaces_the_adapter_that_is_there(model, base, tmp_path):
    add_lora(model, r=4, alpha=8, targets=["q_proj"])
    save(randomise(model), tmp_path, None)
    other = copy.deepcopy(base)
    add_lora(other, r=2, alpha=2)
    assert load(randomise(other), tmp_path) == list(lora.layers(model))
    assert torch.equal(logits(other), logits(model))


def test_a_failed_save_leaves_the_old_adapter(model, tmp_path, monkeypatch):
    add_lora(model, r=4, alpha=8)
    save(model, tmp_path, None)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    monkeypatch.setattr(lora.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(UserError, match="no space"):
        save(randomise(model), tmp_path, None)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before


@pytest.mark.parametrize("old", ["language_model.model.layers.", "model.layers."])
def test_names_of_older_transformers_and_of_the_original_codes_are_understood(model, base, tmp_path, old):
    add_lora(model, r=4, alpha=8)
    save(randomise(model), tmp_path, None)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k.replace("model.language_model.layers.", old): v for k, v in load_file(file).items()}, file)
    loaded = copy.deepcopy(base)
    load(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


# ---- merging

def test_merged_equals_unmerged_in_plain_linear_layers(model):
    add_lora(model, r=4, alpha=8)
    before = logits(randomise(model))
    merge(model)
    assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert not lora.layers(model) and not lora_parameters(model)
    one = model.get_submodule("model.language_model.layers.0.self_attn.q_proj")
    assert type(one) is torch.nn.Linear
    assert not vars(one).keys() & {"alpha", "scale", "enabled"} and set(one.state_dict()) == {"weight"}
    add_lora(model, r=2, alpha=2)                                   # a merged model can be adapted again


def test_merging_into_bf16_rounds_once(model):
    model.to(torch.bfloat16)
    name, *_ = add_lora(model, r=4, alpha=8)
    layer = randomise(model).get_submodule(name)
    exact = layer.weight.double() + layer.scale * (layer.lora_A.double() @ layer.lora_B.double()).T
    merge(model)
    assert_close(layer.weight.double(), exact, rtol=2 ** -8, atol=1e-6)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["lora.py", *map(str, arguments)])
    lora.main()


def test_the_merged_folder_needs_transformers_alone(model, folder, tmp_path, monkeypatch):
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    add_lora(model, r=4, alpha=8)
    save(randomise(model), tmp_path / "adapter", str(folder))
    out = tmp_path / "merged"
    command(monkeypatch, "merge", "--model", folder, "--adapter", tmp_path / "adapter", "--out", out)
    alone = AutoModelForImageTextToText.from_pretrained(out).eval()
    assert_close(logits(alone), logits(model), rtol=1e-5, atol=1e-5)
    names = {f.name for f in out.iterdir()}
    assert names >= {f.name for f in folder.iterdir()}              # tokenizer, template, image processor
    assert sorted(tmp_path.iterdir()) == [tmp_path / "adapter", out]
    templates = [AutoTokenizer.from_pretrained(f).chat_template for f in (folder, out)]
    assert templates[0] and templates[0] == templates[1]

    with pytest.raises(SystemExit, match="merged must be an empty folder or a new one"):    # read nothing yet
        command(monkeypatch, "merge", "--model", folder, "--adapter", tmp_path / "adapter", "--out", out)
    half = tmp_path / "half"
    half.mkdir()                                                    # an empty folder is a new one
    command(monkeypatch, "merge", "--model", folder, "--adapter", tmp_path / "adapter", "--out", half,
            "--dtype", "bfloat16")
    assert {v.dtype for v in load_file(half / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["adapter", "float16"])
def test_a_merge_that_is_not_finite_is_refused_with_the_weights_name(model, folder, tmp_path, monkeypatch,
                                                                     kind):
    name, *_ = add_lora(model, 2, 4)
    layer, spoilt = model.get_submodule(name), 7e4 if kind == "float16" else float("nan")
    with torch.no_grad():
        layer.lora_A[0, 0], layer.lora_B[0, 0] = 1, spoilt
    save(model, tmp_path / "adapter", str(folder))
    part = "weight" if kind == "float16" else "lora_B.weight"
    with pytest.raises(SystemExit, match=f"{name}.{part} is not finite") as caught:
        command(monkeypatch, "merge", "--model", folder, "--adapter", tmp_path / "adapter", "--out",
                tmp_path / "merged", "--dtype", "float16")
    assert not (tmp_path / "merged").exists() and "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments, said", [
    ((), "required"), (("merge", "--model", "x"), "--adapter, --out"),
    (("merge", "--model", "x", "--adapter", "y", "--out", "z", "--dtpye", "float32"), "--dtpye"),
    (("split", "--model", "x", "--adapter", "y", "--out", "z"), "split: give one of merge")])
def test_a_wrong_command_is_one_sentence_and_exit_1(arguments, said, monkeypatch):
    with pytest.raises(SystemExit, match=re.escape(said)) as error:
        command(monkeypatch, *arguments)
    assert error.value.code.startswith("lora.py: ")                 # a string: Python prints it and exits 1


def test_a_failed_merge_leaves_nothing_behind(model, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="adapter_config.json"):
        command(monkeypatch, "merge", "--model", folder, "--adapter", tmp_path / "none", "--out", out)
    with pytest.raises(SystemExit, match="nowhere: no such folder"):
        command(monkeypatch, "merge", "--model", tmp_path / "nowhere", "--adapter", tmp_path, "--out", out)
    assert not list(tmp_path.iterdir())


# ---- users' mistakes

def test_unknown_targets_are_refused_with_those_there_are(model):
    with pytest.raises(UserError, match="q_prj.*down_proj, gate_proj"):
        add_lora(model, r=4, alpha=8, targets=["q_prj"])
    assert all(p.requires_grad for p in model.parameters())          # nothing was touched
    add_lora(model, r=4, alpha=8)
    with pytest.raises(UserError, match="already"):
        add_lora(model, r=4, alpha=8)


def test_there_is_nothing_to_save_in_a_plain_model(model, tmp_path):
    with pytest.raises(UserError, match="no adapter to save"):
        save(model, tmp_path, None)


@pytest.mark.parametrize("config", [
    {"use_dora": True}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
    {"target_modules": ["fc1"], "lora_bias": True}, {"trainable_token_indices": [1]}], ids=str)
def test_what_peft_saves_besides_two_matrices_a_layer_is_refused(model, base, tmp_path, config):
    """fc1 has a bias; the others are what the language model's layers have."""
    config = {"target_modules": ["fc1", "q_proj"]} | config
    randomise(peft_model(copy.deepcopy(base), **config)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="let PEFT merge it"):
        load(model, tmp_path)
    assert not lora.layers(model)


@pytest.mark.parametrize("change", [{"peft_type": "IA3"}, {"init_lora_weights": "pissa_niter_4"}], ids=str)
def test_what_is_not_plain_lora_is_refused_by_name(model, base, tmp_path, change):
    add_lora(model, r=4, alpha=8)
    save(model, tmp_path, None)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=next(iter(change))):
        load(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("spoil, said", [
    (lambda t, c: t.update({"base_model.model.nowhere.lora_A.weight": torch.ones(4, 32)}), "nowhere"),
    (lambda t, c: t.update({"base_model.model.lm_head.weight": torch.ones(4, 32)}), "lm_head"),
    (lambda t, c: t.pop(next(k for k in t if "lora_B" in k)), r"B \(0, 0\)"),
    (lambda t, c: c.update(r=8), "rank 8"),
    (lambda t, c: t.update({k: torch.ones(4, 48) for k in t if "k_proj.lora_A" in k}), r"\(48, 4\)"),
], ids=["unknown layer", "no LoRA weight", "half is absent", "other rank", "other shape"])
def test_an_adapter_of_another_model_is_refused_and_the_model_untouched(model, base, tmp_path, spoil, said):
    add_lora(model, r=4, alpha=8)
    save(model, tmp_path, None)
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, options = load_file(file), json.loads(config.read_text())
    spoil(tensors, options)
    save_file(tensors, file)
    config.write_text(json.dumps(options))
    target = copy.deepcopy(base)
    with pytest.raises(UserError, match=said):
        load(target, tmp_path)
    assert not lora.layers(target)


@pytest.mark.parametrize("pattern", ["(a+)+b", ".*q_proj", "q_proj|v_proj", r"\d.q_proj", "", "q_proj$"])
@pytest.mark.parametrize("patterns", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_no_plain_name_is_refused_at_once(model, base, tmp_path, patterns, pattern):
    """No expression of the file's is run: the first of these takes longer than a life on a name of 40 a's."""
    add_lora(model, r=4, alpha=8)
    save(model, tmp_path, None)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {patterns: {pattern: 3}}))
    with pytest.raises(UserError, match=f"{patterns} has .*, which is not a layer's name"):
        load(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_absent_or_torn_files_are_named(model, base, tmp_path, file):
    add_lora(model, r=4, alpha=8)
    save(model, tmp_path, None)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:40])
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load(copy.deepcopy(base), tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=re.escape(file)):
        load(copy.deepcopy(base), tmp_path)
