"""What a run needs, before a weight is read: its steps, its tokens, and the GiB per GPU that are certain.

    python train_dpo.py --dry_run --preset mdpo-llava --model llava-1.5-7b --data pairs.jsonl [its options]

Part of train_dpo.py. Weights, LoRA, gradients and the optimiser's state are counted exactly, on a model
without storage; of autograd's memory only a lower bound, one hidden state a layer. A refused run cannot fit;
another may still not, and then `out_of_memory` says what to change.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of train_dpo.py; run: python train_dpo.py --help"))

import os
import sys
from dataclasses import replace

import torch

import data
import lora
from model import command, front
from training import batches, options

GIB = 2 ** 30
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


# -------------------------------------------------------------------------------- memory
def skeleton(config):
    """transformers' model of a config, with shapes and no storage."""
    import transformers
    with torch.device("meta"):
        return getattr(transformers, front.FAMILIES[config.model_type].architecture)(config)


def memory(model, o, tokens, world=1):
    """Bytes that each GPU needs at least: {"weights", "LoRA" or "gradients", "optimiser", "activations"}.

    model: of skeleton(). o: with a dtype that is not auto. tokens: of each pair's packed row. world: GPUs.
    Without LoRA the weights are those that train (float32 masters where they are sharded) and their frozen
    copy.
    """
    e = BYTES[o.dtype]
    master = max(4, e)
    size = {name: p.numel() for name, p in model.named_parameters()}
    sharded = 0
    if o.shard and world > 1:
        sharded = sum(n for name, n in size.items() if ".language_model.layers." in name)
    found = {"weights": e * (sum(size.values()) - sharded + sharded / world)}
    if o.lora_r:
        adapter = o.lora_r * lora_sides(model, o)
        found["LoRA"] = 2 * master * adapter                          # and its gradient
        found["optimiser"] = 3 * master * adapter / world             # two moments, the slice's gradient
    else:
        tower = front.FAMILIES[model.config.model_type].tower
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
    """The summed inputs and outputs of the linear layers that LoRA goes on."""
    linear = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    chosen = [linear[name] for name in lora.targeted(list(linear), o.lora_targets.split(","))]
    return sum(m.in_features + m.out_features for m in chosen)


def capacity(device):
    """(bytes of a device's memory, its name)."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return about.total_memory, about.name
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"


def peak(device):
    """GiB that were in use at most, of the GPU or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (GIB if sys.platform == "darwin" else 2 ** 20)


# -------------------------------------------------------------------------------- what cannot fit
CHANGES = {"--micro_batch 1": {"micro_batch": 1}, "--dtype bfloat16": {"dtype": "bfloat16"},
           "--lora_r 64": {"lora_r": 64}, "--shard": {"shard": True}}
LARGER = "shard the base over more GPUs (torchrun, --shard), or take a smaller model or a larger GPU"


def advice(model, o, tokens, world, room):
    """The first change of options with which a run might fit, in words; else the hardware that it needs."""
    for words, change in CHANGES.items():
        if sum(memory(model, replace(o, **change), tokens, world).values()) <= room:
            return f"pass {words}"
    return LARGER


def refuse(config, o, tokens, ranks):
    """Raise UserError, with advice, if a run cannot fit. tokens: of each pair."""
    room, name = capacity(ranks.device)
    model, o = skeleton(config), replace(o, dtype=options.dtype_of(o, ranks.device.type))
    need = sum(memory(model, o, tokens, ranks.world).values())
    if o.check_memory and need > room:
        fix = advice(model, o, tokens, ranks.world, room)
        raise data.UserError(f"the run needs at least {need / GIB:.1f} GiB, {name} has {room / GIB:.1f}: "
                             f"{fix}; --set check_memory=false tries all the same")


def out_of_memory(o, world=1):
    """The sentence for a step that has run out of memory: it names memory-saving options that are not set."""
    ways = {"--set checkpointing=true": not o.checkpointing, "--micro_batch 1": o.micro_batch > 1,
            "--shard": world > 1 and not o.shard}
    unset = [words for words, saves in ways.items() if saves]
    if unset:
        return f"out of memory: pass {' '.join(unset)}"
    return f"out of memory: shorten the pairs (--set max_length), {LARGER}"


# -------------------------------------------------------------------------------- --dry_run
def show(o):
    """The plan of a run, line by line: for this machine's GPUs, or for a machine without any."""
    if o.data == "classroom":
        raise data.UserError("--data classroom is made when it trains, in a minute: there is nothing to plan")
    from model import import_checkpoint
    yield from import_checkpoint.describe(o.model)
    family = front.open_folder(o.model, o.template or None, o.images)
    pairs = batches.checked(family, o.data, o, options.needs_of(o), command.Ranks())
    tokens, records = pairs.tokens, pairs.records
    steps, mean = options.steps_of(o, len(tokens)), sum(tokens) / len(tokens)
    yield f"pairs           {len(tokens):,} of {len(records):,} in {records.path}"
    yield f"steps           {steps:,} of {o.batch} pairs ({o.micro_batch} a forward), {o.epochs} epochs"
    yield (f"tokens          {mean:,.0f} a pair, {max(tokens):,} at most; "
           f"{mean * o.batch * steps:,.0f} in all")

    # ---- memory ----
    gpus, device = torch.cuda.device_count(), torch.device(o.device or "cuda")
    world = int(os.environ.get("WORLD_SIZE", max(1, gpus)))
    model, o = skeleton(family.config), replace(o, dtype=options.dtype_of(o, device.type))
    parts = memory(model, o, tokens, world)
    need, listed = sum(parts.values()), ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    yield (f"memory          at least {need / GIB:.1f} GiB on each {device.type} device of {world}, "
           f"{o.dtype}: {listed}")
    if gpus or device.type == "cpu":
        room, name = capacity(device)
        yield f"room            {room / GIB:.1f} GiB, {name}"
        if need > room:
            yield f"does not fit    {advice(model, o, tokens, world, room)}"
