"""LLaVA-OneVision: LLaVA-1.6's tiles, made fewer where they are too many; several pictures have one each."""
if __name__ == "__main__":
    raise SystemExit(print("A part of every command; run: python train_dpo.py --help"))

import math
from itertools import groupby

from model.family import Family
from model.llava import LlavaNext


class OneVision(LlavaNext):
    """As transformers' processor does it with the pictures of one prompt in a list of their own."""
    architecture = "LlavaOnevisionForConditionalGeneration"
    usual_template = Family.usual_template

    def grid(self, size):
        """At most about as many patches as vision_aspect_ratio allows tiles: anyres_max_9."""
        rows, columns = super().grid(size)
        most = int(self.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * self.image_tokens))
        if ratio > 1.1:
            return int(rows // ratio), int(columns // ratio)
        return rows, columns

    def image_ids(self, size):
        if not size:
            return [self.image_token_id] * (self.image_tokens + 1)                         # and a newline
        return super().image_ids(size)

    def prompt_ids(self, question, sizes, history=()):
        if len(sizes) > 1:
            sizes = [None] * len(sizes)
        return super().prompt_ids(question, sizes, history)

    def prepare(self, images):
        if not images:
            return []
        made = self.image_processor(images=[images], return_tensors="pt")
        both = zip(made.pixel_values, made.image_sizes, strict=True)
        return [{"pixel_values": tiles, "image_sizes": size} for tiles, size in both]

    def inputs(self, prepared):
        import torch
        found, numbers = super().inputs(prepared), []
        for cut, some in groupby(prepared, lambda image: len(image["pixel_values"]) > 1):
            n = len([*some])
            numbers += [1] * n if cut else [n]             # a number above 1: none of these is cut into tiles
        return found | {"batch_num_images": torch.tensor(numbers)}
