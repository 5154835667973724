"""A run that stops and goes on equals one that never stopped, bit for bit."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from litseek.errors import LitseekError
from litseek.optim import BatchRamp
from litseek.parallel import storage
from litseek.stages.pretrain import Pretrain
from tests.stages.fitting import fit
from tests.toy import ToySource, toy_optim, toy_stage


def stage(**keys):
    return toy_stage(Pretrain, optim=toy_optim(moments="bf16"), **keys)


def same_state(a, b):
    for name, value in a.model.state_dict().items():
        assert torch.equal(value, b.model.state_dict()[name]), name
    ours, theirs = (s.trainer.strategy.optimizer_state(s.trainer.optimizers[0])["state"] for s in (a, b))
    for name, state in ours.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name][key])), (name, key)
            assert torch.as_tensor(value).dtype == torch.as_tensor(theirs[name][key]).dtype


@pytest.mark.parametrize("at", [3, 4, 6])  # 4 is also a validation step
def test_resuming_from_any_checkpoint_is_bit_exact(tmp_path, at):
    whole = stage(checkpoint_every=1, checkpoint_keep=0)
    losses = fit(whole, tmp_path / "whole", 8)
    assert len(losses) == 8
    resumed = stage(checkpoint_every=1, checkpoint_keep=0)
    rest = fit(resumed, tmp_path / "rest", 8, resume=tmp_path / f"whole/checkpoints/step-{at:08d}")
    assert rest == losses[at:]
    same_state(whole, resumed)
    assert resumed.results == whole.results
    assert (resumed.step, resumed.consumed, resumed.tokens_seen) == (8, 32, 8 * 4 * 16)


def test_going_on_after_the_end_with_more_steps(tmp_path):
    whole = stage()
    losses = fit(whole, tmp_path / "whole", 7)
    fit(stage(), tmp_path / "first", 4)
    resumed = stage()
    rest = fit(resumed, tmp_path / "second", 7, resume=storage.last(tmp_path / "first/checkpoints"))
    assert rest == losses[4:]
    same_state(whole, resumed)


def test_a_finished_run_that_is_resumed_trains_nothing_and_knows_its_results(tmp_path):
    first = stage()
    fit(first, tmp_path, 4)
    again = stage()
    assert fit(again, tmp_path, 4, resume=storage.last(tmp_path / "checkpoints")) == []
    assert again.results == first.results


def test_every_sample_is_trained_on_once_across_a_resume_and_a_ramp(tmp_path):
    ramp = BatchRamp(start=2, end=8, tokens=2 * 16 * 10, multiple=2)
    data = ToySource()
    whole = stage(batch=ramp, data=data, checkpoint_every=1, checkpoint_keep=0)
    losses = fit(whole, tmp_path / "whole", 7)
    assert whole.consumed > 7 * ramp.start
    assert data.asked == list(range(len(data.asked))) and len(data.asked) >= whole.consumed
    resumed_data = ToySource()
    resumed = stage(batch=ramp, data=resumed_data, checkpoint_every=0)
    rest = fit(resumed, tmp_path / "rest", 7, resume=tmp_path / "whole/checkpoints/step-00000003")
    assert rest == losses[3:]
    assert resumed.consumed == whole.consumed
    # Lightning fetches one batch ahead of the one it trains on; what was trained on is the same
    start = resumed_data.asked[0]
    assert resumed_data.asked == data.asked[data.asked.index(start) :]


class Draws(Callback):
    """Takes random numbers of all kinds in every step, as sampling would."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, *args):
        self.seen.append((random.random(), float(np.random.rand()), float(torch.rand(()))))


def test_random_numbers_go_on_where_they_were(tmp_path):
    whole, rest = Draws(), Draws()
    fit(stage(checkpoint_every=1, checkpoint_keep=0), tmp_path / "whole", 4, whole)
    fit(stage(), tmp_path / "rest", 4, rest, resume=tmp_path / "whole/checkpoints/step-00000002")
    assert rest.seen == whole.seen[2:]


def test_a_checkpoint_of_another_stage_is_refused(tmp_path):
    fit(stage(), tmp_path, 1)
    with pytest.raises(LitseekError, match="of stage pretrain, not of other"):
        fit(stage(name="other"), tmp_path, 2, resume=storage.last(tmp_path / "checkpoints"))
