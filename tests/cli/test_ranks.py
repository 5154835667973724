"""A command on two ranks, started by us and by torchrun: it runs, it stops together, and it ends together."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMOKE = [
    *("preset=smoke", "logger=none", "strategy=dp", "trainer.devices=2", "trainer.accelerator=cpu"),
    *("trainer.max_steps=4", "stage.checkpoint_every=0", "~callbacks.ema"),
]
OURS = [sys.executable, "-m", "litseek"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
TORCHRUN += ["--rdzv-endpoint=localhost:0", "-m", "litseek"]


def run(start: list[str], folder: Path, *words: str) -> tuple[int, str, list[str], float]:
    """Exit status, stdout, the program's own lines of stderr, seconds."""
    env = os.environ | {"LITSEEK_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = f"{ROOT}/src:{ROOT}/kernels:{ROOT}"
    began = time.monotonic()
    done = subprocess.run([*start, *words], env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("litseek: ")]
    return done.returncode, done.stdout, lines, time.monotonic() - began


def fault(rank: int, step: int, how: str) -> str:
    return f"+callbacks.fault={{_target_:tests.cli.fault.Fault,rank:{rank},step:{step},how:{how}}}"


def test_killed_rank_of_ours(tmp_path: Path) -> None:
    status, out, lines, seconds = run(OURS, tmp_path, "train", *SMOKE, "run_dir=run", fault(1, 3, "SIGKILL"))
    assert status == 1 and seconds < 60 and out == ""
    assert len(lines) == 1 and lines[0].startswith("litseek: rank 1 died without a word")


def test_raising_rank_of_torchrun(tmp_path: Path) -> None:
    status, _, lines, seconds = run(TORCHRUN, tmp_path, "train", *SMOKE, "run_dir=run", fault(1, 3, "raise"))
    assert status != 0 and seconds < 60
    assert "litseek: rank 1: unexpected RuntimeError: the fault of this test (debug=true shows where)." in lines
    assert "litseek: rank 1 failed: unexpected RuntimeError: the fault of this test (debug=true shows where)." in lines


@pytest.mark.slow  # in tests/cli/test_cluster.py a job is asked, too
def test_asked_to_stop_a_pipeline_saves_and_stops(tmp_path: Path) -> None:
    """That it goes on from there as if nothing had happened is tested under cluster=slurm."""
    command = ["pipeline", *SMOKE, "stages=[pretrain]", "report=false", "sample=false", "run_dir=run"]
    status, out, lines, _ = run(OURS, tmp_path, *command, fault(0, 3, "SIGTERM"))
    assert (status, out) == (143, "")
    assert lines == ["litseek: stopped by SIGTERM: step 3 is saved, and the same command goes on from it."]
    assert (tmp_path / "run" / "pretrain" / "checkpoints" / "step-00000003").is_dir()


@pytest.mark.slow  # in tests/parallel every rank refuses, and test_watchdog.py counts what is said
def test_bad_input_is_said_once_by_torchrun(tmp_path: Path) -> None:
    status, out, lines, _ = run(TORCHRUN, tmp_path, "train", *SMOKE, "run_dir=run", "stage.batch=12")
    assert status != 0 and out == ""
    assert len(lines) == 1 and "stage.batch=12 is not a multiple of stage.micro_batch=4 times 2" in lines[0]
