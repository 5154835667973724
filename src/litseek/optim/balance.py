"""Auxiliary-loss-free balance (report §2.1.2): the bias update. Letters: E experts."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def update_bias_(bias_E: Tensor, load_E: Tensor, speed: float) -> None:
    """b += speed * sign(mean load - load), in place: overloaded experts fall, underloaded rise (report §2.1.2).

    ``load`` counts the tokens that chose each expert over the whole global batch, summed over all ranks. At exactly
    mean load the bias stays (the report leaves it open). Whole-number loads are compared exactly: a global batch
    holds more tokens than float32 can count.
    """
    load_E = load_E.to(bias_E.device)
    bias_E.add_(torch.sign(load_E.sum() - load_E * load_E.numel()).to(bias_E.dtype), alpha=speed)
