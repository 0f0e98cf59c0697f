"""Preference pairs in every public format, and their check.

    records = Records("pairs.jsonl")    # indexes the file; a record is parsed when it is asked for
    good = check(records)               # every record and image, once; the first faults on stderr, one a line
    pair = records[good[0]]             # id images images_rejected question history chosen rejected meta, and
                                        # apart if rejected follows other turns: the record with those

Formats, detected by their keys, in any kind of file that files.py reads, and where each is published:
    native      question chosen rejected image (history meta image_rejected)     this project's own
    mdpo        img_path prompt chosen rejected                                  luka-group/mDPO
    llava       conversations rejected_conversations image                       PDS-DPO; YiyangZhou/POVID
                conversations chosen rejected images                             LLaMA-Factory's sharegpt
    ms-swift    messages rejected_response|rejected_messages images (rejected_images)                ms-swift
                messages chosen rejected images                                  LLaMA-Factory's openai tags
    rlhf-v      text (object or string of: question chosen rejected) image       openbmb/RLHF-V-Dataset
    rlaif-v     question chosen rejected ds_name image (path or {bytes path})    openbmb/RLAIF-V-Dataset
    vlfeedback  prompt img_path completions (of: annotations response)           MMInstruction/VLFeedback
    llava-rlhf  conversations output_1 output_2 preference image               zhiqings/LLaVA-Human-Preference
    ha-dpo      image_id question chosen reject | {image_id: chosen rejected}    opendatalab/HA-DPO
    trl         prompt chosen rejected images (messages or text)                 TRL's "Dataset formats"
                chosen rejected images (messages that begin with the prompt)     TRL's implicit prompt
In all of them images are under the one key that names an image (a path, bytes, base64 or a data: URI), and
their places are where <image> stands in the text, or in front of the first question. chosen and rejected are
one turn each, the last, and each follows its own earlier turns, in which the images have places of their own;
several rejected ones, in a list, are a pair each, with the ids ID#1, ID#2, ...
Ours, where a format leaves a choice:
 1. vlfeedback: best against worst mean rating, ties left out. mDPO's 10,000 pairs are published as `mdpo`.
 2. ha-dpo: images are VG_100K_2/ID.jpg or VG_100K/ID.jpg in the image root; `correct` answers are left out
    (official); a description's texts are one seeded draw per image.
 3. Without an id, and in llava-rlhf, where ids repeat, the id is FILE:index.
 4. An image stays at its marker; LLaVA's own code moves it in front of the question."""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

import base64
import contextlib
import functools
import json
import os
import re
import statistics
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

from tqdm import tqdm

import data
import lora
from data import UserError, draw, read_image
from evaluation.stats import few
from model import command
from training import files

WHOLE = 1 << 12                                         # blocks: a file of records is hashed up to 256 MiB


# ---- the formats: raw record -> what it has elsewhere: question, chosen, rejected, each a text or turns ----
# question: the prompt. Without it chosen and rejected begin with the prompt.
def native(raw):
    return {"question": [*chain(*raw.get("history") or ()), raw["question"]]}


def mdpo(raw):
    """The prompt is a text: ... USER: a question ASSISTANT: an answer</s>USER: a question ASSISTANT:"""
    text = raw["prompt"].strip().removesuffix("ASSISTANT:").replace("</s>", "")
    _, *turns = re.split(r"\b(?:USER|ASSISTANT):", text)
    return {"question": turns or text}


def dialogues(raw, key="conversations"):
    """A dialogue that chosen and rejected answer (LLaMA-Factory), or the chosen one with, to reject, another
    or its last answer."""
    if "chosen" in raw:
        return {"question": raw[key]}
    found = {"chosen": raw[key]}
    for key in ("rejected_conversations", "rejected_response", "rejected_messages"):
        if raw.get(key):
            found["rejected"] = raw[key]
    return found


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
BASE64 = re.compile(r"data:.*|[A-Za-z0-9+/\s]{88,}=*\s*", re.DOTALL)      # as long as the smallest PNG's
ROLES = ["user", "assistant"]
DESCRIBE = ("Describe this image in detail.", "Take a look at this image and describe what you notice.",
            "Please provide a detailed description of the picture.",
            "Could you describe the contents of this image for me?")


# ---- what several formats share ----
def brief(value, room=150):
    """A record's text, or a sentence about it, as a message shows it: its two ends if it is long."""
    text = str(value)
    return text if len(text) <= room else f"{text[:room // 2]}...{text[-room // 2:]}"


def _image_keys(found):
    """The keys of an object that name an image and have a value."""
    return [key for key, value in found.items() if value and IMAGE_KEY.fullmatch(key)]


def _turns(dialogue):
    """[(role, text)] of turns in LLaVA's or OpenAI's layout, or of texts by turns."""
    found = []
    for turn in [dialogue] if isinstance(dialogue, (str, dict)) else dialogue:
        if isinstance(turn, str):
            turn = {"role": ROLES[len(found) % 2], "content": turn}
        role, text = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
        parts = text if isinstance(text, list) else []
        if any(map(_image_keys, [turn, *parts])):
            raise UserError("a message names its image itself; list the record's images under `images`")
        if parts:
            text = "".join(part["text"] if part["type"] == "text" else MARKER for part in parts)
        text.encode()                                       # a ValueError for half of a surrogate pair
        found.append(({"human": "user", "gpt": "assistant"}.get(role, role), text))
    return found


def _completed(prompt, response, other):
    """(turns, text): a response, which is a text, a turn, or turns that begin with the prompt, if there is
    one. other: the turns before the other response, which this one follows if it brings none."""
    if isinstance(response, str):
        response = {"role": "assistant", "content": response}
    turns = _turns(response)
    if turns[0][0] == "assistant":
        prompt = prompt or other
        turns = prompt + turns
    *before, (_, text) = turns
    if prompt and before != prompt:
        raise UserError("chosen or rejected is not text, or not one turn after the same turns; fix it")
    return before, text


def _dialogue(turns, images):
    """{"history", "question"} of a prompt's turns; a system message leads the first question. Markers stay
    where they are, but those in front, whose images the template places."""
    system, roles, texts = "", [], []
    for role, text in turns:
        if role == "system":
            system += f"{text}\n\n" if text else ""
        else:
            roles.append(role)
            texts.append(text.strip())
    if roles != ROLES * (len(roles) // 2) + ["user"]:
        raise UserError("the turns are not user, assistant, user, ..., assistant; fix the conversation")
    marked = "".join(texts).count(MARKER)
    if marked not in (0, len(images)):
        raise UserError(f"{marked} {MARKER} for {len(images)} images; give as many, or none")
    texts[0] = system + re.sub(f"^({MARKER}\\s*)+", "", texts[0])
    return {"history": data.chunks(texts[:-1], 2), "question": texts[-1]}


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
    "ms-swift": ("messages", lambda raw: dialogues(raw, "messages")),
    "mdpo": ("img_path prompt", mdpo),
    "llava": ("conversations", dialogues),
    "ha-dpo": ("image_id chosen", ha_dpo),
    "rlhf-v": ("text image", openbmb),
    "rlaif-v": ("question ds_name", openbmb),
    "native": ("question", native),
    "trl": ("chosen", lambda raw: {"question": raw.get("prompt")})}
IS_PAIR = {"vlfeedback": _by_rating, "ha-dpo": lambda raw: not raw.get("correct")}   # else all are


# ---- the records ----
class Records:
    """A file's pairs, normalised when asked for; `keep` has their numbers among all raw records.
    rejected: whether a record's rejected response is read. follow_links: as data.inside has it."""
    __iter__ = None                                     # a record may be several pairs: ask by number

    def __init__(self, path, image_root=None, rejected=True, follow_links=False):
        path = lora.fetched(str(path), "dataset")
        self.path, self.raw, self.rejected = path, files.opened(path), rejected
        self.follow_links = follow_links
        own = path if os.path.isdir(path) else Path(path).parent
        self.root = os.path.realpath(image_root or own)
        self.keep = range(len(self.raw))
        if not self.keep:
            raise UserError(f"{path} holds no records; give JSON lines, a JSON array of objects, or parquet")
        self.format, self.read = self._detected()
        if is_pair := IS_PAIR.get(self.format):
            self.keep = [k for k in self.keep if self._counts(is_pair, k)]

    def _counts(self, is_pair, k):
        """Whether a record is a pair; one that cannot be read is, and its reading says what is wrong."""
        raw = self._raw(k)
        try:
            return is_pair(raw)
        except (TypeError, AttributeError, ValueError):
            return True

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
        keys = brief(", ".join(sorted(keys)))
        raise UserError(f"{self.place(i)}: no known format has the keys {keys}; rename them to those of one "
                        f"of {', '.join(FORMATS)} (docs/data.md)")

    def __len__(self):
        return len(self.keep)

    def place(self, i):
        """FILE, line N (in parquet and arrow: record N): for messages."""
        return self.raw.place(self.keep[i % len(self)])

    def where(self, i):
        """FILE, line N (id X): for messages."""
        id, n = brief(self._id(self._raw(i), i)), i // len(self)
        return f"{self.place(i)} (id {id}{f'#{n + 1}' if n else ''})"

    def _raw(self, i):
        found = self.raw[self.keep[i % len(self)]]
        return data.as_record(found, self.place(i))

    def _id(self, raw, i):
        own = raw.get("id")
        if own is None or self.format == "llava-rlhf":           # whose ids repeat
            return f"{Path(self.path.removesuffix('.gz')).stem}:{self.keep[i % len(self)]}"
        return str(own)

    def __getitem__(self, i):
        """A pair. The n-th more of a record with several rejected responses is n * len(self) further."""
        raw = self._raw(i)
        try:
            found = raw | self.read(raw)
            if found.get("tools"):
                raise UserError("no prompt here tells of tools; remove them")
            system = _turns({"role": "system", "content": found.get("system") or ""})
            images, meta = self._images(found, rejected=False), raw.get("meta") or {}
            prompt = _turns(found.get("question") or [])
            before, chosen = _completed(prompt, found["chosen"], [])
            record = {"id": self._id(raw, i), "images": images,
                      "images_rejected": self._images(found, rejected=True),
                      **_dialogue(system + before, images), "chosen": chosen,
                      "meta": meta if isinstance(meta, dict) else {"meta": meta}, "pairs": 1}
            if self.rejected:
                rejected = found["rejected"]
                if isinstance(rejected, list) and not any(isinstance(turn, dict) for turn in rejected):
                    n = i // len(self)
                    record |= {"id": f"{record['id']}#{n + 1}", "pairs": len(rejected)}
                    rejected = rejected[n] if rejected else ""
                own, record["rejected"] = _completed(prompt, rejected, before)
                if own != before:
                    record["apart"] = record | _dialogue(system + own, images)
            return record
        except KeyError as error:
            problem = f"key {brief(error)} is missing; add it"
        except UserError as error:
            problem = brief(error, 400)
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            problem = f"not laid out as {self.format} is ({brief(error)}); fix the record"
        raise UserError(f"{self.where(i)}: {problem}")

    def identity(self):
        """A hash over the records' files, and one over the images that they name, with - between them."""
        paths, images = [file.path for file in getattr(self.raw, "files", [self.raw])], set()
        for i in range(len(self)):
            with contextlib.suppress(UserError):
                record = self[i]
                images.update(filter(os.path.isfile, record["images"] + record["images_rejected"]))
        return f"{command.identity_of(paths, WHOLE)}-{command.identity_of(sorted(images))}"

    def _images(self, found, rejected):
        """What is under the one key that names the image: see _image."""
        keys = [key for key in _image_keys(found) if ("rejected" in key) == rejected]
        if len(keys) > 1:
            raise UserError(f"{' and '.join(keys)} each name an image; leave one")
        images = found[keys[0]] if keys else []
        images = map(self._image, images if isinstance(images, list) else [images])
        return [image for image in images if image not in (None, "")]

    def _image(self, image):
        """A path inside the image root, or bytes; None or "" for nothing."""
        if isinstance(image, dict):                     # as Hugging Face's datasets hold images
            image = image["bytes"] or image["path"]
        if isinstance(image, bytes) or image in (None, ""):
            return image
        if not isinstance(image, str):
            raise UserError(f"the image is {type(image).__name__}, not a path; fix the record")
        if BASE64.fullmatch(image) and not os.path.exists(os.path.join(self.root, image)):
            return base64.b64decode(image.rpartition(",")[2])
        second = image.replace("VG_100K/", "VG_100K_2/")        # Visual Genome comes in two folders
        if self.format == "ha-dpo" and os.path.exists(os.path.join(self.root, second)):
            image = second
        return data.inside(self.root, image, "image", self.follow_links)


# ---- the full check ----
def check(records, needs_image=False, skip_bad=False):
    """The indices of the good records; the others are `drop`ped. Threads decode every image once."""
    if len(records) < len(records.raw):
        print(f"{len(records)} of {len(records.raw)} records of {records.path} are pairs", file=sys.stderr)
    faults, first, shown_by = set(), {}, {}  # {id: index}; {path, or index of a record with bytes: indices}
    n = len(records)
    pairs = list(range(n))

    def fault(i, kind, says):
        faults.add((i, kind, f"{records.where(i)}: {says}"))

    for i in pairs:
        try:
            record = records[i]
        except UserError as error:
            faults.add((i, "unreadable record", str(error)))
            continue
        if i < n:
            pairs += range(i + n, n * record["pairs"], n)    # those of its other rejected responses
        for kind, says in _text_faults(record):
            fault(i, kind, says)
        before = first.setdefault(record["id"], i)
        if before != i:
            fault(i, "duplicate id", f"the id is a duplicate of that at {records.place(before)}; rename one")
        for image in record["images"] + record["images_rejected"]:
            shown_by.setdefault(image if isinstance(image, str) else i % n, []).append(i)
    if needs_image and not shown_by:
        for i in first.values():
            fault(i, "missing image", "there is no image and this loss needs one; add it or choose dpo")
    with ThreadPoolExecutor() as pool:
        looked = pool.map(functools.partial(_image_fault, records), shown_by)
        looked = tqdm(looked, "checking images", len(shown_by), delay=1, disable=None)
        for indices, says in zip(shown_by.values(), looked, strict=True):
            for i in indices if says else ():
                fault(i, "missing or unreadable image", says)
    pairs.sort(key=lambda i: i % n)          # those of one record together
    return drop(records, pairs, sorted(faults), skip_bad)


def drop(records, indices, faults, skip_bad):
    """The indices without a fault. The first faults, (index, kind, sentence), go to stderr, one a line; any
    ends the run unless skip_bad."""
    if faults:
        print(few([text for *_, text in faults], "\n"), file=sys.stderr)
    bad = {i for i, _, _ in faults}
    share = f"{len(bad)} of {max(len(records), len(indices))} records of {records.path}"
    if bad and not skip_bad:
        raise UserError(f"{share} are faulty (listed above); fix them or pass --skip_bad")
    if len(bad) == len(indices):
        raise UserError(f"{records.path} has no usable record; fix it or give an --image_root")
    if bad:
        kinds = Counter(kind for _, kind, _ in faults)
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        print(f"--skip_bad left out {share} ({counts})", file=sys.stderr)
    return [i for i in indices if i not in bad]


def _text_faults(record):
    """Yields (kind, sentence): what is wrong with a record, its images' files apart."""
    images = record["images"]
    texts = {name: record[name].strip() for name in ("chosen", "rejected") if name in record}
    for name, text in texts.items():
        if not text:
            yield "empty response", f"the {name} response is empty; write or delete it"
    if texts["chosen"] == texts.get("rejected") != "":
        yield "identical responses", "chosen and rejected are identical, though turns before may differ"
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
        return brief(str(error).replace(records.root + os.sep, ""), 250)       # as the records have it
