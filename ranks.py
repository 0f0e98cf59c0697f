"""Several processes as one run: who is who under torchrun; AdamW, and on request the base, in shards.

Gradients are summed over ranks once per optimiser step, by hand, without a DDP wrapper. `--shard` puts the
frozen decoder layers, nine tenths of a 7B, under PyTorch's FSDP2. Tested with two ranks over gloo on a CPU,
as one node and as two; NCCL, and ranks that share a GPU, have not been run.
"""
import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import data
import lora


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


def from_rank_0(work, rank, world, sharded=None):
    """work() on rank 0, its result on every rank; a user's mistake there, which rank 0 says, ends them all.

    sharded: the language model of shard(), if work uses it. Rank 0 then runs any number of forwards, and for
    each of them the other ranks send a token of their own through: the layers' weights come from all ranks.
    """
    def forward_follows(*_):
        told_by_rank_0(1)
    result = [None, None]
    if rank == 0:
        hook = sharded.register_forward_pre_hook(forward_follows) if sharded else None
        try:
            result[0] = work()
        except (data.UserError, lora.AdapterError) as e:
            result[1] = e
        if sharded:
            hook.remove()
            told_by_rank_0(0)
    elif sharded:
        token = torch.zeros(1, 1, sharded.config.hidden_size, dtype=sharded.dtype, device=sharded.device)
        while told_by_rank_0():
            with torch.no_grad():
                sharded(inputs_embeds=token, use_cache=False)
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
    one whole model, a GPU never more than one whole layer.
    """
    if device.type not in ("cuda", "cpu"):
        raise data.UserError(f"--shard on {device.type}: PyTorch can do it on CUDA and on the CPU only")
    # a group of its own: PyTorch keeps a mesh's group for ever, and the main one must end before Python does
    mesh = DeviceMesh.from_group(dist.new_group(), device.type)
    for turn in range(dist.get_world_size()):
        if turn == int(os.environ["LOCAL_RANK"]):
            m = load()
            language, adapter = m.model.model.language_model, set(lora.lora_parameters(m.model).values())
            dealt = {p for layer in language.layers for p in layer.parameters()} - adapter
            for x in {*m.model.parameters(), *m.model.buffers()} - dealt:
                x.data = x.data.to(device)
            for layer in language.layers:
                fully_shard(layer, mesh=mesh, ignored_params=adapter, reshard_after_forward=True)
            fully_shard(language, mesh=mesh, ignored_params=set(language.parameters()))    # joins the layers
        dist.barrier()
    return m


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
    """AdamW over one flat vector of all LoRA weights; a rank owns a shard of its gradient and moments.

    reduce-scatter the gradient, step the shard, all-gather the weights: ZeRO-2 (arXiv 1910.02054, section 5).
    """
    def __init__(self, parameters, o, rank, world):
        self.world, self.clip, self.place, at = world, o.clip, {}, 0
        first = next(iter(parameters.values()))
        per_rank = -(-sum(p.numel() for p in parameters.values()) // world)           # rounded up
        self.flat, self.grad = (first.new_zeros(per_rank * world) for _ in range(2))
        for name, p in parameters.items():
            self.place[name], at = (slice(at, at + p.numel()), p.shape), at + p.numel()
            self.flat[self.place[name][0]] = p.data.flatten()
            p.data, p.grad = (x[self.place[name][0]].view(p.shape) for x in (self.flat, self.grad))
        self.mine = slice(rank * per_rank, (rank + 1) * per_rank)
        self.shard = torch.nn.Parameter(self.flat[self.mine])                      # the same memory
        self.shard.grad = torch.zeros_like(self.shard)
        self.adam = torch.optim.AdamW([self.shard], o.lr, (o.adam_beta1, o.adam_beta2),
                                      weight_decay=o.weight_decay)
        self.adam.state[self.shard] = self.moments = {
            "step": torch.tensor(0.0), "exp_avg": torch.zeros_like(self.flat[self.mine]),
            "exp_avg_sq": torch.zeros_like(self.flat[self.mine])}

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
        exact = torch.float32 if self.grad.device.type == "mps" else torch.float64      # MPS has no float64
        square = self.shard.grad.to(exact).square().sum()
        if self.world > 1:
            all_reduce(square)
        norm = square.sqrt().item()
        if math.isfinite(norm):
            self.shard.grad *= min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()
            if self.world > 1:
                self.flat.copy_(self.gather(self.shard.detach()))
        return norm

    def state(self):
        """{kind/name: tensor}, unsharded and named: weights and both moments. Every rank must call it."""
        whole = {"lora": self.flat, **{k: self.gather(self.moments[k]) for k in ("exp_avg", "exp_avg_sq")}}
        return {f"{kind}/{name}": vector[at].view(shape).cpu().clone()
                for kind, vector in whole.items() for name, (at, shape) in self.place.items()}

    def load(self, tensors, step):
        """Take up state() of any number of ranks."""
        for kind in ("lora", "exp_avg", "exp_avg_sq"):
            whole = torch.zeros_like(self.flat)
            for name, (at, _) in self.place.items():
                whole[at] = tensors[f"{kind}/{name}"].flatten().to(whole.device)
            if kind == "lora":
                self.flat.copy_(whole)
            else:
                self.moments[kind].copy_(whole[self.mine])
        self.moments["step"].fill_(step)
