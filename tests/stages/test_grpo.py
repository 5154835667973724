"""GRPO: the first ratio is exactly 1, rollouts follow from (seed, index), a killed run goes on bit-equal, it learns."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

from litseek.data import tokenizer as bpe
from litseek.data.arithmetic import Arithmetic
from litseek.data.prompts import PromptSource
from litseek.models.config import DeepSeekV3Config
from litseek.optim.adamw import AdamWConfig
from litseek.optim.schedules import LRSchedule
from litseek.parallel.strategy import LitseekStrategy
from litseek.precision import FP32
from litseek.rl.evaluate import Accuracy
from litseek.rl.rewards import REWARDS
from litseek.stages.grpo import Grpo
from tests.ranks import ranks

OPTIONS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
MODEL = DeepSeekV3Config(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    num_attention_heads=2,
    n_shared_experts=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    max_position_embeddings=64,
    aux_loss_alpha=0.0,
)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe.train(["1 + 2 - 3 = 0\nAnswer: 4"], vocab_size=264, digits=1).save(folder)
    return str(folder)


def make(tokenizer: str, **keys) -> Grpo:
    data = PromptSource(Arithmetic("grpo", options=OPTIONS), seq_len=48, tokenizer=tokenizer)
    optim = AdamWConfig(lr=keys.pop("lr", 1e-3), schedule=LRSchedule(keys.pop("peak", 1e-3)), moments="fp32")
    settings = {"batch": 16, "group": 4, "micro_batch": 8, "max_tokens": 6, "seed": 1, "rewards": {"coin": 1.0}}
    model = keys.pop("model", MODEL)
    return Grpo(model, FP32(), optim, data, **{**settings, **keys})


def trainer(folder: Path, steps: int, **keys) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=keys.pop("devices", 1),
        strategy=LitseekStrategy(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=keys.pop("limit_val_batches", 0),
        **keys,
    )


class Record(pl.Callback):
    def __init__(self):
        self.metrics: list[dict[str, float]] = []
        self.rollouts: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, stage, *_):
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.rollouts.append(stage.rollout.state_dict())


def fit(stage: Grpo, folder: Path, steps: int, resume: Path | None = None, **keys) -> Record:
    record = Record()
    trainer(folder, steps, callbacks=[record], **keys).fit(stage, ckpt_path=None if resume is None else str(resume))
    return record


def test_first_ratio_is_exactly_one_and_rollouts_are_renewed(tokenizer, tmp_path):
    record = fit(make(tokenizer, updates_per_rollout=2, beta=0.1), tmp_path, 4)
    first, second = record.metrics[0], record.metrics[1]
    assert first["ratio"] == 1.0 and first["clip_fraction"] == 0.0 and first["kl"] == 0.0
    assert second["ratio"] != 1.0
    assert record.metrics[2]["ratio"] == 1.0 and record.metrics[2]["kl"] > 0
    assert [int(r["index"]) for r in record.rollouts] == [0, 0, 1, 1]
    assert not torch.equal(record.rollouts[0]["tokens"], record.rollouts[2]["tokens"])
    for key in ("rollout/reward", "rollout/accuracy", "rollout/response_tokens", "entropy", "loss"):
        assert key in first
    assert first["rollout/logprob_gap"] < 1e-5


def test_every_sample_has_ratio_one_bit_for_bit(tokenizer, tmp_path):
    seen = []

    class Checked(Grpo):
        def head_loss(self, hidden, micro):
            found = self._logprobs(hidden, micro, self.model.lm_head.weight)
            seen.append(torch.equal(found.detach(), micro.extra["old_logprobs"]))
            return super().head_loss(hidden, micro)

    stage = make(tokenizer)
    stage.__class__ = Checked
    fit(stage, tmp_path, 1)
    assert seen == [True, True]


def test_leaving_out_samples_that_teach_nothing_changes_nothing(tokenizer, tmp_path):
    class Whole(Grpo):
        def _rows(self, rollout, rank):
            return list(torch.arange(len(rollout)).split(self.micro_batch))

    trained = []
    for kind in (Grpo, Whole):
        stage = make(tokenizer, group=2, beta=0.0)
        stage.__class__ = kind
        record = fit(stage, tmp_path / kind.__name__, 1)
        assert 0 < int((record.rollouts[0]["advantage"] == 0).sum()) < 16
        trained.append((record.metrics[0]["loss"], stage.model.state_dict()))
    assert trained[0][0] == pytest.approx(trained[1][0], abs=1e-6)
    for name, value in trained[0][1].items():
        torch.testing.assert_close(value, trained[1][1][name], atol=1e-5, rtol=1e-4)


def test_a_run_that_is_cut_in_the_middle_of_a_rollout_goes_on_bit_equal(tokenizer, tmp_path):
    keys = {"updates_per_rollout": 3, "beta": 0.05, "checkpoint_every": 2, "checkpoint_keep": 9}
    whole = make(tokenizer, **keys)
    one = fit(whole, tmp_path / "whole", 5)
    fit(make(tokenizer, **keys), tmp_path / "cut", 4)
    torch.rand(7)  # the run's chance must not come from the process's generator
    resumed = make(tokenizer, **keys)
    two = fit(resumed, tmp_path / "cut", 5, resume=tmp_path / "cut" / "checkpoints" / "step-00000002")
    assert [m["loss"] for m in two.metrics] == [m["loss"] for m in one.metrics[2:]]
    assert torch.equal(two.rollouts[0]["old_logprobs"], one.rollouts[2]["old_logprobs"])
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_rollout_is_a_function_of_seed_and_index_and_weights(tokenizer, tmp_path):
    def first(seed):
        return fit(make(tokenizer, seed=seed), tmp_path, 1).rollouts[0]["tokens"]

    again = first(1)
    torch.manual_seed(99)
    assert torch.equal(first(1), again)
    assert not torch.equal(first(2), again)


def test_mtp_is_left_alone_and_the_bias_moves_only_when_asked(tokenizer, tmp_path):
    frozen, moving = make(tokenizer), make(tokenizer, balance_speed=0.01)
    for stage in (frozen, moving):
        stage.configure_model()
    before = {name: value.clone() for name, value in frozen.model.state_dict().items()}
    for n, stage in enumerate((frozen, moving)):
        fit(stage, tmp_path / str(n), 1)
    changed = {name for name, value in frozen.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any("mtp" in name or "bias" in name for name in changed)
    assert moving.model.state_dict()["layers.1.mlp.gate.e_score_correction_bias"].abs().max() > 0


def test_it_learns_a_reward(tokenizer, tmp_path, monkeypatch):
    three = bpe.load(tokenizer).encode("3")[0]
    monkeypatch.setitem(REWARDS, "threes", lambda s: s.response.count("3") / s.length)
    stage = make(tokenizer, rewards={"threes": 1.0}, peak=1e-2, batch=32, group=32, micro_batch=32, beta=0.0)
    record = fit(stage, tmp_path, 25)
    assert record.metrics[-1]["rollout/reward"] > record.metrics[0]["rollout/reward"] + 0.3
    assert float((record.rollouts[-1]["tokens"] == three).float().mean()) > 0.2


def test_accuracy_before_and_after_and_samples(tokenizer, tmp_path):
    accuracy = Accuracy(Arithmetic("eval", options=OPTIONS), count=20, max_tokens=4)
    stage = make(tokenizer, accuracy=accuracy)
    fit(stage, tmp_path, 1)
    assert stage.results["eval/problems"] == 20
    assert stage.results["eval/accuracy"] == stage.results["eval/accuracy_before"] == 0.0
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 8


def test_sequence_level_runs_with_kl(tokenizer, tmp_path):
    metrics = fit(make(tokenizer, level="sequence", beta=0.1, updates_per_rollout=2), tmp_path, 2).metrics
    assert metrics[0]["ratio"] == 1.0 and metrics[1]["kl"] > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"batch": 10, "micro_batch": 5}, "stage.batch=10 is not a multiple of stage.group=4"),
        ({"group": 1}, "stage.group=1 must be at least 2"),
        ({"updates_per_rollout": 0}, "updates_per_rollout=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"level": "word"}, "stage.level is 'word'"),
        ({"clip": 0.0}, "stage.clip=0.0"),
        ({"max_tokens": 48}, "stage.max_tokens=48 leaves no room"),
        ({"rewards": {"luck": 1.0}}, "rewards has luck"),
    ],
)
def test_bad_settings_name_the_key(tokenizer, keys, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer, **keys)


def run_on_ranks(tokenizer: str, folder: Path, devices: int) -> tuple[dict, dict]:
    """Two steps of one rollout on so many ranks: its buffer and the weights."""
    record = Record()
    stage = make(tokenizer, updates_per_rollout=2, beta=0.1, micro_batch=4)
    runner = trainer(folder, 2, callbacks=[record], devices=devices)
    runner.fit(stage)
    return record.rollouts[0], stage.model.state_dict()


def test_two_ranks_share_a_rollout_and_agree_with_one(tokenizer, tmp_path):
    rollout, weights = run_on_ranks(tokenizer, tmp_path / "one", 1)
    for shared, same in ranks(2).run(run_on_ranks, tokenizer, tmp_path / "two", 2):
        for key in ("tokens", "reward", "advantage"):
            assert torch.equal(shared[key], rollout[key]), key
        for key in ("old_logprobs", "ref_logprobs"):
            torch.testing.assert_close(shared[key], rollout[key])
        for name, value in weights.items():
            torch.testing.assert_close(same[name], value, atol=1e-5, rtol=1e-4)
