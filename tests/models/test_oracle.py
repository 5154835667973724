"""The whole model against the report's formulas in float64, token by token; determinism; finite differences."""

import pytest
import torch

from litseek.data.batch import MicroBatch
from litseek.losses import linear_cross_entropy, mtp_loss
from litseek.models.transformer import Transformer
from tests.conformance.slow import YARN, Slow, model_of, random_tokens, tiny
from tests.models.parity import relative

CASES = {
    "plain": {},
    "yarn": dict(rope_scaling=YARN),
    "no q_lora": dict(q_lora_rank=None),
    "one group": dict(n_group=1, topk_group=1),
    "two depths": dict(num_nextn_predict_layers=2),
    "no shared expert": dict(n_shared_experts=0),
    "no depth": dict(num_nextn_predict_layers=0),
}
MTP_WEIGHT = 0.3


def micro_of(tokens: torch.Tensor) -> MicroBatch:
    """T + 1 tokens as T inputs with T labels."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    return MicroBatch(inputs, labels, torch.arange(inputs.shape[1]).expand_as(inputs), None, float(labels.numel()))


def loss_of(model: Transformer, micro: MicroBatch) -> torch.Tensor:
    """Main and MTP loss; in the weights' dtype, so that float64 stays float64."""
    state, weight, depths = model(micro), model.lm_head.weight, len(model.mtp)
    if weight.dtype == torch.float32:
        main = linear_cross_entropy(state["hidden"], weight, micro.labels) / micro.targets
        hiddens = [state[f"mtp.{k}"] for k in range(depths)]
        return main + (MTP_WEIGHT * mtp_loss(hiddens, weight, micro.labels, micro.targets)[0] if depths else 0)
    total = torch.zeros((), dtype=weight.dtype)
    for k in range(depths + 1):
        hidden = state["hidden"] if k == 0 else state[f"mtp.{k - 1}"]
        logits = hidden[:, : hidden.shape[1] - k] @ weight.T
        terms = torch.nn.functional.cross_entropy(logits.flatten(0, 1), micro.labels[:, k:].flatten(), reduction="sum")
        total = total + terms / micro.targets * (1 if k == 0 else MTP_WEIGHT / depths)
    return total


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_loss_and_every_gradient_equal_the_slow_model(changes):
    model = model_of(tiny(**changes), seed=2)
    tokens = random_tokens(1, 9)
    slow = Slow(model)
    loss = loss_of(model, micro_of(tokens))
    loss.backward()
    expected = slow.loss(tokens[0].tolist(), MTP_WEIGHT)
    expected.backward()
    assert relative(loss.detach().double(), expected.detach()) < 1e-6
    for name, parameter in model.named_parameters():
        reference = slow.w[name].grad
        assert (parameter.grad is None) == (reference is None), name
        assert relative(parameter.grad.double(), reference) < 1e-4, name


def test_float64_is_near_float32_and_nearer_the_slow_model():
    model = model_of(tiny(num_nextn_predict_layers=2, rope_scaling=YARN), seed=3)
    micro = micro_of(random_tokens(1, 10))
    single = loss_of(model, micro)
    single.backward()
    gradients = {n: p.grad.double() for n, p in model.named_parameters()}
    model.zero_grad()
    double_model = model.double()
    double = loss_of(double_model, micro)
    assert double.dtype == torch.float64
    double.backward()
    assert relative(single.detach().double(), double.detach()) < 1e-5
    for name, parameter in double_model.named_parameters():
        assert parameter.grad.dtype == torch.float64, name
        assert relative(gradients[name], parameter.grad) < 1e-5, name
    tokens = torch.cat([micro.tokens, micro.labels[:, -1:]], dim=1)[0].tolist()
    # the rotation's cos and sin are float32 by design, so not to float64's own accuracy
    assert relative(double.detach(), Slow(double_model).loss(tokens, MTP_WEIGHT).detach()) < 1e-7


def test_gradients_equal_finite_differences():
    model = model_of(tiny(num_nextn_predict_layers=1, aux_loss_alpha=0.0), seed=4).double()
    micro = micro_of(random_tokens(2, 7))
    loss_of(model, micro).backward()
    step = 1e-6
    for index, (name, parameter) in enumerate(model.named_parameters()):
        flat = parameter.detach().view(-1)
        place = int(parameter.grad.abs().flatten().argmax()) if index % 2 else (index * 7919) % flat.numel()
        values = []
        for sign in (1, -1):
            flat[place] += sign * step
            values.append(loss_of(model, micro).item())
            flat[place] -= sign * step
        numeric = (values[0] - values[1]) / (2 * step)
        assert abs(numeric - parameter.grad.view(-1)[place].item()) < 1e-7 + 1e-5 * abs(numeric), name


@pytest.mark.parametrize("recompute", [False, True])
def test_the_same_inputs_give_bit_equal_loss_and_gradients(recompute):
    micro = micro_of(random_tokens(3, 33))
    runs = []
    for _ in range(2):
        model = model_of(tiny(num_nextn_predict_layers=2, aux_loss_alpha=0.01), seed=5, recompute=recompute)
        state = model(micro)
        loss = linear_cross_entropy(state["hidden"], model.lm_head.weight, micro.labels) + state["aux"]
        loss = loss + mtp_loss([state["mtp.0"], state["mtp.1"]], model.lm_head.weight, micro.labels, 1.0)[0]
        loss.backward()
        runs.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(runs[0][0], runs[1][0])
    for name, gradient in runs[0][1].items():
        assert torch.equal(gradient, runs[1][1][name]), name
