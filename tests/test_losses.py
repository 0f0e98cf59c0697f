"""The losses as specification: worked values, the official code's numbers (golden), TRL's own code."""
import json
import math
import re
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN
from torch.testing import assert_close

import losses
from losses import Logps, ancpo, copo, dpo, mdpo, needs, resolve, response_logps, rewards, sft

LN2 = math.log(2)
FIELDS = ("chosen", "rejected", "image_rejected")


def numbers(seed=0, n=6, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return Logps(*(-20 * torch.rand(n, generator=g, dtype=dtype) - 1 for _ in FIELDS),
                 *(torch.randint(1, 30, (n,), generator=g) for _ in range(2)))


# ---- values that a hand can check

def test_dpo_at_init_is_ln2():
    policy = numbers()
    assert_close(dpo(policy, policy, 0.1), torch.full((6,), LN2, dtype=torch.float64))


def test_mdpo_at_init_is_three_ln2():
    policy = numbers()
    assert_close(mdpo(policy, policy, 0.1, 0.0), torch.full((6,), 3 * LN2, dtype=torch.float64))


def test_mdpo_is_dpo_and_copo_and_ancpo():
    policy, reference = numbers(1), numbers(2)
    parts = dpo(policy, reference, 0.3) + copo(policy, reference, 0.3) + ancpo(policy, reference, 0.3, 0.2)
    assert_close(mdpo(policy, reference, 0.3, 0.2), parts)
    assert_close(resolve("dpo+copo+ancpo")(policy, reference, 0.3, 0.2), parts)


def test_one_pair_by_hand():
    """Chosen gained 2 nats, rejected lost 1, image_rejected gained 0.5; beta 0.5: rewards 1, -0.5, 0.25."""
    policy = Logps(*torch.tensor([[-8.0], [-11.0], [-9.5]], dtype=torch.float64))
    reference = Logps(*torch.tensor([[-10.0], [-10.0], [-10.0]], dtype=torch.float64))

    def minus_log_sigmoid(z):
        return math.log1p(math.exp(-z))
    assert rewards(policy, reference, 0.5) == (1.0, -0.5, 0.25)
    assert dpo(policy, reference, 0.5).item() == pytest.approx(minus_log_sigmoid(1.5))
    assert copo(policy, reference, 0.5).item() == pytest.approx(minus_log_sigmoid(0.75))
    assert ancpo(policy, reference, 0.5, 0.3).item() == pytest.approx(minus_log_sigmoid(1 - 0.3))
    assert ancpo(policy, reference, 0.5, 0.3, anchors="wlm").item() == pytest.approx(
        minus_log_sigmoid(1 - 0.3) + minus_log_sigmoid(0.3 + 0.5) + minus_log_sigmoid(0.3 - 0.25))


def test_sft_is_minus_the_mean_log_probability_of_a_chosen_token():
    policy = numbers()
    assert_close(sft(policy, None, 0.1), -policy.chosen / policy.chosen_tokens)


@pytest.mark.parametrize("name", ["dpo", "copo", "ancpo", "mdpo", "sft", "dpo+copo"])
def test_every_loss_pushes_the_chosen_response_up_and_the_others_down(name):
    policy = numbers(1)
    for field in FIELDS:
        getattr(policy, field).requires_grad_()
    resolve(name, anchors="wlm")(policy, numbers(2), 0.1, 0.0).sum().backward()
    assert (policy.chosen.grad < 0).all()
    for other in (policy.rejected, policy.image_rejected):
        assert other.grad is None or (other.grad > 0).all()


@pytest.mark.parametrize("gap", [2250.0, -2250.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_and_gradients_are_finite_however_far_the_policy_went(gap, dtype):
    zero = torch.zeros(1, dtype=dtype)
    policy = Logps(*((zero + g).requires_grad_() for g in (gap, -gap, -gap)), zero + 1, zero + 1)
    loss = mdpo(policy, Logps(zero, zero, zero), 1.0, 0.0, anchors="wlm")
    loss.sum().backward()
    assert loss.isfinite().all() and all(getattr(policy, field).grad.isfinite().all() for field in FIELDS)


# ---- the gather

def test_logps_are_summed_not_averaged():
    logits = torch.zeros(2, 6, 4)                                   # every token has probability 1/4
    labels = torch.tensor([[-100, 1, 2, -100, -100, -100], [-100, 1, 2, 3, 0, -100]])
    assert_close(response_logps(logits, labels), torch.tensor([-2.0, -4.0]) * math.log(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_response_logps_is_log_softmax_and_is_minus_the_summed_cross_entropy(dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, 9, 11)).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (3, 9)).masked_fill(torch.rand(3, 9) < 0.4, -100)
    ours = response_logps(logits, labels)
    wide = logits.to(ours.dtype)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    targets = labels[:, 1:]
    gathered = wide.log_softmax(-1)[:, :-1].gather(2, targets.clamp(min=0)[..., None]).squeeze(-1)
    assert_close(ours, (gathered * (targets != -100)).sum(-1))
    for row in range(3):
        assert_close(ours[row], -F.cross_entropy(wide[row, :-1], targets[row], reduction="sum"))
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=ours.dtype)
    entropy = -F.cross_entropy(wide[:, :-1].transpose(1, 2), targets, reduction="none").sum(-1)
    mine, = torch.autograd.grad((ours * weights).sum(), logits, retain_graph=True)
    its, = torch.autograd.grad((entropy * weights).sum(), logits)
    assert_close(mine, its)


def test_only_the_positions_before_labels_count():
    """The first label has nothing before it; what other positions hold does not matter, infinities or not."""
    torch.manual_seed(0)
    logits = torch.randn(1, 5, 7)
    labels = torch.tensor([[3, -100, 2, 5, -100]])
    expected = logits[0, 1].log_softmax(-1)[2] + logits[0, 2].log_softmax(-1)[5]
    logits[0, [0, 3, 4]] = -torch.inf
    assert_close(response_logps(logits, labels), expected[None])
    assert response_logps(logits, torch.full((1, 5), -100)) == 0


# ---- names, and the fields computed for them

def test_needs_names_what_a_loss_reads():
    assert needs(dpo) == {"chosen", "rejected"}
    assert needs(copo) == {"chosen", "image_rejected"}
    assert needs(sft) == {"chosen", "chosen_tokens"}
    assert needs(resolve("ancpo")) == {"chosen"}
    assert needs(resolve("ancpo", anchors="wl")) == {"chosen", "rejected"}
    assert needs(resolve("dpo+ancpo", anchors="wlm")) == set(FIELDS) == needs(resolve("mdpo"))


def test_the_reference_counts_as_reading():
    assert needs(lambda policy, reference, *_: policy.chosen - reference.image_rejected) == {
        "chosen", "image_rejected"}


@pytest.mark.parametrize("loss, said", [
    (lambda policy, reference, *_: policy.chosne, "reads the field 'chosne': give one of chosen, rejected"),
    (lambda policy, reference, *_: policy.chosen.mean(), r"gives torch.Size\(\[\]\) for two pairs"),
    (lambda policy, reference, *_: 1.0, "gives float for two pairs"),
    (lambda policy, reference, *_: policy.chosen.detach(), "have no gradient"),
    (lambda policy, reference, *_: policy.chosen.log(), "are not finite")])
def test_a_loss_that_cannot_train_is_refused_in_a_sentence(loss, said):
    """Before anything is loaded, on two made-up pairs."""
    with pytest.raises(ValueError, match=said):
        needs(loss)


def test_what_a_loss_is_given_cannot_be_changed():
    with pytest.raises(AttributeError):
        numbers().chosen = 0


def test_a_students_three_lines_are_a_loss(monkeypatch):
    def mine(policy, reference, beta, delta):
        margin = (policy.chosen - reference.chosen) - (policy.rejected - reference.rejected)
        return (1 - beta * margin).clamp(min=0)
    monkeypatch.setitem(losses.LOSSES, "mine", mine)
    policy, reference = numbers(1), numbers(2)
    assert needs(resolve("mine")) == {"chosen", "rejected"}
    assert_close(resolve("mine+dpo")(policy, reference, 0.1, 0.0),
                 mine(policy, reference, 0.1, 0.0) + dpo(policy, reference, 0.1))


def test_the_docstrings_example_runs(monkeypatch):
    lines = losses.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if "def mine" in line)
    space = {}
    exec("\n".join(line[4:] for line in lines[start:start + 3]), space)
    monkeypatch.setitem(losses.LOSSES, "mine", space["mine"])
    assert_close(resolve("mine")(numbers(), numbers(), 0.1, 0.0), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("name", ["dop", "dpo+", "", "dpo+nope"])
def test_an_unknown_name_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"is not in losses\.py.*dpo, copo, ancpo, mdpo, sft"):
        resolve(name)


@pytest.mark.parametrize("anchors", ["", "x", "wx"])
def test_unknown_anchors_are_refused(anchors):
    with pytest.raises(ValueError, match="w, wl or wlm"):
        resolve("mdpo", anchors=anchors)(numbers(), numbers(), 0.1, 0.0)


# ---- the official numbers, and TRL's code

def golden(part):
    for path in sorted(GOLDEN.glob("mdpo_loss*/expected.json")):
        case = json.loads(path.read_text())
        for name, expected in case[part].items():
            for dtype in expected if part == "official" else ["float64"]:
                values = expected[dtype] if part == "official" else expected
                where = f"{path.parent.name}: {name} {dtype}"
                yield pytest.param(case["inputs"], name, dtype, values, id=where)


def equals(got, expected, dtype):
    tight = {"float32": {"rtol": 1e-6, "atol": 1e-10}, "float64": {"rtol": 1e-12, "atol": 1e-14}}[dtype]
    assert_close(got, torch.tensor(expected, dtype=got.dtype), **tight)


def check_golden(loss, beta, delta, inputs, dtype, expected):
    policy, reference = (Logps(*(torch.tensor(inputs[f"{who}_{field}"], dtype=getattr(torch, dtype),
                                              requires_grad=who == "policy") for field in FIELDS))
                         for who in ("policy", "reference"))
    values = loss(policy, reference, beta, delta)
    values.mean().backward()
    equals(values, expected["losses"], dtype)
    equals(values.mean(), expected["loss_mean"], dtype)
    for name, gradient in expected["grad_of_mean"].items():
        of = getattr(policy, name.removeprefix("policy_"))
        equals(torch.zeros_like(of) if of.grad is None else of.grad, gradient, dtype)
    for field, reward in zip(FIELDS, rewards(policy, reference, beta), strict=True):
        if f"{field}_rewards" in expected:
            equals(reward, expected[f"{field}_rewards"], dtype)
    return policy, reference


@pytest.mark.golden
@pytest.mark.parametrize("inputs, name, dtype, expected", list(golden("official")))
def test_equals_the_official_code(inputs, name, dtype, expected):
    kind, beta = name.split(" beta=")
    loss = {"mdpo": mdpo, "trl_sigmoid_dpo": dpo}[kind]
    check_golden(loss, float(beta), 0.0, inputs, dtype, expected)


@pytest.mark.golden
@pytest.mark.parametrize("inputs, name, dtype, expected", list(golden("by_formula")))
def test_equals_the_papers_formulas(inputs, name, dtype, expected):
    beta, delta = (float(re.search(rf"{key}=([\d.]+)", name)[1]) for key in ("beta", "delta"))
    terms = expected["terms"]
    anchors = "".join(term[-1] for term in terms if term.startswith("anchor_"))
    names = [term for term in terms if term in losses.LOSSES] + ["ancpo"] * bool(anchors)
    loss = resolve("+".join(names), anchors=anchors)
    policy, reference = check_golden(loss, beta, delta, inputs, dtype, expected)
    for term, values in terms.items():
        one = resolve("ancpo", anchors=term[-1]) if term.startswith("anchor_") else resolve(term)
        equals(one(policy, reference, beta, delta), values, dtype)
    if {"dpo", "copo", "anchor_w"} <= set(terms):
        equals(resolve("mdpo", anchors=anchors)(policy, reference, beta, delta), expected["losses"], dtype)


def test_equals_trl_from_logits_to_gradient():
    """TRL's own DPOTrainer._compute_loss, unmodified, on a trainer and a model with just what it reads."""
    pytest.importorskip("trl", reason="TRL is not installed: it is in requirements-dev.txt")
    from trl import DPOTrainer
    from trl.trainer.utils import selective_log_softmax
    if not hasattr(DPOTrainer, "_compute_loss"):
        pytest.skip("this TRL has no DPOTrainer._compute_loss: the test is written for 1.16")
    torch.manual_seed(0)
    B, T, V, beta = 3, 10, 13, 0.2
    ids = torch.randint(0, V, (2 * B, T))                           # (2B, T): chosen rows, then rejected rows
    mask = (torch.arange(T) >= 4) & (torch.arange(T) < torch.randint(6, T + 1, (2 * B, 1)))
    labels = ids.masked_fill(~mask, -100)
    logits, other = 4 * torch.randn(2, 2 * B, T, V, dtype=torch.float64)

    def model(input_ids, labels, **_):
        per_token = selective_log_softmax(weights[:, :-1], input_ids[:, 1:]) * (labels[:, 1:] != -100)
        return SimpleNamespace(log_probs=per_token, entropy=per_token, mean_logits=per_token,
                               is_top1=per_token > 0)

    per_row = response_logps(other, labels)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), precompute_ref_logps=True, beta=beta, loss_types=["sigmoid"],
        loss_weights=[1.0], label_smoothing=0.0, f_divergence_type="reverse_kl", ld_alpha=None,
        use_weighting=False, aux_loss_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask.long(),
              "ref_chosen_logps": per_row[:B], "ref_rejected_logps": per_row[B:]}
    weights = logits.clone().requires_grad_()
    theirs = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    theirs.backward()

    ours_logits = logits.clone().requires_grad_()
    policy, reference = (Logps(*rows.split(B)) for rows in (response_logps(ours_logits, labels), per_row))
    ours = dpo(policy, reference, beta).mean()
    ours.backward()
    assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert_close(ours_logits.grad, weights.grad, rtol=1e-10, atol=1e-15)
    logged = trainer._metrics["train"]
    assert logged["rewards/chosen"][0] == pytest.approx(rewards(policy, reference, beta)[0].mean().item())
    assert logged["logps/rejected"][0] == pytest.approx(policy.rejected.mean().item())
