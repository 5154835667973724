"""`litseek bench`: rows, table, JSON lines and CSV of a tiny model on a CPU, and what is refused before any work."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from litseek.cli import bench
from litseek.cli.__main__ import main
from litseek.cli.bench import COLUMNS, append, model_name, rates
from litseek.cli.bench_step import Timing
from litseek.errors import LitseekError

TINY = [
    *("model=tiny", "model.num_hidden_layers=2", "model.vocab_size=64", "seq_len=32"),
    *("batch=2", "steps=1", "warmup=0", "compile=false", "device=cpu"),
]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["bench", *words])
    out, err = capsys.readouterr()
    return status, out, err


def lines(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def test_step_prints_a_table_a_line_and_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "out" / "results.csv"
    words = [*TINY, "batch=[2,4]", "precisions=[bf16,fp32]", "micro_batch=2", f"results={file}"]
    status, out, err = run(capsys, *words)
    assert status == 0, err
    rows = lines(out)
    assert [(row["precision"], row["batch"]) for row in rows] == [("bf16", 2), ("fp32", 2), ("bf16", 4), ("fp32", 4)]
    assert all(row["tokens_per_s"] > 0 and row["value"] == pytest.approx(5.4, abs=1) for row in rows)
    assert rows[0]["model"] == "tiny num_hidden_layers=2 vocab_size=64" and rows[0]["peak_gib"] is None
    assert rows[0]["ms"] == pytest.approx(2 * 32 / rows[0]["tokens_per_s"] * 1e3)
    stored = list(csv.DictReader(file.open()))
    assert tuple(stored[0]) == COLUMNS and [row["batch"] for row in stored] == ["2", "2", "4", "4"]
    assert "litseek bf16" in out and "tokens/s" in out
    assert run(capsys, *TINY, f"results={file}")[0] == 0
    assert len(list(csv.DictReader(file.open()))) == 5


def test_slice_times_blocks_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = ["what=slice", *TINY, "model.n_routed_experts=8", "model.num_hidden_layers=2", "micro_batch=1"]
    status, out, err = run(capsys, *small, "slice.layers=6", f"results={tmp_path / 'r.csv'}")
    assert status == 0, err
    (row,) = lines(out)
    assert row["note"] == "2 of 6 layers: no network, no bubble" and "no network, no bubble" in out
    assert row["tokens_per_s"] == pytest.approx(2 * 32 / row["ms"] * 1e3 * 2 / 6)


def test_profile_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, "what=profile", *TINY, "profile.steps=1", f"results={tmp_path / 'r.csv'}")
    assert status == 0, err
    (row,) = lines(out)
    parts = {name: part["ms"] for name, part in row["parts"].items()}
    assert sum(parts.values()) >= row["ms"] * 0.999
    assert parts["dense GEMM"] > 0 and parts["optimizer"] > 0 and parts["cross-entropy"] > 0
    assert "the 25 kernels that took most" in out
    assert json.loads(next(csv.DictReader((tmp_path / "r.csv").open()))["parts"]) == row["parts"]


def test_recompute_reaches_stage_and_executor(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [*TINY, "recompute=true", "strategy.recompute=[experts]", f"results={tmp_path / 'r.csv'}"]
    status, out, err = run(capsys, *words)
    assert status == 0, err
    assert lines(out)[0]["recompute"] == "norms experts"


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["what=stp"], 2, "what=stp is not in conf/what; did you mean step?"),
        (["precisions=[bf16,fp9]"], 2, "precisions names 'fp9'"),
        (["precisions=[]"], 2, "precisions=[] is empty"),
        (["batch=[0]"], 2, "batch=0 must be at least 1"),
        (["batch=[6]", "micro_batch=4"], 2, "batch=6 must be at least 1 and a multiple of micro_batch=4"),
        (["steps=0"], 2, "steps=0 must be an integer of at least 1"),
        (["vs=[megatron]"], 2, "vs names 'megatron'; there are torchtitan, transformers."),
        (["vs=[transformers]", "what=slice"], 2, "goes with what=step only"),
        (["model.n_group=3"], 1, "model.n_group=3 does not divide"),
        (["strategy.recompute=[atend]"], 1, "strategy.recompute names 'atend'"),
        (["what=kernels", "ops=[no_such_op]"], 2, "ops names 'no_such_op'"),
        (["stpes=3"], 2, "there is no key 'stpes'; did you mean steps?"),
    ],
)
def test_mistakes_end_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: list[str], status: int, sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, *words)
    assert (found, out) == (status, "") and sentence in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_fit_is_a_row_and_a_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB. More")

    monkeypatch.setattr(bench, "time_steps", full)
    status, out, err = run(capsys, *TINY, f"results={tmp_path / 'r.csv'}")
    assert status == 1 and "not measured: litseek bf16 batch 2: out of memory: CUDA out of memory" in err
    assert lines(out)[0]["ms"] is None


def test_another_file_is_not_written_to(tmp_path: Path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(LitseekError, match="its columns are not those"):
        append([{"what": "step"}], tmp_path / "other.csv")


def test_kernels_runs_the_files_of_kernels_bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    runner = bench._runner()
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(bench, "_runner", lambda: runner)
    monkeypatch.setattr(runner, "has_gpu", lambda: True)
    monkeypatch.setattr(runner, "run", lambda *given: asked.append(given) or int(len(asked) > 1))
    assert run(capsys, "what=kernels", f"results={tmp_path / 'k.csv'}")[0] == 0
    assert asked == [([], tmp_path / "k.csv")]
    status, _, err = run(capsys, "what=kernels")
    assert status == 1 and "some of kernels/bench failed" in err and asked[1] == ([], runner.RESULTS)


def test_rates():
    found = rates(
        Timing(ms=500.0, peak_gib=1.0, value=2.0), tokens=1000, flops_per_token=1e9, device=torch.device("cpu")
    )
    assert found["tokens_per_s"] == 2000 and found["model_tflops"] == 2.0 and found["mfu"] is None


def test_model_names():
    from hydra.utils import get_object
    from omegaconf import OmegaConf

    from litseek.cli.compose import conf_dir

    file = OmegaConf.to_container(OmegaConf.load(conf_dir() / "model" / "v3_671b.yaml"))
    assert model_name(file) == "v3_671b" and get_object(file["_target_"])
    assert model_name(file | {"n_routed_experts": 32}) == "v3_671b n_routed_experts=32"
