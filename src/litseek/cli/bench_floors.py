"""The least time of each part of a training step: its FLOPs at the product rate, or its bytes at the copy rate.

Both rates are measured here and now. Bytes count what must be read and written once if nothing were fused across parts;
what a good step does without (copies, casts, idle) has a floor of 0. Letters: T tokens, D model, N parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from litseek_kernels.testing import median_ms

from litseek.models.config import DeepSeekV3Config


@dataclass(frozen=True)
class Floor:
    ms: float
    what: str


@dataclass(frozen=True)
class Rates:
    """Measured ceilings: BF16 and, where it is used, FP8 products in TFLOP/s, and copies in GB/s read plus written."""

    bf16: float
    fp8: float | None
    copy: float
    size: int = 8192
    """Of the square products that were timed."""

    @classmethod
    def measure(cls, device: torch.device, precision: str) -> Rates:
        gpu = device.type == "cuda"
        size = 8192 if gpu else 256
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        bf16 = 2 * size**3 / median_ms(lambda: a @ b.T) / 1e9
        fp8 = _fp8_rate(a, b) if gpu and is_fp8(precision) else None
        source = torch.empty(2**28 if gpu else 2**20, device=device).normal_()
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / median_ms(lambda: target.copy_(source)) / 1e6
        return cls(bf16, fp8, copy, size)

    def __str__(self) -> str:
        fp8 = "" if self.fp8 is None else f", {self.fp8:.0f} in FP8"
        return f"{self.bf16:.0f} TFLOP/s in BF16{fp8} ({self.size} cubed), copy {self.copy:.0f} GB/s"


def _fp8_rate(a: torch.Tensor, b: torch.Tensor) -> float:
    """Per-tensor scales: no block-scaled product is faster."""
    one = torch.ones((), device=a.device)
    codes_a, codes_b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)

    def product() -> torch.Tensor:
        return torch._scaled_mm(codes_a, codes_b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=False)

    return 2 * a.shape[0] ** 3 / median_ms(product) / 1e9


def is_fp8(precision: str) -> bool:
    return precision.startswith("fp8")


def floors(cfg: DeepSeekV3Config, precision: str, tokens: int, seq_len: int, rates: Rates) -> dict[str, Floor]:
    """By the profile's part. ``cfg``'s MTP depths are not counted, as in the model's FLOPs."""
    fp8 = is_fp8(precision)
    product = rates.fp8 or rates.bf16
    d, moe_layers = cfg.hidden_size, cfg.num_hidden_layers - cfg.first_k_dense_replace
    heads, layers = cfg.num_attention_heads, cfg.num_hidden_layers
    chosen_rows, hidden = tokens * cfg.num_experts_per_tok, cfg.moe_intermediate_size

    experts = 3 * d * hidden * cfg.num_experts_per_tok * moe_layers
    head, gate = cfg.vocab_size * d, d * cfg.n_routed_experts * moe_layers
    attention = layers * heads * (cfg.qk_head_dim + cfg.v_head_dim) * seq_len  # causal: half of 2 products
    linear = (cfg.flops_per_token(seq_len) - 3 * attention) / 6 - experts - head - gate
    norms = 2 * layers * d + layers * (cfg.kv_lora_rank + (cfg.q_lora_rank or 0)) + d
    acts = chosen_rows * hidden * moe_layers + tokens * (
        cfg.n_shared_experts * hidden * moe_layers + cfg.intermediate_size * cfg.first_k_dense_replace
    )
    rope = layers * (heads + 1) * cfg.qk_rope_head_dim

    def flops(per_token: float, rate: float) -> float:
        return per_token * tokens / rate / 1e9

    def nbytes(total: float) -> float:
        return total / rates.copy / 1e6

    found = {
        "dense GEMM": Floor(flops(6 * linear, product) + flops(6 * gate, rates.bf16), "6 FLOPs a weight and token"),
        "grouped GEMM": Floor(flops(6 * experts, product), "6 FLOPs a chosen weight and token"),
        "attention": Floor(flops(3.5 * attention, rates.bf16), "causal; backward 2.5 times forward"),
        "cross-entropy": Floor(flops(6 * head, rates.bf16), "the head's products"),
        "permute, route": Floor(
            nbytes(4 * 2 * (tokens + chosen_rows) * d * moe_layers), "rows read and written 4 times in BF16"
        ),
        "norm, elementwise": Floor(
            nbytes(2 * (tokens * (5 * norms + 4 * rope) + 8 * acts)), "norms 5, RoPE 4, SwiGLU 8 numbers of BF16"
        ),
        "optimizer": Floor(
            nbytes(26 * cfg.num_params()), "26 bytes a parameter: FP32 weight and gradient, BF16 moments"
        ),
    }
    if fp8:
        # input and output gradient of every product: 2 bytes read, two codes of 1 byte written; weights once a step
        rows = tokens * (linear_widths(cfg) * 4) + 4 * chosen_rows * (2 * d + 3 * hidden) * moe_layers
        weights = cfg.num_params() * (4 + 1 + 1)
        found["quantise"] = Floor(nbytes(rows + weights), "codes of inputs, gradients and weights, both layouts")
    return found


def linear_widths(cfg: DeepSeekV3Config) -> int:
    """Inputs and outputs of all dense Linear of a token, an input that two of them share once: what is quantised of it."""
    d, heads, q = cfg.hidden_size, cfg.num_attention_heads, cfg.q_lora_rank
    query, value = heads * cfg.qk_head_dim, heads * cfg.v_head_dim
    low_rank = d + query if q is None else d + 2 * q + query
    latent = cfg.kv_lora_rank + cfg.qk_rope_head_dim  # its input is the query's
    up = cfg.kv_lora_rank + heads * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    attention = low_rank + latent + up + value + d
    moe_layers = cfg.num_hidden_layers - cfg.first_k_dense_replace
    ffn = sum(
        count * (d + 2 * width + width + d)
        for count, width in (
            (cfg.first_k_dense_replace, cfg.intermediate_size),
            (moe_layers if cfg.n_shared_experts else 0, cfg.n_shared_experts * cfg.moe_intermediate_size),
        )
    )
    return cfg.num_hidden_layers * attention + ffn
