"""FP32 and BF16 arithmetic. Letters: R rows, E experts, F out, D in.

Parameters are FP32 masters: what the optimizer steps and a checkpoint holds. Training reads BF16 copies of them that are
made once (`Precision.attach`); elsewhere a product casts where it uses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from litseek_kernels.ref.grouped_gemm import grouped_mm
from litseek_kernels.ref.swiglu import swiglu
from litseek_kernels.swiglu import swiglu as swiglu_rows
from torch import Tensor, nn

from litseek.copies import attach_copy, compute_copy, refresh_copy
from litseek.deferral import splits, weight_gradient


class Linear(nn.Module):
    """y = x W^T in the compute dtype; ``weight`` (out, in) is the FP32 master. No bias, as in the released model."""

    def __init__(self, in_features: int, out_features: int, compute_dtype: torch.dtype, role: str = "linear"):
        super().__init__()
        self.role = role
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, compute_dtype
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        x, weight = _cast(x, self.compute_dtype), operand(self.weight, self.compute_dtype)
        return _LinearProduct.apply(x, weight) if splits() else F.linear(x, weight)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class Precision:
    """What the model asks of a number format; formats differ by ``role`` and by what they store for backward."""

    name: str
    compute_dtype: torch.dtype

    def linear(self, in_features: int, out_features: int, role: str = "linear") -> Linear:
        """A Linear with an FP32 ``weight``. Roles: "linear", "attention_out" (o_proj), "head", "mtp" (eh_proj); the last
        two are always kept high."""
        return Linear(in_features, out_features, self.compute_dtype, role)

    def linears(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        """Several Linears of one input."""
        return tuple(linear(x) for linear in linears)

    def attach(self, weight: nn.Parameter, role: str) -> None:
        """Before a step: a copy of a product's weight in the compute dtype, fresh. Roles are `linear`'s and "experts"."""
        if self.compute_dtype != weight.dtype and weight.dtype != torch.float64:
            attach_copy(weight, self.compute_dtype)

    def experts(
        self, rows_RD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, count_E: Tensor, weight_R: Tensor | None = None
    ) -> Tensor:
        """(R, D): each row through its expert's SwiGLU feed-forward; rows are sorted by expert, count_E says how many
        each has. Rows after the last expert's may hold anything, be it NaN, forward and backward: nothing that counts reads
        them, and what comes out in their places means nothing. ``weight_R``, the gate's, multiplies the hidden activation: the down-projection is linear, and so
        nothing of its output has to be kept for the weights' gradient."""
        hidden_RG = self.grouped_mm(rows_RD, gate_up_EGD, count_E)
        weight_R = None if weight_R is None else weight_R.to(torch.promote_types(hidden_RG.dtype, torch.float32))
        return self.grouped_mm(swiglu_rows(hidden_RG, weight_R), down_EDF, count_E)

    def grouped_mm(self, rows_RD: Tensor, weight_EFD: Tensor, count_E: Tensor) -> Tensor:
        """(R, F): row i times the matrix of its expert; rows are sorted by expert, count_E says how many each has."""
        rows, weight = _cast(rows_RD, self.compute_dtype), operand(weight_EFD, self.compute_dtype)
        if rows.is_cuda and self.compute_dtype == torch.bfloat16:
            return _GroupedProduct.apply(rows, weight, count_E.cumsum(0).to(torch.int32))
        return _GroupedReference.apply(rows, weight, count_E) if splits() else grouped_mm(rows, weight, count_E)

    def feed_forward(self, x: Tensor, gate: Linear, up: Linear, down: Linear) -> Tensor:
        """A dense SwiGLU feed-forward (..., D): down(silu(gate(x)) * up(x))."""
        return down(swiglu(gate(x), up(x)))

    def pack(self, rows_RD: Tensor) -> tuple[Tensor, ...]:
        """What travels between ranks in dispatch: tensors (R, ...) of a dtype that can be copied by rows."""
        return (_cast(rows_RD, self.compute_dtype),)

    def unpack(self, payload: tuple[Tensor, ...]) -> Tensor:
        """(R, D) in the compute dtype, of the rows that arrived."""
        return payload[0]


class FP32(Precision):
    """Everything in float32; float64 inputs and weights stay float64, which makes it the oracle's arithmetic too."""

    name = "fp32"
    compute_dtype = torch.float32


class BF16(Precision):
    """Products and the residual stream in bfloat16, FP32 masters."""

    name = "bf16"
    compute_dtype = torch.bfloat16


class _GroupedProduct(torch.autograd.Function):
    """torch's grouped product; its own backward would return the weights' gradient transposed, one slow copy each."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_EFD: Tensor, end_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RD, weight_EFD, end_E)
        return F.grouped_mm(rows_RD, weight_EFD.transpose(-2, -1), offs=end_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weight_EFD, end_E = ctx.saved_tensors
        grad_RF = grads[0].contiguous()
        grad_weight = weight_gradient(weight_EFD, lambda: F.grouped_mm(grad_RF.t(), rows_RD, offs=end_E))
        return F.grouped_mm(grad_RF, weight_EFD, offs=end_E), grad_weight, None


class _LinearProduct(torch.autograd.Function):
    """F.linear whose weights' half of backward can be put off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_FD: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_FD)
        return F.linear(x, weight_FD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_FD = ctx.saved_tensors
        grad = grads[0]
        grad_weight = weight_gradient(weight_FD, lambda: grad.flatten(0, -2).t() @ x.flatten(0, -2))
        return grad @ weight_FD, grad_weight


class _GroupedReference(torch.autograd.Function):
    """The reference's grouped product, likewise."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weight_EFD: Tensor, count_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RD, weight_EFD, count_E)
        return grouped_mm(rows_RD, weight_EFD, count_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RD, weight_EFD, count_E = ctx.saved_tensors
        grad_RF = grads[0]

        def of_weight() -> Tensor:
            with torch.enable_grad():
                leaf = torch.zeros_like(weight_EFD).requires_grad_()
                out = grouped_mm(rows_RD, leaf, count_E)
            return torch.autograd.grad(out, leaf, grad_RF)[0]

        grad_rows = grouped_mm(grad_RF, weight_EFD.transpose(1, 2), count_E)
        return grad_rows, weight_gradient(weight_EFD, of_weight), None


def operand(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What a product reads: the weight's copy in this dtype, or a cast made now."""
    if not torch.compiler.is_compiling():  # compiled phases rely on `attach` before the step
        refresh_copy(weight)
    copy = compute_copy(weight)
    fits = copy is not None and copy.dtype == dtype and copy.device == weight.device
    return copy if copy is not None and fits else _cast(weight, dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype in (dtype, torch.float64) else x.to(dtype)
