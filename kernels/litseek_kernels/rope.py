"""MLA's heads from the up-projections' outputs: rotation, and the shared rotary key in each head. Spec: ref.rope.

Queries are rotated where they lie, values stay a view, and only the keys are written anew; the layout is (B, S, H, .),
which attention takes as a strided view. Letters: T = B * S tokens, H heads, N unrotated width, r rotary width, V value width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from litseek_kernels.device import runs_kernel
from litseek_kernels.operator import operator
from litseek_kernels.ref import rope as ref


def mla_heads(
    q_BSD: Tensor, kv_BSD: Tensor, k_rope_BSr: Tensor, cos_BSr: Tensor, sin_BSr: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (B, S, H, N + r) and values (B, S, H, V) for attention; ``cos``, ``sin`` (B, S, r/2) or (S, r/2).

    On a GPU ``q`` is overwritten, and so is the gradient that comes in for it: nothing else may use either. The
    values are a view of ``kv``.
    """
    _check(q_BSD, kv_BSD, k_rope_BSr, cos_BSr, heads)
    if not runs_kernel(q_BSD) or q_BSD.dtype == torch.float64:
        return ref.mla_heads(q_BSD, kv_BSD, k_rope_BSr, cos_BSr, sin_BSr, heads)
    batch, length, rope = k_rope_BSr.shape
    cos, sin = (table.expand(batch, length, rope // 2).float().contiguous() for table in (cos_BSr, sin_BSr))
    return _Heads.apply(q_BSD, kv_BSD, k_rope_BSr, cos, sin, heads)


@triton.jit
def _turned(x, cos, sin, H: tl.constexpr, PAIRS: tl.constexpr):
    """x (H, 2 * PAIRS) float32, cos and sin (1, PAIRS)."""
    even, odd = tl.split(tl.reshape(x, [H, PAIRS, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [H, 2 * PAIRS])


@triton.jit
def _forward(
    q_ptr,
    kv_ptr,
    k_rope_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    rope_stride,
    heads,
    nope,
    value,
    PAIRS: tl.constexpr,
    H: tl.constexpr,
    NOPE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    R: tl.constexpr = 2 * PAIRS
    pair, r, n = tl.arange(0, PAIRS)[None, :], tl.arange(0, R)[None, :], tl.arange(0, NOPE)[None, :]
    cos, sin = tl.load(cos_ptr + token * PAIRS + pair), tl.load(sin_ptr + token * PAIRS + pair)
    shared = _turned(tl.load(k_rope_ptr + token * rope_stride + r).to(tl.float32), cos, sin, 1, PAIRS)
    shared = shared.to(k_ptr.dtype.element_ty)
    q_ptr += token * heads * (nope + R)
    k_ptr += token * heads * (nope + R)
    kv_ptr += token * heads * (nope + value)
    for first in range(0, heads, H):
        h = first + tl.arange(0, H)[:, None]
        at = h * (nope + R)
        q = tl.load(q_ptr + at + nope + r, mask=h < heads, other=0.0).to(tl.float32)
        k = tl.load(kv_ptr + h * (nope + value) + n, mask=(h < heads) & (n < nope))
        tl.store(q_ptr + at + nope + r, _turned(q, cos, sin, H, PAIRS).to(q_ptr.dtype.element_ty), mask=h < heads)
        tl.store(k_ptr + at + n, k, mask=(h < heads) & (n < nope))
        tl.store(k_ptr + at + nope + r, tl.broadcast_to(shared, [H, R]), mask=h < heads)


@triton.jit
def _backward(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dkv_ptr,
    dk_rope_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    nope,
    value,
    PAIRS: tl.constexpr,
    H: tl.constexpr,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    R: tl.constexpr = 2 * PAIRS
    pair, r, n = tl.arange(0, PAIRS)[None, :], tl.arange(0, R)[None, :], tl.arange(0, NOPE)[None, :]
    v = tl.arange(0, VALUE)[None, :]
    cos, sin = tl.load(cos_ptr + token * PAIRS + pair), -tl.load(sin_ptr + token * PAIRS + pair)
    dq_ptr += token * heads * (nope + R)
    dk_ptr += token * heads * (nope + R)
    dv_ptr += token * heads * value
    dkv_ptr += token * heads * (nope + value)
    total = tl.zeros([H, R], tl.float32)
    for first in range(0, heads, H):
        h = first + tl.arange(0, H)[:, None]
        at = h * (nope + R)
        dq = tl.load(dq_ptr + at + nope + r, mask=h < heads, other=0.0).to(tl.float32)
        dk = tl.load(dk_ptr + at + n, mask=(h < heads) & (n < nope))
        total += tl.load(dk_ptr + at + nope + r, mask=h < heads, other=0.0).to(tl.float32)
        dv = tl.load(dv_ptr + h * value + v, mask=(h < heads) & (v < value))
        tl.store(dq_ptr + at + nope + r, _turned(dq, cos, sin, H, PAIRS).to(dq_ptr.dtype.element_ty), mask=h < heads)
        tl.store(dkv_ptr + h * (nope + value) + n, dk, mask=(h < heads) & (n < nope))
        tl.store(dkv_ptr + h * (nope + value) + nope + v, dv, mask=(h < heads) & (v < value))
    dk_rope = _turned(tl.sum(total, 0)[None, :], cos, sin, 1, PAIRS)
    tl.store(dk_rope_ptr + token * R + r, dk_rope.to(dk_rope_ptr.dtype.element_ty))


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BSD: Tensor, kv_BSD: Tensor, k_rope_BSr: Tensor, cos: Tensor, sin: Tensor, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_BSD, kv_BSD = q_BSD.contiguous(), kv_BSD.contiguous()
        k_BSHQ = _forward_op(q_BSD, kv_BSD, k_rope_BSr, cos, sin, heads)
        ctx.save_for_backward(cos, sin)
        q_BSHQ = q_BSD.view_as(k_BSHQ)
        return q_BSHQ, k_BSHQ, kv_BSD.unflatten(-1, (heads, -1))[..., k_BSHQ.shape[-1] - k_rope_BSr.shape[-1] :]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        dq_BSHQ, dk_BSHQ, dv_BSHV = (grad.contiguous() for grad in grad_outputs)
        cos, sin = ctx.saved_tensors
        dkv_BSD, dk_rope_BSr = _backward_op(dq_BSHQ, dk_BSHQ, dv_BSHV, cos, sin)
        return dq_BSHQ.flatten(-2), dkv_BSD, dk_rope_BSr, None, None, None


@operator("litseek::mla_heads", mutates_args=("q_BSD",))
def _forward_op(
    q_BSD: Tensor, kv_BSD: Tensor, k_rope_BSr: Tensor, cos_BSr: Tensor, sin_BSr: Tensor, heads: int
) -> Tensor:
    k_BSHQ = q_BSD.new_empty(*q_BSD.shape[:2], heads, q_BSD.shape[2] // heads)
    rope, nope = k_rope_BSr.shape[-1], k_BSHQ.shape[-1] - k_rope_BSr.shape[-1]
    rows = k_rope_BSr.reshape(-1, rope)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    if q_BSD.numel():
        _forward[(len(rows),)](
            *(q_BSD, kv_BSD, rows, k_BSHQ, cos_BSr, sin_BSr),
            *(rows.stride(0), heads, nope, kv_BSD.shape[2] // heads - nope),
            PAIRS=rope // 2,
            H=min(16, triton.next_power_of_2(heads)),
            NOPE=triton.next_power_of_2(nope),
            num_warps=4,
        )
    return k_BSHQ


@_forward_op.register_fake
def _(q_BSD: Tensor, kv_BSD: Tensor, k_rope_BSr: Tensor, cos_BSr: Tensor, sin_BSr: Tensor, heads: int) -> Tensor:
    return q_BSD.new_empty(q_BSD.shape[0], q_BSD.shape[1], heads, q_BSD.shape[2] // heads)


@operator("litseek::mla_heads_backward", mutates_args=("dq_BSHQ",))
def _backward_op(
    dq_BSHQ: Tensor, dk_BSHQ: Tensor, dv_BSHV: Tensor, cos_BSr: Tensor, sin_BSr: Tensor
) -> tuple[Tensor, Tensor]:
    dkv_BSD, dk_rope_BSr = _backward_outputs(dk_BSHQ, dv_BSHV, cos_BSr)
    batch, length, heads, _ = dq_BSHQ.shape
    rope, value = dk_rope_BSr.shape[-1], dv_BSHV.shape[-1]
    nope = dq_BSHQ.shape[-1] - rope
    if dq_BSHQ.numel():
        _backward[(batch * length,)](
            *(dq_BSHQ, dk_BSHQ, dv_BSHV, dkv_BSD, dk_rope_BSr, cos_BSr, sin_BSr),
            *(heads, nope, value),
            PAIRS=rope // 2,
            H=min(16, triton.next_power_of_2(heads)),
            NOPE=triton.next_power_of_2(nope),
            VALUE=triton.next_power_of_2(value),
            num_warps=4,
        )
    return dkv_BSD, dk_rope_BSr


@_backward_op.register_fake
def _(dq_BSHQ: Tensor, dk_BSHQ: Tensor, dv_BSHV: Tensor, cos_BSr: Tensor, sin_BSr: Tensor) -> tuple[Tensor, Tensor]:
    return _backward_outputs(dk_BSHQ, dv_BSHV, cos_BSr)


def _backward_outputs(dk_BSHQ: Tensor, dv_BSHV: Tensor, cos_BSr: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, width = dk_BSHQ.shape
    rope = 2 * cos_BSr.shape[-1]
    dkv_BSD = dk_BSHQ.new_empty(batch, length, heads * (width - rope + dv_BSHV.shape[-1]))
    return dkv_BSD, dk_BSHQ.new_empty(batch, length, rope)


def _check(q_BSD: Tensor, kv_BSD: Tensor, k_rope_BSr: Tensor, cos_BSr: Tensor, heads: int) -> None:
    rope = k_rope_BSr.shape[-1]
    widths = q_BSD.shape[-1] % heads == 0 == kv_BSD.shape[-1] % heads
    pairs = rope // 2 == cos_BSr.shape[-1] and rope == triton.next_power_of_2(rope) and rope > 1
    if not (widths and pairs and q_BSD.shape[:2] == kv_BSD.shape[:2] == k_rope_BSr.shape[:2]):
        raise ValueError(
            f"mla_heads takes q and kv of {heads} heads and a rotary width that is a power of 2, twice the tables' "
            f"width: q is {tuple(q_BSD.shape)}, kv {tuple(kv_BSD.shape)}, k_rope {tuple(k_rope_BSr.shape)}, cos "
            f"{tuple(cos_BSr.shape)}"
        )
