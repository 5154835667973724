"""The first 20 losses of the stages that this package trains, against the ones on record (tests/golden)."""

import json
import os
from pathlib import Path

import pytest

from litseek.parallel.checkpoint import load_weights, resolve_checkpoint
from litseek.stages.context import Context
from litseek.stages.pretrain import Pretrain
from litseek.stages.sft import Sft
from tests.stages.fitting import fit
from tests.toy import SEQ, ToySource, toy_stage

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-4
STEPS = 20


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Stage -> its losses, each stage from its parent's checkpoint."""
    run = tmp_path_factory.mktemp("run")
    found = {"pretrain": fit(toy_stage(Pretrain), run / "pretrain", STEPS)}
    longer = dict(
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": SEQ}, max_position_embeddings=2 * SEQ
    )
    stages = {
        "context_32k": toy_stage(Context, data=ToySource(2 * SEQ), model=longer, name="context_32k"),
        "sft": toy_stage(Sft, data=ToySource(2 * SEQ, documents=True)),
    }
    parent = "pretrain"
    for name, stage in stages.items():
        load_weights(stage, resolve_checkpoint(run / parent))
        found[name] = fit(stage, run / name, STEPS)
        parent = name
    return found


@pytest.mark.parametrize("stage", ["pretrain", "context_32k", "sft"])
def test_first_losses(losses, stage):
    path = GOLDEN / f"{stage}.json"
    if os.environ.get("LITSEEK_WRITE_GOLDEN"):
        path.write_text(json.dumps({"losses": losses[stage]}, indent=1) + "\n")
    assert losses[stage] == pytest.approx(json.loads(path.read_text())["losses"], rel=TOLERANCE)
    assert sum(losses[stage][-5:]) < sum(losses[stage][:5])
