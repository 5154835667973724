"""FP8 with one scale a row: near BF16 on the CPU, and what leaving out the promotion does on a GPU."""

import pytest
import torch
from litseek_kernels.testing import relative_error

from litseek.precision import BF16, RowScaledFP8

COUNTS = [3, 0, 130, 59]


def run(precision, device, wide=256):
    torch.manual_seed(0)
    rows = torch.randn(sum(COUNTS), wide).to(device).requires_grad_()
    weight = torch.randn(len(COUNTS), 144, wide).to(device).requires_grad_()
    out = precision.grouped_mm(rows, weight, torch.tensor(COUNTS, device=device))
    out.backward(torch.randn(out.shape).to(device, out.dtype))
    return out, rows.grad, weight.grad


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_and_gradients_are_near_those_of_bf16(device):
    for ours, theirs in zip(run(RowScaledFP8(), device), run(BF16(), device), strict=True):
        assert relative_error(ours, theirs) < 0.045  # two operands of 3 bits


def test_a_linear_takes_any_number_of_rows():
    linear = RowScaledFP8().linear(32, 16)
    torch.nn.init.normal_(linear.weight)
    x = torch.randn(2, 5, 32)
    assert relative_error(linear(x), x @ linear.weight.t()) < 0.06


@pytest.mark.gpu
def test_without_promotion_sums_have_fewer_bits_and_no_more_is_lost():
    for exact, low in zip(
        run(RowScaledFP8(), "cuda", 4096), run(RowScaledFP8(promote=False), "cuda", 4096), strict=True
    ):
        assert relative_error(low, exact) < 0.01
    exact, low = (run(RowScaledFP8(promote=p), "cuda", 4096)[2] for p in (True, False))
    assert relative_error(low, exact) > 1e-7


def test_a_cpu_has_no_such_sums():
    with pytest.raises(ValueError, match="promote=False needs a GPU"):
        run(RowScaledFP8(promote=False), "cpu")
