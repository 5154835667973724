"""How numbers are stored and multiplied; injected into the model, which never asks (report §3.3)."""

from litseek.precision.high import BF16, FP32, Precision

__all__ = ["BF16", "FP32", "Precision"]
