"""The parts of bench/gpu.py: each takes a Bench and returns the numbers that it found, {name: number}.

Models are made on the device from a seed; no file of weights is written for them but for the smallest.
"""
if __name__ == "__main__":
    exit("A part of bench/gpu.py; run: python bench/gpu.py --help")

import contextlib
import io
import os
import shutil
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import limit
import qwen3b
import torch
from section import SHAPES
from torch.nn.functional import scaled_dot_product_attention

import data
import lora
import train_dpo
from model import command, vlm
from model.generation import complete
from training import options

DTYPE = "bfloat16"                                   # of the large model
LOSSES = ("dpo", "mdpo")
NEW, ANSWERS, AT_ONCE = 64, 128, (16, 64)            # tokens of an answer, answers, prompts in a batch
# A run of 12 steps that is the same everywhere; `classroom` is the main command's own.
FIXED = {"pairs": 64, "scenes": 4, "questions": 8, "look": 0, "max_new_tokens": 8}
TINY = {"pairs": 8, "scenes": 2, "questions": 4, "look": 0, "max_new_tokens": 4, "epochs": 2, "batch": 4,
        "micro_batch": 4, "lora_r": 8}
SCALES, FEW, MORE = (5, 7, 9, 11), 2, 10             # guidance, and steps that are timed
STOPPED = 2                                          # steps before the run is stopped that then resumes
SMALL_SD3 = {"sample_size": 8, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2,
             "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32,
             "pos_embed_max_size": 16}
SMALL_VAE = {"block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4}
SMALL_T5 = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_heads": 2, "num_layers": 1, "vocab_size": 100}


class Bench:
    """What the parts share: the device, the sizes, and the large model once it is made."""

    def __init__(self, tiny=False):
        limit.transformers_quietly()
        gpu = torch.cuda.is_available()
        self.device = "cuda" if gpu else "cpu"
        self.tiny = tiny or not gpu
        self.shape = SHAPES["tiny" if self.tiny else "7b"]
        self.small = SHAPES["tiny" if self.tiny else "half"]
        self.rounds, self.warm = (1, 1) if self.tiny else (3, 2)
        self.scratch = tempfile.TemporaryDirectory()
        self.folder = Path(self.scratch.name)
        self.ours = None
        self.fixed = {}

    # ---- models ----
    def large(self, checkpointing=False, compiled=False):
        """limit.Ours with LLaVA-1.5-7B's shape, made at the first call."""
        if self.ours is None:
            front = limit.write_front(self.folder / "large", self.shape)
            with made_here(self.random):
                self.ours = limit.Ours(front, self.shape, DTYPE, self.device)
            self.checkpointing = self.compiled = False
        language = self.ours.m.language_model
        language.train(checkpointing)                # as train_dpo.py's load does
        if checkpointing:
            language.activation_checkpointing_enable({"use_reentrant": False})
        elif self.checkpointing:
            language.activation_checkpointing_disable()
        self.checkpointing = checkpointing
        if compiled and not self.compiled:
            with tiny_compiler() if self.tiny else contextlib.nullcontext():
                vlm.compile_layers(self.ours.m)
        elif self.compiled and not compiled:
            for layer in language.layers:
                for part in layer.children():
                    part._compiled_call_impl = None
        self.compiled = compiled
        return self.ours

    def random(self, kind=None):
        return limit.random_model(self.shape, DTYPE, self.device)

    def little(self, dtype="float32"):
        """limit.Ours of a small model, which also lies in the folder `small`."""
        folder = self.folder / "small"
        if not folder.exists():
            limit.write_model(folder, self.small, "float32", self.device)
        return limit.Ours(folder, self.small, dtype, self.device)

    def tidy(self, broken=False):
        """Free what no part needs; broken: the large model too, which a part may have left half-way."""
        if broken:
            self.ours = None
        if not self.tiny:
            command.free()

    # ---- measuring ----
    def peak_gib(self, run):
        """Of a run on a GPU; on a CPU of the process until now."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run()
        return limit.resident("VmHWM", self.device) / 1024

    def seconds(self, run, times=5):
        """Of the middle one of several runs, after two that do not count."""
        return statistics.median(limit.rounds({"run": run}, times, self.device, self.warm)["run"])


@contextlib.contextmanager
def made_here(make, kind="LlavaForConditionalGeneration", package="transformers"):
    """Inside, the class's from_pretrained reads no weights: it returns make(class)."""
    cls = getattr(__import__(package), kind)

    def from_pretrained(asked, folder, *, output_loading_info=False, **options):
        model = make(asked)
        return (model, {"missing_keys": []}) if output_loading_info else model
    # vlm.forget is for memory that is mapped from a file
    with mock.patch.object(cls, "from_pretrained", classmethod(from_pretrained)), \
            mock.patch.object(vlm, "forget", lambda mapped: None):
        yield


# ---------------------------------------------------------------------------------------- the machine
def hardware(bench):
    """What there is, and its rates: matrix products, copies within the device, copies to it."""
    side, size = (256, 1 << 20) if bench.tiny else (8192, 1 << 30)
    kind = {"device": bench.device, "dtype": torch.bfloat16}
    a, b, c = (torch.randn(side, side, **kind) for _ in range(3))
    here, there = torch.zeros(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    found = {"cores": os.cpu_count()}
    if bench.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"memory_gib": about.total_memory / 2 ** 30, "multiprocessors": about.multi_processor_count,
                  "capability": f"{about.major}.{about.minor}", "cuda": torch.version.cuda,
                  "gpus": torch.cuda.device_count()}
        here, there = here.pin_memory(), there.cuda()
    inside = there.clone()
    found["matmul_tflops"] = 2 * side ** 3 / bench.seconds(lambda: torch.mm(a, b, out=c)) / 1e12
    found["copy_gb_per_second"] = 2 * size / bench.seconds(lambda: inside.copy_(there)) / 1e9
    found["to_device_gb_per_second"] = size / bench.seconds(lambda: there.copy_(here)) / 1e9
    return found


# ---------------------------------------------------------------------------------------- correctness
def gradient(side, batch, loss, forward):
    """(loss, the adapter's flat gradient in float64) of a micro-batch."""
    value = side.loss(batch, loss, False, forward)
    flat = side.optimiser.grad.double()
    side.optimiser.grad.zero_()
    return value, flat


def apart(a, b):
    """Relative distance of two tensors."""
    return ((a - b).norm() / b.norm()).item()


def packed(bench):
    """The packed forward equals the naive one in float32, and in bfloat16 is no farther from that than it."""
    exact, rough = bench.little(), bench.little(DTYPE)
    found, ok = {}, True
    for loss in LOSSES:
        batch = limit.batch_of(exact.m, limit.random_records(bench.small), limit.needs_of(loss))
        value, truth = gradient(exact, batch, loss, vlm.naive)
        other, flat = gradient(exact, batch, loss, vlm.packed)
        _, naive = gradient(rough, batch, loss, vlm.naive)
        _, fast = gradient(rough, batch, loss, vlm.packed)
        row = {"loss": abs(value - other) / abs(value), "gradient": apart(flat, truth),
               "bf16_gradient": apart(fast, truth), "bf16_gradient_of_naive": apart(naive, truth)}
        ok = ok and row["loss"] < 1e-4 and row["gradient"] < 1e-3
        ok = ok and row["bf16_gradient"] < 1.5 * row["bf16_gradient_of_naive"]
        found |= {f"{loss}_{name}": number for name, number in row.items()}
    return {**found, "ok": ok}


def peft(bench):
    """LoRA beside PEFT's on the same weights, float32: logits and the adapter's gradient."""
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration
    side = bench.little()
    adapter = bench.folder / "adapter"
    lora.save(side.m.model, adapter, "small")
    plain = LlavaForConditionalGeneration.from_pretrained(bench.folder / "small").to(bench.device)
    theirs = PeftModel.from_pretrained(plain, adapter, is_trainable=True).eval()
    ids = torch.randint(5, bench.small.vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    logits = []
    for model in (side.m.model, theirs):
        logits.append(model(input_ids=ids.to(bench.device), use_cache=False).logits)
        logits[-1].log_softmax(-1)[..., 5].sum().backward()
    grads = {name.removeprefix("base_model.model.").removesuffix(".default.weight"): p.grad.T
             for name, p in theirs.named_parameters() if p.grad is not None}
    ours = lora.lora_parameters(side.m.model)
    found = {"logits": apart(*logits),
             "gradient": max(apart(p.grad, grads[name]) for name, p in ours.items())}
    return {**found, "ok": found["logits"] < 1e-4 and found["gradient"] < 1e-3}


def trl_equality(bench):
    """The small model's loss and gradient beside TRL's, float32; raises where they are not equal."""
    import vs_trl
    o, found = SimpleNamespace(dtype="float32", device=bench.device), {}
    side, records = bench.little(), limit.random_records(bench.small)
    for loss in LOSSES:
        theirs = vs_trl.TRL(bench.folder / "small", bench.small, o, loss, side)
        batch = limit.batch_of(side.m, records, limit.needs_of(loss))
        differences = vs_trl.equality(side, theirs, batch, theirs.collate(records, loss), loss)
        found[f"{loss}_loss"], found[f"{loss}_gradient"] = differences
    return {**found, "ok": True}


def run_classroom(out, **more):
    """train_dpo.py in this process, in silence -> its summary."""
    threads = torch.get_num_threads()
    o = options.Options(out=str(out), **more)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train_dpo.launch(o, command.join(o.device))
    finally:
        torch.set_num_threads(threads)
    return data.read_json(out / "summary.json")


def fixed_run(bench, device, dtype):
    """Steps of the fixed run's log, which is made once for each device and type."""
    out = bench.folder / f"{device}-{dtype}"
    if out not in bench.fixed:
        first = next(iter(bench.fixed), None)
        begin(out, first)
        run_classroom(out, device=device, dtype=dtype, **(TINY if bench.tiny else FIXED))
        bench.fixed[out] = steps_of(out)
    return bench.fixed[out]


def begin(out, like):
    """A run's folder with the pairs and scenes of another, which take a second or two to make."""
    for name in ("data", "scenes"):
        if like:
            shutil.copytree(like / name, out / name)


def steps_of(out):
    return [line for line in data.read_jsonl(out / "log.jsonl") if "step" in line]


def farthest(steps, others, name="loss"):
    return max(abs(a[name] - b[name]) for a, b in zip(steps, others, strict=True))


def cpu_log(bench):
    """The fixed run in float32 and bfloat16 beside the CPU's in float32: the largest difference of a loss."""
    log = fixed_run(bench, "cpu", "float32")
    found = {"steps": len(log), "last_loss": log[-1]["loss"]}
    for dtype in ("float32", DTYPE):
        steps = fixed_run(bench, bench.device, dtype)
        found[f"{dtype}_loss"] = farthest(steps, log)
        found[f"{dtype}_norm"] = max(abs(a["grad_norm"] / b["grad_norm"] - 1)
                                     for a, b in zip(steps, log, strict=True))
    return {**found, "ok": found["float32_loss"] < 5e-3 and found[f"{DTYPE}_loss"] < 0.03}


def resume(bench):
    """The fixed run, stopped after a few steps and started again, beside the whole one."""
    whole, out = fixed_run(bench, bench.device, DTYPE), bench.folder / "resumed"
    shutil.rmtree(out, ignore_errors=True)
    begin(out, bench.folder / f"{bench.device}-{DTYPE}")
    asked = {"device": bench.device, "dtype": DTYPE, **(TINY if bench.tiny else FIXED)}
    step = train_dpo.step

    def stopping(run, t):
        run.stop.asked = run.stop.asked or t + 1 == STOPPED      # what SIGTERM does
        return step(run, t)
    with mock.patch.object(train_dpo, "step", stopping), contextlib.suppress(KeyboardInterrupt):
        run_classroom(out, **asked)
    before = len(steps_of(out))
    run_classroom(out, **asked)
    steps = steps_of(out)
    found = {"stopped_after": before, "steps": len(steps), "loss": farthest(steps, whole)}
    return {**found, "ok": before == STOPPED and found["loss"] < (0.02 if bench.device == "cuda" else 1e-9)}


# ---------------------------------------------------------------------------------------- the fast paths
def plain_varlen(query, key, value, starts_q, starts_k, longest_q, longest_k, *, scale=None, window_size,
                 enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn computes, written out: it has no kernel for a CPU.

    query (T, H, d), key and value (K, H_kv, d); a sequence's last query sees all of its keys.
    """
    assert window_size == (-1, 0) and starts_q.dtype == starts_k.dtype == torch.int32
    lengths = [starts.diff().tolist() for starts in (starts_q, starts_k)]
    assert longest_q >= max(lengths[0]) and longest_k >= max(lengths[1])
    out = []
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        seen = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out.append(scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)[0])
    return torch.cat(out, 1).transpose(0, 1)


def attention(bench):
    """A packed row's attention, there and back, segment by segment and in one call: seconds, and the relative
    distance of its gradients from float32's. mDPO, a micro-batch of eight."""
    shape, prompt = bench.shape, [0] * (bench.shape.question + (bench.shape.pixels // 14) ** 2)
    pairs = [data.Pair("", prompt, prompt, [0] * shape.response, [0] * shape.response)] * 8
    row = data.pack(pairs, limit.needs_of("mdpo"))
    layout = vlm.Layout(row.segments, torch.device(bench.device))
    size = 4, 1, shape.heads, len(row.ids), shape.hidden // shape.heads
    tensors = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(bench.device)

    def gradients(attend, dtype):
        q, k, v, up = tensors.to(dtype)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, layout, scale=None, enable_gqa=False)                           # (1, T, H, d)
        return torch.stack(torch.autograd.grad(out, inputs, up.transpose(1, 2))).float()
    found, rough, exact = {"tokens": len(row.ids)}, torch.bfloat16, gradients(vlm.in_turn, torch.float32)
    # a CPU has no kernel for the one call: there, it is written out
    plain = mock.patch("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    with plain if bench.device == "cpu" else contextlib.nullcontext():
        for name, attend in (("in_turn", vlm.in_turn), ("at_once", vlm.at_once)):
            found[f"{name}_seconds"] = bench.seconds(partial(gradients, attend, rough))
            found[f"{name}_gradient"] = apart(gradients(attend, rough), exact)
    return {**found, "ok": found["at_once_gradient"] < 1.5 * found["in_turn_gradient"]}


def compiled(bench):
    """The small model with compiled layers beside the same without, in float32: loss and gradient of rows of
    three lengths, the seconds of the first one, and how many graphs there were after each."""
    dtype = DTYPE if bench.tiny else "float32"                         # so that `step` finds its graphs made
    plain, side = bench.little(dtype), bench.little(dtype)
    with tiny_compiler() if bench.tiny else contextlib.nullcontext():
        vlm.compile_layers(side.m)
    made = torch._dynamo.utils.counters["stats"]
    found, before = {"loss": 0.0, "gradient": 0.0}, made["unique_graphs"]
    for n in (2, 1, 3):
        batch = limit.batch_of(side.m, limit.random_records(bench.small, n), limit.needs_of("mdpo"))
        start = time.perf_counter()
        value, flat = gradient(side, batch, "mdpo", vlm.packed)
        seconds = time.perf_counter() - start
        found.setdefault("first_seconds", seconds)
        truth, exact = gradient(plain, batch, "mdpo", vlm.packed)
        found["loss"] = max(found["loss"], abs(value - truth) / abs(truth))
        found["gradient"] = max(found["gradient"], apart(flat, exact))
        found[f"graphs_of_{n}"] = made["unique_graphs"] - before
    same = found["graphs_of_2"] == found["graphs_of_3"]
    return {**found, "ok": same and found["loss"] < 1e-4 and found["gradient"] < 1e-3}


def waits(bench):
    """How often the host waits for the GPU in a step of train_dpo.py, by PyTorch's own count: as often with
    four micro-batches as with one, in the first epoch and later. A CPU counts none."""
    found = {}
    for parts in (1, 4):
        out = bench.folder / f"waits-{parts}"
        shutil.rmtree(out, ignore_errors=True)
        begin(out, next(iter(bench.fixed), None))
        o = options.Options(out=str(out), device=bench.device, **(TINY if bench.tiny else FIXED))
        o = replace(o, micro_batch=o.batch // parts)
        with contextlib.redirect_stdout(io.StringIO()):
            run = train_dpo.prepare(o, out, command.join(o.device))
        train_dpo.step(run, 0)
        for epoch, t in (("first", 1), ("cached", run.batches.per_epoch)):
            found[f"{epoch}_epoch_{parts}"] = waited(partial(train_dpo.step, run, t))
    same = all(found[f"{epoch}_epoch_1"] == found[f"{epoch}_epoch_4"] for epoch in ("first", "cached"))
    return {**found, "ok": same}


def waited(run):
    """How often PyTorch warns in run() that it waits for the GPU."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in heard)


@contextlib.contextmanager
def tiny_compiler():
    """Inside, modules are compiled by Dynamo alone: kernels for a CPU would take a minute."""
    compiler = torch.nn.Module.compile
    with mock.patch.object(torch.nn.Module, "compile", partialmethod(compiler, backend="eager")):
        yield


# ---------------------------------------------------------------------------------------- the step
def step(bench, loss, micro_batch, *how):
    """A 7B's optimiser step in its first epoch and in later ones, whose reference is kept.

    how: "checkpointing", "compile".
    """
    side, needs = bench.large("checkpointing" in how, "compile" in how), limit.needs_of(loss)
    batch = limit.batch_of(side.m, limit.random_records(bench.shape, int(micro_batch)), needs)
    epochs = {"first": partial(side.step, batch, loss, False),
              "cached": partial(side.step, batch, loss, True)}
    alone, operations = limit.products(side.m, batch.pairs, loss, DTYPE, bench.device)
    start = time.perf_counter()
    epochs["first"]()                                                  # with "compile" it compiles
    begun = time.perf_counter() - start
    taken = limit.rounds({**alone, **epochs}, bench.rounds, bench.device, bench.warm)
    best = limit.fastest(operations, taken)
    rate = operations[best] / statistics.median(taken[best])
    tokens = len(data.pack(batch.pairs, needs).ids)
    found = {"loss": loss, "micro_batch": int(micro_batch), "checkpointing": "checkpointing" in how,
             "compile": "compile" in how, "tokens": tokens, "products_tflops": rate / 1e12,
             "first_step_seconds": begun}
    for epoch, run in epochs.items():
        seconds = statistics.median(taken[epoch])
        work = sum(limit.minimum(side.m, batch.pairs, loss, epoch == "cached").values())
        found[epoch] = {"seconds": seconds, "pairs_per_second": len(batch.pairs) / seconds,
                        "tokens_per_second": tokens / seconds, "fraction": work / rate / seconds,
                        "peak_gib": bench.peak_gib(run)}
    return found


def profile(bench):
    """Where the time of DPO's step of two pairs goes, by torch's profiler: shares."""
    side = bench.large()
    batch = limit.batch_of(side.m, limit.random_records(bench.shape), limit.needs_of("dpo"))
    run = partial(side.step, batch, "dpo", False)
    run()
    return limit.profile(run, bench.device)


def trl(bench, micro_batch, checkpointing=""):
    """TRL's step on the same pairs beside ours; checkpointing: with TRL's default, which recomputes.

    TRL's head is the tiled one, over responses alone. Its step is tried in autocast, which its train() does,
    and without: the faster one counts.
    """
    import vs_trl
    side, o = bench.large(), SimpleNamespace(dtype=DTYPE, device=bench.device)
    found = {"micro_batch": int(micro_batch), "checkpointing": bool(checkpointing)}
    records = limit.random_records(bench.shape, int(micro_batch))
    for loss in LOSSES:
        batch = limit.batch_of(side.m, records, limit.needs_of(loss))
        with made_here(bench.random):
            theirs = vs_trl.TRL(bench.folder / "large", bench.shape, o, loss, side, bool(checkpointing))
        theirs.take(side)
        collated = theirs.collate(records, loss)
        sides = {"plain": partial(theirs.step, collated),
                 "autocast": partial(in_autocast, theirs, collated),
                 "first": partial(side.step, batch, loss, False),
                 "cached": partial(side.step, batch, loss, True)}
        taken = limit.rounds(sides, bench.rounds, bench.device, bench.warm)
        best = min(("plain", "autocast"), key=lambda name: statistics.median(taken[name]))
        times = vs_trl.ratios({name: [seconds] for name, seconds in taken.items()}, best)
        found[loss] = {"setting": best, "pairs_per_second": len(records) / statistics.median(taken[best]),
                       "peak_gib": bench.peak_gib(sides[best]),
                       "ours_peak_gib": bench.peak_gib(sides["first"]),
                       "ours_first": times["first"][0], "ours_cached": times["cached"][0]}
        del theirs, sides, collated
        bench.tidy()
    return found


def in_autocast(theirs, collated):
    with theirs.trainer.accelerator.autocast():
        theirs.step(collated)


# ---------------------------------------------------------------------------------------- another family
def qwen(bench):
    """Qwen2.5-VL-3B's step of two pairs with mDPO, and its packed loss beside the naive one."""
    bench.tidy(broken=True)                                            # room for this one
    folder = bench.folder / "qwen"
    with made_here(partial(qwen3b.random, qwen3b.write(folder, bench.tiny), DTYPE, bench.device),
                   "Qwen2_5_VLForConditionalGeneration"):
        side = limit.Ours(folder, bench.shape, DTYPE, bench.device)
    pairs, images, rejected = [], [], []
    for i, record in enumerate(limit.random_records(bench.shape)):
        sizes = (record["image"].size,)
        prompt = side.m.front.prompt_ids(record["prompt"], sizes)
        responses = [side.m.front.response_ids(record[name]) for name in ("chosen", "rejected")]
        pairs.append(data.Pair(str(i), prompt, prompt, *responses, sizes, sizes))
        images += side.m.front.prepare([record["image"]])
        rejected += side.m.front.prepare([record["image_rejected"]])
    batch = vlm.Batch(pairs, images, rejected, [0, 1], [1, 2], 2, 2)
    value, naive = (side.loss(batch, "mdpo", False, forward) for forward in (vlm.packed, vlm.naive))
    side.optimiser.grad.zero_()
    tokens = len(data.pack(pairs, limit.needs_of("mdpo")).ids)
    found = {"parameters": sum(p.numel() for p in side.m.model.parameters()), "tokens": tokens,
             "loss": value, "naive_loss": naive}
    for epoch, cached in (("first", False), ("cached", True)):
        run = partial(side.step, batch, "mdpo", cached)
        seconds = bench.seconds(run, bench.rounds)
        found[epoch] = {"pairs_per_second": 2 / seconds, "tokens_per_second": tokens / seconds,
                        "peak_gib": bench.peak_gib(run)}
    return {**found, "ok": abs(value - naive) < 0.05 * naive}


# ---------------------------------------------------------------------------------------- the rest
def generation(bench):
    """Greedy answers of a 7B, all of one length: the random model ends none by itself."""
    side = bench.large()
    n, new = (4, 4) if bench.tiny else (ANSWERS, NEW)
    records, found = limit.random_records(bench.shape, n), {"new_tokens": new}
    images, questions = [[record["image"]] for record in records], ["w7 w8 w9 w10 w11 w12"] * n
    for size in (2, 4) if bench.tiny else AT_ONCE:
        complete(side.m, images[:size], questions[:size], 2, size)
        start = limit.clock(bench.device)
        complete(side.m, images, questions, new, size)
        seconds = limit.clock(bench.device) - start
        found[f"batch_{size}"] = {"answers_per_second": n / seconds, "tokens_per_second": n * new / seconds}
    return found


def classroom(bench):
    """The main command as a whole: its seconds and its table."""
    out = bench.folder / "classroom"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    summary = run_classroom(out, device=bench.device, **(TINY if bench.tiny else {}))
    found = {"seconds": time.perf_counter() - start, "training_seconds": summary["seconds"],
             "pairs": summary["pairs"], "steps": summary["steps"]}
    for when in ("before", "after"):
        for name in ("chair_s", "chair_i", "cover", "pope_adversarial_acc"):
            found[f"{name}_{when}"] = summary[when][name]
    return found


def encode(bench):
    """Stable Diffusion 3's T5 in bfloat16, a prompt at a time."""
    from transformers import T5Config, T5EncoderModel

    from bench import synthesis as sizes
    from synthesis import images
    bench.tidy(broken=True)                                            # room for this one
    with torch.device(bench.device):
        encoder = T5EncoderModel(T5Config(**sizes.T5 | (SMALL_T5 if bench.tiny else {})))
    encoder = encoder.to(torch.bfloat16).eval()
    ids = torch.ones(1, images.MOST, dtype=torch.int64, device=bench.device)
    with torch.no_grad():
        return {"tokens": images.MOST, "prompts_per_second": 1 / bench.seconds(partial(encoder, ids))}


def paint(bench):
    """Stable Diffusion 3's transformer and VAE in bfloat16: four scales of one image, few steps and more."""
    from bench import synthesis as sizes
    from synthesis import images
    bench.tidy(broken=True)                                            # room for this one
    sd3 = sizes.SD3 | (SMALL_SD3 if bench.tiny else {})
    vae = sizes.VAE | (SMALL_VAE if bench.tiny else {})
    folder = bench.folder / "sd3"
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text("{}")
    with made_here(partial(pipeline, bench.device, sd3, vae), "StableDiffusion3Pipeline", "diffusers"):
        painter = images.Painter(folder, bench.device, torch.bfloat16)
    kind = {"device": bench.device, "dtype": torch.bfloat16}
    prompt = (torch.randn(1, images.MOST + 77, sd3["joint_attention_dim"], **kind),
              torch.randn(1, sd3["pooled_projection_dim"], **kind))
    taken = {}
    for steps in (1, FEW, MORE):                                       # the first one is the warming up
        start = limit.clock(bench.device)
        shown = painter(prompt, prompt, SCALES, range(len(SCALES)), steps=steps)
        taken[steps] = limit.clock(bench.device) - start
    step = (taken[MORE] - taken[FEW]) / (MORE - FEW)
    return {"pixels": shown[0].width, "images": len(shown), "seconds_per_step": step,
            "seconds_of_28_steps": taken[MORE] + (28 - MORE) * step}


def pipeline(device, sd3, vae, kind):
    """diffusers' pipeline without encoders."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    from synthesis import images
    with torch.device(device):
        transformer = SD3Transformer2DModel(**sd3)
        decoder = AutoencoderKL(**vae, scaling_factor=1.5305, shift_factor=0.0609)
    return kind(transformer=transformer.to(torch.bfloat16).eval(), vae=decoder.to(torch.bfloat16).eval(),
                scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **dict.fromkeys(images.ENCODERS))
