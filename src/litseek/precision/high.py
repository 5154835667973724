"""FP32 and BF16 arithmetic. Letters: R rows, E experts, F out, D in.

Parameters are FP32 masters: what the optimizer steps and a checkpoint holds. BF16 copies are made where they are used,
and their gradients are accumulated in FP32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from litseek_kernels.ref.grouped_gemm import grouped_mm
from litseek_kernels.ref.swiglu import swiglu
from torch import Tensor, nn


class Linear(nn.Module):
    """y = x W^T in the compute dtype; ``weight`` (out, in) is the FP32 master. No bias, as in the released model."""

    def __init__(self, in_features: int, out_features: int, compute_dtype: torch.dtype):
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, compute_dtype
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_cast(x, self.compute_dtype), _cast(self.weight, self.compute_dtype))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}"


class Precision:
    """What the model asks of a number format. FP8 will differ by ``role`` and by what it stores for backward."""

    name: str
    compute_dtype: torch.dtype

    def linear(self, in_features: int, out_features: int, role: str = "linear") -> Linear:
        """A Linear with an FP32 ``weight``. Roles: "linear", "head", "mtp" (eh_proj); the last two are always kept high."""
        return Linear(in_features, out_features, self.compute_dtype)

    def grouped_mm(self, rows_RD: Tensor, weight_EFD: Tensor, count_E: Tensor) -> Tensor:
        """(R, F): row i times the matrix of its expert; rows are sorted by expert, count_E says how many each has."""
        rows, weight = _cast(rows_RD, self.compute_dtype), _cast(weight_EFD, self.compute_dtype)
        if rows.is_cuda and self.compute_dtype == torch.bfloat16:
            return F.grouped_mm(rows, weight.transpose(-2, -1), offs=count_E.cumsum(0).to(torch.int32))
        return grouped_mm(rows, weight, count_E)

    def swiglu(self, gate_up_NF: Tensor) -> Tensor:
        """silu(gate) * up of the two halves of the last dimension."""
        return swiglu(*gate_up_NF.chunk(2, dim=-1))

    def pack(self, rows_RD: Tensor) -> tuple[Tensor, ...]:
        """What travels between ranks in dispatch."""
        return (_cast(rows_RD, self.compute_dtype),)

    def unpack(self, payload: tuple[Tensor, ...]) -> Tensor:
        return payload[0]


class FP32(Precision):
    """Everything in float32; float64 inputs and weights stay float64, which makes it the oracle's arithmetic too."""

    name = "fp32"
    compute_dtype = torch.float32


class BF16(Precision):
    """Products and the residual stream in bfloat16, FP32 masters."""

    name = "bf16"
    compute_dtype = torch.bfloat16


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype in (dtype, torch.float64) else x.to(dtype)
