"""What every script shares: files that are never half written, images, rejected images, packed token rows.
Ours, where official codes differ: 1. A crop that fits in none of ten tries is central and keeps its area
(torchvision: its aspect). 2. `noise` is drawn at VCD's 336 pixels: shrinking averages out finer noise."""
if __name__ == "__main__":
    exit("A part of every command; run: python train_dpo.py --help")

import argparse
import contextlib
import difflib
import functools
import glob
import hashlib
import io
import json
import os
import re
import shutil
import sys
import textwrap
import threading
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

if missing := [name for name in "numpy PIL safetensors torch tqdm".split() if not find_spec(name)]:
    sys.exit(f"{sys.executable} has no {', '.join(missing)}: in nanoVPO's folder, run python3 -m venv .venv "
             "&& . .venv/bin/activate && pip install -r requirements.txt")

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps


class UserError(ValueError):
    """A user's mistake, in one sentence: what is wrong, where, and how to fix it."""
    def __str__(self):
        shown = re.sub(r"(?<=://)[^/\s]*@|(?<=\S)\?\S+=\S*", "", super().__str__())     # a URL's secrets
        return re.sub(r"(\S{60})\S{90,}(\S{30})", r"\1...\2", shown)                 # an image as a text


@contextlib.contextmanager
def explained(what, fix):
    """Whatever a file's contents make its reader raise is a UserError: what failed, why, how to fix it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or "OutOfMemory" in type(error).__name__:
            raise
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{what} ({why}); {fix}") from error


def like(word, names):                                  # what a mistyped word was meant to be
    near = difflib.get_close_matches(word, names, 1, 0.7)
    return f" (did you mean {near[0]}?)" if near else ""


class Parser(argparse.ArgumentParser):
    """A command line whose refusals are one sentence and exit code 1; help texts of 80 columns."""
    def __init__(self, *args, **options):
        form = functools.partial(argparse.RawDescriptionHelpFormatter, width=80)
        super().__init__(*args, formatter_class=form, allow_abbrev=False, **options)
        parts = (self.description or "").strip().split("\n\n")
        self.description = "\n\n".join(part if "\n    " in f"\n{part}"              # commands: as they are
                                       else textwrap.fill(" ".join(part.split()), 80) for part in parts)

    def parse_known_args(self, argv=None, *namespace):
        argv, known = sys.argv[1:] if argv is None else argv, self._option_string_actions
        if re.search("[\0\ud800-\udfff]", " ".join(argv)):              # half of a surrogate pair: no UTF-8
            self.error("an argument holds a NUL or bytes that are no UTF-8: leave them out")
        for name in [word.partition("=")[0] for word in argv if word[:2] == "--" != word]:
            if name not in known and not self._subparsers:
                self.error(f"there is no {name}{like(name, known)}")
        return super().parse_known_args(argv, *namespace)

    def _check_value(self, action, value):
        if action.choices and value not in action.choices:
            says = f"{value}{like(value, action.choices)}: give one of {', '.join(action.choices)}"
            raise argparse.ArgumentError(action, says)

    def error(self, message):
        sys.exit(f"{self.prog}: {UserError(message)}; see --help")


# ---- files: what is already written is never lost ----
def _write_all(file, content):
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    view = memoryview(content)
    while view:
        view = view[os.write(file.fileno(), view):]


def temporary(path):
    """The name that a file or folder has until it is whole; what killed processes left is removed."""
    if not path.name or path.exists() and not (path.is_file() or path.is_dir()):
        raise UserError(f"{path} can be no file or folder of ours; give another name")
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(ValueError, OverflowError, PermissionError):       # somebody else's
            pid = int(old.name.split(".")[-2])
            line = Path(f"/proc/{pid}/cmdline")
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 0)                                                     # asks whether it lives
                if not line.exists() or line.read_bytes():          # else it has ended, and nobody asked
                    continue
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def atomic_write(path, content):
    """Write the whole file, text or bytes, or leave the old one; its folder is made. Raises UserError."""
    path = Path(path)
    tmp = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(tmp, "wb", buffering=0) as file:
            _write_all(file, content)
            os.fsync(file.fileno())     # before the rename: a power cut must not leave an empty file
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"{path} could not be written ({e.strerror}) and is as it was; free space") from e
    finally:
        with contextlib.suppress(OSError):      # gone already if all went well: renamed
            tmp.unlink()


def write_jsonl(path, rows):
    """Write one object per line: the whole file, or the old one stays. Raises UserError."""
    atomic_write(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))


def append_jsonl(path, record):
    """Append one line, or none of it; a killed run's torn last line is cut off first. Raises UserError."""
    try:
        with open(path, "ab+", buffering=0) as file:
            size = _end_line(file)
            try:
                _write_all(file, f"{json.dumps(record, ensure_ascii=False)}\n")
            except OSError:
                file.truncate(size)
                raise
    except OSError as e:
        raise UserError(f"{path} could not be extended ({e.strerror}) and is as it was; free space") from e


def _end_line(file):
    """Cut off a torn last line, or end one that lacks only its newline -> the file's size."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read() in (b"", b"\n"):
        return size
    file.seek(0)
    tail = file.read().rpartition(b"\n")[2]
    try:
        json.loads(tail)
        file.write(b"\n")
    except (ValueError, RecursionError):
        file.truncate(size - len(tail))
    return file.seek(0, os.SEEK_END)


@contextlib.contextmanager
def reading(path):
    """The open file of a path. Raises UserError if it cannot be read."""
    try:
        if Path(path).is_fifo() or Path(path).is_char_device():
            raise OSError(None, "it is a pipe or a device")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); check the path") from error


def read_bytes(path):
    """A file's bytes. Raises UserError."""
    with reading(path) as file:
        return file.read()


def parse(text, path, line=1, object_hook=None):
    """The value of a JSON text (bytes or str) that begins in a line of a file. Raises UserError."""
    try:
        return json.loads(text, object_hook=object_hook)
    except json.JSONDecodeError as error:               # its line number counts from the start of `text`
        line += error.lineno - 1
        why = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:       # ValueError: bytes that are not UTF-8
        why = error
    raise UserError(f"{path}, line {line}: broken JSON ({why}); fix or delete it")


def as_record(value, place):
    """The value, which must be a JSON object. Raises UserError."""
    if not isinstance(value, dict):
        raise UserError(f"{place}: {type(value).__name__} instead of a record {{...}}; fix or delete it")
    return value


def read_json(path, default=None, check=None, object_hook=None):
    """What a JSON file holds, or `default`. check: as_record, or another. object_hook: json.loads's."""
    if default is not None and not os.path.exists(path):
        return default
    found = parse(read_bytes(path), path, object_hook=object_hook)
    return check(found, path) if check else found


def read_jsonl(path, torn_ok=False, check=as_record):
    """The objects of a JSON-lines file; torn_ok passes over a last line that a killed run left unfinished."""
    with reading(path) as file:
        for number, line in enumerate(file, 1):
            try:
                if text := line.rstrip():
                    yield check(parse(text, path, number), f"{path}, line {number}")
            except UserError:
                if not torn_ok or line.endswith(b"\n"):
                    raise


def read_records(path, torn_ok=True, check=as_record):
    """The objects of a JSON list or of JSON lines, told apart by the first character, in a list."""
    with reading(path) as file:
        start = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start.startswith(b"["):
        return list(read_jsonl(path, torn_ok, check))
    return [check(value, f"{path}, entry {number}") for number, value in enumerate(read_json(path), 1)]


def inside(root, path, what, follow_links=False):
    """A path in `root`, which it may leave by symbolic links alone, with follow_links. Raises UserError."""
    root = os.path.realpath(root)
    found = os.path.join(root, path.replace("\0", "?"))
    found = os.path.abspath(found) if follow_links else os.path.realpath(found)
    if "\0" in path or os.path.commonpath([root, found]) != root:
        raise UserError(f"{what}: {path} leaves the folder {root}; move it inside (a copy, not a link), give "
                        "its own folder (--image_root, --images), or let links lead out (--follow_links)")
    return found


def chunks(items, size):
    """The slices of `size` items of a list or a range; the last may be shorter."""
    return [items[at:at + size] for at in range(0, len(items), size)]


def from_folder(kind, folder, what, fix="copy it again", **options):
    """kind.from_pretrained(folder), without a network and without the folder's own code. Raises UserError."""
    if any(file.is_fifo() or file.is_char_device() for file in Path(folder).rglob("*")):
        raise UserError(f"{folder} holds a pipe or a device: {fix}")
    with explained(f"{folder}: the {what} cannot be read", fix):          # what libraries raise has no end
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


# ---- images ----
FORMATS = "PNG JPEG WEBP GIF BMP TIFF PPM AVIF JPEG2000".split()
NARROW, PIXELS, SIDE, ALONE = 100, 1 << 26, 10_000, threading.Lock()   # at most; large ones one at a time


@contextlib.contextmanager
def _opened(source):
    """A path's or bytes' PIL image; whatever is wrong with the file is a UserError."""
    name = source
    if isinstance(source, bytes):
        name, source = f"of {len(source)} bytes", io.BytesIO(source)
    elif not os.path.isfile(source) and not os.path.isdir(source):
        raise UserError(f"image {name} is missing; put it there or give the right --image_root")
    with (explained(f"image {name} is unreadable", "replace the file"),         # Pillow raises what it likes
          Image.open(source, formats=FORMATS) as file):
        if max(file.size) > NARROW * min(file.size):                 # one side would be scaled to a gigabyte
            raise ValueError(f"{file.width} x {file.height} pixels are too narrow: crop it")
        pixels = file.width * file.height
        if pixels > PIXELS or max(file.size) > SIDE:
            raise ValueError(f"{file.width} x {file.height} pixels are over {PIXELS:,} or {SIDE:,} a side")
        with ALONE if pixels > PIXELS // 4 else contextlib.nullcontext():
            yield file


def read_image(source, as_stored=False):
    """A path's or bytes' image in RGB, upright, alpha dropped as official; as_stored: as in the file."""
    with _opened(source) as file:
        if as_stored:
            return file.copy()
        image = ImageOps.exif_transpose(file)           # decodes all of it: a truncated file fails here
        if image.mode[0] in "IF":                       # 16 bits, or floats, which convert() would clip
            pixels = np.asarray(image, float)
            unit = 256 if image.mode[0] == "I" else max(1, pixels.max()) / 255
            image = Image.fromarray((pixels / unit).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def image_size(source):
    """(width, height) of read_image's result, from the header alone."""
    with _opened(source) as file:
        if file.format == "TIFF":                       # whose size changes with its pixels
            file.load()
        return file.size[::-1] if file.getexif().get(0x0112, 1) >= 5 else file.size    # those on their side


# ---- rejected images: one function f(record, image, other, rng) each, and a line in REJECTED ----
def hash64(*key):
    text = "\0".join(map(str, key)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def draw(*key):
    """A random generator of its own for each key."""
    return np.random.default_rng(hash64(*key))


def crop_box(width, height, rng, area):
    """(x, y, w, h) of torchvision's RandomResizedCrop: a share of the area, aspect 3/4 to 4/3."""
    for _ in range(10):
        target = width * height * rng.uniform(*area)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1)), w, h
    w, h = (width, round(target / width)) if w > width else (round(target / height), height)
    w, h = max(w, 1), max(h, 1)
    return (width - w) // 2, (height - h) // 2, w, h


def crop(area):
    """The rejected image that is a random box with a share of the picture's area, resized back."""
    def made(record, image, other, rng):
        x, y, w, h = crop_box(*image.size, rng, area)
        return image.crop((x, y, x + w, y + h)).resize(image.size, Image.Resampling.BILINEAR)
    return made


def patch(record, image, other, rng):
    """What crop keeps, neither moved nor magnified."""
    x, y, w, h = crop_box(*image.size, rng, AREAS["crop"])
    found, box = blank(record, image, other, rng), (x, y, x + w, y + h)
    found.paste(image.crop(box), box)
    return found


def blank(record, image, other, rng):
    """A picture that is zeros once normalised."""
    return Image.new("RGB", image.size, tuple((MEAN * 255).round().astype(int).tolist()))


def moco(record, image, other, rng):
    """MoCo v2 (arXiv 2003.04297, main_moco.py --aug-plus); its blur is meant for 224 pixels."""
    image = crop((0.2, 1.0))(record, image, other, rng)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind in rng.permutation(4) if rng.random() < 0.8 else ():
        if kind < 3:
            image = enhancers[kind](image).enhance(rng.uniform(0.6, 1.4))
        else:
            shift = int(rng.uniform(-0.1, 0.1) * 255)
            hue, *rest = image.convert("HSV").split()
            hue = hue.point(np.roll(range(256), -shift).tolist())
            image = Image.merge("HSV", (hue, *rest)).convert("RGB")
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * min(image.size) / 224))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


MEAN = np.array([0.48145466, 0.4578275, 0.40821073])    # CLIP's, whose normalised pixels VCD works on
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def noise(record, image, other, rng):
    """x_500 of 1000 as in VCD (arXiv 2311.16922, vcd_add_noise.py): sigmoid betas."""
    betas = 1e-5 + (0.5e-2 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, 1000)))
    kept, size, scale = np.cumprod(1 - betas)[500], image.size, min(1.0, 336 / min(image.size))
    image = image.resize([max(1, round(side * scale)) for side in size], Image.Resampling.BICUBIC)
    pixels = np.sqrt(kept) * (np.asarray(image) / 255 - MEAN) / STD
    pixels += np.sqrt(1 - kept) * rng.standard_normal(pixels.shape)
    pixels = ((pixels * STD + MEAN) * 255).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


AREAS = {"crop": (0.01, 0.2), "crop20-50": (0.2, 0.5), "crop50-80": (0.5, 0.8), "crop80-100": (0.8, 1.0)}
REJECTED = {name: crop(area) for name, area in AREAS.items()}
REJECTED |= {"patch": patch, "random": lambda record, image, other, rng: other(), "moco": moco,
             "blank": blank, "noise": noise}


def rng_of(strategy, seed, id):
    """The generator of a pair's rejected image. `patch` takes crop's, so that it keeps what crop keeps."""
    return draw(seed, "crop" if strategy == "patch" else strategy, id, None)


def rejected_image(strategy, image, seed, id, other=None, record=None):
    """A pair's rejected image: the same for the same seed, strategy and id. other, record: see above."""
    return REJECTED[strategy](record, image, other, rng_of(strategy, seed, id))


# ---- token ids ----
class Pair(NamedTuple):
    """One pair in token ids: image runs are expanded, responses end with the end-of-sequence token."""
    id: str
    prompt: list
    prompt_rejected: list
    chosen: list
    rejected: list
    sizes: tuple = ()             # (width, height) of each image in `prompt`
    sizes_rejected: tuple = ()    # and in `prompt_rejected`
    prompt_bare: list = ()        # without images, if the loss reads such answers
    weight: float = 1.0           # the record's meta.weight
    apart: object = None          # a Pair whose prompts `rejected` follows, if its earlier turns differ

    def shown(self, images, field="chosen"):
        """(prompt, its images' sizes) before a field's response: with `images`, `rejected` ones or `none`."""
        if self.apart and field.startswith("rejected"):
            return self.apart.shown(images)
        return {"images": (self.prompt, self.sizes), "none": (self.prompt_bare, ()),
                "rejected": (self.prompt_rejected, self.sizes_rejected)}[images]

    def response(self, field):    # the one whose log-prob a field of losses.Logps is
        return self.rejected if field.startswith("rejected") else self.chosen


class Segment(NamedTuple):
    """Where a prompt and its responses are in a Row: their lengths in tokens."""
    start: int
    prompt: int
    chosen: int
    rejected: int = 0


class Row(NamedTuple):
    """A micro-batch packed into one row of T tokens for vlm.packed; tensors of int64."""
    ids: object           # (T,)
    positions: object     # (T,) or (3, T): they restart in each segment, `rejected` follows its prompt
    segments: list        # [Segment]
    predict: object       # (N,) the place whose hidden state predicts response token n
    target: object        # (N,) that token
    lengths: list         # tokens of each response in `predict`: all of a field, field after field
    shown: list           # features of the images in `ids`, one after another


def positions_after(positions, n):
    """Positions of n tokens after a prompt with positions (T,) or (3, T): they continue from the largest."""
    import torch
    return (torch.arange(n) + positions.max() + 1).expand(*positions.shape[:-1], n)


FIELDS = {"images": ("chosen", "rejected"), "rejected": ("image_rejected", "rejected_image_rejected"),
          "none": ("chosen_no_image", "rejected_no_image")}          # in losses.Logps, by the prompt's images


def grouped(needs):
    """{the images in a prompt: the fields of losses.Logps in `needs` that are scored behind it}."""
    return {images: read for images, fields in FIELDS.items() if (read := [f for f in fields if f in needs])}


def pack(pairs, needs, positions_of=None, features=None):
    """Pairs -> Row: `[prompt | chosen | rejected]` of each, or `[prompt | chosen] [prompt | rejected]` where
    earlier turns differ; so with rejected images, then without any. needs: fields of losses.Logps; no others
    are packed. positions_of(ids, sizes): a family's, of a prompt (if not 0, 1, ...); responses continue from
    its largest. features: vlm.Features of the pairs, for the Row."""
    import torch
    ids, positions, segments, scored, shown = [], [], [], {}, []
    for images, fields in grouped(needs).items():
        encoded = iter(getattr(features, images, ()))
        for pair in pairs:
            of_pair = [*islice(encoded, len(pair.sizes))]
            for (prompt, sizes), behind in groupby(fields, functools.partial(pair.shown, images)):
                own = positions_of(prompt, sizes) if positions_of else torch.arange(len(prompt))
                lengths = [len(ids), len(prompt)]
                ids += prompt
                positions.append(own)
                last = len(ids) - 1                          # predicts the first token of both responses
                for field in behind:
                    response = pair.response(field)
                    places = [last, *range(len(ids), len(ids) + len(response) - 1)]
                    scored.setdefault(field, []).append((places, response))
                    ids += response
                    positions.append(positions_after(own, len(response)))
                    lengths.append(len(response))
                segments.append(Segment(*lengths))
                shown += of_pair
    places, responses = zip(*sum(scored.values(), []), strict=True)
    predict, target = torch.tensor(sum(places, [])), torch.tensor(sum(responses, []))
    positions = torch.cat(positions, -1)
    return Row(torch.tensor(ids), positions, segments, predict, target, [*map(len, responses)], shown)
