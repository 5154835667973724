"""Which experts a token goes to, and with what weight (report §2.1.2). Letters: T tokens, E experts, K chosen, G groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gate(NamedTuple):
    """What the gate decided for T tokens, and how even its scores are in each of B sequences."""

    expert_TK: Tensor
    weight_TK: Tensor
    load_E: Tensor
    """int64: tokens that chose each expert."""
    share_BE: Tensor
    """The part of a sequence's tokens that have the expert among their K highest unbiased scores; B may be 0."""
    probability_BE: Tensor
    """The mean over a sequence of the expert's part of a token's scores; with gradient."""


def gate(
    logit_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    experts_per_group_score: int = 2,
    normalise: bool = True,
    scaling: float = 1.0,
    sequences: int = 0,
) -> Gate:
    """All of it from the logits; without ``sequences`` the last two are empty."""
    score_TE = logit_TE.sigmoid()
    expert_TK = choose_experts(score_TE.detach(), bias_E, top_k, num_groups, top_groups, experts_per_group_score)
    weight_TK = gate_weights(score_TE, expert_TK, normalise, scaling)
    share_BE = probability_BE = score_TE.new_empty(0, score_TE.shape[1])
    if sequences:
        share_BE, probability_BE = balance_statistics(score_TE.unflatten(0, (sequences, -1)), top_k)
    return Gate(expert_TK, weight_TK, count_experts(expert_TK, score_TE.shape[1]), share_BE, probability_BE)


def balance_statistics(score_BSE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """share_BE and probability_BE (report §2.1.2, eq. 18-20): without the balance bias and without the group limit."""
    with torch.no_grad():
        chosen_BSK = score_BSE.topk(top_k, dim=-1).indices
        share_BE = torch.zeros_like(score_BSE).scatter_(-1, chosen_BSK, 1.0).mean(1)
    return share_BE, (score_BSE / score_BSE.sum(dim=-1, keepdim=True)).mean(1)


def choose_experts(
    score_TE: Tensor,
    bias_E: Tensor,
    top_k: int,
    num_groups: int = 1,
    top_groups: int = 1,
    experts_per_group_score: int = 2,
) -> Tensor:
    """expert_TK, int64. The balance bias acts on the choice alone; groups outside the best ``top_groups`` are masked
    with -inf (0 would beat negative biased scores)."""
    biased_TE = score_TE + bias_E
    if num_groups > 1 and top_groups < num_groups:
        grouped_TGE = biased_TE.unflatten(-1, (num_groups, -1))
        group_TG = grouped_TGE.topk(experts_per_group_score, dim=-1).values.sum(-1)
        keep = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(
            -1, group_TG.topk(top_groups, dim=-1).indices, True
        )
        biased_TE = grouped_TGE.masked_fill(~keep.unsqueeze(-1), float("-inf")).flatten(-2)
    return biased_TE.topk(top_k, dim=-1).indices


def gate_weights(score_TE: Tensor, expert_TK: Tensor, normalise: bool, scaling: float) -> Tensor:
    """weight_TK: the UNbiased scores of the chosen, normalised to sum 1 (plus 1e-20, as transformers), times ``scaling``."""
    weight_TK = score_TE.gather(-1, expert_TK)
    if normalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return weight_TK * scaling


def count_experts(expert_TK: Tensor, num_experts: int) -> Tensor:
    """count_E, int64: rows of each expert. Unlike bincount it has a fixed shape, so the host waits for nothing."""
    flat = expert_TK.flatten()
    return torch.zeros(num_experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
