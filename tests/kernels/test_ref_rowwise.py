"""RMSNorm and SwiGLU row by row against float64; zero rows, BF16."""

import pytest
import torch
from litseek_kernels.ref.rmsnorm import rmsnorm
from litseek_kernels.ref.swiglu import swiglu

SHAPES = [(5, 7), (0, 7), (1, 3), (123, 431)]
DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 6e-3)]


def norm_by_row(x, weight, eps):
    rows = [weight * row / torch.sqrt((row * row).sum() / len(row) + eps) for row in x]
    return torch.stack(rows) if rows else x * weight


def gate_by_number(gate, up):
    return gate / (1 + torch.exp(-gate)) * up


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_rmsnorm_forward_and_backward(shape, dtype, tolerance):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    weight = torch.randn(shape[1], dtype=torch.float64).to(dtype)
    weight = weight.float() if dtype == torch.bfloat16 else weight  # the master stays float32
    check(lambda x, w: rmsnorm(x, w, 1e-6), lambda x, w: norm_by_row(x, w, 1e-6), (x, weight), dtype, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", DTYPES)
def test_swiglu_forward_and_backward(shape, dtype, tolerance):
    gate, up = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(2))
    check(swiglu, gate_by_number, (gate, up), dtype, tolerance)


def check(op, oracle, tensors, dtype, tolerance):
    mine = [t.clone().requires_grad_() for t in tensors]
    theirs = [t.double().requires_grad_() for t in tensors]
    out, expected = op(*mine), oracle(*theirs)
    assert out.dtype == dtype and out.shape == expected.shape
    seed = torch.randn(expected.shape, dtype=torch.float64).to(dtype)
    out.backward(seed)
    expected.backward(seed.double())
    for got, wanted in [(out, expected), *((a.grad, b.grad) for a, b in zip(mine, theirs))]:
        assert (got.double() - wanted).norm() <= tolerance * (wanted.norm() + 0.1)


def test_rmsnorm_of_a_zero_row_is_zero_with_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    out = rmsnorm(x, torch.ones(8), 1e-6)
    out.sum().backward()
    assert out.abs().max() == 0 and torch.isfinite(x.grad).all()


def test_rmsnorm_takes_its_statistics_in_float32():
    # in bfloat16 the mean of 4096 squares would stop growing at 256
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    assert rmsnorm(x, torch.ones(4096), 0.0).unique().tolist() == [1.0]


def test_swiglu_of_extreme_gates_is_finite():
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]], requires_grad=True)
    out = swiglu(gate, torch.full_like(gate, 2.0))
    out.sum().backward()
    assert torch.allclose(out, torch.tensor([[0.0, 0.0, 0.0, 180.0, 2e4]]), atol=1e-30)
    assert torch.isfinite(gate.grad).all()


def test_gradcheck():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rmsnorm(x, w, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(swiglu, (x, up))
