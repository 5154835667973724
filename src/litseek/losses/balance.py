"""Auxiliary losses of expert balance (report §2.1.2, §4.5.3). Letters: B sequences, S tokens of one, E experts."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_balance(scores_BSE: Tensor, top_k: int) -> Tensor:
    """sum_i f_i P_i of each sequence, averaged over sequences (report §2.1.2, eq. 17-20); times alpha by the caller.

    ``scores`` are the UNbiased sigmoid affinities in float32. f counts the ``top_k`` highest of them without the
    balance bias and without the group limit, so it can differ from the experts that were really chosen.
    1 at perfect balance.
    """
    return _balance(scores_BSE, top_k, over=(1,))


def batch_balance(scores_BSE: Tensor, top_k: int) -> Tensor:
    """The same with f and P over all tokens of the batch instead of each sequence (report §4.5.3)."""
    return _balance(scores_BSE, top_k, over=(0, 1))


def _balance(scores_BSE: Tensor, top_k: int, over: tuple[int, ...]) -> Tensor:
    num_experts = scores_BSE.shape[-1]
    with torch.no_grad():
        chosen_BSK = scores_BSE.topk(top_k, dim=-1).indices
        hit_BSE = torch.zeros_like(scores_BSE).scatter_(-1, chosen_BSK, 1.0)
        frequency = hit_BSE.mean(dim=over) * (num_experts / top_k)
    probability = (scores_BSE / scores_BSE.sum(dim=-1, keepdim=True)).mean(dim=over)
    return (frequency * probability).sum(dim=-1).mean()
