"""A run's page of prompts, pictures and pairs, gallery.html, and the paper's tables of it, analysis.json.

    python synth.py analyse --out D

classroom/papers/analyses.py makes both.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of synth.py; run: python synth.py --help"))

import subprocess
import sys
from pathlib import Path

from data import UserError

PROGRAM = Path(__file__).resolve().parents[1] / "classroom" / "papers" / "analyses.py"


def analyse(run):
    words = [f"--{name}={getattr(run.o, name)}" for name in ("judge", "model_name", "seed", "gallery")]
    if subprocess.run([sys.executable, PROGRAM, run.out, *words]).returncode:
        raise UserError("the run's page and tables were not made: see above")
    run.say("analyse", page="gallery.html", tables="analysis.json")
