"""What a step reads (train_dpo.py would be too long with it): pairs with their pixels, and the reference.

A record becomes a data.Pair, the pixels of its images and of the rejected ones, and a key over all of them.
The reference's log-probs are kept under that key: what a pair was scored with is what it is compared with.
"""
import functools
import hashlib
import math
import random
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

import data
import losses
import vlm
from plan import tokenise


def read_pair(m, records, good, place, o, needs, epoch):
    """The pair at a place of `good`: (Pair, pixels of its images, of the rejected ones, a key of it all)."""
    record = records[good[place]]
    images = [] if o.image_rejected == "none" else [data.read_image(x) for x in record["images"]]
    damaged = [data.read_image(x) for x in record["images_rejected"] or [] if "image_rejected" in needs]
    seed = f"{o.seed}/{epoch}" if o.redraw else o.seed
    names = [f"{record['id']}/{n}" if n else record["id"] for n in range(len(images))]
    cropped = "image_rejected" in needs and not damaged and o.crop_pixels
    if "image_rejected" in needs and not damaged and not cropped:
        def other():
            index = data.other_index(seed, record["id"], place, len(good))
            return data.read_image(records[good[index]]["images"][0])
        damaged = [data.rejected_image(o.image_rejected, image, seed, name, other, record)
                   for name, image in zip(names, images, strict=True)]
    pair, _ = tokenise(m.front, record, o, [image.size for image in damaged])
    both, n = m.front.prepare(images + damaged), len(images)
    shown, shown_rejected = both[:n], both[n:]
    if cropped:
        for name, x in zip(names, shown, strict=True):
            pixels = data.rejected_pixels(o.image_rejected, x["pixel_values"], seed, name)
            shown_rejected.append({"pixel_values": pixels})
    key = hashlib.blake2b(repr(pair).encode(), digest_size=8)
    for prepared in shown if o.redraw else shown + shown_rejected:
        for x in prepared.values():
            key.update(x.numpy().tobytes())
    return pair, shown, shown_rejected, int.from_bytes(key.digest(), "little", signed=True)


@functools.lru_cache(2)
def order(n, seed, epoch):
    """The places of n pairs in an epoch's order: the same for every number of ranks, and after a resume."""
    places = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(places)
    return places


KEEP = 2 ** 28                                     # bytes of pixels: the classroom's pairs, no others


class Feed:
    """What the steps read, by threads and a step ahead: the pairs are the same with any number of them.

    tokens: of each pair. Ranks take micro-batches of much the same length. equal: as many each, of which one
    that does not count repeats another; with --shard all ranks run equally many forwards.
    """
    def __init__(self, m, records, good, tokens, o, needs, steps, rank=0, world=1, equal=False):
        self.tokens, self.o, self.steps = tokens, o, steps
        self.rank, self.world, self.equal = rank, world, equal
        self.read_anew = functools.partial(read_pair, m, records, good, o=o, needs=needs)
        self.pool, self.begun, self.kept = ThreadPoolExecutor(o.workers), {}, {}

    def read(self, place, epoch):
        """read_pair, once for all epochs where KEEP has room for as many pairs of this one's size."""
        if place in self.kept:
            return self.kept[place]
        pair = self.read_anew(place=place, epoch=epoch)
        size = sum(x.nbytes for prepared in pair[1] + pair[2] for x in prepared.values())
        if not self.o.redraw and size * len(self.tokens) <= KEEP:
            self.kept[place] = pair
        return pair

    def __call__(self, step):
        """(pairs in the step, this rank's micro-batches [(places, counts, a future of each pair)])."""
        for ahead in (step, step + 1):
            if ahead not in self.begun and ahead < self.steps:
                self.begun[ahead] = self.begin(ahead)
        return self.begun.pop(step)

    def begin(self, step):
        epoch, at = divmod(step, math.ceil(len(self.tokens) / self.o.batch))
        places = order(len(self.tokens), self.o.seed, epoch)[at * self.o.batch:(at + 1) * self.o.batch]
        size = self.o.micro_batch
        micros = [(places[k:k + size], True) for k in range(0, len(places), size)]
        micros += [(micros[0][0], False)] * (-len(micros) % self.world if self.equal else 0)
        if self.world > 1:                                      # the longest first, dealt back and forth
            micros.sort(key=lambda micro: -sum(self.tokens[place] for place in micro[0]))
            turns = [*range(self.world), *reversed(range(self.world))]
            micros = [x for k, x in enumerate(micros) if turns[k % len(turns)] == self.rank]
        return len(places), [(micro, counts, [self.pool.submit(self.read, place=place, epoch=epoch)
                                              for place in micro]) for micro, counts in micros]


class Reference:
    """Log-probs of the frozen reference, kept per pair beside the key of the inputs that they were made from.

    The key covers token ids (so texts and template) and pixels (so images, their preparation and the draw);
    the base's identity is checked when a run resumes. What does not match is scored anew.
    """
    FIELDS = ("chosen", "rejected", "image_rejected")

    def __init__(self, n, world, sharded=False):
        self.logps, self.key = torch.zeros(n, 3, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
        self.world, self.sharded = world, sharded           # sharded: all ranks run a forward, or none
        self.new = []                                       # places this rank added since the last sync

    def __call__(self, m, places, batch, features, forward, needs, redraw):
        """losses.Logps of a micro-batch; with redraw the rejected image's term is scored every time."""
        pairs, keys = [b[0] for b in batch], torch.tensor([b[3] for b in batch])
        kept = needs - {"image_rejected"} if redraw else needs
        stale = not torch.equal(self.key[places], keys)
        if self.sharded:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, stale)
            stale = any(everyone)
        with torch.no_grad(), vlm.base_of(m) as base:
            if base is not m and (stale or redraw):             # the policy's projector trains, too
                features = encode(base, batch)
            if stale:
                logps = forward(base, pairs, features, kept)
                for i, field in enumerate(self.FIELDS):
                    if field in kept:
                        self.logps[places, i] = getattr(logps, field).cpu().double()
                self.key[places], self.new = keys, self.new + places
            exact = torch.promote_types(m.model.dtype, torch.float32)
            values = [self.logps[places, i].to(exact).to(m.device) if f in kept else None
                      for i, f in enumerate(self.FIELDS)]
            if redraw:
                again = [p._replace(prompt=p.prompt_rejected, sizes=p.sizes_rejected) for p in pairs]
                values[2] = forward(base, again, vlm.Features(features.rejected, []), {"chosen"}).chosen
        tokens = [torch.tensor([len(getattr(p, f)) for p in pairs], dtype=exact, device=m.device)
                  for f in ("chosen", "rejected")]
        return losses.Logps(*values, *tokens)

    def sync(self):
        """Give every rank what the others have added: a pair is scored by one rank."""
        if self.world > 1:
            added = [None] * self.world
            dist.all_gather_object(added, (self.new, self.logps[self.new], self.key[self.new]))
            for places, logps, key in added:
                self.logps[places], self.key[places] = logps, key
        self.new = []


def encode(m, batch):
    """vlm.Features of a micro-batch."""
    pairs, shown, shown_rejected, _ = zip(*batch, strict=True)
    return vlm.encode_images(m, data.Batch(pairs, sum(shown, []), sum(shown_rejected, [])))
