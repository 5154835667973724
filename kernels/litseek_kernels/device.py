"""Where an op runs: the kernel on CUDA tensors, its reference on CPU tensors."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def runs_kernel(x: Tensor) -> bool:
    """True for CUDA tensors, and on the CPU only where TRITON_INTERPRET=1 asks for Triton's interpreter."""
    return x.is_cuda or (not torch.compiler.is_compiling() and os.environ.get("TRITON_INTERPRET") == "1")
