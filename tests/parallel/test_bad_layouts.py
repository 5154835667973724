"""What does not fit a layout is refused on every rank, in one sentence that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from litseek.errors import LitseekError
from litseek.parallel.strategy import LitseekStrategy
from tests.parallel.layouts import LAYOUTS, stage_of
from tests.ranks import ranks
from tests.stages.fitting import trainer


def refused(layout: dict[str, Any], folder: Path, **keys: Any) -> str:
    """On one rank: the sentence that a run on this layout ends with."""
    try:
        run = trainer(folder, 1, strategy=LitseekStrategy(**layout), devices=2, **keys.pop("trainer", {}))
        run.fit(stage_of(**keys))
    except (ValueError, LitseekError) as error:
        return str(error)
    return "nothing"


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "world": (dict(ep=3), {}, "strategy.ep=3 is 3, which does not divide the 2 ranks"),
    "batch": (LAYOUTS["ep2"], dict(batch=7), "stage.batch=7"),
    "micros": (LAYOUTS["pp2_v"], dict(micro_batch=4), "micro-batches"),
}


@pytest.mark.parametrize("name", BAD)
def test_every_rank_refuses_in_the_same_words(name: str, tmp_path: Path) -> None:
    layout, keys, words = BAD[name]
    first, second = ranks(2).run(refused, layout, tmp_path, **keys)
    assert words in first and first == second
