"""The default callbacks on a real stage: a skipped step touches nothing, a resumed run ends as an uninterrupted one."""

import json
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from litseek.callbacks import MetricsCSV, SpikeGuard, WeightAverage
from litseek.callbacks.metrics_csv import read
from litseek.errors import LitseekError
from litseek.stages.pretrain import Pretrain
from tests.stages.fitting import fit
from tests.toy import toy_stage


class Poisoned(Pretrain):
    """Losses that are not a number from step ``first`` on (counted from 0)."""

    first = 2

    def head_loss(self, hidden, micro):
        loss, metrics = super().head_loss(hidden, micro)
        return (loss * float("nan") if self.step >= self.first else loss), metrics


def defaults():
    """What conf/callbacks/default.yaml makes, all of it."""
    conf = Path(__file__).parents[2] / "conf" / "callbacks" / "default.yaml"
    return {name: instantiate(value) for name, value in OmegaConf.load(conf).items()}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_skipped_steps_touch_neither_bias_nor_average_and_end_the_run(tmp_path):
    guard, average, stage = SpikeGuard(limit=3), WeightAverage(decay=0.5), toy_stage(Poisoned)
    with pytest.raises(LitseekError, match=r"Step 5 is the last of 3 in a row"):
        fit(stage, tmp_path / "poisoned", 9, guard, average)
    clean, reference = WeightAverage(decay=0.5), toy_stage(Pretrain)
    fit(reference, tmp_path / "clean", 2, clean)
    assert average.ema.updates == clean.ema.updates == 2
    assert any("e_score_correction_bias" in name for name in clean.ema.average)
    for name, value in clean.ema.average.items():
        assert torch.equal(value, average.ema.average[name]), name
    for name, value in reference.model.state_dict().items():
        assert torch.equal(value, stage.model.state_dict()[name]), name


def test_all_defaults_together_resume_as_if_never_interrupted(tmp_path, capsys):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    runs = {}
    for folder, stops in ((straight, [7]), (killed, [4, 7])):
        resume = None
        for stop in stops:
            callbacks = defaults()
            progress = callbacks.pop("progress")
            stage = toy_stage(Pretrain, checkpoint_every=3)
            fit(
                stage, folder, stop, *callbacks.values(), progress, resume=resume,
                logger=MetricsCSV(folder), enable_progress_bar=True, log_every_n_steps=1,
            )  # fmt: skip
            resume = folder / "checkpoints/step-00000003"  # the last before the end: step 4 is trained again
        runs[folder] = callbacks["ema"].ema
    for name, value in runs[straight].average.items():
        assert torch.equal(value, runs[killed].average[name]), name
    assert "mtp.0.norm.weight" in runs[straight].average
    columns = ("step", "loss", "grad_norm", "tokens", "routing/entropy", "skipped_steps", "val/loss")
    one, two = ([[row.get(c) for c in columns] for row in read(f / "metrics.csv")[1]] for f in (straight, killed))
    assert one == two and all(row[1] for row in one[:7])
    routing = [
        [json.loads(line) for line in (f / "routing.jsonl").read_text().splitlines()] for f in (straight, killed)
    ]
    assert routing[0] == routing[1] and {row["layer"] for row in routing[0]} == {"layers.1", "mtp.0"}
    assert "step 7/7" in capsys.readouterr().err
