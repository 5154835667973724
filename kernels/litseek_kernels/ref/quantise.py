"""FP8 E4M3 with a scale a tile (report §3.3.2): 128x128 blocks of weights, 1x128 and 128x1 tiles of activations.

Letters: M rows, N or K columns. A weight's code is w / scale, as the released weights have it; an activation's is
x * (448 / amax), one product instead of a division a number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litseek_kernels.ref.layout import to_padded

BLOCK = 128
E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
AMAX_FLOOR = 2.0**-64
"""A block's largest magnitude counts as at least this, so that a block of zeros has a scale. It must lie far below
gradients: a loss that is a mean over 63M tokens, the report's batch, has them near 1e-10."""
WEIGHT_FLOOR = 1e-4
"""The same for a weight's block: the released quantiser's."""


def quantise_block(weight_MN: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes (M, N) float8_e4m3fn and scales (ceil(M/block), ceil(N/block)) float32: weight ~ code * scale.

    Scale = max |w| of the block / 448, taken in float32; edge blocks are padded with zeros. Values are clamped to
    +-448 before the cast, whose own overflow differs between torch versions. A block with NaN or Inf has only NaN codes.
    """
    assert weight_MN.ndim == 2, f"a matrix is wanted, got shape {tuple(weight_MN.shape)}"
    M, N = weight_MN.shape
    tiles = _tiles(weight_MN.float(), block)
    amax = tiles.abs().amax(dim=(1, 3)).clamp_min(WEIGHT_FLOOR)
    scale, _ = tile_scale(amax)
    codes = (tiles / scale[:, None, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return _untiled(codes, M, N), scale


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``quantise_block`` of (N, K) or of every expert of (E, N, K), and the codes transposed: codes, scale, codes_t."""
    if weight.ndim == 2:
        codes, scale = quantise_block(weight)
        return codes, scale, _transposed(codes)
    parts = [quantise_weight(matrix) for matrix in weight]
    if not parts:
        return _no_experts(weight)
    codes, scale, codes_t = (torch.stack([_bytes(part) for part in column]) for column in zip(*parts, strict=True))
    return codes.view(E4M3), scale, codes_t.view(E4M3)


def tile_scale(amax: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Scale max(amax, AMAX_FLOOR) / 448, or the next power of two, and what to multiply by to get codes (float32 both).

    Where amax is not finite both are NaN, so that the whole tile is.
    """
    amax = amax.float().clamp_min(AMAX_FLOOR)
    limit = torch.full_like(amax, E4M3_MAX)  # a tensor: CUDA divides by a number through its rounded reciprocal
    scale, inverse = amax / limit, limit / amax
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
        one = torch.ones_like(scale)
        scale, inverse = torch.ldexp(one, exponent), torch.ldexp(one, -exponent)
    finite = amax.isfinite()
    return torch.where(finite, scale, torch.nan), torch.where(finite, inverse, torch.nan)


def quantise_rows(x_MK: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """1x128 tiles along the last dimension: codes (M, K) and scale (ceil(K/128), M) float32, x ~ code * scale.

    A tile with NaN or Inf has NaN codes and scale. The last tile of a width that 128 does not divide is narrower.
    """
    assert x_MK.ndim == 2, f"a matrix is wanted, got shape {tuple(x_MK.shape)}"
    M, K = x_MK.shape
    tiles = F.pad(x_MK.float(), (0, -K % BLOCK)).unflatten(1, (-1, BLOCK)) if K else x_MK.float().view(M, 0, BLOCK)
    scale, inverse = tile_scale(tiles.abs().amax(dim=-1), power_of_two)
    codes = (tiles * inverse[:, :, None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return codes.flatten(1)[:, :K].contiguous(), scale.t().contiguous()


def quantise_columns(x_MK: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """128x1 tiles, transposed: ``quantise_rows`` of x^T. codes_t (K, M), scale_t (ceil(M/128), K)."""
    return quantise_rows(x_MK.t(), power_of_two)


def dequantise_rows(codes_MK: Tensor, scale_KM: Tensor) -> Tensor:
    """(M, K) float32: code * scale of 1x128 tiles. Of (codes_t, scale_t) it is x^T."""
    wide = scale_KM.t().repeat_interleave(BLOCK, dim=1)[:, : codes_MK.shape[1]]
    return codes_MK.float() * wide


def requantise_transposed(codes_MK: Tensor, scale_KM: Tensor) -> tuple[Tensor, Tensor]:
    """1x128 codes to 128x1 codes with power-of-two scales. With power-of-two scales in, code * scale is exact, and only
    what is far below its new tile's largest number is rounded again."""
    return quantise_columns(dequantise_rows(codes_MK, scale_KM), power_of_two=True)


def gather_rows(
    x_MK: Tensor, tile_begin: Tensor | None = None, tile_count: Tensor | None = None, index_R: Tensor | None = None
) -> Tensor:
    """Rows in the order in which they are quantised: gathered by ``index_R``, then spread to the padded layout."""
    as_bytes = _bytes(x_MK)
    rows = as_bytes if index_R is None else as_bytes[index_R.long()]
    if tile_begin is not None and tile_count is not None:
        rows = to_padded(rows, tile_begin, tile_count)
    return rows.view(x_MK.dtype)


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
    codes = (tiles / old).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    kept = ((codes.float() * old) == tiles).all(dim=3).all(dim=1)
    if bool(kept.all()):
        return _untiled(codes, M, N), scale.clone()
    fresh_MN, fresh_scale = quantise_block(weight_MN, block)
    mask = kept[:, None, :, None]
    # Selecting among bytes: torch has no where() for float8.
    merged = torch.where(mask, codes.view(torch.uint8), _tiles(fresh_MN, block).view(torch.uint8))
    return _untiled(merged.view(E4M3), M, N), torch.where(kept, scale.float(), fresh_scale)


def block_grid(rows: int, columns: int, block: int = BLOCK) -> tuple[int, int]:
    """Shape of the scales: 576 x 7168 has 5 x 56."""
    return (-(-rows // block), -(-columns // block))


def _tiles(x_MN: Tensor, block: int) -> Tensor:
    """(M, N) -> (ceil(M/block), block, ceil(N/block), block), zero-padded at the edges."""
    M, N = x_MN.shape
    grid_m, grid_n = block_grid(M, N, block)
    pad_m, pad_n = grid_m * block - M, grid_n * block - N
    if pad_m or pad_n:
        as_bytes = x_MN.dtype == E4M3
        x_MN = F.pad(x_MN.view(torch.uint8) if as_bytes else x_MN, (0, pad_n, 0, pad_m))
        x_MN = x_MN.view(E4M3) if as_bytes else x_MN
    return x_MN.reshape(grid_m, block, grid_n, block)


def _untiled(tiles: Tensor, M: int, N: int) -> Tensor:
    grid_m, block, grid_n, _ = tiles.shape
    return tiles.reshape(grid_m * block, grid_n * block)[:M, :N].contiguous()


def _bytes(x: Tensor) -> Tensor:
    """torch has no stack, index or copy between layouts for float8: bytes stand in."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x


def _transposed(codes_MN: Tensor) -> Tensor:
    return codes_MN.view(torch.uint8).t().contiguous().view(E4M3)


def _no_experts(weight_ENK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, N, K = weight_ENK.shape
    shapes = ((0, N, K), (0, *block_grid(N, K)), (0, K, N))
    codes, scale, codes_t = (weight_ENK.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return codes.to(E4M3), scale, codes_t.to(E4M3)
