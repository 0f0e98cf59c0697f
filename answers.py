"""Let a model answer a benchmark's questions: batched, greedy, over several ranks, and never twice.

    answer_scenes(m, "scenes.jsonl", "answers.jsonl")            the classroom's, with a model of vlm.load
    answer_questions(m, "pope", questions, "answers.jsonl")      a published benchmark's, of benchmarks.py
    read_answers("answers.jsonl")                                -> (settings, answers)

answers.jsonl: first a line {"settings": ...}, then the benchmark's lines in order, each with an "answer". A
file of its own, because training answers questions too; eval_hallu.py is the command line over it.

Which answers share a batch can move a near-tie by rounding, so a continued run, and one on other ranks, keeps
the batches of the first: it ends with the same bytes where the device is deterministic. Ranks write
answers.jsonl.rankN beside the file; rank 0 puts them in order and removes them.
"""
import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

import benchmarks
import data
import metrics
import nouns
import objects

LENGTHS = {"classroom": 64, "pope": 64, "amber": 512, "objhal": 512, "mmhal": 512}      # tokens of an answer


def read_scenes(path):
    """The lines of a scenes.jsonl (or its folder's) and the file: checked before a model works in vain."""
    file = Path(path) / "scenes.jsonl" if Path(path).is_dir() else Path(path)
    scenes = list(data.read_jsonl(file))
    for number, scene in enumerate(scenes, 1):
        where = f"{file}, line {number}"
        metrics.check_truth(scene, where)
        if not (isinstance(scene.get("question"), str) and isinstance(scene.get("image"), str)):
            raise data.UserError(f"{where} lacks a question or an image; make the scenes again")
        image_path(file, scene["image"])
    if not scenes:
        raise data.UserError(f"{file} holds no scenes; make them with classroom/pairs.py scenes")
    return scenes, file


def image_path(file, image):
    """The path of an image named in a file, which must not lead out of that file's folder."""
    root = os.path.realpath(Path(file).parent)
    path = os.path.realpath(os.path.join(root, image))
    if os.path.commonpath([root, path]) != root:
        raise data.UserError(f"{file}: image {image} leaves the folder {root}; move it inside")
    return path


def describe(m, **more):
    """The settings that decide the answers: a file that was begun with others is not continued."""
    import lora
    digest = hashlib.sha256()
    weights = lora.lora_parameters(m.model)
    for name, weight in weights.items():
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    front = m.front
    return {"model": Path(front.folder).name, "base": data.identity(front.folder),
            "template": front.template, "images": front.preparation,
            "adapter": digest.hexdigest()[:16] if weights else None,
            "dtype": str(m.model.dtype).removeprefix("torch."), "decoding": "greedy", **more}


def check_begun(path, begun, settings):
    """A UserError where a file was not begun with these settings: what differs is named."""
    if not isinstance(begun, dict):
        raise data.UserError(f"{path} is no answers file (no settings in its first line); give another --out")
    if differ := [k for k in {**begun, **settings} if begun.get(k) != settings.get(k)]:
        was = ", ".join(f"{k} ({_short(begun.get(k))}, now {_short(settings.get(k))})" for k in differ)
        raise data.UserError(f"{path} was begun with other settings: {was}; give another --out or delete it")


def answered(path, settings, lines):
    """How many of the lines an existing file answers; a line that a killed run left unfinished is cut off."""
    try:
        raw = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise data.UserError(f"{path} could not be read ({error.strerror}); check the path") from error
    whole = raw[:raw.rfind(b"\n") + 1]
    if whole != raw:
        data.atomic_write(path, whole)
    if not whole:
        data.append_jsonl(path, {"settings": settings})
        return 0
    first, *rest = data.read_jsonl(path)
    check_begun(path, first.get("settings"), settings)
    if [{**line, "answer": old.get("answer")} for line, old in zip(lines, rest, strict=False)] != rest:
        raise data.UserError(f"{path} holds answers to other questions; give another --out or delete it")
    return len(rest)


def in_parts(path, settings):
    """{place: answer} of the files beside `path` that ranks have written, each for itself."""
    found = {}
    for part in sorted(path.parent.glob(f"{path.name}.rank*")):
        lines = data.read_jsonl(part, torn_ok=True)
        if first := next(lines, None):
            check_begun(part, first.get("settings"), settings)
            found |= {line["place"]: line["answer"] for line in lines}
    return found


def merge(path, settings, lines):
    """Put what the ranks have written into the one file, in the order of the questions."""
    first, *rest = data.read_jsonl(path)
    found = {place: old["answer"] for place, old in enumerate(rest)} | in_parts(path, settings)
    whole = [first, *({**line, "answer": found[place]} for place, line in enumerate(lines))]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in whole)
    data.atomic_write(path, text.encode("utf-8", "backslashreplace"))
    for part in path.parent.glob(f"{path.name}.rank*"):
        part.unlink()


def together(work, rank, world):
    """work() on rank 0 when every rank has come here; its result on all of them."""
    if world == 1:
        return work()
    import torch.distributed

    import ranks
    torch.distributed.barrier()
    return ranks.from_rank_0(work, rank, world)


def _short(value):
    text = str(value)
    return text if len(text) < 40 else text[:37] + "..."


def answer(m, lines, ask, out_path, settings, batch_size, progress, description, rank=0, world=1):
    """The loop of every benchmark: lines -> out_path, each with an answer. ask(i): line i's image and prompt.

    Batches are those of the whole list, whoever answers them: a run that goes on, or on more ranks, ends with
    the same file. Several ranks write a file each, which rank 0 puts in order when all are done.
    """
    import vlm
    out_path = Path(out_path)

    def begin():
        out_path.parent.mkdir(parents=True, exist_ok=True)
        done = answered(out_path, settings, lines)
        return set(range(done)), set(in_parts(out_path, settings))
    done, parted = together(begin, rank, world)
    alone = world == 1 and not parted
    part = out_path if alone else out_path.with_name(f"{out_path.name}.rank{rank}")
    done |= parted
    todo = [range(at, min(at + batch_size, len(lines))) for at in range(0, len(lines), batch_size)]
    todo = [places for places in todo if not done.issuperset(places)]
    if not alone and not (part.exists() and next(data.read_jsonl(part, torn_ok=True), None)):
        data.append_jsonl(part, {"settings": settings})
    with tqdm(total=len(lines), initial=len(done), desc=description, unit="answer",
              disable=not progress or rank > 0) as bar:
        for places in todo[rank::world]:
            images, prompts = zip(*map(ask, places), strict=True)
            texts = vlm.generate(m, [[image] for image in images], prompts, batch_size=batch_size,
                                 max_new_tokens=settings["max_new_tokens"])
            for place, text in zip(places, texts, strict=True):
                if place not in done:
                    line = lines[place] if alone else {"place": place}
                    data.append_jsonl(part, {**line, "answer": text})
                    bar.update(world)
    if not alone:
        together(lambda: merge(out_path, settings, lines), rank, world)


def answer_scenes(m, scenes_path, out_path, batch_size=64, max_new_tokens=64, progress=True,
                  description="answering", rank=0, world=1):
    """Let a model of vlm.load, with the LoRA it carries, answer scenes.jsonl; called again it goes on."""
    scenes, file = read_scenes(scenes_path)
    out_path = Path(out_path)
    settings = describe(m, benchmark="classroom", max_new_tokens=max_new_tokens, questions=len(scenes),
                        scenes=os.path.relpath(file, out_path.parent),
                        scenes_sha256=hashlib.sha256(file.read_bytes()).hexdigest()[:16])

    def ask(place):
        return data.read_image(image_path(file, scenes[place]["image"])), scenes[place]["question"]
    answer(m, scenes, ask, out_path, settings, batch_size, progress, description, rank, world)


def answer_questions(m, benchmark, questions, out_path, prompt="{question}", batch_size=16,
                     max_new_tokens=512, progress=True, description="answering", rank=0, world=1):
    """Let a model answer a published benchmark: what benchmarks.questions read; called again it goes on."""
    lines = [question.line for question in questions]
    digest = hashlib.sha256(json.dumps(lines, sort_keys=True).encode()).hexdigest()[:16]
    settings = describe(m, benchmark=benchmark, prompt=prompt, max_new_tokens=max_new_tokens, seed=None,
                        questions=len(lines), questions_sha256=digest)

    read = lru_cache(maxsize=2)(benchmarks.read_image)      # questions about one image follow each other

    def ask(place):
        return read(questions[place].image), questions[place].prompt
    answer(m, lines, ask, out_path, settings, batch_size, progress, description, rank, world)


def read_answers(path):
    """-> (settings or {}, answers). Raises AnswerError for a file that its run has not finished."""
    settings = next(data.read_jsonl(path, torn_ok=True), {}).get("settings") or {}
    lines = list(data.read_jsonl(path, torn_ok=bool(settings)))[bool(settings):]
    if len(lines) != settings.get("questions", len(lines)):
        raise metrics.AnswerError(f"{path} answers {len(lines)} of {settings['questions']} questions; run "
                                  "the same `answers` command again, it goes on where it stopped")
    return settings, lines


def score_classroom(answers_path):
    """-> metrics.classroom of an answers file."""
    return metrics.classroom(read_answers(answers_path)[1])


def difference(before_path, after_path):
    """-> metrics.difference of two answers files."""
    return metrics.difference(read_answers(before_path)[1], read_answers(after_path)[1])


def quick(m, path, out_path, images=None, annotations=None, synonyms=None, **options):
    """{measure: percent} of a small file of questions, asked of a model as it is while it is trained.

    path: POPE's questions, or questions about COCO images ({question_id, image, text}), whose answers are
    scored by CHAIR with COCO's annotations and a synonyms file. out_path: where the answers go. options: of
    answer_questions, such as batch_size.
    """
    Path(out_path).unlink(missing_ok=True)                       # of other weights, where a run was resumed
    kind = "pope" if "label" in data.read_records(path)[0] else "objhal"
    questions = benchmarks.questions(kind, [path], images)
    answer_questions(m, kind, questions, out_path, max_new_tokens=LENGTHS[kind], **options)
    lines = benchmarks.read_answers([out_path])
    if kind == "pope":
        scores, _ = metrics.pope(benchmarks.pope_questions([path]), lines)
        return {f"pope_{key}": 100 * scores[key] for key in ("accuracy", "f1", "yes_ratio")}
    classes, about = objects.synonyms(benchmarks.read_text(synonyms)), objects.image_ids(lines)
    truth = objects.coco_truth(*benchmarks.coco(annotations, about), classes, nouns.singulars, about)
    scores, _ = metrics.chair(lines, truth, classes, nouns.singulars)
    return {key: 100 * scores[key] for key in ("chair_s", "chair_i", "recall")}


def word_rewards(m, run_folder, beta, images=12, n=4):
    """Does the model look? beta (log p_policy - log p_reference) of each word of an answer after training,
    with the true image and with another. For n of the run's first captions; hallucinating ones first."""
    import vlm

    def logps(m, images, new):
        return [vlm.word_logps(m, image, new["question"], new["answer"]) for image in images]
    run = Path(run_folder)
    (settings, before), (_, after) = (read_answers(run / f"{name}.jsonl") for name in ("before", "after"))
    both = [(b, a) for b, a in zip(before, after, strict=True) if a["kind"] == "caption" and a["answer"]]
    marked = [any(metrics.hallucinated(x["answer"], x["truth"]) for x in pair) for pair in both[:images]]
    chosen = sorted(sorted(range(len(marked)), key=lambda i: not marked[i])[:n])
    file, out = run / settings["scenes"], []
    for i in chosen:
        old, new = both[i]
        other = next((b["image"] for b, _ in both[i + 1:] + both[:i] if b["image"] != new["image"]), None)
        if other is None:
            continue
        paths = [image_path(file, name) for name in (new["image"], other)]
        shown = [data.read_image(p) for p in paths]
        with vlm.base_of(m) as base:
            reference = logps(base, shown, new)
        rewards = [[(w, beta * (p - r)) for (w, p), (_, r) in zip(*both, strict=True)]
                   for both in zip(logps(m, shown, new), reference, strict=True)]
        image, other_image = (os.path.relpath(p, os.path.realpath(run)) for p in paths)
        out.append({"id": new["id"], "image": image, "other_image": other_image, "question": new["question"],
                    "answer_before": old["answer"], "answer_after": new["answer"], "truth": new["truth"],
                    "words": [{"word": w, "true": t, "other": o}
                              for (w, t), (_, o) in zip(*rewards, strict=True)]})
    return out
