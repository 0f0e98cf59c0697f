"""Train a vision-language model on preference pairs with LoRA: DPO, CoPO, AncPO, mDPO, SFT, or your own loss.

    python train_dpo.py                                           the built-in world: two CPU cores, 2 minutes
    python train_dpo.py --loss dpo --image_rejected none          another loss, the same pairs
    python train_dpo.py --preset mdpo-llava --model DIR --data F  LLaVA-1.5-7B on one GPU
    torchrun --nproc_per_node 2 train_dpo.py --preset ...         the same run on two
    python train_dpo.py --dry_run --preset ...                    what it would need: steps, tokens, GiB a GPU

A run is a folder (runs/PRESET-LOSS-sSEED-HASH, or --out): log.jsonl, summary.json, adapter/ (PEFT's format),
or model/ (a llava-hf folder) with --no-lora, report.html, last/ (the checkpoint). The same command again goes
on where a killed run stopped, bit for bit on a CPU; a finished run prints its table again. Papers: mDPO,
arXiv 2406.11839; PDS-DPO, arXiv 2412.17417.

Departures from the official code:
 1. The rejected image is drawn once per pair and run (`--set redraw=true`: once per epoch). The official mDPO
    code draws it anew in every forward, so that policy and reference score different crops.
 2. The reference is the policy with LoRA switched off, or (--no-lora) a frozen copy of what trains; its
    log-probs are kept from the first epoch on.
 3. Images are encoded once, responses share their prompt, nothing is padded (`--forward naive` to compare).
 4. Gradients and Adam's moments are sharded over the ranks by hand: ZeRO-2's saving without DeepSpeed.
    `--shard` also deals the base (and the copy) to them, for models that one GPU cannot hold.
"""
import errno
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import command
import data
import diagnose
import families
import lora
import losses
import options
import plan
import vlm
from ranks import Zero2
from records import Records, check
from reference import Feed, Reference, encode, read_pair


# ---------------------------------------------------------------------------------------- before and after
def classroom_files(o, out):
    """The built-in scenes and pairs, made by classroom/pairs.py as a program. Returns the pairs' path."""
    def make(folder, *arguments):
        program = Path(__file__).parent / "classroom" / "pairs.py"
        command = [sys.executable, str(program), *arguments, "--out", str(folder)]
        if not folder.exists():
            done = subprocess.run(command, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
            if done.returncode:
                why = (done.stderr.strip() or "no word why").splitlines()[-1]
                raise data.UserError(f"{program} failed: {why}")
    built_in = (data.model_folder(o.model) / "classroom.json").exists()
    if built_in:
        make(out / "scenes", "scenes", "--seed", str(o.eval_seed), "--split", o.split,
             "--n", str(o.scenes), "--questions", str(o.questions))
    if o.data == "classroom":
        make(out / "data", "--seed", str(o.seed), "--n", str(o.pairs), *shlex.split(o.pair_options))
    if (built_in or o.data == "classroom") and o.look and not o.val_data:
        make(out / "held_out", *shlex.split(o.pair_options), "--split", "tune",
             "--seed", str(o.eval_seed), "--n", str(min(o.look, o.pairs)))
    return out / "data" / "pairs.jsonl" if o.data == "classroom" else Path(o.data)


def evaluate(m, o, out, name, val):
    """Metrics of the model as it stands: of the classroom or of val_data, and of eval_data's questions."""
    found = measured(m, o, out, name, val)
    if o.look and (held_out := val or diagnose.made(out)):
        found["look"] = diagnose.look(m, *held_out[:2], o, name, out / "before.look.json")
    if o.eval_data:
        import answers
        asked = answers.quick(m, o.eval_data, out / f"{name}.questions.jsonl", o.eval_images or None,
                              o.eval_annotations or None, o.eval_synonyms or None,
                              description=f"{name}: questions")
        found |= {f"questions_{key}": value for key, value in asked.items()}
    return found


def measured(m, o, out, name, val):
    """The classroom's metrics where the model is the classroom's, else loss, margin, accuracy on val_data."""
    if m.front.is_classroom:
        import answers
        answers.answer_scenes(m, out / "scenes" / "scenes.jsonl", out / f"{name}.jsonl",
                              max_new_tokens=o.max_new_tokens, description=f"{name}: answering")
        return answers.score_classroom(out / f"{name}.jsonl")
    if val is None:
        return {}
    (records, good, reference), forward = val, vlm.FORWARDS[o.forward]
    loss_of = losses.resolve(o.loss, anchors=o.anchors)
    needs, rows = losses.needs(loss_of) | {"chosen", "rejected"}, []
    for at in tqdm(range(0, len(good), o.micro_batch), f"{name}: validation pairs"):
        places = [*range(at, min(at + o.micro_batch, len(good)))]
        batch = [read_pair(m, records, good, p, o, needs, 0) for p in places]
        with torch.no_grad():
            features = encode(m, batch)
            frozen = reference(m, places, batch, features, forward, needs, False)
            policy = forward(m, [b[0] for b in batch], features, needs)
        chosen, rejected, _ = losses.rewards(policy, frozen, o.beta)
        loss = loss_of(policy, frozen, o.beta, o.delta)
        rows += zip(loss.tolist(), (chosen - rejected).tolist(), strict=True)
    n = len(rows)
    return {"loss": sum(x for x, _ in rows) / n, "margin": sum(x for _, x in rows) / n,
            "accuracy": 100 * sum(x > 0 for _, x in rows) / n, "n": n}


# ---------------------------------------------------------------------------------------- the loop
class Stop:
    """SIGTERM and Ctrl-C, heard at the end of a step: save and leave. A second one acts at once."""
    asked, armed = False, False

    def __call__(self, number, frame):
        if self.asked or not self.armed:
            raise KeyboardInterrupt
        self.asked = True


def learning_rate(step, steps, o):
    """Linear warm-up from 0 to o.lr, then a cosine to 0: transformers' get_cosine_schedule_with_warmup."""
    warm = math.ceil(o.warmup * steps)
    if step < warm:
        return o.lr * step / warm
    return o.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def measures(policy, reference, loss, beta):
    """What is logged, summed over a micro-batch, under TRL's names; what a loss does not read is left out."""
    chosen, rejected, image = losses.rewards(policy, reference, beta)
    got = {"loss": loss, "rewards/chosen": chosen, "logps/chosen": policy.chosen}
    if rejected is not None:
        got |= {"rewards/rejected": rejected, "logps/rejected": policy.rejected,
                "rewards/margins": chosen - rejected, "rewards/accuracies": chosen > rejected}
    if image is not None:
        got |= {"rewards/image_rejected": image, "rewards/image_margins": chosen - image,
                "rewards/image_accuracies": chosen > image}
    return {k: v.detach().cpu().double().sum().item() for k, v in got.items()}


def train(o, ranks):
    """One run, from its options to its summary. Returns (summary, the run's folder)."""
    rank, world, device = ranks.rank, ranks.world, ranks.device
    out, lock = options.run_folder(o), []
    ranks.first(lambda: lock.append(options.claim(out, o)))
    if not (out / ".lock").exists():
        raise data.UserError(f"--out {out} is not what rank 0 sees: give a folder that all nodes share")
    if (out / "summary.json").exists():
        return json.loads((out / "summary.json").read_text()), out

    # Pairs are checked before the model loads, and again as tokens after.
    loss_of, forward = losses.resolve(o.loss, anchors=o.anchors), vlm.FORWARDS[o.forward]
    needs = losses.needs(loss_of) | {"chosen"}
    redraw = o.redraw and "image_rejected" in needs

    def checked(path):
        records, image = Records(path, o.image_root or None), "image_rejected" in needs
        cache = out / "checked" if o.data == "classroom" else None       # a user's files: remembered for all
        return records, ranks.first(lambda: check(records, needs_image=image, skip_bad=o.skip_bad,
                                                  cache_dir=cache))
    records, good = checked(ranks.first(lambda: classroom_files(o, out)))
    val = checked(o.val_data) if o.val_data else None
    val = val and (*val, Reference(len(val[1]), 1))                 # of rank 0, which evaluates alone
    dtype = ("bfloat16" if device.type == "cuda" else "float32") if o.dtype == "auto" else o.dtype
    sharding = o.shard and world > 1
    if o.shard and not sharding:
        print("--shard: one process alone holds the whole base; start several with torchrun", file=sys.stderr)

    front = families.open_folder(o.model, o.template or None, o.images)
    good, lengths = ranks.first(lambda: plan.usable(front, records, good, o, needs))
    ranks.first(lambda: plan.refuse(front.config, o, lengths, dtype, device, world))

    def load(place=device):
        m = vlm.load(front, dtype=getattr(torch, dtype), device=place)
        if o.lora_r:
            targets = [target for target in o.lora_targets.split(",") if target]
            lora.add_lora(m.model, o.lora_r, o.lora_alpha, targets, seed=o.seed)
        else:
            vlm.train_whole(m)
        return m
    if sharding:
        import shard
    m = shard.load_in_shards(lambda: load("cpu"), ranks) if sharding else load()
    if m.front.is_classroom and device.type == "cpu":
        torch.set_num_threads(1)                     # its matrices are tiny: a second thread only waits
    if o.checkpointing:
        m.language_model.train()                # transformers recomputes in train mode only
        m.language_model.activation_checkpointing_enable({"use_reentrant": False})

    def evaluated(name):
        """Scores by rank 0, kept in NAME.json so that a resumed run does not ask again."""
        def work():
            if not (out / f"{name}.json").exists():
                (out / f"{name}.jsonl").unlink(missing_ok=True)      # of other weights, if a GPU resumed
                data.atomic_write(out / f"{name}.json", json.dumps(evaluate(m, o, out, name, val)))
            return json.loads((out / f"{name}.json").read_text())
        return shard.first(ranks, work, m) if sharding else ranks.first(work)
    before = evaluated("before")

    per_epoch = math.ceil(len(good) / o.batch)
    steps = min(o.max_steps or math.inf, o.epochs * per_epoch)
    trained = {name: p for name, p in m.model.named_parameters() if p.requires_grad}
    betas = o.adam_beta1, o.adam_beta2
    adamw = partial(torch.optim.AdamW, lr=o.lr, betas=betas, weight_decay=o.weight_decay)
    optimiser = Zero2(trained, adamw, ranks, o.clip)
    reference, base = Reference(len(good), world, sharding), data.identity(m.front.folder)
    state = {"step": 0, "seconds": 0.0, "log_bytes": 0, "chosen": []}
    state |= restore(out, optimiser, reference, base)
    log = Log(out / "log.jsonl", state["log_bytes"], rank)
    if state["step"] == 0:
        log.write({"options": asdict(o), "ranks": world, "device": str(device), "dtype": dtype,
                   "pairs": len(good), "steps": steps, "template": m.front.template_name, "base": base,
                   "images": m.front.preparation, "official": options.departures(o),
                   "base_bytes": frozen_bytes((m.frozen or m).model), **options.provenance()}, before)
    stop, began = Stop(), time.monotonic() - state["seconds"]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    stop.armed = True

    feed = Feed(m, records, good, [*map(plan.tokens, lengths)], o, needs, steps, rank, world, sharding)
    bar = tqdm(range(state["step"], steps), "training", initial=state["step"], total=steps, disable=rank > 0)
    for step in bar:
        tick, (size, micros) = time.monotonic(), feed(step)
        sums, tokens, waited, bad = {}, 0, 0.0, []
        for places, counts, futures in micros:
            since = time.monotonic()
            batch = [future.result() for future in futures]
            waited += time.monotonic() - since
            pairs, features = [b[0] for b in batch], encode(m, batch)
            frozen = reference(m, places, batch, features, forward, needs, redraw)
            policy = forward(m, pairs, features, needs)
            loss = loss_of(policy, frozen, o.beta, o.delta)            # (B,)
            (loss.sum() * counts / size).backward()
            if not counts:
                continue
            for k, v in measures(policy, frozen, loss, o.beta).items():
                sums[k] = sums.get(k, 0.0) + v
            bad += [p.id for p, x in zip(pairs, loss.tolist(), strict=True) if not math.isfinite(x)]
            tokens += sum(map(len, [x for p in pairs for x in (
                p.prompt, p.chosen, p.rejected if "rejected" in needs else "",
                *((p.prompt_rejected, p.chosen) if "image_rejected" in needs else ()))]))
        everyone = [(sums, tokens, waited, bad, stop.asked)] * world
        if world > 1:
            dist.all_gather_object(everyone, everyone[0])
        bad = [i for each in everyone for i in each[3]]
        rate = learning_rate(step, steps, o)
        norm = math.nan if bad else optimiser.step(rate)
        if not math.isfinite(norm):
            bad = bad or [records[good[p]]["id"] for places, *_ in micros for p in places]
            raise data.UserError(f"loss or gradient of step {step + 1} is not finite; the pairs are "
                                 f"{', '.join(bad)}: look at them or lower --lr; {out} keeps its checkpoint")

        now = time.monotonic()
        mean = {k: sum(each[0].get(k, 0.0) for each in everyone) / size for k in everyone[0][0]}
        line = {"step": step + 1, "epoch": round((step + 1) / per_epoch, 4), "lr": rate, "grad_norm": norm,
                **mean, "tokens_per_second": round(sum(each[1] for each in everyone) / (now - tick)),
                "waiting": round(max(each[2] for each in everyone) / (now - tick), 4),
                "seconds": round(now - began, 2), "memory_gib": round(plan.peak(device), 3)}
        state["chosen"] = [*state["chosen"], mean["rewards/chosen"]][-40:]
        if falling(state["chosen"]) and not state.get("warned"):
            state["warned"] = True
            line["warning"] = ("the chosen reward keeps falling below zero: add ancpo to --loss, lower --lr, "
                               "or raise --beta")
            bar.write(f"warning: {line['warning']}", file=sys.stderr)
        if o.eval_every and (step + 1) % o.eval_every == 0 and step + 1 < steps:
            line["eval"] = evaluated(f"step-{step + 1}")
        if step + 1 < steps:                                # the last line waits for `after`
            log.write(line, line.get("eval", {}))
        bar.set_postfix(loss=f"{mean['loss']:.3f}", chosen=f"{mean['rewards/chosen']:+.2f}")
        stopping = any(each[4] for each in everyone)
        if stopping or step + 1 == steps or not (step + 1) % o.save_every or not (step + 1) % per_epoch:
            state |= {"step": step + 1, "seconds": now - began, "log_bytes": log.size(), "line": line}
            save(out, optimiser, reference, base, state, rank)
        if stopping and step + 1 < steps:
            raise KeyboardInterrupt
    stop.armed = False
    after = evaluated("after")
    log.write(state["line"], after)
    summary = {"before": before, "after": after, "pairs": len(good), "steps": steps,
               "seconds": round(state["seconds"], 1), "options": asdict(o)}

    weights = optimiser.weights() if sharding else None

    def finish():
        if o.lora_r:
            lora.save(m.model, out / "adapter", str(m.front.folder))
        elif not (out / "model").exists():
            lora.write_folder(m.model, m.front.folder, out / "model", weights)
        if m.front.is_classroom:
            import answers
            summary["difference"] = answers.difference(out / "before.jsonl", out / "after.jsonl")
            words = answers.word_rewards(m, out, o.beta)
            data.atomic_write(out / "words.json", json.dumps(words, indent=1))
        data.atomic_write(out / "summary.json", json.dumps(summary, indent=1))
        return summary
    return (shard.first(ranks, finish, m) if sharding else ranks.first(finish)), out


# ---------------------------------------------------------------------------------------- checkpoint and log
def save(out, optimiser, reference, base, state, rank):
    """last/checkpoint.safetensors in one move: weights, moments, reference log-probs, the rest as JSON."""
    from safetensors.torch import save as to_bytes
    reference.sync()
    tensors = {**optimiser.state(), "reference/logps": reference.logps, "reference/key": reference.key}
    if rank == 0:
        (out / "last").mkdir(exist_ok=True)
        data.atomic_write(out / "last" / "checkpoint.safetensors",
                          to_bytes(tensors, {"state": json.dumps(state), "base": base}))


def restore(out, optimiser, reference, base):
    """Load the last checkpoint; returns its state, {} if there is none. Raises UserError for other inputs."""
    from safetensors import safe_open
    file = out / "last" / "checkpoint.safetensors"
    if not file.exists():
        return {}
    with safe_open(file, "pt") as f:
        tensors, about = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    if about["base"] != base or len(tensors["reference/key"]) != len(reference.key):
        raise data.UserError(f"{file} was made with another base or number of pairs than --model and --data "
                             "give now: give another --out")
    state = json.loads(about["state"])
    reference.logps, reference.key = tensors.pop("reference/logps"), tensors.pop("reference/key")
    optimiser.load(tensors)
    return state


def frozen_bytes(model):
    """Bytes of the base's weights that this rank holds."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in frozen)


class Log:
    """log.jsonl, cut back to where the checkpoint stood, so that each step stands once. Rank 0 writes."""
    def __init__(self, path, size, rank):
        self.file = open(path, "ab") if rank == 0 else None
        if self.file:
            self.file.truncate(size)

    def write(self, line, scores):
        if self.file:
            data.append_jsonl(self.file, line | {k: v for k, v in scores.items() if k == "look"})

    def size(self):
        return os.fstat(self.file.fileno()).st_size if self.file else 0


def falling(chosen):
    """Whether the chosen reward keeps falling below zero: negative over 20 steps, and under the 20 before."""
    return len(chosen) == 40 and sum(chosen[20:]) < min(0, sum(chosen[:20]))


def main():
    rank = int(os.environ.get("RANK", 0))
    try:
        o = options.parse(sys.argv[1:], __doc__)
        if o.dry_run:
            return print("\n".join(plan.show(o)))
        ranks = command.join(o.device)
        summary, out = train(o, ranks)
        if rank == 0:
            import report
            page = out / "report.html"
            if not page.exists():
                report.write(out)
            print("\n".join(report.table(summary)))
            print(f"{summary['pairs']} pairs, {summary['steps']} steps, {summary['seconds']:.0f} s: {page}")
        ranks.barrier()
    except data.UserError as e:
        sys.exit(f"train_dpo.py: {e}" if rank == 0 or dist.is_initialized() else 1)
    except KeyboardInterrupt:
        sys.exit("train_dpo.py: stopped; the same command goes on from its checkpoint" if rank == 0 else 1)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        sys.exit(f"train_dpo.py: the disk is full ({e.filename or 'in the run'}): make room, call it again")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
