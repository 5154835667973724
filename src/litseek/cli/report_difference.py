"""How far an arm's loss is from another's, relative to it, over training (report §3.3, App. B.1's measure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from litseek.cli.report_figures import MUTED, SERIES, STYLE, panels
from litseek.errors import LitseekError

DECAY = 0.9
"""Of the average that smooths both curves, as in the report."""

Curves = Mapping[int, np.ndarray]
"""Seed -> one value a step."""


@dataclass
class Difference:
    """Of one arm, in percent of the reference's smoothed curve, from step ``first`` on."""

    arm: str
    first: int
    seeds: dict[int, np.ndarray]

    @property
    def largest(self) -> float:
        return max(float(np.abs(values).max()) for values in self.seeds.values())

    @property
    def last(self) -> list[float]:
        return [float(values[-1]) for values in self.seeds.values()]


def differences(curves: Mapping[str, Curves], reference: str, first: int) -> list[Difference]:
    """Arm by arm against the reference's run of the same seed; then the reference's own seeds against their mean, under
    the name "seeds of <reference>": what chance alone does."""
    if reference not in curves:
        raise LitseekError(f"against={reference} is no arm with finished runs; there are {', '.join(curves)}.")
    steps = min(len(values) for arm in curves.values() for values in arm.values())
    if not 0 <= first < steps:
        raise LitseekError(f"after={first} must be a step of the runs, which have {steps}.")
    smoothed = {arm: {seed: average(v[:steps]) for seed, v in seeds.items()} for arm, seeds in curves.items()}
    base, found = smoothed[reference], []
    for arm, seeds in smoothed.items():
        shared = [seed for seed in seeds if seed in base]
        if arm != reference and shared:
            percent = {seed: 100 * (seeds[seed] / base[seed] - 1)[first:] for seed in shared}
            found.append(Difference(arm, first, percent))
    if len(base) > 1:
        mean = np.mean(list(base.values()), axis=0)
        found.append(
            Difference(f"seeds of {reference}", first, {s: 100 * (v / mean - 1)[first:] for s, v in base.items()})
        )
    return found


def average(values: np.ndarray) -> np.ndarray:
    """Exponential average with weight 0.1 on the newest, started at the first value."""
    out = np.empty(len(values))
    for i, value in enumerate(values):
        out[i] = value if i == 0 else DECAY * out[i - 1] + (1 - DECAY) * value
    return out


def sentence(found: Sequence[Difference], column: str, reference: str, first: int) -> str:
    """What the figure shows, in numbers."""
    parts = []
    for difference in found:
        last = np.mean(difference.last)
        parts.append(f"`{difference.arm}` at most {difference.largest:.3f}%, at the end {last:+.3f}%")
    return (f"Relative difference of `{column}` to `{reference}` of the same seed, both smoothed by an average of {DECAY}, "
            f"after step {first}: {'; '.join(parts)}.")  # fmt: skip


def draw(found: Sequence[Difference], column: str, reference: str, limit: float | None = None) -> Figure:
    """One line a seed; the reference's own seeds in grey behind, and a line at +- ``limit`` percent."""
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = panels(1, height=3.6)
        tints = iter(SERIES)
        for difference in sorted(found, key=lambda d: not d.arm.startswith("seeds of ")):
            noise = difference.arm.startswith("seeds of ")
            tint = MUTED if noise else next(tints)
            for i, values in enumerate(difference.seeds.values()):
                steps = np.arange(difference.first, difference.first + len(values))
                width, alpha, name = (1.0, 0.6, difference.arm) if noise else (1.5, 1.0, difference.arm)
                ax.plot(steps, values, color=tint, linewidth=width, alpha=alpha, label=name if i == 0 else None)
        for edge in () if limit is None else (-limit, limit):
            ax.axhline(edge, color=MUTED, linewidth=1, linestyle=":")
        ax.axhline(0, color=MUTED, linewidth=0.8)
        ax.set(title=f"{column}: difference to {reference}", xlabel="steps", ylabel="percent")
        ax.legend(loc="upper right", ncols=3)
        return figure
