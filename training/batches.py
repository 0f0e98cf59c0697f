"""Which pairs a step takes, on which rank; a record as tokens and images, read ahead by threads.

    pairs = checked(front, "pairs.jsonl", o, needs, ranks)    every record, image and response, or UserError
    for batch in Batches(pairs, o, ranks, steps)(t): ...      this rank's vlm.Batches of step t

Part of train_dpo.py.
"""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

import hashlib
import math
import random
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial, reduce
from operator import add
from typing import Any

from tqdm import tqdm

import data
import lora
from data import UserError
from model import command, vlm
from training.records import Records, brief, check, drop

KEEP = 1 << 13                                     # the classroom's pairs: 150 MB of pixels


# ---- pairs ----
def classroom_files(o, out):
    """The built-in scenes and pairs, which classroom/pairs.py makes: run as a program, once for all that are
    not there. Returns the paths of the pairs and of held-out ones, "" if there are none."""
    own = built_in(o)
    made = o.data == "classroom"
    path, held_out = o.data, o.val_data
    wanted = {}
    if own:
        wanted["scenes"] = (f"scenes --seed {o.eval_seed} --split {o.split} --n {o.scenes} "
                            f"--questions {o.questions}")
    if made:
        wanted["data"] = f"--seed {o.seed} --n {o.pairs} {o.pair_options}"
        path = out / "data/pairs.jsonl"
    if (own or made) and o.look and not o.val_data:
        wanted["held_out"] = (f"{o.pair_options} --split tune --seed {o.eval_seed} "
                              f"--n {min(o.look, o.pairs)}")
        held_out = out / "held_out/pairs.jsonl"
    words = []
    for name, arguments in wanted.items():
        if not (out / name).exists():
            words += ["--then", *shlex.split(arguments), "--model", o.model, "--out", out / name]
    if words:
        command.classroom("pairs.py", *words)
    return path, held_out


def built_in(o):
    """Whether the model is one of the classroom's, which gets the classroom's scores."""
    return (lora.model_folder(o.model) / "classroom.json").exists()


@dataclass
class Pairs:
    """Records that were checked, and how one is read. A place is an index of `good`."""
    records: Records
    good: list                # indices of records
    tokens: list              # of each record's packed row
    front: Any                # a family of model/
    o: Any
    needs: frozenset          # the fields of losses.Logps that are to be computed
    without_image: int = 0    # pairs that CoPO skips
    pinned: bool = False      # pixels go where a GPU copies from by itself, while the step before goes on

    def __len__(self):
        return len(self.good)

    def record(self, place):
        return self.records[self.good[place]]

    def read(self, place, epoch=0):
        """A vlm.Batch of one pair; with `--set redraw=true` its rejected image is another in each epoch."""
        o, record = self.o, self.record(place)
        seed = f"{o.seed}/{epoch}" if o.redraw else o.seed
        twice = "rejected" in data.grouped(self.needs)
        images = [data.read_image(x) for x in shown(record, o)]
        rejected = self.rejected_images(place, record, images, seed) if twice else []
        sizes = [tuple(image.size for image in some) for some in (images, rejected)]
        pair = tokenise(self.front, record, o, *sizes, self.needs)
        images, rejected = map(self.prepared, (images, rejected))
        if twice and not rejected:                        # crop_pixels, as the official code of mDPO crops
            for n, image in enumerate(images):
                rng = data.rng_of(o.image_rejected, seed, named(record, n))
                box_of = partial(data.crop_box, rng=rng, area=data.AREAS[o.image_rejected])
                rejected.append({"pixel_values": crop_pixels(image["pixel_values"], box_of)})
        digest = hashlib.blake2b(repr(pair).encode(), digest_size=8)
        for image in images + rejected:
            for x in image.values():
                digest.update(x.numpy().tobytes())
        key = int.from_bytes(digest.digest(), "little", signed=True)
        return vlm.Batch([pair], images, rejected, [place], [key])

    def prepared(self, images):
        """What the family makes of a prompt's images; pinned, a GPU copies it while it computes."""
        found = self.front.prepare(images)
        if self.pinned:
            found = [{name: x.pin_memory() for name, x in image.items()} for image in found]
        return found

    def rejected_images(self, place, record, images, seed):
        """The record's own rejected images, or one made for each; [] if the prepared pixels are cropped."""
        if record["images_rejected"] or self.o.crop_pixels or not images:
            return [data.read_image(x) for x in record["images_rejected"]]
        other = partial(other_image, self.records, seed, record["id"], self.good[place], images[0])
        return [data.rejected_image(self.o.image_rejected, image, seed, named(record, n), other, record)
                for n, image in enumerate(images)]


def join(batches):
    """Several vlm.Batches as one: lists are joined, counts are added."""
    return vlm.Batch(*(reduce(add, field) for field in zip(*batches, strict=True)))


def other_image(records, seed, id, i, image):
    """The first image of another record than i, drawn until it is another picture than this image; where it
    is nearly always the same one, drawn among those that are another."""
    pixels = image.tobytes()
    for attempt in range(100):
        found = another(records, other_index(seed, id, i, len(records), attempt), pixels)
        if found:
            return found
    others = of_other_pictures(records, pixels)
    if not others:
        raise UserError("all pictures are the same one: add others or choose --image_rejected crop")
    return another(records, others[data.hash64(seed, "other", id) % len(others)], pixels)


def another(records, i, pixels):
    """A record's first image, if it has one that is another picture than one of these bytes."""
    with suppress(UserError, IndexError):                       # a faulty record, or one without an image
        found = data.read_image(records[i]["images"][0])
        if found.tobytes() != pixels:
            return found


@lru_cache(4)
def of_other_pictures(records, pixels):
    """The indices of the records whose first image is another picture than one of these bytes."""
    return [i for i in range(len(records)) if another(records, i, pixels)]


def other_index(seed, id, i, n, attempt=0):
    """The index of another record than i, of n; i if it is the only one."""
    return (i + 1 + int(data.draw(seed, "other", id, attempt).integers(max(1, n - 1)))) % n


def crop_pixels(pixels, box_of):
    """A box (x, y, w, h) of prepared pixels (3, H, W), padding and all, resized back: mDPO's own code.
    box_of(width, height) is the box."""
    import torch.nn.functional as F
    if pixels.ndim != 3:
        raise UserError("--set crop_pixels=true: this model's pixels cannot be cropped; leave it out")
    size = pixels.shape[1:]
    x, y, w, h = box_of(*reversed(size))
    return F.interpolate(pixels[None, :, y:y + h, x:x + w], size, mode="bilinear", antialias=True)[0]


def shown(record, o):
    """The images in a record's prompt, as records.py has them."""
    return [] if o.image_rejected == "none" else record["images"]


def named(record, n):
    """What the draw for a record's n-th image is keyed by."""
    return f"{record['id']}/{n}" if n else record["id"]


def tokenise(front, record, o, sizes, sizes_rejected=(), needs=()):
    """A record -> data.Pair. sizes: (width, height) of the images in its prompt,
    and of the rejected ones where they are others. needs: fields of losses.Logps. Responses are cut to
    o.max_length tokens with their prompts, which are not. Raises UserError."""
    sizes_rejected = sizes_rejected or sizes
    history = tuple(map(tuple, record["history"]))
    bare = () if "none" in data.grouped(needs) else sizes
    prompt, prompt_rejected, prompt_bare = (prompt_ids(front, record["question"], x, history)
                                            for x in (sizes, sizes_rejected, bare))
    chosen = front.response_ids(record["chosen"])
    rejected = front.response_ids(record.get("rejected", record["chosen"]))       # absent: no loss reads it
    weight = record["meta"].get("weight", 1.0) if "weights" in needs else 1.0
    if not command.fits(weight, float):
        raise UserError(f"meta.weight {weight!r} is not a number; correct it or drop the record")
    room = o.max_length - max(len(prompt), len(prompt_rejected))
    if room < 1:
        raise UserError(f"the prompt of {record['id']} has {o.max_length - room} tokens, which leaves no room"
                        f" for an answer in max_length {o.max_length}; raise it or drop the record")
    pair = data.Pair(record["id"], prompt, prompt_rejected, chosen[:room], rejected[:room], sizes,
                     sizes_rejected, prompt_bare, weight)
    if "apart" in record:
        apart = tokenise(front, record["apart"], o, sizes, sizes_rejected, needs)
        pair = pair._replace(rejected=apart.rejected, apart=apart)
    return pair


@lru_cache(1024)
def prompt_ids(front, *prompt):
    """front.prompt_ids(*prompt), once: many pictures are asked the same question."""
    return front.prompt_ids(*prompt)


def checked(front, path, o, needs, ranks):
    """Pairs of a file, which rank 0 has checked. --image_root is for files that the user gives. Raises
    UserError."""
    if o.forward == "packed" and not front.packs:
        raise UserError(f"{front.folder}: the tokens of an image see each other in both directions, which a "
                        "packed row does not allow: pass --forward naive")
    records = Records(path, o.image_root if path in (o.data, o.val_data) else None,
                      "rejected" in needs, o.follow_links)
    good, tokens, without_image = ranks.first(usable, front, records, o, needs)
    return Pairs(records, good, tokens, front, o, frozenset(needs), without_image,
                 pinned=str(ranks.device).startswith("cuda"))


def usable(front, records, o, needs):
    """(indices of the good records, tokens of each one's packed row, how many CoPO skips: those without an
    image). Cut responses are counted, and faults end the run as in records.drop."""
    twice = "rejected" in data.grouped(needs)
    good = check(records, twice, o.skip_bad)
    faults, tokens, cut, skipped = [], [], 0, 0
    for i in tqdm(good, "tokenising", disable=len(good) < 5000):
        record = records[i]
        images = shown(record, o)
        rejected = ()
        if twice and images:
            rejected = tuple(map(data.image_size, record["images_rejected"]))
            if o.image_rejected == "random" and not rejected:
                drawn = other_image(records, o.seed, record["id"], i, data.read_image(images[0]))
                rejected = (drawn.size,) * len(images)
        try:
            pair = tokenise(front, record, o, tuple(map(data.image_size, images)), rejected, needs)
            if not images and "rejected_image_rejected" in needs:
                raise UserError("it has no image, and this loss asks which image an answer is about; add one "
                                "or drop the record")
            if "rejected" in needs and pair.chosen == pair.rejected:
                raise UserError(f"chosen and rejected are the same {len(pair.chosen)} tokens when cut and "
                                "tokenised: raise --set max_length or drop the record")
        except UserError as e:
            faults.append((i, "unusable as tokens", f"{records.where(i)}: {brief(e, 400)}"))
            continue
        cut += {pair.chosen[-1], pair.rejected[-1]} != {front.eos_id}
        skipped += twice and not images
        tokens.append(len(data.pack([pair], needs).ids))
    good = drop(records, good, faults, o.skip_bad)
    if cut:
        print(f"{cut} of {len(good)} pairs had a response cut at {o.max_length} tokens (--set max_length)")
    if skipped:
        print(f"{skipped} of {len(good)} pairs have no image: what compares images (CoPO) skips them")
    return good, tokens, skipped


# ---- steps ----
@dataclass
class Batches:
    """batches(t) -> this rank's vlm.Batches of step t, in turn; threads read a step ahead.

    The pairs are the same with any number of threads, and a step's are the same on any number of ranks.
    With --shard all ranks run equally many forwards: a filler repeats another and counts for nothing. waited:
    seconds that the last step has waited for the threads.
    """
    pairs: Pairs
    o: Any
    ranks: command.Ranks
    steps: int

    def __post_init__(self):
        self.per_epoch = math.ceil(len(self.pairs) / self.o.batch)
        self.pool = ThreadPoolExecutor(self.o.workers)
        self.begun = {}
        # the classroom's are few and small: read once for all epochs, unless each draws them anew
        self.read = lru_cache(KEEP if built_in(self.o) else 0)(self.pairs.read)

    def __call__(self, t):
        self.waited = 0.0
        for ahead in range(t, min(t + 2, self.steps)):
            if ahead not in self.begun:
                self.begun[ahead] = self.begin(ahead)
        for futures, counts, of in self.begun.pop(t):
            since = time.monotonic()
            read = [future.result() for future in futures]
            self.waited += time.monotonic() - since
            yield join(read)._replace(counts=counts, of=of)

    def begin(self, t):
        """[(futures of the pairs, how many of them count, pairs in the step)] of step t, on this rank."""
        epoch, step = divmod(t, self.per_epoch)
        drawn = epoch if self.o.redraw else 0
        places = data.chunks(order(len(self.pairs), self.o.seed, epoch), self.o.batch)[step]
        micros = data.chunks(places, self.o.micro_batch)
        if self.ranks.world > 1:                  # the longest first: each rank has about as many tokens
            micros.sort(key=lambda some: -sum(self.pairs.tokens[place] for place in some))
        counted = [(some, len(some)) for some in micros]
        while self.o.shard and len(counted) % self.ranks.world:
            counted.append((micros[-1], 0))
        found = []
        for some, count in counted[self.ranks.rank::self.ranks.world]:
            futures = [self.pool.submit(self.read, place, drawn) for place in some]
            found.append((futures, count, len(places)))
        return found


@lru_cache(2)
def order(n, seed, epoch):
    """The places of n pairs in an epoch's order: the same for every number of ranks, and after a resume."""
    places = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(places)
    return places
