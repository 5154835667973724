"""The all-to-all dispatcher on two ranks means what the local one means on one."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from litseek.data.batch import MicroBatch
from litseek.models.dispatch import LocalDispatcher
from litseek.models.transformer import Transformer
from litseek.parallel.dispatch import AllToAllDispatcher
from litseek.parallel.executor import Executor
from tests.ranks import ranks
from tests.toy import toy_config, with_biases

E, D, K = 4, 6, 2


def routing(case: str) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x, expert, weight) of each rank."""
    g = torch.Generator().manual_seed(4)
    tokens = {"unequal": (7, 3), "zero tokens on a rank": (5, 0), "no tokens at all": (0, 0)}.get(case, (6, 6))
    made = []
    for count in tokens:
        expert = (
            torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(count)])
            if count
            else torch.empty(0, K, dtype=torch.long)
        )
        if case == "all to one expert":
            expert = torch.full((count, K), 3)
        if case == "all to the other rank's experts":
            expert = torch.tensor([[2, 3]] * count) if not made else torch.tensor([[1, 0]] * count)
        made.append((torch.randn(count, D, generator=g), expert, torch.rand(count, K, generator=g)))
    return made


def weights() -> Tensor:
    return torch.randn(E, D, D, generator=torch.Generator().manual_seed(5))


def apply(rows: Tensor, count: Tensor, weight_EDD: Tensor) -> Tensor:
    parts = rows.split(count.tolist())
    return torch.cat([torch.tanh(part @ weight) for part, weight in zip(parts, weight_EDD)])


def through(dispatcher, x, expert, weight, own_EDD):
    x, weight, own_EDD = (t.clone().requires_grad_() for t in (x, weight, own_EDD))
    rows, count, plan = dispatcher.dispatch(x, expert, weight)
    y = dispatcher.combine(apply(rows, count, own_EDD), plan)
    (y * torch.arange(1.0, D + 1)).square().sum().backward()
    return [t.detach() for t in (y, count, x.grad, weight.grad, own_EDD.grad)]


def on_rank(case: str):
    rank = dist.get_rank()
    return through(AllToAllDispatcher(E), *routing(case)[rank], weights()[2 * rank : 2 * rank + 2])


CASES = [
    "even",
    "unequal",
    "all to one expert",
    "all to the other rank's experts",
    "zero tokens on a rank",
    "no tokens at all",
]


@pytest.mark.parametrize("case", CASES)
def test_rows_and_gradients_equal_the_local_dispatcher(case):
    first, second = ranks(2).run(on_rank, case)
    x, expert, weight = (torch.cat(parts) for parts in zip(*routing(case)))
    y, count, x_grad, weight_grad, own_grad = through(LocalDispatcher(E), x, expert, weight, weights())
    found = [torch.cat(parts) for parts in zip(first, second)]
    for ours, expected in zip(found, (y, count, x_grad, weight_grad, own_grad)):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(RuntimeError, match=r"model\.n_routed_experts=3 is not a multiple of the 2 ranks"):
        ranks(2).run(AllToAllDispatcher, 3)


def micros() -> list[MicroBatch]:
    g = torch.Generator().manual_seed(2)
    return [MicroBatch.of(torch.randint(0, 64, (2, 16), generator=g)) for _ in range(2)]


def head_loss(model):
    def loss(state, micro):
        hidden = state["hidden"] + state["mtp.0"]
        logits = nn.functional.linear(hidden, model.lm_head.weight)
        return nn.functional.cross_entropy(logits.flatten(0, 1), micro.labels.flatten()), {}

    return loss


def sharded_model(recompute: bool):
    """One micro-batch a rank, half of the experts a rank: (loss, gradients of this rank)."""
    rank, batch = dist.get_rank(), micros()
    model = with_biases(Transformer(toy_config(), seed=1))
    blocks = [*model.layers, *(mtp.block for mtp in model.mtp)]
    for block in blocks:
        if hasattr(block.mlp, "experts"):
            block.dispatcher = AllToAllDispatcher(4)
            for name in ("gate_up_proj", "down_proj"):
                whole = getattr(block.mlp.experts, name).detach()
                setattr(block.mlp.experts, name, nn.Parameter(whole[2 * rank : 2 * rank + 2].clone()))
    total = sum(m.targets for m in batch)
    executor = Executor(model.phases(), 2, recompute=lambda name: recompute)
    result = executor.forward_backward([batch[rank]], head_loss(model), total_targets=total / 2)
    return result.loss / 2, {n: p.grad / 2 for n, p in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True])
def test_the_whole_model_with_experts_on_two_ranks(recompute):
    (loss0, grads0), (loss1, grads1) = ranks(2).run(sharded_model, recompute)
    model, batch = with_biases(Transformer(toy_config(), seed=1)), micros()
    result = Executor(model.phases()).forward_backward(batch, head_loss(model))
    torch.testing.assert_close(loss0 + loss1, result.loss, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        ours = torch.cat([grads0[name], grads1[name]]) if ".mlp.experts." in name else grads0[name] + grads1[name]
        assert (ours - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
