"""What a person sees while a stage trains: loss, tokens a second, time left."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from litseek.callbacks.later import Later


class Progress(ProgressBar):
    """A rich bar on a terminal; elsewhere a plain line on stderr every ``seconds``.

    It is a Lightning progress bar, so that Lightning adds none of its own. The loss of a GPU is the newest one that has
    arrived: the training does not wait for the bar.
    """

    def __init__(self, seconds: float = 30.0, refresh: float = 0.25):
        super().__init__()
        self.seconds, self.refresh = seconds, refresh
        self._enabled = True
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._shown = 0.0
        self._later = Later()
        self._loss: float | None = None

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._started = self._shown = time.monotonic()
        self._first_step, self._first_tokens = trainer.global_step, pl_module.tokens_seen
        if not self._enabled or not trainer.is_global_zero or not sys.stderr.isatty():
            return
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task(
            stage_name(pl_module), total=_total(trainer), completed=trainer.global_step, numbers=""
        )
        self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        now = time.monotonic()
        last = trainer.global_step == _total(trainer)
        if not self._enabled or not trainer.is_global_zero:
            return
        self._read(pl_module.step_result, last)
        if self._bar is not None and self._task is not None:
            if now - self._shown >= self.refresh or last:
                self._shown = now
                self._bar.update(self._task, completed=trainer.global_step, numbers=self._numbers(pl_module, now))
        elif now - self._shown >= self.seconds or last:
            self._shown = now
            print(self.line(trainer, pl_module, now), file=sys.stderr, flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{stage_name(pl_module)} (validating)")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=stage_name(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def print(self, *args: Any, **kwargs: Any) -> None:
        """``trainer.print`` and ``self.print`` go above the bar."""
        if self._bar is not None:
            self._bar.console.print(*args, **kwargs)
        else:
            print(*args, file=sys.stderr, **kwargs)

    def line(self, trainer: Trainer, pl_module: Any, now: float) -> str:
        """``pretrain  step 120/500  loss 3.214  9.7K tokens/s  0:45 left``."""
        total = _total(trainer)
        done = trainer.global_step - self._first_step
        parts = [stage_name(pl_module), f"step {trainer.global_step}" + (f"/{total}" if total else "")]
        parts.append(self._numbers(pl_module, now))
        if total and done:
            left = (now - self._started) / done * (total - trainer.global_step)
            parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        return "  ".join(parts)

    def _read(self, result: Any, last: bool) -> None:
        if result is None:
            return
        self._later.put(result.loss)
        arrived = result.loss if last else self._later.get()
        if arrived is not None:
            self._loss = float(arrived)

    def _numbers(self, pl_module: Any, now: float) -> str:
        rate = (pl_module.tokens_seen - self._first_tokens) / max(now - self._started, 1e-9)
        loss = "" if self._loss is None else f"loss {self._loss:.3f}  "
        return f"{loss}{_short(rate)} tokens/s"


def stage_name(pl_module: Any) -> str:
    """The stage's own name, else its class's."""
    return str(getattr(pl_module, "name", "") or type(pl_module).__name__.lower())


def _total(trainer: Trainer) -> int | None:
    return trainer.max_steps if trainer.max_steps > 0 else None


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("K", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"
