"""Weight gradients put off (report §3.2): backward's two halves, one for the inputs and one for the weights.

A pipeline sends a gradient on as soon as the inputs' half has made it, and fills a bubble with the weights' half later.
Products ask `weight_gradient` in their backward; what an executor has put off it runs with `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from litseek.copies import add_gradient

Work = tuple[Tensor, Callable[[], Tensor]]

_splitting = False
_queue: list[Work] | None = None
"""One for all threads: autograd runs a GPU's backward on a thread of its own."""


def splits() -> bool:
    """Whether products shall be made so that their weights' half can be put off. Never so in compiled code."""
    return _splitting and not torch.compiler.is_compiling()


@contextmanager
def splitting(on: bool) -> Iterator[None]:
    """Around the forwards whose backward may be split."""
    global _splitting
    before, _splitting = _splitting, on
    try:
        yield
    finally:
        _splitting = before


@contextmanager
def deferring(queue: list[Work]) -> Iterator[None]:
    """Around a backward: weights' halves go into ``queue``."""
    global _queue
    assert _queue is None, "one backward at a time"
    _queue = queue
    try:
        yield
    finally:
        _queue = None


def weight_gradient(weight: Tensor, compute: Callable[[], Tensor]) -> Tensor | None:
    """In a Function's backward: the gradient of the leaf ``weight``, or None if it comes later."""
    if _queue is None:
        return compute()
    _queue.append((weight, compute))
    return None


@torch.no_grad()
def run(queue: list[Work], add: Callable[[Tensor, Tensor], None] = add_gradient) -> None:
    """The weights' half: every gradient is added where autograd would have added it."""
    for weight, compute in queue:
        add(weight, compute())
    queue.clear()
