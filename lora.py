"""Low-rank adapters (arXiv 2106.09685) in plain PyTorch, read and written in PEFT's own format.

    linear(x) + scale * (x @ A @ B)             A (in, r), B (r, out), scale = alpha / r    Eq. 3 of the paper

    python lora.py merge --model M --adapter runs/NAME/adapter --out DIR
        writes a folder that transformers alone loads (the classroom's model: seconds; a 7B: minutes, 15 GB)

Departures from PEFT:
1. A and B are float32 masters beside a base of any type and are cast to x's; PEFT makes a float32 copy of x.
2. No dropout: packed and naive forward would differ, and both papers' official runs had none in effect.
3. The first A is drawn from (seed, layer's name), so it is the same on any device, in any order.
"""
import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import safetensors.torch
import torch

# What an adapter of PEFT's can hold, or do to the base, that A and B do not say.
UNREAD = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices",
          "target_parameters", "use_qalora", "alora_invocation_tokens", "arrow_config")
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What older transformers, and the original LLaVA and Bunny, call the language model.
RENAMED = {"language_model.model.": "model.language_model.", "model.layers.": "model.language_model.layers."}


SHARD = "5GB"                                                   # of a merged folder's files


class AdapterError(ValueError):
    """One sentence: what, where, the mend."""


class LoRALinear(torch.nn.Linear):
    def adapt(self, r, alpha, seed=0, name=""):
        """Turn a plain linear layer into this class in place: no weight is copied or renamed."""
        self.__class__, self.alpha, self.scale, self.enabled = LoRALinear, alpha, alpha / r, True
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        bound = self.in_features ** -0.5                            # kaiming_uniform, a = sqrt(5), as in PEFT
        A = torch.empty(self.in_features, r).uniform_(-bound, bound, generator=draw)
        kind = self.weight.device, torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_A = torch.nn.Parameter(A.to(*kind))
        self.lora_B = torch.nn.Parameter(torch.zeros(r, self.out_features).to(*kind))

    def forward(self, x):
        if not self.enabled:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features)                      # (N, in)
        y = super().forward(rows)                                   # (N, out)
        # + scale * (x @ A @ B) in place: two tensors of y's size and a fifth of the time less (bf16: a third)
        y.addmm_(rows @ self.lora_A.to(x.dtype), self.lora_B.to(x.dtype), alpha=self.scale)
        return y.view(*x.shape[:-1], self.out_features)


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model, r, alpha, targets=None, seed=0):
    """Freeze `model` and adapt linear layers: those that `targeted` finds. Returns their names."""
    if layers(model):
        raise AdapterError("the model already carries an adapter: merge it or load the model anew.")
    if r < 1:
        raise AdapterError(f"LoRA of rank {r} is no adapter: give a rank of at least 1.")
    names = targeted([n for n, m in model.named_modules() if type(m) is torch.nn.Linear], targets)
    model.requires_grad_(False)
    for name in names:
        LoRALinear.adapt(model.get_submodule(name), r, alpha, seed, name)
    return names


def targeted(names, targets=None):
    """Those of the linear layers' names that LoRA goes on; without targets all of the language model.

    A target without a dot is the last name of a layer of the language model (CLIP has a q_proj of its own);
    one with a dot is the end of a full name, anywhere but in lm_head. Raises AdapterError for a target that
    names nothing.
    """
    names = [n for n in names if n.split(".")[-1] != "lm_head"]
    language = [n for n in names if "language_model" in n.split(".")] or names
    targets = [target for target in targets or () if target]
    chosen = set()
    for target in targets:
        found = {n for n in language if n.split(".")[-1] == target}
        if "." in target:
            found = {n for n in names if f".{n}".endswith(f".{target}")}
        if not found:
            kinds = ", ".join(sorted({n.split(".")[-1] for n in language}))
            raise AdapterError(f"no linear layer is called {target!r}: give some of {kinds}, or the end of a "
                               "full name with a dot in it.")
        chosen |= found
    return [n for n in names if n in chosen] if targets else language


@contextlib.contextmanager
def lora_disabled(model):
    """Inside the `with`, which may be nested, the model is without its adapter: the reference."""
    before = [(layer, layer.enabled) for layer in layers(model).values()]
    try:
        for layer, _ in before:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def lora_parameters(model):
    """All that trains, in the model's order: `...q_proj.lora_A` (in, r) and `...q_proj.lora_B` (r, out)."""
    return {f"{n}.{ab}": getattr(m, ab) for n, m in layers(model).items() for ab in ("lora_A", "lora_B")}


def remove(model):
    """Leave plain linear layers: those of the base, unless merge() calls this."""
    for layer in layers(model).values():
        del layer.lora_A, layer.lora_B, layer.alpha, layer.scale, layer.enabled
        layer.__class__ = torch.nn.Linear


@torch.no_grad()
def merge(model):
    """Add the adapter to the weights, computing in float32, and leave plain linear layers."""
    for layer in layers(model).values():
        delta = layer.scale * (layer.lora_A @ layer.lora_B).T       # (out, in)
        layer.weight.copy_(layer.weight.to(delta.dtype) + delta)
    remove(model)


def save(model, folder, base_name):
    """PEFT's adapter_config.json and adapter_model.safetensors; the same adapter gives the same bytes."""
    sizes = {n: (m.lora_A.shape[1], m.alpha) for n, m in layers(model).items()}
    if not sizes:
        raise AdapterError(f"there is no adapter to save in {folder}: call add_lora or load first.")
    r, alpha = next(iter(sizes.values()))
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_name, "r": r,
              "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
              "target_modules": sorted(sizes),                      # in full: the vision tower has q_proj too
              "rank_pattern": {re.escape(n): size[0] for n, size in sizes.items() if size[0] != r},
              "alpha_pattern": {re.escape(n): size[1] for n, size in sizes.items() if size[1] != alpha}}
    tensors = {f"base_model.model.{n}.weight": p.detach().float().T.contiguous().cpu()
               for n, p in lora_parameters(model).items()}
    for name, data in (("adapter_model.safetensors", safetensors.torch.save(tensors, {"format": "pt"})),
                       ("adapter_config.json", json.dumps(config, indent=1, sort_keys=True).encode())):
        temporary = Path(folder, f"{name}.tmp{os.getpid()}")
        try:
            os.makedirs(folder, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, Path(folder, name))
        except OSError as e:
            temporary.unlink(missing_ok=True)
            raise AdapterError(f"{folder} cannot hold the adapter ({e}): make room there.") from e


@torch.no_grad()
def load(model, folder):
    """Make the layers that an adapter (ours or PEFT's) names carry it, and no others; returns their names."""
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_text())
        tensors = safetensors.torch.load_file(Path(folder, "adapter_model.safetensors"))
    except (OSError, ValueError, safetensors.SafetensorError) as e:
        raise AdapterError(f"{folder} needs adapter_config.json and adapter_model.safetensors: {e}.") from e
    odd = [key for key in UNREAD if config.get(key)] + ["bias"] * (config.get("bias", "none") != "none")
    odd += ["init_lora_weights"] * str(config.get("init_lora_weights")).startswith(REBASED)
    if odd or config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is no plain LoRA ({', '.join(odd) or 'peft_type'}): let PEFT merge it.")

    def setting(key, name):                                         # PEFT's rule: a pattern ends the name
        patterns = config.get({"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]) or {}
        return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), config.get(key, 8))

    modules, found = dict(model.named_modules()), {}
    for stem in sorted({re.sub(r"\.lora_[AB]\.weight$", "", key) for key in tensors}):
        A, B = (tensors.get(f"{stem}.lora_{half}.weight", torch.empty(0, 0)).T for half in "AB")
        name = stem.removeprefix("base_model.model.")
        old = next((old for old in RENAMED if name.startswith(old) and name not in modules), "")
        layer = modules.get(RENAMED.get(old, "") + name.removeprefix(old))
        r, alpha = setting("r", name), setting("lora_alpha", name)
        want = isinstance(layer, torch.nn.Linear) and ((layer.in_features, r), (r, layer.out_features))
        if (A.shape, B.shape) != want:
            raise AdapterError(f"{folder} has {name} of rank {r}, A {tuple(A.shape)}, B {tuple(B.shape)}, "
                               f"but the model has {layer}: load it into the model that it was trained on.")
        found[layer] = r, alpha * (r ** 0.5 if config.get("use_rslora") else 1), A, B
    remove(model)
    model.requires_grad_(False)
    for layer, (r, alpha, A, B) in found.items():
        LoRALinear.adapt(layer, r, alpha)
        layer.lora_A.copy_(A)
        layer.lora_B.copy_(B)
    return list(layers(model))


def merge_folder(model, adapter, out, dtype="auto"):
    """Writes `out` whole or not at all: config, shards, and the model's tokenizer, processor and template."""
    from transformers import AutoModelForImageTextToText
    models, out = Path(__file__).resolve().parent / "classroom/models", Path(out)
    places = [models / "base0"] if model == "classroom" else [Path(model), models / model]
    source = next((place for place in places if place.is_dir()), None)
    if source is None or out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"--model {model} must be a folder, and --out {out} an empty or a new one.")
    try:
        merged = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        load(merged, adapter)
        merge(merged)
    except (OSError, ValueError) as e:
        raise AdapterError(f"{model} cannot be merged into {out}: {e}") from e
    write_folder(merged, source, out)


def write_folder(model, source, out, weights=None):
    """A folder that transformers alone loads, whole or not at all: `model`, the rest as it is in `source`.

    weights: {name: tensor} in the place of what other ranks hold a part of.
    """
    temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")
    state = {name: x if weights is None or name not in weights else weights[name].to(model.dtype)
             for name, x in model.state_dict().items()}
    try:
        model.save_pretrained(temporary, max_shard_size=SHARD, state_dict=state)
        kept = [f for f in source.iterdir() if f.suffix in (".json", ".jinja", ".model", ".txt")]
        for file in kept:
            if not file.name.endswith(".index.json") and not (temporary / file.name).exists():
                shutil.copyfile(file, temporary / file.name)
        os.replace(temporary, out)
    except (OSError, ValueError) as e:
        raise AdapterError(f"{out} cannot hold the model ({e}): make room there.") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.error = lambda message: sys.exit(f"lora.py: {message}.")
    parser.add_argument("command", choices=["merge"])
    parser.add_argument("--model", required=True, help="a llava-hf folder, or: classroom")
    parser.add_argument("--adapter", required=True, help="adapter_model.safetensors and adapter_config.json")
    parser.add_argument("--out", required=True, help="a new folder")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    args = parser.parse_args()
    try:
        merge_folder(args.model, args.adapter, args.out, args.dtype)
    except AdapterError as e:
        sys.exit(f"lora.py: {e}")


if __name__ == "__main__":
    main()
