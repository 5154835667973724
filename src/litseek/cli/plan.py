"""`litseek plan`: what a pipeline schedule costs before anything runs (report §3.2.1)."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from litseek.cli.errors import Usage
from litseek.cli.plan_picture import counted, draw
from litseek.parallel.schedule import KINDS, make_schedule
from litseek.parallel.timeline import EXACT, Timeline


def run(cfg: DictConfig) -> None:
    """Print bubble and activations; write the events to `out` and their picture beside it."""
    line = timeline(cfg)
    print("\n".join(summary(line)))
    Console(width=100).print(per_rank(line))
    if cfg.out is not None:
        file, picture = outputs(cfg)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            "[\n" + ",\n".join(json.dumps(event.as_dict()) for event in line.events) + "\n]\n", encoding="utf-8"
        )
        draw(line, picture)
        print(f"{file}: {len(line.events)} events; {picture}: their picture.")


def check(cfg: DictConfig) -> None:
    """Kind, numbers and file, before any output."""
    timeline(cfg)
    if cfg.out is not None:
        outputs(cfg)


def timeline(cfg: DictConfig) -> Timeline:
    """The configured schedule and times. Raises Usage and ValueError."""
    if cfg.kind not in KINDS:
        raise Usage.nearest(f"kind={cfg.kind} is not a schedule", str(cfg.kind), KINDS)
    for key in ("ranks", "microbatches"):
        if type(cfg[key]) is not int or cfg[key] < 1:
            raise Usage(f"{key}={cfg[key]} must be an integer of at least 1.")
    for key in ("f", "b", "w"):
        if type(cfg[key]) not in (int, float):
            raise Usage(f"{key}={cfg[key]} is not a number.")
    return Timeline(make_schedule(cfg.kind, cfg.ranks, cfg.microbatches), cfg.f, cfg.b, cfg.w)


def outputs(cfg: DictConfig) -> tuple[Path, Path]:
    """The JSON file and the picture beside it."""
    file = Path(cfg.out).expanduser()
    if file.is_dir() or file.suffix == ".png":
        raise Usage(
            f"out={cfg.out} must name a file for the JSON list, such as timeline.json; the picture is its .png."
        )
    return file, file.with_suffix(".png")


def summary(line: Timeline) -> list[str]:
    """What was planned, then bubble and activations beside the report's formulas."""
    s = line.schedule
    both = ", half of them from each end" if s.kind == "dualpipe" else ""
    lines = [
        f"{s.kind}: {counted(s.ranks, 'rank')}, {counted(s.num_stages, 'stage')}, {counted(s.micros, 'micro-batch', 'es')}{both}; "
        f"f={line.f:g} b={line.b:g} w={line.w:g}",
        f"time {line.time:g}, of which each rank computes {line.work:g}",
        f"bubble {100 * line.bubble / line.time:.1f}%: {line.bubble:g} of {line.time:g}; the report's formula gives {line.bubble_formula:g}",
    ]
    if abs(line.bubble - line.bubble_formula) > 1e-9 * line.time:
        lines[-1] += f" (exact for {EXACT[s.kind]})"
    peak = max(line.activations)
    return [
        *lines,
        f"peak activations {peak} of one stage and micro-batch, {peak / s.num_stages:.2f} micro-batches through the whole "
        f"model; the report's formula gives {line.activations_formula}",
    ]


def per_rank(line: Timeline) -> Table:
    s = line.schedule
    table = Table("rank", "stages", "peak activations", "idle before its first action", "after its last", box=None)
    for rank, peak in enumerate(line.activations):
        mine = [event for event in line.events if event.rank == rank]
        stages = sorted({part.stage for event in mine for part in event.parts})
        cells = (rank, " ".join(map(str, stages)), peak, f"{mine[0].start:g}", f"{line.time - mine[-1].end:g}")
        table.add_row(*map(str, cells))
    if s.kind == "dualpipe":
        table.caption = (
            "of the two stages, counted along a micro-batch's own direction, a rank has each for one direction"
        )
    return table
