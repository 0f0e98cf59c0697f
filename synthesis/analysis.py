"""A run's page of prompts, pictures and pairs, gallery.html, and the paper's tables of it, analysis.json.

    python synth.py analyse --out D

classroom/papers/analyses.py makes both.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of synth.py; run: python synth.py --help"))

from model import command


def analyse(run):
    words = [f"--{name}={getattr(run.o, name)}" for name in ("judge", "model_name", "seed", "gallery")]
    print(command.classroom("papers/analyses.py", run.out, *words), end="")
    run.say("analyse", page="gallery.html", tables="analysis.json")
