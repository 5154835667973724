"""FP8 quantisers beside a copy of the same bytes and torch.compile of the reference.

Value: GB/s of the bytes that must move once: numbers in, codes and scales out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from litseek_kernels.layout import padded_capacity, row_layout
from litseek_kernels.quantise import (
    quantise_both,
    quantise_rows,
    quantise_weight,
    requantise_both,
    requantise_transposed,
)
from litseek_kernels.ref import quantise as ref
from litseek_kernels.testing import median_ms, turns, uneven_counts

SHAPES = ((65536, 7168), (8192, 7168), (32768, 1536), (32768, 6144))
"""Tokens x width of the 671B, then of the yardstick at 8 x 4096. Each input set is 100 MB or more: none stays in L2."""
GROUPED = ((64, 196608, 1536, 32768), (32, 65536, 7168, 8192))
"""(E, rows, width, tokens): routed rows of the yardstick and of the 671B slice."""
WEIGHTS = ((64, 1536, 1536), (32, 4096, 7168))


def rows() -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        yield from activations(*shape)
    for case in GROUPED:
        yield from grouped(*case)
    for weight in WEIGHTS:
        yield from weights(*weight)


def activations(M: int, K: int) -> Iterator[dict[str, Any]]:
    sets = turns(lambda: torch.randn(M, K, device="cuda", dtype=torch.bfloat16), 2)
    shape, numbers = f"{M} x {K}", M * K
    one, two = numbers * (3 + 4 / 128), numbers * (4 + 8 / 128)
    yield copy("quantise 1x128", shape, one)
    yield row("quantise 1x128", shape, "litseek", one, lambda: quantise_rows(next(sets)))
    yield row("quantise 1x128, 2^n", shape, "litseek", one, lambda: quantise_rows(next(sets), power_of_two=True))
    compiled = torch.compile(ref.quantise_rows, dynamic=False)
    yield row("quantise 1x128", shape, "torch compiled", one, lambda: compiled(next(sets)))
    yield row("quantise 1x128 + 128x1", shape, "litseek", two, lambda: quantise_both(next(sets)))
    both = torch.compile(lambda x: (ref.quantise_rows(x), ref.quantise_columns(x)), dynamic=False)
    yield row("quantise 1x128 + 128x1", shape, "torch compiled", two, lambda: both(next(sets)))
    payload = quantise_rows(next(sets), power_of_two=True)
    again = numbers * (2 + 8 / 128)
    yield row("requantise 128x1", shape, "litseek", again, lambda: requantise_transposed(*payload))


def grouped(E: int, R: int, K: int, T: int) -> Iterator[dict[str, Any]]:
    layout = row_layout(uneven_counts(E, R, device="cuda"), padded_capacity(R, E))
    x = torch.randn(R, K, device="cuda", dtype=torch.bfloat16)
    tokens = torch.randn(T, K, device="cuda", dtype=torch.bfloat16)
    index = torch.randint(0, T, (R,), device="cuda")
    shape, both = f"{E} experts, {R} rows x {K}", R * K * (4 + 8 / 128)
    op = "quantise 1x128 + 128x1 to padded"
    yield copy(op, shape, both)
    yield row(op, shape, "litseek", both, lambda: quantise_both(x, layout=layout))
    gathered = R * K * (2 + 8 / 128) + T * K * 2
    yield row(
        f"{op}, gathered", shape, "litseek", gathered, lambda: quantise_both(tokens, layout=layout, index_R=index)
    )
    payload = quantise_rows(x, power_of_two=True)
    moved = R * K * (3 + 12 / 128)
    yield row("payload to padded + 128x1", shape, "litseek", moved, lambda: requantise_both(*payload, layout=layout))


def weights(E: int, N: int, K: int) -> Iterator[dict[str, Any]]:
    weight = torch.randn(E, N, K, device="cuda")
    shape, moved = f"{E} x {N} x {K} FP32", E * N * K * 6
    yield copy("quantise 128x128 + transposed", shape, moved)
    yield row("quantise 128x128 + transposed", shape, "litseek", moved, lambda: quantise_weight(weight))


def copy(op: str, shape: str, moved: float) -> dict[str, Any]:
    """What the memory gives: half of the bytes read, half written."""
    source = torch.randint(0, 255, (int(moved / 2),), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return row(op, shape, "copy of as many bytes", moved, lambda: target.copy_(source))


def row(op: str, shape: str, implementation: str, moved: float, run: Callable[[], Any]) -> dict[str, Any]:
    ms = median_ms(run)
    return {
        "op": op, "shape": shape, "implementation": implementation,
        "ms": ms, "value": moved / ms / 1e6, "unit": "GB/s", "note": "",
    }  # fmt: skip
