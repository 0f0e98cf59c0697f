"""The published benchmarks' own files: questions as a model is asked them, answers as anyone wrote them.

    questions("pope", ["coco/"], images="val2014/")   [Question(line, prompt, image)], ready for a model
    export("amber", answers)                          what AMBER's own script reads

Apart from eval_hallu.py, since everything here is about other people's formats; imports no torch. No
question, image or prompt of theirs is part of this repository: everything is read by path.

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

SPLITS = ("random", "popular", "adversarial")
KEPT = ("annotations", "images", "categories", "image_id", "category_id", "caption", "id", "name")   # of COCO


class Question(NamedTuple):
    """What is written beside the answer; what the model is asked; the image as a path, or as base64 bytes."""
    line: dict
    prompt: str
    image: object


def read_image(image):
    """The image of a Question, upright and in RGB. Raises UserError where it cannot be read."""
    try:
        return data.read_image(base64.b64decode(image, validate=True) if isinstance(image, bytes) else image)
    except binascii.Error as error:
        raise data.UserError(f"an image in the question file, {image[:16].decode()}..., is broken base64 "
                             f"({error}); copy the file again") from error


# ---------------------------------------------------------------------------------------------- questions
def records(path, keys, what):
    """The records of a question file, each with these keys. Raises UserError that names another benchmark."""
    found = data.read_records(path, torn_ok=False)
    for number, record in enumerate(found, 1):
        if missing := [key for key in keys if record.get(key) is None]:
            raise data.UserError(f"{path}, record {number} has no {missing[0]!r}, so this is no {what}"
                                 f"{_guess(record)}; give the right file")
    if not found:
        raise data.UserError(f"{path} is empty: it holds no {what}; copy it again")
    return found


def _guess(record):
    kinds = {"an answers file": {"settings"}, "POPE's questions": {"text", "label"},
             "AMBER's queries": {"query"}, "AMBER's annotations": {"id", "type", "truth"},
             "MMHal's template": {"image_content", "gt_answer"}, "the classroom's scenes": {"kind", "truth"},
             "answers to AMBER": {"id", "response"}, "answers": {"answer"}}
    return next((f" but looks like {name}" for name, keys in kinds.items() if keys <= record.keys()), "")


def pope_questions(paths):
    """{split: records} of POPE's question files, or of folders of them. A split's name is its file's."""
    files = [file for path in paths for file in _files(Path(path), "*pope*.json*", "POPE's question files")]
    found = {}
    for file in sorted(files, key=lambda f: [s not in f.name for s in SPLITS]):
        split = next((s for s in SPLITS if s in file.name), file.stem)
        if split in found:
            raise data.UserError(f"{file} is a second file of the split {split}: two versions of it are in "
                                 "circulation (2,910 and 3,000 questions); give one of them by its name")
        found[split] = records(file, ("question_id", "image", "text", "label"), "POPE question file")
    return found


def amber_queries(path):
    """The queries of a file, or of a folder: the generative ones, then the discriminative ones."""
    names = ("query_generative.json", "query_discriminative.json")
    files = [Path(path) / name for name in names if (Path(path) / name).exists()]
    files = files or _files(Path(path), "query_all.json", "AMBER's queries")
    return [query for file in files for query in records(file, ("id", "image", "query"), "AMBER query file")]


def _files(path, pattern, what):
    if not path.is_dir():
        return [path]
    if not (found := sorted(path.glob(pattern))):
        raise data.UserError(f"{path} holds no {pattern}; give the folder that holds {what}")
    return found


def questions(benchmark, paths, images=None, prompt="{question}"):
    """[Question] of a benchmark's file or folder (POPE: or several files).

    images: the folder that holds the images; None where they lie beside the questions.
    prompt: what is asked, with {question} for the benchmark's own text. Raises UserError for a wrong file and
    where images are missing, which is found before a model is loaded.
    """
    path = Path(paths[0])
    if "{question}" not in prompt:
        raise data.UserError(f"--prompt {prompt!r} has no {{question}}; put it where the question goes")
    if len(paths) > 1 and benchmark != "pope":
        raise data.UserError(f"--data {' '.join(map(str, paths))}: {benchmark} has one file or one "
                             "folder; give that")
    read = {"pope": _pope, "amber": _amber, "objhal": _objhal, "mmhal": _mmhal}[benchmark]
    lines, texts, sources = zip(*read(paths if benchmark == "pope" else path), strict=True)
    places = [n for n, source in enumerate(sources) if isinstance(source, dict)]
    root, found = images or (path if path.is_dir() else path.parent), list(sources)
    for place, image in zip(places, find_images(root, [sources[n] for n in places]), strict=True):
        found[place] = image
    if missing := [n for n in places if found[n] is None]:
        first = (image_names(sources[missing[0]]) or ["one without a name"])[0]
        raise data.UserError(f"{root} lacks {len(missing)} of {len(places)} images (first: {first}); give "
                             "their folder with --images")
    return [Question(*row) for row in zip(lines, (prompt.replace("{question}", t) for t in texts), found,
                                          strict=True)]


# Each yields what is written beside an answer, the question, and the image: base64, or where its names stand.
def _pope(paths):
    for split, rows in pope_questions(paths).items():
        for row in rows:
            yield ({"question_id": row["question_id"], "split": split, "image": row["image"],
                    "question": row["text"], "label": row["label"]}, row["text"], row)


def _amber(path):
    for row in amber_queries(path):
        line = {"id": row["id"], "image": row["image"], "question": row["query"]}
        yield line, row["query"], row


def _objhal(path):
    for place, row in enumerate(records(path, (), "question file")):
        text = next((row[k] for k in ("question", "prompt", "text") if isinstance(row.get(k), str)), None)
        image = next((row[k] for k in ("image", "image_path") if isinstance(row.get(k), str)), "")
        image_id = row.get("image_id", image if len(image) < 300 else None)
        if digits := re.fullmatch(r"(?:.*/)?(?:COCO_\w+2014_)?(\d{1,12})(?:\.\w+)?", str(image_id)):
            image_id = int(digits[1])
        if text is None or image_id is None:
            raise data.UserError(f"{path}, record {place + 1} has no question or no image, so this is no "
                                 f"file of questions about images{_guess(row)}; give the right file")
        inside = image.startswith("data:") or len(image) > 300                  # longer than any file's name
        line = {"question_id": row.get("question_id", place), "image_id": image_id, "question": text}
        yield line, text, image.rpartition(",")[2].encode() if inside else {**row, "image_id": image_id}


def _mmhal(path):
    keys = ("question_type", "image_id", "image_src", "image_content", "question", "gt_answer")
    for place, row in enumerate(records(path, keys, "MMHal-Bench template")):
        line = {"question_id": place, **{k: row[k] for k in row if k not in ("image", "model_answer")}}
        yield line, row["question"], line


def image_names(line):
    """The names under which the image of a question or an answer may lie in a folder, the likeliest first."""
    names = [line[key] for key in ("image", "image_path") if isinstance(line.get(key), str)]
    if isinstance(line.get("image_src"), str):              # MMHal; its archive numbers the files: 00_name
        name = line["image_src"].rpartition("/")[2]
        names += [f"{line.get('image_id')}.{end}" for end in ("jpg", "png", "jpeg")]
        return [*names, name, f"*_{name}"]
    if isinstance(line.get("image_id"), int):
        names += [f"COCO_val2014_{line['image_id']:012d}.jpg", f"{line['image_id']:012d}.jpg"]
    return names


def find_images(root, lines):
    """The path of each line's image, or None: the first of its names that is a file in the folder."""
    root, listed = os.path.realpath(root), None
    if not os.path.isdir(root):
        raise data.UserError(f"--images {root} is no folder; give the one that holds the images")
    found = []
    for line in lines:
        for name in image_names(line):
            if name.startswith("*"):
                listed = sorted(os.listdir(root)) if listed is None else listed
                name = next((other for other in listed if other.endswith(name[1:])), name)
            path = os.path.realpath(os.path.join(root, name))
            if os.path.commonpath([root, path]) != root:
                raise data.UserError(f"image {name} leaves the folder {root}; move it inside")
            if os.path.isfile(path):
                found.append(path)
                break
        else:
            found.append(None)
    return found


# ---------------------------------------------------------------------------------------------- for scoring
def read_text(path):
    """A text file as it is. Raises UserError."""
    try:
        return Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise data.UserError(f"{path} could not be read ({error}); check the path") from error


def read_json(path, kind):
    """A JSON file that holds a list or an object. Raises UserError."""
    try:
        found = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise data.UserError(f"{path} could not be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise data.UserError(f"{path}: broken JSON ({error}); copy the file again") from error
    if not isinstance(found, kind):
        raise data.UserError(f"{path} holds a {type(found).__name__} where a {kind.__name__} is wanted; give "
                             "the right file")
    return found


def read_answers(paths):
    """The lines of one answers file or of several, ours or as the official scripts take them.

    Of several files, each holds one split of POPE, told by its name. A last line that a killed run left torn
    is passed over: the answer is missing, and whoever scores counts what is missing.
    """
    found = []
    for path in paths:
        lines = data.read_records(path)
        # A `text` is a question in some files, an answer in others: questions must not be scored as answers.
        if asked := next((n for n, line in enumerate(lines, 1) if {"image", "text"} <= line.keys() and not
                          {"answer", "response", "question", "prompt"} & line.keys()), 0):
            raise data.UserError(f"{path}, record {asked} is a question, not an answer; give the answers")
        if lines and all(line.get("model_answer") == "" for line in lines):
            raise data.UserError(f"{path} is a template that nobody has filled in: every model_answer is "
                                 "empty; give the answers")
        if any("caption" in line for line in lines):                              # the first CHAIR's own form
            lines = [{"text": line.get("caption"), **line} for line in lines]
        if len(paths) > 1:
            split = next((s for s in SPLITS if s in Path(path).name), None)
            if split is None and not all("split" in line for line in lines if "settings" not in line):
                raise data.UserError(f"{path}: of several answers files, each needs the name of its split "
                                     f"({', '.join(SPLITS)}) in its own; rename it")
            lines = [line if "settings" in line else {"split": split, **line} for line in lines]
        found += lines
    return found


def amber_data(folder):
    """-> (queries or [], annotations, relation, safe words) of AMBER's data folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise data.UserError(f"--data {folder} is no folder; give AMBER's data folder")
    queries = amber_queries(folder) if any(folder.glob("query_*.json")) else []
    annotations = records(folder / "annotations.json", ("id", "type", "truth"), "annotations of AMBER")
    safe = [word.strip() for word in read_text(folder / "safe_words.txt").split("\n") if word.strip()]
    return queries, annotations, read_json(folder / "relation.json", dict), safe


def amber_nouns(path):
    """{id: nouns} of a file of nouns that were extracted before: lines {id, nouns or nouns_in_vocab}."""
    found = {}
    for number, line in enumerate(data.read_records(path, torn_ok=False), 1):
        words = line.get("nouns", line.get("nouns_in_vocab"))
        if "id" not in line or not isinstance(words, list):
            raise data.UserError(f"{path}, record {number} has no id or no list of `nouns`: this is no "
                                 "file of nouns; give builtin, nltk, or such a file")
        if line["id"] in found:
            raise data.UserError(f"{path}: id {line['id']} stands there twice; keep one of the two")
        found[line["id"]] = words
    return found


def lemmas(path):
    """-> a function text -> its words in the singular, by a JSON file {word: singular}; or, for words that a
    tagger read in their context, {text: [its words]}, which has to hold every text, COCO's captions too."""
    table = read_json(path, dict)
    kinds = {kind for value in table.values() for kind in (type(value), *map(type, value))}
    if not (kinds <= {str} or kinds == {list, str} and all(isinstance(v, list) for v in table.values())):
        raise data.UserError(f"{path} is no table of words (a value is no string, or no list of strings "
                             "among lists); give builtin, nltk or such a table")
    texts = {" ".join(text.split()): words for text, words in table.items()}

    def found(text):
        if (text := " ".join(text.split())) not in texts:
            raise data.UserError(f"{path} holds no words of the text {text[:60]!r}; extract them again, of "
                                 "the answers and of COCO's captions")
        return texts[text]
    return found if list in kinds else lambda text: [table.get(w, w) for w in nouns.tokens(text.lower())]


def coco(folder, images):
    """-> ([instances], [captions]) of COCO's 2014 train and val files, cut down to what these images need.

    Nothing but ids, names and captions is kept: train's outlines alone would take gigabytes.
    """
    folder = Path(folder)

    def slim(part):
        image = part.get("image_id", part.get("id") if "file_name" in part else None)
        if image is not None and image not in images:
            return None
        return {key: part[key] for key in KEPT if key in part}
    kinds = {kind: [folder / f"{kind}_{split}2014.json" for split in ("val", "train")]
             for kind in ("instances", "captions")}
    if missing := [path for paths in kinds.values() for path in paths if not path.exists()]:
        raise data.UserError(f"{missing[0]} is missing; --annotations needs COCO's instances and captions, "
                             "of train2014 and of val2014")
    found = []
    for paths in kinds.values():
        found.append([])
        for path in paths:
            with open(path, "rb") as file:
                try:
                    part = json.load(file, object_hook=slim)
                except (ValueError, RecursionError) as error:
                    raise data.UserError(f"{path}: broken JSON ({error}); copy the file again") from error
            found[-1].append({"categories": part.get("categories", [])} | {
                key: [entry for entry in part.get(key, ()) if entry] for key in ("images", "annotations")})
    return found


def export(benchmark, answers):
    """Our answers as the text of a file that the benchmark's own script reads."""
    def pick(keys, line):
        if missing := [key for key in keys if key not in line]:
            raise data.UserError(f"the answers have no {missing[0]!r}: they are no answers to {benchmark}; "
                                 "give what `answers` wrote")
        return {new: line[old] for old, new in keys.items()}
    if benchmark == "pope":
        keys = {"question_id": "question_id", "question": "question", "answer": "answer"}
    elif benchmark == "amber":
        keys = {"id": "id", "answer": "response"}
    elif benchmark == "objhal":
        keys = {"question_id": "question_id", "image_id": "image_id", "question": "prompt", "answer": "text"}
    else:
        keys = {key: key for key in ("question_type", "question_topic", "image_id", "image_src",
                                     "image_content", "question", "gt_answer")} | {"answer": "model_answer"}
    lines = [pick(keys, line) for line in answers]
    if benchmark in ("amber", "mmhal"):
        return json.dumps(lines, ensure_ascii=False, indent=1) + "\n"
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
