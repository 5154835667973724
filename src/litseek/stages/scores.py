"""Held-out loss summed up: in nats a token, in bits a byte, and by position in the context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from litseek.data.batch import IGNORE


class Scores:
    """Sums of token losses by position, over micro-batches and ranks. Letters: B batch, S sequence."""

    def __init__(self) -> None:
        self.nats_S: Tensor | None = None
        self.count_S: Tensor | None = None

    def add(self, nats_BS: Tensor, labels_BS: Tensor) -> None:
        nats_S = nats_BS.double().sum(0).cpu()
        count_S = (labels_BS != IGNORE).double().sum(0).cpu()
        if self.nats_S is None or self.count_S is None:
            self.nats_S, self.count_S = nats_S, count_S
        else:
            self.nats_S, self.count_S = self.nats_S + nats_S, self.count_S + count_S

    def reduce(self, sum_: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Over ranks."""
        assert self.nats_S is not None and self.count_S is not None
        both = sum_(torch.stack([self.nats_S, self.count_S]).to(device)).cpu()
        self.nats_S, self.count_S = both[0], both[1]

    @property
    def tokens(self) -> int:
        return 0 if self.count_S is None else int(self.count_S.sum())

    @property
    def loss(self) -> float:
        """Nats a token."""
        assert self.nats_S is not None
        return float(self.nats_S.sum()) / max(self.tokens, 1)

    def bits_per_byte(self, num_bytes: int, all_tokens: int) -> float:
        """Over ``num_bytes`` of text that hold ``all_tokens`` scored tokens; a part of them counts as its share."""
        assert self.nats_S is not None
        share = self.tokens / max(all_tokens, 1)
        return float(self.nats_S.sum()) / math.log(2) / max(num_bytes * share, 1e-9)

    def by_position(self, points: int = 256) -> dict[str, list[float]]:
        """Mean loss of at most ``points`` equal stretches of the context, each with its middle position."""
        assert self.nats_S is not None and self.count_S is not None
        width = -(-len(self.nats_S) // points)
        rows: dict[str, list[float]] = {"positions": [], "loss": []}
        for start in range(0, len(self.nats_S), width):
            stretch = slice(start, start + width)
            count = float(self.count_S[stretch].sum())
            if count:
                rows["positions"].append(start + (len(self.nats_S[stretch]) - 1) / 2)
                rows["loss"].append(float(self.nats_S[stretch].sum()) / count)
        return rows


def labels_in(rows: Any) -> int:
    """Scored tokens of held-out rows."""
    return sum(int((row["labels"] != IGNORE).sum()) for row in rows)
