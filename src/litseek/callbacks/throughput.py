"""Tokens a second, model FLOP/s and their share of the GPU's peak (MFU)."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}
"""Dense BF16 of the SXM forms, from the makers' data sheets, by a part of the device's name."""

Mark = float | torch.cuda.Event


class Throughput(Callback):
    """Logs ``throughput/tokens_per_s``, ``throughput/model_tflops`` and, on a known GPU, ``throughput/mfu``.

    Means over the last ``window`` steps, of all ranks together (MFU: per GPU). Data loading counts; validation and
    checkpoints do not, nor do the first ``warmup`` steps. A GPU's own clock is read, and only where Lightning logs.
    FLOPs are the model's (``cfg.flops_per_token``), without recompute. Stages that also generate say so with ``counts_flops = False`` and get tokens a second only.
    """

    def __init__(self, window: int = 10, warmup: int = 2, peak_tflops: float | None = None):
        if window < 1:
            raise ValueError(f"callbacks.throughput.window is {window}, it must be at least 1")
        self.warmup, self.peak_tflops = warmup, peak_tflops
        self._skip = warmup
        self._window: deque[tuple[int, Mark, Mark]] = deque(maxlen=window)  # tokens, beginning and end of a step
        self._started: Mark = 0.0
        self._tokens_before = 0
        self._ended: Mark | None = None
        self._interrupted = False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._skip = self.warmup
        self._window.clear()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._ended = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        now = mark(pl_module.device)
        # the time since the last step is waiting for data, unless something else ran in between
        self._started = now if self._ended is None or self._interrupted else self._ended
        self._interrupted = False
        self._tokens_before = pl_module.tokens_seen

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self._ended = mark(pl_module.device)
        if self._skip:
            self._skip -= 1
            return
        self._window.append((pl_module.tokens_seen - self._tokens_before, self._started, self._ended))
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            if pl_module.device.type == "cuda":
                pl_module.log("throughput/peak_gib", torch.cuda.max_memory_allocated(pl_module.device) / 2**30)
            for name, value in self._rates(trainer, pl_module).items():
                pl_module.log(f"throughput/{name}", value)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._interrupted = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._interrupted = True

    def _rates(self, trainer: Trainer, pl_module: Any) -> dict[str, float]:
        seconds = sum(seconds_between(started, ended) for _, started, ended in self._window)
        tokens_per_s = sum(tokens for tokens, _, _ in self._window) / seconds
        rates = {"tokens_per_s": tokens_per_s}
        if getattr(pl_module, "counts_flops", True):
            flops = pl_module.model.cfg.flops_per_token(pl_module.data.seq_len)
            rates["model_tflops"] = tokens_per_s * flops / 1e12
            peak = self.peak_tflops or peak_tflops(pl_module.device)
            if peak:
                rates["mfu"] = rates["model_tflops"] / (peak * trainer.world_size)
        return rates


def mark(device: torch.device) -> Mark:
    """This moment on the host, or of a GPU's queue: when what was queued so far is done."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(started: Mark, ended: Mark) -> float:
    if isinstance(started, float) and isinstance(ended, float):
        return ended - started
    assert isinstance(started, torch.cuda.Event) and isinstance(ended, torch.cuda.Event)
    ended.synchronize()
    return started.elapsed_time(ended) / 1e3


def peak_tflops(device: torch.device) -> float | None:
    """Dense BF16 peak of a known GPU, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
