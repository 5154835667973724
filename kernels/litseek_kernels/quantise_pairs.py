"""BF16 rows quantised 1x128 and 128x1 of one reading. Spec: ref.quantise. Letters: M rows out, K columns.

Gluon for Hopper. Two neighbouring numbers stay one word from memory to the codes, and words wait in shared memory until the
largest number of every column is known, so that few registers leave room for many programs. What else is quantised, and
what the CPU's interpreter tests, is quantise._both_kernel.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from litseek_kernels.e4m3 import high_of, low_of, magnitude, tile_scale, to_e4m3
from litseek_kernels.layout import TILE
from litseek_kernels.ref.quantise import BLOCK

WIDTH = 16
WARPS = 4


def takes(x: Tensor, M: int) -> bool:
    """Whether x's rows, and the codes' M rows turned, start at whole words of 16."""
    return (
        x.is_cuda
        and x.dtype == torch.bfloat16
        and x.stride(1) == 1
        and not (x.shape[1] % WIDTH or x.stride(0) % WIDTH or M % WIDTH or x.data_ptr() % WIDTH)
    )


def quantise_pairs(
    x: Tensor,
    tile_begin: Tensor | None,
    tile_count: Tensor | None,
    index: Tensor | None,
    power_of_two: bool,
    out: list[Tensor],
) -> None:
    """Fills ``out``: codes (M, K), scale, codes_t (K, M), scale_t."""
    codes, scale, codes_t, scale_t = out
    M, K = codes.shape
    _kernel[(triton.cdiv(M, TILE) * triton.cdiv(K, BLOCK),)](
        x.view(torch.int32), x.stride(0) // 2, tile_begin, tile_count, index,
        codes.view(torch.uint8), scale, codes_t.view(torch.uint8), scale_t, M, K,
        GROUPED=tile_begin is not None, GATHER=index is not None, POWER_OF_TWO=power_of_two, WARPS=WARPS, num_warps=WARPS,
    )  # fmt: skip


@gluon.jit
def _kernel(
    x_ptr, stride, begin_ptr, count_ptr, index_ptr, codes_ptr, scale_ptr, codes_t_ptr, scale_t_ptr, M, K,
    GROUPED: gl.constexpr, GATHER: gl.constexpr, POWER_OF_TWO: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """128 rows x 128 columns, two rows a warp at a time. Four words after every 16 rows keep columns out of one bank."""
    STEP: gl.constexpr = 2 * WARPS
    rows: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [WARPS, 1], [1, 0])
    numbers: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    columns: gl.constexpr = gl.BlockedLayout([16, 1], [8, 4], [1, WARPS], [0, 1])
    waiting: gl.constexpr = gl.PaddedSharedLayout.with_identity_for([[1024, 4]], [128, 64], [1, 0])
    tiles_k = gl.cdiv(K, 128)
    tile_k = gl.program_id(0) % tiles_k
    tile = gl.program_id(0) // tiles_k
    count = M - tile * 128
    begin = tile * 128
    if GROUPED:
        count = gl.load(count_ptr + tile)
        begin = gl.load(begin_ptr + tile)
        if count == 0:
            return
    words = gl.allocate_shared_memory(gl.int32, [128, 64], waiting)
    i = gl.arange(0, STEP, gl.SliceLayout(1, rows))
    word = tile_k * 64 + gl.arange(0, 64, gl.SliceLayout(0, rows))
    k = tile_k * 128 + gl.arange(0, 128, gl.SliceLayout(0, numbers))
    inside = (word < K // 2)[None, :]
    for first in gl.static_range(0, 128, STEP):
        live = first + i < count
        source = begin + first + i
        if GATHER:
            source = gl.load(index_ptr + source, mask=live, other=0)
        at = source.to(gl.int64)[:, None] * stride + word[None, :]
        pairs = gl.load(x_ptr + at, mask=live[:, None] & inside, other=0)
        words.slice(first, STEP).store(pairs)
        scale, inverse = tile_scale(_largest(pairs, 1), POWER_OF_TWO)
        both = gl.join(low_of(pairs) * inverse[:, None], high_of(pairs) * inverse[:, None])
        code = gl.convert_layout(to_e4m3(gl.reshape(both, [STEP, 128])), numbers, assert_trivial=True)
        row = tile * 128 + first + gl.arange(0, STEP, gl.SliceLayout(1, numbers))
        gl.store(
            codes_ptr + row.to(gl.int64)[:, None] * K + k[None, :], code, mask=(row < M)[:, None] & (k < K)[None, :]
        )
        row = tile * 128 + first + i
        gl.store(scale_ptr + tile_k.to(gl.int64) * M + row, scale, mask=row < M)
    pairs = words.load(columns)
    most = gl.reduce(pairs & 0x7FFF7FFF, 0, _larger)
    row = tile * 128 + gl.arange(0, 128, gl.SliceLayout(1, columns))
    for odd in gl.static_range(2):
        column = tile_k * 128 + 2 * gl.arange(0, 64, gl.SliceLayout(0, columns)) + odd
        if odd:
            scale, inverse = tile_scale(magnitude(high_of(most)), POWER_OF_TWO)
            x = high_of(pairs) * inverse[None, :]
        else:
            scale, inverse = tile_scale(magnitude(low_of(most)), POWER_OF_TWO)
            x = low_of(pairs) * inverse[None, :]
        gl.store(scale_t_ptr + tile.to(gl.int64) * K + column, scale, mask=column < K)
        at = column.to(gl.int64)[None, :] * M + row[:, None]
        gl.store(codes_t_ptr + at, to_e4m3(x), mask=(row < M)[:, None] & (column < K)[None, :])


@gluon.jit
def _larger(x, y):
    return gl.inline_asm_elementwise(
        "max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _largest(pairs, axis: gl.constexpr):
    """The largest ``magnitude`` along an axis of words."""
    most = gl.reduce(pairs & 0x7FFF7FFF, axis, _larger)
    return gl.maximum(magnitude(low_of(most)), magnitude(high_of(most)))
