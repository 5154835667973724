"""SwiGLU forward and backward, and fused with FP8 quantisation, beside torch compiled and a copy of the same bytes.

Value: GB/s of the bytes that must move once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from litseek_kernels.layout import padded_capacity, row_layout
from litseek_kernels.ref import swiglu as ref
from litseek_kernels.swiglu import swiglu
from litseek_kernels.swiglu_fp8 import swiglu_backward_quantise, swiglu_quantise
from litseek_kernels.testing import median_ms, uneven_counts

SHAPES = ((64, 196608, 768), (32, 65536, 2048))
"""(E, rows, F): routed rows of the yardstick at 8 x 4096 and of the 671B slice."""


def rows() -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        yield from plain(*shape)
        yield from quantised(*shape)


def plain(E: int, R: int, F: int) -> Iterator[dict[str, Any]]:
    gate_up = torch.randn(R, 2 * F, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.rand(R, device="cuda", requires_grad=True)
    grad = torch.randn(R, F, device="cuda", dtype=torch.bfloat16)
    shape, forward, backward = f"{R} x {F}", R * F * 6, R * F * 10
    compiled = torch.compile(ref.swiglu_forward, dynamic=False)
    for name, fn in (("litseek", swiglu), ("torch compiled", compiled), ("torch eager", ref.swiglu_forward)):
        with torch.no_grad():
            yield row("swiglu, weighted, forward", shape, name, forward, lambda f=fn: f(gate_up, weight))  # type: ignore[misc]
        out = fn(gate_up, weight)
        yield row(
            "swiglu, weighted, backward",
            shape,
            name,
            backward,
            lambda o=out: torch.autograd.grad(o, (gate_up, weight), grad, retain_graph=True),  # type: ignore[misc]
        )


def quantised(E: int, R: int, F: int) -> Iterator[dict[str, Any]]:
    layout = row_layout(uneven_counts(E, R, device="cuda"), padded_capacity(R, E))
    capacity = layout.tile_begin.numel() * 128
    h = torch.randn(capacity, 2 * F, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(capacity, F, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(R, device="cuda")
    shape = f"{E} experts, {R} rows x {F}"
    forward, backward = R * F * (7 + 12 / 128), R * F * (9 + 28 / 128)
    yield row("swiglu to FP8", shape, "litseek", forward, lambda: swiglu_quantise(h, layout=layout, weight_R=weight))
    _, _, codes, scale = swiglu_quantise(h, layout=layout, weight_R=weight)
    source = torch.randint(0, 255, (int(backward / 2),), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    op = "swiglu backward, FP8 in and out"
    yield row(op, shape, "copy of as many bytes", backward, lambda: target.copy_(source))
    yield row(
        op,
        shape,
        "litseek",
        backward,
        lambda: swiglu_backward_quantise(codes, scale, grad, layout=layout, weight_R=weight),
    )


def row(op: str, shape: str, implementation: str, moved: float, run: Callable[[], Any]) -> dict[str, Any]:
    ms = median_ms(run)
    return {
        "op": op, "shape": shape, "implementation": implementation,
        "ms": ms, "value": moved / ms / 1e6, "unit": "GB/s", "note": "",
    }  # fmt: skip
