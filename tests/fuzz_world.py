"""The sound inputs that tests/fuzz.py spoils, small and always the same: build(folder) writes them.

All paths are relative to the folder, which is the working directory of everything that is run, and the clock
of the training runs is a counter: a seed gives the same input in every place.
"""
import itertools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from unittest import mock

from conftest import picture, write_llava
from PIL import Image
from test_records import PUBLISHED

import data
import eval_hallu
import synth
import train_dpo

OUT = "case/out"                                             # of every command: the runs' options agree
STEPS = "--batch 2 --micro_batch 2 --epochs 2 --lora_r 2 --lr 1e-2 --set save_every=1 --set workers=1"
TRAIN = f"--model llava15 --data pairs.jsonl {STEPS}"
SYNTH = (f"--out {OUT} --preset pds-dpo --prompts topics --instruct questions.txt --device cpu "
         "--scorer length --margin 0 --responders replies/one.ours.jsonl,replies/two.ours.jsonl")
IMAGES = ("png", "jpg", "webp", "gif", "bmp", "tiff", "ppm", "ico", "tga", "jp2", "pcx", "sgi")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
SAID = ("a red dog and a cat .", "there is no dog .", "yes , a blue dog", "no", "a cat there", "two red cat")


def build(folder):
    """Write everything into the folder, which becomes the working directory."""
    os.chdir(folder)
    clock = itertools.count()
    with mock.patch("time.monotonic", clock.__next__):
        pictures()
        models()
        records()
        training()
    pope()
    amber()
    mmhal()
    chair()
    classroom()
    votes()
    synthesis()


def write(path, value):
    """JSON, or JSON lines where the name says so."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in value)
    path.write_text(text)


# ---- what is read ----
def pictures():
    for name in ("pictures", "coco"):
        Path(name).mkdir()
    for k, kind in enumerate(IMAGES):
        picture(k, (36, 24)).save(f"pictures/{k}.{kind}")
    for mode in ("L", "P", "LA", "RGBA", "1"):
        picture(9, (36, 24)).convert(mode).save(f"pictures/{mode}.png")
    Image.new("I;16", (36, 24)).save("pictures/I16.png")
    picture(9, (36, 24)).convert("CMYK").save("pictures/cmyk.jpg")
    Path("pictures/eps.png").write_bytes(EPS)
    for k in range(4):
        picture(k, (36, 24)).save(f"coco/COCO_val2014_{k:012}.jpg")


def models():
    from rehearse import TINY, write_original
    from test_synth import write_llava_next
    write_llava(Path("llava15"), hidden=16)
    write_llava_next(Path("llava16"))
    write_original("bunny", "bunny", sizes=TINY["bunny"], shard=1 << 14)


def records():
    """data/: three records of every published format; pairs.jsonl, which is trained on."""
    Path("images/VG_100K").mkdir(parents=True)
    for name in ("a.png", "VG_100K/7.jpg", "VG_100K/07.jpg"):
        picture(0, (36, 24)).save(f"images/{name}")
    two = ["a.png", "a.png"]
    more = {"history": [["what ?", "a dog"]], "image": two, "image_rejected": two, "meta": {"of": 1}}
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(
        ("<image> what ?", "a dog", "sure ?", "A dog.", "<image> is it red ?", "no", "why ?", "A cat."))]
    apart = {"id": "t", "messages": turns[:4], "rejected_messages": turns[4:], "images": ["a.png"]}
    for name, record in {**PUBLISHED, "history": PUBLISHED["native"] | more, "turns": apart}.items():
        text = json.dumps(record).replace("A dog.", "a dog .").replace("A cat.", "a cat .")      # tokens
        rows = [json.loads(text) for _ in range(3)]
        for k, row in enumerate(rows):
            if isinstance(row.get("id"), str):
                row["id"] += str(k)
        write(f"data/{name}.jsonl", rows)
    descriptions = {"chosen": ["a dog", "a red dog"], "rejected": ["a cat", "no cat"]}
    write("data/described.json", {"7": descriptions, "07": descriptions})
    rows = []
    for k, said in enumerate(SAID[:4]):
        rows.append({"id": f"p{k}", "image": f"pictures/{k}.{IMAGES[k]}", "question": "what is this ?",
                     "chosen": said, "rejected": SAID[(k + 1) % 4]})
    write("pairs.jsonl", rows)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    for row, image in zip(rows, ("a.png", {"bytes": Path("images/a.png").read_bytes()}), strict=False):
        table = pyarrow.Table.from_pylist([row | {"image": image}])
        pyarrow.parquet.write_table(table, f"data/{type(image).__name__}.parquet")


# ---- training runs ----
def training():
    """runs/whole, finished; runs/half and runs/early, of steps 2 and 1; runs/other, of another seed."""
    Path("runs").mkdir()
    for name, steps, more in (("whole", 9, ""), ("half", 2, ""), ("early", 1, ""), ("other", 2, "--seed 7")):
        train(f"{TRAIN} --out {OUT} {more}".split(), steps)
        shutil.move(OUT, f"runs/{name}")
    shutil.copytree("runs/whole/adapter", "adapter")


def train(argv, steps):
    """A training run that is asked to stop so that its checkpoint is of this step; of 4 steps in all."""
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
            assert steps > 4


# ---- evaluation: questions, answers, and replies of judges ----
def pope():
    rows = []
    for k in range(4):
        rows.append({"question_id": k, "image": f"COCO_val2014_{k:012}.jpg", "label": ("yes", "no")[k % 2],
                     "text": "Is there a dog in the image?"})
    write("lines.jsonl", rows)
    Path("pope").mkdir()
    Path("lines.jsonl").rename("pope/coco_pope_random.json")
    said = [row | {"question": row["text"]} for row in rows]
    for row in said:
        del row["text"]
    write("pope.a.jsonl", [row | {"answer": "Yes, there is."} for row in said])
    write("pope.b.jsonl", [row | {"answer": ("No.", "Yes")[k % 2]} for k, row in enumerate(said)])


def amber():
    kinds = ("generative", "discriminative-attribute-state", "discriminative-hallucination", "relation")
    notes = [{"id": k, "type": kind, "truth": "yes", "hallu": ["car"]} for k, kind in enumerate(kinds, 1)]
    notes[0]["truth"] = ["dog", "cat"]
    queries = [{"id": k, "image": f"{k}.jpg", "query": "Describe this image."} for k in range(1, 5)]
    write("amber/annotations.json", notes)
    write("amber/query_generative.json", queries[:1])
    write("amber/query_discriminative.json", queries[1:])
    write("amber/relation.json", {"dog": ["puppy"], "cat": [], "car": ["truck"]})
    Path("amber/safe_words.txt").write_text("man\nwoman\n")
    said = enumerate(("A dog and a car.", "Yes", "No", "yes"), 1)
    write("amber.jsonl", [{"id": k, "response": text} for k, text in said])


def mmhal():
    template = []
    for k in range(4):
        template.append({"question_type": "attribute", "image_id": f"i{k}", "image_src": f"https://x/{k}.jpg",
                         "image_content": ["dog"], "question": "What is this?", "gt_answer": "A dog."})
    write("mmhal/template.json", template)
    write("mmhal.jsonl", [{"question_id": k, "answer": "A dog."} for k in range(4)])
    replied("judge", range(4), [f"They agree. Rating: {k + 2}" for k in range(4)])


def chair():
    images = [{"id": k, "file_name": f"COCO_val2014_{k:012}.jpg"} for k in range(4)]
    objects = [{"image_id": k, "category_id": 1} for k in range(4)]
    captions = [{"image_id": 0, "id": 1, "caption": "A cat sits."}]
    for part in ("val", "train"):
        instances = {"categories": [{"id": 1, "name": "dog"}], "annotations": objects, "images": images}
        write(f"annotations/instances_{part}2014.json", instances)
        write(f"annotations/captions_{part}2014.json", {"annotations": captions, "images": images})
    Path("synonyms.txt").write_text("dog, puppy\ncat, kitten\nperson, man\n")
    said = {"question": "Describe it.", "answer": "There is a dog and a cat on the mat."}
    write("chair.jsonl", [{"question_id": k, "image_id": k, **said} for k in range(4)])
    replied("extractor", range(4), ['["dog", "cat"]', "['puppy']", "[]", '["dog"]'])


def classroom():
    yes = {"choices": ["yes", "no"], "set": "random"}
    asked = [("caption", {"present": ["dog"], "absent": ["cat"]}, "a cat"),
             ("colour", {"answer": "red", "choices": ["red", "blue"]}, "red"),
             ("existence", {"answer": "yes", **yes}, "yes"),
             ("existence", {"answer": "no", **yes, "set": ["random", "adversarial"]}, "yes")]
    rows = [{"settings": {"benchmark": "classroom", "questions": 4, "scenes": "scenes.jsonl"}}]
    for k, (kind, truth, said) in enumerate(asked):
        rows.append({"id": f"s{k}", "image": f"{k}.png", "kind": kind, "question": "what ?", "truth": truth,
                     "answer": said})
    write("classroom.jsonl", rows)


def votes():
    words = "compare pope.a.jsonl pope.b.jsonl --images coco --out page.html"
    eval_hallu.run_compare(eval_hallu.parse(words.split()))
    page = json.loads(re.search(r'id="data">(.*?)</script>', Path("page.html").read_text(), re.DOTALL)[1])
    for rater in ("ann", "bob"):
        chosen = [{"item": k, "choice": "first", "seconds": 1.5} for k in range(len(page["items"]))]
        write(f"votes-{rater}.json", {"rater": rater, "page": page["page"], "key": page["key"],
                                      "of": len(chosen), "votes": chosen})


def replied(name, ids, texts):
    """Saved replies in the three forms that are read: ours, a server's, the Batch API's."""
    ours, servers, batch = [], [], []
    for id, text in zip(ids, texts, strict=True):
        servers.append({"choices": [{"message": {"content": text}}]})
        ours.append({"id": str(id), "reply": text})
        batch.append({"custom_id": str(id), "response": {"body": servers[-1]}})
    write(f"replies/{name}.ours.jsonl", ours)
    write(f"replies/{name}.server.json", servers)
    write(f"replies/{name}.batch.jsonl", batch)


# ---- synthesis ----
def synthesis():
    """synth/: a run with every stage's files and journals; the images and their ranks are made here."""
    Path("topics").mkdir()
    for topic in ("cats", "bikes"):
        Path(f"topics/{topic}.txt").write_text(f"a red {topic} and a dog\na {topic} and no bike at all\n")
    Path("questions.txt").write_text("what is this ?\nis there a dog ?\n")
    out = Path(OUT)
    with mock.patch("time.time", itertools.count().__next__):
        synth.main(["prompts", *SYNTH.split()])
        prompts = list(data.read_jsonl(out / "prompts.jsonl"))
        images, ranked = [], []
        for number, row in enumerate(prompts):
            id, here = row["id"], []
            for k in range(2):
                here.append({"id": f"{id}-{k}", "prompt_id": id, "guidance": 5. + k, "seed": k,
                             "image": f"images/{id}-{k}.png"})
                picture(number, (24, 24)).save(out / here[k]["image"])
            tried = [{name: one[name] for name in ("image", "guidance", "seed")} for one in here]
            best = {"image": here[1]["image"], "guidance": here[1]["guidance"], "dropped": None}
            scores = {"imagereward": [.5, 1. + number], "clip": [1., .5]}
            own = {name: row[name] for name in ("id", "topic", "prompt")}
            ranked.append(own | best | {"scores": scores, "candidates": tried})
            images += here
        write(out / "images.jsonl", images)
        write(out / "ranked.jsonl", ranked)
        ids = [row["id"] for row in prompts]
        replied("one", ids, SAID[:len(ids)])
        replied("two", ids, SAID[-len(ids):])
        replied("writer", [f"cats/{k}" for k in range(3)], ["1. a cat\n2. two cat\n- a dog"] * 3)
        for stage in ("instruct", "respond", "score", "pairs", "analyse"):
            synth.main([stage, *SYNTH.split()])
    shutil.move(out, "synth")
