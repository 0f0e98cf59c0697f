"""training/objectives.py: each equals TRL, its official code's numbers, or its formula worked out by hand."""
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train_dpo import trained
from torch.testing import assert_close

import data
import losses
from losses import Logps, tried
from training import checkpoint, objectives, options
from training.objectives import resolve

NAMES = ("hinge ipo cdpo robust simpo orpo dpop r_dpo apo_zero apo_down nca exo sppo bco mpo rpo realign "
         "chip vdpo symmpo svco hsa").split()
SCORED = sum(data.FIELDS.values(), ())
STORED = json.loads((Path(__file__).parent / "data" / "objectives.json").read_text())


def logps(numbers, grad=False):
    read = {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}
    return Logps(**{name: x.requires_grad_(grad and name in SCORED) for name, x in read.items()})


def gradients(policy):
    return {name: x.grad for name, x in vars(policy).items() if name in SCORED and x.grad is not None}


def test_these_are_they():
    assert sorted(objectives.OBJECTIVES) == sorted(NAMES) == sorted(case["name"] for case in STORED["cases"])


@pytest.mark.parametrize("case", STORED["cases"], ids=lambda case: case["name"])
def test_equals_the_stored_case(case):
    policy, reference = logps(STORED["policy"], True), logps(STORED["reference"])
    found = resolve(case["name"], **case["args"])(policy, reference, case["beta"], 0.0)
    found.sum().backward()
    tight = {"rtol": 1e-9, "atol": case.get("tolerance", 1e-12)}
    assert_close(found, torch.tensor(case["loss"], dtype=torch.float64), **tight)
    got = gradients(policy)
    for name, expected in case["gradient"].items():
        expected = torch.tensor(expected, dtype=torch.float64)
        assert_close(got.get(name, torch.zeros_like(expected)), expected, **tight)


# ---- TRL ----

TRL = {"hinge": {"hinge": 1}, "ipo": {"ipo": 1}, "robust": {"robust": 1}, "exo": {"exo_pair": 1},
       "nca": {"nca_pair": 1}, "bco": {"bco_pair": 1}, "sppo": {"sppo_hard": 1}, "apo_zero": {"apo_zero": 1},
       "apo_down": {"apo_down": 1}, "rpo": {"sigmoid": 1, "sft": 1},
       "mpo": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1}, "0.3*dpo+2*hinge": {"sigmoid": 0.3, "hinge": 2}}
SMOOTH = {"robust": 0.1, "exo": 1e-3}


def by_trl(name, policy, reference, chosen, rejected):
    """DPOTrainer._compute_loss, unmodified, of one pair whose tokens' log-probs add up to these."""
    trl = pytest.importorskip("trl", reason="TRL is not installed: it is in requirements-dev.txt")
    if not hasattr(trl.DPOTrainer, "_compute_loss"):
        pytest.skip("this TRL has no DPOTrainer._compute_loss: the test is written for 1.16")
    longest = 1 + max(chosen, rejected)                               # one token of prompt
    mask = torch.zeros(2, longest, dtype=torch.long)
    mask[0, 1:1 + chosen] = mask[1, 1:1 + rejected] = 1
    lengths = torch.tensor([[chosen], [rejected]])
    each = torch.stack([policy.chosen, policy.rejected]) / lengths * mask[:, 1:]

    def model(**_):
        return SimpleNamespace(log_probs=each, entropy=each, mean_logits=each, is_top1=each > 0)
    kinds = TRL[name]
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), precompute_ref_logps=True, beta=0.2, loss_types=[*kinds],
        loss_weights=[*kinds.values()], label_smoothing=SMOOTH.get(name, 0.0), f_divergence_type="reverse_kl",
        ld_alpha=None, use_weighting=False, aux_loss_enabled=False, _tp_size=1, _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)),
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x))
    inputs = {"input_ids": mask, "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "ref_chosen_logps": reference.chosen, "ref_rejected_logps": reference.rejected}
    return trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


@pytest.mark.parametrize("name", TRL)
def test_equals_trl(name):
    for i in range(5):
        numbers, frozen = ({field: values[i:i + 1] for field, values in STORED[side].items()}
                           for side in ("policy", "reference"))
        ours, theirs, reference = logps(numbers, True), logps(numbers, True), logps(frozen)
        found = resolve(name)(ours, reference, 0.2, 0.0).sum()
        expected = by_trl(name, theirs, reference, *(int(numbers[f"{x}_tokens"][0])
                                                     for x in ("chosen", "rejected")))
        found.backward()
        expected.backward()
        tight = {"rtol": 1e-7 if name == "exo" else 1e-12, "atol": 1e-14}     # its epsilon is float32 there
        assert_close(found, expected, **tight)
        assert_close(gradients(ours), gradients(theirs), **tight)


@pytest.mark.parametrize("name, where, trainer, work", [
    ("simpo", "cpo.cpo_trainer", "CPOTrainer", "cpo_loss"),
    ("orpo", "orpo.orpo_trainer", "ORPOTrainer", "odds_ratio_loss")])
def test_equals_trls_losses_without_a_reference(name, where, trainer, work):
    module = pytest.importorskip(f"trl.experimental.{where}", reason="this TRL has no such trainer")
    settings = SimpleNamespace(beta=2.0 if name == "simpo" else 0.1, loss_type="simpo", simpo_gamma=0.5,
                               alpha=0.0, label_smoothing=0.0, accelerator=SimpleNamespace(device="cpu"))
    ours, theirs = logps(STORED["policy"], True), logps(STORED["policy"], True)
    mean = theirs.chosen / theirs.chosen_tokens, theirs.rejected / theirs.rejected_tokens
    expected, *_ = getattr(getattr(module, trainer), work)(settings, *mean)
    if name == "orpo":                                                # the trainer's compute_loss: NLL - this
        expected = -mean[0] - expected
    found = resolve(name)(ours, None, settings.beta, 0.0)
    found.sum().backward()
    expected.sum().backward()
    tight = {"rtol": 1e-5, "atol": 1e-7} if name == "orpo" else {}    # TRL has it in float32
    assert_close(found, expected.double(), **tight)
    assert_close(gradients(ours), gradients(theirs), **tight)


# ---- what they read, their sums, their arguments ----

def test_what_each_reads():
    both, image = {"chosen", "rejected"}, {"chosen", "rejected", "image_rejected"}
    four = image | {"rejected_image_rejected"}
    reads = dict.fromkeys(NAMES, both) | dict.fromkeys(("realign", "chip"), image) | {
        "vdpo": {"chosen", "image_rejected"}, "symmpo": four, "svco": {*SCORED}}
    tokens = {"ipo": 2, "simpo": 2, "orpo": 2, "r_dpo": 2, "rpo": 1, "mpo": 1}
    for name in NAMES:
        policy, reference, values = tried(resolve(name))
        assert {*policy} & {*SCORED} == reads[name] and values.shape == (2,), name
        assert len({"chosen_tokens", "rejected_tokens"} & {*policy}) == tokens.get(name, 0), name
        assert ("weights" in policy) == (name == "hsa")
        assert {*reference} == (set() if name in ("simpo", "orpo") else reads[name]), name


@pytest.mark.parametrize("name", [*losses.LOSSES, *NAMES])
def test_what_a_loss_does_not_read_may_be_absent(name):
    policy, reference, _ = tried(resolve(name))
    numbers = [{field: STORED[side][field] for field in read}
               for side, read in (("policy", policy), ("reference", reference))]
    whole = resolve(name)(logps(STORED["policy"]), logps(STORED["reference"]), 0.2, 0.1)
    assert_close(resolve(name)(*map(logps, numbers), 0.2, 0.1), whole)
    assert whole.shape == (5,) and whole.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "apo_down"])
def test_a_step_makes_the_chosen_response_likelier(name):
    policy, _, _ = tried(resolve(name))
    assert (policy.chosen.grad < 0).all()


def test_weighted_sums():
    policy, reference = logps(STORED["policy"]), logps(STORED["reference"])
    parts = [resolve(name)(policy, reference, 0.2, 0.0) for name in ("dpo", "bco", "sft")]
    found = resolve("0.8*dpo+0.2*bco+sft")(policy, reference, 0.2, 0.0)
    assert_close(found, 0.8 * parts[0] + 0.2 * parts[1] + parts[2])
    assert_close(found, resolve("mpo")(policy, reference, 0.2, 0.0))
    assert_close(resolve("bco", anchors="w")(policy, reference, 0.2, 0.0), parts[1])     # ancpo's alone
    assert_close(losses.resolve(".5*dpo+copo")(policy, reference, 0.2, 0.0),
                 0.5 * parts[0] + losses.copo(policy, reference, 0.2))


def test_a_loss_of_ones_own_goes_before_one_of_the_same_name(monkeypatch):
    monkeypatch.setitem(losses.LOSSES, "hinge", losses.dpo)
    policy, reference = logps(STORED["policy"]), logps(STORED["reference"])
    assert_close(resolve("hinge")(policy, reference, 0.2, 0.0), losses.dpo(policy, reference, 0.2))


def parse(*words):
    return options.parse([*words], "")


def test_further_arguments():
    policy, reference = logps(STORED["policy"]), logps(STORED["reference"])
    found = options.loss_of(parse("--loss", "simpo+0.5*dpop", "--set", "loss_args=gamma=1.5,lam=2"))
    assert_close(found(policy, reference, 0.2, 0.0), resolve("simpo", gamma=1.5)(policy, reference, 0.2, 0.0)
                 + 0.5 * resolve("dpop", lam=2.0)(policy, reference, 0.2, 0.0))


@pytest.mark.parametrize("loss, given, said", [
    ("simpo", "gama=1", "--loss simpo: it has no argument gama"),
    ("dpo", "beta=1", "--loss dpo: it has no argument beta"),
    ("simpo+dpo", "epsilon=1", "it has no argument epsilon"),
    ("simpo", "gamma=high", "--loss simpo: could not convert string to float: 'high'"),
    ("simpo", "gamma", "could not convert .* ''"), ("simpo", "gamma=nan", "are not finite"),
    ("robust", "epsilon=0.5,", "division by zero|not finite"),
    ("dpo", "anchors=w", "could not convert .* 'w'"), ("ancpo", "anchors=1", "multiple values .* 'anchors'"),
    ("much*dpo", "", "could not convert string to float: 'much'"), ("0.8*", "", "is not in losses.py"),
    ("dpo+sympo", "", r"'sympo' is not in losses.py \(did you mean symmpo\?\): give a sum .* svco")])
def test_what_is_no_loss_is_refused_in_a_sentence(loss, given, said):
    with pytest.raises(data.UserError, match=said):
        parse("--loss", loss, "--set", f"loss_args={given}")


@pytest.mark.parametrize("loss", ["realign", "chip", "vdpo", "symmpo", "svco"])
def test_a_loss_that_compares_images_needs_one(loss):
    with pytest.raises(data.UserError, match="without the image it compares"):
        parse("--loss", loss, "--image_rejected", "none")


def test_a_loss_says_how_it_begins(capsys, monkeypatch):
    assert options.announce(parse("--loss", "dpo")) == {"chosen", "rejected"}
    assert capsys.readouterr().err == "--loss dpo begins at 0.6931 for two made-up pairs\n"
    assert options.announce(parse("--loss", "simpo")) == options.announce(parse("--loss", "sft")) == set()
    assert options.announce(parse("--loss", "copo")) == {"chosen", "image_rejected"}
    assert "does not make" not in capsys.readouterr().err
    monkeypatch.setitem(losses.LOSSES, "upside", lambda p, r, beta, delta: -losses.dpo(p, r, beta))
    monkeypatch.setitem(losses.LOSSES, "aside", lambda p, r, beta, delta: p.rejected)
    for name in ("upside", "apo_down", "aside"):
        options.announce(parse("--loss", name))
        assert "does not make their chosen responses likelier" in capsys.readouterr().err, name


# ---- what the steps warn of ----

def steps(margin=1.0, chosen=0.0, lr=1e-5):
    return [{"rewards/margins": margin, "rewards/chosen": chosen, "lr": lr}] * checkpoint.WINDOW


def test_a_flat_margin_and_a_falling_chosen_reward_are_warned_of():
    o = replace(parse("--loss", "dpo"), lr=1e-5)
    assert checkpoint.warning(steps(), o) == ""
    assert "raise --lr (1e-05)" in checkpoint.warning(steps(margin=1e-5), o)
    said = checkpoint.warning(steps(chosen=-0.5), o)
    assert "rewards/chosen falls" in said and "--loss dpo+ancpo" in said
    assert checkpoint.warning([{"lr": 1e-5, "loss": 1.0}] * 40, replace(o, loss="sft")) == ""  # has neither


def test_nothing_is_warned_of_too_early_or_advised_that_is_on():
    o = replace(parse(), lr=1e-5)
    assert checkpoint.warning(steps(margin=0.0, lr=1e-6), o) == ""                  # the warm-up
    for loss in ("mdpo", "dpo+ancpo", "0.5*dpo+2*ancpo", "symmpo"):
        said = checkpoint.warning(steps(chosen=-0.5), replace(o, loss=loss))
        assert "lower --lr" in said and "+ancpo" not in said


def test_a_run_warns_on_stderr(tmp_path):
    """At a learning rate of next to nothing."""
    out = trained(["--lr", "1e-12", "--loss", "dpo", "--image_rejected", "none", "--batch", "1", "--set",
                   "warmup=0", "--set", "pairs=40", "--set", "look=0", "--set", "scenes=2", "--set",
                   "questions=2", "--epochs", "1", "--lora_r", "2", "--out", str(tmp_path / "run")])
    assert out.count("rewards/margins is 0 for 40 steps: nothing is learned; raise --lr (1e-12)") == 1
    assert "--loss dpo begins at 0.6931" in out
