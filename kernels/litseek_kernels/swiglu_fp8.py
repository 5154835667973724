"""SwiGLU fused with FP8 quantisation (report §3.2.3, §3.3). Spec: ref.swiglu.

Letters: R rows of experts (compact or padded, see litseek_kernels.layout), F hidden, G = 2 F (gate first).
``weight`` is one number a row, the gate's, multiplied into the activation.

Backward is Gluon for Hopper: its three matrices wait in shared memory as BF16 until the largest number of every column is
known: 2384 GB/s on an H200, where in registers they left room for one program of 8 warps a multiprocessor: 1445 GB/s. The
two-way quantiser, whose state is a third, gains nothing from it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from litseek_kernels.device import runs_kernel
from litseek_kernels.e4m3 import bf16_pair, high_of, low_of, magnitude, tile_scale, to_e4m3
from litseek_kernels.layout import TILE, Layout
from litseek_kernels.operator import operator
from litseek_kernels.ref import swiglu as ref
from litseek_kernels.ref.quantise import BLOCK, E4M3
from litseek_kernels.swiglu import _named, _sigmoid


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


@operator("litseek::swiglu_quantise")
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


@operator("litseek::swiglu_backward_quantise")
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
    if not grad.is_cuda or F % BLOCK or R % TILE:  # Gluon has no interpreter
        *results, grad_weight = ref.swiglu_backward_quantise(h_codes, h_scale, grad, tile_begin, tile_count, weight)
        return [*results, grad.new_empty(0, dtype=torch.float32) if grad_weight is None else grad_weight]
    out = *_empty_codes(grad, F, R), *_empty_codes(grad, R, 2 * F), *_empty_codes(grad, 2 * F, R)
    a_t, a_scale_t, codes, scale, codes_t, scale_t = out
    blocks = F // BLOCK
    columns = 0 if weight is None else weight.numel()
    part = grad.new_zeros(blocks if weight is not None else 0, columns, dtype=torch.float32)
    if a_t.numel():
        _backward_kernel[(R // TILE * blocks,)](
            h_codes.view(torch.uint8), h_scale, grad.contiguous(), weight, tile_begin, tile_count,
            a_t.view(torch.uint8), a_scale_t, codes.view(torch.uint8), scale, codes_t.view(torch.uint8), scale_t,
            part, R, F, columns, GROUPED=tile_begin is not None, WEIGHTED=weight is not None, WARPS=8, num_warps=8,
        )  # fmt: skip
    return [*out, part.sum(0)]


@_swiglu_backward_quantise.register_fake
def _(h_codes, h_scale, grad, tile_begin, tile_count, weight):
    R, F = grad.shape
    grad_weight = grad.new_empty(0 if weight is None else weight.shape[0], dtype=torch.float32)
    return [*_empty_codes(grad, F, R), *_empty_codes(grad, R, 2 * F), *_empty_codes(grad, 2 * F, R), grad_weight]


def _empty_codes(like: Tensor, M: int, K: int) -> tuple[Tensor, Tensor]:
    return like.new_empty(M, K, dtype=E4M3), like.new_empty(-(-K // BLOCK), M, dtype=torch.float32)


QUANTISE_ROWS, QUANTISE_WARPS = 32, 4


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


@gluon.jit
def _backward_kernel(
    h_ptr, h_scale_ptr, grad_ptr, weight_ptr, begin_ptr, count_ptr,
    a_t_ptr, a_scale_t_ptr, codes_ptr, scale_ptr, codes_t_ptr, scale_t_ptr, part_ptr, R, F, rows_compact,
    GROUPED: gl.constexpr, WEIGHTED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """128 rows x 128 columns of gate and of up, 2 rows a warp at a time: what is whole with a row is stored, the rest waits
    in shared memory, two neighbouring columns in a word. Four words after every 16 rows keep columns out of one bank."""
    STEP: gl.constexpr = 2 * WARPS
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    columns: gl.constexpr = gl.BlockedLayout([16, 1], [8, 4], [1, WARPS], [0, 1])
    waiting: gl.constexpr = gl.PaddedSharedLayout.with_identity_for([[1024, 4]], [128, 64], [1, 0])
    tiles_f = F // 128
    tile_f = gl.program_id(0) % tiles_f
    tile = gl.program_id(0) // tiles_f
    count = 128
    begin = tile * 128
    if GROUPED:
        count = gl.load(count_ptr + tile)
        begin = gl.load(begin_ptr + tile)
    if count == 0:
        return
    gates = gl.allocate_shared_memory(gl.int32, [128, 64], waiting)
    ups = gl.allocate_shared_memory(gl.int32, [128, 64], waiting)
    activations = gl.allocate_shared_memory(gl.int32, [128, 64], waiting)
    i = gl.arange(0, STEP, gl.SliceLayout(1, rows))
    f = tile_f * 128 + gl.arange(0, 128, gl.SliceLayout(0, rows))
    part_ptr += tile_f.to(gl.int64) * rows_compact + begin
    for first in gl.static_range(0, 128, STEP):
        row = tile * 128 + first + i
        live = first + i < count
        real = live[:, None]
        at = row.to(gl.int64)[:, None] * (2 * F) + f[None, :]
        at_scale = tile_f.to(gl.int64) * R + row
        at_scale_up = at_scale + tiles_f.to(gl.int64) * R
        gate_scale = gl.load(h_scale_ptr + at_scale, mask=live, other=0.0)
        up_scale = gl.load(h_scale_ptr + at_scale_up, mask=live, other=0.0)
        gate = gl.load(h_ptr + at, mask=real, other=0)
        up = gl.load(h_ptr + at + F, mask=real, other=0)
        grad = gl.load(grad_ptr + row.to(gl.int64)[:, None] * F + f[None, :], mask=real, other=0.0).to(gl.float32)
        gate = gate.to(gl.float8e4nv, bitcast=True).to(gl.float32) * gate_scale[:, None]
        up = up.to(gl.float8e4nv, bitcast=True).to(gl.float32) * up_scale[:, None]
        gate_sigmoid = _sigmoid(gate)
        silu = gate * gate_sigmoid
        activation = silu * up
        if WEIGHTED:
            weight = gl.load(weight_ptr + begin + first + i, mask=live, other=0.0).to(gl.float32)
            gl.store(part_ptr + first + i, gl.sum(grad * activation, 1), mask=live)
            grad = grad * weight[:, None]
            activation = activation * weight[:, None]
        activations.slice(first, STEP).store(_neighbours(activation))
        grad_up = grad * silu
        ups.slice(first, STEP).store(_neighbours(grad_up))
        _store_whole(codes_ptr + F, scale_ptr, grad_up, at, at_scale_up)
        grad_gate = grad * up * (gate_sigmoid + silu * (1.0 - gate_sigmoid))
        gates.slice(first, STEP).store(_neighbours(grad_gate))
        _store_whole(codes_ptr, scale_ptr, grad_gate, at, at_scale)
    _store_columns(gates, codes_t_ptr, scale_t_ptr, tile, tile_f * 128, 2 * F, R, columns)
    _store_columns(ups, codes_t_ptr, scale_t_ptr, tile, F + tile_f * 128, 2 * F, R, columns)
    _store_columns(activations, a_t_ptr, a_scale_t_ptr, tile, tile_f * 128, F, R, columns)


@gluon.jit
def _neighbours(x):
    """(I, 64) words of (I, 128) numbers, rounded to BF16."""
    even, odd = gl.split(gl.reshape(x, [x.shape[0], 64, 2]))
    return bf16_pair(even, odd)


@gluon.jit
def _store_whole(codes_ptr, scale_ptr, x, at, at_scale):
    """1x128 codes and scales of (I, 128) numbers."""
    scale, inverse = tile_scale(gl.max(magnitude(x), 1), False)
    gl.store(codes_ptr + at, to_e4m3(x * inverse[:, None]))
    gl.store(scale_ptr + at_scale, scale)


@gluon.jit
def _larger(x, y):
    return gl.inline_asm_elementwise(
        "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _store_columns(words, codes_ptr, scale_ptr, tile, first, width, R, columns: gl.constexpr):
    """128x1 codes and scales of 128 columns from ``first`` on: a thread has 16 rows of one word."""
    pairs = words.load(columns)
    most = gl.reduce(pairs & 0x7FFF7FFF, 0, _larger)
    row = tile * 128 + gl.arange(0, 128, gl.SliceLayout(1, columns))
    column = first + 2 * gl.arange(0, 64, gl.SliceLayout(0, columns))
    scale_ptr += tile.to(gl.int64) * width
    for odd in gl.static_range(2):
        if odd:
            scale, inverse = tile_scale(magnitude(high_of(most)), False)
            x = high_of(pairs) * inverse[None, :]
        else:
            scale, inverse = tile_scale(magnitude(low_of(most)), False)
            x = low_of(pairs) * inverse[None, :]
        gl.store(scale_ptr + column + odd, scale)
        gl.store(codes_ptr + (column + odd).to(gl.int64)[None, :] * R + row[:, None], to_e4m3(x))
