"""Memory that the GPUs of a node share for exchanging tokens: what lies where. Used by litseek_kernels.all_to_all.

A rank's buffers are counters, one a peer, and two halves, used in turn. A half holds, for each rank that sends: T rows, the
choices and weights of T tokens, and the scales of T rows. Letters: W ranks, T tokens a rank has room for, K chosen a token,
D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE = 128
"""Columns that share a scale."""
STATE = 4
"""int32 numbers of ``Buffers.state``."""
EXCHANGES, LATE, NEEDED = 0, 1, 2
"""In ``Buffers.state``: exchanges waited for; waits that gave up; most rows that a ``place`` wanted."""
PROGRAMS = 20
"""The report's share of multiprocessors for communication."""
SPINS = 1 << 26
"""Polls before a wait gives up: about a minute, each is a round trip to L2."""
FLAGS = 1024
"""Bytes before the first half: a counter of 4 bytes for each rank."""
MAX_WORLD = 64
_ALIGN = 128


@dataclass(frozen=True)
class Buffers:
    """One rank's view of memory that every rank of the node has alike. Made by whoever can share memory."""

    peers_W: Tensor
    """(W,) int64: every rank's address of its buffers, as seen from here."""
    own: Tensor
    """(``size``,) uint8, this rank's; zeros before the first exchange."""
    state: Tensor
    """(STATE,) int32, zeros at first; not shared."""
    rank: int
    tokens: int
    """T: room for the tokens of a rank."""
    top_k: int
    hidden: int
    itemsize: int
    """Bytes of the widest number of a row."""
    programs: int = PROGRAMS
    """The same at every rank, and for as long as the counters live."""
    spins: int = SPINS

    def __post_init__(self) -> None:
        if self.hidden % 16 or self.itemsize not in (2, 4):
            raise ValueError(
                f"an exchange moves rows of 16-byte pieces in numbers of 2 or 4 bytes, these have {self.hidden} numbers "
                f"of {self.itemsize} bytes"
            )
        if self.world > MAX_WORLD or self.own.numel() < self.size:
            raise ValueError(
                f"{self.world} ranks with room for {self.tokens} tokens of {self.hidden} need {self.size} bytes and at most "
                f"{MAX_WORLD} ranks, the buffer has {self.own.numel()} bytes"
            )

    @property
    def world(self) -> int:
        return self.peers_W.numel()

    @property
    def slots(self) -> int:
        return self.world * self.tokens

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Bytes into a half: where choices, weights and scales start, after the rows; and where the half ends."""
        return parts(self.world, self.tokens, self.top_k, self.hidden, self.itemsize)

    @property
    def size(self) -> int:
        return size(self.world, self.tokens, self.top_k, self.hidden, self.itemsize)

    def at(self, part: int | None, dtype: torch.dtype) -> tuple[Tensor, int]:
        """Own memory from the first half's rows (None) or ``parts[part]`` on, and how far the other half is, in ``dtype``."""
        start = FLAGS + (0 if part is None else self.parts[part])
        return self.own[start : self.size].view(dtype), self.parts[3] // dtype.itemsize


def parts(world: int, tokens: int, top_k: int, hidden: int, itemsize: int) -> tuple[int, int, int, int]:
    slots = world * tokens
    sizes = slots * hidden * itemsize, slots * top_k * 4, slots * top_k * 4, slots * -(-hidden // TILE)
    ends, end = [], 0
    for part in sizes:
        end += -(-part // _ALIGN) * _ALIGN
        ends.append(end)
    return ends[0], ends[1], ends[2], ends[3]


def size(world: int, tokens: int, top_k: int, hidden: int, itemsize: int) -> int:
    """Bytes of ``Buffers.own``."""
    return FLAGS + 2 * parts(world, tokens, top_k, hidden, itemsize)[3]
