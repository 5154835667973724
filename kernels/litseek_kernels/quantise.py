"""FP8 quantisers of one pass (report §3.3.2). Spec: ref.quantise. Letters: M rows, K columns, R rows of experts, E experts.

Formats: activations 1x128 are codes (M, K) and scale (ceil(K/128), M); the same tensor 128x1 is codes_t (K, M) and
scale_t (ceil(M/128), K), the 1x128 form of x^T that the weight gradient wants; weights 128x128 are codes (N, K), scale
(ceil(N/128), ceil(K/128)) and codes_t (K, N). Codes are float8_e4m3fn, scales float32, value = code * scale.

With ``layout`` rows are read compact and written padded (litseek_kernels.layout): padding rows have codes of zero, tiles
that no expert owns are left unwritten. ``index_R`` gathers: row r is x[index_R[r]], so a permutation needs no copy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from litseek_kernels.device import runs_kernel
from litseek_kernels.e4m3 import (
    divide,
    from_e4m3,
    high_of,
    larger_pair,
    low_of,
    magnitude,
    pack_pair,
    pair_of,
    store_transposed,
    tile_scale,
    to_e4m3,
)
from litseek_kernels.layout import TILE, Layout
from litseek_kernels.operator import operator
from litseek_kernels.ref import quantise as ref
from litseek_kernels.ref.quantise import BLOCK, E4M3, block_grid


def quantise_rows(
    x_MK: Tensor, *, power_of_two: bool = False, layout: Layout | None = None, index_R: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """1x128: codes, scale. BF16 or FP32 in."""
    codes, scale, _, _ = _checked(x_MK, None, layout, index_R, power_of_two, rows=True, columns=False)
    return codes, scale


def quantise_columns(
    x_MK: Tensor, *, power_of_two: bool = False, layout: Layout | None = None, index_R: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """128x1, transposed: codes_t, scale_t."""
    _, _, codes_t, scale_t = _checked(x_MK, None, layout, index_R, power_of_two, rows=False, columns=True)
    return codes_t, scale_t


def quantise_both(
    x_MK: Tensor, *, power_of_two: bool = False, layout: Layout | None = None, index_R: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1x128 and 128x1 of one reading: codes, scale, codes_t, scale_t."""
    return _checked(x_MK, None, layout, index_R, power_of_two, rows=True, columns=True)


def requantise_transposed(codes_MK: Tensor, scale_KM: Tensor, *, layout: Layout | None = None) -> tuple[Tensor, Tensor]:
    """1x128 codes to 128x1 codes_t, scale_t with power-of-two scales, without BF16 in between (report §3.3.2)."""
    _, _, codes_t, scale_t = _checked(codes_MK, scale_KM, layout, None, True, rows=False, columns=True)
    return codes_t, scale_t


def requantise_both(
    codes_MK: Tensor, scale_KM: Tensor, *, layout: Layout | None = None, index_R: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ``requantise_transposed`` gives, and the 1x128 codes and scales themselves in the new places: what a payload
    that was dispatched in FP8 needs. codes, scale, codes_t, scale_t."""
    return _checked(codes_MK, scale_KM, layout, index_R, True, rows=True, columns=True)


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """128x128 blocks of (N, K) or (E, N, K), FP32 or BF16: codes, scale, codes_t. Edge blocks count as padded by zeros."""
    if weight.ndim not in (2, 3) or weight.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"a weight is (N, K) or (E, N, K) in FP32 or BF16, this is {_named(weight)}")
    return _quantise_weight(weight)


def _checked(
    x: Tensor,
    scale: Tensor | None,
    layout: Layout | None,
    index_R: Tensor | None,
    power_of_two: bool,
    rows: bool,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    allowed = (torch.float32, torch.bfloat16) if scale is None else (E4M3,)
    if x.ndim != 2 or x.dtype not in allowed:
        raise ValueError(f"quantise wants a matrix in {' or '.join(map(str, allowed))}, got {_named(x)}")
    if scale is not None and scale.shape != (-(-x.shape[1] // BLOCK), x.shape[0]):
        raise ValueError(f"scales {_named(scale)} do not fit codes {_named(x)}")
    begin, count = (None, None) if layout is None else (layout.tile_begin, layout.tile_count)
    out = _quantise(x, scale, begin, count, index_R, power_of_two, rows, columns)
    return out[0], out[1], out[2], out[3]


def _named(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


@operator("litseek::quantise")
def _quantise(
    x: Tensor,
    x_scale: Tensor | None,
    tile_begin: Tensor | None,
    tile_count: Tensor | None,
    index: Tensor | None,
    power_of_two: bool,
    rows: bool,
    columns: bool,
) -> list[Tensor]:
    """codes, scale, codes_t, scale_t; what was not asked for has no elements."""
    if not runs_kernel(x):
        return _reference(x, x_scale, tile_begin, tile_count, index, power_of_two, rows, columns)
    out = _empty(x, tile_begin, index, rows, columns)
    codes, scale, codes_t, scale_t = out
    M, K = _rows_out(x, tile_begin, index), x.shape[1]
    if M == 0 or K == 0:
        return out
    if x.stride(1) != 1 or x_scale is not None:
        x = x.contiguous()
    if x.dtype == E4M3:
        x = x.view(torch.uint8)
    inputs = x, x.stride(0), x.shape[0], x_scale, tile_begin, tile_count, index
    flags = {"GROUPED": tile_begin is not None, "GATHER": index is not None, "POWER_OF_TWO": power_of_two}
    if columns:
        packed = M % 16 == 0
        _both_kernel[(triton.cdiv(M, TILE) * triton.cdiv(K, BLOCK),)](
            *inputs, codes.view(torch.uint8), scale, codes_t.view(torch.int32 if packed else torch.uint8), scale_t, M, K,
            **flags, CODES_IN=x_scale is not None, ROWS=rows, PACKED=packed, num_warps=BOTH_WARPS,
        )  # fmt: skip
    else:
        grid = (triton.cdiv(M, ROWS_M) * triton.cdiv(K, ROWS_TILES * BLOCK),)
        _rows_kernel[grid](
            *inputs,
            codes.view(torch.uint8),
            scale,
            M,
            K,
            **flags,
            BLOCK_M=ROWS_M,
            TILES=ROWS_TILES,
            num_warps=ROWS_WARPS,
        )
    return out


@_quantise.register_fake
def _(x, x_scale, tile_begin, tile_count, index, power_of_two, rows, columns):
    return _empty(x, tile_begin, index, rows, columns)


@operator("litseek::quantise_weight")
def _quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_kernel(weight):
        return ref.quantise_weight(weight)
    weight = weight.contiguous()
    codes, scale, codes_t = _empty_weight(weight)
    N, K = weight.shape[-2:]
    experts = weight.shape[0] if weight.ndim == 3 else 1
    if codes.numel():
        packed = N % 16 == 0
        _weight_kernel[(scale.numel(),)](
            weight, codes.view(torch.uint8), scale, codes_t.view(torch.int32 if packed else torch.uint8), N, K,
            PACKED=packed, num_warps=WEIGHT_WARPS,
        )  # fmt: skip
    assert experts * N * K == codes.numel()
    return codes, scale, codes_t


@_quantise_weight.register_fake
def _(weight):
    return _empty_weight(weight)


ROWS_M, ROWS_TILES, ROWS_WARPS = 32, 1, 4
BOTH_WARPS = 4
WEIGHT_WARPS = 8


def _rows_out(x: Tensor, tile_begin: Tensor | None, index: Tensor | None) -> int:
    if tile_begin is not None:
        return tile_begin.shape[0] * TILE
    return x.shape[0] if index is None else index.shape[0]


def _empty(x: Tensor, tile_begin: Tensor | None, index: Tensor | None, rows: bool, columns: bool) -> list[Tensor]:
    M, K = _rows_out(x, tile_begin, index), x.shape[1]
    shapes = (
        ((M, K) if rows else (0, 0), E4M3),
        ((-(-K // BLOCK), M) if rows else (0, 0), torch.float32),
        ((K, M) if columns else (0, 0), E4M3),
        ((-(-M // BLOCK), K) if columns else (0, 0), torch.float32),
    )
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in shapes]


def _empty_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *experts, N, K = weight.shape
    codes = weight.new_empty((*experts, N, K), dtype=E4M3)
    scale = weight.new_empty((*experts, *block_grid(N, K)), dtype=torch.float32)
    return codes, scale, weight.new_empty((*experts, K, N), dtype=E4M3)


def _reference(
    x: Tensor,
    x_scale: Tensor | None,
    tile_begin: Tensor | None,
    tile_count: Tensor | None,
    index: Tensor | None,
    power_of_two: bool,
    rows: bool,
    columns: bool,
) -> list[Tensor]:
    moved = ref.gather_rows(x, tile_begin, tile_count, index)
    none = x.new_empty(0, 0, dtype=torch.float32)
    out = [none.to(E4M3), none.clone(), none.to(E4M3), none.clone()]
    if x_scale is not None:
        moved_scale = ref.gather_rows(x_scale.t(), tile_begin, tile_count, index)
        if tile_begin is not None:  # padding rows have the scale of zeros, as if they were quantised
            floor, _ = ref.tile_scale(torch.zeros_like(moved_scale), power_of_two)
            moved_scale = torch.where(moved_scale == 0, floor, moved_scale)
        moved_scale = moved_scale.t().contiguous()
        if rows:
            out[:2] = moved.clone(), moved_scale.clone()
        if columns:
            out[2:] = ref.requantise_transposed(moved, moved_scale)
        return out
    if rows:
        out[:2] = ref.quantise_rows(moved, power_of_two)
    if columns:
        out[2:] = ref.quantise_columns(moved, power_of_two)
    return out


@triton.jit
def _source(row, tile, M, begin_ptr, count_ptr, index_ptr, GROUPED: tl.constexpr, GATHER: tl.constexpr):
    """Where each row written is read, and whether there is anything to read."""
    if GROUPED:
        offset = row % 128
        live = offset < tl.load(count_ptr + tile)
        source = tl.load(begin_ptr + tile) + offset
    else:
        live = row < M
        source = row
    if GATHER:
        source = tl.load(index_ptr + source, mask=live, other=0)
    return source.to(tl.int64), live


@triton.jit
def _rows_kernel(
    x_ptr, stride_x, M_in, x_scale_ptr, begin_ptr, count_ptr, index_ptr,
    codes_ptr, scale_ptr, M, K,
    GROUPED: tl.constexpr, GATHER: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    BLOCK_M: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    blocks_k = tl.cdiv(K, TILES * 128)
    block_m = tl.program_id(0) // blocks_k
    first_tile = tl.program_id(0) % blocks_k * TILES
    tile = block_m * BLOCK_M // 128
    if GROUPED:  # noqa: SIM102 (this condition is the compiler's)
        if tl.load(count_ptr + tile) == 0:
            return
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    source, live = _source(row, tile, M, begin_ptr, count_ptr, index_ptr, GROUPED, GATHER)
    k = first_tile * 128 + tl.arange(0, TILES * 128)
    inside = (k < K)[None, :]
    x = tl.load(x_ptr + source[:, None] * stride_x + k[None, :], mask=live[:, None] & inside, other=0.0).to(tl.float32)
    x = tl.reshape(x, (BLOCK_M, TILES, 128))
    scale, inverse = tile_scale(tl.max(magnitude(x), 2), POWER_OF_TWO)
    code = tl.reshape(to_e4m3(x * inverse[:, :, None]), (BLOCK_M, TILES * 128))
    kept = row < M
    tl.store(codes_ptr + row.to(tl.int64)[:, None] * K + k[None, :], code, mask=kept[:, None] & inside)
    t = first_tile + tl.arange(0, TILES)
    at = t.to(tl.int64)[None, :] * M + row[:, None]
    tl.store(scale_ptr + at, scale, mask=kept[:, None] & (t < tl.cdiv(K, 128))[None, :])


@triton.jit
def _quarter(x_ptr, stride_x, M_in, x_scale_ptr, source, live, k, tile_k, K,
             POWER_OF_TWO: tl.constexpr, CODES_IN: tl.constexpr):  # fmt: skip
    """Rows 4 i + j of a 128 x 128 tile for one j: as stored, their scales where they are codes, and as numbers."""
    raw = tl.load(x_ptr + source[:, None] * stride_x + k[None, :], mask=live[:, None] & (k < K)[None, :], other=0)
    if CODES_IN:
        floor, _ = tile_scale(tl.zeros(source.shape, tl.int32), POWER_OF_TWO)
        scale = tl.where(live, tl.load(x_scale_ptr + tile_k.to(tl.int64) * M_in + source, mask=live, other=0.0), floor)
        return raw, scale, from_e4m3(raw) * scale[:, None]
    else:
        return raw, tl.zeros(source.shape, tl.float32), raw.to(tl.float32)


@triton.jit
def _store_quarter(raw, scale, x, row, k, tile_k, codes_ptr, scale_ptr, M, K,
                   POWER_OF_TWO: tl.constexpr, CODES_IN: tl.constexpr):  # fmt: skip
    """The 1x128 codes and scales of those rows."""
    if CODES_IN:
        code = raw
    else:
        scale, inverse = tile_scale(tl.max(magnitude(x), 1), POWER_OF_TWO)
        code = to_e4m3(x * inverse[:, None])
    kept = row < M
    tl.store(codes_ptr + row.to(tl.int64)[:, None] * K + k[None, :], code, mask=kept[:, None] & (k < K)[None, :])
    tl.store(scale_ptr + tile_k.to(tl.int64) * M + row, scale, mask=kept)


@triton.jit
def _both_kernel(
    x_ptr, stride_x, M_in, x_scale_ptr, begin_ptr, count_ptr, index_ptr,
    codes_ptr, scale_ptr, codes_t_ptr, scale_t_ptr, M, K,
    GROUPED: tl.constexpr, GATHER: tl.constexpr, POWER_OF_TWO: tl.constexpr, CODES_IN: tl.constexpr,
    ROWS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One 128 x 128 tile as four quarters of interleaved rows. BF16 stays in registers, two numbers in one, until the
    largest number of every column is known; anything else is read a second time, from L1."""
    KEPT: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16
    blocks_k = tl.cdiv(K, 128)
    tile = tl.program_id(0) // blocks_k
    tile_k = tl.program_id(0) % blocks_k
    if GROUPED:  # noqa: SIM102 (this condition is the compiler's)
        if tl.load(count_ptr + tile) == 0:
            return
    k = tile_k * 128 + tl.arange(0, 128)
    row = tile * 128 + 4 * tl.arange(0, 32)
    largest = tl.zeros((32, 128), tl.int32)
    pairs = ()  # type: tuple
    for j in tl.static_range(0, 4, 2):
        at0, live0 = _source(row + j, tile, M, begin_ptr, count_ptr, index_ptr, GROUPED, GATHER)
        at1, live1 = _source(row + j + 1, tile, M, begin_ptr, count_ptr, index_ptr, GROUPED, GATHER)
        raw0, s0, x0 = _quarter(x_ptr, stride_x, M_in, x_scale_ptr, at0, live0, k, tile_k, K, POWER_OF_TWO, CODES_IN)
        raw1, s1, x1 = _quarter(x_ptr, stride_x, M_in, x_scale_ptr, at1, live1, k, tile_k, K, POWER_OF_TWO, CODES_IN)
        if KEPT:
            pair = pair_of(raw0, raw1)
            largest = larger_pair(largest, pair)
            pairs = pairs + (pair,)  # noqa: RUF005
        else:
            largest = tl.maximum(largest, tl.maximum(magnitude(x0), magnitude(x1)))
        if ROWS:
            _store_quarter(raw0, s0, x0, row + j, k, tile_k, codes_ptr, scale_ptr, M, K, POWER_OF_TWO, CODES_IN)
            _store_quarter(raw1, s1, x1, row + j + 1, k, tile_k, codes_ptr, scale_ptr, M, K, POWER_OF_TWO, CODES_IN)
    if KEPT:
        largest = tl.maximum(magnitude(low_of(largest)), magnitude(high_of(largest)))
    scale_t, inverse_t = tile_scale(tl.max(largest, 0), POWER_OF_TWO)
    tl.store(scale_t_ptr + tile.to(tl.int64) * K + k, scale_t, mask=k < K)
    if not KEPT:
        tl.debug_barrier()  # so that the compiler reads again instead of keeping everything
    word = tl.zeros((32, 128), tl.int32)
    for j in tl.static_range(0, 4, 2):
        if KEPT:
            x0, x1 = low_of(pairs[j // 2]), high_of(pairs[j // 2])
        else:
            at0, live0 = _source(row + j, tile, M, begin_ptr, count_ptr, index_ptr, GROUPED, GATHER)
            at1, live1 = _source(row + j + 1, tile, M, begin_ptr, count_ptr, index_ptr, GROUPED, GATHER)
            _, _, x0 = _quarter(x_ptr, stride_x, M_in, x_scale_ptr, at0, live0, k, tile_k, K, POWER_OF_TWO, CODES_IN)
            _, _, x1 = _quarter(x_ptr, stride_x, M_in, x_scale_ptr, at1, live1, k, tile_k, K, POWER_OF_TWO, CODES_IN)
        word = pack_pair(word, x0 * inverse_t[None, :], x1 * inverse_t[None, :], j == 0)
    store_transposed(codes_t_ptr, word, tile * 128, k, K, M, PACKED)


@triton.jit
def _weight_kernel(w_ptr, codes_ptr, scale_ptr, codes_t_ptr, N, K, PACKED: tl.constexpr):
    """One 128 x 128 block of one expert."""
    blocks_n, blocks_k = tl.cdiv(N, 128), tl.cdiv(K, 128)
    expert = (tl.program_id(0) // (blocks_n * blocks_k)).to(tl.int64)
    block_n = tl.program_id(0) // blocks_k % blocks_n
    k = tl.program_id(0) % blocks_k * 128 + tl.arange(0, 128)
    n = block_n * 128 + 4 * tl.arange(0, 32)
    at = expert * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    inside = (k < K)[None, :]
    x0 = tl.load(w_ptr + at, mask=inside & (n < N)[:, None], other=0.0).to(tl.float32)
    x1 = tl.load(w_ptr + at + K, mask=inside & (n + 1 < N)[:, None], other=0.0).to(tl.float32)
    x2 = tl.load(w_ptr + at + 2 * K, mask=inside & (n + 2 < N)[:, None], other=0.0).to(tl.float32)
    x3 = tl.load(w_ptr + at + 3 * K, mask=inside & (n + 3 < N)[:, None], other=0.0).to(tl.float32)
    largest = tl.maximum(tl.maximum(magnitude(x0), magnitude(x1)), tl.maximum(magnitude(x2), magnitude(x3)))
    scale, _ = tile_scale(tl.maximum(tl.max(tl.max(largest, 1), 0), 0x38D1B717), False)  # 1e-4, ref.WEIGHT_FLOOR
    tl.store(scale_ptr + tl.program_id(0), scale)
    inverse = tl.div_rn(1.0, scale)
    divisor = tl.full((32, 128), 1.0, tl.float32) * scale
    x0, x1 = divide(x0, divisor, inverse), divide(x1, divisor, inverse)
    x2, x3 = divide(x2, divisor, inverse), divide(x3, divisor, inverse)
    tl.store(codes_ptr + at, to_e4m3(x0), mask=inside & (n < N)[:, None])
    tl.store(codes_ptr + at + K, to_e4m3(x1), mask=inside & (n + 1 < N)[:, None])
    tl.store(codes_ptr + at + 2 * K, to_e4m3(x2), mask=inside & (n + 2 < N)[:, None])
    tl.store(codes_ptr + at + 3 * K, to_e4m3(x3), mask=inside & (n + 3 < N)[:, None])
    size = expert * N * K // 4 if PACKED else expert * N * K
    word = pack_pair(x0, x0, x1, True)
    word = pack_pair(word, x2, x3, False)
    store_transposed(codes_t_ptr + size, word, block_n * 128, k, K, N, PACKED)
