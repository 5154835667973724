"""The executor against plain autograd, on a toy list of phases (the model's own parity is in test_model_seams)."""

import pytest
import torch
from torch import Tensor, nn

from litseek.data.batch import MicroBatch
from litseek.parallel.executor import Executor, one_after_another
from litseek.parallel.schedule import Action, Compute, Part


class ToyPhase:
    def __init__(self, name: str, module: nn.Module, calls: list[str]) -> None:
        self.name, self.module, self.calls = name, module, calls

    def __call__(self, state: dict, micro: MicroBatch) -> dict:
        self.calls.append(self.name)
        return self.module(state, micro)


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(17, 8)

    def forward(self, state, micro):
        return {"x": self.table(micro.tokens)}


class Split(nn.Module):
    """Adds a side tensor, an auxiliary loss and a load."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, state, micro):
        rows = torch.tanh(self.linear(state["x"]))
        order = torch.argsort(micro.tokens.flatten())
        return {"x": state["x"], "rows": rows, "order": order, "aux": 0.1 * rows.square().mean(), "load": order[:3]}


class Join(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.3)

    def forward(self, state, micro):
        assert not state["order"].is_floating_point()
        return {"x": state["x"] + self.drop(self.linear(state["rows"]))}


class Norm(nn.Module):
    """Passes a tensor through untouched and adds one made from it."""

    def forward(self, state, micro):
        hidden = nn.functional.layer_norm(state["x"], (8,))
        return {"hidden": hidden, "mtp.0": hidden * 2}


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Embed(), Split(), Join(), Split(), Join(), Norm()])
        self.head = nn.Linear(8, 17)
        self.calls: list[str] = []

    def phases(self):
        return [ToyPhase(f"{i}.{type(p).__name__}", p, self.calls) for i, p in enumerate(self.parts)]

    def head_loss(self, state, micro):
        logits = self.head(state["hidden"] + state["mtp.0"])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), micro.labels.flatten())
        return loss, {"loss/main": loss.detach()}

    def reference(self, micros) -> Tensor:
        total = sum(m.targets for m in micros)
        loss = torch.zeros(())
        for micro in micros:
            state: dict = {}
            for part in self.parts:
                state = part(state, micro)
                if "aux" in state:
                    loss = loss + state.pop("aux") / len(micros)
            loss = loss + self.head_loss(state, micro)[0] * micro.targets / total
        return loss


def micros(n: int = 3) -> list[MicroBatch]:
    g = torch.Generator().manual_seed(1)
    made = []
    for i in range(n):
        micro = MicroBatch.of(torch.randint(0, 17, (2, 5), generator=g))
        micro.labels[0, : i + 1] = -100
        micro.targets = float((micro.labels != -100).sum())
        made.append(micro)
    return made


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_loss_and_gradients_equal_plain_autograd(chunks, recompute):
    torch.manual_seed(0)
    model, batch = Toy(), micros()
    torch.manual_seed(5)  # dropout draws the same numbers on both sides
    expected = model.reference(batch)
    expected.backward()
    wanted = grads(model)
    model.zero_grad()

    torch.manual_seed(5)
    executor = Executor(model.phases(), chunks, recompute=lambda name: recompute)
    result = executor.forward_backward(batch, model.head_loss)
    torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-5, atol=1e-6)
    found = grads(model)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-5, atol=1e-6, msg=name)


def test_recompute_runs_a_phase_twice_and_counts_loads_once():
    model, batch = Toy(), micros(1)
    plain = Executor(model.phases()).forward_backward(batch, model.head_loss)
    assert len(model.calls) == 6
    model.calls.clear()
    again = Executor(model.phases(), recompute=lambda n: n.endswith("Split")).forward_backward(batch, model.head_loss)
    assert model.calls.count("1.Split") == 2 and model.calls.count("2.Join") == 1
    assert again.loads.keys() == {"1.Split", "3.Split"}
    assert all(torch.equal(again.loads[k], plain.loads[k]) for k in plain.loads)


def test_recompute_leaves_the_random_stream_where_it_was():
    model, batch = Toy(), micros(2)
    states = []
    for recompute in (False, True):
        torch.manual_seed(3)
        Executor(model.phases(), recompute=lambda name, r=recompute: r).forward_backward(batch, model.head_loss)
        states.append(torch.rand(3))
    assert torch.equal(*states)


def test_another_action_list_gives_the_same_gradients():
    model, batch = Toy().eval(), micros(3)
    Executor(model.phases(), 2).forward_backward(batch, model.head_loss)
    wanted = grads(model)
    model.zero_grad()
    every = [Part("F", c, m) for c in (0, 1) for m in range(3)] + [Part("B", c, m) for c in (1, 0) for m in range(3)]
    steps = [Compute(Action((part,))) for part in every]
    Executor(model.phases(), 2).forward_backward(batch, model.head_loss, instructions=steps)
    for name, value in grads(model).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)


def test_metrics_are_weighed_and_the_loss_is_their_sum():
    model, batch = Toy().eval(), micros(2)
    result = Executor(model.phases()).forward_backward(batch, model.head_loss)
    with torch.no_grad():
        heads = Executor(model.phases()).forward(batch, lambda s, m: model.head_loss(s, m)[0] * m.targets)
    expected = sum(heads) / sum(m.targets for m in batch)
    torch.testing.assert_close(result.metrics["loss/main"], expected)
    torch.testing.assert_close(result.loss, result.metrics["loss/main"] + result.metrics["loss/balance"])


def test_total_targets_scale_the_loss_of_one_rank():
    model, batch = Toy().eval(), micros(2)
    full = Executor(model.phases()).forward_backward(batch, model.head_loss).metrics["loss/main"]
    total = sum(m.targets for m in batch)
    half = Executor(model.phases()).forward_backward(batch, model.head_loss, total_targets=2 * total)
    torch.testing.assert_close(half.metrics["loss/main"], full / 2)


def test_default_actions_keep_one_micro_batch_in_flight():
    first = [("F", 0, 0), ("F", 1, 0), ("B", 1, 0), ("B", 0, 0)]
    parts = [step.action.parts for step in one_after_another(2, 2)]
    assert parts == [(part,) for part in (*first, *((kind, stage, 1) for kind, stage, _ in first))]


def test_chunks_beyond_the_phases_are_refused():
    with pytest.raises(ValueError, match=r"strategy\.chunks=7 .* 6 phases"):
        Executor(Toy().phases(), 7)
