"""metrics.csv of a stage: one row a step, a column for every metric that was ever logged."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsCSV(Logger):
    """Appends to ``<folder>/metrics.csv`` and flushes each row; numbers are written so that they read back equal.

    Metrics logged for the same step share a row. A metric that is new adds a column: the file is then written anew
    under a temporary name. What an earlier process left is kept up to the step before the first one logged here, and
    a last line that it could not finish is dropped, so that a resumed run leaves the file of an uninterrupted one.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None
        self._row: dict[str, str] = {}
        self._offset = 0

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved config lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        cells = {key: _cell(value) for key, value in metrics.items() if key not in ("epoch", "step")}
        cells = {"step": str(step or 0), **cells}
        if self._columns is None:
            self._open(step or 0)
        assert self._columns is not None
        if cells["step"] == self._row.get("step"):
            cells = self._row | cells
        else:
            self._offset = self.path.stat().st_size
        self._row = cells
        new = [key for key in cells if key not in self._columns]
        if new:
            self._widen(new)
        self._write_last()

    def _open(self, step: int) -> None:
        """Take over the file: rows before ``step`` stay."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        columns, rows = read(self.path)
        self._columns = columns or ["step"]
        self._rewrite([row for row in rows if int(float(row["step"])) < step])

    def _widen(self, new: list[str]) -> None:
        assert self._columns is not None
        _, rows = read(self.path)
        if rows and rows[-1]["step"] == self._row["step"]:
            rows.pop()
        self._columns += new
        self._rewrite(rows)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        assert self._columns is not None
        temporary = self.path.with_name(self.path.name + ".tmp")
        header = dict(zip(self._columns, self._columns))
        temporary.write_text("".join(self._line(row) for row in [header, *rows]), encoding="utf-8", newline="")
        os.replace(temporary, self.path)
        self._offset = self.path.stat().st_size

    def _write_last(self) -> None:
        """The current row, in place of what was written of it before: a kill in between costs that row at most."""
        line = self._line(self._row).encode()
        with self.path.open("r+b") as out:
            out.seek(self._offset)
            out.write(line)
            out.truncate()

    def _line(self, row: dict[str, str]) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerow([row.get(key, "") for key in self._columns or ()])
        return out.getvalue()


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of a metrics file; a line that was never finished is left out. Nothing for no file."""
    if not path.exists():
        return [], []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(whole)))
    if not lines or "step" not in lines[0]:
        return [], []
    columns = lines[0]
    return columns, [dict(zip(columns, line)) for line in lines[1:] if len(line) == len(columns) and line[0]]


def _cell(value: Any) -> str:
    number = float(value)
    return str(int(number)) if number.is_integer() and abs(number) < 2**53 else repr(number)
