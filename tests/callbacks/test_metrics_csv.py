"""metrics.csv: columns that join later, a resume that drops what it repeats, a kill in the middle of a line."""

import csv

import pytest
import torch

from litseek.callbacks import MetricsCSV
from litseek.callbacks.metrics_csv import read
from tests.callbacks.stage import TinyStage, trainer


def table(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_of_a_step_share_a_row_and_new_ones_add_columns(tmp_path):
    log = MetricsCSV(tmp_path)
    log.log_metrics({"loss": 2.5, "epoch": 0}, step=1)
    log.log_metrics({"loss": 2.25, "tokens": 4096.0}, step=2)
    log.log_metrics({"val/loss": 3.0}, step=2)
    log.log_metrics({"loss": 2.0}, step=3)
    assert table(tmp_path) == [
        {"step": "1", "loss": "2.5", "tokens": "", "val/loss": ""},
        {"step": "2", "loss": "2.25", "tokens": "4096", "val/loss": "3"},
        {"step": "3", "loss": "2", "tokens": "", "val/loss": ""},
    ]


def test_numbers_read_back_equal(tmp_path):
    values = {"a": float(torch.tensor(1 / 3)), "b": 1e-300, "c": -2.5e17, "d": float("inf")}
    MetricsCSV(tmp_path).log_metrics(values, step=0)
    assert {key: float(table(tmp_path)[0][key]) for key in values} == values


def test_not_a_number_is_written_as_such(tmp_path):
    MetricsCSV(tmp_path).log_metrics({"loss": float("nan")}, step=0)
    assert table(tmp_path)[0]["loss"] == "nan"


def test_a_resumed_run_leaves_the_file_of_an_uninterrupted_one(tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def rows(log, steps):
        for step in steps:
            log.log_metrics({"loss": 1 / (step + 1)}, step=step)
            if step % 3 == 2:
                log.log_metrics({"val/loss": 2 / (step + 1)}, step=step)

    rows(MetricsCSV(straight), range(9))
    rows(MetricsCSV(killed), range(7))
    with (killed / "metrics.csv").open("a") as file:
        file.write("7,0.1")  # killed here
    rows(MetricsCSV(killed), range(4, 9))
    assert (killed / "metrics.csv").read_bytes() == (straight / "metrics.csv").read_bytes()


def test_a_fresh_run_in_an_old_folder_starts_over(tmp_path):
    MetricsCSV(tmp_path).log_metrics({"loss": 1.0}, step=5)
    MetricsCSV(tmp_path).log_metrics({"loss": 2.0}, step=0)
    assert [row["step"] for row in table(tmp_path)] == ["0"]


@pytest.mark.parametrize("content", ["", "ste", "nothing of ours\n1\n"])
def test_a_file_without_a_header_is_replaced(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    MetricsCSV(tmp_path).log_metrics({"loss": 1.0}, step=4)
    assert table(tmp_path) == [{"step": "4", "loss": "1"}]


def test_reading_leaves_out_an_unfinished_line(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n1,2.5\n2,2.2")
    assert read(path) == (["step", "loss"], [{"step": "1", "loss": "2.5"}])


def test_as_lightnings_logger(tmp_path):
    run = trainer(tmp_path, [], 4, logger=MetricsCSV(tmp_path), limit_val_batches=1, val_check_interval=2)
    run.fit(TinyStage())
    rows = table(tmp_path)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [bool(row["val/weight"]) for row in rows] == [False, True, False, True]
    assert all(row["loss"] for row in rows)
