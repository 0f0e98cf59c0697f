"""Idefics3, SmolVLM and InternVL3: a picture becomes tiles of one size, as many as its shape asks for,
and one more of the whole. InternVL3 is meant in transformers' form, as OpenGVLab/InternVL3-1B-hf.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of every command; run: python train_dpo.py --help"))

from itertools import islice

from model.family import IMAGE, Family
from model.llava import Llava


class Idefics3(Family):
    """Idefics3 and SmolVLM, the first and the second: tokens say a tile's row and column."""
    image_token = IMAGE
    tower = "model.vision_model"
    language = "model.text_model"
    lead = " "                                             # "Assistant:" and its answer
    inputs = Llava.inputs

    @property
    def image_tokens(self):
        """The number of tokens of a tile."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor ** 2

    def grid(self, size):
        """(rows, columns) of a picture's tiles; (0, 0) if it is not cut."""
        width, height = size
        _, *found = self.image_processor.get_number_of_image_patches(height, width)
        return found

    def fits(self, prepared):
        made = self.image_processor
        if made.size["longest_edge"] % made.max_image_size["longest_edge"]:
            raise ValueError("size.longest_edge is no multiple of max_image_size.longest_edge")

    def image_ids(self, size):
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string
        text = get_image_prompt_string(*self.grid(size), self.image_tokens, "<fake_token_around_image>",
                                       self.image_token, "<global-img>")
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def prepare(self, images):
        """Without the mask, which is of 1s alone and two thirds of the pixels' size."""
        return [{"pixel_values": image["pixel_values"][0]} for image in super().prepare(images)]


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
