"""Tiny random checkpoints of SmolVLM, Idefics3, LLaVA-OneVision, InternVL and Gemma 3.

    WRITERS["smolvlm"](folder)      weights, tokenizer, processor and template, as transformers saves them
    processor(folder)               transformers' own processor of a folder

Real classes at the smallest sizes that still have tiles, newlines and several heads. The tokenizer knows
bytes and, like the published ones, has tokens of their own for two and three newlines.
"""
import json
from functools import partial
from pathlib import Path

NEWLINES = [("Ċ", "Ċ"), ("ĊĊ", "Ċ")]                       # Ċ: a newline's name in byte-level BPE
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
          "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
          "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LEADING = ("{% for m in messages %}<|im_start|>{{ m['role'] }} "                # images first, then the texts
           "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
           "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}\n{{ part['text'] }}"
           "{% endfor %}<|im_end|>{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SMOL = ("<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
        "{% if m['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
        "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
        "{% elif part['type'] == 'image' %}<image>{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}")
GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>"
         "{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
         "{% for part in m['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
         "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")


def byte_tokenizer(special, template, **names):
    """Bytes, runs of newlines and the special tokens. names: bos_token="...", image_token="...", ..."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in NEWLINES]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, NEWLINES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    usual = {name: names.pop(name) for name in ("bos_token", "eos_token", "pad_token") if name in names}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=names, **usual)
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def save(folder, model, tokenizer, processor, about, std=0.2):
    """Weights of a scale at which attention matters. about: the rest of processor_config.json."""
    import torch
    draw = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, std, generator=draw)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    (Path(folder) / "processor_config.json").write_text(json.dumps(about))
    return folder


def text_of(tokenizer, **more):
    """A language model's sizes."""
    return dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id) | more


VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


def write_idefics(folder, kind="Idefics3", text=None, vision=None, tile=16, longest=48, scale=2, std=0.2):
    """Tiles of 16 pixels, of which a picture's longer side takes three; four tokens a tile."""
    import torch
    import transformers
    most = range(1, 1 + longest // tile)
    special = ["<image>", "<fake_token_around_image>", "<global-img>",
               *(f"<row_{row}_col_{column}>" for row in most for column in most)]
    tokenizer = byte_tokenizer(special, SMOL, bos_token="<|im_start|>", eos_token="<end_of_utterance>",
                               pad_token="<|pad|>")
    vision = VISION | {"image_size": tile, "patch_size": 4} | (vision or {})
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        text_config=text_of(tokenizer) | {"model_type": "llama"} | (text or {}), vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), scale_factor=scale,
        tie_word_embeddings=kind == "SmolVLM")
    pictures = getattr(transformers, f"{kind}ImageProcessorPil")(size={"longest_edge": longest},
                                                                 max_image_size={"longest_edge": tile})
    about = {"image_seq_len": (tile // vision["patch_size"] // scale) ** 2,
             "processor_class": f"{kind}Processor"}
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    return save(folder, model, tokenizer, pictures, about, std)


def write_onevision(folder):
    """Tiles of 28 pixels, at most two of them at full resolution; four tokens a tile."""
    import torch
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessorPil,
        Qwen2Config,
        SiglipVisionConfig,
    )
    tokenizer = byte_tokenizer(["<image>", "<video>", "<|im_start|>"], LEADING,
                               eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tiles = [[28 * h, 28 * w] for h in (1, 2, 3) for w in (1, 2, 3)]
    torch.manual_seed(0)
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**text_of(tokenizer)), vision_aspect_ratio="anyres_max_2",
        vision_config=SiglipVisionConfig(**VISION, image_size=28, patch_size=14, vision_use_head=False),
        image_grid_pinpoints=tiles, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"))
    pictures = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=tiles)
    about = {"num_image_tokens": 4, "vision_feature_select_strategy": "full",
             "vision_aspect_ratio": "anyres_max_2", "processor_class": "LlavaOnevisionProcessor"}
    return save(folder, LlavaOnevisionForConditionalGeneration(config), tokenizer, pictures, about)


def write_internvl(folder):
    """Tiles of 56 pixels, at most six; four tokens a tile."""
    import torch
    from transformers import (
        GotOcr2ImageProcessorPil,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        Qwen2Config,
    )
    names = {"start_image_token": "<img>", "end_image_token": "</img>",
             "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    tokenizer = byte_tokenizer(["<|im_start|>"], CHATML,
                               eos_token="<|im_end|>", pad_token="<|endoftext|>", **names)
    torch.manual_seed(0)
    config = InternVLConfig(
        text_config=Qwen2Config(**text_of(tokenizer)), image_seq_length=4, tie_word_embeddings=False,
        vision_config=InternVLVisionConfig(**VISION, image_size=(56, 56), patch_size=(14, 14)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    pictures = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}, min_patches=1, max_patches=6)
    about = {"image_seq_length": 4, "processor_class": "InternVLProcessor"}
    return save(folder, InternVLForConditionalGeneration(config), tokenizer, pictures, about)


def write_gemma(folder):
    """Pictures of 28 pixels, four tokens each; one layer with a window of 8 tokens, one without."""
    import torch
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3ImageProcessorPil,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
             "image_token": "<image_soft_token>"}
    tokenizer = byte_tokenizer(["<start_of_turn>", "<end_of_turn>"], GEMMA, bos_token="<bos>",
                               eos_token="<eos>", pad_token="<pad>", **names)
    torch.manual_seed(0)
    text = Gemma3TextConfig(**text_of(tokenizer), head_dim=8, query_pre_attn_scalar=8, sliding_window=8,
                            layer_types=["sliding_attention", "full_attention"])
    boi, eoi, soft = tokenizer.convert_tokens_to_ids([*names.values()])
    config = Gemma3Config(
        text_config=text, vision_config=SiglipVisionConfig(**VISION, image_size=28, patch_size=7,
                                                           vision_use_head=False),
        mm_tokens_per_image=4, boi_token_index=boi, eoi_token_index=eoi, image_token_index=soft)
    pictures = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    about = {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    return save(folder, Gemma3ForConditionalGeneration(config), tokenizer, pictures, about)


WRITERS = {"smolvlm": partial(write_idefics, kind="SmolVLM"), "idefics3": write_idefics,
           "onevision": write_onevision, "internvl": write_internvl, "gemma3": write_gemma}


def processor(folder):
    """AutoProcessor's; without torchvision, which the parts for videos need, the class by its own parts."""
    import transformers
    about = json.loads((Path(folder) / "processor_config.json").read_text())
    kind = getattr(transformers, about.pop("processor_class"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    pictures = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    about["chat_template"] = tokenizer.chat_template
    if "video_processor" not in kind.get_attributes():
        return transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    if kind is transformers.SmolVLMProcessor:
        from transformers.models.smolvlm import processing_smolvlm
        processing_smolvlm.num2words = processing_smolvlm.num2words or str          # for videos alone
    unchecked = {"check_argument_for_proper_class": lambda *_: None}                # of the part for videos
    return type(kind.__name__, (kind,), unchecked)(pictures, tokenizer, None, **about)
