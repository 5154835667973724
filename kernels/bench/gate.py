"""The router: its float32 product, its gate, both with the balance loss, against torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from litseek_kernels import gate as op
from litseek_kernels import linear_float32 as linear
from litseek_kernels.ref import gate as ref
from litseek_kernels.ref import linear_float32 as linear_ref
from litseek_kernels.testing import GATES, median_ms
from torch import Tensor

WIDTH = {64: 1536, 256: 7168}
SEQUENCE = 4096


def rows() -> Iterable[dict[str, Any]]:
    for shape in GATES:
        for name, gate, product in (
            ("litseek", op.gate, linear.linear_float32),
            ("torch", ref.gate, linear_ref.linear_float32),
        ):
            yield from _rows(*shape, name, gate, product)


def _rows(
    T: int, E: int, K: int, groups: int, top_groups: int, name: str, gate: Callable, product: Callable
) -> Iterable[dict[str, Any]]:
    """GB/s count every input read and every output written once; the step's are the rows' and the logits'."""
    D = WIDTH[E]
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(E, D, device="cuda").mul_(D**-0.5).requires_grad_()
    bias, seed = torch.randn(E, device="cuda") * 0.1, torch.randn(T, K, device="cuda")
    logit = product(x.detach(), weight.detach()).requires_grad_()
    setting = (bias, K, groups, top_groups, 2, True, 2.5)

    def step(product_too: bool, sequences: int) -> None:
        start = product(x, weight) if product_too else logit
        got = gate(start, *setting, sequences)
        loss = (got.weight_TK * seed).sum()
        if sequences:
            loss = loss + (got.share_BE * got.probability_BE).sum()
        torch.autograd.grad(loss, (x, weight) if product_too else (logit,))

    large, small = T * D * 2, T * E * 4
    calls: dict[str, tuple[int, Callable[[], Tensor | None]]] = {
        "linear_float32": (large + small, lambda: product(x.detach(), weight.detach())),
        "gate": (small, lambda: gate(logit.detach(), *setting)),
        "gate, forward and backward": (3 * small, lambda: step(False, 0)),
        "router, forward and backward": (3 * large + 5 * small, lambda: step(True, 0)),
        "router with balance loss, forward and backward": (3 * large + 5 * small, lambda: step(True, T // SEQUENCE)),
    }
    shape = f"{T} x {K} of {E} in {groups} groups, {D}"
    for what, (size, call) in calls.items():
        ms = median_ms(call)
        yield dict(op=what, shape=shape, implementation=name, ms=ms, value=size / ms / 1e6, unit="GB/s", note="")
