"""--shard: the decoder layers, nine tenths of a 7B, under PyTorch's FSDP2. Part of train_dpo.py.

These are the frozen base's or, without an adapter, those that train and those of the frozen copy. Tested with
two ranks over gloo on a CPU, as one node and as two; NCCL has not been run.
"""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

import os
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import lora
from data import UserError


def load_in_shards(load, ranks):
    """load() -> VLM on the CPU, LoRA included; then its decoder layers go to the device, each in parts.

    A layer's whole weight is gathered while it runs. Embeddings, lm_head, vision tower, projector and LoRA
    stay whole. The ranks of a node take turns, and the layers go one by one: the host never holds more than
    one whole model (and its frozen copy, if it trains itself), a GPU never more than one whole layer.
    """
    if ranks.device.type not in ("cuda", "cpu"):
        raise UserError(f"--shard on {ranks.device.type}: PyTorch can do it on CUDA and on the CPU only")
    # a group of its own: PyTorch keeps a mesh's group for ever, and the main one must end before Python does
    mesh = DeviceMesh.from_group(dist.new_group(), ranks.device.type)
    for turn in range(ranks.world):
        if turn == int(os.environ["LOCAL_RANK"]):
            m = load()
            for each in filter(None, (m, m.frozen)):                      # and the copy, if there is one
                divide(each, ranks.device, mesh)
        ranks.barrier()
    return m


def divide(m, device, mesh):
    """Put a model's decoder layers under FSDP2; trainable weights are float32 and compute in their type."""
    language, adapter = m.language_model, set(lora.lora_parameters(m.model).values())
    divided = {p for layer in language.layers for p in layer.parameters()} - adapter
    for x in {*m.model.parameters(), *m.model.buffers()} - divided:
        x.data = x.data.to(device)
    master = torch.promote_types(language.dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=language.dtype, reduce_dtype=master)
    for layer in language.layers:
        if any(p.requires_grad for p in divided):
            layer.to(master)
        fully_shard(layer, mesh=mesh, ignored_params=adapter, reshard_after_forward=True, mp_policy=policy)
        layer.set_gradient_divide_factor(1.0)                          # a sum over the ranks, not their mean
        layer.set_force_sum_reduction_for_comms(True)
    fully_shard(language, mesh=mesh, ignored_params=set(language.parameters()))            # joins the layers


def first(ranks, m, *work):
    """ranks.first(*work), where work runs the model or its frozen copy, whose weights come from all ranks.

    Rank 0 runs any number of forwards; for each the other ranks send a token of their own through the same
    language model, which rank 0 has told them by its number.
    """
    languages = [each.language_model for each in (m, m.frozen) if each]
    if ranks.rank > 0:
        while number := ranks.gather(None)[0]:                            # rank 0's
            follow(languages[number - 1])
    return ranks.first(leading, ranks, languages, *work)


def leading(ranks, languages, work, *arguments):
    """work(*arguments) on rank 0, which tells the others before each forward, and at the end."""
    hooks = [language.register_forward_pre_hook(partial(tell, ranks, number))
             for number, language in enumerate(languages, 1)]
    try:
        return work(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
        tell(ranks, 0)


@torch.no_grad()
def follow(language):
    token = language.get_input_embeddings().weight[:1]                                          # (1, D)
    language(inputs_embeds=token[None], use_cache=False)


def tell(ranks, number, *_):
    ranks.gather(number)
