"""The strategy under Lightning: gradients survive its closure, and clipping, schedulers and callbacks work."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from litseek.models.transformer import build
from litseek.optim import AdamWConfig
from litseek.parallel import storage
from litseek.parallel.strategy import LitseekStrategy
from litseek.precision import BF16, FP8
from litseek.stages.pretrain import Pretrain
from tests.ranks import ranks
from tests.stages.fitting import Losses, fit, trainer
from tests.toy import ToySource, toy_optim, toy_stage

WIDE = dict(qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
"""Widths that FP8 takes."""


class Hooks(Callback):
    """What a user's callback sees of the gradients."""

    def __init__(self):
        self.seen = []
        self.norms = []

    def on_before_backward(self, trainer, module, loss):
        self.seen.append("before_backward")

    def on_after_backward(self, trainer, module):
        self.seen.append("after_backward")
        assert all(p.grad is not None for p in module.parameters())

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.seen.append("before_step")
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])))

    def on_train_batch_end(self, trainer, module, *args):
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()])))


def test_gradients_survive_the_closure_and_hooks_run_in_order(tmp_path):
    stage, hooks = toy_stage(Pretrain), Hooks()
    losses = fit(stage, tmp_path, 15, hooks)
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.5
    assert hooks.seen[:3] == ["before_backward", "after_backward", "before_step"]


def test_the_norm_is_clipped_and_the_unclipped_one_is_logged(tmp_path):
    stage, hooks = toy_stage(Pretrain, optim=toy_optim(clip=0.1)), Hooks()
    fit(stage, tmp_path, 2, hooks)
    before, after = hooks.norms[-2:]
    assert before > 1 and after == pytest.approx(0.1, rel=1e-4)
    assert float(stage.step_result.grad_norm) == pytest.approx(before, rel=1e-5)
    stage, hooks = toy_stage(Pretrain, optim=toy_optim(clip=0.1)), Hooks()
    fit(stage, tmp_path / "b", 2, hooks, gradient_clip_val=0.2)
    assert hooks.norms[-1] == pytest.approx(0.2, rel=1e-4)


class WithScheduler(Pretrain):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_users_scheduler_monitor_logger_and_model_checkpoint_work(tmp_path):
    stage = toy_stage(WithScheduler)
    keep = ModelCheckpoint(tmp_path / "best", monitor="val/loss", save_top_k=1, save_last=True)
    logger = CSVLogger(tmp_path / "csv")
    t = trainer(
        tmp_path, 8, keep, LearningRateMonitor("step"), logger=logger, enable_checkpointing=True, log_every_n_steps=1
    )
    t.fit(stage)
    assert t.lr_scheduler_configs[0].scheduler.last_epoch == 8
    assert keep.best_model_path and (tmp_path / "best" / "last.ckpt" / "manifest.json").is_file()
    resumed = toy_stage(WithScheduler)
    t = trainer(tmp_path / "more", 9)
    t.fit(resumed, ckpt_path=keep.last_model_path)
    assert resumed.step == 9 and t.lr_scheduler_configs[0].scheduler.last_epoch == 9


class WithFusedAdamW(Pretrain):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3, fused=True)


@pytest.mark.parametrize("precision", [BF16(), FP8()], ids=["bf16", "fp8"])
def test_a_users_fused_optimizer_trains_the_weights_that_products_read(precision, tmp_path):
    """Autograd does not see it write, and so it is told."""
    stage = toy_stage(WithFusedAdamW, model=WIDE, precision=precision)
    fit(stage, tmp_path, 2)
    tokens = torch.randint(64, (2, 16))
    fresh = build(stage.cfg, precision)
    fresh.load_state_dict(stage.model.state_dict())
    with torch.no_grad():
        assert torch.equal(stage.model.logits(tokens), fresh.logits(tokens))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("precision", [BF16(), FP8()], ids=["bf16", "fp8"])
def test_training_after_a_validation_alone(precision, tmp_path):
    """There Lightning is in inference mode, whose tensors no backward takes."""
    stage = toy_stage(Pretrain, model=WIDE, precision=precision)
    trainer(tmp_path, 1).validate(stage, verbose=False)
    assert len(fit(stage, tmp_path, 1)) == 1


class Poisoned(Pretrain):
    """A loss that is not a number in step 1 (counted from 0)."""

    def head_loss(self, hidden, micro):
        loss, metrics = super().head_loss(hidden, micro)
        return (loss * float("nan") if self.step == 1 else loss), metrics


def test_a_step_that_is_not_finite_changes_nothing_but_the_place_in_the_data(tmp_path):
    fit(toy_stage(Poisoned, checkpoint_every=1, checkpoint_keep=0), tmp_path, 3)
    one, two, three = (storage.load(tmp_path / f"checkpoints/step-{n:08d}") for n in (1, 2, 3))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    assert any(not torch.equal(v, three["state_dict"][n]) for n, v in two["state_dict"].items())
    moments = [s["optimizer_states"][0]["state"]["norm.weight"] for s in (one, two)]
    assert torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"])
    assert (one["stage"]["consumed"], two["stage"]["consumed"]) == (4, 8)


def test_biases_move_by_the_speed_towards_balance(tmp_path):
    stage = toy_stage(Pretrain, balance_speed=0.01)
    fit(stage, tmp_path, 1)
    for name, router in stage.model.balance_routers().items():
        load = stage.step_result.loads[name]
        assert load.sum() == 4 * 16 * 2  # every token of the global batch chose two experts
        expected = 0.01 * torch.sign(load.double().mean() - load)
        torch.testing.assert_close(router.e_score_correction_bias.double(), expected, rtol=1e-6, atol=0)


def test_accumulation_and_lightnings_precision_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2 .* only 1"):
        trainer(tmp_path, 1, accumulate_grad_batches=2).fit(toy_stage(Pretrain))
    with pytest.raises(ValueError, match=r"trainer\.precision .* precision=bf16"):
        trainer(tmp_path, 1, precision="bf16-mixed").fit(toy_stage(Pretrain))
    with pytest.raises(ValueError, match=r"stage\.batch=3 is not a multiple of stage\.micro_batch=2"):
        fit(toy_stage(Pretrain, batch=3), tmp_path, 1)
    with pytest.raises(ValueError, match="cannot run a stage"):
        trainer(tmp_path, 1, strategy="auto").fit(toy_stage(Pretrain))


@pytest.mark.parametrize("keys", [dict(chunks=2), dict(recompute=["all"]), dict(chunks=3, recompute=["attend"])])
def test_chunks_and_recompute_give_the_same_run(tmp_path, keys):
    plain, other = toy_stage(Pretrain), toy_stage(Pretrain)
    expected = fit(plain, tmp_path / "plain", 4)
    assert fit(other, tmp_path / "other", 4, strategy=LitseekStrategy(**keys)) == pytest.approx(expected, rel=1e-6)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def data_parallel(folder, poisoned_rank=None, resume=None, steps=4):
    """The stage on this rank of the pool: (losses, gradient norms, weights, results)."""
    rank = torch.distributed.get_rank()
    cls = Poisoned if rank == poisoned_rank else Pretrain
    stage = toy_stage(
        cls, batch=8, data=ToySource(held_out=5, documents=True), optim=slow(), checkpoint_every=2, checkpoint_keep=0
    )
    losses = Losses()
    world = torch.distributed.get_world_size()
    t = trainer(folder, steps, losses, strategy=LitseekStrategy(), devices=world)
    t.fit(stage, ckpt_path=resume)
    assert t.strategy.dp == world == 2
    return losses.values, stage.model.state_dict(), stage.results, stage.data.asked, stage.tokens_seen


def slow() -> AdamWConfig:
    """A rate at which Adam, which divides by tiny second moments, does not blow rounding up."""
    return toy_optim(lr=1e-4)


def test_two_data_parallel_ranks_equal_one(tmp_path):
    stage = toy_stage(Pretrain, batch=8, data=ToySource(held_out=5, documents=True), optim=slow())
    expected = fit(stage, tmp_path / "one", 4)
    first, second = ranks(2).run(data_parallel, tmp_path / "two")
    for losses, weights, results, _, tokens in (first, second):
        assert losses == pytest.approx(expected, rel=1e-6)
        assert tokens == stage.tokens_seen
        assert results == pytest.approx(stage.results, rel=1e-6)
        for name, value in stage.model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)
    assert (first[3][:8], second[3][:8]) == ([0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15])


def test_two_ranks_resume_bit_exactly_and_one_rank_reads_their_checkpoint(tmp_path):
    whole = ranks(2).run(data_parallel, tmp_path / "whole")
    rest = ranks(2).run(data_parallel, tmp_path / "rest", resume=str(tmp_path / "whole/checkpoints/step-00000002"))
    for a, b in zip(whole, rest):
        assert b[0] == a[0][2:]
        assert all(torch.equal(value, b[1][name]) for name, value in a[1].items())
    alone = toy_stage(Pretrain, batch=8, data=ToySource(documents=True), optim=slow())
    losses = fit(alone, tmp_path / "alone", 4, resume=tmp_path / "whole/checkpoints/step-00000002")
    assert losses == pytest.approx(whole[0][0][2:], rel=1e-6)


def test_a_nan_on_one_rank_is_skipped_by_both(tmp_path):
    first, second = ranks(2).run(data_parallel, tmp_path, poisoned_rank=1, steps=3)
    assert math.isnan(first[0][1]) and math.isnan(second[0][1])
    assert all(torch.equal(value, second[1][name]) and value.isfinite().all() for name, value in first[1].items())


class OwnLoader(Pretrain):
    """A user's map-style DataLoader in place of ours."""

    def train_dataloader(self):
        rows = [self.data[i] for i in range(32)]
        collate = lambda picked: {"rows": picked, "first": self.consumed, "count": 4}
        return torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate)


def own_loader(folder):
    stage = toy_stage(OwnLoader, batch=4, micro_batch=2)
    t = trainer(folder, 1, strategy=LitseekStrategy(), devices=2, use_distributed_sampler=True)
    t.fit(stage)
    return t.train_dataloader.sampler.num_replicas, t.train_dataloader.sampler.rank


def test_lightning_gives_a_users_own_loader_a_share(tmp_path):
    assert ranks(2).run(own_loader, tmp_path) == [(2, 0), (2, 1)]
