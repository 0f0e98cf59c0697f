"""InternVL3 in transformers' form (OpenGVLab/InternVL3-1B-hf): tiles of the picture, then all of it."""
if __name__ == "__main__":
    raise SystemExit(print("A part of every command; run: python train_dpo.py --help"))

from itertools import islice

from model.family import Family


class InternVL(Family):
    """<img>, the tokens of all tiles, </img>."""
    architecture = "InternVLForConditionalGeneration"
    image_token = "<IMG_CONTEXT>"

    def __post_init__(self):
        super().__post_init__()
        self.image_processor.crop_to_patches = True        # as transformers' processor does, whatever it says

    def image_ids(self, size):
        width, height = size
        tiles = self.image_processor.get_number_of_image_patches(height, width)
        start, end = self.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
        return [start, *[self.image_token_id] * (tiles * self.config.image_seq_length), end]

    def prepare(self, images):
        return [{"pixel_values": image["pixel_values"]} for image in super().prepare(images)]   # (P, 3, H, W)

    def encode(self, model, prepared):
        import torch
        tiles = iter(super().encode(model, prepared))
        return [torch.cat([*islice(tiles, len(image["pixel_values"]))]) for image in prepared]
