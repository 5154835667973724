"""Running a stage under a real trainer, small and quiet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from litseek.parallel.strategy import LitseekStrategy


class Losses(Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def trainer(folder: Path, steps: int, *callbacks: Callback, strategy: Any = None, **keys: Any) -> pl.Trainer:
    return pl.Trainer(
        **{
            **dict(accelerator="cpu", devices=1, max_steps=steps, max_epochs=-1, logger=False, num_sanity_val_steps=0),
            **dict(enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False),
            **dict(val_check_interval=4, check_val_every_n_epoch=None, use_distributed_sampler=False),
            "default_root_dir": str(folder),
            "strategy": strategy or LitseekStrategy(),
            "callbacks": list(callbacks),
            **keys,
        }
    )


def fit(
    stage: Any, folder: Path, steps: int, *callbacks: Callback, resume: Path | None = None, **keys: Any
) -> list[float]:
    """Train and return the losses of the steps that ran."""
    losses = Losses()
    trainer(folder, steps, losses, *callbacks, **keys).fit(stage, ckpt_path=None if resume is None else str(resume))
    return losses.values
