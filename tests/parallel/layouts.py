"""One run of a stage on a layout, in a pool of gloo processes, and its parts put together again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from litseek.callbacks.ema import WeightAverage
from litseek.parallel.checkpoint import resolve_checkpoint
from litseek.parallel.strategy import LitseekStrategy
from litseek.stages.pretrain import Pretrain
from tests.ranks import ranks
from tests.stages.fitting import Losses, trainer
from tests.toy import ToySource, toy_optim, toy_stage, with_biases

LAYOUTS: dict[str, dict[str, Any]] = {
    "ep2": dict(ep=2),
    "ep2_overlap": dict(ep=2, overlap=True),
    "ep2_edp2": dict(ep=2),
    "pp2_v": dict(pp=2, schedule="dualpipev"),
    "pp4_v": dict(pp=4, schedule="dualpipev"),
    "pp2_bidirectional": dict(pp=2, schedule="dualpipe"),
    "pp2_1f1b": dict(pp=2, schedule="1f1b"),
    "pp2_zb1p": dict(pp=2, schedule="zb1p"),
    "ep2_pp2_v": dict(ep=2, pp=2, schedule="dualpipev"),
}
WORLDS = {"ep2_edp2": 4, "pp4_v": 4, "ep2_pp2_v": 4}


class Norms(Losses):
    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, module, *args)
        self.norms.append(float(module.step_result.grad_norm))


def stage_of(cls: type = Pretrain, **keys: Any) -> Any:
    model = dict(num_hidden_layers=7) | keys.pop("model", {})
    settings = dict(
        batch=8, micro_batch=1, data=ToySource(held_out=5, documents=True), optim=toy_optim(lr=1e-4), balance_speed=0.01
    )
    return toy_stage(cls, model=model, **{**settings, **keys})


def train_here(
    folder: Path,
    layout: dict[str, Any],
    steps: int = 6,
    resume: str | None = None,
    cls: type = Pretrain,
    biased: bool = True,
    parent: Path | str | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """On this rank (or in this process alone): what the run gave, and this rank's part of the weights."""
    stage = stage_of(cls, **keys)
    if parent is not None:
        stage.start_from(resolve_checkpoint(parent))
    if biased:
        stage.configure_model()
        with_biases(stage.model)
    return run_here(stage, folder, layout, steps, resume)


def run_here(stage: Any, folder: Path, layout: dict[str, Any], steps: int, resume: str | None = None) -> dict[str, Any]:
    """The same for a stage that is there."""
    seen, average = Norms(), WeightAverage(decay=0.5)
    world = dist.get_world_size() if dist.is_initialized() else 1
    run = trainer(folder, steps, seen, average, strategy=LitseekStrategy(**layout), devices=world)
    run.fit(stage, ckpt_path=resume)
    team = run.strategy.team
    state = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    starts = {name: team.placement(name, tensor).start for name, tensor in state.items()}
    return {
        "losses": seen.values,
        "norms": seen.norms,
        "results": stage.results,
        "state": state,
        "starts": starts,
        "average": dict(average.ema.average),
        "loads": {name: load.clone() for name, load in stage.step_result.loads.items()},
        "tokens": stage.tokens_seen,
    }


def train(name: str, folder: Path, recompute: tuple = (), **keys: Any) -> list[dict[str, Any]]:
    return ranks(WORLDS.get(name, 2)).run(train_here, folder, LAYOUTS[name] | {"recompute": list(recompute)}, **keys)


def joined(parts: list[dict[str, Any]], key: str = "state") -> dict[str, Tensor]:
    """The whole model from the ranks' parts, which must agree where they overlap."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for part in parts:
        for name, tensor in part[key].items():
            known = pieces.setdefault(name, {}).setdefault(part["starts"][name], tensor)
            assert torch.equal(known, tensor), name
    return {
        name: torch.cat([rows for _, rows in sorted(found.items())]) if len(found) > 1 else found.popitem()[1]
        for name, found in pieces.items()
    }
