"""Turn an original LLaVA-1.5 or Bunny-v1.0-3B checkpoint, as published, into a llava-hf folder, once.

    python -m model.import_checkpoint llava-v1.5-7b  llava-7b --vision_tower clip-vit-large-patch14-336
    python -m model.import_checkpoint Bunny-v1_0-3B  bunny-3b        (its SigLIP tower lies in the checkpoint)
    python -m model.import_checkpoint llava-v1.5-7b-lora  DST --base vicuna-7b-v1.5 --vision_tower ...

DST holds what transformers alone needs (LlavaForConditionalGeneration, LlavaProcessor), and no code of
others: nothing in SRC is executed, pickles are read with weights_only. Weights are copied a gigabyte at a
time. DST appears whole or not at all.
SRC may be a LoRA as LLaVA's and Bunny's scripts write it: adapter_config.json, adapter_model.safetensors or
.bin, non_lora_trainables.bin, config.json. It is merged in float32 into the weights of --base.

--vision_tower: the folder of CLIP or SigLIP, needed if the checkpoint leaves the tower out (LLaVA-1.5);
for a tower of unpublished size its config.json alone, since the number of heads is in no weight.

Differences from the published folders:
 1. `<image>` becomes a token behind the vocabulary: a row of zeros in the embedding and in lm_head. It is
    never predicted (generation_config's suppress_tokens), and vlm.py leaves it out of the softmax.
 2. A tower published in another type than the language model (CLIP: float32) is cast to that one's.
 3. SigLIP's last layer is dropped, as Bunny's code does: features are the output of the one before, unnormed.
"""
import json
import re
import shutil
import sys
from math import isqrt, prod
from pathlib import Path
from typing import Any, NamedTuple

import data
from model import command, front, llava

SHARD = 1 << 30                                        # bytes of an output file, at most (or one tensor)
TYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
ADAPTER, WHOLE = "adapter_config.json", "non_lora_trainables.bin"
PEFT = "base_model.model."                             # before the names of all that was trained
# Key maps, first match first; None drops a buffer that old files carry, or what the model has no place for.
COMMON = [(r"(\.rotary_emb\.inv_freq|\.position_ids)$", None),
          (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
          (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
          (r"^(?:model\.vision_tower\.vision_tower\.)?vision_model\.head\.", None),        # SigLIP's pooling
          (r"^(?:model\.vision_tower\.vision_tower\.)?vision_model\.", "model.vision_tower."),
          (r"^lm_head\.", "lm_head."), (r"^model\.(?!vision_tower)", "model.language_model.")]


class Weight(NamedTuple):
    """A tensor that is mapped from a file."""
    file: Path
    name: str                  # there
    tensor: Any
    delta: tuple = ()          # a LoRA's A (in, r) and scaled B (r, out)

    @property
    def shape(self):
        return tuple(self.tensor.shape)


# -------------------------------------------------------------------------------- the source
def shards(folder):
    """The weights files of a published folder. Raises UserError if one that the index names is missing."""
    for index, single in (("model.safetensors.index.json", "model.safetensors"),
                          ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        names = sorted(set(data.read_json(folder / index, {}).get("weight_map", {}).values()))
        names = names or ([single] if (folder / single).exists() else [])
        if lack := [n for n in names if not (folder / n).is_file()]:
            raise data.UserError(f"{folder}: {index} names {len(lack)} files that are not there, {lack[0]} "
                                 "first: download the rest")
        if names:
            return [folder / n for n in names]
    raise data.UserError(f"{folder} holds no weights, model*.safetensors or pytorch_model*.bin: get them")


def mapped(file):
    """{name: tensor} of a file of safetensors or a pickle, nothing of which is executed. Raises UserError."""
    import torch
    from safetensors.torch import load_file
    with command.explained(f"{file} is torn or no weights file, or holds more than tensors and is not opened",
                           "download it again, or its safetensors"):
        if file.suffix == ".safetensors":
            return load_file(file)
        try:
            found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap" not in str(error):               # torch's format before 1.6 cannot be mapped
                raise
            found = torch.load(file, map_location="cpu", weights_only=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in found.values()):
            raise ValueError("not tensors alone")
        return found


def place(name):
    """The name in DST of a published one; None where it has no place there, "" of one that is not known."""
    name = name.removeprefix(PEFT)
    for pattern, new in COMMON:
        if re.search(pattern, name):
            return new and re.sub(pattern, new, name)
    return ""


def collect(files, keep=lambda name: True):
    """{name in DST: Weight} of the source's files."""
    found = {}
    there = [Weight(file, name, tensor) for file in files for name, tensor in mapped(file).items()]
    for weight in [weight for weight in there if keep(weight.name)]:
        name = place(weight.name)
        if name == "":
            raise data.UserError(f"{weight.file}: {weight.name} belongs to no LLaVA-1.5 or Bunny: it is "
                                 "another model, or a checkpoint in the middle of training")
        if name:
            if str(weight.tensor.dtype) not in TYPES:
                raise data.UserError(f"{weight.file}: {weight.name} is {weight.tensor.dtype}: a quantised "
                                     "checkpoint cannot be imported, take the one in float16 or bfloat16")
            found[name] = weight
    return found


# -------------------------------------------------------------------------------- what it is
def family(src):
    """(config.json, "llava" or "bunny") of an original checkpoint. Raises UserError for anything else."""
    config = data.read_json(src / "config.json", {})
    if not config or not isinstance(config, dict):
        raise data.UserError(f"{src}/config.json is missing or empty, or not a JSON object: get all of it")
    if isinstance(config.get("text_config"), dict):
        raise data.UserError(f"{src} is a transformers folder already: give it to --model as it is")
    if "mm_vision_tower" not in config:
        raise data.UserError(f"{src} is a text-only model ({config.get('model_type')}), it has no vision "
                             "tower: give the folder of LLaVA-1.5 or Bunny itself, not of its language model")
    kind = {"llava": "llava", "llava_llama": "llava", "bunny-phi": "bunny"}.get(config.get("model_type"))
    tests = {"model_type": kind is None, "mm_projector_type": config.get("mm_projector_type") != "mlp2x_gelu",
             "mm_use_im_start_end": bool(config.get("mm_use_im_start_end")),
             "mm_patch_merge_type": config.get("mm_patch_merge_type", "flat") != "flat",
             "image_aspect_ratio": config.get("image_aspect_ratio", "pad") != "pad"}
    if odd := [f"{k} {config.get(k)!r}" for k, wrong in tests.items() if wrong]:
        raise data.UserError(f"{src}/config.json has {', '.join(odd)}: only LLaVA-1.5 and Bunny-v1.0-3B can "
                             "be imported (LLaVA-1.6: take its llava-hf folder)")
    return config, kind


def vision_config(kind, tower, found):
    """The tower's config, from its folder if there is one, else from shapes and the published model."""
    from transformers import CLIPVisionConfig, SiglipVisionConfig
    given = data.read_json(tower / "config.json", {}) if tower else {}
    given = given.get("vision_config", given) or {}
    patches = found.get("model.vision_tower.embeddings.patch_embedding.weight")
    places = found.get("model.vision_tower.embeddings.position_embedding.weight")
    fc1 = found.get("model.vision_tower.encoder.layers.0.mlp.fc1.weight")
    if not (patches and places and fc1):
        raise data.UserError("the checkpoint holds no vision tower: give --vision_tower DIR, the folder of "
                             + {"llava": "openai/clip-vit-large-patch14-336",
                                "bunny": "google/siglip-so400m-patch14-384"}[kind])
    hidden, _, patch, _ = patches.shape
    heads = given.get("num_attention_heads") or {("llava", 1024): 16, ("bunny", 1152): 16}.get((kind, hidden))
    if not heads:
        raise data.UserError(f"a vision tower of width {hidden} is not the published one, and its number of "
                             "heads is in no weight: give --vision_tower DIR with its config.json")
    clip = kind == "llava"
    layers = given.get("num_hidden_layers", 24 if clip else 27) - (not clip)                     # Departure 3
    sizes = dict(hidden_size=hidden, intermediate_size=fc1.shape[0], num_attention_heads=heads,
                 patch_size=patch, num_hidden_layers=layers, image_size=isqrt(places.shape[0] - clip) * patch)
    if odd := [f"{k} {given[k]}, not {v}" for k, v in sizes.items()
               if k in given and given[k] != v + (k == "num_hidden_layers" and not clip)
               and k != "image_size"]:
        raise data.UserError(f"{tower}/config.json has {'; '.join(odd)} as the weights: it is another's")
    # image_size 384 with patches of 14 leaves 6 pixels over: the grid of places alone would say 378
    size = given.get("image_size", {27: 384}.get(isqrt(places.shape[0]), sizes["image_size"]))
    if isqrt(places.shape[0] - clip) != size // patch:
        raise data.UserError(f"the tower's places are for {sizes['image_size']} pixels, its config.json says "
                             f"{size}: it is another tower's")
    sizes["image_size"] = size
    own = {k: given[k] for k in ("hidden_act", "layer_norm_eps") if k in given}
    if clip:
        return CLIPVisionConfig(**sizes, **own)
    return SiglipVisionConfig(**sizes, **own, vision_use_head=False)


def llava_config(src, config, kind, vision, image_id, rows):
    """transformers' config of the folder to write; what the json leaves out is as in the published model."""
    from transformers import LlamaConfig, LlavaConfig, PhiConfig
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "hidden_act", "max_position_embeddings", "rope_theta", "rope_scaling",
             "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "rms_norm_eps",
             "attention_bias", "head_dim", "layer_norm_eps", "partial_rotary_factor", "qk_layernorm",
             "resid_pdrop", "embd_pdrop", "attention_dropout", "initializer_range")
    defaults = {"llava": {"rms_norm_eps": 1e-5}, "bunny": {"partial_rotary_factor": 0.4}}[kind]
    own = defaults | {k: config[k] for k in names if config.get(k) is not None}
    layer = config.get("mm_vision_select_layer", -2)
    if kind == "llava" and (layer, config.get("mm_vision_select_feature", "patch")) != (-2, "patch"):
        raise data.UserError(f"{src}/config.json selects vision layer {layer}, "
                             f"{config.get('mm_vision_select_feature')}: only LLaVA-1.5's -2, patch can be")
    text = {"llava": LlamaConfig, "bunny": PhiConfig}[kind](**own, vocab_size=rows)
    tokens = (vision.image_size // vision.patch_size) ** 2
    how = ({"vision_feature_layer": -2, "vision_feature_select_strategy": "default"} if kind == "llava" else
           {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"})
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id,
                       image_seq_length=tokens, projector_hidden_act="gelu",
                       tie_word_embeddings=bool(config.get("tie_word_embeddings")),
                       architectures=["LlavaForConditionalGeneration"], **how)


def expected(config):
    """{name: shape} of what transformers' model of a config holds."""
    import torch
    from transformers import LlavaForConditionalGeneration
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    return {n: tuple(p.shape) for n, p in model.named_parameters() if n not in tied}


# -------------------------------------------------------------------------------- the tokenizer
def read_tokenizer(folder, kind, **options):
    """The tokenizer of a published folder, of transformers' class `kind`. Raises UserError."""
    file = folder / "tokenizer.model"
    if not file.exists() or (folder / "tokenizer.json").exists():
        return data.from_folder(kind, folder, "tokenizer", "copy its files", **options)
    try:
        import google.protobuf  # noqa: F401
        from sentencepiece import SentencePieceProcessor
        from tokenizers import Tokenizer
    except ImportError as error:
        raise data.UserError(f"{folder} has its tokenizer as a tokenizer.model ({error}): `pip install "
                             "sentencepiece protobuf`") from None
    tokenizer = data.from_folder(kind, folder, "tokenizer", "copy its files", **options)

    # SentencePiece merges by score, transformers 5.23 by id: double spaces would be other tokens.
    pieces, about = SentencePieceProcessor(str(file)), json.loads(tokenizer.backend_tokenizer.to_str())
    if about["model"]["type"] == "BPE":
        about["model"]["merges"].sort(key=lambda pair: -pieces.get_score(pieces.piece_to_id("".join(pair))))
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(about))
    return tokenizer


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


def deltas(src):
    """{published name of a weight: (A (in, r), B (r, out)), the transpose of whose product is to be added to
    it} of a LoRA, in float32; {} if src is none."""
    import lora
    if not (src / ADAPTER).exists():
        return {}
    file, found = src / "adapter_model.bin", {}
    pickled = file.exists() and not file.with_suffix(".safetensors").exists()
    config, tensors = lora.read_adapter(src, mapped(file) if pickled else None)
    for name, r, alpha, A, B in lora.matrices(config, tensors):
        if A.shape[1:] != (r,) or B.shape[:1] != (r,):
            raise data.UserError(f"{src} has {name} of rank {r}, A {tuple(A.shape)}, B {tuple(B.shape)}: "
                                 "this is no plain LoRA, let PEFT merge it")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise data.UserError(f"{src}: what it adds to {name} is not finite: train it again")
        found[f"{name}.weight"] = A.float(), B.float() * (alpha / r)
    return found


# -------------------------------------------------------------------------------- the copy
class Plan(NamedTuple):
    """All that will be written, checked before the first byte."""
    config: Any
    tokenizer: Any
    kind: str
    tensors: dict              # {name in DST: Weight}
    shapes: dict               # {name in DST: shape}; a row more than the Weight's: zeros


def plan(src, tower=None, base=None):
    """Read headers, config and tokenizer of the source, and hold them against transformers' model."""
    config, kind = family(src)
    base = base_of(src, base)
    tokenizer = tokenizer_of(base, kind, config)
    found = collect(shards(base))
    if base != src:
        found |= collect(filter(Path.exists, [src / WHOLE]))
    if tower and shards_there(tower) and not any(n.startswith("model.vision_tower.") for n in found):
        found |= collect(shards(tower), lambda name: name.startswith("vision_model."))
    vision = vision_config(kind, tower, found)
    if kind == "bunny":                                # Departure 3
        extra = re.compile(rf"model\.vision_tower\.encoder\.layers\.{vision.num_hidden_layers}\.")
        found = {n: w for n, w in found.items() if not extra.match(n)}
    image_id = tokenizer.convert_tokens_to_ids(llava.IMAGE)
    rows = max(config["vocab_size"], image_id + 1)
    new = llava_config(src, config, kind, vision, image_id, rows)
    shapes = expected(new)
    grown = {n for n in ("model.language_model.embed_tokens.weight", "lm_head.weight") if n in shapes}
    for n in grown & set(found):
        if found[n].shape[0] != config["vocab_size"]:
            raise data.UserError(f"{src}: {found[n].name} has {found[n].shape[0]} rows, config.json's "
                                 f"vocab_size is {config['vocab_size']}: one of the two is not this model's")
    wanted = {n: (config["vocab_size"], *s[1:]) if n in grown else s for n, s in shapes.items()}
    if lack := sorted(set(wanted) - set(found)):
        raise data.UserError(f"{src}: {len(lack)} weights are missing, {lack[0]} first: download it again")
    if more := sorted(set(found) - set(wanted)):
        raise data.UserError(f"{src}: {len(more)} weights have no place in the model, {found[more[0]].name} "
                             "first: config.json is not this checkpoint's")
    if odd := [n for n in wanted if found[n].shape != wanted[n]]:
        raise data.UserError(f"{src}: {found[odd[0]].name} is {found[odd[0]].shape}, by config.json it is "
                             f"{wanted[odd[0]]}: one of the two is not this model's")
    for name, (A, B) in deltas(src).items():
        at = place(name)
        if at not in found or found[at].shape != (B.shape[1], len(A)):
            raise data.UserError(f"{src} adapts {name} of {B.shape[1]} x {len(A)}, which {base} lacks or "
                                 "has in another shape: give the --base that it was trained on")
        found[at] = found[at]._replace(delta=(A, B))
    new.dtype = found["model.language_model.embed_tokens.weight"].tensor.dtype
    return Plan(new, tokenizer, kind, found, shapes)


def shards_there(folder):
    return any(any(folder.glob(f"*{suffix}")) for suffix in (".safetensors", ".bin"))


def write_weights(todo, dst, report=print):
    """The plan's tensors as safetensors of at most SHARD bytes with an index, a file in memory at a time."""
    from safetensors.torch import save_file
    groups, total = [[]], 0
    sizes = {n: todo.config.dtype.itemsize * prod(todo.shapes[n]) for n in todo.tensors}
    for name, size in sizes.items():
        if total + size > SHARD and groups[-1]:
            groups, total = [*groups, []], 0
        groups[-1].append(name)
        total += size
    files = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    files = files if len(files) > 1 else ["model.safetensors"]
    for file, names in zip(files, groups, strict=True):
        report(f"{file}: {sum(sizes[n] for n in names) / 2**30:.2f} GiB")
        tensors = {n: content(todo.tensors[n], todo.shapes[n], todo.config.dtype) for n in names}
        with command.explained(f"{dst / file} could not be written", "free space"):
            save_file(tensors, dst / file, {"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())},
                 "weight_map": {n: file for file, names in zip(files, groups, strict=True) for n in names}}
        (dst / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def content(weight, shape, dtype):
    """A tensor as it is written: merged, of a type, a row longer. Raises UserError if it is not finite."""
    import torch
    tensor = weight.tensor
    if weight.delta:
        A, B = weight.delta
        tensor = tensor.to(torch.promote_types(tensor.dtype, A.dtype)) + (A @ B).T
    tensor = tensor.to(dtype)
    if not tensor.isfinite().all():
        raise data.UserError(f"{weight.file}: {weight.name} is not finite: download it again")
    if added := shape[0] - len(tensor):                # <image>'s row of zeros
        tensor = torch.cat([tensor, tensor.new_zeros(added, *shape[1:])])
    return tensor.contiguous()


def write_rest(todo, dst, config):
    """config.json, generation_config.json, tokenizer, template and image processor."""
    from transformers import GenerationConfig, LlavaImageProcessorPil, LlavaProcessor
    image_id, side = todo.config.image_token_id, todo.config.vision_config.image_size
    todo.config.save_pretrained(dst)
    GenerationConfig(bos_token_id=config.get("bos_token_id"), eos_token_id=todo.tokenizer.eos_token_id,
                     pad_token_id=todo.tokenizer.pad_token_id,
                     suppress_tokens=[image_id]).save_pretrained(dst)
    half = {} if todo.kind == "llava" else {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    square = {"height": side, "width": side}
    pictures = LlavaImageProcessorPil(do_pad=True, size=square, crop_size=square, do_center_crop=False,
                                      **half)
    LlavaProcessor(pictures, todo.tokenizer, patch_size=todo.config.vision_config.patch_size,
                   vision_feature_select_strategy=todo.config.vision_feature_select_strategy,
                   num_additional_image_tokens=int(todo.kind == "llava"),
                   chat_template=llava.TEMPLATES["vicuna"]).save_pretrained(dst)
    if todo.kind == "llava":                           # transformers does not keep it, and reads it again
        path = dst / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "legacy": True}, indent=1))


def run(src, dst, tower=None, report=print, base=None):
    """Write DST, whole or not at all. Raises UserError."""
    src, dst, tower = Path(src), Path(dst), Path(tower) if tower else None
    for folder in (src, tower):
        if folder and not folder.is_dir():
            raise data.UserError(f"{folder}: no such folder")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise data.UserError(f"{dst} exists and is not empty: give a new folder")
    with command.explained(f"{src} cannot be read as a checkpoint", "download it again"):
        todo = plan(src, tower, base)
    unfinished = data.temporary(dst)                   # removes what a run that was killed has left
    try:
        unfinished.mkdir(parents=True)
        write_rest(todo, unfinished, data.read_json(src / "config.json", {}))
        write_weights(todo, unfinished, report)
        unfinished.replace(dst)
    except OSError as e:
        raise data.UserError(f"{dst} could not be written ({e.strerror or e}): free space") from e
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return todo


# -------------------------------------------------------------------------------- what came of it
def describe(folder):
    """Lines that say what a model's folder is, by its files, and what is torn or missing."""
    import lora
    folder = lora.model_folder(folder)
    config = front.read_config(folder)
    found, lines, faults = [], [], []
    attempt(faults, shards, folder)
    for file in sorted(folder.glob("*.safetensors")):
        found += (attempt(faults, mapped, file) or {}).values()
    own = attempt(faults, front.open_folder, folder)
    if own:
        text = own.render(own.messages("QUESTION", 1), add_generation_prompt=True)
        size, tokens = config["vision_config"].get("image_size", "640 x 480"), own.image_ids((640, 480))
        lines = [f"image           {size} pixels, {len(tokens)} tokens; {own.preparation}",
                 f"template        {own.template_name}: {text!r}"]
    parts = [(config.get(name) or {}).get("model_type") for name in ("vision_config", "text_config")]
    types = ", ".join(sorted({TYPES.get(str(x.dtype), "others") for x in found})) or "no file"
    return [f"folder          {folder}",
            f"model           {config['model_type']}: {' + '.join(map(str, filter(None, parts)))}",
            f"parameters      {sum(x.numel() for x in found):,} in {types}",
            *lines,
            f"missing         {'; '.join(faults) or 'nothing'}"]


def attempt(faults, work, *arguments):
    """The result of work, or None if it raises an error, whose text joins the faults."""
    try:
        with command.explained(arguments[0], "copy it again"):
            return work(*arguments)
    except data.UserError as e:
        faults.append(str(e))


def main():
    parser = data.Parser(prog="import_checkpoint.py", description=__doc__.split("\n")[0])
    parser.add_argument("src", help="the published folder: liuhaotian/llava-v1.5-7b, BAAI/Bunny-v1_0-3B, "
                                   "or of a LoRA on one")
    parser.add_argument("dst", help="the new folder")
    parser.add_argument("--vision_tower", help="for LLaVA-1.5 openai/clip-vit-large-patch14-336")
    parser.add_argument("--base", help="of a LoRA: the published folder of the language model (Vicuna, "
                                       "phi-2), LLaVA or Bunny that it is for [the one its adapter names]")
    args = parser.parse_args()
    try:
        run(args.src, args.dst, args.vision_tower, base=args.base)
        print("\n".join(describe(args.dst)))
    except (data.UserError, OSError) as e:
        sys.exit(f"import_checkpoint.py: {e}")


if __name__ == "__main__":
    main()
