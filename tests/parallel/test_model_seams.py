"""The model's phases under the executor equal plain autograd: chunks, whole-phase recompute, the model's own recompute."""

import pytest
import torch
from torch import Tensor

from litseek.losses import linear_cross_entropy, mtp_loss
from litseek.models.transformer import Transformer
from litseek.parallel.executor import Executor
from litseek.stages.loader import micro_batches
from tests.toy import ToySource, toy_config, with_biases

MICROS = micro_batches([ToySource(documents=True)[i] for i in range(5)], 2)


def head_loss(model):
    def loss(state, micro):
        weight, targets = model.lm_head.weight, micro.targets
        main = linear_cross_entropy(state["hidden"], weight, micro.labels) / targets
        depths = [state[f"mtp.{k}"] for k in range(model.cfg.num_nextn_predict_layers)]
        return main + 0.3 * mtp_loss(depths, weight, micro.labels, targets, micro.documents)[0], {}

    return loss


def plain(model) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    total, loss = sum(m.targets for m in MICROS), torch.zeros(())
    loads: dict[str, Tensor] = {}
    for micro in MICROS:
        state = model(micro)
        loss = loss + head_loss(model)(state, micro)[0] * micro.targets / total + state["aux"] / len(MICROS)
        for name, load in state["loads"].items():
            loads[name] = loads.get(name, 0) + load
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), grads, loads


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("own_recompute", [False, True])
@pytest.mark.parametrize("recompute", ["none", "attend", "all"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_loss_and_gradients(chunks, recompute, own_recompute, depths):
    model = with_biases(Transformer(toy_config(num_nextn_predict_layers=depths), recompute=own_recompute, seed=1))
    loss, grads, loads = plain(model)
    executor = Executor(model.phases(), chunks, recompute=lambda name: recompute == "all" or name.endswith(recompute))
    result = executor.forward_backward(MICROS, head_loss(model))
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        assert (parameter.grad - grads[name]).norm() <= 1e-5 * grads[name].norm(), name
    assert result.loads.keys() == loads.keys() == model.balance_routers().keys()
    assert all(torch.equal(result.loads[name], loads[name]) for name in loads)


def test_forward_only_equals_logits_and_stops_at_the_norm():
    model = with_biases(Transformer(toy_config(), seed=1))
    seen = []

    def head(state, micro):
        seen.append(sorted(state))
        return model.head_logits(state["hidden"])

    micro = MICROS[0]
    plain_micro = type(micro).of(micro.tokens)
    (logits,) = Executor(model.phases(), 2).forward([plain_micro], head, until="norm")
    torch.testing.assert_close(logits, model.logits(micro.tokens))
    assert not logits.requires_grad and seen == [["hidden"]]
