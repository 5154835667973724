"""SIGTERM ends a run after the step in progress, with a checkpoint; so do SIGUSR1 and SIGUSR2 in a scheduler's job.

The signal only sets a flag. The strategy sums the flags of all ranks together with the counts that it sums on the host at
the start of every step anyway, so that all ranks stop after the same step and no GPU is waited for.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from lightning.pytorch import Trainer

from litseek.errors import Preempted

ELSEWHERE = "a signal to another rank"
_received: str | None = None
"""The signal that asked this process to stop, until it has stopped."""


def listen(trainer: Trainer) -> None:
    """Take the signals over until the trainer is torn down, which restores whoever had them.

    Lightning's own answer to SIGTERM starts a collective inside the signal's handler, and asks about it with a host-device
    sync in every step: both are put out of action.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    if threading.current_thread() is threading.main_thread():
        for number in signals():
            signal.signal(number, _note)


def signals() -> list[signal.Signals]:
    """SLURM and submitit warn of the end of a job by SIGUSR1 or SIGUSR2; elsewhere these are not ours."""
    in_job = "SLURM_JOB_ID" in os.environ or "SUBMITIT_EXECUTOR" in os.environ
    return [signal.SIGTERM, *((signal.SIGUSR1, signal.SIGUSR2) if in_job else ())]


def requested() -> bool:
    """Whether this process has been asked to stop, and has not yet."""
    return _received is not None


def agree(stop: bool) -> None:
    """Where the ranks are not in a step: take over what rank 0 found."""
    global _received
    _received = (_received or ELSEWHERE) if stop else None


def stopped(what: str) -> Preempted:
    """The error that ends the run when the request has been met and ``what`` is saved."""
    global _received
    asked, _received = _received or ELSEWHERE, None
    return Preempted(f"stopped by {asked}: {what} is saved, and the same command goes on from it.")


def _note(number: int, frame: Any) -> None:
    global _received
    _received = signal.Signals(number).name
