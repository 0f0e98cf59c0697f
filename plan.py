"""Pairs as tokens, and what a run of them needs before a weight is read: GiB per GPU, and what cannot fit.

    python train_dpo.py --dry_run --preset mdpo-llava --model llava-1.5-7b --data pairs.jsonl [its options]

The memory is arithmetic: weights, LoRA (float32 masters and gradients), Adam's moments, and what autograd
keeps of the micro-batch with the longest pairs. tests/test_plan.py holds the last against autograd's own
saved tensors on a CPU. It is a lower bound: what it refuses cannot fit, what it lets pass may still not; on a
CPU in float32 kernels.Attention keeps up to heads x queries x keys numbers a layer that are not counted. The
one full-size run so far, Bunny-3B in bfloat16 on a CPU (tests/rehearse.py), peaked at 13.5 GiB where 11 are
planned; most likely malloc kept what was freed in blocks below 32 MiB: where it had to give them back
(MALLOC_MMAP_THRESHOLD_=1048576) the first forward of a smaller Bunny peaked at 1.8 GiB in place of 2.4. On a
GPU nothing has been measured.
"""
import dataclasses
import math
import os
import sys

import torch

import data
import families
import losses

GIB = 2 ** 30
CONTEXT = 1.0 * GIB            # CUDA's context or the process, libraries' workspaces
SLACK = 1.06                   # what the allocator cannot use
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


# -------------------------------------------------------------------------------- memory
def shapes(config):
    """{name: shape} of a model's weights, by transformers' class: no weight is read."""
    import transformers
    with torch.device("meta"):
        model = getattr(transformers, families.FAMILIES[config.model_type].architecture)(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def tokens(length):
    """Tokens of a pair in the packed row, by (prompt, chosen, rejected, prompt_rejected, pictures)."""
    prompt, chosen, rejected, again, _ = length
    return prompt + chosen + rejected + (again + chosen if again else 0)


def memory(config, o, rows, dtype, world=1, weights=None):
    """Bytes per GPU: {"weights", "LoRA" or "gradients", "optimiser", "activations", "rest", "total"}.

    rows: the lengths of the pairs in the largest micro-batch. world: GPUs. weights: shapes(config), if known.
    Without an adapter the weights are those that train and the frozen copy of them.
    """
    e, weights, text = BYTES[dtype], weights or shapes(config), config.text_config
    count = {n: math.prod(s) for n, s in weights.items()}
    layers = {n for n in count if ".language_model.layers." in n}
    linear = [s for n, s in weights.items() if n in layers and len(s) == 2]
    dealt = sum(count[n] for n in layers) if o.shard and world > 1 else 0
    adapter = o.lora_r * sum(sum(s) for s in linear)
    got = {"weights": e * (sum(count.values()) - dealt + dealt / world)}
    if o.lora_r:
        got |= {"LoRA": 8 * adapter,                                  # float32, the gradient as large
                "optimiser": 12 * adapter / world}                    # two moments and the shard's gradient
    else:
        flat, master = sum(count[n] for n in count if ".vision_tower." not in n) - dealt, max(4, e)
        got["weights"] += e * flat + master * dealt / world           # the frozen copy; masters, where dealt
        got |= {"gradients": master * (flat + dealt / world),
                "optimiser": master * (2 * dealt + (3 + (e < master)) * flat) / world}

    T = sum(map(tokens, rows))
    if o.forward == "naive":                                          # padded to the longest
        longest = max(max(p, a) + max(c, r) for p, c, r, a, _ in rows)
        T = longest * sum(1 + bool(r) + bool(a) for _, _, r, a, _ in rows)
    whole, copied = per_layer(text, e, o.lora_r * len(linear) / text.num_hidden_layers, not o.lora_r)
    forked = sum(p + r for p, _, r, _, _ in rows if r) if o.forward == "packed" else 0
    layer = whole * T + copied * forked + (e < 4) * e * adapter / text.num_hidden_layers     # A, B cast to e
    hidden, wide = e * text.hidden_size * T, e * (2 * text.intermediate_size + 4 * text.hidden_size) * T
    n = text.num_hidden_layers
    got["activations"] = (n * hidden + layer if o.checkpointing else n * layer) + 3 * hidden + wide
    responses = sum(c + r + (c if a else 0) for _, c, r, a, _ in rows)
    scored = T if o.forward == "naive" else min(1024, responses)
    vision, pictures = config.vision_config, sum(r[4] for r in rows)
    tiles = families.FAMILIES[config.model_type].tiles
    patches = (vision.image_size // vision.patch_size) ** 2 + 1
    seen = pictures * tiles * patches * e * (vision.hidden_size * (vision.num_hidden_layers + 8)
                                             + 2 * vision.intermediate_size)
    gathered = (2 * e + 4 * (not o.lora_r)) * dealt / n               # two layers' weights, one's gradient
    head = 0 if o.lora_r else 2 * e * text.vocab_size * text.hidden_size                 # lm_head's gradient
    got["rest"] = (scored * text.vocab_size * (2 * e + 8) + responses * text.hidden_size * e + seen + gathered
                   + head + CONTEXT)
    got["total"] = sum(got.values()) * SLACK
    return got


def per_layer(text, e, ranks, trains=False):
    """Bytes that autograd keeps of a decoder layer: per token, and per token of a prompt with two responses.

    Counted on transformers' code: what a frozen linear layer reads is kept for LoRA's A alone, and once for
    all layers that read it. e: bytes of a number. ranks: LoRA's rank times the layer's linear layers. trains:
    the layer's own weights do, the norms' too.
    """
    D, inner = text.hidden_size, text.intermediate_size
    kv = 2 * (getattr(text, "head_dim", None) or D // text.num_attention_heads) * text.num_key_value_heads
    attention = e * (D + kv) + 2 * e * D                              # q, k, v; the result twice
    if text.model_type == "phi":                                      # one norm; its GELU keeps five tensors
        kept = 2 * e * D + attention + 5 * e * inner
    else:                                                             # two RMSNorms, in float32; a gated SiLU
        kept = 2 * (max(4, e) * D + (1 + trains) * e * D) + attention + 3 * e * inner
    return kept + e * ranks, e * kv


def capacity(device):
    """(bytes of a device's memory, its name), (None, "") where it is not known."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return about.total_memory, about.name
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"
    except (ValueError, OSError, AttributeError):
        return None, ""


def peak(device):
    """GiB that were in use at most, of the GPU or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (GIB if sys.platform == "darwin" else 2 ** 20)


def mend(config, o, longest, dtype, world, room, weights):
    """The first change of options that makes it fit, in words; or what it would take."""
    slim, one = {"checkpointing": True}, {"micro_batch": 1}
    ways = [("--set checkpointing=true", slim), ("--micro_batch 1", one),
            ("--set checkpointing=true --micro_batch 1", slim | one)]
    if world > 1:
        ways.append(("--shard --set checkpointing=true --micro_batch 1", slim | one | {"shard": True}))
    for words, change in ways:
        other = dataclasses.replace(o, **change)
        if memory(config, other, longest[:other.micro_batch], dtype, world, weights)["total"] <= room:
            return f"pass {words}"
    least = dataclasses.replace(o, **slim, **one)
    need = memory(config, least, longest[:1], dtype, world, weights)["total"] / GIB
    return (f"even --set checkpointing=true --micro_batch 1 needs {need:.1f} GiB: shorten the pairs (--set "
            "max_length), deal the base to several GPUs (torchrun, --shard), "
            + "train an adapter (--lora_r 64), " * (not o.lora_r) + "or take a larger one")


def refuse(config, o, rows, dtype, device, world=1):
    """Raise UserError where a run cannot fit by the plan, with the mend. rows: lengths of all pairs."""
    room, name = capacity(device)
    if not room or not o.check_memory:
        return
    longest, weights = sorted(rows, key=tokens)[::-1][:o.micro_batch], shapes(config)
    got = memory(config, o, longest, dtype, world, weights)
    if got["total"] > room:
        raise data.UserError(f"the run needs about {got['total'] / GIB:.1f} GiB, {name} has "
                             f"{room / GIB:.1f}: {mend(config, o, longest, dtype, world, room, weights)}; "
                             "--set check_memory=false tries all the same")


def lines(front, o, records, rows, world=1, device=None):
    """The plan as lines of text. device: where it would run, None for a GPU that is not here."""
    rows = sorted(rows, key=tokens)[::-1]
    per_epoch = math.ceil(len(rows) / o.batch)
    steps = min(o.max_steps or math.inf, o.epochs * per_epoch)
    dtype = o.dtype if o.dtype != "auto" else "float32" if device and device.type == "cpu" else "bfloat16"
    weights = shapes(front.config)
    got = memory(front.config, o, rows[:o.micro_batch], dtype, world, weights)
    each = [tokens(r) for r in rows]
    cpu = device is not None and device.type == "cpu"
    where = f"per GPU, on {world}" if world > 1 else "on the CPU" if cpu else "on one GPU"
    said = [f"pairs           {len(rows):,} of {len(records):,} in {records.path}",
            f"steps           {steps:,} of {o.batch} pairs ({o.micro_batch} a forward), {o.epochs} epochs",
            f"tokens          {sum(each) / len(each):,.0f} a pair, {each[0]:,} at most; "
            f"{sum(each) / len(each) * o.batch * steps:,.0f} in all",
            f"memory          {got['total'] / GIB:.1f} GiB {where}, {dtype}: "
            + ", ".join(f"{k} {v / GIB:.1f}" for k, v in got.items() if k != "total")]
    rooms = {name: size for name, size in [("24", 24), ("40", 40), ("48", 48), ("80", 80), ("141", 141)]}
    if device:
        room, name = capacity(device)
        fits = got["total"] <= room
        said.append(f"fits            {'yes' if fits else 'NO'}: {name} has {room / GIB:.1f} GiB")
        if not fits:
            way = mend(front.config, o, rows[:o.micro_batch], dtype, world, room, weights)
            said.append(f"mend            {way}")
    else:
        fitting = [n for n, size in rooms.items() if got["total"] <= size * GIB * 0.97]
        said.append(f"fits            GPUs of {', '.join(fitting)} GiB" if fitting else "fits            no "
                    f"GPU of {max(rooms.values())} GiB or less")
        small = [size for n, size in rooms.items() if n not in fitting]
        if small:
            said.append(f"on {small[-1]} GiB".ljust(16)
                        + mend(front.config, o, rows[:o.micro_batch], dtype, world, small[-1] * GIB, weights))
    return said


def show(o):
    """The plan of `train_dpo.py`'s options, as lines."""
    import batches
    import command
    front = families.open_folder(o.model, o.template or None, o.images)
    if o.data == "classroom":
        raise data.UserError("--data classroom is made when it trains, in a minute: there is nothing to plan")
    needs = losses.needs(losses.resolve(o.loss, anchors=o.anchors)) | {"chosen"}
    pairs = batches.checked(front, o.data, o, needs, command.Ranks())
    gpus = torch.cuda.device_count()
    world = int(os.environ.get("WORLD_SIZE", max(1, gpus)))
    device = torch.device("cuda", 0) if gpus else torch.device("cpu") if o.device == "cpu" else None
    return lines(front, o, pairs.records, pairs.lengths, world, device)
