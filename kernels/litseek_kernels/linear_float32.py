"""x W^T of bfloat16 rows and a float32 matrix, as exact as in float32 and on the bfloat16 tensor cores. Spec:
ref.linear_float32. Letters: T rows, D in, E out.

A float32 is the sum of three bfloat16 (24 = 3 x 8 bits of mantissa) and a product of two bfloat16 is exact in float32, so
x W^T = x W0^T + x W1^T + x W2^T loses nothing but in its sums. Tensor cores cut bits when they add, so a sum over a
block of the inner dimension goes to a float32 register sum of its own. No float32 copy of x is made or kept.

On an H200, 32768 x 1536 by 64: torch's float32 product takes 325 us forward with its cast, 270 and 214 us backward; these
kernels take 66-81 us each on average inside a training step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from litseek_kernels.device import runs_kernel
from litseek_kernels.operator import operator
from litseek_kernels.ref import linear_float32 as ref


def linear_float32(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """(T, E) float32. Where x is not bfloat16 it is torch's own float32 product."""
    if not runs_kernel(x_TD) or x_TD.dtype != torch.bfloat16 or weight_ED.dtype != torch.float32:
        return ref.linear_float32(x_TD, weight_ED)
    if x_TD.ndim != 2 or weight_ED.ndim != 2 or x_TD.shape[1] != weight_ED.shape[1]:
        raise ValueError(f"linear_float32 has rows {tuple(x_TD.shape)} for a weight {tuple(weight_ED.shape)}")
    return _linear(x_TD, weight_ED)


# ---- operators


@operator("litseek::linear_float32")
def _linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return _product(x_TD.unsqueeze(0), _split(weight_ED).transpose(1, 2), _FORWARD, torch.float32)


@_linear.register_fake
def _(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    return weight_ED.new_empty(x_TD.shape[0], weight_ED.shape[0])


@operator("litseek::linear_float32_backward")
def _linear_backward(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    grad, weight = _split(grad_TE), _split(weight_ED)
    grad_x = _product(grad, weight, _BOTH, torch.bfloat16)
    return grad_x, _product(grad.transpose(1, 2), x_TD.unsqueeze(0), _LEFT, torch.float32)


@_linear_backward.register_fake
def _(grad_TE: Tensor, x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), weight_ED.new_empty(weight_ED.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_TE: Tensor):
    return _linear_backward(grad_TE, *ctx.saved_tensors)


_linear.register_autograd(_backward, setup_context=_save)


def _split(x: Tensor) -> Tensor:
    """(3, *shape) bfloat16 that sum to x."""
    x, parts = x.contiguous(), x.new_empty(3, *x.shape, dtype=torch.bfloat16)
    if x.numel():
        _split_kernel[(triton.cdiv(x.numel(), 2048),)](x, parts, x.numel(), 2048, num_warps=4)
    return parts


_FORWARD, _LEFT, _BOTH = 0, 1, 2
"""Which operand comes in three parts: the right one, the left one, both (then the three largest products count, which
is more than a bfloat16 result can show)."""


def _product(left: Tensor, right: Tensor, kind: int, dtype: torch.dtype) -> Tensor:
    """(M, N): the sum over parts of left (P, M, K) times right (P, K, N). Deterministic also where K is divided."""
    (_, M, K), N = left.shape, right.shape[2]
    block_m, block_n, block_k, warps, stages = _BLOCKS[kind]
    tiles = triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    # few tiles and a long K: several programs share a tile, and their sums are added in order
    splits = max(min(_PROGRAMS // max(tiles, 1), triton.cdiv(K, 16 * block_k)), 1) if kind == _LEFT else 1
    out = left.new_empty(splits, M, N, dtype=dtype)
    if out.numel():
        span = triton.cdiv(triton.cdiv(K, splits), block_k) * block_k
        _product_kernel[(triton.cdiv(M, block_m), triton.cdiv(N, block_n), splits)](
            left, right, out, M, N, K, span, *left.stride(), *right.stride(), kind, left.is_cpu,
            block_m, block_n, block_k, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out.sum(0) if splits > 1 else out[0]


_BLOCKS = {_FORWARD: (128, 64, 64, 4, 3), _LEFT: (64, 128, 64, 4, 3), _BOTH: (128, 128, 64, 8, 2)}
"""Tile of M, N, K; warps; stages."""
_PROGRAMS = 264


# ---- kernels


@triton.jit
def _split_kernel(x_ptr, parts_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x_ptr + i, mask=i < n, other=0.0)
    for part in tl.static_range(3):
        high = rest.to(tl.bfloat16)
        tl.store(parts_ptr + part * n + i, high, mask=i < n)
        rest = rest - high.to(tl.float32)


@triton.jit
def _dot(a, b, total, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter multiplies no bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def _product_kernel(
    left_ptr,
    right_ptr,
    out_ptr,
    M,
    N,
    K,
    span,
    left_p,
    left_m,
    left_k,
    right_p,
    right_k,
    right_n,
    KIND: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the output over ``span`` of K, small parts first."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    left_ptr += m.to(tl.int64)[:, None] * left_m
    right_ptr += n.to(tl.int64)[None, :] * right_n
    m_live, n_live = (m < M)[:, None], (n < N)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    end = tl.minimum((split + 1) * span, K)
    for start in range(split * span, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left, right = left_ptr + k.to(tl.int64)[None, :] * left_k, right_ptr + k.to(tl.int64)[:, None] * right_k
        left_live, right_live = m_live & (k < end)[None, :], n_live & (k < end)[:, None]
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if KIND == 0:
            a = tl.load(left, mask=left_live, other=0.0)
            for p in tl.static_range(3):
                part = _dot(a, tl.load(right + (2 - p) * right_p, mask=right_live, other=0.0), part, UPCAST)
        elif KIND == 1:
            b = tl.load(right, mask=right_live, other=0.0)
            for p in tl.static_range(3):
                part = _dot(tl.load(left + (2 - p) * left_p, mask=left_live, other=0.0), b, part, UPCAST)
        else:
            a = tl.load(left, mask=left_live, other=0.0)
            b = tl.load(right, mask=right_live, other=0.0)
            part = _dot(tl.load(left + left_p, mask=left_live, other=0.0), b, part, UPCAST)
            part = _dot(a, tl.load(right + right_p, mask=right_live, other=0.0), part, UPCAST)
            part = _dot(a, b, part, UPCAST)
        total += part
    out = out_ptr + split.to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=m_live & n_live)
