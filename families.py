"""What differs between LLaVA-1.5, LLaVA-1.6 and imported Bunny before a weight is read: texts and images.

    front = families.front("llava-1.5-7b")        tokenizer, template, image processor, from the files alone
    families.prompt_ids(front, "What is this?")   token ids, each image a run of image tokens
    families.prepare(front, [image])              pixel values

    llava        LLaVA-1.5 and imported Bunny: one square picture, always the same number of tokens
    llava_next   LLaVA-1.6: the whole picture and up to four tiles (anyres); its shape makes the tokens more

Pictures are prepared as the folder's own image processor does it: llava-hf's published folders resize and cut
out the middle; what tools/import_checkpoint.py wrote pads to a square with the mean colour first, as the
official codes of LLaVA and Bunny do. `preparation="pad"` (PDS-DPO's run) does that with any LLaVA-1.5 folder.
"""
import importlib.util
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

import data

CLASSROOM = Path(__file__).resolve().parent / "classroom" / "models"
CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
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
PREPARATIONS = ("", "pad")


@dataclass
class Front:
    """What stands before a model: texts become token ids, pictures become pixels."""
    config: Any                # transformers' config of the folder
    tokenizer: Any
    image_processor: Any
    template: str              # Jinja
    template_name: str         # "folder", "plain", "vicuna" or "given": what the log says
    preparation: str           # of pictures, in words: what the log says
    pad: tuple | None          # the colour that pictures are padded to a square with before the processor
    image_token_id: int
    image_tokens: int          # K: tokens of a picture, or, if it is cut into tiles, of one tile
    eos_id: int
    folder: Path
    is_classroom: bool         # made by classroom/make.py: before/after are classroom metrics


class Tiles(NamedTuple):
    """A picture as LLaVA-1.6 sees it."""
    pixels: Any                # (P, 3, H, W): the whole picture, then its tiles, row by row
    size: tuple                # (height, width) as it came: the padding is cut off the features again


# -------------------------------------------------------------------------------- the folder
def resolve(folder):
    """The folder behind a name: `classroom`, a path, or a name in classroom/models/. Raises UserError."""
    classroom = str(folder) == "classroom"
    for path in [CLASSROOM / "base0"] if classroom else [Path(folder), CLASSROOM / str(folder)]:
        if path.is_dir():
            return path
    raise data.UserError(f"--model {folder}: no such folder; give a llava-hf folder or `classroom`")


def read_json(path):
    """An object of a JSON file, {} where there is none. Raises UserError."""
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise data.UserError(f"{path} is not valid JSON ({e}): copy the checkpoint again") from None
    if not isinstance(found, dict):
        raise data.UserError(f"{path} holds no JSON object: copy the checkpoint again")
    return found


def read_config(folder):
    """config.json of a llava-hf checkpoint. Raises UserError, naming what the folder is instead."""
    path = Path(folder) / "config.json"
    if not path.exists():
        raise data.UserError(f"{path} is missing: {folder} is no folder of a transformers model")
    config = read_json(path)
    kind = config.get("model_type")
    # The original LLaVA's model_type is "llava" as well, but it has no text_config.
    if kind in CLASSES and isinstance(config.get("text_config"), dict):
        return config
    mend = "give a llava-hf folder"
    if "mm_vision_tower" in config:
        mend = f"run `python tools/import_checkpoint.py {folder} NEW_FOLDER`, then use that"
    elif "vision_config" not in config:
        mend = "it has no vision tower, it is a text-only model; " + mend
    raise data.UserError(f"{path} says model_type {kind!r}, {config.get('architectures')}: only llava-hf "
                         f"folders ({', '.join(CLASSES.values())}) can be loaded; {mend}")


def read_header(path):
    """{name: {"dtype", "shape", "data_offsets"}} of a safetensors file. Raises UserError for a torn one."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length, = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else None
            header.pop("__metadata__", None)
            if 8 + length + max(about["data_offsets"][1] for about in header.values()) != size:
                raise ValueError
        return header
    except (struct.error, ValueError, AttributeError, KeyError, TypeError):
        raise data.UserError(f"{path} is torn ({size:,} bytes) or no weights file: copy it again") from None


def part(folder, kind, what, mend, **options):
    """kind.from_pretrained(folder), without a network; a UserError says what could not be read, and why."""
    from safetensors import SafetensorError
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, SafetensorError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise data.UserError(f"{folder}: the {what} cannot be read ({reason}): {mend}") from None


def read_tokenizer(folder, kind=None, **options):
    """The folder's tokenizer. Raises UserError; kind: transformers' class, if the folder does not say it."""
    from transformers import AutoTokenizer
    packages = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
    if (folder / "tokenizer.model").exists() and not (folder / "tokenizer.json").exists():
        lack = [name for name, module in packages.items() if not _installed(module)]
        if lack:
            raise data.UserError(f"{folder} has its tokenizer as a tokenizer.model, which needs "
                                 f"{' and '.join(lack)}: `pip install {' '.join(lack)}`")
        tokenizer = part(folder, kind or AutoTokenizer, "tokenizer", "copy its files", **options)
        return _merges_by_score(tokenizer, folder / "tokenizer.model")
    return part(folder, kind or AutoTokenizer, "tokenizer", "copy its files", **options)


def _merges_by_score(tokenizer, file):
    """SentencePiece merges by score, transformers 5.23 by id: double spaces would be other tokens."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer
    pieces, about = SentencePieceProcessor(str(file)), json.loads(tokenizer.backend_tokenizer.to_str())
    if about["model"]["type"] == "BPE":
        about["model"]["merges"].sort(key=lambda pair: -pieces.get_score(pieces.piece_to_id("".join(pair))))
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(about))
    return tokenizer


def _installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:                      # the package that the module stands in
        return False


def own_template(folder, tokenizer):
    """The chat template that a folder brings: beside its tokenizer or its processor; None without one."""
    text = tokenizer.chat_template or read_json(folder / "chat_template.json").get("chat_template")
    return text or read_json(folder / "processor_config.json").get("chat_template")


def front(folder, template=None, preparation=""):
    """The Front of a llava-hf folder.

    template: None for the folder's own, a name in TEMPLATES or Jinja. preparation: "" for the folder's own,
    "pad" to pad pictures to a square with the mean colour first. Raises UserError for what is missing or
    amiss.
    """
    from transformers import AutoConfig, AutoImageProcessor
    folder = resolve(folder)
    read_config(folder)
    config = part(folder, AutoConfig, "config.json", "copy it again")      # with the defaults of the classes
    tokenizer = read_tokenizer(folder)
    processor = part(folder, AutoImageProcessor, "image processor", "copy preprocessor_config.json",
                     backend="pil")
    image_id = config.image_token_id
    found, unknown = tokenizer.convert_tokens_to_ids(IMAGE), tokenizer.unk_token_id
    if found is None or found == unknown:
        raise data.UserError(f"{folder}: its tokenizer does not know {IMAGE}: copy the tokenizer of a "
                             "llava-hf folder, not that of its language model")
    if found != image_id:
        raise data.UserError(f"{folder}: the tokenizer gives {IMAGE} the id {found}, config.json "
                             f"says {image_id}: one of the two files is not this model's")
    if len(tokenizer) > (rows := config.text_config.vocab_size):
        raise data.UserError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, its model's embedding "
                             f"only {rows} rows: one of the two is not this model's")

    own, usual = own_template(folder, tokenizer), "vicuna"
    if config.model_type == "llava_next":
        usual = "llama3" if tokenizer.eos_token == "<|eot_id|>" else config.text_config.model_type
    name = template if template in TEMPLATES else "given" if template else "folder" if own else (
        usual if usual in TEMPLATES else "vicuna")
    vision = config.vision_config
    cls = config.vision_feature_select_strategy == "full" and vision.model_type == "clip_vision_model"
    mean = getattr(processor, "image_mean", None)
    if preparation not in PREPARATIONS:
        raise data.UserError(f"images={preparation} is no preparation: give one of "
                             f"{', '.join(repr(p) for p in PREPARATIONS)}")
    if preparation == "pad" and (config.model_type != "llava" or not mean):
        raise data.UserError(f"{folder}: only LLaVA-1.5's pictures can be padded to a square: leave out "
                             "images=pad")
    pad = tuple(int(x * 255) for x in mean) if preparation == "pad" else None    # cut off, as LLaVA does
    template = own if name == "folder" else TEMPLATES.get(name, template)
    return Front(config, tokenizer, processor, template, name, _in_words(processor, pad), pad, image_id,
                 image_tokens=(vision.image_size // vision.patch_size) ** 2 + cls,
                 eos_id=tokenizer.eos_token_id, folder=folder,
                 is_classroom=(folder / "classroom.json").exists())


def _in_words(processor, pad):
    shapes = getattr(processor, "image_grid_pinpoints", None)
    if not pad and not shapes and getattr(processor, "do_pad", False):          # the processor does it itself
        pad = tuple(int(x * 255) for x in processor.image_mean)
    words = [f"padded to a square with {pad}"] if pad else []
    words += [f"the whole and tiles of {len(shapes)} shapes"] if shapes else []
    size = {k: v for k, v in dict(processor.size).items() if v}
    words.append("resized to " + " x ".join(str(v) for v in size.values()))
    if getattr(processor, "do_center_crop", False) and "shortest_edge" in size:
        words.append("the middle cut out")
    return ", ".join(words) + f" ({type(processor).__name__})"


# -------------------------------------------------------------------------------- texts
def prompt_ids(m, question, n_images=1, history=(), counts=None):
    """Token ids of a prompt, up to where the response starts; each image is a run of image tokens.

    history: earlier [user, assistant] turns; the images stand in the first user turn. counts: the images'
    numbers of tokens (tokens_of), m.image_tokens each if None. BOS comes once, whether the template writes it
    or the tokenizer adds it. Raises UserError where the text holds IMAGE.
    """
    counts = [m.image_tokens] * n_images if counts is None else counts
    messages, images = [], [{"type": "image"}] * len(counts)
    for user, assistant in [*history, (question, None)]:
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": user}]})
        images = []
        if assistant is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": assistant}]})
    text = m.tokenizer.apply_chat_template(messages, chat_template=m.template, tokenize=False,
                                           add_generation_prompt=True)
    bos = m.tokenizer.bos_token
    ids = m.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids
    if ids and ids[-1] == m.eos_id:                                    # some tokenizers close every text
        ids = ids[:-1]
    if (places := ids.count(m.image_token_id)) != len(counts):
        raise data.UserError(f"the template {m.template_name!r} makes {places} image places for "
                             f"{len(counts)} images in {text[:80]!r}: question or template holds {IMAGE}")
    runs = iter(counts)
    return [t for i in ids for t in ([i] * next(runs) if i == m.image_token_id else [i])]


def response_ids(m, text):
    """Token ids of a response, EOS last: tokenised apart from the prompt, as both official codes do.

    An EOS inside the text is removed. Raises UserError for a text with the image marker or without a token.
    """
    ids = m.tokenizer(text.replace(m.tokenizer.eos_token, "").strip(), add_special_tokens=False).input_ids
    if m.image_token_id in ids:
        raise data.UserError(f"the response {text[:60]!r} holds {IMAGE}: remove the marker")
    if not ids:
        raise data.UserError(f"the response {text[:60]!r} has no token: drop the record or pass --skip_bad")
    return [*ids, m.eos_id]


# -------------------------------------------------------------------------------- pictures
def pad_square(image, colour):
    """The picture in the middle of a square of a colour: LLaVA's expand2square (mm_utils.py)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def prepare(m, images):
    """PIL images -> pixel values (N, 3, H, W) float32; for LLaVA-1.6 a list of N Tiles."""
    images = [pad_square(image, m.pad) for image in images] if m.pad else list(images)
    if m.config.model_type != "llava_next":
        return m.image_processor(images=images, return_tensors="pt").pixel_values
    tiles = (m.image_processor(images=[i], return_tensors="pt").pixel_values[0] for i in images)
    return [Tiles(pixels, image.size[::-1]) for pixels, image in zip(tiles, images, strict=True)]


def counts(m, sources):
    """The numbers of tokens of images, given as paths or bytes; read from their headers only if they vary."""
    if m.config.model_type != "llava_next":
        return [m.image_tokens] * len(sources)
    return [tokens_of(m, data.image_size(source)) for source in sources]


def tokens_of(m, size):
    """The number of tokens that an image of (width, height) pixels becomes."""
    if m.config.model_type != "llava_next":
        return m.image_tokens
    from transformers.image_processing_utils import select_best_resolution
    width, height = size
    vision = m.config.vision_config
    rows, columns = (side // vision.image_size * (vision.image_size // vision.patch_size)
                     for side in select_best_resolution((height, width), m.config.image_grid_pinpoints))
    # The tiles' features without the padding's (transformers' unpad_image), and a newline after each row.
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return m.image_tokens + rows * (columns + 1)


# -------------------------------------------------------------------------------- what a folder is
PARTS = {"weights": ("*.safetensors", "*.bin"),
         "tokenizer": ("tokenizer.json", "tokenizer.model", "vocab.json"),
         "image processor": ("preprocessor_config.json", "processor_config.json")}


def info(folder):
    """Lines that say what a model folder is, read from its files alone; no weight is loaded, nothing is
    raised
    for what is torn or missing: it is said."""
    from safetensors import SafetensorError, safe_open
    folder = resolve(folder)
    config = read_config(folder)
    parameters, size, types, amiss = 0, 0, set(), []
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size += path.stat().st_size
        try:
            with safe_open(path, "pt") as tensors:
                for name in tensors.keys():
                    piece = tensors.get_slice(name)
                    parameters += torch.Size(piece.get_shape()).numel()
                    types.add(piece.get_dtype())
        except (SafetensorError, OSError) as e:
            amiss.append(f"{path.name} is torn ({e})" if path.suffix == ".safetensors" else
                         f"{path.name} is a pickle, not counted")
    maps = [read_json(index).get("weight_map", {}) for index in folder.glob("*.index.json")]
    indexed = {name for weight_map in maps for name in weight_map.values()}
    amiss += [f"{name} of the index is missing" for name in sorted(indexed) if not (folder / name).exists()]
    absent = (what for what, names in PARTS.items() if not any(any(folder.glob(n)) for n in names))
    amiss += [f"{what} is missing" for what in absent]
    lines = [f"folder          {folder}",
             f"model           {config['model_type']}: {config.get('vision_config', {}).get('model_type')} + "
             f"{config['text_config'].get('model_type')}",
             f"parameters      {parameters:,} in {', '.join(sorted(types)) or '-'}, {size / 2**20:,.1f} MiB"]
    try:
        m = front(folder)
        text = m.tokenizer.decode(prompt_ids(m, "QUESTION", counts=[1]))
        more = " a tile, up to 5 tiles and a token a row" if m.config.model_type == "llava_next" else ""
        lines += [f"image           {m.config.vision_config.image_size} pixels, {m.image_tokens} "
                  f"tokens{more}; {m.preparation}",
                  f"vocabulary      {m.config.text_config.vocab_size}",
                  f"template        {m.template_name}: {text!r}"]
    except data.UserError as e:
        amiss.append(str(e))
    return [*lines, f"missing         {'; '.join(amiss) or 'nothing'}"]
