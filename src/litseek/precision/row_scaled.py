"""FP8 with one scale along all that a product sums over: what promotion in FP32 can be left out of (report §3.3.2, Fig. 7b).

A row of activations or gradients has one scale, of a weight 128 rows of its output have one. Then no scale changes within a
sum, which the tensor cores can make alone. For ablations: the operands are quantised by plain torch operations, slowly.
Letters: M rows, N out, K in, R rows of experts, E experts; k, n blocks of 128.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from litseek_kernels.grouped_gemm import grouped_mm_fp8
from litseek_kernels.grouped_wgrad import grouped_wgrad_fp8
from litseek_kernels.layout import TILE, Layout, padded_capacity, row_layout
from litseek_kernels.ref.layout import padded_index
from litseek_kernels.ref.quantise import AMAX_FLOOR, E4M3, E4M3_MAX
from torch import Tensor, nn

from litseek.precision.fp8 import HIGH, check_device
from litseek.precision.high import BF16, Linear


class RowScaledFP8(BF16):
    """``promote`` False leaves every sum to the tensor cores, which needs a GPU; True adds up in FP32 every 128 numbers."""

    name = "fp8_row_scaled"

    def __init__(self, promote: bool = True):
        self.promote = promote

    def attach(self, weight: nn.Parameter, role: str) -> None:
        if role in HIGH:  # the others are quantised from their masters at every use
            super().attach(weight, role)
        else:
            check_device(weight.device)

    def linear(self, in_features: int, out_features: int, role: str = "linear") -> Linear:
        if role in HIGH:
            return super().linear(in_features, out_features, role)
        return _RowScaledLinear(in_features, out_features, role, self)

    def grouped_mm(self, rows_RD: Tensor, weight_EFD: Tensor, count_E: Tensor) -> Tensor:
        return _Product.apply(rows_RD.to(self.compute_dtype), weight_EFD, count_E, self.promote)


class _RowScaledLinear(Linear):
    def __init__(self, in_features: int, out_features: int, role: str, precision: RowScaledFP8):
        super().__init__(in_features, out_features, precision.compute_dtype, role)
        self.precision = precision

    def forward(self, x: Tensor) -> Tensor:
        rows_MK = x.reshape(-1, x.shape[-1])
        count = torch.full((1,), rows_MK.shape[0], dtype=torch.int64, device=x.device)
        return self.precision.grouped_mm(rows_MK, self.weight[None], count).unflatten(0, x.shape[:-1])


class _Product(torch.autograd.Function):
    """Rows (R, K) sorted by expert times a master (E, N, K)."""

    @staticmethod
    def forward(ctx: Any, rows_RK: Tensor, weight_ENK: Tensor, count_E: Tensor, promote: bool) -> Tensor:
        layout = row_layout(count_E, padded_capacity(rows_RK.shape[0], count_E.shape[0]))
        ctx.promote = promote
        ctx.save_for_backward(rows_RK, weight_ENK, *layout)
        return _multiply(_padded(rows_RK, layout), weight_ENK, layout, rows_RK.shape[0], promote)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RK, weight_ENK, *parts = ctx.saved_tensors
        layout = Layout(*parts)
        grad, rows = _padded(grads[0], layout), _padded(rows_RK, layout)
        grad_rows = _multiply(grad, weight_ENK.transpose(1, 2), layout, rows_RK.shape[0], ctx.promote)
        turned = *by_row(grad.t()), *by_row(rows.t())
        grad_weight = grouped_wgrad_fp8(*turned, layout.padded_start_E, promote=ctx.promote)
        return grad_rows, grad_weight, None, None


def _multiply(padded: Tensor, weight_ENK: Tensor, layout: Layout, rows: int, promote: bool) -> Tensor:
    compact = layout.tile_begin, layout.tile_count, rows
    operands = *by_row(padded), *by_rows_of_block(weight_ENK)
    return grouped_mm_fp8(*operands, layout.tile_expert, compact=compact, promote=promote)


def _padded(rows_RD: Tensor, layout: Layout) -> Tensor:
    """Zeros in between, without a wait of the host."""
    index = padded_index(layout.tile_begin, layout.tile_count)
    return torch.where(index[:, None] >= 0, rows_RD[index.clamp_min(0)], 0)


def by_row(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (M, K) and scales (K / 128, M), the same along a row."""
    scale_M = x_MK.float().abs().amax(dim=1).clamp_min(AMAX_FLOOR) / E4M3_MAX
    blocks = -(-x_MK.shape[1] // TILE)
    return _codes(x_MK, scale_M[:, None]), scale_M.expand(blocks, -1).contiguous()


def by_rows_of_block(weight_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (E, N, K) and scales (E, N / 128, K / 128), the same along K."""
    N, K = weight_ENK.shape[1:]
    amax_EN = weight_ENK.float().abs().amax(dim=2)
    amax_En = F.pad(amax_EN, (0, -N % TILE)).unflatten(1, (-1, TILE)).amax(dim=2)
    scale_En = amax_En.clamp_min(AMAX_FLOOR) / E4M3_MAX
    codes = _codes(weight_ENK, scale_En.repeat_interleave(TILE, dim=1)[:, :N, None])
    return codes, scale_En[:, :, None].expand(-1, -1, -(-K // TILE)).contiguous()


def _codes(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).contiguous()
