"""Shapes of the real models, one timer and one error measure for every kernel's tests and benchmark rows.

Letters of the shapes: M rows, N out, K in of a product; E experts; T tokens; D width.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Widths(NamedTuple):
    """What a model's kernels see of it."""

    hidden: int
    ffn: int
    """Of the dense blocks."""
    expert: int
    experts: int
    chosen: int
    heads: int
    q_lora: int | None
    kv_lora: int
    vocab: int
    shared: int


MODELS = {
    "v3_671b": Widths(7168, 18432, 2048, 256, 8, 128, 1536, 512, 129280, 1),
    "v3_16b": Widths(2048, 10944, 1408, 64, 6, 16, None, 512, 102400, 2),
    "yardstick": Widths(1536, 6144, 768, 64, 6, 16, 768, 512, 32768, 2),
}
"""conf/model/<name>.yaml; all have heads of 128 + 64 (query, key) and 128 (value)."""


def linears(model: str) -> dict[str, tuple[int, int]]:
    """Dense Linear of a model by its released name: (N, K)."""
    w = MODELS[model]
    query = w.heads * 192
    low_rank = {"q_proj": (query, w.hidden)}
    if w.q_lora is not None:
        low_rank = {"q_a_proj": (w.q_lora, w.hidden), "q_b_proj": (query, w.q_lora)}
    return low_rank | {
        "kv_a_proj_with_mqa": (w.kv_lora + 64, w.hidden),
        "kv_b_proj": (w.heads * 256, w.kv_lora),
        "o_proj": (w.hidden, w.heads * 128),
        "gate_up_proj": (2 * w.ffn, w.hidden),
        "down_proj": (w.hidden, w.ffn),
        "shared.gate_up_proj": (2 * w.shared * w.expert, w.hidden),
        "shared.down_proj": (w.hidden, w.shared * w.expert),
    }


DENSE: tuple[tuple[int, int, int], ...] = (
    *((8192, n, k) for model in MODELS for n, k in linears(model).values()),
    (8192, 8192, 8192),
    (4096, 24576, 1536),
    (4096, 7168, 16384),
)
"""(M, N, K): every Linear of the models at 8192 tokens, and three that others publish."""

GROUPED: tuple[tuple[int, int, int, int], ...] = (
    (8, 1024, 4096, 7168),
    (8, 1024, 7168, 2048),
    (8, 4096, 4096, 7168),
    (8, 4096, 7168, 2048),
    (32, 1024, 4096, 7168),
    (32, 256, 4096, 7168),
    (32, 2048, 4096, 7168),
    (32, 2048, 7168, 2048),
    (64, 1536, 1536, 1536),
    (64, 1536, 1536, 768),
    (64, 3072, 1536, 1536),
    (64, 3072, 1536, 768),
)
"""(E, M per expert on average, N, K): 671B shards, the slice of `litseek bench`, the yardstick at 4 and 8 x 4096."""

ROWS: tuple[tuple[int, int], ...] = (
    (8192, 7168),
    (8192, 18432),
    (65536, 7168),
    (65536, 2048),
    (32768, 1536),
    (196608, 1536),
    (196608, 768),
)
"""(rows, width) of row-wise kernels: tokens and routed rows of the 671B and of the yardstick at 8 x 4096."""

GATES: tuple[tuple[int, int, int, int, int], ...] = ((8192, 256, 8, 8, 4), (32768, 64, 6, 8, 4), (32768, 64, 6, 1, 1))
"""(T, E, chosen, groups, chosen groups)."""

HEADS: tuple[tuple[int, int, int], ...] = ((8192, 129280, 2048), (8192, 129280, 7168), (32768, 32768, 1536))
"""(rows, vocabulary, D) of the output head."""

UGLY_ROWS: tuple[tuple[int, int], ...] = ((123, 431), (1, 128), (0, 256), (129, 576), (7, 1))
"""For tests: nothing divides anything; 576 is kv_a_proj_with_mqa's own width."""


def uneven_counts(experts: int, rows: int, seed: int = 0, device: str | torch.device = "cpu") -> Tensor:
    """(E,) int64 that sum to ``rows``, uneven as routing is (0.5 to 2 times the mean), about one expert in 16 empty."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(experts, generator=generator, dtype=torch.float64).mul_(1.5).add_(0.5)
    share[torch.rand(experts, generator=generator) < 1 / 16] = 0.0
    if not share.any():
        share[0] = 1.0
    ends = (share.cumsum(0) / share.sum() * rows).round().to(torch.int64)
    return torch.diff(ends, prepend=ends.new_zeros(1)).to(device)


def median_ms(fn: Callable[[], Any], warmup: int = 25, rep: int = 100) -> float:
    """Median milliseconds of ``fn``; ``warmup`` and ``rep`` are milliseconds too.

    On a GPU by events with the L2 cache cleared before each call (triton.testing.do_bench), else by the host's clock.
    """
    if torch.cuda.is_available():
        return triton.testing.do_bench(fn, warmup=warmup, rep=rep, return_mode="median")
    times: list[float] = []
    for budget in (warmup, rep):
        times, end = [], time.perf_counter() + budget / 1e3
        while not times or time.perf_counter() < end:
            start = time.perf_counter()
            fn()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def relative_error(out: Tensor, ref: Tensor) -> float:
    """||out - ref|| / ||ref|| in float64; nan stays nan; against zeros it is 0 or infinity."""
    if out.shape != ref.shape:
        raise ValueError(f"the result has shape {tuple(out.shape)}, its reference {tuple(ref.shape)}")
    wide, exact = out.double(), ref.double().to(out.device)
    error, norm = (wide - exact).norm().item(), exact.norm().item()
    if norm == 0:
        return error if error != error or error == 0 else float("inf")
    return error / norm


def turns(make: Callable[[], Any], count: int) -> Iterator[Any]:
    """Without end, one of ``count`` input sets after another: inputs that fit in L2 would time the cache."""
    sets = [make() for _ in range(count)]
    while True:
        yield from sets
