"""The objectives of other papers, each in a few lines: f(policy, reference, beta, delta), as in losses.py.

`--loss NAME` takes each, alone or in a sum (`--loss dpo+vdpo`). r is beta * (policy - reference), with the
fields of losses.Logps: the rewards. Arguments behind delta have the paper's default (p), its official code's
(c), or ours (o), and are given by `--set loss_args=NAME=VALUE`.
tests/test_objectives.py compares each with TRL 1.16, with numbers of the official code, or with the formula.

Where these depart from papers and official codes:
1. ipo takes means over tokens, as TRL does (by agreement with the authors, it says); the paper has sums.
2. exo smooths as TRL does; its code uses e^-10 for both, unnormalised. sppo has hard labels; its code halves
   the sum. bco and mpo have no running mean of rewards, which their codes subtract; nor has TRL's bco_pair.
3. orpo and mpo imitate by the mean over a response's tokens; their codes take it over those of a batch.
4. simpo's gamma is the paper's; the code's gamma_beta_ratio is gamma / beta. The paper's betas are 2 to 10.
5. rpo's weight of SFT is 1 (p). For another, as in LLaVA-OneVision's recipes, say --loss dpo+0.5*sft.
6. realign's rejected image is what --image_rejected makes; the paper retrieves one.
7. chip is CHiP's loss with its cross-modal term, without those of tokens and segments. As its one margin
   compares images too, it skips a pair without an image.
8. vdpo is V-DPO's image term, from its code: dpo+vdpo is the loss (the code takes the mean of the two). The
   guidance by image in the paper's other term needs log-probabilities of single tokens.
9. symmpo and svco take a record's rejected response for one that is right for its rejected image. SymMPO's
   DPO term has a third response there; here it is the same one. Pairs without an image are refused.
10. hsa weighs the rejected response by meta.weight, which is 1 where a record has none, as in its code.
"""
if __name__ == "__main__":
    exit("A part of train_dpo.py; run: python train_dpo.py --help")

import math
from dataclasses import dataclass
from functools import wraps

from torch.nn.functional import logsigmoid

import losses


@dataclass
class Rewards:
    """beta * (policy - reference) of the fields that are read, and the margin between the two responses."""
    policy: losses.Logps
    reference: losses.Logps
    beta: float

    def __getattr__(self, field):
        return self.beta * (getattr(self.policy, field) - getattr(self.reference, field))

    @property
    def margin(self):
        return self.chosen - self.rejected


# ---- sums of what is in losses.py ----
OBJECTIVES = {
    "bco": losses.resolve("ancpo", anchors="wl"),                           # arXiv 2404.04656
    "rpo": losses.resolve("dpo+sft"),                                       # arXiv 2404.19733, Eq. 1
    "mpo": losses.resolve("0.8*dpo+0.2*ancpo+sft", anchors="wl"),           # arXiv 2411.10442; p
    "realign": losses.resolve("dpo+copo")}                                  # arXiv 2502.13146


def objective(formula):
    """Put a formula of Rewards, f(r), among the objectives, as a loss of policy and reference."""
    @wraps(formula)
    def loss(policy, reference, beta, delta, **more):
        return formula(Rewards(policy, reference, beta), **more)
    OBJECTIVES[formula.__name__] = loss
    return formula


# ---- the margin between two responses ----
@objective
def hinge(r):                                                               # arXiv 2305.10425, 2309.06657
    return (1 - r.margin).relu()


@objective
def ipo(r):                                                                 # arXiv 2310.12036, Eq. 17
    means = r.chosen / r.policy.chosen_tokens - r.rejected / r.policy.rejected_tokens
    return ((means - 0.5) / r.beta) ** 2


@objective
def cdpo(r, epsilon=0.1):                                                   # ericmitchell.ai/cdpo.pdf; o
    return -(1 - epsilon) * logsigmoid(r.margin) - epsilon * logsigmoid(-r.margin)


@objective
def robust(r, epsilon=0.1):                                                 # arXiv 2403.00409; o
    return cdpo(r, -epsilon / (1 - 2 * epsilon))     # 9/8 for it, -1/8 against


@objective
def exo(r, epsilon=1e-3):                                                   # arXiv 2402.00856, Eq. 16; o
    m = r.margin
    return (m.sigmoid() * (logsigmoid(m) - math.log1p(-epsilon))
            + (-m).sigmoid() * (logsigmoid(-m) - math.log(epsilon)))


@objective
def dpop(r, lam=50.0):                                                      # arXiv 2402.13228, Eq. 3; p
    return -logsigmoid(r.margin - lam * (-r.chosen).relu())


@objective
def r_dpo(r, alpha=0.01):                                                   # arXiv 2403.19159; o
    longer = r.policy.chosen_tokens - r.policy.rejected_tokens
    return -logsigmoid(r.margin + alpha * longer)


@objective
def hsa(r):                                                                 # arXiv 2404.14233
    return -logsigmoid(r.chosen - r.policy.weights * r.rejected)


# ---- each response by itself ----
@objective
def apo_zero(r):                                                            # arXiv 2408.06266, Eq. 7
    return (-r.chosen).sigmoid() + r.rejected.sigmoid()


@objective
def apo_down(r):                                                            # arXiv 2408.06266, Eq. 8
    return r.chosen.sigmoid() + (r.rejected - r.chosen).sigmoid()


@objective
def nca(r):                                                                 # arXiv 2402.05369
    return -logsigmoid(r.chosen) - 0.5 * (logsigmoid(-r.chosen) + logsigmoid(-r.rejected))


@objective
def sppo(r):                                                                # arXiv 2405.00675, Eq. 4.7
    return ((r.chosen - 0.5) / r.beta) ** 2 + ((r.rejected + 0.5) / r.beta) ** 2


# ---- no reference ----
@objective
def simpo(r, gamma=0.5):                                                    # arXiv 2405.14734, Eq. 6; c
    means = r.policy.chosen / r.policy.chosen_tokens - r.policy.rejected / r.policy.rejected_tokens
    return -logsigmoid(r.beta * means - gamma)


@objective
def orpo(r, lam=0.1):                                                       # arXiv 2403.07691, Eq. 6; p
    chosen, rejected = r.policy.chosen / r.policy.chosen_tokens, r.policy.rejected / r.policy.rejected_tokens
    odds = chosen.exp().logit() - rejected.exp().logit()
    return -chosen - lam * logsigmoid(odds)


# ---- two images ----
@objective
def chip(r):                                                                # arXiv 2501.16629
    return -logsigmoid(2 * r.chosen - r.rejected - r.image_rejected)


@objective
def vdpo(r):                                                                # arXiv 2411.02712
    return -logsigmoid(r.chosen - r.image_rejected.detach())


@objective
def symmpo(r, lam=0.5):                                                     # arXiv 2506.11712; c
    own, other = r.margin, r.rejected_image_rejected - r.image_rejected
    return (1e-4 * ((own - other) / r.beta) ** 2 - (1 + lam) * logsigmoid(own) - lam * logsigmoid(other)
            - logsigmoid(r.chosen) - logsigmoid(r.rejected_image_rejected))


@objective
def svco(r):                                                                # arXiv 2502.13928
    steps = (r.chosen - r.chosen_no_image, r.chosen_no_image - r.image_rejected,
             r.rejected_image_rejected - r.rejected_no_image, r.rejected_no_image - r.rejected)
    return -sum(map(logsigmoid, steps))


def resolve(name, **more):
    """losses.resolve of all of them; a name in losses.py goes before one here."""
    return losses.resolve(name, OBJECTIVES | losses.LOSSES, **more)
