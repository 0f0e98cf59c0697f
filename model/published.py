"""For import_checkpoint.py, what lies beside a published folder's weights: its tokenizer, and LLaVA's LoRA.

    tokenizer_of(folder, "llava", config)     transformers' tokenizer, with <image> added
    base_of(folder, given)                    the folder that a LoRA is added to
    deltas(folder, unpickle)                  {published name of a weight: the two factors of what is added}

LLaVA's scripts write a LoRA as PEFT's adapter on the original classes' names, beside it what was trained
whole (the projector) as non_lora_trainables.bin, and the whole model's config.json.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of the import; run: python model/import_checkpoint.py --help"))

import importlib.util
import json
from pathlib import Path

import data
from model import llava

ADAPTER, WHOLE = "adapter_config.json", "non_lora_trainables.bin"
PEFT = "base_model.model."                             # before the names of all that was trained


# -------------------------------------------------------------------------------- the tokenizer
def read_tokenizer(folder, kind, **options):
    """The tokenizer of a published folder, of transformers' class `kind`. Raises UserError."""
    packages = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    alone = (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists()
    if alone:
        if lack := [name for name, module in packages.items() if not installed(module)]:
            raise data.UserError(f"{folder} has its tokenizer as a tokenizer.model, which needs "
                                 f"{' and '.join(lack)}: `pip install {' '.join(lack)}`")
    tokenizer = data.from_folder(kind, folder, "tokenizer", "copy its files", **options)
    return merges_by_score(tokenizer, folder / "tokenizer.model") if alone else tokenizer


def merges_by_score(tokenizer, file):
    """SentencePiece merges by score, transformers 5.23 by id: double spaces would be other tokens."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    pieces, about = SentencePieceProcessor(str(file)), json.loads(tokenizer.backend_tokenizer.to_str())
    if about["model"]["type"] == "BPE":
        about["model"]["merges"].sort(key=lambda pair: -pieces.get_score(pieces.piece_to_id("".join(pair))))
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(about))
    return tokenizer


def installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:                      # the package that the module is in
        return False


def tokenizer_of(src, kind, config):
    """The source's tokenizer with <image> added. Raises UserError."""
    from transformers import CodeGenTokenizer, LlamaTokenizer
    if kind == "llava":
        # Without `legacy` the space piece between <image> and the newline, which LLaVA's code has, is lost.
        tokenizer = read_tokenizer(src, LlamaTokenizer, legacy=True, add_bos_token=True)
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer = read_tokenizer(src, CodeGenTokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    for name in ("bos_token_id", "eos_token_id"):
        if config.get(name) is not None and getattr(tokenizer, name) != config[name]:
            raise data.UserError(f"{src}: the tokenizer's {name} is {getattr(tokenizer, name)}, "
                                 f"config.json's {config[name]}: one of the two is not this model's")
    if len(tokenizer) > config["vocab_size"]:
        raise data.UserError(f"{src}: the tokenizer has {len(tokenizer)} tokens, config.json's vocab_size is "
                             f"{config['vocab_size']}: one of the two is not this model's")
    tokenizer.add_special_tokens({"additional_special_tokens": [llava.IMAGE]})
    tokenizer.padding_side = "left"                    # for generation; vlm.py pads by itself
    return tokenizer


# -------------------------------------------------------------------------------- a LoRA
def base_of(src, given=None):
    """The folder of the model under a LoRA, `given` or as the adapter says; src itself if it is no LoRA."""
    path = src / ADAPTER
    if not path.exists():
        if given:
            raise data.UserError(f"{src} is no LoRA, it has no {ADAPTER}: leave out --base")
        return src
    named = data.read_json(path, check=data.as_record).get("base_model_name_or_path")
    base = Path(given or str(named))
    if not base.is_dir():
        raise data.UserError(f"{src} is a LoRA on {named}, and {base} is no folder here: give --base DIR, "
                             "that model's folder as published")
    return base


def deltas(src, unpickle):
    """{published name of a weight: (A (in, r), B (r, out)), the transpose of whose product is to be added to
    it} of a LoRA, in float32; {} if src is none. unpickle: a function file -> tensors."""
    import lora
    if not (src / ADAPTER).exists():
        return {}
    file, found = src / "adapter_model.bin", {}
    pickled = file.exists() and not file.with_suffix(".safetensors").exists()
    config, tensors = lora.read_adapter(src, unpickle(file) if pickled else None)
    for name, r, alpha, A, B in lora.matrices(config, tensors):
        if A.shape[1:] != (r,) or B.shape[:1] != (r,):
            raise data.UserError(f"{src} has {name} of rank {r}, A {tuple(A.shape)}, B {tuple(B.shape)}: "
                                 "this is no plain LoRA, let PEFT merge it")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise data.UserError(f"{src}: what it adds to {name} is not finite: train it again")
        found[f"{name}.weight"] = A.float(), B.float() * (alpha / r)
    return found
