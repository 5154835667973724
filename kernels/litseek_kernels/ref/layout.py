"""Where each expert's rows lie in the padded layout. Letters: E experts, R rows, J tiles of 128 rows."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128


def padded_capacity(num_rows: int, num_experts: int) -> int:
    """Rows of the padded layout, whatever the counts: every expert wastes less than one tile."""
    return (-(-num_rows // TILE) + num_experts) * TILE


def row_layout(count_E: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tile_expert_J, padded_start_E1, tile_begin_J, tile_count_J, all int32 (see ``litseek_kernels.layout.Layout``)."""
    assert capacity % TILE == 0, f"a capacity of {capacity} rows is no multiple of {TILE}"
    counts = count_E.to(torch.int64)
    tiles_E = (counts + TILE - 1) // TILE
    last_tile_E = tiles_E.cumsum(0)
    first_tile_E = last_tile_E - tiles_E
    start_E = counts.cumsum(0) - counts
    tile_J = torch.arange(capacity // TILE, device=count_E.device)
    owner_J = torch.searchsorted(last_tile_E, tile_J, right=True)
    used_J = owner_J < counts.numel()
    owner_J = owner_J.clamp_max(counts.numel() - 1)
    done_J = (tile_J - first_tile_E[owner_J]) * TILE
    tile_count_J = torch.where(used_J, (counts[owner_J] - done_J).clamp(0, TILE), 0)
    tile_begin_J = torch.where(used_J, start_E[owner_J] + done_J, 0)
    tile_expert_J = torch.where(used_J, owner_J, -1)
    padded_start_E1 = torch.cat([first_tile_E[:1] * 0, last_tile_E]) * TILE
    return (
        tile_expert_J.to(torch.int32),
        padded_start_E1.to(torch.int32),
        tile_begin_J.to(torch.int32),
        tile_count_J.to(torch.int32),
    )


def padded_index(tile_begin_J: Tensor, tile_count_J: Tensor) -> Tensor:
    """(J * 128,) int64: the compact row that each padded row holds, -1 for padding."""
    offset = torch.arange(TILE, device=tile_begin_J.device)
    row = tile_begin_J[:, None].long() + offset
    return torch.where(offset < tile_count_J[:, None], row, -1).flatten()


def to_padded(rows_RD: Tensor, tile_begin_J: Tensor, tile_count_J: Tensor) -> Tensor:
    """(J * 128, D): compact rows spread out, zeros elsewhere. Works on bytes too (float8 viewed as uint8)."""
    index = padded_index(tile_begin_J, tile_count_J)
    out = rows_RD.new_zeros(index.numel(), *rows_RD.shape[1:])
    out[index >= 0] = rows_RD[index[index >= 0]]
    return out


def to_compact(padded: Tensor, num_rows: int, tile_begin_J: Tensor, tile_count_J: Tensor) -> Tensor:
    """(R, D): the inverse of ``to_padded``."""
    index = padded_index(tile_begin_J, tile_count_J)
    out = padded.new_zeros(num_rows, *padded.shape[1:])
    out[index[index >= 0]] = padded[index >= 0]
    return out
