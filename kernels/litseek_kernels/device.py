"""Where an op runs: the kernel on CUDA tensors, its reference on CPU tensors."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor


def runs_kernel(x: Tensor) -> bool:
    """True for CUDA tensors, and on the CPU only where TRITON_INTERPRET=1 asks for Triton's interpreter."""
    return x.is_cuda or (not torch.compiler.is_compiling() and os.environ.get("TRITON_INTERPRET") == "1")


def multiprocessors(device: int) -> int:
    """How many programs a persistent Hopper kernel starts: one for each multiprocessor that torch's own products may use
    (litseek.parallel.lanes leaves some to others). ValueError on a GPU that is no Hopper."""
    return _multiprocessors(device) - (torch._C._get_sm_carveout_experimental() or 0)


@cache
def _multiprocessors(device: int) -> int:
    properties = torch.cuda.get_device_properties(device)
    found = (properties.major, properties.minor)
    if found != (9, 0):
        raise ValueError(f"FP8 products are written for compute capability 9.0, {properties.name} has {found}")
    return properties.multi_processor_count
