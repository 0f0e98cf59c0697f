"""What every command needs: its options, its place among torchrun's ranks, its folder, work that resumes.

    chosen, rest = parse(Options, argv, "synth.py", __doc__)     a dataclass is the command line
    ranks = join()                                               who is who under torchrun
    lock = claim(out)                                            one run in a folder
    rows = Store(path, ranks).work(items, make)                  finished work is kept
"""
if __name__ == "__main__":
    exit("A part of every command; run: python train_dpo.py --help")

import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

import data
from data import UserError, explained

WIDTH = 80                                           # columns of a help text


# ---- options: a dataclass is the command line ----
def option(default, help, **about):
    """A field of an options dataclass. about: `behind_set` where only --set NAME=VALUE reaches it, `choices`,
    `above`, `at_least` (else 0) or `at_most` (else MOST) for numbers, which are finite, `off` (a flag
    that makes it 0)."""
    return dataclasses.field(default=default, metadata={"help": help, **about})


behind_set = partial(option, behind_set=True)        # rarely changed: --set NAME=VALUE


def parse(kind, argv, prog, description, positional=()):
    """argv -> ({field: value} of what was given, {positional: value}). Raises UserError for a bad value.

    kind: the dataclass. positional: (name, choices, default, help) of each argument without dashes. What was
    not given is absent, so that a preset can come between the dataclass's defaults and the command line.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    rare = {name: field for name, field in fields.items() if "behind_set" in field.metadata}
    parser = data.Parser(prog=prog, description=description, epilog=_described(rare))
    for name, choices, default, text in positional:
        parser.add_argument(name, nargs="?", choices=choices, default=default, help=text)
    for name, field in fields.items():
        if name not in rare:
            _add(parser, name, field)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="a rarer setting, see below; may be given several times")
    given, chosen = vars(parser.parse_args(argv)), {}
    for item in given.pop("set"):
        name, equals, text = item.partition("=")
        if name not in fields or not equals:             # an --option's name is one of them
            raise UserError(f"--set {item}{data.like(name, fields)}: give KEY=VALUE with KEY one of "
                            f"{', '.join(rare)}")
        chosen[name] = value(f"--set {item}", text, fields[name])
    for name, field in fields.items():
        found = given.pop(name, None)
        if found is not None:
            chosen[name] = value(f"--{name} {found}", str(found), field)
    return chosen, given


def _add(parser, name, field):
    """One --NAME; its value stays text until `value` reads it, so that a bad one is refused in one place."""
    import argparse
    text = f"{field.metadata['help']} [{_shown(field.default)}]".replace("%", "%%")
    short, *_ = KINDS[field.type]
    form = {"metavar": short}
    if field.type is bool:
        form = {"action": argparse.BooleanOptionalAction}
    parser.add_argument(f"--{name}", help=text, **form)
    if "off" in field.metadata:
        off = field.metadata["off"]
        parser.add_argument(off, dest=name, action="store_const", const=0, help=f"--{name} 0")


def value(where, text, field):
    """A field's value from its text. Raises UserError if it is none; `where` is what the user wrote."""
    kind, about = field.type, field.metadata
    _, spelt, read = KINDS[kind]
    try:
        found = read(text)
    except (ValueError, KeyError):
        raise UserError(f"{where}: {text!r} is not {spelt}") from None
    choices = about.get("choices", [found])
    if found not in choices:
        raise UserError(f"{where}{data.like(text, choices)}: give one of {', '.join(filter(None, choices))}")
    least, most = about.get("at_least", 0), about.get("at_most", MOST)
    for number in {int: [found], float: [found], tuple: found}.get(kind, ()):
        if "above" in about and not number > about["above"]:
            raise UserError(f"{where}: it must be a number above {about['above']}")
        if not least <= number <= most:
            raise UserError(f"{where}: it must not be below {least} or above {most}")
    return found


MOST = 10 ** 9
KINDS = {bool: ("BOOL", "true or false", lambda text: {"true": True, "false": False}[text.lower()]),
         int: ("N", "a whole number", int),
         float: ("X", "a number", float),
         tuple: ("X,Y", "numbers with commas", lambda text: tuple(map(float, text.split(",")))),
         str: ("TEXT", "a text", str)}


def _shown(default):
    if isinstance(default, tuple):
        return ",".join(f"{x:g}" for x in default)
    return str(default).lower() or "none"


def _described(fields):
    """The --set keys, one paragraph each."""
    lines = ["settings behind --set, with their defaults:"]
    for name, field in fields.items():
        text = f"{name}={_shown(field.default)}: {field.metadata['help']}"
        lines.append(textwrap.fill(text, WIDTH - 2, initial_indent="  ", subsequent_indent="      "))
    return "\n".join(lines)


# ---- ranks ----
@dataclass(frozen=True)
class Ranks:
    """Who is who. Without torchrun: rank 0 of 1."""
    rank: int = 0
    world: int = 1
    device: object = "cpu"

    def barrier(self):
        self.gather(None)

    def gather(self, value):
        """[value of rank 0, of rank 1, ...] on every rank."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist
        everyone = [None] * self.world
        dist.all_gather_object(everyone, value)
        return everyone

    def first(self, work, *arguments):
        """work(*arguments) on rank 0, its result on every rank; a UserError there, which rank 0 says, ends
        them all."""
        result = error = None
        if self.rank == 0:
            try:
                result = work(*arguments)
            except UserError as wrong:
                error = wrong
        (result, error), *_ = self.gather((result, error))
        if error:
            raise error if self.rank == 0 else SystemExit(1)
        return result


ALONE = Ranks()


def join(device="", backend=""):
    """Ranks of this process, which waits for the others under torchrun. Ranks that share a GPU, or have none,
    use gloo, as does backend="gloo"; `device` is as `place` takes it."""
    import torch
    import torch.distributed as dist
    found = place(device)
    if "RANK" not in os.environ:
        return Ranks(device=found)
    own = "gloo"
    if found.type == "cuda":
        torch.cuda.set_device(found)
        if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            own = "nccl"
    # the other ranks wait while rank 0 checks the pairs and evaluates: that may take hours
    dist.init_process_group(backend or own, timeout=timedelta(days=30))
    return Ranks(dist.get_rank(), dist.get_world_size(), found)


def dtype(name, device, on_cuda="bfloat16"):
    """torch's type of a name; of auto, nf4 (what it computes in) or none: on_cuda on a GPU, else float32."""
    import torch
    if name in (None, "auto", "nf4"):
        name = on_cuda if torch.device(device).type == "cuda" else "float32"
    return getattr(torch, name)


def place(device):
    """The torch.device of this process; `device` is "" for CUDA, else MPS, else the CPU."""
    import torch
    with explained(f"--device {device}: it cannot be used", "give cuda, mps or cpu, if it is there"):
        found = torch.device(device or torch.accelerator.current_accelerator(True) or "cpu")
        if found.type == "cuda" and found.index is None:
            rank = int(os.environ.get("LOCAL_RANK", 0))
            found = torch.device("cuda", rank % max(1, torch.cuda.device_count()))
        torch.ones(1, device=found).item()
    return found


def leave(ranks):
    """Undo join: wait for every rank, then close the group."""
    ranks.barrier()
    if ranks.world > 1:
        import torch.distributed as dist
        dist.destroy_process_group()


def send(x, device):
    """A tensor of the host on the device; the host does not wait until a GPU has it."""
    return x.to(device, non_blocking=device.type == "cuda")


def free():
    """Free the memory of objects that nothing refers to any more, for the next model."""
    import gc

    import torch
    gc.collect()                                        # modules refer to each other in circles
    torch.cuda.empty_cache()                            # nothing without a GPU


# ---- what files hold ----
def fits(value, shape):
    """Whether a value from a file is of a shape: of a type (numbers are finite, texts can be written), of one
    of a tuple of shapes (None: it may be absent), a list of [shape] or of as many as [shape, shape, ...], an
    object of {field: shape}, or of {str: shape} under any names."""
    if shape is str:
        return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)      # half of a pair
    if isinstance(shape, tuple):
        return any(fits(value, one) for one in shape)
    if isinstance(shape, list):
        wanted = shape * len(value) if isinstance(value, list) and len(shape) == 1 else shape
        return isinstance(value, list) and len(value) == len(wanted) and all(map(fits, value, wanted))
    if isinstance(shape, dict):
        each = shape.get(str)
        names = value if each else shape
        return isinstance(value, dict) and all(fits(value.get(name), each or shape[name]) for name in names)
    if shape in (int, float):
        return type(value) in (int, shape) and abs(value) < 1 << 63
    return value is None if shape is None else isinstance(value, shape)


def fields(what, **shapes):
    """A check for data's readers of JSON: a record with fields of these shapes. what: it is, for people."""
    def check(record, place):
        data.as_record(record, place)
        for name, shape in shapes.items():
            if not fits(record.get(name), shape):
                has = "no" if record.get(name) is None else f"{str(record[name])[:60]!r} as"
                raise UserError(f"{place} has {has} {name!r}, so this is no {what}; fix it or give one")
        return record
    return check


def read_text(path):
    """A text file as it is, its line ends included. Raises UserError."""
    with explained(f"{path} is no text in UTF-8", "give the right file"):
        return data.read_bytes(path).decode("utf-8-sig")


def file_name(text):
    """A text as a file's name, which cannot lead out of its folder."""
    return re.sub(r"[^\w.-]+", "-", text)[:100]


def classroom(program, *words):
    """Run one of the classroom's programs, which no file imports -> what it printed. Raises UserError."""
    path = Path(__file__).resolve().parents[1] / "classroom" / program
    done = subprocess.run([sys.executable, path, *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError(done.stderr.strip())
    print(done.stderr, end="", file=sys.stderr)
    return done.stdout


# ---- the folder ----
def claim(out):
    """Make the folder `out` and lock it; returns the lock, to keep. Raises UserError if it is in use."""
    import fcntl
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        lock = open(f"{out}/.lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)           # released by the system in any case
    except BlockingIOError:
        raise UserError(f"--out {out} is in use by another run: wait for it or give another") from None
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e.strerror}): give another folder") from None
    return lock


# ---- what something was made from ----
BLOCK, BLOCKS = 1 << 16, 64                             # bytes; of a larger file so many are hashed
FILES = 10_000                                          # of a folder: more are not a model's


def is_url(source):
    return re.match("(?i)https?://", source) is not None


def fingerprint(content):
    """16 hex digits of bytes."""
    return hashlib.sha256(content).hexdigest()[:16]


def digest(path, blocks=BLOCKS):
    """A hash over a file's name, its size and spread blocks of it (all of a file that they would fill).

    A tuned model differs nearly everywhere, so 14 GB need not be read a second time. Raises UserError.
    """
    with data.reading(path) as file:
        length = file.seek(0, os.SEEK_END)
        found = hashlib.sha256(f"{path.name} {length}".encode())
        for place in range(0, length, max(BLOCK, length // blocks)):
            file.seek(place)
            found.update(file.read(BLOCK))
    return found.digest()


def identity(source):
    """16 hex digits that tell one model from another: of a URL's text without its query; of a file's or a
    folder's files' digests."""
    source, path = str(source), Path(source)
    if is_url(source):
        return fingerprint(source.partition("?")[0].encode())
    if not path.exists():
        raise UserError(f"{source}: no such file or folder, and no URL; check the path")
    there = [path, *islice(path.rglob("*"), FILES)]
    if len(there) > FILES:
        raise UserError(f"{source} holds over {FILES:,} files: give the folder of the model alone")
    return identity_of(file for file in sorted(there) if file.is_file() and file.suffix != ".md")


def identity_of(paths, blocks=BLOCKS):
    """16 hex digits that tell these files from others. blocks: as digest takes them."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(partial(digest, blocks=blocks), map(Path, paths))
        return fingerprint(b"".join(digests))


# ---- work that resumes ----
NAME = int, str                                         # an id in a file


@dataclass
class Store:
    """A file of JSON lines, one for each item that is made, in the items' order.

    An item is a dict with an `id` and a `hash` over all that it is made from; a line is the item and what
    `make` found. While work runs, each rank appends to a part of its own beside the file, one line for each
    group of items, so that a kill loses whole groups only; at the end rank 0 writes the parts' lines in
    order.

    head: {"settings": {name: value}}, the first line, which decides every other (in a part each line has it):
    a file begun with others is refused. shape: a row -> its line in the finished file, where that has no id
    and hash.
    """
    path: Path
    ranks: Ranks = ALONE
    head: dict | None = None
    shape: object = None

    def parts(self):
        return sorted(self.path.parent.glob(f"{self.path.name}.rank*"))

    def kept(self, items):
        """{id: row} of the items that are made: those whose row has the item's hash."""
        wanted, found = {item["id"]: item["hash"] for item in items}, {}
        for file in (self.path, *self.parts()):
            lines = list(data.read_jsonl(file, torn_ok=True)) if file.exists() else []
            with explained(f"{file} is damaged or has no settings", "delete it: what it holds is made again"):
                if lines and self.head:
                    self.check_head(file, lines[0])
                if self.shape and file == self.path:                 # the lines are in the items' order
                    own = [line for line in lines if "settings" not in line]
                    lines = [line | item for line, item in zip(own, items, strict=False)]
                for line in lines:
                    for row in line.get("rows", [line]):
                        if wanted.get(row.get("id"), "") == row.get("hash"):
                            found[row["id"]] = row
        return found

    def check_head(self, file, begun):
        """Raise UserError where a file was begun with other settings: what differs is named."""
        was, now, differ = begun["settings"], self.head["settings"], []
        for name in was | now:
            old, new = str(was.get(name)), str(now.get(name))
            if old != new:
                differ.append(f"{name} ({old[:40]}, now {new[:40]})")
        if differ:
            raise UserError(f"{file} was begun with other settings: {', '.join(differ)}; give another --out")

    def add(self, rows):
        """Keep rows that are made, all or none of them."""
        part = self.path.with_name(f"{self.path.name}.rank{self.ranks.rank}")
        data.append_jsonl(part, {**(self.head or {}), "rows": rows})

    def work(self, items, make, size=1, description=""):
        """The items' rows in their order, without those that failed; only what is missing is made.

        make: groups (lists of `size` items) -> their rows, group by group, None for an item that failed.
        Group g is rank g's (modulo the ranks) and is made whole, so that a resumed run computes in the same
        batches. Keys of an item that begin with _ are for `make` alone. `there`: how many were made before.
        """
        had, ranks = self.kept(items), self.ranks
        self.there = len(had)
        ranks.barrier()                                     # everyone has read what is there before it grows
        groups = data.chunks(items, size)[ranks.rank::ranks.world]
        mine = [group for group in groups if any(item["id"] not in had for item in group)]
        hidden = True if ranks.rank else None               # None: shown on a terminal only
        with tqdm(total=len(items), initial=len(had), desc=description, disable=hidden) as bar:
            for group, rows in zip(mine, make(mine), strict=True) if mine else ():
                new = []
                for item, row in zip(group, rows, strict=True):
                    if row is not None and item["id"] not in had:
                        new.append({k: v for k, v in (item | row).items() if not k.startswith("_")})
                self.add(new)
                bar.update(len(new) * ranks.world)
        ranks.barrier()
        found = self.kept(items)
        ranks.barrier()                                     # everyone has read the parts: delete them
        rows = [found[item["id"]] for item in items if item["id"] in found]
        if ranks.rank == 0:
            lines = [self.shape(row) for row in rows] if self.shape else rows
            data.write_jsonl(self.path, [self.head, *lines] if self.head else lines)
            for part in self.parts():
                part.unlink()
        return rows
