"""Grouped and dense FP8 products with block scales against torch's own, at the shapes of the 671B and of the yardstick."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from litseek_kernels.grouped_gemm import grouped_mm_fp8, mm_fp8
from litseek_kernels.layout import padded_capacity, row_layout
from litseek_kernels.testing import GROUPED, median_ms, uneven_counts
from torch import Tensor

FP8 = torch.float8_e4m3fn
DENSE = [(8192, 8192, 8192), (4096, 7168, 16384), (4096, 4096, 7168), (4096, 7168, 2048)]
"""(M, N, K)."""


def rows() -> Iterable[dict[str, Any]]:
    for E, m, N, K in GROUPED:
        yield from _grouped([m] * E, N, K, f"{E} x {m}, {N}, {K}")
    for E, m, N, K in ((32, 1024, 4096, 7168), (64, 3072, 1536, 1536)):
        yield from _grouped(uneven_counts(E, E * m).tolist(), N, K, f"{E} x {m} uneven, {N}, {K}")
    for M, N, K in DENSE:
        yield from _dense(M, N, K)


def _grouped(counts: list[int], N: int, K: int, shape: str) -> Iterable[dict[str, Any]]:
    E, R = len(counts), sum(counts)
    layout = row_layout(torch.tensor(counts, device="cuda"), padded_capacity(R, E))
    codes, scale = _codes(layout.tile_expert.numel() * 128, K), _scales(-(-K // 128), layout.tile_expert.numel() * 128)
    weight, weight_scale = _codes(E, N, K), _scales(E, -(-N // 128), -(-K // 128))
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    compact = layout.tile_begin, layout.tile_count, R
    left, right = _normal(R, K), _normal(E, N, K)
    row_scale, column_scale = _scales(R), _scales(E, N)
    calls: dict[str, Callable[[], Tensor]] = {
        "litseek": lambda: grouped_mm_fp8(codes, scale, weight, weight_scale, layout.tile_expert),
        "litseek, compact rows out": lambda: grouped_mm_fp8(
            codes, scale, weight, weight_scale, layout.tile_expert, compact=compact
        ),
        "torch FP8, scales by row": lambda: torch._scaled_grouped_mm(
            codes[:R], weight.transpose(1, 2), row_scale, column_scale, offs=ends, out_dtype=torch.bfloat16
        ),
        "torch BF16": lambda: F.grouped_mm(left, right.transpose(1, 2), offs=ends),
    }
    for name, call in calls.items():
        yield _row("grouped_mm_fp8", shape, name, call, 2 * R * N * K)


def _dense(M: int, N: int, K: int) -> Iterable[dict[str, Any]]:
    codes, scale, weight, weight_scale = _codes(M, K), _scales(K // 128, M), _codes(N, K), _scales(N // 128, K // 128)
    row, block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    left, right = _normal(M, K), _normal(N, K)
    calls: dict[str, Callable[[], Tensor]] = {
        "litseek": lambda: mm_fp8(codes, scale, weight, weight_scale),
        "torch scaled_mm": lambda: F.scaled_mm(
            codes, weight.t(), scale.t(), row, weight_scale.t(), block, output_dtype=torch.bfloat16
        ),
        "torch BF16": lambda: left @ right.t(),
    }
    for name, call in calls.items():
        yield _row("mm_fp8", f"{M} x {N} x {K}", name, call, 2 * M * N * K)


def _row(op: str, shape: str, name: str, call: Callable[[], Tensor], flops: int) -> dict[str, Any]:
    """A rival that refuses the shape is a row that says so; ours may not."""
    empty = dict(op=op, shape=shape, implementation=name, unit="TFLOP/s")
    try:
        ms = median_ms(call)
    except (RuntimeError, AttributeError, TypeError) as error:
        if name.startswith("litseek"):
            raise
        return empty | dict(note=" ".join(str(error).split())[:120])
    return empty | dict(ms=ms, value=flops / ms / 1e9, note="")


def _codes(*shape: int) -> Tensor:
    return _normal(*shape).mul_(100).clamp_(-448, 448).to(FP8)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _scales(*shape: int) -> Tensor:
    return torch.rand(*shape, device="cuda") * 0.01 + 1e-3
