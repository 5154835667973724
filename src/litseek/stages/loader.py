"""Batches whose order is a function of (seed, samples consumed), so that a resumed run repeats and loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from litseek.data.batch import IGNORE, MicroBatch

Row = dict[str, Tensor]
Batch = dict[str, Any]
KNOWN = ("tokens", "labels", "positions", "documents")


class TrainingBatches:
    """Global batches without end, this rank's contiguous share of each.

    Iteration starts at ``consumed()`` and then counts on by itself: Lightning fetches one batch ahead, so the stage's own
    counter, which moves when a batch was trained on, is the one that a checkpoint holds.
    A batch: ``rows`` (list), ``first`` and ``count`` (of the global batch, in samples).
    """

    def __init__(
        self, source: Any, consumed: Callable[[], int], size: Callable[[int], int], rank: int = 0, ranks: int = 1
    ) -> None:
        self.source, self.consumed, self.size, self.rank, self.ranks = source, consumed, size, rank, ranks

    def __iter__(self) -> Iterator[Batch]:
        first = self.consumed()
        while True:
            count = self.size(first)
            share = count // self.ranks
            mine = range(first + self.rank * share, first + (self.rank + 1) * share)
            yield {"rows": [self.source[i] for i in mine], "first": first, "count": count}
            first += count


class ValidationBatches:
    """The held-out rows in micro-batches. Every rank has as many, the last filled up with rows that score nothing."""

    def __init__(self, rows: Sequence[Row], micro_batch: int, rank: int = 0, ranks: int = 1) -> None:
        self.rows, self.micro_batch, self.rank, self.ranks = rows, micro_batch, rank, ranks

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.micro_batch * self.ranks))

    def __iter__(self) -> Iterator[Batch]:
        for i in range(len(self)):
            start = (i * self.ranks + self.rank) * self.micro_batch
            rows = list(self.rows[start : start + self.micro_batch])
            if not rows:
                blank = dict(self.rows[0])
                rows = [blank | {"labels": torch.full_like(blank["labels"], IGNORE)}]
            yield {"rows": rows}


def micro_batches(rows: Sequence[Row], size: int) -> list[MicroBatch]:
    """Rows in groups of ``size``, on the host: targets are counted here, where counting stops no GPU."""
    return [_micro(rows[i : i + size]) for i in range(0, len(rows), size)]


def _micro(rows: Sequence[Row]) -> MicroBatch:
    stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return MicroBatch(
        tokens=stacked["tokens"],
        labels=stacked["labels"],
        positions=stacked["positions"],
        documents=stacked.get("documents"),
        targets=float((stacked["labels"] != IGNORE).sum()),
        extra={key: value for key, value in stacked.items() if key not in KNOWN},
    )
