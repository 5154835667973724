"""The gate's choice and weights against plain Python, number by number."""

import pytest
import torch
from litseek_kernels.ref.gate import choose_experts, count_experts, gate_weights

CASES = {
    "V3-like": (16, 4, 4, 2, 2),
    "one group": (16, 4, 1, 1, 2),
    "all groups": (16, 4, 4, 4, 1),
    "one expert a group counts": (16, 2, 8, 3, 1),
    "whole groups": (12, 3, 4, 1, 3),
    "every expert": (6, 6, 2, 2, 3),
    "one of many": (64, 1, 8, 1, 1),
}


def choose_by_hand(score, bias, top_k, groups, top_groups, best):
    biased = [s + b for s, b in zip(score, bias)]
    size = len(biased) // groups
    value = [sum(sorted(biased[g * size : (g + 1) * size])[-best:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: -value[g])[:top_groups]
    return sorted((i for i in range(len(biased)) if i // size in kept), key=lambda i: -biased[i])[:top_k]


@pytest.mark.parametrize("bias_size", [0.3, -5.0])  # the second makes every biased score negative
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_choice_equals_python(case, bias_size):
    experts, *setting = case
    generator = torch.Generator().manual_seed(experts)
    score = torch.rand(50, experts, generator=generator, dtype=torch.float64)
    bias = torch.rand(experts, generator=generator, dtype=torch.float64) * bias_size
    if bias_size < 0:
        bias -= 2
    chosen = choose_experts(score, bias, *setting)
    assert chosen.dtype == torch.int64
    for row, got in zip(score.tolist(), chosen.tolist()):
        assert set(got) == set(choose_by_hand(row, bias.tolist(), *setting)) and len(set(got)) == len(got)


def test_no_tokens():
    empty = torch.empty(0, 8)
    chosen = choose_experts(empty, torch.zeros(8), 2, 4, 2, 1)
    assert chosen.shape == (0, 2) and gate_weights(empty, chosen, True, 2.5).shape == (0, 2)


def test_weights_equal_python():
    score = torch.rand(9, 6, dtype=torch.float64)
    chosen = choose_experts(score, torch.randn(6, dtype=torch.float64), 3)
    for normalise, scaling in [(True, 2.5), (False, 1.0), (False, 2.5)]:
        weight = gate_weights(score, chosen, normalise, scaling)
        for t in range(9):
            picked = [score[t, e].item() for e in chosen[t]]
            total = sum(picked) if normalise else 1.0
            assert weight[t].tolist() == pytest.approx([scaling * s / total for s in picked], rel=1e-12)


def test_scores_of_zero_give_weights_of_zero_not_nan():
    weight = gate_weights(torch.zeros(2, 4), torch.tensor([[0, 1], [2, 3]]), True, 2.5)
    assert weight.abs().max() == 0


def test_gradcheck_of_the_weights():
    score = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0, 1], [4, 2], [3, 0]])
    assert torch.autograd.gradcheck(lambda s: gate_weights(s, chosen, True, 2.5), score)


@pytest.mark.parametrize("tokens", [0, 1, 57])
def test_counts_equal_python(tokens):
    expert_TK = torch.randint(0, 5, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
    count = count_experts(expert_TK, 7)
    assert count.dtype == torch.int64 and count.tolist() == [int((expert_TK == e).sum()) for e in range(7)]
