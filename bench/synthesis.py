"""What each stage of synth.py needs on a GPU, as Markdown.

    python bench/synthesis.py    a minute on any machine, without downloads

Published models are built without weights, from their published sizes, and their numbers counted. Weights
are in float16 or bfloat16, ImageReward in float32; GB is 10**9 bytes. `answers at once` is what a card's
rest holds of cached keys and values for answers of 4,000 tokens (2,928 of a 1024-pixel image, the question,
up to 1,000 new ones), a tenth of the card left free for activations, which were not measured.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402

CARDS, FREE, TOKENS = (24e9, 80e9), .9, 4000

# Stable Diffusion 3 medium's parts.
T5 = {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24, "vocab_size": 32128,
      "feed_forward_proj": "gated-gelu"}
SD3 = {"sample_size": 128, "num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24,
       "joint_attention_dim": 4096, "caption_projection_dim": 1536, "pooled_projection_dim": 2048,
       "in_channels": 16, "out_channels": 16, "patch_size": 2, "pos_embed_max_size": 192}
VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16,
       "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
       "use_quant_conv": False, "use_post_quant_conv": False}


def count(build):
    """Numbers in a model that `build` makes."""
    import torch
    with torch.device("meta"):
        return sum(p.numel() for p in build().parameters())


def llava(text):
    """LLaVA-1.6 on CLIP ViT-L/14-336, as the three published folders have it."""
    from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
    eyes = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=336,
                            num_attention_heads=16, patch_size=14, projection_dim=768)
    return lambda: LlavaNextForConditionalGeneration(LlavaNextConfig(vision_config=eyes, text_config=text))


def stages():
    """[(stage, its models with the numbers of each, bytes a number, cached bytes a token or 0)]."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        LlamaConfig,
        LlamaModel,
        MistralConfig,
        T5Config,
        T5EncoderModel,
    )

    from synthesis import rewards
    small = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                           num_attention_heads=12, projection_dim=768)
    large = CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                           num_attention_heads=20, projection_dim=1280)
    texts = {"T5-XXL": count(lambda: T5EncoderModel(T5Config(**T5))),
             "CLIP-G": count(lambda: CLIPTextModelWithProjection(large)),
             "CLIP-L": count(lambda: CLIPTextModelWithProjection(small))}
    paint = {"transformer": count(lambda: SD3Transformer2DModel(**SD3)),
             "VAE": count(lambda: AutoencoderKL(**VAE))}
    found = [("encode prompts", texts, 2, 0), ("paint", paint, 2, 0),
             ("rank", {"ImageReward": count(lambda: rewards.ImageReward(**rewards.PUBLISHED))}, 4, 0)]
    vicuna = {"vocab_size": 32064, "max_position_embeddings": 4096}
    for name, config in (
            ("mistral-7b", MistralConfig(vocab_size=32064, num_key_value_heads=8)),
            ("vicuna-7b", LlamaConfig(**vicuna)),
            ("vicuna-13b", LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                                       num_attention_heads=40, **vicuna))):
        head = config.hidden_size // config.num_attention_heads
        cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head
        found.append(("respond", {f"LLaVA-1.6 {name}": count(llava(config))}, 2, cache))
    llama = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                        intermediate_size=14336, vocab_size=128257)
    return [*found, ("score", {"ArmoRM": count(lambda: LlamaModel(llama))}, 2, 0)]


def verdict(card, weights, cache):
    room = FREE * card - weights
    if room < cache * TOKENS:
        return "does not fit"
    return f"{int(room / (cache * TOKENS))} answers at once" if cache else "fits"


def table():
    lines = ["| stage | weights | GB | 24 GB | 80 GB |", "|---|---|---|---|---|"]
    for stage, models, size, cache in stages():
        weights = size * sum(models.values())
        named = ", ".join(f"{name} {n / 1e9:.2f} B" for name, n in models.items())
        fits = " | ".join(verdict(card, weights, cache) for card in CARDS)
        lines.append(f"| {stage} | {named} | {weights / 1e9:.1f} | {fits} |")
    return lines


def main():
    data.Parser(prog="bench/synthesis.py", description=__doc__).parse_args()
    print("\n".join(table()))


if __name__ == "__main__":
    main()
