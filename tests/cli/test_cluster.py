"""Jobs of a queue, with submitit's local executor in its place: ranks, preemption, and what comes back of a failure."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from litseek.cli.__main__ import main
from litseek.cli.compose import cluster_of, jobs
from litseek.cli.overrides import parse
from litseek.errors import LitseekError

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ["preset=smoke", "logger=none", "~callbacks.ema", "trainer.accelerator=cpu", "stage.checkpoint_every=0"]


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Submits a command's jobs to processes of this machine instead of SLURM."""
    monkeypatch.setenv("LITSEEK_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}/src:{ROOT}/kernels:{ROOT}")

    def submit(*words: str) -> None:
        from litseek.cli.cluster import Local

        composed = jobs("train", parse(words))
        cluster = cluster_of(composed[0].cfg)
        assert cluster is not None
        keep = ("nodes", "tasks_per_node", "name")
        Local(**{key: cluster[key] for key in keep}, timeout_min=2).submit("litseek.cli.train", composed)

    return submit


def losses(stage: Path) -> dict[int, float]:
    with (stage / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}


def test_preempted_job_queues_itself_again_and_goes_on_as_if_nothing_had_happened(local: Any, tmp_path: Path) -> None:
    whole, parts = (["train", *SMOKE, f"run_dir={tmp_path / name}"] for name in ("whole", "parts"))
    assert main(whole) == 0
    fault = "+callbacks.fault={_target_:tests.cli.fault.Fault,rank:1,step:4,how:SIGTERM}"
    local(*parts[1:], "strategy=dp", "trainer.devices=2", "cluster=slurm", fault)
    logs = sorted((tmp_path / "parts" / ".submitit").glob("*/*_log.out"))
    assert [log.name.rsplit("_", 2)[1] for log in logs] == ["0", "1"]
    text = logs[0].read_text()
    assert "stopped by a signal to another rank: step 4 is saved" in text
    assert "goes on from step-00000004" in text and text.count("bits per byte") == 1
    assert "bits per byte" not in logs[1].read_text()
    first, second = (losses(tmp_path / run / "pretrain") for run in ("whole", "parts"))
    assert list(first) == list(second) == list(range(8))
    assert second == pytest.approx(first, rel=1e-5)  # two ranks add up in another order
    assert json.loads((tmp_path / "parts" / "pretrain" / "receipt.json").read_text())["tokens"] == 4096


def test_a_failed_job_is_told_in_its_own_words(local: Any, tmp_path: Path) -> None:
    with pytest.raises(LitseekError, match=f"{tmp_path}/nowhere: no such checkpoint"):
        local(*SMOKE, "stage=sft", f"init_from={tmp_path}/nowhere", f"run_dir={tmp_path / 'run'}", "cluster=slurm")


FAKES = {
    "sbatch": """cp "$1" "$HERE/script.sh"; echo "Submitted batch job 4242"
        SLURM_JOB_ID=4242 bash "$HERE/script.sh" >"$HERE/job.log" 2>&1 &""",
    # two nodes of this name, one task each, as srun starts them
    "srun": """while [[ "$1" == --* ]]; do
            case "$1" in --output) out="$2"; shift;; --error) err="$2"; shift;; esac; shift
        done
        export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=1 SLURM_NNODES=2 SLURM_JOB_NUM_NODES=2 SLURM_JOB_NAME=litseek
        export SLURM_JOB_NODELIST=localhost,localhost SLURM_LOCALID=0
        for rank in 0 1; do
            export SLURM_PROCID=$rank SLURM_NODEID=$rank log="${out//%j/4242}"
            "$@" >"${log//%t/$rank}" 2>&1 &
        done; wait""",
    "sacct": 'echo "JobID|State|NodeList"; echo "4242|RUNNING|localhost"',
}


def test_slurm_gets_a_script_and_its_tasks_become_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.setenv("LITSEEK_CACHE", str(tmp_path / "cache"))
    where = [
        "cluster=slurm",
        "strategy=dp",
        "trainer.num_nodes=2",
        "cluster.gpus_per_node=null",
        "cluster.partition=long",
    ]
    assert main(["train", *SMOKE, *where, f"run_dir={tmp_path / 'run'}"]) == 0
    script = (tmp_path / "script.sh").read_text()
    wanted = (
        "nodes=2",
        "ntasks-per-node=1",
        "partition=long",
        "signal=USR2@300",
        "requeue",
        "time=1440",
        "open-mode=append",
    )
    for flag in wanted:
        assert f"#SBATCH --{flag}\n" in script, script
    receipt = json.loads((tmp_path / "run" / "pretrain" / "receipt.json").read_text())
    assert receipt["tokens"] == 4096
    logs = [path.read_text() for path in sorted((tmp_path / "run" / ".submitit" / "4242").glob("*_log.out"))]
    assert ["bits per byte" in log for log in logs] == [True, False]


def test_slurm_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *SMOKE, "cluster=slurm"]) == 1
    assert capsys.readouterr().err == (
        "litseek: cluster=slurm: there is no sbatch on this machine; submit from a node that has it.\n"
    )
    assert main(["train", *SMOKE, "cluster=slurm", "cluster.partitoin=x"]) == 2
    assert "did you mean cluster.partition?" in capsys.readouterr().err
    assert main(["train", *SMOKE, "cluster=slurm", "trainer.devices=auto"]) == 1
    assert "trainer.devices=auto must be a number" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
