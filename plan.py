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
from tqdm import tqdm

import data
import families
import lora
import losses

GIB = 2 ** 30
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


# -------------------------------------------------------------------------------- pairs as tokens
def tokenise(front, record, o, damaged=None):
    """A record -> (data.Pair, number of response tokens cut off). Raises UserError.

    front: of families.open_folder. damaged: (width, height) of the rejected images, if not the images' own.
    """
    sizes = () if o.image_rejected == "none" else tuple(data.image_size(x) for x in record["images"])
    other = tuple(damaged or sizes)
    prompt = again = front.prompt_ids(record["question"], sizes, record["history"])
    if other != sizes:
        again = front.prompt_ids(record["question"], other, record["history"])
    chosen, rejected = (front.response_ids(record[role]) for role in ("chosen", "rejected"))
    return data.truncate(data.Pair(record["id"], prompt, again, chosen, rejected, sizes, other), o.max_length)


def usable(front, records, good, o, needs):
    """(indices whose responses have tokens and whose prompts fit, lengths of their pairs).

    Faults are printed one a line, cuts counted.
    """
    kept, cut, lengths = [], 0, []
    twice, both = "image_rejected" in needs, "rejected" in needs
    for i in tqdm(good, "tokenising", disable=len(good) < 5000):
        try:
            record = records[i]
            pair, lost = tokenise(front, record, o)
            cut += lost > 0
            kept.append(i)
            lengths.append((len(pair.prompt), len(pair.chosen), len(pair.rejected) * both,
                            len(pair.prompt_rejected) * twice, len(record["images"]) * (1 + twice)))
        except data.UserError as e:
            print(f"{records.where(i)}: {e}", file=sys.stderr)
    if len(kept) < len(good) and not (o.skip_bad and kept):
        lost = f"{len(good) - len(kept)} of {len(good)} records of {records.path}"
        raise data.UserError(f"{lost} cannot be used: mend them, or pass --skip_bad")
    if cut:
        print(f"{cut} of {len(kept)} pairs had a response cut at {o.max_length} tokens (--set max_length)")
    return kept, lengths


# -------------------------------------------------------------------------------- memory
def skeleton(config):
    """transformers' model of a config, with shapes and no storage."""
    import transformers
    with torch.device("meta"):
        return getattr(transformers, families.FAMILIES[config.model_type].architecture)(config)


def tokens(length):
    """Tokens of a pair in the packed row, by (prompt, chosen, rejected, prompt_rejected, images)."""
    prompt, chosen, rejected, again, _ = length
    return prompt + chosen + rejected + (again + chosen if again else 0)


def memory(model, o, lengths, dtype, world=1):
    """Bytes that each GPU needs at least: {"weights", "LoRA" or "gradients", "optimiser", "activations"}.

    model: of skeleton(). lengths: of all pairs. world: GPUs. Without LoRA the weights are those that train
    (float32 masters where they are sharded) and their frozen copy.
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
    each, text = [tokens(length) for length in lengths], model.config.text_config
    row = max(max(each), min(o.micro_batch, len(each)) * sum(each) / len(each))
    graph = 1 if "." in o.lora_targets else text.num_hidden_layers    # LoRA may be on the last layers alone
    found["activations"] = e * row * text.hidden_size * graph
    return found


def lora_sides(model, o):
    """Inputs and outputs, added up, of the linear layers that LoRA goes on."""
    linear = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear}
    targets = [target for target in o.lora_targets.split(",") if target]
    chosen = [linear[name] for name in lora.targeted(list(linear), targets)]
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


def refuse(config, o, lengths, dtype, device, world=1):
    """Raise UserError, with advice, where a run cannot fit. lengths: of all pairs."""
    room, name = capacity(device)
    if not room or not o.check_memory:
        return
    model = skeleton(config)
    need = sum(memory(model, o, lengths, dtype, world).values())
    if need > room:
        fix = advice(model, o, lengths, dtype, world, room)
        raise data.UserError(f"the run needs at least {need / GIB:.1f} GiB, {name} has {room / GIB:.1f}: "
                             f"{fix}; --set check_memory=false tries all the same")


def advice(model, o, lengths, dtype, world, room):
    """The first change of options after which a run might fit, in words; or what it would take."""
    ways = [("--micro_batch 1", {"micro_batch": 1}, dtype), ("--dtype bfloat16", {}, "bfloat16")]
    if not o.lora_r:
        ways.append(("--lora_r 64", {"lora_r": 64}, dtype))
    if world > 1:
        ways.append(("--shard", {"shard": True}, dtype))
    for words, change, kind in ways:
        if sum(memory(model, replace(o, **change), lengths, kind, world).values()) <= room:
            return f"pass {words}"
    return ("no option makes it small enough: shard the base over several GPUs (torchrun, --shard), take a "
            "smaller model or a larger GPU")


def out_of_memory(o, world=1):
    """The sentence for a step that has run out of memory: what is not set yet and saves the most."""
    ways = []
    if not o.checkpointing:
        ways.append("--set checkpointing=true")
    if o.micro_batch > 1:
        ways.append("--micro_batch 1")
    if world > 1 and not o.shard:
        ways.append("--shard")
    if ways:
        return f"out of memory: pass {' '.join(ways)}"
    return (f"out of memory: shorten the pairs (--set max_length, now {o.max_length}), shard the base over "
            "more GPUs (torchrun, --shard) or take a larger GPU")


# -------------------------------------------------------------------------------- --dry_run
def lines(front, o, records, lengths, world=1, device=None):
    """The plan as lines of text. device: where it would run, None for a GPU that is not here."""
    each = [tokens(length) for length in lengths]
    steps = min(o.max_steps or math.inf, o.epochs * math.ceil(len(each) / o.batch))
    mean = sum(each) / len(each)
    dtype = o.dtype
    if dtype == "auto":
        dtype = "float32" if device and device.type == "cpu" else "bfloat16"
    model = skeleton(front.config)
    parts = memory(model, o, lengths, dtype, world)
    need, where = sum(parts.values()), f"on each of {world} GPUs" if world > 1 else "on one GPU"
    if device and device.type == "cpu":
        where = "on the CPU"
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    found = [f"pairs           {len(each):,} of {len(records):,} in {records.path}",
             f"steps           {steps:,} of {o.batch} pairs ({o.micro_batch} a forward), {o.epochs} epochs",
             f"tokens          {mean:,.0f} a pair, {max(each):,} at most; "
             f"{mean * o.batch * steps:,.0f} in all",
             f"memory          at least {need / GIB:.1f} GiB {where}, {dtype}: {listed}"]
    if device:
        room, name = capacity(device)
        found.append(f"room            {room / GIB:.1f} GiB, {name}")
        if need > room:
            found.append(f"does not fit    {advice(model, o, lengths, dtype, world, room)}")
    return found


def show(o):
    """The plan of a run, as lines."""
    from records import Records, check
    if o.data == "classroom":
        raise data.UserError("--data classroom is made when it trains, in a minute: there is nothing to plan")
    front = families.open_folder(o.model, o.template or None, o.images)
    records = Records(o.data, o.image_root or None)
    needs = losses.needs(losses.resolve(o.loss, anchors=o.anchors)) | {"chosen"}
    good = check(records, needs_image="image_rejected" in needs, skip_bad=o.skip_bad)
    _, lengths = usable(front, records, good, o, needs)
    gpus = torch.cuda.device_count()
    world = int(os.environ.get("WORLD_SIZE", max(1, gpus)))
    device = torch.device("cuda", 0) if gpus else None
    if o.device == "cpu":
        device = torch.device("cpu")
    return lines(front, o, records, lengths, world, device)
