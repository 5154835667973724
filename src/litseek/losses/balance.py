"""Auxiliary losses of expert balance (report §2.1.2, §4.5.3). Letters: B sequences, S tokens of one, E experts."""

from __future__ import annotations

from litseek_kernels.ref.gate import balance_statistics
from torch import Tensor


def sequence_balance(scores_BSE: Tensor, top_k: int) -> Tensor:
    """sum_i f_i P_i of each sequence, averaged over sequences (report §2.1.2, eq. 17-20); times alpha by the caller.

    ``scores`` are the UNbiased sigmoid affinities in float32. f counts the ``top_k`` highest of them without the
    balance bias and without the group limit, so it can differ from the experts that were really chosen.
    1 at perfect balance.
    """
    return balance_loss(*balance_statistics(scores_BSE, top_k), top_k, per_sequence=True)


def batch_balance(scores_BSE: Tensor, top_k: int) -> Tensor:
    """The same with f and P over all tokens of the batch instead of each sequence (report §4.5.3)."""
    return balance_loss(*balance_statistics(scores_BSE, top_k), top_k, per_sequence=False)


def balance_loss(share_BE: Tensor, probability_BE: Tensor, top_k: int, per_sequence: bool) -> Tensor:
    """Either loss from what the gate counted: the part of a sequence's tokens that have an expert among their
    ``top_k`` highest scores, and the mean of its part of a token's scores (P)."""
    if not per_sequence:
        share_BE, probability_BE = share_BE.mean(0, keepdim=True), probability_BE.mean(0, keepdim=True)
    frequency_BE = share_BE * (share_BE.shape[-1] / top_k)
    return (frequency_BE * probability_BE).sum(dim=-1).mean()
