"""Token rows to expert order and back. Letters: T tokens, K chosen a token, R rows (one a choice), D model.

``order_R`` names for each row the flat (token, choice) it comes from; ``inverse_TK`` for each choice the row it went to.
A choice of -1 is nobody's here: it has no row, its place in ``inverse_TK`` is -1 and R is less than T * K.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litseek_kernels.ref.gate import count_experts


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order_R and inverse_TK, int32; count_E, int64. Stable: tokens keep their order in an expert.

    Where there are choices of -1, order_R still has T * K places; those after the first ``count_E.sum()`` mean nothing.
    """
    key_TK = torch.where(expert_TK < 0, num_experts, expert_TK).long()
    order_R = key_TK.flatten().argsort(stable=True).to(torch.int32)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), dtype=torch.int32, device=order_R.device)
    inverse_TK = inverse_R.view(expert_TK.shape).masked_fill(expert_TK < 0, -1)
    return order_R, inverse_TK, count_experts(key_TK, num_experts + 1)[:num_experts]


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
        return _rows_at(grad_RD, inverse_TK).sum(1), None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, index_R: Tensor, back_R: Tensor) -> Tensor:
        ctx.save_for_backward(back_R)
        return _rows_at(rows, index_R)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (back_R,) = ctx.saved_tensors
        return _rows_at(grad, back_R), None, None


def _rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """Zeros at -1. With as many places as rows there is no -1, and no row is copied to make room for zeros."""
    if index.numel() > rows.shape[0]:
        rows = F.pad(rows, (0, 0) * (rows.ndim - 1) + (0, 1))
    return rows[index]
