"""What is in front of a language model: texts become token ids, images become features. A family is a class.

    front = open_folder("llava-1.5-7b")                      tokenizer, template, image processor
    front.prompt_ids("What is this?", sizes=[(640, 480)])    token ids, each image as its image_ids
    front.prepare([image])                                   what encode() takes, one entry an image

What a family says, and what all of them share, is in family.py.
"""
if __name__ == "__main__":
    exit("A part of every command; run: python train_dpo.py --help")

import inspect
import json
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from PIL import Image

import data
from model import command
from model.llava import TEMPLATES, Llava, LlavaNext, OneVision
from model.qwen import Qwen2VL, Qwen3VL
from model.tiles import Gemma3, Idefics3, InternVL

FAMILIES = {"llava": Llava,                                        # by transformers' model_type
            "llava_next": LlavaNext,
            "llava_onevision": OneVision,
            "idefics3": Idefics3,
            "smolvlm": Idefics3,
            "internvl": InternVL,
            "gemma3": Gemma3,
            "qwen2_vl": Qwen2VL,
            "qwen2_5_vl": Qwen2VL,
            "qwen3_vl": Qwen3VL}


def read_config(folder):
    """config.json of a checkpoint of one of the families. Raises UserError, naming what it is instead."""
    path = Path(folder) / "config.json"
    config = data.read_json(path, check=data.as_record)
    if re.search(r'(layers|depth)": \d{4}', json.dumps(config)):     # all would be made first
        raise data.UserError(f"{path} says that a part has a thousand layers or more: copy it again")
    kind = config.get("model_type")
    # The original LLaVA's model_type is "llava" as well, but it has no vision_config.
    parts = {"model_type": str, "vision_config": dict, "text_config": (dict, None)}
    if command.fits(config, parts) and kind in FAMILIES:
        return config
    fix = "give one of those, as transformers saves it"
    if "mm_vision_tower" in config:
        fix = f"run `python -m model.import_checkpoint {folder} NEW_FOLDER`, then use that"
    raise data.UserError(f"{path} says model_type {kind!r}, {config.get('architectures')}: only folders "
                         f"of {', '.join(FAMILIES)} can be loaded; {fix}")


def open_folder(folder, template=None, preparation=""):
    """The family of a folder in transformers' layout, from its files alone.

    template: None for the folder's own, a name in TEMPLATES or Jinja. preparation: "" for the folder's own,
    "pad" to pad images to a square with the mean colour first. Raises UserError for what is missing or wrong.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, LlavaImageProcessorPil

    import lora
    folder = lora.model_folder(folder)
    family = FAMILIES[read_config(folder)["model_type"]]
    config = data.from_folder(AutoConfig, folder, "config.json")    # with classes' defaults
    tokenizer = data.from_folder(AutoTokenizer, folder, "tokenizer", "copy tokenizer.json and its config")
    processor = data.from_folder(AutoImageProcessor, folder, "image processor",
                                 "copy preprocessor_config.json", backend="pil")
    check_tokens(folder, config, tokenizer, family.image_token)
    if preparation:
        if not family.squares:
            raise data.UserError(f"{folder}: only LLaVA-1.5's images can be padded: leave out images=pad")
        processor = LlavaImageProcessorPil.from_dict(processor.to_dict() | {"do_pad": True})
    found = family(folder, config, tokenizer, processor)
    found.template_name, found.template = choose_template(found, template)
    probe(found)
    return found


def probe(front):
    """Raise UserError if a question about a picture cannot be made with what the folder says, or takes too
    much; what only some questions show is found with them."""
    with command.explained(f"{front.folder}: its files are not one model's", "copy them again"):
        check_template(front.folder, front.tokenizer, front.template, front.messages("QUESTION", 1))
        front.prompt_ids("QUESTION", ())
        front.response_ids("ANSWER")
        picture = Image.new("RGB", (64, 48))
        front.image_ids(picture.size)
        front.fits(*front.prepare([picture]))


def check_tokens(folder, config, tokenizer, image_token):
    """Raise UserError if the tokenizer is not this model's."""
    found = tokenizer.convert_tokens_to_ids(image_token)
    if found != config.image_token_id:
        raise data.UserError(f"{folder}: its tokenizer gives {image_token} the id {found}, config.json says "
                             f"{config.image_token_id}: copy the tokenizer of the published folder")
    if len(tokenizer) > (rows := config.text_config.vocab_size):
        raise data.UserError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, its model's embedding "
                             f"only {rows} rows: one of the two is not this model's")


def choose_template(front, asked):
    """(name, Jinja) of the template asked for, else the folder's own, else the family's usual one.

    A folder's own is its processor's, as transformers reads it, or else its tokenizer's.
    """
    own = None
    if not (front.folder / "chat_template.jinja").exists():            # which the tokenizer has read
        for file in ("chat_template.json", "processor_config.json"):
            own = own or data.read_json(front.folder / file, {}).get("chat_template")
    own = own or front.tokenizer.chat_template                         # a language model's, perhaps
    if own and not asked:
        return "folder", own
    name = asked or front.usual_template()
    return (name, TEMPLATES[name]) if name in TEMPLATES else ("given", name)


# ---- a chat template is a program ----
def check_template(folder, tokenizer, template, messages):
    """Render a folder's template once. Raises UserError for one that fails, or takes too much.

    It is a program that the folder brings, so it is tried in a process of its own, which the system limits
    and which shares nothing with this one: a fork would inherit the locks of torch's threads.
    """
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", str(template))             # transformers' own
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    if why := _fault(json.dumps([plain, tokens | {"messages": messages, "add_generation_prompt": True}])):
        raise data.UserError(f"the chat template of {folder} fails, or takes too much: {why}; correct it")


@lru_cache(100)
def _fault(given):
    """Why a template cannot be rendered, else "". given: the template and its variables."""
    done = subprocess.run([sys.executable, "-P", "-c", PROGRAM], input=given, capture_output=True, text=True)
    said = done.stderr.strip().rpartition("\n")[2]
    return done.returncode and (said or "it computes for seconds")


def _rendered():
    """That process's work, in transformers' words: two seconds, half a gigabyte, 100,000 characters."""
    import json
    import resource
    import sys
    from datetime import datetime

    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    resource.setrlimit(resource.RLIMIT_CPU, (2, 2))
    if sys.platform == "linux":                         # others do not keep to it
        resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))
    template, variables = json.load(sys.stdin)
    here = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=["jinja2.ext.loopcontrols"])
    here.filters["tojson"] = lambda value, **options: json.dumps(value, **options)
    here.globals |= {"strftime_now": lambda form: datetime.now().strftime(form), "raise_exception": sys.exit}
    try:
        for node in here.parse(template).find_all(nodes.Expr):
            try:
                node.as_const()
            except nodes.Impossible as error:
                if isinstance(error.__cause__, MemoryError):           # Jinja would go on without a word
                    raise MemoryError("for a constant") from error
        length = len(here.from_string(template).render(variables))
    except Exception as error:
        sys.exit(f"{type(error).__name__}, {error}")
    if length > 100_000:
        sys.exit(f"it writes {length:,} characters for one word")


PROGRAM = f"{inspect.getsource(_rendered)}_rendered()"
