"""Train a paper's run at full size on random weights, without a download.

    python tests/rehearse.py mdpo-bunny        14 GB of memory, 13 GB of disk
    python tests/rehearse.py mdpo-llava        7B: a GPU or 64 GB; 40 GB of disk
    python tests/rehearse.py pds-llava         the same
    python tests/rehearse.py smolvlm-256m      8 GB of memory, 1 GB of disk; two minutes on two idle cores
    python tests/rehearse.py qwen2.5-vl-3b     18 GB of memory, 9 GB of disk; ten minutes on two idle cores

Writes a random checkpoint with the published shapes, key names, types and shards, as the original is
published; takes it through model/import_checkpoint.py and train_dpo.py for 2 steps on two of the ten real
pairs (or, where ../shared is absent, on two pairs of its own). What transformers itself writes needs no
import. write_original() with other sizes makes the tests' checkpoints.
"""
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]
import data  # noqa: E402

SHARED = Path(os.environ.get("NANOVPO_SHARED", ROOT.parent / "shared"))

# The fields of the published config.json files that say a size or a switch, and the towers' own.
SETTINGS = {
    "bunny": {"model_type": "bunny-phi", "architectures": ["BunnyPhiForCausalLM"], "hidden_act": "gelu_new",
              "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.4, "rope_theta": 10000.0,
              "rope_scaling": None, "qk_layernorm": False, "resid_pdrop": 0.1, "embd_pdrop": 0.0,
              "attention_dropout": 0.0,
              "tie_word_embeddings": False, "image_aspect_ratio": "pad", "mm_projector_type": "mlp2x_gelu",
              "mm_vision_tower": "google/siglip-so400m-patch14-384", "max_position_embeddings": 2048},
    "llava": {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "hidden_act": "silu",
              "rms_norm_eps": 1e-5, "rope_scaling": None, "tie_word_embeddings": False,
              "image_aspect_ratio": "pad", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
              "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
              "mm_use_im_patch_token": False, "pretraining_tp": 1,
              "mm_vision_tower": "openai/clip-vit-large-patch14-336", "max_position_embeddings": 4096}}


def sizes(text, vision):
    """The numbers that make a size: (hidden, intermediate, layers, heads, ...), of text and vision."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {"text": dict(zip((*names, "num_key_value_heads", "vocab_size", "bos_token_id", "eos_token_id",
                              "pad_token_id"), text, strict=True)),
            "vision": dict(zip((*names, "image_size", "patch_size"), vision, strict=True))}


PUBLISHED = {"bunny": sizes((2560, 10240, 32, 32, 32, 50295, 50256, 50256, 50256),
                            (1152, 4304, 27, 16, 384, 14)),
             "llava": sizes((4096, 11008, 32, 32, 32, 32000, 1, 2, 0), (1024, 4096, 24, 16, 336, 14))}
TINY = {"bunny": sizes((40, 48, 2, 4, 4, 270, 256, 256, 256), (24, 40, 3, 4, 30, 14)),
        "llava": sizes((32, 48, 2, 4, 2, 400, 1, 2, 0), (24, 40, 3, 4, 28, 14))}


def write_smolvlm(folder, text, tiny=False):
    """SmolVLM-256M-Instruct as published: SigLIP-base of 512 pixels, SmolLM2-135M, at most 17 tiles.

    The tokenizer has the words of a text, so that it makes as many tokens of it as a real one.
    """
    import families
    folder.mkdir(parents=True)
    if tiny:
        families.idefics3(folder)
        return
    merges = [*families.NEWLINES, *learnt_merges(text)]
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49280, "max_position_embeddings": 8192,
             "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
              "num_attention_heads": 12, "patch_size": 16}
    families.idefics(folder, "Idefics3", sizes, vision, tile=512, longest=2048, scale=4, std=0.02,
                     merges=merges)


def write_qwen(folder, text, tiny=False):
    """Qwen2.5-VL-3B-Instruct as published, in bfloat16; the tokenizer as in write_smolvlm."""
    import families
    import qwen3b
    folder.mkdir(parents=True)
    if tiny:
        families.qwen2_5_vl(folder)
        return
    families.qwen(folder, "Qwen2_5_VL", families.QWEN2, text=qwen3b.TEXT, vision=qwen3b.TOWER, blocks=16384,
                  std=0.02, merges=learnt_merges(text), dtype=torch.bfloat16)


def learnt_merges(text):
    """Byte-level BPE's merges, of a text small enough for each word to be a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    core, bytes = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = bytes
    core.train_from_iterator([text], trainers.BpeTrainer(vocab_size=5000, show_progress=False,
                                                         initial_alphabet=bytes.alphabet()))
    return [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]


def byte_level_bpe(folder, size, end):
    """vocab.json and merges.txt of GPT-2's kind: bytes, fillers, and the token `end` at its id."""
    from tokenizers.pre_tokenizers import ByteLevel
    words = sorted(ByteLevel.alphabet())
    words += [f"filler{i}" for i in range(len(words), end)] + ["<|endoftext|>"]
    words += [f"filler{i}" for i in range(len(words), size)]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def sentencepiece_model(folder, size):
    """tokenizer.model of Llama's kind: control tokens, bytes, letters with and without a space, fillers."""
    from sentencepiece import sentencepiece_model_pb2 as format
    letters = [chr(i) for i in range(33, 127)]
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256)), ("▁", 1),
              *((letter, 1) for letter in letters), *((f"▁{letter}", 1) for letter in letters)]
    pieces = pieces[:size] + [(f"filler{i}", 1) for i in range(len(pieces), size)]
    model = format.ModelProto()
    for i, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(i), type=kind)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True                    # BPE
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 0, 1, 2
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = True, False
    model.normalizer_spec.name, model.normalizer_spec.escape_whitespaces = "identity", True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def original_name(name):
    """The published key of a weight of transformers' class."""
    for pattern, old in ((r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
                         (r"^model\.multi_modal_projector\.linear_1", "model.mm_projector.0"),
                         (r"^model\.multi_modal_projector\.linear_2", "model.mm_projector.2"),
                         (r"^model\.language_model\.", "model.")):
        if re.match(pattern, name):
            return re.sub(pattern, old, name)
    return name


def write_original(kind, folder, sizes=None, dtype=torch.bfloat16, shard=2 << 30, pickled=None, scale=0.02,
                   seed=0):
    """A random checkpoint as `kind` is published, shard by shard; returns (folder, tower folder or None)."""
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    from model import import_checkpoint
    sizes, folder = sizes or PUBLISHED[kind], Path(folder)
    pickled = kind == "llava" if pickled is None else pickled
    folder.mkdir(parents=True, exist_ok=True)
    config = {**SETTINGS[kind], **sizes["text"], "mm_hidden_size": sizes["vision"]["hidden_size"],
              "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    vision = CLIPVisionConfig(**sizes["vision"])
    if kind == "bunny":
        byte_level_bpe(folder, sizes["text"]["vocab_size"], sizes["text"]["eos_token_id"])
        vision = SiglipVisionConfig(**sizes["vision"], vision_use_head=False)
        vision.num_hidden_layers -= 1                  # as published: the last layer was dropped
    else:
        sentencepiece_model(folder, sizes["text"]["vocab_size"])
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer",
                                                                  "legacy": False, "add_bos_token": True}))
    new = import_checkpoint.llava_config(folder, config, kind, vision, 0, sizes["text"]["vocab_size"])
    shapes = {original_name(n): s for n, s in import_checkpoint.expected(new).items()}
    tower = None
    if kind == "llava":                                # CLIP is published apart, in float32
        tower, stem = folder / "clip", "model.vision_tower.vision_tower."
        tower.mkdir(exist_ok=True)
        own = {n.removeprefix(stem): shapes.pop(n) for n in list(shapes) if n.startswith(stem)}
        _write(tower, {**own, "logit_scale": ()}, torch.float32, shard, pickled, scale, seed + 1)
        about = {"model_type": "clip", "vision_config": sizes["vision"]}
        (tower / "config.json").write_text(json.dumps(about))
    elif sizes is not PUBLISHED[kind]:                 # another tower's number of heads is in no weight
        tower = folder / "siglip"
        tower.mkdir(exist_ok=True)
        (tower / "config.json").write_text(json.dumps(sizes["vision"]))
    _write(folder, shapes, dtype, shard, pickled, scale, seed)
    return folder, tower


def _write(folder, shapes, dtype, shard, pickled, scale, seed):
    """Random weights under their names, in shards of at most `shard` bytes with an index."""
    from safetensors.torch import save_file
    groups, room = [[]], shard
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = shard
        groups[-1].append(name)
        room -= size
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    files = [f"{stem}-{i + 1:05}-of-{len(groups):05}.{suffix}" for i in range(len(groups))]
    files = files if len(files) > 1 else [f"{stem}.{suffix}"]
    draw = torch.Generator().manual_seed(seed)
    for file, names in zip(files, groups, strict=True):
        tensors = {n: torch.empty(shapes[n], dtype=dtype).normal_(0, scale, generator=draw) for n in names}
        for n, t in tensors.items():
            if re.search(r"norm\d?\.weight$|layrnorm\.weight$", n):
                t += 1
        torch.save(tensors, folder / file) if pickled else save_file(tensors, folder / file, {"format": "pt"})
        print(f"{folder.name}/{file}: {(folder / file).stat().st_size / 2**30:.2f} GiB", file=sys.stderr)
    if len(files) > 1:
        where = {n: file for file, names in zip(files, groups, strict=True) for n in names}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def two_pairs(folder):
    """Two of the ten real pairs, or two of noise: returns the file for --data."""
    real = SHARED / "real" / "pds10"
    if (real / "step3_sanity.json").exists():
        pairs = json.loads((real / "step3_sanity.json").read_text())
        pairs = [p for p in pairs if p["rejected_conversations"][-1]["value"].strip()][:2]    # two are empty
        for pair in pairs:
            (folder / pair["image"]).parent.mkdir(exist_ok=True)
            shutil.copy(real / pair["image"], folder / pair["image"])
        (folder / "pairs.json").write_text(json.dumps(pairs))
        return folder / "pairs.json"
    from conftest import picture
    for i in range(2):
        picture(i, (640, 480)).save(folder / f"{i}.png")
    lines = [{"id": str(i), "image": f"{i}.png", "question": "What is this?", "chosen": "Noise. " * 40,
              "rejected": "A picture of a cat. " * 12} for i in range(2)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "pairs.jsonl"


def rehearse(preset, folder, steps=2, sizes=None, options=()):
    """Write and import, where that is not done yet, and train; returns the lines of log.jsonl."""
    from model import import_checkpoint
    kind = preset.partition("-")[2]
    if preset in WRITTEN and not (folder / "imported").exists():
        WRITTEN[preset](folder / "imported", two_pairs(folder).read_text(), tiny=bool(sizes))
    if not (folder / "imported").exists():
        original, tower = write_original(kind, folder / "original", sizes,
                                         torch.float16 if kind == "llava" else torch.bfloat16)
        import_checkpoint.run(original, folder / "imported", tower, lambda line: print(line, file=sys.stderr))
        shutil.rmtree(original)
    subprocess.run([sys.executable, ROOT / "train_dpo.py", "--preset", preset, "--model", folder / "imported",
                    "--data", two_pairs(folder), "--max_steps", str(steps), "--out", folder / "run",
                    "--batch", "1", "--micro_batch", "1", *options], check=True)
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


WRITTEN = {"smolvlm-256m": write_smolvlm, "qwen2.5-vl-3b": write_qwen}     # by transformers itself


def main():
    parser = data.Parser(prog="tests/rehearse.py", description=__doc__)
    parser.add_argument("preset", choices=["mdpo-bunny", "mdpo-llava", "pds-llava", *WRITTEN])
    parser.add_argument("--keep", help="write into this folder and leave it there")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: does the rehearsal itself run?")
    args = parser.parse_args()
    folder = Path(args.keep or tempfile.mkdtemp(prefix="rehearse-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        kind, cpu = args.preset.partition("-")[2], not torch.cuda.is_available()
        options = []
        if args.preset not in WRITTEN:
            # The random tokenizer knows letters alone: 1300 tokens are about what a real one makes of them.
            options = ["--set", "max_length=1300"]
        if args.preset != "smolvlm-256m":
            options += ["--dtype", "bfloat16", "--set", "checkpointing=true"] * cpu
        options = [] if args.tiny else options
        sizes = TINY.get(kind, True) if args.tiny else None
        _, *steps = rehearse(args.preset, folder, sizes=sizes, options=options)
        for line in steps:
            print(f"step {line['step']}: loss {line['loss']:.4f}, {line['tokens_per_second']} tokens/s, "
                  f"{line['seconds']:.0f} s")
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        peak = used.ru_maxrss / 2 ** 20
        print(f"at most {peak if cpu else steps[-1]['memory_gib']:.1f} GiB; "
              f"{used.ru_utime + used.ru_stime:.0f} s of processor time in all, loading included")
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
