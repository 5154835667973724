"""Every dispatcher means what the local one means on the gathered tokens: outputs, counts and all gradients."""

from functools import cache
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from litseek.data.batch import MicroBatch
from litseek.models.dispatch import LocalDispatcher
from litseek.models.transformer import Transformer
from litseek.parallel.dispatch import AllToAllDispatcher
from litseek.parallel.executor import Executor
from litseek.parallel.hierarchical import HierarchicalDispatcher, node_groups
from tests.ranks import KEPT, ranks
from tests.toy import toy_config, with_biases

E, D, K = 8, 6, 3
KINDS = [(2, "all-to-all"), (4, "all-to-all"), (2, "1 x 2"), (2, "2 x 1"), (4, "2 x 2")]
"""World size and dispatcher: nodes x ranks of a node, or one group. A new dispatcher joins here and in `dispatcher`."""
CASES = {
    "even": "the same number of tokens on each rank",
    "unequal": "another one on each",
    "all to one expert": "all choices of a token too",
    "all to the last rank": "the others have no rows",
    "all away": "no rank chooses an expert of its own",
    "a rank without tokens": "the first one",
    "no tokens": "on any rank",
}


@cache
def groups(world: int):
    """Process groups are made by all ranks together, once a pool."""
    every = [list(range(world))]
    made = dist.new_group(every[0]), {n: [node_groups(every, n) for _ in range(2)] for n in (1, 2) if n <= world}
    KEPT.extend([made[0], *(group for pairs in made[1].values() for nodes in pairs for group in nodes)])
    return made


def dispatcher(kind: str, world: int):
    backward, by_local = groups(world)
    if kind == "all-to-all":
        return AllToAllDispatcher(E, dist.group.WORLD, backward)
    return HierarchicalDispatcher(E, *by_local[int(kind.split(" x ")[1])])


def routing(case: str, world: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(x, expert, weight) of each rank."""
    g, made = torch.Generator().manual_seed(4), []
    for rank in range(world):
        tokens = {"unequal": 2 + 3 * rank, "a rank without tokens": 5 * (rank > 0), "no tokens": 0}.get(case, 6)
        expert = torch.rand(tokens, E, generator=g).topk(K).indices
        if case == "all to one expert":
            expert = torch.full((tokens, K), 3)
        if case == "all to the last rank":
            expert = E - 1 - expert % (E // world)
        if case == "all away":
            expert = (expert % (E // world) + (rank + 1) * (E // world)) % E
        x, weight = (torch.randn(tokens, n, generator=g, dtype=torch.float64) for n in (D, K))
        made.append((x, expert, weight))
    return made


def weights() -> Tensor:
    return torch.randn(E, D, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def through(dispatcher, x, expert, weight, own_EDD, inside: bool) -> list[Tensor]:
    """Output, counts, gradients. ``inside``: weights go into the experts, as in a block, and not into combine."""
    x, weight, own_EDD = (t.clone().requires_grad_() for t in (x, weight, own_EDD))
    rows, count, plan = dispatcher.dispatch(x, expert, weight)
    hidden = [torch.tanh(part @ matrix) for part, matrix in zip(rows.split(count.tolist()), own_EDD)]
    out = torch.cat(hidden)
    if inside:
        out, plan = out * dispatcher.row_weights(plan)[:, None], plan.with_weight(None)
    y = dispatcher.combine(out, plan)
    (y * torch.arange(1.0, D + 1)).square().sum().backward()
    return [t.detach() for t in (y, count, x.grad, weight.grad, own_EDD.grad)]


def on_rank(kind: str, case: str, inside: bool) -> list[Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    own = weights().chunk(world)[rank]
    return through(dispatcher(kind, world), *routing(case, world)[rank], own, inside)


@pytest.mark.parametrize("inside", [True, False], ids=["weights inside", "weights in combine"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("world", "kind"), KINDS, ids=[f"{kind} on {world}" for world, kind in KINDS])
def test_outputs_and_gradients_equal_the_local_dispatcher(world, kind, case, inside):
    found = [torch.cat(parts) for parts in zip(*ranks(world).run(on_rank, kind, case, inside))]
    x, expert, weight = (torch.cat(parts) for parts in zip(*routing(case, world)))
    for ours, expected in zip(found, through(LocalDispatcher(E), x, expert, weight, weights(), inside)):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@cache
def pairs() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's pair (0 and 2, 1 and 3), twice: for forward and backward."""
    made = tuple(dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])[0] for _ in range(2))
    KEPT.extend(made)
    return made


def in_pairs() -> list[Tensor]:
    rank = dist.get_rank()
    own = weights().chunk(2)[rank // 2]
    return through(AllToAllDispatcher(E, *pairs()), *routing("unequal", 4)[rank], own, True)


def test_two_expert_groups_of_one_world_do_not_meet():
    found = ranks(4).run(in_pairs)
    for pair in ([0, 2], [1, 3]):
        x, expert, weight = (torch.cat([routing("unequal", 4)[r][i] for r in pair]) for i in range(3))
        expected = through(LocalDispatcher(E), x, expert, weight, weights(), True)
        for ours, wanted in zip(zip(*(found[r] for r in pair)), expected):
            torch.testing.assert_close(torch.cat(ours), wanted, rtol=1e-12, atol=1e-12)


def traffic(kind: str) -> tuple[list[str], int]:
    """Which group each collective used, in order of calls; how often the host read a tensor."""
    world, seen, reads = dist.get_world_size(), [], []
    ours = dispatcher(kind, world)
    backward = [hop.backward_group for hop in ours.hops]
    real, tolist = dist.all_to_all_single, Tensor.tolist

    def spy(*args, group, **keys):
        seen.append("backward" if any(group is b for b in backward) else "forward")
        return real(*args, group=group, **keys)

    with mock.patch.object(dist, "all_to_all_single", spy):
        x, expert, weight = (t.clone() for t in routing("even", world)[dist.get_rank()])
        with mock.patch.object(Tensor, "tolist", lambda t: reads.append(t) or tolist(t)):
            rows, _, plan = ours.dispatch(x.requires_grad_(), expert, weight.requires_grad_())
            y = ours.combine(rows * ours.row_weights(plan)[:, None], plan.with_weight(None))
        y.sum().backward()
    return seen, len(reads)


@pytest.mark.parametrize(("world", "kind", "hops"), [(2, "all-to-all", 1), (4, "2 x 2", 2)])
def test_backward_has_groups_of_its_own_and_the_host_reads_once(world, kind, hops):
    for seen, reads in ranks(world).run(traffic, kind):
        # counts, places, rows, weights and sums; then the gradients of sums, weights and rows
        assert seen == ["forward"] * 5 * hops + ["backward"] * 3 * hops
        assert reads == 1


def once_a_rank() -> tuple[int, int]:
    """Rows of which each has three experts at the other rank: (bytes of dispatch, of combine)."""
    ours = AllToAllDispatcher(E, dist.group.WORLD)
    x, expert, weight = routing("all away", 2)[dist.get_rank()]
    rows, _, plan = ours.dispatch(x, expert, weight)
    sent = ours.hops[0].bytes_sent
    ours.combine(rows, plan.with_weight(None))
    return sent, ours.hops[0].bytes_sent - sent


def test_a_row_goes_once_to_a_rank_and_one_sum_comes_back():
    assert ranks(2).run(once_a_rank) == [(6 * (8 * D + 4 * K), 6 * 8 * D)] * 2


def with_a_nan(kind: str) -> Tensor:
    rank, world = dist.get_rank(), dist.get_world_size()
    x, expert, weight = (t.clone() for t in routing("even", world)[rank])
    if rank == 1:
        x[2, 0], x[4] = float("nan"), float("inf")
    return through(dispatcher(kind, world), x, expert, weight, weights().chunk(world)[rank], True)[0]


@pytest.mark.parametrize(("world", "kind"), [(2, "all-to-all"), (4, "2 x 2")])
def test_a_row_that_is_not_finite_stays_so_and_alone(world, kind):
    for rank, y in enumerate(ranks(world).run(with_a_nan, kind)):
        assert y.isnan().any(1).tolist() == [rank == 1 and t in (2, 4) for t in range(6)]


def refused(experts: int) -> None:
    AllToAllDispatcher(experts, dist.group.WORLD)


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(RuntimeError, match=r"model\.n_routed_experts=3 is not a multiple of the 2 ranks"):
        ranks(2).run(refused, 3)


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
            block.dispatcher = AllToAllDispatcher(4, dist.group.WORLD)
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
