"""Output head and cross-entropy in one, chunk by chunk (report §2.2, §4.2). Letters: N rows, C of them, D model, V vocabulary.

At V = 129280 the float32 logits of one 4096-token sequence are 2.1 GB, so they exist for one chunk of rows at a time,
on a GPU in BF16 and overwritten by their own gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from litseek_kernels.cross_entropy import cross_entropy, cross_entropy_and_gradient_, cross_entropy_backward_, scale_
from torch import Tensor

IGNORE = -100
"""Label of a position that is not scored; the same value as in the data's micro-batches."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    reduction: str = "sum",
    *,
    temperature: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    chunk_rows: int | None = None,
    weight_copy_VD: Tensor | None = None,
) -> Tensor:
    """Cross-entropy in nats of ``hidden @ weight.T / temperature`` (report §2.2), float32.

    ``hidden`` is (..., D) and ``labels`` (...); ``IGNORE`` labels score 0 and pass no gradient. ``reduction`` "sum"
    gives a scalar, "none" the labels' shape. The weight is the float32 master: it is cast to ``compute_dtype`` (the
    hidden states' dtype when None) for the products, and its gradient is summed over chunks in float32.
    ``weight_copy`` is the weight in ``compute_dtype``, if there is one already: it saves the cast, nothing else.
    "sum" computes both gradients in the forward pass, three products in all; "none" recomputes the logits in
    backward. ``chunk_rows`` None keeps a chunk near 8 MB on the CPU and within 1 GiB on a GPU.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction is '{reduction}', allowed are 'sum' and 'none'")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, it must be above 0")
    if hidden_ND.shape[:-1] != labels_N.shape:
        raise ValueError(f"labels have shape {tuple(labels_N.shape)}, hidden states {tuple(hidden_ND.shape)}")
    flat_ND, flat_N = hidden_ND.reshape(-1, hidden_ND.shape[-1]), labels_N.reshape(-1)
    dtype = compute_dtype or hidden_ND.dtype
    if weight_copy_VD is not None and (weight_copy_VD.dtype, weight_copy_VD.shape) != (dtype, weight_VD.shape):
        raise ValueError(
            f"weight_copy is {weight_copy_VD.dtype} {tuple(weight_copy_VD.shape)}, it must be the weight in the compute "
            f"dtype: {dtype} {tuple(weight_VD.shape)}"
        )
    copy_VD = None if weight_copy_VD is None else weight_copy_VD.detach()
    setting = _Setting(1 / temperature, dtype, chunk_rows or _chunk_rows(flat_N, weight_VD, dtype))
    if reduction == "none":
        return _PerRow.apply(flat_ND, weight_VD, flat_N, copy_VD, setting).reshape(labels_N.shape)
    if not flat_ND.is_cuda:  # masked rows cost as much as scored ones; on a GPU counting them would stop the queue
        keep_N = (flat_N != IGNORE).nonzero()[:, 0]
        if len(keep_N) < 0.9 * len(flat_N):
            flat_ND, flat_N = flat_ND.index_select(0, keep_N), flat_N.index_select(0, keep_N)
    return _Sum.apply(flat_ND, weight_VD, flat_N, copy_VD, setting, torch.is_grad_enabled())


def token_logprobs(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    temperature: float = 1.0,
    *,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """log pi(label | prefix) of every row (report §5.2.2), float32, the labels' shape; 0 where the label is IGNORE."""
    return -linear_cross_entropy(
        hidden_ND, weight_VD, labels_N, "none", temperature=temperature, compute_dtype=compute_dtype
    )


class _Setting(NamedTuple):
    scale: float
    """1 / temperature."""
    dtype: torch.dtype
    rows: int
    """Of a chunk."""


def _chunk_rows(labels_N: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> int:
    """As many rows as the limit allows; on a GPU all chunks alike and, where they can be, multiples of 128."""
    if not labels_N.is_cuda:
        return max(256, 2**21 // weight_VD.shape[0])
    most = max(128, 2**30 // dtype.itemsize // weight_VD.shape[0])
    chunks = -(-len(labels_N) // most)
    return min(most, -(-len(labels_N) // max(chunks, 1) // 128) * 128) or 1


def _logits(hidden_CD: Tensor, weight_VD: Tensor) -> Tensor:
    return hidden_CD @ weight_VD.T


class _Gradients:
    """Turns the logits' gradient of each chunk into those of hidden states and weight."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, need_hidden: bool, need_weight: bool):
        new = weight_VD.new_empty if len(hidden_ND) else weight_VD.new_zeros  # the first chunk overwrites
        self.hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        self.weight_VD = new(weight_VD.shape, dtype=torch.float32) if need_weight else None
        self.fresh = True

    def add(self, rows: slice, grad_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor) -> None:
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = grad_CV @ weight_VD
        if self.weight_VD is not None:
            self._add_weight(grad_CV.T, hidden_CD)
            self.fresh = False

    def _add_weight(self, grad_VC: Tensor, hidden_CD: Tensor) -> None:
        total_VD = self.weight_VD
        assert total_VD is not None
        if grad_VC.dtype == total_VD.dtype:
            torch.mm(grad_VC, hidden_CD, out=total_VD) if self.fresh else total_VD.addmm_(grad_VC, hidden_CD)
        elif not grad_VC.is_cuda:  # which cannot write a product wider than its factors
            total_VD.copy_(grad_VC @ hidden_CD) if self.fresh else total_VD.add_(grad_VC @ hidden_CD)
        elif self.fresh:
            torch.mm(grad_VC, hidden_CD, out_dtype=total_VD.dtype, out=total_VD)
        else:
            torch.addmm(total_VD, grad_VC, hidden_CD, out_dtype=total_VD.dtype, out=total_VD)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        copy_VD: Tensor | None,
        setting: _Setting,
        grad_enabled: bool,
    ) -> Tensor:
        ctx.need = tuple(grad_enabled and need for need in ctx.needs_input_grad[:2])
        ctx.setting = setting
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, copy_VD)
        total, ctx.grads = _sum(hidden_ND, weight_VD, labels_N, copy_VD, setting, *ctx.need)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients are there already: they are scaled in place, and made again for a second backward."""
        (grad,) = grad_outputs
        hidden_ND, weight_VD, labels_N, copy_VD = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, grads = _sum(hidden_ND, weight_VD, labels_N, copy_VD, ctx.setting, *ctx.need)
        grad_hidden = None if grads.hidden_ND is None else scale_(grads.hidden_ND, grad)
        grad_weight = None if grads.weight_VD is None else scale_(grads.weight_VD, grad).to(weight_VD.dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _sum(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    labels_N: Tensor,
    copy_VD: Tensor | None,
    setting: _Setting,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, _Gradients]:
    """The summed loss and the gradients for an upstream gradient of 1."""
    grads = _Gradients(hidden_ND, weight_VD, need_hidden, need_weight)
    cast_VD = weight_VD.to(setting.dtype) if copy_VD is None else copy_VD
    total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
    for start in range(0, len(labels_N), setting.rows):
        chunk = slice(start, start + setting.rows)
        hidden_CD, labels_C = hidden_ND[chunk].to(setting.dtype), labels_N[chunk]
        logits_CV = _logits(hidden_CD, cast_VD)
        if need_hidden or need_weight:
            nll_C = cross_entropy_and_gradient_(logits_CV, labels_C, IGNORE, setting.scale)
            grads.add(chunk, logits_CV, hidden_CD, cast_VD)
        else:
            nll_C, _ = cross_entropy(logits_CV, labels_C, IGNORE, setting.scale)
        total += nll_C.sum()
        del logits_CV  # before the next chunk's are made
    return total, grads


class _PerRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        copy_VD: Tensor | None,
        setting: _Setting,
    ) -> Tensor:
        cast_VD = weight_VD.to(setting.dtype) if copy_VD is None else copy_VD
        nll_N = torch.empty(labels_N.shape, dtype=torch.float32, device=hidden_ND.device)
        lse_N = torch.empty_like(nll_N)
        for start in range(0, len(labels_N), setting.rows):
            chunk = slice(start, start + setting.rows)
            logits_CV = _logits(hidden_ND[chunk].to(setting.dtype), cast_VD)
            nll_N[chunk], lse_N[chunk] = cross_entropy(logits_CV, labels_N[chunk], IGNORE, setting.scale)
            del logits_CV
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, lse_N, copy_VD)
        ctx.setting = setting
        return nll_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grad_outputs
        hidden_ND, weight_VD, labels_N, lse_N, copy_VD = ctx.saved_tensors
        setting = ctx.setting
        grads = _Gradients(hidden_ND, weight_VD, *ctx.needs_input_grad[:2])
        cast_VD = weight_VD.to(setting.dtype) if copy_VD is None else copy_VD
        for start in range(0, len(labels_N), setting.rows):
            chunk = slice(start, start + setting.rows)
            hidden_CD = hidden_ND[chunk].to(setting.dtype)
            logits_CV = _logits(hidden_CD, cast_VD)
            cross_entropy_backward_(logits_CV, labels_N[chunk], lse_N[chunk], grad_N[chunk], IGNORE, setting.scale)
            grads.add(chunk, logits_CV, hidden_CD, cast_VD)
            del logits_CV
        grad_weight = None if grads.weight_VD is None else grads.weight_VD.to(weight_VD.dtype)
        return grads.hidden_ND, grad_weight, None, None, None
