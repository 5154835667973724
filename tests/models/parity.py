"""Tiny models of ours and of transformers with the same weights, for parity tests."""

from __future__ import annotations

import torch
from transformers import DeepseekV3Config as TheirConfig
from transformers import DeepseekV3ForCausalLM

from litseek.models.config import DeepSeekV3Config
from litseek.models.transformer import Transformer

TINY = dict(
    vocab_size=97, hidden_size=48, num_hidden_layers=3, first_k_dense_replace=1, num_nextn_predict_layers=0,
    intermediate_size=80, moe_intermediate_size=24, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=4,
    n_group=4, topk_group=2, routed_scaling_factor=2.5, num_attention_heads=4, q_lora_rank=20, kv_lora_rank=16,
    qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, max_position_embeddings=512, initializer_range=0.2,
)  # fmt: skip
YARN = {
    "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def tiny_config(**changes) -> DeepSeekV3Config:
    """2 groups of 4, 4 of 8 experts: K_r / M is 2, as the released code fixes it."""
    return DeepSeekV3Config(**{**TINY, "aux_loss_alpha": 0.0, **changes})


def with_biases(model: Transformer, size: float = 0.3) -> Transformer:
    """Non-zero balance biases: zero would hide a gate that weighs by biased scores."""
    generator = torch.Generator().manual_seed(7)
    for router in model.balance_routers().values():
        bias = router.e_score_correction_bias
        bias.copy_(torch.randn(bias.shape, generator=generator) * size)
    return model


def theirs(model: Transformer) -> DeepseekV3ForCausalLM:
    """transformers' model with the weights of ours (main model only)."""
    cfg = model.cfg
    keys = [k for k in cfg.field_names() if not k.startswith(("aux_loss", "mtp_aux", "group_score"))]
    values = {k: getattr(cfg, k) for k in keys if k not in ("rope_scaling", "num_key_value_heads")}
    rope = dict(cfg.rope_scaling) if cfg.rope_scaling else None
    config = TheirConfig(**values, num_key_value_heads=cfg.num_attention_heads, rope_scaling=rope)
    config._attn_implementation = "eager"
    other = DeepseekV3ForCausalLM(config).eval()
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")}
    renamed = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in own.items()}
    other.load_state_dict(renamed, strict=True)
    return other


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return ((ours - reference).norm() / reference.norm().clamp_min(1e-30)).item()
