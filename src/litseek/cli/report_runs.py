"""What a run folder holds, read back: receipts, metrics.csv, routing, samples, loss by position."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from litseek.errors import LitseekError

STAGES = ("pretrain", "context_32k", "context_128k", "sft", "grpo")
"""The lineage's order. Folders of other names follow, by name."""
LABELS = {
    "pretrain": "Pre-training",
    "context_32k": "Context 32K",
    "context_128k": "Context 128K",
    "sft": "SFT",
    "grpo": "GRPO",
}


@dataclass
class StageRun:
    """One ``<run_dir>/<stage>`` folder; ``receipt`` is empty while the stage is unfinished."""

    name: str
    folder: Path
    receipt: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, np.ndarray] = field(default_factory=dict)
    """Column of metrics.csv -> values, NaN where a row has none."""
    routing: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Layer -> (steps (N,), load (N, E) in tokens)."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    by_position: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        return LABELS.get(self.name, self.name)

    @property
    def results(self) -> dict[str, float]:
        """The receipt's flat metrics."""
        return self.receipt.get("metrics") or {}

    def column(self, *names: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """(steps, tokens, values) of the first column that exists, rows without a value left out."""
        for name in names:
            values = self.metrics.get(name)
            if values is None:
                continue
            keep = np.isfinite(values)
            if keep.any():
                nothing = np.full(len(values), np.nan)
                steps, tokens = (self.metrics.get(axis, nothing)[keep] for axis in ("step", "tokens"))
                return steps, tokens, values[keep]
        return None


def read_run(folder: Path) -> list[StageRun]:
    """All stages of a run folder, in the lineage's order. Errors: no folder, or no stage in it."""
    if not folder.is_dir():
        raise LitseekError(f"{folder}: no such folder; give a run folder such as runs/demo or experiments/<name>.")
    if is_stage(folder):
        return [read_stage(folder)]
    found = {path.name: path for path in sorted(folder.iterdir()) if is_stage(path) and path.suffix != ".replaced"}
    if not found:
        names = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
        raise LitseekError(f"{folder}: no stage with a receipt.json or metrics.csv in it, found {names}.")
    order = [name for name in STAGES if name in found] + [name for name in found if name not in STAGES]
    return [read_stage(found[name]) for name in order]


def is_stage(folder: Path) -> bool:
    return (folder / "receipt.json").is_file() or (folder / "metrics.csv").is_file()


def read_stage(folder: Path) -> StageRun:
    run = StageRun(folder.name, folder)
    run.receipt = read_json(folder / "receipt.json") or {}
    run.metrics = read_metrics(folder / "metrics.csv")
    run.routing = read_routing(folder / "routing.jsonl")
    run.samples = read_jsonl(folder / "samples.jsonl")
    run.by_position = read_json(folder / "loss_by_position.json")
    return run


def read_json(path: Path) -> dict[str, Any] | None:
    """The file's object, None when there is no file. Errors: not JSON, or no object."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LitseekError(f"{path}: not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise LitseekError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise LitseekError(f"{path}, line {number}: not JSON ({error}).") from error
    return rows


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Columns of metrics.csv as float arrays; columns without any number are left out."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = list(reader.fieldnames or [])
        rows = list(reader)
    columns = {}
    for name in names:
        values = np.array([number(row.get(name)) for row in rows], dtype=np.float64)
        if np.isfinite(values).any():
            columns[name] = values
    return columns


def number(text: Any) -> float:
    """The number in a cell, NaN for an empty or textual one."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return math.nan
    return value


def read_routing(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """routing.jsonl as layer -> (steps, loads). A step that appears twice (a resumed run) counts once, the later."""
    rows: dict[str, dict[int, list[float]]] = {}
    for row in read_jsonl(path):
        try:
            rows.setdefault(layer_label(row["layer"]), {})[int(row["step"])] = row["load"]
        except KeyError as error:
            raise LitseekError(f"{path}: a row needs step, layer and load, found only {sorted(row)}.") from error
    table = {}
    for layer, loads in sorted(rows.items(), key=lambda item: layer_key(item[0])):
        steps = np.array(sorted(loads))
        table[layer] = (steps, np.array([loads[step] for step in sorted(loads)], dtype=np.float64))
    return table


def layer_label(layer: Any) -> str:
    """``layers.3.dispatch`` -> ``layer 3``, ``mtp.0.block.dispatch`` -> ``MTP 0``."""
    parts = str(layer).split(".")
    if parts[0] == "layers" and len(parts) > 1:
        return f"layer {parts[1]}"
    if parts[0] == "mtp" and len(parts) > 1:
        return f"MTP {parts[1]}"
    return f"layer {layer}" if isinstance(layer, int) else str(layer)


def layer_key(label: str) -> tuple[int, int, str]:
    kind, _, index = label.partition(" ")
    return (int(kind != "layer"), int(index) if index.isdigit() else 0, label)
