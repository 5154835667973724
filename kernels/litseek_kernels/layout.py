"""Row layouts of grouped GEMMs, computed on the device. Spec: ref.layout. Letters: E experts, R rows, J tiles of 128 rows.

Compact: (R, D), rows sorted by expert, nothing between them. Padded: (capacity, D), every expert's rows start at a
multiple of 128, so that no 128-row tile and no 128x1 scale is shared by two experts; padding rows are zeros. Row counts
are known on the device only, so the capacity is fixed (``padded_capacity``) and the host never waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from litseek_kernels.device import runs_kernel
from litseek_kernels.operator import operator
from litseek_kernels.ref import layout as ref
from litseek_kernels.ref.layout import TILE, padded_capacity

__all__ = ["TILE", "Layout", "group_layout", "padded_capacity", "row_layout"]


class Layout(NamedTuple):
    """What the experts' kernels need to know about the padded layout; all int32."""

    tile_expert: Tensor
    """(J,): the expert that owns each 128-row tile, -1 for tiles after the used part."""
    padded_start_E: Tensor
    """(E + 1,): each expert's first padded row; the last is the end of the used part."""
    tile_begin: Tensor
    """(J,): the compact row that the tile's first row holds."""
    tile_count: Tensor
    """(J,): real rows in the tile, 0 to 128; they come first, padding follows."""


def group_layout(count_E: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """``tile_expert`` and ``padded_start_E`` of ``row_layout``."""
    return row_layout(count_E, capacity)[:2]


def row_layout(count_E: Tensor, capacity: int) -> Layout:
    """The padded layout of ``count_E`` rows an expert in ``capacity`` rows (``padded_capacity`` of all rows is enough)."""
    if capacity % TILE:
        raise ValueError(f"capacity is {capacity} rows, it must be a multiple of {TILE}")
    return Layout(*_row_layout(count_E, capacity))


@operator("litseek::row_layout")
def _row_layout(count_E: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not runs_kernel(count_E):
        return ref.row_layout(count_E, capacity)
    experts, tiles = count_E.numel(), capacity // TILE
    out = _empty(count_E, capacity)
    grid = (max(triton.cdiv(tiles, _TILES_A_PROGRAM), 1),)
    _layout_kernel[grid](
        count_E, *out, experts, tiles, TILE, _TILES_A_PROGRAM, triton.next_power_of_2(experts + 1), num_warps=4
    )
    return out


@_row_layout.register_fake
def _(count_E: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(count_E, capacity)


_TILES_A_PROGRAM = 64


def _empty(count_E: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiles, experts = capacity // TILE, count_E.numel()
    tile_expert, begin, count = (count_E.new_empty(tiles, dtype=torch.int32) for _ in range(3))
    return tile_expert, count_E.new_empty(experts + 1, dtype=torch.int32), begin, count


@triton.jit
def _layout_kernel(
    count_ptr,
    expert_ptr,
    start_ptr,
    begin_ptr,
    tile_count_ptr,
    experts,
    tiles,
    TILE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Every program sums the counts itself (a few hundred numbers) and writes its own tiles."""
    e = tl.arange(0, BLOCK_E)
    count = tl.load(count_ptr + e, mask=e < experts, other=0).to(tl.int32)
    tiles_e = (count + TILE - 1) // TILE
    first = tl.cumsum(tiles_e, 0) - tiles_e
    row = tl.cumsum(count, 0) - count
    if tl.program_id(0) == 0:
        tl.store(start_ptr + e, first * TILE, mask=e <= experts)

    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    mine = (j[:, None] >= first[None, :]) & (j[:, None] < (first + tiles_e)[None, :])
    done = (j[:, None] - first[None, :]) * TILE
    # at most one expert owns a tile, so sums pick its numbers
    owner = tl.sum(tl.where(mine, e[None, :] + 1, 0), 1) - 1
    begin = tl.sum(tl.where(mine, row[None, :] + done, 0), 1)
    real = tl.sum(tl.where(mine, tl.minimum(count[None, :] - done, TILE), 0), 1)
    tl.store(expert_ptr + j, owner, mask=j < tiles)
    tl.store(begin_ptr + j, begin, mask=j < tiles)
    tl.store(tile_count_ptr + j, real, mask=j < tiles)
