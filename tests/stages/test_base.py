"""What every stage does: schedules by step and tokens, the ramp, held-out metrics, checks at construction."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from litseek.optim import BatchRamp, LRSchedule, Steps
from litseek.parallel.checkpoint import load_weights, resolve_checkpoint
from litseek.stages.pretrain import Pretrain
from tests.stages.fitting import fit, trainer
from tests.toy import SEQ, ToySource, toy_optim, toy_stage, with_biases


class Seen(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        metrics = {k: float(v) for k, v in trainer.logged_metrics.items()}
        metrics |= {k: float(v) for k, v in trainer.callback_metrics.items()}
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append(metrics | {"used_lr": lr, "tokens_seen": module.tokens_seen, "count": batch["count"]})


def test_what_is_logged(tmp_path):
    seen = Seen()
    fit(toy_stage(Pretrain), tmp_path, 2, seen)
    row = seen.rows[-1]
    assert {"loss", "loss/main", "loss/mtp", "loss/balance", "grad_norm", "lr", "tokens"} <= row.keys()
    assert row["loss"] == pytest.approx(row["loss/main"] + 0.3 * row["loss/mtp"] + row["loss/balance"], rel=1e-5)
    assert row["tokens"] == row["tokens_seen"] == 2 * 4 * SEQ


def test_the_rate_follows_steps_and_tokens(tmp_path):
    schedule = LRSchedule(
        1e-3, [dict(length=3 * 4 * SEQ), dict(shape="linear", length=2 * 4 * SEQ, to=1e-4)], warmup_steps=2
    )
    seen = Seen()
    fit(toy_stage(Pretrain, optim=toy_optim(schedule=schedule)), tmp_path, 6, seen)
    assert [row["used_lr"] for row in seen.rows] == pytest.approx([0, 5e-4, 1e-3, 1e-3, 5.5e-4, 1e-4])


def test_the_ramp_changes_the_number_of_micro_batches(tmp_path):
    seen, ramp = Seen(), BatchRamp(start=2, end=6, tokens=20 * SEQ, multiple=2)
    stage = toy_stage(Pretrain, batch=ramp)
    fit(stage, tmp_path, 9, seen)
    counts = [int(row["count"]) for row in seen.rows]
    assert counts[0] == 2 and counts[-1] == 6 and 4 in counts and counts == sorted(counts)
    assert stage.consumed == sum(counts) and stage.tokens_seen == sum(counts) * SEQ
    done = [0, *(sum(counts[: i + 1]) for i in range(8))]
    assert counts == [ramp.sequences(samples * SEQ) for samples in done]


def test_lambda_and_gamma_follow_tokens(tmp_path):
    stage = toy_stage(
        Pretrain, mtp_weight=Steps([0.3, 0.1], [2 * 4 * SEQ]), balance_speed=Steps([0.01, 0.0], [4 * SEQ])
    )
    seen = Seen()
    biases = []

    class Biases(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            routers = module.model.balance_routers().values()
            biases.append(torch.cat([r.e_score_correction_bias.clone() for r in routers]))

    fit(stage, tmp_path, 3, seen, Biases())
    for row, weight in zip(seen.rows, (0.3, 0.3, 0.1), strict=True):
        assert row["loss"] == pytest.approx(row["loss/main"] + weight * row["loss/mtp"] + row["loss/balance"], rel=1e-5)
    assert biases[0].abs().max() == pytest.approx(0.01) and torch.equal(biases[1], biases[0])


def test_held_out_metrics_are_those_of_the_plain_model(tmp_path):
    stage = toy_stage(Pretrain)
    stage.configure_model()
    with_biases(stage.model)
    trainer(tmp_path, 0).validate(stage, verbose=False)
    metrics = stage.trainer.callback_metrics
    nats = tokens = 0.0
    for row in stage.data.validation():
        logits = stage.model.logits(row["tokens"][None])[0].detach()
        nats += float(torch.nn.functional.cross_entropy(logits, row["labels"], reduction="sum"))
        tokens += len(row["labels"])
    assert float(metrics["val/loss"]) == pytest.approx(nats / tokens, rel=1e-5)
    expected = nats / math.log(2) / stage.data.validation_bytes
    assert float(metrics["val/bits_per_byte"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["val/bytes"]) == stage.data.validation_bytes and float(metrics["val/gzip_bits_per_byte"]) > 0


def test_a_checkpoint_rebuilds_the_model_and_only_it(tmp_path):
    stage = toy_stage(Pretrain)
    fit(stage, tmp_path, 2)
    other = toy_stage(Pretrain, seed=8)
    load_weights(other, resolve_checkpoint(tmp_path))
    assert all(torch.equal(v, other.model.state_dict()[n]) for n, v in stage.model.state_dict().items())
    assert (other.step, other.consumed) == (0, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(batch=3), r"stage\.batch=3 is not a multiple of stage\.micro_batch=2"),
        (dict(batch=0), r"stage\.batch=0 and stage\.micro_batch=2 must be at least 1"),
        (dict(data=ToySource(seq_len=32)), r"data\.seq_len=32 exceeds model\.max_position_embeddings=16"),
    ],
)
def test_contradictions_stop_at_construction(keys, message):
    with pytest.raises(ValueError, match=message):
        toy_stage(Pretrain, **keys)


def test_a_model_without_mtp_has_no_mtp_loss(tmp_path):
    seen = Seen()
    fit(toy_stage(Pretrain, model=dict(num_nextn_predict_layers=0)), tmp_path, 1, seen)
    assert "loss/mtp" not in seen.rows[0]
    assert seen.rows[0]["loss"] == pytest.approx(seen.rows[0]["loss/main"] + seen.rows[0]["loss/balance"], rel=1e-5)
