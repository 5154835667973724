"""RMSNorm kernels against float64. Relative errors: 1e-6 in float32; in BF16, rounded once, 2.5e-3 (5e-3 in the
interpreter, whose stores cut off instead of rounding); the weight's gradient is float32 and within 1e-5 in both.
"""

import pytest
import torch
from litseek_kernels.rmsnorm import add_rmsnorm, rmsnorm
from litseek_kernels.testing import UGLY_ROWS, relative_error

EPS = 1e-6
SHAPES = [*UGLY_ROWS, (40, 512), (9, 1536), (3, 7168)]


def exact(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def limits(dtype, device):
    return 1e-6 if dtype == torch.float32 else 2.5e-3 if device.type == "cuda" else 5e-3


def inputs(shape, dtype, device, count=1):
    x = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(count)]
    return *x, torch.randn(shape[-1], device=device).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape, dtype, device):
    x, weight = inputs(shape, dtype, device)
    seed = torch.randn(shape, device=device).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = exact(*wide)
    want.backward(seed.double())
    got = rmsnorm(x, weight, EPS)
    got.backward(seed)
    assert got.dtype == dtype and weight.grad.dtype == torch.float32
    assert relative_error(got, want) <= limits(dtype, device)
    if shape[-1] > 1:
        assert relative_error(x.grad, wide[0].grad) <= limits(dtype, device)
    else:  # the norm of one number is its sign: what is left of the gradient is rounding
        assert x.grad.abs().max() <= 1e-4
    assert relative_error(weight.grad, wide[1].grad) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 48), (0, 256), (129, 576), (3, 7168)])
@pytest.mark.parametrize("used", ["both", "norm only"])
def test_residual_sum_and_norm(shape, dtype, used, device):
    x, delta, weight = inputs(shape, dtype, device, 2)
    seeds = [torch.randn(shape, device=device).to(dtype) for _ in range(2)]
    total, y = add_rmsnorm(x, delta, weight, EPS)
    assert torch.equal(total, x + delta) or (device.type == "cpu" and dtype == torch.bfloat16)
    wide_total, wide_weight = total.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = exact(wide_total, wide_weight)
    want.backward(seeds[0].double())
    want_dx = wide_total.grad + (seeds[1].double() if used == "both" else 0)
    outputs = (y, total) if used == "both" else (y,)
    dx, ddelta, dweight = torch.autograd.grad(outputs, (x, delta, weight), seeds[: len(outputs)])
    assert relative_error(total, x.double() + delta.double()) <= limits(dtype, device)
    assert relative_error(y, want) <= limits(dtype, device)
    assert relative_error(dx, want_dx) <= limits(dtype, device) and torch.equal(dx, ddelta)
    assert relative_error(dweight, wide_weight.grad) <= 1e-5


def test_a_slice_of_rows_is_not_copied(device):
    rows = torch.randn(4, 7, 576, device=device)
    x, weight = rows[..., :512], torch.randn(512, device=device)
    assert relative_error(rmsnorm(x, weight, EPS), exact(x.double(), weight.double())) <= 1e-6
    x = rows.transpose(1, 2)
    weight = weight[:7]
    assert relative_error(rmsnorm(x, weight, EPS), exact(x.double(), weight.double())) <= 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_zero_rows_and_what_is_not_finite(device):
    x = torch.zeros(3, 64, device=device)
    x[1, 5], x[2, 6] = float("nan"), float("inf")
    x.requires_grad_()
    y = rmsnorm(x, torch.ones(64, device=device), EPS)
    y[0].sum().backward()
    assert (y[0] == 0).all() and y[1].isnan().all() and y[2].isnan().any() and x.grad[0].isfinite().all()


def test_weight_gradient_is_the_same_every_time(device):
    x, weight = inputs((300, 96), torch.float32, device)
    seed = torch.randn(300, 96, device=device)
    first, second = (torch.autograd.grad(rmsnorm(x, weight, EPS), weight, seed)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_refusals_name_the_shape(device):
    with pytest.raises(ValueError, match=r"\(3, 8\), the weight \(7,\)"):
        rmsnorm(torch.zeros(3, 8, device=device), torch.ones(7, device=device), EPS)
    with pytest.raises(ValueError, match=r"\(3, 8\) and torch.float32 \(3, 7\)"):
        add_rmsnorm(torch.zeros(3, 8), torch.zeros(3, 7), torch.ones(8), EPS)


def test_ops_are_registered(device):
    x, delta, weight = (t.detach() for t in inputs((6, 40), torch.float32, device, 2))
    rstd = torch.ones(6, device=device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.litseek.rmsnorm, (x, weight, EPS), test_utils=tests)
    torch.library.opcheck(torch.ops.litseek.add_rmsnorm, (x, delta, weight, EPS), test_utils=tests)
    for dtotal in (None, delta):
        args = (x, dtotal, x, weight, rstd)
        torch.library.opcheck(torch.ops.litseek.rmsnorm_backward, args, test_utils=tests)
