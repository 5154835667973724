"""FP8 E4M3 with one scale a 128x128 block, as the released weights have it (report §3.3.2). Letters: M rows, N columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
"""A block's largest magnitude counts as at least this, so that a block of zeros has a scale."""


def quantise_block(weight_MN: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes (M, N) float8_e4m3fn and scales (ceil(M/block), ceil(N/block)) float32: weight ~ code * scale.

    Scale = max |w| of the block / 448, taken in float32; edge blocks are padded with zeros. Values are clamped to
    +-448 before the cast, whose own overflow differs between torch versions. A block with NaN or Inf yields NaN codes.
    """
    assert weight_MN.ndim == 2, f"a matrix is wanted, got shape {tuple(weight_MN.shape)}"
    M, N = weight_MN.shape
    tiles = _tiles(weight_MN.float(), block)
    amax = tiles.abs().amax(dim=(1, 3)).clamp_min(AMAX_FLOOR)
    scale = amax / E4M3_MAX
    codes = (tiles / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return _untiled(codes, M, N), scale


def dequantise_block(codes_MN: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, block: int = BLOCK) -> Tensor:
    """code.float() * scale per block, rounded once to ``dtype``: the released cast to BF16 with ``dtype=bfloat16``."""
    M, N = codes_MN.shape
    assert scale.shape == block_grid(M, N, block), f"scales {tuple(scale.shape)} do not fit codes {M}x{N}"
    tiles = _tiles(codes_MN.float(), block) * scale.float()[:, None, :, None]
    return _untiled(tiles, M, N).to(dtype)


def requantise_block(weight_MN: Tensor, scale: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise, but keep ``scale`` for every block that is still exactly what its codes stood for.

    ``weight_MN`` is float32. Where code * scale gives the weights back bit for bit, that block was not changed since it
    was dequantised and keeps codes and scale; every other block gets fresh ones. Without the old scales this is
    impossible: code 224 at scale s and code 448 at s/2 are the same weight.
    """
    assert weight_MN.dtype == torch.float32
    M, N = weight_MN.shape
    assert scale.shape == block_grid(M, N, block), f"scales {tuple(scale.shape)} do not fit weights {M}x{N}"
    tiles = _tiles(weight_MN, block)
    old = scale.float()[:, None, :, None]
    codes = (tiles / old).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    kept = ((codes.float() * old) == tiles).all(dim=3).all(dim=1)
    if bool(kept.all()):
        return _untiled(codes, M, N), scale.clone()
    fresh_MN, fresh_scale = quantise_block(weight_MN, block)
    mask = kept[:, None, :, None]
    # Selecting among bytes: torch has no where() for float8.
    merged = torch.where(mask, codes.view(torch.uint8), _tiles(fresh_MN, block).view(torch.uint8))
    return _untiled(merged.view(torch.float8_e4m3fn), M, N), torch.where(kept, scale.float(), fresh_scale)


def block_grid(rows: int, columns: int, block: int = BLOCK) -> tuple[int, int]:
    """Shape of the scales: 576 x 7168 has 5 x 56."""
    return (-(-rows // block), -(-columns // block))


def _tiles(x_MN: Tensor, block: int) -> Tensor:
    """(M, N) -> (ceil(M/block), block, ceil(N/block), block), zero-padded at the edges."""
    M, N = x_MN.shape
    grid_m, grid_n = block_grid(M, N, block)
    pad_m, pad_n = grid_m * block - M, grid_n * block - N
    if pad_m or pad_n:
        as_bytes = x_MN.dtype == torch.float8_e4m3fn
        x_MN = F.pad(x_MN.view(torch.uint8) if as_bytes else x_MN, (0, pad_n, 0, pad_m))
        x_MN = x_MN.view(torch.float8_e4m3fn) if as_bytes else x_MN
    return x_MN.reshape(grid_m, block, grid_n, block)


def _untiled(tiles: Tensor, M: int, N: int) -> Tensor:
    grid_m, block, grid_n, _ = tiles.shape
    return tiles.reshape(grid_m * block, grid_n * block)[:M, :N].contiguous()
