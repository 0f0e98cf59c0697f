"""Qwen2.5-VL-3B without its weights: the published sizes, and a tokenizer whose tokens are bytes."""
if __name__ == "__main__":
    exit("A part of bench/gpu.py; run: python bench/gpu.py --help")

import torch

# Qwen2.5-VL-3B's sizes, as published in its config.json, and what a tiny one changes.
TEXT = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
        "num_key_value_heads": 2, "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
SMALL_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "vocab_size": 300,
              "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}}
TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
         "out_hidden_size": 2048, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
SMALL_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
               "fullatt_block_indexes": [1]}
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
          "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
          "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def write(folder, tiny):
    """All of the folder but the weights -> its configuration. The tokenizer's tokens are bytes."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2_5_VLConfig, Qwen2Tokenizer, Qwen2VLImageProcessorPil
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=letters, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    named = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *named]})
    start, end, image, video = tokenizer.convert_tokens_to_ids(named)
    tokenizer.chat_template = CHATML
    config = Qwen2_5_VLConfig(
        text_config=TEXT | (SMALL_TEXT if tiny else {}), vision_config=TOWER | (SMALL_TOWER if tiny else {}),
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=True)
    for part in (config, tokenizer, Qwen2VLImageProcessorPil()):
        part.save_pretrained(folder)
    return config


def random(config, dtype, device, kind):
    """transformers' model, made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return kind(config)
    finally:
        torch.set_default_dtype(before)
