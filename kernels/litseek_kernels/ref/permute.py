"""Token rows to expert order and back. Letters: T tokens, K chosen a token, R = T * K rows, D model."""

from __future__ import annotations

import torch
from torch import Tensor

from litseek_kernels.ref.gate import count_experts


def sort_by_expert(expert_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """order_R (row -> flat (token, choice) index), inverse_R, count_E. Stable: tokens keep their order in an expert."""
    flat_R = expert_TK.flatten()
    order_R = flat_R.argsort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    return order_R, inverse_R, count_experts(expert_TK, num_experts)


def permute(x_TD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """(R, D): each token's row once for every expert it chose, experts together. Backward gathers, so it is
    deterministic where an index_add would not be."""
    return _Permute.apply(x_TD, order_R, inverse_R)


def unpermute(rows_RD: Tensor, weight_TK: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """(T, D): the sum of a token's rows, each times its weight; float32 accumulation, rows' dtype out."""
    T, K = weight_TK.shape
    chosen_TKD = _Reorder.apply(rows_RD, inverse_R, order_R).view(T, K, rows_RD.shape[1])
    wide = torch.promote_types(rows_RD.dtype, weight_TK.dtype)
    return (chosen_TKD.to(wide) * weight_TK.to(wide).unsqueeze(-1)).sum(1).to(rows_RD.dtype)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        choices = max(order_R.numel() // max(x_TD.shape[0], 1), 1)
        ctx.shape = x_TD.shape[0], choices, x_TD.shape[1]
        return x_TD[order_R // choices]

    @staticmethod
    def backward(ctx, grad_RD: Tensor):
        (inverse_R,) = ctx.saved_tensors
        return grad_RD[inverse_R].view(ctx.shape).sum(1), None, None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD: Tensor, index_R: Tensor, back_R: Tensor) -> Tensor:
        ctx.save_for_backward(back_R)
        return rows_RD[index_R]

    @staticmethod
    def backward(ctx, grad_RD: Tensor):
        (back_R,) = ctx.saved_tensors
        return grad_RD[back_R], None, None
