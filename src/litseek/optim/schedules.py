"""What follows a plan during training, as pure functions of steps and tokens (report §4.2): learning rate, batch, weights."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

SHAPES = ("constant", "linear", "cosine")


class LRSchedule:
    """Linear warm-up in steps, then phases measured in tokens or steps (report §4.2).

    ``phases`` is a list of ``{shape, length, to}``: shape "constant", "linear" or "cosine"; ``length`` in ``unit``
    ("tokens" or "steps"), absent = for ever (last phase only); ``to`` the absolute rate that the phase ends at, and
    for "constant" the rate that it holds (absent: the one before it). The first phase starts from ``peak`` at 0, so
    the warm-up lies inside it and multiplies it. Past the last phase its final rate holds.
    With a ``horizon`` (in ``unit``) lengths are shares of it, for runs whose phases should stretch with their size.
    """

    def __init__(
        self,
        peak: float,
        phases: Sequence[Mapping[str, Any]] = (),
        warmup_steps: int = 0,
        unit: str = "tokens",
        horizon: float | None = None,
    ):
        if unit not in ("tokens", "steps"):
            raise ValueError(f"optim.schedule.unit is '{unit}', allowed are 'tokens' and 'steps'")
        if horizon is not None and not horizon > 0:
            raise ValueError(f"optim.schedule.horizon is {horizon}, it must be above 0")
        if warmup_steps < 0:
            raise ValueError(f"optim.schedule.warmup_steps is {warmup_steps}, it must not be below 0")
        self.peak, self.warmup_steps, self.unit, self.horizon = peak, warmup_steps, unit, horizon
        self.phases: list[tuple[str, float, float]] = []  # shape, length in unit, final rate
        rate = peak
        for i, phase in enumerate(phases):
            shape, length, to = _phase(i, phase, last=i == len(phases) - 1)
            rate = rate if to is None else to
            self.phases.append((shape, length * (horizon or 1.0), rate))

    def lr(self, step: int, tokens: int) -> float:
        """Rate of the step that comes after ``step`` finished steps and ``tokens`` trained tokens; 0 at the very first
        step of a warm-up, ``peak`` after ``warmup_steps``."""
        warmup = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        at: float = tokens if self.unit == "tokens" else step
        rate = self.peak
        for shape, length, to in self.phases:
            if at < length:
                return warmup * _between(shape, rate, to, at / length)
            at, rate = at - length, to
        return warmup * rate


class BatchRamp:
    """Sequences in a global batch (report §4.2): from ``start`` to ``end`` over ``tokens``, then constant.

    The report gives no shape: ours is linear in tokens, rounded down to a multiple of ``multiple`` (the sequences that
    all ranks take at once).
    """

    def __init__(self, start: int, end: int, tokens: float, multiple: int = 1):
        for key, value in (("start", start), ("end", end)):
            if value < multiple or value % multiple:
                raise ValueError(f"batch.{key} is {value}, it must be a multiple of batch.multiple, {multiple}")
        if end < start:
            raise ValueError(f"batch.end is {end}, it must not be below batch.start, {start}")
        self.start, self.end, self.tokens, self.multiple = start, end, tokens, multiple

    def sequences(self, tokens: int) -> int:
        """Size of the batch that starts after ``tokens`` trained tokens."""
        if tokens >= self.tokens:
            return self.end
        size = self.start + (self.end - self.start) * tokens / self.tokens
        return int(size // self.multiple) * self.multiple


class Steps:
    """A number that changes at token counts: lambda of MTP (0.3, then 0.1 after 10T), the bias speed (0.001, 0 after
    14.3T) (report §4.2). ``values`` has one entry more than ``boundaries`` (tokens, rising)."""

    def __init__(self, values: Sequence[float], boundaries: Sequence[float] = ()):
        if len(values) != len(boundaries) + 1:
            raise ValueError(f"{len(values)} values need {len(values) - 1} boundaries, found {len(boundaries)}")
        if list(boundaries) != sorted(boundaries):
            raise ValueError(f"boundaries must rise, found {list(boundaries)}")
        self.values, self.boundaries = list(values), list(boundaries)

    def __call__(self, tokens: int) -> float:
        """The value for the step that starts after ``tokens`` trained tokens; a boundary already has the new one."""
        return self.values[bisect_right(self.boundaries, tokens)]


def _phase(i: int, phase: Mapping[str, Any], last: bool) -> tuple[str, float, float | None]:
    unknown = set(phase) - {"shape", "length", "to"}
    if unknown:
        raise ValueError(f"optim.schedule.phases[{i}] has the key '{min(unknown)}', allowed are shape, length, to")
    shape, length, to = phase.get("shape", "constant"), phase.get("length"), phase.get("to")
    if shape not in SHAPES:
        raise ValueError(f"optim.schedule.phases[{i}].shape is '{shape}', allowed are {', '.join(SHAPES)}")
    if shape != "constant" and to is None:
        raise ValueError(f"optim.schedule.phases[{i}].to is missing, a {shape} phase needs the rate that it ends at")
    if length is None and (shape != "constant" or not last):
        raise ValueError(f"optim.schedule.phases[{i}].length is missing, only a last constant phase may last for ever")
    if length is not None and not length > 0:
        raise ValueError(f"optim.schedule.phases[{i}].length is {length}, it must be above 0")
    return shape, math.inf if length is None else float(length), to


def _between(shape: str, start: float, end: float, share: float) -> float:
    if shape == "constant":
        return end
    if shape == "linear":
        return start + (end - start) * share
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
