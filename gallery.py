"""What a synthesis run made: the paper's analyses (arXiv 2412.17417) on its files, and a page of examples.

    python synth.py analyse --out D         analysis.json, three figures (PNG, with matplotlib), gallery.html

    guidance     Fig. 4: share of the prompts whose best image has each guidance scale, by topic
    agreement    Table 4: two (three) rankers' top k of the candidates, mean share in common, beside chance
    judge        Table 5: how often --judge prefers the first ranker's pick to the second's; the two in random
                 order, ties apart, prompts where both picked the same image apart
    similarity   Fig. 6: each prompt's mean similarity to the other prompts, each response's to the others
                 that answer the same question; cosines of --encoder, else of weighted word counts

A file of its own, for it only reads; numbers are computed here, the page's look is page.py's.
"""
import itertools
import json
import math
import re
from collections import Counter
from html import escape

import numpy as np

import chat
import data
import page

ASK_JUDGE = ("Two pictures were made from this description:\n{prompt}\nWhich shows it better: the first (A) "
             "or the second (B)? Reply with A, B or tie.")


# ---------------------------------------------------------------------------- numbers
def guidance(ranked):
    """{topic: {scale: share}}, `all` first."""
    scales = sorted({c["guidance"] for r in ranked for c in r["candidates"]})
    topics = {"all": ranked} if ranked else {}
    for r in sorted(ranked, key=lambda r: r["topic"]):
        topics.setdefault(r["topic"], []).append(r)
    return {t: {g: sum(r["guidance"] == g for r in rows) / len(rows) for g in scales}
            for t, rows in topics.items()}


def top(scores, k):
    """The k best places; of equal scores the earlier."""
    return set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])


def agreement(ranked):
    """[{"rankers", "k", "agree", "chance", "n"}] of every two, and every three, rankers that scored."""
    out, rows = [], [r for r in ranked if len(r["candidates"]) > 1]
    names = sorted({n for r in rows for n in r["scores"]}, key=list(rows[0]["scores"]).index) if rows else []
    for group in itertools.chain(*(itertools.combinations(names, size) for size in (2, 3))):
        both = [r for r in rows if all(n in r["scores"] for n in group)]
        for k in range(1, max((len(r["candidates"]) for r in both), default=1)):
            common = [len(set.intersection(*(top(r["scores"][n], k) for n in group))) / k for r in both]
            chance = [(k / len(r["candidates"])) ** (len(group) - 1) for r in both]
            out.append({"rankers": list(group), "k": k, "agree": float(np.mean(common)),
                        "chance": float(np.mean(chance)), "n": len(both)})
    return out


def duel(row, seed):
    """(A, B, is A the first ranker's): the places of two rankers' picks in random order; None if equal."""
    ours, theirs = (max(range(len(s)), key=s.__getitem__) for s in list(row["scores"].values())[:2])
    if ours == theirs:
        return None
    first = bool(data.draw(seed, "judge", row["id"]).integers(2))
    return (ours, theirs, first) if first else (theirs, ours, first)


def judged(run, ranked):
    """Table 5's counts, or None without --judge or with one ranker."""
    o, names = run.o, list(ranked[0]["scores"])[:2] if ranked else []
    if not o.judge or len(names) < 2:
        return None
    asked, first, same = [], {}, 0
    for r in ranked:
        pair = duel(r, o.seed)
        if not pair:
            same += 1
            continue
        *places, first[r["id"]] = pair
        pictures = [run.out / r["candidates"][k]["image"] for k in places]
        asked.append(chat.Question(r["id"], ASK_JUDGE.format(prompt=r["prompt"]), pictures))
    said, count = chat.replies(o.judge, asked, run.out / "parts" / "judge.jsonl", model=o.model_name or None,
                               max_tokens=16, description="judge"), Counter()
    for id, text in said.items():
        vote = re.match(r"\W*(?:answer\W+)?(a|b|tie)\b", text, re.I)
        vote = vote and vote[1].lower()
        count["unread" if not vote else "tie" if vote == "tie" else names[(vote == "a") != first[id]]] += 1
    wins, losses = (count[n] for n in names)
    low, high = wilson(wins, wins + losses)
    return {"rankers": names, "wins": wins, "losses": losses, "ties": count["tie"], "unread": count["unread"],
            "not_answered": len(asked) - len(said), "same_pick": same,
            "win_rate": wins / (wins + losses) if wins + losses else None, "interval": [low, high]}


def wilson(k, n, z=1.96):
    """95% interval of a share k of n."""
    if not n:
        return 0., 1.
    centre, width = (k + z * z / 2) / (n + z * z), z * math.sqrt(k * (n - k) / n + z * z / 4) / (n + z * z)
    return centre - width, centre + width


def vectors(texts, encoder="", device="cpu"):
    """Unit vectors (N, D): a sentence encoder's mean over tokens, or word counts weighted by rarity."""
    if encoder:
        import torch
        from transformers import AutoModel, AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(encoder, local_files_only=True)
        model = AutoModel.from_pretrained(encoder, local_files_only=True).eval().to(device)
        parts = []
        for at in range(0, len(texts), 64):
            x = tokenizer(texts[at:at + 64], padding=True, truncation=True, return_tensors="pt").to(device)
            with torch.no_grad():
                hidden, mask = model(**x).last_hidden_state, x["attention_mask"][..., None]
            parts.append(((hidden * mask).sum(1) / mask.sum(1)).float().cpu().numpy())
        found = np.concatenate(parts)
    else:
        words = [Counter(re.findall(r"\w+", t.lower())) for t in texts]
        seen = Counter(w for count in words for w in count)
        found = np.zeros((len(texts), 4096), np.float32)
        for row, count in zip(found, words, strict=True):
            for word, n in count.items():
                row[data.hash64(word) % 4096] += n * math.log((1 + len(texts)) / seen[word])
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def mean_similarity(unit):
    """Each vector's mean cosine with the others: (N,)."""
    n = len(unit)
    return (unit @ unit.sum(0) - (unit * unit).sum(1)) / (n - 1) if n > 1 else np.zeros(0)


def similarity(prompts, responses, encoder="", device="cpu"):
    """{"prompts": [...], "responses": [...]}."""
    out = {"prompts": mean_similarity(vectors(prompts, encoder, device)).tolist() if prompts else []}
    unit = vectors([r["response"] for r in responses], encoder, device) if responses else []
    groups = {}
    for k, r in enumerate(responses):
        groups.setdefault(r["id"], []).append(k)
    out["responses"] = [float(x) for places in groups.values() for x in mean_similarity(unit[places])]
    return out


# ---------------------------------------------------------------------------- figures
def figures(out, found):
    """guidance.png, agreement.png, similarity.png; [] and a sentence where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("figures: not drawn; `pip install matplotlib` draws them")
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    drawn = []

    def save(name, figure):
        figure.tight_layout()
        figure.savefig(out / name, dpi=120, metadata={"Software": None})
        plt.close(figure)
        drawn.append(name)
    table = found["guidance"]
    if table:
        figure, axes = plt.subplots(figsize=(1.5 + .9 * len(table), 3.2))
        scales, width = list(table["all"]), .8 / len(table["all"])
        for k, g in enumerate(scales):
            heights = [100 * row[g] for row in table.values()]
            axes.bar([i + k * width for i in range(len(table))], heights, width, label=f"guidance {g:g}")
        axes.set_xticks([i + .4 - width / 2 for i in range(len(table))], table, rotation=30, ha="right")
        axes.set_ylabel("best image, % of prompts")
        axes.legend(fontsize=7, ncols=len(scales), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        save("guidance.png", figure)
    if found["agreement"]:
        figure, axes = plt.subplots(figsize=(5, 3.2))
        for k, group in enumerate(dict.fromkeys(tuple(r["rankers"]) for r in found["agreement"])):
            rows = [r for r in found["agreement"] if tuple(r["rankers"]) == group]
            for kind, style, label in (("agree", "o-", " and ".join(group)), ("chance", ":", "chance")):
                axes.plot([r["k"] for r in rows], [100 * r[kind] for r in rows], f"C{k}{style}", label=label)
        axes.set_xlabel("k of the top k")
        axes.set_xticks(sorted({r["k"] for r in found["agreement"]}))
        axes.set_ylabel("in common, %")
        axes.legend(fontsize=7)
        save("agreement.png", figure)
    if any(found["similarity"].values()):
        figure, axes = plt.subplots(figsize=(5, 3.2))
        for name, values in found["similarity"].items():
            if values:
                label = f"{name} (n {len(values)})"
                axes.hist(values, bins=30, range=(0, 1), density=True, alpha=.6, label=label)
        axes.set_xlabel("mean cosine with the others")
        axes.legend(fontsize=7)
        save("similarity.png", figure)
    return drawn


# ---------------------------------------------------------------------------- the page
def candidates(run, row):
    """The candidates with their scores; under each the rankers that picked it."""
    best = {n: max(range(len(s)), key=s.__getitem__) for n, s in row["scores"].items()}
    body = ""
    for k, c in enumerate(row["candidates"]):
        scored = [f"{n} {s[k]:.2f}" for n, s in row["scores"].items()]
        says = ", ".join([f"guidance {c['guidance']:g}", *scored])
        picked = [n for n, place in best.items() if place == k]
        says += f" ← picked by {' and '.join(picked)}" if picked else ""
        body += page.picture(run.out, c["image"], says)
    return body


def entry(run, row, question, said, scores, faults, pair, reason):
    body = f'<div class="row">{candidates(run, row)}</div><dl>'
    if reason:
        body += f"<dt>dropped</dt><dd><mark>{escape(reason)}</mark></dd>"
    if question:
        body += f"<dt>question</dt><dd>{escape(question)}</dd>"
    for r in said:
        chosen = pair and pair["meta"]["models"]
        role = ["chosen", "rejected"][chosen.index(r["model"])] if chosen and r["model"] in chosen else ""
        which = (r["id"], r["model"])
        note = [r["model"], *([page.num(scores[which])] if which in scores else []), *faults.get(which, ())]
        body += (f"<dt>{role or 'neither'}</dt><dd>{escape(r['response']) or '–'} "
                 f"<small>{escape(', '.join(note))}</small></dd>")
    head = f'<h3>{escape(row["prompt"])}</h3><small>{escape(row["id"])}</small>'
    return f'<div class="card">{head}{body}</dl></div>'


def examples(run, found, ranked):
    o, rows = run.o, run.rows
    questions = {r["id"]: r["question"] for r in rows("instructions")}
    scores = {(r["id"], r["model"]): r["score"] for r in rows(f"scores-{o.scorer}")}
    faults = {(r["id"], r["model"]): r["faults"] for r in rows("faults")}
    pairs, reasons = {p["id"]: p for p in rows("pairs")}, {r["id"]: r["reason"] for r in rows("dropped")}
    said = {}
    for r in rows("responses"):
        said.setdefault(r["id"], []).append(r)
    counts = [(k, v) for k, v in Counter(reasons.values()).items()] + [
        (f"response {k}", v) for k, v in Counter(f for x in faults.values() for f in x).items()]
    scales = list(found["guidance"].get("all", ()))
    body = page.section("What was left out", f"{len(ranked)} prompts, {len(pairs)} pairs.",
                        page.table(("reason", "n"), counts))
    shares = [(t, *(f"{100 * row[g]:.0f}" for g in scales)) for t, row in found["guidance"].items()]
    body += page.section("Guidance", "Share of the prompts whose best image has this scale, in percent.",
                         page.table(("topic", *(f"{g:g}" for g in scales)), shares))
    agree = [(" and ".join(r["rankers"]), r["k"], f"{100 * r['agree']:.1f}", f"{100 * r['chance']:.1f}",
              r["n"]) for r in found["agreement"]]
    body += page.section("Agreement", "Share in common of the rankers' top k, in percent.",
                         page.table(("rankers", "k", "agree", "chance", "prompts"), agree))
    if judge := found["judge"]:
        ours, theirs = judge["rankers"]
        rate = [f"{100 * x:.0f}" for x in ((judge["win_rate"] or 0.), *judge["interval"])]
        body += page.section(
            "Judge", f"How often {ours}'s pick is preferred to {theirs}'s; the rate is of the decided.",
            page.table(("better", "worse", "ties", "same pick", "unread", "not answered", "win rate, %",
                        "95%"),
                       [[judge[k] for k in ("wins", "losses", "ties", "same_pick", "unread", "not_answered")]
                        + [rate[0], f"{rate[1]} to {rate[2]}"]]))
    shown = ranked[::max(1, len(ranked) // max(1, o.gallery))][:o.gallery]
    cards = "".join(entry(run, r, questions.get(r["id"]), said.get(r["id"], ()), scores, faults,
                          pairs.get(r["id"]), reasons.get(r["id"]) or r.get("dropped")) for r in shown)
    body += page.section("Prompts", "Evenly spaced through the run: nothing is picked.",
                         cards and f'<div class="grid" style="--w:560px">{cards}</div>')
    return page.page(f"Synthesis: {run.out.name}", body)


def analyse(run):
    """Writes analysis.json, the figures and gallery.html into the run's folder."""
    ranked, o = run.rows("ranked", "rank"), run.o
    found = {"guidance": guidance(ranked), "agreement": agreement(ranked), "judge": judged(run, ranked),
             "similarity": similarity([p["prompt"] for p in run.rows("prompts")], run.rows("responses"),
                                      o.encoder, run.device)}
    short = {k: {"n": len(v), "mean": float(np.mean(v)),
                 "deciles": np.quantile(v, np.arange(1, 10) / 10).tolist()}
             for k, v in found["similarity"].items() if v}
    data.atomic_write(run.out / "analysis.json", json.dumps(found | {"similarity": short}, indent=1) + "\n")
    drawn = figures(run.out, found)
    data.atomic_write(run.out / "gallery.html", examples(run, found, ranked))
    for row in found["agreement"]:
        print(f"top {row['k']}: {' and '.join(row['rankers'])} agree {100 * row['agree']:.1f}%, "
              f"chance {100 * row['chance']:.1f}%")
    run.say(stage="analyse", prompts=len(ranked), figures=len(drawn), page=str(run.out / "gallery.html"))
