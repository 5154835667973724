"""Recompute of RMSNorm and MLA up-projections in backward (report §3.2.3): cheap work again, costly work kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from litseek_kernels.grouped_gemm import grouped_mm_op
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
_PRODUCT = {_aten.mm.default, grouped_mm_op}
"""BF16's and FP8's."""


def keep_products(function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function``; backward recomputes all but its matrix products (a norm before a down-projection)."""
    return _selective(function, _PRODUCT, *args)


def keep_attention(function: Callable[..., Any], *args: Any) -> Any:
    """Run ``function``; backward recomputes all but the attention core (norms, up-projections, rotation)."""
    return _selective(function, _ATTENTION, *args)


def _selective(function: Callable[..., Any], kept: set[Any], *args: Any) -> Any:
    def policy(ctx: Any, op: Any, *a: Any, **k: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts, preserve_rng_state=False)
