"""Low-rank adapters (arXiv 2106.09685) in plain PyTorch, read and written in PEFT's own format.

    linear(x) + scale * (x @ A @ B)                                      Eq. 3
    with A (in, r), B (r, out), scale = alpha / r

    python lora.py merge --model M --adapter runs/NAME/adapter --out DIR

merge writes a folder that transformers alone loads (the classroom's model: seconds; a 7B: minutes, 15 GB).

Departures from PEFT:
1. A and B are float32 masters beside a base of any type and are cast to x's; PEFT makes a float32 copy of x.
2. No dropout: packed and naive forward would differ, and both papers' official runs had none in effect.
3. The first A is drawn from (seed, layer's name), so it is the same on any device, in any order.
"""
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import data
from data import UserError

# isort: split
import safetensors.torch
import torch

STARTS = (True, False, "gaussian", "eva", "orthogonal")         # PEFT's that leave the base as it is
SHARD = "5GB"                                                   # of a merged folder's files
FETCHED = ("*.safetensors ImageReward.pt *.json *.txt *.jinja *.model *.jsonl *.gz *.parquet *.arrow "
           "*.png *.jpg *.jpeg").split()                            # nothing that runs


class LoRALinear(torch.nn.Linear):
    def adapt(self, r, alpha, seed=0, name=""):
        """Turn a plain linear layer into this class in place: no weight is copied or renamed."""
        self.__class__ = LoRALinear
        self.r, self.alpha, self.scale, self.enabled = r, alpha, alpha / r, True
        self.start = self.packed = None                             # see begin_here, quantise
        digest = hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()
        draw = torch.Generator().manual_seed(int(digest[:14], 16))
        bound = self.in_features ** -0.5                            # kaiming_uniform, a = sqrt(5), as in PEFT
        A = torch.empty(self.in_features, r).uniform_(-bound, bound, generator=draw)
        kind = self.weight.device, torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_A = torch.nn.Parameter(A.to(*kind))
        self.lora_B = torch.nn.Parameter(torch.zeros(r, self.out_features).to(*kind))

    def base(self, x):
        """The frozen layer."""
        if not self.packed:
            return super().forward(x)
        from bitsandbytes import matmul_4bit
        return matmul_4bit(x, self.weight.t(), self.packed, bias=self.bias)

    def forward(self, x):
        adapter = (self.lora_A, self.lora_B) if self.enabled else self.start
        if not adapter:
            return self.base(x)
        A, B = adapter
        rows = x.reshape(-1, self.in_features)                      # (N, in)
        y = self.base(rows)                                         # (N, out)
        # + scale * (x @ A @ B) in place: two tensors of y's size and a fifth of the time less (bf16: a third)
        y.addmm_(rows @ A.to(x.dtype), B.to(x.dtype), alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


# ---- put it on, switch it off, merge it ----
def add_lora(model, r, alpha, targets=None, seed=0):
    """Freeze `model` and adapt linear layers: those that `targeted` finds. Returns their names."""
    if layers(model):
        raise UserError("the model already carries an adapter: merge it or load the model anew")
    names = targeted([n for n, m in model.named_modules() if type(m) is torch.nn.Linear], targets)
    model.requires_grad_(False)
    for name in names:
        LoRALinear.adapt(model.get_submodule(name), r, alpha, seed, name)
    return names


def targeted(names, targets):
    """Those of the linear layers' names that LoRA goes on; without targets all of the language model.

    A target without a dot is the last name of a layer of the language model (CLIP has a q_proj of its own);
    one with a dot is the end of a full name, anywhere but in lm_head. Raises UserError for a target that
    names nothing.
    """
    names = [n for n in names if not n.endswith("lm_head")]
    language = [n for n in names if re.search(r"\b(language|text)_model\.", n)] or names
    chosen = []
    for target in filter(None, targets or ()):
        among = names if "." in target else language
        found = [n for n in among if f".{n}".endswith(f".{target}")]
        if not found:
            kinds = ", ".join(sorted({n.split(".")[-1] for n in language}))
            raise UserError(f"no linear layer is called {target!r}: give some of {kinds}, or the end of a "
                            "full name with a dot in it")
        chosen += found
    return [n for n in names if n in chosen] or language


@contextlib.contextmanager
def lora_disabled(model):
    """Inside the `with`, which may be nested, the model is without its adapter, or with the one that training
    began with: the reference."""
    enabled = [layer for layer in layers(model).values() if layer.enabled]
    try:
        for layer in enabled:
            layer.enabled = False
        yield
    finally:
        for layer in enabled:
            layer.enabled = True


def begin_here(model):
    """Training goes on from the adapter as it is now: lora_disabled leaves a frozen copy of it on."""
    for layer in layers(model).values():
        layer.start = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()


def quantise(model, device):
    """Move the model to a device, the weights under its adapter in 4 bits: NF4 (arXiv 2305.14314), in blocks
    of 64 along the input; other layers keep theirs. Raises UserError."""
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        raise UserError("--dtype nf4 needs bitsandbytes: pip install bitsandbytes") from None
    for layer in layers(model).values():
        if not layer.in_features % 64:                              # else its kernel for CPUs is wrong
            layer.weight.data, layer.packed = quantize_4bit(layer.weight.data.to(device), quant_type="nf4")
    model.to(device)


def lora_parameters(model):
    """All that trains, in the model's order: `...q_proj.lora_A` (in, r) and `...q_proj.lora_B` (r, out)."""
    return {f"{n}.{ab}": getattr(m, ab) for n, m in layers(model).items() for ab in ("lora_A", "lora_B")}


def check_finite(weights, fix):
    """Raise UserError for the first of {name: weight} that is not."""
    for name, weight in weights.items():
        # the sum, which is fast, may be infinite without any of its terms
        if not weight.sum(dtype=torch.float32).isfinite() and not weight.isfinite().all():
            raise UserError(f"{name} is not finite: {fix}")


def remove(model):
    """Leave plain linear layers: those of the base, unless merge() calls this."""
    for layer in layers(model).values():
        del layer.lora_A, layer.lora_B, layer.r, layer.alpha, layer.scale
        del layer.enabled, layer.start, layer.packed
        layer.__class__ = torch.nn.Linear


@torch.no_grad()
def merge(model):
    """Add the adapter to the weights, computing in float32, and leave plain linear layers."""
    for layer in layers(model).values():
        delta = layer.scale * (layer.lora_A @ layer.lora_B).T       # (out, in)
        weight = layer.weight
        if layer.packed:
            from bitsandbytes.functional import dequantize_4bit
            weight = dequantize_4bit(weight, layer.packed)
        layer.weight.data = (weight.to(delta.dtype) + delta).to(weight.dtype)
    remove(model)


# ---- PEFT's files ----
def save(model, folder, base_name):
    """PEFT's adapter_config.json and adapter_model.safetensors; the same adapter gives the same bytes."""
    adapted = layers(model)
    if not adapted:
        raise UserError(f"there is no adapter to save in {folder}: call add_lora or load first")
    first = next(iter(adapted.values()))
    config = {"peft_type": "LORA",
              "task_type": "CAUSAL_LM",
              "base_model_name_or_path": base_name,
              "r": first.r,
              "lora_alpha": first.alpha,
              "lora_dropout": 0.0,
              "bias": "none",
              "inference_mode": True,
              "target_modules": sorted(adapted),                    # in full: the vision tower has q_proj too
              "rank_pattern": {n: m.r for n, m in adapted.items() if m.r != first.r},
              "alpha_pattern": {n: m.alpha for n, m in adapted.items() if m.alpha != first.alpha}}
    tensors = {f"base_model.model.{name}.weight": p.detach().float().T.contiguous().cpu()
               for name, p in lora_parameters(model).items()}
    data.atomic_write(Path(folder, "adapter_model.safetensors"),
                      safetensors.torch.save(tensors, {"format": "pt"}))
    data.atomic_write(Path(folder, "adapter_config.json"), json.dumps(config, indent=1, sort_keys=True))


@torch.no_grad()
def load(model, folder):
    """Make the layers that an adapter (ours or PEFT's) names carry it, and no others; returns their names."""
    config, tensors = read_adapter(folder)
    check_finite(tensors, f"give another adapter than {folder}")
    modules, found = dict(model.named_modules()), {}
    for name, r, alpha, A, B in matrices(config, tensors):
        # What older transformers, and the original LLaVA and Bunny, call the language model's layers.
        new = re.sub(r"^(language_model\.)?model\.layers\.", "model.language_model.layers.", name)
        layer = modules.get(name) or modules.get(new)
        fits = isinstance(layer, torch.nn.Linear) and A.shape == (layer.in_features, r)
        if not fits or B.shape != (r, layer.out_features):
            raise UserError(f"{folder} has {name} of rank {r}, A {tuple(A.shape)}, B {tuple(B.shape)}, but "
                            f"the model has {layer}: load it into the model that it was trained on, or let "
                            "PEFT merge it")
        found[layer] = r, alpha, A, B
    remove(model)
    model.requires_grad_(False)
    for layer, (r, alpha, A, B) in found.items():
        LoRALinear.adapt(layer, r, alpha)
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    return list(layers(model))


def matrices(config, tensors):
    """Yield (layer's name, r, alpha by which alpha / r is the scale, A (in, r), B (r, out)) of an adapter."""
    absent = torch.empty(0, 0)
    for stem in sorted({re.sub(r"\.lora_[AB]\.weight$", "", key) for key in tensors}):
        name = stem.removeprefix("base_model.model.")
        r = setting(config, "r", "rank_pattern", name)
        alpha = setting(config, "lora_alpha", "alpha_pattern", name)
        if config.get("use_rslora"):
            alpha *= r ** 0.5
        yield name, r, alpha, *(tensors.get(f"{stem}.lora_{ab}.weight", absent).T for ab in "AB")


def read_adapter(folder, tensors=None):
    """(adapter_config.json, the tensors under PEFT's names, where they are not given). Raises UserError for
    anything but plain LoRA."""
    try:
        config = data.read_json(Path(folder, "adapter_config.json"), check=data.as_record)
        tensors = tensors or safetensors.torch.load_file(Path(folder, "adapter_model.safetensors"))
    except (OSError, UserError, safetensors.SafetensorError) as e:
        raise UserError(f"{folder} needs adapter_config.json and adapter_model.safetensors: {e}") from e
    odd = config.get("alora_invocation_tokens") or config.get("arrow_config")     # which no tensor shows
    if odd or config.get("peft_type") != "LORA" or config.get("init_lora_weights", True) not in STARTS:
        raise UserError(f"{folder} is not plain LoRA (peft_type, init_lora_weights, alora_invocation_tokens, "
                        "arrow_config): let PEFT merge it")
    return config, tensors


def setting(config, key, patterns, name):
    """A layer's rank or alpha by PEFT's rule: a pattern is the end of its name.

    To PEFT it is a regular expression; here it is a plain name, as PEFT writes it, whose dots may be escaped.
    """
    found = config.get(key, 8)
    for pattern, value in reversed(data.as_record(config.get(patterns) or {}, patterns).items()):
        plain = pattern.replace("\\.", ".")
        if not re.fullmatch(r"[\w.]+", plain):
            raise UserError(f"{patterns} has {pattern!r}, which is not a layer's name: let PEFT merge it")
        if f".{name}".endswith(f".{plain}"):
            found = value                                           # the first that fits is the last here
    if type(found) not in (int, float) or not 0 < found < 1e9:
        raise UserError(f"adapter_config.json has {found!r:.40} as {key} of {name}: it is a number above 0")
    return found


# ---- a model's folder ----
def model_folder(name):
    """The folder behind --model: a path, `classroom`, a name in classroom/models/, or the hub's. Raises
    UserError."""
    own = Path(__file__).resolve().parent / "classroom/models"
    if str(name) == "classroom":
        name = own / "base0"
    for path in Path(name), own / name, Path(fetched(str(name))):
        if path.is_dir():
            return path
    raise UserError(f"--model {name}: no such folder; give a model's, ORG/NAME of the hub or `classroom`")


@functools.cache
def fetched(name, kind="model"):
    """ORG/NAME[@REVISION] as the folder that holds it in the hub's cache; what exists, or has another form,
    as it is. What the cache lacks is fetched, after a line that says how much and where to. Raises UserError.

    kind: or "dataset".
    """
    if os.path.exists(name) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", name):
        return name
    from huggingface_hub import constants, errors, snapshot_download
    repo, _, revision = name.partition("@")
    fetch = functools.partial(snapshot_download, repo, repo_type=kind, revision=revision or None,
                              allow_patterns=FETCHED)
    try:
        with contextlib.suppress(errors.LocalEntryNotFoundError):
            return fetch(local_files_only=True)
        missing = [file.file_size for file in fetch(dry_run=True) if file.will_download]
        print(f"fetching {name}: {len(missing)} files, {sum(missing) / 1e9:.3f} GB, into "
              f"{constants.HF_HUB_CACHE}", file=sys.stderr)
        return fetch()
    except Exception as error:                          # of the hub's and its helpers' there is no end
        if isinstance(error, errors.DryRunError):
            error = error.__cause__
        raise UserError(f"{name}: there is no such path, and the hub does not give it "
                        f"({' '.join(str(error).split()):.300}); fetch it with `hf download {repo} "
                        f"--repo-type {kind} --local-dir DIR`, after `hf auth login` if it is gated, and "
                        "give DIR") from None


def merge_folder(model, adapter, out, dtype="auto"):
    """Writes `out` whole or not at all: config, shards, and the model's tokenizer, processor and template."""
    from transformers import AutoModelForImageTextToText
    source, out = model_folder(model), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} must be an empty folder or a new one")
    merged = data.from_folder(AutoModelForImageTextToText, source, "model", dtype=dtype)
    load(merged, adapter)
    merge(merged)
    write_folder(merged, source, out)
    if (about := Path(adapter, "README.md")).exists():
        data.atomic_write(out / "README.md", about.read_text().replace("name: peft", "name: transformers"))


def write_folder(model, source, out, weights=None):
    """A folder that transformers alone loads, whole or not at all: `model`, the rest as it is in `source`.

    weights: {name: tensor}, the whole ones of those that are sharded over ranks. A processor_config.json,
    without which LLaVA's processor cannot count an image's tokens, is made where there is none. Raises
    UserError for a weight that is not finite.
    """
    temporary = data.temporary(out)
    state = dict(model.state_dict())
    for name, weight in (weights or {}).items():
        state[name] = weight.to(model.dtype)
    check_finite(state, "the adapter or its model is broken, or the type too narrow; give --dtype float32 or "
                        "another adapter")
    try:
        with data.explained(f"{out} cannot hold the model", "make room there"):
            model.save_pretrained(temporary, max_shard_size=SHARD, state_dict=state)
            for file in source.iterdir():
                new = temporary / file.name
                kept = file.suffix in ".json .jinja .model .txt".split() and ".index." not in file.name
                if kept and not new.exists():
                    shutil.copyfile(file, new)
            new, config = temporary / "processor_config.json", model.config
            if not new.exists() and hasattr(config, "vision_feature_select_strategy"):
                vision = config.vision_config
                about = {"patch_size": vision.patch_size,
                         "vision_feature_select_strategy": config.vision_feature_select_strategy,
                         "num_additional_image_tokens": int(vision.model_type == "clip_vision_model")}
                new.write_text(json.dumps(about, indent=1))
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main():
    parser = data.Parser(prog="lora.py", description=__doc__)
    parser.add_argument("command", choices=["merge"], help="add an adapter to its model's weights")
    parser.add_argument("--model", required=True, help="a model's folder, ORG/NAME on the hub, or classroom")
    parser.add_argument("--adapter", required=True, help="the folder of a LoRA in PEFT's format")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--dtype", default="auto", choices="auto float32 bfloat16 float16".split(),
                        help="type of the merged weights; auto keeps the model's")
    o = parser.parse_args()
    try:
        merge_folder(o.model, o.adapter, o.out, o.dtype)
        print(f"{o.out}: the merged model, its tokenizer and its processor; transformers loads it as it is")
    except (UserError, OSError) as e:
        sys.exit(f"lora.py: {e}")


if __name__ == "__main__":
    main()
