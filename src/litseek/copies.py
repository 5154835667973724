"""Compute copies of FP32 masters: made once, followed by the optimizer, read by every product of a training step.

A copy is an autograd leaf of its own. Its gradient is added to the master's in FP32 as soon as it is whole, so that
clipping, reduction over ranks and the optimizer see ``param.grad`` of the master alone, summed over micro-batches in FP32.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_MASTERS = WeakTensorKeyDictionary()
"""Copy -> a weak reference to its master."""


def attach_copy(master: nn.Parameter, dtype: torch.dtype) -> None:
    """Give ``master`` a ``compute_copy`` of this dtype; one that is there already and fits stays."""
    copy = getattr(master, "compute_copy", None)
    if (
        copy is not None
        and (copy.dtype, copy.device) == (dtype, master.device)
        and _hands_over(copy) == master.requires_grad
    ):
        refresh_copy(master)
        return
    copy = master.detach().to(dtype).requires_grad_(master.requires_grad)
    if master.requires_grad:
        # weakly: the hook is held where Python's collector does not look, and a cycle through it would never be freed
        owner: Any = weakref.ref(master)
        copy.register_post_accumulate_grad_hook(lambda leaf: _hand_over(leaf, owner()))
        _MASTERS[copy] = owner
    dynamic: Any = master
    dynamic.compute_copy = copy
    mark_fresh(master)


def compute_copy(master: Tensor) -> Tensor | None:
    """What products read in the master's place, if it has one."""
    return getattr(master, "compute_copy", None)


def refresh_copy(master: Tensor) -> None:
    """Copy again if the master was written (a checkpoint, an average of weights) since its copy was.

    A write through ``master.data`` is the only one that cannot be seen."""
    copy: Any = compute_copy(master)
    if copy is not None and getattr(copy, "of_version", None) != version_of(master):
        with torch.no_grad():
            copy.copy_(master)
        mark_fresh(master)


def mark_fresh(master: Tensor) -> None:
    """Whoever wrote both master and copy says so."""
    copy: Any = compute_copy(master)
    if copy is not None:
        copy.of_version = version_of(master)


def version_of(master: Tensor) -> tuple[int, int]:
    """What changes whenever the master is written, or its ``data`` replaced, as by a move to another device."""
    return master._version, master.data_ptr()


def _hands_over(copy: Tensor) -> bool:
    """Not so one whose master was frozen when it was made, nor one that was unpickled, which loses its hook."""
    return copy.requires_grad and bool(copy._post_accumulate_grad_hooks)


def add_gradient(leaf: Tensor, grad: Tensor) -> None:
    """Where backward would have added it: to a master's gradient, of a master or of its copy."""
    owner = _MASTERS.get(leaf)
    master = leaf if owner is None else owner()
    if master.grad is None:
        master.grad = grad.to(master.dtype)
    else:
        master.grad.add_(grad)


def _hand_over(copy: Tensor, master: nn.Parameter | None) -> None:
    grad, copy.grad = copy.grad, None
    assert master is not None
    if grad is not None:  # a gradient put off (litseek.deferral) comes by way of `add_gradient`
        add_gradient(master, grad)
