"""The sound inputs that tests/fuzz.py spoils, small and always the same: build(folder) writes them.

All paths are relative to the folder, which is the working directory of everything that is run, and the
clock of the training runs is a counter: a seed gives the same input in every place.
"""
import base64
import itertools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

from conftest import picture, word_tokenizer, write_llava
from PIL import Image
from test_records import PUBLISHED

import data
import synth
import train_dpo
from evaluation import compare
from synthesis import pairing
from training import plan

TRAIN = ["--model", "llava15", "--data", "pairs.jsonl", "--batch", "2", "--micro_batch", "2", "--epochs", "2",
         "--lora_r", "2", "--lr", "1e-2", "--set", "save_every=1", "--set", "workers=1"]
IMAGES = ("png", "jpg", "webp", "gif", "bmp", "tiff", "ppm", "ico", "tga", "jp2", "pcx", "sgi")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
SAID = ("a red dog and a cat .", "there is no dog .", "yes , a blue dog", "no", "a cat on there", "two red cat and one dog")


def build(folder):
    """Write everything into the folder, which becomes the working directory."""
    os.chdir(folder)
    clock = itertools.count()
    with mock.patch("time.monotonic", clock.__next__), mock.patch.object(plan, "peak", return_value=1.0):
        pictures()
        models()
        records()
        training()
    evaluation()
    synthesis()


def write(path, value):
    """JSON, or JSON lines where the name says so."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        path.write_text(json.dumps(value, indent=1))


# ---- what is read ----
def pictures():
    for name in ("pictures", "coco"):
        Path(name).mkdir()
    for k, kind in enumerate(IMAGES):
        picture(k, (36, 24)).save(f"pictures/{k}.{kind}")
    for mode in ("L", "P", "LA", "RGBA", "1", "I;16"):
        image = picture(9, (36, 24))
        image = Image.new(mode, (36, 24)) if mode == "I;16" else image.convert(mode)
        image.save(f"pictures/{mode.replace(';', '')}.png")
    picture(9, (36, 24)).convert("CMYK").save("pictures/cmyk.jpg")
    Path("pictures/eps.png").write_bytes(EPS)
    for k in range(4):
        picture(k, (36, 24)).save(f"coco/COCO_val2014_{k:012}.jpg")


def models():
    from rehearse import TINY, write_original
    from test_synth import write_llava_next
    write_llava(Path("llava15"), hidden=16)
    write_llava_next(Path("llava16"))
    with mock.patch.object(sys, "stderr", open(os.devnull, "w")):
        write_original("bunny", "bunny", sizes=TINY["bunny"], shard=1 << 14)
    word_tokenizer().save_pretrained("words")


def records():
    """data/FORMAT.jsonl: three of every published format."""
    Path("images/VG_100K").mkdir(parents=True)
    picture(0, (36, 24)).save("images/a.png")
    picture(0, (36, 24)).save("images/VG_100K/7.jpg")
    published = PUBLISHED | {"history": PUBLISHED["native"] | {"history": [["what ?", "a dog"]], "image": ["a.png", "a.png"],
                                                               "image_rejected": ["a.png", "a.png"], "meta": {"of": 1}}}
    for name, record in published.items():
        rows = []
        for k in range(3):
            row = json.loads(json.dumps(record))
            if isinstance(row.get("id"), str):
                row["id"] += str(k)
            rows.append(row)
        write(f"data/{name}.jsonl", rows)
    encoded = base64.b64encode(Path("images/a.png").read_bytes()).decode()
    write("data/bytes.jsonl", [PUBLISHED["rlaif-v"] | {"image": {"bytes": encoded, "path": "a.png"}}] * 2)
    descriptions = {"chosen": ["a dog", "a red dog"], "rejected": ["a cat", "no cat"]}
    write("data/described.json", {"7": descriptions, "07": descriptions})
    rows = [{"id": f"p{k}", "image": f"{k}.{IMAGES[k]}", "question": "what is this ?", "chosen": said,
             "rejected": SAID[(k + 1) % 4]} for k, said in enumerate(SAID[:4])]
    write("pairs.jsonl", [row | {"image": f"pictures/{row['image']}"} for row in rows])
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), "data/native.parquet")


# ---- training runs ----
def training():
    """runs/whole, finished; runs/half and runs/early, stopped behind steps 2 and 1; runs/other, of another seed."""
    for name, steps, more in (("whole", 9, []), ("half", 2, []), ("early", 1, []), ("other", 2, ["--seed", "7"])):
        case = Path("case/out")                              # where every case has its run: the options agree
        train([*TRAIN, *more, "--out", str(case)], steps)
        shutil.move(case, f"runs/{name}") if Path("runs").mkdir(exist_ok=True) is None else None
    shutil.copytree("runs/whole/adapter", "adapter")


def train(argv, steps):
    """A training run that is asked to stop so that its checkpoint is of this step."""
    taken = []

    def step(run, t, real=train_dpo.step):
        taken.append(t)
        if len(taken) == steps:
            os.kill(os.getpid(), signal.SIGTERM)             # heard within this step
        return real(run, t)

    sys.argv = ["train_dpo.py", *argv]
    with mock.patch.object(train_dpo, "step", step):
        try:
            train_dpo.main()
        except SystemExit as end:
            assert "stopped" in str(end.code), end.code
        else:
            assert steps == 9


# ---- evaluation ----
def evaluation():
    names = [f"COCO_val2014_{k:012}.jpg" for k in range(4)]
    asked = [{"question_id": k, "image": name, "text": "Is there a dog in the image?", "label": ("yes", "no")[k % 2]}
             for k, name in enumerate(names)]
    write("pope/coco_pope_random.json", 0) or write("pope/coco_pope_random.jsonl", asked)
    Path("pope/coco_pope_random.jsonl").replace("pope/coco_pope_random.json")
    said = [{"question_id": row["question_id"], "image": row["image"], "question": row["text"], "label": row["label"]}
            for row in asked]
    write("pope.a.jsonl", [row | {"answer": "Yes, there is."} for row in said])
    write("pope.b.jsonl", [row | {"answer": ("No.", "Yes")[k % 2]} for k, row in enumerate(said)])

    kinds = ("generative", "discriminative-attribute-state", "discriminative-hallucination", "discriminative-relation")
    notes = [{"id": k + 1, "type": kind, "truth": ["dog", "cat"] if k == 0 else "yes", "hallu": ["car"]}
             for k, kind in enumerate(kinds)]
    write("amber/annotations.json", notes)
    write("amber/query_all.json", [{"id": k, "image": f"{k}.jpg", "query": "Describe this image."} for k in range(1, 5)])
    write("amber/relation.json", {"dog": ["puppy"], "cat": [], "car": ["truck"]})
    Path("amber/safe_words.txt").write_text("man\nwoman\n")
    write("amber.jsonl", [{"id": k + 1, "response": text} for k, text in enumerate(("A dog and a car.", "Yes", "No", "yes"))])

    template = [{"question_type": "attribute", "image_id": f"i{k}", "image_src": f"https://x/{k}.jpg",
                 "image_content": ["dog"], "question": "What is this?", "gt_answer": "A dog."} for k in range(4)]
    write("mmhal/template.json", template)
    write("mmhal.jsonl", [{"question_id": k, "answer": "A dog."} for k in range(4)])
    replies = [f"They agree. Rating: {k + 2}" for k in range(4)]
    replied("judge", list(range(4)), replies)

    for part in ("val", "train"):
        objects = [{"image_id": k, "category_id": 1} for k in range(4)]
        write(f"annotations/instances_{part}2014.json", {"categories": [{"id": 1, "name": "dog"}], "annotations": objects,
                                                         "images": [{"id": k, "file_name": names[k]} for k in range(4)]})
        write(f"annotations/captions_{part}2014.json", {"annotations": [{"image_id": 0, "id": 1, "caption": "A cat sits."}]})
    Path("synonyms.txt").write_text("dog, puppy\ncat, kitten\nperson, man\n")
    write("chair.jsonl", [{"question_id": k, "image_id": k, "question": "Describe it.",
                           "answer": "There is a dog and a cat on the mat."} for k in range(4)])
    replied("extractor", list(range(4)), ['["dog", "cat"]', "['puppy']", "[]", '["dog"]'])

    settings = {"benchmark": "classroom", "questions": 4, "scenes": "scenes.jsonl"}
    scenes = [("caption", {"present": ["dog"], "absent": ["cat"]}), ("colour", {"answer": "red", "choices": ["red", "blue"]}),
              ("existence", {"answer": "yes", "choices": ["yes", "no"], "set": "random"}),
              ("existence", {"answer": "no", "choices": ["yes", "no"], "set": ["random", "adversarial"]})]
    rows = [{"id": f"s{k}", "image": f"{k}.png", "kind": kind, "question": "what ?", "truth": truth, "answer": said}
            for k, ((kind, truth), said) in enumerate(zip(scenes, ("a cat", "red", "yes", "yes"), strict=True))]
    write("classroom.jsonl", [{"settings": settings}, *rows])
    compare.report("pope.a.jsonl", "pope.b.jsonl", Path("page.html"), Path("coco"))
    page = json.loads(re.search(r'id="data">(.*?)</script>', Path("page.html").read_text(), re.DOTALL)[1])
    for rater in ("ann", "bob"):
        votes = [{"item": k, "choice": "first", "seconds": 1.5} for k in range(len(page["items"]))]
        write(f"votes-{rater}.json", {"rater": rater, "page": page["page"], "key": page["key"], "of": len(votes),
                                      "votes": votes})


def replied(name, ids, texts):
    """Saved replies in the three forms that are read: ours, a server's, the Batch API's."""
    bodies = [{"choices": [{"message": {"content": text}}]} for text in texts]
    both = list(zip(ids, texts, bodies, strict=True))
    write(f"replies/{name}.ours.jsonl", [{"id": str(id), "reply": text} for id, text, _ in both])
    write(f"replies/{name}.server.json", bodies)
    write(f"replies/{name}.batch.jsonl", [{"custom_id": str(id), "response": {"body": body}} for id, _, body in both])


# ---- synthesis ----
def synthesis():
    """synth/: a run with every stage's files and journals; the images and their ranks are made here."""
    for topic in ("cats", "bikes"):
        text = "\n".join(f"a red {topic} and {end}" for end in ("a blue dog", "no bike at all"))
        Path("topics").mkdir(exist_ok=True)
        Path(f"topics/{topic}.txt").write_text(text + "\n")
    Path("questions.txt").write_text("what is this ?\nis there a dog ?\n")
    with mock.patch("time.time", itertools.count().__next__):
        synth.main(["prompts", *SYNTH])
        out = Path("synth")
        shutil.move("case/out", out)
        prompts = list(data.read_jsonl(out / "prompts.jsonl"))
        images, ranked = [], []
        for number, row in enumerate(prompts):
            here = [{"id": f"{row['id']}-{k}", "prompt_id": row["id"], "guidance": 5. + k, "seed": k,
                     "image": f"images/{row['id']}-{k}.png"} for k in range(2)]
            for image in here:
                picture(number, (24, 24)).save(out / image["image"])
            scores = {"imagereward": [0.5, 1.0 + number], "clip": [1.0, 0.5]}
            ranked.append(pairing.best_image(row, here, scores))
            images += here
        write(out / "images.jsonl", images)
        write(out / "ranked.jsonl", ranked)
        replied("writer", [f"cats/{k}" for k in range(3)], ["1. a cat\n2. two cat\n- a dog"] * 3)
        for name, shift in (("one", 0), ("two", 2)):
            replied(name, [row["id"] for row in prompts], [SAID[(k + shift) % 6] for k in range(len(prompts))])
        shutil.move(out, "case/out")
        for stage in ("instruct", "respond", "score", "pairs", "analyse"):
            synth.main([stage, *SYNTH])
    shutil.move("case/out", out)


SYNTH = ["--out", "case/out", "--preset", "pds-dpo", "--prompts", "topics", "--instruct", "questions.txt", "--device",
         "cpu", "--responders", "replies/one.ours.jsonl,replies/two.ours.jsonl", "--scorer", "length", "--margin", "0"]
