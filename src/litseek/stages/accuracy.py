"""A stage's accuracy on held-out problems, summed over ranks; some of the answers go to samples.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from litseek.parallel.storage import replace_text


def judge(stage: Any, accuracy: Any) -> dict[str, float]:
    """``eval/accuracy`` and what goes with it, equal on all ranks."""
    strategy = stage.strategy
    with stage.generating() as engine:
        tally = accuracy(engine, stage.data.tokenizer, strategy.global_rank, strategy.world_size)
    tally.sums.copy_(strategy.sum(tally.sums.to(stage.device)))
    if strategy.is_global_zero:
        _append(stage.checkpoints.parent / "samples.jsonl", stage.step, tally.samples)
    return tally.metrics()


def _append(path: Path, step: int, samples: list[dict[str, Any]]) -> None:
    """Add this step's answers. Lines of it or of later steps are from before a kill, and go."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    kept = [line for line in lines if json.loads(line)["step"] < step]
    added = [json.dumps({"step": step, **sample}, ensure_ascii=False) for sample in samples]
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, "".join(f"{line}\n" for line in [*kept, *added]))
