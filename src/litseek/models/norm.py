"""RMSNorm as a module. Its weight is an FP32 master; statistics are taken in float32 whatever comes in."""

from __future__ import annotations

import torch
from litseek_kernels.ref.rmsnorm import rmsnorm
from torch import Tensor, nn


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm(x, self.weight, self.eps)
