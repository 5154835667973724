"""Output head and cross-entropy in one, chunk by chunk (report §2.2, §4.2). Letters: N rows, C of them, D model, V vocabulary.

At V = 129280 the float32 logits of one 4096-token sequence are 2.1 GB, so they exist for one chunk of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from litseek_kernels.ref.cross_entropy import cross_entropy, cross_entropy_backward_
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
) -> Tensor:
    """Cross-entropy in nats of ``hidden @ weight.T / temperature`` (report §2.2), float32.

    ``hidden`` is (..., D) and ``labels`` (...); ``IGNORE`` labels score 0 and pass no gradient. ``reduction`` "sum"
    gives a scalar, "none" the labels' shape. The weight is the float32 master: it is cast to ``compute_dtype`` (the
    hidden states' dtype when None) for the products, and its gradient is summed over chunks in float32.
    "sum" computes both gradients in the forward pass, three products in all; "none" recomputes the logits in
    backward. ``chunk_rows`` None keeps a chunk near 8 MB on the CPU and, in BF16, 1 GB on a GPU.
    """
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction is '{reduction}', allowed are 'sum' and 'none'")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, it must be above 0")
    if hidden_ND.shape[:-1] != labels_N.shape:
        raise ValueError(f"labels have shape {tuple(labels_N.shape)}, hidden states {tuple(hidden_ND.shape)}")
    rows = chunk_rows or max(256, 2 ** (29 if hidden_ND.is_cuda else 21) // weight_VD.shape[0])
    flat_ND, flat_N = hidden_ND.reshape(-1, hidden_ND.shape[-1]), labels_N.reshape(-1)
    setting = (temperature, compute_dtype or hidden_ND.dtype, rows)
    if reduction == "none":
        return _PerRow.apply(flat_ND, weight_VD, flat_N, *setting).reshape(labels_N.shape)
    if not flat_ND.is_cuda:  # masked rows cost as much as scored ones; on a GPU counting them would stop the queue
        keep_N = (flat_N != IGNORE).nonzero()[:, 0]
        if len(keep_N) < 0.9 * len(flat_N):
            flat_ND, flat_N = flat_ND.index_select(0, keep_N), flat_N.index_select(0, keep_N)
    return _Sum.apply(flat_ND, weight_VD, flat_N, *setting, torch.is_grad_enabled())


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


def _logits(hidden_CD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits_CV = hidden_CD @ weight_VD.T
    return logits_CV if temperature == 1.0 else logits_CV.float().div_(temperature)


@cache
def _ops(device_type: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """Forward and backward from logits. Compiled on a GPU: a dozen passes over the logits become three."""
    if device_type == "cuda":
        return torch.compile(cross_entropy, dynamic=True), torch.compile(cross_entropy_backward_, dynamic=True)
    return cross_entropy, cross_entropy_backward_


class _Gradients:
    """Turns the logits' gradient of each chunk into those of hidden states and weight."""

    def __init__(self, hidden_ND: Tensor, weight_VD: Tensor, need_hidden: bool, need_weight: bool):
        self.hidden_ND = torch.empty_like(hidden_ND) if need_hidden else None
        self.weight_VD = weight_VD.new_zeros(weight_VD.shape, dtype=torch.float32) if need_weight else None

    def add(self, rows: slice, grad_CV: Tensor, hidden_CD: Tensor, weight_VD: Tensor) -> None:
        grad_CV = grad_CV.to(weight_VD.dtype)
        if self.hidden_ND is not None:
            self.hidden_ND[rows] = grad_CV @ weight_VD
        if self.weight_VD is not None:
            if grad_CV.dtype == torch.float32:
                self.weight_VD.addmm_(grad_CV.T, hidden_CD)
            else:
                self.weight_VD += grad_CV.T @ hidden_CD


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        temperature: float,
        dtype: torch.dtype,
        rows: int,
        grad_enabled: bool,
    ) -> Tensor:
        need_hidden, need_weight = (grad_enabled and need for need in ctx.needs_input_grad[:2])
        grads = _Gradients(hidden_ND, weight_VD, need_hidden, need_weight)
        weight_cast_VD = weight_VD.to(dtype)
        loss_of, grad_of_ = _ops(hidden_ND.device.type)
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, len(labels_N), rows):
            chunk = slice(start, start + rows)
            hidden_CD, labels_C = hidden_ND[chunk].to(dtype), labels_N[chunk]
            logits_CV = _logits(hidden_CD, weight_cast_VD, temperature)
            nll_C, lse_C = loss_of(logits_CV, labels_C, IGNORE)
            total += nll_C.sum()
            if need_hidden or need_weight:
                grad_C = torch.full_like(lse_C, 1 / temperature)
                grad_of_(logits_CV, labels_C, lse_C, grad_C, IGNORE)
                grads.add(chunk, logits_CV, hidden_CD, weight_cast_VD)
        ctx.grads, ctx.weight_dtype = grads, weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        hidden_ND, weight_VD = ctx.grads.hidden_ND, ctx.grads.weight_VD
        # out of place: a second backward with retain_graph must find them unscaled
        grad_hidden = None if hidden_ND is None else hidden_ND * grad.to(hidden_ND.dtype)
        grad_weight = None if weight_VD is None else (weight_VD * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


class _PerRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        temperature: float,
        dtype: torch.dtype,
        rows: int,
    ) -> Tensor:
        weight_cast_VD = weight_VD.to(dtype)
        loss_of, _ = _ops(hidden_ND.device.type)
        nll_N = torch.empty(labels_N.shape, dtype=torch.float32, device=hidden_ND.device)
        lse_N = torch.empty_like(nll_N)
        for start in range(0, len(labels_N), rows):
            chunk = slice(start, start + rows)
            logits_CV = _logits(hidden_ND[chunk].to(dtype), weight_cast_VD, temperature)
            nll_N[chunk], lse_N[chunk] = loss_of(logits_CV, labels_N[chunk], IGNORE)
        ctx.save_for_backward(hidden_ND, weight_VD, labels_N, lse_N)
        ctx.setting = temperature, dtype, rows
        return nll_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_N,) = grad_outputs
        hidden_ND, weight_VD, labels_N, lse_N = ctx.saved_tensors
        temperature, dtype, rows = ctx.setting
        grads = _Gradients(hidden_ND, weight_VD, *ctx.needs_input_grad[:2])
        weight_cast_VD = weight_VD.to(dtype)
        _, grad_of_ = _ops(hidden_ND.device.type)
        for start in range(0, len(labels_N), rows):
            chunk = slice(start, start + rows)
            hidden_CD = hidden_ND[chunk].to(dtype)
            logits_CV = _logits(hidden_CD, weight_cast_VD, temperature)
            grad_C = grad_N[chunk] / temperature
            grad_of_(logits_CV, labels_N[chunk], lse_N[chunk], grad_C, IGNORE)
            grads.add(chunk, logits_CV, hidden_CD, weight_cast_VD)
        grad_weight = None if grads.weight_VD is None else grads.weight_VD.to(weight_VD.dtype)
        return grads.hidden_ND, grad_weight, None, None, None, None
