"""Several processes as one run: who is who under torchrun; AdamW, and on request the base, in shards.

Gradients are summed over ranks once per optimiser step, by hand, without a DDP wrapper. `--shard` puts the
decoder layers, nine tenths of a 7B, under PyTorch's FSDP2: the frozen base's, or, without an adapter, those
that train and those of the frozen copy. Tested with two ranks over gloo on a CPU,
as one node and as two; NCCL, and ranks that share a GPU, have not been run.
"""
import functools
import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import data
import lora

KINDS = ("weight", "exp_avg", "exp_avg_sq")                   # what a checkpoint keeps of each weight


def distributed(o):
    """(rank, world, device), (0, 1, device) without torchrun. Ranks sharing a GPU, or without, use gloo."""
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    kind = o.device or ("cuda" if gpus else "mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(kind, local % gpus) if kind == "cuda" and gpus else torch.device(kind)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    alone = device.type == "cuda" and gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    # the other ranks wait while rank 0 checks the pairs and evaluates: that may take hours, and is no fault
    dist.init_process_group("nccl" if alone else "gloo", timeout=timedelta(hours=24))
    return dist.get_rank(), dist.get_world_size(), device


def from_rank_0(work, rank, world, sharded=()):
    """work() on rank 0, its result on every rank; a user's mistake there, which rank 0 says, ends them all.

    sharded: the language models that load_in_shards dealt, if work uses them. Rank 0 then runs any number of
    forwards, and for each the other ranks send a token of their own through the same model: the layers'
    weights come from all ranks.
    """
    def forward_follows(number, *_):
        told_by_rank_0(number)
    result = [None, None]
    if rank == 0:
        hooks = [language.register_forward_pre_hook(functools.partial(forward_follows, number))
                 for number, language in enumerate(sharded, 1)]
        try:
            result[0] = work()
        except data.UserError as e:
            result[1] = e
        for hook in hooks:
            hook.remove()
        if sharded:
            told_by_rank_0(0)
    elif sharded:
        one = sharded[0]
        token = torch.zeros(1, 1, one.config.hidden_size, dtype=one.dtype, device=one.device)
        while number := told_by_rank_0():
            with torch.no_grad():
                sharded[number - 1](inputs_embeds=token, use_cache=False)
    if world > 1:
        dist.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1] if rank == 0 else SystemExit(1)
    return result[0]


def told_by_rank_0(number=0):
    """A number from rank 0."""
    sent = wire(torch.tensor(number))
    dist.broadcast(sent, 0)
    return sent.item()


def on_any(flag):
    """Whether a flag is set on any rank: what all ranks must decide alike."""
    count = torch.tensor(int(flag))
    all_reduce(count)
    return count.item() > 0


def load_in_shards(load, device):
    """load() -> VLM on the CPU, LoRA included; its decoder layers then go to `device`, a part of each a rank.

    A layer's whole weight is gathered while it runs. Embeddings, lm_head, vision tower, projector and LoRA
    stay whole. The ranks of a node take turns, and the layers go one by one: the host never holds more than
    one whole model (and its frozen copy, if it trains itself), a GPU never more than one whole layer.
    """
    if device.type not in ("cuda", "cpu"):
        raise data.UserError(f"--shard on {device.type}: PyTorch can do it on CUDA and on the CPU only")
    # a group of its own: PyTorch keeps a mesh's group for ever, and the main one must end before Python does
    mesh = DeviceMesh.from_group(dist.new_group(), device.type)
    for turn in range(dist.get_world_size()):
        if turn == int(os.environ["LOCAL_RANK"]):
            m = load()
            for each in (m, m.frozen) if m.frozen else (m,):
                deal(each.model, device, mesh)
        dist.barrier()
    return m


def deal(model, device, mesh):
    """Put a model's decoder layers under FSDP2; what trains of them is float32 and computes in their type."""
    language, adapter = model.model.language_model, set(lora.lora_parameters(model).values())
    dealt = {p for layer in language.layers for p in layer.parameters()} - adapter
    for x in {*model.parameters(), *model.buffers()} - dealt:
        x.data = x.data.to(device)
    master = torch.promote_types(language.dtype, torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=language.dtype, reduce_dtype=master)
    for layer in language.layers:
        if any(p.requires_grad for p in dealt):
            layer.to(master)
        fully_shard(layer, mesh=mesh, ignored_params=adapter, reshard_after_forward=True, mp_policy=policy)
        layer.set_gradient_divide_factor(1.0)                          # a sum over the ranks, not their mean
        layer.set_force_sum_reduction_for_comms(True)
    fully_shard(language, mesh=mesh, ignored_params=set(language.parameters()))            # joins the layers


def frozen_bytes(model):
    """Bytes of the base's weights that this rank holds."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes
               for p in model.parameters() if not p.requires_grad)


def wire(x):
    """A tensor where the backend can send it from: gloo sends from the CPU, NCCL from the GPU."""
    return x.cpu() if dist.get_backend() == "gloo" else x.cuda()


def all_reduce(x):
    """Sum a tensor over the ranks, in place, wherever it lies."""
    sent = wire(x)
    dist.all_reduce(sent)
    x.copy_(sent)


class ShardedAdamW:
    """AdamW with its float32 masters and moments dealt to the ranks.

    Weights that every rank holds whole lie in one flat vector, and a rank owns a shard of it: reduce-scatter
    the gradient, step the shard, all-gather the weights: ZeRO-2 (arXiv 1910.02054, section 5). Of those that
    deal() dealt a rank steps the part that it has, whose gradient FSDP2 has summed.
    """
    def __init__(self, parameters, o, rank, world):
        self.rank, self.world, self.clip, self.place, at = rank, world, o.clip, {}, 0
        self.dealt = {n: p for n, p in parameters.items() if isinstance(p, DTensor)}
        whole = {n: p for n, p in parameters.items() if n not in self.dealt}
        first = next(iter(whole.values()))
        master = torch.promote_types(first.dtype, torch.float32)
        per_rank = -(-sum(p.numel() for p in whole.values()) // world)                # rounded up
        self.flat = first.new_zeros(per_rank * world)
        self.grad = self.flat.new_zeros(per_rank * world, dtype=master)
        for name, p in whole.items():
            self.place[name], at = (slice(at, at + p.numel()), p.shape), at + p.numel()
            self.flat[self.place[name][0]] = p.data.flatten()
            p.data, grad = (x[self.place[name][0]].view(p.shape) for x in (self.flat, self.grad))
            if p.dtype == master:
                p.grad = grad
            else:
                p.register_post_accumulate_grad_hook(functools.partial(add_and_clear, grad))
        self.mine = slice(rank * per_rank, (rank + 1) * per_rank)
        self.shard = torch.nn.Parameter(self.flat[self.mine].to(master))       # float32: the same memory
        self.shard.grad = torch.zeros_like(self.shard)
        self.parts = [self.shard, *(torch.nn.Parameter(p.detach().to_local()) for p in self.dealt.values())]
        self.adam = torch.optim.AdamW(self.parts, o.lr, (o.adam_beta1, o.adam_beta2),
                                      weight_decay=o.weight_decay)
        for part in self.parts:
            self.adam.state[part] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(part),
                                     "exp_avg_sq": torch.zeros_like(part)}

    def gather(self, shard):
        """The shards of all ranks as one flat vector."""
        if self.world == 1:
            return shard
        sent = wire(shard)
        whole = [torch.empty_like(sent) for _ in range(self.world)]
        dist.all_gather(whole, sent)
        return torch.cat(whole).to(shard.device)

    def step(self, lr):
        """One update from the gradient summed over ranks, then cleared; returns its norm before clipping."""
        if self.world > 1:
            received = torch.empty_like(wire(self.shard.grad))
            dist.reduce_scatter(received, list(wire(self.grad).chunk(self.world)))
            self.shard.grad.copy_(received)
        else:
            self.shard.grad.copy_(self.grad)
        self.grad.zero_()
        for part, p in zip(self.parts[1:], self.dealt.values(), strict=True):
            part.grad, p.grad = p.grad.to_local(), None
        exact = torch.float32 if self.grad.device.type == "mps" else torch.float64      # MPS has no float64
        square = sum(part.grad.to(exact).square().sum() for part in self.parts)
        if self.world > 1:
            all_reduce(square)
        norm = square.sqrt().item()
        if math.isfinite(norm):
            for part in self.parts:
                part.grad *= min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            if self.world > 1 or self.shard.dtype != self.flat.dtype:
                self.flat.copy_(self.gather(self.shard.detach().to(self.flat.dtype)))
        return norm

    def kept(self, kind):
        """Of each part, what a checkpoint keeps: the masters ("weight") or one of the moments."""
        return [part.detach() if kind == "weight" else self.adam.state[part][kind] for part in self.parts]

    def whole(self, kind):
        """One of KINDS as {name: tensor}, unsharded, on the CPU; {} but on rank 0. All ranks must call it."""
        mine, *parts = self.kept(kind)
        flat, found = self.gather(mine), {}
        for name, (at, shape) in self.place.items() if self.rank == 0 else ():
            found[name] = flat[at].view(shape).cpu().clone()
        for (name, p), part in zip(self.dealt.items(), parts, strict=True):
            part = DTensor.from_local(part, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            part = part.full_tensor()
            if self.rank == 0:
                found[name] = part.cpu()
        return found

    def state(self):
        """{kind/name: tensor}: masters and both moments, as whole() gives them."""
        return {f"{kind}/{name}": x for kind in KINDS for name, x in self.whole(kind).items()}

    def load(self, tensors, step):
        """Take up state() of any number of ranks."""
        for kind in KINDS:
            mine, *parts = self.kept(kind)
            flat = torch.zeros_like(self.flat, dtype=mine.dtype)
            for name, (at, _) in self.place.items():
                flat[at] = tensors[f"{kind}/{name}"].flatten().to(flat.device)
            mine.copy_(flat[self.mine])
            if kind == "weight":
                self.flat.copy_(flat)
            for (name, p), part in zip(self.dealt.items(), parts, strict=True):
                whole = tensors[f"{kind}/{name}"].to(part.device)
                part.copy_(distribute_tensor(whole, p.device_mesh, p.placements,
                                             src_data_rank=None).to_local())
        for part in self.parts:
            self.adam.state[part]["step"].fill_(step)


def add_and_clear(total, p):
    """A gradient of this backward, in the weight's own type, into the float32 sum over micro-batches."""
    total += p.grad
    p.grad = None
