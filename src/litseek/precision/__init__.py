"""How numbers are stored and multiplied; injected into the model, which never asks (report §3.3)."""

from litseek.copies import compute_copy
from litseek.precision.emulated import EmulatedFP8
from litseek.precision.fp8 import FP8
from litseek.precision.high import BF16, FP32, Linear, Precision, operand

__all__ = ["BF16", "FP8", "FP32", "EmulatedFP8", "Linear", "Precision", "compute_copy", "operand"]
