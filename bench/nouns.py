"""How far AMBER's and CHAIR's scores are from the official ones when our rules find the nouns.

    python bench/nouns.py      tables for the docs, a minute

Compared are scores, in points: CHAIR, Cover, Hal and Cog of AMBER with our nouns and with those that NLTK's
tagger and WordNet found; CHAIR of COCO captions with our lemmas and with the official scorers'. Captions that
models wrote of COCO images have no truth of AMBER's, so each is set beside an AMBER image: the one of whose
truth it names most, each image once; or any, ten times over. Their official lemmas are ours where the golden
table of lemmas is silent.
"""
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from evaluation import amber as ambers  # noqa: E402
from evaluation import benchmarks, metrics, objects, stats, words  # noqa: E402

stats.RESAMPLES = 0                                 # no intervals are read here
KEYS = ("chair", "cover", "hal", "cog")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def row(name, n, theirs, ours):
    """A line of the table: theirs, ours and the difference, in points."""
    cells = [f"{a:.1f} / {b:.1f} ({b - a:+.2f})" for a, b in zip(theirs, ours, strict=True)]
    print(f"| {name} | {n} | {' | '.join(cells)} |")


def amber(files, captions, official):
    """[[CHAIR, Cover, Hal, Cog] with the official nouns, with ours] of {AMBER id: caption}."""
    answers = [{"id": name, "response": text} for name, text in captions.items()]
    scores = [ambers.measures([], answers, nouns=found, partial=True, **files)[0]
              for found in (official, words.nouns)]
    return [[part[key] for key in KEYS] for part in scores]


def beside(places, *columns):
    return [dict(zip(places, column, strict=True)) for column in columns]


def bench_amber(shared, golden):
    folder = shared / "official" / "amber"
    files = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("annotations", "relation")}
    files["safe_words"] = (folder / "safe_words.txt").read_text().split("\n")
    print("| captions: official / ours (difference) | n | CHAIR | Cover | Hal | Cog |")
    print("|---|---|---|---|---|---|")
    for path in sorted(golden.glob("amber/nouns.*.jsonl")):
        official = {line["id"]: line["nouns_in_vocab"] for line in lines(path)}
        answers = json.loads((path.parent / f"{path.stem.removeprefix('nouns.')}.json").read_text())
        captions = {line["id"]: line["response"] for line in answers if line["id"] in official}
        row(f"templates, {path.name}", len(captions), *amber(files, captions, official))
    table = json.loads((golden / "lemma" / "nltk_noun_lemma.json").read_text())
    vocabulary = ambers.vocabulary(files["relation"])
    truths = {line["id"]: set(line["truth"]) for line in files["annotations"]
              if line["type"] == "generative"}
    for path in sorted(golden.glob("lemma/tokenize_pos*.jsonl")):
        texts, found = [], []
        for line in lines(path):
            texts.append(line["text"])
            found.append([table.get(word, words.lemma(word)) for word, tag in
                          zip(line["tokens"], line["tags"], strict=True) if tag.startswith("NN")])
        free, places = dict(truths), []
        for named in found:                        # the image of which a caption names most, each image once
            named = set(named) & vocabulary
            places.append(max(free, key=lambda i: len(free[i] & named) / (len(free[i]) + 3)))
            del free[places[-1]]
        row("real, beside the nearest image", len(texts), *amber(files, *beside(places, texts, found)))
        draws = []
        for seed in range(10):
            places = random.Random(seed).sample(sorted(truths), len(texts))
            draws.append(amber(files, *beside(places, texts, found)))
        means = [[sum(draw[who][k] for draw in draws) / len(draws) for k in range(4)] for who in (0, 1)]
        row("real, beside any image, mean of ten", len(texts), *means)
        worst = [max(abs(draw[0][k] - draw[1][k]) for draw in draws) for k in range(4)]
        print("| the same, largest of ten | | " + " | ".join(f"{value:.2f}" for value in worst) + " |")


def bench_chair(shared, golden):
    print("\n| CHAIR, official / ours (difference) | n | CHAIR_s | CHAIR_i |\n|---|---|---|---|")
    folder = shared / "official" / "objhal"
    expected = json.loads((golden / "chair" / "expected.json").read_text())
    for scorer, file, lemmatize, key in (
            ("original", "synonyms.chair.txt", words.singulars, "original_chair(pattern)"),
            ("objhal", "synonyms_refine.rlhfv.txt", words.lemmas, "rlhfv_nogpt")):
        table = objects.synonyms((folder / file).read_text(), literal=scorer != "objhal")
        for path in sorted(golden.glob("chair/responses_*.jsonl")):
            answers, name = lines(path), path.stem.removeprefix("responses_")
            truth = benchmarks.coco_truth(golden / "chair" / "coco80", answers, table, lemmatize)
            scores, _ = metrics.chair(answers, truth, table, lemmatize, mode="official")
            official = expected[f"{key}|{name}"]
            row(f"{scorer}, {name}", len(answers), [100 * official["CHAIRs"], 100 * official["CHAIRi"]],
                [100 * scores["chair_s"], 100 * scores["chair_i"]])


def main():
    parser = data.Parser(prog="bench/nouns.py", description=__doc__)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared",
                        help="where the benchmarks' files are [../shared]")
    parser.add_argument("--golden", type=Path,
                        help="results of the official code [golden/ in --shared]")
    options = parser.parse_args()
    golden = options.golden or options.shared / "golden"
    if not (golden / "amber").is_dir():
        parser.error(f"{golden} holds no amber folder; give --shared and --golden")
    bench_amber(options.shared, golden)
    bench_chair(options.shared, golden)


if __name__ == "__main__":
    main()
