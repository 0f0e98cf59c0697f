"""Which pairs a step takes, on which rank; a record as tokens and images, read ahead by threads.

    pairs = checked(front, "pairs.jsonl", o, needs, ranks)    every record, image and response, or UserError
    for batch in Batches(pairs, o, ranks, steps)(t): ...      this rank's data.Batches of step t

Part of train_dpo.py.
"""
import functools
import hashlib
import math
import random
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import data
from records import Records, check

KEEP = 2 ** 28                                     # bytes of pixels: the classroom's pairs, no others


class Read(NamedTuple):
    """A pair as a step takes it: ids, its images as the family prepared them, a hash over all of it."""
    pair: data.Pair
    images: list
    images_rejected: list
    key: int


# ---- pairs ----
def classroom_files(o, out):
    """The built-in scenes and pairs, made by classroom/pairs.py as a program. Returns the pairs' path."""
    wanted, own = {}, built_in(o)
    if own:
        wanted["scenes"] = ["scenes", "--seed", o.eval_seed, "--split", o.split, "--n", o.scenes,
                            "--questions", o.questions]
    if o.data == "classroom":
        wanted["data"] = ["--seed", o.seed, "--n", o.pairs, *shlex.split(o.pair_options)]
    if (own or o.data == "classroom") and o.look and not o.val_data:
        wanted["held_out"] = [*shlex.split(o.pair_options), "--split", "tune", "--seed", o.eval_seed,
                              "--n", min(o.look, o.pairs)]
    program = Path(__file__).parent / "classroom" / "pairs.py"
    for name, arguments in wanted.items():
        if (out / name).exists():
            continue
        words = [sys.executable, program, *arguments, "--out", out / name]
        done = subprocess.run([*map(str, words)], text=True, capture_output=True)
        if done.returncode:
            raise data.UserError(f"{program} failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
    return out / "data" / "pairs.jsonl" if o.data == "classroom" else Path(o.data)


def built_in(o):
    """Whether the model is the classroom's: its scores are then the classroom's."""
    return (data.model_folder(o.model) / "classroom.json").exists()


@dataclass
class Pairs:
    """Records that were checked, and how one is read. A place is an index of `good`."""
    records: Records
    good: list                # indices of records
    tokens: list              # of each one's packed row
    front: Any                # a family of families.py
    o: Any
    needs: frozenset          # the fields of losses.Logps that are to be computed

    def __len__(self):
        return len(self.good)

    def read(self, place, epoch=0):
        """The Read at a place; with `--set redraw=true` its rejected image is another in each epoch."""
        o, record = self.o, self.records[self.good[place]]
        images = [] if o.image_rejected == "none" else [data.read_image(x) for x in record["images"]]
        seed, rejected = f"{o.seed}/{epoch}" if o.redraw else o.seed, []
        wanted = "image_rejected" in self.needs
        from_pixels = wanted and o.crop_pixels and not record["images_rejected"]
        if wanted and not from_pixels:
            rejected = self.rejected_images(place, record, images, seed)
        pair, _ = tokenise(self.front, record, o, sizes_of(images), sizes_of(rejected))
        prepared = self.front.prepare(images + rejected)
        images, rejected = prepared[:len(images)], prepared[len(images):]
        if from_pixels:                                   # as the official code of mDPO crops
            for n, image in enumerate(images):
                pixels = rejected_pixels(o.image_rejected, image["pixel_values"], seed, named(record, n))
                rejected.append({"pixel_values": pixels})
        key = hashlib.blake2b(repr(pair).encode(), digest_size=8)
        for image in images + rejected:
            for x in image.values():
                key.update(x.numpy().tobytes())
        return Read(pair, images, rejected, int.from_bytes(key.digest(), "little", signed=True))

    def rejected_images(self, place, record, images, seed):
        """The record's own rejected images, or one made for each image."""
        if record["images_rejected"]:
            return [data.read_image(x) for x in record["images_rejected"]]

        def other():
            index = other_index(seed, record["id"], place, len(self))
            return data.read_image(self.records[self.good[index]]["images"][0])
        return [data.rejected_image(self.o.image_rejected, image, seed, named(record, n), other, record)
                for n, image in enumerate(images)]

    def batch(self, places, read, counts, of):
        """data.Batch of the Reads at some places."""
        images = sum([one.images for one in read], [])
        images_rejected = sum([one.images_rejected for one in read], [])
        keys = [one.key for one in read]
        return data.Batch([one.pair for one in read], images, images_rejected, places, keys, counts, of)


def other_index(seed, id, i, n):
    """The index of another record than i, of n."""
    if n < 2:
        raise data.UserError("--image_rejected random needs two records or more; add some or choose crop")
    return (i + 1 + int(data.draw(seed, "other", id, 0).integers(n - 1))) % n


def crop_pixels(pixels, box):
    """A box (x, y, w, h) of prepared pixels (3, H, W), padding and all, resized back: mDPO's own code."""
    import torch.nn.functional as F
    x, y, w, h = box
    return F.interpolate(pixels[None, :, y:y + h, x:x + w], pixels.shape[1:], mode="bilinear",
                         antialias=True)[0]


def rejected_pixels(strategy, pixels, seed, id):
    """data.rejected_image's crops of prepared pixels (3, H, W) in place of the picture; the same draws."""
    if pixels.ndim != 3:
        raise data.UserError("--set crop_pixels=true: LLaVA-1.6's tiles cannot be cropped; leave it out")
    height, width = pixels.shape[1:]
    rng = data.rng_of(strategy, seed, id)
    return crop_pixels(pixels, data.crop_box(width, height, rng, data.AREAS[strategy]))


def named(record, n):
    """What the draw for a record's n-th image is keyed by."""
    return f"{record['id']}/{n}" if n else record["id"]


def sizes_of(images):
    return tuple(image.size for image in images)


def tokenise(front, record, o, sizes, sizes_rejected=()):
    """A record -> (data.Pair, response tokens cut off). sizes: (width, height) of the images in its prompt,
    and of the rejected ones where they are others. Raises UserError."""
    sizes_rejected = sizes_rejected or sizes
    prompt = again = front.prompt_ids(record["question"], sizes, record["history"])
    if sizes_rejected != sizes:
        again = front.prompt_ids(record["question"], sizes_rejected, record["history"])
    chosen, rejected = front.response_ids(record["chosen"]), front.response_ids(record["rejected"])
    pair = data.Pair(record["id"], prompt, again, chosen, rejected, sizes, sizes_rejected)
    return data.truncate(pair, o.max_length)


def checked(front, path, o, needs, ranks, folder=None):
    """Pairs of a file, which rank 0 has checked. Raises UserError.

    folder: of the run, where the outcome of the records' check stays.
    """
    records = Records(path, o.image_root or None)
    good, tokens = ranks.first(lambda: usable(front, records, o, needs, folder))
    return Pairs(records, good, tokens, front, o, frozenset(needs))


def usable(front, records, o, needs, folder=None):
    """(indices of the good records, tokens of each one's packed row). Faults are printed, one a line, and cut
    responses counted. Raises UserError."""
    good = check(records, needs_image="image_rejected" in needs, skip_bad=o.skip_bad, cache_dir=folder)
    kept, tokens, cut = [], [], 0
    for i in tqdm(good, "tokenising", disable=len(good) < 5000):
        try:
            record = records[i]
            images = record["images"] if o.image_rejected != "none" else []
            pair, lost = tokenise(front, record, o, tuple(data.image_size(x) for x in images))
            if lost and "rejected" in needs and pair.chosen == pair.rejected:
                raise data.UserError(f"chosen and rejected are the same {len(pair.chosen)} tokens when cut: "
                                     "raise --set max_length or drop the record")
        except data.UserError as e:
            print(f"{records.where(i)}: {e}", file=sys.stderr)
            continue
        cut += lost > 0
        kept.append(i)
        tokens.append(row_tokens(pair, needs))
    if len(kept) < len(good) and not (o.skip_bad and kept):
        raise data.UserError(f"{len(good) - len(kept)} of {len(good)} records of {records.path} cannot be "
                             "used (listed above): fix them, or pass --skip_bad")
    if cut:
        print(f"{cut} of {len(kept)} pairs had a response cut at {o.max_length} tokens (--set max_length)")
    return kept, tokens


def row_tokens(pair, needs):
    """Tokens of a pair's packed row: of what a step computes."""
    parts = [pair.prompt, pair.chosen]
    if "rejected" in needs:
        parts.append(pair.rejected)
    if "image_rejected" in needs:
        parts += [pair.prompt_rejected, pair.chosen]
    return sum(map(len, parts))


# ---- steps ----
class Batches:
    """batches(t) -> this rank's data.Batches of step t, in turn; threads read a step ahead.

    The pairs are the same with any number of threads, and a step's are the same on any number of ranks.
    equal: every rank gets as many, where a filler repeats another and counts for nothing (with --shard all
    ranks run equally many forwards). waited: seconds that the last step has waited for the threads.
    """
    def __init__(self, pairs, o, ranks, steps, equal=False):
        self.pairs, self.o, self.ranks, self.steps, self.equal = pairs, o, ranks, steps, equal
        self.per_epoch = math.ceil(len(pairs) / o.batch)
        self.pool, self.begun, self.kept, self.waited = ThreadPoolExecutor(o.workers), {}, {}, 0.0

    def __call__(self, t):
        for ahead in (t, t + 1):
            if ahead not in self.begun and ahead < self.steps:
                self.begun[ahead] = self.begin(ahead)
        self.waited = 0.0
        for micro, futures in self.begun.pop(t):
            since = time.monotonic()
            read = [future.result() for future in futures]
            self.waited += time.monotonic() - since
            yield self.pairs.batch(micro.places, read, micro.counts, micro.of)

    def begin(self, t):
        """[(Micro, a future of each Read)] of step t, on this rank."""
        epoch, at = divmod(t, self.per_epoch)
        places = order(len(self.pairs), self.o.seed, epoch)[at * self.o.batch:(at + 1) * self.o.batch]
        micros = []
        for k in range(0, len(places), self.o.micro_batch):
            some = places[k:k + self.o.micro_batch]
            micros.append(Micro(some, len(some), len(places)))
        while self.equal and len(micros) % self.ranks.world:
            micros.append(micros[0]._replace(counts=0))
        return [(micro, [self.pool.submit(self.read, place, epoch) for place in micro.places])
                for micro in self.share(micros)]

    def share(self, micros):
        """This rank's: the longest first, back and forth, so that all ranks have much the same tokens."""
        world = self.ranks.world
        if world == 1:
            return micros
        micros = sorted(micros, key=lambda micro: -sum(self.pairs.tokens[place] for place in micro.places))
        turns = [*range(world), *reversed(range(world))]
        return [micro for k, micro in enumerate(micros) if turns[k % len(turns)] == self.ranks.rank]

    def read(self, place, epoch):
        """Pairs.read, once for all epochs where KEEP has room for as many pairs of this one's size."""
        if place in self.kept:
            return self.kept[place]
        found = self.pairs.read(place, epoch)
        size = sum(x.nbytes for image in found.images + found.images_rejected for x in image.values())
        if not self.o.redraw and size * len(self.pairs) <= KEEP:
            self.kept[place] = found
        return found


class Micro(NamedTuple):
    """A micro-batch before it is read; see data.Batch."""
    places: list
    counts: int
    of: int


@functools.lru_cache(2)
def order(n, seed, epoch):
    """The places of n pairs in an epoch's order: the same for every number of ranks, and after a resume."""
    places = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(places)
    return places
