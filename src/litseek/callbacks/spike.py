"""Guard against steps whose loss or gradient is not finite."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Callback, Trainer

from litseek.errors import LitseekError


class SpikeGuard(Callback):
    """Counts skipped steps and stops the run after ``limit`` of them in a row.

    The strategy decides, alike on all ranks, by ``step_result.finite``: optimizer, balance biases and weight average
    are left alone in such a step, the data go on. The counts are in the checkpoint. Raises LitseekError at the limit.
    """

    def __init__(self, limit: int = 5):
        if limit < 1:
            raise ValueError(f"callbacks.spike_guard.limit is {limit}, it must be at least 1")
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        result = pl_module.step_result
        if result.finite:
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
            what = f"loss {float(result.loss):.4g}, gradient norm {_number(result.grad_norm)}"
            if self.in_a_row >= self.limit:
                raise LitseekError(
                    f"Step {trainer.global_step} is the last of {self.in_a_row} in a row that are not finite ({what}): "
                    "lower optim.lr or look at the data; the last checkpoint is from before them."
                )
            warnings.warn(f"step {trainer.global_step} skipped, it is not finite: {what}", stacklevel=1)
        pl_module.log("skipped_steps", float(self.skipped))

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def _number(value: Any) -> str:
    return "unknown" if value is None else f"{float(value):.4g}"
