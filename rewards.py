"""Reward models: how well a picture shows a prompt (ImageReward, CLIP, BLIP), how good an answer is (ArmoRM).

    model = ImageReward.load("ImageReward.pt", vocab="vocab.txt")       # bert-base-uncased's vocabulary
    model.score("a red bike on a beach", ["1.png", "2.png"])            # -> [0.58, -1.41]
    model = ArmoRM.load("ArmoRM-Llama3-8B-v0.1", dtype=torch.bfloat16)
    model.score("What is on the table?", ["A cup.", "I don't know."])   # -> [0.15, 0.06]

Every model has `score(text, things) -> [float]`: one text against several pictures or answers.

Both papers' reward models need packages, or remote code, that no longer run beside current transformers. Here
they are transformers' own towers (BLIP's vision and text model; Llama) under heads written out below, and the
published files load as they are. Papers: ImageReward, arXiv 2304.05977; ArmoRM, arXiv 2406.12845.

Departures from the official codes:
 1. ArmoRM is told by the attention mask where a conversation ends, on whichever side it is padded. The
    official forward takes the token before the first padding id: right where it is padded on the right.
 2. ArmoRM's heads compute in float32 whatever the tower's type (official: all bfloat16).
"""
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from data import MEAN, STD, UserError

# ---- files ----


def read_weights(path):
    """{name: tensor} of a .pt or .safetensors file, or of a folder's safetensors; pickled code is never run.

    Raises UserError for what is not there, is torn, or holds something other than tensors.
    """
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise UserError(f"{path}: no weights there; give the published file or its folder")
    state = {}
    for file in files:
        try:
            state |= (load_file(file) if file.suffix == ".safetensors"
                      else torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, TypeError) as error:
            raise UserError(f"{file} cannot be read as weights ({_first(error)}); "
                            "copy the published file again") from error
    if not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{path} holds more than named tensors; give the published state dict")
    return state


def read_config(path):
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; copy it from the published model") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}); copy it again") from error


def _first(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- ImageReward ----

MEAN_REWARD, STD_REWARD = 0.16717362830052426, 1.0333394966054072      # of its training set
MAX_PROMPT = 35                                                         # tokens, [CLS] and [SEP] included
PUBLISHED = {"vision": {"num_attention_heads": 16}, "text": {"num_attention_heads": 12}}   # the rest: shapes
# Published names to ours, in this order; `dropped` are parts of the file that the reward does not use.
NAMES = (("blip.visual_encoder.cls_token", "vision.embeddings.class_embedding"),
         ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
         ("blip.visual_encoder.patch_embed.proj.", "vision.embeddings.patch_embedding."),
         ("blip.visual_encoder.blocks.", "vision.encoder.layers."),
         ("blip.visual_encoder.norm.", "vision.post_layernorm."),
         ("blip.text_encoder.", "text."), ("mlp.layers.", "mlp."))
INNER = ((".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection."),
         (".norm1.", ".layer_norm1."), (".norm2.", ".layer_norm2."))
DROPPED = ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.", "blip.text_proj.")


def to_ours(name):
    """A name in ImageReward.pt -> in our module; None for what is dropped, the name itself if unknown."""
    if name.startswith(DROPPED):
        return None
    for theirs, ours in NAMES:
        if name.startswith(theirs):
            name = ours + name[len(theirs):]
            if name.startswith("vision."):
                for theirs, ours in INNER:
                    name = name.replace(theirs, ours)
            return name
    return name


def to_published(name):
    """The inverse of to_ours, for weights that are trained here and stored as the published ones are."""
    if name.startswith("vision."):
        for theirs, ours in INNER:
            name = name.replace(ours, theirs)
    return next((theirs + name[len(ours):] for theirs, ours in NAMES if name.startswith(ours)), name)


def preprocess(image, size):
    """A PIL image as ImageReward sees it: float32 (3, size, size).

    Bicubic in the image's own mode, shorter side to `size` (the longer one rounded down, as in torchvision),
    centre crop (half a pixel rounds to even), and only then RGB: an RGBA image differs if converted first.
    """
    width, height = image.size
    short, long = min(width, height), int(size * max(width, height) / min(width, height))
    if short != size or long != max(width, height):
        image = image.resize((size, long) if width <= height else (long, size), Image.Resampling.BICUBIC)
    width, height = image.size
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
    mean, std = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (MEAN, STD))
    return (pixels.permute(2, 0, 1).float() / 255 - mean) / std


def open_image(image):
    """A path or a PIL image -> the PIL image, in its own mode and as it is stored (no EXIF turn)."""
    if isinstance(image, Image.Image):
        return image
    try:
        with Image.open(image) as file:
            file.load()
            return file
    except FileNotFoundError as error:
        raise UserError(f"image {image} is missing; put it there") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"image {image} is unreadable ({error}); replace the file") from error


class ImageReward(nn.Module):
    """BLIP's towers; the text's first token, after cross-attention to the picture, becomes the reward."""

    def __init__(self, vision, text, widths=(1024, 128, 64, 16, 1)):
        from transformers import BlipTextModel, BlipVisionModel
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        # Five linear maps in a row, without activations; the dropouts between them hold the numbers' gaps.
        sizes = [text.hidden_size, *widths]
        self.mlp = nn.ModuleDict({str(place): nn.Linear(sizes[k], sizes[k + 1])
                                  for k, place in enumerate((0, 2, 4, 6, 7))})
        self.tokenizer = None

    @classmethod
    def build(cls, vision, text, **options):
        """From two dicts of sizes; what ImageReward fixes (layer norms, cross-attention) is set here."""
        from transformers import BlipTextConfig, BlipVisionConfig
        theirs = {"encoder_width": "encoder_hidden_size"}            # BLIP's med_config.json
        text = {theirs.get(k, k): v for k, v in text.items() if k not in ("model_type", "architectures")}
        text = {"layer_norm_eps": 1e-12, **text, "is_decoder": True,     # creates the cross-attention
                "attention_probs_dropout_prob": 0., "hidden_dropout_prob": 0., "use_cache": False,
                "bos_token_id": None, "sep_token_id": None}
        return cls(BlipVisionConfig(**{"layer_norm_eps": 1e-6, **vision}), BlipTextConfig(**text), **options)

    @classmethod
    def load(cls, weights, config=None, vocab=None, device="cpu", dtype=torch.float32):
        """weights: ImageReward.pt or its folder, in the published key names. vocab: bert-base-uncased's
        vocab.txt or its folder; None: beside the weights. config: {"vision": {...}, "text": {...}} or a JSON
        file of it; sizes that show in the shapes may be left out. None: beside the weights (config.json), or
        the published size. Raises UserError, in a sentence, for what does not fit.
        """
        folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
        state = {to_ours(name): x for name, x in read_weights(weights).items() if to_ours(name)}
        if config is None and (folder / "config.json").exists():
            config = folder / "config.json"
        if not isinstance(config, dict):
            config = read_config(config) if config else PUBLISHED
        try:
            shapes = cls.sizes(state)
        except (KeyError, ValueError, IndexError) as error:
            raise UserError(f"{weights} is not ImageReward's state dict (no {error}); give the published "
                            "ImageReward.pt") from error
        widths = shapes.pop("widths")
        parts = {part: PUBLISHED[part] | shapes[part] | config.get(part, {}) for part in ("vision", "text")}
        try:
            with torch.device("meta"):                       # no memory and no time for random weights
                model = cls.build(**parts, widths=widths)
            model.load_state_dict(state, strict=True, assign=True)
        except (ValueError, TypeError, RuntimeError) as error:
            why = " ".join(line.strip() for line in str(error).splitlines()[:3])[:300]
            raise UserError(f"{weights} does not fit its config ({why}); give the one that belongs to "
                            "it") from error
        for module in model.modules():                       # the only buffers, not in the file: 0, 1, 2, ...
            for name, buffer in module._buffers.items():
                module._buffers[name] = torch.arange(buffer.numel()).view(buffer.shape)
        model.tokenizer = bert_tokenizer(vocab or folder)
        return model.requires_grad_(False).eval().to(device=device, dtype=dtype)

    @staticmethod
    def sizes(state):
        """What the shapes of a state dict tell of its config."""
        def depth(prefix):
            return 1 + max(int(k[len(prefix):].split(".")[0]) for k in state if k.startswith(prefix))
        seen, said, layer = "vision.embeddings.", "text.embeddings.", "text.encoder.layer."
        patch, place = state[seen + "patch_embedding.weight"], state[seen + "position_embedding"]
        words = state[said + "word_embeddings.weight"]
        return {"vision": {"hidden_size": patch.shape[0], "patch_size": patch.shape[-1],
                           "image_size": patch.shape[-1] * math.isqrt(place.shape[1] - 1),
                           "num_hidden_layers": depth("vision.encoder.layers."),
                           "intermediate_size": state["vision.encoder.layers.0.mlp.fc1.weight"].shape[0]},
                "text": {"vocab_size": words.shape[0], "hidden_size": words.shape[1],
                         "num_hidden_layers": depth(layer),
                         "max_position_embeddings": state[said + "position_embeddings.weight"].shape[0],
                         "intermediate_size": state[layer + "0.intermediate.dense.weight"].shape[0],
                         "encoder_hidden_size": state[layer + "0.crossattention.self.key.weight"].shape[1]},
                "widths": [state[f"mlp.{k}.weight"].shape[0] for k in (0, 2, 4, 6, 7)]}

    def forward(self, input_ids, attention_mask, pixels):
        """Rewards (B,) of B texts (B, T) and B pictures (B, 3, S, S)."""
        return self.read(input_ids, attention_mask, self.vision(pixel_values=pixels).last_hidden_state)

    def read(self, input_ids, attention_mask, seen):
        """The same from the pictures' tokens (B, K, D)."""
        x = self.text(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen,
                      encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device))
        x = x.last_hidden_state[:, 0].float()                                                      # (B, D)
        for linear in self.mlp.values():
            x = F.linear(x, linear.weight.float(), linear.bias.float())
        return (x[:, 0] - MEAN_REWARD) / STD_REWARD

    @torch.no_grad()
    def score(self, prompt, images, batch_size=8):
        """Rewards of pictures (paths or PIL images, or one of them) for a prompt, a list of floats."""
        images = [images] if isinstance(images, str | Path | Image.Image) else images
        device, size = self.mlp["0"].weight.device, self.vision.config.image_size
        encoded = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=MAX_PROMPT,
                                 return_tensors="pt")
        scores = []
        for at in range(0, len(images), batch_size):
            pixels = torch.stack([preprocess(open_image(x), size) for x in images[at:at + batch_size]])
            ids, mask = (encoded[k].expand(len(pixels), -1) for k in ("input_ids", "attention_mask"))
            scores += self(ids.to(device), mask.to(device), pixels.to(device, self.vision.dtype)).tolist()
        return scores


def bert_tokenizer(vocab):
    """bert-base-uncased's tokenizer from its vocab.txt, with the two tokens that BLIP adds behind it."""
    from transformers import BertTokenizer
    path = Path(vocab) / "vocab.txt" if Path(vocab).is_dir() else Path(vocab)
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
        kind = read_config(Path(folder) / "config.json").get("model_type")
        if kind not in ("clip", "blip"):
            raise UserError(f"{folder}: model_type {kind} is neither clip nor blip; give one of them")
        blip = kind == "blip"
        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model = (BlipForImageTextRetrieval if blip else CLIPModel).from_pretrained(
                folder, local_files_only=True, dtype=dtype)
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"{folder} cannot be loaded ({_first(error)}); copy it again") from None
        return cls(model.requires_grad_(False).eval().to(device), processor, blip)

    @torch.no_grad()
    def embed(self, texts=(), images=(), batch_size=16):
        """Unit vectors of texts (cut to what the model reads) or of pictures: (N, D)."""
        m, out = self.model, []
        for at in range(0, len(texts or images), batch_size):
            if texts:
                limit = m.config.text_config.max_position_embeddings
                x = self.processor.tokenizer(list(texts[at:at + batch_size]), padding=True, truncation=True,
                                             max_length=limit, return_tensors="pt").to(m.device)
                x = {k: x[k] for k in ("input_ids", "attention_mask")}
                x = (m.text_proj(m.text_encoder(**x).last_hidden_state[:, 0]) if self.blip
                     else m.get_text_features(**x).pooler_output)
            else:
                pictures = [open_image(i).convert("RGB") for i in images[at:at + batch_size]]
                x = self.processor.image_processor(images=pictures, return_tensors="pt").pixel_values
                x = x.to(m.device, m.dtype)
                x = (m.vision_proj(m.vision_model(pixel_values=x).last_hidden_state[:, 0]) if self.blip
                     else m.get_image_features(pixel_values=x).pooler_output)
            out.append(F.normalize(x.float(), dim=-1))
        return torch.cat(out)

    def score(self, prompt, images):
        """One text against several pictures."""
        return (self.embed(images=images) @ self.embed(texts=[prompt])[0]).tolist()

    def score_texts(self, image, texts):
        """One picture against several texts, as CLIP-DPO (arXiv 2408.10433) ranks answers."""
        return (self.embed(texts=texts) @ self.embed(images=[image])[0]).tolist()


# ---- ArmoRM ----

LLAMA3 = (128009, 128006, 78191, 128007, 271)    # <|eot_id|> and the assistant's header: the prompt ends here
ATTRIBUTES = ("helpsteer-helpfulness", "helpsteer-correctness", "helpsteer-coherence", "helpsteer-complexity",
              "helpsteer-verbosity", "ultrafeedback-overall_score", "ultrafeedback-instruction_following",
              "ultrafeedback-truthfulness", "ultrafeedback-honesty", "ultrafeedback-helpfulness",
              "beavertails-is_safe", "prometheus-score", "argilla-overall_quality", "argilla-judge_lm",
              "code-complexity", "code-style", "code-explanation", "code-instruction-following",
              "code-readability")
HELPSTEER = 5                                    # the first five: the attributes of the PDS-DPO paper


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
    def load(cls, weights, config=None, token_pattern=LLAMA3, device="cpu", dtype=None):
        """weights: the published folder, or a file of its state dict. config: a dict, a JSON file, or None:
        the folder's config.json. dtype: of the Llama tower; None is float32, bfloat16 on CUDA. The heads'
        sizes come from their shapes. Raises UserError for what does not fit.
        """
        from transformers import AutoTokenizer, LlamaConfig, LlamaModel
        folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
        config = config if isinstance(config, dict) else read_config(config or folder / "config.json")
        config = {k: v for k, v in config.items() if k not in ("torch_dtype", "dtype", "architectures")}
        state = read_weights(weights)
        tower = {k.removeprefix("model."): x for k, x in state.items() if k.startswith("model.")}
        head = {k.replace(".", "/"): x.float() for k, x in state.items() if not k.startswith("model.")}
        dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
        try:
            llama, told = LlamaModel.from_pretrained(None, config=LlamaConfig(**config), state_dict=tower,
                                                     dtype=dtype, output_loading_info=True)
        except (ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{weights} does not fit its config ({_first(error)}); give both as "
                            "published") from error
        layers = sum(name.startswith("gating/layers/") for name in head) // 2
        wanted = {"regression_layer/weight", "reward_transform_matrix", "gating/logit_scale"} | {
            f"gating/layers/{k}/{x}" for k in range(max(1, layers)) for x in ("weight", "bias")}
        wrong = wanted ^ set(head) | told["missing_keys"] | told["unexpected_keys"] | {
            key for key, *_ in told["mismatched_keys"]}
        if wrong:
            raise UserError(f"{weights} does not fit ArmoRM or its config: {len(wrong)} names differ, among "
                            f"them {min(wrong).replace('/', '.')}; give both as published")
        temperature, pad_id = config.get("gating_temperature", 10), config.get("pad_token_id")
        model = cls(llama, head, temperature, token_pattern, pad_id)
        if (folder / "tokenizer_config.json").exists():
            model.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return model.requires_grad_(False).eval().to(device)

    def prompt_end(self, input_ids, real):
        """Where the last whole occurrence of the pattern starts: (B,). Raises UserError where none is."""
        n, pattern = len(self.pattern), torch.tensor(self.pattern, device=input_ids.device)
        found = torch.zeros_like(real[:, :1])
        if input_ids.shape[1] >= n:
            found = ((input_ids.unfold(1, n, 1) == pattern) & real.unfold(1, n, 1)).all(-1)       # (B, T-n+1)
        if missing := (~found.any(1)).nonzero()[:, 0].tolist():
            raise UserError(f"ArmoRM: conversation {missing[0] + 1} of {len(input_ids)} has no assistant "
                            f"header (ids {list(self.pattern)}): truncation cut it off, or another chat "
                            "template wrote it; shorten the prompt or use ArmoRM's own template")
        place = torch.arange(found.shape[1], device=found.device)
        return torch.where(found, place, -1).amax(1)

    def forward(self, input_ids, attention_mask=None):
        """Conversations (B, T), padded on either side -> {"rewards" (B, O), "gating" (B, O), "score" (B,)}.

        No mask: every id but the padding's is real.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids) if self.pad_id is None else input_ids != self.pad_id
        real = attention_mask.bool()
        start, head, rows = self.prompt_end(input_ids, real), self.head, range(len(input_ids))
        last = torch.where(real, torch.arange(real.shape[1], device=real.device), -1).amax(1)
        places = (real.long().cumsum(1) - 1).clamp(min=0)
        hidden = self.llama(input_ids=input_ids, attention_mask=real.long(), position_ids=places,
                            use_cache=False).last_hidden_state                                    # (B, T, D)
        rewards = F.linear(hidden[rows, last].float(), head["regression_layer/weight"])           # (B, O)
        x, k = hidden[rows, start].float(), 0
        while f"gating/layers/{k}/weight" in head:
            x = F.linear(x.relu() if k else x, *(head[f"gating/layers/{k}/{p}"] for p in ("weight", "bias")))
            k += 1
        gating = (x / self.temperature).softmax(-1) * head["gating/logit_scale"]                  # (B, O)
        score = (gating * (rewards @ head["reward_transform_matrix"])).sum(-1)                    # (B,)
        return {"rewards": rewards, "gating": gating, "score": score}

    @torch.no_grad()
    def judge(self, question, answers, batch_size=8, max_length=4096):
        """[{"rewards", "gating", "score"}] of the answers to a question, in the folder's chat template."""
        if self.tokenizer is None:
            raise UserError("ArmoRM's folder has no tokenizer; copy tokenizer.json and tokenizer_config.json")
        ids, out, device = [], [], self.head["gating/logit_scale"].device
        for answer in answers:
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            ids.append(self.tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"][:max_length])
        for at in range(0, len(ids), batch_size):
            part = [torch.tensor(row) for row in ids[at:at + batch_size]]
            tokens = pad_sequence(part, batch_first=True, padding_value=self.pad_id or 0)
            mask = pad_sequence([torch.ones_like(row) for row in part], batch_first=True)
            got = {k: x.tolist() for k, x in self(tokens.to(device), mask.to(device)).items()}
            out += [dict(zip(got, row, strict=True)) for row in zip(*got.values(), strict=True)]
        return out

    def score(self, question, answers):
        """Gated scores of answers to a question, a list of floats."""
        return [row["score"] for row in self.judge(question, answers)]
