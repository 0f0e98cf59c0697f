"""Preference pairs in every public format, and their check.

    records = Records("pairs.jsonl")    # indexes the file; a record is parsed when it is asked for
    good = check(records)               # every record and image, once; the faults on stderr, one a line
    pair = records[good[0]]             # id images images_rejected question history chosen rejected meta

Formats, detected by their keys, in JSON lines, a JSON array or parquet, and where each is published:
    native      question chosen rejected image (history meta image_rejected)     this project's own
    mdpo        img_path prompt chosen rejected                                  luka-group/mDPO
    llava       conversations rejected_conversations image                       PDS-DPO; YiyangZhou/POVID
                conversations chosen rejected images                             LLaMA-Factory's sharegpt
    ms-swift    messages rejected_response images (rejected_images)              ms-swift
    rlhf-v      text (object or string of: question chosen rejected) image       openbmb/RLHF-V-Dataset
    rlaif-v     question chosen rejected ds_name image (path or {bytes path})    openbmb/RLAIF-V-Dataset
    vlfeedback  prompt img_path completions (of: annotations response)           MMInstruction/VLFeedback
    llava-rlhf  conversations output_1 output_2 preference image               zhiqings/LLaVA-Human-Preference
    ha-dpo      image_id question chosen reject | {image_id: chosen rejected}    opendatalab/HA-DPO
    trl         prompt chosen rejected images (messages or text)                 TRL's "Dataset formats"
                chosen rejected images (messages that begin with the prompt)     TRL's implicit prompt
In all of them images are under the one key that names an image, and their places are where <image> stands in
the text, or in front of the first question. chosen and rejected are one turn after the same turns.
Ours, where a format leaves a choice:
 1. vlfeedback: best against worst mean rating, ties left out. mDPO's 10,000 pairs are published as `mdpo`.
 2. ha-dpo: images are VG_100K_2/ID.jpg or VG_100K/ID.jpg in the image root; `correct` answers are left out
    (official); a description's texts are one seeded draw per image.
 3. Without an id, and in llava-rlhf, where ids repeat, the id is FILE:index.
 4. An image stays at its marker; LLaVA's own code moves it in front of the question."""
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

from tqdm import tqdm

import data
from data import UserError, draw, read_image


# ---- the formats: raw record -> what it has elsewhere: question, chosen, rejected, each a text or turns ----
# question: the prompt. Without it chosen and rejected begin with the prompt.
def native(raw):
    return {"question": [*chain(*raw.get("history") or ()), raw["question"]]}


def mdpo(raw):
    """The prompt is a text: ... USER: a question ASSISTANT: an answer</s>USER: a question ASSISTANT:"""
    text = raw["prompt"].strip().removesuffix("ASSISTANT:").replace("</s>", "")
    _, *turns = re.split(r"\b(?:USER|ASSISTANT):", text)
    return {"question": turns or text}


def llava(raw):
    """Two conversations, or (LLaMA-Factory) one that chosen and rejected answer."""
    if "chosen" in raw:
        return {"question": raw["conversations"]}
    return {"chosen": raw["conversations"], "rejected": raw.get("rejected_conversations")}


def openbmb(raw):
    """The pair may be in `text`, an object or the text of one. image_path is where the image comes from."""
    pair = raw.get("text", {})
    if isinstance(pair, str):
        pair = json.loads(pair)
    return pair | {"image_path": None}


def vlfeedback(raw):
    worst, *_, best = _by_rating(raw)
    return {"question": raw["prompt"], "chosen": best, "rejected": worst}


def llava_rlhf(raw):
    turns, outputs, best = raw["conversations"], {1: raw["output_1"], 2: raw["output_2"]}, raw["preference"]
    if len(turns) % 2 == 0:                             # an answer is the last
        turns = turns[:-1]
    return {"question": turns, "chosen": outputs[best]["value"], "rejected": outputs[3 - best]["value"]}


def ha_dpo(raw):
    """A question with its answers, or, without a question, several descriptions of an image."""
    found = {"image": f"VG_100K/{raw['image_id']}.jpg"}
    if "question" in raw:
        return found | {"rejected": raw["reject"]}
    rng = draw("ha-dpo", raw["image_id"])
    texts = {"question": DESCRIBE, "chosen": raw["chosen"], "rejected": raw["rejected"]}
    return found | {key: rng.choice(some).item() for key, some in texts.items()}


MARKER = "<image>"
IMAGE_KEY = re.compile(r"(\w+_)?(image|img|picture|photo|video|audio)s?(_?(rejected|path|file|name|url)s?)?")
ROLES = ["user", "assistant"]
DESCRIBE = ("Describe this image in detail.", "Take a look at this image and describe what you notice.",
            "Please provide a detailed description of the picture.",
            "Could you describe the contents of this image for me?")


# ---- what several formats share ----
def _turns(dialogue):
    """[(role, text)] of turns in LLaVA's or OpenAI's layout, or of texts by turns."""
    found = []
    for turn in [dialogue] if isinstance(dialogue, (str, dict)) else dialogue:
        if isinstance(turn, str):
            turn = {"role": ROLES[len(found) % 2], "content": turn}
        role, text = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
        if isinstance(text, list):
            text = "".join(part["text"] if part["type"] == "text" else MARKER for part in text)
        text.encode()                                       # a ValueError for half of a surrogate pair
        found.append(({"human": "user", "gpt": "assistant"}.get(role, role), text))
    return found


def _completed(prompt, response):
    """(turns, text): a response, which is a text, a turn, or turns that may begin with the prompt."""
    if isinstance(response, str):
        response = {"role": "assistant", "content": response}
    turns = _turns(response)
    if turns[0][0] == "assistant":
        turns = prompt + turns
    *before, (_, text) = turns
    if prompt and before != prompt:
        raise UserError("chosen or rejected is not text, or not one turn after the same turns; fix it")
    return before, text


def _dialogue(turns, images):
    """(history, question) of a prompt's turns; a system message leads the first question. Markers stay where
    they are, but those in front, whose images the template places."""
    system, roles, texts = "", [], []
    for role, text in turns:
        if role == "system":
            system += text + "\n\n"
        else:
            roles.append(role)
            texts.append(text.strip())
    if roles != ROLES * (len(roles) // 2) + ["user"]:
        raise UserError("the turns are not user, assistant, user, ..., assistant; fix the conversation")
    marked = "".join(texts).count(MARKER)
    if marked not in (0, len(images)):
        raise UserError(f"{marked} {MARKER} for {len(images)} images; give as many, or none")
    texts[0] = system + re.sub(f"^({MARKER}\\s*)+", "", texts[0])
    return data.chunks(texts[:-1], 2), texts[-1]


def _by_rating(raw):
    """The texts of VLFeedback's rated completions, worst mean first; [] where all are tied. "N/A" is none."""
    answers, means = raw.get("completions") or [], {}
    if isinstance(answers, dict):                       # parquet: an object of lists for a list of objects
        answers = [dict(zip(answers, row, strict=False)) for row in zip(*answers.values(), strict=False)]
    for answer in answers:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, OverflowError):
            marks = [float(mark["Rating"]) for mark in answer["annotations"].values()]
            means[answer["response"]] = statistics.fmean(marks)
    if len(set(means.values())) < 2:
        return []
    return sorted(means, key=means.get)


FORMATS = {                     # the keys that each is detected by, in this order, and its function above
    "vlfeedback": ("prompt completions", vlfeedback),
    "llava-rlhf": ("output_1 output_2", llava_rlhf),
    "ms-swift": ("messages rejected_response",
                 lambda raw: {"chosen": raw["messages"], "rejected": raw["rejected_response"]}),
    "mdpo": ("img_path prompt", mdpo),
    "llava": ("conversations", llava),
    "ha-dpo": ("image_id chosen", ha_dpo),
    "rlhf-v": ("text image", openbmb),
    "rlaif-v": ("question ds_name", openbmb),
    "native": ("question", native),
    "trl": ("chosen", lambda raw: {"question": raw.get("prompt")})}
IS_PAIR = {"vlfeedback": _by_rating, "ha-dpo": lambda raw: not raw.get("correct")}   # else all are


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


class Parquet(list):
    """Parquet: where each record is, by row group; only a few of those are in memory."""
    def __init__(self, path):
        self.path, about = path, _parquet(path)
        for group in range(about.num_row_groups):
            self += [(group, row) for row in range(about.row_group(group).num_rows)]

    def __getitem__(self, k):
        group, row = super().__getitem__(k)
        record, = _parquet(self.path, group).slice(row, 1).to_pylist()
        return record


@functools.lru_cache(4)
def _parquet(path, group=None):
    """The metadata of a parquet file, or one of its row groups as a table."""
    try:
        from pyarrow import Table, parquet
        file = parquet.ParquetFile(path, memory_map=True)
        if group is None:
            return file.metadata
        return Table.from_batches(file.iter_batches(1000, [group]))         # a piece holds at most 2 GB
    except ImportError as error:
        raise UserError(f"{path} is parquet: pip install pyarrow, or convert it to JSON lines") from error
    except (ValueError, OSError) as error:              # pyarrow's ArrowInvalid
        raise UserError(f"{path} is not readable parquet ({error}); fetch it again") from error


class Array(list):
    """A JSON array, or the values of one object {image id: record} (HA-DPO's), read whole."""
    def __init__(self, path):
        self.path, rows = path, data.read_json(path)
        if isinstance(rows, dict):
            rows = [{"image_id": name, **data.as_record(row, path)} for name, row in rows.items()]
        super().__init__(rows)

    @functools.cached_property
    def numbers(self):
        """The line in which each record begins: found when the first fault is to be named."""
        text, decoder = data.read_bytes(self.path).decode("utf-8-sig"), json.JSONDecoder()
        at, end, line, found = 0, 0, 1, []
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
    if head[:1] not in b"{":
        raise UserError(f"{path} is no JSON or parquet (gzip, zip, csv, UTF-16?); convert it to JSON lines")
    return Lines(path)


# ---- the records ----
class Records:
    """A file's pairs, normalised when asked for; `keep` has their numbers among all raw records.
    rejected: whether a record's rejected response is read."""

    def __init__(self, path, image_root=None, rejected=True):
        self.path, self.raw, self.rejected = str(path), _opened(str(path)), rejected
        self.root = os.path.realpath(image_root or Path(path).parent)
        self.keep = range(len(self.raw))
        if not len(self):
            raise UserError(f"{path} holds no records; give JSON lines, a JSON array of objects, or parquet")
        self.format, self.read = self._detected()
        if is_pair := IS_PAIR.get(self.format):
            self.keep = [k for k in self.keep if is_pair(self._raw(k))]

    def _detected(self):
        """The format's name and function, by the first record that can be read."""
        for i in range(len(self)):                      # one broken record must not hide the others' format
            with contextlib.suppress(UserError):
                keys = self._raw(i).keys()
                break
        else:
            self._raw(0)                                # raises
        for name, (needed, read) in FORMATS.items():
            if keys >= set(needed.split()):
                return name, read
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
            found = raw | self.read(raw)
            images = self._images(found, rejected=False)
            prompt, chosen = _completed(_turns(found.get("question") or []), found["chosen"])
            history, question = _dialogue(prompt, images)
            record = {"id": self._id(raw, i), "images": images,
                      "images_rejected": self._images(found, rejected=True),
                      "question": question, "history": history, "chosen": chosen,
                      "meta": raw.get("meta") or {}}
            if self.rejected:
                _, record["rejected"] = _completed(prompt, found["rejected"])
            return record
        except KeyError as error:
            problem = f"key {error} is missing; add it"
        except UserError as error:
            problem = error
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            problem = f"not laid out as {self.format} is ({error}); fix the record"
        raise UserError(f"{self.where(i)}: {problem}")

    def _images(self, found, rejected):
        """Paths inside the image root, or bytes: what is under the one key that names the image."""
        keys = [key for key, value in found.items()
                if value and IMAGE_KEY.fullmatch(key) and ("rejected" in key) == rejected]
        if len(keys) > 1:
            raise UserError(f"{' and '.join(keys)} each name an image; leave one")
        images, paths = found[keys[0]] if keys else [], []
        for image in images if isinstance(images, list) else [images]:
            if isinstance(image, dict):                     # as Hugging Face's datasets hold images
                image = image["bytes"] or image["path"]
            if image in (None, ""):
                continue
            if isinstance(image, str):
                second = image.replace("VG_100K/", "VG_100K_2/")        # Visual Genome comes in two folders
                if self.format == "ha-dpo" and os.path.exists(os.path.join(self.root, second)):
                    image = second
                image = data.inside(self.root, image, "image")
            elif not isinstance(image, bytes):
                raise UserError(f"the image is {type(image).__name__}, not a path; fix the record")
            paths.append(image)
        return paths


# ---- the full check ----
def check(records, needs_image=False, skip_bad=False):
    """The indices of the good records; the others are `drop`ped. Threads decode every image once."""
    if len(records) < len(records.raw):
        print(f"{len(records)} of {len(records.raw)} records of {records.path} are pairs", file=sys.stderr)
    faults, first, shown_by = set(), {}, {}  # {id: index}; {path, or index of a record with bytes: indices}

    def fault(i, kind, says):
        faults.add((i, kind, f"{records.where(i)}: {says}"))

    for i in range(len(records)):
        try:
            record = records[i]
        except UserError as error:
            faults.add((i, "unreadable record", str(error)))
            continue
        for kind, says in _text_faults(record, needs_image):
            fault(i, kind, says)
        before = first.setdefault(record["id"], i)
        if before != i:
            fault(i, "duplicate id", f"the id is a duplicate of that at {records.place(before)}; rename one")
        for image in record["images"] + record["images_rejected"]:
            shown_by.setdefault(image if isinstance(image, str) else i, []).append(i)
    with ThreadPoolExecutor() as pool:
        looked = pool.map(functools.partial(_image_fault, records), shown_by)
        looked = tqdm(looked, "checking images", len(shown_by), delay=1, disable=None)
        for indices, says in zip(shown_by.values(), looked, strict=True):
            for i in indices if says else ():
                fault(i, "missing or unreadable image", says)
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
    images = record["images"]
    texts = {name: record[name].strip() for name in ("chosen", "rejected") if name in record}
    for name, text in texts.items():
        if not text:
            yield "empty response", f"the {name} response is empty; write or delete it"
    if texts["chosen"] == texts.get("rejected") != "":
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
