"""A callback that makes one rank fail while the others are in a step, or sends it a signal."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning.pytorch import Callback, Trainer


class Fault(Callback):
    """Before step ``step`` rank ``rank`` raises (``how="raise"``) or sends itself the signal of this name."""

    def __init__(self, rank: int, step: int, how: str) -> None:
        self.rank, self.step, self.how = rank, step, how

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_rank == self.rank and pl_module.step + 1 == self.step:
            if self.how == "raise":
                raise RuntimeError("the fault of this test")
            os.kill(os.getpid(), signal.Signals[self.how])
