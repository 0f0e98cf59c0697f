"""Make preference pairs from nothing but prompts: PDS-DPO's data engine (arXiv 2412.17417) in seven stages.

    python synth.py                                 all stages on the built-in world: two CPU cores, minutes
    python synth.py all --preset pds-dpo --out D --generator G --imagereward R --armorm A --responders M,N,O
    torchrun --nproc_per_node 8 synth.py all ...    the same files from eight GPUs
    python synth.py pairs --out D --margin 0.5      one stage again, with another setting
    python synth.py analyse --out D                 the paper's analyses, and gallery.html
    python train_dpo.py --loss dpo --data D/pairs.jsonl

Each stage reads the files before its own and writes one, a JSON object a line:
    prompts   prompts.jsonl       id number topic prompt                  from text files, or by --writer
    images    images.jsonl        id prompt_id guidance seed image        every scale of a prompt in one call
    rank      ranked.jsonl        id topic prompt image guidance scores   the best image; all scores are kept
    instruct  instructions.jsonl  id question                             template, text file or chat model
    respond   responses.jsonl     id model response finished              one model after another
    score     scores-NAME.jsonl   id model score (rewards gating)         armorm, clip, length or random
    pairs     pairs.jsonl         also pds_dpo.json, faults.jsonl, dropped.jsonl (what, why) and card.md

Kill it anywhere and call it again: parts/ holds what each stage has made, by a hash of all that it came from
(texts, images, model files, settings). What fits is kept, the rest is made, nothing twice (journal.py). Each
stage loads its models and frees them: generator, reward and responders are never in memory together.

Departures from the official pipeline; --as_official goes back on 1 to 4:
 1. Responders get their chat template and answer without an echo (official: raw text, its echo is scored).
 2. Faulty responses and near ties make no pair (pairing.py); official: first maximum against first minimum.
 3. Prompts whose best image scores below --threshold are left out, and counted.
 4. Responses keep their line breaks.
 5. Scales, seeds and texts stand in the files beside each image: nothing is matched by its place in a list.
"""
import dataclasses
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import chat
import data
import pairing
import topics
from data import UserError
from journal import bare, begin, file_hash, free, identity, key, work

HERE = Path(__file__).resolve().parent
# The published PDS-DPO prompts, as they are: no roles, no template.
RAW = ("{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> "
       "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}")
BUILT_IN, BASES = HERE / "classroom" / "synthesis", HERE / "classroom" / "models"


@dataclass
class Options:
    """The 24 options of the command line, and below what --set reaches."""
    out: str = ""                     # folder of the run; "": runs/synth-PRESET-sSEED
    preset: str = "classroom"         # classroom, or pds-dpo (the paper's settings, your models)
    prompts: str = ""                 # a text file, one prompt a line, or a folder of them, one a topic
    writer: str = ""                  # a chat model that writes them: a folder, a URL, or saved replies
    per_topic: int = 0                # at most so many prompts a topic; 0: all (--writer: 30)
    generator: str = ""               # folder of a Stable Diffusion 3 pipeline
    guidance: tuple = (5., 7., 9., 11.)   # scales, with commas: one image of each prompt for each
    steps: int = 28                   # of the generator
    size: int = 1024                  # pixels; 0: the generator's own
    seed: int = 0                     # of images, templates and the random scorer
    paired_seeds: bool = False        # one seed for all scales of a prompt (official: one for each image)
    ranker: str = "imagereward"       # of imagereward, clip, blip, with commas: the first one picks
    imagereward: str = ""             # its weights: ImageReward.pt, or their folder
    clip: str = ""                    # folder of a CLIP, as ranker and as scorer
    blip: str = ""                    # folder of a BLIP for retrieval
    threshold: float = 0.             # what the best image must score (0: ImageReward's average)
    instruct: str = "template"        # template, a text file of questions, or a chat model as for --writer
    responders: str = ""              # folders or URLs of vision-language models, with commas
    scorer: str = "armorm"            # armorm, clip, length, random; for `pairs` also X of a scores-X.jsonl
    armorm: str = ""                  # folder of ArmoRM
    margin: float = .1                # least gap of a pair's scores, in standard deviations of all scores
    batch: int = 8                    # responses at once
    as_official: bool = False         # the published pipeline, faults included
    device: str = ""                  # cuda, mps or cpu; "": what is there
    # by --set
    attributes: str = "gated"         # of ArmoRM: gated, or paper (the mean of HelpSteer's five)
    max_new_tokens: int = 1000        # of a response
    topics: str = ""                  # of --writer, with commas; "": the prompts folder's
    similar: float = .5               # prompts that share more of their word pairs are near-duplicates
    model_name: str = ""              # what a server calls the model, where it serves several
    judge: str = ""                   # analyse: a vision-language model that compares two rankers' picks
    encoder: str = ""                 # analyse: folder of a sentence encoder; "": shared words
    gallery: int = 24                 # analyse: prompts on the page
    dtype: str = "auto"               # auto: float16 images and bfloat16 texts on CUDA, else float32
    chunk: int = 256                  # prompts that are encoded before their images are painted


SHORT = [f.name for f in dataclasses.fields(Options)][:24]
MODELS = ("writer", "generator", "imagereward", "clip", "blip", "instruct", "responders", "armorm")
PRESETS = {
    "pds-dpo": {"prompts": str(HERE / "prompts")},
    "classroom": {
        "prompts": str(BUILT_IN / "prompts"), "generator": str(BUILT_IN / "sd3"), "steps": 16, "size": 0,
        "imagereward": str(BUILT_IN / "imagereward"), "clip": str(BUILT_IN / "clip"),
        "armorm": str(BUILT_IN / "armorm"), "ranker": "imagereward,clip", "guidance": (1., 2., 4., 8.),
        "threshold": -1.6,            # halfway from another prompt's picture to the true: statistics.json
        "instruct": str(BUILT_IN / "questions.txt"), "batch": 64, "max_new_tokens": 48,
        "responders": ",".join(map(str, sorted(BUILT_IN.glob("llava?")) or sorted(BASES.glob("base?"))))}}


def dtype(run, on_cuda):
    import torch
    name = on_cuda if run.device.startswith("cuda") else "float32"
    return getattr(torch, name if run.o.dtype == "auto" else run.o.dtype)


def needed(value, flag, what):
    if not value:
        raise UserError(f"{flag} is missing: give {what}")


# ---------------------------------------------------------------------------- 1 prompts
def prompts(run):
    """Rank 0 alone: a few requests, or a few files."""
    o, rows, count = run.o, [], Counter()
    if run.rank:
        return
    if o.writer:
        about = o.topics.split(",") if o.topics else sorted(f.stem for f in (HERE / "prompts").glob("*.txt"))
        limit = o.per_topic or 30
        both = topics.written(o.writer, about, limit, o.similar, run.out / "parts", o.model_name, o.seed)
    else:
        needed(o.prompts, "--prompts", "a text file, or a folder of them")
        both = topics.read(o.prompts)
        limit = o.per_topic or len(both)
    kept = topics.distinct([text for _, text in both], o.similar)
    for topic, text in (both[i] for i in kept):
        count[topic] += 1
        if count[topic] <= limit:
            name = f"{topic}-{count[topic]}"
            rows.append({"id": name, "number": len(rows) + 1, "topic": topic, "prompt": text})
    if not rows:
        raise UserError(f"--writer {o.writer} wrote no prompts; see {run.out}/parts for what it said")
    run.write("prompts", rows)
    run.say(stage="prompts", prompts=len(rows), topics=len(count), near_duplicates=len(both) - len(kept))


# ---------------------------------------------------------------------------- 2 images
def images(run):
    """Image k of prompt n has seed 1000 n + k, as official; with --paired_seeds 1000 n for all k."""
    o, items = run.o, []
    needed(o.generator, "--generator", "the folder of Stable Diffusion 3 in diffusers' layout")
    if o.preset == "classroom" and not Path(o.generator).exists():
        raise UserError(f"{o.generator} is missing: `python classroom/synthesis.py` trains the built-in "
                        "models; --preset pds-dpo takes yours")
    made_by = [identity(o.generator), o.steps, o.size, o.dtype]
    for p in run.rows("prompts", "prompts"):
        for k, scale in enumerate(o.guidance, 1):
            seed = 10 ** 7 * o.seed + 1000 * p["number"] + (0 if o.paired_seeds else k)
            item = {"id": f"{p['id']}-{k}", "prompt_id": p["id"], "guidance": scale, "seed": seed,
                    "image": f"images/{p['id']}-{k}.png", "_prompt": p["prompt"]}
            items.append(item | {"hash": key(item, made_by)})
    (run.out / "images").mkdir(exist_ok=True)
    rows = work(run, "images", items, lambda groups: paint(run, groups), len(o.guidance))
    run.write("images", map(bare, rows))


def paint(run, groups):
    """The rows of each group, a prompt's images, painted in one call. A file says in itself what it was made
    from: one that a killed run wrote, but did not note in its journal, is kept."""
    from PIL import Image, PngImagePlugin

    import sd3
    o, kind = run.o, dtype(run, "float16")

    def there(item):
        try:
            with Image.open(run.out / item["image"]) as file:
                return file.text.get("nanoVPO") == item["hash"]
        except (OSError, SyntaxError, ValueError, AttributeError):
            return False
    for at in range(0, len(groups), o.chunk):
        chunk = groups[at:at + o.chunk]
        missing = {g[0]["id"]: g for g in chunk if not all(map(there, g))}
        if missing:
            encoded = sd3.encode(o.generator, [g[0]["_prompt"] for g in missing.values()], run.device, kind)
            painter = sd3.Painter(o.generator, run.device, kind)
        for group in chunk:
            if group[0]["id"] in missing:
                scales, seeds = ([x[k] for x in group] for k in ("guidance", "seed"))
                pictures = painter(encoded[group[0]["_prompt"]], encoded[""], scales, seeds, o.steps, o.size)
                for item, picture in zip(group, pictures, strict=True):
                    path, note = run.out / item["image"], PngImagePlugin.PngInfo()
                    note.add_text("nanoVPO", item["hash"])
                    if not there(item):
                        picture.save(path.with_suffix(".tmp"), "png", pnginfo=note)
                        os.replace(path.with_suffix(".tmp"), path)
            yield [{}] * len(group)
        painter = encoded = None
        free()


# ---------------------------------------------------------------------------- 3 rank
def rank(run):
    o, scores, groups = run.o, {}, {p["id"]: (p, []) for p in run.rows("prompts", "prompts")}
    for row in run.rows("images", "images"):
        if row["prompt_id"] in groups:
            groups[row["prompt_id"]][1].append(row)
    groups = {id: both for id, both in groups.items() if both[1]}
    hashes = {id: [file_hash(run.out / x["image"]) for x in rows] for id, (_, rows) in groups.items()}
    names = o.ranker.split(",")
    for name in names:
        if name not in ("imagereward", "clip", "blip"):
            raise UserError(f"--ranker {name} is not one of imagereward, clip, blip; choose one of them")
        needed(getattr(o, name), f"--{name}", "the model that --ranker names")
        made_by = [identity(getattr(o, name)), o.dtype]
        items = [{"id": id, "hash": key(p["prompt"], hashes[id], made_by)} for id, (p, _) in groups.items()]

        def make(todo, name=name):
            model = load_ranker(run, name)
            for (item,) in todo:
                p, rows = groups[item["id"]]
                yield [{"scores": model.score(p["prompt"], [run.out / x["image"] for x in rows])}]
        for row in work(run, f"rank-{name}", items, make):
            scores.setdefault(row["id"], {})[name] = row["scores"]
    found = [choose(p, rows, scores[id], names[0], o) for id, (p, rows) in groups.items()]
    run.write("ranked", found)
    low = sum(row["dropped"] is not None for row in found)
    run.say(stage="rank", prompts=len(found), kept=len(found) - low, below_threshold=low)


def load_ranker(run, name):
    import rewards
    if name == "imagereward":
        return rewards.ImageReward.load(run.o.imagereward, device=run.device)
    return rewards.Similarity.load(getattr(run.o, name), run.device)


def choose(prompt, rows, scores, first, o):
    """The first of the images that the first ranker scores best, with what all of them scored."""
    best = max(range(len(rows)), key=lambda k: scores[first][k])
    low = not o.as_official and scores[first][best] < o.threshold
    return {**{k: prompt[k] for k in ("id", "topic", "prompt")},
            **{k: rows[best][k] for k in ("image", "guidance")},
            "dropped": f"best image scores below {o.threshold}" if low else None, "scores": scores,
            "candidates": [{k: row[k] for k in ("image", "guidance", "seed")} for row in rows]}


# ---------------------------------------------------------------------------- 4 instruct
def instruct(run):
    o, kept = run.o, {r["id"]: r["prompt"] for r in run.rows("ranked", "rank") if not r["dropped"]}
    if o.instruct == "template" or o.instruct.endswith(".txt"):
        asked = topics.template(o.instruct, kept, o.seed)
        run.write("instructions", [{"id": id, "question": q} for id, q in asked.items()])
        return run.say(stage="instruct", questions=len(asked))
    made_by = [identity(o.instruct), topics.ASK_QUESTION, o.model_name, o.seed]

    def make(groups):
        writer = chat.connect(o.instruct, model=o.model_name or None, max_tokens=128, seed=o.seed)
        for group in groups:
            said = topics.ask(writer, {x["id"]: kept[x["id"]] for x in group})
            yield [{"question": said[x["id"]]} if x["id"] in said else None for x in group]
    items = [{"id": id, "hash": key(text, made_by)} for id, text in kept.items()]
    run.write("instructions", map(bare, work(run, "instruct", items, make, 64)))


# ---------------------------------------------------------------------------- 5 respond
def respond(run):
    o, out, said = run.o, run.out, {}
    needed(o.responders, "--responders", "folders or URLs of vision-language models, with commas")
    picked = {r["id"]: r["image"] for r in run.rows("ranked", "rank")}
    asked = [(r["id"], r["question"], picked[r["id"]]) for r in run.rows("instructions", "instruct")]
    for name, source in named(o.responders).items():
        made_by = [identity(source), o.max_new_tokens, o.as_official, o.dtype, o.model_name]
        items = [{"id": id, "hash": key(q, file_hash(out / image), made_by), "_question": q, "_image": image}
                 for id, q, image in asked]

        def make(groups, source=source):
            model = chat.connect(source, model=o.model_name or None, max_tokens=o.max_new_tokens,
                                 batch=o.batch, device=run.device, dtype=dtype(run, "bfloat16"),
                                 template=RAW if o.as_official else None)
            for group in groups:
                asked = [chat.Question(x["id"], x["_question"], [out / x["_image"]]) for x in group]
                said = chat.ask(model, asked, description="respond")
                yield [response(x["_question"], said.get(x["id"]), o.as_official) for x in group]
        for row in work(run, f"respond-{name}", items, make, o.batch):
            said.setdefault(row["id"], []).append({"id": row["id"], "model": name} | bare(row))
    run.write("responses", [row for id, *_ in asked for row in said.get(id, ())])


def response(question, row, as_official):
    """A row of responses.jsonl, None without a reply. finished: the model ended it by itself, None where that
    is not known. as_official: the question before it, line breaks flattened, as the published code keeps it.
    """
    if not row:
        return None
    text, finished = row["reply"], {"stop": True, "length": False}.get(row.get("finish"))
    if as_official:
        text = f"{question} {text}".replace("\n", " ")
    return {"response": text, "finished": finished}


def named(sources):
    """{short name: source} of sources with commas; a name that is taken gets a number behind it."""
    names = {}
    for source in filter(None, sources.split(",")):
        short = chat.public(source).split("//")[-1] if chat.is_url(source) else Path(source).name
        short = re.sub(r"[^\w.-]+", "-", short)
        names[short if short not in names else f"{short}-{len(names) + 1}"] = source
    return names


# ---------------------------------------------------------------------------- 6 score
def score(run):
    """All responses to a question. ArmoRM reads question and response, and never sees the image."""
    o, said = run.o, {r["id"]: (r["question"], []) for r in run.rows("instructions", "instruct")}
    if o.scorer not in ("armorm", "clip", "length", "random"):
        raise UserError(f"--scorer {o.scorer} is not one of armorm, clip, length, random; choose one of them")
    if model := {"armorm": o.armorm, "clip": o.clip}.get(o.scorer, "none"):
        made_by = [o.seed if model == "none" else identity(model), o.dtype]
    needed(model, f"--{o.scorer}", "the model that --scorer names")
    image = {r["id"]: run.out / r["image"] for r in run.rows("ranked", "rank")} if o.scorer == "clip" else {}
    for row in run.rows("responses", "respond"):
        if row["id"] in said:
            said[row["id"]][1].append(row)
    items = [{"id": id, "hash": key(q, [(r["model"], r["response"]) for r in rows], made_by,
                                    file_hash(image[id]) if image else None)}
             for id, (q, rows) in said.items() if rows]

    def make(groups):
        judge = load_scorer(run)
        for (item,) in groups:
            question, rows = said[item["id"]]
            texts = [r["response"] for r in rows]
            yield [{"scores": judge(item["id"], question, texts, image.get(item["id"]))}]
    rows = work(run, f"score-{o.scorer}", items, make)
    run.write(f"scores-{o.scorer}", [{"id": row["id"], "model": r["model"]} | s for row in rows
                                     for r, s in zip(said[row["id"]][1], row["scores"], strict=True)])


def load_scorer(run):
    """-> f(id, question, texts, image) -> [{"score", ...}]."""
    o = run.o
    if o.scorer == "length":
        return lambda id, question, texts, image: [{"score": float(len(t.split()))} for t in texts]
    if o.scorer == "random":
        return lambda id, question, texts, image: [
            {"score": float(data.draw(o.seed, "scorer", id, k).random())} for k in range(len(texts))]
    import rewards
    if o.scorer == "clip":
        clip = rewards.Similarity.load(o.clip, run.device)
        return lambda id, question, texts, image: [{"score": s} for s in clip.score_texts(image, texts)]
    pattern = Path(o.armorm) / "token_pattern.json"         # of a tokenizer that is not Llama 3's
    pattern = json.loads(pattern.read_text()) if pattern.exists() else rewards.LLAMA3
    armorm = rewards.ArmoRM.load(o.armorm, None, pattern, run.device, dtype(run, "bfloat16"))
    return lambda id, question, texts, image: armorm.judge(question, texts)


# ---------------------------------------------------------------------------- 7 pairs
def pairs(run):
    if run.rank:
        return
    o, said, ranked = run.o, {}, {r["id"]: r for r in run.rows("ranked", "rank")}
    asked = [{k: ranked[r["id"]][k] for k in ("image", "topic", "prompt", "guidance")} | r
             for r in run.rows("instructions", "instruct") if r["id"] in ranked]
    for row in run.rows("responses", "respond"):
        said.setdefault(row["id"], []).append(row)
    paper = o.attributes == "paper" and o.scorer == "armorm"
    scores = {(r["id"], r["model"]): sum(r["rewards"][:5]) / 5 if paper else r["score"]
              for r in run.rows(f"scores-{o.scorer}", f"score --scorer {o.scorer}")}
    found, dropped, faulty = pairing.select(asked, said, scores, o.margin, o.as_official)
    gone = [{"id": r["id"], "reason": r["dropped"]} for r in ranked.values() if r.get("dropped")]
    for name, rows in (("pairs", found), ("dropped", gone + dropped), ("faults", faulty)):
        run.write(name, rows)
    published = json.dumps([pairing.conversations(p) for p in found], indent=1, ensure_ascii=False)
    data.atomic_write(run.out / "pds_dpo.json", published + "\n")
    counts = {"prompts": len(ranked), **Counter(r["reason"] for r in gone), "questions": len(asked),
              "responses": sum(map(len, said.values())), **Counter(f for r in faulty for f in r["faults"]),
              **Counter(r["reason"] for r in dropped), "pairs": len(found)}
    settings = {k: v for k, v in dataclasses.asdict(o).items() if k not in ("out", "device", *MODELS)}
    gap = pairing.lengths(found)
    card = pairing.card(run.out.name, models(o), settings, counts, gap)
    data.atomic_write(run.out / "card.md", card)
    run.say(stage="pairs", **counts)
    print(pairing.length_report(gap))


def models(o):
    """Rows (role, name, revision, licence) of the models that a run names."""
    return [(role, name, revision(source), licence(source)) for role in MODELS
            for name, source in named(getattr(o, role)).items()
            if source.startswith("http") or Path(source).exists()]


def revision(source):
    """A hub snapshot's commit, or our own hash of the files."""
    parts = Path(source).resolve().parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else identity(source)


def licence(source):
    """What a model's folder says of itself: `license:` in its README.md, or the first line of its LICENSE."""
    for name, pattern in (("README.md", r"^license(?:_name)?:\s*(.+)$"), ("LICENSE", r"^\s*(\S.*)$")):
        file = Path(source) / name
        if file.is_file() and (found := re.search(pattern, file.read_text(errors="replace"), re.M)):
            return found[1].strip()
    return "not stated in its folder"


# ---------------------------------------------------------------------------- the command line
def analyse(run):
    import gallery
    if run.rank == 0:
        gallery.analyse(run)


STAGES = {f.__name__: f for f in (prompts, images, rank, instruct, respond, score, pairs)}


def value(name, text, kind):
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(text).lower()]
        return tuple(map(float, text.split(","))) if kind is tuple else kind(text)
    except (ValueError, KeyError):
        what = {bool: "true or false", tuple: "numbers with commas"}.get(kind, "a number")
        raise UserError(f"{name} is {text!r}: give {what}") from None


def options(argv):
    """-> (stage, Options). Defaults, then the preset's, then the command line's."""
    import inspect
    says = dict(re.findall(r"^    (\w+): .*?#\s*(.*)$", inspect.getsource(Options), re.M))
    rest = "; ".join(f"{k}: {v}" for k, v in says.items() if k not in SHORT)
    parser = data.Parser(prog="synth.py", description=__doc__.split("\n")[0], epilog=f"--set reaches {rest}")
    parser.add_argument("stage", nargs="?", default="all", choices=("all", *STAGES, "analyse"))
    kinds = {f.name: type(f.default) for f in dataclasses.fields(Options)}
    for name in SHORT:
        extra = {"nargs": "?", "const": "true"} if kinds[name] is bool else {}
        parser.add_argument(f"--{name}", help=says[name].replace("%", "%%"), **extra)
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="any option by name")
    given = vars(parser.parse_args(argv))
    chosen = {k: given[k] for k in SHORT if given[k] is not None}
    for text in given["set"]:
        name, _, what = text.partition("=")
        if name not in kinds:
            raise UserError(f"--set {text}: {name} is no option; see --help")
        chosen[name] = what
    chosen = {k: value(k, v, kinds[k]) for k, v in chosen.items()}
    preset = chosen.get("preset", "classroom")
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} is not one of {', '.join(PRESETS)}; choose one of them")
    o = Options(**(PRESETS[preset] | chosen))
    if not o.guidance or o.steps < 1 or o.batch < 1 or o.chunk < 1 or o.size < 0 or o.margin < 0:
        raise UserError("guidance, steps, batch, chunk must be above 0, size and margin not below; mend them")
    o.out = o.out or f"runs/synth-{preset}-s{o.seed}" + "-official" * o.as_official
    return given["stage"], o


def main(argv=None):
    try:
        stage, o = options(argv)
        run = begin(o, o.out)
        for name in STAGES if stage == "all" else [stage]:
            (STAGES | {"analyse": analyse})[name](run)
            run.barrier()
    except UserError as error:
        sys.exit(f"synth.py: {error}")
    if run.world > 1:
        import torch.distributed as dist
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
