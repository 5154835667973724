"""Where every tensor of the released layout lies in our model: the one map that reading, writing and converting share.

Released files hold one matrix an expert and keep MTP depth k as layer ``num_hidden_layers + k`` with copies of embedding
and head (report's release notes); we hold experts stacked, MTP under ``mtp.k`` and embedding and head once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from litseek_kernels.ref.quantise import BLOCK, block_grid

from litseek.models.config import DeepSeekV3Config

SCALE_SUFFIX = "_scale_inv"
"""``x.weight_scale_inv`` holds the scales of ``x.weight``; despite the name they are multiplied to dequantise."""
BIAS_SUFFIX = "e_score_correction_bias"


@dataclass(frozen=True)
class Piece:
    """One released tensor and the part of our parameter that it is."""

    name: str
    """Released name, for example ``model.layers.3.mlp.experts.7.up_proj.weight``."""
    param: str
    """Our name, for example ``layers.3.mlp.experts.gate_up_proj``."""
    shape: tuple[int, ...]
    expert: int | None = None
    """Index along our parameter's first axis."""
    rows: tuple[int, int] | None = None
    """Rows of our (sliced) matrix: the gate's half or the up projection's."""
    quantised: bool = False
    """Stored in FP8 by the release: matrices of attention and feed-forward, not embedding, head, gate, eh_proj."""
    copy: bool = False
    """A second copy of something we hold once: written for other readers, optional when reading."""

    @property
    def index(self) -> tuple[Any, ...]:
        """What to index our parameter with to get this piece."""
        expert = () if self.expert is None else (self.expert,)
        return (*expert, slice(*self.rows) if self.rows else ...)

    @property
    def scale_name(self) -> str:
        return self.name + SCALE_SUFFIX

    @property
    def scale_shape(self) -> tuple[int, int]:
        rows, columns = self.shape
        return block_grid(rows, columns, BLOCK)


def released_layout(cfg: DeepSeekV3Config, copies: bool = True) -> Iterator[Piece]:
    """Every tensor of the released layout, in the order of the files; MTP's copies of embedding and head with ``copies``."""
    vocab = (cfg.vocab_size, cfg.hidden_size)
    yield Piece("model.embed_tokens.weight", "embed_tokens.weight", vocab)
    for layer in range(cfg.num_hidden_layers):
        yield from _block(cfg, f"model.layers.{layer}", f"layers.{layer}", cfg.is_moe(layer))
    yield Piece("model.norm.weight", "norm.weight", (cfg.hidden_size,))
    yield Piece("lm_head.weight", "lm_head.weight", vocab)
    for depth in range(cfg.num_nextn_predict_layers):
        theirs, ours = f"model.layers.{cfg.num_hidden_layers + depth}", f"mtp.{depth}"
        if copies:
            yield Piece(f"{theirs}.embed_tokens.weight", "embed_tokens.weight", vocab, copy=True)
        for norm in ("enorm", "hnorm"):
            yield Piece(f"{theirs}.{norm}.weight", f"{ours}.{norm}.weight", (cfg.hidden_size,))
        yield Piece(f"{theirs}.eh_proj.weight", f"{ours}.eh_proj.weight", (cfg.hidden_size, 2 * cfg.hidden_size))
        yield from _block(cfg, theirs, f"{ours}.block", True)
        yield Piece(f"{theirs}.shared_head.norm.weight", f"{ours}.norm.weight", (cfg.hidden_size,))
        if copies:
            yield Piece(f"{theirs}.shared_head.head.weight", "lm_head.weight", vocab, copy=True)


def parameter_shapes(cfg: DeepSeekV3Config) -> dict[str, tuple[int, ...]]:
    """Our tensors' names and shapes, put together from the released layout's pieces."""
    shapes = {}
    for param, pieces in by_parameter(cfg).items():
        last = pieces[-1]
        if last.expert is None:
            shapes[param] = last.shape
        else:
            rows = last.rows[1] if last.rows else last.shape[0]
            shapes[param] = (last.expert + 1, rows, last.shape[1])
    return shapes


def by_parameter(cfg: DeepSeekV3Config) -> dict[str, list[Piece]]:
    """Our parameters' names, each with the released tensors that it is made of."""
    grouped: dict[str, list[Piece]] = {}
    for piece in released_layout(cfg, copies=False):
        grouped.setdefault(piece.param, []).append(piece)
    return grouped


def _block(cfg: DeepSeekV3Config, theirs: str, ours: str, moe: bool) -> Iterator[Piece]:
    d, heads = cfg.hidden_size, cfg.num_attention_heads

    def plain(name: str, *shape: int) -> Piece:
        return Piece(f"{theirs}.{name}", f"{ours}.{name}", shape)

    def matrix(name: str, rows: int, columns: int) -> Piece:
        return Piece(f"{theirs}.{name}.weight", f"{ours}.{name}.weight", (rows, columns), quantised=True)

    yield plain("input_layernorm.weight", d)
    query = heads * cfg.qk_head_dim
    if cfg.q_lora_rank is None:
        yield matrix("self_attn.q_proj", query, d)
    else:
        yield matrix("self_attn.q_a_proj", cfg.q_lora_rank, d)
        yield plain("self_attn.q_a_layernorm.weight", cfg.q_lora_rank)
        yield matrix("self_attn.q_b_proj", query, cfg.q_lora_rank)
    yield matrix("self_attn.kv_a_proj_with_mqa", cfg.kv_lora_rank + cfg.qk_rope_head_dim, d)
    yield plain("self_attn.kv_a_layernorm.weight", cfg.kv_lora_rank)
    yield matrix("self_attn.kv_b_proj", heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.kv_lora_rank)
    yield matrix("self_attn.o_proj", d, heads * cfg.v_head_dim)
    yield plain("post_attention_layernorm.weight", d)
    if not moe:
        yield from _feed_forward(matrix, "mlp", d, cfg.intermediate_size)
        return
    yield plain("mlp.gate.weight", cfg.n_routed_experts, d)
    yield plain(f"mlp.gate.{BIAS_SUFFIX}", cfg.n_routed_experts)
    width = cfg.moe_intermediate_size
    for e in range(cfg.n_routed_experts):
        expert = f"{theirs}.mlp.experts.{e}"
        both, down = f"{ours}.mlp.experts.gate_up_proj", f"{ours}.mlp.experts.down_proj"
        yield Piece(f"{expert}.gate_proj.weight", both, (width, d), e, (0, width), quantised=True)
        yield Piece(f"{expert}.up_proj.weight", both, (width, d), e, (width, 2 * width), quantised=True)
        yield Piece(f"{expert}.down_proj.weight", down, (d, width), e, quantised=True)
    if cfg.n_shared_experts:
        yield from _feed_forward(matrix, "mlp.shared_experts", d, width * cfg.n_shared_experts)


def _feed_forward(matrix, name: str, d: int, width: int) -> Iterator[Piece]:  # type: ignore[no-untyped-def]
    yield matrix(f"{name}.gate_proj", width, d)
    yield matrix(f"{name}.up_proj", width, d)
    yield matrix(f"{name}.down_proj", d, width)
