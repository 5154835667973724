"""Optimizers, schedules, balance-bias update, clipping and the average of weights."""

from litseek.optim.adamw import AdamW, AdamWConfig, set_lr
from litseek.optim.balance import update_bias_, update_biases_
from litseek.optim.clip import clip_grad_norm_, grad_norm
from litseek.optim.ema import EMA
from litseek.optim.muon import Muon, MuonConfig
from litseek.optim.schedules import BatchRamp, LRSchedule, Steps

__all__ = [
    "EMA",
    "AdamW",
    "AdamWConfig",
    "BatchRamp",
    "LRSchedule",
    "Muon",
    "MuonConfig",
    "Steps",
    "clip_grad_norm_",
    "grad_norm",
    "set_lr",
    "update_bias_",
    "update_biases_",
]
