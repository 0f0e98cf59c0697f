"""Candidate images of a prompt from Stable Diffusion 3, for synth.py: all guidance scales in one call.

    encoded = encode(folder, ["a red bike"])            # the text encoders alone
    painter = Painter(folder)                           # transformer and VAE alone
    images = painter(encoded["a red bike"], encoded[""], guidance=[5, 7, 9, 11], seeds=[11, 12, 13, 14])

Memory on a GPU in float16, from the published parameter counts: encoding 11.2 GB of weights (T5-XXL 9.5, the
two CLIPs 1.6), painting 4.2 GB (transformer 4.1, VAE 0.2) and the activations of eight 1024-pixel latents.

Departures from the published pipeline:
 1. The scales are one batch, each guided by its own (diffusers takes one number): the numbers equal those of
    single calls to rounding (tests/test_synth.py: at most one step of an 8-bit pixel).
 2. Scales of 1 and less are guided as the formula says, eps(empty) + g (eps(prompt) - eps(empty)); diffusers
    leaves guidance out there and paints as for 1.
 3. A T5 tokenizer with a limit below 256 tokens gets no more than that (the built-in one takes 12).
 4. Seeds are a CPU generator's, so that every device starts from the same noise.
"""
if __name__ == "__main__":
    exit("A part of synth.py; run: python synth.py --help")

from pathlib import Path
from types import SimpleNamespace

import torch

import data
from data import UserError

ENCODERS = "text_encoder text_encoder_2 text_encoder_3 tokenizer tokenizer_2 tokenizer_3".split()
MOST = 256                              # tokens of a prompt for T5, diffusers' own limit


def _pipeline():
    """diffusers' class, with a scale for each image of the batch."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils import logging
    logging.set_verbosity_error()       # else it warns of every long prompt that CLIP cut
    logging.disable_progress_bar()

    class PerImageGuidance(StableDiffusion3Pipeline):
        do_classifier_free_guidance = True              # never decided by comparing a tensor of scales with 1
    return PerImageGuidance


def _load(folder, device, dtype, without):
    """The pipeline without these parts, and without those that were not saved: diffusers wants both named.

    A part that has nothing but fp16 weights is read from those. Raises UserError for one that is not there.
    """
    folder, variant = Path(folder), None
    index = data.read_json(folder / "model_index.json", check=data.as_record)
    named = [name for name, part in index.items() if isinstance(part, list) and part[0]]
    for name in named:
        if not (folder / name).is_dir():
            raise UserError(f"{folder} lacks the part {name}: copy it again (T5 alone can be left out: both "
                            "of its parts are then [null, null] in model_index.json)")
        if {".fp16" in file.name for file in (folder / name).glob("*.safetensors")} == {True}:
            variant = "fp16"
    absent = {*ENCODERS}.difference(named)
    pipeline = data.from_folder(
        _pipeline(), folder, "Stable Diffusion 3 pipeline in diffusers' layout", "copy it again",
        dtype=dtype, variant=variant, **dict.fromkeys([*without, *absent]))
    pipeline.set_progress_bar_config(disable=True)
    if "transformer" in without and "text_encoder_3" in absent:     # zeros take T5's place, as wide as it
        config = data.read_json(folder / "transformer/config.json")
        pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**config))
    return pipeline.to(device)


@torch.no_grad()
def encode(folder, prompts, device="cpu", dtype=torch.float32):
    """{prompt: (embeddings (1, T, D), pooled (1, P))} on the CPU: of the prompts and of the empty negative.

    One at a time: its neighbours in a batch would change a prompt's last bits, and a resumed run's images.
    """
    pipeline, found = _load(folder, device, dtype, ("transformer", "vae")), {}
    room = min(MOST, getattr(pipeline.tokenizer_3, "model_max_length", MOST))
    for prompt in dict.fromkeys(["", *prompts]):
        words, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, device=device, do_classifier_free_guidance=False, max_sequence_length=room)
        found[prompt] = words.cpu(), pooled.cpu()
    return found


class Painter:
    """Transformer and VAE; called with a prompt's embeddings it returns one image for each scale and seed."""
    def __init__(self, folder, device="cpu", dtype=torch.float32):
        self.pipeline = _load(folder, device, dtype, ENCODERS)

    @torch.no_grad()
    def __call__(self, prompt, negative, guidance, seeds, steps, size=0):
        """PIL images. prompt, negative: of `encode`. size: pixels, 0 for the model's own."""
        transformer = self.pipeline.transformer
        scale = torch.tensor(guidance, dtype=transformer.dtype, device=transformer.device)
        given = [x.to(scale.device).repeat_interleave(len(seeds), 0) for x in (*prompt, *negative)]
        words, pooled, empty, empty_pooled = given
        return self.pipeline(
            prompt_embeds=words, pooled_prompt_embeds=pooled, negative_prompt_embeds=empty,
            negative_pooled_prompt_embeds=empty_pooled, guidance_scale=scale[:, None, None, None],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds], num_inference_steps=steps,
            height=size or None, width=size or None).images
