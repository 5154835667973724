"""The emulated recipe beside the real one, and what each broken rule does to it."""

import pytest
import torch
from litseek_kernels.testing import relative_error

from litseek.precision import FP8, EmulatedFP8
from litseek.precision.emulated import rounded_as


def pair(precision):
    made = precision.linear(256, 192)
    torch.nn.init.normal_(made.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    x = torch.randn(128, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    x = (x * torch.logspace(-3, 3, 256)).bfloat16().requires_grad_()  # widths of very different size
    y = made(x)
    y.backward(torch.randn(128, 192, generator=torch.Generator().manual_seed(3)).bfloat16())
    return y.detach(), x.grad, made.weight.grad


def test_by_default_it_is_the_recipe():
    for ours, wanted in zip(pair(EmulatedFP8()), pair(FP8())):
        assert ours.dtype == wanted.dtype and relative_error(ours, wanted) < 5e-3


@pytest.mark.parametrize("counts", [[100, 0, 156], [256, 0, 0]])
def test_experts(counts):
    rows, up, down = torch.randn(256, 256).bfloat16(), torch.randn(3, 256, 256) * 0.05, torch.randn(3, 256, 128) * 0.05
    weight, count, grad = torch.rand(256) + 0.5, torch.tensor(counts), torch.randn(256, 256).bfloat16()
    results = []
    for precision in (EmulatedFP8(), FP8()):
        leaves = [t.detach().requires_grad_() for t in (rows, up, down, weight)]
        y = precision.experts(leaves[0], leaves[1], leaves[2], count, leaves[3])
        y.backward(grad)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, wanted in zip(*results):
        assert (
            relative_error(ours, wanted) < 0.09
        )  # other tiles of rows, no powers of two, and the stash is not rounded


def test_one_scale_for_all_loses_what_is_small():
    x = torch.randn(128, 256)
    x[:, 128:] *= 1e6
    errors = {shares: relative_error(rounded_as(x, shares, -1)[:, :128], x[:, :128]) for shares in ("tile", "tensor")}
    assert errors["tile"] < 0.03 and errors["tensor"] > 0.9


@pytest.mark.parametrize("dim", [0, -1])
def test_ugly_shapes_and_what_is_not_finite(dim):
    x = torch.randn(3, 130, 70)
    x[0, 5, 6] = float("nan")
    x[1, 5, 6] = float("inf")
    y = rounded_as(x, "tile", dim)
    assert y.shape == x.shape and not y[0, 5, 6].isfinite() and not y[1, 5, 6].isfinite()
    assert y[2].isfinite().all() and relative_error(y[2], x[2]) < 0.04


def test_unknown_share():
    with pytest.raises(ValueError, match=r"precision\.gradient is 'row', allowed are tile, block, tensor"):
        EmulatedFP8(gradient="row")
