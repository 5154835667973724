"""Multi-token prediction loss (report §2.2). Letters: B batch, S sequence, D model, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from litseek.losses.cross_entropy import IGNORE, linear_cross_entropy


def mtp_labels(labels_BS: Tensor, depth: int, documents_BS: Tensor | None = None) -> Tensor:
    """Labels of MTP depth k >= 1: those of the main head ``depth`` places on (report §2.2, eq. 24).

    The last ``depth`` places become IGNORE, which leaves T - k terms. With ``documents`` (attention isolated), so
    does every place whose input tokens s+1 .. s+depth reach into another document.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}, MTP depths start at 1")
    shifted_BS = torch.full_like(labels_BS, IGNORE)
    if depth < labels_BS.shape[1]:
        shifted_BS[:, :-depth] = labels_BS[:, depth:]
        if documents_BS is not None:
            shifted_BS[:, :-depth].masked_fill_(documents_BS[:, depth:] != documents_BS[:, :-depth], IGNORE)
    return shifted_BS


def mtp_loss(
    hiddens: Sequence[Tensor],
    weight_VD: Tensor,
    labels_BS: Tensor,
    targets: float,
    documents_BS: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    weight_copy_VD: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Mean over depths of (sum of the T - k terms) / T, and each depth's own, detached (report §2.2, eq. 24-25).

    ``hiddens`` holds the (B, S, D) states of depths 1, 2, ... after their own norm, ``labels`` those of the main head,
    ``targets`` = T its number of scored tokens. The caller multiplies by lambda. Raises ValueError without a depth.
    """
    if not hiddens:
        raise ValueError("mtp_loss was given no depth; without MTP leave its term out")
    losses = [
        linear_cross_entropy(
            hidden,
            weight_VD,
            mtp_labels(labels_BS, k, documents_BS),
            "sum",
            compute_dtype=compute_dtype,
            weight_copy_VD=weight_copy_VD,
        )
        / max(targets, 1.0)
        for k, hidden in enumerate(hiddens, start=1)
    ]
    return torch.stack(losses).mean(), [loss.detach() for loss in losses]
