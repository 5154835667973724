"""Rows grouped by expert times that expert's matrix. Letters: R rows, E experts, F out, D in."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.compiler.disable
def grouped_mm(rows_RD: Tensor, weight_EFD: Tensor, count_E: Tensor) -> Tensor:
    """(R, F): ``rows[i] @ weight[e].T`` for the expert e that owns row i; the first count_E[0] rows are expert 0's.

    The counts are read on the host. An expert without rows gets a zero gradient.
    """
    return _GroupedMM.apply(rows_RD, weight_EFD, count_E)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD: Tensor, weight_EFD: Tensor, count_E: Tensor) -> Tensor:
        counts = count_E.tolist()
        assert sum(counts) == rows_RD.shape[0], f"counts sum to {sum(counts)}, rows are {rows_RD.shape[0]}"
        out = rows_RD.new_empty(rows_RD.shape[0], weight_EFD.shape[1])
        for e, begin, end in _spans(counts):
            torch.mm(rows_RD[begin:end], weight_EFD[e].t(), out=out[begin:end])
        ctx.save_for_backward(rows_RD, weight_EFD)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx, grad_RF: Tensor):
        rows_RD, weight_EFD = ctx.saved_tensors
        grad_RF = grad_RF.contiguous()
        need_rows, need_weight, _ = ctx.needs_input_grad
        grad_rows = torch.empty_like(rows_RD) if need_rows else None
        grad_weight = torch.zeros_like(weight_EFD) if need_weight else None
        for e, begin, end in _spans(ctx.counts):
            if grad_rows is not None:
                torch.mm(grad_RF[begin:end], weight_EFD[e], out=grad_rows[begin:end])
            if grad_weight is not None:
                torch.mm(grad_RF[begin:end].t(), rows_RD[begin:end], out=grad_weight[e])
        return grad_rows, grad_weight, None


def _spans(counts: list[int]):
    begin = 0
    for e, count in enumerate(counts):
        if count:
            yield e, begin, begin + count
        begin += count
