"""RMSNorm, alone or on a residual sum, forward and backward. Spec: ref.rmsnorm. Letters: N rows, D width, P programs.

Backward reads each row once: the same pass writes the input's gradient and sums the weight's, each program over its
own rows; a second, small sum over the programs makes that deterministic. Measured on H200 in us, beside torch.compile
of the specification: backward of 32768 x 1536 112 (129), of 8192 x 7168 139 (193), forward on a sum 90 (109) and 104
(126), calls' overhead in the rival's. Inside of a compiled block the compiler joins norms to their neighbours, so the
model leaves them to it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from litseek_kernels.device import runs_kernel
from litseek_kernels.operator import operator
from litseek_kernels.ref import rmsnorm as ref

MAX_WIDTH = 16384
"""A row is held in one program's registers."""


def rmsnorm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """(..., D) in x's dtype, float32 inside; ``weight`` is the FP32 master and gets an FP32 gradient."""
    if not runs_kernel(x) or x.dtype == torch.float64:
        return ref.rmsnorm(x, weight_D, eps)
    _, y = _RMSNorm.apply(_rows(x, weight_D), None, weight_D, eps)
    return y.view(x.shape)


def add_rmsnorm(x: Tensor, delta: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``sum = x + delta`` (rounded to x's dtype) and the norm of that sum, in one pass."""
    if x.shape != delta.shape or x.dtype != delta.dtype:
        raise ValueError(
            f"add_rmsnorm adds alike tensors, found {x.dtype} {tuple(x.shape)} and {delta.dtype} {tuple(delta.shape)}"
        )
    if not runs_kernel(x) or x.dtype == torch.float64:
        return ref.add_rmsnorm(x, delta, weight_D, eps)
    total, y = _RMSNorm.apply(_rows(x, weight_D), _rows(delta, weight_D), weight_D, eps)
    return total.view(x.shape), y.view(x.shape)


@triton.jit
def _forward(
    x_ptr,
    delta_ptr,
    weight_ptr,
    total_ptr,
    y_ptr,
    rstd_ptr,
    rows,
    stride,
    delta_stride,
    width,
    eps,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
    at = row[:, None] * width + col[None, :]
    if ADD:
        delta = tl.load(delta_ptr + row[:, None] * delta_stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rounded = (x + delta).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, rounded, mask=mask)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / width + eps)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (x * rstd[:, None] * weight[None, :]).to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def _backward(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    dx_ptr,
    partial_ptr,
    rows,
    stride,
    width,
    PROGRAMS: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    col = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, PROGRAMS * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        at = row[:, None] * width + col[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        normed = x * rstd
        sums += dy * normed
        scaled = dy * weight
        mean = tl.sum(scaled * normed, 1)[:, None] / width
        dx = (scaled - normed * mean) * rstd
        if ADD:
            dx += tl.load(dtotal_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + tl.program_id(0) * width + col, tl.sum(sums, 0), mask=col < width)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, delta_ND: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor | None, Tensor]:
        if delta_ND is None:
            total_ND, (y_ND, rstd_N) = None, _norm_op(x_ND, weight_D, eps)
        else:
            total_ND, y_ND, rstd_N = _add_norm_op(x_ND, delta_ND, weight_D, eps)
        ctx.save_for_backward(x_ND if total_ND is None else total_ND, weight_D, rstd_N)
        ctx.add = delta_ND is not None
        return total_ND, y_ND

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        dtotal_ND, dy_ND = grad_outputs
        x_ND, weight_D, rstd_N = ctx.saved_tensors
        assert dy_ND is not None
        dtotal_ND = dtotal_ND.contiguous() if ctx.add and dtotal_ND is not None else None
        dx_ND, partial_PD = _backward_op(dy_ND.contiguous(), dtotal_ND, x_ND, weight_D, rstd_N)
        return dx_ND, dx_ND if ctx.add else None, partial_PD.sum(0).to(weight_D.dtype), None


def _tile(width: int) -> tuple[int, int, int]:
    """Rows that backward takes at once, columns, warps: 16 numbers of each tensor a thread."""
    block = triton.next_power_of_2(width)
    rows = max(1, 2048 // block)
    return rows, block, max(1, min(16, rows * block // 512))


def _forward_tile(width: int) -> tuple[int, int, int]:
    """The same of forward: two wide rows, which hide each other's reduction (54 for 61 us at 32768 x 1536 on H200)."""
    block = triton.next_power_of_2(width)
    return max(1 if block > 8192 else 2, 4096 // block), block, 4 if block <= 2048 else 8


@operator("litseek::rmsnorm")
def _norm_op(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y_ND, rstd_N = _norm_outputs(x_ND)
    _launch_forward(x_ND, x_ND, weight_D, y_ND, y_ND, rstd_N, eps, add=False)
    return y_ND, rstd_N


@_norm_op.register_fake
def _(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _norm_outputs(x_ND)


@operator("litseek::add_rmsnorm")
def _add_norm_op(x_ND: Tensor, delta_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y_ND, rstd_N = _norm_outputs(x_ND)
    total_ND = torch.empty_like(y_ND)
    _launch_forward(x_ND, delta_ND, weight_D, total_ND, y_ND, rstd_N, eps, add=True)
    return total_ND, y_ND, rstd_N


@_add_norm_op.register_fake
def _(x_ND: Tensor, delta_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y_ND, rstd_N = _norm_outputs(x_ND)
    return torch.empty_like(y_ND), y_ND, rstd_N


@operator("litseek::rmsnorm_backward")
def _backward_op(
    dy_ND: Tensor, dtotal_ND: Tensor | None, x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor
) -> tuple[Tensor, Tensor]:
    rows, block, warps = _tile(x_ND.shape[1])
    dx_ND, partial_PD = _backward_outputs(x_ND)
    programs = len(partial_PD)
    _backward[(programs,)](
        *(dy_ND, dy_ND if dtotal_ND is None else dtotal_ND, x_ND, weight_D, rstd_N, dx_ND, partial_PD),
        *(len(x_ND), x_ND.stride(0), x_ND.shape[1]),
        PROGRAMS=programs,
        ADD=dtotal_ND is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )
    return dx_ND, partial_PD


@_backward_op.register_fake
def _(dy_ND: Tensor, dtotal_ND: Tensor | None, x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor) -> tuple[Tensor, Tensor]:
    return _backward_outputs(x_ND)


def _launch_forward(
    x_ND: Tensor,
    delta_ND: Tensor,
    weight_D: Tensor,
    total_ND: Tensor,
    y_ND: Tensor,
    rstd_N: Tensor,
    eps: float,
    add: bool,
) -> None:
    if not x_ND.numel():
        return
    rows, block, warps = _forward_tile(x_ND.shape[1])
    _forward[(triton.cdiv(len(x_ND), rows),)](
        *(x_ND, delta_ND, weight_D, total_ND, y_ND, rstd_N),
        *(len(x_ND), x_ND.stride(0), delta_ND.stride(0), x_ND.shape[1], eps),
        ADD=add,
        ROWS=rows,
        BLOCK=block,
        num_warps=warps,
    )


def _norm_outputs(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(x_ND.shape[:1], dtype=torch.float32)


def _backward_outputs(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    _, _, warps = _tile(x_ND.shape[1])
    programs = _processors(x_ND.device) * max(1, 32 // warps)
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty((programs, x_ND.shape[1]), dtype=torch.float32)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _rows(x: Tensor, weight_D: Tensor) -> Tensor:
    """(N, D) without a copy where rows lie evenly apart, as those of a slice of the last dimension do."""
    if weight_D.shape != x.shape[-1:] or weight_D.shape[0] > MAX_WIDTH:
        raise ValueError(
            f"rmsnorm takes rows of the weight's width, at most {MAX_WIDTH}: x is {tuple(x.shape)}, the weight "
            f"{tuple(weight_D.shape)}"
        )
    rows_ND = x.reshape(-1, x.shape[-1])
    return rows_ND if rows_ND.stride(-1) == 1 else rows_ND.contiguous()
