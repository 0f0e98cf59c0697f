"""Train one of the classroom's base models from nothing: a tiny LLaVA of transformers' own classes.

    python classroom/make.py --seed 0 --out classroom/models/base0    8 minutes
    python classroom/make.py --measure classroom/statistics.json      a minute
    python classroom/make.py smol --help                              hours

The second command measures the bases and the pairs that are shipped; the third is the second world's. The
times are of one core.

Three stages, each drawn from its own generator keyed by (seed, stage):

1. Look. The vision tower and the projector learn to put each patch beside the embeddings of the words for
its object and colour. Without this stage the model stays blind and only learns the captions' statistics.

2. Learn. Captions and questions, all true; the tower is frozen from here on.

3. Err. The captions of a careless observer, who adds typical objects that are not there (`--level`) and now
and then leaves out one that is (`--omit`); the questions stay true. This is what preference optimisation
has to repair.

The folder is an ordinary llava-hf folder: transformers alone loads it. Weights are stored in fp16 and the
statistics are those of the stored model, on print scenes. One thread makes the training equal byte for byte
from run to run.
"""

import json
import math
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]          # the repository
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from classroom import world  # noqa: E402

IMAGE_TOKENS = world.GRID ** 2
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
TEMPLATE = ("{{ bos_token }}{% for message in messages %}"
            "{{ ' USER:' if message.role == 'user' else ' ASSISTANT:' }}"
            "{% if message.content is string %}{{ ' ' + message.content }}{% else %}"
            "{% for part in message.content %}"
            "{{ ' <image>' if part.type == 'image' else ' ' + part.text }}{% endfor %}{% endif %}"
            "{% if message.role == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}")
STEPS = {"look": 1500, "learn": 3300, "err": 400}


def build_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = [*SPECIAL, *world.vocabulary()]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>",
                                        pad_token="<pad>", unk_token="<unk>", padding_side="left",
                                        additional_special_tokens=["<image>"], model_max_length=512,
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def build_model(tokenizer):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                              num_attention_heads=4, image_size=world.SIZE, patch_size=world.CELL,
                              projection_dim=64)
    text = LlamaConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=192, num_hidden_layers=3,
                       num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
                       tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                       initializer_range=.08)  # at the usual .02 so narrow a model learns far more slowly
    config = LlavaConfig(vision_config=vision, text_config=text, image_seq_length=IMAGE_TOKENS,
                         image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
                         tie_word_embeddings=True, pad_token_id=0)
    return LlavaForConditionalGeneration(config)


def build_processor():
    from transformers import CLIPImageProcessorPil
    side = {"height": world.SIZE, "width": world.SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": world.SIZE}, crop_size=side, image_mean=[.5] * 3,
                                 image_std=[.25] * 3)


def pixels(scenes):
    """What the image processor makes of the pictures (test_classroom.py compares), a hundred times faster."""
    import numpy as np
    import torch
    pictures = np.stack([world.draw(s) for s in scenes])  # (N, H, W, 3)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255).sub(.5).div(.25)


def schedule(step, steps, warm=30):
    return min(1, (step + 1) / warm) * (.05 + .95 * .5 * (1 + math.cos(math.pi * step / steps)))


def stage(name, parameters, steps, lr, loss_of, rng):
    import torch
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(.9, .98), weight_decay=.01)
    start, seen = time.time(), []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * schedule(step, steps)
        loss = loss_of(rng)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        seen.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean = sum(seen[-100:]) / len(seen[-100:])
            print(f"{name:5} {step + 1:5}/{steps}  loss {mean:.4f}  {time.time() - start:.0f} s", flush=True)


def look(model, tokenizer, batch=64):
    """The loss of stage 1: each patch's object and colour by the words' embeddings, its column and row by a
    head that is thrown away."""
    import torch
    from torch.nn import functional as F
    words = model.get_input_embeddings().weight
    kinds, colours = (torch.tensor(tokenizer.convert_tokens_to_ids(list(group)))
                      for group in (world.TYPES, world.COLOURS))
    place = torch.nn.Linear(words.shape[1], 2 * world.GRID)
    where = torch.arange(IMAGE_TOKENS)

    def loss_of(rng):
        scenes = [world.scene(rng, typical=rng.random() < .5) for _ in range(batch)]
        kind = torch.full((batch, IMAGE_TOKENS), len(kinds))  # the last class is nothing
        colour = torch.full((batch, IMAGE_TOKENS), -100)
        for i, s in enumerate(scenes):
            for thing in s.things:
                for column, row, *_ in thing.places:
                    kind[i, row * world.GRID + column] = world.TYPES.index(thing.type)
                    colour[i, row * world.GRID + column] = list(world.COLOURS).index(thing.colour)
        features = model.model.get_image_features(pixel_values=pixels(scenes)).pooler_output
        seen = torch.stack(list(features))                             # (N, K, D)
        kind_logits = F.pad(seen @ words[kinds].T, (0, 1))             # (N, K, 25), nothing has logit 0
        columns, rows = place(seen).chunk(2, -1)                       # (N, K, 4) each
        return (F.cross_entropy(kind_logits.flatten(0, 1), kind.flatten())
                + F.cross_entropy((seen @ words[colours].T).flatten(0, 1), colour.flatten())
                + .1 * F.cross_entropy(columns.flatten(0, 1), (where % world.GRID).repeat(batch))
                + .1 * F.cross_entropy(rows.flatten(0, 1), (where // world.GRID).repeat(batch)))
    return loss_of, list(place.parameters())


def talk(model, tokenizer, level=0., omit=0., order="random", typical=1., batch=16, questions=6):
    """The loss of stages 2 and 3: for each scene a caption and six questions, over the answers' words.

    They share the picture in one row, `<s> USER: picture | question, answer | question, answer | ...`, where
    each part sees the picture and itself, at the positions that it would have alone. The word that decides an
    answer counts five times, a caption's words twice.
    """
    import torch
    from torch.nn import functional as F
    ids = tokenizer.get_vocab()
    prefix = 2 + IMAGE_TOKENS

    def loss_of(rng):
        scenes = [world.scene(rng, typical=rng.random() < typical) for _ in range(batch)]
        rows = []  # of tokens, positions, part, label weight
        for s in scenes:
            asked = [world.ask(rng, s, rng.choice(ASKED)) or world.ask(rng, s, "existence")
                     for _ in range(questions)]
            parts = [(q.question, q.answer, q.right) for q in asked]
            parts += [(rng.choice(world.DESCRIBE), world.careless_caption(rng, s, level, omit, order), None)]
            row = [(0, t, 0, 0) for t in range(prefix)]
            for number, (question, answer, right) in enumerate(parts, 1):
                words = [(w, 0) for w in f"{question} ASSISTANT:".split()]
                words += [(w, 5 if w == right else 1 if right else 2) for w in f"{answer} </s>".split()]
                row += [(ids[w], prefix + t, number, weight) for t, (w, weight) in enumerate(words)]
            rows.append(row)
        width = max(map(len, rows))
        rows = torch.tensor([row + [(0, 0, -1, 0)] * (width - len(row)) for row in rows])  # (R, T, 4)
        tokens, positions, part, weight = rows.unbind(-1)
        mask = (part[:, :, None] == part[:, None]) | (part[:, None] == 0)
        mask = (mask & torch.ones(width, width, dtype=torch.bool).tril())[:, None]          # (R, 1, T, T)
        with torch.no_grad():
            tower = model.model.vision_tower(pixels(scenes)).last_hidden_state[:, 1:]
        seen = model.model.multi_modal_projector(tower)                                     # (R, K, D)
        embed = model.get_input_embeddings()
        start = embed(torch.tensor([[ids["<s>"], ids["USER:"]]])).expand(batch, -1, -1)
        inputs = torch.cat([start, seen, embed(tokens[:, prefix:])], 1)                     # (R, T, D)
        hidden = model.model.language_model(inputs_embeds=inputs, position_ids=positions, attention_mask=mask,
                                            use_cache=False).last_hidden_state
        said = weight[:, 1:] > 0
        losses = F.cross_entropy(model.lm_head(hidden[:, :-1][said]), tokens[:, 1:][said], reduction="none")
        return (losses * weight[:, 1:][said]).sum() / weight.sum()
    return loss_of


# shares while learning; relations are the hardest and are learned last
ASKED = ("existence",) * 4 + ("relation",) * 3 + ("attribute", "counting", "false_premise")


def train(seed, level, omit, order="random", scale=1.):
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    steps = {name: max(2, round(n * scale)) for name, n in STEPS.items()}

    def rng(name):
        return random.Random(f"make-{seed}-{name}")

    loss_of, extra = look(model, tokenizer)
    stage("look", [*model.parameters(), *extra], steps["look"], 3e-3, loss_of, rng("look"))
    model.model.vision_tower.requires_grad_(False)
    speaking = [p for p in model.parameters() if p.requires_grad]
    stage("learn", speaking, steps["learn"], 2.5e-3, talk(model, tokenizer, typical=.5), rng("learn"))
    stage("err", speaking, steps["err"], 1e-3, talk(model, tokenizer, level, omit, order), rng("err"))
    return model, tokenizer


def save(model, tokenizer, out, card):
    """A llava-hf folder: fp16 on disk, float32 when loaded."""
    import torch
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.update(eos_token_id=2, bos_token_id=1, pad_token_id=0)
    model.half().save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    for part in (config, config["text_config"], config["vision_config"]):
        part["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(out)
    build_processor().save_pretrained(out)
    (out / "classroom.json").write_text(json.dumps(card, indent=2) + "\n")
    model.to(torch.float32)


def main():
    if sys.argv[1:2] == ["smol"]:
        from classroom.smol import train as second
        return second.command(sys.argv[2:])
    parser = data.Parser(prog="make.py", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the weights, scenes and words (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the model")
    parser.add_argument("--measure", type=Path, help="train nothing; measure the shipped bases into it")
    parser.add_argument("--level", type=float, default=.6,
                        help="how often the observer adds a tempting object (%(default)s)")
    parser.add_argument("--omit", type=float, default=.08,
                        help="how often the observer omits a present object (%(default)s)")
    parser.add_argument("--order", choices=("random", "last"), default="random",
                        help="where a careless caption names the absent object (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.,
                        help="multiplies the steps of every stage (%(default)s)")
    parser.add_argument("--scenes", type=int, default=1000,
                        help="print scenes for the statistics; 0: none (%(default)s)")
    o = parser.parse_args()
    from classroom import measures  # with torch: help is quick without it
    if o.measure:
        return measures.measure(o.measure)
    if not o.out:
        parser.error("--out is missing: give the folder of the model, or --measure FILE")
    start = time.time()
    model, tokenizer = train(o.seed, o.level, o.omit, o.order, o.scale)
    card = {"world": world.VERSION, "seed": o.seed, "level": o.level, "omit": o.omit, "order": o.order}
    card["scale"] = o.scale
    save(model, tokenizer, o.out, card)
    if o.scenes:
        card["statistics"] = measures.statistics(o.out, "print", o.scenes)
        (o.out / "classroom.json").write_text(json.dumps(card, indent=2) + "\n")
        print(json.dumps(card["statistics"]))
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters in {time.time() - start:.0f} s -> {o.out}")


if __name__ == "__main__":
    main()
