"""What a run needs, before a weight is read: its steps, its tokens, and the GiB per GPU that are certain.

    python train_dpo.py --dry_run --preset mdpo-llava --model llava-1.5-7b --data pairs.jsonl [its options]

Part of train_dpo.py. Weights, LoRA, gradients and the optimiser's state are counted exactly, on a model
without storage; of what autograd keeps only a floor, one hidden state a layer. What is refused cannot fit;
what passes may still not, and then `out_of_memory` says what to change.
"""
import math
import os
import sys
from dataclasses import replace

import torch

import data
import families
import lora
import losses

GIB = 2 ** 30
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


# -------------------------------------------------------------------------------- memory
def skeleton(config):
    """transformers' model of a config, with shapes and no storage."""
    import transformers
    with torch.device("meta"):
        return getattr(transformers, families.FAMILIES[config.model_type].architecture)(config)


def memory(model, o, tokens, dtype, world=1):
    """Bytes that each GPU needs at least: {"weights", "LoRA" or "gradients", "optimiser", "activations"}.

    model: of skeleton(). tokens: of each pair's packed row. world: GPUs. Without LoRA the weights are those
    that train (float32 masters where they are sharded) and their frozen copy.
    """
    e, master = BYTES[dtype], max(4, BYTES[dtype])
    tower = families.FAMILIES[model.config.model_type].tower
    size = {name: p.numel() for name, p in model.named_parameters()}
    layers = sum(n for name, n in size.items() if ".language_model.layers." in name)
    sharded = layers if o.shard and world > 1 else 0
    found = {"weights": e * (sum(size.values()) - sharded + sharded / world)}
    if o.lora_r:
        adapter = o.lora_r * lora_sides(model, o)
        found["LoRA"] = 2 * master * adapter                          # and its gradient
        found["optimiser"] = 3 * master * adapter / world             # two moments, the slice's gradient
    else:
        whole = sum(n for name, n in size.items() if not name.startswith(tower)) - sharded
        copies = 3 + (e < master)                                     # the same, and a slice of masters
        found["weights"] += e * whole + master * sharded / world
        found["gradients"] = master * (whole + sharded / world)
        found["optimiser"] = master * (2 * sharded + copies * whole) / world

    # ---- some micro-batch has the longest pair, and some has at least the mean of all ----
    text = model.config.text_config
    row = max(max(tokens), min(o.micro_batch, len(tokens)) * sum(tokens) / len(tokens))
    graph = 1 if "." in o.lora_targets else text.num_hidden_layers    # LoRA may be on the last layers alone
    found["activations"] = e * row * text.hidden_size * graph
    return found


def lora_sides(model, o):
    """Inputs and outputs, added up, of the linear layers that LoRA goes on."""
    linear = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    chosen = [linear[name] for name in lora.targeted(list(linear), o.lora_targets.split(","))]
    return sum(m.in_features + m.out_features for m in chosen)


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


def refuse(config, o, tokens, dtype, device, world=1):
    """Raise UserError, with advice, where a run cannot fit. tokens: of each pair."""
    room, name = capacity(device)
    if not room or not o.check_memory:
        return
    model = skeleton(config)
    need = sum(memory(model, o, tokens, dtype, world).values())
    if need > room:
        fix = advice(model, o, tokens, dtype, world, room)
        raise data.UserError(f"the run needs at least {need / GIB:.1f} GiB, {name} has {room / GIB:.1f}: "
                             f"{fix}; --set check_memory=false tries all the same")


LARGER = "shard the base over more GPUs (torchrun, --shard), or take a smaller model or a larger GPU"


def advice(model, o, tokens, dtype, world, room):
    """The first change of options after which a run might fit, in words; or what it would take."""
    ways = [("--micro_batch 1", {"micro_batch": 1}, dtype), ("--dtype bfloat16", {}, "bfloat16"),
            ("--lora_r 64", {"lora_r": o.lora_r or 64}, dtype), ("--shard", {"shard": world > 1}, dtype)]
    for words, change, kind in ways:
        if sum(memory(model, replace(o, **change), tokens, kind, world).values()) <= room:
            return f"pass {words}"
    return LARGER


def out_of_memory(o, world=1):
    """The sentence for a step that has run out of memory: pass what saves memory and is not set yet."""
    ways = {"--set checkpointing=true": not o.checkpointing, "--micro_batch 1": o.micro_batch > 1,
            "--shard": world > 1 and not o.shard}
    unset = [words for words, saves in ways.items() if saves]
    if unset:
        return f"out of memory: pass {' '.join(unset)}"
    return f"out of memory: shorten the pairs (--set max_length), {LARGER}"


# -------------------------------------------------------------------------------- --dry_run
def show(o):
    """The plan of a run, as lines of text: for this machine's GPUs, or for one that is not here."""
    import batches
    import command
    if o.data == "classroom":
        raise data.UserError("--data classroom is made when it trains, in a minute: there is nothing to plan")
    front = families.open_folder(o.model, o.template or None, o.images)
    needs = losses.needs(losses.resolve(o.loss, anchors=o.anchors)) | {"chosen"}
    pairs = batches.checked(front, o.data, o, needs, command.Ranks())
    tokens, records = pairs.tokens, pairs.records
    steps = min(o.max_steps or math.inf, o.epochs * math.ceil(len(tokens) / o.batch))
    mean = sum(tokens) / len(tokens)

    # ---- memory ----
    gpus = torch.cuda.device_count()
    world = int(os.environ.get("WORLD_SIZE", max(1, gpus)))
    dtype, where = o.dtype, f"on each of {world} GPUs" if world > 1 else "on one GPU"
    if dtype == "auto":
        dtype = "float32" if o.device == "cpu" else "bfloat16"
    if o.device == "cpu":
        where = "on the CPU"
    model = skeleton(front.config)
    parts = memory(model, o, tokens, dtype, world)
    need, listed = sum(parts.values()), ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    found = [f"pairs           {len(tokens):,} of {len(records):,} in {records.path}",
             f"steps           {steps:,} of {o.batch} pairs ({o.micro_batch} a forward), {o.epochs} epochs",
             f"tokens          {mean:,.0f} a pair, {max(tokens):,} at most; "
             f"{mean * o.batch * steps:,.0f} in all",
             f"memory          at least {need / GIB:.1f} GiB {where}, {dtype}: {listed}"]
    if gpus or o.device == "cpu":
        room, name = capacity(torch.device(o.device or "cuda"))
        found.append(f"room            {(room or 0) / GIB:.1f} GiB, {name}")
        if room and need > room:
            found.append(f"does not fit    {advice(model, o, tokens, dtype, world, room)}")
    return found
