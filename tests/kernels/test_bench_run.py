"""The runner of kernels/bench: a row of every file, failures included."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "kernels" / "bench" / "run.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("kernels_bench_run", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ROW = '{"op": "add", "shape": "8", "implementation": "ours", "ms": 0.123456, "value": 3.0, "unit": "GB/s", "note": ""}'
RIVAL = '{"op": "add", "shape": "8", "implementation": "rival", "note": "not installed"}'


def test_every_file_gives_rows(bench, tmp_path: Path, capsys):
    (tmp_path / "add.py").write_text(f"def rows():\n    yield {ROW}\n    yield {RIVAL}\n")
    out = tmp_path / "out" / "results.csv"
    assert bench.run((), out, tmp_path) == 0 and bench.run(("add",), out, tmp_path) == 0
    found = list(csv.DictReader(out.open()))
    assert [row["implementation"] for row in found] == ["ours", "rival"] * 2
    assert found[0]["ms"] == "0.1235" and found[0]["torch"] and found[1]["ms"] == ""
    assert "not installed" in capsys.readouterr().out


def test_a_file_that_fails_is_a_row_and_a_status(bench, tmp_path: Path):
    (tmp_path / "broken.py").write_text("import absent_module\n")
    (tmp_path / "later.py").write_text(f"def rows():\n    yield {ROW}\n    raise ValueError('shape 3 x 4')\n")
    out = tmp_path / "results.csv"
    assert bench.run((), out, tmp_path) == 1
    notes = [row["note"] for row in csv.DictReader(out.open())]
    assert notes[0].startswith("FAILED: ModuleNotFoundError") and notes[2] == "FAILED: ValueError: shape 3 x 4"


def test_unknown_keys_and_ops_are_refused(bench, tmp_path: Path):
    with pytest.raises(ValueError, match="'speed'"):
        bench.append([{"op": "add", "speed": 1}], tmp_path / "results.csv")
    with pytest.raises(SystemExit):
        bench.main(["no_such_op"])


def test_every_file_of_the_folder_can_be_measured(bench):
    """Imported here, measured on a GPU: each has rows()."""
    assert bench.names()
    for name in bench.names():
        spec = importlib.util.spec_from_file_location(f"kernels_bench_{name}", PATH.parent / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert callable(module.rows), name
