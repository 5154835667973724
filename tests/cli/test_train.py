"""How a run is tracked and summed up; training itself is in test_pipeline and test_kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from litseek.cli.compose import jobs
from litseek.cli.overrides import parse
from litseek.cli.train import construct, group, summary, wandb_login


@pytest.fixture(autouse=True)
def nobody_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_tracking_is_offline_unless_someone_is_logged_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not wandb_login()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert wandb_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not wandb_login()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert wandb_login()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert not wandb_login()


def test_group_is_the_experiment_or_the_run_folder() -> None:
    def of(*words: str) -> str:
        return group(jobs("train", parse(words))[0].cfg)

    assert of("run_dir=runs/demo") == "demo"
    assert {of(f"experiment=balance/{arm}", f"seed={seed}") for arm in ("none", "aux_free") for seed in (0, 1)} == {
        "balance"
    }


def test_summary_states_what_a_number_is_to_be_compared_with() -> None:
    metrics = {"val/bits_per_byte": 1.9, "val/gzip_bits_per_byte": 2.1, "eval/accuracy": 0.5}
    line = summary(Path("runs/x/sft"), {"tokens": 1200, "wall_s": 3.2, "metrics": metrics})
    assert line == "runs/x/sft: 1,200 tokens in 3 s, bits per byte 1.900 (gzip 2.100), accuracy 0.500"


def test_callbacks_can_be_left_out() -> None:
    cfg = jobs("train", parse(["preset=smoke", "~callbacks.ema", "callbacks.progress=null"]))[0].cfg
    assert set(construct(cfg)["callbacks"]) == {"throughput", "routing", "spike_guard"}
    cfg = jobs("train", parse(["preset=smoke", "trainer.enable_progress_bar=false"]))[0].cfg
    assert "progress" not in construct(cfg)["callbacks"]  # Lightning refuses the two together
