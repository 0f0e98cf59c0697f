"""What families of models share: a dialogue becomes token ids, with its images in their places.

A family is a class that inherits from Family (or from another one) and says what differs, and a line in
front.FAMILIES:

    image_token                     the name of an image's token
    lead, packs                     what stands between prompt and response, and if --forward packed is exact
    tower, language                 the model's parts: what --no-lora leaves frozen, and what reads embeddings
    image_ids(size)                 the ids that stand in a prompt for an image of (width, height) pixels,
                                    where the template has the one of image_token
    prepare(images)                 one prompt's PIL images -> [{name: tensor}], by transformers' names
    fits(prepared)                  ValueError if an image's pixels are not what the vision tower takes
    inputs(prepared)                those of a batch, as transformers' forward and generate take them
    encode(model, prepared)         features in the language model's space: [(K, D)], one an image; columns
                                    behind the D are for language_inputs
    positions(ids, sizes)           of a prompt's T tokens, (T,) or (3, T); a response follows the largest
    language_inputs(ids, features)  what the language model takes besides embeddings and positions, of ids
                                    (..., T) and the features of their images
    token_types                     transformers' name of what tells images from text, where generate takes it

Everything that is needed of an image before it is read is a function of its size: checking the pairs and
planning a run need no pixels.
"""
if __name__ == "__main__":
    exit("A part of every command; run: python train_dpo.py --help")

from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import data
from model import command

IMAGE = "<image>"              # where an image stands in a text; see training/records.py


class Picture(NamedTuple):
    """An image file, read and prepared, that is alone in its prompt."""
    size: tuple                # (width, height) in pixels
    inputs: dict               # what prepare() makes of it


@dataclass(eq=False)
class Family:
    """What is in front of a folder's language model."""
    folder: Path
    config: Any                # transformers'
    tokenizer: Any
    image_processor: Any
    template: str = ""         # Jinja
    template_name: str = ""    # "folder", "given" or a name in llava.TEMPLATES: for the log

    image_token = ""
    tower = "model.vision_tower"
    language = "model.language_model"
    squares = False            # whether images may be padded to a square
    packs = True
    lead = token_types = ""

    def __post_init__(self):
        self.image_token_id = self.config.image_token_id
        self.eos_id = self.tokenizer.eos_token_id
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.is_classroom = (self.folder / "classroom.json").exists()    # before/after are classroom metrics
        # The classroom's are few and small, and each evaluation shows them several times.
        self.read = lru_cache(2048 if self.is_classroom else 2)(self.picture)

    def positions(self, ids, sizes):
        """Positions (T,) or (3, T) of a prompt; here images are tokens like all others."""
        import torch
        return torch.arange(len(ids))

    # ---- what differs between families: image_ids(size), and where these do not fit ----
    def usual_template(self):
        """The template for a folder that brings none. Raises UserError if nothing but its own is right."""
        raise data.UserError(f"{self.folder} has no chat template: copy chat_template.jinja or .json of the "
                             "published folder, or give one (--set template=)")

    def parts(self, text):
        """A text as the parts of a message; IMAGE becomes a part of its own."""
        found = []
        for piece in text.split(IMAGE):
            found += [{"type": "image"}, {"type": "text", "text": piece}]
        return [part for part in found[1:] if part.get("text") != ""]

    def prepare(self, images):
        found = []
        for image in images:
            made = self.image_processor(images=[image], return_tensors="pt")
            # without numbers that are no model's, and a mask of 1s alone, two thirds of the pixels' size
            found.append({name: x for name, x in made.items() if name.startswith(("pixel_values", "image_"))})
        return found

    def inputs(self, prepared):
        import torch
        return {name: torch.cat([image[name] for image in prepared]) for name in prepared[0]}

    def fits(self, prepared):
        """Raise ValueError if an image, as it is prepared, is not what the vision tower takes."""

    def language_inputs(self, ids, features):
        return {}

    @property
    def preparation(self):
        """How images are prepared, in words: for the log."""
        processor, words = self.image_processor, []
        if self.squares and getattr(processor, "do_pad", False):
            words.append(f"padded to a square with {tuple(int(x * 255) for x in processor.image_mean)}")
        sizes = dict.fromkeys(filter(None, dict(processor.size).values()))
        words.append(f"resized to {' to '.join(map(str, sizes))}")
        if getattr(processor, "do_center_crop", False):
            words.append("the middle cut out")
        return f"{', '.join(words)} ({type(processor).__name__})"

    # ---- what they share ----
    def prepared(self, images):
        """prepare(images) of one prompt, whose images may be Pictures."""
        if images and isinstance(images[0], Picture):
            return [picture.inputs for picture in images]
        return self.prepare(images)

    def picture(self, source):
        """The Picture of a path or bytes; `read` is the same and keeps the last ones. Raises UserError."""
        image = data.read_image(source)
        inputs, = self.prepare([image])
        return Picture(image.size, inputs)

    def on_device(self, model, prepared):
        """inputs(prepared) on the model's device, floats in its type."""
        from transformers import BatchFeature
        there = []                                       # and joined there: so a pinned image goes by itself
        for image in prepared:
            there.append({name: command.send(x, model.device) for name, x in image.items()})
        return BatchFeature(self.inputs(there)).to(model.device, model.dtype)

    def encode(self, model, prepared):
        return [*model.get_image_features(**self.on_device(model, prepared)).pooler_output]

    def messages(self, question, n_images, history=()):
        """A dialogue as chat templates take it; n_images are in front of the first user turn."""
        found, leading = [], [{"type": "image"}] * n_images
        for user, assistant in [*history, (question, "")]:
            found += [{"role": "user", "content": [*leading, *self.parts(user)]},
                      {"role": "assistant", "content": self.parts(assistant)}]
            leading = []
        return found[:-1]                                              # the answer is to come

    def render(self, messages, **options):
        """The template's text. Raises UserError if it fails."""
        with command.explained(f"the chat template of {self.folder} fails",
                               "correct it, or give another (--set template=)"):
            return self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self.template,
                                                      **options)

    def prompt_ids(self, question, sizes, history=()):
        """Token ids of a prompt, up to where the response starts; each image is its image_ids.

        sizes: (width, height) of each image. history: earlier [user, assistant] turns. An image is where the
        text has IMAGE; those without one lead the first user turn. BOS comes once, whether the template
        writes it or the tokenizer adds it. Raises UserError if the text has IMAGE more often.
        """
        leading = len(sizes) - "".join(chain(*history, [question])).count(IMAGE)
        text = self.render(self.messages(question, leading, history), add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        ids = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids
        if ids[-1:] == [self.tokenizer.eos_token_id]:      # some tokenizers close every text
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
        text = text.replace(self.tokenizer.convert_ids_to_tokens(self.eos_id), "").strip()
        for marker in (IMAGE, self.image_token):
            if marker in text:
                raise data.UserError(f"the response {text[:60]!r} contains {marker}: remove the marker")
        ids = self.tokenizer(self.lead + text, add_special_tokens=False).input_ids
        if not text or not ids:
            raise data.UserError(f"the response {text[:60]!r} has no token: drop it, or pass --skip_bad")
        return [*ids, self.eos_id]
