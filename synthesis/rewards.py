"""Reward models for synth.py: how well a picture shows a prompt (ImageReward, CLIP, BLIP), how good an answer
is (ArmoRM).

    model = ImageReward.load("ImageReward.pt", vocab="vocab.txt")       # bert-base-uncased's vocabulary
    model.score("a red bike on a beach", ["1.png", "2.png"])            # -> [0.58, -1.41]
    model = ArmoRM.load("ArmoRM-Llama3-8B-v0.1", dtype=torch.bfloat16)
    model.score("What is on the table?", ["A cup.", "I don't know."])   # -> [0.15, 0.06]

Every model has `score(text, things) -> [float]`: one text against several pictures or answers.

Both papers' reward models need packages, or remote code, that no longer run beside current transformers. Here
they are transformers' own towers (BLIP's vision and text model; Llama) under heads written out below, and the
published files load as they are. Papers: ImageReward, arXiv 2304.05977; ArmoRM, arXiv 2406.12845.

Departures from the official codes:
 1. ArmoRM takes from the attention mask where a conversation ends, on whichever side it is padded. The
    official forward takes the token before the first padding id: right if it is padded on the right.
 2. ArmoRM's heads compute in float32 whatever the tower's type (official: all bfloat16).
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of synth.py; run: python synth.py --help"))

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
from data import MEAN, STD, UserError


def read_weights(path):
    """{name: tensor} of a .pt or .safetensors file, or of a folder's safetensors; pickled code is never run.

    Raises UserError for a file that is missing or torn, or that holds more than tensors.
    """
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file
    files, state = [Path(path)], {}
    if files[0].is_dir():
        folder = files[0]
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.pt"))
    for file in files:
        try:
            if file.suffix == ".safetensors":
                state |= load_file(file)
            else:
                state |= torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, TypeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read as weights ({brief(error)}); copy the published file "
                            "again") from error
    if not state or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{path}: no weights there, or other things too; give the published file or folder")
    return state


def brief(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


def beside(weights, config, default=None):
    """(the weights' folder, their config): a dict, a JSON file, or None for config.json in the folder."""
    folder = Path(weights)
    if not folder.is_dir():
        folder = folder.parent
    if config is None:
        config = data.read_json(folder / "config.json", default)
    elif not isinstance(config, dict):
        config = data.read_json(config)
    return folder, config


# ---- ImageReward ----

MEAN_REWARD, STD_REWARD = 0.16717362830052426, 1.0333394966054072      # of its training set
MAX_PROMPT = 35                                                         # tokens, [CLS] and [SEP] included
PUBLISHED = {
    "vision": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
               "intermediate_size": 4096, "image_size": 224, "patch_size": 16,
               "layer_norm_eps": 1e-6},
    "text": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
             "intermediate_size": 3072, "encoder_hidden_size": 1024, "vocab_size": 30524,
             "max_position_embeddings": 512, "layer_norm_eps": 1e-12}}
LINEAR = (0, 2, 4, 6, 7)                # the head's linear maps; dropouts have the numbers between
# Published names to ours, ^ at their beginning; parts of the file that the reward does not use.
NAMES = (("^blip.visual_encoder.cls_token", "^vision.embeddings.class_embedding"),
         ("^blip.visual_encoder.pos_embed", "^vision.embeddings.position_embedding"),
         ("^blip.visual_encoder.patch_embed.proj.", "^vision.embeddings.patch_embedding."),
         ("^blip.visual_encoder.blocks.", "^vision.encoder.layers."),
         ("^blip.visual_encoder.norm.", "^vision.post_layernorm."),
         ("^blip.text_encoder.", "^text."), ("^mlp.layers.", "^mlp."),
         (".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection."),
         (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."))
DROPPED = ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.", "blip.text_proj.")


def to_ours(name):
    """A name in ImageReward.pt -> in our module; None for a dropped part, the name itself if unknown."""
    if name.startswith(DROPPED):
        return None
    name = f"^{name}"
    for published, ours in NAMES:
        name = name.replace(published, ours)
    return name[1:]


def to_published(name):
    """The inverse of to_ours, for weights that are trained here and stored as the published ones are."""
    name = f"^{name}"
    for published, ours in NAMES:
        name = name.replace(ours, published)
    return name[1:]


def preprocess(image, size):
    """A PIL image as ImageReward sees it: float32 (3, size, size).

    Bicubic in the image's own mode, shorter side to `size` (the longer one rounded down, as in torchvision),
    centre crop (half a pixel rounds to even), and only then RGB: an RGBA image differs if converted first.
    """
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    width, height = (size, longer) if width <= height else (longer, size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    pixels = np.array(image, np.float32) / 255
    pixels = (pixels - MEAN.astype(np.float32)) / STD.astype(np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


class ImageReward(nn.Module):
    """BLIP's towers; the text's first token, after cross-attention to the picture, becomes the reward."""
    def __init__(self, vision, text, widths=(1024, 128, 64, 16, 1)):
        from transformers import BlipTextModel, BlipVisionModel
        super().__init__()
        self.vision, self.tokenizer = BlipVisionModel(vision), None
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.mlp, before = nn.ModuleDict(), text.hidden_size    # linear maps in a row, without activations
        for place, width in zip(LINEAR, widths, strict=True):
            self.mlp[str(place)] = nn.Linear(before, width)
            before = width

    @classmethod
    def build(cls, vision, text, **options):
        """From two dicts of sizes, the text's as in BLIP's med_config.json or ours; else the published."""
        from transformers import BlipTextConfig, BlipVisionConfig
        text = PUBLISHED["text"] | text
        text["encoder_hidden_size"] = text.pop("encoder_width", text["encoder_hidden_size"])
        text |= {"is_decoder": True, "attention_probs_dropout_prob": 0., "hidden_dropout_prob": 0.,
                 "bos_token_id": None, "sep_token_id": None}             # is_decoder: with cross-attention
        return cls(BlipVisionConfig(**PUBLISHED["vision"] | vision), BlipTextConfig(**text), **options)

    @classmethod
    def load(cls, weights, config=None, vocab=None, device="cpu", dtype=torch.float32):
        """weights: ImageReward.pt or its folder, in the published key names. vocab: bert-base-uncased's
        vocab.txt or its folder; None: beside the weights. config: {"vision": {...}, "text": {...}} or a JSON
        file of it; None: beside the weights (config.json). What it leaves out has the published size, and a
        picture's and its patches' size show in the weights. Raises UserError if they do not fit.
        """
        folder, config = beside(weights, config, {})
        state = {to_ours(name): x for name, x in read_weights(weights).items()}
        state.pop(None, None)
        try:
            patch = state["vision.embeddings.patch_embedding.weight"].shape[-1]
            across = math.isqrt(state["vision.embeddings.position_embedding"].shape[1])
            shown = {"patch_size": patch, "image_size": patch * across}
            widths = [len(state[f"mlp.{place}.bias"]) for place in LINEAR]
            vision, text = shown | config.get("vision", {}), config.get("text", {})
            with torch.device("meta"):                      # no memory and no time for random weights
                model = cls.build(vision, text, widths=widths)
            model.load_state_dict(state, assign=True)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{weights} is not ImageReward's state dict, or does not fit its config "
                            f"({brief(error)}); give the published ImageReward.pt, or the two that belong "
                            "together") from error
        for module in model.modules():                      # the only buffers, not in the file: 0, 1, 2, ...
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.arange(buffer.numel()).view(buffer.shape)
        model.tokenizer = bert_tokenizer(vocab or folder)
        return model.requires_grad_(False).eval().to(device=device, dtype=dtype)

    def forward(self, input_ids, attention_mask, seen):
        """Rewards (B,) of B texts (B, T) and B pictures' tokens (B, K, D), vision's last_hidden_state."""
        everywhere = torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device)
        x = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen,
                      encoder_attention_mask=everywhere).last_hidden_state[:, 0].float()           # (B, D)
        for linear in self.mlp.values():
            x = F.linear(x, linear.weight.float(), linear.bias.float())
        return (x[:, 0] - MEAN_REWARD) / STD_REWARD

    @torch.no_grad()
    def score(self, prompt, images, batch_size=8):
        """Rewards of pictures (paths or PIL images, or one of them) for a prompt, a list of floats."""
        if isinstance(images, str | Path | Image.Image):
            images = [images]
        text = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=MAX_PROMPT,
                              return_tensors="pt").to(self.vision.device)
        vision, scores = self.vision, []
        size = vision.config.image_size
        for at in range(0, len(images), batch_size):
            some = images[at:at + batch_size]
            pixels = torch.stack([preprocess(opened(image), size) for image in some])
            seen = vision(pixel_values=pixels.to(vision.device, vision.dtype)).last_hidden_state
            ids = text.input_ids.expand(len(some), -1)
            mask = text.attention_mask.expand(len(some), -1)
            scores += self(ids, mask, seen).tolist()
        return scores


def opened(image):
    """The PIL image of a path or of itself, in its own mode and as it is stored."""
    if isinstance(image, Image.Image):
        return image
    return data.read_image(image, as_stored=True)


def bert_tokenizer(vocab):
    """bert-base-uncased's tokenizer from its vocab.txt, with the two tokens that BLIP adds behind it."""
    from transformers import BertTokenizer
    path = Path(vocab)
    if path.is_dir():
        path = path / "vocab.txt"
    if not path.exists():
        raise UserError(f"{path} is missing: ImageReward reads prompts with bert-base-uncased's vocab.txt; "
                        "pass its path or put it beside the weights")
    words = path.read_text(encoding="utf-8").splitlines()
    tokenizer = BertTokenizer(vocab={word: k for k, word in enumerate(words)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return tokenizer


# ---- CLIP and BLIP: how alike a picture and a text are ----

class Similarity:
    """Cosine of a picture's and a text's embedding, from a CLIP or BLIP (image-text retrieval) folder."""
    def __init__(self, model, processor, blip):
        self.model, self.processor, self.blip = model, processor, blip

    @classmethod
    def load(cls, folder, device="cpu", dtype=torch.float32):
        from transformers import AutoProcessor, BlipForImageTextRetrieval, CLIPModel
        kinds = {"clip": CLIPModel, "blip": BlipForImageTextRetrieval}
        kind = data.read_json(Path(folder) / "config.json").get("model_type")
        if kind not in kinds:
            raise UserError(f"{folder}: model_type {kind} is neither clip nor blip; give one of them")
        processor = data.from_folder(AutoProcessor, folder, "processor", "copy it again")
        model = data.from_folder(kinds[kind], folder, "model", "copy it again", dtype=dtype)
        model.requires_grad_(False).eval().to(device)
        return cls(model, processor, kind == "blip")

    @torch.no_grad()
    def texts(self, texts):
        """Unit vectors (N, D) of texts, cut to the model's limit."""
        model = self.model
        limit = model.config.text_config.max_position_embeddings
        x = self.processor.tokenizer(list(texts), padding=True, truncation=True, max_length=limit,
                                     return_tensors="pt").to(model.device)
        x = {"input_ids": x.input_ids, "attention_mask": x.attention_mask}
        if self.blip:
            hidden = model.text_encoder(**x).last_hidden_state
            found = model.text_proj(hidden[:, 0])
        else:
            found = model.get_text_features(**x).pooler_output
        return F.normalize(found.float(), dim=-1)

    @torch.no_grad()
    def images(self, images):
        """Unit vectors (N, D) of pictures, paths or PIL images."""
        model = self.model
        pictures = [opened(image).convert("RGB") for image in images]
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt").pixel_values
        pixels = pixels.to(model.device, model.dtype)
        if self.blip:
            hidden = model.vision_model(pixel_values=pixels).last_hidden_state
            found = model.vision_proj(hidden[:, 0])
        else:
            found = model.get_image_features(pixel_values=pixels).pooler_output
        return F.normalize(found.float(), dim=-1)

    def score(self, prompt, images):
        """One text against several pictures."""
        text, = self.texts([prompt])
        return (self.images(images) @ text).tolist()

    def score_texts(self, image, texts):
        """One picture against several texts, as CLIP-DPO (arXiv 2408.10433) ranks answers."""
        seen, = self.images([image])
        return (self.texts(texts) @ seen).tolist()


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
    def __init__(self, llama, head, temperature=10, token_pattern=LLAMA3, pad_id=None, tokenizer=None):
        super().__init__()
        self.llama, self.head = llama, nn.ParameterDict(head)
        self.temperature, self.pattern = temperature, tuple(token_pattern)
        self.pad_id, self.tokenizer = pad_id, tokenizer

    @classmethod
    def load(cls, weights, config=None, token_pattern=LLAMA3, device="cpu", dtype=torch.float32):
        """weights: the published folder, or a file of its state dict. config: a dict, a JSON file, or None:
        the folder's config.json. dtype: of the Llama tower. The heads' sizes come from their shapes. Raises
        UserError for what does not fit.
        """
        from transformers import AutoTokenizer, LlamaConfig, LlamaModel
        folder, config = beside(weights, config)
        tower, head = {}, {}
        for name, x in read_weights(weights).items():
            if name.startswith("model."):
                tower[name.removeprefix("model.")] = x
            else:
                head[name.replace(".", "/")] = x.float()
        try:
            llama, info = LlamaModel.from_pretrained(None, config=LlamaConfig(**config), state_dict=tower,
                                                     dtype=dtype, output_loading_info=True)
            wrong = HEAD - head.keys() | info["missing_keys"] | info["unexpected_keys"]
            if wrong:
                raise ValueError(f"{len(wrong)} names differ, among them {min(wrong).replace('/', '.')}")
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{weights} does not fit ArmoRM or its config ({brief(error)}); give both "
                            "as published") from error
        temperature, pad_id = config.get("gating_temperature", 10), config.get("pad_token_id")
        model = cls(llama, head, temperature, token_pattern, pad_id)
        if (folder / "tokenizer_config.json").exists():
            model.tokenizer = data.from_folder(AutoTokenizer, folder, "tokenizer", "copy it again")
        return model.requires_grad_(False).eval().to(device)

    def prompt_end(self, input_ids, real):
        """Where the last whole occurrence of the pattern starts: (B,). Raises UserError if there is none."""
        n, found = len(self.pattern), torch.zeros_like(real[:, :1])
        if input_ids.shape[1] >= n:
            pattern = torch.tensor(self.pattern, device=input_ids.device)
            same = input_ids.unfold(1, n, 1) == pattern
            found = (same & real.unfold(1, n, 1)).all(-1)                                         # (B, T-n+1)
        for row, there in enumerate(found.any(1).tolist(), 1):
            if not there:
                raise UserError(f"ArmoRM: conversation {row} of {len(input_ids)} has no assistant header "
                                f"(ids {list(self.pattern)}): truncation cut it off, or another chat "
                                "template wrote it; shorten the prompt or use ArmoRM's own template")
        return last(found)

    def forward(self, input_ids, attention_mask=None):
        """Conversations (B, T), padded on either side -> {"rewards" (B, O), "gating" (B, O), "score" (B,)}.

        No mask: every id but the padding's is real.
        """
        if attention_mask is None:                      # an id that never occurs: every token is real
            attention_mask = input_ids != (-1 if self.pad_id is None else self.pad_id)
        real, head = attention_mask.bool(), self.head
        start, rows = self.prompt_end(input_ids, real), range(len(input_ids))
        places = (real.long().cumsum(1) - 1).clamp(min=0)
        hidden = self.llama(input_ids=input_ids, attention_mask=real.long(), position_ids=places,
                            use_cache=False).last_hidden_state                                    # (B, T, D)
        rewards = F.linear(hidden[rows, last(real)].float(), head["regression_layer/weight"])     # (B, O)
        x = hidden[rows, start].float()
        k = 0
        while f"gating/layers/{k}/weight" in head:
            x = x.relu() if k else x
            weight, bias = head[f"gating/layers/{k}/weight"], head[f"gating/layers/{k}/bias"]
            x, k = F.linear(x, weight, bias), k + 1
        gating = (x / self.temperature).softmax(-1) * head["gating/logit_scale"]                  # (B, O)
        score = (gating * (rewards @ head["reward_transform_matrix"])).sum(-1)                    # (B,)
        return {"rewards": rewards, "gating": gating, "score": score}

    @torch.no_grad()
    def judge(self, question, answers, batch_size=8, max_length=4096):
        """[{"rewards", "gating", "score"}] of a question's answers, in the folder's chat template."""
        if self.tokenizer is None:
            raise UserError("ArmoRM's folder has no tokenizer; copy tokenizer.json and tokenizer_config.json")
        found, device = [], self.head["gating/logit_scale"].device
        for at in range(0, len(answers), batch_size):
            chats = []
            for answer in answers[at:at + batch_size]:
                asked = {"role": "user", "content": question}
                chats.append([asked, {"role": "assistant", "content": answer}])
            tokens = self.tokenizer.apply_chat_template(
                chats, padding=True, truncation=True, max_length=max_length, return_dict=True,
                return_tensors="pt", tokenizer_kwargs={"padding_side": "right"}).to(device)
            judged = self(tokens["input_ids"], tokens["attention_mask"])
            for row in range(len(chats)):
                found.append({name: x[row].tolist() for name, x in judged.items()})
        return found

    def score(self, question, answers):
        """Gated scores of answers to a question, a list of floats."""
        return [row["score"] for row in self.judge(question, answers)]


def last(found):
    """The last true place of each row: (B, T) -> (B,)."""
    place = torch.arange(found.shape[1], device=found.device)
    return torch.where(found, place, -1).amax(1)


def load(name, source, device="cpu", dtype=torch.float32):
    """The reward model of a name, from its weights or folder; dtype: of ArmoRM's tower."""
    if name == "imagereward":
        return ImageReward.load(source, device=device)
    if name in ("clip", "blip"):
        return Similarity.load(source, device)
    # a tokenizer other than Llama 3's ends the prompt with ids of its own
    pattern = data.read_json(Path(source) / "token_pattern.json", LLAMA3)
    return ArmoRM.load(source, None, pattern, device, dtype)
