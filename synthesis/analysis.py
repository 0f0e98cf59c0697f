"""A page of a synthesis run's prompts: their pictures with scores and guidance, and their pairs.

    python synth.py analyse --out D         gallery.html, and analysis.json by classroom/papers/analyses.py
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of synth.py; run: python synth.py --help"))

import subprocess
import sys
from html import escape
from pathlib import Path

import data
from evaluation import page
from model import command

PAPER = Path(__file__).resolve().parents[1] / "classroom" / "papers" / "analyses.py"


def entry(run, row, pair):
    """A prompt on the page: its pictures with their scores, then its pair, if there is one."""
    body = ""
    for place, image in enumerate(row["candidates"]):
        says = [f"guidance {image['guidance']:g}"]
        says += [f"{name} {scores[place]:.2f}" for name, scores in row["scores"].items()]
        if image["image"] == row["image"]:
            says.append("picked")
        body += page.picture(run.out, image["image"], ", ".join(says))
    body = f'<div class="row">{body}</div>'
    if pair:
        sides = [[side, pair[side]] for side in ("chosen", "rejected")]
        body += page.table(["", pair["question"]], sides)
    return page.section(escape(row["prompt"]), "", body)


def analyse(run):
    """Writes gallery.html, of --set gallery= prompts, evenly spaced through the run, so that none was picked;
    and analysis.json, the paper's tables of the run."""
    body, most = "", run.o.gallery
    ranked, pairs = run.rows("ranked", "rank"), {row["id"]: row for row in run.rows("pairs")}
    apart = max(1, len(ranked) // max(1, most))
    with command.explained(f"{run.out}: its files are not those of one run", "run the stages again"):
        for row in ranked[::apart][:most]:
            body += entry(run, row, pairs.get(row["id"]))
    data.atomic_write(run.out / "gallery.html", page.page(f"Synthesis: {run.out.name}", body))
    words = [run.out, f"--judge={run.o.judge}", f"--model_name={run.o.model_name}", f"--seed={run.o.seed}"]
    if subprocess.run([sys.executable, PAPER, *words]).returncode:
        raise data.UserError("the paper's tables were not made: see above")
    run.say("analyse", prompts=len(ranked), page="gallery.html")
