"""The published benchmarks' own files, for eval_hallu.py: questions as a model is asked them, and answers.

    questions("pope", ["coco/"], images="val2014/")   [Question(line, prompt, image)], ready for a model
    read_answers(["answers.jsonl"])                   their lines, ours or as the official scripts take them

No question, image or prompt of theirs is part of this repository: everything is read by path.

    pope     coco_pope_random.json ...          JSON lines {question_id, image, text, label}; or their folder;
             also lmms-lab/POPE's columns       {question_id, question, answer, image_source, category}
    amber    query_generative.json ...          list of {id, image, query}; or their folder: all 15,220
    objhal   obj_halbench_300_with_image.jsonl  {image (base64 or a name) or image_path, question, image_id};
             also LLaVA's question files        {question_id, image, text}: any captions over COCO images
    mmhal    mmhal-bench_answer_template.json   list of 96; images by image_id, or by the name in image_src
"""
if __name__ == "__main__":
    exit("A part of eval_hallu.py; run: python eval_hallu.py --help")

import base64
import os
from pathlib import Path
from typing import NamedTuple

import data
from data import UserError
from evaluation import objects
from evaluation.metrics import SPLITS
from evaluation.stats import first, image_number, once
from model import command
from model.command import NAME

ANSWER = command.fields("file of answers", image=(*NAME, None), image_id=(*NAME, None),
                        settings=({"questions": (int, None), "benchmark": (str, None)}, None))
KEPT = "annotations images categories image_id category_id caption id name".split()                # of COCO
HUBS = {"text": "question", "label": "answer", "image": "image_source", "split": "category"}  # lmms-lab/POPE
LONGEST = 300                                  # characters: anything longer is base64, not a file's name


class Question(NamedTuple):
    """What is written beside the answer; what the model is asked; the image: a path, or its file's bytes."""
    line: dict
    prompt: str
    image: object


# ---- questions ----
def records(path, what, named=dict, **shapes):
    """The records of a question file as `named` gives them, each with fields as command.fields takes them.
    Raises UserError."""
    found = [named(record) for record in data.read_records(path, torn_ok=False)]
    check = command.fields(what, **shapes)
    for number, record in enumerate(found, 1):
        check(record, f"{path}, record {number}")
    if not found:
        raise UserError(f"{path} is empty: it holds no {what}; copy it again")
    return found


def prompt(path, own, places):
    """The text of a prompt's file, or of our own. Raises UserError if a place occurs in it more or less often
    than in `places`."""
    text = command.read_text(path or Path(__file__).with_name(own))
    if any(text.count(place) != places.count(place) for place in places):
        raise UserError(f"{path} must hold {' '.join(places)}, where question and answer go; add them")
    return text


def pope_questions(paths):
    """{split: records} of POPE's question files, or of folders of them. A split's name is its records', or
    its file's."""
    found, homes = {}, {}
    for file in [file for path in paths for file in files(Path(path), "*pope*.json*")]:
        for row in records(file, "POPE question file", _popes, question_id=NAME, image=str, text=str,
                           label=str, split=(str, None)):
            split = row.get("split") or _split(file) or file.stem
            if homes.setdefault(split, file) != file:
                raise UserError(f"{file} is a second file of the split {split}: two versions of it are in "
                                "circulation (2,910 and 3,000 questions); give one of them by its name")
            found.setdefault(split, []).append(row)
    return dict(sorted(found.items(), key=lambda each: [split != each[0] for split in SPLITS]))


def _popes(row):
    """A question under POPE's own names."""
    return row if "label" in row else row | {ours: row.get(hubs) for ours, hubs in HUBS.items()}


def _split(file):
    return next((split for split in SPLITS if split in Path(file).name), None)


def amber_queries(path):
    """The queries of a file, or of a folder: the generative ones, then the discriminative ones."""
    found = []
    for file in reversed(files(path, "query_*ive.json")):
        found += records(file, "AMBER query file", id=NAME, image=str, query=str)
    return found


def files(path, pattern):
    """The files of a folder, or the one that a path names. Raises UserError if there are none."""
    found = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not found:
        raise UserError(f"{path} holds no {pattern}; give the folder that holds the questions")
    return found


def questions(benchmark, paths, images=None, prompt="{question}", follow_links=False):
    """[Question] of a benchmark's file or folder (POPE: or several files).

    images: the folder that holds the images; None if they lie beside the questions.
    prompt: what is asked, with {question} for the benchmark's own text. Raises UserError for a wrong file and
    where images are missing, which is found before a model is loaded.
    """
    if "{question}" not in prompt:
        raise UserError(f"--prompt {prompt!r} has no {{question}}; put it where the question goes")
    if len(paths) > 1 and benchmark != "pope":
        raise UserError(f"--data: {benchmark} has one file or one folder, not {len(paths)}; give that")
    read = {"pope": _pope, "amber": _amber, "objhal": _objhal, "mmhal": _mmhal,
            "classroom": _scenes}[benchmark]
    asked, path = list(read(paths)), Path(paths[0])
    root = images or (path if path.is_dir() else path.parent)
    there = find_images(root, [image for _, image in asked], follow_links)
    found = []
    for (line, image), file in zip(asked, there, strict=True):
        if file is None:
            name, *_ = image_names(image)
            raise UserError(f"{name} is missing: {root} lacks {there.count(None)} of {len(asked)} images "
                            f"(first: {name}); give their folder with --images")
        found.append(Question(line, prompt.replace("{question}", line["question"]), file))
    return found


# Each yields (a Question's line, its image): its file's bytes, or the record in which its names are.
def _pope(paths):
    for split, rows in pope_questions(paths).items():
        for row in rows:
            line = {"question_id": row["question_id"],
                    "split": split,
                    "image": row["image"],
                    "question": row["text"],
                    "label": row["label"]}
            yield line, row


def _amber(paths):
    for row in amber_queries(Path(paths[0])):
        yield {"id": row["id"], "image": row["image"], "question": row["query"]}, row


def _objhal(paths):
    for place, row in enumerate(records(paths[0], "question file")):
        text, image = first(row, "question", "prompt", "text"), first(row, "image", "image_path") or ""
        coded = len(image) > LONGEST
        image_id = row.get("image_id", None if coded else image)
        if image_id is None or not isinstance(text, str):
            raise UserError(f"{paths[0]}, record {place + 1} has no question or no image, so this is not a "
                            "file of questions about images; give another file")
        image_id = image_number(image_id) or image_id
        line = {"question_id": row.get("question_id", place), "image_id": image_id, "question": text}
        yield line, _decoded(image) if coded else row | {"image_id": image_id}


def _scenes(paths):
    file, = files(Path(paths[0]), "scenes.jsonl")
    for number, row in enumerate(records(file, "file of scenes", question=str, image=str), 1):
        objects.check_truth(row, f"{file}, line {number}")
        yield row, row


def truths(folder):
    """{a picture's path: {question: truth}} of a folder of scenes; {} where there is none. The truth of
    whatever else is asked is under None: the caption's."""
    found = {}
    if Path(folder, "scenes.jsonl").is_file():
        for line, question, path in questions("classroom", [folder]):
            known = found.setdefault(path, {})
            known[question] = line["truth"]
            if line["kind"] == "caption":
                known[None] = line["truth"]
    return found


def _decoded(image):
    with command.explained(f"an image in the question file, {image[:16]}..., is broken base64",
                           "copy the file again"):
        return base64.b64decode(image, validate=True)


def _mmhal(paths):
    rows = records(paths[0], "MMHal-Bench template", question_type=str, image_id=str, image_src=str,
                   image_content=[str], question=str, gt_answer=str)
    for place, row in enumerate(rows):
        line = {"question_id": place} | {key: row[key] for key in row if key not in ("image", "model_answer")}
        yield line, line


def image_names(line, listed=()):
    """The names under which the image of a question or an answer may lie in a folder, the likeliest first.

    listed: what the folder holds, since MMHal's archive numbers its files: 00_name.
    """
    names = [line[key] for key in ("image", "image_path") if isinstance(line.get(key), str)]
    names += [f"{name}.jpg" for name in names]                                              # the hub's
    if isinstance(line.get("image_src"), str):                                                       # MMHal's
        name = line["image_src"].rpartition("/")[2]
        names += [name, *(other for other in listed if other.endswith(f"_{name}"))]
    elif isinstance(line.get("image_id"), int):
        names += [f"COCO_val2014_{line['image_id']:012d}.jpg", f"{line['image_id']:012d}.jpg"]
    return names or ["one without a name"]


def find_images(root, lines, follow_links):
    """The path of each line's image, or None: the first of its names that is a file in the folder. A line
    that is the image itself, as bytes, stays. follow_links: as data.inside has it."""
    if not os.path.isdir(root):
        raise UserError(f"--images {root} is not a folder; give the one that holds the images")
    listed, found = sorted(os.listdir(root)), []
    for line in lines:
        if isinstance(line, bytes):
            found.append(line)
            continue
        paths = (data.inside(root, name, "the image of a question", follow_links)
                 for name in image_names(line, listed))
        found.append(next(filter(os.path.isfile, paths), None))
    return found


# ---- for scoring ----
def read_answers(paths):
    """The lines of one answers file or of several, ours or as the official scripts take them.

    A file that has the name of a split of POPE holds answers to that; of several files, each must have one.
    A last line that a killed run left torn is passed over: its answer counts as missing.
    """
    found = []
    for path in paths:
        lines, split = data.read_records(path, check=ANSWER), _split(path)
        if lines and all(line.get("model_answer") == "" for line in lines):
            raise UserError(f"{path} is a template that nobody has filled in: every model_answer is empty; "
                            "give the answers")
        for number, line in enumerate(lines, 1):
            if _is_question(line):
                raise UserError(f"{path}, record {number} is a question, not an answer; give the answers")
            if not line.keys() & {"split", "category", "settings"}:
                if split:
                    line = {"split": split, **line}
                elif len(paths) > 1:
                    raise UserError(f"{path}: of several answers files, each needs the name of its split "
                                    f"({', '.join(SPLITS)}) in its own; rename it")
            found.append(line)
    return found


def _is_question(line):
    """A `text` is a question in some files, an answer in others: questions must not be scored as answers."""
    return {"image", "text"} <= line.keys() and not {"answer", "response", "question", "prompt"} & line.keys()


def amber_data(folder):
    """-> (queries or [], annotations, relation, safe words) of AMBER's data folder."""
    queries = amber_queries(folder) if any(folder.glob("query_*.json")) else []
    annotations = records(folder / "annotations.json", "annotations of AMBER", id=NAME, type=str,
                          truth=(str, [str]), hallu=([str], None))
    relation = data.read_json(folder / "relation.json", check=data.as_record)
    if not command.fits(relation, {str: [str]}):
        raise UserError(f"{folder}/relation.json is not AMBER's, a list of words for each; copy it again")
    safe = command.read_text(folder / "safe_words.txt").split("\n")
    return queries, annotations, relation, set(map(str.strip, safe))


def amber_nouns(path):
    """{id: nouns} of a file of nouns that were extracted before: lines {id, nouns or nouns_in_vocab}."""
    rows = records(path, "file of nouns", lambda row: row | {"nouns": first(row, "nouns", "nouns_in_vocab")},
                   id=NAME, nouns=[str])
    once([row["id"] for row in rows], f"captions of {path}")
    return {row["id"]: row["nouns"] for row in rows}


def coco_truth(folder, answers, table, lemmatize):
    """-> {image id: the classes in it} of the images that the answers are about, by CHAIR's rule: those of
    COCO's instances, and those that its captions name, in its train and val files of 2014.

    table: objects.synonyms. lemmatize: as for metrics.chair.
    """
    images, truth = {image_number(first(line, "image_id", "image")) for line in answers}, {}

    def slim(part):             # nothing but ids, names and captions: train's outlines would take gigabytes
        return {key: part[key] for key in KEPT if key in part}

    for name in "instances_val instances_train captions_val captions_train".split():
        path = Path(folder) / f"{name}2014.json"
        part = data.read_json(path, check=data.as_record, object_hook=slim)
        with command.explained(f"{path} is not COCO's", "copy it again"):
            names = {category["id"]: category["name"] for category in part.get("categories", [])}
            for image in images.intersection(image["id"] for image in part["images"]):
                truth.setdefault(image, set())
            for mark in part["annotations"]:
                found = truth.get(mark["image_id"])
                if found is None:
                    continue
                if "caption" in mark:
                    named = objects.coco_objects(objects.joined(lemmatize(mark["caption"]), table), table)
                    found.update(kind for _, kind in named)
                    continue
                name = names.get(mark.get("category_id"))
                if name not in table:
                    raise UserError(f"COCO's category {name!r} is not among the synonyms; give the file of "
                                    "CHAIR or of Object HalBench")
                found.add(table[name])
    return truth
