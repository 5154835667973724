"""Rotary positions on the decoupled part, and the heads that MLA's attention reads, in plain torch (report §2.1.1).

Letters: B batch, S sequence, H heads, N unrotated width, r rotary width (r/2 interleaved pairs), V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_BSHr: Tensor, cos_BSr: Tensor, sin_BSr: Tensor) -> Tensor:
    """Turn each interleaved pair of the last dimension; dtype kept, arithmetic in float32 (float64 stays).

    ``cos`` and ``sin`` are (B, S, r/2), or (S, r/2) when all sequences have the same positions.
    """
    wide = torch.promote_types(x_BSHr.dtype, torch.float32)
    even, odd = x_BSHr.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_BSr.unsqueeze(-2), sin_BSr.unsqueeze(-2)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x_BSHr.dtype)


def mla_heads(
    q_BSD: Tensor, kv_BSD: Tensor, k_rope_BSr: Tensor, cos_BSr: Tensor, sin_BSr: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, S, H, N + r), keys (B, S, H, N + r) and values (B, S, H, V) from the up-projections' outputs.

    A head of ``q`` is [nope ; rope], a head of ``kv`` [key's nope ; value]; ``k_rope`` is shared by all heads.
    """
    rope = k_rope_BSr.shape[-1]
    q_BSHQ, kv_BSHD = q_BSD.unflatten(-1, (heads, -1)), kv_BSD.unflatten(-1, (heads, -1))
    nope = q_BSHQ.shape[-1] - rope
    q_nope, q_rope = q_BSHQ.split([nope, rope], dim=-1)
    k_nope, v_BSHV = kv_BSHD.split([nope, kv_BSHD.shape[-1] - nope], dim=-1)
    k_rope = rotate(k_rope_BSr[:, :, None], cos_BSr, sin_BSr).expand(-1, -1, heads, -1)
    q = torch.cat([q_nope, rotate(q_rope, cos_BSr, sin_BSr)], dim=-1)
    return q, torch.cat([k_nope, k_rope], dim=-1), v_BSHV
