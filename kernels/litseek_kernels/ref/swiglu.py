"""silu(gate) * up. Letters: N rows, F hidden."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """(N, F) in the inputs' dtype."""
    return F.silu(gate_NF) * up_NF
