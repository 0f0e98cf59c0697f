"""The losses: pure functions of log-probabilities. This is the file to change.

A loss of your own is a function, one line in LOSSES below, and `python train_dpo.py --loss mine`:

    def mine(policy, reference, beta, delta):                              # -> (B,), one value a pair
        margin = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
        return (1 - beta * margin).clamp(min=0)                            # a hinge, not a log-sigmoid

What it does not read is not computed: without `image_rejected` the model never sees the second image. Names
joined by + are summed, with weights if they have some (`--loss 0.8*dpo+0.2*mine`). Arguments behind delta are
given by `--set loss_args=NAME=VALUE`, one named `anchors` by `--anchors`. The objectives of other papers are
in training/objectives.py, under names that --loss takes too.
Of a pair without an image the policy's `image_rejected` is -inf, so that a log-sigmoid, or a hinge, of the
margin over it is 0: such a term skips the pair.

    here              papers    what it is
    chosen            y_w       the preferred response
    rejected          y_l       the other one
    image             m_w       the image that the question q is about
    image_rejected    m_l       another image. The FIELD of this name is log π(y_w | m_l, q): the chosen
                                response's log-probability when m_l replaces its own image
    policy            π_θ       the model in training
    reference         π_ref     the same model with its adapter switched off
    beta, delta       β, δ      strength of the reward, height of the anchor
    reward            r         beta * (policy - reference)

Log-probabilities are SUMS over a response's tokens, its end-of-sequence token included, in float32.
DPO is arXiv 2305.18290; mDPO, the sum of DPO, CoPO and AncPO, is arXiv 2406.11839, whose equations have no
numbers: section 3.1 is CoPO, 3.2 is AncPO and the sum.
Where this departs from the papers and from the official mDPO code:
1. AncPO has the paper's delta; the official code has none (delta 0, the default here, is the same).
2. AncPO can anchor y_l and m_l too, as in the paper's ablation (`anchors="wl"`, `"wlm"`); the official code
   anchors y_w alone, which is the default.
3. Each term is a function of its own, and any sum of them can be trained on (`dpo+copo`).
4. `sft` is in neither paper: it is the plainest baseline, imitating the chosen response.
"""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

import difflib
import inspect
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Logps:
    """What a loss sees of one model, each (B,). A field that the loss does not read is None."""
    chosen: torch.Tensor = None              # log π(y_w | m_w, q)
    rejected: torch.Tensor = None            # log π(y_l | m_w, q)
    image_rejected: torch.Tensor = None      # log π(y_w | m_l, q)
    chosen_tokens: torch.Tensor = None       # |y_w|, tokens that were summed
    rejected_tokens: torch.Tensor = None     # |y_l|
    rejected_image_rejected: torch.Tensor = None    # log π(y_l | m_l, q)
    chosen_no_image: torch.Tensor = None     # log π(y_w | q)
    rejected_no_image: torch.Tensor = None   # log π(y_l | q)
    weights: torch.Tensor = None             # the record's meta.weight


def response_logps(logits, labels):
    """Each row's summed log-probability of its labels: (R, T, V), (R, T) -> (R,). Label -100: skipped."""
    logits, labels = logits[:, :-1], labels[:, 1:]                         # position t predicts token t + 1
    mask = labels != -100                                                  # (R, T - 1)
    logps = token_logps(logits[mask], labels[mask])                        # (N,): of responses only
    return logps.new_zeros(mask.shape).masked_scatter(mask, logps).sum(-1)                      # (R,)


def token_logps(logits, tokens):
    """The log-probability of each token: (N, V), (N,) -> (N,)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))   # float64 stays float64
    return logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)


def dpo(policy, reference, beta, delta=0.0):
    """Prefer the chosen to the rejected response."""
    margin = (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected)
    return -logsigmoid(beta * margin)                                      # arXiv 2305.18290, Eq. 7


def copo(policy, reference, beta, delta=0.0):
    """Prefer the chosen response with its own image to the same response with the rejected image."""
    margin = (policy.chosen - policy.image_rejected) - (reference.chosen - reference.image_rejected)
    return -logsigmoid(beta * margin)                                      # arXiv 2406.11839, §3.1


def ancpo(policy, reference, beta, delta=0.0, anchors="w"):
    """Hold the reward of y_w above delta and, if asked, those of y_l ("l") and of m_l ("m") below it."""
    if not anchors or set(anchors) - set("wlm"):
        raise ValueError(f"anchors {anchors!r} is not made of the letters w, l and m: give w, wl or wlm.")
    loss = 0.0
    if "w" in anchors:
        loss -= logsigmoid(beta * (policy.chosen - reference.chosen) - delta)  # arXiv 2406.11839, §3.2
    if "l" in anchors:
        loss -= logsigmoid(delta - beta * (policy.rejected - reference.rejected))
    if "m" in anchors:
        loss -= logsigmoid(delta - beta * (policy.image_rejected - reference.image_rejected))
    return loss


def mdpo(policy, reference, beta, delta=0.0, anchors="w"):                 # arXiv 2406.11839, §3.2
    return (dpo(policy, reference, beta, delta) + copo(policy, reference, beta, delta)
            + ancpo(policy, reference, beta, delta, anchors))


def sft(policy, reference, beta, delta=0.0):
    """Imitate the chosen response: minus its mean log-probability per token."""
    return -policy.chosen / policy.chosen_tokens


LOSSES = {"dpo": dpo, "copo": copo, "ancpo": ancpo, "mdpo": mdpo, "sft": sft}


def resolve(name, known=LOSSES, **more):
    """The weighted sum that `0.8*dpo+copo` names, f(policy, reference, beta, delta).

    more: `anchors`, for AncPO, and further arguments, for the terms that have them. Raises ValueError.
    """
    terms, unread = [], {*more} - {"anchors"}
    for part in name.split("+"):
        weight, _, term = part.rpartition("*")
        if term not in known:
            near = difflib.get_close_matches(term, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"loss {term!r} is not in losses.py{hint}: give a sum (+) of "
                             f"{', '.join(known)}.")
        parameters = inspect.signature(known[term]).parameters.values()
        taken = {one.name for one in parameters if one.default is not one.empty} - {"beta", "delta"}
        given = {key: more[key] for key in taken if key in more}
        terms.append((float(weight or 1), partial(known[term], **given)))
        unread -= taken
    if unread:
        raise ValueError(f"it has no argument {', '.join(unread)} for loss_args.")

    def total(*numbers):
        return sum(weight * term(*numbers) for weight, term in terms)
    return total


# Two pairs of made-up numbers, in which no two fields are alike: log-probs below 0, the others above.
numbers = torch.arange(3.0, 21.0).view(9, 2)
EXAMPLE = Logps(*-numbers[:3], *numbers[3:5], *-numbers[5:8], numbers[8])


class Noting(dict):
    """EXAMPLE, which notes what is read of it: {field: numbers}."""
    def __getattr__(self, name):
        if name not in vars(EXAMPLE):
            raise ValueError(f"it reads the field {name!r}: give one of {', '.join(vars(EXAMPLE))}.")
        return self.setdefault(name, getattr(EXAMPLE, name).clone().requires_grad_())


def tried(loss, beta=0.1, delta=0.0):
    """A loss before training, when policy and reference agree, on two pairs.

    -> ({field that is read of the policy: its numbers}, the same of the reference, the losses (2,)); the
    numbers' `grad` are the losses' gradients. Raises ValueError for a loss that reads another field, or that
    gives no (B,) of finite numbers with a gradient.
    """
    policy, reference = Noting(), Noting()
    value = loss(policy, reference, beta, delta)
    shape = getattr(value, "shape", type(value).__name__)
    if shape != (2,):
        raise ValueError(f"it gives {shape} for two pairs: return one value a pair, of shape (B,).")
    if not value.isfinite().all() or not value.requires_grad:
        raise ValueError("its values for two pairs are not finite, or have no gradient: use policy's fields.")
    value.sum().backward()
    return policy, reference, value.detach()


def needs(loss):
    """The fields of Logps that a loss reads, of the policy or the reference. Raises ValueError as `tried`."""
    policy, reference, _ = tried(loss)
    return {*policy, *reference}


def rewards(policy, reference, beta):
    """r = beta * (policy - reference) of chosen, rejected, image_rejected, each (B,) or None: for the log."""
    found = []
    for name in ("chosen", "rejected", "image_rejected"):
        ours, theirs = getattr(policy, name), getattr(reference, name)
        found.append(None if ours is None or theirs is None else beta * (ours - theirs).detach())
    return tuple(found)
