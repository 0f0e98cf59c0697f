"""Pieces of a decoder layer and of lm_head with a backward of their own: the same numbers, less memory moved.

autograd keeps and rewrites more than the mathematics asks for; beside the large products it is memory that a
step waits for. Each piece gives the bits of the code that it stands for, values and gradients; ChunkedLogps
gives them to rounding (tests/test_kernels.py).

    rotary          transformers' apply_rotary_pos_emb
    gated_mlp       the forward of a LLaMA's MLP
    Contiguous      of attention's tensors, forward and back
    ChunkedLogps    log_softmax over the vocabulary and the gather
"""
import sys
import types

import torch
import torch.nn.functional as F
from torch.autograd import Function


def install(model):
    """Put both into a model of transformers': rotary where all models of its kind look it up."""
    from transformers.activations import ACT2FN
    code, silu = sys.modules[type(model).__module__], type(ACT2FN["silu"])
    if hasattr(code, "apply_rotary_pos_emb"):
        code.apply_rotary_pos_emb = rotary
    for module in model.modules():
        if hasattr(module, "gate_proj") and isinstance(module.act_fn, silu):
            module.forward = types.MethodType(gated_mlp, module)


class Rotary(Function):
    """x cos + rotate_half(x) sin, without the rotated copy and half of the sums.

    The result lies head by head, however x does: attention's products want rows that follow one another.
    """
    @staticmethod
    def forward(ctx, x, cos, sin):                                     # (1, H, T, d), (1, 1, T, d) twice
        ctx.save_for_backward(cos, sin)
        out = torch.mul(x, cos, out=x.new_empty(x.shape))
        (first, second), (a, b), (s, t) = (y.chunk(2, -1) for y in (out, x, sin))
        first -= b * s
        second += a * t
        return out

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        out = grad * cos
        (first, second), (a, b), (s, t) = (y.chunk(2, -1) for y in (out, grad, sin))
        first += b * t
        second -= a * s
        return out, None, None


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    """transformers' apply_rotary_pos_emb."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)


class Contiguous(Function):
    """x.contiguous(), whose gradient is contiguous too."""
    @staticmethod
    def forward(ctx, x):
        return x.contiguous()

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


class SwiGLU(Function):
    """silu(gate) * up of (..., I); silu(gate) is made again in the backward, not kept."""
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(up)
        for g, u, y in blocks(gate, up, out):
            torch.mul(F.silu(g), u, out=y)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        for d, g, u, dg, du in blocks(grad, gate, up, to_gate, to_up):
            torch.mul(d, F.silu(g), out=du)
            torch.ops.aten.silu_backward.grad_input(d * u, g, grad_input=dg)
        return to_gate, to_up


def blocks(*tensors):
    """Their rows, on a CPU so many at once that what is made of them stays in a core's cache (256 KiB)."""
    rows = [x.reshape(-1, x.shape[-1]) for x in tensors]               # views, for what is dense
    n = 2 ** 18 // (rows[0].shape[1] * rows[0].element_size()) if rows[0].device.type == "cpu" else 0
    return zip(*(x.split(n or max(len(x), 1)) for x in rows), strict=True)


def gated_mlp(self, x):
    """The forward of transformers' LlamaMLP, and of those made like it."""
    return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


class ChunkedLogps(Function):
    """log p(target) of hidden states (N, D) under the frozen lm_head (V, D): never over chunk x V logits.

    The gradient is taken in the forward, with a chunk's probabilities at hand: d logp / dh = W[y] - p W.
    """
    @staticmethod
    def forward(ctx, hidden, weight, target, chunk):
        logps, gradients = [], []
        for h, y in zip(hidden.split(chunk), target.split(chunk), strict=True):
            logits = (h @ weight.T).to(torch.promote_types(h.dtype, torch.float32))             # (n, V)
            logps.append(logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(1))
            if ctx.needs_input_grad[0]:
                gradients.append(weight[y] - logits.softmax(1).to(weight.dtype) @ weight)       # (n, D)
        ctx.save_for_backward(torch.cat(gradients) if gradients else None)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        gradient, = ctx.saved_tensors
        return (grad[:, None] * gradient).to(gradient.dtype), None, None, None
