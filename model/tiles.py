"""Idefics3, SmolVLM and InternVL3: a picture becomes tiles of one size, as many as its shape asks for,
and one more of the whole, which is all that Gemma 3 takes. InternVL3 is meant in transformers' form, as
OpenGVLab/InternVL3-1B-hf.
"""
if __name__ == "__main__":
    exit("A part of every command; run: python train_dpo.py --help")

from itertools import islice

import data
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
        _, *grid = self.image_processor.get_number_of_image_patches(*reversed(size))  # 0 x 0: it is not cut
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
        tiles = self.image_processor.get_number_of_image_patches(*reversed(size))
        start, end = self.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
        return [start, *[self.image_token_id] * (tiles * self.config.image_seq_length), end]

    def encode(self, model, prepared):
        import torch
        tiles = iter(super().encode(model, prepared))
        return [torch.cat([*islice(tiles, len(image["pixel_values"]))]) for image in prepared]


class Gemma3(Family):
    """A picture is one tile, whose tokens see each other in both directions: with --forward naive alone,
    because a packed row's attention is causal. Pan and scan, which cuts out further tiles, is refused."""
    image_token = "<image_soft_token>"
    token_types = "token_type_ids"
    packs = False

    def __post_init__(self):
        super().__post_init__()
        self.config.text_config._attn_implementation = "sdpa"      # for its masks
        self.eos_id = self.tokenizer.convert_tokens_to_ids("<end_of_turn>")
        if self.image_processor.do_pan_and_scan:
            raise data.UserError(f"{self.folder} crops images by pan and scan, which this trainer does not: "
                                 "set do_pan_and_scan to false in its preprocessor_config.json")

    def render(self, messages, **options):
        """With an image's newlines as text, because the tokenizer joins them with those around."""
        text = super().render(messages, **options)
        start, end = "<start_of_image>", "<end_of_image>"
        return text.replace(start, f"\n\n{start}{self.image_token}{end}\n\n")

    def image_ids(self, size):
        return [self.image_token_id] * self.config.mm_tokens_per_image

    def language_inputs(self, ids, features):
        """The masks of both kinds of layers: causal, but an image's tokens see all of it."""
        from transformers.models.gemma3 import modeling_gemma3
        images = modeling_gemma3.get_block_sequence_ids_for_mask(ids == self.image_token_id)       # (R, T)
        masks = modeling_gemma3.create_masks_for_vision_model(self.config.text_config, ids[..., None],
                                                              None, None, None, images)
        return {"attention_mask": masks}
