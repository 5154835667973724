"""Weight gradient of the experts: ours in FP8 beside torch's grouped product in BF16. Value: TFLOP/s of the real rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from litseek_kernels.grouped_wgrad import grouped_wgrad_fp8
from litseek_kernels.layout import group_layout, padded_capacity
from litseek_kernels.testing import GROUPED, median_ms, uneven_counts
from torch import Tensor

UNEVEN = ((8, 4096, 4096, 7168), (64, 1536, 1536, 1536), (64, 1536, 1536, 768))


def rows() -> Iterator[dict]:
    for experts, each, n, k in GROUPED:
        yield from _shape(torch.full((experts,), each, device="cuda"), n, k, f"{experts} x {each}, {n}, {k}")
    for experts, each, n, k in UNEVEN:
        counts = uneven_counts(experts, experts * each, device="cuda")
        yield from _shape(counts, n, k, f"{experts} x {each} uneven, {n}, {k}")


def _shape(count_E: Tensor, n: int, k: int, shape: str) -> Iterator[dict]:
    total = int(count_E.sum())
    flop = 2 * total * n * k
    for implementation, fn, note in chain(_ours(count_E, total, n, k), _torch(count_E, total, n, k)):
        ms = median_ms(fn)
        yield {"op": "grouped_wgrad", "shape": shape, "implementation": implementation, "ms": ms,
               "value": flop / ms / 1e9, "unit": "TFLOP/s", "note": note}  # fmt: skip


def _ours(count_E: Tensor, total: int, n: int, k: int) -> Iterator[tuple[str, Callable[[], Any], str]]:
    capacity = padded_capacity(total, len(count_E))
    start_E = group_layout(count_E, capacity)[1]
    tensors = *_quantised(n, capacity), *_quantised(k, capacity), start_E
    out = torch.empty(len(count_E), n, k, device="cuda")
    yield "litseek fp8", lambda: grouped_wgrad_fp8(*tensors, out=out), "float32 out"
    yield "litseek fp8", lambda: grouped_wgrad_fp8(*tensors, out=out, accumulate=True), "added to float32 out"
    short = out.bfloat16()
    yield "litseek fp8", lambda: grouped_wgrad_fp8(*tensors, out=short), "bfloat16 out"


def _torch(count_E: Tensor, total: int, n: int, k: int) -> Iterator[tuple[str, Callable[[], Any], str]]:
    grad = torch.randn(total, n, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(total, k, device="cuda", dtype=torch.bfloat16)
    ends = count_E.cumsum(0).to(torch.int32)
    yield "torch grouped_mm bf16", lambda: F.grouped_mm(grad.t(), rows, offs=ends), "bfloat16 out"


def _quantised(width: int, capacity: int) -> tuple[Tensor, Tensor]:
    codes = torch.randn(width, capacity, device="cuda", dtype=torch.bfloat16).mul_(60).to(torch.float8_e4m3fn)
    return codes, torch.rand(capacity // 128, width, device="cuda").add_(0.5)
