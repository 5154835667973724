"""Auxiliary-loss-free balance (report §2.1.2): the bias update. Letters: E experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def update_bias_(bias_E: Tensor, load_E: Tensor, speed: float) -> None:
    """b += speed * sign(mean load - load), in place: overloaded experts fall, underloaded rise (report §2.1.2).

    ``load`` counts the tokens that chose each expert over the whole global batch, summed over all ranks. At exactly
    mean load the bias stays (the report leaves it open). Whole-number loads are compared exactly: a global batch
    holds more tokens than float32 can count.
    """
    update_biases_([bias_E], [load_E], speed)


@torch.no_grad()
def update_biases_(
    biases: Sequence[Tensor], loads: Sequence[Tensor], speed: float, finite: Tensor | None = None
) -> None:
    """`update_bias_` of all layers (of E experts each) together; ``finite`` (bool scalar) false moves none of them."""
    if not biases:
        return
    load_LE = torch.stack([load.to(bias.device) for bias, load in zip(biases, loads, strict=True)])
    move_LE = torch.sign(load_LE.sum(1, keepdim=True) - load_LE * load_LE.shape[1])
    if finite is not None:
        move_LE = move_LE * finite
    torch._foreach_add_(list(biases), [m.to(bias.dtype) for m, bias in zip(move_LE, biases)], alpha=speed)
