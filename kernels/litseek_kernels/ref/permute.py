"""Token rows to expert order and back. Letters: T tokens, K chosen a token, R = T * K rows, D model.

``order_R`` names for each row the flat (token, choice) it comes from; ``inverse_TK`` for each choice the row it went to.
"""

from __future__ import annotations

import torch
from torch import Tensor

from litseek_kernels.ref.gate import count_experts


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order_R and inverse_TK, int32; count_E, int64. Stable: tokens keep their order in an expert."""
    order_R = expert_TK.flatten().argsort(stable=True).to(torch.int32)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), dtype=torch.int32, device=order_R.device)
    return order_R, inverse_R.view(expert_TK.shape), count_experts(expert_TK, num_experts)


def permute(x_TD: Tensor, order_R: Tensor, inverse_TK: Tensor) -> Tensor:
    """(R, D): each token's row once for every expert it chose, experts together. Backward gathers and sums in float32,
    so it is deterministic where an index_add would not be."""
    return _Permute.apply(x_TD, order_R, inverse_TK)


def unpermute(rows_RD: Tensor, weight_TK: Tensor | None, order_R: Tensor, inverse_TK: Tensor) -> Tensor:
    """(T, D): the sum of a token's rows, each times its weight where there are weights; float32 accumulation, rows'
    dtype out."""
    chosen_TKD = _Reorder.apply(rows_RD, inverse_TK.flatten(), order_R).view(*inverse_TK.shape, rows_RD.shape[1])
    wide = torch.promote_types(rows_RD.dtype, torch.float32 if weight_TK is None else weight_TK.dtype)
    chosen_TKD = chosen_TKD.to(wide)
    if weight_TK is not None:
        chosen_TKD = chosen_TKD * weight_TK.to(wide).unsqueeze(-1)
    return chosen_TKD.sum(1).to(rows_RD.dtype)


def weight_of_rows(weight_TK: Tensor, order_R: Tensor, inverse_TK: Tensor) -> Tensor:
    """weight_R: the gate's weights in the rows' order."""
    return _Reorder.apply(weight_TK.flatten(), order_R, inverse_TK.flatten())


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, order_R: Tensor, inverse_TK: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_TK)
        return x_TD[order_R // inverse_TK.shape[1]]

    @staticmethod
    def backward(ctx, grad_RD: Tensor):
        (inverse_TK,) = ctx.saved_tensors
        return grad_RD[inverse_TK].sum(1), None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, index_R: Tensor, back_R: Tensor) -> Tensor:
        ctx.save_for_backward(back_R)
        return rows[index_R]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (back_R,) = ctx.saved_tensors
        return grad[back_R], None, None
