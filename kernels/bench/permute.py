"""Rows to expert order and back: kernels against torch's indexing, at the yardstick's and the 671B's sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from litseek_kernels import permute as op
from litseek_kernels.ref import permute as ref
from litseek_kernels.testing import median_ms
from torch import Tensor

SHAPES = [(32768, 6, 64, 1536), (8192, 8, 256, 7168)]
"""(T, K, E, D): the yardstick at 8 x 4096, the slice of the 671B."""


def rows() -> Iterable[dict[str, Any]]:
    for shape in SHAPES:
        for name, library in (("litseek", op), ("torch", ref)):
            yield from _rows(*shape, name, library)


def _rows(T: int, K: int, E: int, D: int, name: str, library: ModuleType) -> Iterable[dict[str, Any]]:
    """GB/s count every input read and every output written once."""
    expert_TK = torch.rand(T, E, device="cuda").topk(K, dim=-1).indices
    order, inverse, _ = ref.sort_by_expert(expert_TK, E)
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    routed = torch.randn(T * K, D, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(T, K, device="cuda")
    ids, token, row = T * K * 4, T * D * 2, T * K * D * 2
    once = ids + token + row
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "sort_by_expert": (4 * ids, lambda: library.sort_by_expert(expert_TK, E)),
        "permute": (once, lambda: library.permute(x, order, inverse)),
        "permute backward": (once, _backward(lambda a: library.permute(a, order, inverse), x)),
        "unpermute": (once + ids, lambda: library.unpermute(routed, weight, order, inverse)),
        "unpermute backward": (
            once + 2 * ids + row,
            _backward(lambda a, w: library.unpermute(a, w, order, inverse), routed, weight),
        ),
        "unpermute, plain": (once, lambda: library.unpermute(routed, None, order, inverse)),
        "unpermute, plain, backward": (
            once,
            _backward(lambda a: library.unpermute(a, None, order, inverse), routed),
        ),
    }
    for what, (size, call) in calls.items():
        ms = median_ms(call)
        rate = size / ms / 1e6
        yield dict(
            op=what, shape=f"{T} x {K} of {E}, {D}", implementation=name, ms=ms, value=rate, unit="GB/s", note=""
        )


def _backward(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    seed = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, seed, retain_graph=True)
