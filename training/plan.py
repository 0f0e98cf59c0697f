"""What a run needs, before a weight is read: steps, tokens, hours, and the GiB per GPU that are certain.

    python train_dpo.py --dry_run --preset mdpo-llava --model llava-1.5-7b --data pairs.jsonl [its options]

Part of train_dpo.py. Weights, LoRA, gradients and the optimiser's state are counted exactly, on a model
without storage; of autograd's memory only a lower bound, one hidden state a layer. A refused run cannot fit;
another may still not, and then `advice` says what to change. The hours are an estimate.
"""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

import os

import torch
from torch.utils import benchmark

import data
import lora
from model import command, front
from training import batches, options

GIB = 2 ** 30


# -------------------------------------------------------------------------------- memory
def memory(config, o, tokens, device="cpu", world=1):
    """Bytes that each GPU needs at least: {"weights", "LoRA" or "gradients", "optimiser", "activations"}.

    config: of transformers. tokens: of each pair's packed row. device: its kind. world: GPUs. Without LoRA
    the weights are those that train (float32 masters where they are sharded) and their frozen copy.
    """
    family = front.FAMILIES[config.model_type]
    model = outline(config, o)
    if not o.lora_r:
        model.get_submodule(family.tower).requires_grad_(False)

    # ---- numbers: what is frozen, what trains as a whole, what trains in shards ----
    e = command.dtype(o.dtype, device).itemsize
    frozen = whole = sharded = 0
    for name, p in model.named_parameters():
        layer = name.startswith(f"{family.language}.layers.") and ".lora_" not in name
        divided = layer and o.shard and world > 1
        held = p.numel() / world if divided else p.numel()
        if layer and o.dtype == "nf4" and p.ndim == 2:
            held *= 0.5625 / e                                        # half a byte, and a block's scale
        if not p.requires_grad:
            frozen += held
        elif divided:
            sharded += held
        else:
            whole += held

    # ---- bytes ----
    master = max(4, e)
    found = {"weights": e * frozen}
    copies = 3                                                        # two moments, the slice's gradient
    if o.lora_r:
        found["LoRA"] = 2 * master * whole                            # and its gradient
    else:
        if e < master:
            copies += 1                                               # a slice of masters
        found["weights"] += 2 * e * whole + (e + master) * sharded
        found["gradients"] = master * (whole + sharded)
    found["optimiser"] = master * (copies * whole / world + 2 * sharded)

    # ---- some micro-batch has the longest pair, and some has at least the mean of all ----
    row = max(max(tokens), min(o.micro_batch, o.batch, len(tokens)) * sum(tokens) / len(tokens))
    text = config.text_config
    # LoRA may be on the last layers alone
    graph = 1 if o.adapter or "." in o.lora_targets else text.num_hidden_layers
    found["activations"] = e * row * text.hidden_size * graph
    return found


def outline(config, o):
    """A run's model, with its LoRA, without storage. Raises UserError."""
    import transformers
    with torch.device("meta"), command.explained("config.json describes no model", "copy it again"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    adapt(model, o)
    return model


def adapt(model, o):
    """Put a run's LoRA, if it has one, on transformers' model. Raises UserError for one that does not fit."""
    if o.adapter:
        lora.load(model, o.adapter)
    elif o.lora_r:
        lora.add_lora(model, o.lora_r, o.lora_alpha, o.lora_targets.split(","), o.seed)


def capacity(device):
    """(bytes of a device's memory, its name)."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return about.total_memory, about.name
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"


# -------------------------------------------------------------------------------- what cannot fit
def advice(o, world):
    """The memory-saving options that are not set; if all are, what else helps."""
    ways = {"--set checkpointing=true": not o.checkpointing,
            "--micro_batch 1": o.micro_batch > 1,
            "--dtype bfloat16": o.dtype in ("float32", "float64"),
            "--lora_r 64": not o.lora_r,
            "--shard": world > 1 and not o.shard}
    unset = [words for words, saves in ways.items() if saves]
    if unset:
        return f"pass {' '.join(unset)}"
    return ("shorten the pairs (--set max_length), shard the base over more GPUs (torchrun, --shard), or "
            "take a smaller model or a larger GPU")


def refuse(config, o, tokens, ranks):
    """Raise UserError, with advice, if a run cannot fit. tokens: of each pair."""
    room, name = capacity(ranks.device)
    need = sum(memory(config, o, tokens, ranks.device.type, ranks.world).values())
    if o.check_memory and need > room:
        raise data.UserError(f"the run needs at least {need / GIB:.1f} GiB, {name} has {room / GIB:.1f}: "
                             f"{advice(o, ranks.world)}; --set check_memory=false tries all the same")


# -------------------------------------------------------------------------------- --dry_run
def show(o):
    """The plan of a run, line by line: for this machine's GPUs, or for a machine without any."""
    if o.data == "classroom":
        raise data.UserError("--data classroom is made when it trains, in a minute: there is nothing to plan")
    from model import import_checkpoint
    yield from import_checkpoint.describe(o.model)
    family = front.open_folder(o.model, o.template or None, o.images)
    pairs = batches.checked(family, o.data, o, options.needs_of(o), command.ALONE)
    tokens, records = pairs.tokens, pairs.records
    steps, mean = options.steps_of(o, len(tokens)), sum(tokens) / len(tokens)
    yield f"pairs           {len(tokens):,} of {len(records):,} records in {records.path}"
    yield f"steps           {steps:,} of {o.batch} pairs ({o.micro_batch} a forward), {o.epochs} epochs"
    yield f"tokens          {mean:,.0f} a pair, {max(tokens):,} at most; {mean * o.batch * steps:,.0f} in all"

    # ---- memory ----
    gpus, device = torch.cuda.device_count(), torch.device(o.device or "cuda")
    world = int(os.environ.get("WORLD_SIZE", max(1, gpus)))
    parts = memory(family.config, o, tokens, device.type, world)
    need, listed = sum(parts.values()), ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    yield (f"memory          at least {need / GIB:.1f} GiB on each {device.type} device of {world}, "
           f"{command.dtype(o.dtype, device)}: {listed}")
    if gpus or device.type == "cpu":
        refuse(family.config, o, tokens, command.Ranks(0, world, device))

    # ---- hours: a token meets each weight in forward, reference and backward, and once for the rest ----
    device = command.place(o.device)
    matrix = f"x = torch.ones(2048, 2048, device='{device}', dtype={command.dtype(o.dtype, device)})"
    timer = benchmark.Timer("x @ x", matrix, num_threads=torch.get_num_threads())
    rate = 2 ** 34 / timer.blocked_autorange().median                 # of FLOP per second
    flop = 8 * outline(family.config, o).num_parameters() * mean * o.batch * steps
    yield (f"hours           about {2 * flop / rate / world / 3600:.2g} on {world} {device.type}: an "
           f"estimate, half of the {rate / 1e9:,.0f} GFLOP/s of a product of matrices, measured here")
