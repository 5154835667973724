"""The report on made-up run folders: what is on the page, what is left out, what an experiment's README gets."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import pytest

from litseek.cli.report import report_run
from litseek.cli.report_arms import mean_spread, report_experiment
from litseek.errors import LitseekError

STAGES = {"pretrain": (2.62, 1.86), "context_32k": (1.88, 1.80), "context_128k": (1.83, 1.77), "sft": (1.1, 0.4)}


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def receipt(stage: str, metrics: dict[str, float], tokens: int, seconds: float) -> dict:
    return {
        "stage": stage, "config": "ab12" * 16, "parent": "0123456789abcdef",
        "commit": "3fa72aa0c0ffee", "tokens": tokens, "wall_s": seconds, "metrics": metrics,
        "versions": {"litseek": "0.1.0", "python": "3.11.7", "torch": "2.13.0+cpu", "lightning": "2.6.6"},
        "device": "CPU, 2 threads",
    }  # fmt: skip


def fake_stage(folder: Path, name: str, rng: random.Random, steps: int = 160) -> None:
    """A stage folder of plausible numbers, in the shape that `litseek train` writes."""
    folder.mkdir(parents=True)
    rows: list[dict] = []
    for step in range(1, steps + 1):
        row: dict = {"step": step, "tokens": step * 4096}
        if name == "grpo":
            reward = 0.42 + 0.3 * (1 - math.exp(-step / 50)) + rng.gauss(0, 0.03)
            row |= {
                "loss": rng.gauss(0, 0.01),
                "rollout/reward": reward,
                "eval/accuracy": reward if step % 40 == 0 else "",
            }
        else:
            start, end = STAGES[name]
            row |= {"loss": end + (start - end) * 3 * math.exp(-step / 12) + rng.gauss(0, 0.03)}
        rows.append(row)
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if name in ("sft", "grpo"):
        value = {"sft": 0.416, "grpo": 0.694}[name]
        metrics = {"eval/accuracy": value, "eval/problems": 600}
        metrics |= {"eval/accuracy_before": 0.011} if name == "sft" else {}
        samples = [
            {"step": 0, "prompt": "3 + 4 + 9 =", "completion": "def 3:\n    <b>path</b>", "correct": 0.0},
            {"step": 160, "prompt": "3 + 4 + 9 =", "completion": "3 + 4 = 7; 7 + 9 = 16. #### 16", "correct": 1.0},
            {"step": 160, "prompt": "8 + 8 + 7 =", "completion": "8 + 8 = 16; 16 + 7 = 22. #### 22", "correct": 0.0},
        ]  # fmt: skip
    else:
        metrics = {
            "val/bits_per_byte": STAGES[name][1],
            "val/gzip_bits_per_byte": 2.113,
            "val/xz_bits_per_byte": 1.978,
            "val/bytes": 400000,
        }
        samples = []
        if name != "pretrain":
            metrics |= {"val/bits_per_byte_before": 1.99, "val/bits_per_byte_untrained": 1.91}
    write_jsonl(folder / "samples.jsonl", samples)
    write_jsonl(folder / "routing.jsonl", [
        {"step": step, "layer": f"layers.{layer}.dispatch",
         "load": [max(0.0, 512 * (1 + rng.gauss(0, 0.15) + 0.9 * math.exp(-step / 30) * math.sin(5 * e + layer)))
                  for e in range(8)]}
        for step in range(1, steps + 1, 4) for layer in (1, 2, 3)
    ])  # fmt: skip
    if name.startswith("context"):
        old = {"context_32k": 256, "context_128k": 512}[name]
        positions = list(range(8, 2 * old, 16))
        base = [1.9 + 1.4 / math.sqrt(1 + p / 8) for p in positions]
        arms = {
            "old frequencies": [b + max(0, p - old) / old * 0.5 for b, p in zip(base, positions)],
            "yarn untrained": [b + 0.02 + max(0, p - old) / old * 0.04 for b, p in zip(base, positions)],
            "yarn trained": [b - 0.03 for b in base],
        }
        data = {"positions": positions, "arms": arms, "old_length": old, "unit": "nats a token"}
        (folder / "loss_by_position.json").write_text(json.dumps(data), encoding="utf-8")
    tokens, seconds = steps * 4096, {"pretrain": 150.0, "grpo": 85.0}.get(name, 55.0)
    (folder / "receipt.json").write_text(json.dumps(receipt(name, metrics, tokens, seconds)), encoding="utf-8")


def fake_run(folder: Path, stages: tuple[str, ...] = (*STAGES, "grpo")) -> Path:
    rng = random.Random(0)
    for name in stages:
        fake_stage(folder / name, name, rng)
    return folder


def test_page_of_a_whole_run(tmp_path: Path):
    path = report_run(fake_run(tmp_path / "demo"))
    page = path.read_text(encoding="utf-8")
    for text in ("Pre-training", "1.860", "gzip -9: 2.113", "69.4 %", "before: 1.1 %", "Loss by position", "Expert load",
                 "Receipts", "3fa72aa0c0", "torch 2.13.0+cpu", "&lt;b&gt;path"):  # fmt: skip
        assert text in page, text
    assert path.stat().st_size < 3_000_000
    for outside in ("http://", "https://"):
        allowed = page.count(f'="{outside}www.w3.org/')  # XML namespaces are names, nothing is loaded from them
        assert page.count(outside) == allowed, outside
    assert "<script" not in page and '<link rel="icon" href="data:,' in page


def test_frequencies_and_training_are_told_apart(tmp_path: Path):
    page = report_run(fake_run(tmp_path / "demo", ("context_32k",))).read_text(encoding="utf-8")
    assert "from the frequencies" in page and "from training" in page
    assert "<td>1.990</td><td>1.910</td><td>1.800</td><td>-0.080</td><td>-0.110</td>" in page
    assert "Not in this run folder: Pre-training, Context 128K, SFT, GRPO." in page


def test_an_unfinished_stage_is_said_to_be(tmp_path: Path):
    folder = fake_run(tmp_path / "demo", ("pretrain", "sft"))
    (folder / "sft" / "receipt.json").unlink()
    page = report_run(folder).read_text(encoding="utf-8")
    assert "Not finished, so without a receipt: SFT." in page


def test_a_stage_that_was_set_aside_is_left_out(tmp_path: Path):
    folder = fake_run(tmp_path / "demo", ("pretrain", "sft"))
    (folder / "sft").rename(folder / "sft.replaced")
    assert "sft.replaced" not in report_run(folder).read_text(encoding="utf-8")


def test_bad_folders_are_named(tmp_path: Path):
    with pytest.raises(LitseekError, match="no such folder"):
        report_run(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LitseekError, match="no stage with a receipt"):
        report_run(tmp_path / "empty")
    folder = fake_run(tmp_path / "demo", ("pretrain",))
    with (folder / "pretrain" / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    with pytest.raises(LitseekError, match=r"samples\.jsonl, line 1: not JSON"):
        report_run(folder)


README = """# Balance

Question: which one?

<!-- results:begin metrics=val/bits_per_byte,routing/max_over_mean curves=loss,routing/max_over_mean -->
old text
<!-- results:end -->

Verdict: none yet.
"""


def fake_experiment(root: Path, arms: dict[str, float], seeds: int = 3) -> tuple[Path, Path]:
    folder, runs = root / "experiments" / "balance", root / "runs"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(README, encoding="utf-8")
    for arm, shift in arms.items():
        (folder / f"{arm}.yaml").write_text("# @package _global_\n", encoding="utf-8")
        for seed in range(seeds):
            rng = random.Random(f"{arm}{seed}")
            stage = runs / "balance" / arm / f"seed={seed}" / "pretrain"
            stage.mkdir(parents=True)
            rows = ["step,tokens,loss,routing/max_over_mean"]
            for step in range(1, 101):
                loss, load = (
                    2 + shift + 2 * math.exp(-step / 9) + rng.gauss(0, 0.02),
                    1.2 + 3 * shift + rng.random() / 9,
                )
                rows.append(f"{step},{step * 512},{loss:.4f},{load:.4f}")
            (stage / "metrics.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
            data = receipt("pretrain", {"val/bits_per_byte": 2 + shift + rng.gauss(0, 0.01)}, 51200, 12.5)
            (stage / "receipt.json").write_text(json.dumps(data), encoding="utf-8")
    return folder, runs


def test_experiment_gets_table_csv_and_plots(tmp_path: Path):
    folder, runs = fake_experiment(tmp_path, {"aux_free": 0.0, "none": 0.3})
    written = report_experiment(folder, runs)
    assert {p.name for p in written} == {"results.csv", "metrics.png", "curves.png", "README.md"}
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "old text" not in text and text.startswith("# Balance") and text.endswith("Verdict: none yet.\n")
    assert "| arm | seeds | val/bits_per_byte | routing/max_over_mean |" in text
    assert "| `aux_free` | 3 | " in text and " ± " in text
    assert "litseek train -m experiment=balance/aux_free,balance/none seed=0,1,2" in text
    assert "commit 3fa72aa0c0" in text and "CPU, 2 threads" in text and "torch 2.13.0+cpu" in text
    with (folder / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, str(s)) for arm in ("aux_free", "none") for s in range(3)
    ]
    assert 1.9 < float(rows[0]["val/bits_per_byte"]) < 2.1
    before = {path: path.read_bytes() for path in written}
    report_experiment(folder, runs)
    assert before == {path: path.read_bytes() for path in written}


def test_experiment_against_an_arm(tmp_path: Path):
    folder, runs = fake_experiment(tmp_path, {"aux_free": 0.0, "none": 0.3})
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8")
    mark = text[text.index("<!-- results:begin") :].split("-->")[0]
    readme.write_text(text.replace(mark, mark + "against=aux_free after=20 "), encoding="utf-8")
    written = report_experiment(folder, runs)
    assert "difference.png" in {p.name for p in written}
    text = readme.read_text(encoding="utf-8")
    assert "to `aux_free` of the same seed" in text and "`seeds of aux_free` at most" in text
    readme.write_text(text.replace("after=20", "after=late"), encoding="utf-8")
    with pytest.raises(LitseekError, match="against=<arm> and after=<step>, found 'after=late'"):
        report_experiment(folder, runs)


def test_experiment_names_what_is_not_finished(tmp_path: Path):
    folder, runs = fake_experiment(tmp_path, {"aux_free": 0.0, "none": 0.3})
    (runs / "balance" / "none" / "seed=2" / "pretrain" / "receipt.json").unlink()
    (folder / "late.yaml").write_text("# @package _global_\n", encoding="utf-8")
    report_experiment(folder, runs)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "Not finished: late, none seed=2." in text and "| `none` | 2 |" in text


def test_experiment_without_runs_or_marks(tmp_path: Path):
    folder, runs = fake_experiment(tmp_path, {"aux_free": 0.0}, seeds=1)
    with pytest.raises(LitseekError, match="no finished run of aux_free; first run litseek train -m"):
        report_experiment(folder, tmp_path / "elsewhere")
    (folder / "README.md").write_text("# Balance\n", encoding="utf-8")
    with pytest.raises(LitseekError, match="results:begin"):
        report_experiment(folder, runs)


def test_digits_follow_the_spread():
    assert mean_spread([1.2341, 1.2382, 1.2363]) == "1.2362 ± 0.0021"
    assert mean_spread([10.0, 20.0, 30.0]) == "20 ± 10"
    assert mean_spread([0.5]) == "0.5" and mean_spread([]) == "–"
