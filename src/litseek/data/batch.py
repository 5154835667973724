"""One micro-batch: what travels beside the hidden states to every phase. Letters: B batch, S sequence."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that is not scored."""


@dataclass
class MicroBatch:
    """Token ids, labels and side inputs of one micro-batch; every pipeline rank holds all of it."""

    tokens: Tensor
    """(B, S) int64."""
    labels: Tensor
    """(B, S) int64: ``labels[b, s]`` is the token after position s, or ``IGNORE``."""
    positions: Tensor
    """(B, S) int64 rotary positions."""
    documents: Tensor | None = None
    """(B, S) int64 document ids where attention stays inside a document, else None."""
    targets: float = 0.0
    """Scored units in here (label tokens; samples for GRPO). The executor weighs the loss by it."""
    blank: bool = False
    """Runs along where a schedule or another rank wants a micro-batch more, and counts nowhere."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """What a stage adds, for example advantages."""
    memo: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    """What `once` has computed."""

    @classmethod
    def of(cls, tokens: Tensor) -> MicroBatch:
        """A batch of plain tokens at positions 0..S-1, labelled with the next token."""
        labels = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], dim=1)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return cls(tokens, labels, positions, targets=float((labels != IGNORE).sum()))

    def blanked(self) -> MicroBatch:
        """Its first row once more, as a micro-batch that counts nowhere."""
        return replace(
            self,
            tokens=self.tokens[:1],
            labels=torch.full_like(self.labels[:1], IGNORE),
            positions=self.positions[:1],
            documents=None if self.documents is None else self.documents[:1],
            targets=0.0,
            blank=True,
            extra={},
            memo={},
        )

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What all layers need of this micro-batch's side inputs, computed by the first that asks."""
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def to(self, device: torch.device | str) -> MicroBatch:
        """On ``device``; towards a GPU through pinned memory, as a copy from anywhere else makes the host wait."""
        pin = torch.device(device).type == "cuda"

        def move(t: Tensor) -> Tensor:
            t = t.contiguous().pin_memory() if pin and not t.is_cuda else t
            return t.to(device, non_blocking=True)

        return replace(
            self,
            tokens=move(self.tokens),
            labels=move(self.labels),
            positions=move(self.positions),
            documents=None if self.documents is None else move(self.documents),
            extra={k: move(v) for k, v in self.extra.items()},
            memo={},
        )
