"""Does the model look at its image, and how far has training moved it? Numbers on held-out pairs.

    found = look(m, records, good, o, "after")      # {"n": 200, "margin": {"true": [0.9, 0.8, 1], ...}, ...}

train_dpo.py calls it with every evaluation; it stands there under `look`, in log.jsonl and in the report. The
pairs are the first `--set look=200` with one image of --val_data, or, for the classroom's models and data,
pairs by pair_options about tuning scenes (the same for every --seed and --data; never a printed scene).

Every number is [mean over the pairs, low, high]: a 95% interval of 1000 resamples of the images with
replacement. Differences are taken pair by pair. log p is summed over a response's tokens, in nats; r is the
reward, beta * (policy - reference), 0 for all before training.

    preference       log p(chosen) - log p(rejected) of the policy, with one of these images in the prompt:
                     true        the pair's own
                     blank       one colour, of the same size: zeros once normalised
                     other       another pair's, of another theme where the records' meta.theme allows it
                     same_theme  another pair's of the same theme; left out for records without meta.theme
    preference_true_minus  the same with the true image minus with another: 0 for a model that does not look
    margin                 r(chosen) - r(rejected), with each of these images: what training did to preference
    margin_true_minus      0 where training changed words alone, > 0 where it taught the model to look
    logps_chosen           log p(chosen) with the true image; logps_chosen_change: minus the reference's
    kl                     KL(policy || reference) of an answer, in nats. One answer a pair is drawn from the
                           policy at temperature 1, cut at max_new_tokens; the mean of its log p minus the
                           reference's. It is unbiased and noisy: an interval may reach below 0.

`other` gives every image to exactly one other pair, and so does `same_theme` within its theme: their means
differ from that of `true` by who sees which image, and by nothing else.
"""
import json
import random
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

import data
import tally
import vlm
from plan import tokenise
from records import Records

RESPONSES = {"chosen", "rejected"}


def look(m, records, good, o, name, kept=None):
    """The numbers above, of the model as it stands; {} where fewer than two records have one image.

    records, good: held-out pairs, and the indices that may be read. o: train_dpo.py's options (look, beta,
    micro_batch, forward, max_length, max_new_tokens, eval_seed). name: which evaluation; in `before` policy
    and reference are one. kept: the file in which `before` leaves the reference's log p for the others.
    Nothing is left changed, random generators included. Raises UserError.
    """
    shown = list(islice((r for r in map(records.__getitem__, good) if len(r["images"]) == 1), o.look))
    if len(shown) < 2:
        return {}
    images = [r["images"][0] for r in shown]
    themes = [r["meta"].get("theme") for r in shown]
    other, alike = partners([t or i for t, i in zip(themes, images, strict=True)], o.eval_seed)
    alike = {i: j for i, j in alike.items() if themes[i] and images[i] != images[j]}
    own = {i: i for i in range(len(shown))}
    jobs = [(kind, *ij) for kind, which in (("true", own), ("blank", own), ("other", other),
                                            ("same_theme", alike)) for ij in which.items()]

    def scores(model):
        """log p of the two responses of every job, chosen first: (jobs, 2)."""
        rows = []
        for at in tqdm(range(0, len(jobs), o.micro_batch), f"{name}: looking"):
            some = jobs[at:at + o.micro_batch]
            pictures = [shut(data.read_image(images[j]), kind) for kind, _, j in some]
            pairs = [tokenise(model.front, shown[i], o, [picture.size])[0]
                     for (_, i, _), picture in zip(some, pictures, strict=True)]
            pairs = [pair._replace(prompt=pair.prompt_rejected, sizes=pair.sizes_rejected)
                     for pair in pairs]                                          # with this very picture
            rows.append(score(model, pairs, pictures, RESPONSES, o))
        return np.concatenate(rows)
    mine = frozen = scores(m)
    if kept and name == "before":
        data.atomic_write(kept, json.dumps(mine.tolist()))
    elif kept and kept.exists():
        frozen = np.array(json.loads(kept.read_text()))
    elif name != "before":
        with vlm.base_of(m) as base:
            frozen = scores(base)
    policy = {kind: np.full((len(shown), 2), np.nan) for kind, *_ in jobs}       # (n, chosen and rejected)
    change = {kind: np.full((len(shown), 2), np.nan) for kind in policy}         # policy minus reference
    for (kind, i, _), row, base_row in zip(jobs, mine, frozen, strict=True):
        policy[kind][i], change[kind][i] = row, row - base_row

    def mean(values):
        return interval(values, images, o.eval_seed)

    found = {"n": len(shown)}
    for name, scores, scale in (("preference", policy, 1), ("margin", change, o.beta)):
        margins = {kind: scale * (x[:, 0] - x[:, 1]) for kind, x in scores.items()}
        found[name] = {kind: mean(x) for kind, x in margins.items()}
        found[f"{name}_true_minus"] = {kind: mean(margins["true"] - x) for kind, x in margins.items()
                                       if kind != "true"}
    return found | {"logps_chosen": mean(policy["true"][:, 0]),
                    "logps_chosen_change": mean(change["true"][:, 0]),
                    "kl": mean(divergence(m, shown, o, name != "before"))}


def made(out):
    """(records, indices) of the pairs that the classroom's runs hold out; None in another run."""
    file = out / "held_out" / "pairs.jsonl"
    if file.exists():
        records = Records(file)
        return records, range(len(records))


def partners(groups, seed):
    """({i: another, of another group where no group holds more than half}, {i: another of the same group}).

    Both are one-to-one; who is alone in its group has none there. groups: one hashable name for each.
    """
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    together = {}
    for i in order:
        together.setdefault(groups[i], []).append(i)
    row = sum(together.values(), [])                         # group after group: a step of the largest leaves
    step = min(max(map(len, together.values())), len(row) // 2)
    return (dict(zip(row, row[step:] + row[:step], strict=True)),
            {i: j for g in together.values() if len(g) > 1 for i, j in zip(g, g[1:] + g[:1], strict=True)})


def shut(picture, kind):
    """The picture, or for `blank` one of its size that shows nothing."""
    return data.rejected_image("blank", picture, 0, "") if kind == "blank" else picture


@torch.no_grad()
def score(m, pairs, pictures, needs, o):
    """log p of the responses that `needs` names, chosen first: float64 (B, number of needs)."""
    features = vlm.encode_images(m, data.Batch(pairs, m.front.prepare(pictures)))
    logps = vlm.FORWARDS[o.forward](m, pairs, features, needs)
    return torch.stack([getattr(logps, field) for field in sorted(needs)], 1).double().cpu().numpy()


def divergence(m, shown, o, moved):
    """log p - log p of the reference of one drawn answer to each of the records: (n,), in nats."""
    if not moved:
        return np.zeros(len(shown))
    pictures = [data.read_image(r["images"][0]) for r in shown]
    texts = vlm.generate(m, [[p] for p in pictures], [r["question"] for r in shown], o.max_new_tokens,
                         batch_size=64 if m.front.is_classroom else 16, sample_seed=o.eval_seed)
    pairs = []
    for r, picture, text in zip(shown, pictures, texts, strict=True):
        prompt = m.front.prompt_ids(r["question"], [picture.size])
        ids = m.front.tokenizer(text, add_special_tokens=False).input_ids
        ids = [t for t in ids if t != m.front.image_token_id]
        answer = [*ids, m.front.eos_id][:o.max_new_tokens]
        pairs.append(data.Pair(r["id"], prompt, prompt, answer, [], (picture.size,)))

    def scores(model):
        return np.concatenate([score(model, pairs[at:at + o.micro_batch], pictures[at:at + o.micro_batch],
                                     {"chosen"}, o) for at in range(0, len(pairs), o.micro_batch)])[:, 0]
    with vlm.base_of(m) as base:
        frozen = scores(base)
    return scores(m) - frozen


def interval(values, images, seed, resamples=1000):
    """[mean, low, high] of values (n,), those that are nan left out; the images are what is drawn anew."""
    there = [{"image": image, "sum": x, "n": 1} for image, x in zip(images, values, strict=True) if x == x]
    _, draws = tally.add_up(there, lambda item: {k: item[k] for k in ("sum", "n")}, seed, resamples)
    point = sum(item["sum"] for item in there) / len(there)
    return [round(float(x), 6) for x in (point, *tally.interval(draws["sum"] / draws["n"], point))]
