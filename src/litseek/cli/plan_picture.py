"""A schedule as a picture like figure 5 of the report: ranks are rows, time runs right, micro-batch numbers in boxes."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from litseek.cli.report_figures import INK, MUTED, PAPER, STYLE
from litseek.parallel.schedule import Part
from litseek.parallel.timeline import Event, Timeline

COLOURS = {"F": "#f2c14e", "B": "#5b9f6d", "I": "#5aa9c9", "W": "#9b8ac4"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, input half", "W": "backward, weight half"}
DOTS = 150
"""An inch."""
LATER = 0.45
"""How much paler the second lane is: the stage nearer to the model's end, or direction 1."""


def draw(line: Timeline, file: Path) -> None:
    """Write a PNG. Boxes are numbered as long as the numbers fit; a long schedule's boxes are narrower."""
    s = line.schedule
    shortest = min(_widths(line))
    width = min(max(0.2 * line.time / shortest, 9), 60)  # inches; 60 at 100 dots each is what a viewer opens
    per_unit = 72 * width / line.time
    row = 34 if s.ranks <= 16 else 20
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(width + 1.0, s.ranks * row / 72 + 1.3), dpi=DOTS, facecolor=PAPER, layout="constrained"
        )
        axes = figure.add_subplot()
        for event in line.events:
            _box(axes, line, event, per_unit, row)
        axes.set(xlim=(0, line.time), ylim=(s.ranks - 0.45, -0.55), xlabel="time", yticks=range(s.ranks))
        axes.set_yticklabels([f"rank {rank}" for rank in range(s.ranks)])
        axes.grid(False)
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_facecolor("#f3f4f6")
        share = 100 * line.bubble / line.time
        axes.set_title(
            f"{s.kind}: {counted(s.ranks, 'rank')}, {counted(s.num_stages, 'stage')}, "
            f"{counted(s.micros, 'micro-batch', 'es')}, bubble {share:.1f}%"
        )
        figure.legend(handles=_legend(line), loc="outside lower center", ncols=7 if width > 12 else 4)
        FigureCanvasAgg(figure).print_png(str(file))


def counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"


def _widths(line: Timeline) -> list[float]:
    return [event.end - event.start for event in line.events if event.end > event.start]


def _box(axes: Axes, line: Timeline, event: Event, per_unit: float, row: float) -> None:
    """One part fills the row; F&B stacks F over B within one border."""
    length, height = event.end - event.start, 0.86 / len(event.parts)
    for i, part in enumerate(event.parts):
        top = event.rank - 0.43 + i * height
        second = _second_lane(line, part)
        axes.add_patch(
            Rectangle(
                (event.start, top), length, height, facecolor=_colour(part.op, second), edgecolor=PAPER, linewidth=0.6
            )
        )
        text = str(part.micro)
        size = min(0.62 * height * row, 0.86 * per_unit * length / (0.64 * len(text)), 9)
        if size >= 3.5:
            axes.text(
                event.start + length / 2,
                top + height / 2,
                text,
                size=size,
                ha="center",
                va="center_baseline",
                color=INK,
            )
    if len(event.parts) > 1:
        axes.add_patch(
            Rectangle((event.start, event.rank - 0.43), length, 0.86, fill=False, edgecolor=INK, linewidth=0.9)
        )


def _second_lane(line: Timeline, part: Part) -> bool:
    s = line.schedule
    return bool(s.direction(part.micro)) or (s.kind == "dualpipev" and part.stage >= s.ranks)


def _colour(op: str, second: bool) -> tuple[float, float, float]:
    full = matplotlib.colors.to_rgb(COLOURS[op])
    return tuple(c + (1 - c) * LATER * second for c in full)  # type: ignore[return-value]


def _legend(line: Timeline) -> list[Patch]:
    ops = {part.op for event in line.events for part in event.parts}
    handles = [Patch(facecolor=colour, label=NAMES[op]) for op, colour in COLOURS.items() if op in ops]
    if any(len(event.parts) > 1 for event in line.events):
        handles.append(Patch(facecolor="none", edgecolor=INK, label="both at once"))
    if line.schedule.kind in ("dualpipe", "dualpipev"):
        label = "from the other end" if line.schedule.kind == "dualpipe" else "the rank's second stage"
        handles.append(Patch(facecolor=str(0.4 + 0.6 * LATER), label=f"pale: {label}"))
    return [*handles, Patch(facecolor="#f3f4f6", edgecolor=MUTED, linewidth=0.4, label="idle")]
