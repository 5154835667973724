"""The report's plots, drawn with matplotlib and handed back as SVG text or PNG files. No global pyplot state."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from litseek.cli.report_runs import StageRun

INK, MUTED, GRID, PAPER = "#1f2a37", "#6b7683", "#e6e8eb", "#ffffff"
COLOURS = {
    "pretrain": "#3d5a98",
    "context_32k": "#2b86a6",
    "context_128k": "#2a9d83",
    "sft": "#d29022",
    "grpo": "#c4553b",
}
SERIES = ("#3d5a98", "#c4553b", "#2a9d83", "#d29022", "#7a5ba6", "#2b86a6", "#8c6d46", "#6b7683")
ARMS = {"old frequencies": MUTED, "yarn untrained": "#d29022", "yarn trained": "#2a9d83"}
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "axes.edgecolor": "#b8bfc7",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "litseek",
}


def colour(name: str, index: int = 0) -> str:
    return COLOURS.get(name, SERIES[index % len(SERIES)])


def panels(count: int, width: float = 10.4, height: float = 2.9, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """`count` panels in rows of `columns`; sizes in inches."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(width, height * rows), layout="constrained", facecolor=PAPER)
    axes = list(np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel())
    for extra in axes[count:]:
        extra.set_visible(False)
    return figure, axes[:count]


def svg(figure: Figure, label: str) -> str:
    """The figure as an inline <svg>; `label` is what a screen reader says, and keeps ids apart on one page."""
    text = io.StringIO()
    salt = re.sub(r"\W+", "-", label).strip("-").lower()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        FigureCanvasSVG(figure)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    body = text.getvalue()[text.getvalue().index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(
        r'\bid="(figure|axes|patch|text|line2d|matplotlib\.axis|xtick|ytick|legend|PathCollection)_?\d*"', "", body
    )
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    return body.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def png(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=110, metadata={"Software": None})


def smooth(values: np.ndarray, horizon: float) -> np.ndarray:
    """Running average over about `horizon` points; over fewer at the start, so that it does not lag a steep fall."""
    out, average = np.empty(len(values)), 0.0
    for i, value in enumerate(values):
        average += (value - average) / min(max(horizon, 1), 1 + i / 5)
        out[i] = average
    return out


def thin(x: np.ndarray, y: np.ndarray, most: int = 600) -> tuple[np.ndarray, np.ndarray]:
    keep = np.unique(np.linspace(0, len(x) - 1, min(most, len(x))).round().astype(int))
    return x[keep], y[keep]


def curve(axes: Axes, x: np.ndarray, y: np.ndarray, tint: str, label: str | None = None) -> None:
    """Raw values faintly, their running average on top."""
    axes.plot(*thin(x, y), color=tint, alpha=0.28, linewidth=0.9)
    axes.plot(*thin(x, smooth(y, max(len(y) / 25, 5))), color=tint, linewidth=2, label=label)


def loss_curves(runs: Sequence[StageRun], column: Sequence[str]) -> Figure:
    with matplotlib.rc_context(STYLE):
        columns = 2 if len(runs) in (2, 4) else 3
        figure, axes = panels(len(runs), height=2.7, columns=columns)
        for i, (run, ax) in enumerate(zip(runs, axes, strict=True)):
            steps, tokens, values = run.column(*column) or (np.zeros(0), np.zeros(0), np.zeros(0))
            by_tokens = len(tokens) > 0 and bool(np.isfinite(tokens).all())
            curve(ax, tokens if by_tokens else steps, values, colour(run.name, i))
            ax.set(title=run.label, xlabel="tokens" if by_tokens else "steps")
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.xaxis.set_major_locator(MaxNLocator(5))
            if len(values) > 20:  # the first steps' fall would flatten everything after it
                late = values[len(values) // 20 :]
                room = 0.05 * (late.max() - late.min() or 1)
                ax.set_ylim(late.min() - room, late.max() + room)
            if i % columns == 0:
                ax.set_ylabel("loss, nats a token")
        return figure


def bits_per_byte(rows: Sequence[tuple[str, str, float, dict[str, float]]]) -> Figure:
    """One bar a stage and a mark a compressor. Rows: (stage name, label, bits per byte, compressor -> bits per byte)."""
    marks = {"gzip -9": (INK, "-"), "xz -9e": (INK, (0, (2, 1.2)))}
    one_text = all(others == rows[0][3] for *_, others in rows)  # the same held-out bytes in every stage
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(10.4, (0.6 if one_text else 0.75) * len(rows) + 1.1), layout="constrained", facecolor=PAPER
        )
        ax = figure.subplots()
        for y, (name, _, value, others) in enumerate(rows):
            ax.barh(y, value, color=colour(name, y), height=0.58)
            ax.text(value * 0.985, y, f"{value:.3f}", va="center", ha="right", color="white", fontweight="bold")
            for other, bits in others.items():
                tint, dash = marks.get(other, (MUTED, ":"))
                label = (f"{other}: {bits:.3f}" if one_text else other) if y == 0 else None
                ax.plot([bits, bits], [y - 0.4, y + 0.4], color=tint, linestyle=dash, linewidth=2, label=label)
                if not one_text:
                    side = "right" if bits == min(others.values()) else "left"
                    ax.text(bits, y + 0.44, f"{bits:.3f} ", ha=side, va="top", fontsize=8, color=MUTED)
        ax.set_yticks(range(len(rows)), [label for _, label, _, _ in rows])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set(xlabel="bits per byte of held-out text (lower is better)", xlim=(0, None))
        ax.spines["left"].set_visible(False)
        ax.tick_params(left=False)
        if any(others for _, _, _, others in rows):
            ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderaxespad=0.2)
        return figure


def by_position(rows: Sequence[tuple[StageRun, np.ndarray, dict[str, np.ndarray], float | None]], unit: str) -> Figure:
    """A row a context stage: loss along the context, and its difference from the first arm's, in which the text's own
    ups and downs cancel. Rows: (run, positions, arm -> loss, old length)."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(2 * len(rows), height=3.0, columns=2)
        for (run, positions, arms, old), left, right in zip(rows, axes[::2], axes[1::2], strict=True):
            base = next(iter(arms.values()))
            for i, (arm, values) in enumerate(arms.items()):
                tint = ARMS.get(arm, SERIES[i % len(SERIES)])
                look: dict[str, Any] = {
                    "linewidth": 3.6 if i == 0 else 1.8,
                    "alpha": 0.6 if i == 0 else 1,
                    "color": tint,
                }
                left.plot(positions, values, label=arm, **look)
                right.plot(*stretches(positions, values - base), **look)
            for ax in (left, right):
                if old is not None and old < positions[-1]:
                    ax.axvline(old, color=INK, linewidth=1, linestyle=(0, (3, 3)))
                    ax.annotate(f"trained before: {old:g}", (old, 1), (0, 3), ("data", "axes fraction"), "offset points",
                                ha="center", va="bottom", fontsize=8.5, color=MUTED)  # fmt: skip
                ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            left.set(title=run.label, ylabel=f"loss, {unit}")
            right.set_ylabel(f"minus {next(iter(arms))}")
        for ax in axes[-2:]:
            ax.set_xlabel("position in the context, tokens")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        return figure


def stretches(x: np.ndarray, y: np.ndarray, most: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most `most` neighbouring stretches."""
    parts = min(most, len(x))
    return tuple(np.array([part.mean() for part in np.array_split(values, parts)]) for values in (x, y))  # type: ignore[return-value]


def expert_load(routing: dict[str, tuple[np.ndarray, np.ndarray]], most: int = 6) -> Figure:
    """Each expert's share of its layer's tokens over time, 1 = an even share; evenly chosen layers when many."""
    names = list(routing)
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(most, len(names))).round().astype(int))]
    with matplotlib.rc_context(STYLE):
        experts = max(routing[name][1].shape[1] for name in chosen)
        columns = 4 if len(chosen) == 4 else 3
        figure, axes = panels(len(chosen), height=2.0 + min(experts, 64) / 24, columns=columns)
        image = None
        for i, (name, ax) in enumerate(zip(chosen, axes, strict=True)):
            steps, load_NE = routing[name]
            share = load_NE / np.maximum(load_NE.mean(axis=1, keepdims=True), 1e-9)
            keep = np.unique(np.linspace(0, len(steps) - 1, min(240, len(steps))).round().astype(int))
            edges = (steps[0], steps[-1] if len(steps) > 1 else steps[0] + 1, share.shape[1] - 0.5, -0.5)
            image = ax.imshow(share[keep].T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, extent=edges,
                              interpolation="nearest")  # fmt: skip
            ax.grid(visible=False)
            ax.set(title=name, xlabel="steps")
            ax.yaxis.set_major_locator(MaxNLocator(min(8, share.shape[1]), integer=True))
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if i % columns == 0:
                ax.set_ylabel("expert")
        assert image is not None
        bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.015, aspect=22)
        bar.set_label("load, 1 = an even share")
        bar.outline.set_visible(False)  # type: ignore[operator]
        return figure


def imbalance(runs: Sequence[StageRun]) -> Figure:
    """The busiest expert's load over the mean one, per layer, over time; one panel a stage, one scale for all."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(runs), height=2.3)
        tops = []
        names = max((list(run.routing) for run in runs), key=len)
        shades = dict(zip(names, matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(names))), strict=True))
        for i, (run, ax) in enumerate(zip(runs, axes, strict=True)):
            for name, (steps, load_NE) in run.routing.items():
                tint = shades.get(name, MUTED)
                ratio = load_NE.max(axis=1) / np.maximum(load_NE.mean(axis=1), 1e-9)
                tops.append(ratio.max())
                ax.plot(*thin(steps, ratio), "o-" if len(steps) < 3 else "-", color=tint, linewidth=1.5, label=name)
            ax.axhline(1, color=INK, linewidth=1, linestyle=(0, (3, 3)))
            ax.set(title=run.label, xlabel="steps")
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if i % 3 == 0:
                ax.set_ylabel("max / mean load")
        for ax in axes:
            ax.set_ylim(0.9, 1.05 * max(tops))
        if len(runs[0].routing) <= 8:
            handles, labels = axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=8)
        return figure


def reward(run: StageRun, columns: Sequence[str], evaluations: Sequence[str]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure, (ax,) = panels(1, width=6.2, height=3.2)
        steps, _, values = run.column(*columns) or (np.zeros(0), np.zeros(0), np.zeros(0))
        curve(ax, steps, values, colour(run.name), "reward of the rollouts (mean)")
        checked = run.column(*evaluations)
        if checked is not None:
            ax.plot(checked[0], checked[2], "o-", color=INK, markersize=5, linewidth=1, label="held-out accuracy")
        ax.set(xlabel="steps", ylabel="share of right answers")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
        return figure


def accuracy(rows: Sequence[tuple[str, str, float, float | None]]) -> Figure:
    """Held-out accuracy along the lineage. Rows: (stage name, label, accuracy in 0..1, half-width or None)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 3.2), layout="constrained", facecolor=PAPER)
        ax = figure.subplots()
        for x, (name, _, value, spread) in enumerate(rows):
            ax.bar(x, 100 * value, color=colour(name, x), width=0.62)
            if spread is not None:
                ax.errorbar(x, 100 * value, 100 * spread, color=INK, capsize=4, linewidth=1.2)
            ax.text(x, 100 * (value + (spread or 0)) + 1.5, f"{100 * value:.1f}", ha="center", fontweight="bold")
        top = max(100 * (value + (spread or 0)) for _, _, value, spread in rows)
        ax.set_xticks(range(len(rows)), [label for _, label, _, _ in rows])
        ax.set(ylabel="right answers, %", ylim=(0, min(112.0, 1.18 * top + 6)))
        ax.grid(axis="x", visible=False)
        return figure
