"""Measure hallucination in two steps with a file between: a model answers, then the answers are scored.

    python eval_hallu.py answers pope --model M --adapter runs/NAME/adapter \\
        --data coco/ --images val2014/ --out answers.jsonl
            batched and greedy; killed and called again it goes on.
            Two GPUs: torchrun --nproc_per_node 2 eval_hallu.py answers ...
    python eval_hallu.py score pope --answers answers.jsonl --questions coco/ \\
        --out scores.json
            without the model, in seconds: a table, 95% intervals, and what each
            answer adds in scores.items.jsonl
    python eval_hallu.py score mmhal --answers answers.jsonl --template T \\
        --judge http://localhost:8000/v1 --out scores.json
            the judge is a server, a model folder, or a file of saved replies
    python eval_hallu.py compare a.jsonl b.jsonl --out page.html
            the paired difference, and a page for people to choose blindly;
            `score votes` counts what they chose

Benchmarks: classroom (the built-in world: ten seconds on a CPU), and by the paths of their published files
pope, amber, objhal and mmhal; `score chair` scores captions of COCO images, Object HalBench's among them.
--mode official equals the official scorers to the digit; robust, the default, also reads what they misread,
and reports what it cannot read. metrics.py defines the measures, benchmarks.py the benchmarks' files.
"""
import json
import sys
from pathlib import Path

import amber
import answers
import benchmarks
import compare
import data
import judge
import metrics
import nouns
import objects
from data import UserError
from replies import object_list, rating
from tally import columns


# ---- answers ----
def run_answers(o):
    questions = None
    if o.benchmark != "classroom":          # before torch and the model are loaded in vain
        questions = benchmarks.questions(o.benchmark, o.data, o.images, o.prompt)[:o.limit]
    elif o.images or o.limit or o.prompt != "{question}" or len(o.data) > 1:
        raise UserError("the classroom's scenes.jsonl says all of it; leave out --images, --prompt, --limit "
                        "and further --data")
    import torch

    import command
    import vlm
    ranks = command.join()
    dtype = o.dtype or ("bfloat16" if ranks.device.type == "cuda" else "float32")
    m = vlm.load(o.model, adapter=o.adapter, dtype=getattr(torch, dtype), device=ranks.device,
                 template=o.template, preparation="pad" if o.pad else "")
    options = {"max_new_tokens": o.max_new_tokens or answers.LENGTHS[o.benchmark], "ranks": ranks}
    if questions is None:
        answers.answer_scenes(m, o.data[0], o.out, batch_size=o.batch_size or 64, **options)
    else:
        answers.answer_questions(m, o.benchmark, questions, o.out, o.prompt, o.batch_size or 16, **options)
    command.leave(ranks)


# ---- score: each takes the options and the lines of the answers file -> (scores, items) ----
def score_classroom(o, lines):
    settings, said = answers.read_answers(o.answers[0])
    keys = ("id", "kind", "answer", "hallucinated", "sums")
    items = [{key: item[key] for key in keys} for item in metrics.classroom_items(said)]
    return metrics.classroom(said) | {"settings": settings}, items


def score_pope(o, lines):
    return metrics.pope(benchmarks.pope_questions(o.questions), lines, mode=o.mode, partial=o.partial)


def score_amber(o, lines):
    finder = {"builtin": nouns.nouns, "nltk": nouns.nltk_nouns}.get(o.nouns)
    finder = finder or benchmarks.amber_nouns(o.nouns)
    similarity = None if o.similarity == "exact" else data.read_json(o.similarity, kind=dict)
    queries, *known = benchmarks.amber_data(o.data)
    return amber.measures(queries, lines, *known, finder, similarity, o.mode, o.partial)


def score_chair(o, lines):
    original = o.scorer == "original"
    literal = original and o.mode == "official"                   # their reader keeps blanks as they stand
    table = objects.synonyms(data.read_text(o.synonyms), literal)
    lemmatize = nouns.singulars if original else nouns.lemmas
    if o.nouns != "builtin":
        lemmatize = nouns.nltk_lemmas if o.nouns == "nltk" else benchmarks.lemmas(o.nouns)
    images = objects.image_ids(lines)
    truth = objects.coco_truth(*benchmarks.coco(o.annotations, images), table, lemmatize, images)
    replies, said = None, {}
    if o.extractor != "none":
        text = judge.prompt(o.extraction_prompt, judge.EXTRACTION, ["{question}", "{answer}"])
        needed = {str(line["id"]): line for line in metrics.extraction_requests(lines)}
        prompts = {i: judge.filled(text, line) for i, line in needed.items()}
        replies, said = judge.ask(o, "extractor", o.extractor, prompts, object_list,
                                  o.extraction_prompt, text)
        replies = {needed[i]["id"]: reply for i, reply in replies.items()}
    scores, items = metrics.chair(lines, truth, table, lemmatize, replies, nouns.phrase, o.mode, o.partial)
    return scores | said, items


def score_mmhal(o, lines):
    template = benchmarks.records(o.template, ("image_content", "question", "gt_answer"), "MMHal template")
    text = judge.prompt(o.judge_prompt, judge.JUDGE, ["{}"] * 4)
    prompts = metrics.mmhal_prompts(template, lines, text, o.partial)
    prompts = {str(place): filled for place, filled in prompts.items()}
    if not o.judge:
        judge.keep(path := o.out.with_suffix(".prompts.jsonl"), prompts)
        raise UserError(f"there is no --judge: {path} holds the {len(prompts)} prompts; have them judged and "
                        "give the replies with --judge FILE, or give a URL or a model folder")
    replies, said = judge.ask(o, "judge", o.judge, prompts, rating, o.judge_prompt, text)
    replies = {int(place): reply for place, reply in replies.items()}
    scores, items = metrics.mmhal(template, lines, replies, o.mode, o.partial)
    return scores | said, items


SCORERS = {"classroom": score_classroom, "pope": score_pope, "amber": score_amber, "chair": score_chair,
           "mmhal": score_mmhal}


def run_score(o):
    items_path = o.out.with_suffix(".items.jsonl")
    if {path.resolve() for path in o.answers} & {o.out.resolve(), items_path.resolve()}:
        raise UserError(f"--out {o.out} would write over the answers; give another name")
    lines = benchmarks.read_answers(o.answers)
    scores, items = SCORERS[o.benchmark](o, lines)
    if not scores["n"]:
        raise UserError(f"none of {scores['unparsed']} replies can be read, so there is nothing to score; "
                        "look at them, and ask another judge or extractor")
    settings = [line["settings"] for line in lines if "settings" in line]
    if settings:
        scores["settings"] = settings[0] if len(settings) == 1 else settings
    data.atomic_write(items_path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    data.atomic_write(o.out, json.dumps(scores, indent=1) + "\n")
    print("\n".join(table(o.benchmark, scores)))


def run_votes(o):
    found = compare.preference(*compare.read_votes(o.votes))
    data.atomic_write(o.out, json.dumps(found, indent=1) + "\n")
    print("\n".join(compare.preference_table(found)))


def run_compare(o):
    print("\n".join(compare.report(o.a, o.b, o.out, o.images, o.items, o.n, o.seed)))


def run_export(o):
    lines = [line for line in benchmarks.read_answers([o.answers]) if "settings" not in line]
    data.atomic_write(o.out, benchmarks.export(o.benchmark, lines))


# ---- tables ----
NAMES = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1",
         "yes_ratio": "says yes", "chair": "CHAIR, lower is better", "cover": "Cover",
         "hal": "Hal, lower is better", "cog": "Cog, lower is better", "amber_score": "AMBER score",
         "chair_s": "CHAIR_s, of all responses", "chair_s_refine": "CHAIR_s, of those with an object",
         "chair_i": "CHAIR_i, of mentions", "mean_words": "words in a response", "score": "score, 0 to 6",
         "informativeness": "informativeness", "hallucination_rate": "hallucination rate"}
FRACTIONS = ("pope", "chair", "mmhal")          # these are fractions in scores.json, shown in percent
PLAIN = ("score", "mean_words")                 # and these are no share of anything


def table(benchmark, scores):
    """The measures with their intervals as lines of text, then a line for each category."""
    names = metrics.CLASSROOM if benchmark == "classroom" else NAMES
    lines = [f"{columns(('percent', ''), (32, 7))}   95% interval"]
    for key, name in names.items():
        if scores.get(key) is not None:
            lines.append(measure(benchmark, key, name, scores[key], scores["intervals"].get(key)))
    for kind, part in scores.get("by_kind", {}).items():
        name = f"{kind}, accuracy of {part['n']}"
        lines.append(measure(benchmark, kind, name, part["acc"], part["interval"]))
    for key in ("by_split", "by_type", "by_category"):
        if scores.get(key):
            lines += ["", *breakdown(benchmark, key.removeprefix("by_"), scores[key])]
    return lines + notes(scores)


def shown(benchmark, key, value):
    """A measure's number as it is printed."""
    if key in PLAIN:
        return f"{value:.2f}"
    fraction = benchmark in FRACTIONS and key != "informativeness"
    return f"{100 * value if fraction else value:.1f}"


def measure(benchmark, key, name, value, interval):
    line = columns((name, shown(benchmark, key, value)), (32, 7))
    if interval:
        low, high = (shown(benchmark, key, end) for end in interval)
        line += f"   {low:>5} to {high}"
    return line


def breakdown(benchmark, title, parts):
    """A table of the measures by split, type or category."""
    keys = [key for key in NAMES if key in next(iter(parts.values()))]
    heads = [NAMES[key].partition(",")[0] for key in keys]
    heads = ["halluc." if head == "hallucination rate" else head for head in heads]
    widths = (15, 7, *(2 + max(9, len(head)) for head in heads))
    lines = [columns((title, "n", *heads), widths)]
    for name, part in parts.items():
        cells = [shown(benchmark, key, part[key]) for key in keys]
        lines.append(columns((name, part["n"], *cells), widths))
    return lines


def notes(scores):
    """What was scored: which questions, how many answers, who judged them by which prompt, what is odd."""
    lines = [scores["version"]] if "version" in scores else []
    note, covered = f"{scores['n']} answers", scores.get("coverage", {})
    if "images" in scores:
        note += f" about {scores['images']} images"
    if covered.get("answered") != covered.get("of"):
        note += f", of {covered['of']} questions"
    lines.append(f"{note}, {scores['unparsed']} of them unreadable")
    for who in ("judge", "extractor"):
        if who in scores:
            line = f"{who}: {scores[who]}; prompt: {scores[f'{who}_prompt']}"
            digest = scores[f"{who}_prompt_sha256"]
            lines.append(line + f", sha256 {digest[:16]}" if digest else line)
    return [*lines, *scores.get("remarks", ())]


# ---- command line ----
def positive(text):
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError
    return int(text)


def path(help, required=True, **more):
    return {"type": Path, "help": help, "required": required, **more}


def number(help, **more):
    return {"type": positive, "metavar": "N", "help": help, **more}


SCORED = {
    "--answers": path("what `answers` wrote, or a file as the official scripts take it", nargs="+"),
    "--out": path("scores.json, and per item .items.jsonl")}
MODES = {
    "--mode": {"choices": ("robust", "official"), "default": "robust",
               "help": "official: the official scorer's numbers, misreadings included [robust]"},
    "--partial": {"action": "store_true", "help": "score what is answered, and say how much that is"}}
CHAT_MODEL = {
    "--chat_model": {"help": "the server's name for the model, where it serves several"}}

# name: (what runs it, what it does, {argument: what argparse is told of it})
COMMANDS = {
    "answers": (run_answers, "let a model answer a benchmark's questions", {
        "benchmark": {"choices": tuple(answers.LENGTHS), "help": "whose questions"},
        "--model": {"required": True, "help": "a llava-hf folder, or classroom"},
        "--adapter": {"help": "a LoRA folder in PEFT's format on top of it"},
        "--template": {"help": "of the prompt, as in the run's --set template= [the folder's]"},
        "--pad": {"action": "store_true", "help": "pad images to a square: as --set images=pad trains"},
        "--data": path("the benchmark's question file, or the folder that holds it (POPE: or several "
                       "files)", nargs="+"),
        "--images": path("the folder of the images [beside --data]", required=False),
        "--out": path("answers.jsonl; an unfinished one is continued"),
        "--prompt": {"default": "{question}", "help": "what is asked, with {question} [{question}]"},
        "--batch_size": number("questions at once [classroom: 64, others: 16]"),
        "--max_new_tokens": number("an answer's length at most [classroom, pope: 64; others: 512]"),
        "--limit": number("only the first N questions [all]"),
        "--dtype": {"choices": ("bfloat16", "float16", "float32", "float64"),
                    "help": "of the model [bfloat16 on a GPU, float32 elsewhere]"}}),
    "score classroom": (run_score, "the built-in world", SCORED),
    "score pope": (run_score, "yes and no about objects, by split", SCORED | MODES | {
        "--questions": path("coco_pope_SPLIT.json, several of them, or their folder", nargs="+")}),
    "score amber": (run_score, "captions, and questions by type", SCORED | MODES | {
        "--data": path("AMBER's data folder"),
        "--similarity": {"default": "exact",
                         "help": "of words: exact, or a file of similarities or of vectors [exact]"},
        "--nouns": {"default": "builtin", "help": "builtin (no package), nltk (the official way), or a file "
                                                  "of nouns [builtin]"}}),
    "score mmhal": (run_score, "96 questions, by a judge", SCORED | MODES | CHAT_MODEL | {
        "--template": path("mmhal-bench_answer_template.json"),
        "--judge": {"metavar": "FILE|URL|MODEL",
                    "help": "saved replies, a server, or a folder; without one its prompts are written"},
        "--judge_prompt": path("with four {} to fill in [our own]", required=False)}),
    "score chair": (run_score, "COCO captions, also of Object HalBench", SCORED | MODES | CHAT_MODEL | {
        "--annotations": path("COCO's 2014 annotations folder"),
        "--synonyms": path("the published list, a class a line"),
        "--scorer": {"choices": ("original", "objhal"), "default": "objhal",
                     "help": "CHAIR's own rules, or Object HalBench's [objhal]"},
        "--nouns": {"default": "builtin",
                    "help": "how words are put in the singular: builtin (no package), nltk (Object "
                            "HalBench's official way), or a JSON file {word: singular} [builtin]"},
        "--extractor": {"default": "none", "metavar": "none|FILE|URL|MODEL",
                        "help": "who lists the objects: nobody, saved replies, a server, a folder [none]"},
        "--extraction_prompt": path("with {question} and {answer} [our own]", required=False)}),
    "score votes": (run_votes, "what people chose on a page of `compare`", {
        "votes": {"type": Path, "nargs": "+", "help": "votes-NAME.json as downloaded, one a rater"},
        "--out": path("preference.json")}),
    "compare": (run_compare, "two answers files: the paired difference, and a page to choose on", {
        "a": {"type": Path, "help": "answers of the one model"},
        "b": {"type": Path, "help": "answers of the other to the same questions"},
        "--out": path("page.html"),
        "--images": path("the folder of the images, to be shown [no images]", required=False),
        "--items": path("what `score` wrote per item, where the answers do not hold the truth themselves",
                        required=False, nargs=2, metavar=("A.items.jsonl", "B.items.jsonl")),
        "--n": number("pairs on the page, drawn at random [100]", default=100),
        "--seed": {"type": int, "default": 0, "metavar": "N",
                   "help": "of the pairs and of their sides [0]"}}),
    "export": (run_export, "answers as the official scripts read them", {
        "benchmark": {"choices": tuple(benchmarks.EXPORTS), "help": "whose script is to read them"},
        "--answers": path("what `answers` wrote"),
        "--out": path("the file to write")})}


def parse(argv=None):
    parser = data.Parser(prog="eval_hallu.py", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)
    says = "score answers, without a model"
    scoring = steps.add_parser("score", help=says, description=says)
    kinds = scoring.add_subparsers(dest="benchmark", required=True)
    for name, (run, says, arguments) in COMMANDS.items():
        home = kinds if name.startswith("score ") else steps
        p = home.add_parser(name.removeprefix("score "), help=says, description=says)
        p.set_defaults(run=run)
        for argument, about in arguments.items():
            p.add_argument(argument, **about)
    return parser.parse_args(argv)


def main():
    o = parse()
    try:
        o.run(o)
    except UserError as error:
        sys.exit(f"eval_hallu.py: {error}")


if __name__ == "__main__":
    main()
