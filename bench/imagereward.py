"""Seconds an image of the full-size ImageReward, on random weights in the published names and shapes.

    python bench/imagereward.py [--images 4] [--device cpu]

Writes a file of 1.8 GB into a temporary folder, loads it as the published ImageReward.pt is loaded, scores
pictures for one prompt, and prints one JSON line. Needs 6 GB of memory and no download.
"""
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

UNUSED = {"blip.text_encoder.embeddings.position_ids": (1, 512), "blip.vision_proj.weight": (256, 1024),
          "blip.vision_proj.bias": (256,), "blip.text_proj.weight": (256, 768), "blip.text_proj.bias": (256,)}


def published_shapes():
    """{name: shape} of ImageReward.pt."""
    import torch

    from synthesis import rewards
    with torch.device("meta"):
        model = rewards.ImageReward(**rewards.PUBLISHED)
    return {rewards.to_published(k): tuple(x.shape) for k, x in model.state_dict().items()} | UNUSED


def seconds(images, device):
    """The lines to print, for so many pictures."""
    import numpy as np
    import torch
    from PIL import Image

    from synthesis import rewards
    rng, shapes = torch.Generator().manual_seed(0), published_shapes()
    with tempfile.TemporaryDirectory() as folder:
        state = {k: torch.randn(shape, generator=rng) * .02 for k, shape in shapes.items()}
        torch.save(state, Path(folder) / "ImageReward.pt")
        del state
        words = [*(f"[unused{k}]" for k in range(30517)), "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (Path(folder) / "vocab.txt").write_text("\n".join(words))
        start = time.time()
        model = rewards.ImageReward.load(Path(folder) / "ImageReward.pt", device=device)
        loaded = time.time() - start
        noise = np.random.default_rng(0).integers(0, 256, (images, 300, 400, 3), dtype=np.uint8)
        pictures = [Image.fromarray(x) for x in noise]
        model.score("a red bike on a beach", pictures[:1])
        start = time.time()
        scores = model.score("a red bike on a beach", pictures)
        spent = (time.time() - start) / images
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    return {"device": device, "threads": torch.get_num_threads(), "tensors": len(shapes),
                      "parameters": sum(p.numel() for p in model.parameters()),
                      "load_seconds": round(loaded, 1), "seconds_an_image": round(spent, 2),
                      "peak_gib": round(peak, 2), "finite": all(map(np.isfinite, scores))}


def main():
    parser = data.Parser(prog="bench/imagereward.py", description=__doc__)
    parser.add_argument("--images", type=int, default=4, help="pictures to score (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (%(default)s)")
    o = parser.parse_args()
    print(json.dumps(seconds(o.images, o.device)))


if __name__ == "__main__":
    main()
