"""MLA's heads (rotation and the shared rotary key), forward and backward: ours beside torch eager and compiled.

Value: GB/s of the bytes that must move once: rotary parts of the queries in and out, keys' part in, keys out; backward
the same and the values' gradient in and out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
from litseek_kernels.ref import rope as ref
from litseek_kernels.rope import mla_heads
from torch import Tensor

SHAPES = ((8, 4096, 16), (2, 4096, 128))
"""(batch, length, heads) of the yardstick and of the 671B; heads are 128 + 64 and 128 wide."""
NOPE, ROPE, VALUE = 128, 64, 128


def rows() -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        yield from layer(*shape)


def layer(batch: int, length: int, heads: int) -> Iterator[dict[str, Any]]:
    def new(*width: int) -> Tensor:
        return torch.randn(batch, length, *width, device="cuda", dtype=torch.bfloat16)

    given = new(heads * (NOPE + ROPE)), new(heads * (NOPE + VALUE)), new(512 + ROPE)
    angle = torch.arange(length, device="cuda")[:, None] * torch.rand(ROPE // 2, device="cuda")
    cos, sin = (t.expand(batch, -1, -1).contiguous() for t in (angle.cos(), angle.sin()))
    seeds = [new(heads, width) for width in (NOPE + ROPE, NOPE + ROPE, VALUE)]
    part = 2 * batch * length * heads
    moved = (
        part * (2 * ROPE + NOPE + NOPE + ROPE),
        part * (2 * ROPE + NOPE + ROPE + VALUE + NOPE + VALUE),
    )
    compiled = torch.compile(ref.mla_heads, dynamic=False)
    for name, function in (("litseek", mla_heads), ("torch eager", ref.mla_heads), ("torch compiled", compiled)):
        for kind, ms, count in zip(("forward", "backward"), times(function, given, (cos, sin, heads), seeds), moved):
            yield {
                "op": f"mla_heads {kind}",
                "shape": f"{batch}x{length}x{heads}",
                "implementation": name,
                "ms": ms,
                "value": count / ms / 1e6,
                "unit": "GB/s",
            }


def times(function: Any, given: tuple[Tensor, ...], rest: tuple[Any, ...], seeds: list[Tensor]) -> tuple[float, float]:
    def call(q: Tensor, kv: Tensor, latent: Tensor) -> tuple[Tensor, ...]:
        return function(q, kv, latent[..., 512:], *rest)

    def both() -> None:
        torch.autograd.grad(call(*inputs), inputs, seeds)

    # device time alone: graphs replay, and backward has to be captured together with its forward
    inputs = [t.clone().requires_grad_() for t in given]
    with torch.cuda.stream(torch.cuda.Stream()):
        forward, whole = (
            triton.testing.do_bench_cudagraph(fn, rep=40, return_mode="median") for fn in (lambda: call(*inputs), both)
        )
    return forward, whole - forward
