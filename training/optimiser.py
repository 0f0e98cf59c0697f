"""ZeRO-2 (arXiv 1910.02054, section 5) by hand, around any torch optimiser that works element by element.

    optimiser = Zero2({name: weight}, partial(torch.optim.AdamW, lr=1e-4), ranks, clip=1.0)
    loss.backward()
    norm = optimiser.step(lr)

All that trains lies in one flat vector, of which each rank owns a slice: reduce-scatter the gradient, step
the slice, all-gather the weights. No DDP wrapper: gradients are summed over ranks once per optimiser step.
Part of train_dpo.py. Tested with two ranks over gloo on a CPU; NCCL has not been run.
"""
if __name__ == "__main__":
    raise SystemExit(print("A part of train_dpo.py; run: python train_dpo.py --help"))

import math
from functools import partial

import torch
import torch.distributed as dist

from data import UserError

WHOLE = ("Muon", "Adafactor", "LBFGS", "SparseAdam")         # need matrices, all weights, sparse gradients


class Zero2:
    """A torch optimiser whose float32 masters and state are sharded over the ranks.

    Of weights that shard.py has already split, a rank steps the part that it holds; FSDP2 sums its gradient.
    """
    def __init__(self, parameters, make, ranks, clip=0.0):
        """parameters: {name: weight}. make: [weight] -> torch.optim.Optimizer. clip: largest norm of the
        gradient, 0 for any. Raises UserError for an optimiser that does not work element by element."""
        kind = type(make([torch.nn.Parameter(torch.zeros(2, 2))])).__name__
        if kind in WHOLE:
            raise UserError(f"{kind} does not work element by element, and a rank has only a slice of the "
                            "weights: take AdamW, SGD, RMSprop, Adagrad or another that does")
        self.ranks = ranks
        self.clip = clip
        self.divided = {name: p for name, p in parameters.items() if hasattr(p, "to_local")}        # DTensors
        whole = {name: p for name, p in parameters.items() if name not in self.divided}
        self.shapes = {name: p.shape for name, p in whole.items()}
        first = next(iter(whole.values()))
        master = torch.promote_types(first.dtype, torch.float32)
        size = -(-sum(p.numel() for p in whole.values()) // ranks.world)             # of a slice, rounded up
        self.flat = first.new_zeros(size * ranks.world)
        self.grad = torch.zeros_like(self.flat, dtype=master)
        weights = self.views(self.flat)
        gradients = self.views(self.grad)
        for name, p in whole.items():
            weights[name].copy_(p.data)
            p.data = weights[name]
            if p.dtype == master:
                p.grad = gradients[name]
            else:
                p.register_post_accumulate_grad_hook(partial(add_and_clear, gradients[name]))
        self.own = slice(ranks.rank * size, (ranks.rank + 1) * size)
        self.mine = torch.nn.Parameter(self.flat[self.own].to(master))       # if float32, the weights' memory
        self.mine.grad = torch.zeros_like(self.mine)
        parts = [torch.nn.Parameter(p.detach().to_local()) for p in self.divided.values()]
        self.stepped = [self.mine, *parts]
        self.optimiser = make(self.stepped)

    def views(self, flat):
        """{name: its piece of a flat vector, in the weight's shape}."""
        found = {}
        at = 0
        for name, shape in self.shapes.items():
            found[name] = flat[at:at + shape.numel()].view(shape)
            at += shape.numel()
        return found

    def step(self, lr):
        """One update from the gradient summed over ranks, then cleared; returns its norm before clipping."""
        received = self.grad
        if self.ranks.world > 1:
            received = wire(self.mine.grad)
            dist.reduce_scatter_tensor(received, wire(self.grad))
        self.mine.grad.copy_(received)
        self.grad.zero_()
        for part, p in zip(self.stepped[1:], self.divided.values(), strict=True):
            part.grad = p.grad.to_local()
            p.grad = None
        norm = self.norm()
        if math.isfinite(norm):
            if self.clip:
                for part in self.stepped:
                    part.grad *= min(1.0, self.clip / (norm + 1e-6))
            for group in self.optimiser.param_groups:
                group["lr"] = lr
            self.optimiser.step()
            self.spread()
        return norm

    def norm(self):
        """The norm of the gradient of all ranks' parts."""
        exact = torch.float32 if self.grad.device.type == "mps" else torch.float64      # MPS has no float64
        square = sum(part.grad.to(exact).square().sum() for part in self.stepped)
        return math.sqrt(sum(self.ranks.gather(square.item())))

    def spread(self):
        """The masters of all ranks become the weights."""
        self.flat.copy_(self.gather(self.mine.detach().to(self.flat.dtype)))

    def gather(self, piece):
        """All ranks' slices as one flat vector."""
        if self.ranks.world == 1:
            return piece
        whole = wire(piece.new_empty(len(self.flat)))
        dist.all_gather_into_tensor(whole, wire(piece))
        return whole.to(piece.device)

    # ---- the checkpoint ----
    def held(self, part):
        """{kind: what this rank has of it}: the master ("weight"), and what the optimiser keeps."""
        return {"weight": part.detach(), **self.optimiser.state[part]}

    def state(self):
        """{kind/name: tensor} of masters and state, whole; {kind: tensor} for single numbers."""
        found = {}
        for kind, value in self.held(self.mine).items():
            if value is not None and value.ndim == 0:
                found[kind] = value
            elif value is not None:
                found |= {f"{kind}/{name}": x for name, x in self.whole(kind).items()}
        return found

    def whole(self, kind):
        """{name: tensor} of one kind, on the CPU; {} but on rank 0. All ranks must call it."""
        return {name: x.cpu().clone() for name, x in self.each(kind) if self.ranks.rank == 0}

    def each(self, kind):
        """(name, tensor) of one kind, whole on every rank, one after another."""
        mine, *parts = [self.held(part)[kind] for part in self.stepped]
        yield from self.views(self.gather(mine)).items()
        for (name, p), part in zip(self.divided.items(), parts, strict=True):
            like = torch.empty_like(p)
            like.to_local().copy_(part)
            yield name, like.full_tensor()

    def load(self, tensors):
        """Take up state() of any number of ranks."""
        for kind in {key.partition("/")[0] for key in tensors}:
            pieces = [tensors[kind]] * len(self.stepped) if kind in tensors else self.pieces(tensors, kind)
            for part, piece in zip(self.stepped, pieces, strict=True):
                if kind == "weight":
                    part.data.copy_(piece)
                else:
                    self.optimiser.state[part][kind] = piece.clone()
        self.spread()

    def pieces(self, tensors, kind):
        """The opposite of whole: for each of `stepped` its part of {kind/name: tensor}."""
        flat = torch.zeros_like(self.grad)
        for name, view in self.views(flat).items():
            view.copy_(tensors[f"{kind}/{name}"])
        found = [flat[self.own]]
        for name, p in self.divided.items():
            from torch.distributed.tensor import distribute_tensor
            there = tensors[f"{kind}/{name}"].to(p.device)
            found.append(distribute_tensor(there, p.device_mesh, p.placements, src_data_rank=None).to_local())
        return found


def add_and_clear(total, p):
    """A gradient of this backward, in the weight's own type, into the float32 sum over micro-batches."""
    total += p.grad
    p.grad = None


def wire(x):
    """A tensor on the device that the backend sends from: gloo's is the CPU, NCCL's the GPU."""
    return x.cpu() if dist.get_backend() == "gloo" else x.cuda()
