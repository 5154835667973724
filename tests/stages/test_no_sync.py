"""On a GPU a training step never makes the host wait, and a step that is not finite changes nothing all the same."""

import math
import threading

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from litseek.callbacks import Progress, RoutingStats, SpikeGuard, Throughput, WeightAverage
from litseek.errors import LitseekError
from litseek.optim import MuonConfig
from litseek.parallel import storage
from litseek.precision import BF16, FP8
from litseek.stages.pretrain import Pretrain
from litseek.stages.sft import Sft
from tests.stages.fitting import fit, trainer
from tests.toy import ToySource, toy_config, toy_optim

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
GPU = dict(accelerator="gpu", log_every_n_steps=1000, val_check_interval=1000)
WIDTHS = dict(qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, hidden_size=64, moe_intermediate_size=128)


def stage_of(cls, optim=None, data=None, precision=None, **keys):
    """Widths that the GPU's grouped products and attention take."""
    return cls(toy_config(**WIDTHS), precision or BF16(), optim or toy_optim(moments="bf16"), data or ToySource(),
               **{"batch": 4, "micro_batch": 2, "seed": 3, **keys})  # fmt: skip


class Strict(Callback):
    """From step ``first`` to step ``last`` an operation that waits for the GPU is an error; explicit waits are recorded,
    as torch's debug mode does not see them. The average's thread may wait, the training's may not."""

    def __init__(self, first=3, last=7):
        self.first, self.last, self.steps, self.waits = first, last, 0, []
        self.patch = pytest.MonkeyPatch()

    def on_train_batch_start(self, trainer, module, *args):
        if trainer.global_step == self.first:
            for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
                self.patch.setattr(owner, "synchronize", self.recorded(owner.synchronize, threading.current_thread()))
            torch.cuda.set_sync_debug_mode("error")

    def recorded(self, original, thread):
        def synchronize(*args, **keys):
            if threading.current_thread() is thread:
                self.waits.append(original)
            return original(*args, **keys)

        return synchronize

    def on_train_batch_end(self, trainer, module, *args):
        self.steps += self.first < trainer.global_step <= self.last
        if trainer.global_step == self.last:
            self.stop()

    def on_exception(self, trainer, module, exception):
        self.stop()

    def stop(self):
        torch.cuda.set_sync_debug_mode("default")
        self.patch.undo()


@pytest.mark.parametrize(
    ("cls", "keys"),
    [
        (Pretrain, {}),
        (Pretrain, dict(optim=MuonConfig(lr=1e-3))),
        (Sft, dict(data=ToySource(documents=True))),
        (Pretrain, dict(precision=FP8())),
    ],
    ids=["pretrain", "muon", "sft", "fp8"],
)
def test_a_step_makes_the_host_wait_for_nothing(cls, keys, tmp_path):
    strict, stage = Strict(), stage_of(cls, **keys)
    callbacks = [
        SpikeGuard(), WeightAverage(every=1000), Throughput(), RoutingStats(every=1000), Progress(seconds=0), strict,
    ]  # fmt: skip
    trainer(tmp_path, 9, *callbacks, enable_progress_bar=True, **GPU).fit(stage)
    assert strict.steps == 4 and not strict.waits


def test_the_average_is_fed_without_a_wait(tmp_path):
    average, strict = WeightAverage(decay=0.5), Strict()
    trainer(tmp_path, 9, average, strict, **GPU).fit(stage_of(Pretrain))
    assert average.ema.updates == 9 and strict.steps == 4 and not strict.waits


class Poisoned(Pretrain):
    """A loss that is not a number in the steps of ``bad`` (counted from 0)."""

    bad = (2,)

    def head_loss(self, hidden, micro):
        loss, metrics = super().head_loss(hidden, micro)
        return (loss * float("nan") if self.step in self.bad else loss), metrics


def test_a_step_that_is_not_finite_changes_nothing_but_the_place_in_the_data(tmp_path):
    guard = SpikeGuard()
    fit(stage_of(Poisoned, checkpoint_every=1, checkpoint_keep=0), tmp_path, 4, WeightAverage(decay=0.5), guard, **GPU)
    two, three, four = (storage.load(tmp_path / f"checkpoints/step-{n:08d}") for n in (2, 3, 4))
    flat = lambda state: {
        **state["state_dict"],
        **{f"{n}/{k}": v for n, s in state["optimizer_states"][0]["state"].items() for k, v in s.items()},
        **{f"average/{n}": v for n, v in average_of(state).items()},
    }
    before, skipped, after = flat(two), flat(three), flat(four)
    assert all(torch.equal(value, skipped[name]) for name, value in before.items())
    assert any("e_score_correction_bias" in name for name in before) and any("average" in name for name in before)
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    assert int(after["norm.weight/step"]) == 3 and after["norm.weight/step"].dtype == torch.int64
    assert (two["stage"]["consumed"], three["stage"]["consumed"]) == (8, 12)
    assert (guard.skipped, guard.in_a_row) == (1, 0)


def average_of(state):
    return next(s["average"] for s in state["callbacks"].values() if "average" in s)


class AllBad(Poisoned):
    bad = tuple(range(1, 100))


def test_the_guard_stops_the_run_though_it_learns_late(tmp_path):
    guard, stage = SpikeGuard(limit=3), stage_of(AllBad)
    with pytest.raises(LitseekError, match=r"Step 4 is the last of \d+ in a row that are not finite \(loss nan"):
        trainer(tmp_path, 60, guard, **GPU).fit(stage)
    assert guard.skipped >= 3 and 4 <= stage.step < 60


def test_resume_is_bit_exact(tmp_path):
    straight, resumed = (stage_of(Pretrain, checkpoint_every=2, checkpoint_keep=0) for _ in range(2))
    whole = fit(straight, tmp_path / "a", 4, WeightAverage(), SpikeGuard(), **GPU)
    rest = fit(
        resumed,
        tmp_path / "b",
        4,
        WeightAverage(),
        SpikeGuard(),
        resume=tmp_path / "a/checkpoints/step-00000002",
        **GPU,
    )
    assert rest == whole[2:] and all(map(math.isfinite, whole))
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
