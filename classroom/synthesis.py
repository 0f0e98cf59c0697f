"""Train the built-in models of synth.py: a generator, rewards and responders of the classroom's world.

    python classroom/synthesis.py                      all of them
    python classroom/synthesis.py sd3 --minutes 60     one of them again
    python classroom/synthesis.py sharper --minutes 3  its decoder further
    python classroom/synthesis.py measure              synthesis/statistics.json
    python classroom/synthesis.py table                the same as Markdown

sd3: Stable Diffusion 3 of diffusers' own classes at 80 pixels: a VAE that shrinks by 4, two CLIP text
models and a T5 whose tokens are words, a transformer over the 16 cells; on a GPU if there is one.

imagereward: rewards.ImageReward, trained as the published one, by ranking: a scene's picture above another
scene's, and above one with another object, another colour, one object less, or spoilt by contrast and
noise.

clip: transformers' CLIP by contrast, the control that CLIP-DPO is.

armorm: rewards.ArmoRM, five attributes and a gate over questions and answers. It sees no picture and no
scene's truth, here as in use: its labels are computed from the words alone.

llava0 to llava3: four responders, the classroom's bases, trained further on differently careless captions.

Everything is small and trained on scenes of the train split, whose pictures the generator learns in an easy
form: two or three objects, each once, in the middle of its cell.
"""
import copy
import dataclasses
import functools
import json
import math
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from classroom import make, world  # noqa: E402

OUT = ROOT / "classroom" / "synthesis"
ROOM = 12                                   # tokens of a prompt, begin and end included
JOINT, WIDTH, LAYERS, CHANNELS = 64, 128, 4, 3      # of the transformer and of the VAE


# ---------------------------------------------------------------------------- scenes, prompts, words
def easy(rng, split="train"):
    """A scene of two or three objects, each once and in the middle of its cell."""
    while True:
        s = world.scene(rng, split)
        if len(s.things) <= 3 and all(len(t.places) == 1 for t in s.things):
            things = [dataclasses.replace(t, places=tuple((c, r, 17, 1, 1) for c, r, *_ in t.places))
                      for t in s.things]
            return dataclasses.replace(s, things=tuple(things))


def prompt(s):
    """`street with red car , blue boat`."""
    return f"{s.theme} with " + " , ".join(f"{t.colour} {t.type}" for t in s.things)


def reading(s):
    """The same scene, its objects in the order of reading: the generator learns to place them so."""
    return dataclasses.replace(s, things=tuple(sorted(s.things, key=lambda t: t.places[0][1::-1])))


def clip_tokenizer(length):
    """transformers' CLIP tokenizer, each word of the world one token: merges build it letter by letter."""
    from transformers import CLIPTokenizer
    words = sorted({*world.vocabulary(), "with", "and"})
    merges, vocab = [], {}
    for word in words:
        letters = [*word[:-1], word[-1] + "</w>"]
        for letter in letters:
            vocab.setdefault(letter, len(vocab))
        while len(letters) > 1:             # from the end: what is joined ends a word, and hurts no other
            pair = tuple(letters[-2:])
            if pair not in merges:
                merges.append(pair)
            letters = [*letters[:-2], "".join(pair)]
            vocab.setdefault(letters[-1], len(vocab))
    vocab |= {w: len(vocab) + k for k, w in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)
    wrong = [w for w in words if len(tokenizer(w).input_ids) != 3]
    if wrong:
        raise ValueError(f"these words are more than one token: {wrong}")
    return tokenizer


def pictures(scenes):
    """Pictures in [-1, 1]: (N, 3, 80, 80)."""
    import numpy as np
    import torch
    return torch.from_numpy(np.stack([world.draw(s) for s in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1


def device():
    """A GPU if there is one: for the generator alone, the rest takes a few minutes anywhere."""
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def fit(name, parameters, loss_of, steps, lr, minutes=math.inf, after=None):
    """AdamW with warm-up and cosine, for so many steps or, if that is sooner, minutes of processor time. An
    interrupt (Ctrl-C, SIGTERM) ends it with what was learned so far."""
    import torch
    stop = []
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda *_: stop.append(1))
    parameters = [p for p in parameters if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(.9, .98), weight_decay=.01)
    start, seen = time.process_time(), []
    for step in range(steps):
        spent = (time.process_time() - start) / 60 / minutes
        share = max(step / steps, spent)
        if share >= 1 or stop:
            break
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * (.02 + .98 * .5 * (1 + math.cos(math.pi * share)))
        loss = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.)
        optimiser.step()
        if after:
            after(step)
        seen.append(loss.item())
        if (step + 1) % 100 == 0:
            spent = time.process_time() - start
            print(f"{name} {step + 1}  loss {sum(seen[-100:]) / 100:.4f}  {spent:.0f} s", flush=True)
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_DFL)


def halved(folder):
    """Stored in half precision, to be loaded in whichever."""
    import torch
    from safetensors.torch import load_file, save_file
    for file in Path(folder).rglob("*.safetensors"):
        state = {k: x.half() if x.dtype == torch.float32 else x for k, x in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})


# ---------------------------------------------------------------------------- the generator
def train_vae(steps, minutes=math.inf):
    import torch
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 16, 32), latent_channels=CHANNELS, norm_num_groups=4,
                        layers_per_block=1, sample_size=world.SIZE, mid_block_add_attention=False,
                        use_quant_conv=False, use_post_quant_conv=False).to(device())
    rng = random.Random("vae")
    half = world.SIZE // 2

    def loss_of(step):
        whole = pictures([easy(rng) for _ in range(16)])
        x, y = rng.choice((0, half)), rng.choice((0, half))
        whole = torch.cat([whole[:8, :, :half, :half], whole[8:, :, y:y + half, x:x + half]]).to(device())
        latent = vae.encode(whole).latent_dist
        shown = vae.decode(latent.sample()).sample
        return (shown - whole).abs().mean() + ((shown - whole) ** 2).mean() + 1e-6 * latent.kl().mean()
    fit("vae", list(vae.parameters()), loss_of, steps, 4e-3, minutes / 2)
    sharpen(vae, minutes / 2)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        z = vae.encode(pictures([easy(rng) for _ in range(64)]).to(device())).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / z.std().item(), shift_factor=z.mean().item())
    return vae


def sharpen(vae, minutes):
    """The decoder alone, on whole pictures, whose norms differ from a crop's; objects' pixels count more."""
    import numpy as np
    import torch
    vae.requires_grad_(False).decoder.requires_grad_(True)
    rng = random.Random("sharpen")

    def loss_of(step):
        scenes = [easy(rng) for _ in range(6)]
        whole = pictures(scenes).to(device())
        empty = np.stack([np.array(world.ground(s.theme)) for s in scenes]) / 127.5 - 1
        empty = torch.from_numpy(empty).permute(0, 3, 1, 2).float().to(device())
        weight = 1 + 9 * ((whole - empty).abs().amax(1, keepdim=True) > .05)
        latent = vae.encode(whole).latent_dist
        shown = vae.decode(latent.sample()).sample
        return (weight * ((shown - whole).abs() + (shown - whole) ** 2)).sum() / (3 * weight.sum())
    fit("sharpen", list(vae.decoder.parameters()), loss_of, 4000, 3e-3, minutes)


def sharper(minutes):
    """The same for the generator that is there; its transformer only knows the encoder."""
    from diffusers import AutoencoderKL
    vae = AutoencoderKL.from_pretrained(OUT / "sd3" / "vae").float().to(device())
    sharpen(vae, minutes)
    vae.register_to_config(_name_or_path="")            # else the path on this machine
    vae.cpu().eval().save_pretrained(OUT / "sd3" / "vae")
    halved(OUT / "sd3" / "vae")


def read_texts(clips, t5, tokens):
    """What SD3's transformer is told, as its pipeline does it: (N, 2 ROOM, JOINT) and pooled (N, JOINT)."""
    import torch
    seen = [clip(tokens[:, :ROOM], output_hidden_states=True) for clip in clips]
    joint = torch.cat([out.hidden_states[-2] for out in seen], -1)
    return torch.cat([joint, t5(tokens[:, ROOM:])[0]], 1), torch.cat([out.text_embeds for out in seen], -1)


def learn_to_read(clips, t5, both, steps=800):
    """The text models come to know which colour belongs to which object, as the published ones come trained;
    the prompts are of any objects, so that nothing of the scenes is in them."""
    import torch
    rng, heads = random.Random("read"), torch.nn.ModuleList(
        torch.nn.Linear(JOINT, len(world.TYPES) * len(world.COLOURS)) for _ in range(3))
    names = [(c, t) for t in world.TYPES for c in world.COLOURS]
    readers = torch.nn.ModuleList([*clips, t5, heads]).to(device())

    def loss_of(step):
        asked = [rng.sample(names, rng.choice((2, 3))) for _ in range(128)]
        there = torch.tensor([[n in some for n in names] for some in asked]).float().to(device())
        texts = [" , ".join(map(" ".join, some)) for some in asked]
        texts = [f"{rng.choice(list(world.THEMES))} with {text}" for text in texts]
        joint, pooled = read_texts(clips, t5, both(texts).to(device()))
        told = (heads[0](joint[:, :ROOM]).amax(1), heads[1](joint[:, ROOM:]).amax(1), heads[2](pooled))
        return sum(torch.nn.functional.binary_cross_entropy_with_logits(x - 4, there) for x in told)
    fit("read", list(readers.parameters()), loss_of, steps, 8e-3)
    for model in (*clips, t5):
        model.eval().requires_grad_(False)


def sd3(minutes):
    """The VAE (a quarter of the minutes), the text models, then the transformer by flow matching."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from diffusers import StableDiffusion3Pipeline as Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    folder, rng, shift, start = OUT / "sd3", random.Random("sd3"), 3., time.process_time()
    if (folder / "vae").exists():               # trained before: delete the folder to train it again
        vae = AutoencoderKL.from_pretrained(folder / "vae").float().eval().requires_grad_(False)
        vae.register_to_config(_name_or_path="")        # else the path on this machine
    else:
        vae = train_vae(4000, minutes / 4)
        vae.save_pretrained(folder / "vae")
    vae.to(device())
    torch.manual_seed(1)
    tokenizer, pieces = clip_tokenizer(ROOM), t5_tokenizer(ROOM)
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=JOINT // 2, intermediate_size=JOINT,
                          num_hidden_layers=3, num_attention_heads=2, projection_dim=JOINT // 2,
                          max_position_embeddings=ROOM, bos_token_id=len(tokenizer) - 2,
                          eos_token_id=len(tokenizer) - 1, initializer_factor=1.)
    clips = [CLIPTextModelWithProjection(text) for _ in range(2)]
    t5 = T5EncoderModel(T5Config(vocab_size=len(pieces), d_model=JOINT, d_kv=32, d_ff=2 * JOINT, num_layers=2,
                                 num_heads=2, dropout_rate=0.))
    transformer = SD3Transformer2DModel(
        sample_size=world.SIZE // 4, patch_size=world.CELL // 4, in_channels=CHANNELS, out_channels=CHANNELS,
        num_layers=LAYERS, attention_head_dim=32, num_attention_heads=WIDTH // 32, joint_attention_dim=JOINT,
        caption_projection_dim=WIDTH, pooled_projection_dim=JOINT, pos_embed_max_size=world.GRID)

    def both(texts):
        """Tokens of CLIP and of T5: (N, 2 ROOM)."""
        return torch.cat([words(tokenizer, texts), words(pieces, texts)], 1)
    learn_to_read(clips, t5, both)
    config, latents, told = vae.config, [], []
    with torch.no_grad():
        for _ in range(min(128, round(3 * minutes))):       # up to 16,384 scenes, encoded once
            scenes = [reading(easy(rng)) for _ in range(128)]
            z = vae.encode(pictures(scenes).to(device())).latent_dist.mean
            latents.append((z - config.shift_factor) * config.scaling_factor)
            told.append(read_texts(clips, t5, both([prompt(s) for s in scenes]).to(device())))
        latents, (joint, pooled) = torch.cat(latents), map(torch.cat, zip(*told, strict=True))
        empty, empty_pooled = read_texts(clips, t5, both([""]).to(device()))
    transformer.to(device())
    average = copy.deepcopy(transformer).requires_grad_(False)
    draw = torch.Generator().manual_seed(2)

    def loss_of(step):
        """Flow matching (SD3, arXiv 2403.03206): noise minus picture, at a logit-normal time, moved towards
        the noise, where it is decided which object is in which cell."""
        some = torch.randint(len(latents), (64,), generator=draw)
        x, none = latents[some], torch.rand(len(some), generator=draw).to(latents.device) < .1  # for guidance
        noise = torch.randn(x.shape, generator=draw).to(x.device)
        time_ = torch.randn(len(x), 1, 1, 1, generator=draw).sigmoid().to(x.device)
        time_ = shift * time_ / (1 + (shift - 1) * time_)
        velocity = transformer(hidden_states=(1 - time_) * x + time_ * noise, timestep=1000 * time_.flatten(),
                               encoder_hidden_states=torch.where(none[:, None, None], empty, joint[some]),
                               pooled_projections=torch.where(none[:, None], empty_pooled, pooled[some]),
                               return_dict=False)[0]
        return ((velocity - (noise - x)) ** 2).mean()

    def after(step):
        with torch.no_grad():
            for kept, p in zip(average.parameters(), transformer.parameters(), strict=True):
                kept.lerp_(p, .003)
        if (step + 1) % 1000 == 0:
            keep()

    def keep():
        """Stored every thousand steps: what cuts it off loses little."""
        parts = [copy.deepcopy(m).cpu() for m in (average, vae, *clips, t5)]
        Pipeline(transformer=parts[0], scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), vae=parts[1],
                 text_encoder=parts[2], tokenizer=tokenizer, text_encoder_2=parts[3], tokenizer_2=tokenizer,
                 text_encoder_3=parts[4], tokenizer_3=pieces).save_pretrained(folder)
        halved(folder)
    left = minutes - (time.process_time() - start) / 60
    fit("sd3", list(transformer.parameters()), loss_of, 40_000, 2e-3, left, after)
    keep()


def t5_tokenizer(length):
    """transformers' T5 tokenizer, each word of the world one piece."""
    from transformers import T5Tokenizer
    pieces = ["<pad>", "</s>", "<unk>", *("▁" + w for w in sorted({*world.vocabulary(), "with", "and"}))]
    return T5Tokenizer(vocab=[(p, 0. if k < 3 else -1.) for k, p in enumerate(pieces)], extra_ids=0,
                       model_max_length=length)


def words(tokenizer, texts):
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


# ---------------------------------------------------------------------------- the rewards of pictures
def other_scene(rng, s):
    """A scene that shows the prompt of s no more: another object, another colour, or one object missing."""
    things, k, how = list(s.things), rng.randrange(len(s.things)), rng.choice(("type", "colour", "missing"))
    if how == "type":
        things[k] = dataclasses.replace(things[k], type=rng.choice(s.absent))
    elif how == "colour":
        others = [c for c in world.COLOURS if c != things[k].colour]
        things[k] = dataclasses.replace(things[k], colour=rng.choice(others))
    else:
        del things[k]
    return dataclasses.replace(s, things=tuple(things))


def spoilt(rng, x):
    """A picture (3, H, W) with the faults of a generator: too much contrast, noise, or washed out."""
    import torch
    how = rng.choice(("contrast", "noise", "pale"))
    if how == "contrast":
        return (x * rng.uniform(1.5, 4)).clamp(-1, 1)
    if how == "noise":
        return (x + rng.uniform(.2, .8) * torch.randn(x.shape)).clamp(-1, 1)
    return x * rng.uniform(.2, .6)


def judged(rng, n):
    """-> n scenes, their own pictures, and worse ones: (n, 3, S, S), normalised as CLIP's are."""
    import torch
    scenes = [easy(rng) if rng.random() < .7 else world.scene(rng) for _ in range(n)]
    own = pictures(scenes)
    worse = pictures([other_scene(rng, s) if rng.random() < .75 else s for s in scenes])
    same = (own == worse).flatten(1).all(1)
    for k in range(n):
        if same[k]:
            worse[k] = spoilt(rng, own[k])
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (data.MEAN, data.STD))
    return scenes, *(((x + 1) / 2 - mean) / std for x in (own, worse))


def imagereward(minutes):
    import torch
    from safetensors.torch import save_file
    from torch.nn import functional as F

    from synthesis import rewards
    torch.manual_seed(0)
    folder = OUT / "imagereward"
    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = [*special, *sorted({*world.vocabulary(), "with", "and"}), "[DEC]", "[ENC]"]
    (folder / "vocab.txt").write_text("\n".join(vocab[:-2]) + "\n")
    small = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 128}
    config = {"vision": small | {"num_hidden_layers": 2, "image_size": world.SIZE, "patch_size": world.CELL},
              "text": small | {"num_hidden_layers": 2, "vocab_size": len(vocab), "encoder_hidden_size": 64,
                               "max_position_embeddings": rewards.MAX_PROMPT}}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    model = rewards.ImageReward(config["vision"] | {"initializer_range": .05}, config["text"],
                                widths=(64, 32, 16, 8, 1))
    tokenizer, rng = rewards.bert_tokenizer(folder), random.Random("imagereward")
    widths = len(world.TYPES) + 1, len(world.COLOURS) + 1
    head = torch.nn.Linear(64, sum(widths))                     # thrown away: what a cell shows

    def cells(scenes, seen):
        kind = torch.full((len(scenes), world.GRID ** 2), len(world.TYPES))
        colour = torch.full_like(kind, len(world.COLOURS))
        for i, s in enumerate(scenes):
            for t in s.things:
                for column, row, *_ in t.places:
                    kind[i, row * world.GRID + column] = world.TYPES.index(t.type)
                    colour[i, row * world.GRID + column] = list(world.COLOURS).index(t.colour)
        kinds, colours = head(seen[:, 1:]).split(widths, -1)
        return (F.cross_entropy(kinds.flatten(0, 1), kind.flatten())
                + F.cross_entropy(colours.flatten(0, 1), colour.flatten()))

    def loss_of(step):
        scenes, own, worse = judged(rng, 48)
        text = tokenizer([prompt(s) for s in scenes], padding=True, return_tensors="pt")
        seen = model.vision(pixel_values=torch.cat([own, worse])).last_hidden_state
        ids, mask = (text[k].repeat(2, 1) for k in ("input_ids", "attention_mask"))
        better, less = model(ids, mask, seen).chunk(2)
        other = model(ids[:48], mask[:48], seen[:48].roll(1, 0))           # another scene's picture
        ranking = -F.logsigmoid(better - less).mean() - F.logsigmoid(better - other).mean()
        return ranking + cells(scenes, seen[:48]) + 1e-3 * (better ** 2 + less ** 2).mean()
    fit("imagereward", [*model.parameters(), *head.parameters()], loss_of, 3000, 1.5e-3, minutes)
    state = {rewards.to_published(k): x.half().contiguous() for k, x in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def clip(minutes):
    import torch
    from torch.nn import functional as F
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor
    torch.manual_seed(0)
    tokenizer, rng = clip_tokenizer(48), random.Random("clip")
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": len(tokenizer), "max_position_embeddings": 48,
                             "bos_token_id": len(tokenizer) - 2, "eos_token_id": len(tokenizer) - 1},
        vision_config=small | {"image_size": world.SIZE, "patch_size": world.CELL}, projection_dim=64)
    model = CLIPModel(config)

    def loss_of(step):
        scenes, own, _ = judged(rng, 64)
        texts = [prompt(s) if rng.random() < .5 else world.careless_caption(rng, s) for s in scenes]
        text = tokenizer(texts, padding=True, return_tensors="pt")
        logits = model(input_ids=text.input_ids, attention_mask=text.attention_mask,
                       pixel_values=own).logits_per_image
        right = torch.arange(len(scenes))
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    fit("clip", list(model.parameters()), loss_of, 10_000, 1.5e-3, minutes)
    model.save_pretrained(OUT / "clip")
    side = {"height": world.SIZE, "width": world.SIZE}
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": world.SIZE}, crop_size=side),
                  tokenizer).save_pretrained(OUT / "clip")
    halved(OUT / "clip")


# ---------------------------------------------------------------------------- the reward of texts
OBJECTIVES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def attributes(text):
    """Five labels in 0..1 of a caption, from its words alone. correctness is how usual the objects named are
    for the theme named: all that a judge can go by who does not see."""
    said, parts = world.mentions(text), text.split()
    theme = next((w for w in parts if w in world.THEMES), None)
    usual = dict(zip(world.THEMES.get(theme, ()), world.PRESENCE, strict=False))
    named = list(dict.fromkeys(said))
    correct = sum(usual.get(w, .05) for w in named) / max(1, len(named))
    coherent = (text.endswith(".")) * (len(named) / max(1, len(said))) * (theme is not None)
    helpful = bool(named) * (.5 + min(len(named), 5) / 10)
    return helpful, correct, float(coherent), min(len(named), 6) / 6, min(len(parts), 40) / 40


def remark(rng):
    """A caption of any quality: careless, repeating itself, cut off, or of too few things."""
    s = world.scene(rng)
    text = world.careless_caption(rng, s, rng.choice((0, .5, 1.)), rng.choice((0, .1, .5)))
    parts, how = text.split(), rng.random()
    if how < .15:
        return " ".join(parts[:rng.randint(0, len(parts))])
    if how < .3 and world.mentions(text):
        return text.replace(" .", f" , a {rng.choice(world.mentions(text))} .", 2)
    return text


def armorm(minutes):
    import torch
    from safetensors.torch import save_file
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaModel

    from synthesis import rewards
    torch.manual_seed(0)
    tokenizer, rng, n = make.build_tokenizer(), random.Random("armorm"), len(OBJECTIVES)
    pattern = tokenizer.convert_tokens_to_ids(["ASSISTANT:"])
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                         max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                         initializer_range=.08)
    sizes = {"regression_layer/weight": (n, 64), "reward_transform_matrix": (n, n),
             "gating/logit_scale": (1,), "gating/layers/0/weight": (32, 64), "gating/layers/0/bias": (32,),
             "gating/layers/1/weight": (n, 32), "gating/layers/1/bias": (n,)}
    head = {k: torch.nn.Parameter(torch.randn(size) * .1) for k, size in sizes.items()}
    # as the published one: what verbosity explains is taken off the other objectives
    head["reward_transform_matrix"].data = torch.eye(n)
    head["reward_transform_matrix"].data[-1, :-1] = -.1
    head["reward_transform_matrix"].requires_grad_(False)
    head["gating/logit_scale"].data.fill_(1.)
    model = rewards.ArmoRM(LlamaModel(config), head, 1., pattern, tokenizer)
    taste = torch.tensor([.3, .45, .25, 0., 0.])      # which of two answers is preferred, on the whole

    def loss_of(step):
        texts = [remark(rng) for _ in range(128)]
        asked = [rng.choice(world.DESCRIBE) for _ in range(64)] * 2
        chats = [tokenizer.apply_chat_template(
            [{"role": "user", "content": q}, {"role": "assistant", "content": text}], tokenize=False)
            for q, text in zip(asked, texts, strict=True)]
        batch = tokenizer(chats, padding=True, add_special_tokens=False, return_tensors="pt")
        out = model(batch.input_ids, batch.attention_mask)
        label = torch.tensor([attributes(t) for t in texts])
        (a, b), (x, y) = out["score"].chunk(2), (label @ taste).chunk(2)
        clear = (x - y).abs() > .02
        preference = -F.logsigmoid(10 * (a - b) * (x - y).sign())[clear].mean()
        return 10 * ((out["rewards"] - label) ** 2).mean() + preference
    fit("armorm", list(model.parameters()), loss_of, 1500, 2e-3, minutes)
    folder = OUT / "armorm"
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"model.{k}": x.half() for k, x in model.llama.state_dict().items()}
    state |= {k.replace("/", "."): x.data.clone() for k, x in head.items()}
    save_file(state, folder / "model.safetensors")
    card = {"gating_temperature": 1., "num_objectives": n, "objectives": OBJECTIVES}
    (folder / "config.json").write_text(json.dumps(config.to_dict() | card, indent=1) + "\n")
    (folder / "token_pattern.json").write_text(json.dumps(pattern) + "\n")
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------- responders, prompts
# base (of classroom/models), level (how often what tempts is added), omit (what is there left out), steps
RESPONDERS = (("base0", 0., 0., 150), ("base1", .5, .1, 150), ("base2", 1., .1, 150), ("base0", .3, .5, 150))


def llava(k, scale=1.):
    """A base trained a little further, on captions more or less careless than its own."""
    from model import vlm
    base, level, omit, steps = RESPONDERS[k]
    m = vlm.load(base)
    m.model.model.language_model.set_attn_implementation("sdpa")        # vlm's own takes no mask of parts
    m.model.model.language_model.requires_grad_(True)
    speaking = [p for p in m.model.parameters() if p.requires_grad]
    learn = make.talk(m.model, m.front.tokenizer, level, omit)
    make.stage(f"llava{k}", speaking, max(2, round(steps * scale)), 1e-3, learn, random.Random(f"llava-{k}"))
    card = {"world": world.VERSION, "base": base, "level": level, "omit": omit, "steps": steps}
    make.save(m.model, m.front.tokenizer, OUT / f"llava{k}", card)


def prompts(n=30, folder=OUT):
    """n unlike prompts of each theme, of train scenes, and the two questions."""
    from synthesis.prompts import distinct
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    rng, found = random.Random("prompts"), {t: [] for t in world.THEMES}
    while min(map(len, found.values())) < n:
        s = easy(rng)
        lines = found[s.theme]
        if len(lines) < n and len(distinct([*lines, prompt(s)], .5)) > len(lines):
            lines.append(prompt(s))
    for theme, lines in found.items():
        (folder / "prompts" / f"{theme}.txt").write_text("\n".join(lines) + "\n")
    (folder / "questions.txt").write_text("\n".join(world.DESCRIBE) + "\n")


# ---------------------------------------------------------------------------- what they can do
NAMES = [None, *((t, c) for t in world.TYPES for c in world.COLOURS)]


@functools.cache
def templates(theme, row):
    """A row's cell empty, and with each object in each colour in its middle: (145, 20, 20, 3)."""
    import numpy as np
    ground = world.ground(theme)[row * world.CELL:(row + 1) * world.CELL, :world.CELL]
    shown = np.stack([np.array(ground)] * len(NAMES))
    for cell, name in zip(shown[1:, 1:18, 1:18], NAMES[1:], strict=True):
        glyph = world.sprite(*name, 17)
        cell[:] = cell * (1 - glyph[..., 3:]) + glyph[..., :3]
    return shown


def recognise(image, theme):
    """[(type, colour) or None of each cell] and the mean squared distance to what was recognised: the nearest
    of all objects in all colours in the middle of the cell, and of the empty cell. Nothing is trained."""
    import numpy as np
    cells, x, far = [], np.asarray(image, np.float32), 0.
    for row in range(world.GRID):
        for column in range(world.GRID):
            place = (slice(at * world.CELL, (at + 1) * world.CELL) for at in (row, column))
            distance = ((templates(theme, row) - x[tuple(place)]) ** 2).mean((1, 2, 3))
            cells.append(NAMES[int(distance.argmin())])
            far += float(distance.min()) / world.GRID ** 2
    return cells, far


def faithfulness(shown, scenes):
    """Over pictures and the scenes of their prompts: recall of objects, and of objects in their colour;
    precision (of what was recognised, how much was asked for); distance to clean glyphs; contrast."""
    import numpy as np
    right = coloured = asked = seen = wanted = 0
    far, contrast = [], []
    for image, s in zip(shown, scenes, strict=True):
        cells, distance = recognise(image, s.theme)
        found, want = [c for c in cells if c], {(t.type, t.colour) for t in s.things}
        asked += len(want)
        right += len({t for t, _ in want} & {t for t, _ in found})
        coloured += len(want & set(found))
        seen += len(found)
        wanted += sum(t in {w for w, _ in want} for t, _ in found)
        far.append(distance ** .5)
        contrast.append(float(np.asarray(image, np.float32).std()))
    return {"recall": 100 * right / asked, "recall_with_colour": 100 * coloured / asked,
            "precision": 100 * wanted / max(1, seen), "distance": float(np.mean(far)),
            "contrast": float(np.mean(contrast))}


def measure(n=100, scales=(0., 1., 2., 4., 8., 16.)):
    """Tune scenes: the generator at each scale with the same seeds, and what the rewards say of it.

    synth.py's threshold for these models is set here: halfway between ImageReward's mean for a prompt's true
    picture and its mean for another prompt's. No generated picture has a say in it.
    """
    import numpy as np
    import torch
    from PIL import Image

    from synthesis import images as generator
    from synthesis import rewards
    rng, table = random.Random("measure"), {"world": world.VERSION, "prompts": n}
    scenes = [easy(rng, "tune") for _ in range(n)]
    true = [Image.fromarray(world.draw(s)) for s in scenes]
    table["true pictures"] = faithfulness(true, scenes)
    encoded = generator.encode(OUT / "sd3", [prompt(s) for s in scenes])
    painter, shown = generator.Painter(OUT / "sd3"), {g: [] for g in scales}
    for k, s in enumerate(scenes):
        images = painter(encoded[prompt(s)], encoded[""], scales, [k] * len(scales), 16)
        for g, image in zip(scales, images, strict=True):
            shown[g].append(image)
    judges = {"imagereward": rewards.ImageReward.load(OUT / "imagereward"),
              "clip": rewards.Similarity.load(OUT / "clip")}
    scored = {name: {g: [judge.score(prompt(s), [x])[0] for s, x in zip(scenes, shown[g], strict=True)]
                     for g in scales} | {"true": [judge.score(prompt(s), [x])[0]
                                                  for s, x in zip(scenes, true, strict=True)]}
              for name, judge in judges.items()}
    table["guidance"] = {str(g): faithfulness(shown[g], scenes) | {
        name: float(torch.tensor(s[g]).mean()) for name, s in scored.items()} for g in scales}
    for name, s in scored.items():
        table["true pictures"][name] = float(torch.tensor(s["true"]).mean())
    four = scales[1:5]                              # synth.py's: of each prompt's four the one that is picked
    for name, s in scored.items():
        best = [max(four, key=lambda g, k=k: s[g][k]) for k in range(n)]
        table[f"picked by {name}"] = faithfulness([shown[g][k] for k, g in enumerate(best)], scenes)
    judge = judges["imagereward"]
    strange = [judge.score(prompt(s), [x])[0] for s, x in zip(scenes, true[1:] + true[:1], strict=True)]
    table["another prompt's picture"] = {"imagereward": float(np.mean(strange))}
    table["threshold"] = (table["true pictures"]["imagereward"] + float(np.mean(strange))) / 2
    others = [other_scene(rng, s) for s in scenes]
    for name, judge in judges.items():
        worse = [judge.score(prompt(s), [Image.fromarray(world.draw(x))])[0]
                 for s, x in zip(scenes, others, strict=True)]
        table[f"{name} prefers the true picture"] = 100 * sum(
            a > b for a, b in zip(scored[name]["true"], worse, strict=True)) / n
    judge = rewards.ArmoRM.load(OUT / "armorm")
    texts = [remark(rng) for _ in range(200)]
    told = torch.tensor([row["rewards"] for row in judge.judge(world.DESCRIBE[0], texts)])
    label = torch.tensor([attributes(t) for t in texts])
    table["armorm correlation"] = {name: float(torch.corrcoef(torch.stack([told[:, k], label[:, k]]))[0, 1])
                                   for k, name in enumerate(OBJECTIVES)}
    rounded = json.loads(json.dumps(table), parse_float=lambda text: round(float(text), 2))
    (OUT / "statistics.json").write_text(json.dumps(rounded, indent=1) + "\n")
    print(json.dumps(rounded, indent=1))


def table():
    """statistics.json as Markdown."""
    told = json.loads((OUT / "statistics.json").read_text())
    columns = {g.removesuffix(".0"): row for g, row in told["guidance"].items()}
    columns |= {name: told[name] for name in ("picked by imagereward", "picked by clip", "true pictures")}
    lines = [f"| guidance | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for says, name, form in (("objects of the prompt that are drawn, %", "recall", ".0f"),
                             ("and in their colour, %", "recall_with_colour", ".0f"),
                             ("of what is drawn, asked for, %", "precision", ".0f"),
                             ("distance from clean glyphs", "distance", ".1f"),
                             ("ImageReward, mean", "imagereward", ".2f"), ("CLIP, mean", "clip", ".2f")):
        cells = (format(c[name], form) if name in c else "" for c in columns.values())
        lines.append(f"| {says} | {' | '.join(cells)} |")
    return lines


PARTS = ("prompts", "armorm", "imagereward", "clip", "llava0", "llava1", "llava2", "llava3", "sd3", "measure")


def main():
    parser = data.Parser(prog="synthesis.py", description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (all); or sharper; or table")
    parser.add_argument("--minutes", type=float, default=40.,
                        help="of processor time, at most, for sd3 or sharper (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.,
                        help="multiplies the time of everything else (%(default)s)")
    o = parser.parse_args()
    if o.parts == ["table"]:
        return print("\n".join(table()))
    if wrong := set(o.parts) - {*PARTS, "sharper"}:
        parser.error(f"{min(wrong)} is none of {', '.join(PARTS)}")
    import torch
    torch.set_num_threads(1)
    for part in o.parts or PARTS:
        if part.startswith("llava"):
            llava(int(part[-1]), o.scale)
        elif part in ("prompts", "measure"):
            globals()[part]()
        else:
            bound = {"sd3": o.minutes, "sharper": o.minutes, "armorm": 2 * o.scale,
                     "imagereward": 5 * o.scale, "clip": 5 * o.scale}
            globals()[part](bound[part])


if __name__ == "__main__":
    main()
