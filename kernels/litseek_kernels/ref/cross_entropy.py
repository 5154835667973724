"""Cross-entropy from logits, forward and backward, in plain torch. Letters: N rows, V vocabulary.

The specification, CPU path and oracle. Arithmetic runs in float32 whatever the logits' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(
    logits_NV: Tensor, labels_N: Tensor, ignore_index: int = -100, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats of ``scale * logits`` (0 where the label is ``ignore_index``) and log-sum-exp,
    both float32 (N,)."""
    wide_NV = logits_NV.float() if scale == 1.0 else logits_NV.float() * scale
    max_N = wide_NV.amax(dim=-1)
    lse_N = (wide_NV - max_N[:, None]).exp_().sum(dim=-1).log_().add_(max_N)
    picked_N = wide_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels_N != ignore_index, lse_N - picked_N, 0.0), lse_N


def cross_entropy_backward_(
    logits_NV: Tensor, labels_N: Tensor, lse_N: Tensor, grad_N: Tensor, ignore_index: int = -100, scale: float = 1.0
) -> Tensor:
    """Overwrite the logits with the loss gradient ``(softmax - one_hot) * grad * scale``, rounded once; ignored rows
    get 0."""
    grad_N1 = torch.where(labels_N != ignore_index, grad_N * scale, 0.0)[:, None]
    lse_N1, label_N1 = lse_N[:, None], labels_N.clamp(min=0)[:, None]
    # apart from the rest: softmax - 1 near softmax = 1 has to be taken before any rounding
    at_label_N1 = (logits_NV.gather(1, label_N1).float() * scale - lse_N1).exp_().sub_(1).mul_(grad_N1)
    wide_NV = logits_NV if logits_NV.dtype == torch.float32 else logits_NV.float()
    if scale != 1.0:
        wide_NV.mul_(scale)
    wide_NV.sub_(lse_N1).exp_().mul_(grad_N1)
    if wide_NV is not logits_NV:
        logits_NV.copy_(wide_NV)
    return logits_NV.scatter_(1, label_N1, at_label_N1.to(logits_NV.dtype))
