"""What is in front of a language model: texts become token ids, images become features. A family is a class.

    front = open_folder("llava-1.5-7b")                      tokenizer, template, image processor
    front.prompt_ids("What is this?", sizes=[(640, 480)])    token ids, each image as its image_ids
    front.prepare([image])                                   what encode() takes, one entry an image

A family is a class, and a line in FAMILIES. A new one inherits from Llava and says what differs:

    image_ids(size)                 the ids that an image of (width, height) pixels becomes in a prompt
    prepare(images)                 PIL images -> [{name: tensor}], one an image, by transformers' names
    inputs(prepared)                those of a batch, as transformers' forward and generate take them
    encode(model, prepared)         features in the language model's space: [(K, D)], one an image
    positions(ids, sizes)           of a prompt's T tokens, (T,) or (3, T); a response follows the largest
    language_model(model)           the part that reads embeddings
    language_inputs(row, features)  what that takes besides embeddings and positions, of a data.Row

Everything that is needed of an image before it is read is a function of its size: checking the pairs and
planning a run need no pixels.

Images are prepared as the folder's own image processor does it: llava-hf's published folders resize and cut
out the middle; what model/import_checkpoint.py wrote pads to a square with the mean colour first, as the
official codes of LLaVA and Bunny do. `preparation="pad"` (PDS-DPO's run) does that with any LLaVA-1.5 folder.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of every command; run: python train_dpo.py --help"))

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

import data
from model import command, template

IMAGE = "<image>"
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


# ---- the families ----
@dataclass
class Llava:
    """LLaVA-1.5 and imported Bunny: one square picture, always the same number of tokens."""
    folder: Path
    config: Any                # transformers'
    tokenizer: Any
    image_processor: Any
    template: str = ""         # Jinja
    template_name: str = ""    # "folder", "given" or a name in TEMPLATES: for the log
    pad: tuple | None = None   # the colour of the square that images are padded to before the processor

    architecture = "LlavaForConditionalGeneration"     # transformers' class
    tower = "model.vision_tower"                       # the part that --no-lora leaves frozen
    squares = True                                     # whether `pad` makes sense

    def __post_init__(self):
        self.image_token_id = self.config.image_token_id
        self.eos_id = self.tokenizer.eos_token_id
        self.is_classroom = (self.folder / "classroom.json").exists()    # before/after are classroom metrics

    # ---- what differs between families ----
    @property
    def image_tokens(self):
        """The number of tokens of an image, or of a tile."""
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    def usual_template(self):
        """The template for a folder that brings none."""
        return "vicuna"

    def image_ids(self, size):
        return [self.image_token_id] * self.image_tokens

    def prepare(self, images):
        if not images:
            return []
        if self.pad:
            images = [pad_square(image, self.pad) for image in images]
        batch = self.image_processor(images=images, return_tensors="pt")
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]

    def inputs(self, prepared):
        from torch.nn.utils.rnn import pad_sequence
        found = {}
        for name in prepared[0]:
            found[name] = pad_sequence([image[name] for image in prepared], batch_first=True)
        return found                       # pixel_values (N, 3, H, W); of tiles (N, P, 3, H, W), zeros last

    def positions(self, ids, sizes):
        return data.plain_positions(ids, sizes)

    def language_model(self, model):
        return model.model.language_model

    def language_inputs(self, row, features):
        return {}

    # ---- what they share ----
    def on_device(self, model, prepared):
        """inputs(prepared) on the model's device, floats in its type."""
        from transformers import BatchFeature
        return BatchFeature(self.inputs(prepared)).to(model.device, model.dtype)

    def encode(self, model, prepared):
        if not prepared:
            return []
        return [*model.get_image_features(**self.on_device(model, prepared)).pooler_output]

    def prompt_ids(self, question, sizes, history=()):
        """Token ids of a prompt, up to where the response starts; each image is its image_ids.

        sizes: (width, height) of each image. history: earlier [user, assistant] turns. An image is where the
        text has IMAGE; those without one lead the first user turn. BOS comes once, whether the template
        writes it or the tokenizer adds it. Raises UserError if the text has IMAGE more often.
        """
        leading = len(sizes) - "".join(chain(*history, [question])).count(IMAGE)
        said = messages(question, leading, history)
        try:
            text = self.tokenizer.apply_chat_template(said, tokenize=False, chat_template=self.template,
                                                      add_generation_prompt=True)
        except Exception as error:                                     # a template may do anything
            raise data.UserError(f"the chat template of {self.folder} fails ({error}): correct it, or name "
                                 f"another: {', '.join(TEMPLATES)}") from None
        bos = self.tokenizer.bos_token
        ids = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids
        if ids[-1:] == [self.eos_id]:                                  # some tokenizers close every text
            ids.pop()
        if (places := ids.count(self.image_token_id)) != len(sizes):
            raise data.UserError(f"the template {self.template_name!r} makes {places} image places for "
                                 f"{len(sizes)} images in {text[:80]!r}: mind {IMAGE} in the text")
        found, shown = [], iter(sizes)
        for token in ids:
            found += self.image_ids(next(shown)) if token == self.image_token_id else [token]
        return found

    def response_ids(self, text):
        """Token ids of a response, EOS last: tokenised apart from the prompt, as both official codes do.

        An EOS in the text is removed. Raises UserError for a text with the image marker or without a token.
        """
        text = text.replace(self.tokenizer.eos_token, "").strip()
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        if self.image_token_id in ids:
            raise data.UserError(f"the response {text[:60]!r} contains {IMAGE}: remove the marker")
        if not ids:
            raise data.UserError(f"the response {text[:60]!r} has no token: drop the record or pass "
                                 "--skip_bad")
        return [*ids, self.eos_id]

    @property
    def preparation(self):
        """How images are prepared, in words: for the log."""
        processor = self.image_processor
        side = max(filter(None, dict(processor.size).values()))
        words = f"resized to {side}"
        if self.pad or self.squares and getattr(processor, "do_pad", False):    # the processor does it itself
            words = f"padded to a square with {colour(processor)}, {words}"
        if getattr(processor, "do_center_crop", False):
            words += ", the middle cut out"
        return f"{words} ({type(processor).__name__})"


class LlavaNext(Llava):
    """LLaVA-1.6: the whole picture and up to four tiles (anyres); its shape decides the number of tokens."""
    architecture = "LlavaNextForConditionalGeneration"
    squares = False

    def usual_template(self):
        if self.tokenizer.eos_token == "<|eot_id|>":
            return "llama3"
        kind = self.config.text_config.model_type
        return kind if kind in TEMPLATES else "vicuna"

    def image_ids(self, size):
        """The whole picture, its tiles without the padding (unpad_image), a newline after each row."""
        from transformers.image_processing_utils import select_best_resolution
        width, height = size
        vision = self.config.vision_config
        shape = select_best_resolution((height, width), self.config.image_grid_pinpoints)
        side = vision.image_size // vision.patch_size                                # patches along a tile
        rows, columns = (length // vision.image_size * side for length in shape)
        if width / height > columns / rows:
            rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
        else:
            columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
        return [self.image_token_id] * (self.image_tokens + rows * (columns + 1))


FAMILIES = {"llava": Llava, "llava_next": LlavaNext}


def messages(question, n_images, history):
    """A dialogue as chat templates take it; the images are in the first user turn."""
    found, images = [], [{"type": "image"}] * n_images
    for user, assistant in [*history, (question, "")]:
        found.append({"role": "user", "content": [*images, {"type": "text", "text": user}]})
        found.append({"role": "assistant", "content": [{"type": "text", "text": assistant}]})
        images = []
    return found[:-1]                                                  # the answer is to come


def pad_square(image, fill):
    """The picture in the middle of a square of a colour: LLaVA's expand2square (mm_utils.py)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), fill)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def colour(processor):
    """The processor's mean as a colour: cut off, as LLaVA does."""
    return tuple(int(x * 255) for x in processor.image_mean)


# -------------------------------------------------------------------------------- the folder
def read_config(folder):
    """config.json of a llava-hf checkpoint. Raises UserError, naming what the folder is instead."""
    path = Path(folder) / "config.json"
    config = data.read_json(path, check=data.as_record)
    kind = config.get("model_type")
    # The original LLaVA's model_type is "llava" as well, but it has no text_config.
    parts = {"model_type": str, "text_config": dict, "vision_config": (dict, None)}
    if command.fits(config, parts) and kind in FAMILIES:
        return config
    fix = "give a llava-hf folder"
    if "mm_vision_tower" in config:
        fix = f"run `python -m model.import_checkpoint {folder} NEW_FOLDER`, then use that"
    raise data.UserError(f"{path} says model_type {kind!r}, {config.get('architectures')}: only llava-hf "
                         f"folders of {', '.join(FAMILIES)} can be loaded; {fix}")


def open_folder(folder, template=None, preparation=""):
    """The family of a llava-hf folder, from its files alone.

    template: None for the folder's own, a name in TEMPLATES or Jinja. preparation: "" for the folder's own,
    "pad" to pad images to a square with the mean colour first. Raises UserError for what is missing or wrong.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    folder = data.model_folder(folder)
    family = FAMILIES[read_config(folder)["model_type"]]
    config = data.from_folder(AutoConfig, folder, "config.json", "copy it again")    # with classes' defaults
    tokenizer = data.from_folder(AutoTokenizer, folder, "tokenizer", "copy tokenizer.json and its config")
    processor = data.from_folder(AutoImageProcessor, folder, "image processor",
                                 "copy preprocessor_config.json", backend="pil")
    check_tokens(folder, config, tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found = family(folder, config, tokenizer, processor)
    found.template_name, found.template = choose_template(found, template)
    if preparation:
        if not family.squares:
            raise data.UserError(f"{folder}: only LLaVA-1.5's images can be padded to a square: leave out "
                                 "images=pad")
        found.pad = colour(processor)
    probe(found)
    return found


def probe(front):
    """Raise UserError if a question about a picture cannot be made with what the folder says, or takes too
    much; what only some questions show is found with them."""
    with command.explained(f"{front.folder}: its files are not one model's", "copy them again"):
        template.check(front.folder, front.tokenizer, front.template, messages("QUESTION", 1, ()))
        front.prompt_ids("QUESTION", ())
        front.response_ids("ANSWER")
        picture = Image.new("RGB", (64, 48))
        front.image_ids(picture.size)
        pixels, side = front.prepare([picture])[0]["pixel_values"], front.config.vision_config.image_size
        if front.architecture.startswith("Llava") and pixels.shape[-1] != side:
            raise ValueError(f"pictures become {pixels.shape[-1]} pixels wide, its vision tower takes {side}")


def check_tokens(folder, config, tokenizer):
    """Raise UserError if the tokenizer is not this model's."""
    found = tokenizer.convert_tokens_to_ids(IMAGE)
    if found != config.image_token_id:
        raise data.UserError(f"{folder}: its tokenizer gives {IMAGE} the id {found}, config.json says "
                             f"{config.image_token_id}: copy the tokenizer of the llava-hf folder, not that "
                             "of its language model")
    if len(tokenizer) > (rows := config.text_config.vocab_size):
        raise data.UserError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, its model's embedding "
                             f"only {rows} rows: one of the two is not this model's")


def choose_template(front, asked):
    """(name, Jinja) of the template asked for, else the folder's own, else the family's usual one.

    A folder's own is beside its tokenizer or its processor.
    """
    own = front.tokenizer.chat_template
    for file in ("chat_template.json", "processor_config.json"):
        own = own or data.read_json(front.folder / file, {}).get("chat_template")
    if own and not asked:
        return "folder", own
    name = asked or front.usual_template()
    return (name, TEMPLATES[name]) if name in TEMPLATES else ("given", name)
