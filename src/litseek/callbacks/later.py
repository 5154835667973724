"""Numbers of a GPU for the host, without the host waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """The newest value of a small tensor that has arrived: `put` queues a copy, `get` takes it when it is there.

    On a CPU it is there at once.
    """

    def __init__(self) -> None:
        self._here: Tensor | None = None
        self._pinned: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def put(self, value: Tensor) -> None:
        """Queue ``value``, unless an earlier one is still on its way."""
        if not value.is_cuda:
            self._here = value
        elif self._arrived is None:
            if self._pinned is None:
                self._pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._pinned.copy_(value.detach(), non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(value.device))

    def get(self) -> Tensor | None:
        """What has arrived since the last `get`, or None."""
        if self._arrived is not None and self._pinned is not None and self._arrived.query():
            self._here, self._arrived = self._pinned.clone(), None
        value, self._here = self._here, None
        return value
