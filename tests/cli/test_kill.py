"""SIGKILL in pre-training (mid-step, mid-save) and in GRPO (mid-rollout): the same command goes on, bit for bit."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from litseek.parallel import storage
from tests.cli.forked import Runner

PIPELINE = [
    *("pipeline", "preset=smoke", "stages=[pretrain,grpo]", "report=false", "sample=false", "trainer.max_steps=9"),
    *(
        "stage.checkpoint_every=2",
        "grpo.stage.updates_per_rollout=2",
        "grpo.stage.batch=64",
        "grpo.stage.max_tokens=24",
    ),
    *(
        "grpo.data.seq_len=96",
        "model.max_position_embeddings=96",
        "grpo.trainer.max_steps=6",
        "grpo.optim.lr=0.01",
        "grpo.stage.rewards={answered:1,coin:1}",
    ),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the run `whole`, which nobody disturbed, and the run `parts`, which was killed three times."""
    folder = tmp_path_factory.mktemp("kill")
    parts = folder / "parts"
    with Runner(folder, {"LITSEEK_CACHE": str(folder / "cache"), "WANDB_MODE": "offline"}) as runner:
        runner.run(*PIPELINE, f"run_dir={folder / 'whole'}")
        again = [*PIPELINE, f"run_dir={parts}"]
        runner.kill_in(runner.start(*again), "forward_backward", lambda: steps(parts / "pretrain") >= 3)
        ids = [wandb_ids(parts / "pretrain")]
        runner.kill_in(runner.start(*again), "_save_tensors", lambda: steps(parts / "pretrain") >= 5)
        assert list((parts / "pretrain" / "checkpoints").glob(".*.partial")), "the kill came after the save"
        runner.kill_in(runner.start(*again), "roll", lambda: steps(parts / "grpo") >= 3)
        ids.append(wandb_ids(parts / "grpo"))
        assert "goes on from step-" in runner.run(*again)
        assert ids == [wandb_ids(parts / "pretrain"), wandb_ids(parts / "grpo")], "a resumed run got another W&B id"
    yield folder


@pytest.mark.parametrize("stage", ["pretrain", "grpo"])
def test_killed_run_equals_an_undisturbed_one(killed: Path, stage: str) -> None:
    whole, parts = (storage.load(newest(killed / run / stage)) for run in ("whole", "parts"))
    for key in ("state_dict", "optimizer_states", "stage", "rollout", "random"):
        assert same(whole.get(key), parts.get(key)), f"{key} differs"
    assert losses(killed / "whole" / stage) == losses(killed / "parts" / stage)
    first, second = (json.loads((killed / run / stage / "receipt.json").read_text()) for run in ("whole", "parts"))
    assert first["metrics"] == second["metrics"] and first["tokens"] == second["tokens"]


@pytest.mark.parametrize("stage", ["pretrain", "grpo"])
def test_killed_run_keeps_its_tracking_id(killed: Path, stage: str) -> None:
    session = json.loads((killed / "parts" / stage / "session.json").read_text())
    assert wandb_ids(killed / "parts" / stage) == {session["wandb_id"]}


def newest(stage: Path) -> Path:
    found = storage.last(stage / "checkpoints")
    assert found is not None
    return found


def steps(stage: Path) -> int:
    """Rows of metrics.csv so far."""
    path = stage / "metrics.csv"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.is_file() else 0


def losses(stage: Path) -> list[tuple[str, str, str]]:
    with (stage / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["loss"]]
    assert len(found) >= 6 and len({step for step, _, _ in found}) == len(found)
    return found


def wandb_ids(stage: Path) -> set[str]:
    return {path.name.rsplit("-", 1)[1] for path in (stage / "wandb").glob("offline-run-*")}


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return a == b
