"""The training step that `stage=pretrain` makes, without Lightning's loop, and the clock that times any step.

The pieces are the stage's own: inputs, head loss, gradients through the strategy's executor, their norm and clip, the
optimizer, the bias update. Only the tokens are random.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.accelerators import CPUAccelerator, CUDAAccelerator
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
    """Calling it makes one optimizer step on ``batch`` fresh sequences a rank and returns the loss.

    ``micro_batch`` sequences are computed at once. The model is made on ``device``; under torchrun each rank makes its
    part of it, as the strategy lays it out.
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
        self.data, self.strategy = RandomTokens(cfg.vocab_size, seq_len, seed), strategy
        join(strategy, device)
        self.batch, self.own = batch * strategy.world_size, batch * strategy.pp
        self.stage = Pretrain(
            cfg, precision, optim, self.data, batch=self.batch, micro_batch=micro_batch, seed=seed, compile=compile,
            recompute=recompute,
        )  # fmt: skip
        strategy.connect(self.stage)
        strategy.check_micros(self.own // micro_batch)
        self.stage.configure_model()
        strategy.place()
        self.stage.to(strategy.root_device)
        self.optimizer = self.stage.configure_optimizers()
        self.made: list[Batch] = []
        self.done = 0

    def prepare(self, steps: int) -> None:
        """Make the next ``steps`` batches on the host, outside what is timed."""
        begin = self.strategy.dp_rank * self.own
        for i in range(self.done, self.done + steps):
            rows = [self.data[i * self.batch + j] for j in range(begin, begin + self.own)]
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


def join(strategy: LitseekStrategy, device: torch.device) -> None:
    """Take this process's place among those that torchrun started; alone without it."""
    if not TorchElasticEnvironment.detect():
        strategy.parallel_devices = [device]
        return
    ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    strategy.cluster_environment = TorchElasticEnvironment()
    strategy.parallel_devices = [
        torch.device(device.type, i) if device.type == "cuda" else device for i in range(ranks)
    ]
    strategy.num_nodes = strategy.cluster_environment.world_size() // ranks
    strategy.accelerator = CUDAAccelerator() if device.type == "cuda" else CPUAccelerator()
    strategy.setup_environment()


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
