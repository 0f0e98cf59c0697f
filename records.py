"""Preference pairs in every public format, and their check.

    records = Records("pairs.jsonl")    # indexes the file; a record is parsed when it is asked for
    good = check(records)               # every record and image, once; the faults on stderr, one a line
    pair = records[good[0]]             # id images images_rejected question history chosen rejected meta

Formats, detected by their keys, in JSON lines, a JSON array or parquet, and where each is published:
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
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, repeat
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from data import UserError, draw, hash64, read_image


# ---- the formats: raw record -> (image or images, question or turns, chosen, rejected) ----
def native(raw):
    turns = []
    for user, assistant in raw.get("history") or []:
        turns += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    turns.append({"role": "user", "content": raw["question"]})
    return raw.get("image"), turns, raw["chosen"], raw.get("rejected")


def mdpo(raw):
    inner = re.search(r"USER:(.*)ASSISTANT:", raw["prompt"], re.DOTALL)
    question = inner[1] if inner else raw["prompt"]
    return raw["img_path"], question, raw["chosen"], raw.get("rejected")


def llava(raw):
    turns = raw["conversations"]
    return raw.get("image"), turns[:-1], _last(turns), _last(raw.get("rejected_conversations"))


def rlhf_v(raw):
    """RLHF-V's pair is in `text`, an object or the text of one; RLAIF-V's is in the record itself."""
    pair = raw.get("text") or raw
    if isinstance(pair, str):
        pair = json.loads(pair)
    return raw.get("image") or raw.get("image_path"), pair["question"], pair["chosen"], pair.get("rejected")


def vlfeedback(raw):
    _, texts = _rated(raw)
    return raw["img_path"], raw["prompt"], texts[-1], texts[0]


def llava_rlhf(raw):
    turns = raw["conversations"]
    role, _ = _turn(turns[-1])
    if role == "assistant":
        turns = turns[:-1]
    first, second = raw["output_1"]["value"], raw["output_2"]["value"]
    chosen, rejected = {1: (first, second), 2: (second, first)}[raw["preference"]]
    return raw.get("image"), turns, chosen, rejected


def ha_dpo(raw):
    """A question with its answers, or, without a question, several descriptions of an image."""
    image, chosen = f"VG_100K/{raw['image_id']}.jpg", raw["chosen"]
    if isinstance(chosen, str):
        return image, raw["question"], chosen, raw.get("reject", raw.get("rejected"))
    rng = draw("ha-dpo", raw["image_id"])
    question, chosen, rejected = (rng.choice(texts).item() for texts in (DESCRIBE, chosen, raw["rejected"]))
    return image, question, chosen, rejected


def trl(raw):
    image = raw.get("images", raw.get("image"))
    return image, raw["prompt"], _last(raw["chosen"]), _last(raw.get("rejected"))


FORMATS = {  # name: (the keys that it is detected by, in this order; its function)
    "vlfeedback": ({"prompt", "completions"}, vlfeedback),
    "llava-rlhf": ({"output_1", "output_2"}, llava_rlhf),
    "mdpo": ({"img_path", "prompt"}, mdpo),
    "llava": ({"conversations"}, llava),
    "ha-dpo": ({"image_id", "chosen"}, ha_dpo),
    "rlhf-v": ({"text", "image"}, rlhf_v),
    "rlaif-v": ({"question", "ds_name"}, rlhf_v),
    "native": ({"question"}, native),
    "trl": ({"prompt", "chosen"}, trl)}
SAMPLE = 10_000                                                 # pairs of VLFeedback at most
NO_IDS = ("llava-rlhf", "ha-dpo", "rlhf-v", "rlaif-v")          # or ids that repeat
DESCRIBE = ("Describe this image in detail.", "Take a look at this image and describe what you notice.",
            "Please provide a detailed description of the picture.",
            "Could you describe the contents of this image for me?")


# ---- what several formats share ----
def _turn(raw):
    """(role, text) of a turn in LLaVA's or OpenAI's layout."""
    role, text = (raw["from"], raw["value"]) if "from" in raw else (raw["role"], raw["content"])
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text)
    return {"human": "user", "gpt": "assistant", "llava": "assistant"}.get(role, role), text


def _last(turns):
    """The text of a response, which is its last turn, a text already, or None."""
    if isinstance(turns, list):
        _, turns = _turn(turns[-1])
    return turns


def _dialogue(turns):
    """(history, question) of a question or of turns; a system message leads the first question."""
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    turns = [_turn(turn) for turn in turns]
    system = [text for role, text in turns if role == "system"]
    roles = [role for role, _ in turns if role != "system"]
    texts = [text.replace("<image>", "").strip() for role, text in turns if role != "system"]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise UserError("the turns are not user, assistant, user, ..., assistant; fix the conversation")
    texts[0] = "\n\n".join([*system, texts[0]])
    return [texts[k:k + 2] for k in range(0, len(texts) - 1, 2)], texts[-1]


def _rated(raw):
    """(mean ratings, texts) of VLFeedback's completions, worst first; "N/A" or null counts as not rated."""
    answers, means, texts = raw.get("completions") or [], [], []
    if isinstance(answers, dict):                       # parquet: an object of lists for a list of objects
        answers = [dict(zip(answers, row, strict=False)) for row in zip(*answers.values(), strict=False)]
    for answer in answers:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError):
            marks = [float(mark["Rating"]) for mark in answer["annotations"].values()]
            mean, text = sum(marks) / len(marks), answer["response"]
            means.append(mean)
            texts.append(text)
    order = sorted(range(len(texts)), key=means.__getitem__)
    return [means[k] for k in order], [texts[k] for k in order]


# ---- what the papers leave out: all raw records -> the reason of each, "" where it stays ----
def _sampled(raws):
    """LLaVA-Instruct's part of VLFeedback, where there is any, without ties: at most SAMPLE records."""
    ids, reasons = [], []
    for raw in raws:
        means, _ = _rated(raw)
        ids.append(str(raw.get("id")))
        reasons.append("tied or no ratings" if len(set(means)) < 2 else "")
    instruct = {i for i, name in enumerate(ids) if name.startswith("llava-")}
    for i in range(len(ids)):
        if instruct and i not in instruct:
            reasons[i] = "not of LLaVA-Instruct"
    left = [i for i, reason in enumerate(reasons) if not reason]
    for i in sorted(left, key=lambda i: hash64("sample", ids[i]))[SAMPLE:]:
        reasons[i] = f"beyond a sample of {SAMPLE}"
    return reasons


LEAVE_OUT = {"vlfeedback": _sampled,
             "ha-dpo": lambda raws: ["answered correctly" if raw.get("correct") else "" for raw in raws]}


# ---- a file's raw records, by their number in it ----
class Lines:
    """JSON lines: only where they begin and end is in memory."""
    unit = "line"

    def __init__(self, path):
        self.path = path
        self.starts, self.ends, self.numbers = data.index_lines(path)

    def __len__(self):
        return len(self.starts)

    def place(self, k):
        return f"{self.path}, {self.unit} {self.numbers[k]}"

    def __getitem__(self, k):
        with open(self.path, "rb") as file:
            file.seek(self.starts[k])
            text = file.read(self.ends[k] - self.starts[k])
        return data.parse(text, lambda _: self.place(k))


class Array(Lines):
    """A JSON array, or one object {image id: record} (HA-DPO's), read whole."""
    def __init__(self, path):
        self.path, self.rows = path, data.read_json(path)
        if isinstance(self.rows, dict):
            self.rows = [{"image_id": name, **row} for name, row in self.rows.items()]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        if not isinstance(self.rows[k], dict):
            raise UserError(f"{self.place(k)}: {type(self.rows[k]).__name__} instead of a record {{...}}; "
                            "fix or delete it")
        return self.rows[k]

    @functools.cached_property
    def numbers(self):
        """The line in which each record begins: found when the first fault is to be named."""
        text, decode, end, line, found = Path(self.path).read_text("utf-8-sig"), json.JSONDecoder(), 0, 1, []
        before = re.compile(r'\s*[\[{,]\s*("[^"]*"\s*:\s*)?')        # a bracket or comma, and the image id
        for _ in self.rows:
            begin = before.match(text, end).end()
            line += text.count("\n", end, begin)
            found.append(line)
            _, end = decode.raw_decode(text, begin)
            line += text.count("\n", begin, end)
        return found


class Parquet(Lines):
    """Parquet: only a row group or two are in memory."""
    unit = "record"

    def __init__(self, path):
        self.path, about = path, _parquet(path)
        sizes = [about.row_group(g).num_rows for g in range(about.num_row_groups)]
        self.first = np.cumsum([0, *sizes])                         # record of each group
        self.starts, self.numbers = range(about.num_rows), range(1, about.num_rows + 1)

    def __getitem__(self, k):
        group = int(np.searchsorted(self.first, k, "right")) - 1
        return _parquet(self.path, group).slice(k - self.first[group], 1).to_pylist()[0]


@functools.lru_cache(maxsize=2)
def _parquet(path, group=None):
    """The metadata of a parquet file, or one of its row groups as a table."""
    try:
        import pyarrow.parquet as pq
        file = pq.ParquetFile(path, memory_map=True)
        return file.metadata if group is None else file.read_row_group(group)
    except ImportError as error:
        raise UserError(f"{path} is parquet: pip install pyarrow, or convert it to JSON lines") from error
    except ValueError as error:                         # pyarrow's ArrowInvalid
        raise UserError(f"{path} is no readable parquet ({error}); fetch it again") from error


def _opened(path):
    """A file's raw records, by what the file begins with."""
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
        if head.startswith(b"PAR1"):
            return Parquet(path)
        if re.match(rb'\[|\{\s*"\d+"\s*:\s*\{', head):
            return Array(path)
        return Lines(path)
    except OSError as error:
        raise UserError(f"{path} could not be read ({error.strerror}); "
                        "give a .jsonl, .json or .parquet file") from error


# ---- the records ----
class Records:
    """A file's records, normalised when asked for; `dropped` counts what the papers leave out."""

    def __init__(self, path, image_root=None):
        self.path, self.raw = str(path), _opened(str(path))
        self.root = os.path.realpath(image_root or os.path.dirname(os.path.abspath(path)))
        self.keep, self.dropped = np.arange(len(self.raw)), {}
        if not len(self):
            raise UserError(f"{path} holds no records; give JSON lines, a JSON array of objects, or parquet")
        self.format = self._detected()
        self.genome = _genome(self.root) if self.format == "ha-dpo" else {}
        if self.format in LEAVE_OUT:
            reasons = LEAVE_OUT[self.format](map(self.raw.__getitem__, range(len(self))))
            self.dropped = dict(Counter(filter(None, reasons)))
            self.keep = np.flatnonzero([not reason for reason in reasons])
        if not len(self):
            raise UserError(f"{path}: no record is left ({self.dropped}); give the whole published file")

    def _detected(self):
        """The name of the format, by the first record that can be read."""
        for i in range(len(self)):                      # one broken record must not hide what the others are
            with contextlib.suppress(UserError):
                keys = self.raw[i].keys()
                break
        else:
            self.raw[0]                                 # raises
        for name, (wanted, _) in FORMATS.items():
            if keys >= wanted:
                return name
        known = [f"{name} ({', '.join(sorted(wanted))}, ...)" for name, (wanted, _) in FORMATS.items()]
        raise UserError(f"{self.place(i)}: no known format has the keys {', '.join(sorted(keys))}; rename "
                        f"them to those of one of these: {'; '.join(known)}")

    def __len__(self):
        return len(self.keep)

    def place(self, i):
        """FILE, line N: for messages."""
        return self.raw.place(self.keep[i])

    def where(self, i):
        """FILE, line N (id X): for messages."""
        return f"{self.place(i)} (id {self._id(self.raw[self.keep[i]], i)})"

    def _id(self, raw, i):
        own = None if self.format in NO_IDS else raw.get("id")
        return f"{Path(self.path).stem}:{self.keep[i]}" if own is None else str(own)

    def __getitem__(self, i):
        raw = self.raw[self.keep[i]]                    # beyond the last: IndexError, which ends a loop
        try:
            return {"id": self._id(raw, i), **self._fields(raw)}
        except KeyError as error:
            problem = f"key {error} is missing; add it"
        except UserError as error:
            problem = error
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            problem = f"not laid out as {self.format} is ({error}); fix the record"
        raise UserError(f"{self.where(i)}: {problem}")

    def _fields(self, raw):
        _, read = FORMATS[self.format]
        image, turns, chosen, rejected = read(raw)
        history, question = _dialogue(turns)
        if not isinstance(chosen, str) or not isinstance(rejected, str | None):
            raise UserError("chosen or rejected is not text; fix the record")
        own = {key: raw[key] for key in ("id", "idx", "image_id") if key in raw}
        return {"images": self._images(image),
                "images_rejected": self._images(raw.get("image_rejected")) or None,
                "question": question, "history": history, "chosen": chosen, "rejected": rejected,
                "meta": own | (raw.get("meta") or {})}

    def _images(self, images):
        """Paths inside the image root, or bytes, of what a record has under an image's key."""
        if not isinstance(images, list):
            images = [images]
        return [self._image(image) for image in images if image is not None]

    def _image(self, image):
        if isinstance(image, dict):                     # as Hugging Face's datasets hold images
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            return image
        if not isinstance(image, str):
            raise UserError(f"the image is {type(image).__name__}, not a path; fix the record")
        fix = "move it inside or give another --image_root"
        return data.inside(self.root, self.genome.get(image, image), "image", fix)


def _genome(root):
    """{VG_100K/ID.jpg: where it is} by Visual Genome's image_data.json in the image root, if it is there."""
    path = os.path.join(root, "image_data.json")
    try:
        urls = {row["image_id"]: row["url"].split("/") for row in data.read_json(path, [])}
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not Visual Genome's ({error!r}); fetch it again") from error
    return {f"VG_100K/{name}.jpg": "/".join(url[-2:]) for name, url in urls.items()}


# ---- the full check ----
def check(records, needs_rejected=True, needs_image=False, skip_bad=False, cache_dir=None):
    """The indices of the good records; faults go to stderr, one a line, and end the run unless skip_bad.

    Every image is decoded once. cache_dir: a folder of the run; the outcome stays there, and holds until the
    data or an image changes size or time."""
    faults = _kept_check(records, (needs_rejected, needs_image), cache_dir)
    for _, _, text in faults:
        print(text, file=sys.stderr)
    bad = {i for i, _, _ in faults}
    if bad and not skip_bad:
        raise UserError(f"{len(bad)} of {len(records)} records of {records.path} are faulty (listed above); "
                        "fix them or pass --skip_bad")
    if len(bad) == len(records):
        raise UserError(f"{records.path} has no usable record (see above); fix it or give an --image_root")
    if bad:
        kinds = Counter(kind for _, kind, _ in faults).items()
        print(f"--skip_bad left out {len(bad)} of {len(records)} records of {records.path} "
              f"({', '.join(f'{n} {kind}' for kind, n in kinds)})", file=sys.stderr)
    return [i for i in range(len(records)) if i not in bad]


def _kept_check(records, needs, folder):
    """_full_check's faults, or those that an earlier check has left in `folder`."""
    path = os.path.abspath(records.path)
    kept = Path(folder or "") / f"check-{hash64(path, _stat(path), records.root, *needs):016x}.json"
    if folder and kept.exists():
        with contextlib.suppress(UserError):            # torn
            found = data.read_json(kept)
            if all(_stat(image) == stat for image, stat in found["images"].items()):
                return found["faults"]
    faults, images = _full_check(records, needs)
    if folder:
        with contextlib.suppress(OSError, UserError):   # a full disk, or a folder to read only: nothing stays
            kept.parent.mkdir(parents=True, exist_ok=True)
            data.atomic_write(kept, json.dumps({"images": images, "faults": faults}))
    return faults


def _stat(path):
    with contextlib.suppress(OSError):
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]


def _full_check(records, needs, size=128):
    """([(index, kind, sentence)], {an image's path: its size and time}). Threads decode the images."""
    faults, first, broken, stats = [], {}, {}, {}
    starts = range(0, len(records), size)
    with ThreadPoolExecutor() as pool:
        for start in tqdm(starts, "checking records", disable=None if len(starts) > 4 else True):
            read, images = {}, {}
            for i in range(start, min(start + size, len(records))):
                try:
                    record = read[i] = records[i]
                    images[i] = record["images"] + (record["images_rejected"] or [])
                except UserError as error:
                    faults.append((i, "unreadable record", str(error)))
            # ---- the images that were not seen before; bytes are not kept ----
            new = set(chain(*images.values())) - broken.keys()
            paths = [image for image in new if isinstance(image, str)]
            stats |= {path: _stat(path) for path in paths}
            found = dict(zip(new, pool.map(_image_fault, new, repeat(records.root)), strict=True))
            broken |= {path: found[path] for path in paths}
            # ---- what is wrong with each record ----
            for i, record in read.items():
                wrong = _text_faults(record, *needs)
                before = first.setdefault(record["id"], i)
                if before != i:
                    where = records.place(before)
                    wrong.append(("duplicate id", f"the id is a duplicate of that at {where}; rename one"))
                for image in images[i]:
                    if says := found.get(image) or broken.get(image):
                        wrong.append(("missing or unreadable image", says))
                faults += [(i, kind, f"{records.where(i)}: {says}") for kind, says in wrong]
    return sorted(faults), stats


def _text_faults(record, needs_rejected, needs_image):
    """[(kind, sentence)]: what is wrong with a record, its images' files apart."""
    wrong, images = [], record["images"]
    for name in ("chosen", "rejected")[:1 + needs_rejected]:
        if record[name] is None:
            wrong.append(("missing key", f"key '{name}' is missing; add it"))
        elif not record[name].strip():
            wrong.append(("empty response", f"the {name} response is empty; write or delete it"))
    if not wrong and needs_rejected and record["chosen"].strip() == record["rejected"].strip():
        wrong.append(("identical responses", "chosen and rejected are identical; fix or delete it"))
    if needs_image and not images:
        wrong.append(("missing image", "there is no image and this loss needs one; add it or choose dpo"))
    if len(record["images_rejected"] or images) != len(images):
        wrong.append(("rejected images", "image and image_rejected differ in number; give as many"))
    return wrong


def _image_fault(image, root):
    """A sentence where an image cannot be read, with its path as the records have it."""
    try:
        read_image(image)
    except UserError as error:
        said = str(error)
        return said if isinstance(image, bytes) else said.replace(image, os.path.relpath(image, root))
