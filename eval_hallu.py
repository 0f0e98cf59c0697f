"""Measure hallucination in two steps with a file between: a model answers, then the answers are scored.

    python eval_hallu.py answers pope --model M --adapter runs/NAME/adapter --data coco/ --images val2014/ \\
        --out answers.jsonl
        batched and greedy; killed and called again it goes on. Two GPUs: torchrun --nproc_per_node 2 ...
    python eval_hallu.py score pope --answers answers.jsonl --questions coco/ --out scores.json
        without the model, in seconds: a table, 95% intervals, scores.items.jsonl with what each answer adds
    python eval_hallu.py score mmhal --answers answers.jsonl --template T --judge http://localhost:8000/v1 \\
        --out scores.json
        the judge is a server, a model folder, or a file of replies that were saved before
    python eval_hallu.py compare a.jsonl b.jsonl --out page.html
        the paired difference, and a page for people to choose blindly; `score votes` counts what they chose

Benchmarks: classroom (the built-in world: ten seconds on a CPU), and by the paths of their published files
pope, amber, objhal and mmhal; `score chair` scores captions of COCO images, Object HalBench's among them.
--mode official equals the official scorers to the digit; robust, the default, also reads what they misread,
and reports what it cannot read. metrics.py defines the measures, benchmarks.py the benchmarks' files.
"""
import argparse
import json
import sys
from pathlib import Path

import benchmarks
import compare
import data
import judge
import metrics
import nouns
import objects
from answers import LENGTHS, answer_questions, answer_scenes, read_answers


# ---------------------------------------------------------------------------------------------- score
def items_classroom(answers):
    """What each answer adds to the sums, {measure: [numerator, denominator]}, and its hallucinated words."""
    for a in answers:
        yield {"id": a["id"], "kind": a["kind"], "answer": a["answer"],
               "hallucinated": metrics.hallucinated(a["answer"], a["truth"]), "sums": metrics.judge(a)[0]}


# Each of these: the options and the lines of the answers file -> (scores, items).
def classroom(o, lines):
    settings, answers = read_answers(o.answers[0])
    return {**metrics.classroom(answers), "settings": settings}, items_classroom(answers)


def pope(o, lines):
    return metrics.pope(benchmarks.pope_questions(o.questions), lines, mode=o.mode, partial=o.partial)


def amber(o, lines):
    finder = {"builtin": nouns.nouns, "nltk": nouns.nltk_nouns}.get(o.nouns)
    finder = finder or benchmarks.amber_nouns(o.nouns)
    similarity = None if o.similarity == "exact" else benchmarks.read_json(o.similarity, dict)
    queries, annotations, relation, safe = benchmarks.amber_data(o.data)
    return metrics.amber(queries, lines, annotations, relation, safe, finder, similarity, o.mode, o.partial)


def chair(o, lines):
    literal = o.scorer != "objhal" and o.mode == "official"       # their reader keeps blanks as they stand
    classes = objects.synonyms(benchmarks.read_text(o.synonyms), literal)
    words = {"original": nouns.singulars, "objhal": nouns.lemmas, "opera": nouns.in_context}[o.scorer]
    if o.nouns == "nltk":
        words = nouns.nltk_in_context if o.scorer == "opera" else nouns.nltk_lemmas
    elif o.nouns != "builtin":
        words = benchmarks.lemmas(o.nouns)
    images = objects.image_ids(lines)
    truth = objects.coco_truth(*benchmarks.coco(o.annotations, images), classes, words, images)
    replies, said = None, {}
    if o.extractor != "none":
        places = ["{question}", "{answer}"]
        text = judge.prompt(o.extraction_prompt, judge.EXTRACTION, places)
        needed = {str(line["id"]): line for line in metrics.extraction_requests(lines)}
        prompts = {i: judge.filled(text, line) for i, line in needed.items()}
        replies, said = judge.ask(o, "extractor", o.extractor, prompts, metrics.object_list,
                                  o.extraction_prompt, text)
        replies = {needed[i]["id"]: reply for i, reply in replies.items()}
    scores, items = metrics.chair(lines, truth, classes, words, replies, nouns.phrase, o.mode, o.partial)
    return {**scores, **said}, items


def mmhal(o, lines):
    template = benchmarks.read_json(o.template, list)
    text = judge.prompt(o.judge_prompt, judge.JUDGE, ["{}"] * 4)
    prompts = metrics.mmhal_prompts(template, lines, text, o.partial)
    prompts = {str(place): filled for place, filled in prompts.items()}
    if not o.judge:
        judge.keep(path := o.out.with_suffix(".prompts.jsonl"), prompts)
        raise data.UserError(f"there is no --judge: {path} holds the {len(prompts)} prompts; have them "
                             "judged and give the replies with --judge FILE, or give a URL or a model folder")
    replies, said = judge.ask(o, "judge", o.judge, prompts, metrics.rating, o.judge_prompt, text)
    replies = {int(place): reply for place, reply in replies.items()}
    scores, items = metrics.mmhal(template, lines, replies, o.mode, o.partial)
    return {**scores, **said}, items


# ---------------------------------------------------------------------------------------------- tables
NAMES = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1",
         "yes_ratio": "says yes", "chair": "CHAIR, lower is better", "cover": "Cover",
         "hal": "Hal, lower is better", "cog": "Cog, lower is better", "amber_score": "AMBER score",
         "chair_s": "CHAIR_s, of all responses", "chair_s_refine": "CHAIR_s, of those with an object",
         "chair_i": "CHAIR_i, of mentions", "mean_words": "words in a response",
         "len": "tokens in a response", "score": "score, 0 to 6",
         "informativeness": "informativeness",
         "hallucination_rate": "hallucination rate"}
FRACTIONS = ("pope", "chair", "mmhal")          # these are fractions in scores.json, shown in percent
PLAIN = ("score", "mean_words")                 # and these are no share of anything


def table(benchmark, scores):
    """The measures with their intervals as lines of text, then a line for each category."""
    def shown(key, value):
        return 100 * value if benchmark in FRACTIONS and key not in (*PLAIN, "informativeness") else value
    names = metrics.CLASSROOM if benchmark == "classroom" else NAMES
    rows = [(name, shown(key, scores[key]), [shown(key, v) for v in scores["intervals"].get(key, ())],
             ".2f" if key in PLAIN else ".1f") for key, name in names.items() if scores.get(key) is not None]
    if benchmark == "classroom":
        rows += [(f"{kind}, accuracy of {v['n']}", v["acc"], v["interval"], ".1f")
                 for kind, v in scores["by_kind"].items()]
    lines = [f"{'percent':32}{'':7}   95% interval"]
    for name, value, interval, form in rows:
        spread = "   {:5{f}} to {:{f}}".format(*interval, f=form) if interval else ""
        lines.append(f"{name:32}{value:7{form}}{spread}")
    for key in ("by_split", "by_type", "by_category"):
        if parts := scores.get(key):
            columns = [k for k in NAMES if k in next(iter(parts.values()))]
            head = [{"hallucination_rate": "halluc."}.get(k, NAMES[k].partition(",")[0]) for k in columns]
            lines += ["", f"{key[3:]:15}{'n':>7}" + "".join(f"  {name:>9}" for name in head)]
            for name, part in parts.items():
                cells = (f"  {shown(k, part[k]):{max(9, len(title))}{'.2f' if k in PLAIN else '.1f'}}"
                         for k, title in zip(columns, head, strict=True))
                lines.append(f"{name:15}{part['n']:7}" + "".join(cells))
    lines += [scores["version"]] if "version" in scores else []
    note = f"{scores['n']} answers" + (f" about {scores['images']} images" if "images" in scores else "")
    covered = scores.get("coverage", {})
    if covered.get("answered") != covered.get("of"):
        note += f", of {covered['of']} questions"
    lines.append(f"{note}, {scores['unparsed']} of them unreadable")
    for who in ("judge", "extractor"):
        if who in scores:
            digest = scores[f"{who}_prompt_sha256"]
            lines.append(f"{who}: {scores[who]}; prompt: {scores[f'{who}_prompt']}"
                         + (f", sha256 {digest[:16]}" if digest else ""))
    return "\n".join([*lines, *scores.get("remarks", ())])


# ---------------------------------------------------------------------------------------------- command line
SCORES = {"classroom": classroom, "pope": pope, "amber": amber, "chair": chair, "mmhal": mmhal}


def run_answers(o):
    questions = None
    if o.benchmark != "classroom":          # before torch and the model are loaded in vain
        questions = benchmarks.questions(o.benchmark, o.data, o.images, o.prompt)[:o.limit]
    elif o.images or o.limit or o.prompt != "{question}" or len(o.data) > 1:
        raise data.UserError("the classroom's scenes.jsonl says all of it; leave out --images, --prompt, "
                             "--limit and further --data")
    from types import SimpleNamespace

    import torch

    import ranks
    import vlm
    rank, world, device = ranks.distributed(SimpleNamespace(device=None))
    dtype = getattr(torch, o.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    m = vlm.load(o.model, adapter=o.adapter, dtype=dtype, device=device, template=o.template,
                 preparation="pad" if o.pad else "")
    options = {"batch_size": o.batch_size or (64 if questions is None else 16),
               "max_new_tokens": o.max_new_tokens or LENGTHS[o.benchmark],
               "rank": rank, "world": world}
    if questions is None:
        answer_scenes(m, o.data[0], o.out, **options)
    else:
        answer_questions(m, o.benchmark, questions, o.out, o.prompt, **options)
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run_score(o):
    items_path = o.out.with_suffix(".items.jsonl")
    if {path.resolve() for path in o.answers} & {o.out.resolve(), items_path.resolve()}:
        raise data.UserError(f"--out {o.out} would write over the answers; give another name")
    lines = benchmarks.read_answers(o.answers)
    scores, items = SCORES[o.benchmark](o, lines)
    if not scores["n"]:
        raise data.UserError(f"none of {scores['unparsed']} replies can be read, so there is nothing to "
                             "score; look at them, and ask another judge or extractor")
    if settings := [line["settings"] for line in lines if "settings" in line]:
        scores["settings"] = settings[0] if len(settings) == 1 else settings
    data.atomic_write(items_path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))
    data.atomic_write(o.out, json.dumps(scores, indent=1) + "\n")
    print(table(o.benchmark, scores))


def run_export(o):
    answers = [line for line in benchmarks.read_answers([o.answers]) if "settings" not in line]
    data.atomic_write(o.out, benchmarks.export(o.benchmark, answers))


def parse(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = data.Parser(prog="eval_hallu.py", description=__doc__, formatter_class=raw)
    step = parser.add_subparsers(dest="step", required=True)
    p = step.add_parser("answers", help="let a model answer a benchmark's questions")
    p.set_defaults(run=run_answers)
    p.add_argument("benchmark", choices=tuple(LENGTHS))
    p.add_argument("--model", required=True, help="a llava-hf folder, or classroom")
    p.add_argument("--adapter", help="a LoRA folder in PEFT's format on top of it")
    p.add_argument("--template", help="of the prompt, as in the run's --set template= [the folder's]")
    p.add_argument("--pad", action="store_true", help="pad images to a square: as --set images=pad trains")
    p.add_argument("--data", required=True, type=Path, nargs="+",
                   help="the benchmark's question file, or the folder that holds it (POPE: or several files)")
    p.add_argument("--images", type=Path, help="the folder of the images [beside --data]")
    p.add_argument("--out", required=True, type=Path, help="answers.jsonl; an unfinished one is continued")
    p.add_argument("--prompt", default="{question}", help="what is asked, with {question} [{question}]")
    p.add_argument("--batch_size", type=compare.positive,
                   help="questions at once [classroom: 64, others: 16]")
    p.add_argument("--max_new_tokens", type=compare.positive,
                   help="an answer's length at most [classroom, pope: 64; others: 512]")
    p.add_argument("--limit", type=compare.positive, help="only the first N questions")
    p.add_argument("--dtype", choices=("bfloat16", "float16", "float32", "float64"),
                   help="of the model [bfloat16 on a GPU, float32 elsewhere]")
    scoring = step.add_parser("score", help="score answers, without a model", formatter_class=raw)
    kinds = scoring.add_subparsers(dest="benchmark", required=True)
    for name, says in {"classroom": "the built-in world", "pope": "yes and no about objects, by split",
                       "amber": "captions, and questions by type", "mmhal": "96 questions, by a judge",
                       "chair": "captions of COCO images, Object HalBench's too"}.items():
        p = kinds.add_parser(name, help=says)
        p.set_defaults(run=run_score)
        p.add_argument("--answers", required=True, type=Path, nargs="+",
                       help="what `answers` wrote, or a file as the official scripts take it")
        p.add_argument("--out", required=True, type=Path, help="scores.json, and per item .items.jsonl")
        if name != "classroom":
            p.add_argument("--mode", choices=("robust", "official"), default="robust",
                           help="official: the official scorer's numbers, misreadings included [robust]")
            p.add_argument("--partial", action="store_true", help="score what is answered, and say how much")
        if name == "pope":
            p.add_argument("--questions", required=True, type=Path, nargs="+",
                           help="coco_pope_SPLIT.json, several of them, or their folder")
        if name == "amber":
            p.add_argument("--data", required=True, type=Path, help="AMBER's data folder")
            p.add_argument("--similarity", default="exact",
                           help="of words: exact, or a file of similarities or of vectors [exact]")
            p.add_argument("--nouns", default="builtin",
                           help="builtin (no package), nltk (the official way), or a file of nouns [builtin]")
        if name == "chair":
            p.add_argument("--annotations", required=True, type=Path, help="COCO's 2014 annotations folder")
            p.add_argument("--synonyms", required=True, type=Path, help="the published list, a class a line")
            p.add_argument("--scorer", choices=("original", "objhal", "opera"), default="objhal",
                           help="CHAIR's own rules, Object HalBench's, or those of OPERA's and HALVA's code: "
                                "words by their part of speech [objhal]")
            p.add_argument("--nouns", default="builtin",
                           help="how words are put in the singular: builtin (no package), nltk (Object "
                                "HalBench's and OPERA's official way), or a JSON file, {word: singular} or "
                                "{text: [its words]} [builtin]")
            p.add_argument("--extractor", default="none", metavar="none|FILE|URL|MODEL",
                           help="who lists the objects: nobody, saved replies, a server, a folder [none]")
            p.add_argument("--extraction_prompt", type=Path, help="with {question} and {answer} [our own]")
        if name == "mmhal":
            p.add_argument("--template", required=True, type=Path, help="mmhal-bench_answer_template.json")
            p.add_argument("--judge", metavar="FILE|URL|MODEL", help="saved replies, a server, or a folder")
            p.add_argument("--judge_prompt", type=Path, help="with four {} to fill in [our own]")
        if name in ("chair", "mmhal"):
            p.add_argument("--chat_model", help="the server's name for the model, where it serves several")
    compare.add_votes_parser(kinds)
    scoring.epilog = "\n".join(each.format_usage().removeprefix("usage: ") for each in kinds.choices.values())
    p = step.add_parser("export", help="answers as the official scripts read them")
    p.set_defaults(run=run_export)
    p.add_argument("benchmark", choices=("pope", "amber", "objhal", "mmhal"))
    p.add_argument("--answers", required=True, type=Path, help="what `answers` wrote")
    p.add_argument("--out", required=True, type=Path)
    compare.add_parser(step)
    return parser.parse_args(argv)


def main():
    o = parse()
    try:
        o.run(o)
    except (data.UserError, metrics.AnswerError, nouns.NounError) as error:
        sys.exit(f"eval_hallu.py: {error}")


if __name__ == "__main__":
    main()
