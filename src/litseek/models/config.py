"""Shape of a DeepSeek-V3 model (report §4.2). Field names are those of the released config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

ROPE_SCALING_DEFAULTS: dict[str, Any] = {
    "type": "yarn",
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""The report's YaRN (§4.3); keys left out of ``rope_scaling`` take these values."""


@dataclass(frozen=True)
class DeepSeekV3Config:
    """Checked at construction. Defaults are the 671B model's.

    Raises ValueError naming the fields when they contradict each other.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    num_nextn_predict_layers: int = 1
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    moe_layer_freq: int = 1
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    group_score_experts: int | None = None
    """How many of a group's best biased scores make its score; None: K_r / M by the report (released code: always 2)."""
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    seq_aux: bool = True
    """True: sequence-wise balance loss (report eq. 17-20); False: batch-wise (report §4.5.3)."""
    aux_loss_alpha: float = 0.0001
    """Weight of the balance loss; the report's value (the released config.json says 0.001)."""
    aux_loss_reduction: str = "sum"
    """Over layers, "sum" or "mean" (the report leaves it open)."""
    mtp_aux_loss: bool = True
    """Whether the MTP block has a balance loss of its own (the report leaves it open)."""
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    attention_dropout: float = 0.0
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    initializer_range: float = 0.006
    tie_word_embeddings: bool = False
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", _checked_scaling(self.rope_scaling))
        for name in _POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"model.{name}={value!r} must be an integer of at least 1")
        for name in ("first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"model.{name}={value!r} must be an integer of at least 0")
        if self.q_lora_rank is not None and self.q_lora_rank < 1:
            raise ValueError(f"model.q_lora_rank={self.q_lora_rank} must be at least 1, or null for a full-rank query")
        for name, only in _ONLY.items():
            if getattr(self, name) not in only:
                raise ValueError(f"model.{name}={getattr(self, name)!r} is not supported: allowed is {_listed(only)}")
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise ValueError(
                f"model.num_key_value_heads={self.num_key_value_heads} must equal model.num_attention_heads="
                f"{self.num_attention_heads}: latent attention has a key and a value for every head"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"model.qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotary pairs")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"model.first_k_dense_replace={self.first_k_dense_replace} exceeds "
                f"model.num_hidden_layers={self.num_hidden_layers}"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"model.n_group={self.n_group} does not divide model.n_routed_experts={self.n_routed_experts}"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"model.topk_group={self.topk_group} exceeds model.n_group={self.n_group}")
        reachable = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"model.num_experts_per_tok={self.num_experts_per_tok} exceeds the {reachable} experts in "
                f"model.topk_group={self.topk_group} groups"
            )
        score = self.group_score_experts
        if score is not None and not 1 <= score <= self.n_routed_experts // self.n_group:
            raise ValueError(
                f"model.group_score_experts={score} must lie between 1 and the {self.n_routed_experts // self.n_group} "
                "experts of a group"
            )
        for name in ("aux_loss_alpha", "initializer_range", "rms_norm_eps", "rope_theta", "routed_scaling_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
                raise ValueError(f"model.{name}={value!r} must be a number that is not negative")
        for name in ("rms_norm_eps", "rope_theta", "routed_scaling_factor"):
            if getattr(self, name) == 0:
                raise ValueError(f"model.{name}=0 must be above 0")

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def experts_per_group_score(self) -> int:
        """``group_score_experts``, or K_r / M (report §2.1.2): 2 in V3."""
        per_group = self.n_routed_experts // self.n_group
        return self.group_score_experts or min(max(1, self.num_experts_per_tok // self.topk_group), per_group)

    def is_moe(self, layer: int) -> bool:
        """Whether this layer's feed-forward is a mixture; MTP blocks (layer >= num_hidden_layers) always are."""
        return layer >= self.first_k_dense_replace

    def num_params(self) -> int:
        """All trained numbers, MTP's own included, balance biases not."""
        d = self.hidden_size
        layers = self.num_hidden_layers * (self._attention() + self._attention_norms() + 2 * d)
        layers += self.first_k_dense_replace * self._dense() + self._num_moe() * self._moe(self.n_routed_experts)
        own = self._attention() + self._attention_norms() + 2 * d + self._moe(self.n_routed_experts) + 2 * d * d + 3 * d
        ends = (1 if self.tie_word_embeddings else 2) * self.vocab_size * d + d
        return layers + ends + self.num_nextn_predict_layers * own

    def num_active_params(self) -> int:
        """Numbers that one token meets on its way to the main head: no input embedding, no MTP."""
        d = self.hidden_size
        layers = self.num_hidden_layers * (self._attention() + self._attention_norms() + 2 * d)
        layers += self.first_k_dense_replace * self._dense() + self._num_moe() * self._moe(self.num_experts_per_tok)
        return layers + self.vocab_size * d + d

    def flops_per_token(self, seq_len: int) -> int:
        """Forward and backward of the main model: 6 per active matrix parameter, causal attention at half (no MTP)."""
        d = self.hidden_size
        matrices = self.num_hidden_layers * self._attention() + self.first_k_dense_replace * self._dense()
        matrices += self._num_moe() * self._moe(self.num_experts_per_tok) + self.vocab_size * d
        attention = self.num_hidden_layers * self.num_attention_heads * (self.qk_head_dim + self.v_head_dim)
        return 6 * matrices + 3 * attention * seq_len

    def replace(self, **changes: Any) -> DeepSeekV3Config:
        """A changed copy, checked again."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON."""
        return {k: dict(v) if isinstance(v, Mapping) else v for k, v in asdict(self).items()}

    @classmethod
    def field_names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    def _num_moe(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    def _attention(self) -> int:
        d, heads, rank = self.hidden_size, self.num_attention_heads, self.kv_lora_rank
        query = heads * self.qk_head_dim
        q = d * query if self.q_lora_rank is None else (d + query) * self.q_lora_rank
        kv = d * (rank + self.qk_rope_head_dim) + rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return q + kv + heads * self.v_head_dim * d

    def _attention_norms(self) -> int:
        return self.kv_lora_rank + (self.q_lora_rank or 0)

    def _dense(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    def _moe(self, experts: int) -> int:
        ffn = 3 * self.hidden_size * self.moe_intermediate_size * (experts + self.n_shared_experts)
        return ffn + self.hidden_size * self.n_routed_experts


_POSITIVE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "moe_intermediate_size"),
    *("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group", "num_attention_heads", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
)
_ONLY: dict[str, tuple[Any, ...]] = {
    "moe_layer_freq": (1,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "aux_loss_reduction": ("sum", "mean"),
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "rope_interleave": (True,),
    "hidden_act": ("silu",),
    "tie_word_embeddings": (False,),
}


def _checked_scaling(scaling: Mapping[str, Any]) -> dict[str, Any] | None:
    unknown = sorted(set(scaling) - set(ROPE_SCALING_DEFAULTS) - {"rope_type"})
    if unknown:
        raise ValueError(
            f"model.rope_scaling.{unknown[0]} is not a key of YaRN: allowed are {_listed(ROPE_SCALING_DEFAULTS)}"
        )
    full = {**ROPE_SCALING_DEFAULTS, **scaling}
    kind = full.pop("rope_type", full["type"])
    if kind != "yarn":
        raise ValueError(f"model.rope_scaling.type={kind!r} is not supported: allowed is 'yarn', or rope_scaling=null")
    full["type"] = "yarn"
    for key, value in full.items():
        if key != "type" and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
            raise ValueError(f"model.rope_scaling.{key}={value!r} must be a number of at least 0")
    if full["factor"] < 1:
        raise ValueError(f"model.rope_scaling.factor={full['factor']} must be at least 1")
    return full


def _listed(values: Any) -> str:
    return ", ".join(str(v) for v in values)
