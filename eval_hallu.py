"""Measure hallucination in two steps with a file between: a model answers, then the answers are scored.

    python eval_hallu.py answers pope --model M --adapter runs/NAME/adapter \\
        --data coco/ --images val2014/ --out answers.jsonl
            batched and greedy; the same command continues a killed run.
            Two GPUs: torchrun --nproc_per_node 2 eval_hallu.py answers ...
    python eval_hallu.py score pope --answers answers.jsonl --questions coco/ \\
        --out scores.json
            without the model, in seconds: a table, 95% intervals, and what each
            answer adds in scores.items.jsonl
    python eval_hallu.py score mmhal --answers answers.jsonl --template T \\
        --judge http://localhost:8000/v1 --out scores.json
            the judge is a server, a model folder, or a file of saved replies
    python eval_hallu.py ask --adapter runs/NAME/adapter [--image F] [--page]
            one question per line, answered before and after training
    python eval_hallu.py compare a.jsonl b.jsonl --out page.html
            the paired difference, and a page on which people choose without
            knowing which model is which; `score votes` counts their choices

Benchmarks: classroom (the built-in world: ten seconds on a CPU), and by the paths of their published files
pope, amber, objhal and mmhal; `score chair` scores captions of COCO images, Object HalBench's among them.
--mode official equals the official scorers to the digit; robust, the default, also reads what they misread,
and reports what it cannot read. evaluation/metrics.py defines the measures.
"""
import hashlib
import json
import os
import sys
from functools import partial
from pathlib import Path

import data
from data import UserError
from evaluation import amber, answers, benchmarks, compare, metrics, objects, stats, words
from evaluation.readers import object_list, rating
from model import ask, command


def loaded(o, folder, device):
    """The VLM of a folder, by a command's options."""
    from model import vlm
    return vlm.load(folder, adapter=o.adapter, dtype=command.dtype(o.dtype, device), device=device,
                    template=o.template, preparation="pad" if o.pad else "")


# ---- answers ----
def run_answers(o):
    questions = None
    served = ask.is_url(o.model)
    for name in "adapter template pad dtype".split() if served else ["chat_model"]:
        if getattr(o, name):
            raise UserError(f"--{name} does not go with --model {ask.public(o.model)}: leave it out")
    if o.benchmark != "classroom":          # before torch and the model are loaded
        questions = benchmarks.questions(o.benchmark, o.data, o.images, o.prompt, o.follow_links)[:o.limit]
    elif o.images or o.limit or o.prompt != "{question}" or len(o.data) > 1:
        raise UserError("the classroom's scenes.jsonl says all that; leave out --images, --prompt, --limit "
                        "and further --data")

    ranks = command.join()
    length = o.max_new_tokens or answers.LENGTHS[o.benchmark]
    if served:
        m = ask.connect(o.model, model=o.chat_model, max_tokens=length, workers=o.batch_size or 64,
                        accept=bool)
    else:
        m = loaded(o, o.model, ranks.device)
    options = {"batch_size": o.batch_size, "max_new_tokens": length, "ranks": ranks}
    if questions is None:
        answers.answer_scenes(m, o.data[0], o.out, **options)
    else:
        answers.answer_questions(m, o.benchmark, questions, o.out, o.prompt, **options)
    command.leave(ranks)


# ---- score: each takes the options and the lines of the answers file -> (scores, items) ----
def score_classroom(o, lines):
    return metrics.classroom(lines), metrics.classroom_items(lines)


def score_pope(o, lines):
    return metrics.pope(benchmarks.pope_questions(o.questions), lines, o.mode, o.partial)


def score_amber(o, lines):
    finders = {"builtin": words.nouns, "nltk": words.nltk_nouns}
    finder = finders.get(o.nouns) or benchmarks.amber_nouns(o.nouns)
    similarity = {} if o.similarity == "exact" else data.read_json(o.similarity, check=data.as_record)
    queries, *known = benchmarks.amber_data(o.data)
    return amber.measures(queries, lines, *known, finder, similarity, o.mode, o.partial)


def score_chair(o, lines):
    original = o.scorer == "original"
    table = objects.synonyms(command.read_text(o.synonyms), literal=original and o.mode == "official")
    lemmatize = words.singulars if original else words.lemmas
    if o.nouns == "nltk":
        lemmatize = words.nltk_lemmas
    truth = benchmarks.coco_truth(o.annotations, lines, table, lemmatize)
    replies, said = None, {}
    if o.extractor != "none":
        text = benchmarks.prompt(o.extraction_prompt, "extraction.txt", ["{question}", "{answer}"])
        prompts = metrics.extraction_prompts(lines, text)
        replies, said = replied(o, "extractor", prompts, object_list, o.extraction_prompt, text)
    scores, items = metrics.chair(lines, truth, table, lemmatize, replies, o.mode)
    return scores | said, items


def score_mmhal(o, lines):
    template = benchmarks.records(o.template, "MMHal template", image_content=[str], question=str,
                                  gt_answer=str, image_id=(*command.NAME, None))
    text = benchmarks.prompt(o.judge_prompt, "judge.txt", ["{}"] * 4)
    prompts = metrics.mmhal_prompts(template, lines, text, o.partial)
    if not o.judge:
        path = o.out.with_suffix(".prompts.jsonl")
        rows = [{"id": str(i), "messages": ask.messages(prompt)} for i, prompt in prompts.items()]
        data.write_jsonl(path, rows)
        raise UserError(f"there is no --judge: {path} holds the {len(prompts)} prompts; have them judged and "
                        "give the replies with --judge FILE, or give a URL or a model folder")
    replies, said = replied(o, "judge", prompts, rating, o.judge_prompt, text)
    scores, items = metrics.mmhal(template, lines, replies, o.mode, o.partial)
    return scores | said, items


def replied(o, who, prompts, read, path, text):
    """-> ({id: reply, None if it was cut off} of prompts {id: text}; what the report says of who replied, and
    to which prompt).

    who: judge or extractor, o's name for the source. read: reads a reply, None if it cannot: a server is then
    asked again. path, text: the prompt's file, or None for our own, and its text. Numbers from two prompts
    are not comparable. Replies are kept beside --out. Raises UserError if a reply is missing, unless
    o.partial, and if all are.
    """
    source, questions = getattr(o, who), [ask.Question(str(i), prompt) for i, prompt in prompts.items()]
    rows = ask.ask(source, questions, o.out.with_suffix(f".{who}.jsonl"), model=o.chat_model, description=who,
                   max_tokens=o.judge_tokens,
                   accept=lambda row: ask.whole(row) and read(row["reply"]) is not None)
    lost = len(prompts) - len(rows)
    if lost and not (rows and o.partial):
        raise UserError(f"the {who} did not reply to {lost} of {len(prompts)} requests (the reason is "
                        "above); call again, or score the others, if there are any, with --partial")
    models = ", ".join(sorted({str(row["model"]) for row in rows.values() if row.get("model")}))
    prompt = str(path or "built-in, in our own words: no match for the published one's scores")
    digest = hashlib.sha256(text.encode()).hexdigest()
    if not all(row["asked"] for row in rows.values()):          # else these very prompts were replied to
        prompt, digest = "the replies do not say which", None
    said = {who: ask.public(str(source)) + (models and f" ({models})"),
            f"{who}_prompt": prompt,
            f"{who}_prompt_sha256": digest}
    replies = {}
    for i in prompts:
        if row := rows.get(str(i)):
            replies[i] = row["reply"] if ask.whole(row) else None
    return replies, said


def run_score(scorer, o):
    items_path = o.out.with_suffix(".items.jsonl")
    if {path.resolve() for path in o.answers} & {o.out.resolve(), items_path.resolve()}:
        raise UserError(f"--out {o.out} would write over the answers; give another name")
    lines = benchmarks.read_answers(o.answers)
    settings = [line["settings"] for line in lines if "settings" in line]
    wanted = sum(each.get("questions", 0) for each in settings)
    there = len(lines) - len(settings)
    if there < wanted and not o.partial:
        raise UserError(f"the file answers {there} of {wanted} questions; run the same `answers` command "
                        "again to continue it")
    scores, items = scorer(o, lines)
    if not scores["n"]:
        raise UserError(f"none of {scores['unparsed']} replies can be read, so there is nothing to score; "
                        "look at them, and ask another judge or extractor")
    if settings:
        scores["settings"] = settings if settings[1:] else settings[0]
    data.write_jsonl(items_path, items)
    data.atomic_write(o.out, json.dumps(scores, indent=1) + "\n")
    print(*table(o.benchmark, scores), *notes(scores), sep="\n")


def run_votes(o):
    print(command.classroom("papers/votes.py", *o.words), end="")


def run_compare(o):
    print(*compare.difference(o), sep="\n")
    run_votes(o)


def run_ask(o):
    if o.page:
        program = Path(__file__).parent / "classroom/ask.py"
        os.execv(sys.executable, [sys.executable, program, *o.words])
    from evaluation import dialogue  # and with it torch
    m, scenes, path = asked(o)
    dialogue.talk(m, sys.stdin, path, scenes.get(path, {}), o.max_new_tokens)


def asked(o):
    """-> (the model to ask, benchmarks.truths of its run or its picture's folder, the picture's path)"""
    folder, adapter = o.model, o.adapter
    if adapter and not folder:
        config = data.read_json(Path(adapter, "adapter_config.json"), check=data.as_record)
        folder = config.get("base_model_name_or_path")
    if not isinstance(folder, str):
        raise UserError("there is no model to ask: give --model, or an --adapter that names its own")
    image = o.image and os.path.realpath(o.image)
    home = Path(image).parent.parent if image else Path(adapter or folder).parent / "scenes"
    scenes = benchmarks.truths(home)
    return loaded(o, folder, command.join().device), scenes, image or next(iter(scenes), None)


# ---- tables ----
NAMES = metrics.CLASSROOM | {
    "acc": "accuracy",
    "f1": "F1",
    "chair": "CHAIR, lower is better",
    "hal": "Hal, lower is better",
    "cog": "Cog, lower is better",
    "amber_score": "AMBER score",
    "chair_s_refine": "CHAIR_s, of those with an object",
    "score": "score, 0 to 6",
    "win": "A is better",
    "loss": "B is better"}
PERCENT = ("classroom", "amber")      # in scores.json; the others' fractions are printed in percent, too


def named(key):
    """A measure's name for people."""
    return NAMES.get(key, key.replace("_", " "))


def table(benchmark, scores):
    """The measures with their intervals as lines of text, then a line for each category."""
    lines = [f"{'percent':39}   95% interval"]
    for key, ends in scores["intervals"].items():
        value, low, high = (shown(benchmark, key, number) for number in (scores[key], *ends))
        if stats.undefined(scores, key):
            lines.append(f"{named(key):31} undefined: {'names no objects' if 'chair' in key else '0 of 0'}")
        else:
            lines.append(f"{named(key):32} {value:>6}   {low:>5} to {high}")
    for parts in "by_kind by_split by_type by_category".split():
        for title, part in scores.get(parts, {}).items():
            cells = [f"{named(key).partition(',')[0]} {shown(benchmark, key, part[key])}"
                     for key in part.get("intervals", ["acc"])]
            lines.append(f"{title} ({part['n']}): {', '.join(cells)}")
    return lines


def shown(benchmark, key, value):
    """A measure's number as it is printed."""
    if key in stats.PLAIN:
        return f"{value:.2f}"
    return f"{value if benchmark in PERCENT else 100 * value:.1f}"


def notes(scores):
    """What was scored: which questions, how many answers, who judged them by which prompt, and remarks."""
    lines = [scores["version"]] if "version" in scores else []
    note, covered = f"{scores['n']} answers", scores.get("coverage", {})
    if "images" in scores:
        note += f" about {scores['images']} images"
    if covered.get("answered") != covered.get("of"):
        note += f", of {covered['of']} questions"
    lines.append(f"{note}, {scores['unparsed']} of them unreadable")
    for who in ("judge", "extractor"):
        if who in scores:
            digest = scores[f"{who}_prompt_sha256"] or "unknown"
            lines.append(f"{who}: {scores[who]}; prompt: {scores[f'{who}_prompt']}, sha256 {digest[:16]}")
    return lines + scores["remarks"]


# ---- command line ----
def positive(text):
    number = int(text)
    if not 0 < number <= command.MOST:
        raise ValueError
    return number


def new_file(text):
    if not Path(text).name or os.path.exists(text) and not os.path.isfile(text):     # a folder, a device
        raise ValueError
    return Path(text)


def text(help, **more):
    return {"help": help, **more}


path = partial(text, type=Path)
needed = partial(path, required=True)
out = partial(text, type=new_file, required=True)
number = partial(text, type=positive, metavar="N")
flag = partial(text, action="store_true")

SCORED = {
    "--answers": needed("what `answers` wrote, or a file in the official scripts' format", nargs="+"),
    "--out": out("scores.json; what each item adds goes to its .items.jsonl")}
MODES = {
    "--mode": text("official: the official scorer's numbers, misreadings included [robust]",
                   choices=("robust", "official"), default="robust"),
    "--partial": flag("score an unfinished file, and say how much of it is answered")}
LINKS = flag("symbolic links in the folder of the images may lead out of it")
LOADED = {
    "--template": text("the prompt's, as in training's --set template= [the folder's]"),
    "--pad": flag("pad images to a square, as --set images=pad does in training"),
    "--dtype": text("the model's type [bfloat16 on a GPU, float32 elsewhere]",
                    choices="bfloat16 float16 float32 float64".split())}
CHAT_MODEL = {"--chat_model": text("the server's name for the model [the server's choice]")}
JUDGED = CHAT_MODEL | {
    "--judge_tokens": number("the longest reply in tokens, thoughts included [1024]", default=1024)}

# name: (what runs it, or scores answers, what it does, {argument: its settings for argparse})
COMMANDS = {
    "answers": (run_answers, "let a model answer a benchmark's questions", {
        "benchmark": text("whose questions", choices=tuple(answers.LENGTHS)),
        "--model": text("a model's folder, classroom, or a server's URL", required=True),
        **CHAT_MODEL,
        "--adapter": text("a LoRA folder in PEFT's format on top of it"),
        "--data": needed("the benchmark's question file or its folder (POPE: or several files)", nargs="+"),
        "--images": path("the folder of the images [beside --data]"),
        "--follow_links": LINKS,
        "--out": out("answers.jsonl; an unfinished one is continued"),
        "--prompt": text("the prompt, with {question} in it [{question}]", default="{question}"),
        "--batch_size": number("questions at once [16; servers: 64; the classroom's models: 512]"),
        "--max_new_tokens": number("tokens of the longest answer [classroom, pope: 64; others: 512]"),
        "--limit": number("only the first N questions [all]"),
        **LOADED}),
    "ask": (run_ask, "ask a model about a picture: one question per line, or on a page", {
        "--model": text("a model's folder, or classroom [the one that --adapter names]"),
        "--adapter": text("a LoRA folder: the answers before and after training, side by side"),
        "--image": path("the picture [the first scene of the adapter's run]"),
        "--page": flag("serve a page on this machine, where you can ask and crop"),
        "--max_new_tokens": number("tokens of the longest answer [64]", default=64),
        **LOADED}),
    "score classroom": (score_classroom, "the built-in world", SCORED),
    "score pope": (score_pope, "yes and no about objects, by split", SCORED | MODES | {
        "--questions": needed("coco_pope_SPLIT.json, several, their folder, or hub records", nargs="+")}),
    "score amber": (score_amber, "captions, and questions by type", SCORED | MODES | {
        "--data": needed("AMBER's data folder"),
        "--similarity": text("of words: exact, or a file of similarities [exact]", default="exact"),
        "--nouns": text("who finds them: builtin, nltk (officially), a file [builtin]", default="builtin")}),
    "score mmhal": (score_mmhal, "96 questions, by a judge", SCORED | MODES | JUDGED | {
        "--template": needed("mmhal-bench_answer_template.json"),
        "--judge": text("saved replies, a server or a folder; without one, its prompts are written"),
        "--judge_prompt": path("a text with four {} to fill in [our own]")}),
    "score chair": (score_chair, "COCO captions, also Object HalBench's",
                    SCORED | MODES | JUDGED | {
        "--annotations": needed("COCO's 2014 annotations folder"),
        "--synonyms": needed("the published synonyms, one class per line"),
        "--scorer": text("whose rules: CHAIR's own, or Object HalBench's [objhal]",
                         choices=("original", "objhal"), default="objhal"),
        "--nouns": text("whose singulars: our own, or NLTK's, as in Object HalBench [builtin]",
                        choices=("builtin", "nltk"), default="builtin"),
        "--extractor": text("who lists the objects: nobody, saved replies, a server, a folder [none]",
                            default="none"),
        "--extraction_prompt": path("a text with {question} and {answer} in it [our own]")}),
    "score votes": (run_votes, "what people chose on a page of `compare`", {
        "votes": path("votes-NAME.json as downloaded, one per rater", nargs="+"),
        "--out": out("preference.json")}),
    "compare": (run_compare, "compare two answers files: the paired difference, and a page to vote on", {
        "a": path("answers of the one model"),
        "b": path("answers of the other to the same questions"),
        "--out": out("page.html"),
        "--images": path("the folder of the images, to be shown [no images]"),
        "--follow_links": LINKS,
        "--items": path("the .items.jsonl that `score` wrote for each (the classroom needs none)", nargs=2),
        "--n": number("pairs on the page, drawn at random [100]", default=100),
        "--seed": text("draws the pairs and their sides [0]", type=int, default=0)})}


def parse(argv=None):
    parser = data.Parser(prog="eval_hallu.py", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    says = "score answers, without a model"
    scoring = steps.add_parser("score", help=says, description=says)
    kinds = scoring.add_subparsers(dest="benchmark", required=True)
    for name, (run, says, arguments) in COMMANDS.items():
        kind = name.removeprefix("score ")
        home = steps if kind == name else kinds
        command = home.add_parser(kind, help=says, description=says)
        if "--answers" in arguments:
            run = partial(run_score, run)
        command.set_defaults(run=run, partial=False)
        for argument, about in arguments.items():
            command.add_argument(argument, **about)
    found = parser.parse_args(argv)
    found.words = argv or sys.argv[1:]                      # for a program of the classroom's
    return found


def main():
    o = parse()
    try:
        o.run(o)
    except (UserError, OSError) as error:
        sys.exit(f"eval_hallu.py: {error}")


if __name__ == "__main__":
    main()
