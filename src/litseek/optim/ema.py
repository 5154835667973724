"""Average of the weights in CPU memory, updated beside the training (report §3.2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class EMA:
    """average += (1 - decay) * (value - average), float32 on the CPU, for parameters and balance biases alike.

    Of GPU tensors ``update`` only queues a copy into pinned memory on a side stream and returns; a thread averages it
    when it has arrived. ``wait_copied`` must come before the values change again, ``wait`` before the average is read.
    The report does not give the decay.
    """

    def __init__(self, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay is {decay}, it must lie in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._pinned: dict[str, Tensor] = {}
        self._counts: Tensor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    @torch.no_grad()
    def start(self, values: Mapping[str, Tensor]) -> None:
        """Begin from these values, unless an average was loaded already."""
        if not self.average:
            self.average = {name: _host_copy(value) for name, value in values.items()}
        if set(self.average) != set(values):
            name = min(set(self.average) ^ set(values))
            raise ValueError(f"the loaded average of weights and the model differ in '{name}'")

    @torch.no_grad()
    def update(self, values: Mapping[str, Tensor], finite: Tensor | None = None) -> None:
        """Move the average towards ``values`` (the same names as at ``start``), unless ``finite`` (bool scalar) is false.

        Values and flag of a GPU travel together: only the thread learns whether they count.
        """
        self.wait()
        on_gpu = {name: value for name, value in values.items() if value.is_cuda}
        if on_gpu:
            copied = self._copy(on_gpu, finite)
            host = {name: value.detach().clone() for name, value in values.items() if name not in on_gpu}
            self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="ema")
            self._pending = self._thread.submit(self._add_copied, copied, host)
        elif finite is None or bool(finite):
            self._add(values)

    def wait_copied(self) -> None:
        """Queue on the current stream: what follows may overwrite the values."""
        if self._copied is not None:
            torch.cuda.current_stream(self._stream.device if self._stream else None).wait_event(self._copied)

    def wait(self) -> None:
        """Return once the average holds every update; raises what the thread raised."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def state_dict(self) -> dict[str, object]:
        self.wait()
        return {"decay": self.decay, "updates": self.updates, "average": dict(self.average)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.wait()
        average = state["average"]
        assert isinstance(average, Mapping) and isinstance(state["updates"], int)
        self.updates = state["updates"]
        self.average = {name: _host_copy(value) for name, value in average.items()}

    def _copy(self, values: Mapping[str, Tensor], finite: Tensor | None) -> torch.cuda.Event:
        device = next(iter(values.values())).device
        self._stream = self._stream or torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for name, value in values.items():
                if name not in self._pinned:
                    self._pinned[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
                self._pinned[name].copy_(value.detach(), non_blocking=True)
            if self._counts is None:
                self._counts = torch.empty(1, dtype=torch.bool, pin_memory=True)
            if finite is None:
                self._counts.fill_(True)
            else:
                if finite.is_cuda:
                    finite.record_stream(self._stream)  # it may be freed before the copy has run
                self._counts.copy_(finite.view(1), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)
        return self._copied

    @torch.no_grad()
    def _add_copied(self, copied: torch.cuda.Event, host: Mapping[str, Tensor]) -> None:
        copied.synchronize()
        if self._counts is None or bool(self._counts):
            self._add({**self._pinned, **host})

    def _add(self, values: Mapping[str, Tensor]) -> None:
        self.updates += 1
        for name, value in values.items():
            self.average[name].lerp_(value.detach().float(), 1 - self.decay)


def _host_copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32, copy=True)
