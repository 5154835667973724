"""RMSNorm forward and backward, alone and on a residual sum: ours beside torch eager and compiled.

Value: GB/s of the bytes that must move once (forward: rows in and out; backward: rows and gradient in, gradient out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from litseek_kernels.ref import rmsnorm as ref
from litseek_kernels.rmsnorm import add_rmsnorm, rmsnorm
from litseek_kernels.testing import median_ms
from torch import Tensor

SHAPES = ((32768, 1536), (32768, 768), (32768, 512), (8192, 7168), (8192, 1536))
"""The yardstick's three norms at 8 x 4096; the 671B's hidden width and its query latent at 8192 tokens."""
EPS = 1e-6


def rows() -> Iterator[dict]:
    for shape in SHAPES:
        x, delta, dy = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        weight = torch.rand(shape[1], device="cuda", requires_grad=True)
        compiled = torch.compile(ref.rmsnorm, dynamic=False)
        added = torch.compile(ref.add_rmsnorm, dynamic=False)
        for name, norm in (("litseek", rmsnorm), ("torch eager", ref.rmsnorm), ("torch compiled", compiled)):
            yield from pair("rmsnorm", name, lambda f=norm: (f(x, weight, EPS),), (x, weight), (dy.detach(),), 2, 3)
        both = (dy.detach(), torch.randn_like(dy.detach()))
        for name, norm in (("litseek", add_rmsnorm), ("torch eager", ref.add_rmsnorm), ("torch compiled", added)):
            yield from pair(
                "add_rmsnorm", name, lambda f=norm: f(x, delta, weight, EPS), (x, delta, weight), both, 4, 4
            )


def pair(
    op: str,
    name: str,
    forward: Callable[[], tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    seeds: tuple[Tensor, ...],
    forward_crossings: int,
    backward_crossings: int,
) -> Iterator[dict[str, Any]]:
    outputs = forward()
    for kind, crossings, ms in (
        ("forward", forward_crossings, median_ms(forward)),
        (
            "backward",
            backward_crossings,
            median_ms(lambda: torch.autograd.grad(outputs, inputs, seeds, retain_graph=True)),
        ),
    ):
        yield {
            "op": f"{op} {kind}",
            "shape": "x".join(map(str, inputs[0].shape)),
            "implementation": name,
            "ms": ms,
            "value": crossings * inputs[0].nbytes / ms / 1e6,
            "unit": "GB/s",
        }
