"""Preference pairs in every public format, and their check.

    records = Records("pairs.jsonl")    # indexes the file; a record is parsed when it is asked for
    good = check(records)               # every record and image, once; the faults on stderr, one a line
    pair = records[good[0]]             # id images images_rejected question history chosen rejected meta

Formats, told by their keys, in JSON lines, a JSON array or parquet, and where each is published:
    native      question chosen rejected image (history meta image_rejected)     this project's own
    mdpo        img_path prompt chosen rejected                                  luka-group/mDPO
    llava       conversations rejected_conversations image                       PDS-DPO; YiyangZhou/POVID
    rlhf-v      text (object or string of: question chosen rejected) image       openbmb/RLHF-V-Dataset
    rlaif-v     question chosen rejected ds_name image (path or {bytes path})    openbmb/RLAIF-V-Dataset
    vlfeedback  prompt img_path completions (of: annotations response)           MMInstruction/VLFeedback
    llava-rlhf  conversations output_1 output_2 preference image               zhiqings/LLaVA-Human-Preference
    ha-dpo      image_id question chosen reject | {image_id: chosen rejected}    opendatalab/HA-DPO
    trl         prompt chosen rejected images (messages or text)                 TRL's "Dataset formats"
Ours, where a format leaves a choice:
 1. vlfeedback: only ids `llava-...` (LLaVA-Instruct, as in mDPO) where there are any; best against worst mean
    rating; of more than 10,000 pairs a sample by a hash of the id. `Records.dropped` counts what is left out.
 2. ha-dpo: images lie where Visual Genome's image_data.json in the image root says, else at VG_100K/ID.jpg;
    `correct` answers are left out (official); a description's texts are one seeded draw per image.
 3. llava-rlhf, ha-dpo, rlhf-v, rlaif-v repeat ids or have none: the id is FILE:index, theirs is in `meta`."""
import contextlib
import functools
import io
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import UserError, atomic_write, draw, hash64, index_array, index_lines, parse, read_image

# ---- the formats ----

def _text(turn):
    """(role, text) of a turn in LLaVA's or OpenAI's layout."""
    role, content = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return {"human": "user", "gpt": "assistant", "llava": "assistant"}.get(role, role), content


def _answer(turns):
    return turns if isinstance(turns, str | None) else _text(turns[-1])[1]


def _dialogue(turns):
    """(history, question) of a question or of turns; a system message leads the first question."""
    turns = [("user", turns)] if isinstance(turns, str) else [_text(turn) for turn in turns]
    system = [text for role, text in turns if role == "system"]
    turns = [(role, text.replace("<image>", "").strip()) for role, text in turns if role != "system"]
    if [role for role, _ in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise UserError("the turns are not user, assistant, user, ..., assistant; mend the conversation")
    texts = ["\n\n".join([*system, turns[0][1]]), *(text for _, text in turns[1:])]
    return [texts[k:k + 2] for k in range(0, len(texts) - 1, 2)], texts[-1]


def _rated(raw):
    """(mean rating, answer) of the completions, worst first; "N/A" or null counts as not rated."""
    answers, rated = raw.get("completions") or [], []
    if isinstance(answers, dict):                       # parquet: an object of lists for a list of objects
        answers = [dict(zip(answers, row, strict=False)) for row in zip(*answers.values(), strict=False)]
    for answer in answers:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
            marks = [float(mark["Rating"]) for mark in answer["annotations"].values()]
            rated.append((sum(marks) / len(marks), answer["response"]))
    return sorted(rated, key=lambda mark: mark[0])


FORMATS = {  # the keys that tell, in this order
    "vlfeedback": {"prompt", "completions"}, "llava-rlhf": {"output_1", "output_2"},
    "mdpo": {"img_path", "prompt"}, "llava": {"conversations"}, "ha-dpo": {"image_id", "chosen"},
    "rlhf-v": {"text", "image"}, "rlaif-v": {"question", "ds_name"}, "native": {"question"},
    "trl": {"prompt", "chosen"}}
DESCRIBE = ("Describe this image in detail.", "Take a look at this image and describe what you notice.",
            "Please provide a detailed description of the picture.",
            "Could you describe the contents of this image for me?")
SAMPLE = 10_000


def _fields(kind, raw, genome):
    """(image or images, question or turns, chosen, rejected) under each format's names."""
    get, image, chosen, rejected = raw.get, raw.get("image"), raw.get("chosen"), raw.get("rejected")
    match kind:
        case "native":
            turns = [{"role": role, "content": text} for pair in get("history") or []
                     for role, text in zip(("user", "assistant"), pair, strict=True)]
            return image, [*turns, {"role": "user", "content": raw["question"]}], raw["chosen"], rejected
        case "mdpo":
            inner = re.search(r"USER:(.*)ASSISTANT:", raw["prompt"], re.DOTALL)
            return raw["img_path"], inner[1] if inner else raw["prompt"], raw["chosen"], rejected
        case "llava":
            turns = raw["conversations"]
            return image, turns[:-1], _answer(turns), _answer(get("rejected_conversations"))
        case "rlhf-v" | "rlaif-v":
            pair = json.loads(raw["text"]) if isinstance(get("text"), str) else get("text") or raw
            return image or get("image_path"), pair["question"], pair["chosen"], pair.get("rejected")
        case "vlfeedback":
            rated = _rated(raw)
            return raw["img_path"], raw["prompt"], rated[-1][1], rated[0][1]
        case "llava-rlhf":
            turns, answers = raw["conversations"], [raw["output_1"]["value"], raw["output_2"]["value"]]
            turns = turns[:-1] if _text(turns[-1])[0] == "assistant" else turns
            better = {1: 0, 2: 1}[raw["preference"]]
            return image, turns, answers[better], answers[1 - better]
        case "ha-dpo":
            image = genome.get(int(raw["image_id"]), f"VG_100K/{raw['image_id']}.jpg")
            if isinstance(chosen, str):
                return image, raw["question"], chosen, get("reject", rejected)
            rng = draw("ha-dpo", raw["image_id"])
            return image, rng.choice(DESCRIBE).item(), rng.choice(chosen).item(), rng.choice(rejected).item()
        case "trl":
            return get("images", image), raw["prompt"], _answer(raw["chosen"]), _answer(rejected)


@functools.lru_cache(maxsize=2)
def _parquet(path, group=None):
    try:
        import pyarrow.parquet as pq
        file = pq.ParquetFile(path, memory_map=True)    # without threads: this may be a forked worker
        return file.metadata if group is None else file.read_row_group(group, use_threads=False)
    except ImportError as error:
        raise UserError(f"{path} is parquet: pip install pyarrow, or convert it to JSON lines") from error
    except ValueError as error:                         # pyarrow's ArrowInvalid
        raise UserError(f"{path} is no readable parquet ({error}); fetch it again") from error


class Records:
    """A file's records, normalised when asked for; only their places in the file are in memory."""

    def __init__(self, path, image_root=None):
        self.path, self.dropped, self.genome, self.gap = str(path), {}, {}, None
        self.root = os.path.realpath(image_root or os.path.dirname(os.path.abspath(path)))
        try:
            with open(path, "rb") as file:
                head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
            if head.startswith(b"PAR1"):
                meta = _parquet(self.path)
                sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
                self.groups = np.cumsum([0, *sizes])
                self.starts, self.lines = np.arange(meta.num_rows), None
            elif head.startswith(b"[") or re.match(rb'\{\s*"\d+"\s*:\s*\{', head):      # the latter: HA-DPO
                self.gap = rb"[\[,]" if head.startswith(b"[") else rb'[{,]\s*"(\d+)"\s*:'    # before a record
                self.starts, self.ends, self.lines = index_array(path)
            else:
                self.starts, self.ends, self.lines = index_lines(path)
        except OSError as error:
            raise UserError(f"{path} could not be read ({error.strerror}); "
                            "give a .jsonl, .json or .parquet file") from error
        self.keep = np.arange(len(self.starts))
        if not len(self):
            raise UserError(f"{path} holds no records; give JSON lines, a JSON array of objects, or parquet")
        self.format = self._recognise()
        if self.format in ("ha-dpo", "vlfeedback"):
            self._select()

    def _recognise(self):
        for i in range(len(self)):                      # one broken record must not hide what the others are
            with contextlib.suppress(UserError):
                keys = self._raw(i).keys()
                break
        else:
            self._raw(0)
        for name, wanted in FORMATS.items():
            if keys >= wanted:
                return name
        known = "; ".join(f"{name} ({', '.join(sorted(wanted))}, ...)" for name, wanted in FORMATS.items())
        raise UserError(f"{self.place(i)}: no known format has the keys {', '.join(sorted(keys))}; rename "
                        f"them to those of one of these: {known}")

    def _select(self):
        """Leave out what the papers leave out."""
        meta = os.path.join(self.root, "image_data.json")
        try:
            with contextlib.suppress(FileNotFoundError), open(meta, "rb") as file:
                rows = json.load(file)
                self.genome = {row["image_id"]: "/".join(row["url"].split("/")[-2:]) for row in rows}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{meta} is not Visual Genome's ({error!r}); fetch it again") from error
        ids, reasons = [], []
        for raw in map(self._raw, range(len(self))):
            ids.append(str(raw.get("id")))
            tied = self.format == "vlfeedback" and len({mark for mark, _ in _rated(raw)}) < 2
            correct = self.format == "ha-dpo" and raw.get("correct")
            reasons.append("tied or no ratings" if tied else "answered correctly" if correct else "")
        if any(name.startswith("llava-") for name in ids):
            for i, name in enumerate(ids):
                reasons[i] = reasons[i] if name.startswith("llava-") else "not of LLaVA-Instruct"
        left = sorted((i for i, why in enumerate(reasons) if not why), key=lambda i: hash64("sample", ids[i]))
        for i in left[SAMPLE:] if self.format == "vlfeedback" else []:
            reasons[i] = f"beyond a sample of {SAMPLE}"
        self.dropped = dict(Counter(filter(None, reasons)))
        self.keep = np.flatnonzero([not why for why in reasons])
        if not len(self):
            raise UserError(f"{self.path}: no record is left ({self.dropped}); give the whole published file")

    def __len__(self):
        return len(self.keep)

    def place(self, i, line=1):
        k = int(self.keep[i])
        number = f"record {k + 1}" if self.lines is None else f"line {self.lines[k] + line - 1}"
        return f"{self.path}, {number}"

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
        k = int(self.keep[i])                           # its IndexError ends a loop over the records
        if self.lines is None:
            group = int(np.searchsorted(self.groups, k, "right")) - 1
            return _parquet(self.path, group).slice(k - self.groups[group], 1).to_pylist()[0]
        begin = self.starts[k] if self.gap is None else self.ends[k - 1] if k else 0
        with open(self.path, "rb") as file:
            file.seek(begin)
            text = file.read(self.ends[k] - begin)
        gap, text = (part.removeprefix(b"\xef\xbb\xbf").strip()
                     for part in (text[:self.starts[k] - begin], text[self.starts[k] - begin:]))
        key = re.fullmatch(self.gap or b"", gap)
        if not key:
            raise UserError(f"{self.place(i)}: broken JSON (no comma before the record); mend the file")
        raw = parse(text, lambda line: self.place(i, line))
        return {"image_id": key[1].decode(), **raw} if key.groups() else raw

    def _image(self, image):
        if isinstance(image, dict):                     # as Hugging Face's datasets hold images
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            return image
        if not isinstance(image, str):
            raise UserError(f"the image is {type(image).__name__}, not a path; mend the record")
        path = os.path.realpath(os.path.join(self.root, image))    # through links, which may not lead out
        if os.path.commonpath([path, self.root]) != self.root:
            raise UserError(f"image {image} leaves the image root {self.root}; give another --image_root")
        return path

    def _images(self, value):
        values = value if isinstance(value, list) else [value]
        return [self._image(image) for image in values if image is not None]

    def __getitem__(self, i):
        raw = self._raw(i)
        try:
            images, turns, chosen, rejected = _fields(self.format, raw, self.genome)
            history, question = _dialogue(turns)
            if not isinstance(chosen, str) or not isinstance(rejected, str | None):
                raise UserError("chosen or rejected is not text; mend the record")
            own = {key: raw[key] for key in ("id", "idx", "image_id") if key in raw}
            return {"id": self._id(raw, i), "images": self._images(images),
                    "images_rejected": self._images(raw.get("image_rejected")) or None, "question": question,
                    "history": history, "chosen": chosen, "rejected": rejected,
                    "meta": own | (raw.get("meta") or {})}
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


def _image_fault(image, root):
    try:
        read_image(image)
    except UserError as error:
        shown = str(error)
        return shown if isinstance(image, bytes) else shown.replace(image, os.path.relpath(image, root))


def _response_faults(record, needs_rejected):
    wrong = []
    for name in ("chosen", "rejected")[:1 + needs_rejected]:
        if record[name] is None:
            wrong.append(("missing key", f"key '{name}' is missing; add it"))
        elif not record[name].strip():
            wrong.append(("empty response", f"the {name} response is empty; write or delete it"))
    if not wrong and needs_rejected and record["chosen"].strip() == record["rejected"].strip():
        wrong.append(("identical responses", "chosen and rejected are identical; mend or delete it"))
    return wrong


def _begin(*what):
    global _checked                                     # given to each worker once, not with every job
    _checked = what


def _check_some(indices):
    """Of some records: faults [(index, kind, sentence)], hashes of the ids, {image: its size and time}."""
    records, needs_rejected, needs_image = _checked
    faults, hashes, stats, broken = [], [], {}, {}
    for i in indices:
        try:
            record = records[i]
        except UserError as error:
            faults.append((i, "unreadable record", str(error)))
            hashes.append(hash64("unreadable", i))
            continue
        hashes.append(hash64(record["id"]))
        wrong = _response_faults(record, needs_rejected)
        if needs_image and not record["images"]:
            wrong.append(("missing image", "there is no image and this loss needs one; add it or choose dpo"))
        if len(record["images_rejected"] or record["images"]) != len(record["images"]):
            wrong.append(("rejected images", "image and image_rejected differ in number; give as many"))
        for image in record["images"] + (record["images_rejected"] or []):
            if image not in broken:
                if isinstance(image, str):
                    stats[image] = _stat(image)
                broken[image] = _image_fault(image, records.root)
            if broken[image]:
                wrong.append(("missing or unreadable image", broken[image]))
        faults += [(i, kind, f"{records.where(i)}: {sentence}") for kind, sentence in wrong]
    return faults, hashes, stats


def _full_check(records, needs, workers, progress, notes):
    n, faults, hashes = len(records), [], []
    jobs = [range(start, min(start + 128, n)) for start in range(0, n, 128)]
    workers = min(os.cpu_count() or 1, 16) if workers is None else workers
    with contextlib.ExitStack() as stack:
        run = map
        if min(workers, len(jobs)) > 1:
            context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
            run = stack.enter_context(ProcessPoolExecutor(workers, context, _begin, (records, *needs))).map
        _begin(records, *needs)
        for found, some, images in tqdm(run(_check_some, jobs), "checking records", len(jobs),
                                        disable=not progress or len(jobs) < 5):
            faults += found
            hashes += some
            notes.writelines(json.dumps(entry).encode() + b"\n" for entry in images.items())
    hashes = np.array(hashes, np.uint64)
    order = np.argsort(hashes, kind="stable")
    for k in np.flatnonzero(hashes[order][1:] == hashes[order][:-1]):
        first, again = (int(i) for i in order[k:k + 2])
        faults.append((again, "duplicate id", f"{records.where(again)}: the id is a duplicate of that at "
                                              f"{records.place(first)}; rename one"))
    return sorted(faults)


def check(records, needs_rejected=True, needs_image=False, workers=None, skip_bad=False, cache_dir=None,
          progress=True):
    """The indices of the good records; faults go to stderr, one a line, and end the run unless skip_bad.

    Every image is decoded once: the outcome is remembered until the data or an image changes size or time."""
    cache = Path(cache_dir or os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/nanovpo").expanduser()
    path = os.path.abspath(records.path)
    stamp = hash64(path, _stat(path), records.root, needs_rejected, needs_image)
    memory, faults = cache / f"check-{stamp:016x}.jsonl", None
    with contextlib.suppress(OSError, ValueError), open(memory, encoding="utf-8") as file:
        for entry in map(json.loads, file):             # [image, [size, time]] ... {"faults": ...}
            if isinstance(entry, dict):
                faults = entry["faults"]
            elif _stat(entry[0]) != entry[1]:
                break
    if faults is None:
        notes = io.BytesIO()
        try:
            faults = _full_check(records, (needs_rejected, needs_image), workers, progress, notes)
        except BrokenExecutor as error:
            raise UserError(f"{records.path}: a process that checked its records was killed, perhaps for "
                            "want of memory; free some and run the command again") from error
        notes.write(json.dumps({"faults": faults}).encode() + b"\n")
        with contextlib.suppress(OSError, UserError):   # a read-only home or a full disk: remember nothing
            cache.mkdir(parents=True, exist_ok=True)
            atomic_write(memory, notes.getbuffer())
    for _, _, sentence in faults:
        print(sentence, file=sys.stderr)
    bad = {i for i, _, _ in faults}
    if bad and not skip_bad:
        raise UserError(f"{len(bad)} of {len(records)} records of {records.path} are faulty (listed above); "
                        "mend them or pass --skip_bad")
    if len(bad) == len(records):
        raise UserError(f"{records.path} has no usable record (see above); mend it or give an --image_root")
    if bad:
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(kind for _, kind, _ in faults).items())
        print(f"--skip_bad left out {len(bad)} of {len(records)} records of {records.path} ({kinds})",
              file=sys.stderr)
    return [i for i in range(len(records)) if i not in bad]
