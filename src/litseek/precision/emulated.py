"""FP8's rounding on BF16 products, with every rule of the recipe a setting (report §3.3, App. B): for ablations, anywhere.

Operands are rounded to E4M3 with their scales and multiplied as BF16, which holds a code times its scale to 0.2%, a
tenth of E4M3's own error. Sums are FP32 throughout, so what the tensor cores' narrow sums do is not here. Slower than
BF16: `litseek.precision.FP8` is the one to train with. Letters: M rows, N out, K in, R rows of experts, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from litseek_kernels.ref.quantise import AMAX_FLOOR, BLOCK, E4M3_MAX
from torch import Tensor, nn

from litseek.precision.fp8 import HIGH
from litseek.precision.high import BF16, Linear, _GroupedProduct

ALLOWED = {
    "activation": ("tile", "block", "tensor"),
    "gradient": ("tile", "block", "tensor"),
    "weight": ("block", "tensor"),
}
"""What shares a scale: 128 numbers along the sum, a 128 x 128 block, or the whole tensor."""


class EmulatedFP8(BF16):
    """The recipe by default; ``activation``, ``gradient`` and ``weight`` say what shares a scale."""

    name = "fp8_emulated"

    def __init__(self, activation: str = "tile", gradient: str = "tile", weight: str = "block"):
        self.activation, self.gradient, self.weight = activation, gradient, weight
        for key, allowed in ALLOWED.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"precision.{key} is '{getattr(self, key)}', allowed are {', '.join(allowed)}.")

    def attach(self, weight: nn.Parameter, role: str) -> None:
        if role in HIGH:  # the others are rounded from their masters at every use
            super().attach(weight, role)

    def linear(self, in_features: int, out_features: int, role: str = "linear") -> Linear:
        if role in HIGH:
            return super().linear(in_features, out_features, role)
        return _EmulatedLinear(in_features, out_features, role, self)

    def grouped_mm(self, rows_RD: Tensor, weight_EFD: Tensor, count_E: Tensor) -> Tensor:
        """Scales of 128 rows may be shared by two experts' rows here: rows are not padded."""
        return _Product.apply(rows_RD.to(self.compute_dtype), weight_EFD, count_E, self)


class _EmulatedLinear(Linear):
    def __init__(self, in_features: int, out_features: int, role: str, precision: EmulatedFP8):
        super().__init__(in_features, out_features, precision.compute_dtype, role)
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        rows_MK = x.reshape(-1, x.shape[-1]).to(self.compute_dtype)
        return _Product.apply(rows_MK, self.weight, None, self.precision).unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """Rows (M, K) times a master (N, K), or (E, N, K) by groups of rows."""

    @staticmethod
    def forward(ctx: Any, rows_MK: Tensor, weight: Tensor, count_E: Tensor | None, precision: EmulatedFP8) -> Tensor:
        rows_MK = _counted(rows_MK, count_E)
        rounded = rounded_as(weight, precision.weight, -1)
        ctx.save_for_backward(rounded_as(rows_MK, precision.activation, 0), rounded, count_E)
        ctx.gradient = precision.gradient
        return _multiply(rounded_as(rows_MK, precision.activation, -1), rounded, count_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_MK, weight, count_E = ctx.saved_tensors
        grad_MN = _counted(grads[0], count_E)
        grad_rows = _multiply(rounded_as(grad_MN, ctx.gradient, -1), weight.transpose(-1, -2).contiguous(), count_E)
        with torch.enable_grad():  # dW is the gradient of a product with these rows
            leaf = torch.zeros_like(weight).requires_grad_()
            out = _multiply(rows_MK, leaf, count_E)
        (grad_weight,) = torch.autograd.grad(out, leaf, rounded_as(grad_MN, ctx.gradient, 0))
        return grad_rows, grad_weight.float(), None, None


def _counted(rows_MK: Tensor, count_E: Tensor | None) -> Tensor:
    """Zeros in the rows of no expert, which would share scales with the others."""
    if count_E is None:
        return rows_MK
    real_M = torch.arange(rows_MK.shape[0], device=rows_MK.device) < count_E.sum()
    return torch.where(real_M[:, None], rows_MK, 0)


def _multiply(rows_MK: Tensor, weight: Tensor, count_E: Tensor | None) -> Tensor:
    if count_E is None:
        return F.linear(rows_MK, weight)
    if rows_MK.is_cuda:
        return _GroupedProduct.apply(rows_MK, weight, count_E.cumsum(0).to(torch.int32))
    return BF16().grouped_mm(rows_MK, weight, count_E)


def rounded_as(x: Tensor, shares: str, dim: int) -> Tensor:
    """BF16 of the E4M3 codes times their scales; ``dim`` is the one that the product sums over ("tile" lies along it).
    NaN and Inf stay what they are."""
    wide = x.float()
    if shares == "tensor":
        scale = wide.abs().amax().clamp_min(AMAX_FLOOR) / E4M3_MAX
        return _through_e4m3(wide, scale).to(torch.bfloat16)
    height, width = (BLOCK, BLOCK) if shares == "block" else (1, BLOCK) if dim == -1 else (BLOCK, 1)
    M, K = x.shape[-2:]
    tiles = F.pad(wide, (0, -K % width, 0, -M % height)).unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
    scale = tiles.abs().amax(dim=(-1, -3), keepdim=True).clamp_min(AMAX_FLOOR) / E4M3_MAX
    return _through_e4m3(tiles, scale).flatten(-2).flatten(-3, -2)[..., :M, :K].to(torch.bfloat16)


def _through_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    codes = (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.float() * scale
