"""Measure hallucination in two steps with a file between: a model answers, then the answers are scored.

    python eval_hallu.py answers classroom --model M --data scenes.jsonl --out answers.jsonl
        1000 captions and 2000 questions: ten seconds on a CPU; killed and called again it goes on
    python eval_hallu.py answers classroom --model M --adapter runs/NAME/adapter --data ... --out ...
        the same with a run's adapter on top; on a GPU where there is one
    python eval_hallu.py score classroom --answers answers.jsonl --out scores.json
        CHAIR, Cover, POPE, accuracy by kind, with 95% intervals: seconds, without the model

answers.jsonl: first a line {"settings": ...}, then the benchmark's lines in order, each with an "answer".
scores.json: what metrics.classroom returns, and the settings; scores.items.jsonl: what each answer adds.
Generation is greedy. Which answers share a batch can move a near-tie by rounding, so a continued file repeats
the batches of the first call: it ends with the same bytes where the device is deterministic.
"""
import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

import data
import metrics


# ---------------------------------------------------------------------------------------------- answers
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
    import vlm
    digest = hashlib.sha256()
    weights = lora.lora_parameters(m.model)
    for name, weight in weights.items():
        digest.update(name.encode() + weight.detach().cpu().contiguous().numpy().tobytes())
    return {"model": Path(m.folder).name, "base": vlm.identity(m), "template": m.template,
            "decoding": "greedy", "adapter": digest.hexdigest()[:16] if weights else None,
            "dtype": str(m.model.dtype).removeprefix("torch."), **more}


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
    begun = first.get("settings")
    if not isinstance(begun, dict):
        raise data.UserError(f"{path} is no answers file (no settings in its first line); give another --out")
    if differ := [k for k in {**begun, **settings} if begun.get(k) != settings.get(k)]:
        was = ", ".join(f"{k} ({_short(begun.get(k))}, now {_short(settings.get(k))})" for k in differ)
        raise data.UserError(f"{path} was begun with other settings: {was}; give another --out or delete it")
    if [{**line, "answer": old.get("answer")} for line, old in zip(lines, rest, strict=False)] != rest:
        raise data.UserError(f"{path} holds answers to other questions; give another --out or delete it")
    return len(rest)


def _short(value):
    text = str(value)
    return text if len(text) < 40 else text[:37] + "..."


def answer(m, lines, file, out_path, settings, batch_size, progress, description):
    """The loop of every benchmark: lines with "image" (a path beside `file`) and "question" -> out_path."""
    import vlm
    out_path = Path(out_path)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    done = answered(out_path, settings, lines)
    if done == len(lines):
        return
    with (open(out_path, "ab") as out,
          tqdm(total=len(lines), initial=done, desc=description, unit="answer", disable=not progress) as bar):
        for start in range(done // batch_size * batch_size, len(lines), batch_size):
            batch = lines[start:start + batch_size]
            images = [[data.read_image(image_path(file, line["image"]))] for line in batch]
            texts = vlm.generate(m, images, [line["question"] for line in batch],
                                 max_new_tokens=settings["max_new_tokens"], batch_size=batch_size)
            for line, text in list(zip(batch, texts, strict=True))[max(0, done - start):]:
                data.append_jsonl(out, {**line, "answer": text})
                bar.update()


def answer_scenes(m, scenes_path, out_path, batch_size=64, max_new_tokens=64, progress=True,
                  description="answering"):
    """Let a model of vlm.load, with the LoRA it carries, answer scenes.jsonl; called again it goes on."""
    scenes, file = read_scenes(scenes_path)
    out_path = Path(out_path)
    settings = describe(m, benchmark="classroom", max_new_tokens=max_new_tokens, questions=len(scenes),
                        scenes=os.path.relpath(file, out_path.parent),
                        scenes_sha256=hashlib.sha256(file.read_bytes()).hexdigest()[:16])
    answer(m, scenes, file, out_path, settings, batch_size, progress, description)


def word_rewards(m, run_folder, beta, images=12, n=4):
    """Does the model look? beta (log p_policy - log p_reference) of each word of an answer after training,
    with the true image and with another. For n of the run's first captions; hallucinating ones first."""
    import lora
    import vlm
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
        rewards = []
        features = vlm.encode_images(m, vlm.prepare(m, [data.read_image(p) for p in paths]))    # (2, K, D)
        for one in features.split(1):
            policy = vlm.word_logps(m, one, new["question"], new["answer"])
            with lora.lora_disabled(m.model):
                reference = vlm.word_logps(m, one, new["question"], new["answer"])
            rewards.append([(w, beta * (p - r)) for (w, p), (_, r) in zip(policy, reference, strict=True)])
        image, other_image = (os.path.relpath(p, os.path.realpath(run)) for p in paths)
        out.append({"id": new["id"], "image": image, "other_image": other_image, "question": new["question"],
                    "answer_before": old["answer"], "answer_after": new["answer"], "truth": new["truth"],
                    "words": [{"word": w, "true": t, "other": o}
                              for (w, t), (_, o) in zip(*rewards, strict=True)]})
    return out


# ---------------------------------------------------------------------------------------------- score
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


def items_classroom(answers):
    """What each answer adds to the sums, {measure: [numerator, denominator]}, and its hallucinated words."""
    for a in answers:
        yield {"id": a["id"], "kind": a["kind"], "answer": a["answer"],
               "hallucinated": metrics.hallucinated(a["answer"], a["truth"]), "sums": metrics.judge(a)[0]}


def table(scores):
    """The measures with their intervals as lines of text."""
    rows = [(name, scores[key], scores["intervals"][key]) for key, name in metrics.CLASSROOM.items()
            if scores[key] is not None]
    rows += [(f"{kind}, accuracy of {v['n']}", v["acc"], v["interval"])
             for kind, v in scores["by_kind"].items()]
    lines = [f"{name:32}{value:7.1f}   {low:5.1f} to {high:5.1f}" for name, value, (low, high) in rows]
    note = f"{scores['n']} answers about {scores['images']} images, {scores['unparsed']} of them unreadable"
    return "\n".join([f"{'percent':32}{'':7}   95% interval", *lines, note])


# ---------------------------------------------------------------------------------------------- command line
ANSWERS = {"classroom": answer_scenes}              # benchmark -> f(m, data, out, batch_size, max_new_tokens)
SCORES = {"classroom": (metrics.classroom, items_classroom)}        # benchmark -> (scores, what items add)


def run_answers(o):
    import torch

    import lora
    import vlm
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    try:
        m = vlm.load(o.model, adapter=o.adapter, dtype=dtype, device=device)
    except lora.AdapterError as error:
        raise data.UserError(str(error)) from error
    ANSWERS[o.benchmark](m, o.data, o.out, batch_size=o.batch_size, max_new_tokens=o.max_new_tokens)


def run_score(o):
    settings, answers = read_answers(o.answers)
    scorer, items = SCORES[o.benchmark]
    scores = scorer(answers)
    lines = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items(answers))
    data.atomic_write(o.out.with_suffix(".items.jsonl"), lines)
    data.atomic_write(o.out, json.dumps({**scores, "settings": settings}, indent=1) + "\n")
    print(table(scores))


def positive(text):
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError
    return int(text)


def parse(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = data.Parser(prog="eval_hallu.py", description=__doc__, formatter_class=raw)
    step = parser.add_subparsers(dest="step", required=True)
    p = step.add_parser("answers", help="let a model answer a benchmark's questions")
    p.add_argument("benchmark", choices=tuple(ANSWERS))
    p.add_argument("--model", required=True, help="a llava-hf folder, or classroom")
    p.add_argument("--adapter", help="a LoRA folder in PEFT's format on top of it")
    p.add_argument("--data", required=True, type=Path, help="scenes.jsonl, or the folder that holds it")
    p.add_argument("--out", required=True, type=Path, help="answers.jsonl; an unfinished one is continued")
    p.add_argument("--batch_size", type=positive, default=64, help="questions at once [64]")
    p.add_argument("--max_new_tokens", type=positive, default=64, help="an answer's length at most [64]")
    p = step.add_parser("score", help="score answers, without a model")
    p.add_argument("benchmark", choices=tuple(SCORES))
    p.add_argument("--answers", required=True, type=Path, help="what `answers` wrote")
    p.add_argument("--out", required=True, type=Path, help="scores.json; per item beside it as .items.jsonl")
    return parser.parse_args(argv)


def main():
    o = parse()
    try:
        run_answers(o) if o.step == "answers" else run_score(o)
    except (data.UserError, metrics.AnswerError) as error:
        sys.exit(f"eval_hallu.py: {error}")


if __name__ == "__main__":
    main()
