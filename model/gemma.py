"""Gemma 3: a picture is always the same number of tokens, which see each other in both directions."""
if __name__ == "__main__":
    raise SystemExit(print("A part of every command; run: python train_dpo.py --help"))

import data
from model.family import Family


class Gemma3(Family):
    """With --forward naive alone: a packed row's attention is causal. Pan and scan is refused."""
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
