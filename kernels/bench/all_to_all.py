"""The one-sided exchange between two or more GPUs of a node: first that it is right, then how long it takes beside NCCL.

    PYTHONPATH=kernels torchrun --nproc-per-node 2 kernels/bench/all_to_all.py [--out FILE]

Prints one JSON object a row and appends it to FILE. Times are medians, the slowest rank's, and over replays of a captured
graph unless the row says otherwise.
GB/s are what a GPU sends to others. "put" ends when the rows lie at the peer, which every exchange waits for.
"""

import argparse
import faulthandler
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
import triton
from litseek_kernels import all_to_all as op
from litseek_kernels.buffers import FLAGS, LATE, NEEDED, STATE, Buffers, size
from litseek_kernels.quantise import quantise_rows
from litseek_kernels.ref import all_to_all as ref
from litseek_kernels.testing import relative_error
from torch import Tensor

SECONDS = 145
"""Then the process ends, whatever it does."""
SPINS = 1 << 22
"""Polls before a wait gives up, a few seconds."""
POISON = 85
D, K, E = 7168, 8, 64
PROGRAMS = 8, 16, 20, 32, 64
TILES = (16, 512, 8), (16, 512, 32), (32, 512, 16), (64, 256, 16), (8, 1024, 16), (8, 512, 8), (8, 512, 16)
"""Rows, 32-bit words of each and warps of a send; for few tokens a quarter of the rows and four times the words."""


def rows() -> Iterator[dict[str, Any]]:
    """For run.py, which has one process."""
    yield {"op": "all_to_all", "note": "needs a process for each of several GPUs: see this file's first lines"}


@dataclass
class Node:
    """What the ranks share, and this rank's place in it."""

    rank: int
    world: int
    memory: Tensor
    peers: Tensor

    @classmethod
    def make(cls, nbytes: int) -> Self:
        import torch.distributed._symmetric_memory as symmetric

        memory = symmetric.empty(nbytes, dtype=torch.uint8, device="cuda")
        handle = symmetric.rendezvous(memory, dist.group.WORLD)
        rank, world = dist.get_rank(), dist.get_world_size()
        peers = [handle.get_buffer(r, memory.shape, memory.dtype).data_ptr() for r in range(world)]
        node = cls(rank, world, memory, torch.tensor(peers, device="cuda"))
        node.handle = handle  # type: ignore[attr-defined]
        return node

    def buffers(self, tokens: int, top_k: int, hidden: int, programs: int, spins: int = SPINS) -> Buffers:
        """Counters at zero, all else poisoned."""
        meet()
        self.memory.fill_(POISON)
        self.memory[:FLAGS] = 0
        state = torch.zeros(STATE, dtype=torch.int32, device="cuda")
        meet()
        return Buffers(self.peers, self.memory, state, self.rank, tokens, top_k, hidden, 2, programs, spins)


def meet() -> None:
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()


# ---- that it is right


@dataclass
class Data:
    """Of all ranks, alike at each of them."""

    x: list[Tensor]
    expert: list[Tensor]
    weight: list[Tensor]

    @classmethod
    def make(cls, seed: int, counts: list[int], hidden: int, top_k: int, experts: int, last: bool = False) -> Self:
        g = torch.Generator("cuda").manual_seed(seed)
        made = cls([], [], [])
        for count in counts:
            x = torch.randn(count, hidden, generator=g, device="cuda") * 10
            chosen = torch.rand(count, experts, generator=g, device="cuda").topk(top_k).indices
            made.x.append(x.bfloat16())
            made.expert.append(torch.full_like(chosen, experts - 1) if last else chosen)
            made.weight.append(torch.rand(count, top_k, generator=g, device="cuda"))
        return made


CASES: dict[str, dict[str, Any]] = {
    "4096 x 7168 top 8 of 64, FP8": {"room": 4096, "fp8": True},
    "4096 x 7168 top 8 of 64, BF16": {"room": 4096},
    "256 x 7168 top 8 of 64, FP8": {"room": 256, "fp8": True},
    "no tokens on the last rank, FP8": {"room": 37, "counts": [37, 0], "fp8": True},
    "no tokens on the first rank, width 1536, top 6": {"room": 64, "counts": [0, 50], "hidden": 1536, "top_k": 6},
    "a few tokens, width 48": {"room": 5, "counts": [5, 3], "hidden": 48, "fp8": True},
    "all to one expert": {"room": 128, "last": True},
    "overflow": {"room": 128, "capacity": 300, "fp8": True},
    "overflow, all to one expert": {"room": 64, "capacity": 100, "last": True},
}


def check(node: Node, room: int, counts: list[int] | None = None, hidden: int = D, top_k: int = K, fp8: bool = False,
          capacity: int | None = None, last: bool = False, programs: int = 20) -> float:  # fmt: skip
    """The largest relative error of sums; anything else that differs is an AssertionError."""
    counts = (counts or [room] * node.world)[: node.world]
    counts += [room] * (node.world - len(counts))
    held, L, me = capacity or node.world * room * top_k, E // node.world, node.rank
    buffers = node.buffers(room, top_k, hidden, programs)
    worst = 0.0
    for turn in range(3):  # both halves, and the first one again
        data = Data.make(100 * turn + room, counts, hidden, top_k, E, last)
        scale = None
        x = data.x
        if fp8:
            x, scales = zip(*(quantise_rows(one, power_of_two=True) for one in data.x))
            scale = [part.t() for part in scales]
        wanted = ref.dispatch(list(x), data.expert, data.weight, L, held, scale)
        poison(held, hidden)
        op.send(buffers, x[me], data.expert[me], L, data.weight[me], scale and scale[me])
        op.wait(buffers)
        in_time(buffers)
        position, count = op.place(buffers, L, held)
        got, weight = op.expand(buffers, x[me], position, held, torch.bfloat16, weighted=True, scaled=fp8)
        rows_w, count_w, weight_w = wanted[me]
        used = len(rows_w)
        needed = ref.places(data.expert, L, me, held)[2]
        assert torch.equal(count, count_w), f"counts {count.tolist()}, wanted {count_w.tolist()}"
        assert torch.equal(got[:used], rows_w), "rows differ"
        assert weight is not None and torch.equal(weight[:used], weight_w), "weights differ"
        assert int(buffers.state[NEEDED]) >= needed and (turn or int(buffers.state[NEEDED]) == needed)

        g = torch.Generator("cuda").manual_seed(turn + 7)
        out = [torch.randn(held, hidden, generator=g, device="cuda").bfloat16() for _ in counts]
        numbers = [torch.rand(held, generator=g, device="cuda") for _ in counts]
        for r in range(node.world):
            out[r][len(wanted[r][0]) :] = torch.nan
        sums_w = ref.combine([o[: len(w[0])].float() for o, w in zip(out, wanted)], data.expert, L, held)[me]
        numbers_w = torch.zeros_like(data.weight[me])
        for r in range(node.world):
            place = ref.places(data.expert, L, r, held)[0][me]
            numbers_w += torch.where(place >= 0, numbers[r][place.clamp_min(0)], 0)
        del wanted, rows_w
        poison(held, hidden)
        sums = op.reduce(buffers, out[me], position, numbers[me])
        op.send_back(buffers, *sums, position)
        op.wait(buffers)
        in_time(buffers)
        y, numbers_y = op.collect(buffers, data.expert[me], L, torch.bfloat16, weighted=True)
        if capacity is None:  # a choice that did not fit leaves nothing to collect
            if len(y):
                worst = max(worst, float(relative_error(y, sums_w)))
            assert worst <= 5e-3, f"sums differ by {worst}"
            assert numbers_y is not None and torch.equal(numbers_y, numbers_w), "numbers differ"
        del out, sums, sums_w

        grad = Data.make(turn + 50, counts, hidden, top_k, E).x
        wanted = ref.dispatch(grad, data.expert, data.weight, L, held)
        op.send(buffers, grad[me], data.expert[me], L, choices=False)
        op.wait(buffers)
        in_time(buffers)
        got, _ = op.expand(buffers, grad[me], position, held, torch.bfloat16)
        assert torch.equal(got[:used], wanted[me][0]), "gradients differ"
    return worst


def poison(held: int, hidden: int) -> None:
    """The allocator hands this memory out next."""
    del_me = torch.full((held, hidden), torch.nan, dtype=torch.bfloat16, device="cuda")
    del del_me


def in_time(buffers: Buffers) -> None:
    assert int(buffers.state[LATE]) == 0, "a wait gave up"


def check_late(node: Node) -> None:
    """Nobody sends: a wait ends and says so."""
    buffers = node.buffers(8, 2, 64, 4, spins=1 << 12)
    op.wait(buffers)
    assert int(buffers.state[LATE]) == node.world - 1, "a wait without a sender was not noticed"


# ---- how long it takes


def graph_ms(run: Callable[[], Any], calls: int = 5, replays: int = 20) -> float:
    """Median of one call in a captured graph of ``calls``, the slowest rank's."""
    for _ in range(3):
        run()
    meet()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            run()
    meet()
    for _ in range(2):
        graph.replay()
    found = timed(graph.replay, replays)
    del graph
    return found / calls


def timed(run: Callable[[], Any], times: int) -> float:
    meet()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    median = statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    slowest = torch.tensor(median, device="cuda")
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return float(slowest)


@dataclass
class Load:
    """This rank's tokens of a timed exchange."""

    shape: str
    x: Tensor
    expert: Tensor
    weight: Tensor
    to: Tensor
    """(W, T) bool: whether a token has an expert at a rank."""
    moved: int
    """Rows that leave."""

    @classmethod
    def make(cls, node: Node, tokens: int) -> Self:
        data, W, me = Data.make(tokens, [tokens] * node.world, D, K, E), node.world, node.rank
        to = torch.stack([((data.expert[me] // (E // W)) == d).any(1) for d in range(W)])
        moved = int(to.sum()) - int(to[me].sum())
        return cls(f"{tokens} x {D} top {K} of {E}, {W} ranks", data.x[me], data.expert[me], data.weight[me], to, moved)

    def row(self, name: str, ms: float, itemsize: int, note: str = "in a graph") -> dict[str, Any]:
        speed = self.moved * D * itemsize / ms / 1e6
        return dict(op="all_to_all", shape=self.shape, implementation=name, ms=ms, value=speed, unit="GB/s", note=note)


def times(node: Node, tokens: int, sweep: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    load = Load.make(node, tokens)
    x, expert, weight, row, L = load.x, load.expert, load.weight, load.row, E // node.world
    held = node.world * tokens * K
    codes, scales = quantise_rows(x, power_of_two=True)
    scale = scales.t().contiguous()
    for programs in sweep:
        buffers = node.buffers(tokens, K, D, programs)

        def put(buffers: Buffers = buffers) -> None:
            op.send(buffers, codes, expert, L, weight, scale)
            op.wait(buffers)

        yield row(f"dispatch FP8, put, {programs} programs", graph_ms(put), 1)
        in_time(buffers)
        put()
        position, _ = op.place(buffers, L, held)
        out = torch.randn(held, D, device="cuda", dtype=torch.bfloat16)
        sums = op.reduce(buffers, out, position)

        def back(buffers: Buffers = buffers, sums: Any = sums, position: Tensor = position) -> None:
            op.send_back(buffers, *sums, position)
            op.wait(buffers)

        yield row(f"combine BF16, put, {programs} programs", graph_ms(back), 2)

        def combine(buffers: Buffers = buffers, out: Tensor = out, position: Tensor = position) -> None:
            op.send_back(buffers, *op.reduce(buffers, out, position), position)
            op.wait(buffers)
            op.collect(buffers, expert, L, torch.bfloat16)

        yield row(f"combine BF16, with sums on both sides, {programs} programs", graph_ms(combine), 2)
        if programs == 20:

            def dispatch(buffers: Buffers = buffers) -> None:
                put(buffers)
                position, _ = op.place(buffers, L, held)
                op.expand(buffers, codes, position, held, torch.bfloat16, weighted=True, scaled=True)

            yield row("dispatch FP8, put, sort and expand, 20 programs", graph_ms(dispatch), 1)

            def bf16(buffers: Buffers = buffers) -> None:
                op.send(buffers, x, expert, L, choices=False)
                op.wait(buffers)

            yield row("gradient of combine BF16, put, 20 programs", graph_ms(bf16), 2)
            yield row("dispatch FP8, put, 20 programs", timed(put, 50), 1, "without a graph")
            yield row("combine BF16, put, 20 programs", timed(back, 50), 2, "without a graph")
        in_time(buffers)
        del out, sums


def tiles(node: Node, tokens: int, tried: tuple[tuple[int, int, int], ...]) -> Iterator[dict[str, Any]]:
    """What a program of a send moves at a time, and with how many warps; the first is the default."""
    load, L = Load.make(node, tokens), E // node.world
    codes, scales = quantise_rows(load.x, power_of_two=True)
    scale = scales.t().contiguous()
    default = op._ROWS, op._PIECE, op._WARPS
    for few in (default, *tried):
        op._ROWS, op._PIECE, op._WARPS = few
        buffers = node.buffers(tokens, K, D, 20)

        def put(buffers: Buffers = buffers) -> None:
            op.send(buffers, codes, load.expert, L, load.weight, scale)
            op.wait(buffers)

        def bf16(buffers: Buffers = buffers) -> None:
            op.send(buffers, load.x, load.expert, L, choices=False)
            op.wait(buffers)

        name = "put, 20 programs, {} rows x {} words, {} warps".format(*few)
        yield load.row(f"FP8 {name}", graph_ms(put), 1)
        yield load.row(f"BF16 {name}", graph_ms(bf16), 2)
        in_time(buffers)
    op._ROWS, op._PIECE, op._WARPS = default


def nccl(node: Node, tokens: int, captured: bool) -> Iterator[dict[str, Any]]:
    """all_to_all_single of the same rows, a token once a rank, counts known to the host."""
    load = Load.make(node, tokens)
    to, row = load.to, load.row
    codes, _ = quantise_rows(load.x, power_of_two=True)
    payloads = {"FP8": codes.view(torch.uint8), "BF16": load.x}
    sent = to.sum(1)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    order = torch.cat([part.nonzero().flatten() for part in to])
    counts, arriving = sent.tolist(), received.tolist()
    for name, payload in payloads.items():
        packed = payload[order]
        out = payload.new_empty(sum(arriving), payload.shape[1])

        def exchange(out: Tensor = out, packed: Tensor = packed) -> None:
            dist.all_to_all_single(out, packed, arriving, counts)

        def permuted(out: Tensor = out, payload: Tensor = payload) -> None:
            dist.all_to_all_single(out, payload.index_select(0, order), arriving, counts)

        for what, run in (("", exchange), (", with the permutation before it", permuted)):
            for _ in range(3):
                run()
            ms = graph_ms(run) if captured else timed(run, 30)
            note = "in a graph" if captured else "without a graph"
            yield row(f"NCCL all_to_all_single of {name} rows{what}", ms, payload.itemsize, note)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # read when memory is shared
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    start = time.time()
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}

    def say(row: dict[str, Any]) -> None:
        if rank:
            return
        text = json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} | about)
        print(text, flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(text + "\n")

    node = Node.make(size(dist.get_world_size(), 4096, K, D, 2))
    check_late(node)
    for name, case in CASES.items():
        say({"op": "all_to_all", "shape": name, "implementation": "right", "value": check(node, **case), "unit": "relative error",
             "note": f"{time.time() - start:.0f} s in"})  # fmt: skip
    for programs in (1, 8, 64):
        check(node, 100, programs=programs)
    timings = [times(node, 4096, PROGRAMS), times(node, 256, (8, 20, 32))]
    timings += [nccl(node, tokens, captured) for captured in (False, True) for tokens in (4096, 256)]
    timings += [tiles(node, tokens, TILES) for tokens in (4096, 256)]
    for timing in timings:
        for row in timing:
            say(row)
    say({"op": "all_to_all", "implementation": "done", "note": f"{time.time() - start:.0f} s"})
    meet()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
