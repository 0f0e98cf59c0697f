"""Preference pairs: every public record format, their checks, image reading, rejected images, JSON lines, atomic writes.

    records = Records("pairs.jsonl")      # indexes the file; a record is parsed when it is asked for
    good = check(records)                 # every record and every image, once; the faults on stderr, one a line
    pair = records[good[0]]               # id images images_rejected question history chosen rejected meta
    image = rejected_image("crop", read_image(pair["images"][0]), seed=0, id=pair["id"])

Formats, told by their keys, in JSON lines, a JSON array or parquet, and where each is published:
    native      question chosen rejected image [image_rejected history meta]    this project's own
    mdpo        img_path prompt chosen rejected                                 luka-group/mDPO, data/sample_data.json
    llava       conversations rejected_conversations image                      PDS-DPO; YiyangZhou/POVID, train_dpo.py
    rlhf-v      text (JSON string or object: question chosen rejected) image    openbmb/RLHF-V-Dataset
    rlaif-v     question chosen rejected image (path or {bytes, path}) ds_name  openbmb/RLAIF-V-Dataset
    vlfeedback  prompt completions (of annotations, response) img_path          MMInstruction/VLFeedback (Silkie)
    llava-rlhf  conversations output_1 output_2 preference (1 or 2) image       zhiqings/LLaVA-Human-Preference-10K
    ha-dpo      image_id question chosen reject, or {image_id: chosen rejected} opendatalab/HA-DPO, llava-v1_5/train_dpo.py
    trl         prompt chosen rejected images (messages or text)                TRL's "Dataset formats"
Ours, where a format leaves a choice:
    1. vlfeedback: where ids begin with `llava-`, only these (LLaVA-Instruct, as in mDPO); best against worst mean rating, no ties;
       of more than 10,000 pairs a sample by a hash of the id. `Records.dropped` counts what is left out.
    2. ha-dpo: an image lies where Visual Genome's image_data.json in the image root says, else at VG_100K/ID.jpg; `correct` answers
       are left out like the official code does; a description's question and answers are one seeded draw per image.
    3. llava-rlhf, ha-dpo, rlhf-v and rlaif-v repeat their ids or have none: the id is FILE:index, their own is in `meta`.
    4. A crop that does not fit in ten tries is central and keeps the area drawn (torchvision keeps the aspect; official images are
       square and never come to it). `noise` is drawn at VCD's 336 pixels, because finer noise is lost when a model shrinks the image.
"""
import argparse
import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import re
import struct
import sys
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from tqdm import tqdm


class UserError(ValueError):
    """A user's mistake, in one sentence: what, where, and the mend."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose refusals are UserErrors too: one sentence, and exit code 1."""
    def error(self, message):
        sys.exit(f"{self.prog}: {message}; see --help")


# ---- files: what is already written is never lost ----

def _write_all(fd, content):
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view):]


def atomic_write(path, content):
    """Write the whole file, or leave the old one as it was."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb", buffering=0) as file:
            _write_all(file.fileno(), content.encode() if isinstance(content, str) else content)
            os.fsync(file.fileno())       # before the rename: a power cut must not leave an empty file under the final name
        os.replace(tmp, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            tmp.unlink()
        if not isinstance(error, OSError):
            raise
        raise UserError(f"{path} could not be written ({error.strerror}) and what stood there is kept; free space or "
                        "choose another folder, and run the command again") from error


def append_jsonl(target, record):
    """One line more, or none. Given a path, a last line that a killed run left torn is cut off first."""
    if isinstance(target, str | os.PathLike):
        try:
            with open(target, "ab+") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - (1 << 24)))
                if tail := file.read().rpartition(b"\n")[2]:
                    try:
                        json.loads(tail)
                        file.write(b"\n")
                    except ValueError:
                        file.truncate(size - len(tail))
                return append_jsonl(file, record)
        except OSError as error:
            raise UserError(f"{target} could not be opened for writing ({error.strerror}); check its folder") from error
    target.flush()
    size = os.fstat(target.fileno()).st_size
    try:
        _write_all(target.fileno(), (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    except OSError as error:
        os.ftruncate(target.fileno(), size)
        raise UserError(f"{target.name} could not be extended ({error.strerror}) and its earlier lines are kept; free "
                        "space and run the command again") from error


def _parse(text, place):
    """One JSON object; a fault names `place(its line)`."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:               # ValueError covers bytes that are not UTF-8, too
        raise UserError(f"{place(getattr(error, 'lineno', 1))}: broken JSON ({error}); mend it or delete the record") from error
    if not isinstance(record, dict):
        raise UserError(f"{place(1)}: {type(record).__name__} where a record {{...}} should be; mend it or delete it")
    return record


def read_jsonl(path, torn_ok=False):
    """The objects of a JSON-lines file; torn_ok passes over a last line that a killed run left unfinished."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield _parse(line, lambda _, number=number: f"{path}, line {number}")
                    except UserError:
                        if not torn_ok or line.endswith(b"\n"):
                            raise
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); check the path") from error


def read_image(source):
    """A path's or bytes' image in RGB, upright by its EXIF tag, alpha dropped as the official codes do."""
    name = f"of {len(source)} bytes" if isinstance(source, bytes) else source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            image = ImageOps.exif_transpose(file)               # decodes all of it: a truncated file fails here
        if image.mode.startswith("I"):                          # 16 bits, which convert() would clip to white
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")
    except FileNotFoundError as error:
        raise UserError(f"image {name} is missing; put it there, or give its folder with --image_root") from error
    except (OSError, SyntaxError, ValueError, EOFError, OverflowError, struct.error, zlib.error,
            Image.DecompressionBombError) as error:
        raise UserError(f"image {name} is unreadable ({error}); replace the file") from error


# ---- the index: where records begin and end ----

def _chunks(path, size=1 << 24):
    offset = 0
    with open(path, "rb") as file:
        while chunk := file.read(size):
            while chunk.endswith(b"\\") and (more := file.read(1)):     # never cut between a backslash and its character
                chunk += more
            yield offset, chunk
            offset += len(chunk)


def index_lines(path):
    """Starts, ends and line numbers of the lines that are not blank."""
    breaks = [np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + offset for offset, chunk in _chunks(path)]
    ends = np.concatenate([*breaks, [os.path.getsize(path)]])
    starts = np.concatenate([[0], ends[:-1] + 1])
    keep = ends > starts
    with open(path, "rb") as file:
        for i in np.flatnonzero(keep & (ends - starts < 16)):
            file.seek(starts[i])
            keep[i] = bool(file.read(ends[i] - starts[i]).strip())
    return starts[keep], ends[keep], np.flatnonzero(keep) + 1


STEP = np.zeros(256, np.int8)
STEP[list(b"{[")], STEP[list(b"}]")] = 1, -1


def index_array(path):
    """Starts, ends and lines of the objects in a top-level array (or object), by counting brackets outside strings."""
    found, depth, quoted, line = [], 0, 0, 1
    for offset, chunk in _chunks(path):
        text = np.frombuffer(chunk, np.uint8)
        quotes = np.flatnonzero(text == ord('"'))
        escaped, run, back = np.zeros(len(quotes), bool), np.arange(len(quotes)), 1
        while len(run := run[(quotes[run] >= back) & (text[quotes[run] - back] == ord("\\"))]):
            escaped[run] ^= True                                # an odd number of backslashes: a quote inside the string
            back += 1
        quotes, newlines = quotes[~escaped], np.flatnonzero(text == 10)
        brackets = np.flatnonzero(STEP[text])
        brackets = brackets[(np.searchsorted(quotes, brackets) + quoted) % 2 == 0]
        step = STEP[text[brackets]]
        level = depth + np.cumsum(step, dtype=np.int64)
        opens, closes = brackets[(level == 2) & (step > 0)], brackets[(level == 1) & (step < 0)]
        found.append((opens + offset, closes + offset + 1, np.searchsorted(newlines, opens) + line))
        line, quoted, depth = line + len(newlines), (quoted + len(quotes)) % 2, depth + int(step.sum())
    starts, ends, lines = (np.concatenate(parts) for parts in zip(*found, strict=True))
    with open(path, "rb") as file:
        file.seek(ends[-1] if len(ends) else 0)
        if depth or quoted or file.read().strip() not in (b"]", b"}", b"[]"):
            file.seek(0)
            _parse(file.read(), lambda at: f"{path}, line {at}")        # slow, but it names the line where the file breaks
    return starts, ends, lines


# ---- the formats ----

def _text(turn):
    """(role, text) of a turn in LLaVA's or OpenAI's layout."""
    role, content = turn["from"] if "from" in turn else turn["role"], turn["value"] if "value" in turn else turn["content"]
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return {"human": "user", "gpt": "assistant", "llava": "assistant"}.get(role, role), content


def _answer(turns):
    if isinstance(turns, str | None):
        return turns
    role, text = _text(turns[-1])
    if role != "assistant":
        raise UserError("the last turn is not the assistant's; mend the conversation")
    return text


def _dialogue(turns):
    """(history, question) of a question, or of turns that end with the user's; a system message leads the first question."""
    turns = [("user", turns)] if isinstance(turns, str) else [_text(turn) for turn in turns]
    system = [text for role, text in turns if role == "system"]
    turns = [(role, text.replace("<image>", "").strip()) for role, text in turns if role != "system"]
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise UserError("the turns before the answer are not user, assistant, ..., user; mend the conversation")
    texts = ["\n\n".join([*system, turns[0][1]]), *(text for _, text in turns[1:])]
    return [texts[k:k + 2] for k in range(0, len(texts) - 1, 2)], texts[-1]


def _rated(raw):
    """(mean rating, answer) of the completions that are rated; parquet holds the list of objects as an object of lists."""
    answers, rated = raw["completions"], []
    if isinstance(answers, dict):
        answers = [dict(zip(answers, values, strict=True)) for values in zip(*answers.values(), strict=True)]
    for answer in answers:
        with contextlib.suppress(ValueError, TypeError, ZeroDivisionError):     # "N/A", null, or none: not rated
            marks = [float(mark["Rating"]) for mark in answer["annotations"].values()]
            rated.append((sum(marks) / len(marks), answer["response"]))
    return sorted(rated, key=lambda mark: mark[0])


DESCRIBE = ("Describe this image in detail.", "Take a look at this image and describe what you notice.",
            "Please provide a detailed description of the picture.", "Could you describe the contents of this image for me?")
FORMATS = {"vlfeedback": ("prompt", "completions"), "llava-rlhf": ("output_1", "output_2"), "mdpo": ("img_path", "prompt"),
           "llava": ("conversations",), "ha-dpo": ("image_id", "chosen"), "rlhf-v": ("text", "image"),
           "rlaif-v": ("question", "ds_name"), "native": ("question",), "trl": ("chosen", "rejected")}  # the keys that tell
SAMPLE = 10_000


def _fields(kind, raw, genome):
    """id, image(s), question or turns, chosen, rejected, under each format's names."""
    get = raw.get
    match kind:
        case "native":
            turns = [{"role": role, "content": text} for pair in get("history") or []
                     for role, text in zip(("user", "assistant"), pair, strict=True)]
            return get("id"), get("image"), [*turns, {"role": "user", "content": raw["question"]}], raw["chosen"], get("rejected")
        case "mdpo":
            inner = re.search(r"USER:(.*)ASSISTANT:", raw["prompt"], re.DOTALL)
            return get("id"), raw["img_path"], inner[1] if inner else raw["prompt"], raw["chosen"], get("rejected")
        case "llava":
            turns = raw["conversations"]
            return get("id"), get("image"), turns[:-1], _answer(turns), _answer(get("rejected_conversations"))
        case "rlhf-v" | "rlaif-v":
            pair = get("text") or raw
            pair = json.loads(pair) if isinstance(pair, str) else pair
            return None, get("image") or get("image_path"), pair["question"], pair["chosen"], pair.get("rejected")
        case "vlfeedback":
            rated = _rated(raw)
            return get("id"), raw["img_path"], raw["prompt"], rated[-1][1], rated[0][1]
        case "llava-rlhf":
            turns, answers = raw["conversations"], [_answer([raw["output_1"]]), _answer([raw["output_2"]])]
            turns = turns[:-1] if _text(turns[-1])[0] == "assistant" else turns
            better = {1: 0, 2: 1}[raw["preference"]]
            return None, get("image"), turns, answers[better], answers[1 - better]
        case "ha-dpo":
            name = genome.get(int(raw["image_id"]), f"VG_100K/{raw['image_id']}.jpg")
            chosen, rejected, rng = raw["chosen"], get("reject", get("rejected")), draw("ha-dpo", raw["image_id"])
            if isinstance(chosen, str):
                return None, name, raw["question"], chosen, rejected
            return None, name, DESCRIBE[rng.integers(4)], chosen[rng.integers(len(chosen))], rejected[rng.integers(len(rejected))]
        case "trl":
            turns = get("prompt") or raw["chosen"][:-1]         # TRL allows the prompt inside the answers
            return get("id"), get("images", get("image")), turns, _answer(raw["chosen"]), _answer(get("rejected"))


@functools.lru_cache(maxsize=2)
def _row_group(path, group):
    import pyarrow.parquet                                      # no threads: this may be a forked worker
    return pyarrow.parquet.ParquetFile(path, memory_map=True).read_row_group(group, use_threads=False)


class Records:
    """A file's records, normalised when asked for; only their places in the file are in memory."""

    def __init__(self, path, image_root=None):
        self.path, self.dropped, self.genome = str(path), {}, {}
        self.root = os.path.realpath(image_root or os.path.dirname(os.path.abspath(path)))
        try:
            self._index()
            if not len(self.starts):
                raise UserError(f"{path} holds no records; give JSON lines, a JSON array of objects, or parquet")
            self.keep = np.arange(len(self.starts))
            self.format = self._recognise()
            if self.format in ("ha-dpo", "vlfeedback"):
                self._select()
        except OSError as error:
            raise UserError(f"{path} could not be read ({error.strerror}); give an existing .jsonl, .json or .parquet file") from error

    def _index(self):
        with open(self.path, "rb") as file:
            head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
        self.gap = None                                         # what stands between two records, but for white space
        if head.startswith(b"PAR1"):
            try:
                import pyarrow.parquet
            except ImportError as error:
                raise UserError(f"{self.path} is parquet; pip install pyarrow, or convert it to JSON lines") from error
            meta = pyarrow.parquet.ParquetFile(self.path).metadata
            self.groups = np.cumsum([0] + [meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
            self.starts, self.ends, self.lines = np.arange(meta.num_rows), None, None
        elif head.startswith(b"[") or re.match(rb'\{\s*"\d+"\s*:\s*\{', head):  # the second: descriptions of HA-DPO
            self.gap = rb"[\[,]" if head.startswith(b"[") else rb'[{,]\s*"(\d+)"\s*:'
            self.starts, self.ends, self.lines = index_array(self.path)
        else:
            self.starts, self.ends, self.lines = index_lines(self.path)

    def _recognise(self):
        broken = None
        for i in range(min(100, len(self))):
            try:
                keys = self._raw(i).keys()
            except UserError as error:                          # one broken record must not hide the faults of others
                broken = broken or error
                continue
            for name, wanted in FORMATS.items():
                if keys >= set(wanted):
                    return name
            known = "; ".join(f"{name} ({', '.join(wanted)}, ...)" for name, wanted in FORMATS.items())
            raise UserError(f"{self.place(i)}: no format has the keys {', '.join(sorted(keys))}; rename them to one of {known}")
        raise broken

    def _select(self):
        """Leave out what the papers leave out."""
        if os.path.exists(meta := os.path.join(self.root, "image_data.json")):
            with open(meta, "rb") as file:
                self.genome = {row["image_id"]: "/".join(row["url"].split("/")[-2:]) for row in json.load(file)}
        ids, reasons = [], []
        for raw in map(self._raw, range(len(self))):
            ids.append(str(raw.get("id")))
            tied = self.format == "vlfeedback" and len({mark for mark, _ in _rated(raw)}) < 2
            reasons.append("answered correctly" if raw.get("correct") is True else "no best and worst rating" if tied else None)
        if any(name.startswith("llava-") for name in ids):
            reasons = [why if name.startswith("llava-") else "not of LLaVA-Instruct" for why, name in zip(reasons, ids, strict=True)]
        left = sorted((i for i, why in enumerate(reasons) if not why), key=lambda i: hash64("sample", ids[i]))
        for i in left[SAMPLE:] if self.format == "vlfeedback" else []:
            reasons[i] = f"beyond a sample of {SAMPLE}"
        self.dropped = dict(Counter(filter(None, reasons)))
        self.keep = np.flatnonzero([not why for why in reasons])
        if not len(self.keep):
            raise UserError(f"{self.path}: no record is left ({self.dropped}); give the whole published file")

    def __len__(self):
        return len(self.keep)

    def place(self, i, line=1):
        k = int(self.keep[i])
        return f"{self.path}, record {k + 1}" if self.lines is None else f"{self.path}, line {self.lines[k] + line - 1}"

    def where(self, i):
        """FILE, line N (id X): for messages."""
        try:
            return f"{self.place(i)} (id {self._id(self._raw(i), i)})"
        except UserError:
            return self.place(i)

    def _id(self, raw, i):
        own = None if self.format in ("llava-rlhf", "ha-dpo", "rlhf-v", "rlaif-v") else raw.get("id")
        return f"{Path(self.path).stem}:{self.keep[i]}" if own is None else str(own)

    def _raw(self, i):
        k = int(self.keep[i])                                   # its IndexError ends a loop over the records
        if self.lines is None:
            group = int(np.searchsorted(self.groups, k, "right")) - 1
            return _row_group(self.path, group).slice(k - self.groups[group], 1).to_pylist()[0]
        begin = self.starts[k] if self.gap is None else self.ends[k - 1] if k else 0
        with open(self.path, "rb") as file:
            file.seek(begin)
            text = file.read(self.ends[k] - begin)
        gap, text = text[:self.starts[k] - begin].removeprefix(b"\xef\xbb\xbf").strip(), text[self.starts[k] - begin:]
        key = re.fullmatch(self.gap or b"", gap)
        if not key:
            raise UserError(f"{self.place(i)}: broken JSON (no comma before the record); mend the file")
        raw = _parse(text.removeprefix(b"\xef\xbb\xbf"), lambda line: self.place(i, line))
        return {"image_id": key[1].decode(), **raw} if key.groups() else raw

    def _image(self, image):
        if isinstance(image, dict):                             # as Hugging Face's datasets hold images
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            return image
        if not isinstance(image, str):
            raise UserError(f"the image is {type(image).__name__}, not a path; mend the record")
        path = os.path.realpath(os.path.join(self.root, image))         # through links, which may not lead out either
        if os.path.commonpath([path, self.root]) != self.root:
            raise UserError(f"image {image} leaves the image root {self.root}; move it inside, or give --image_root")
        return path

    def _images(self, value):
        return [self._image(image) for image in (value if isinstance(value, list) else [] if value is None else [value])]

    def __getitem__(self, i):
        raw = self._raw(i)
        try:
            _, images, turns, chosen, rejected = _fields(self.format, raw, self.genome)
            history, question = _dialogue(turns)
            if not isinstance(chosen, str) or not isinstance(rejected, str | None):
                raise UserError("chosen or rejected is not text; mend the record")
            other = raw.get("image_rejected")
            return {"id": self._id(raw, i), "images": self._images(images), "images_rejected": other and self._images(other),
                    "question": question, "history": history, "chosen": chosen, "rejected": rejected,
                    "meta": (raw.get("meta") or {}) | {k: raw[k] for k in ("id", "idx", "image_id") if k in raw}}
        except KeyError as error:
            problem = f"key {error} is missing; add it"
        except UserError as error:
            problem = error
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            problem = f"not laid out as {self.format} is ({error}); mend the record"
        raise UserError(f"{self.where(i)}: {problem}")


# ---- the full check ----

def _stat(path):
    with contextlib.suppress(OSError):
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]


def _begin(*what):
    global _checked                       # handed to each worker once, not with every job
    _checked = what


def _check_some(indices):
    """Of some records, in a worker: faults [(index, kind, sentence)], hashes of ids, {image: its size and time}."""
    records, needs_rejected, needs_image = _checked
    faults, hashes, images, broken = [], [], {}, {}
    for i in indices:
        try:
            record = records[i]
        except UserError as error:
            faults.append((i, "unreadable record", str(error)))
            hashes.append(hash64("unreadable", i))
            continue
        hashes.append(hash64(record["id"]))
        answers = {name: record[name] for name in ("chosen", "rejected")[:1 + needs_rejected]}
        wrong = [("missing key", f"key '{name}' is missing; add it") for name, text in answers.items() if text is None]
        wrong += [("empty response", f"the {name} response is empty; write one or delete the record")
                  for name, text in answers.items() if text is not None and not text.strip()]
        if not wrong and needs_rejected and record["chosen"].strip() == record["rejected"].strip():
            wrong.append(("identical responses", "chosen and rejected are identical; mend or delete the record"))
        if needs_image and not record["images"]:
            wrong.append(("no image", "there is no image, and this loss needs one; add it or delete the record"))
        for image in record["images"] + (record["images_rejected"] or []):
            if image not in images:
                images[image], broken[image] = isinstance(image, str) and _stat(image), None
                try:
                    read_image(image)
                except UserError as error:
                    broken[image] = str(error)
            if broken[image]:
                short = broken[image] if isinstance(image, bytes) else broken[image].replace(image, os.path.relpath(image, records.root))
                wrong.append(("missing or unreadable image", short))
        faults += [(i, kind, f"{records.where(i)}: {sentence}") for kind, sentence in wrong]
    return faults, hashes, {image: stat for image, stat in images.items() if isinstance(image, str)}


def _full_check(records, needs, workers, progress, memory):
    n, faults, hashes = len(records), [], []
    jobs = [range(start, min(start + 256, n)) for start in range(0, n, 256)]
    workers = min(os.cpu_count() or 1 if workers is None else workers, len(jobs))
    with contextlib.ExitStack() as stack:
        run = map
        if workers > 1:
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
            run = stack.enter_context(ProcessPoolExecutor(workers, context, _begin, (records, *needs))).map
        _begin(records, *needs)
        for found, some, images in tqdm(run(_check_some, jobs), "checking records", len(jobs), disable=not progress or n < 1000):
            faults += found
            hashes += some
            memory.writelines(json.dumps(entry) + "\n" for entry in images.items())
    hashes = np.array(hashes, np.uint64)
    order = np.argsort(hashes, kind="stable")
    for k in np.flatnonzero(hashes[order][1:] == hashes[order][:-1]):
        first, again = (int(i) for i in order[k:k + 2])
        faults.append((again, "duplicate id", f"{records.where(again)}: the id is also that of {records.place(first)}; rename one"))
    return sorted(faults)


def check(records, needs_rejected=True, needs_image=False, workers=None, skip_bad=False, cache_dir=None, progress=True):
    """The indices of the good records. Faults go to stderr, one a line; without skip_bad they end the run.

    Every image is decoded once; the outcome is remembered until the data file or an image changes its size or time."""
    stamp = [records.root, len(records), *_stat(records.path), needs_rejected, needs_image]
    cache = Path(cache_dir or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/nanovpo").expanduser()
    memory, faults = cache / f"check-{hash64(os.path.abspath(records.path), *stamp):016x}.jsonl", None
    with contextlib.suppress(OSError, ValueError), open(memory, encoding="utf-8") as file:
        for entry in map(json.loads, file):
            if isinstance(entry, dict):                         # the last line of a check that came to its end
                faults = entry["faults"]
            elif _stat(entry[0]) != entry[1]:
                break
    if faults is None:
        with contextlib.ExitStack() as stack:
            try:
                cache.mkdir(parents=True, exist_ok=True)
                notes = stack.enter_context(open(memory, "w", encoding="utf-8"))
            except OSError:                                     # a read-only home: check, and remember nothing
                notes = stack.enter_context(io.StringIO())
            faults = _full_check(records, (needs_rejected, needs_image), workers, progress, notes)
            notes.write(json.dumps({"faults": faults}) + "\n")
    for _, _, sentence in faults:
        print(sentence, file=sys.stderr)
    bad = {i for i, _, _ in faults}
    if bad and not skip_bad:
        raise UserError(f"{len(bad)} of the {len(records)} records of {records.path} are faulty (listed above); mend them "
                        "or pass --skip_bad")
    if len(bad) == len(records):
        raise UserError(f"no record of {records.path} is usable (faults listed above); give other data or the right --image_root")
    if bad:
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(kind for _, kind, _ in faults).items())
        print(f"--skip_bad: {len(bad)} of {len(records)} records of {records.path} left out ({kinds})", file=sys.stderr)
    return [i for i in range(len(records)) if i not in bad]


# ---- rejected images: one draw, keyed by what it is for, never by the order of calls ----

def hash64(*key):
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, key)).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def draw(*key):
    """A random generator of its own for each key."""
    return np.random.default_rng(hash64(*key))


def other_index(seed, id, i, n, attempt=0):
    """The index of another record than i; a further attempt where that one has the same image."""
    if n < 2:
        raise UserError("a random rejected image needs at least two records; add records or choose --image_rejected crop")
    return (i + 1 + int(draw(seed, "other", id, attempt).integers(n - 1))) % n


def _crop(image, rng, area):
    """torchvision's RandomResizedCrop: a share of the area, aspect 3/4 to 4/3, resized back to the image's size."""
    width, height = image.size
    for _ in range(10):
        target, aspect = width * height * rng.uniform(*area), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w, h = (width, round(target / width)) if w > width else (round(target / height), height)
        w, h = min(max(w, 1), width), min(max(h, 1), height)
        x, y = (width - w) // 2, (height - h) // 2
    return image.crop((x, y, x + w, y + h)).resize(image.size, Image.Resampling.BILINEAR)


def _moco(image, rng):
    """The augmentation of MoCo v2 (arXiv 2003.04297, main_moco.py --aug-plus); the blur's sigma is meant for 224 pixels."""
    image = _crop(image, rng, (0.2, 1.0))
    for kind in rng.permutation(4) if rng.random() < 0.8 else ():
        if kind < 3:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind]
            image = enhance(image).enhance(rng.uniform(0.6, 1.4))
        else:
            shift = int(rng.uniform(-0.1, 0.1) * 255)
            hue, *rest = image.convert("HSV").split()
            image = Image.merge("HSV", (hue.point(lambda value: (value + shift) % 256), *rest)).convert("RGB")
    if rng.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0) * min(image.size) / 224))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


CLIP_MEAN, CLIP_STD = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])


def _noise(image, rng, step=500):
    """q(x_t | x_0) of VCD (arXiv 2311.16922, vcd_add_noise.py): sigmoid betas over 1000 steps, on CLIP's normalised pixels."""
    kept = np.cumprod(1 - (1e-5 + (0.5e-2 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, 1000)))))[step]
    size, scale = image.size, min(1.0, 336 / min(image.size))
    image = image.resize([max(1, round(side * scale)) for side in size], Image.Resampling.BICUBIC)
    pixels = (np.asarray(image) / 255 - CLIP_MEAN) / CLIP_STD
    pixels = np.sqrt(kept) * pixels + np.sqrt(1 - kept) * rng.standard_normal(pixels.shape)
    pixels = ((pixels * CLIP_STD + CLIP_MEAN) * 255).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


AREAS = {"crop": (0.01, 0.2), "crop20-50": (0.2, 0.5), "crop80-100": (0.8, 1.0)}       # the share that is kept
REJECTED = (*AREAS, "random", "moco", "blank", "noise")


def rejected_image(strategy, image, seed, id, other=None, epoch=None):
    """The rejected image of a pair: the same for the same seed, strategy and id (and epoch, where it is drawn anew)."""
    rng = draw(seed, strategy, id, epoch)
    if strategy in AREAS:
        return _crop(image, rng, AREAS[strategy])
    match strategy:
        case "random":
            return other
        case "moco":
            return _moco(image, rng)
        case "blank":
            return Image.new("RGB", image.size, tuple((CLIP_MEAN * 255).round().astype(int).tolist()))     # 0 once normalised
        case "noise":
            return _noise(image, rng)
    raise UserError(f"--image_rejected {strategy} is not one of {', '.join(REJECTED)}; choose one of them")


# ---- token ids ----

class Pair(NamedTuple):
    """One pair in token ids: image runs are expanded, responses end with the end-of-sequence token."""
    id: str
    prompt: list
    prompt_rejected: list
    chosen: list
    rejected: list


def truncate(pair, max_length):
    """Shorten the responses, never the prompts, to max_length tokens a row -> (pair, how many tokens were cut)."""
    room = max_length - max(len(pair.prompt), len(pair.prompt_rejected))
    if room < 1:
        raise UserError(f"the prompt of {pair.id} has {max_length - room} tokens, which leaves no room for an answer in "
                        f"max_length {max_length}; raise it or drop the record")
    cut = pair._replace(chosen=pair.chosen[:room], rejected=pair.rejected[:room])
    return cut, len(pair.chosen) + len(pair.rejected) - len(cut.chosen) - len(cut.rejected)


class Row(NamedTuple):
    """A micro-batch packed into one row of T tokens for vlm.packed."""
    ids: torch.Tensor                               # (T,)
    positions: torch.Tensor                         # (T,) restarting in each segment, and for `rejected` after its prompt
    segments: list[tuple[int, int, int, int]]       # (start, prompt, chosen, rejected): lengths in tokens
    predict: torch.Tensor                           # (N,) the place whose hidden state predicts response token n
    target: torch.Tensor                            # (N,) that token
    lengths: list[int]                              # of the responses in `predict`: all chosen, all rejected, all image_rejected


def pack(pairs, needs):
    """Pairs -> Row: `[prompt | chosen | rejected]` each, then `[prompt_rejected | chosen]` each where it is needed.

    needs: the fields of losses.Logps that the loss reads; `rejected` and `image_rejected` are left out where it does not.
    """
    segments = [(p.prompt, p.chosen, p.rejected if "rejected" in needs else []) for p in pairs]
    if "image_rejected" in needs:
        segments += [(p.prompt_rejected, p.chosen, []) for p in pairs]
    ids, positions, shapes, first, second = [], [], [], [], []
    for prompt, chosen, rejected in segments:
        start, fork = len(ids), len(ids) + len(prompt)
        middle = fork + len(chosen)
        ids += prompt + chosen + rejected
        positions += [*range(len(prompt) + len(chosen)), *range(len(prompt), len(prompt) + len(rejected))]
        shapes.append((start, len(prompt), len(chosen), len(rejected)))
        first.append(([fork - 1, *range(fork, middle - 1)], chosen))       # the prompt's end predicts both first tokens
        second.append(([fork - 1, *range(middle, middle + len(rejected) - 1)], rejected))
    order = first[:len(pairs)] + (second[:len(pairs)] if "rejected" in needs else []) + first[len(pairs):]
    return Row(torch.tensor(ids), torch.tensor(positions), shapes, torch.tensor([i for at, _ in order for i in at]),
               torch.tensor([t for _, response in order for t in response]), [len(response) for _, response in order])
