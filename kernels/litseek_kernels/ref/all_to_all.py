"""The exchange of tokens between ranks, all of them seen at once. Letters: W ranks, T tokens a rank, K chosen a token, D
width, L experts a rank (rank d has those from d * L on), R rows of a rank's experts.

Arguments are lists with one entry a rank; T may differ from rank to rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from litseek_kernels.ref.quantise import dequantise_rows


def places(expert_WTK: list[Tensor], num_local: int, rank: int, capacity: int) -> tuple[list[Tensor], Tensor, int]:
    """For each rank's tokens (T, K) int64 the row of each choice that is an expert of ``rank``, else -1; count_L; how many
    rows there would be without a capacity. Rows are sorted by expert, then by rank, token and choice."""
    local = torch.cat([expert.long().flatten() for expert in expert_WTK]) - rank * num_local
    mine = ((local >= 0) & (local < num_local)).nonzero().flatten()
    by_expert = mine[local[mine].argsort(stable=True)]
    place = torch.full_like(local, -1)
    kept = by_expert[:capacity]
    place[kept] = torch.arange(len(kept), device=local.device)
    count = torch.bincount(local[kept], minlength=num_local)
    parts = place.split([expert.numel() for expert in expert_WTK])
    return [part.view_as(expert) for part, expert in zip(parts, expert_WTK)], count, len(mine)


def dispatch(
    x_WTD: list[Tensor],
    expert_WTK: list[Tensor],
    weight_WTK: list[Tensor],
    num_local: int,
    capacity: int,
    scale_WTk: list[Tensor] | None = None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each rank rows (R, D) sorted by expert, count_L and weight_R. Codes with their scales arrive as bfloat16, which
    holds a code times a power of two exactly."""
    if scale_WTk is not None:
        x_WTD = [dequantise_rows(codes, scale.t()).to(torch.bfloat16) for codes, scale in zip(x_WTD, scale_WTk)]
    out = []
    for rank in range(len(x_WTD)):
        place_WTK, count, _ = places(expert_WTK, num_local, rank, capacity)
        rows = x_WTD[0].new_zeros(int(count.sum()), x_WTD[0].shape[1])
        weight_R = weight_WTK[0].new_zeros(len(rows), dtype=torch.float32)
        for x, weight, place in zip(x_WTD, weight_WTK, place_WTK):
            token, choice = (place >= 0).nonzero(as_tuple=True)
            rows = rows.index_put((place[token, choice],), x[token])
            weight_R = weight_R.index_put((place[token, choice],), weight[token, choice].float())
        out.append((rows, count, weight_R))
    return out


def combine(rows_WRD: list[Tensor], expert_WTK: list[Tensor], num_local: int, capacity: int) -> list[Tensor]:
    """For each rank (T, D): a token's rows summed at their rank and rounded, and those sums summed."""
    total = [rows_WRD[0].new_zeros(len(expert), rows_WRD[0].shape[1]) for expert in expert_WTK]
    wide = torch.promote_types(rows_WRD[0].dtype, torch.float32)
    total = [part.to(wide) for part in total]
    for rank, rows in enumerate(rows_WRD):
        place_WTK, _, _ = places(expert_WTK, num_local, rank, capacity)
        for s, place in enumerate(place_WTK):
            if len(rows):
                chosen_TKD = rows[place.clamp_min(0)].to(wide).masked_fill((place < 0).unsqueeze(-1), 0)
                total[s] = total[s] + chosen_TKD.sum(1).to(rows.dtype).to(wide)
    return [part.to(rows_WRD[0].dtype) for part in total]
