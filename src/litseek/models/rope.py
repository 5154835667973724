"""Rotary positions on the decoupled part, with YaRN (report §2.1.1, §4.3; YaRN: arXiv 2309.00071).

Letters: B batch, S sequence, R rotary dimensions (R/2 pairs). Pairs are interleaved, as in the released weights.
"""

from __future__ import annotations

import math

import torch
from litseek_kernels.ref.rope import rotate as rotate
from torch import Tensor

from litseek.models.config import DeepSeekV3Config

Rotary = tuple[Tensor, Tensor]
"""cos and sin of every position, as `rotation` gives them."""


def frequencies(cfg: DeepSeekV3Config, device: torch.device | str | None = None) -> Tensor:
    """(R/2,) float32 radians a position. Under YaRN: kept above the fast bound, divided by ``factor`` below the slow
    one, and mixed linearly between the two pairs that the bounds name (10 and 23 of 32 at s = 40)."""
    dim, scaling = cfg.qk_rope_head_dim, cfg.rope_scaling
    period = cfg.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
    base = 1.0 / period
    if scaling is None:
        return base
    low, high = ramp_bounds(cfg)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
    # bit for bit as transformers: at position 131071 one unit in the last place is 0.008 radians
    kept = 1 - ramp
    return 1.0 / (scaling["factor"] * period) * (1 - kept) + base * kept


def ramp_bounds(cfg: DeepSeekV3Config) -> tuple[float, float]:
    """The rotary pairs between which YaRN's ramp runs: those turning beta_fast and beta_slow times in the original
    length, rounded outwards."""
    scaling, dim = cfg.rope_scaling, cfg.qk_rope_head_dim
    assert scaling is not None

    def pair(turns: float) -> float:
        wavelength = scaling["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(cfg.rope_theta))

    low = max(math.floor(pair(scaling["beta_fast"])), 0)
    high = min(math.ceil(pair(scaling["beta_slow"])), dim - 1)
    return low, high if high > low else low + 0.001


def softmax_scale(cfg: DeepSeekV3Config) -> float:
    """1 / sqrt(query width), times mscale_all_dim's factor squared under YaRN (0.135234 at s = 40)."""
    scale = cfg.qk_head_dim**-0.5
    if cfg.rope_scaling is None:
        return scale
    return scale * _magnitude(cfg.rope_scaling["factor"], cfg.rope_scaling["mscale_all_dim"]) ** 2


def rotation(cfg: DeepSeekV3Config, positions_BS: Tensor) -> Rotary:
    """cos and sin, (B, S, R/2) float32. They are scaled only if the two mscales differ, which the release's do not."""
    angle = positions_BS.to(torch.float32)[..., None] * frequencies(cfg, positions_BS.device)
    cos, sin = angle.cos(), angle.sin()
    if cfg.rope_scaling is not None:
        s = cfg.rope_scaling
        magnitude = _magnitude(s["factor"], s["mscale"]) / _magnitude(s["factor"], s["mscale_all_dim"])
        if magnitude != 1.0:
            cos, sin = cos * magnitude, sin * magnitude
    return cos, sin


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 or not mscale else 0.1 * mscale * math.log(factor) + 1.0
