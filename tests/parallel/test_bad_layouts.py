"""What does not fit a layout is refused on every rank, in one sentence that names it; a NaN of one rank stops none of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from litseek.data.batch import MicroBatch
from litseek.errors import LitseekError
from litseek.parallel.mesh import Mesh
from litseek.parallel.strategy import LitseekStrategy
from litseek.parallel.sums import Sums
from litseek.parallel.zero import Shares
from tests.parallel.layouts import LAYOUTS, stage_of, train_here
from tests.ranks import ranks
from tests.stages.fitting import trainer


class Poison(Callback):
    """In step ``at`` one gradient of rank ``rank`` is not a number, and nobody else's."""

    def __init__(self, rank: int, at: int) -> None:
        self.rank, self.at, self.finite, self.weights = rank, at, [], []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        shares = trainer.strategy.shares
        shares.reduce = partial(self.reduce, shares, trainer.global_rank == self.rank and number == self.at)
        self.before = {name: value.clone() for name, value in module.model.state_dict().items()}

    def reduce(self, shares: Shares, now: bool) -> None:
        Shares.reduce(shares)
        if now:
            next(grad for grad in shares.grads() if grad.numel()).view(-1)[0] = float("nan")

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        state = module.model.state_dict()
        kept = all(torch.equal(value, self.before[name]) for name, value in module.model.named_parameters())
        self.finite.append(bool(trainer.strategy.step_result.finite))
        self.weights.append((kept, all(bool(value.isfinite().all()) for value in state.values())))


def refused(layout: dict[str, Any], folder: Path, resume: str | None = None, **keys: Any) -> str:
    """On one rank: the sentence that a run on this layout ends with."""
    try:
        run = trainer(folder, 1, strategy=LitseekStrategy(**layout), devices=2, **keys.pop("trainer", {}))
        run.fit(stage_of(**keys), ckpt_path=resume)
    except (ValueError, LitseekError) as error:
        return str(error)
    return "nothing"


BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "world": (dict(ep=3), {}, "strategy.ep=3 is 3, which does not divide the 2 ranks"),
    "batch": (LAYOUTS["ep2"], dict(batch=7), "stage.batch=7"),
    "micros": (LAYOUTS["pp2_v"], dict(micro_batch=4), "micro-batches"),
    "experts": (LAYOUTS["ep2"], dict(model=dict(n_routed_experts=3, n_group=1, topk_group=1)), "n_routed_experts=3"),
    "stages": (LAYOUTS["pp2_v"], dict(model=dict(num_hidden_layers=2)), "model.num_hidden_layers=2"),
    "accumulate": (LAYOUTS["ep2"], dict(trainer=dict(accumulate_grad_batches=2)), "accumulate_grad_batches=2"),
}


@pytest.mark.parametrize("name", BAD)
def test_every_rank_refuses_in_the_same_words(name: str, tmp_path: Path) -> None:
    layout, keys, words = BAD[name]
    first, second = ranks(2).run(refused, layout, tmp_path, **keys)
    assert words in first and first == second


@pytest.mark.parametrize("name", ["ep2", "pp2_v"])
def test_a_checkpoint_of_another_model_is_refused_by_all(name: str, tmp_path: Path) -> None:
    train_here(tmp_path, {}, steps=1, model=dict(moe_intermediate_size=24))
    saved = str(tmp_path / "checkpoints" / "step-00000001")
    first, second = ranks(2).run(refused, LAYOUTS[name], tmp_path / "two", resume=saved)
    assert "step-00000001" in first and "moe_intermediate_size" in first and "24" in first and first == second


def unequal(pp: int, ep: int) -> str:
    """On one rank: what it hears when the two were given different batches."""
    import torch.distributed as dist

    rank = dist.get_rank()
    length, number = (8 + 8 * rank, 1) if pp > 1 else (8, 1 + rank)
    micros = [MicroBatch.of(torch.zeros(1, length, dtype=torch.long))] * number
    try:
        Sums(Mesh(2, pp, ep, rank), dist.group.WORLD).batch(micros)
    except LitseekError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(("pp", "ep", "words"), [(2, 1, "must be given the same batch"), (1, 2, "must run as many")])
def test_different_batches_are_refused_by_all(pp: int, ep: int, words: str) -> None:
    first, second = ranks(2).run(unequal, pp, ep)
    assert words in first and first == second


def poisoned(folder: Path, layout: dict[str, Any]) -> tuple[list[bool], list[tuple[bool, bool]]]:
    """On one rank, for each step: whether it was finite; whether weights stayed as they were, and were numbers after it."""
    poison = Poison(rank=1, at=1)
    trainer(folder, 3, poison, strategy=LitseekStrategy(**layout), devices=2).fit(stage_of())
    return poison.finite, poison.weights


@pytest.mark.parametrize("name", ["ep2", "pp2_v"])
def test_nan_on_one_rank_is_skipped_by_all(name: str, tmp_path: Path) -> None:
    for finite, weights in ranks(2).run(poisoned, tmp_path, LAYOUTS[name]):
        assert finite == [True, False, True]
        assert weights == [(False, True), (True, True), (False, True)]
