"""How near a training step comes to the machine's own rate of matrix products, and where the rest goes.

    python bench/limit.py                two minutes
    python bench/limit.py --threads 0    all cores
    python bench/limit.py --shape 7b --device cuda --dtype bfloat16

Without options it measures one pinned core in float32; the last command has LLaVA-1.5-7B's shape on a GPU.
The model is random, of LLaVA's classes: weights do not change what a step costs. A step is what
train_dpo.py does with a micro-batch: encode the images, score with the reference, forward, loss, backward,
AdamW. Reading and tokenising are not in it; a thread does them ahead of the step.

minimum: the operations that the step cannot do without, from the shapes alone: every token once through
every layer, forward and back to the adapters, attention over what a token may see, lm_head where a response
token is predicted, the layers of the vision tower that are read. Not counted: weight gradients of frozen
layers, gradients towards the images, attention scores made a second time.

rate: the fastest of the matrix products of this model's linear layers, alone, between the steps.

fraction: minimum / rate / seconds, within a round: a machine whose speed drifts drifts for both.
"""
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from section import SHAPES, arguments, command, heading, machine, report

import data
import lora
import losses
from model import vlm
from model.command import Ranks
from train_dpo import fetched, means, measures, step_loss
from training import options
from training.optimiser import Zero2
from training.reference import Reference

BETA = 0.1


# ------------------------------------------------------------------------------------- a model and its pairs
def write_model(folder, shape, dtype="float32", device="cpu", seed=0):
    """A llava-hf folder of random weights; its tokens are <unk> <pad> <s> </s> <image> and numbered words."""
    transformers_quietly()
    random_model(shape, dtype, device, seed).save_pretrained(folder)
    return write_front(folder, shape)


def llava_config(shape):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    hidden, inner, layers, heads = shape.vision
    return LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                                       num_attention_heads=heads, image_size=shape.pixels, patch_size=14),
        text_config=LlamaConfig(hidden_size=shape.hidden, intermediate_size=shape.inner,
                                num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
                                num_key_value_heads=shape.heads, vocab_size=shape.vocabulary,
                                bos_token_id=2, eos_token_id=3, pad_token_id=1, tie_word_embeddings=False),
        image_token_id=4, tie_word_embeddings=False)


def random_model(shape, dtype="float32", device="cpu", seed=0):
    """transformers' model, made on the device."""
    from transformers import LlavaForConditionalGeneration
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(llava_config(shape))
    finally:
        torch.set_default_dtype(before)


def write_front(folder, shape):
    """All of a llava-hf folder but the weights. Returns the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
    words = ["<unk>", "<pad>", "<s>", "</s>", "<image>", *(f"w{i}" for i in range(5, shape.vocabulary))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>",
                                        bos_token="<s>", eos_token="</s>",
                                        additional_special_tokens=["<image>"])
    side = {"height": shape.pixels, "width": shape.pixels}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": shape.pixels}, crop_size=side)
    LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    pictures.save_pretrained(folder)
    if not (Path(folder) / "config.json").exists():
        llava_config(shape).save_pretrained(folder)
    return Path(folder)


def transformers_quietly():
    import transformers
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def random_records(shape, n=2, seed=0):
    """[{"prompt", "chosen", "rejected": texts of numbered words, "image", "image_rejected": pictures}]."""
    import numpy as np
    from PIL import Image
    rng = np.random.default_rng(seed)

    def words(count):
        return " ".join(f"w{i}" for i in rng.integers(5, shape.vocabulary, count))

    def picture():
        return Image.fromarray(rng.integers(0, 256, (shape.pixels, shape.pixels, 3), dtype=np.uint8))
    return [{"prompt": f"<s> <image> {words(shape.question - 1)}",
             "chosen": f"{words(shape.response - 1)} </s>", "rejected": f"{words(shape.response - 1)} </s>",
             "image": picture(), "image_rejected": picture()} for _ in range(n)]


def batch_of(m, records, needs, first=0):
    """The vlm.Batch of some records, as train_dpo.py's loop takes it."""
    pairs, images, images_rejected = [], [], []
    for i, record in enumerate(records, first):
        ids = {part: m.front.tokenizer(record[part], add_special_tokens=False).input_ids
               for part in ("prompt", "chosen", "rejected")}
        sizes, prompt = (record["image"].size,), []
        for token in ids["prompt"]:
            prompt += m.front.image_ids(sizes[0]) if token == m.front.image_token_id else [token]
        pairs.append(data.Pair(str(i), prompt, prompt, ids["chosen"], ids["rejected"], sizes, sizes))
        images += m.front.prepare([record["image"]])
        if "image_rejected" in needs:
            images_rejected += m.front.prepare([record["image_rejected"]])
    places = list(range(first, first + len(records)))
    keys = [place + 1 for place in places]
    return vlm.Batch(pairs, images, images_rejected, places, keys, len(pairs), len(pairs))


# ------------------------------------------------------------------------------------------------- the step
class Ours:
    """The product's step: the functions that train_dpo.py's loop calls, in its order."""

    def __init__(self, folder, shape, dtype="float32", device="cpu", rank=0, world=1, places=64):
        transformers_quietly()
        self.m = vlm.load(folder, dtype=getattr(torch, dtype), device=device)
        lora.add_lora(self.m.model, shape.rank, 2 * shape.rank)
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():                       # a policy that differs from its reference
            for name, p in lora.lora_parameters(self.m.model).items():
                if name.endswith("lora_B"):
                    p.copy_(torch.randn(p.shape, generator=draw) * 0.02)
        self.ranks, self.places, self.references = Ranks(rank, world, device), places, {}
        trained = lora.lora_parameters(self.m.model)
        self.optimiser = Zero2(trained, partial(torch.optim.AdamW, lr=1e-6, weight_decay=0.0,
                                        fused=device == "cuda"),
                               self.ranks, clip=1.0)

    def loss(self, batch, loss, cached, forward=vlm.packed):
        """The mean loss of a micro-batch, its gradient added to the adapter's, and its log."""
        loss_of = losses.resolve(loss)
        needs = losses.needs(loss_of) | {"chosen"}
        reference = self.references.get((loss, forward))
        if reference is None or not cached:
            reference = Reference(self.places, self.m, forward, needs, self.ranks)
            self.references[loss, forward] = reference
        run = SimpleNamespace(model=self.m, loss=loss_of, o=options.Options(beta=BETA),
                              pairs=SimpleNamespace(needs=needs))
        value, policy, frozen = step_loss(run, batch, reference)
        (value.sum() / batch.of).backward()
        return means(fetched([measures(policy, frozen, value, BETA)]))["loss"]

    def step(self, batch, loss, cached, forward=vlm.packed):
        value = self.loss(batch, loss, cached, forward)
        self.optimiser.step(1e-6)
        return value


def as_train_dpo(device):
    """What train_dpo.py's main sets for the whole process."""
    if device == "cpu":
        vlm.keep_memory()


def clock(device):
    """Seconds, once the device has finished its work.

    Of one thread, its processor's seconds: other programs on the machine take their turns in between, and a
    step never waits for anything. Else the wall's.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def rounds(sides, n, device="cpu", warm=1):
    """{name: [seconds]} of n rounds in which every side runs once, after `warm` that do not count.

    A side that slows down with the whole machine does so beside the others: compare within a round.
    """
    taken = {name: [] for name in sides}
    for k in range(warm + n):
        for name, run in sides.items():
            start = clock(device)
            run()
            if k >= warm:
                taken[name].append(clock(device) - start)
    return taken


def resident(key, device="cpu"):
    """MiB that this process holds now (VmRSS) or held at most (VmHWM); of a GPU's where it runs there."""
    if torch.device(device).type == "cuda":
        bytes_of = torch.cuda.memory_allocated if key == "VmRSS" else torch.cuda.max_memory_allocated
        return bytes_of() / 2 ** 20
    status = Path("/proc/self/status")
    if not status.exists():                                                       # a Mac: the most, in bytes
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    found = next(line for line in status.read_text().splitlines() if line.startswith(key))
    return int(found.split()[1]) / 1024


def middle(values):
    """(median, least, most)."""
    return statistics.median(values), min(values), max(values)


# ---------------------------------------------------------------------------------------------- the minimum
def minimum(m, pairs, loss, cached):
    """Operations (a multiply-add is two) of a step over data.Pairs, by part; what counts: see the top."""
    needs = losses.needs(losses.resolve(loss)) | {"chosen"}
    twice, both = "image_rejected" in needs, "rejected" in needs
    forwards, text, vision = 1 if cached else 2, m.front.config.text_config, m.front.config.vision_config
    segments = [(len(p.prompt), len(p.chosen), len(p.rejected) if both else 0) for p in pairs]
    segments += [(len(p.prompt_rejected), len(p.chosen), 0) for p in pairs] if twice else []
    T, N = sum(map(sum, segments)), sum(c + r for _, c, r in segments)
    seen = sum((p + c) * (p + c + 1) // 2 + r * p + r * (r + 1) // 2 for p, c, r in segments)
    width = text.num_attention_heads * (getattr(text, "head_dim", None)
                                        or text.hidden_size // text.num_attention_heads)
    parts = {"layers": 0, "LoRA": 0,
             "attention": 2 * (2 * forwards + 4) * seen * width * text.num_hidden_layers}
    for name, layer in lora.layers(m.model).items():
        i, o, r = layer.in_features, layer.out_features, layer.lora_A.shape[1]
        # nothing trains below the first layer's inputs: no gradient goes back to them
        first = ".layers.0." in name and name.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj")
        parts["layers"] += 2 * T * i * o * (forwards + 1 - first)
        parts["LoRA"] += 2 * T * r * (3 * (i + o) - first * i)
    parts["lm_head"] = 2 * N * text.hidden_size * m.words * (forwards + 1)
    images = sum(p.prompt.count(m.front.image_token_id) for p in pairs) / m.front.image_tokens
    patches, width = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    layers = vision.num_hidden_layers + 1 + m.front.config.vision_feature_layer      # -2: all but the last
    tower = layers * (2 * (patches + 1) * (4 * width ** 2 + 2 * width * vision.intermediate_size)
                      + 4 * (patches + 1) ** 2 * width) + 2 * patches * width * 3 * vision.patch_size ** 2
    projector = 2 * patches * (width * text.hidden_size + text.hidden_size ** 2)
    parts["vision"] = int(images * (1 + twice) * (tower + projector))
    return parts


def needs_of(loss):
    return losses.needs(losses.resolve(loss)) | {"chosen"}


def products(m, pairs, loss, dtype, device, times=8):
    """{name: function} of matrix products in this model's shapes, for rounds(), and each one's operations.

    Each is made so many times: a single one is over in a twentieth of a second, too soon to be known to 5%.
    """
    text, T = m.front.config.text_config, len(data.pack(pairs, needs_of(loss)).ids)
    D, inner = text.hidden_size, text.intermediate_size
    run, operations, kind = {}, {}, {"device": device, "dtype": getattr(torch, dtype)}
    for rows, i, o in ((T, D, D), (T, D, inner), (T, inner, D)):
        x, w, out = torch.randn(rows, i, **kind), torch.randn(o, i, **kind), torch.empty(rows, o, **kind)
        name = f"{rows} x {i} x {o}"
        run[name] = lambda x=x, w=w, out=out: [torch.mm(x, w.T, out=out) for _ in range(times)]
        operations[name] = times * 2 * rows * i * o
    return run, operations


def fastest(operations, taken):
    """The name of the product with the highest rate, by the medians of what rounds() took."""
    return max(operations, key=lambda name: operations[name] / statistics.median(taken[name]))


# ------------------------------------------------------------------------------------------------ the parts
PARTS = {"matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"),
         "attention": ("aten::_scaled_dot", "aten::_flash", "aten::_efficient", "aten::_cudnn_attention"),
         "optimiser": ("aten::_fused", "aten::_foreach", "aten::lerp", "aten::addc"),
         "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::index", "aten::masked_sc",
                    "aten::gather", "aten::select_b", "aten::slice_b", "aten::embedding", "aten::zero",
                    "aten::fill", "aten::empty", "aten::resize", "aten::_to_copy")}


def part_of(event):
    return next((part for part, names in PARTS.items() if event.key.startswith(names)), "element by element")


def profile(run, device="cpu"):
    """{part: share of a run's time}, by torch's profiler."""
    from torch.profiler import ProfilerActivity
    on_gpu = torch.device(device).type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=kinds, acc_events=True) as found:
        run()
        clock(device)
    times = dict.fromkeys([*PARTS, "element by element"], 0.0)
    for event in found.key_averages() if on_gpu else found.events():
        times[part_of(event)] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    whole = sum(times.values())
    return {part: spent / whole for part, spent in times.items()}


# ------------------------------------------------------------------------------------------------- reporting
def pin(threads, core=None):
    """One thread on one core, or (0) all of them; returns in words what was done."""
    if not threads:
        return f"{torch.get_num_threads()} threads"
    torch.set_num_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[-threads:] if core is None else {core})
    return "one pinned thread (seconds are its processor's)" if threads == 1 else f"{threads} pinned threads"


# What the papers' runs cost: name: (loss, pairs, epochs), facts of the presets in training/options.py.
RUNS = {"PDS-DPO": ("dpo", 9000, 2), "mDPO": ("mdpo", 10000, 3)}


def measure(side, records, o):
    """Seconds, minimum, limit and fraction of four kinds of step, the rate, a profile of the first."""
    kinds = {"dpo": ("dpo", False), "dpo_cached": ("dpo", True),
             "mdpo": ("mdpo", False), "mdpo_cached": ("mdpo", True)}
    batch = {loss: batch_of(side.m, records, losses.needs(losses.resolve(loss)), first)
             for loss, first in (("dpo", 0), ("mdpo", len(records)))}
    pairs = batch["dpo"].pairs
    run, operations = products(side.m, pairs, "dpo", o.dtype, o.device)
    sides = {kind: lambda loss=loss, cached=cached: side.step(batch[loss], loss, cached)
             for kind, (loss, cached) in kinds.items()}
    taken = rounds({**run, **sides}, o.rounds, o.device)
    rates = {name: operations[name] / statistics.median(taken[name]) for name in run}
    best, steps = fastest(operations, taken), {}
    rate = rates[best]
    for kind, (loss, cached) in kinds.items():
        parts, seconds = minimum(side.m, pairs, loss, cached), middle(taken[kind])
        whole = sum(parts.values())
        fraction = middle([whole / operations[best] * alone / step
                           for alone, step in zip(taken[best], taken[kind], strict=True)])
        steps[kind] = {"seconds": seconds, "gflop": {k: v / 1e9 for k, v in parts.items()},
                       "limit_seconds": whole / rate, "fraction": fraction[0], "spread": fraction[1:],
                       "pairs_per_second": len(pairs) / seconds[0],
                       "tokens_per_second": len(data.pack(pairs, needs_of(loss)).ids) / seconds[0]}
    row = data.pack(pairs, {"chosen", "rejected"})
    parts = profile(sides["dpo"], o.device)
    seconds = parts["matrix products"] * steps["dpo"]["seconds"][0]
    linear = sum(v for part, v in minimum(side.m, pairs, "dpo", False).items() if part != "attention")
    return {"shape": SHAPES[o.shape]._asdict(), "gflops": {k: v / 1e9 for k, v in rates.items()},
            "limit_fraction": steps["dpo"]["fraction"], "steps": steps, "tokens": len(row.ids),
            "profile": parts, "products_at": linear / rate / seconds}


def table(found, o, about, threads):
    lines = heading("How near the step is to this machine's matrix products", about, command())
    lines += [f"Shape {o.shape}, micro-batch 2, {o.dtype}, {threads}; medians of {o.rounds} interleaved "
              f"rounds (least, most). Matrix products alone: {max(found['gflops'].values()):,.0f} GFLOP/s.\n",
              "| step of two pairs | seconds | minimum, GFLOP | at the limit | fraction | pairs/s |",
              "|---|---|---|---|---|---|"]
    names = {"dpo": "DPO, first epoch", "dpo_cached": "DPO, later epochs (reference cached)",
             "mdpo": "mDPO, first epoch", "mdpo_cached": "mDPO, later epochs"}
    for kind, step in found["steps"].items():
        seconds, least, most = step["seconds"]
        lines.append(f"| {names[kind]} | {seconds:.2f} ({least:.2f}, {most:.2f}) | "
                     f"{sum(step['gflop'].values()):,.0f} | {step['limit_seconds']:.2f} s | "
                     f"{step['fraction']:.0%} ({', '.join(f'{x:.0%}' for x in step['spread'])}) | "
                     f"{step['pairs_per_second']:.2f} |")
    shares = ", ".join(f"{part} {share:.0%}" for part, share in found["profile"].items())
    lines.append(f"\nWhere the first row's time goes (torch's profiler): {shares}. Its matrix products, "
                 f"adapters' narrow ones included, run at {found['products_at']:.0%} of the rate above.")
    if "hours" in found:
        said = ", ".join(f"{name} {hours:.1f}" for name, hours in found["hours"].items())
        lines.append(f"\nAt these speeds, hours of training alone on {about['machine']}: {said}. "
                     f"Peak memory {found['peak_gib']:.1f} GiB.")
    return lines


def main():
    o = arguments(__doc__, 3).parse_args()
    threads, about = pin(o.threads, o.core) if o.device == "cpu" else o.device, machine(o.device)
    as_train_dpo(o.device)
    shape = SHAPES[o.shape]
    with tempfile.TemporaryDirectory() as folder:
        side = Ours(write_model(folder, shape, o.dtype, o.device), shape, o.dtype, o.device)
        found = measure(side, random_records(shape), o)
    found["peak_gib"] = resident("VmHWM", o.device) / 1024
    if o.shape == "7b":
        found["hours"] = {}
        for name, (loss, pairs, epochs) in RUNS.items():
            first, later = (found["steps"][kind]["pairs_per_second"] for kind in (loss, f"{loss}_cached"))
            found["hours"][name] = (pairs / first + (epochs - 1) * pairs / later) / 3600
    report(table(found, o, about, threads), {**found, **about, "threads": threads}, o)


if __name__ == "__main__":
    main()
