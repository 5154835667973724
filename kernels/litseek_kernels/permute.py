"""Token rows to expert order and back, at memory speed. Spec: ref.permute. Letters: T tokens, K chosen a token,
R rows (one a choice), D model, E experts. A choice of -1 has no row.

A token's K rows lie scattered over the experts, so every kernel walks over tokens: a token's own row is read or written
once, and its K rows are whole rows in memory. Sums over K are in float32 and in the order of the choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from litseek_kernels.device import runs_kernel
from litseek_kernels.operator import operator
from litseek_kernels.ref import permute as ref


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order_R (row -> flat (token, choice)) and inverse_TK, int32; count_E, int64. A stable counting sort.

    order_R has T * K places, of which the first ``count_E.sum()`` mean something: all but those of choices of -1."""
    if not runs_kernel(expert_TK):
        return ref.sort_by_expert(expert_TK, num_experts)
    return _sort_by_expert(expert_TK, num_experts)


def permute(x_TD: Tensor, order_R: Tensor, inverse_TK: Tensor) -> Tensor:
    """(R, D): each token's row once for every expert it chose, experts together."""
    if not runs_kernel(x_TD):
        return ref.permute(x_TD, order_R, inverse_TK)
    if x_TD.ndim != 2 or inverse_TK.ndim != 2 or x_TD.shape[0] != inverse_TK.shape[0]:
        raise ValueError(f"permute has rows {tuple(x_TD.shape)} for choices {tuple(inverse_TK.shape)}")
    return _spread(x_TD, inverse_TK, order_R.shape[0])


def unpermute(rows_RD: Tensor, weight_TK: Tensor | None, order_R: Tensor, inverse_TK: Tensor) -> Tensor:
    """(T, D): the sum of a token's rows, each times its weight where there are weights, in rows' dtype. Only with
    weights do the rows stay for backward."""
    if not runs_kernel(rows_RD):
        return ref.unpermute(rows_RD, weight_TK, order_R, inverse_TK)
    if weight_TK is not None and weight_TK.shape != inverse_TK.shape:
        raise ValueError(f"unpermute has weights {tuple(weight_TK.shape)} for choices {tuple(inverse_TK.shape)}")
    if rows_RD.ndim != 2 or inverse_TK.ndim != 2 or rows_RD.shape[0] != order_R.shape[0]:
        raise ValueError(
            f"unpermute has rows {tuple(rows_RD.shape)}, {order_R.shape[0]} places and choices {tuple(inverse_TK.shape)}"
        )
    return _gather_sum(rows_RD, weight_TK, inverse_TK)


def weight_of_rows(weight_TK: Tensor, order_R: Tensor, inverse_TK: Tensor) -> Tensor:
    """weight_R: the gate's weights in the rows' order."""
    return ref.weight_of_rows(weight_TK, order_R, inverse_TK)


# ---- operators


@operator("litseek::sort_by_expert")
def _sort_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    expert_TK = expert_TK.contiguous()
    order, inverse, count = _empty_sort(expert_TK, num_experts)
    rows = expert_TK.numel()
    if not rows:
        return order, inverse, count.zero_()
    blocks = triton.cdiv(rows, _SORT_ROWS)
    partial = torch.empty(blocks, num_experts, dtype=torch.int32, device=expert_TK.device)
    width = triton.next_power_of_2(num_experts)
    _count_kernel[(blocks,)](expert_TK, partial, rows, num_experts, _SORT_ROWS, _SORT_STEP, width, num_warps=4)
    _place_kernel[(blocks,)](
        expert_TK, partial, order, inverse, count, rows, num_experts, blocks, _SORT_ROWS, _SORT_STEP, width,
        max(4096 // width, 8), num_warps=4,
    )  # fmt: skip
    return order, inverse, count


@_sort_by_expert.register_fake
def _(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_sort(expert_TK, num_experts)


def _empty_sort(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    order = expert_TK.new_empty(expert_TK.numel(), dtype=torch.int32)
    inverse = expert_TK.new_empty(expert_TK.shape, dtype=torch.int32)
    return order, inverse, expert_TK.new_empty(num_experts, dtype=torch.int64)


@operator("litseek::permute")
def _spread(x_TD: Tensor, inverse_TK: Tensor, num_rows: int) -> Tensor:
    x_TD, (T, K), D = x_TD.contiguous(), inverse_TK.shape, x_TD.shape[1]
    rows = x_TD.new_empty(num_rows, D)
    if rows.numel():
        grid, meta = _launch(T, D)
        _spread_kernel[grid](x_TD, inverse_TK, rows, T, D, K, **meta)
    return rows


@_spread.register_fake
def _(x_TD: Tensor, inverse_TK: Tensor, num_rows: int) -> Tensor:
    return x_TD.new_empty(num_rows, x_TD.shape[1])


@operator("litseek::unpermute")
def _gather_sum(rows_RD: Tensor, weight_TK: Tensor | None, inverse_TK: Tensor) -> Tensor:
    rows_RD, (T, K), D = rows_RD.contiguous(), inverse_TK.shape, rows_RD.shape[1]
    out = rows_RD.new_empty(T, D)
    if out.numel():
        grid, meta = _launch(T, D)
        weight = rows_RD if weight_TK is None else weight_TK.contiguous()
        _gather_sum_kernel[grid](rows_RD, weight, inverse_TK, out, T, D, K, weight_TK is not None, **meta)
    return out


@_gather_sum.register_fake
def _(rows_RD: Tensor, weight_TK: Tensor | None, inverse_TK: Tensor) -> Tensor:
    return rows_RD.new_empty(inverse_TK.shape[0], rows_RD.shape[1])


@operator("litseek::unpermute_backward")
def _gather_sum_backward(
    grad_TD: Tensor, rows_RD: Tensor, weight_TK: Tensor, inverse_TK: Tensor
) -> tuple[Tensor, Tensor]:
    grad_TD, rows_RD, weight_TK = grad_TD.contiguous(), rows_RD.contiguous(), weight_TK.contiguous()
    (T, K), D = inverse_TK.shape, rows_RD.shape[1]
    grad_rows, grad_weight = torch.empty_like(rows_RD), torch.empty_like(weight_TK)
    if rows_RD.numel():
        _unpermute_backward_kernel[(T,)](
            grad_TD, rows_RD, weight_TK, inverse_TK, grad_rows, grad_weight, D, K,
            triton.next_power_of_2(K), min(triton.next_power_of_2(D), 512), num_warps=4,
        )  # fmt: skip
    else:
        grad_weight.zero_()  # rows of width 0
    return grad_rows, grad_weight


@_gather_sum_backward.register_fake
def _(grad_TD: Tensor, rows_RD: Tensor, weight_TK: Tensor, inverse_TK: Tensor) -> tuple[Tensor, Tensor]:
    return rows_RD.new_empty(rows_RD.shape), weight_TK.new_empty(weight_TK.shape)


def _save_for_spread(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _spread_backward(ctx, grad_RD: Tensor):
    return _gather_sum(grad_RD, None, ctx.saved_tensors[0]), None, None


def _save_for_sum(ctx, inputs, output) -> None:
    rows_RD, weight_TK, inverse_TK = inputs
    kept = (inverse_TK,) if weight_TK is None else (inverse_TK, rows_RD, weight_TK)
    ctx.save_for_backward(*kept)
    ctx.num_rows = rows_RD.shape[0]


def _sum_backward(ctx, grad_TD: Tensor):
    inverse_TK, *kept = ctx.saved_tensors
    if not kept:
        return _spread(grad_TD, inverse_TK, ctx.num_rows), None, None
    rows_RD, weight_TK = kept
    return *_gather_sum_backward(grad_TD, rows_RD, weight_TK, inverse_TK), None


_spread.register_autograd(_spread_backward, setup_context=_save_for_spread)
_gather_sum.register_autograd(_sum_backward, setup_context=_save_for_sum)

_SORT_ROWS, _SORT_STEP = 1024, 128
"""Rows of one program of the sort, and how many of them are compared with each other at a time."""


def _launch(T: int, D: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (tokens, pieces of a row). Pieces of 512 fit 1536 and 7168 without a remainder.

    On an H200 pieces of 256 to 1024 and 1 to 4 warps are alike: sums 4.0-4.1 TB/s, copies 3.7, a plain copy 4.2."""
    block = min(triton.next_power_of_2(D), 512)
    return (T, triton.cdiv(D, block)), {"BLOCK_D": block, "num_warps": 2}


# ---- kernels


@triton.jit
def _spread_kernel(x_ptr, inverse_ptr, rows_ptr, T, D, K: tl.constexpr, BLOCK_D: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)  # rows * D passes 2**31
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + t * D + d, mask=d < D)
    for k in tl.static_range(K):
        row = tl.load(inverse_ptr + t * K + k).to(tl.int64)
        tl.store(rows_ptr + row * D + d, x, mask=(d < D) & (row >= 0))


@triton.jit
def _gather_sum_kernel(
    rows_ptr, weight_ptr, inverse_ptr, out_ptr, T, D, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_D: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(inverse_ptr + t * K + k).to(tl.int64)
        part = tl.load(rows_ptr + row * D + d, mask=(d < D) & (row >= 0), other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weight_ptr + t * K + k).to(tl.float32)
        total += part
    tl.store(out_ptr + t * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def _unpermute_backward_kernel(
    grad_ptr,
    rows_ptr,
    weight_ptr,
    inverse_ptr,
    grad_rows_ptr,
    grad_weight_ptr,
    D,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token: its rows' gradients are its own times a weight, and the weight's is a dot product with the row.

    All rows of a piece at once, so that enough loads are in flight."""
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    row = tl.load(inverse_ptr + t * K + k, mask=k < K, other=0).to(tl.int64)[:, None]
    weight = tl.load(weight_ptr + t * K + k, mask=k < K, other=0.0).to(tl.float32)[:, None]
    dot = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        live = (k < K)[:, None] & (row >= 0) & (d < D)
        grad = tl.load(grad_ptr + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        dot += grad * tl.load(rows_ptr + row * D + d, mask=live, other=0.0).to(tl.float32)
        tl.store(grad_rows_ptr + row * D + d, (grad * weight).to(grad_rows_ptr.dtype.element_ty), mask=live)
    tl.store(grad_weight_ptr + t * K + k, tl.sum(dot, 1).to(grad_weight_ptr.dtype.element_ty), mask=k < K)


@triton.jit
def _count_kernel(expert_ptr, partial_ptr, R, E, ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_E: tl.constexpr):
    """partial[b, e]: how many of block b's rows go to expert e."""
    e = tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_E], tl.int32)
    for step in range(0, ROWS, STEP):
        r = tl.program_id(0) * ROWS + step + tl.arange(0, STEP)
        expert = tl.load(expert_ptr + r, mask=r < R, other=-1).to(tl.int32)
        count += tl.sum((expert[:, None] == e[None, :]).to(tl.int32), 0)
    tl.store(partial_ptr + tl.program_id(0) * E + e, count, mask=e < E)


@triton.jit
def _place_kernel(
    expert_ptr,
    partial_ptr,
    order_ptr,
    inverse_ptr,
    count_ptr,
    R,
    E,
    blocks,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """A row's place: its expert's start, the expert's rows in earlier blocks, and those before it in this block.

    Every program sums all blocks' counts itself: the table is small and lies in L2, and a launch is saved."""
    me = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, blocks, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        live = (b[:, None] < blocks) & (e[None, :] < E)
        part = tl.load(partial_ptr + b[:, None] * E + e[None, :], mask=live, other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where(b[:, None] < me, part, 0), 0)
    if me == 0:
        tl.store(count_ptr + e, total.to(tl.int64), mask=e < E)
    place = tl.cumsum(total, 0) - total + before

    i = tl.arange(0, STEP)
    for step in range(0, ROWS, STEP):
        r = me * ROWS + step + i
        expert = tl.load(expert_ptr + r, mask=r < R, other=-1).to(tl.int32)
        # the same numbers along the other axis
        other = tl.load(expert_ptr + me * ROWS + step + i, mask=me * ROWS + step + i < R, other=-1).to(tl.int32)
        same = expert[:, None] == other[None, :]
        rank = tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
        mine = expert[:, None] == e[None, :]
        slot = rank + tl.sum(tl.where(mine, place[None, :], 0), 1)
        tl.store(inverse_ptr + r, tl.where(expert < 0, -1, slot), mask=r < R)
        tl.store(order_ptr + slot, r, mask=(r < R) & (expert >= 0))
        place += tl.sum(mine.to(tl.int32), 0)
