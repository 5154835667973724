"""Root-mean-square norm. Letters: N rows, D width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rmsnorm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """(N, D) in x's dtype; the mean of squares is taken in float32 at least."""
    return F.rms_norm(x_ND, (x_ND.shape[-1],), weight_D.to(x_ND.dtype), eps)
