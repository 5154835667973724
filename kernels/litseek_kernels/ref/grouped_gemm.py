"""Rows grouped by expert times that expert's matrix. Letters: R rows, E experts, F (or N) out, D (or K) in."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

TILE = 128


@torch.compiler.disable
def grouped_mm(rows_RD: Tensor, weight_EFD: Tensor, count_E: Tensor) -> Tensor:
    """(R, F): ``rows[i] @ weight[e].T`` for the expert e that owns row i; the first count_E[0] rows are expert 0's.

    The counts are read on the host. An expert without rows gets a zero gradient. Rows after the last expert's are neither
    read nor written.
    """
    return _GroupedMM.apply(rows_RD, weight_EFD, count_E)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RD: Tensor, weight_EFD: Tensor, count_E: Tensor) -> Tensor:
        counts = count_E.tolist()
        assert sum(counts) <= rows_RD.shape[0], f"counts sum to {sum(counts)}, rows are {rows_RD.shape[0]}"
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


def grouped_mm_fp8(
    codes_RK: Tensor,
    scale_kR: Tensor,
    weight_ENK: Tensor,
    weight_scale_Enk: Tensor,
    tile_expert: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    compact: tuple[Tensor, Tensor, int] | None = None,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Every tile of 128 rows times its expert's matrix: 128 of K at a time, each product scaled and added in ``compute``.

    ``compute=float64`` gives the oracle. Tiles of no expert (-1) come out as zeros. Owners are read on the host.
    """
    K, N = codes_RK.shape[1], weight_ENK.shape[1]
    full = torch.zeros(codes_RK.shape[0], N, dtype=compute, device=codes_RK.device)
    for e, begin, end in _runs(tile_expert.tolist()):
        rows, weight = codes_RK[begin:end].to(compute), weight_ENK[e].to(compute)
        scale_Nk = weight_scale_Enk[e].to(compute).repeat_interleave(TILE, 0)[:N]
        scale_Rk = scale_kR[:, begin:end].to(compute).t()
        for k in range(scale_Nk.shape[1]):
            at = slice(k * TILE, min(k * TILE + TILE, K))
            full[begin:end] += (rows[:, at] @ weight[:, at].t()) * scale_Rk[:, k, None] * scale_Nk[:, k]
    if compact is None:
        return full.to(out_dtype)
    tile_begin, tile_count, num_rows = compact
    out = full.new_zeros(num_rows, N)
    for tile, (begin, count) in enumerate(zip(tile_begin.tolist(), tile_count.tolist())):
        out[begin : begin + count] = full[tile * TILE : tile * TILE + count]
    return out.to(out_dtype)


def _runs(owners: list[int]):
    """(expert, first row, row after the last) of every stretch of tiles of one expert."""
    tile = 0
    for e, stretch in groupby(owners):
        tiles = len(list(stretch))
        if e >= 0:
            yield e, tile * TILE, (tile + tiles) * TILE
        tile += tiles


def check_promotion(promote: bool) -> None:
    """ValueError where the references are asked for the tensor cores' own sums."""
    if not promote:
        raise ValueError("promote=False needs a GPU: the sums of its FP8 tensor cores cannot be had on a CPU.")
