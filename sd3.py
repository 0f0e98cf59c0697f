"""Candidate images of a prompt from Stable Diffusion 3: all guidance scales in one call, on small GPUs.

A file of its own because diffusers is this file's business alone: synth.py hands in prompts and gets images.

    encoded = encode(folder, ["a red bike"])            # loads the text encoders alone, and frees them again
    painter = Painter(folder)                           # transformer and VAE alone
    images = painter(encoded["a red bike"], encoded[""], guidance=[5, 7, 9, 11], seeds=[11, 12, 13, 14])

Memory on a GPU in float16, from the published parameter counts: encoding 11.2 GB of weights (T5-XXL 9.5, the
two CLIPs 1.6), painting 4.2 GB (transformer 4.1, VAE 0.2) and the activations of eight 1024-pixel latents.

Departures from the published pipeline:
 1. The scales are one batch, guided each by its own (diffusers takes one number): the numbers of single calls
    to rounding (tests/test_synth.py: at most one step of an 8-bit pixel).
 2. Scales of 1 and less are guided as the formula says, eps(empty) + g (eps(prompt) - eps(empty)); diffusers
    leaves guidance out there and paints as for 1.
 3. A T5 tokenizer that says that it takes fewer than 256 tokens gets no more (the built-in one takes 12).
 4. Seeds are a CPU generator's, so that every device starts from the same noise.
"""
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from data import UserError
from journal import free


@cache
def _pipeline():
    """diffusers' class, with a scale for each image of the batch."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils import logging
    logging.set_verbosity_error()                       # else it says for every long prompt what CLIP cut off
    logging.disable_progress_bar()

    class PerImageGuidance(StableDiffusion3Pipeline):
        do_classifier_free_guidance = True              # never decided by comparing a tensor of scales with 1
    return PerImageGuidance


def _load(folder, device, dtype, without):
    index = Path(folder) / "model_index.json"
    try:
        parts = json.loads(index.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{index} cannot be read ({error}): --generator needs the folder of a Stable "
                        "Diffusion 3 pipeline in diffusers' layout") from error
    # a pipeline saved without T5 has to be told so again
    absent = [name for name, what in parts.items() if isinstance(what, list) and what[0] is None]
    try:
        pipeline = _pipeline().from_pretrained(str(folder), dtype=dtype, local_files_only=True,
                                               **dict.fromkeys([*without, *absent]))
    except (OSError, ValueError, RuntimeError, TypeError, ImportError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} cannot be loaded as Stable Diffusion 3 ({why}); copy it again") from error
    pipeline.set_progress_bar_config(disable=True)
    if "transformer" in without and "text_encoder_3" in absent:     # zeros stand for T5's, as wide
        config = json.loads((Path(folder) / "transformer" / "config.json").read_text())
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
    return pipeline.to(device)


@torch.no_grad()
def encode(folder, prompts, device="cpu", dtype=torch.float32):
    """{prompt: (embeddings (1, T, D), pooled (1, P))} on the CPU: of the prompts and of the empty negative.

    One at a time: its neighbours in a batch would change a prompt's last bits, and a resumed run's images.
    """
    pipeline, out = _load(folder, device, dtype, ("transformer", "vae")), {}
    room = min(256, getattr(pipeline.tokenizer_3, "model_max_length", 256))     # 256 is diffusers' own
    for prompt in dict.fromkeys(["", *prompts]):
        words, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, device=device,
                                                     do_classifier_free_guidance=False,
                                                     max_sequence_length=room)
        out[prompt] = words.cpu(), pooled.cpu()
    del pipeline
    free()
    return out


class Painter:
    """Transformer and VAE; called with a prompt's embeddings it returns one image for each scale and seed."""

    def __init__(self, folder, device="cpu", dtype=torch.float32):
        text = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
        self.pipeline, self.device = _load(folder, device, dtype, text), device

    @torch.no_grad()
    def __call__(self, prompt, negative, guidance, seeds, steps=28, size=0):
        """PIL images. prompt, negative: of `encode`. size: pixels, 0 for the model's own."""
        n = len(seeds)
        scale = torch.tensor(guidance, dtype=self.pipeline.transformer.dtype, device=self.device)
        (words, pooled), (empty, empty_pooled) = ([x.to(self.device).repeat_interleave(n, 0) for x in pair]
                                                  for pair in (prompt, negative))
        return self.pipeline(
            prompt_embeds=words, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty,
            negative_pooled_prompt_embeds=empty_pooled, guidance_scale=scale[:, None, None, None],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], num_inference_steps=steps,
            height=size or None, width=size or None).images
