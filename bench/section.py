"""Of limit.py, vs_trl.py, scale.py and gpu.py: sizes, options, the machine, a section of RESULTS.md."""
if __name__ == "__main__":
    exit("A part of bench/limit.py; run: python bench/limit.py --help")

import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

RESULTS = Path(__file__).with_name("RESULTS.md")


class Shape(NamedTuple):
    """A LLaVA, and the lengths of its pairs in tokens."""
    hidden: int
    inner: int                 # of the MLP
    layers: int
    heads: int
    vision: tuple              # CLIP's hidden, inner, layers, heads
    pixels: int                # side of an image; patches of 14
    question: int              # with the BOS, without the image
    response: int              # with the EOS
    vocabulary: int
    rank: int                  # LoRA's


SHAPES = {
    # LLaVA-1.5-7B at a quarter of its width and an eighth of its depth, in its proportions: lm_head 2% of the
    # weights, the vision tower 5%, LoRA a sixteenth of the width at rank 64 of 4096.
    "prop": Shape(1024, 2752, 4, 8, (256, 1024, 3, 4), 336, 60, 120, 1024, 16),
    "half": Shape(512, 1376, 4, 8, (128, 512, 3, 4), 336, 60, 120, 512, 8),
    "tiny": Shape(32, 64, 2, 4, (16, 32, 3, 2), 28, 6, 9, 64, 4),
    "7b": Shape(4096, 11008, 32, 32, (1024, 4096, 24, 16), 336, 60, 120, 32064, 64),
}


def machine(device="cpu"):
    """The machine and the versions, in words."""
    name = platform.processor() or platform.machine()
    if device.startswith("cuda"):
        import torch
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        name = (f"{found.get('model name', name)}, {os.cpu_count()} cores"
                + ", AVX-512" * ("avx512f" in found.get("flags", "")))
    packages = ("torch", "transformers", "trl", "peft")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except ImportError:
            versions[package] = "not installed"
    commit = subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True,
                            text=True)
    return {"machine": name, "versions": versions, "date": date.today().isoformat(),
            "commit": commit.stdout.strip() or "unknown"}


def heading(title, about, how):
    """The first lines of a section of RESULTS.md."""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    return [f"\n## {title}\n",
            f"`{how}`, {about['date']}, commit {about['commit']}; {about['machine']}; {versions}.\n"]


def report(lines, found, o):
    """Print a section, append it to --results, write the numbers to --out."""
    text = "\n".join(lines) + "\n"
    print(text)
    if o.out:
        data.atomic_write(Path(o.out), json.dumps(found, indent=1))
    if o.results:
        with open(o.results, "a") as file:
            file.write(text)


def command():
    """This run's command, without its output files."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word in ("--out", "--results"):
            next(words, None)
        elif not word.startswith(("--out=", "--results=")):
            kept.append(word)
    return " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *kept])


def arguments(description, n):
    """The parser that the scripts share; n: rounds."""
    parser = data.Parser(prog=f"bench/{Path(sys.argv[0]).name}", description=description)
    add = parser.add_argument
    add("--shape", default="prop", choices=SHAPES, help="of the random model (%(default)s)")
    add("--rounds", type=int, default=n, help="so many, after one that does not count (%(default)s)")
    add("--threads", type=int, default=1, help="so many, pinned; 0: all, not pinned (%(default)s)")
    add("--core", type=int, help="the core to pin to (the last that is allowed)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float64"],
        help="of the base model (%(default)s)")
    add("--device", default="cpu", help="cpu or cuda (%(default)s)")
    add("--out", help="a JSON file for the numbers")
    add("--results", default=str(RESULTS), help="a file to append the table to; '': none (bench/RESULTS.md)")
    return parser
