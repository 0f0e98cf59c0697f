"""Tiny random checkpoints of every family, in its publishers' layout, and transformers' own processors.

    FAMILIES[name](folder)      writes one: transformers' classes, a tokenizer of bytes, the real template
    processor(folder)           transformers' own processor of a folder
"""
import json
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

SPECIAL_QWEN = ("<|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> "
                "<|video_pad|>").split()
# The published chat templates, without what they say about videos and tools.
QWEN2 = ("{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
         "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
         "<|im_start|>{{ message['role'] }}\n"
         "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
         "{% else %}{% for content in message['content'] %}"
         "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
         "<|vision_start|><|image_pad|><|vision_end|>"
         "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
         "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
QWEN3 = ("{%- for message in messages %}\n    {%- if message.role == 'user' %}\n"
         "        {{- '<|im_start|>' + message.role + '\\n' }}\n"
         "        {%- for content in message.content %}\n"
         "            {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}\n"
         "                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}\n"
         "            {%- elif 'text' in content %}\n                {{- content.text }}\n"
         "            {%- endif %}\n        {%- endfor %}\n        {{- '<|im_end|>\\n' }}\n"
         "    {%- elif message.role == 'assistant' %}\n"
         "        {{- '<|im_start|>' + message.role + '\\n' }}\n"
         "        {%- for content in message.content %}\n            {%- if 'text' in content %}\n"
         "                {{- content.text }}\n            {%- endif %}\n        {%- endfor %}\n"
         "        {{- '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
         "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}\n")
INTERN = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
          "{% for content in message['content'] %}"
          "{% if content['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ content['text'] }}{% endif %}"
          "{% endfor %}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# A turn's images come first.
ONEVISION = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
             "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
             "<image>{% endfor %}"
             "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
             "{{ '\n' + content['text'] }}{% endfor %}<|im_end|>{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SMOLVLM = ("<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
           "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
           "{% for content in message['content'] %}{% if content['type'] == 'text' %}{{ content['text'] }}"
           "{% elif content['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n"
           "{% endfor %}"
           "{% if add_generation_prompt %}Assistant:{% endif %}")
GEMMA = ("{{ bos_token }}{% for message in messages %}"
         "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
         "{% for content in message['content'] %}{% if content['type'] == 'image' %}<start_of_image>"
         "{% else %}{{ content['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")


# ---- what the writers share ----
def byte_tokenizer(kind, special, merges=(), names=None, **named):
    """A tokenizer of a class of transformers' for byte-level BPE: a token is a byte, but for a few merges.

    special: more tokens. named: eos_token=, pad_token=, bos_token= and the like. names: those that only this
    family's tokenizer has, {"boi_token": "<start_of_image>"}.
    """
    from tokenizers import pre_tokenizers
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocab = {c: i for i, c in enumerate(letters)}
    tokenizer = kind(vocab=vocab, merges=[*merges], extra_special_tokens=names or {}, **named)
    tokenizer.add_tokens([*special], special_tokens=True)
    return tokenizer


# The published tokenizers have tokens for two newlines and three: how a text is cut around an image matters.
NEWLINES = [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]


def save(folder, model, tokenizer, processor, std=0.3):
    """Write the parts into a folder, the weights louder than the default: attention shall matter."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=std)
        else:
            weight.data += 0.1 * torch.randn(weight.shape)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)


def processor(folder):
    """transformers' own processor of a folder: where torchvision is absent, without its part for videos."""
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, processing_utils
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import is_torchvision_available
    name = PROCESSOR_MAPPING_NAMES[AutoConfig.from_pretrained(folder).model_type]
    kind = getattr(__import__("transformers"), name)
    if is_torchvision_available() or "video_processor" not in kind.get_attributes():
        return AutoProcessor.from_pretrained(folder, backend="pil")
    about, _ = kind.get_processor_dict(folder)
    about.pop("processor_class", None)
    with (mock.patch.object(processing_utils.ProcessorMixin, "check_argument_for_proper_class"),
          mock.patch("transformers.models.smolvlm.processing_smolvlm.num2words", str)):        # for videos
        return kind(AutoImageProcessor.from_pretrained(folder, backend="pil"),
                    AutoTokenizer.from_pretrained(folder),
                    video_processor=None, **about)


# ---- the families ----
def qwen(folder, kind, template, patch=14, text=None, vision=None, blocks=9, std=0.3, merges=(),
         dtype=torch.float32):
    """kind: what transformers' classes are called, Qwen2VL. text, vision: of its configurations. blocks: of
    pixels, an image's most tokens."""
    import transformers
    tokenizer = byte_tokenizer(transformers.Qwen2Tokenizer, SPECIAL_QWEN, merges, eos_token="<|im_end|>",
                               pad_token="<|endoftext|>")
    start, end, image, video = tokenizer.convert_tokens_to_ids(SPECIAL_QWEN[2:4] + SPECIAL_QWEN[5:])
    text = dict(vocab_size=len(tokenizer) + 5, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                rope_parameters={"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4},
                ) | (text or {})
    config = getattr(transformers, f"{kind}Config")(
        text_config=text,
        vision_config=dict(depth=2, patch_size=patch, spatial_merge_size=2) | vision,
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=kind != "Qwen2VL")
    model = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    block = (2 * patch) ** 2
    pixels = transformers.Qwen2VLImageProcessorPil(min_pixels=4 * block, max_pixels=blocks * block,
                                                   patch_size=patch)
    save(folder, model, tokenizer, pixels, std)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def as_published(folder):
    """What was published in 2025: a flat config.json, other names, a text template beside the other."""
    about = json.loads((folder / "config.json").read_text())
    text = about.pop("text_config")
    rope = text.pop("rope_parameters")
    about = text | about | {"rope_theta": rope["rope_theta"],
                            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    (folder / "config.json").write_text(json.dumps(about))
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        weights[name] = weight
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def qwen2_vl(folder):
    qwen(folder, "Qwen2VL", QWEN2, vision=dict(embed_dim=32, num_heads=2, hidden_size=32, mlp_ratio=2))
    as_published(folder)


def qwen2_5_vl(folder):
    qwen(folder, "Qwen2_5_VL", QWEN2,
         vision=dict(hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, window_size=56,
                     fullatt_block_indexes=[1]))
    as_published(folder)


def qwen3_vl(folder):
    qwen(folder, "Qwen3VL", QWEN3, patch=16, text=dict(head_dim=8),
         vision=dict(hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32,
                     num_position_embeddings=16, deepstack_visual_indexes=[0, 1]))


def about(folder, kind, template, **more):
    """processor_config.json and the template, as published beside the tokenizer."""
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": kind} | more))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def text_of(tokenizer, **more):
    """A language model's sizes."""
    return dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id) | more


VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def idefics(folder, kind, text=None, vision=None, tile=16, longest=48, scale=2, std=0.3, merges=NEWLINES):
    """Tiles of 16 pixels, four tokens each, three along an image's longer side; see qwen() for the rest."""
    import transformers
    most = range(1, 1 + longest // tile)
    special = ["<image>", "<fake_token_around_image>", "<global-img>",
               *(f"<row_{row}_col_{column}>" for row in most for column in most)]
    tokenizer = byte_tokenizer(transformers.GPT2Tokenizer, special, merges, bos_token="<|im_start|>",
                               eos_token="<end_of_utterance>", pad_token="<|pad|>")
    vision = VISION | {"image_size": tile, "patch_size": 4} | (vision or {})
    config = getattr(transformers, f"{kind}Config")(
        text_config=text_of(tokenizer) | {"model_type": "llama"} | (text or {}), vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=scale,
        tie_word_embeddings=kind == "SmolVLM")
    pixels = getattr(transformers, f"{kind}ImageProcessorPil")(size={"longest_edge": longest},
                                                               max_image_size={"longest_edge": tile})
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    save(folder, model, tokenizer, pixels, std)
    about(folder, f"{kind}Processor", SMOLVLM, image_seq_len=(tile // vision["patch_size"] // scale) ** 2)


def smolvlm(folder):
    idefics(folder, "SmolVLM")


def idefics3(folder):
    idefics(folder, "Idefics3")


def onevision(folder):
    """Tiles of 28 pixels, four tokens each, at most two of them at their full resolution."""
    import transformers
    tokenizer = byte_tokenizer(transformers.Qwen2Tokenizer, ["<|im_start|>", "<image>", "<video>"], NEWLINES,
                               eos_token="<|im_end|>", pad_token="<|endoftext|>")
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    tiles = [[28 * height, 28 * width] for height in (1, 2, 3) for width in (1, 2, 3)]
    config = transformers.LlavaOnevisionConfig(
        text_config=text_of(tokenizer) | {"model_type": "qwen2"}, vision_aspect_ratio="anyres_max_2",
        vision_config=VISION | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14,
                                "vision_use_head": False},
        image_grid_pinpoints=tiles, image_token_index=image, video_token_index=video)
    pixels = transformers.LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28},
                                                          image_grid_pinpoints=tiles)
    save(folder, transformers.LlavaOnevisionForConditionalGeneration(config), tokenizer, pixels)
    about(folder, "LlavaOnevisionProcessor", ONEVISION, num_image_tokens=4,
          vision_aspect_ratio="anyres_max_2", vision_feature_select_strategy="full")


def internvl(folder):
    """Tiles of 56 pixels, four tokens each, at most six and the whole image."""
    import transformers
    names = {"start_image_token": "<img>", "end_image_token": "</img>",
             "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tokenizer = byte_tokenizer(transformers.Qwen2Tokenizer, ["<|im_start|>"], NEWLINES, names,
                               eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.InternVLConfig(
        text_config=text_of(tokenizer) | {"model_type": "qwen2"}, image_seq_length=4,
        vision_config=VISION | {"image_size": (56, 56), "patch_size": (14, 14)}, tie_word_embeddings=False,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    pixels = transformers.GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, max_patches=6)
    save(folder, transformers.InternVLForConditionalGeneration(config), tokenizer, pixels)
    about(folder, "InternVLProcessor", INTERN, image_seq_length=4)


def gemma3(folder):
    """Images of 28 pixels, four tokens each; a layer with a window of 8 tokens, and one without."""
    import transformers
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
             "image_token": "<image_soft_token>"}
    tokenizer = byte_tokenizer(transformers.GPT2Tokenizer, ["<start_of_turn>", "<end_of_turn>"], NEWLINES,
                               names, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    start, end, soft = tokenizer.convert_tokens_to_ids([*names.values()])
    config = transformers.Gemma3Config(
        text_config=text_of(tokenizer, head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
                            layer_types=["sliding_attention", "full_attention"]),
        vision_config=VISION | {"image_size": 28, "patch_size": 7, "vision_use_head": False},
        mm_tokens_per_image=4, boi_token_index=start, eoi_token_index=end, image_token_index=soft)
    model = transformers.Gemma3ForConditionalGeneration(config)
    ends = tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"])
    model.generation_config.eos_token_id = ends
    save(folder, model, tokenizer, transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}))
    about(folder, "Gemma3Processor", GEMMA, image_seq_length=4)


FAMILIES = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "smolvlm": smolvlm,
            "idefics3": idefics3, "onevision": onevision, "internvl": internvl, "gemma3": gemma3}
