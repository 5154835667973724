"""Root-mean-square norm. Letters: N rows, D width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rmsnorm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """(N, D) in x's dtype; the mean of squares is taken in float32 at least."""
    return F.rms_norm(x_ND, (x_ND.shape[-1],), weight_D.to(x_ND.dtype), eps)


def add_rmsnorm(x_ND: Tensor, delta_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, rounded to x's dtype, and its norm."""
    total_ND = x_ND + delta_ND
    return total_ND, rmsnorm(total_ND, weight_D, eps)
