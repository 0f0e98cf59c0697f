"""Make preference pairs from nothing but prompts: PDS-DPO's data engine (arXiv
2412.17417) in seven stages.

    python synth.py                  on the built-in world: minutes on two cores
    python synth.py all --preset pds-dpo --out D --generator G --imagereward R \\
        --armorm A --responders M,N,O
    torchrun --nproc_per_node 8 synth.py all ...     the same files from 8 GPUs
    python synth.py pairs --out D --margin 0.5       one stage again
    python synth.py analyse --out D    analysis.json and gallery.html
    python train_dpo.py --loss dpo --data D/pairs.jsonl

Each stage reads the files before its own and writes one, JSON lines:

    prompts   prompts.jsonl       id number topic prompt: text files or --writer
    images    images.jsonl        id prompt_id guidance seed image
    rank      ranked.jsonl        the best image of each prompt, and all scores
    instruct  instructions.jsonl  id question: template, text file or chat model
    respond   responses.jsonl     id model response finished
    score     scores-NAME.jsonl   id model score (ArmoRM: rewards gating)
    pairs     pairs.jsonl         also pds_dpo.json, faults.jsonl, dropped.jsonl
                                  (why) and card.md
You can kill it at any time and run it again: parts/ keeps the results of each
stage under a hash of everything they depend on (texts, images, model files,
settings), and only missing ones are made. Each stage loads its models and frees
them: generator, reward and responders are never in memory together.

Departures from the official pipeline; --as_official undoes 1 to 4:

 1. Responders get their chat template and answer without an echo (official:
    raw text, whose echo is scored).
 2. Faulty responses and near ties make no pair; official: the first maximum
    against the first minimum.
 3. Prompts whose best image scores below --threshold are left out and counted.
 4. Responses keep their line breaks.
 5. Scales, seeds and texts are in the files beside each image: nothing is
    matched by its place in a list.
"""
import math
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import data
from data import UserError
from model import ask, command
from model.ask import fetched
from model.command import behind_set, option
from synthesis import pairing, prompts

BUILT_IN = Path(__file__).resolve().parent / "classroom/synthesis"


@dataclass
class Options:
    out: str = option("", "folder of the run; none: runs/synth-PRESET-sSEED")
    preset: str = option("classroom", "classroom, or pds-dpo: the paper's settings, with your models",
                         choices=("classroom", "pds-dpo"))
    prompts: str = option("", "a text file, one prompt a line, or a folder of them, one a topic")
    writer: str = option("", "a chat model that writes them: a folder, a URL or a file of replies")
    per_topic: int = option(0, "at most this many prompts a topic; 0: all (with --writer 30)")
    generator: str = option("", "folder of a Stable Diffusion 3 pipeline")
    guidance: tuple = option((5., 7., 9., 11.), "scales: one image of each prompt for each", at_least=-100,
                             at_most=100)
    steps: int = option(28, "of the generator", above=0)
    size: int = option(1024, "pixels; 0: the generator's own", at_most=1 << 14)
    seed: int = option(0, "of images, templates and the random scorer")
    paired_seeds: bool = option(False, "one seed for all scales of a prompt (official: one for each image)")
    ranker: str = option("imagereward", "of imagereward, clip, blip, with commas: the first one picks")
    imagereward: str = option("", "its weights: ImageReward.pt, or their folder")
    clip: str = option("", "folder of a CLIP, as ranker and as scorer")
    blip: str = option("", "folder of a BLIP for retrieval")
    threshold: float = option(0., "the least score of the best image; 0 is ImageReward's average",
                              at_least=-command.MOST)
    instruct: str = option("template", "template, a text file of questions, or a chat model as for --writer")
    responders: str = option("", "folders or URLs of vision-language models, with commas")
    scorer: str = option("armorm", "armorm, clip, length, random; for `pairs` also X of a scores-X.jsonl")
    armorm: str = option("", "folder of ArmoRM")
    margin: float = option(.1, "least gap of a pair's scores, in standard deviations of all scores")
    batch: int = option(8, "responses at once", above=0)
    as_official: bool = option(False, "the published pipeline, faults included")
    device: str = option("", "cuda, mps or cpu; none: the first available")
    attributes: str = behind_set("gated", "of ArmoRM: gated, or paper (the mean of HelpSteer's five)",
                                 choices=("gated", "paper"))
    max_new_tokens: int = behind_set(1000, "of a response", above=0)
    topics: str = behind_set("", "of --writer, with commas; none: those of the shipped prompts")
    similar: float = behind_set(.5, "prompts that share more of their word pairs are near-duplicates",
                                at_most=1)
    model_name: str = behind_set("", "the server's name for the model (default: its choice)")
    judge: str = behind_set("", "for analyse: a vision-language model that compares two rankers' picks")
    gallery: int = behind_set(24, "for analyse: prompts on the page")
    dtype: str = behind_set("auto", "auto: float16 images and bfloat16 texts on CUDA, else float32",
                            choices=("auto", "float32", "float16", "bfloat16"))
    chunk: int = behind_set(256, "prompts that are encoded before their images are painted", above=0)


ROWS = {                                # the fields of each stage's rows, by the name of its file
    "prompts": "id number topic prompt", "images": "id prompt_id guidance seed image",
    "ranked": "id topic prompt image guidance dropped scores candidates", "instructions": "id question",
    "responses": "id model response finished", "scores-armorm": "id model score rewards",
    "pairs": "id question chosen rejected"}
FIELDS = {                              # those that are no texts
    "number": int, "seed": int, "guidance": float, "score": float, "rewards": [float], "dropped": (str, None),
    "candidates": (None, [{"image": str}]), "scores": (None, {str: [float]}),       # read by `analyse` alone
    "finished": (bool, None)}
MODELS = "writer generator imagereward clip blip instruct responders armorm".split()
RANKERS, SCORERS = "imagereward clip blip".split(), "armorm clip length random".split()
PRESETS = {
    "classroom": {
        **{name: str(BUILT_IN / name) for name in ("prompts", "imagereward", "clip", "armorm")},
        "generator": str(BUILT_IN / "sd3"), "steps": 16, "size": 0, "guidance": (1., 2., 4., 8.),
        "ranker": "imagereward,clip",
        "threshold": -1.6,            # halfway from another prompt's picture to the true: statistics.json
        "instruct": str(BUILT_IN / "questions.txt"), "batch": 64, "max_new_tokens": 48,
        "responders": ",".join(map(str, sorted(BUILT_IN.glob("llava?"))))},
    "pds-dpo": {"prompts": str(prompts.SHIPPED)}}


@dataclass
class Run:
    """A call's options, its folder, its place among the ranks, and the folder's lock."""
    o: Options
    out: Path
    ranks: command.Ranks = command.ALONE
    lock: object = None

    def path(self, name, folder=""):
        return self.out / folder / f"{command.file_name(name)}.jsonl"

    def rows(self, name, made_by=None):
        """The lines of OUT/name.jsonl. Where it is missing: [] without `made_by`, else a UserError."""
        path = self.path(name)
        if path.exists():
            names = ROWS.get(name, "id model score").split()
            shapes = {field: FIELDS.get(field, str) for field in names}
            return list(data.read_jsonl(path, check=command.fields(f"file of {name}", **shapes)))
        if made_by:
            raise UserError(f"{path} is missing: run `python synth.py {made_by}` with this --out first")
        return []

    def write(self, name, rows):
        """OUT/name.jsonl, in one move, by rank 0."""
        if self.ranks.rank == 0:
            data.write_jsonl(self.path(name), rows)

    def say(self, stage, **line):
        """A line of log.jsonl and of the terminal."""
        if self.ranks.rank == 0:
            data.append_jsonl(self.out / "log.jsonl", {"stage": stage, **line})
            print(stage, *(f" {name.replace('_', ' ')} {n}" for name, n in line.items()))

    def made(self, name, given, make, made_by, size=1):
        """The items' rows in their order, without those that failed; only what is missing is made.

        given: {id: all that this item is made from, such as an ask.Question}, `made_by`: what they all are;
        both are hashed. make: (run, groups of `size` items {"id", "_given", ...}) -> their rows, group by
        group. parts/NAME.jsonl keeps them: see command.Store.work.
        """
        start = time.time()
        store = command.Store(self.path(name, "parts"), self.ranks)
        items = [{"id": id, "_given": parts, "hash": ask.hashed([id, parts, made_by])}
                 for id, parts in given.items()]
        rows = store.work(items, partial(make, self), size, name)
        command.free()
        self.say(name,
                 items=len(items),
                 there=store.there,
                 made=len(rows) - store.there,
                 failed=len(items) - len(rows),
                 seconds=round(time.time() - start, 1))
        return rows

    def ask(self, name, source, questions, **options):
        """{id: {"reply", ...}} of ask.Questions; parts/ keeps each reply as it comes. For rank 0 alone."""
        replies = self.path(name, "parts")
        return ask.ask(source, questions, replies, description=name, **self.place(), **options)

    def place(self):
        """What ask.connect is to know of a server's model, or of how to load a folder's."""
        o = self.o
        return {"model": o.model_name or None,
                "batch": o.batch,
                "device": self.ranks.device,
                "dtype": o.dtype}

    def asked(self):
        """The rows of ranked.jsonl that have a question, with it."""
        ranked = {row["id"]: row for row in self.rows("ranked", "rank")}
        with command.explained(f"{self.out}: a prompt is not ranked", "run `python synth.py instruct`"):
            return [ranked[row["id"]] | row for row in self.rows("instructions", "instruct")]

    def questions(self):
        """{id: ask.Question} of each question about its image."""
        return {row["id"]: ask.Question(row["id"], row["question"], [self.out / row["image"]])
                for row in self.asked()}

    def needs(self, name):
        """The option's value. Raises UserError if it has none."""
        value = getattr(self.o, name)
        if not value:
            raise UserError(f"--{name} is missing: give it (--help says what it is)")
        return value

    def model(self, name):
        """The reward model of a ranker or scorer; None if it is none."""
        if name in MODELS:
            from synthesis import rewards
            return rewards.load(name, fetched(self.needs(name)), self.ranks.device, self.o.dtype)

    def reward(self, flag, name, known):
        """What the rows of a ranker or scorer depend on. Raises UserError for an unknown one."""
        if name not in known:
            raise UserError(f"{flag} {name}{data.like(name, known)} is not one of {', '.join(known)}; choose "
                            "one of them")
        if name not in MODELS:
            return [self.o.seed]
        return [command.identity(fetched(self.needs(name))), self.o.dtype]


def begin(o):
    """A Run in the folder o.out, which it locks; under torchrun one of several. Raises UserError."""
    run = Run(o, Path(o.out), command.join(o.device, backend="gloo"))   # the ranks only wait for each other
    if run.ranks.rank == 0:
        run.lock = command.claim(run.out)
        for name in ("parts", "images"):
            (run.out / name).mkdir(exist_ok=True)
    run.ranks.barrier()
    return run


# ---- 1 prompts ----
def make_prompts(run):
    """A few files, or a few requests."""
    o = run.o
    lines = prompts.written(run) if o.writer else prompts.read(run.needs("prompts"))
    texts = [text for _, text in lines]
    kept = [lines[place] for place in prompts.distinct(texts, o.similar)]
    if not kept:
        raise UserError(f"no prompts: see {run.out}/parts for what --writer said, or check --prompts")
    rows = prompts.numbered(kept, o.per_topic or len(kept))
    run.write("prompts", rows)
    run.say("prompts",
            prompts=len(rows),
            topics=len({row["topic"] for row in rows}),
            near_duplicates=len(lines) - len(kept))


# ---- 2 images ----
def make_images(run):
    """Image k of prompt n has seed 1000 n + k, as official; with --paired_seeds 1000 n for all k."""
    o, jobs, rows = run.o, {}, []
    generator = fetched(run.needs("generator"))
    for row in run.rows("prompts", "prompts"):
        candidates, id = [], row["id"]
        for k, scale in enumerate(o.guidance, 1):
            seed = 10 ** 7 * o.seed + 1000 * row["number"]
            candidates.append({"id": f"{id}-{k}",
                               "prompt_id": id,
                               "guidance": scale,
                               "seed": seed if o.paired_seeds else seed + k,
                               "image": f"images/{id}-{k}.png"})
        jobs[id] = row["prompt"], candidates
        rows += candidates
    run.made("images", jobs, paint, [command.identity(generator), o.steps, o.size, o.dtype])
    run.write("images", rows)


def paint(run, groups):
    """The images of a prompt are painted in one call. The texts of `chunk` prompts are encoded, then their
    images painted: encoders and transformer are never in memory together."""
    from synthesis import images
    o, device, generator = run.o, run.ranks.device, fetched(run.o.generator)
    dtype = command.dtype(o.dtype, device, "float16")
    for some in data.chunks(groups, o.chunk):
        jobs = [item["_given"] for (item,) in some]
        encoded = images.encode(generator, [prompt for prompt, _ in jobs], device, dtype)
        command.free()
        painter = images.Painter(generator, device, dtype)
        for prompt, candidates in jobs:
            seeds = [row["seed"] for row in candidates]
            painted = painter(encoded[prompt], encoded[""], o.guidance, seeds, o.steps, o.size)
            for row, picture in zip(candidates, painted, strict=True):
                picture.save(run.out / row["image"])                # one torn by a kill is painted again
            yield [{}]
        del painter, encoded
        command.free()


# ---- 3 rank ----
def rank(run):
    """Of each prompt the image that the first ranker scores best, beside what all of them scored."""
    o, asked, questions = run.o, {}, {}
    shown = pairing.grouped(run.rows("images", "images"), "prompt_id")
    for row in run.rows("prompts", "prompts"):
        id = row["id"]
        if id in shown:
            asked[id] = row | {"candidates": shown[id], "scores": {}}
            files = [run.out / image["image"] for image in shown[id]]
            questions[id] = ask.Question(id, row["prompt"], files)
    for name in o.ranker.split(","):
        made_by = run.reward("--ranker", name, RANKERS)
        for row in run.made(f"rank-{name}", questions, partial(rank_by, name), made_by):
            asked[row["id"]]["scores"][name] = row.get("scores")
    threshold = -math.inf if o.as_official else o.threshold
    with command.explained(f"{run.out}/parts/rank-*.jsonl are damaged", "delete them"):
        found = [pairing.best_image(row, threshold) for row in asked.values()]
    run.write("ranked", found)
    low = sum(row["dropped"] is not None for row in found)
    run.say("rank", prompts=len(found), kept=len(found) - low, below_threshold=low)


def rank_by(name, run, groups):
    model = run.model(name)
    for (item,) in groups:
        prompt = item["_given"]
        yield [{"scores": model.score(prompt.text, prompt.images)}]


# ---- 4 instruct ----
def instruct(run):
    o = run.o
    kept = {row["id"]: row["prompt"] for row in run.rows("ranked", "rank") if not row.get("dropped")}
    if o.instruct == "template" or o.instruct.endswith(".txt"):
        found = prompts.template(o.instruct, kept, o.seed)
    else:
        asked = [ask.Question(id, prompts.ASK_QUESTION.format(prompt=text)) for id, text in kept.items()]
        said = run.ask(f"instruct-{ask.public(o.instruct)}", o.instruct, asked, max_tokens=128, seed=o.seed)
        found = {id: " ".join(text.split()) for id, text in prompts.said(said).items()}
    rows = [{"id": id, "question": text} for id, text in found.items() if text]
    run.write("instructions", rows)
    run.say("instruct", questions=len(rows), failed=len(kept) - len(rows))


# ---- 5 respond ----
def respond(run):
    """One model after another answers all questions: a folder's on every rank, a server is asked by one."""
    o, said, found = run.o, {}, []
    options = {"max_tokens": o.max_new_tokens, "template": prompts.RAW if o.as_official else None}
    questions = run.questions()
    for name, source in named(run.needs("responders")).items():
        source = fetched(source)
        if Path(source).is_dir():
            made_by = [command.identity(source), options, o.dtype]
            make = partial(answer, source, options)
            rows = run.made(f"respond-{name}", questions, make, made_by, o.batch)
            said[name] = {row["id"]: row for row in rows}
        elif run.ranks.rank == 0:
            said[name] = run.ask(f"respond-{name}", source, [*questions.values()], accept=bool,
                                 **options)
    for id, question in questions.items():
        for name, rows in said.items():
            if id in rows:
                answered = response(question.text, rows[id], o.as_official)
                found.append({"id": id, "model": name} | answered)
    run.write("responses", found)
    run.say("respond", responses=len(found), failed=len(questions) * len(said) - len(found))


def answer(source, options, run, groups):
    """What a model folder says about each group of questions."""
    model = ask.connect(source, **options, **run.place())
    for group in groups:
        asked = [item["_given"] for item in group]
        yield [row for _, row in model.ask(asked)]


def response(question, row, as_official):
    """What responses.jsonl says of a reply; finished: the model ended it by itself, None: that is not known.

    as_official: the question before it, line breaks flattened, as the published code keeps it.
    """
    text = row["reply"]
    finished = ask.whole(row) and (row.get("finish") == "stop" or None)
    if as_official:
        text = f"{question} {text}".replace("\n", " ")
    return {"response": text, "finished": finished}


def named(sources):
    """{short name: source} of sources with commas; a repeated name gets a number."""
    names = {}
    for source in filter(None, sources.split(",")):
        short = command.file_name(ask.public(source).partition("//")[2] or Path(source).name)
        if short in names:
            short = f"{short}-{len(names) + 1}"
        names[short] = source
    return names


# ---- 6 score ----
def score(run):
    """All responses to a question at once. ArmoRM reads question and response, and never sees the image."""
    o, given, found = run.o, {}, []
    made_by = run.reward("--scorer", o.scorer, SCORERS)
    said = pairing.grouped(run.rows("responses", "respond"), "id")
    for id, question in run.questions().items():
        if id in said:
            given[id] = question, [row["response"] for row in said[id]]
    rows = run.made(f"score-{o.scorer}", given, score_by, made_by)
    with command.explained(f"{run.out}/parts/score-{o.scorer}.jsonl is damaged", "delete it"):
        for row in rows:
            for response, scores in zip(said[row["id"]], row["scores"], strict=True):
                found.append(pairing.only(response, "id model") | scores)
    run.write(f"scores-{o.scorer}", found)


def score_by(run, groups):
    name = run.o.scorer
    model = run.model(name)
    for (item,) in groups:
        question, texts = item["_given"]
        if name == "armorm":
            yield [{"scores": model.judge(question.text, texts)}]
            continue
        if name == "clip":
            scores = model.cosines(question.images, texts)[0].tolist()
        elif name == "length":
            scores = [float(len(text.split())) for text in texts]
        else:
            scores = [data.draw(run.o.seed, "scorer", question.id, k).random() for k in range(len(texts))]
        yield [{"scores": [{"score": score} for score in scores]}]


# ---- 7 pairs ----
def make_pairs(run):
    """pairing.make, and for its card the settings; of a model its name, its files' hash and its licence."""
    settings = dict(vars(run.o))
    del settings["out"], settings["device"], settings["judge"]
    for role in MODELS:
        for name, source in named(settings.pop(role)).items():
            source = fetched(source)
            if ask.is_url(source) or Path(source).exists():
                licence = pairing.licence(source)
                settings[f"{role} {name}"] = f"files {command.identity(source)}, licence {licence}"
    pairing.make(run, settings)


# ---- and a page of it ----
def analyse(run):
    """classroom/papers/analyses.py writes gallery.html and the paper's tables of this run, analysis.json."""
    words = [f"--{name}={getattr(run.o, name)}" for name in "judge model_name seed gallery".split()]
    print(command.classroom("papers/analyses.py", run.out, *words), end="")
    run.say("analyse", page="gallery.html", tables="analysis.json")


# ---- the command line ----
STAGES = {"prompts": make_prompts, "images": make_images, "rank": rank, "instruct": instruct,
          "respond": respond, "score": score, "pairs": make_pairs, "analyse": analyse}
ALONE = "prompts instruct pairs analyse".split()        # stages of rank 0 alone


def options(argv):
    """-> (stage, Options): the defaults, then the preset's, then the command line's. Raises UserError."""
    stage = ("stage", ("all", *STAGES), "all", "all is the seven from prompts to pairs [all]")
    chosen, rest = command.parse(Options, argv, "synth.py", __doc__, [stage])
    o = Options(**PRESETS[chosen.get("preset", "classroom")] | chosen)
    if o.writer and not o.per_topic:
        o.per_topic = 30
    official = "-official" if o.as_official else ""
    o.out = o.out or f"runs/synth-{o.preset}-s{o.seed}{official}"
    return rest["stage"], o


def main(argv=None):
    try:
        stage, o = options(argv)
        run = begin(o)
        for name in [*STAGES][:-1] if stage == "all" else [stage]:
            if run.ranks.rank == 0 or name not in ALONE:
                STAGES[name](run)
            run.ranks.barrier()
    except (UserError, OSError) as error:
        sys.exit(f"synth.py: {error}")
    command.leave(run.ranks)


if __name__ == "__main__":
    main()
