"""The training step that `stage=pretrain` makes, without Lightning's loop, and the clock that times any step.

The pieces are the stage's own: inputs, head loss, gradients through the strategy's executor, their norm and clip, the
optimizer, the bias update. Only the tokens are random.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from litseek.data.batch import MicroBatch
from litseek.models.config import DeepSeekV3Config
from litseek.optim import set_lr
from litseek.parallel.executor import State
from litseek.parallel.strategy import LitseekStrategy
from litseek.stages.loader import Batch
from litseek.stages.pretrain import Pretrain


@dataclass(frozen=True)
class Timing:
    """What a series of steps took."""

    ms: float
    """Median of the steps after warm-up."""
    peak_gib: float | None
    """Largest memory allocated during them; None on a CPU."""
    value: float
    """What the last step returned: its loss."""


class RandomTokens:
    """A data source of uniformly random tokens: what a stage asks of one, as far as a step needs it."""

    def __init__(self, vocab_size: int, seq_len: int, seed: int = 0):
        self.vocab_size, self.seq_len, self.seed = vocab_size, seq_len, seed

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 2**32 + index)
        ids = torch.randint(self.vocab_size, (self.seq_len + 1,), generator=generator)
        return {"tokens": ids[:-1], "labels": ids[1:], "positions": torch.arange(self.seq_len)}


class TrainingStep:
    """Calling it makes one optimizer step on ``batch`` fresh sequences and returns the loss.

    ``micro_batch`` sequences are computed at once. The model is made on ``device``.
    """

    def __init__(
        self,
        cfg: DeepSeekV3Config,
        precision: Any,
        optim: Any,
        strategy: LitseekStrategy,
        *,
        batch: int,
        micro_batch: int,
        seq_len: int,
        device: torch.device,
        compile: bool = False,
        recompute: bool = False,
        seed: int = 0,
    ):
        self.data, self.batch, self.strategy = RandomTokens(cfg.vocab_size, seq_len, seed), batch, strategy
        self.stage = Pretrain(
            cfg, precision, optim, self.data, batch=batch, micro_batch=micro_batch, seed=seed, compile=compile,
            recompute=recompute,
        )  # fmt: skip
        with device:
            self.stage.configure_model()
        self.stage.to(device)
        strategy.parallel_devices = [device]
        strategy.connect(self.stage)
        self.optimizer = self.stage.configure_optimizers()
        self.made: list[Batch] = []
        self.done = 0

    def prepare(self, steps: int) -> None:
        """Make the next ``steps`` batches on the host, outside what is timed."""
        for i in range(self.done, self.done + steps):
            rows = [self.data[i * self.batch + j] for j in range(self.batch)]
            self.made.append({"rows": rows, "first": i * self.batch, "count": self.batch})

    def __call__(self) -> Tensor:
        stage, strategy = self.stage, self.strategy
        strategy.clear_gradients()
        set_lr(self.optimizer, stage.optim.schedule.lr(self.done, self.done * self.batch * self.data.seq_len))
        result = strategy.forward_backward(stage.inputs(self.made.pop(0)), self._head_loss)
        with record_function("litseek: optimizer"):
            strategy.clip_gradients(stage.optim.clip)
            strategy.step(self.optimizer)
        stage.update_biases(result)
        self.done += 1
        return result.loss

    def _head_loss(self, hidden: State, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        with record_function("litseek: head"):
            return self.stage.head_loss(hidden, micro)


def time_steps(step: Callable[[], Tensor], warmup: int, steps: int, device: torch.device) -> Timing:
    """Median over ``steps`` calls after ``warmup`` others; on a GPU between events, without a host wait in between."""
    for _ in range(warmup):
        step()
    if device.type != "cuda":
        return _time_on_host(step, steps)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        value = step()
        mark.record()
    torch.cuda.synchronize(device)
    times = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return Timing(statistics.median(times), torch.cuda.max_memory_allocated(device) / 2**30, float(value.detach()))


def _time_on_host(step: Callable[[], Tensor], steps: int) -> Timing:
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        value = step()
        times.append((time.perf_counter() - start) * 1e3)
    return Timing(statistics.median(times), None, float(value.detach()))


def free() -> None:
    """Give back what the last measurement held, compiled graphs included. The caller has dropped its objects."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
