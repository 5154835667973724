"""Clipping of gradients by their global norm (report §4.2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from litseek_kernels.adamw import l2_norm_and_finite
from torch import Tensor


@torch.no_grad()
def grad_norm(params: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all gradients that exist, float32; 0 without any."""
    norm, _ = l2_norm_and_finite(param.grad for param in params if param.grad is not None)
    return norm.float()


@torch.no_grad()
def clip_grad_norm_(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most ``max_norm``; returns the norm before.

    A norm that is not finite leaves every gradient as it is: the caller skips that step, and scaling by it would
    spread the nan to all parameters.
    """
    params = list(params)
    norm = grad_norm(params)
    scale = torch.where(norm.isfinite(), max_norm / norm.clamp(min=max_norm), 1.0)
    grads = [param.grad for param in params if param.grad is not None]
    if grads:
        torch._foreach_mul_(grads, scale)
    return norm
