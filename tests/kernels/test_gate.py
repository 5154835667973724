"""The gate's kernels against ref.gate: the same choice on the same scores, weights and gradients by relative error."""

import pytest
import torch
from litseek_kernels import gate as op
from litseek_kernels.ref import gate as ref
from litseek_kernels.testing import relative_error

CASES = {
    "yardstick": (64, 6, 8, 4, 2),
    "V3": (256, 8, 8, 4, 2),
    "one group": (16, 4, 1, 1, 2),
    "all groups": (16, 4, 4, 4, 1),
    "one expert a group counts": (16, 2, 8, 3, 1),
    "whole groups": (12, 3, 4, 1, 3),
    "every expert": (6, 6, 2, 2, 3),
    "one of many": (64, 1, 8, 1, 1),
    "V2, nothing a power of two": (160, 6, 8, 3, 1),
    "six groups": (66, 5, 6, 3, 2),
    "three experts": (3, 2, 1, 1, 2),
}
"""E, K, groups, chosen groups, experts that score a group."""
BOUND = 1e-6
"""Relative error of weights, statistics and gradients to float64, for logits up to a few units."""


def inputs(tokens: int, case: tuple, device: torch.device, bias_size: float = 0.3):
    experts = case[0]
    logit = torch.randn(tokens, experts, device=device) * 1.5
    return logit.requires_grad_(), torch.randn(experts, device=device) * bias_size


@pytest.mark.parametrize("bias_size", [0.0, 0.3, 3.0])  # 3: most biased scores are negative or above 1
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_choice_weights_and_loads_equal_the_reference(case, bias_size, device):
    logit, bias = inputs(45, case, device, bias_size)
    got = op.gate(logit, bias, *case[1:], True, 2.5)
    wanted = ref.gate(logit.double(), bias.double(), *case[1:], True, 2.5)
    assert got.expert_TK.dtype == torch.int64 and torch.equal(got.expert_TK, wanted.expert_TK)
    assert got.load_E.dtype == torch.int64 and torch.equal(got.load_E, wanted.load_E)
    assert got.weight_TK.dtype == torch.float32 and relative_error(got.weight_TK, wanted.weight_TK) < BOUND
    assert got.share_BE.shape == got.probability_BE.shape == (0, case[0])


@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "plain"])
@pytest.mark.parametrize("sequences", [0, 1, 3])
@pytest.mark.parametrize("case", ["yardstick", "six groups", "one group", "one of many"])
def test_gradients_and_balance_statistics(case, sequences, normalise, device):
    case = CASES[case]
    logit, bias = inputs(141, case, device)  # sequences of 47: the last block of each is not full
    exact = logit.detach().double().requires_grad_()
    got = op.gate(logit, bias, *case[1:], normalise, 2.5, sequences)
    wanted = ref.gate(exact, bias.double(), *case[1:], normalise, 2.5, sequences)
    assert torch.equal(got.expert_TK, wanted.expert_TK)
    seeds = torch.randn_like(got.weight_TK), torch.randn_like(got.probability_BE)
    if sequences:
        assert relative_error(got.share_BE, wanted.share_BE) < BOUND and not got.share_BE.requires_grad
        assert relative_error(got.probability_BE, wanted.probability_BE) < BOUND
    for parts in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):  # the weights', the balance loss's, both
        if parts[1] and not sequences:
            continue
        losses = [
            parts[0] * (g.weight_TK * seeds[0]).sum() + parts[1] * (g.probability_BE * seeds[1]).sum()
            for g in (got, wanted)
        ]
        (grad,) = torch.autograd.grad(losses[0], logit, retain_graph=True)
        (right,) = torch.autograd.grad(losses[1], exact, retain_graph=True)
        # one expert alone has weight 1 whatever its score: only rounding is left of the gradient
        vanishes = normalise and case[1] == 1 and parts[0]
        assert (grad - right).abs().max() < 3e-6 if vanishes else relative_error(grad, right) < BOUND


def test_ties_go_to_the_lower_index(device):
    logit = torch.zeros(3, 16, device=device)
    logit[1, 5:9] = 1.0
    logit[2, 12] = -0.0
    got = op.gate(logit, torch.zeros(16, device=device), 4, 4, 2, 2)
    assert got.expert_TK.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [0, 1, 2, 3]]


def test_scores_of_zero_give_weights_of_zero_not_nan(device):
    logit = torch.full((2, 4), -200.0, device=device, requires_grad=True)
    got = op.gate(logit, torch.zeros(4, device=device), 2, scaling=2.5)
    assert got.weight_TK.abs().max() == 0
    (grad,) = torch.autograd.grad(got.weight_TK.sum(), logit)
    assert grad.abs().max() == 0


@pytest.mark.parametrize("case", ["yardstick", "V2, nothing a power of two"])
def test_nan_and_inf_are_seen_and_the_choice_stays_valid(case, device):
    case = CASES[case]
    logit, bias = inputs(6, case, device)
    with torch.no_grad():
        logit[0] = float("nan")
        logit[1, 3] = float("nan")
        logit[2] = float("-inf")
        logit[3, 7] = float("inf")
    got = op.gate(logit, bias, *case[1:], True, 2.5)
    assert all(len(set(row)) == case[1] and min(row) >= 0 and max(row) < case[0] for row in got.expert_TK.tolist())
    assert got.weight_TK[0].isnan().all() and got.weight_TK[1].isnan().all() and 3 in got.expert_TK[1]
    assert got.weight_TK[2:].isfinite().all() and got.load_E.sum() == 6 * case[1]


def test_biases_of_minus_infinity_shut_experts_out(device):
    logit, bias = inputs(9, CASES["yardstick"], device)
    bias[:32] = float("-inf")
    got = op.gate(logit, bias, *CASES["yardstick"][1:])
    assert got.expert_TK.min() >= 32 and torch.equal(
        got.expert_TK, ref.gate(logit, bias, *CASES["yardstick"][1:]).expert_TK
    )


def test_no_tokens(device):
    logit, bias = inputs(0, CASES["V3"], device)
    got = op.gate(logit, bias, *CASES["V3"][1:])
    assert got.expert_TK.shape == got.weight_TK.shape == (0, 8) and got.load_E.sum() == 0
    (grad,) = torch.autograd.grad(got.weight_TK.sum(), logit)
    assert grad.shape == (0, 256)


def test_what_does_not_fit_is_refused(device):
    logit, bias = inputs(6, CASES["one group"], device)
    with pytest.raises(ValueError, match="17 experts are to be chosen of 16"):
        op.gate(logit, bias, 17)
    with pytest.raises(ValueError, match="2 experts score each of 5 groups of 16 experts"):
        op.gate(logit, bias, 2, 5, 2)
    with pytest.raises(ValueError, match="6 tokens are not 4 sequences"):
        op.gate(logit, bias, 2, sequences=4)
    with pytest.raises(ValueError, match=r"float32 logits and bias, not torch\.bfloat16"):
        op.gate(logit.bfloat16(), bias, 2)


def test_operators_are_described_for_the_compiler(device):
    logit, bias = inputs(6, CASES["one group"], device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for sequences in (0, 2):
        setting = (*CASES["one group"][1:], True, 2.5, sequences)
        torch.library.opcheck(torch.ops.litseek.gate, (logit, bias, *setting), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [(32768, *CASES["yardstick"]), (8192, *CASES["V3"])], ids=["yardstick", "V3"])
def test_real_sizes(case):
    """In float32 two scores may be nearer than a rounding: there either choice is right, and it is rare."""
    tokens, *setting = case
    logit, bias = inputs(tokens, tuple(setting), torch.device("cuda"))
    got = op.gate(logit, bias, *setting[1:], True, 2.5, 4)
    wanted = ref.gate(logit.double(), bias.double(), *setting[1:], True, 2.5, 4)
    same = (got.expert_TK == wanted.expert_TK).all(1)
    assert (~same).sum() <= 4
    assert relative_error(got.weight_TK[same], wanted.weight_TK[same]) < BOUND
    assert relative_error(got.probability_BE, wanted.probability_BE) < BOUND
    assert (got.load_E - wanted.load_E).abs().sum() <= 2 * 4 * setting[1]
    again = op.gate(logit, bias, *setting[1:], True, 2.5, 4)
    assert all(torch.equal(a, b) for a, b in zip(got, again))
