"""Average of weights and balance biases during training (report §3.2.3)."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from litseek.optim.ema import EMA


class WeightAverage(Callback):
    """Keeps ``litseek.optim.EMA`` of all parameters (MTP's too) and balance biases, and saves it in the checkpoint.

    ``decay`` for each step (the report gives none), ``every`` steps one update with decay ** every, ``validate`` True
    puts the average in place of the weights during validation. Skipped steps do not count.
    """

    def __init__(self, decay: float = 0.999, every: int = 1, validate: bool = False):
        if every < 1:
            raise ValueError(f"callbacks.ema.every is {every}, it must be at least 1")
        self.ema = EMA(decay**every)
        self.every, self.validate = every, validate
        self._weights: dict[str, Tensor] = {}
        self._team: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._team = getattr(trainer.strategy, "team", None)  # a foreign strategy has none
        self.ema.start(averaged(pl_module.model))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.ema.wait_copied()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            self.ema.update(averaged(pl_module.model), torch.as_tensor(pl_module.step_result.finite))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.ema.wait()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.validate and not trainer.sanity_checking and self.ema.average:
            self.ema.wait()
            self._weights = {name: value.detach().clone() for name, value in averaged(pl_module.model).items()}
            _write(averaged(pl_module.model), self.ema.average)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self._weights:
            _write(averaged(pl_module.model), self._weights)
            self._weights = {}

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        state = self.ema.state_dict()
        if self._team is not None:  # every rank averages what it holds
            state["average"] = self._team.pieces(state["average"])
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.ema.load_state_dict(state_dict)


def averaged(model: Any) -> dict[str, Tensor]:
    """Global name -> what the average follows: parameters and balance biases."""
    values = dict(model.named_parameters())
    values.update((n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias"))
    return values


@torch.no_grad()
def _write(into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, target in into.items():
        target.copy_(values[name])
