"""The published benchmarks' own files, for eval_hallu.py: questions as a model is asked them, and answers.

    questions("pope", ["coco/"], images="val2014/")   [Question(line, prompt, image)], ready for a model
    read_answers(["answers.jsonl"])                   their lines, ours or as the official scripts take them
    export("amber", answers)                          what AMBER's own script reads

No question, image or prompt of theirs is part of this repository: everything is read by path.

    pope     coco_pope_random.json ...          JSON lines {question_id, image, text, label}; or their folder
    amber    query_generative.json ...          list of {id, image, query}; or their folder: all 15,220
    objhal   obj_halbench_300_with_image.jsonl  {image (base64 or a name) or image_path, question, image_id};
             also LLaVA's question files        {question_id, image, text}: any captions over COCO images
    mmhal    mmhal-bench_answer_template.json   list of 96; images by image_id, or by the name in image_src
"""
import base64
import binascii
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import data
import nouns
from data import UserError

SPLITS = ("random", "popular", "adversarial")
KEPT = ("annotations", "images", "categories", "image_id", "category_id", "caption", "id", "name")   # of COCO
NAME = 300                                     # characters: what is longer is no file's name, but base64


class Question(NamedTuple):
    """What is written beside the answer; what the model is asked; the image as a path, or as base64 bytes."""
    line: dict
    prompt: str
    image: object


def read_image(image):
    """The image of a Question, upright and in RGB. Raises UserError where it cannot be read."""
    if not isinstance(image, bytes):
        return data.read_image(image)
    try:
        return data.read_image(base64.b64decode(image, validate=True))
    except binascii.Error as error:
        raise UserError(f"an image in the question file, {image[:16].decode()}..., is broken base64 "
                        f"({error}); copy the file again") from error


# ---- questions ----
def records(path, keys, what):
    """The records of a question file, each with these keys. Raises UserError."""
    found = data.read_records(path, torn_ok=False)
    for number, record in enumerate(found, 1):
        for key in keys:
            if record.get(key) is None:
                raise UserError(f"{path}, record {number} has no {key!r}, so this is no {what}; give the "
                                "right file")
    if not found:
        raise UserError(f"{path} is empty: it holds no {what}; copy it again")
    return found


def pope_questions(paths):
    """{split: records} of POPE's question files, or of folders of them. A split's name is its file's."""
    files, found = [], {}
    for path in map(Path, paths):
        files += _files(path, "*pope*.json*", "POPE's question files")
    for file in sorted(files, key=lambda file: [split not in file.name for split in SPLITS]):
        split = _split(file) or file.stem
        if split in found:
            raise UserError(f"{file} is a second file of the split {split}: two versions of it are in "
                            "circulation (2,910 and 3,000 questions); give one of them by its name")
        found[split] = records(file, ("question_id", "image", "text", "label"), "POPE question file")
    return found


def _split(file):
    return next((split for split in SPLITS if split in Path(file).name), None)


def amber_queries(path):
    """The queries of a file, or of a folder: the generative ones, then the discriminative ones."""
    names = ("query_generative.json", "query_discriminative.json")
    files = [path / name for name in names if (path / name).exists()]
    found = []
    for file in files or _files(path, "query_all.json", "AMBER's queries"):
        found += records(file, ("id", "image", "query"), "AMBER query file")
    return found


def _files(path, pattern, what):
    if not path.is_dir():
        return [path]
    if not (found := sorted(path.glob(pattern))):
        raise UserError(f"{path} holds no {pattern}; give the folder that holds {what}")
    return found


def questions(benchmark, paths, images=None, prompt="{question}"):
    """[Question] of a benchmark's file or folder (POPE: or several files).

    images: the folder that holds the images; None where they lie beside the questions.
    prompt: what is asked, with {question} for the benchmark's own text. Raises UserError for a wrong file and
    where images are missing, which is found before a model is loaded.
    """
    if "{question}" not in prompt:
        raise UserError(f"--prompt {prompt!r} has no {{question}}; put it where the question goes")
    if len(paths) > 1 and benchmark != "pope":
        raise UserError(f"--data {' '.join(map(str, paths))}: {benchmark} has one file or one folder; give "
                        "that")
    read = {"pope": _pope, "amber": _amber, "objhal": _objhal, "mmhal": _mmhal}[benchmark]
    found = []
    for question in read(paths):
        found.append(question._replace(prompt=prompt.replace("{question}", question.prompt)))
    path = Path(paths[0])
    root = images or (path if path.is_dir() else path.parent)
    named = [place for place, question in enumerate(found) if isinstance(question.image, dict)]
    images, missing = find_images(root, [found[place].image for place in named]), []
    for place, image in zip(named, images, strict=True):
        if image is None:
            missing += image_names(found[place].image)[:1] or ["one without a name"]
        found[place] = found[place]._replace(image=image)
    if missing:
        raise UserError(f"{root} lacks {len(missing)} of {len(named)} images (first: {missing[0]}); give "
                        "their folder with --images")
    return found


# Each yields Questions; the image is base64, or the record in which its names are.
def _pope(paths):
    for split, rows in pope_questions(paths).items():
        for row in rows:
            line = {"question_id": row["question_id"], "split": split, "image": row["image"],
                    "question": row["text"], "label": row["label"]}
            yield Question(line, row["text"], row)


def _amber(paths):
    for row in amber_queries(Path(paths[0])):
        yield Question({"id": row["id"], "image": row["image"], "question": row["query"]}, row["query"], row)


def _objhal(paths):
    for place, row in enumerate(records(paths[0], (), "question file")):
        text = _first_text(row, "question", "prompt", "text")
        image = _first_text(row, "image", "image_path") or ""
        image_id = row.get("image_id", image if len(image) < NAME else None)
        if digits := re.fullmatch(r"(?:.*/)?(?:COCO_\w+2014_)?(\d{1,12})(?:\.\w+)?", str(image_id)):
            image_id = int(digits[1])
        if text is None or image_id is None:
            raise UserError(f"{paths[0]}, record {place + 1} has no question or no image, so this is no file "
                            "of questions about images; give the right file")
        line = {"question_id": row.get("question_id", place), "image_id": image_id, "question": text}
        source = row | {"image_id": image_id}
        if image.startswith("data:") or len(image) > NAME:
            source = image.rpartition(",")[2].encode()
        yield Question(line, text, source)


def _first_text(row, *keys):
    return next((row[key] for key in keys if isinstance(row.get(key), str)), None)


def _mmhal(paths):
    keys = ("question_type", "image_id", "image_src", "image_content", "question", "gt_answer")
    for place, row in enumerate(records(paths[0], keys, "MMHal-Bench template")):
        line = {"question_id": place} | {key: row[key] for key in row if key not in ("image", "model_answer")}
        yield Question(line, row["question"], line)


def image_names(line):
    """The names under which the image of a question or an answer may lie in a folder, the likeliest first."""
    names = [line[key] for key in ("image", "image_path") if isinstance(line.get(key), str)]
    if isinstance(line.get("image_src"), str):              # MMHal; its archive numbers the files: 00_name
        name = line["image_src"].rpartition("/")[2]
        names += [f"{line.get('image_id')}.{end}" for end in ("jpg", "png", "jpeg")]
        names += [name, f"*_{name}"]
    elif isinstance(line.get("image_id"), int):
        names += [f"COCO_val2014_{line['image_id']:012d}.jpg", f"{line['image_id']:012d}.jpg"]
    return names


def find_images(root, lines):
    """The path of each line's image, or None: the first of its names that is a file in the folder."""
    if not os.path.isdir(root):
        raise UserError(f"--images {root} is no folder; give the one that holds the images")
    listed = sorted(os.listdir(root)) if any("image_src" in line for line in lines) else []
    found = []
    for line in lines:
        paths = []
        for name in image_names(line):
            if name.startswith("*"):
                name = next((other for other in listed if other.endswith(name[1:])), name)
            paths.append(data.inside(root, name, "the image of a question"))
        found.append(next(filter(os.path.isfile, paths), None))
    return found


# ---- for scoring ----
def read_answers(paths):
    """The lines of one answers file or of several, ours or as the official scripts take them.

    Of several files, each holds one split of POPE, told by its name. A last line that a killed run left torn
    is passed over: the answer is missing, and whoever scores counts what is missing.
    """
    found = []
    for path in paths:
        lines = data.read_records(path)
        for number, line in enumerate(lines, 1):
            if _is_question(line):
                raise UserError(f"{path}, record {number} is a question, not an answer; give the answers")
        if lines and all(line.get("model_answer") == "" for line in lines):
            raise UserError(f"{path} is a template that nobody has filled in: every model_answer is empty; "
                            "give the answers")
        split, several = _split(path), len(paths) > 1
        if several and not split and not all(line.keys() & {"split", "settings"} for line in lines):
            raise UserError(f"{path}: of several answers files, each needs the name of its split "
                            f"({', '.join(SPLITS)}) in its own; rename it")
        for line in lines:
            if "caption" in line:                                                 # the first CHAIR's own form
                line = {"text": line["caption"], **line}
            if several and "settings" not in line:
                line = {"split": split, **line}
            found.append(line)
    return found


def _is_question(line):
    """A `text` is a question in some files, an answer in others: questions must not be scored as answers."""
    return {"image", "text"} <= line.keys() and not {"answer", "response", "question", "prompt"} & line.keys()


def amber_data(folder):
    """-> (queries or [], annotations, relation, safe words) of AMBER's data folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--data {folder} is no folder; give AMBER's data folder")
    queries = amber_queries(folder) if any(folder.glob("query_*.json")) else []
    annotations = records(folder / "annotations.json", ("id", "type", "truth"), "annotations of AMBER")
    safe = [word.strip() for word in data.read_text(folder / "safe_words.txt").split("\n") if word.strip()]
    return queries, annotations, data.read_json(folder / "relation.json", kind=dict), safe


def amber_nouns(path):
    """{id: nouns} of a file of nouns that were extracted before: lines {id, nouns or nouns_in_vocab}."""
    found = {}
    for number, line in enumerate(data.read_records(path, torn_ok=False), 1):
        named = line.get("nouns", line.get("nouns_in_vocab"))
        if "id" not in line or not isinstance(named, list):
            raise UserError(f"{path}, record {number} has no id or no list of `nouns`: this is no file of "
                            "nouns; give builtin, nltk, or such a file")
        if line["id"] in found:
            raise UserError(f"{path}: id {line['id']} is there twice; keep one of the two")
        found[line["id"]] = named
    return found


def lemmas(path):
    """-> a function text -> its words in the singular, by a JSON file {word: singular}."""
    table = data.read_json(path, kind=dict)
    if not all(isinstance(single, str) for single in table.values()):
        raise UserError(f"{path} is no table of words (a value is no string); give builtin, nltk or such a "
                        "table")
    return lambda text: [table.get(word, word) for word in nouns.tokens(text.lower())]


def coco(folder, images):
    """-> ([instances], [captions]) of COCO's 2014 train and val files, cut down to what these images need.

    Nothing but ids, names and captions is kept: train's outlines alone would take gigabytes.
    """
    def slim(part):
        image = part.get("image_id", part.get("id") if "file_name" in part else None)
        if image is not None and image not in images:
            return None
        return {key: part[key] for key in KEPT if key in part}

    found = {"instances": [], "captions": []}
    paths = [(kind, Path(folder) / f"{kind}_{split}2014.json")
             for kind in found for split in ("val", "train")]
    for _, path in paths:
        if not path.exists():
            raise UserError(f"{path} is missing; --annotations needs COCO's instances and captions, of "
                            "train2014 and of val2014")
    for kind, path in paths:
        part = {"categories": []} | data.read_json(path, kind=dict, object_hook=slim)
        for key in ("images", "annotations"):
            part[key] = list(filter(None, part.get(key, [])))
        found[kind].append(part)
    return found["instances"], found["captions"]


# ---- for the official scripts ----
MMHAL = ("question_type", "question_topic", "image_id", "image_src", "image_content", "question", "gt_answer")
EXPORTS = {"pope": {"question_id": "question_id", "question": "question", "answer": "answer"},
           "amber": {"id": "id", "answer": "response"},
           "objhal": {"question_id": "question_id", "image_id": "image_id", "question": "prompt",
                      "answer": "text"},
           "mmhal": {key: key for key in MMHAL} | {"answer": "model_answer"}}      # {our key: theirs}


def export(benchmark, answers):
    """Our answers as the text of a file that the benchmark's own script reads."""
    lines = []
    for line in answers:
        for key in EXPORTS[benchmark]:
            if key not in line:
                raise UserError(f"the answers have no {key!r}: they are no answers to {benchmark}; give what "
                                "`answers` wrote")
        lines.append({theirs: line[ours] for ours, theirs in EXPORTS[benchmark].items()})
    if benchmark in ("amber", "mmhal"):
        return json.dumps(lines, ensure_ascii=False, indent=1) + "\n"
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
