"""A stage's accuracy on held-out problems, summed over ranks; some of the answers go to samples.jsonl."""

from __future__ import annotations

import json
from typing import Any


def judge(stage: Any, accuracy: Any) -> dict[str, float]:
    """``eval/accuracy`` and what goes with it, equal on all ranks."""
    strategy = stage.strategy
    stage.model.eval()
    tally = accuracy(stage.model, stage.data.tokenizer, strategy.dp_rank, strategy.dp)
    stage.model.train()
    tally.sums.copy_(strategy.sum(tally.sums.to(stage.device)))
    if strategy.is_global_zero:
        path = stage.checkpoints.parent / "samples.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for sample in tally.samples:
                file.write(json.dumps({"step": stage.step, **sample}, ensure_ascii=False) + "\n")
    return tally.metrics()
