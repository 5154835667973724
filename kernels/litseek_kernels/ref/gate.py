"""Which experts a token goes to, and with what weight (report §2.1.2). Letters: T tokens, E experts, K chosen, G groups."""

from __future__ import annotations

import torch
from torch import Tensor


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
