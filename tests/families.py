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


# ---- what the writers share ----
def byte_tokenizer(kind, special, **named):
    """A tokenizer of a class of transformers' for byte-level BPE that has no merges: a token is a byte.

    special: more tokens. named: eos_token=, pad_token=, bos_token= and the like.
    """
    from tokenizers import pre_tokenizers
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = kind(vocab=vocab, merges=[], **named)
    tokenizer.add_special_tokens({"additional_special_tokens": [*special]})
    return tokenizer


def save(folder, model, tokenizer, processor):
    """Write the parts into a folder, the weights louder than the default: attention shall matter."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
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
    with mock.patch.object(processing_utils.ProcessorMixin, "check_argument_for_proper_class"):
        return kind(AutoImageProcessor.from_pretrained(folder, backend="pil"),
                    AutoTokenizer.from_pretrained(folder),
                    video_processor=None, chat_template=about["chat_template"])


# ---- the families ----
def qwen(folder, kind, template, patch=14, text=None, vision=None):
    """kind: what transformers' classes are called, Qwen2VL. text, vision: of its configurations."""
    import transformers
    tokenizer = byte_tokenizer(transformers.Qwen2Tokenizer, SPECIAL_QWEN, eos_token="<|im_end|>",
                               pad_token="<|endoftext|>")
    start, end, image, video = tokenizer.convert_tokens_to_ids(SPECIAL_QWEN[2:4] + SPECIAL_QWEN[5:])
    config = getattr(transformers, f"{kind}Config")(
        text_config=dict(vocab_size=len(tokenizer) + 5, hidden_size=32, intermediate_size=48,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                         pad_token_id=tokenizer.pad_token_id, rope_parameters={
                             "mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4},
                         **text or {}),
        vision_config=dict(depth=2, patch_size=patch, spatial_merge_size=2, **vision),
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=kind != "Qwen2VL")
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    block = (2 * patch) ** 2
    pixels = transformers.Qwen2VLImageProcessorPil(min_pixels=4 * block, max_pixels=9 * block,
                                                   patch_size=patch)
    save(folder, model, tokenizer, pixels)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    if kind != "Qwen3VL":
        as_published(folder)


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


def qwen2_5_vl(folder):
    qwen(folder, "Qwen2_5_VL", QWEN2,
         vision=dict(hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, window_size=56,
                     fullatt_block_indexes=[1]))


def qwen3_vl(folder):
    qwen(folder, "Qwen3VL", QWEN3, patch=16, text=dict(head_dim=8),
         vision=dict(hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32,
                     num_position_embeddings=16, deepstack_visual_indexes=[0, 1]))


FAMILIES = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
