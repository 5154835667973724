"""One AdamW step of one tensor, and the norm of many, in plain torch: specification and oracle of the faster ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Update float32 ``param`` and its moments in place (AdamW with decoupled decay; report §3.3.2, §4.2).

    ``step`` counts from 1. Moments may be bfloat16: they are widened, updated, used in float32 and only then rounded
    to nearest even, so rounding enters the next step's moments and never this step's update. Nearest suffices: a
    moment moves by a twentieth or more of the way to its target, bfloat16 resolves 1/256.
    """
    grad = grad.to(param.dtype)
    mean = exp_avg if exp_avg.dtype == param.dtype else exp_avg.to(param.dtype)
    square = exp_avg_sq if exp_avg_sq.dtype == param.dtype else exp_avg_sq.to(param.dtype)
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if mean is not exp_avg:
        exp_avg.copy_(mean)
    if square is not exp_avg_sq:
        exp_avg_sq.copy_(square)
    bias1, bias2 = 1 - beta1**step, 1 - beta2**step
    denominator = torch.sqrt(square).div_(bias2**0.5).add_(eps)
    param.mul_(1 - lr * weight_decay).addcdiv_(mean, denominator, value=-lr / bias1)


def l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all elements: the norm of the tensors' norms. 0 without tensors."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm(list(tensors), 2)
    return torch.linalg.vector_norm(torch.stack([norm.to(tensors[0].device) for norm in norms]))
