"""RMSNorm forward and backward, alone and on a residual sum: ours beside torch eager and compiled.

Value: GB/s of the bytes that must move once (forward: rows in and out; backward: rows and gradient in, gradient out).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from litseek_kernels.ref import rmsnorm as ref
from litseek_kernels.rmsnorm import add_rmsnorm, rmsnorm
from torch import Tensor

SHAPES = ((32768, 1536), (32768, 768), (32768, 512), (8192, 7168), (8192, 1536))
"""The yardstick's three norms at 8 x 4096; the 671B's hidden width and its query latent at 8192 tokens."""
EPS = 1e-6


def rows() -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        yield from norms(*shape)


def norms(tokens: int, width: int) -> Iterator[dict[str, Any]]:
    x, delta = (torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    weight = torch.rand(width, device="cuda", requires_grad=True)
    dy, dtotal = torch.randn_like(x).detach(), torch.randn_like(x).detach()
    compiled = torch.compile(ref.rmsnorm, dynamic=False), torch.compile(ref.add_rmsnorm, dynamic=False)
    for name, norm, add in (
        ("litseek", rmsnorm, add_rmsnorm),
        ("torch eager", ref.rmsnorm, ref.add_rmsnorm),
        ("torch compiled", *compiled),
    ):
        yield from pair("rmsnorm", name, lambda f=norm: f(x, weight, EPS), (x, weight), (dy,), (2, 3))  # type: ignore[misc]
        both = dtotal, dy
        yield from pair(
            "add_rmsnorm",
            name,
            lambda f=add: f(x, delta, weight, EPS),  # type: ignore[misc]
            (x, delta, weight),
            both,
            (4, 4),
        )


def pair(
    op: str,
    name: str,
    forward: Callable[[], Any],
    inputs: tuple[Tensor, ...],
    seeds: tuple[Tensor, ...],
    crossings: tuple[int, int],
) -> Iterator[dict[str, Any]]:
    """Forward, then backward; ``crossings`` are the tensors of x's size that each must read or write."""

    def both() -> None:
        torch.autograd.grad(forward(), inputs, seeds)

    ahead = graph_ms(forward)
    for kind, ms, count in zip(("forward", "backward"), (ahead, graph_ms(both) - ahead), crossings):
        yield {
            "op": f"{op} {kind}",
            "shape": "x".join(map(str, inputs[0].shape)),
            "implementation": name,
            "ms": ms,
            "value": count * inputs[0].nbytes / ms / 1e6,
            "unit": "GB/s",
        }


def graph_ms(fn: Callable[[], Any]) -> float:
    """Device time alone: calls of this size would else be timed by how fast the host makes them."""
    with torch.cuda.stream(torch.cuda.Stream()):
        return triton.testing.do_bench_cudagraph(fn, rep=40, return_mode="median")
