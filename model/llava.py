"""LLaVA-1.5, LLaVA-1.6, LLaVA-OneVision, imported Bunny; the templates that their published folders lack.

Images are prepared as the folder's own image processor does it: llava-hf's published folders resize and cut
out the middle; what model/import_checkpoint.py wrote pads to a square with the mean colour first, as the
official codes of LLaVA and Bunny do. `preparation="pad"` (PDS-DPO's run) does that with any LLaVA-1.5 folder.
"""
if __name__ == "__main__":
    exit("A part of every command; run: python train_dpo.py --help")

import re
from itertools import groupby

import data
from model.family import IMAGE, Family

# Jinja templates for folders that bring none, and for presets that ask for one by name. `vicuna`: LLaVA-1.5
# as liuhaotian trains and serves it (conversation.py, "vicuna_v1"), and Bunny (the same text, its own EOS).
# `plain`: llava-hf's own for LLaVA-1.5, no system text. `mistral`, `llama3`: LLaVA-1.6 on those models.
_TEXT = ("{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
         "{% else %}{{ part['text'] }}{% endif %}{% endfor %}")
_TURNS = ("{% for message in messages %}{% if message['role'] == 'user' %}USER: " + _TEXT + " "
          "{% else %}ASSISTANT: {{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
_SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
           "The assistant gives helpful, detailed, and polite answers to the user's questions. ")
_MISTRAL = ("{% for message in messages %}{% if message['role'] == 'user' %}[INST] " + _TEXT + " [/INST]"
            "{% else %} {{ message['content'][0]['text'] }}{{ eos_token }}{% endif %}{% endfor %}")
_LLAMA3 = ("<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. "
           "You are able to understand the visual content that the user provides, and assist the user with a "
           "variety of tasks using natural language.<|eot_id|>"
           "{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
           + _TEXT + "<|eot_id|>{% endfor %}"
           "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
TEMPLATES = {"plain": _TURNS, "vicuna": _SYSTEM + _TURNS, "mistral": _MISTRAL, "llama3": _LLAMA3}



class Llava(Family):
    """LLaVA-1.5 and imported Bunny: one square picture, always the same number of tokens."""
    image_token = IMAGE
    squares = True

    @property
    def image_tokens(self):
        """The number of tokens of an image, or of a tile."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def usual_template(self):
        return "vicuna"

    def parts(self, text):
        return [{"type": "text", "text": text}]            # IMAGE is a token of its own

    def image_ids(self, size):
        return [self.image_token_id] * self.image_tokens

    def prepare(self, images):
        return [{name: x[0] for name, x in image.items()} for image in super().prepare(images)]

    def inputs(self, prepared):
        from torch.nn.utils.rnn import pad_sequence
        found = {}
        for name in prepared[0]:
            found[name] = pad_sequence([image[name] for image in prepared], batch_first=True)
        return found                       # pixel_values (N, 3, H, W); of tiles (N, P, 3, H, W), zeros last

    def fits(self, prepared):
        width, side = prepared["pixel_values"].shape[-1], self.config.vision_config.image_size
        if width != side:
            raise ValueError(f"pictures become {width} pixels wide, its vision tower takes {side}")


class LlavaNext(Llava):
    """LLaVA-1.6: the whole picture and up to four tiles (anyres); its shape decides the number of tokens."""
    processor = "LlavaNextProcessor"
    squares = False

    def usual_template(self):
        if self.tokenizer.eos_token == "<|eot_id|>":
            return "llama3"
        kind = self.config.text_config.model_type
        return kind if kind in TEMPLATES else "vicuna"

    def image_ids(self, size):
        """The whole picture, its tiles without the padding, a newline after each row of patches."""
        import transformers
        from transformers.image_processing_utils import select_best_resolution
        width, height = size
        tile = self.config.vision_config.image_size
        side = tile // self.config.vision_config.patch_size                          # patches along a tile
        tiles = [n // tile for n in select_best_resolution((height, width), self.config.image_grid_pinpoints)]
        processor = getattr(transformers, self.processor)  # its method reads nothing but vision_aspect_ratio
        counts = processor._get_unpadded_features(self.config, height, width, side, side, *tiles)
        return [self.image_token_id] * (self.image_tokens + sum(counts))


class OneVision(LlavaNext):
    """LLaVA-OneVision: as LLaVA-1.6, up to most_tiles; several pictures in a prompt have one tile each."""
    processor = "LlavaOnevisionProcessor"
    usual_template = Family.usual_template

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"anyres_max_\d+", self.config.vision_aspect_ratio):
            raise data.UserError(f"{self.folder}: only anyres_max_N is known as a vision_aspect_ratio, not "
                                 f"{self.config.vision_aspect_ratio}: take the published config.json")

    def image_ids(self, size):
        if size:
            return super().image_ids(size)
        return [self.image_token_id] * (self.image_tokens + 1)     # no tiles, and one newline

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
