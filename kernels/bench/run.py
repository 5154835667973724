"""Every op x shape x implementation on this machine: a table, and rows appended to results.csv.

    python kernels/bench/run.py [op ...] [--results FILE]

Each other file here offers ``rows()``, which yields {"op", "shape", "implementation", "ms", "value", "unit", "note"}: the
median time, and what it means (TFLOP/s, GB/s or GiB). A rival that is missing yields a row with a note and without
numbers; a file that fails becomes a row that says why, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.csv"
COLUMNS = ("op", "shape", "implementation", "ms", "value", "unit", "note", "gpu", "torch", "triton", "commit", "date")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", help=f"files of {HERE.name}/ without .py; none: all of {', '.join(names())}")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(argv)
    if unknown := sorted(set(given.ops) - set(names())):
        parser.error(f"{unknown[0]} is not in {HERE.name}/: there are {', '.join(names()) or 'none'}")
    if not has_gpu():
        parser.error("kernels are timed on a GPU, and torch finds none here")
    return run(given.ops, given.results)


def names(folder: Path = HERE) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if path.name != Path(__file__).name)


def run(ops: Sequence[str] = (), results: Path = RESULTS, folder: Path = HERE) -> int:
    """Measure, print and append; 1 if a file failed, else 0."""
    about = machine()
    failed = False
    found: list[dict[str, Any]] = []
    for name in ops or names(folder):
        fresh = []
        for row in measure(folder / f"{name}.py"):
            failed |= row.get("note", "").startswith("FAILED")
            print(line(row), flush=True)
            fresh.append(row | about)
        append(fresh, results)
        found += fresh
        free()
    show(found, about)
    return int(failed)


def measure(path: Path) -> Iterator[dict[str, Any]]:
    """The file's rows; an exception ends them with a row that names it."""
    sys.path[:0] = [p for p in (str(HERE.parent),) if p not in sys.path]  # litseek_kernels without an installation
    try:
        spec = importlib.util.spec_from_file_location(f"kernels_bench_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield from module.rows()
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        yield {"op": path.stem, "note": f"FAILED: {type(error).__name__}: {why}"}


def free() -> None:
    """What one file held is no memory that the next one lacks."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def append(rows: Sequence[dict[str, Any]], results: Path) -> None:
    """Rows at the end of the file, under its header."""
    if unknown := sorted({key for row in rows for key in row} - set(COLUMNS)):
        raise ValueError(f"a benchmark row has the key '{unknown[0]}': allowed are {', '.join(COLUMNS)}")
    fresh = not results.exists()
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows({key: rounded(value) for key, value in row.items()} for row in rows)


def line(row: dict[str, Any]) -> str:
    """One row as plain text, while the others are still running."""
    ms, value = row.get("ms"), row.get("value")
    number = "" if ms is None else f"{ms:.4f} ms"
    rate = "" if value is None else f"{value:.1f} {row.get('unit', '')}"
    cells = (row["op"], row.get("shape", ""), row.get("implementation", ""), number, rate, row.get("note") or "")
    return " | ".join(str(cell) for cell in cells)


def show(rows: Sequence[dict[str, Any]], about: dict[str, Any]) -> None:
    """A table, the fastest row of each shape in bold."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}")
    for column in COLUMNS[:7]:
        table.add_column(column, justify="right" if column in ("ms", "value") else "left")
    best: dict[tuple[Any, Any], float] = {}
    for row in rows:
        if row.get("ms") is not None:
            key = row["op"], row.get("shape")
            best[key] = min(best.get(key, row["ms"]), row["ms"])
    for row in rows:
        cells = [str(rounded(row.get(column))) if row.get(column) is not None else "" for column in COLUMNS[:7]]
        fastest = row.get("ms") is not None and row["ms"] == best[row["op"], row.get("shape")]
        table.add_row(*cells, style="bold" if fastest else "")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine() -> dict[str, str]:
    import torch
    import triton

    git = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], cwd=HERE, capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": git.stdout.strip(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
