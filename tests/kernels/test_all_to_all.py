"""The exchange's kernels against ref.all_to_all: every rank's kernels in turn on one device, all ranks' sends before any wait."""

from __future__ import annotations

import pytest
import torch
from litseek_kernels import all_to_all as op
from litseek_kernels.buffers import LATE, NEEDED, STATE, Buffers, size
from litseek_kernels.quantise import quantise_rows
from litseek_kernels.ref import all_to_all as ref
from litseek_kernels.testing import relative_error
from torch import Tensor

POISON = 85
"""Every byte of memory that a kernel should write."""


class Node:
    """All ranks' buffers, on one device."""

    def __init__(self, world: int, tokens: int, top_k: int, hidden: int, itemsize: int, device, programs=3, spins=4):
        nbytes = size(world, tokens, top_k, hidden, itemsize)
        own = [torch.full((nbytes,), POISON, dtype=torch.uint8, device=device) for _ in range(world)]
        for memory in own:
            memory[:1024] = 0
        self.own = own
        peers = torch.tensor([memory.data_ptr() for memory in own], device=device)
        self.ranks = [
            Buffers(peers, own[r], torch.zeros(STATE, dtype=torch.int32, device=device), r, tokens, top_k, hidden,
                    itemsize, programs, spins)
            for r in range(world)
        ]  # fmt: skip

    def wait(self) -> None:
        for rank in self.ranks:
            op.wait(rank)
            assert rank.state[LATE] == 0

    def dispatch(self, x, expert, weight, L, capacity, scale=None):
        """(rows, count, weight_R, position) of each rank."""
        for r, rank in enumerate(self.ranks):
            op.send(rank, x[r], expert[r], L, weight[r], None if scale is None else scale[r])
        self.wait()
        out = []
        for r, rank in enumerate(self.ranks):
            position, count = op.place(rank, L, capacity)
            dtype = x[r].dtype if scale is None else torch.bfloat16
            rows, weight_R = op.expand(rank, x[r], position, capacity, dtype, weighted=True, scaled=scale is not None)
            out.append((rows, count, weight_R, position))
        return out

    def back(self, rows, expert, position, L, numbers=None):
        """(y, numbers) of each rank."""
        for r, rank in enumerate(self.ranks):
            sums = op.reduce(rank, rows[r], position[r], None if numbers is None else numbers[r])
            op.send_back(rank, *sums, position[r])
        self.wait()
        dtype = rows[0].dtype
        return [op.collect(b, expert[r], L, dtype, numbers is not None) for r, b in enumerate(self.ranks)]


def tokens_of(case: str, world: int, T: int, K: int, E: int, device) -> list[Tensor]:
    """expert_TK of each rank."""
    g = torch.Generator().manual_seed(sum(map(ord, case)))
    out = []
    for r in range(world):
        count = {"a rank without tokens": 0 if r == 0 else T, "fewer on some": T - r, "no tokens": 0}.get(case, T)
        expert = torch.rand(count, E, generator=g).topk(K, dim=-1).indices
        if case == "all to one expert":
            expert = torch.full((count, K), E - 1)
        if case == "all to the next rank":
            expert = (expert % (E // world)) + (r + 1) % world * (E // world)
        if case == "none leaves":
            expert = (expert % (E // world)) + r * (E // world)
        out.append(expert.to(device))
    return out


CASES = {
    "even": (2, 9, 3, 8, 64),
    "three ranks": (3, 5, 2, 6, 32),
    "a rank without tokens": (2, 6, 2, 4, 16),
    "fewer on some": (4, 7, 3, 8, 48),
    "no tokens": (2, 4, 2, 4, 16),
    "all to one expert": (2, 6, 2, 4, 144),
    "all to the next rank": (3, 4, 2, 6, 576),
    "none leaves": (2, 4, 2, 4, 16),
    "one rank": (1, 6, 2, 4, 32),
    "one choice": (2, 5, 1, 6, 16),
    "experts not a power of two": (2, 14, 5, 10, 16),
    "yardstick's width": (2, 3, 6, 16, 1536),
    "671B's width": (2, 2, 8, 16, 7168),
}


@pytest.mark.parametrize("case, dtype", [*((case, torch.float32) for case in CASES), ("even", torch.bfloat16)])
def test_rows_arrive_sorted_and_sums_come_back(case, dtype, device):
    world, T, K, E, D = CASES[case]
    node, L = Node(world, T, K, D, 4, device), E // world
    capacity = world * T * K
    for turn in range(3 if case == "even" else 1):  # both halves, and the first one again
        expert = tokens_of(case, world, T, K, E, device)
        torch.manual_seed(turn)
        x = [torch.randn(len(e), D, device=device).to(dtype) for e in expert]
        weight = [torch.rand(len(e), K, device=device) for e in expert]
        found = node.dispatch(x, expert, weight, L, capacity)
        for (rows, count, weight_R, _), wanted, r in zip(
            found, ref.dispatch(x, expert, weight, L, capacity), range(world)
        ):
            assert torch.equal(count, wanted[1])
            assert torch.equal(rows[: len(wanted[0])], wanted[0])
            assert torch.equal(weight_R[: len(wanted[0])], wanted[2])
            assert node.ranks[r].state[NEEDED] == len(wanted[0])
        used = [int(f[1].sum()) for f in found]
        out = [torch.randn(capacity, D, device=device).to(dtype) for _ in expert]
        numbers = [torch.rand(capacity, device=device) for _ in expert]
        for o, n in zip(out, used):
            o[n:] = torch.nan
        y = node.back(out, expert, [f[3] for f in found], L, numbers)
        wide = [o[:n].double() for o, n in zip(out, used)]
        for got, wanted in zip(y, ref.combine(wide, expert, L, capacity)):
            bound = 1e-6 if dtype == torch.float32 else 1.5e-2  # the interpreter cuts bfloat16
            assert got[0].dtype == dtype and relative_error(got[0], wanted) <= bound
        numbers_WTK = [torch.zeros(len(e), K, device=device) for e in expert]
        for d in range(world):
            for s, place in enumerate(ref.places(expert, L, d, capacity)[0]):
                numbers_WTK[s] += torch.where(place >= 0, numbers[d][place.clamp_min(0)], 0)
        assert all(torch.equal(got[1], n) for got, n in zip(y, numbers_WTK))


@pytest.mark.parametrize("T, D", [(5, 256), (3, 1536), (2, 7168), (4, 48)])
def test_an_fp8_payload_arrives_as_what_its_codes_mean(T, D, device):
    world, K, E = 2, 4, 8
    node = Node(world, T, K, D, 2, device)
    expert = tokens_of("codes", world, T, K, E, device)
    x = [torch.randn(T, D, device=device, dtype=torch.bfloat16) * 30 for _ in expert]
    x[0][0, 3], x[0][1, 5], x[1][0] = torch.nan, torch.inf, 0
    codes, scale = zip(*(quantise_rows(one, power_of_two=True) for one in x))
    scale = [part.t() for part in scale]
    weight = [torch.rand(T, K, device=device) for _ in expert]
    wanted = ref.dispatch(list(codes), expert, weight, E // world, world * T * K, scale)
    found = node.dispatch(codes, expert, weight, E // world, world * T * K, scale)
    for (rows, count, weight_R, _), (rows_w, count_w, weight_w) in zip(found, wanted):
        assert rows.dtype == torch.bfloat16 and torch.equal(count, count_w)
        torch.testing.assert_close(rows[: len(rows_w)], rows_w, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(weight_R[: len(rows_w)], weight_w)


def test_the_gradient_of_a_combine_is_a_dispatch_along_the_same_places(device):
    world, T, K, E, D = 2, 5, 2, 4, 32
    node = Node(world, T, K, D, 4, device)
    expert = tokens_of("gradient", world, T, K, E, device)
    x = [torch.randn(T, D, device=device) for _ in expert]
    found = node.dispatch(x, expert, [torch.rand(T, K, device=device) for _ in expert], E // world, 20)
    grad = [torch.randn(T, D, device=device) for _ in expert]
    for r, rank in enumerate(node.ranks):
        op.send(rank, grad[r], expert[r], E // world, choices=False)
    node.wait()
    weight = [torch.zeros(T, K, device=device) for _ in expert]
    wanted = ref.dispatch(grad, expert, weight, E // world, 20)
    for r, rank in enumerate(node.ranks):
        rows, none = op.expand(rank, grad[r], found[r][3], 20, torch.float32)
        assert none is None and torch.equal(rows[: len(wanted[r][0])], wanted[r][0])


@pytest.mark.parametrize("capacity", [0, 1, 7])
def test_rows_past_the_capacity_are_counted_and_not_written(capacity, device):
    world, T, K, E, D = 2, 6, 2, 4, 16
    node, L = Node(world, T, K, D, 4, device), E // world
    expert = tokens_of("all to one expert", world, T, K, E, device)
    x = [torch.randn(T, D, device=device) for _ in expert]
    weight = [torch.rand(T, K, device=device) for _ in expert]
    found = node.dispatch(x, expert, weight, L, capacity)
    for r, (rows, count, _, position) in enumerate(found):
        wanted = ref.dispatch(x, expert, weight, L, capacity)[r]
        assert torch.equal(count, wanted[1]) and count.sum() <= capacity
        assert torch.equal(rows[: len(wanted[0])], wanted[0]) and position.max() < max(capacity, 1)
        assert node.ranks[r].state[NEEDED] == (24 if r == 1 else 0)
    node.back([f[0] for f in found], expert, [f[3] for f in found], L)


def test_a_peer_that_does_not_send_is_noticed(device):
    node = Node(2, 4, 2, 16, 4, device)
    expert = tokens_of("late", 2, 4, 2, 4, device)
    op.send(node.ranks[0], torch.randn(4, 16, device=device), expert[0], 2, torch.rand(4, 2, device=device))
    op.wait(node.ranks[0])
    op.wait(node.ranks[1])
    assert [int(rank.state[LATE]) for rank in node.ranks] == [1, 0]


def test_what_does_not_fit_is_refused(device):
    node = Node(2, 4, 2, 16, 2, device)
    expert = tokens_of("fit", 2, 4, 2, 4, device)[0]
    with pytest.raises(
        ValueError, match=r"room for 4 tokens of 16 numbers of 2 bytes with 2 choices each, got \(4, 32\)"
    ):
        op.send(node.ranks[0], torch.randn(4, 32, device=device).bfloat16(), expert, 2)
    with pytest.raises(ValueError, match=r"got \(4, 16\) torch.float32"):
        op.send(node.ranks[0], torch.randn(4, 16, device=device), expert, 2)
    with pytest.raises(ValueError, match=r"got \(5, 16\).* choices \(5, 2\)"):
        op.send(node.ranks[0], torch.randn(5, 16, device=device).bfloat16(), expert[:1].expand(5, 2), 2)
    with pytest.raises(ValueError, match=r"24 numbers of 2 bytes"):
        Node(2, 4, 2, 24, 2, device)
