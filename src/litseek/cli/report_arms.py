"""An ablation's results: runs of arms x seeds become results.csv, plots and a table in the experiment's README."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from litseek.cli.report_difference import differences, draw, sentence
from litseek.cli.report_figures import MUTED, SERIES, STYLE, panels, png, smooth
from litseek.cli.report_page import device, duration, short, unique, versions, wall
from litseek.cli.report_runs import StageRun, read_run
from litseek.errors import LitseekError

BEGIN = re.compile(r"<!-- results:begin(?P<options>[^>]*?)-->")
END = "<!-- results:end -->"
MOST = 8
"""Columns a table shows when the README names none."""
LIMIT = 0.25
"""Percent: the report's bound on FP8's relative loss error (§3.3)."""
UNITS = {
    "loss": "nats a token",
    "loss/main": "nats a token",
    "routing/max_over_mean": "1 = an even share",
    "val/bits_per_byte": "bits per byte",
}


@dataclass
class Arm:
    """One arm and its finished runs: seed -> the run's last stage."""

    name: str
    seeds: dict[int, StageRun]

    def values(self, metric: str) -> list[float]:
        return [value for run in self.seeds.values() if (value := outcome(run, metric)) is not None]


def report_experiment(folder: Path, runs: Path) -> list[Path]:
    """Writes results.csv, metrics.png, curves.png and the README's table. `runs` holds <folder>/<arm>/seed=<n>/<stage>.

    The README's own mark says what to show: `<!-- results:begin metrics=a,b curves=c -->`. Without `metrics=` the table
    has the receipts' metrics, without `curves=` the loss is drawn. `against=<arm>` adds the first curve's relative
    difference to that arm, `after=<step>` leaves the warm-up out of it.
    """
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    mark = BEGIN.search(text)
    if mark is None or END not in text[mark.end() :]:
        raise LitseekError(f"{readme}: the lines '<!-- results:begin -->' and '{END}' say where results go; add both.")
    options = parse_options(mark["options"], readme)
    arms, waiting = read_arms(folder, runs)
    metrics = options.get("metrics") or common_metrics(arms)
    for metric in metrics:
        if not any(arm.values(metric) for arm in arms):
            raise LitseekError(
                f"{readme}: metrics={metric} is in no run; there are {', '.join(common_metrics(arms, 99))}."
            )
    written = [write_csv(folder / "results.csv", arms, metrics)]
    body = [table(arms, metrics), "", note(folder, arms, waiting)]
    png(dots(arms, metrics), folder / "metrics.png")
    written.append(folder / "metrics.png")
    body += ["", f"![{', '.join(metrics)} by arm, one dot a seed](metrics.png)"]
    curves = [c for c in options.get("curves") or ["loss"] if any(r.column(c) for a in arms for r in a.seeds.values())]
    if curves:
        png(lines(arms, curves), folder / "curves.png")
        written.append(folder / "curves.png")
        body += ["", f"![{', '.join(curves)} over training, mean and range of the seeds](curves.png)"]
    if "against" in options:
        (reference,), column = options["against"], (curves or ["loss"])[0]
        first = int(options.get("after", ["0"])[0])
        seeds = {arm.name: {s: c[2] for s, r in arm.seeds.items() if (c := r.column(column))} for arm in arms}
        found = differences(seeds, reference, first)
        png(draw(found, column, reference, LIMIT), folder / "difference.png")
        written.append(folder / "difference.png")
        body += [
            "",
            sentence(found, column, reference, first),
            "",
            f"![{column} relative to {reference}](difference.png)",
        ]
    end = text.index(END, mark.end())
    readme.write_text(text[: mark.end()] + "\n" + "\n".join(body) + "\n" + text[end:], encoding="utf-8")
    return [*written, readme]


def parse_options(text: str, readme: Path) -> dict[str, list[str]]:
    options = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if (
            not equals
            or key not in ("metrics", "curves", "against", "after")
            or (key == "after" and not value.isdigit())
        ):
            raise LitseekError(
                f"{readme}: results:begin takes metrics=…, curves=…, against=<arm> and after=<step>, found '{word}'."
            )
        options[key] = [name for name in value.split(",") if name]
    return options


def read_arms(folder: Path, runs: Path) -> tuple[list[Arm], list[str]]:
    """(arms with at least one finished run, in the order of their files; runs that are not finished)."""
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if not names:
        raise LitseekError(f"{folder}: no arm in it; an arm is a YAML file of its overrides.")
    arms, waiting = [], []
    for name in names:
        seeds = {}
        for path in sorted((runs / folder.name / name).glob("seed=*"), key=lambda p: seed_of(p)):
            stage = read_run(path)[-1] if any(path.iterdir()) else None
            if stage is not None and stage.receipt:
                seeds[seed_of(path)] = stage
            else:
                waiting.append(f"{name} {path.name}")
        if seeds:
            arms.append(Arm(name, seeds))
        else:
            waiting.append(name)
    if not arms:
        where = runs / folder.name
        raise LitseekError(
            f"{where}: no finished run of {', '.join(names)}; first run {command(folder, names, [0, 1, 2])}"
        )
    return arms, waiting


def seed_of(path: Path) -> int:
    text = path.name.removeprefix("seed=")
    if not text.isdigit():
        raise LitseekError(f"{path}: expected a folder seed=<number>.")
    return int(text)


def outcome(run: StageRun, metric: str) -> float | None:
    """The receipt's figure, else the mean over the last fifth of metrics.csv's column."""
    if metric in run.results:
        return float(run.results[metric])
    column = run.column(metric)
    if column is None:
        return None
    values = column[2]
    return float(values[-max(1, len(values) // 5) :].mean())


def common_metrics(arms: Sequence[Arm], most: int = MOST) -> list[str]:
    receipts = [run.results for arm in arms for run in arm.seeds.values()]
    return [name for name in receipts[0] if all(name in results for results in receipts)][:most]


def write_csv(path: Path, arms: Sequence[Arm], metrics: Sequence[str]) -> Path:
    """One row a run, every metric of its receipt and of the table."""
    every = unique([*metrics, *(name for arm in arms for run in arm.seeds.values() for name in run.results)])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "seed", "stage", *every, "tokens", "wall_s", "config", "commit"])
        for arm in arms:
            for seed, run in arm.seeds.items():
                values = [outcome(run, name) for name in every]
                tail = [
                    run.receipt.get("tokens"),
                    wall(run.receipt),
                    run.receipt.get("config"),
                    run.receipt.get("commit"),
                ]
                cells = ["" if value is None else f"{value:.6g}" for value in values]
                writer.writerow([arm.name, seed, run.name, *cells, *tail])
    return path


def table(arms: Sequence[Arm], metrics: Sequence[str]) -> str:
    """Markdown: one row an arm, mean ± sample standard deviation over its seeds."""
    rows = [["arm", "seeds", *metrics]]
    for arm in arms:
        rows.append([f"`{arm.name}`", str(len(arm.seeds)), *(mean_spread(arm.values(metric)) for metric in metrics)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def mean_spread(values: Sequence[float]) -> str:
    """`1.234 ± 0.005`, with digits that fit the spread; without a spread for one seed."""
    if not values:
        return "–"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    digits = min(6, max(0, 1 - math.floor(math.log10(spread)))) if spread > 0 else 4
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def note(folder: Path, arms: Sequence[Arm], waiting: Sequence[str]) -> str:
    """Where the numbers come from: spread, hardware, versions, commit, command."""
    receipts = [run.receipt for arm in arms for run in arm.seeds.values()]
    seeds = sorted({seed for arm in arms for seed in arm.seeds})
    parts = ["Mean ± standard deviation over seeds at the end of training; what only the training log holds is the mean "
             "of its last fifth."]  # fmt: skip
    if waiting:
        parts.append(f"Not finished: {', '.join(waiting)}.")
    total = duration(sum(wall(r) or 0 for r in receipts))
    parts.append(f"{len(receipts)} runs, {total} in all, on {', '.join(unique(map(device, receipts))) or 'unknown hardware'}; "
                 f"{'; '.join(unique(map(versions, receipts)))}; "
                 f"commit {', '.join(short(c) for c in unique(r.get('commit') for r in receipts)) or 'unknown'}.")  # fmt: skip
    run = command(folder, [arm.name for arm in arms], seeds)
    return " ".join(parts) + f"\n\n```\n{run}\nlitseek report experiments/{folder.name}\n```"


def command(folder: Path, arms: Sequence[str], seeds: Sequence[int]) -> str:
    chosen = ",".join(f"{folder.name}/{name}" for name in arms)
    return f"litseek train -m experiment={chosen} seed={','.join(map(str, seeds))}"


def dots(arms: Sequence[Arm], metrics: Sequence[str]) -> Figure:
    """One panel a metric, one dot a seed, a bar at the mean."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(metrics), height=0.95 + 0.42 * len(arms))
        for i, (metric, ax) in enumerate(zip(metrics, axes, strict=True)):
            for y, arm in enumerate(arms):
                values = arm.values(metric)
                tint = SERIES[y % len(SERIES)]
                ax.plot(values, [y] * len(values), "o", color=tint, markersize=6, alpha=0.75, markeredgewidth=0)
                if values:
                    ax.plot([np.mean(values)] * 2, [y - 0.28, y + 0.28], color=tint, linewidth=2.5)
            ax.set_yticks(range(len(arms)), [arm.name for arm in arms] if i % 3 == 0 else [""] * len(arms))
            ax.set(title=metric, ylim=(len(arms) - 0.5, -0.5))
            ax.xaxis.set_major_locator(MaxNLocator(4))
            ax.grid(axis="y", visible=False)
        return figure


def lines(arms: Sequence[Arm], columns: Sequence[str]) -> Figure:
    """One panel a column of metrics.csv: an arm's mean over its seeds, and their range."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panels(len(columns), height=3.3, columns=2)
        for column, ax in zip(columns, axes, strict=True):
            late: list[np.ndarray] = []
            for i, arm in enumerate(arms):
                found = [c for run in arm.seeds.values() if (c := run.column(column)) is not None]
                if not found:
                    continue
                length = min(len(values) for _, _, values in found)
                steps, tokens, _ = found[0]
                by_tokens = bool(np.isfinite(tokens[:length]).all())
                x = (tokens if by_tokens else steps)[:length]
                y = np.array([smooth(values[:length], length / 25) for _, _, values in found])
                tint = SERIES[i % len(SERIES)]
                ax.fill_between(x, y.min(axis=0), y.max(axis=0), color=tint, alpha=0.18, linewidth=0)
                ax.plot(x, y.mean(axis=0), color=tint, linewidth=1.8, label=arm.name)
                ax.set_xlabel("tokens" if by_tokens else "steps")
                late.append(y[:, length // 20 :])
            low, high = min(y.min() for y in late), max(y.max() for y in late)
            ax.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
            ax.set(title=column, ylabel=UNITS.get(column, ""))
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
            ax.xaxis.label.set_color(MUTED)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6)
        return figure
