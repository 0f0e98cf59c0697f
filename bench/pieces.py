"""What each piece of kernels.py saves, beside the code that it stands for: forward and backward, in turns.

    python bench/pieces.py                                   a minute
    python bench/pieces.py --device cuda --dtype bfloat16    on a GPU

Sizes are those of a micro-batch of two pairs of the shape (bench/limit.py). The code on the other side is
transformers' or torch's.
"""
import sys

import torch
import torch.nn.functional as F
from limit import middle, pin, rounds, transformers_quietly
from section import ROOT, SHAPES, arguments, command, heading, machine, report

sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402

TIMES = 5                          # a measured side runs its piece so often


def pieces(shape, kind):
    """{name: (theirs, ours, tensors that get a gradient, as a function of them)}, one result each."""
    from torch.nn.attention.bias import causal_lower_right
    from transformers.models.llama import modeling_llama as llama
    turn, scale = llama.apply_rotary_pos_emb, (shape.hidden // shape.heads) ** -0.5
    image = (shape.pixels // 14) ** 2
    whole, back = image + shape.question + shape.response, shape.response
    T, d = 2 * (whole + back), shape.hidden // shape.heads

    def draw(*size, trains=True):
        return torch.randn(*size, **kind).requires_grad_(trains)

    def heads(tokens):                                # as q_proj leaves them: token by token
        return draw(1, tokens, shape.heads, d, trains=False).transpose(1, 2).requires_grad_()

    def theirs_attend(q, k, v):
        n, m = q.shape[2], k.shape[2]
        mask = {"is_causal": True} if n == m else {"attn_mask": causal_lower_right(n, m)}
        return F.scaled_dot_product_attention(q, k, v, scale=scale, **mask)

    def ours_attend(q, k, v):
        return kernels.contiguous(kernels.attend(*map(kernels.contiguous, (q, k, v)), scale=scale))
    cos, sin = (draw(1, T, d, trains=False) for _ in range(2))
    norm = llama.LlamaRMSNorm(shape.hidden).to(**kind).requires_grad_(False)
    head = draw(shape.vocabulary, shape.hidden, trains=False)
    target = torch.randint(shape.vocabulary, (4 * back,), device=kind["device"])

    def theirs_logps(h):
        return (h @ head.T).float().log_softmax(1).gather(1, target[:, None])[:, 0]
    return {
        "rotary, q and k": (lambda q, k: sum(turn(q, k, cos, sin)),
                            lambda q, k: sum(kernels.rotary(q, k, cos, sin)), (heads(T), heads(T))),
        "RMSNorm and its residual": (lambda x: x + norm(x), lambda x: sum(kernels.norm(norm, x)),
                                     (draw(1, T, shape.hidden),)),
        "SwiGLU": (lambda gate, up: F.silu(gate) * up, kernels.SwiGLU.apply,
                   (draw(1, T, shape.inner), draw(1, T, shape.inner))),
        f"attention of {whole} tokens": (theirs_attend, ours_attend, tuple(heads(whole) for _ in range(3))),
        f"attention of {back} to {whole}": (theirs_attend, ours_attend,
                                            (heads(back), heads(whole), heads(whole))),
        "log-probs of responses": (theirs_logps,
                                   lambda h: kernels.ChunkedLogps.apply(h, head, target, 1024),
                                   (draw(4 * back, shape.hidden),)),
    }


def side(function, tensors, found):
    """A function that runs a piece forward and backward; what the last time gave is left in `found`."""
    up = torch.ones_like(function(*tensors))

    def run():
        for _ in range(TIMES):
            out = function(*tensors)
            found[:] = [out.detach(), *torch.autograd.grad(out, tensors, up)]
    return run


def measure(o):
    """{piece: {"theirs": ms, "ours": ms, "ratio": (median, least, most), "difference": the largest}}."""
    transformers_quietly()
    torch.manual_seed(0)
    kind, found = {"device": o.device, "dtype": getattr(torch, o.dtype)}, {}
    for name, (theirs, ours, tensors) in pieces(SHAPES[o.shape], kind).items():
        one, other = [], []
        taken = rounds({"theirs": side(theirs, tensors, one), "ours": side(ours, tensors, other)}, o.rounds,
                       o.device)
        found[name] = {who: 1000 * middle(seconds)[0] / TIMES for who, seconds in taken.items()}
        found[name] |= {"ratio": middle([a / b for a, b in zip(*taken.values(), strict=True)]),
                        "difference": max(((a - b).abs().max() / a.abs().max()).item()
                                          for a, b in zip(one, other, strict=True))}
    return found


def main():
    o = arguments(__doc__, 9).parse_args()
    threads, about = pin(o.threads, o.core) if o.device == "cpu" else o.device, machine(o.device)
    found = measure(o)
    lines = heading("Pieces of a layer, beside what they stand for", about, command())
    lines += [f"Shape {o.shape}, two pairs, {o.dtype}, {threads}, forward and back; medians of {o.rounds} "
              "interleaved rounds (least, most).\n",
              "| piece | theirs, ms | ours, ms | times their speed | largest relative difference |",
              "|---|---|---|---|---|"]
    for name, row in found.items():
        ratio, least, most = row["ratio"]
        lines.append(f"| {name} | {row['theirs']:.1f} | {row['ours']:.1f} | {ratio:.2f} ({least:.2f}, "
                     f"{most:.2f}) | {row['difference']:.0e} |")
    report(lines, {"pieces": found, **about}, o)


if __name__ == "__main__":
    main()
