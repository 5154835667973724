"""How tokens spread over the experts of each layer (report §2.1.2, §4.5)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor


class RoutingStats(Callback):
    """Each layer's load of the global batch: every ``every`` steps into ``routing.jsonl``, as a summary into the log.

    Lines are ``{"step", "layer", "load": [tokens of each expert]}`` in the run's folder. Logged: the mean and the
    largest over layers of max/mean load (``routing/max_over_mean``, ``routing/worst_max_over_mean``; 1 is perfect),
    the mean entropy of the load as a share of log E (``routing/entropy``), and the share of experts that got nothing.
    When a run is resumed, lines after the restored step are dropped.
    """

    def __init__(self, every: int = 20, file: str = "routing.jsonl"):
        if every < 1:
            raise ValueError(f"callbacks.routing.every is {every}, it must be at least 1")
        self.every, self.file = every, file

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            keep_until(self._path(trainer), trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        result = pl_module.step_result
        step = trainer.global_step
        to_log = step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        to_file = step % self.every == 0 or step == 1
        if not result.loads or not (to_log or to_file):
            return
        sizes = [len(load) for load in result.loads.values()]
        fetched = torch.cat([load.detach() for load in result.loads.values()]).cpu().split(sizes)  # one wait for all
        loads = dict(zip(map(_layer, result.loads), fetched))
        if to_log:
            for name, value in summary(list(loads.values())).items():
                pl_module.log(f"routing/{name}", value)
        if to_file and trainer.is_global_zero:
            lines = (json.dumps({"step": step, "layer": n, "load": load.tolist()}) for n, load in loads.items())
            path = self._path(trainer)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as out:
                out.write("".join(line + "\n" for line in lines))

    def _path(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / self.file


def summary(loads: list[Tensor]) -> dict[str, float]:
    """Statistics over layers; each load is (E,) token counts. Layers that saw no token are left out."""
    rows = [load.double() for load in loads if load.sum() > 0]
    if not rows:
        return {}
    peaks = torch.stack([load.max() / load.mean() for load in rows])
    entropies = torch.stack([_entropy(load) for load in rows])
    idle = torch.stack([(load == 0).double().mean() for load in rows])
    return {
        "max_over_mean": float(peaks.mean()),
        "worst_max_over_mean": float(peaks.max()),
        "entropy": float(entropies.mean()),
        "idle_experts": float(idle.mean()),
    }


def keep_until(path: Path, step: int) -> None:
    """Drop the lines after ``step`` and a line that a killed process left half written."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    kept = [line for line in lines if (found := _step(line)) is not None and found <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _step(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _entropy(load: Tensor) -> Tensor:
    share = load / load.sum()
    if len(share) == 1:
        return torch.ones((), dtype=share.dtype)
    return torch.special.entr(share).sum() / torch.log(torch.tensor(float(len(share))))


def _layer(phase: str) -> str:
    """``layers.3.attend`` -> ``layers.3``."""
    return ".".join(phase.split(".")[:2])
