"""Grouped product against one matrix product a row in float64; experts without rows, no rows at all, all to one."""

import pytest
import torch
from litseek_kernels.ref.grouped_gemm import grouped_mm

COUNTS = {
    "plain": [3, 1, 4],
    "first and last empty": [0, 5, 2, 0],
    "all to one": [0, 0, 9, 0],
    "no rows": [0, 0, 0],
    "one expert": [6],
    "ugly": [41, 0, 1, 81],
}


def inputs(counts, wide, deep, dtype=torch.float64):
    generator = torch.Generator().manual_seed(len(counts))
    rows = torch.randn(sum(counts), deep, generator=generator, dtype=dtype)
    weight = torch.randn(len(counts), wide, deep, generator=generator, dtype=dtype)
    return rows, weight, torch.tensor(counts)


def row_by_row(rows, weight, counts):
    owner = [e for e, count in enumerate(counts) for _ in range(count)]
    out = [weight[e] @ row for e, row in zip(owner, rows)]
    return torch.stack(out) if out else (rows @ weight[0].T)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 1e-2)])
def test_forward_and_backward_equal_float64_row_by_row(counts, dtype, tolerance):
    rows, weight, count_E = inputs(counts, 43, 31)
    rows, weight = rows.to(dtype).double(), weight.to(dtype).double()
    seed = torch.randn(len(rows), 43, dtype=torch.float64).to(dtype)
    mine = [t.to(dtype).clone().requires_grad_() for t in (rows, weight)]
    out = grouped_mm(*mine, count_E)
    out.backward(seed)
    theirs = [t.clone().requires_grad_() for t in (rows, weight)]
    expected = row_by_row(*theirs, counts)
    expected.backward(seed.double())
    pairs = [(out, expected), (mine[0].grad, theirs[0].grad), (mine[1].grad, theirs[1].grad)]
    for got, wanted in pairs:
        assert got.dtype == dtype and got.shape == wanted.shape
        assert (got.double() - wanted).norm() <= tolerance * wanted.norm() + 1e-12


def test_an_expert_without_rows_gets_a_zero_gradient():
    rows, weight, count_E = inputs([2, 0, 3], 4, 5)
    weight.requires_grad_()
    grouped_mm(rows, weight, count_E).sum().backward()
    assert weight.grad[1].abs().max() == 0 and weight.grad[0].abs().min() > 0


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0]])
def test_gradcheck(counts):
    rows, weight, count_E = inputs(counts, 3, 4)
    tensors = rows.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda r, w: grouped_mm(r, w, count_E), tensors)


def test_a_broadcast_gradient_is_accepted():
    rows, weight, count_E = inputs([2, 3], 3, 4)
    rows.requires_grad_()
    out = grouped_mm(rows, weight, count_E)
    out.backward(torch.ones(1, 1, dtype=torch.float64).expand_as(out))
    assert torch.allclose(rows.grad[0], weight[0].sum(0))


def test_only_asked_gradients_are_computed():
    rows, weight, count_E = inputs([2, 3], 3, 4)
    rows.requires_grad_()
    (grad,) = torch.autograd.grad(grouped_mm(rows, weight, count_E).sum(), rows)
    assert grad.shape == rows.shape and weight.grad is None


def test_counts_that_do_not_fit_the_rows_are_our_mistake():
    rows, weight, _ = inputs([2, 3], 3, 4)
    with pytest.raises(AssertionError, match="counts sum to 6, rows are 5"):
        grouped_mm(rows, weight, torch.tensor([2, 4]))
