"""What the ranks of one command owe each other: to end together, and to stop together when a scheduler asks."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer

from litseek.cli.errors import INTERRUPTED, describe
from litseek.errors import Preempted
from litseek.parallel import preempt, watchdog


class Watch(Callback):
    """Connects the ranks before data and weights are set up, tells them of this one's error, and listens to SIGTERM."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        strategy: Any = trainer.strategy
        watchdog.start(strategy.global_rank, strategy.local_rank, strategy.world_size, strategy.broadcast)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        preempt.listen(trainer)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if not isinstance(exception, Preempted):
            watchdog.fail(INTERRUPTED if isinstance(exception, KeyboardInterrupt) else describe(exception))


def connect() -> None:
    """Where torchrun or SLURM started all ranks at once, connect them at once; the launcher's are connected by the strategy."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if "RANK" not in os.environ or world == 1 or dist.is_initialized():
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    watchdog.start(dist.get_rank(), int(os.environ.get("LOCAL_RANK", "0")), world, from_rank_0)


def from_rank_0(value: Any) -> Any:
    """What rank 0 put in, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]
