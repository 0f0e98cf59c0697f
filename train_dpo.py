"""Train a vision-language model on preference pairs: DPO, CoPO, AncPO, mDPO, SFT, or a loss of your own.

    python train_dpo.py                                     the built-in world
    python train_dpo.py --loss dpo --image_rejected none    another loss
    python train_dpo.py --preset mdpo-llava --model DIR --data FILE
                                                            a 7B, on one GPU
    torchrun --nproc_per_node 2 train_dpo.py --preset ...   the same on two
    python train_dpo.py --dry_run --preset ...              what it would need

The first takes two minutes on two CPU cores. A run is a folder (runs/PRESET-LOSS-sSEED-HASH, or --out):
log.jsonl, summary.json, adapter/ (PEFT's format), or model/ (a whole model) with --no-lora, report.html,
last/ (the checkpoint). The same command continues a killed run, bit for bit on a CPU; a finished run prints
its table again. Papers: mDPO, arXiv 2406.11839; PDS-DPO, arXiv 2412.17417.

Departures from the official code:

1. The rejected image is drawn once per pair and run (`--set redraw=true`: once per epoch). The official mDPO
code draws it anew in every forward, so that policy and reference score different crops.

2. The reference is the policy with LoRA switched off, or (--no-lora) a frozen copy of what trains; its
log-probs are kept from the first epoch on (with redraw they are not).

3. Images are encoded once, responses share their prompt, nothing is padded (`--forward naive` to compare).

4. Gradients and the optimiser's state are divided among the ranks by hand: ZeRO-2's saving without DeepSpeed.
`--shard` also splits the base (and the copy) over them, for models that one GPU cannot hold.

5. A response is stripped of white space around it, which the official codes keep.
"""
import gc
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import data

# isort: split
import torch
import torch.distributed as dist
from tqdm import tqdm

import lora
import losses
from evaluation import answers, benchmarks
from model import command, front, vlm
from training import batches, checkpoint, look, options, plan, report
from training.optimiser import Zero2
from training.reference import Reference, cache_file

WATCHED = 6                              # answers of each evaluation that the log and the page show


@dataclass
class Run:
    """All that a step, an evaluation and a checkpoint need."""
    o: options.Options
    out: Path
    ranks: command.Ranks
    model: vlm.VLM
    first: Any                           # as ranks.first, for work that may run the model
    loss: Any                            # f(policy, reference, beta, delta) -> (B,)
    pairs: batches.Pairs
    reference: Reference
    val: batches.Pairs | None
    val_reference: Reference | None      # of rank 0, which evaluates alone
    optimiser: Zero2
    batches: batches.Batches
    steps: int
    base: str                            # which base: a resumed run must have the same
    state: checkpoint.State
    stop: checkpoint.Stop
    stopping: bool = False               # any rank was asked to stop
    send: Any = None                     # checkpoint.tracker's, of rank 0


# ---------------------------------------------------------------------------------------- set-up
def prepare(o, out, ranks):
    """Check the pairs, load the model, divide the optimiser among the ranks -> Run. Raises UserError."""
    sharded = o.shard and ranks.world > 1
    if o.shard and not sharded:
        print("--shard: one process alone holds the whole base; start several with torchrun", file=sys.stderr)

    # ---- the pairs, before a weight is read ----
    path, held_out = ranks.first(batches.classroom_files, o, out)
    family = front.open_folder(o.model, o.template or None, o.images)
    needs, reads = options.needs_of(o), ranks.first(options.announce, o)
    pairs = batches.checked(family, path, o, needs, ranks)
    val = val_reference = None
    if held_out:                                                # a margin needs the rejected response
        val = batches.checked(family, held_out, o, needs | {"rejected"}, ranks)
    ranks.first(plan.refuse, family.config, o, pairs.tokens, ranks)

    # ---- the model and its trainable weights ----
    dtype = command.dtype(o.dtype, ranks.device)
    if sharded:
        from training import shard
        model = shard.load_in_shards(partial(load, family, o, dtype, "cpu"), ranks)
        first = partial(shard.first, ranks, model)
    else:
        model = load(family, o, dtype, ranks.device)
        first = ranks.first
    base = command.identity(family.folder)
    if o.adapter:
        base += command.identity(o.adapter)
        lora.begin_here(model.model)
    trained = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    betas = o.adam_beta1, o.adam_beta2
    adamw = partial(torch.optim.AdamW, lr=o.lr, betas=betas, weight_decay=o.weight_decay,
                    fused=ranks.device.type == "cuda")

    # ---- the run ----
    forward = vlm.FORWARDS[o.forward]
    file_of = partial(cache_file, o, f"{base} {o.dtype} {dtype} {ranks.device.type}")
    reference = Reference(len(pairs), model, forward, reads, ranks, o.shard,
                          file_of(reads, pairs, "training"))
    if val:
        val_reference = Reference(len(val), model, forward, val.needs, command.ALONE,
                                  file=file_of(val.needs, val, "validation"))
    steps = options.steps_of(o, len(pairs))
    return Run(o, out, ranks, model, first, options.loss_of(o), pairs, reference, val, val_reference,
               optimiser=Zero2(trained, adamw, ranks, o.clip),
               batches=batches.Batches(pairs, o, ranks, steps), steps=steps,
               base=base, state=checkpoint.State(), stop=checkpoint.Stop())


def load(family, o, dtype, device):
    """The VLM with its trainable weights: LoRA's, or all but the vision tower's."""
    packed = o.dtype == "nf4"
    model = vlm.load(family, dtype=dtype, device="cpu" if packed else device)
    plan.adapt(model.model, o)
    if packed:
        lora.quantise(model.model, device)
    if not o.lora_r:
        vlm.train_whole(model)
    if o.checkpointing:
        model.language_model.train()                             # transformers recomputes in train mode only
        model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    if o.compile:
        vlm.compile_layers(model)
    return model


# ---------------------------------------------------------------------------------------- one step
def step_loss(run, batch, frozen):
    """The loss of a vlm.Batch (B,), and the log-probs of policy and reference. frozen: a Reference."""
    features = vlm.encode_images(run.model, batch)                     # once, for policy and reference
    reference = frozen(batch, features)                                # LoRA off; kept from epoch to epoch
    policy = frozen.forward(run.model, batch.pairs, features, frozen.needs | run.pairs.needs)
    policy = vlm.without_image(policy, batch.pairs)
    loss = run.loss(policy, reference, run.o.beta, run.o.delta)        # (B,)
    return loss, policy, reference


def step(run, t):
    """One optimiser step on the mean loss of `o.batch` pairs, over all ranks. Returns its line of the log."""
    began = time.monotonic()
    measured, places = [], []
    for batch in run.batches(t):                                       # this rank's micro-batches
        loss, policy, reference = step_loss(run, batch, run.reference)
        (loss[:batch.counts].sum() / batch.of).backward()
        if batch.counts:                                               # else a filler
            measured.append(measures(policy, reference, loss, run.o.beta))
            places += batch.places

    # ---- all ranks together; the device is waited for here, and for the gradient's norm ----
    ours = places, fetched(measured), run.batches.waited, run.stop.asked
    places, rows, waited, asked = zip(*run.ranks.gather(ours), strict=True)
    places, rows = [*chain(*places)], [*chain(*rows)]                  # of all pairs in the step
    run.stopping = any(asked)
    rate = learning_rate(t, run.steps, run.o)
    norm = run.optimiser.step(rate)
    broken = [place for place, row in zip(places, rows, strict=True) if not math.isfinite(row["loss"])]
    if broken or not math.isfinite(norm):
        ids = [run.pairs.record(place)["id"] for place in broken or places]
        raise data.UserError(f"loss or gradient of step {t + 1} is not finite; the pairs are "
                             f"{', '.join(ids)}: look at them or lower --lr; {run.out} keeps its checkpoint")
    seconds = time.monotonic() - began
    tokens = sum(run.pairs.tokens[place] for place in places)
    return {"step": t + 1, "epoch": round((t + 1) / run.batches.per_epoch, 4), "lr": rate, "grad_norm": norm,
            **means(rows),
            "tokens_per_second": round(tokens / seconds),
            "waiting": round(max(waited) / seconds, 4),
            "memory_gib": round(torch.cuda.max_memory_allocated() / plan.GIB, 3)}          # of the GPU


def learning_rate(t, steps, o):
    """Linear warm-up from 0 to o.lr, then a cosine to 0: transformers' get_cosine_schedule_with_warmup."""
    warm = math.ceil(o.warmup * steps)
    if t < warm:
        return o.lr * t / warm
    return o.lr * 0.5 * (1 + math.cos(math.pi * (t - warm) / (steps - warm)))


def measures(policy, reference, loss, beta):
    """A micro-batch's numbers for the log (B,), under TRL's names, of the log-probs that the loss reads."""
    chosen, rejected, image = losses.rewards(policy, reference, beta)
    found = {"loss": loss, "rewards/chosen": chosen, "logps/chosen": policy.chosen,
             "rewards/rejected": rejected, "logps/rejected": policy.rejected}
    if rejected is not None:
        found["rewards/margins"] = chosen - rejected
    if image is not None:                                              # infinite for pairs without an image
        found |= {"rewards/image_rejected": image, "rewards/image_margins": chosen - image}
    return {name: value.detach() for name, value in found.items() if value is not None}


def fetched(measured):
    """[measures of a micro-batch] -> [{name: value} of each pair], in one copy."""
    if not measured:
        return []
    tables = [torch.stack([*found.values()], 1) for found in measured]                          # (B, F)
    return [dict(zip(measured[0], row, strict=True)) for row in torch.cat(tables).tolist()]


def means(rows):
    """{name: mean over the pairs}, and accuracies: the shares of margins above 0."""
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows if "/image_" not in name or math.isfinite(row[name])]
        if values:
            found[name] = fmean(values)
            if name.endswith("margins"):
                found[name.replace("margins", "accuracies")] = fmean(x > 0 for x in values)
    return found


# ---------------------------------------------------------------------------------------- the loop
def train(run):
    """Evaluate, take the remaining steps, evaluate again. Returns the summary."""
    o = run.o
    with vlm.base_of(run.model):                             # the adapter changes nothing yet, and costs time
        before = run.first(evaluate, run, "before")          # first: restore() loads trained weights
    checkpoint.restore(run)
    state = run.state
    if state.step == 0:
        checkpoint.log(run, checkpoint.opening(run))
        checkpoint.judge(run, before)
        note(run, "before", before)
    if run.ranks.rank == 0:
        run.send = checkpoint.tracker(run)
    recent = []
    began = time.monotonic() - state.seconds
    bar = tqdm(desc="training", initial=state.step, total=run.steps, disable=run.ranks.rank > 0)
    with run.stop, bar:
        while not checkpoint.over(run):
            line = step(run, state.step)
            state.step += 1
            state.seconds = time.monotonic() - began
            checkpoint.log(run, line | {"seconds": round(state.seconds, 2)})
            bar.update()
            bar.set_postfix(loss=f"{line['loss']:.3f}", chosen=f"{line['logps/chosen']:+.2f}")
            recent.append(line)
            if state.step % checkpoint.WINDOW == 0 and run.ranks.rank == 0:
                tqdm.write(checkpoint.warning(recent, o), sys.stderr, end="")
                recent = []
            due = o.eval_every and state.step % o.eval_every == 0
            if o.keep if state.step == run.steps else due:             # `after` may be another step's
                found = run.first(evaluate, run, f"step-{state.step}")
                checkpoint.judge(run, found)
                note(run, f"step-{state.step}", found, eval=found)
            over = checkpoint.over(run)
            full = state.step % o.save_every == 0 or state.step % run.batches.per_epoch == 0
            if full or over or run.stopping:
                checkpoint.save(run)
            if run.stopping and not over:
                raise KeyboardInterrupt
    if o.keep:
        checkpoint.load(run, run.out / checkpoint.BEST)
    after = run.first(evaluate, run, "after")
    note(run, "after", after)
    weights = run.optimiser.whole("weight") if run.optimiser.parts else None    # --shard: from all ranks
    return run.first(finish, run, before, after, weights)


# ---------------------------------------------------------------------------------------- before and after
def evaluate(run, name):
    """Scores of the model as it is: the classroom's metrics or those of held-out pairs; whether the model
    looks; eval_data's questions. They are kept in NAME.json, so that a resumed run does not ask again."""
    o = run.o
    out = run.out
    file = out / f"{name}.json"
    found = checkpoint.kept(file, report.values)
    if found is not None:
        return found
    for stale in out.glob(f"{name}.*jsonl*"):                             # of other weights, if a GPU resumed
        stale.unlink()
    found = {}
    if run.model.front.is_classroom:
        answers.answer_scenes(run.model, out / "scenes/scenes.jsonl", out / f"{name}.jsonl",
                              max_new_tokens=o.max_new_tokens, description=f"{name}: answering")
        found = answers.score_classroom(out / f"{name}.jsonl")
    else:
        if run.val:
            found = validate(run, name)
        if o.eval_every:
            answers.answer_questions(run.model, "pairs", questions(run.val or run.pairs, out / "scenes"),
                                     out / f"{name}.jsonl", max_new_tokens=o.max_new_tokens)
    if o.look and run.val:
        found["look"] = look.look(run.model, run.val.records, run.val.good, o, name, out / "before.look.json")
    if o.eval_data:
        asked = answers.quick(run.model, o.eval_data, out / f"{name}.questions.jsonl", o.eval_images,
                              o.eval_annotations, o.eval_synonyms, o.follow_links)
        found |= {f"questions_{key}": value for key, value in asked.items()}
    data.atomic_write(file, json.dumps(found))
    return found


def questions(pairs, folder):
    """The first few pairs' that one image and no turn before it ask; a folder gets their images."""
    folder.mkdir(exist_ok=True)
    records = map(pairs.record, range(len(pairs)))
    usable = (record for record in records if len(record["images"]) == 1 and not record["history"])
    found = []
    for n, record in enumerate(islice(usable, WATCHED)):
        line = {"id": record["id"], "question": record["question"], "image": f"{n}.png",
                "truth": {"present": [], "absent": []}}                          # unknown: nothing is marked
        path = folder / line["image"]
        data.read_image(*record["images"]).save(path)
        found.append(benchmarks.Question(line, record["question"], path))
    return found


@torch.no_grad()
def validate(run, name):
    """Loss, margin and accuracy on held-out pairs, by the same step_loss."""
    n = len(run.val)
    measured = []
    for places in tqdm(data.chunks(range(n), run.o.micro_batch), f"{name}: validation pairs"):
        batch = batches.join([run.val.read(place) for place in places])
        loss, policy, reference = step_loss(run, batch, run.val_reference)
        measured.append(measures(policy, reference, loss, run.o.beta))
    run.val_reference.keep()
    found = means(fetched(measured))
    return {"loss": found["loss"], "margin": found["rewards/margins"],
            "accuracy": 100 * found["rewards/accuracies"], "n": n}


def note(run, name, found, **more):
    """An evaluation's line of the log, and the page as it is now. The scores of before and after are in
    summary.json."""
    if "look" in found:
        more = {"look": found["look"]} | more
    if run.o.eval_every and run.ranks.rank == 0:
        more["answers"] = report.said_by(run.out, name)[:WATCHED]
    if more:
        checkpoint.log(run, {"evaluation": name, **more})
    if name != "after":                                      # its page waits for summary.json
        run.ranks.first(report.write, run.out)


def finish(run, before, after, weights):
    """adapter/ or model/, and summary.json. weights: see lora.write_folder. Returns the summary."""
    out = run.out
    model = run.model
    state = run.state
    summary = {"before": before, "after": after, "pairs": len(run.pairs), "steps": state.step,
               "seconds": round(state.seconds, 1), "options": options.decisive(run.o)}
    if run.o.keep:
        summary["remarks"] = [f"{state.step} of {run.steps} steps were taken; the weights are those of step "
                              f"{state.best}, the best by {state.measure}"]
    folder = out / ("adapter" if run.o.lora_r else "model")
    if run.o.lora_r:
        lora.save(model.model, folder, str(model.front.folder))
    elif not folder.exists():
        lora.write_folder(model.model, model.front.folder, folder, weights)
    if model.front.is_classroom:
        summary["difference"] = answers.difference(out / "before.jsonl", out / "after.jsonl")
    digest = options.data_identity(run.o, "data")
    data.atomic_write(folder / "README.md", report.card(out.resolve().name, summary, digest))
    data.atomic_write(out / "summary.json", json.dumps(summary, indent=1))
    return summary


# ---------------------------------------------------------------------------------------- the command
def launch(o, ranks):
    """Train the rest of the run; rank 0 prints its table."""
    out = options.run_folder(o)
    lock = []                                            # kept, and with it the folder, until this returns
    ranks.first(lambda: lock.append(options.claim(out, o)))
    if not (out / ".lock").exists():
        raise data.UserError(f"--out {out} is not the folder that rank 0 sees: give one that all nodes share")
    summary = checkpoint.kept(out / "summary.json", report.told)
    if not summary:
        # ---- three settings for the whole process ----
        gc.set_threshold(100_000)                        # what libraries make stays: look through it rarely
        if ranks.device.type == "cpu":
            vlm.keep_memory()                            # the next step reuses a step's freed memory
            if batches.built_in(o):
                torch.set_num_threads(1)                 # its matrices are tiny: a second thread only waits
        summary = train(prepare(o, out, ranks))
    if ranks.rank == 0:
        print("\n".join(report.told(summary)) + f": {report.write(out)}")
    ranks.barrier()


def main():
    rank = int(os.environ.get("RANK", 0))
    try:
        o = options.parse(sys.argv[1:], __doc__)
        if o.dry_run:
            for line in [] if rank else plan.show(o):
                print(line)
        else:
            launch(o, command.join(o.device))
    except (data.UserError, OSError) as e:
        sys.exit(f"train_dpo.py: {e}" if rank == 0 or dist.is_initialized() else 1)
    except torch.OutOfMemoryError:
        sys.exit(f"train_dpo.py: out of memory: {plan.advice(o, int(os.environ.get('WORLD_SIZE', 1)))}")
    except KeyboardInterrupt:
        sys.exit("train_dpo.py: stopped; the same command continues from its checkpoint" if rank == 0 else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
