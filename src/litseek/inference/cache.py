"""The latent key-value cache of MLA (report §2.1.1): what decoding keeps of the past.

Letters: L layers, B batch, T slots, R latent rank (512), r rotary width (64), S new positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from litseek.models.config import DeepSeekV3Config


class LatentCache:
    """Per token and layer R + r numbers: c_kv after its norm, and the rotated k_rope that all heads share.

    Slot index = position, and a query sees slots <= its own position. Right-padded prompts are therefore correct: what
    padding wrote is overwritten by the real token of that position before any query can see it.
    """

    def __init__(
        self,
        cfg: DeepSeekV3Config,
        batch: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        layers = cfg.num_hidden_layers
        # Zeros, not empty: a slot that nobody wrote has weight 0, and 0 times an old NaN would be NaN.
        self.c_kv_LBTR = torch.zeros(layers, batch, max_len, cfg.kv_lora_rank, device=device, dtype=dtype)
        self.k_rope_LBTr = torch.zeros(layers, batch, max_len, cfg.qk_rope_head_dim, device=device, dtype=dtype)
        self.length = 0
        """Slots in use by the longest sequence; set by whoever feeds tokens, before the model runs."""

    @property
    def max_len(self) -> int:
        return self.c_kv_LBTR.shape[2]

    @property
    def batch(self) -> int:
        return self.c_kv_LBTR.shape[1]

    def numbers_per_token(self) -> int:
        """Numbers held for one token in one layer: 576 in V3."""
        return self.c_kv_LBTR.shape[-1] + self.k_rope_LBTr.shape[-1]

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self.c_kv_LBTR[index], self.k_rope_LBTr[index])

    def keep(self, rows: Tensor) -> None:
        """Drop all sequences but ``rows`` (ascending indices), in the memory that is already held."""
        count = len(rows)
        for name in ("c_kv_LBTR", "k_rope_LBTr"):
            held = getattr(self, name)
            held[:, :count, : self.length] = held[:, rows, : self.length]
            setattr(self, name, held[:, :count])


class LayerCache:
    """One layer's share: what attention writes and reads."""

    def __init__(self, c_kv_BTR: Tensor, k_rope_BTr: Tensor) -> None:
        self.c_kv_BTR, self.k_rope_BTr = c_kv_BTR, k_rope_BTr
        self._row_B1 = torch.arange(c_kv_BTR.shape[0], device=c_kv_BTR.device)[:, None]

    def write(self, positions_BS: Tensor, c_kv_BSR: Tensor, k_rope_BSr: Tensor) -> None:
        self.c_kv_BTR[self._row_B1, positions_BS] = c_kv_BSR.to(self.c_kv_BTR.dtype)
        self.k_rope_BTr[self._row_B1, positions_BS] = k_rope_BSr.to(self.k_rope_BTr.dtype)

    def read(self, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` slots: (B, T, R) and (B, T, r)."""
        return self.c_kv_BTR[:, :length], self.k_rope_BTr[:, :length]
