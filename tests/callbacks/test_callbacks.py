"""Spike guard, weight average, routing statistics and throughput on a stage of one linear layer."""

import json

import pytest
import torch

from litseek.callbacks import RoutingStats, SpikeGuard, Throughput, WeightAverage
from litseek.callbacks.routing import keep_until, summary
from litseek.callbacks.throughput import peak_tflops
from litseek.errors import LitseekError
from tests.callbacks.stage import TinyStage, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")  # fmt: skip


def test_spike_guard_counts_and_goes_on(tmp_path):
    guard, stage = SpikeGuard(limit=3), TinyStage(bad={2, 3, 6})
    run = trainer(tmp_path, [guard], 8)
    run.fit(stage)
    assert (guard.skipped, guard.in_a_row, run.global_step) == (3, 0, 8)
    assert run.callback_metrics["skipped_steps"] == 3


def test_spike_guard_stops_after_the_limit_in_a_row(tmp_path):
    guard, stage = SpikeGuard(limit=3), TinyStage(bad={2, 4, 5, 6})
    with pytest.raises(LitseekError, match=r"Step 6 is the last of 3 in a row that are not finite \(loss nan"):
        trainer(tmp_path, [guard], 10).fit(stage)
    assert guard.skipped == 4


def test_spike_guard_warns_with_numbers(tmp_path):
    with pytest.warns(UserWarning, match="step 2 skipped, it is not finite: loss nan, gradient norm 1"):
        trainer(tmp_path, [SpikeGuard()], 3).fit(TinyStage(bad={2}))


def test_spike_guard_keeps_its_counts_over_a_resume():
    guard, again = SpikeGuard(), SpikeGuard()
    guard.skipped, guard.in_a_row = 4, 2
    again.load_state_dict(guard.state_dict())
    assert (again.skipped, again.in_a_row) == (4, 2)


def test_spike_guard_that_resumes_at_its_limit_waits_for_one_more(tmp_path):
    """As after a stop, with a lower rate: on a GPU a checkpoint may have been written before the host knew."""
    for bad in (set(), {1}):
        guard = SpikeGuard(limit=2)
        guard.load_state_dict({"skipped": 2, "in_a_row": 2})
        run = trainer(tmp_path, [guard], 3)
        if bad:
            with pytest.raises(LitseekError, match="Step 1 is the last of 3 in a row"):
                run.fit(TinyStage(bad=bad))
        else:
            run.fit(TinyStage(bad=bad))
            assert (guard.skipped, guard.in_a_row) == (2, 0)


class Watch(WeightAverage):
    """Keeps what a plain average would be."""

    def on_train_start(self, trainer, stage):
        super().on_train_start(trainer, stage)
        self.plain = {n: t.detach().clone() for n, t in values(stage).items()}

    def on_train_batch_end(self, trainer, stage, *args):
        super().on_train_batch_end(trainer, stage, *args)
        if stage.step_result.finite and trainer.global_step % self.every == 0:
            for name, value in values(stage).items():
                self.plain[name].lerp_(value.detach(), 1 - self.ema.decay)


def values(stage):
    return stage.model.state_dict(keep_vars=True)


@pytest.mark.parametrize("every", [1, 2])
def test_average_follows_weights_and_balance_biases(tmp_path, every):
    watch, stage = Watch(decay=0.5, every=every), TinyStage()
    trainer(tmp_path, [watch], 4).fit(stage)
    assert watch.ema.updates == 4 // every and watch.ema.decay == 0.5**every
    assert set(watch.ema.average) == {"linear.weight", "linear.bias", "e_score_correction_bias"}
    for name, value in watch.plain.items():
        assert torch.equal(watch.ema.average[name], value)
    assert 0 < watch.ema.average["e_score_correction_bias"][0] < 4


def test_average_leaves_skipped_steps_out(tmp_path):
    average = WeightAverage(decay=0.5)
    trainer(tmp_path, [average], 4).fit(TinyStage(bad={2, 3}))
    assert average.ema.updates == 2


def test_average_stands_in_for_the_weights_during_validation_only(tmp_path):
    average, stage = WeightAverage(decay=0.9, validate=True), TinyStage()
    run = trainer(tmp_path, [average], 3, limit_val_batches=2, val_check_interval=3)
    run.fit(stage)
    seen = float(run.callback_metrics["val/weight"])
    assert seen == pytest.approx(float(average.ema.average["linear.weight"].sum()))
    assert seen != pytest.approx(float(stage.model.linear.weight.detach().sum()))
    assert stage.model.e_score_correction_bias.tolist() == [3, 3]


def test_average_is_in_the_checkpoint(tmp_path):
    first, stage = WeightAverage(decay=0.5), TinyStage()
    run = trainer(tmp_path, [first], 2)
    run.fit(stage)
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = WeightAverage(decay=0.5)
    trainer(tmp_path, [again], 4).fit(TinyStage(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    straight = WeightAverage(decay=0.5)
    trainer(tmp_path, [straight], 4).fit(TinyStage())
    assert again.ema.updates == straight.ema.updates == 4
    assert torch.equal(again.ema.average["linear.weight"], straight.ema.average["linear.weight"])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_routing_writes_every_layer_at_its_cadence(tmp_path):
    run = trainer(tmp_path, [RoutingStats(every=3)], 7)
    run.fit(TinyStage())
    rows = lines(tmp_path / "routing.jsonl")
    assert [(row["step"], row["layer"]) for row in rows] == [
        (step, layer) for step in (1, 3, 6) for layer in ("layers.1", "mtp.0")
    ]
    assert rows[2] == {"step": 3, "layer": "layers.1", "load": [3, 97]}
    assert run.callback_metrics["routing/worst_max_over_mean"] == pytest.approx(93 / 50)
    assert run.callback_metrics["routing/max_over_mean"] == pytest.approx((93 / 50 + 1) / 2)


def test_routing_without_experts_writes_nothing(tmp_path):
    trainer(tmp_path, [RoutingStats(every=1)], 2).fit(TinyStage(loads=False))
    assert not (tmp_path / "routing.jsonl").exists()


def test_routing_summary_at_its_extremes():
    even, one = summary([torch.tensor([5, 5, 5, 5])]), summary([torch.tensor([20, 0, 0, 0])])
    assert even == {
        "max_over_mean": 1.0,
        "worst_max_over_mean": 1.0,
        "entropy": pytest.approx(1.0),
        "idle_experts": 0.0,
    }
    assert one == {"max_over_mean": 4.0, "worst_max_over_mean": 4.0, "entropy": 0.0, "idle_experts": 0.75}
    assert summary([torch.zeros(4)]) == {}


def test_routing_drops_what_a_resumed_run_repeats_and_a_torn_line(tmp_path):
    path = tmp_path / "routing.jsonl"
    path.write_text(
        "".join(json.dumps({"step": s, "layer": "layers.1", "load": [1]}) + "\n" for s in (1, 3, 6)) + '{"st'
    )
    keep_until(path, 3)
    assert [row["step"] for row in lines(path)] == [1, 3]
    keep_until(path, 0)
    assert path.read_text() == ""
    keep_until(tmp_path / "absent.jsonl", 3)


def test_throughput_counts_tokens_over_training_time_only(tmp_path, monkeypatch):
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr("litseek.callbacks.throughput.time.perf_counter", lambda: next(clock))
    run = trainer(
        tmp_path, [Throughput(window=4, warmup=2, peak_tflops=1e-3)], 8, limit_val_batches=1, val_check_interval=4
    )
    run.fit(TinyStage())
    # the clock ticks once at each start and end: 2 s a step with its wait for data, 1 s after the validation at step 4
    assert run.callback_metrics["throughput/tokens_per_s"] == pytest.approx(400 / 7)
    assert run.callback_metrics["throughput/model_tflops"] == pytest.approx(400 / 7 * 8000 / 1e12)
    assert run.callback_metrics["throughput/mfu"] == pytest.approx(400 / 7 * 8000 / 1e12 / 1e-3)


def test_throughput_of_a_stage_that_also_generates_has_no_flops(tmp_path):
    stage = TinyStage()
    stage.counts_flops = False
    run = trainer(tmp_path, [Throughput(window=1, warmup=0)], 2)
    run.fit(stage)
    assert run.callback_metrics["throughput/tokens_per_s"] > 0
    assert "throughput/model_tflops" not in run.callback_metrics


def test_peak_is_known_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_tflops(torch.device("cuda")) == 989.0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some New GPU")
    assert peak_tflops(torch.device("cuda")) is None
    assert peak_tflops(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SpikeGuard(limit=0), "spike_guard.limit is 0"),
        (lambda: RoutingStats(every=0), "routing.every is 0"),
        (lambda: Throughput(window=0), "throughput.window is 0"),
        (lambda: WeightAverage(every=0), "ema.every is 0"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
