"""Multi-head latent attention (report §2.1.1).

Letters: B batch, S new positions, T cached positions, D model, H heads, N unrotated width, R latent rank,
r rotary width, V value width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from litseek_kernels.rope import mla_heads
from torch import Tensor, nn

from litseek.models.attention import causal_attention
from litseek.models.config import DeepSeekV3Config
from litseek.models.norm import RMSNorm
from litseek.models.recompute import keep_attention, keep_products
from litseek.models.rope import Rotary, rotate, rotation, softmax_scale
from litseek.precision import Precision, operand


class LayerCache(Protocol):
    """One layer's share of a latent cache: R + r numbers a token."""

    def write(self, positions_BS: Tensor, c_kv_BSR: Tensor, k_rope_BSr: Tensor) -> None: ...

    def read(self, length: int) -> tuple[Tensor, Tensor]: ...


class MLA(nn.Module):
    """Queries and keys/values through low-rank latents; one rotary key shared by all heads."""

    def __init__(self, cfg: DeepSeekV3Config, precision: Precision, recompute: bool = False):
        super().__init__()
        self.cfg, self.precision, self.recompute, self.scale = cfg, precision, recompute, softmax_scale(cfg)
        heads, d = cfg.num_attention_heads, cfg.hidden_size
        if cfg.q_lora_rank is None:
            self.q_proj = precision.linear(d, heads * cfg.qk_head_dim)
        else:
            self.q_a_proj = precision.linear(d, cfg.q_lora_rank)
            self.q_a_layernorm = RMSNorm(cfg.q_lora_rank, cfg.rms_norm_eps)
            self.q_b_proj = precision.linear(cfg.q_lora_rank, heads * cfg.qk_head_dim)
        self.kv_a_proj_with_mqa = precision.linear(d, cfg.kv_lora_rank + cfg.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(cfg.kv_lora_rank, cfg.rms_norm_eps)
        self.kv_b_proj = precision.linear(cfg.kv_lora_rank, heads * (cfg.qk_nope_head_dim + cfg.v_head_dim))
        self.o_proj = precision.linear(heads * cfg.v_head_dim, d, role="attention_out")

    def forward(self, x_BSD: Tensor, norm: nn.Module, rotary: Rotary, documents_BS: Tensor | None) -> Tensor:
        """Attention of ``norm(x)``; the norm comes in so that recompute covers it. ``rotary``: `rope.rotation`'s tables."""
        run = self.recompute and torch.is_grad_enabled()
        if run:
            down = keep_products(lambda x: self._down(norm(x)), x_BSD)
            return self.o_proj(keep_attention(self._core, *down, rotary, documents_BS))
        return self.o_proj(self._core(*self._down(norm(x_BSD)), rotary, documents_BS))

    def forward_cached(
        self, x_BSD: Tensor, positions_BS: Tensor, cache: LayerCache, length: int, absorbed: bool
    ) -> Tensor:
        """Attention of already normed ``x_BSD`` over the cache's first ``length`` slots, new positions written first.

        ``absorbed``: W_UK is folded into the query and W_UV applied after the weighted sum, so that the cache is
        read as it lies; otherwise keys and values are up-projected. Both give the same numbers up to rounding.
        """
        q_BSD, kv_BSD = self._down(x_BSD)
        q_nope, q_rope, c_kv, k_rope = self._latents(q_BSD, kv_BSD, rotation(self.cfg, positions_BS))
        cache.write(positions_BS, c_kv, k_rope)
        c_BTR, k_BTr = cache.read(length)
        visible_BST = torch.arange(length, device=x_BSD.device) <= positions_BS[:, :, None]
        up_k_HNR, up_v_HVR = self._up_matrices(c_BTR.dtype)
        if absorbed:
            query = torch.einsum("bshn,hnr->bshr", q_nope, up_k_HNR)
            score = torch.einsum("bshr,btr->bhst", query, c_BTR)
        else:
            score = torch.einsum("bshn,bthn->bhst", q_nope, torch.einsum("btr,hnr->bthn", c_BTR, up_k_HNR))
        score = (score + torch.einsum("bshr,btr->bhst", q_rope, k_BTr)).float() * self.scale
        weight = score.masked_fill(~visible_BST[:, None], float("-inf")).softmax(-1).to(c_BTR.dtype)
        if absorbed:
            out = torch.einsum("bshr,hvr->bshv", torch.einsum("bhst,btr->bshr", weight, c_BTR), up_v_HVR)
        else:
            out = torch.einsum("bhst,bthv->bshv", weight, torch.einsum("btr,hvr->bthv", c_BTR, up_v_HVR))
        return self.o_proj(out.flatten(-2))

    def _down(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """The query's latent (or the query itself) before its norm, and [c_kv ; k_rope] before norm and rotation."""
        query = self.q_proj if self.cfg.q_lora_rank is None else self.q_a_proj
        q_BSD, kv_BSD = self.precision.linears(x_BSD, query, self.kv_a_proj_with_mqa)
        return q_BSD, kv_BSD

    def _latents(self, q_BSD: Tensor, kv_BSD: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q_nope (B, S, H, N), rotated q_rope (B, S, H, r), normed c_kv (B, S, R), rotated k_rope (B, S, r)."""
        cfg = self.cfg
        if cfg.q_lora_rank is not None:
            q_BSD = self.q_b_proj(self.q_a_layernorm(q_BSD))
        q_nope, q_rope = q_BSD.unflatten(-1, (-1, cfg.qk_head_dim)).split(
            [cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], dim=-1
        )
        c_kv, k_rope = kv_BSD.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], dim=-1)
        return (
            q_nope,
            rotate(q_rope, *rotary),
            self.kv_a_layernorm(c_kv),
            rotate(k_rope[:, :, None], *rotary)[:, :, 0],
        )

    def _core(self, q_BSD: Tensor, kv_BSD: Tensor, rotary: Rotary, documents_BS: Tensor | None) -> Tensor:
        """Norms, up-projections, rotation, softmax attention: (B, S, H * V)."""
        cfg = self.cfg
        if cfg.q_lora_rank is not None:
            q_BSD = self.q_b_proj(self.q_a_layernorm(q_BSD))
        elif self.recompute:
            q_BSD = q_BSD.clone()  # the queries are rotated where they lie, and recompute wants them as they were
        c_kv, k_rope = kv_BSD.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], dim=-1)
        up_BSD = self.kv_b_proj(self.kv_a_layernorm(c_kv))
        q, k, v = mla_heads(q_BSD, up_BSD, k_rope, *rotary, cfg.num_attention_heads)
        return causal_attention(q, k, v, self.scale, documents_BS).flatten(-2)

    def _up_matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W_UK (H, N, R) and W_UV (H, V, R), the two halves of kv_b_proj."""
        cfg = self.cfg
        both = operand(self.kv_b_proj.weight, dtype).unflatten(0, (cfg.num_attention_heads, -1))
        up_k, up_v = both.split([cfg.qk_nope_head_dim, cfg.v_head_dim], dim=1)
        return up_k, up_v
