"""bfloat16 rows times a float32 matrix on bfloat16 tensor cores, by relative error to the float64 product."""

import pytest
import torch
from litseek_kernels.linear_float32 import _split, linear_float32
from litseek_kernels.testing import relative_error

SHAPES = [(64, 128, 16), (1, 5, 3), (130, 200, 66), (257, 64, 160), (0, 32, 8)]
"""T, D, E."""
REAL = [(32768, 1536, 64), (8192, 7168, 256), (4096, 2048, 160)]
BOUND = 1e-6
"""Of the result and of the weight's gradient. The rows' gradient is bfloat16: 3e-3, rounding; the interpreter cuts bits
instead of rounding them, twice as far."""


def operands(shape: tuple[int, int, int], device: torch.device):
    T, D, E = shape
    x = torch.randn(T, D, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(E, D, device=device) * D**-0.5).requires_grad_()
    return x, weight, torch.randn(T, E, device=device)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_and_gradients(shape, device):
    check(shape, device)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", REAL, ids=str)
def test_real_shapes(shape):
    check(shape, torch.device("cuda"))


def check(shape, device):
    x, weight, seed = operands(shape, device)
    out = linear_float32(x, weight)
    assert out.dtype == torch.float32 and out.shape == seed.shape
    assert relative_error(out, x.double() @ weight.double().t()) < BOUND
    grad_x, grad_weight = torch.autograd.grad(out, (x, weight), seed)
    assert grad_x.dtype == torch.bfloat16 and grad_weight.dtype == torch.float32
    assert relative_error(grad_x, seed.double() @ weight.double()) < (6e-3 if device.type == "cpu" else 3e-3)
    assert relative_error(grad_weight, seed.double().t() @ x.double()) < BOUND


def test_three_parts_sum_to_the_number(device):
    x = torch.randn(3, 700, device=device) * torch.logspace(-20, 20, 700, device=device)
    parts = _split(x)
    assert parts.dtype == torch.bfloat16 and torch.equal(parts.double().sum(0).float(), x)


def test_nan_and_inf_are_seen(device):
    x, weight, _ = operands((4, 32, 16), device)
    with torch.no_grad():
        x[1, 3], x[2, 5] = float("nan"), float("inf")
    out = linear_float32(x, weight)
    assert out[1].isnan().all() and not out[2].isfinite().any() and out[[0, 3]].isfinite().all()


def test_other_dtypes_are_torchs_own_product(device):
    x, weight, _ = operands((4, 32, 16), device)
    wide, exact = x.detach().float(), x.detach().double()
    assert torch.equal(linear_float32(wide, weight), torch.nn.functional.linear(wide, weight))
    assert linear_float32(exact, weight.double()).dtype == torch.float64


def test_shapes_that_do_not_fit_are_named(device):
    with pytest.raises(ValueError, match=r"rows \(4, 32\) for a weight \(16, 31\)"):
        linear_float32(torch.zeros(4, 32, device=device, dtype=torch.bfloat16), torch.zeros(16, 31, device=device))


def test_operator_is_described_for_the_compiler(device):
    x, weight, _ = operands((4, 32, 16), device)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.litseek.linear_float32, (x, weight), test_utils=checks)
