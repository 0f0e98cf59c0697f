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
 1. vlfeedback: best against worst mean rating, ties left out. mDPO's 10,000 pairs are published as `mdpo`.
 2. ha-dpo: images are VG_100K_2/ID.jpg or VG_100K/ID.jpg in the image root; `correct` answers are left out
    (official); a description's texts are one seeded draw per image.
 3. Without an id, and in llava-rlhf, where ids repeat, the id is FILE:index."""
if __name__ == "__main__":
    raise SystemExit(print("A part of train_dpo.py; run: python train_dpo.py --help"))

import contextlib
import functools
import json
import os
import re
import statistics
import sys
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import data
from data import UserError, draw, read_image


# ---- the formats: raw record -> what it has elsewhere than native: image, question, chosen, rejected ----
# image: one, or a list. question: a text, or all turns. chosen, rejected: a text, or turns that end with it.
def native(raw):
    return {"question": [*chain(*raw.get("history") or ()), raw["question"]]}


def mdpo(raw):
    inner = re.search(r"USER:(.*)ASSISTANT:", raw["prompt"], re.DOTALL)
    return {"image": raw["img_path"], "question": inner[1] if inner else raw["prompt"]}


def llava(raw):
    turns = raw["conversations"]
    return {"question": turns[:-1], "chosen": turns, "rejected": raw["rejected_conversations"]}


def rlhf_v(raw):
    """The pair is in `text`, an object or the text of one."""
    pair = raw["text"]
    return json.loads(pair) if isinstance(pair, str) else pair


def vlfeedback(raw):
    worst, *_, best = _by_rating(raw)
    return {"image": raw["img_path"], "question": raw["prompt"], "chosen": best, "rejected": worst}


def llava_rlhf(raw):
    turns, outputs, best = raw["conversations"], {1: raw["output_1"], 2: raw["output_2"]}, raw["preference"]
    role, _ = _turn(turns[-1])
    if role == "assistant":
        turns = turns[:-1]
    return {"question": turns, "chosen": [outputs[best]], "rejected": [outputs[3 - best]]}


def ha_dpo(raw):
    """A question with its answers, or, without a question, several descriptions of an image."""
    found = {"image": f"VG_100K/{raw['image_id']}.jpg"}
    if "question" in raw:
        return found | {"rejected": raw["reject"]}
    rng = draw("ha-dpo", raw["image_id"])
    texts = {"question": DESCRIBE, "chosen": raw["chosen"], "rejected": raw["rejected"]}
    return found | {key: rng.choice(some).item() for key, some in texts.items()}


def trl(raw):
    return {"image": raw.get("images", raw.get("image")), "question": raw["prompt"]}


ROLES = ["user", "assistant"]
DESCRIBE = ("Describe this image in detail.", "Take a look at this image and describe what you notice.",
            "Please provide a detailed description of the picture.",
            "Could you describe the contents of this image for me?")


# ---- what several formats share ----
def _turn(raw):
    """(role, text) of a turn in LLaVA's or OpenAI's layout."""
    role, text = (raw["from"], raw["value"]) if "from" in raw else (raw["role"], raw["content"])
    if isinstance(text, list):
        text = "".join(part.get("text") or "" for part in text)
    return {"human": "user", "gpt": "assistant"}.get(role, role), text


def _response(turns):
    """The text of a response, which is its last turn or a text already."""
    if isinstance(turns, list) and isinstance(turns[-1], dict):
        _, turns = _turn(turns[-1])
    if not isinstance(turns, str):
        raise UserError("chosen or rejected is not text; fix the record")
    return turns


def _dialogue(turns):
    """(history, question) of turns, or of texts by turns; a system message leads the first question."""
    system, roles, texts = "", [], []
    for turn in turns:
        if isinstance(turn, str):
            turn = {"role": ROLES[len(roles) % 2], "content": turn}
        role, text = _turn(turn)
        if role == "system":
            system += text + "\n\n"
        else:
            roles.append(role)
            texts.append(text.replace("<image>", "").strip())
    if roles != ROLES * (len(roles) // 2) + ["user"]:
        raise UserError("the turns are not user, assistant, user, ..., assistant; fix the conversation")
    texts[0] = system + texts[0]
    return data.chunks(texts[:-1], 2), texts[-1]


def _by_rating(raw):
    """The texts of VLFeedback's rated completions, worst mean first; [] where all are tied. "N/A" is none."""
    answers, means = raw.get("completions") or [], {}
    if isinstance(answers, dict):                       # parquet: an object of lists for a list of objects
        answers = [dict(zip(answers, row, strict=False)) for row in zip(*answers.values(), strict=False)]
    for answer in answers:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            marks = [float(mark["Rating"]) for mark in answer["annotations"].values()]
            means[answer["response"]] = statistics.fmean(marks)
    if len(set(means.values())) < 2:
        return []
    return sorted(means, key=means.get)


class Format(NamedTuple):
    """A published format: `read` is its function above."""
    keys: str                   # that it is detected by
    read: Any
    is_pair: Any = None         # raw record -> whether it is one; None: all are


FORMATS = {                     # in the order in which they are tried
    "vlfeedback": Format("prompt completions", vlfeedback, is_pair=_by_rating),
    "llava-rlhf": Format("output_1 output_2", llava_rlhf),
    "mdpo": Format("img_path prompt", mdpo),
    "llava": Format("conversations", llava),
    "ha-dpo": Format("image_id chosen", ha_dpo, is_pair=lambda raw: not raw.get("correct")),
    "rlhf-v": Format("text image", rlhf_v),
    "rlaif-v": Format("question ds_name", native),
    "native": Format("question", native),
    "trl": Format("prompt chosen", trl)}


# ---- a file's raw records, by their number in it ----
class Lines:
    """JSON lines: only where they begin is in memory."""
    def __init__(self, path):
        self.path, self.starts, self.numbers, at = path, array("q"), array("q"), 0
        with data.reading(path) as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    self.starts.append(at)
                    self.numbers.append(number)
                at += len(line)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, k):
        with data.reading(self.path) as file:
            file.seek(self.starts[k])
            return data.parse(file.readline().rstrip(), self.path, self.numbers[k])


class Parquet:
    """Parquet, read whole, in Arrow's layout."""
    def __init__(self, path):
        try:
            from pyarrow import Table, parquet
            some = parquet.ParquetFile(path).iter_batches(1000)            # a piece holds at most 2 GB
            self.table = Table.from_batches(some)
        except ImportError as error:
            raise UserError(f"{path} is parquet: pip install pyarrow, or convert it to JSON lines") from error
        except ValueError as error:                         # pyarrow's ArrowInvalid
            raise UserError(f"{path} is not readable parquet ({error}); fetch it again") from error

    def __len__(self):
        return len(self.table)

    def __getitem__(self, k):
        record, = self.table.slice(k, 1).to_pylist()
        return record


class Array(list):
    """A JSON array, or the values of one object {image id: record} (HA-DPO's), read whole."""
    def __init__(self, path):
        self.path, rows = path, data.read_json(path)
        if isinstance(rows, dict):
            rows = [{"image_id": name, **row} for name, row in rows.items()]
        super().__init__(rows)

    @functools.cached_property
    def numbers(self):
        """The line in which each record begins: found when the first fault is to be named."""
        text, decoder, at, end, line, found = data.read_text(self.path), json.JSONDecoder(), 0, 0, 1, []
        before = re.compile(r'\s*[\[{,]\s*("[^"]*"\s*:\s*)?')        # a bracket or comma, and the image id
        for _ in self:
            begin = before.match(text, end).end()
            line += text.count("\n", at, begin)
            found.append(line)
            _, end = decoder.raw_decode(text, begin)
            at = begin
        return found


def _opened(path):
    """A file's raw records; its first bytes decide how they are read."""
    with data.reading(path) as file:
        head = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"PAR1"):
        return Parquet(path)
    if re.match(rb'\[|\{\s*"\d+"\s*:\s*\{', head):
        return Array(path)
    return Lines(path)


# ---- the records ----
class Records:
    """A file's pairs, normalised when asked for; `keep` has their numbers among all raw records."""

    def __init__(self, path, image_root=None):
        self.path, self.raw = str(path), _opened(str(path))
        self.root = os.path.realpath(image_root or Path(path).parent)
        self.keep = range(len(self.raw))
        if not len(self):
            raise UserError(f"{path} holds no records; give JSON lines, a JSON array of objects, or parquet")
        self.format = self._detected()
        self.layout = FORMATS[self.format]
        if self.layout.is_pair:
            self.keep = [k for k in self.keep if self.layout.is_pair(self._raw(k))]

    def _detected(self):
        """The name of the format, by the first record that can be read."""
        for i in range(len(self)):                      # one broken record must not hide the others' format
            with contextlib.suppress(UserError):
                keys = self._raw(i).keys()
                break
        else:
            self._raw(0)                                # raises
        for name, layout in FORMATS.items():
            if keys >= set(layout.keys.split()):
                return name
        raise UserError(f"{self.place(i)}: no known format has the keys {', '.join(sorted(keys))}; rename "
                        f"them to those of one of {', '.join(FORMATS)} (docs/data.md)")

    def __len__(self):
        return len(self.keep)

    def place(self, i):
        """FILE, line N (in parquet: record N): for messages."""
        k = self.keep[i]
        where = f"record {k + 1}" if isinstance(self.raw, Parquet) else f"line {self.raw.numbers[k]}"
        return f"{self.path}, {where}"

    def where(self, i):
        """FILE, line N (id X): for messages."""
        return f"{self.place(i)} (id {self._id(self._raw(i), i)})"

    def _raw(self, i):
        found = self.raw[self.keep[i]]                  # beyond the last: IndexError, which ends a loop
        return data.as_record(found, self.place(i))

    def _id(self, raw, i):
        own = raw.get("id")
        if own is None or self.format == "llava-rlhf":           # whose ids repeat
            return f"{Path(self.path).stem}:{self.keep[i]}"
        return str(own)

    def __getitem__(self, i):
        raw = self._raw(i)
        try:
            found = raw | self.layout.read(raw)
            turns = found["question"]
            history, question = _dialogue([turns] if isinstance(turns, str) else turns)
            return {"id": self._id(raw, i), "images": self._images(found.get("image")),
                    "images_rejected": self._images(raw.get("image_rejected")),
                    "question": question, "history": history, "chosen": _response(found["chosen"]),
                    "rejected": _response(found["rejected"]), "meta": raw.get("meta") or {}}
        except KeyError as error:
            problem = f"key {error} is missing; add it"
        except UserError as error:
            problem = error
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            problem = f"not laid out as {self.format} is ({error}); fix the record"
        raise UserError(f"{self.where(i)}: {problem}")

    def _images(self, images):
        """Paths inside the image root, or bytes, of what a record has under an image's key."""
        found = []
        for image in images if isinstance(images, list) else [images]:
            if image is None:
                continue
            if isinstance(image, dict):                     # as Hugging Face's datasets hold images
                image = image.get("bytes") or image.get("path")
            if isinstance(image, str):
                if self.format == "ha-dpo":
                    image = _genome(self.root, image)
                image = data.inside(self.root, image, "image")
            elif not isinstance(image, bytes):
                raise UserError(f"the image is {type(image).__name__}, not a path; fix the record")
            found.append(image)
        return found


def _genome(root, image):
    """Visual Genome comes in two folders: the path of an image in the one that has it."""
    second = image.replace("VG_100K/", "VG_100K_2/")
    return second if os.path.exists(os.path.join(root, second)) else image


# ---- the full check ----
def check(records, needs_image=False, skip_bad=False):
    """The indices of the good records; the others are `drop`ped. Threads decode every image once."""
    if len(records) < len(records.raw):
        print(f"{len(records)} of {len(records.raw)} records of {records.path} are pairs", file=sys.stderr)
    faults, first, shown_by = set(), {}, {}  # {id: index}; {path, or index of a record with bytes: indices}
    for i in tqdm(range(len(records)), "checking records", delay=1, disable=None):
        try:
            record = records[i]
        except UserError as error:
            faults.add((i, "unreadable record", str(error)))
            continue
        problems = [*_text_faults(record, needs_image)]
        before = first.setdefault(record["id"], i)
        if before != i:
            says = f"the id is a duplicate of that at {records.place(before)}; rename one"
            problems.append(("duplicate id", says))
        for kind, says in problems:
            faults.add((i, kind, f"{records.where(i)}: {says}"))
        for image in record["images"] + record["images_rejected"]:
            shown_by.setdefault(image if isinstance(image, str) else i, []).append(i)
    with ThreadPoolExecutor() as pool:
        looked = pool.map(functools.partial(_image_fault, records), shown_by)
        looked = tqdm(looked, "checking images", len(shown_by), delay=1, disable=None)
        for indices, says in zip(shown_by.values(), looked, strict=True):
            for i in indices if says else ():
                faults.add((i, "missing or unreadable image", f"{records.where(i)}: {says}"))
    return drop(records, range(len(records)), sorted(faults), skip_bad)


def drop(records, indices, faults, skip_bad):
    """The indices without a fault. Faults, (index, kind, sentence), go to stderr, one a line, and end the run
    unless skip_bad."""
    for _, _, text in faults:
        print(text, file=sys.stderr)
    bad = {i for i, _, _ in faults}
    share = f"{len(bad)} of {len(records)} records of {records.path}"
    if bad and not skip_bad:
        raise UserError(f"{share} are faulty (listed above); fix them or pass --skip_bad")
    if len(bad) == len(indices):
        raise UserError(f"{records.path} has no usable record; fix it or give an --image_root")
    if bad:
        kinds = Counter(kind for _, kind, _ in faults)
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        print(f"--skip_bad left out {share} ({counts})", file=sys.stderr)
    return [i for i in indices if i not in bad]


def _text_faults(record, needs_image):
    """Yields (kind, sentence): what is wrong with a record, its images' files apart."""
    texts, images = {name: record[name].strip() for name in ("chosen", "rejected")}, record["images"]
    for name, text in texts.items():
        if not text:
            yield "empty response", f"the {name} response is empty; write or delete it"
    if texts["chosen"] == texts["rejected"] != "":
        yield "identical responses", "chosen and rejected are identical; fix or delete it"
    if needs_image and not images:
        yield "missing image", "there is no image and this loss needs one; add it or choose dpo"
    if len(record["images_rejected"] or images) != len(images):
        yield "rejected images", "image and image_rejected differ in number; give as many"


def _image_fault(records, key):
    """A sentence if an image, or one of the record with this index, cannot be read."""
    images = [key]
    if isinstance(key, int):
        record = records[key]
        images = record["images"] + record["images_rejected"]
    try:
        for image in images:
            read_image(image)
    except UserError as error:
        return str(error).replace(records.root + os.sep, "")       # as the records have it
