"""silu(gate) * up in one pass, and fused with FP8 quantisation (report §3.2.3, §3.3). Spec: ref.swiglu.

Letters: N rows, R rows of experts (compact or padded, see litseek_kernels.layout), F hidden, G = 2 F (gate first).
``weight`` is one number a row, the gate's, multiplied into the activation: y = W2 (w a), so combine is a plain sum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litseek_kernels.device import runs_kernel
from litseek_kernels.e4m3 import (
    INTERPRET,
    bf16_pair,
    from_e4m3,
    high_of,
    larger_pair,
    low_of,
    magnitude,
    narrow,
    pack_pair,
    store_transposed,
    tile_scale,
    to_e4m3,
)
from litseek_kernels.layout import TILE, Layout
from litseek_kernels.ref import swiglu as ref
from litseek_kernels.ref.quantise import BLOCK, E4M3


def swiglu(gate_up: Tensor, weight: Tensor | None = None) -> Tensor:
    """(..., F) of (..., 2F), times weight (...) where given. Backward recomputes: only ``gate_up`` (and weight) is kept."""
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2 or not gate_up.is_floating_point():
        raise ValueError(f"swiglu wants the gate's and the up half in the last dimension, got {_named(gate_up)}")
    if weight is not None and weight.shape != gate_up.shape[:-1]:
        raise ValueError(f"swiglu's weight {_named(weight)} is not one number for each row of {_named(gate_up)}")
    rows = gate_up.flatten(0, -2) if gate_up.ndim > 1 else gate_up[None]
    out = _swiglu(rows, None if weight is None else weight.flatten())
    return out.unflatten(0, gate_up.shape[:-1]) if gate_up.ndim > 1 else out[0]


def swiglu_quantise(
    h_RG: Tensor, *, layout: Layout | None = None, weight_R: Tensor | None = None, power_of_two: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scale (1x128) of the activation, then codes and scale of h itself: what backward keeps.

    With ``layout`` h is padded, weight_R compact; padding rows give zeros and unused tiles are left unwritten.
    """
    if h_RG.ndim != 2 or h_RG.shape[1] % 2 or h_RG.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"swiglu_quantise wants rows of gate and up in BF16 or FP32, got {_named(h_RG)}")
    begin, count = _tiles(h_RG, layout, weight_R)
    return _swiglu_quantise(h_RG, begin, count, weight_R, power_of_two)


class HiddenGradients(NamedTuple):
    """What the experts' backward multiplies with."""

    activation_t: Tensor
    activation_scale_t: Tensor
    """The recomputed, weighted activation 128x1: codes (F, R), scale (R / 128, F)."""
    codes: Tensor
    scale: Tensor
    """The gradient of h 1x128: codes (R, 2F), scale (2F / 128, R)."""
    codes_t: Tensor
    scale_t: Tensor
    """And 128x1: codes (2F, R), scale (R / 128, 2F)."""
    weight: Tensor | None
    """The gradient of weight_R, float32."""


def swiglu_backward_quantise(
    h_codes: Tensor, h_scale: Tensor, grad_RF: Tensor, *, layout: Layout | None = None, weight_R: Tensor | None = None
) -> HiddenGradients:
    """From h as ``swiglu_quantise`` kept it and the (weighted) activation's gradient, BF16, in one pass."""
    R, G = h_codes.shape
    if h_codes.dtype != E4M3 or h_scale.shape != (-(-G // BLOCK), R) or grad_RF.shape != (R, G // 2):
        found = ", ".join(map(_named, (h_codes, h_scale, grad_RF)))
        raise ValueError(f"h in FP8, its scales and the activation's gradient do not fit: {found}")
    begin, count = _tiles(h_codes, layout, weight_R)
    *parts, grad_weight = _swiglu_backward_quantise(h_codes, h_scale, grad_RF, begin, count, weight_R)
    return HiddenGradients._make([*parts, None if weight_R is None else grad_weight])


def _tiles(h: Tensor, layout: Layout | None, weight_R: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if layout is None:
        if weight_R is not None and weight_R.shape != h.shape[:1]:
            raise ValueError(f"swiglu's weight {_named(weight_R)} is not one number for each row of {_named(h)}")
        return None, None
    if layout.tile_begin.shape[0] * TILE != h.shape[0]:
        raise ValueError(f"{_named(h)} is not the padded layout of {layout.tile_begin.shape[0]} tiles of {TILE} rows")
    return layout.tile_begin, layout.tile_count


def _named(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


@torch.library.custom_op("litseek::swiglu", mutates_args=())
def _swiglu(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    if not _has_kernel(gate_up):
        return ref.swiglu_forward(gate_up, weight)
    gate_up = gate_up.contiguous()
    N, F = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(N, F)
    if out.numel():
        grid = (triton.cdiv(N, BLOCK_N), triton.cdiv(F, BLOCK_F))
        _forward_kernel[grid](
            gate_up, weight, out, N, F, WEIGHTED=weight is not None, BLOCK_N=BLOCK_N, BLOCK_F=BLOCK_F, num_warps=4
        )
    return out


@_swiglu.register_fake
def _(gate_up, weight):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op("litseek::swiglu_backward", mutates_args=())
def _swiglu_backward(gate_up: Tensor, grad: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of gate_up and weight; the second has no elements without a weight."""
    if not _has_kernel(gate_up):
        grad_gate_up, grad_weight = ref.swiglu_backward(gate_up, grad, weight)
        return grad_gate_up, grad.new_empty(0) if grad_weight is None else grad_weight
    gate_up, grad = gate_up.contiguous(), grad.contiguous()
    N, F = grad.shape
    grad_gate_up = torch.empty_like(gate_up)
    grad_weight = grad.new_empty(0) if weight is None else torch.empty_like(weight)
    if N:
        _backward_kernel[(triton.cdiv(N, ROWS_BACKWARD),)](
            gate_up, grad, weight, grad_gate_up, grad_weight, N, F,
            WEIGHTED=weight is not None, BLOCK_N=ROWS_BACKWARD, BLOCK_F=BLOCK_F_BACKWARD, num_warps=4,
        )  # fmt: skip
    return grad_gate_up, grad_weight


@_swiglu_backward.register_fake
def _(gate_up, grad, weight):
    return torch.empty_like(gate_up), grad.new_empty(0) if weight is None else torch.empty_like(weight)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    gate_up, weight = ctx.saved_tensors
    grad_gate_up, grad_weight = _swiglu_backward(gate_up, grad, weight)
    return grad_gate_up, grad_weight if weight is not None else None


_swiglu.register_autograd(_autograd, setup_context=_setup)


@torch.library.custom_op("litseek::swiglu_quantise", mutates_args=())
def _swiglu_quantise(
    h: Tensor, tile_begin: Tensor | None, tile_count: Tensor | None, weight: Tensor | None, power_of_two: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R, F = h.shape[0], h.shape[1] // 2
    if not runs_kernel(h) or F % BLOCK:  # no released or benchmarked expert is that ragged
        return ref.swiglu_quantise(h, tile_begin, tile_count, weight, power_of_two)
    out = codes, scale, h_codes, h_scale = *_empty_codes(h, R, F), *_empty_codes(h, R, 2 * F)
    if codes.numel():
        grid = (triton.cdiv(R, QUANTISE_ROWS) * (F // BLOCK),)
        _quantise_kernel[grid](
            h.contiguous(), weight, tile_begin, tile_count, codes.view(torch.uint8), scale, h_codes.view(torch.uint8), h_scale, R, F,
            GROUPED=tile_begin is not None, WEIGHTED=weight is not None, POWER_OF_TWO=power_of_two,
            BLOCK_R=QUANTISE_ROWS, num_warps=QUANTISE_WARPS,
        )  # fmt: skip
    return out


@_swiglu_quantise.register_fake
def _(h, tile_begin, tile_count, weight, power_of_two):
    R, F = h.shape[0], h.shape[1] // 2
    return *_empty_codes(h, R, F), *_empty_codes(h, R, 2 * F)


@torch.library.custom_op("litseek::swiglu_backward_quantise", mutates_args=())
def _swiglu_backward_quantise(
    h_codes: Tensor,
    h_scale: Tensor,
    grad: Tensor,
    tile_begin: Tensor | None,
    tile_count: Tensor | None,
    weight: Tensor | None,
) -> list[Tensor]:
    """The fields of ``HiddenGradients``; the last has no elements without a weight."""
    R, F = grad.shape
    if not runs_kernel(grad) or F % BLOCK or R % TILE:
        *out, grad_weight = ref.swiglu_backward_quantise(h_codes, h_scale, grad, tile_begin, tile_count, weight)
        return [*out, grad.new_empty(0, dtype=torch.float32) if grad_weight is None else grad_weight]
    a_t, a_scale_t = _empty_codes(grad, F, R)
    codes, scale = _empty_codes(grad, R, 2 * F)
    codes_t, scale_t = _empty_codes(grad, 2 * F, R)
    blocks = F // BLOCK
    part = grad.new_zeros(
        blocks if weight is not None else 0, 0 if weight is None else weight.numel(), dtype=torch.float32
    )
    if a_t.numel():
        _backward_quantise_kernel[(R // TILE * blocks,)](
            h_codes.view(torch.uint8), h_scale, grad.contiguous(), weight, tile_begin, tile_count,
            a_t.view(torch.int32), a_scale_t, codes.view(torch.uint8), scale, codes_t.view(torch.int32), scale_t,
            part, R, F, part.shape[1], GROUPED=tile_begin is not None, WEIGHTED=weight is not None,
            num_warps=BACKWARD_QUANTISE_WARPS,
        )  # fmt: skip
    return [a_t, a_scale_t, codes, scale, codes_t, scale_t, part.sum(0)]


@_swiglu_backward_quantise.register_fake
def _(h_codes, h_scale, grad, tile_begin, tile_count, weight):
    R, F = grad.shape
    grad_weight = grad.new_empty(0 if weight is None else weight.shape[0], dtype=torch.float32)
    return [*_empty_codes(grad, F, R), *_empty_codes(grad, R, 2 * F), *_empty_codes(grad, 2 * F, R), grad_weight]


def _empty_codes(like: Tensor, M: int, K: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(M, K, dtype=E4M3), like.new_empty(-(-K // BLOCK), M, dtype=torch.float32)


BLOCK_N, BLOCK_F = 4, 512
ROWS_BACKWARD, BLOCK_F_BACKWARD = 4, 256
QUANTISE_ROWS, QUANTISE_WARPS = 32, 4
BACKWARD_QUANTISE_WARPS = 8


def _has_kernel(x: Tensor) -> bool:
    return runs_kernel(x) and x.dtype in (torch.bfloat16, torch.float32)


@triton.jit
def _sigmoid(x):
    """1 / (1 + 2^(-x log2 e)) in four instructions where tl.sigmoid's exact division takes ten.

    Relative error a few times 1e-7, and for negative x it grows as the rounding of x log2 e does, 1e-7 |x|.
    """
    if INTERPRET:
        return tl.sigmoid(x)
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _forward_kernel(
    h_ptr, weight_ptr, out_ptr, N, F, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (n < N)[:, None] & (f < F)[None, :]
    at = n.to(tl.int64)[:, None] * F + f[None, :]
    at_gate = n.to(tl.int64)[:, None] * (2 * F) + f[None, :]
    gate = tl.load(h_ptr + at_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at_gate + F, mask=mask, other=0.0).to(tl.float32)
    out = gate * _sigmoid(gate) * up
    if WEIGHTED:
        out = out * tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + at, narrow(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_gradients(gate, up, grad, weight, WEIGHTED: tl.constexpr):
    """Of gate and up, then silu(gate) and the unweighted activation; grad is that of the weighted activation."""
    gate_sigmoid = _sigmoid(gate)
    silu = gate * gate_sigmoid
    if WEIGHTED:
        grad = grad * weight[:, None]
    return grad * up * (gate_sigmoid + silu * (1.0 - gate_sigmoid)), grad * silu, silu * up


@triton.jit
def _backward_kernel(
    h_ptr, grad_ptr, weight_ptr, grad_h_ptr, grad_weight_ptr, N, F,
    WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Whole rows a program, so that the weight's gradient is one sum in one order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)[:, None]
    if WEIGHTED:
        weight = tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    else:
        weight = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for first in range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        mask = (n < N)[:, None] & (f < F)[None, :]
        at_gate = row * (2 * F) + f[None, :]
        gate = tl.load(h_ptr + at_gate, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + at_gate + F, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_gate, grad_up, activation = swiglu_gradients(gate, up, grad, weight, WEIGHTED)
        total += grad * activation
        tl.store(grad_h_ptr + at_gate, narrow(grad_gate, grad_h_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_h_ptr + at_gate + F, narrow(grad_up, grad_h_ptr.dtype.element_ty), mask=mask)
    if WEIGHTED:
        rounded = narrow(tl.sum(total, 1), grad_weight_ptr.dtype.element_ty)
        tl.store(grad_weight_ptr + n, rounded, mask=n < N)


@triton.jit
def _rows_of(row, tile, R, begin_ptr, count_ptr, GROUPED: tl.constexpr):
    """Whether padded rows are real, and their compact places."""
    if GROUPED:
        offset = row % 128
        return offset < tl.load(count_ptr + tile), tl.load(begin_ptr + tile) + offset
    else:
        return row < R, row


@triton.jit
def _store_rows(codes_ptr, scale_ptr, x, row, R, k, tile_k, K, POWER_OF_TWO: tl.constexpr):
    """1x128 codes and scales of (I, 128) numbers."""
    scale, inverse = tile_scale(tl.max(magnitude(x), 1), POWER_OF_TWO)
    kept = row < R
    code = to_e4m3(x * inverse[:, None])
    tl.store(codes_ptr + row.to(tl.int64)[:, None] * K + k[None, :], code, mask=kept[:, None])
    tl.store(scale_ptr + tile_k.to(tl.int64) * R + row, scale, mask=kept)


@triton.jit
def _quantise_kernel(
    h_ptr, weight_ptr, begin_ptr, count_ptr, codes_ptr, scale_ptr, h_codes_ptr, h_scale_ptr, R, F,
    GROUPED: tl.constexpr, WEIGHTED: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of one 128-wide tile of the gate, the same of up."""
    tiles_f = F // 128
    tile_f = tl.program_id(0) % tiles_f
    row = tl.program_id(0) // tiles_f * BLOCK_R + tl.arange(0, BLOCK_R)
    tile = tl.program_id(0) // tiles_f * BLOCK_R // 128
    if GROUPED:  # noqa: SIM102 (this condition is the compiler's)
        if tl.load(count_ptr + tile) == 0:
            return
    live, place = _rows_of(row, tile, R, begin_ptr, count_ptr, GROUPED)
    f = tile_f * 128 + tl.arange(0, 128)
    at = row.to(tl.int64)[:, None] * (2 * F) + f[None, :]
    gate = tl.load(h_ptr + at, mask=live[:, None], other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at + F, mask=live[:, None], other=0.0).to(tl.float32)
    activation = gate * _sigmoid(gate) * up
    if WEIGHTED:
        activation = activation * tl.load(weight_ptr + place, mask=live, other=0.0).to(tl.float32)[:, None]
    _store_rows(h_codes_ptr, h_scale_ptr, gate, row, R, f, tile_f, 2 * F, False)
    _store_rows(h_codes_ptr, h_scale_ptr, up, row, R, F + f, tiles_f + tile_f, 2 * F, False)
    _store_rows(codes_ptr, scale_ptr, activation, row, R, f, tile_f, F, POWER_OF_TWO)


@triton.jit
def _hidden(h_ptr, h_scale_ptr, grad_ptr, weight_ptr, place, row, live, tile_f, R, F, WEIGHTED: tl.constexpr):
    """Gradients of gate and up, the weighted activation, and the weight's gradient of this tile's columns."""
    f = tile_f * 128 + tl.arange(0, 128)
    real = live[:, None]
    at = row.to(tl.int64)[:, None] * (2 * F) + f[None, :]
    at_scale = tile_f.to(tl.int64) * R + row
    gate_scale = tl.load(h_scale_ptr + at_scale, mask=live, other=0.0)
    up_scale = tl.load(h_scale_ptr + at_scale + (F // 128).to(tl.int64) * R, mask=live, other=0.0)
    gate = from_e4m3(tl.load(h_ptr + at, mask=real, other=0)) * gate_scale[:, None]
    up = from_e4m3(tl.load(h_ptr + at + F, mask=real, other=0)) * up_scale[:, None]
    at_grad = row.to(tl.int64)[:, None] * F + f[None, :]
    grad = tl.load(grad_ptr + at_grad, mask=real, other=0.0).to(tl.float32)
    weight = gate_scale
    if WEIGHTED:
        weight = tl.load(weight_ptr + place, mask=live, other=0.0).to(tl.float32)
    grad_gate, grad_up, activation = swiglu_gradients(gate, up, grad, weight, WEIGHTED)
    grad_weight = weight
    if WEIGHTED:
        grad_weight = tl.sum(grad * activation, 1)
        activation = activation * weight[:, None]
    return grad_gate, grad_up, activation, grad_weight


@triton.jit
def _backward_quantise_kernel(
    h_ptr, h_scale_ptr, grad_ptr, weight_ptr, begin_ptr, count_ptr,
    a_t_ptr, a_scale_t_ptr, codes_ptr, scale_ptr, codes_t_ptr, scale_t_ptr, part_ptr, R, F, rows_compact,
    GROUPED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """128 rows x 128 columns of gate and of up, as four quarters of interleaved rows. What a quarter gives is rounded to
    BF16 and stays in registers until the largest number of every column is known."""
    tiles_f = F // 128
    tile_f = tl.program_id(0) % tiles_f
    tile = tl.program_id(0) // tiles_f
    if GROUPED:  # noqa: SIM102 (this condition is the compiler's)
        if tl.load(count_ptr + tile) == 0:
            return
    f = tile_f * 128 + tl.arange(0, 128)
    row = tile * 128 + 4 * tl.arange(0, 32)
    most_h, most_a = tl.zeros((32, 128), tl.int32), tl.zeros((32, 128), tl.int32)
    grads, activations = (), ()  # type: tuple, tuple
    for j in tl.static_range(0, 4, 2):
        gate0, up0, a0 = _quarter(
            h_ptr, h_scale_ptr, grad_ptr, weight_ptr, begin_ptr, count_ptr, codes_ptr, scale_ptr, part_ptr,
            row + j, tile, f, tile_f, R, F, rows_compact, GROUPED, WEIGHTED,
        )  # fmt: skip
        pair0 = bf16_pair(gate0, up0)
        gate1, up1, a1 = _quarter(
            h_ptr, h_scale_ptr, grad_ptr, weight_ptr, begin_ptr, count_ptr, codes_ptr, scale_ptr, part_ptr,
            row + j + 1, tile, f, tile_f, R, F, rows_compact, GROUPED, WEIGHTED,
        )  # fmt: skip
        pair1, pair_a = bf16_pair(gate1, up1), bf16_pair(a0, a1)
        most_h, most_a = larger_pair(larger_pair(most_h, pair0), pair1), larger_pair(most_a, pair_a)
        grads, activations = grads + (pair0, pair1), activations + (pair_a,)  # noqa: RUF005
    most_a = tl.maximum(magnitude(low_of(most_a)), magnitude(high_of(most_a)))
    wide_tile = tile.to(tl.int64)
    scale_t_ptr += wide_tile * 2 * F
    inverse = _scale_columns(scale_t_ptr + f, magnitude(low_of(most_h)))
    word = pack_pair(most_h, low_of(grads[0]) * inverse, low_of(grads[1]) * inverse, True)
    word = pack_pair(word, low_of(grads[2]) * inverse, low_of(grads[3]) * inverse, False)
    store_transposed(codes_t_ptr, word, tile * 128, f, 2 * F, R, True)
    inverse = _scale_columns(scale_t_ptr + F + f, magnitude(high_of(most_h)))
    word = pack_pair(most_h, high_of(grads[0]) * inverse, high_of(grads[1]) * inverse, True)
    word = pack_pair(word, high_of(grads[2]) * inverse, high_of(grads[3]) * inverse, False)
    store_transposed(codes_t_ptr, word, tile * 128, F + f, 2 * F, R, True)
    inverse = _scale_columns(a_scale_t_ptr + wide_tile * F + f, most_a)
    word = pack_pair(most_a, low_of(activations[0]) * inverse, high_of(activations[0]) * inverse, True)
    word = pack_pair(word, low_of(activations[1]) * inverse, high_of(activations[1]) * inverse, False)
    store_transposed(a_t_ptr, word, tile * 128, f, F, R, True)


@triton.jit
def _quarter(
    h_ptr, h_scale_ptr, grad_ptr, weight_ptr, begin_ptr, count_ptr, codes_ptr, scale_ptr, part_ptr,
    row, tile, f, tile_f, R, F, rows_compact, GROUPED: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """32 rows: store what is whole with them, return the gradients of gate and up, and the activation."""
    live, place = _rows_of(row, tile, R, begin_ptr, count_ptr, GROUPED)
    gate, up, activation, grad_weight = _hidden(
        h_ptr, h_scale_ptr, grad_ptr, weight_ptr, place, row, live, tile_f, R, F, WEIGHTED
    )
    _store_rows(codes_ptr, scale_ptr, gate, row, R, f, tile_f, 2 * F, False)
    _store_rows(codes_ptr, scale_ptr, up, row, R, F + f, F // 128 + tile_f, 2 * F, False)
    if WEIGHTED:
        tl.store(part_ptr + tile_f.to(tl.int64) * rows_compact + place, grad_weight, mask=live)
    return gate, up, activation


@triton.jit
def _scale_columns(scale_ptr, magnitudes):
    """Store 128x1 scales of columns, given the largest of its rows by fours; return what makes codes."""
    scale, inverse = tile_scale(tl.max(magnitudes, 0), False)
    tl.store(scale_ptr, scale)
    return inverse[None, :]
