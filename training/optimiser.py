"""ZeRO-2 (arXiv 1910.02054, section 5) by hand, around any torch optimiser that works element by element.

    optimiser = Zero2({name: weight}, partial(torch.optim.AdamW, lr=1e-4), ranks, clip=1.0)
    loss.backward()
    norm = optimiser.step(lr)

All that trains lies in one flat vector, of which each rank owns a slice: reduce-scatter the gradient, step
the slice, all-gather the weights. No DDP wrapper: gradients are summed over ranks once per optimiser step.
Part of train_dpo.py. Tested with two ranks over gloo on a CPU; NCCL has not been run.
"""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

import math
from functools import partial

import torch
import torch.distributed as dist

from data import UserError

WHOLE = "Muon Adafactor LBFGS SparseAdam".split()            # need matrices, all weights, sparse gradients


class Zero2:
    """A torch optimiser whose float32 masters and state are sharded over the ranks.

    Of weights that shard.py has already split, a rank steps the part that it holds; FSDP2 sums its gradient.
    """
    def __init__(self, parameters, make, ranks, clip=0.0):
        """parameters: {name: weight}. make: [weight] -> torch.optim.Optimizer. clip: largest norm of the
        gradient, 0 for any. Raises UserError for an optimiser that does not work element by element."""
        matrix = torch.nn.Parameter(torch.zeros(2, 2))
        kind = type(make([matrix])).__name__
        if kind in WHOLE:
            raise UserError(f"{kind} does not work element by element, and a rank has only a slice of the "
                            "weights: take AdamW, SGD, RMSprop, Adagrad or another that does")
        self.ranks = ranks
        self.clip = clip
        # a DTensor, and the part of it that this rank holds and steps
        self.parts = {name: (p, torch.nn.Parameter(p.detach().to_local()))
                      for name, p in parameters.items() if hasattr(p, "to_local")}
        self.weights = {name: p for name, p in parameters.items() if name not in self.parts}
        first = next(iter(self.weights.values()))
        master = torch.promote_types(first.dtype, torch.float32)
        numbers = sum(p.numel() for p in self.weights.values())
        size = math.ceil(numbers / ranks.world)                              # of a slice
        self.flat = first.new_zeros(size * ranks.world)
        self.grad = torch.zeros_like(self.flat, dtype=master)
        places = self.views(self.flat)
        gradients = self.views(self.grad)
        for name, p in self.weights.items():
            places[name].copy_(p.data)
            p.data = places[name]
            if p.dtype == master:
                p.grad = gradients[name]
            else:
                p.register_post_accumulate_grad_hook(partial(add_and_clear, gradients[name]))
        self.mine = torch.nn.Parameter(self.own(self.flat).to(master))       # if float32, the weights' memory
        self.mine.grad = torch.zeros_like(self.mine)
        self.stepped = [self.mine, *(part for _, part in self.parts.values())]
        self.optimiser = make(self.stepped)

    def own(self, flat):
        """This rank's slice of a flat vector."""
        return flat.chunk(self.ranks.world)[self.ranks.rank]

    def views(self, flat):
        """{name: its piece of a flat vector, in the weight's shape}."""
        found = {}
        at = 0
        for name, p in self.weights.items():
            found[name] = flat[at:at + p.numel()].view(p.shape)
            at += p.numel()
        return found

    def step(self, lr):
        """One update from the gradient summed over ranks, then cleared; returns its norm before clipping."""
        received = self.grad
        if self.ranks.world > 1:
            received = wire(self.mine.grad)
            dist.reduce_scatter_tensor(received, wire(self.grad))
        self.mine.grad.copy_(received)
        self.grad.zero_()
        for p, part in self.parts.values():
            part.grad = p.grad.to_local()
            p.grad = None

        # ---- the norm of all ranks' parts, then the update ----
        exact = torch.float32 if self.grad.device.type == "mps" else torch.float64      # MPS has no float64
        square = sum(part.grad.to(exact).square().sum() for part in self.stepped).item()
        norm = math.sqrt(sum(self.ranks.gather(square)))
        if math.isfinite(norm):
            if self.clip:
                for part in self.stepped:
                    part.grad *= min(1.0, self.clip / (norm + 1e-6))
            for group in self.optimiser.param_groups:
                group["lr"] = lr
            self.optimiser.step()
            self.spread()
        return norm

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
        """{kind: this rank's part of it}: the master ("weight"), and the optimiser's state."""
        return {"weight": part.detach(), **self.optimiser.state[part]}

    def state(self):
        """{kind/name: tensor} of masters and state, whole; {kind: tensor} for single numbers."""
        found = {}
        for kind, value in self.held(self.mine).items():
            if value.ndim == 0:
                found[kind] = value
            else:
                found |= {f"{kind}/{name}": x for name, x in self.whole(kind).items()}
        return found

    def whole(self, kind):
        """{name: tensor} of one kind, on the CPU; {} but on rank 0. All ranks must call it."""
        return {name: x.cpu().clone() for name, x in self.each(kind) if self.ranks.rank == 0}

    def each(self, kind):
        """(name, tensor) of one kind, whole on every rank, one after another."""
        whole = self.gather(self.held(self.mine)[kind])
        yield from self.views(whole).items()
        for name, (p, part) in self.parts.items():
            like = torch.empty_like(p)
            like.to_local().copy_(self.held(part)[kind])
            yield name, like.full_tensor()

    def load(self, tensors):
        """Take up state() of any number of ranks."""
        for kind in {key.partition("/")[0] for key in tensors}:
            for part, piece in zip(self.stepped, self.pieces(tensors, kind), strict=True):
                if kind == "weight":
                    part.data.copy_(piece)
                else:
                    self.optimiser.state[part][kind] = piece.to(part.device, copy=True)
        self.spread()

    def pieces(self, tensors, kind):
        """The opposite of whole: for each of `stepped` its part of {kind/name: tensor}."""
        if kind in tensors:                                                          # one number for all
            return [tensors[kind]] * len(self.stepped)
        flat = torch.zeros_like(self.grad)
        for name, view in self.views(flat).items():
            view.copy_(tensors[f"{kind}/{name}"])
        found = [self.own(flat)]
        for name, (p, _) in self.parts.items():
            from torch.distributed.tensor import distribute_tensor
            whole = tensors[f"{kind}/{name}"].to(p.device)
            divided = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)
            found.append(divided.to_local())
        return found


def add_and_clear(total, p):
    """A gradient of this backward, in the weight's own type, into the float32 sum over micro-batches."""
    total += p.grad
    p.grad = None


def wire(x):
    """A tensor on the device that the backend sends from: gloo's is the CPU, NCCL's the GPU."""
    return x.cpu() if dist.get_backend() == "gloo" else x.cuda()
