"""Softmax attention over the up-projected heads. Letters: B batch, S queries, T keys, H heads, N query width, V value width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""cuDNN takes 192 / 128 wide heads; flash does not."""
_PLAIN_LIMIT = 1024
"""Up to this length plain softmax is faster on a CPU than SDPA, whose backward took half of a step."""


def causal_attention(
    q_BSHN: Tensor, k_BSHN: Tensor, v_BSHV: Tensor, scale: float, documents_BS: Tensor | None
) -> Tensor:
    """(B, S, H, V): each position sees itself and earlier ones, inside its own document where ids are given."""
    q, k, v = (t.transpose(1, 2) for t in (q_BSHN, k_BSHN, v_BSHV))
    mask = None if documents_BS is None else document_mask(documents_BS)[:, None]
    if q.device.type == "cpu" and q.shape[2] <= _PLAIN_LIMIT:
        return _plain(q, k, v, scale, mask).transpose(1, 2)
    with sdpa_kernel(_BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)


def document_mask(documents_BS: Tensor) -> Tensor:
    """(B, S, S) bool: query row may see key column (same document, not later)."""
    same = documents_BS[:, :, None] == documents_BS[:, None, :]
    return same & causal_mask(documents_BS.shape[1], documents_BS.device)


def causal_mask(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_()


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    if mask is None:
        mask = causal_mask(q.shape[2], q.device)
    score = (q * scale) @ k.transpose(-2, -1)
    score = torch.where(mask, score, torch.finfo(score.dtype).min)
    return score.softmax(-1) @ v
