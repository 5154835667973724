"""`litseek report <folder>`: a run folder becomes one HTML page, an experiment folder a table and plots in its README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litseek.cli.report_arms import report_experiment
from litseek.cli.report_page import render
from litseek.cli.report_runs import is_stage, read_run


def run(cfg: Any) -> None:
    """`cfg.folder` is runs/<name> or experiments/<name>; `cfg.runs` is where an experiment's runs lie."""
    folder = Path(cfg.folder)
    experiment = any(folder.glob("*.yaml")) and not is_stage(folder)  # a stage's folder holds its config.yaml
    written = report_experiment(folder, Path(cfg.runs)) if experiment else [report_run(folder)]
    for path in written:
        print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


def report_run(folder: Path) -> Path:
    """Writes <folder>/report.html. Errors: no such folder, no stage in it, a damaged file in it."""
    page = render(folder.as_posix(), read_run(folder))
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
