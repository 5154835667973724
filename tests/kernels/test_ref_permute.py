"""Rows to expert order and back: every row once, weighted sums exact, ugly shapes included."""

import pytest
import torch
from litseek_kernels.ref.permute import permute, sort_by_expert, unpermute

SHAPES = {
    "plain": (7, 3, 8, 5),
    "one token": (1, 4, 8, 5),
    "one choice": (6, 1, 4, 3),
    "no tokens": (0, 3, 8, 5),
    "all experts": (5, 4, 4, 2),
    "ugly": (123, 5, 31, 43),
}


def choices(tokens: int, top_k: int, experts: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    rows = [torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)]
    return torch.stack(rows) if rows else torch.empty(0, top_k, dtype=torch.int64)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_row_lies_with_its_expert_in_token_order(shape):
    tokens, top_k, experts, dim = shape
    expert_TK = choices(tokens, top_k, experts)
    order, inverse, count = sort_by_expert(expert_TK, experts)
    x = torch.randn(tokens, dim)
    rows = permute(x, order, inverse)
    expected = [x[t] for e in range(experts) for t in range(tokens) if e in expert_TK[t]]
    assert rows.shape == (tokens * top_k, dim)
    assert count.dtype == torch.int64 and count.tolist() == [int((expert_TK == e).sum()) for e in range(experts)]
    assert torch.equal(rows, torch.stack(expected) if expected else rows)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_round_trip_is_the_weighted_sum_over_choices(shape):
    tokens, top_k, experts, dim = shape
    expert_TK = choices(tokens, top_k, experts)
    order, inverse, _ = sort_by_expert(expert_TK, experts)
    x = torch.randn(tokens, dim, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(tokens, top_k, dtype=torch.float64, requires_grad=True)
    factor = torch.randn(experts, dtype=torch.float64)  # what expert e does to its rows
    rows = permute(x, order, inverse) * factor[expert_TK.flatten()[order]][:, None]
    out = unpermute(rows, weight, order, inverse)
    expected = sum(weight[:, k, None] * factor[expert_TK[:, k]][:, None] * x for k in range(top_k))
    assert out.shape == (tokens, dim) and torch.allclose(out, expected, atol=1e-12)
    seed = torch.randn_like(out)
    got = torch.autograd.grad(out, (x, weight), seed)
    wanted = torch.autograd.grad(expected, (x, weight), seed)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(got, wanted))


def test_all_tokens_to_one_expert_keep_all_rows():
    expert_TK = torch.full((9, 1), 2)
    order, inverse, count = sort_by_expert(expert_TK, 4)
    x = torch.randn(9, 3)
    assert count.tolist() == [0, 0, 9, 0]
    assert torch.equal(permute(x, order, inverse), x)
    assert torch.equal(unpermute(x, torch.ones(9, 1), order, inverse), x)


@pytest.mark.parametrize("tokens", [0, 4])
def test_gradcheck(tokens):
    order, inverse, _ = sort_by_expert(choices(tokens, 2, 5), 5)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2 * tokens, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(tokens, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: permute(x, order, inverse), x)
    assert torch.autograd.gradcheck(lambda r, w: unpermute(r, w, order, inverse), (rows, weight))


def test_unpermute_sums_bfloat16_rows_in_float32():
    # 256 + 1 + 1 is 258 in float32 and 256 when every step rounds to bfloat16
    order, inverse, _ = sort_by_expert(torch.tensor([[0, 1, 2]]), 3)
    rows = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    out = unpermute(rows, torch.ones(1, 3), order, inverse)
    assert out.dtype == torch.bfloat16 and out.item() == 258.0


def test_unpermute_keeps_the_gates_weights_in_float32():
    # 1 + 2**-9 rounds to 1 in bfloat16: the difference of the two rows would vanish
    order, inverse, _ = sort_by_expert(torch.tensor([[0, 1]]), 2)
    rows = torch.tensor([[256.0], [-256.0]], dtype=torch.bfloat16)
    assert unpermute(rows, torch.tensor([[1 + 2**-9, 1.0]]), order, inverse).item() == 0.5
