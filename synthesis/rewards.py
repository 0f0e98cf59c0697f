"""Reward models for synth.py: how well a picture shows a prompt (ImageReward, CLIP, BLIP), how good an answer
is (ArmoRM).

    model = ImageReward.load("ImageReward.pt", vocab="vocab.txt")       # bert-base-uncased's vocabulary
    model.score("a red bike on a beach", ["1.png", "2.png"])            # -> [0.58, -1.41]
    model = ArmoRM.load("ArmoRM-Llama3-8B-v0.1", dtype=torch.bfloat16)
    model.judge("What is on the table?", ["A cup.", "I don't know."])   # -> [{"score": 0.15, ...}, ...]

Both papers' reward models need packages, or remote code, that no longer run beside current transformers. Here
they are transformers' own towers (BLIP's vision and text model; Llama) under heads written out below, and the
published files load as they are. Papers: ImageReward, arXiv 2304.05977; ArmoRM, arXiv 2406.12845.

Departures from the official codes:
 1. ArmoRM takes from the attention mask where a conversation ends, on whichever side it is padded. The
    official forward takes the token before the first padding id: right if it is padded on the right.
 2. ArmoRM's heads compute in float32 whatever the tower's type (official: all bfloat16).
"""
if __name__ == "__main__":
    exit("A part of synth.py; run: python synth.py --help")

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
from data import MEAN, STD, UserError
from model import ask, command, front


def read_published(weights, config, default=None):
    """-> (folder, config, {name: tensor}) of a .pt or .safetensors file, or of a folder's safetensors.

    config: a dict, a JSON file, or None for config.json beside the weights. Pickled code is never run. Raises
    UserError for a file that is missing or torn, or that holds code; a folder may have none.
    """
    from safetensors.torch import load_file
    folder, state = Path(weights), {}
    files = [folder]
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.pt"))
    else:
        folder = folder.parent
    if config is None:
        config = data.read_json(folder / "config.json", default)
    elif not isinstance(config, dict):
        config = data.read_json(config)
    for file in files:
        with command.explained(f"{file} cannot be read as weights", "copy the published file again"):
            if file.suffix == ".safetensors":
                state |= load_file(file)
            else:
                state |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return folder, config, state


# ---- ImageReward ----

MEAN_REWARD, STD_REWARD = 0.16717362830052426, 1.0333394966054072      # of its training set
MAX_PROMPT = 35                                                         # tokens, [CLS] and [SEP] included
PUBLISHED = {                           # where it is not BLIP's default in transformers
    "vision": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
               "intermediate_size": 4096, "image_size": 224, "layer_norm_eps": 1e-6},
    "text": {"num_attention_heads": 12, "bos_token_id": None, "sep_token_id": None}}
LINEAR = "0 2 4 6 7".split()            # the head's linear maps; dropouts have the numbers between
# Published names to ours; parts of the file that the reward does not use.
NAMES = [line.split() for line in """\
blip.visual_encoder.cls_token          vision.embeddings.class_embedding
blip.visual_encoder.pos_embed          vision.embeddings.position_embedding
blip.visual_encoder.patch_embed.proj.  vision.embeddings.patch_embedding.
blip.visual_encoder.blocks.            vision.encoder.layers.
blip.visual_encoder.norm.              vision.post_layernorm.
blip.text_encoder.                     text.
mlp.layers.                            head.
.attn.qkv.                             .self_attn.qkv.
.attn.proj.                            .self_attn.projection.
.norm1.                                .layer_norm1.
.norm2.                                .layer_norm2.""".splitlines()]
DROPPED = ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.", "blip.text_proj.")


def to_ours(name):
    """A name in ImageReward.pt -> in our module; the name itself if unknown."""
    for published, ours in NAMES:
        name = name.replace(published, ours)
    return name


def preprocess(image, size):
    """A PIL image as ImageReward sees it: float32 (3, size, size).

    Bicubic in the image's own mode, shorter side to `size` (the longer one rounded down, as in torchvision),
    centre crop (half a pixel rounds to even), and only then RGB: an RGBA image differs if converted first.
    """
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    mean, std = np.array([MEAN, STD], np.float32)
    pixels = (np.array(image, np.float32) / 255 - mean) / std
    return torch.from_numpy(pixels).permute(2, 0, 1)


class ImageReward(nn.Module):
    """BLIP's towers; the text's first token, after cross-attention to the picture, becomes the reward."""
    def __init__(self, vision, text, widths=(1024, 128, 64, 16, 1)):
        """vision, text: sizes of the towers by transformers' names; what they leave out is as published."""
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel
        super().__init__()
        vision = BlipVisionConfig(**PUBLISHED["vision"] | vision)
        text = BlipTextConfig(**PUBLISHED["text"] | text | {"encoder_hidden_size": vision.hidden_size})
        self.vision, self.tokenizer = BlipVisionModel(vision), None
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head, before = nn.Sequential(), text.hidden_size   # linear maps in a row, without activations
        for place, width in zip(LINEAR, widths, strict=True):
            self.head.add_module(place, nn.Linear(before, width))
            before = width

    @classmethod
    def load(cls, weights, config=None, vocab=None, device="cpu"):
        """weights: ImageReward.pt or its folder, in the published key names. vocab: bert-base-uncased's
        vocab.txt or its folder; None: beside the weights. config: {"vision": {...}, "text": {...}} or a JSON
        file of it; None: beside the weights (config.json). What it leaves out has the published size, and a
        picture's and its patches' size show in the weights. Raises UserError if they do not fit.
        """
        from transformers.initialization import no_init_weights
        folder, config, published = read_published(weights, config, {})
        state = {to_ours(name): x for name, x in published.items() if not name.startswith(DROPPED)}
        with command.explained(f"{weights} is not ImageReward's state dict, or does not fit its config",
                       "give the published ImageReward.pt, or the two that belong together"):
            patch = state["vision.embeddings.patch_embedding.weight"].shape[-1]
            across = math.isqrt(state["vision.embeddings.position_embedding"].shape[1])
            shown = {"patch_size": patch, "image_size": patch * across}
            widths = [len(state[f"head.{place}.bias"]) for place in LINEAR]
            with no_init_weights():
                model = cls(shown | config.get("vision", {}), config.get("text", {}), widths)
            model.load_state_dict(state)
        model.tokenizer = bert_tokenizer(vocab or folder)
        return model.requires_grad_(False).eval().to(device)

    def forward(self, input_ids, attention_mask, seen):
        """Rewards (B,) of B texts (B, T) and B pictures' tokens (B, K, D), vision's last_hidden_state."""
        x = self.text(input_ids=input_ids, attention_mask=attention_mask,
                      encoder_hidden_states=seen).last_hidden_state[:, 0]                          # (B, D)
        return (self.head(x)[:, 0] - MEAN_REWARD) / STD_REWARD

    @torch.no_grad()
    def score(self, prompt, images):
        """Rewards of pictures (paths or PIL images, or one of them) for a prompt, a list of floats."""
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        vision, n = self.vision, len(images)
        text = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=MAX_PROMPT,
                              return_tensors="pt").to(vision.device)
        pixels = [preprocess(opened(image), vision.config.image_size) for image in images]
        seen = vision(pixel_values=torch.stack(pixels).to(vision.device)).last_hidden_state
        return self(text.input_ids.expand(n, -1), text.attention_mask.expand(n, -1), seen).tolist()


def opened(image):
    """The PIL image of a path or of itself, in its own mode and as it is stored."""
    if isinstance(image, Image.Image):
        return image
    return data.read_image(image, as_stored=True)


def bert_tokenizer(vocab):
    """bert-base-uncased's tokenizer from its vocab.txt, or from the folder that holds it."""
    from transformers import BertTokenizer
    path = Path(vocab)
    if path.is_dir():
        path /= "vocab.txt"
    if not path.exists():
        raise UserError(f"{path} is missing: ImageReward needs bert-base-uncased's vocab.txt; put it there")
    return BertTokenizer(vocab=str(path))


# ---- CLIP and BLIP: how alike a picture and a text are ----

@dataclass
class Similarity:
    """Cosine of a picture's and a text's embedding, from a CLIP or BLIP (image-text retrieval) folder."""
    model: nn.Module
    processor: object

    @classmethod
    def load(cls, folder, device="cpu"):
        from transformers import AutoProcessor, BlipForImageTextRetrieval, CLIPModel
        kinds = {"clip": CLIPModel, "blip": BlipForImageTextRetrieval}
        with command.explained(f"{folder} is neither clip nor blip", "give one of them"):
            kind = kinds[data.read_json(Path(folder) / "config.json")["model_type"]]
        processor = data.from_folder(AutoProcessor, folder, "processor")
        model = data.from_folder(kind, folder, "model", dtype=torch.float32)
        return cls(model.to(device), processor)

    @torch.no_grad()
    def cosines(self, images, texts):
        """(N, M) of N pictures (paths or PIL images) and M texts, which are cut to the model's limit. A text
        ranks pictures; a picture ranks texts, as in CLIP-DPO (arXiv 2408.10433)."""
        model = self.model
        pictures = [opened(image).convert("RGB") for image in images]
        limit = model.config.text_config.max_position_embeddings
        x = self.processor(images=pictures, text=texts, padding=True, truncation=True, max_length=limit,
                           return_tensors="pt").to(model.device)
        if model.config.model_type == "blip":
            return model(**x, use_itm_head=False).itm_score
        found = model(**x)
        return found.image_embeds @ found.text_embeds.T

    def score(self, prompt, images):
        """One text against several pictures."""
        return self.cosines(images, [prompt])[:, 0].tolist()


# ---- ArmoRM ----

LLAMA3 = (128009, 128006, 78191, 128007, 271)    # <|eot_id|> and the assistant's header: the prompt's end
# The published objectives: helpsteer-helpfulness, -correctness, -coherence, -complexity, -verbosity (those of
# PDS-DPO), ultrafeedback-overall_score, -instruction_following, -truthfulness, -honesty, -helpfulness,
# beavertails-is_safe, prometheus-score, argilla-overall_quality, -judge_lm, code-complexity, -style,
# -explanation, -instruction-following, -readability.
HEAD = {"regression_layer/weight", "reward_transform_matrix", "gating/logit_scale", "gating/layers/0/weight",
        "gating/layers/0/bias"}


class ArmoRM(nn.Module):
    """Llama; rewards from a conversation's last token, their weights from its prompt's last.

    head: the published file's own names, each `.` a `/` (as ParameterDict wants it), O objectives, width D:
    regression_layer/weight (O, D), reward_transform_matrix (O, O), gating/logit_scale (1,), and of the gate's
    linear maps gating/layers/K/weight and /bias.
    """
    def __init__(self, llama, head, temperature, token_pattern, tokenizer=None):
        super().__init__()
        self.llama, self.head = llama, nn.ParameterDict(head)
        self.temperature, self.pattern, self.tokenizer = temperature, list(token_pattern), tokenizer

    @classmethod
    def load(cls, weights, config=None, token_pattern=None, device="cpu", dtype=torch.float32):
        """weights: the published folder, or a file of its state dict. config: a dict, a JSON file, or None:
        the folder's config.json. token_pattern: ids that end a prompt; None: those in the folder's
        token_pattern.json, else Llama 3's. dtype: of the Llama tower. The heads' sizes come from their
        shapes. Raises UserError for what does not fit.
        """
        from transformers import AutoTokenizer, LlamaConfig, LlamaModel
        folder, config, state = read_published(weights, config)
        tower, head = {}, {}
        with command.explained(f"{weights} does not fit ArmoRM or its config", "give both as published"):
            for name, x in state.items():
                if name.startswith("model."):
                    tower[name.removeprefix("model.")] = x
                else:
                    head[name.replace(".", "/")] = x.float()
            llama, info = LlamaModel.from_pretrained(None, config=LlamaConfig(**config), state_dict=tower,
                                                     dtype=dtype, output_loading_info=True)
            wrong = HEAD - head.keys() | info["missing_keys"] | info["unexpected_keys"]
            if wrong:
                raise ValueError(f"{len(wrong)} names differ, among them {min(wrong)}")
        pattern = token_pattern or data.read_json(folder / "token_pattern.json", LLAMA3)
        model = cls(llama, head, config.get("gating_temperature", 10), pattern)
        if (folder / "tokenizer_config.json").exists():
            model.tokenizer = data.from_folder(AutoTokenizer, folder, "tokenizer")
            if model.tokenizer.chat_template:
                said = [*ask.messages("QUESTION"), {"role": "assistant", "content": "ANSWER"}]
                front.check_template(folder, model.tokenizer, model.tokenizer.chat_template, said)
        return model.requires_grad_(False).to(device)

    def prompt_end(self, input_ids, real):
        """Where the last whole occurrence of the pattern starts: [B]. Raises UserError if there is none."""
        n, found = len(self.pattern), []
        for row, ids in enumerate(input_ids.masked_fill(real == 0, -1).tolist(), 1):
            starts = [at for at in range(len(ids)) if ids[at:at + n] == self.pattern]
            if not starts:
                raise UserError(f"ArmoRM: conversation {row} of {len(input_ids)} has no assistant header "
                                f"(ids {self.pattern}): truncation cut it off, or another chat template "
                                "wrote it; shorten the prompt or use ArmoRM's own template")
            found.append(starts[-1])
        return found

    def forward(self, input_ids, attention_mask=None):
        """Conversations (B, T), padded on either side -> {"rewards" (B, O), "gating" (B, O), "score" (B,)}.

        Without a mask every token is real.
        """
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        start, rows, head = self.prompt_end(input_ids, real), range(len(input_ids)), self.head
        counted = real.cumsum(1)
        hidden = self.llama(input_ids=input_ids, attention_mask=real, use_cache=False,
                            position_ids=(counted - 1).clamp(min=0)).last_hidden_state            # (B, T, D)
        last = counted.argmax(1)                                # the first place that has counted them all
        rewards = F.linear(hidden[rows, last].float(), head["regression_layer/weight"])           # (B, O)
        x, k = hidden[rows, start].float(), 0
        while f"gating/layers/{k}/weight" in head:
            x = x.relu() if k else x
            x = F.linear(x, head[f"gating/layers/{k}/weight"], head[f"gating/layers/{k}/bias"])
            k += 1
        gating = (x / self.temperature).softmax(-1) * head["gating/logit_scale"]                  # (B, O)
        score = (gating * (rewards @ head["reward_transform_matrix"])).sum(-1)                    # (B,)
        return {"rewards": rewards, "gating": gating, "score": score}

    @torch.no_grad()
    def judge(self, question, answers, max_length=4096):
        """[{"rewards", "gating", "score"}] of a question's answers, in the folder's chat template."""
        found, asked = [], ask.messages(question)
        chats = [[*asked, {"role": "assistant", "content": answer}] for answer in answers]
        with command.explained("ArmoRM's folder has no tokenizer with a chat template that works",
                               "copy tokenizer.json and tokenizer_config.json as published"):
            tokens = self.tokenizer.apply_chat_template(
                chats, padding=True, truncation=True, max_length=max_length, return_dict=True,
                return_tensors="pt", tokenizer_kwargs={"padding_side": "right"}).to(self.llama.device)
        judged = self(tokens["input_ids"], tokens["attention_mask"])
        for row in range(len(chats)):
            found.append({name: x[row].tolist() for name, x in judged.items()})
        return found


def load(name, source, device, dtype):
    """The reward model of a name, from its weights or folder; dtype: of ArmoRM's tower, by name."""
    if name == "armorm":
        return ArmoRM.load(source, device=device, dtype=command.dtype(dtype, device))
    kind = ImageReward if name == "imagereward" else Similarity
    return kind.load(source, device=device)
