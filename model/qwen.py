"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: an image keeps its shape, and a token's position has three numbers.

An image is scaled to whole blocks of patches, its pixels within the limits of the folder's image processor;
each block becomes a token. The template writes <|vision_start|> and <|vision_end|> around them.
"""
if __name__ == "__main__":
    exit("A part of every command; run: python train_dpo.py --help")

from itertools import groupby

from model.family import Family


class Qwen2VL(Family):
    image_token = "<|image_pad|>"
    token_types = "mm_token_type_ids"
    tower = "model.visual"                     # with the layers that merge its patches

    def grid(self, size):
        """(rows, columns) of the tokens of an image of (width, height) pixels."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
        processor = self.image_processor
        side = processor.patch_size * processor.merge_size
        height, width = smart_resize(*reversed(size), side,
                                     min_pixels=processor.size["shortest_edge"],
                                     max_pixels=processor.size["longest_edge"])
        return height // side, width // side

    def image_ids(self, size):
        rows, columns = self.grid(size)
        return [self.image_token_id] * (rows * columns)

    def fits(self, prepared):
        made, vision = self.image_processor, self.config.vision_config
        sides = made.patch_size, made.temporal_patch_size, made.merge_size
        its = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
        if sides != its:
            raise ValueError(f"patches are {sides} (pixels, frames, merged), its vision tower takes {its}")

    def positions(self, ids, sizes):
        """(3, T): time, row and column. A text goes on from the largest; an image has one time."""
        import torch
        found, start, grids = [], 0, map(self.grid, sizes)
        for is_image, run in groupby(ids, self.image_token_id.__eq__):
            places = torch.arange(len([*run]))
            block = places.expand(3, -1)
            if is_image:
                _, columns = next(grids)
                block = torch.stack([0 * places, places // columns, places % columns])
            found.append(start + block)
            start = found[-1].max() + 1
        return torch.cat(found, 1)


class Qwen3VL(Qwen2VL):
    """Its first layers get features of the tower's own layers as well (DeepStack, arXiv 2406.04334)."""

    def encode(self, model, prepared):
        import torch
        found = model.get_image_features(**self.on_device(model, prepared))
        layers = [found.pooler_output, *found.deepstack_features]
        return [torch.cat(own, 1) for own in zip(*layers, strict=True)]        # (K, D + as many a layer)

    def language_inputs(self, ids, features):
        import torch
        if not features:
            return {}
        _, *deep = torch.cat([*features]).split(self.config.text_config.hidden_size, 1)
        return {"visual_pos_masks": ids == self.image_token_id, "deepstack_visual_embeds": deep}
