"""How numbers are stored and multiplied; injected into the model, which never asks (report §3.3)."""

from litseek.copies import compute_copy
from litseek.precision.emulated import EmulatedFP8
from litseek.precision.fp8 import FP8
from litseek.precision.high import BF16, FP32, Linear, Precision, operand
from litseek.precision.row_scaled import RowScaledFP8

__all__ = ["BF16", "FP8", "FP32", "EmulatedFP8", "Linear", "Precision", "RowScaledFP8", "compute_copy", "operand"]
