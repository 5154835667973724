"""A stage's folder: fresh, gone on with, skipped, or set aside with a reason; and what a receipt says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from litseek.cli import receipt as receipts
from litseek.cli.folder import begin, finished
from litseek.errors import LitseekError
from litseek.parallel import storage

CONFIG: dict[str, Any] = {
    "run_dir": "runs/a",
    "seed": 0,
    "optim": {"lr": 0.1, "betas": [0.9, 0.95]},
    "logger": {"wandb": {"project": "x"}},
    "trainer": {"max_steps": 5, "enable_progress_bar": True},
}


def changed(**values: Any) -> dict[str, Any]:
    return CONFIG | values


def checkpoint(folder: Path, step: int = 1) -> None:
    storage.save(folder / "checkpoints" / f"step-{step:08d}", {"a": 1})


def finish(folder: Path, config: dict[str, Any], parent: str | None = None) -> None:
    receipts.write_receipt(folder, config, parent, tokens=8, wall_s=1.0, metrics={"val/loss": 2.0})


@pytest.mark.parametrize(
    "same",
    [
        {"run_dir": "elsewhere"},
        {"logger": {}},
        {"trainer": {"max_steps": 5, "enable_progress_bar": False}},
        {"callbacks": {"ema": None}},
        {"debug": True},
    ],
)
def test_what_does_not_matter_keeps_the_hash(same: dict[str, Any]) -> None:
    assert receipts.digest(CONFIG) == receipts.digest(changed(**same))


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"optim": {"lr": 0.2, "betas": [0.9, 0.95]}}, {"trainer": {"max_steps": 6}}]
)
def test_what_matters_changes_the_hash(other: dict[str, Any]) -> None:
    assert receipts.digest(CONFIG) != receipts.digest(changed(**other))


def test_fresh_folder_then_resumed_then_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "pretrain"
    first = begin(folder, CONFIG, None)
    assert first.resume is None and finished(folder, CONFIG, None) is None
    again = begin(folder, CONFIG, None)
    assert again.wandb_id == first.wandb_id and again.resume is None
    assert "starts again: it was stopped before its first checkpoint" in capsys.readouterr().out
    checkpoint(folder, 3)
    third = begin(folder, CONFIG | {"run_dir": "moved"}, None)
    assert third.resume == folder / "checkpoints" / "step-00000003" and third.wandb_id == first.wandb_id
    assert third.spent_s >= 0 and "goes on from step-00000003" in capsys.readouterr().out
    finish(folder, CONFIG)
    done = finished(folder, CONFIG, None)
    assert done is not None and done["metrics"] == {"val/loss": 2.0} and done["tokens"] == 8
    assert {"torch", "lightning", "python"} <= set(done["versions"])
    assert finished(folder, changed(seed=1), None) is None
    assert finished(folder, CONFIG, "another parent") is None


def test_changed_configuration_sets_the_old_folder_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pretrain"
    first = begin(folder, CONFIG, None)
    checkpoint(folder)
    second = begin(folder, changed(optim={"lr": 0.2, "betas": [0.9, 0.95]}), None)
    said = capsys.readouterr().out
    assert "starts afresh because optim.lr was 0.1, now 0.2" in said and "pretrain.replaced" in said
    assert second.resume is None and second.wandb_id != first.wandb_id
    assert storage.last(tmp_path / "pretrain.replaced" / "checkpoints") is not None
    # nothing was reached in the second, so a third must not put it in the first one's place
    begin(folder, changed(seed=9), None)
    assert storage.last(tmp_path / "pretrain.replaced" / "checkpoints") is not None
    begin(folder, changed(seed=9), "parent")
    assert "because its parent's checkpoint changed" in capsys.readouterr().out


def test_rerun_request_is_answered_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "sft"
    begin(folder, CONFIG, None)
    checkpoint(folder)
    finish(folder, CONFIG)
    assert finished(folder, CONFIG, None, "start=sft 1") is None
    assert begin(folder, CONFIG, None, "start=sft 1").resume is None
    assert "start=sft asks for it" in capsys.readouterr().out
    checkpoint(folder)
    assert begin(folder, CONFIG, None, "start=sft 1").resume is not None, "a killed rerun goes on"
    finish(folder, CONFIG)
    assert finished(folder, CONFIG, None, "start=sft 1") is not None
    assert finished(folder, CONFIG, None, "start=sft 2") is None


def test_damaged_or_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(LitseekError, match=r"mine: holds files but no config.yaml"):
        begin(tmp_path / "mine", CONFIG, None)
    folder = tmp_path / "sft"
    begin(folder, CONFIG, None)
    (folder / "receipt.json").write_text("{")
    with pytest.raises(LitseekError, match=r"receipt.json: damaged"):
        finished(folder, CONFIG, None)
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(LitseekError, match=r"config.yaml: damaged"):
        begin(folder, CONFIG, None)


def test_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LitseekError, match="the stage's folder could not be made"):
        begin(tmp_path / "file" / "pretrain", CONFIG, None)
