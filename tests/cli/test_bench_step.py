"""The timed step is the stage's own: the same losses as Lightning's loop, on the same data."""

from __future__ import annotations

import weakref

import pytest
import torch

from litseek.cli.bench_slice import BlocksStep
from litseek.cli.bench_step import RandomTokens, TrainingStep, free, time_steps
from litseek.data.batch import IGNORE
from litseek.models.config import DeepSeekV3Config
from litseek.optim import AdamWConfig
from litseek.parallel.strategy import LitseekStrategy
from litseek.precision import BF16, FP8, FP32

CPU = torch.device("cpu")
SMALL = DeepSeekV3Config(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=1,
    intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    n_group=2, topk_group=1, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip


def training(**changes) -> TrainingStep:
    options = dict(batch=4, micro_batch=2, seq_len=16, device=CPU) | changes
    return TrainingStep(SMALL, FP32(), AdamWConfig(lr=1e-2), LitseekStrategy(), **options)


def by_lightning(steps: int) -> list[float]:
    import lightning.pytorch as pl

    from litseek.stages.pretrain import Pretrain

    class Data(RandomTokens):
        tokenizer = type("T", (), {"check_fits": staticmethod(lambda size: None)})()

        def set_seed(self, seed: int) -> None: ...
        def prepare(self, folder: object) -> None: ...
        def validation(self) -> list:
            return [self[0]]

    class Unsaved(Pretrain):
        def on_train_end(self) -> None: ...

    losses: list[float] = []

    class Note(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            losses.append(float(pl_module.step_result.loss))

    stage = Unsaved(SMALL, FP32(), AdamWConfig(lr=1e-2), Data(64, 16), batch=4, micro_batch=2)
    trainer = pl.Trainer(
        max_steps=steps, strategy=LitseekStrategy(), callbacks=[Note()], logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(stage)
    return losses


def test_the_step_is_the_stages_own():
    step = training()
    step.prepare(3)  # odd: steps of one size cannot cancel in the biases
    assert [float(step()) for _ in range(3)] == by_lightning(3)
    bias = step.stage.model.balance_routers()["layers.1.attend"].e_score_correction_bias
    assert bias.abs().max() > 0 and step.done == 3 and not step.made


def test_random_tokens_are_a_source():
    data = RandomTokens(64, 16)
    row = data[3]
    assert torch.equal(row["tokens"][1:], row["labels"][:-1]) and torch.equal(data[3]["tokens"], row["tokens"])
    assert not torch.equal(data[4]["tokens"], row["tokens"]) and (row["labels"] != IGNORE).all()


def test_blocks_have_gradients_of_their_own():
    step = BlocksStep(SMALL, FP32(), LitseekStrategy(), batch=2, micro_batch=1, seq_len=16, device=CPU)
    assert float(step()) >= 0
    with_grad = {name for name, p in step.model.named_parameters() if p.grad is not None}
    assert with_grad == {name for name, _ in step.model.named_parameters() if name.startswith("layers.")}
    direct = step.x_BSD.clone().requires_grad_()
    state = {"x": direct}
    parameters = [p for name, p in step.model.named_parameters() if name.startswith("layers.")]
    found = [p.grad.clone() for p in parameters]
    for phase in step.model.phases():
        if phase.name.startswith("layers."):
            state = phase(state, step.micros[0])
    expected = torch.autograd.grad((state["x"] * step.grad_BSD).sum(), parameters)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours / 2, theirs, rtol=1e-3, atol=1e-4)


def test_flops_of_the_blocks_leave_the_head_out():
    step = BlocksStep(SMALL, FP32(), LitseekStrategy(), batch=1, micro_batch=1, seq_len=16, device=CPU)
    assert step.flops_per_token() == SMALL.flops_per_token(16) - 6 * SMALL.vocab_size * SMALL.hidden_size


def test_warm_up_is_not_counted():
    calls = []

    def step() -> torch.Tensor:
        calls.append(1)
        return torch.tensor(float(len(calls)))

    timing = time_steps(step, 2, 3, CPU)
    assert len(calls) == 5 and timing.value == 5.0 and timing.peak_gib is None


@pytest.mark.parametrize("precision", [FP32, BF16, FP8])
def test_nothing_of_a_step_stays(precision: type):
    """Or the next row of a table would be measured with this one's weights in memory."""
    step = TrainingStep(
        SMALL, precision(), AdamWConfig(), LitseekStrategy(), batch=1, micro_batch=1, seq_len=16, device=CPU
    )
    step.prepare(1)
    step()
    held = [weakref.ref(p) for p in step.stage.model.parameters()]
    del step
    free()
    assert not [ref for ref in held if ref() is not None]


@pytest.mark.gpu
def test_time_on_a_gpu():
    step = training(device=torch.device("cuda"))
    step.prepare(3)
    timing = time_steps(step, 1, 2, torch.device("cuda"))
    assert timing.ms > 0 and timing.peak_gib is not None and timing.peak_gib > 0
