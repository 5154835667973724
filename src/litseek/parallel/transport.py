"""Activations and their gradients between pipeline ranks: plain isend and irecv, in the schedule's order (report §3.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from litseek.data.batch import MicroBatch
from litseek.parallel.schedule import Transfer


class PeerToPeer:
    """Between the ranks of one pipeline. ``ranks``: the global rank of every pipeline place. ``channel(source, target)``
    is the process group of what passes from one place to another: of its own, so that nothing that is received late keeps
    back what could be sent.

    Two ranks post what passes between them in the same order (`schedule.program`), so no tags are needed. A receive
    knows its shape from the micro-batch, (B, S, D), of which every rank has the side inputs.
    """

    def __init__(
        self,
        ranks: list[int],
        channel: Callable[[int, int], dist.ProcessGroup | None],
        width: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.ranks, self.channel, self.width, self.dtype, self.device = ranks, channel, width, dtype, device
        self.sent: list[tuple[dist.Work, Tensor]] = []
        self.posted: dict[Transfer, tuple[dist.Work, Tensor]] = {}

    def send(self, transfer: Transfer, value: Tensor) -> None:
        value = value.detach().contiguous()
        group = self.channel(transfer.source, transfer.target)
        self.sent.append((_work(dist.isend(value, self.ranks[transfer.target], group=group)), value))

    def expect(self, transfer: Transfer, micro: MicroBatch) -> None:
        value = torch.empty(*micro.tokens.shape, self.width, dtype=self.dtype, device=self.device)
        group = self.channel(transfer.source, transfer.target)
        self.posted[transfer] = _work(dist.irecv(value, self.ranks[transfer.source], group=group)), value

    def arrived(self, transfer: Transfer) -> Tensor:
        work, value = self.posted.pop(transfer)
        work.wait()
        return value

    def finish(self) -> None:
        for work, _ in self.sent:
            work.wait()
        self.sent.clear()
        assert not self.posted, f"received and never used: {list(self.posted)}"


def _work(work: Any) -> dist.Work:
    assert work is not None, "this rank is not in the group"
    return work
