"""A Linear in float32 whatever its input's dtype (the router: report §3.3.1). Letters: T rows, D in, E out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_float32(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in float32, or in float64 where an operand is."""
    wide = torch.promote_types(torch.promote_types(x_TD.dtype, weight_ED.dtype), torch.float32)
    return F.linear(x_TD.to(wide), weight_ED.to(wide))
