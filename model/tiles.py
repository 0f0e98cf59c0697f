"""Idefics3, SmolVLM and InternVL3: a picture becomes tiles of one size, as many as its shape asks for,
and one more of the whole. InternVL3 is meant in transformers' form, as OpenGVLab/InternVL3-1B-hf.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of every command; run: python train_dpo.py --help"))

from itertools import islice

from model.family import Family
from model.llava import Llava


class Idefics3(Llava):
    """Idefics3 and SmolVLM, the first and the second: tokens say a tile's row and column."""
    tower = "model.vision_model"
    language = "model.text_model"
    lead = " "                                             # "Assistant:" and its answer
    squares = False
    usual_template, parts = Family.usual_template, Family.parts

    def fits(self, prepared):
        made = self.image_processor
        if made.size["longest_edge"] % made.max_image_size["longest_edge"]:
            raise ValueError("size.longest_edge is no multiple of max_image_size.longest_edge")

    def image_ids(self, size):
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string
        width, height = size
        _, *grid = self.image_processor.get_number_of_image_patches(height, width)    # 0 x 0: it is not cut
        tokens = self.image_tokens // self.config.scale_factor ** 2
        text = get_image_prompt_string(*grid, tokens, "<fake_token_around_image>", self.image_token,
                                       "<global-img>")
        return self.tokenizer(text, add_special_tokens=False).input_ids


class InternVL(Family):
    """The tokens of all tiles between <img> and </img>."""
    image_token = "<IMG_CONTEXT>"

    def __post_init__(self):
        super().__post_init__()
        self.image_processor.crop_to_patches = True        # as transformers' processor does, whatever it says

    def image_ids(self, size):
        width, height = size
        tiles = self.image_processor.get_number_of_image_patches(height, width)
        start, end = self.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
        return [start, *[self.image_token_id] * (tiles * self.config.image_seq_length), end]

    def encode(self, model, prepared):
        import torch
        tiles = iter(super().encode(model, prepared))
        return [torch.cat([*islice(tiles, len(image["pixel_values"]))]) for image in prepared]
