"""Does the model look at its image, and how far has training moved it? Numbers on held-out pairs.

    found = look(m, records, good, o, "after")      # {"n": 200, "margin": {"true": [0.9, 0.8, 1], ...}, ...}

train_dpo.py calls it with every evaluation: `look` in summary.json, in log.jsonl and in the report. The
pairs are the first `--set look=200` with one image of --val_data, or, for the classroom's models and data,
pairs by pair_options about tuning scenes (the same for every --seed and --data; never a printed scene).

Every number is [mean over the pairs, low, high]: a 95% interval of 1000 resamples of the images with
replacement. Differences are taken pair by pair. log p is summed over a response's tokens, in nats; r is the
reward, beta * (policy - reference), 0 for all before training.

    preference       log p(chosen) - log p(rejected) of the policy, with one of these images in the prompt:
                     true        the pair's own
                     blank       one colour, of the same size: zeros once normalised
                     other       another pair's, of another theme if the records' meta.theme allows it
                     same_theme  another pair's of the same theme; left out for records without meta.theme
    preference_true_minus  the same with the true image minus with another: 0 for a model that does not look
    margin                 r(chosen) - r(rejected), with each of these images: what training did to preference
    margin_true_minus      0 if training changed words alone, > 0 if it taught the model to look
    logps_chosen           log p(chosen) with the true image; logps_chosen_change: minus the reference's
    kl                     KL(policy || reference) of an answer, in nats. One answer a pair is drawn from the
                           policy at temperature 1, cut at max_new_tokens; the mean of its log p minus the
                           reference's, of the tokens as they were drawn. It is unbiased and noisy: an
                           interval may reach below 0 (one that is all below 0 is printed as undefined).
                           Before training it is 0, and nothing is drawn.

`other` gives every image to exactly one other pair, and so does `same_theme` within its theme: the same
images are seen as under `true`, by other pairs.
"""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

import json
import random
from functools import partial
from itertools import islice

import numpy as np
import torch
from tqdm import tqdm

import data
from evaluation import stats
from model import generation, vlm
from training import checkpoint
from training.batches import tokenise


def look(m, records, good, o, name, kept=None):
    """The numbers above, of the model as it is; {} if fewer than two records have one image.

    records, good: held-out pairs, and the indices that may be read. o: train_dpo.py's options (look, beta,
    micro_batch, forward, max_length, max_new_tokens, eval_seed). name: which evaluation; in `before` policy
    and reference are one. kept: the file in which `before` leaves the reference's log p for the others.
    Nothing is left changed, random generators included. Raises UserError.
    """
    read = (records[i] for i in good)
    usable = (record for record in read if len(record["images"]) == 1)
    shown = list(islice(usable, o.look))
    n = len(shown)
    if n < 2:
        return {}
    images = [record["images"][0] for record in shown]
    kinds = kinds_of(shown, images, o.eval_seed)
    policy = scores(m, shown, kinds, o, name)                                                # (K, n, 2)
    if name == "before":
        reference = policy
        drawn = np.zeros(n)                                           # log ratios of drawn answers, (n,)
        if kept:
            data.atomic_write(kept, json.dumps(policy.tolist()))
    else:
        drawn = divergence(m, shown, o)
        reference = checkpoint.kept(kept, lambda rows: np.array(rows, float).reshape(policy.shape))
        if reference is None:
            with vlm.base_of(m) as base:
                reference = scores(base, shown, kinds, o, name)

    # ---- means ----
    mean = partial(interval, images=images, seed=o.eval_seed)
    found = {"n": n}
    change = policy - reference
    for measure, logps, scale in (("preference", policy, 1), ("margin", change, o.beta)):
        margin = scale * (logps[..., 0] - logps[..., 1])                                        # (K, n)
        margins = dict(zip(kinds, margin, strict=True))
        found[measure] = {kind: mean(x) for kind, x in margins.items()}
        true = margins.pop("true")
        found[f"{measure}_true_minus"] = {kind: mean(true - x) for kind, x in margins.items()}
    found["logps_chosen"] = mean(policy[0, :, 0])                     # the first kind is the true images
    found["logps_chosen_change"] = mean(change[0, :, 0])
    found["kl"] = mean(drawn)
    return found


# ---- which pair is shown which image ----
def kinds_of(shown, images, seed):
    """{true, blank, other, same_theme: {place of a pair: of the pair whose image it is shown}}."""
    themes = [str(record["meta"].get("theme") or "") for record in shown]
    groups = [theme or image for theme, image in zip(themes, images, strict=True)]
    own = {i: i for i in range(len(shown))}
    other, alike = partners(groups, seed)
    alike = {i: j for i, j in alike.items() if themes[i] and images[i] != images[j]}
    kinds = {"true": own, "blank": own, "other": other}
    if alike:
        kinds["same_theme"] = alike
    return kinds


def partners(groups, seed):
    """({i: another, of another group where no group holds more than half}, {i: another of the same group}).

    Both are one-to-one; one that is alone in its group has none there. groups: one hashable name for each.
    """
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    together = {}
    for i in order:
        together.setdefault(groups[i], []).append(i)
    row = sum(together.values(), [])                         # group after group: a step of the largest leaves
    largest = max(map(len, together.values()))
    alike = {}
    for group in together.values():
        if len(group) > 1:
            alike |= next_to(group, 1)
    return next_to(row, min(largest, len(row) // 2)), alike


def next_to(row, step):
    """{each of a row: the one so many steps further}, the row being a ring."""
    further = row[step:] + row[:step]
    return dict(zip(row, further, strict=True))


# ---- log-probs ----
def scores(m, shown, kinds, o, name):
    """log p of the two responses with each kind of image, chosen first; nan where there is none: (K, n, 2)"""
    found = np.full((len(kinds), len(shown), 2), np.nan)
    for k, (kind, image_of) in enumerate(kinds.items()):
        bar = tqdm(image_of.items(), f"{name}: looking, {kind}")
        cases = (case_of(m.front, shown[i], shown[j], kind, o) for i, j in bar)
        found[k, [*image_of]] = logps_of(m, cases, o, ["chosen", "rejected"])
    return found


def case_of(front, record, other, kind, o):
    """(data.Pair, family.Picture) of a record with another's image, or with a blank image of its size."""
    picture = front.read(other["images"][0])
    if kind == "blank":
        picture = data.rejected_image("blank", picture, 0, "")
    pair = tokenise(front, record, o, (picture.size,))
    return pair, picture


def divergence(m, shown, o):
    """log p - log p of the reference of one drawn answer to each of the records: (n,), in nats."""
    cases = [case_of(m.front, record, record, "true", o) for record in shown]
    prompts = [pair.prompt for pair, _ in cases]
    images = [[picture] for _, picture in cases]
    size = 64 if m.front.is_classroom else 16
    answers = generation.continued(m, prompts, images, o.max_new_tokens, size, sample_seed=o.eval_seed)
    drawn = zip(cases, answers, strict=True)
    cases = [(pair._replace(chosen=answer), picture) for (pair, picture), answer in drawn]
    policy = logps_of(m, cases, o, ["chosen"])
    with vlm.base_of(m) as base:
        reference = logps_of(base, cases, o, ["chosen"])
    return (policy - reference)[:, 0]


@torch.no_grad()
def logps_of(m, cases, o, fields):
    """Fields of losses.Logps of (data.Pair, its picture)s: (C, len(fields))."""
    cases = iter(cases)
    rows = []
    size = 32 if m.front.is_classroom else o.micro_batch
    while some := [*islice(cases, size)]:
        pairs, pictures = zip(*some, strict=True)
        prepared = [m.front.prepared([picture])[0] for picture in pictures]
        batch = vlm.Batch(pairs, prepared)
        features = vlm.encode_images(m, batch)
        found = vlm.FORWARDS[o.forward](m, pairs, features, set(fields))
        columns = [getattr(found, field) for field in fields]
        rows.append(torch.stack(columns, 1))
    return torch.cat(rows).double().cpu().numpy()


# ---- means ----
def interval(values, images, seed):
    """[mean, low, high] of values (n,), leaving out nan; resamples draw the images."""
    there = zip(images, values, strict=True)
    items = [{"image": image, "sums": {"mean": (x, 1)}} for image, x in there if not np.isnan(x)]
    _, draws = stats.tally(items, seed=seed)
    mean, (top, bottom) = np.nanmean(values), draws["all", "mean"]
    low, high = stats.interval(top / bottom, mean)
    return [round(float(x), 6) for x in (mean, low, high)]
