"""Cross-entropy from logits, forward and backward, in plain torch. Letters: N rows, V vocabulary.

The specification, CPU path and oracle. Sums run in float32 whatever the logits' dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(logits_NV: Tensor, labels_N: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats (0 where the label is ``ignore_index``) and log-sum-exp, both float32 (N,)."""
    logits_NV = logits_NV.float()
    max_N = logits_NV.amax(dim=-1)
    lse_N = (logits_NV - max_N[:, None]).exp_().sum(dim=-1).log_().add_(max_N)
    scored_N = labels_N != ignore_index
    picked_N = logits_NV.gather(1, labels_N.clamp(min=0)[:, None])[:, 0]
    return torch.where(scored_N, lse_N - picked_N, 0.0), lse_N


def cross_entropy_backward_(
    logits_NV: Tensor, labels_N: Tensor, lse_N: Tensor, grad_N: Tensor, ignore_index: int = -100
) -> Tensor:
    """Overwrite float32 logits with the loss gradient ``(softmax - one_hot) * grad``; ignored rows become 0."""
    assert logits_NV.dtype == torch.float32, "the logits are overwritten, so they must be float32 already"
    scored_N = labels_N != ignore_index
    logits_NV.sub_(lse_N[:, None]).exp_()
    logits_NV.scatter_add_(1, labels_N.clamp(min=0)[:, None], logits_NV.new_full((len(labels_N), 1), -1.0))
    # masked_fill and not only a product with 0: an ignored row may hold inf or nan
    return logits_NV.mul_(grad_N[:, None]).masked_fill_(~scored_N[:, None], 0.0)
