"""The pipeline at smoke size: five stages, receipts, skips, reruns with a reason, the report and a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from tests.cli.forked import Runner

STAGES = ["pretrain", "context_32k", "context_128k", "sft", "grpo"]
WORDS = [
    *("pipeline", "preset=smoke", "trainer.max_steps=2", "logger=none", "stage.batch=4"),
    "grpo.stage.micro_batch=4",
]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    folder = tmp_path_factory.mktemp("pipeline")
    with Runner(folder, {"LITSEEK_CACHE": str(folder / "cache")}) as started:
        yield started


@pytest.fixture(scope="module")
def finished(runner: Runner) -> tuple[Path, str]:
    """The run folder, and what was printed."""
    said = runner.run(*WORDS, "run_dir=runs/one", "prompt=3 + 4 =")
    return runner.folder / "runs" / "one", said


def receipts(run: Path) -> dict[str, dict]:
    return {stage: json.loads((run / stage / "receipt.json").read_text()) for stage in STAGES}


def test_every_stage_leaves_a_receipt(finished: tuple[Path, str]) -> None:
    run, _ = finished
    found = receipts(run)
    for stage in STAGES:
        assert found[stage]["stage"] == stage and found[stage]["tokens"] > 0 and found[stage]["wall_s"] > 0
        config = yaml.safe_load((run / stage / "config.yaml").read_text())
        assert config["stage"]["name"] == stage and "${" not in str(config)
    for stage in STAGES[:3]:
        assert {"val/bits_per_byte", "val/gzip_bits_per_byte", "val/bytes"} <= set(found[stage]["metrics"])
    for stage in STAGES[3:]:
        assert 0 <= found[stage]["metrics"]["eval/accuracy"] <= 1
    parents = [found[stage]["parent"] for stage in STAGES]
    assert parents[0] is None and len(set(parents)) == len(STAGES)


def test_ends_with_report_and_sample(finished: tuple[Path, str], runner: Runner) -> None:
    run, said = finished
    assert (run / "report.html").is_file()
    assert "\n3 + 4 =\n" in said
    assert sorted(path.name for path in runner.folder.iterdir() if path.is_dir()) == ["cache", "runs"], "litter"


def test_finished_stages_are_skipped_and_a_change_reruns_what_follows(
    finished: tuple[Path, str], runner: Runner
) -> None:
    run, _ = finished
    before = receipts(run)
    quiet = [*WORDS, "run_dir=runs/one", "report=false", "sample=false"]
    said = runner.run(*quiet)
    assert said.count("finished and nothing changed; skipped.") == 5
    said = runner.run(*quiet, "sft.optim.lr=0.002")
    assert said.count("skipped") == 3
    assert "runs/one/sft: starts afresh because optim.lr was 0.003, now 0.002" in said
    assert "runs/one/grpo: starts afresh because its parent's checkpoint changed" in said
    after = receipts(run)
    assert [stage for stage in STAGES if before[stage] != after[stage]] == ["sft", "grpo"]


def test_start_reruns_from_there(finished: tuple[Path, str], runner: Runner) -> None:
    said = runner.run(*WORDS, "run_dir=runs/one", "report=false", "sample=false", "sft.optim.lr=0.002", "start=grpo")
    assert said.count("skipped") == 4
    assert "runs/one/grpo: starts afresh because start=grpo asks for it" in said


def test_a_damaged_receipt_stops_before_any_stage_runs(finished: tuple[Path, str], runner: Runner) -> None:
    receipt = finished[0] / "grpo" / "receipt.json"
    kept = receipt.read_bytes()
    receipt.write_bytes(kept[:40])
    try:
        runner.start(*WORDS, "run_dir=runs/one", "report=false", "sample=false")
        assert runner.wait() == 1
    finally:
        receipt.write_bytes(kept)
    assert "grpo/receipt.json" in runner.log() and "skipped" not in runner.log()


def test_every_stage_trains_in_fp8(runner: Runner) -> None:
    """On a CPU the recipe runs through its references; checkpoints hold the FP32 masters whatever the precision."""
    wide = ["model.qk_rope_head_dim=16", "precision=fp8", "run_dir=runs/fp8", "report=false"]
    said = runner.run(*WORDS, *wide, "prompt=3 + 4 =")
    assert set(receipts(runner.folder / "runs" / "fp8")) == set(STAGES) and "\n3 + 4 =\n" in said
    names: list[str] = []
    for file in (runner.folder / "runs/fp8/grpo/checkpoints").rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            names += tensors.keys()
    assert names and not any("fp8" in name or "copy" in name for name in names)
