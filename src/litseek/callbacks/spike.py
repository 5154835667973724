"""Guard against steps whose loss or gradient is not finite."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from litseek.callbacks.later import Later
from litseek.errors import LitseekError


class SpikeGuard(Callback):
    """Counts skipped steps and stops the run after ``limit`` of them in a row.

    The strategy decides, alike on all ranks, by ``step_result.finite``: optimizer, balance biases and weight average
    are left alone in such a step, the data go on. The counts are in the checkpoint. Raises LitseekError at the limit.
    On a GPU the counting is done there and the host learns of it when the numbers arrive, some steps late.
    """

    def __init__(self, limit: int = 5):
        if limit < 1:
            raise ValueError(f"callbacks.spike_guard.limit is {limit}, it must be at least 1")
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0
        self._counts: Tensor | None = None
        """(6,) float64: skipped, in a row, the longest row, and of the last bad step until the limit: number, loss, norm."""
        self._later = Later()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._counts = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self._count(trainer.global_step, pl_module.step_result)
        assert self._counts is not None
        if self._counts.is_cuda:
            self._tell(self._later.get())
        self._later.put(self._counts)
        if not self._counts.is_cuda:
            self._tell(self._later.get())
        pl_module.log("skipped_steps", self._counts[0].float())

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._tell(self._counts)

    def state_dict(self) -> dict[str, Any]:
        if self._counts is not None:
            self.skipped, self.in_a_row = (int(count) for count in self._counts[:2].tolist())
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._counts = None

    @torch.no_grad()
    def _count(self, step: int, result: Any) -> None:
        loss = result.loss.detach().double()
        if self._counts is None:
            start = [self.skipped, self.in_a_row, 0, 0, 0, 0]
            self._told = self.skipped
            self._counts = torch.stack([torch.full_like(loss, number) for number in start])
        skipped, row, longest, *_ = self._counts.unbind()
        bad = (~torch.as_tensor(result.finite)).to(loss.dtype)
        norm = torch.full_like(loss, float("nan")) if result.grad_norm is None else result.grad_norm.detach().double()
        row = (row + 1) * bad
        counts = torch.stack([skipped + bad, row, torch.maximum(longest, row)])
        of_step = torch.stack([torch.full_like(loss, step), loss, norm])
        keep = (bad == 0) | (longest >= self.limit)
        self._counts = torch.cat([counts, torch.where(keep, self._counts[3:], of_step)])

    def _tell(self, counts: Tensor | None) -> None:
        """Warn of what was skipped since the last time, or stop."""
        if counts is None:
            return
        skipped, row, longest, step, loss, norm = counts.tolist()
        fresh, self._told = int(skipped) - self._told, int(skipped)
        self.skipped, self.in_a_row = int(skipped), int(row)
        what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
        if longest >= self.limit:
            raise LitseekError(
                f"Step {int(step)} is the last of {int(longest)} in a row that are not finite ({what}): "
                "lower optim.lr or look at the data; the weights are as they were before them."
            )
        if fresh == 1:
            warnings.warn(f"step {int(step)} skipped, it is not finite: {what}", stacklevel=1)
        elif fresh > 1:
            warnings.warn(
                f"{fresh} steps skipped, they are not finite; the last is step {int(step)}: {what}", stacklevel=1
            )
