"""When a schedule's actions run, its bubble and its activations, beside the report's formulas (§3.2.1, table 2).

Each action starts as soon as its rank is free and its inputs exist; transfers take no time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from litseek.parallel.schedule import Action, Part, Schedule, simulate

EXACT = {
    "zb1p": "w <= f, w <= b and at least as many micro-batches as ranks",
    "dualpipe": "f = b >= w",
    "dualpipev": "f = b >= w",
}
"""When an order's bubble is the formula's; 1f1b's always is. For b >= f >= w dualpipe's and dualpipev's is never above it."""


class Event(NamedTuple):
    """One action on one rank, in the time unit of f, b and w."""

    rank: int
    kind: str
    parts: tuple[Part, ...]
    start: float
    end: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `stage` counts along the micro-batch's own direction."""
        parts = [{"op": part.op, "stage": part.stage, "microbatch": part.micro} for part in self.parts]
        return {"rank": self.rank, "kind": self.kind, "parts": parts, "start": self.start, "end": self.end}


@dataclass(frozen=True)
class Timeline:
    """A schedule with the times of a stage's forward (f) and of its backward's input and weight halves (b, w).

    B takes b + w, F&B takes f + b + w: what overlap saves is not in it. Raises ValueError for a time that is negative
    or not finite, and when all three are 0.
    """

    schedule: Schedule
    f: float = 1
    b: float = 1
    w: float = 1

    def __post_init__(self) -> None:
        times = {"f": self.f, "b": self.b, "w": self.w}
        for name, value in times.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value} is not a time: it must be finite and at least 0.")
        if not any(times.values()):
            raise ValueError("f=0, b=0 and w=0 leave nothing to time: at least one must be above 0.")

    @cached_property
    def events(self) -> list[Event]:
        """Rank by rank, in order of time."""
        clock = simulate(self.schedule, self.f, self.b, self.w)
        return [
            Event(rank, action.kind, action.parts, *times)
            for rank, actions in enumerate(self.schedule.actions)
            for action, times in zip(actions, clock[rank], strict=True)
        ]

    @property
    def time(self) -> float:
        """From the first action's start to the last one's end."""
        return max(event.end for event in self.events)

    @property
    def work(self) -> float:
        """What each rank computes: every kind gives all ranks the same."""
        stages = self.schedule.num_stages / self.schedule.ranks
        return self.schedule.micros * stages * (self.f + self.b + self.w)

    @property
    def bubble(self) -> float:
        """Time that each rank idles."""
        return self.time - self.work

    @property
    def bubble_formula(self) -> float:
        """The report's, with B the full backward and F&B = F + B."""
        full = self.b + self.w
        n = self.schedule.num_stages
        if self.schedule.kind == "1f1b":
            return (n - 1) * (self.f + full)
        if self.schedule.kind == "zb1p":
            return (n - 1) * (self.f + full - 2 * self.w)
        return (n // 2 - 1) * ((self.f + full) + full - 3 * self.w)

    @property
    def activations(self) -> list[int]:
        """Each rank's peak of stage activations: those of a stage and micro-batch live from its F's start to its B's or W's end."""
        return [_peak(actions) for actions in self.schedule.actions]

    @property
    def activations_formula(self) -> int:
        """The report's bound on every rank, in activations of one stage; fewer micro-batches than that hold less."""
        return self.schedule.num_stages + (self.schedule.kind in ("dualpipe", "dualpipev"))


def _peak(actions: Sequence[Action]) -> int:
    held = peak = 0
    for action in actions:
        held += sum(part.op == "F" for part in action.parts)
        peak = max(peak, held)
        held -= sum(part.op in ("B", "W") for part in action.parts)
    return peak
