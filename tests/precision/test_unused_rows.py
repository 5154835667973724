"""Rows after the last expert's may hold anything: a dispatcher whose buffers have a fixed size leaves them unwritten."""

from contextlib import nullcontext

import pytest
import torch

from litseek import deferral
from litseek.precision import BF16, FP8, FP32, EmulatedFP8, RowScaledFP8

D, F = 128, 128
COUNTS = [5, 0, 130, 1]
PRECISIONS = {
    "fp32": FP32(),
    "bf16": BF16(),
    "fp8": FP8(),
    "row scaled": RowScaledFP8(),
    "emulated": EmulatedFP8(),
    "one scale for all": EmulatedFP8(activation="tensor", gradient="tensor"),
}


def through(precision, spare: int, split: bool, device: str) -> list[torch.Tensor]:
    """Output of the real rows, then the gradients of rows, weights and matrices; spare rows are NaN both ways."""
    g = torch.Generator().manual_seed(2)
    real = sum(COUNTS)
    rows, grad = (torch.randn(real, D, generator=g) for _ in range(2))
    weight = torch.rand(real, generator=g)
    up, down = torch.randn(4, 2 * F, D, generator=g) / D**0.5, torch.randn(4, D, F, generator=g) / F**0.5
    poison = torch.full((spare, D), torch.nan)
    x = torch.cat([rows, poison]).to(device, precision.compute_dtype).requires_grad_()
    w = torch.cat([weight, poison[:, 0]]).to(device).requires_grad_()
    up, down = (matrix.to(device).requires_grad_() for matrix in (up, down))
    with deferral.splitting(True) if split else nullcontext():
        out = precision.experts(x, up, down, torch.tensor(COUNTS, device=device), w)
        out.backward(torch.cat([grad, poison]).to(device, out.dtype))
    return [out[:real].detach(), x.grad[:real], w.grad[:real], up.grad, down.grad]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_nothing_reads_them(name, split, device):
    precision = PRECISIONS[name]
    for got, wanted in zip(through(precision, 200, split, device), through(precision, 0, split, device)):
        assert wanted.isfinite().all() and torch.equal(got, wanted)
