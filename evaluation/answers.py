"""Let a model answer a benchmark's questions: batched, greedy, over several ranks, and never twice.

    answer_scenes(m, "scenes.jsonl", "answers.jsonl")            the classroom's; m: vlm.load's, ask.connect's
    answer_questions(m, "pope", questions, "answers.jsonl")      a published benchmark's, of benchmarks.py

For eval_hallu.py, and for train_dpo.py, which asks before and after training. answers.jsonl: first a line
{"settings": ...}, then the benchmark's lines in order, each with an "answer". Which answers share a batch can
move a near-tie by rounding, so a continued run, and one on other ranks, keeps the batches of the first: it
ends with the same bytes if the device is deterministic.
"""
if __name__ == "__main__":
    exit("A part of eval_hallu.py; run: python eval_hallu.py --help")

import hashlib
import os
from functools import partial
from pathlib import Path

import data
from evaluation import benchmarks, metrics, objects, words
from model import ask, command

LENGTHS = {"classroom": 64,                                             # tokens of an answer
           "pope": 64,
           "amber": 512,
           "objhal": 512,
           "mmhal": 512}


def describe(m):
    """The model's settings, which decide the answers: a file that was begun with others is not continued."""
    import lora
    if isinstance(m, ask.Server):
        return {"model": m.settings["model"] or m.host, "base": command.identity(m.url)}
    digest = hashlib.sha256()
    weights = lora.lora_parameters(m.model)
    for name, weight in weights.items():
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return {"model": Path(m.front.folder).name,
            "base": command.identity(m.front.folder),
            "template": m.front.template,
            "images": m.front.preparation,
            "adapter": digest.hexdigest()[:16] if weights else None,
            "dtype": str(m.model.dtype).removeprefix("torch.")}


def answer_questions(m, benchmark, questions, out_path, prompt="{question}", batch_size=None,
                     max_new_tokens=512, description="answering", ranks=command.ALONE, **more):
    """Let a model of vlm.load, with the LoRA it carries, or a server answer [Question], as
    benchmarks.questions read them: out_path gets their lines, each with an answer. The same call continues.

    batch_size: None for as many questions as a server's workers, 512 to a model of the classroom, 16 to
    another. more: settings of the benchmark.
    """
    if not batch_size:
        batch_size = m.workers if isinstance(m, ask.Server) else 512 if m.front.is_classroom else 16
    settings = describe(m) | more | {
        "decoding": "greedy",
        "prompt": prompt,
        "seed": None,
        "questions_sha256": ask.hashed([question.line for question in questions]),
        "benchmark": benchmark,
        "max_new_tokens": max_new_tokens,
        "questions": len(questions)}
    items = [{"id": place, "hash": ask.hashed(question.line), "_question": question}
             for place, question in enumerate(questions)]
    Path(out_path).parent.mkdir(parents=True, exist_ok=True)
    store = command.Store(Path(out_path), ranks, {"settings": settings},
                          shape=lambda row: questions[row["id"]].line | {"answer": row.get("answer")})
    store.work(items, partial(_texts, m, max_new_tokens, batch_size), batch_size, description)


def _texts(m, max_new_tokens, batch_size, groups):
    """For each group of items, the model's answers: [{"answer"}]."""
    from model import generation
    for group in groups:
        questions = [item["_question"] for item in group]
        if isinstance(m, ask.Server):
            texts = _replies(m, questions)
        else:
            images = [[m.front.read(question.image)] for question in questions]
            prompts = [question.prompt for question in questions]
            texts = generation.generate(m, images, prompts, max_new_tokens=max_new_tokens,
                                        batch_size=batch_size)
        yield [{"answer": text} for text in texts]


def _replies(server, questions):
    """What a server answers, asked at once. Raises UserError if a question gets no reply."""
    asked = [ask.Question(n, question.prompt, (question.image,)) for n, question in enumerate(questions)]
    said = dict(server.ask(asked))
    if len(said) < len(asked):
        raise data.UserError(f"{server.host} leaves {len(asked) - len(said)} questions without an answer "
                             f"({server.reason}); the same command asks again")
    return [said[question.id]["reply"].strip() for question in asked]


def answer_scenes(m, path, out_path, max_new_tokens=64, **options):
    """Let a model answer scenes.jsonl, or its folder's. options: of answer_questions."""
    questions = benchmarks.questions("classroom", [path])
    file, = benchmarks.files(Path(path), "scenes.jsonl")
    answer_questions(m, "classroom", questions, out_path,
                     max_new_tokens=max_new_tokens,
                     scenes=os.path.relpath(file, Path(out_path).parent),
                     scenes_sha256=command.fingerprint(file.read_bytes()),
                     **options)


# ---- for training ----
def score_classroom(answers_path):
    """-> metrics.classroom of an answers file."""
    return metrics.classroom(benchmarks.read_answers([answers_path]))


def difference(*paths):
    """-> metrics.difference of two answers files, the one before training and the one after."""
    return metrics.difference(*(benchmarks.read_answers([path]) for path in paths))


def quick(m, path, out_path, images=None, annotations=None, synonyms=None, follow_links=False, **options):
    """{measure: percent} of a small file of questions, asked of a model as it is while it is trained.

    path: POPE's questions, or questions about COCO images ({question_id, image, text}), whose answers are
    scored by CHAIR with COCO's annotations and a synonyms file. out_path: where the answers go. options: of
    answer_questions, such as batch_size.
    """
    Path(out_path).unlink(missing_ok=True)                       # of other weights, if the run was resumed
    first, *_ = benchmarks.records(path, "question file")
    kind = "pope" if "label" in first else "objhal"
    questions = benchmarks.questions(kind, [path], images, follow_links=follow_links)
    answer_questions(m, kind, questions, out_path, max_new_tokens=LENGTHS[kind], **options)
    lines = benchmarks.read_answers([out_path])
    if kind == "pope":
        scores, _ = metrics.pope(benchmarks.pope_questions([path]), lines)
        return {f"pope_{key}": 100 * scores[key] for key in ("accuracy", "f1", "yes_ratio")}
    table = objects.synonyms(command.read_text(synonyms))
    truth = benchmarks.coco_truth(annotations, lines, table, words.singulars)
    scores, _ = metrics.chair(lines, truth, table, words.singulars)
    return {key: 100 * scores[key] for key in ("chair_s", "chair_i", "recall")}
