"""Pieces of a decoder layer and of lm_head with a backward of their own: the same numbers, less memory moved.

autograd keeps and rewrites more than the mathematics asks for; beside the large products it is memory that a
step waits for. Each piece gives the bits of the code that it stands for, values and gradients; ChunkedLogps
and Attention give them to rounding (tests/test_kernels.py).

    rotary          transformers' apply_rotary_pos_emb
    decoder_layer   the forward of a LLaMA's layer, with RMSNorm
    gated_mlp       that of its MLP, with SwiGLU, which keeps three tensors where autograd keeps four
    contiguous      of attention's tensors, forward and back
    attend          causal attention: torch's own, or on a CPU, for hundreds of tokens of wide heads,
                    Attention: torch's backward runs there at little more than a third of the products' rate
    ChunkedLogps    log_softmax over the vocabulary and the gather
"""
import sys
import types

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.nn.attention.bias import causal_lower_right

QUERIES = 128                                           # of a block of Attention
SPAN, WIDTH = range(256, 1025), 128                     # keys for which it pays, and least width of a head
LARGE, CACHED = 2 ** 20, 2 ** 18                        # bytes: what a core's cache holds; of a piece
LIKE_LLAMA = ("llama", "mistral", "qwen2")             # transformers has the same layer for all of them


def install(model):
    """Put them into a language model of transformers'; one that is not known is left as it comes.

    rotary goes where transformers looks it up, for all models of this kind.
    """
    from transformers.activations import ACT2FN
    kind, silu = model.config.model_type, type(ACT2FN["silu"])
    if kind in (*LIKE_LLAMA, "phi"):
        sys.modules[type(model).__module__].apply_rotary_pos_emb = rotary
    for layer in model.layers if kind in LIKE_LLAMA else ():
        layer.forward = types.MethodType(decoder_layer, layer)
        if isinstance(layer.mlp.act_fn, silu):
            layer.mlp.forward = types.MethodType(gated_mlp, layer.mlp)


def blocks(*tensors, dim=0):
    """Their pieces along `dim`: of large ones on a CPU such that what is made of them stays in the cache."""
    first = tensors[0]
    if first.device.type != "cpu" or first.nbytes <= LARGE:
        return [tensors]
    n = max(CACHED * first.shape[dim] // first.nbytes, 1)
    return zip(*(x.split(n, dim) for x in tensors), strict=True)


def rows(*tensors):
    return (x.reshape(-1, x.shape[-1]) for x in tensors)               # of what new_empty made, views


class Rotary(Function):
    """x cos + rotate_half(x) sin, without the rotated copy and half of the sums.

    On a CPU the result lies head by head, for attention's products; its gradient token by token, for q_proj.
    """
    @staticmethod
    def forward(ctx, x, cos, sin):                                     # (1, H, T, d), (1, 1, T, d) twice
        ctx.save_for_backward(cos, sin)
        out = x.new_empty(x.shape) if x.device.type == "cpu" else torch.empty_like(x)
        for y, part, c, angle in blocks(out, x, cos, sin, dim=2):
            torch.mul(part, c, out=y)
            (first, second), (a, b), (s, t) = (z.chunk(2, -1) for z in (y, part, angle))
            first -= b * s
            second += a * t
        return out

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        out = torch.empty_like(grad.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        for y, part, c, angle in blocks(out, grad, cos, sin, dim=2):
            torch.mul(part, c, out=y)
            (first, second), (a, b), (s, t) = (z.chunk(2, -1) for z in (y, part, angle))
            first += b * t
            second -= a * s
        return out, None, None


def rotary(q, k, cos, sin):
    """transformers' apply_rotary_pos_emb of q (B, H, T, d), k (B, G, T, d), cos and sin (B, T, d)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)


def contiguous(x):
    """x, on a CPU row after row, its gradient too: products of rows that lie far apart are a fifth slower."""
    return Contiguous.apply(x) if x.device.type == "cpu" and x.nbytes > LARGE else x


class Contiguous(Function):
    @staticmethod
    def forward(ctx, x):
        return x.contiguous()

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous()


def attend(q, k, v, scale):
    """softmax(scale q k^T) v of q (1, H, T, d), k and v (1, G, S, d), T <= S, H a multiple of G.

    The last query sees all S keys, each one before it one key less: causal from the lower right corner.
    """
    queries, keys, gqa = q.shape[2], k.shape[2], q.shape[1] != k.shape[1]
    pays = q.device.type == "cpu" and q.element_size() > 2 and keys in SPAN and q.shape[3] >= WIDTH
    if pays and not gqa and q.requires_grad and torch.is_grad_enabled():
        return Attention.apply(q, k, v, scale)
    mask = {"attn_mask": causal_lower_right(queries, keys)} if queries < keys else {"is_causal": True}
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa, **mask)


class Attention(Function):
    """attend() on a CPU, with H T S probabilities kept; measured on one and two threads.

    A block of queries skips the keys that none of it sees; a head's block stays in a core's cache.
    """
    @staticmethod
    def forward(ctx, q, k, v, scale):
        q, k, v = (q * scale)[0].contiguous(), k[0], v[0]
        out, kept = torch.empty_like(q), []
        ahead = q.new_full((QUERIES, QUERIES), -torch.inf).triu(1)
        for h, t, end, keys in Attention.blocks(q, k):
            scores = q[h, t:end] @ k[h, :keys].T
            scores[:, t - end:] += ahead[:end - t, :end - t]
            kept.append(scores.softmax(1))
            torch.mm(kept[-1], v[h, :keys], out=out[h, t:end])
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.scale = scale
        return out[None]

    @staticmethod
    def backward(ctx, grad):
        (q, k, v, out, *kept), grad = ctx.saved_tensors, grad[0]
        to_q, to_k, to_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        mean = (grad * out).sum(2, keepdim=True)
        for (h, t, end, keys), p in zip(Attention.blocks(q, k), kept, strict=True):
            to_v[h, :keys].addmm_(p.T, grad[h, t:end])
            to_scores = torch.addmm(mean[h, t:end], grad[h, t:end], v[h, :keys].T, beta=-1).mul_(p)
            torch.mm(to_scores, k[h, :keys], out=to_q[h, t:end])
            to_k[h, :keys].addmm_(to_scores.T, q[h, t:end])
        return to_q.mul_(ctx.scale)[None], to_k[None], to_v[None], None

    @staticmethod
    def blocks(q, k):
        """(head, first query, the one behind the last, keys that the last sees)."""
        (heads, queries, _), before = q.shape, k.shape[1] - q.shape[1]
        ends = [(t, min(t + QUERIES, queries)) for t in range(0, queries, QUERIES)]
        return [(h, t, end, before + end) for h in range(heads) for t, end in ends]


class SwiGLU(Function):
    """silu(gate) * up of (..., I); silu(gate) is made again in the backward, not kept."""
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        out = up.new_empty(up.shape)
        for g, u, y in blocks(*rows(gate, up, out)):
            torch.mul(F.silu(g), u, out=y)
        return out

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        to_gate, to_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
        for d, g, u, dg, du in blocks(*rows(grad, gate, up, to_gate, to_up)):
            torch.mul(d, F.silu(g), out=du)
            torch.ops.aten.silu_backward.grad_input(d * u, g, grad_input=dg)
        return to_gate, to_up


def gated_mlp(self, x):
    """The forward of transformers' LlamaMLP, and of those made like it."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    return self.down_proj(SwiGLU.apply(gate, up) if up.nbytes > LARGE else self.act_fn(gate) * up)


class RMSNorm(Function):
    """x and x / sqrt(mean(x^2) + eps) * weight of x (..., D) in float32, under a frozen weight.

    x comes out again for the residual, so that its three gradients are summed where they are made.
    """
    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = x.new_empty(x.shape), x.new_empty(*x.shape[:-1], 1)
        for a, y, s in blocks(*rows(x, out, scale)):
            torch.rsqrt(a.pow(2).mean(-1, keepdim=True) + eps, out=s)
            torch.mul(a, s, out=y).mul_(weight)
        ctx.save_for_backward(x, weight, scale)
        return x, out

    @staticmethod
    def backward(ctx, grad_x, grad):
        x, weight, scale = ctx.saved_tensors
        out = x.new_empty(x.shape)
        for a, s, r, g, y in blocks(*rows(x, scale, grad_x, grad, out)):
            g = g * weight
            to_scale = (g * a).sum(-1, keepdim=True)
            to_square = to_scale * -0.5 * s.pow(3) / a.shape[-1]
            torch.add(r, g * s, out=y).add_(to_square * (a * 2))
        return out, None, None


def norm(self, x):
    """x and transformers' LlamaRMSNorm of it."""
    if x.dtype != torch.float32 or self.weight.requires_grad or x.nbytes <= LARGE:
        return x, self(x)
    return RMSNorm.apply(x, self.weight, self.variance_epsilon)


def decoder_layer(self, hidden_states, **more):
    """The forward of transformers' LlamaDecoderLayer, and of those made like it."""
    x, normed = norm(self.input_layernorm, hidden_states)
    attended, _ = self.self_attn(hidden_states=normed, **more)
    x, normed = norm(self.post_attention_layernorm, x + attended)
    return x + self.mlp(normed)


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
