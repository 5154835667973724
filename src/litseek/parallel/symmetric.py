"""Token dispatch inside a node through our own one-sided exchange: the host never waits for counts (report §3.2.2).

Rows are stored straight into the peers' memory (litseek_kernels.all_to_all). The gate's weights travel with the tokens and
their gradients home with those of the rows. Letters: T tokens of this rank, D model, K chosen, L experts of this rank, W
ranks, S = W * tokens slots for tokens that arrive, R rows of this rank's experts.

Rows have room for ``capacity``, and the tensors that leave here always have so many rows: those after ``count_L.sum()``
are unwritten memory that must not be read. With a capacity below the worst case a step can overflow. Its numbers are
worthless then, but nothing is written out of bounds and no rank hangs. Whoever runs steps asks before it uses the result,
see litseek.parallel.dispatchers:

    while True:
        result = forward_backward(...)                      # with cleared gradients, and nothing counted yet
        if not exchange.can_overflow: break                 # the worst case fits: the host reads nothing
        if not sum over all ranks of exchange.overflowed: break
        exchange.grow()                                     # on every rank; then the same step again

A rank needs its own rows' room only, so that capacities may differ between ranks. ``late`` is fatal.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from litseek_kernels import all_to_all
from litseek_kernels.buffers import FLAGS, LATE, NEEDED, PROGRAMS, STATE, Buffers, size
from torch import Tensor

from litseek.models.dispatch import Plan
from litseek.precision import Precision

Share = Callable[[int, dist.ProcessGroup], tuple[Tensor, Tensor, Any]]
"""(bytes, group) -> this rank's bytes, the (W,) int64 addresses of every rank's, and what must live as long. A collective."""
POLLS_PER_SECOND = 1_000_000
"""Of a waiting kernel; roughly."""


def share(nbytes: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Any]:
    """Memory of this GPU that the group's other GPUs can write. Multicast is neither asked for nor used."""
    os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"  # looked at when the first such memory is made
    import torch.distributed._symmetric_memory as symmetric

    own = symmetric.empty(nbytes, dtype=torch.uint8, device=torch.device("cuda", torch.cuda.current_device()))
    handle = symmetric.rendezvous(own, group)
    peers = [handle.get_buffer(r, own.shape, own.dtype).data_ptr() for r in range(dist.get_world_size(group))]
    return own, torch.tensor(peers, device=own.device), handle


class Exchange:
    """What all mixtures of a rank's model share: the memory, and what went wrong.

    Made by all ranks of ``group`` together, with the same arguments. ``tokens`` is the most that a micro-batch of any rank
    has; `fit` makes room for more, and 0 waits for it. ``factor`` times the even share, tokens * K, is how many rows have
    room at first; None: the worst case, W * tokens * K. ``lanes`` is how many CUDA streams exchange at once
    (litseek.parallel.lanes): each has memory of its own, in the order in which they come first; further streams share it
    and wait for one another. All ranks queue their exchanges in the same order. ``programs`` multiprocessors send.
    Errors: ValueError naming the setting, its value and what is allowed.
    """

    def __init__(
        self,
        num_experts: int,
        group: dist.ProcessGroup,
        tokens: int,
        top_k: int,
        hidden: int,
        dtype: torch.dtype,
        factor: float | None = None,
        lanes: int = 1,
        programs: int = PROGRAMS,
        timeout_s: float = 1800,
        share: Share = share,
    ) -> None:
        world = dist.get_world_size(group)
        if num_experts % world:
            raise ValueError(
                f"model.n_routed_experts={num_experts} is not a multiple of the {world} ranks that share them."
            )
        self.num_local, self.group, self.factor, self.share = num_experts // world, group, factor, share
        self.row = top_k, hidden, dtype.itemsize
        self.programs, self.spins = programs, int(min(timeout_s * POLLS_PER_SECOND, 2**31 - 1))
        self.tokens = self.capacity = self.worst = self._planned = 0
        self._kept: list[Any] = []
        self._buffers: list[Buffers] = []
        self._streams: dict[int, int] = {}
        """Of a stream that has been seen: which buffers it uses."""
        self._last: list[torch.cuda.Stream | None] = [None] * lanes
        self.fit(tokens)

    def fit(self, tokens: int) -> None:
        """Room for micro-batches of so many tokens, if there is less. All ranks together, with nothing under way."""
        if tokens <= self.tokens:
            return
        even = tokens * self.row[0]
        self.tokens, self.worst = tokens, self.world * even
        self._planned = self.worst if self.factor is None else min(math.ceil(self.factor * even), self.worst)
        self.capacity = max(self.capacity, self._planned)
        self._meet()
        self._buffers, self._kept = [], []
        for _ in self._last:
            own, peers, kept = self.share(size(self.world, tokens, *self.row), self.group)
            own[:FLAGS] = 0
            state = torch.zeros(STATE, dtype=torch.int32, device=own.device)
            rank = dist.get_rank(self.group)
            self._buffers.append(Buffers(peers, own, state, rank, tokens, *self.row, self.programs, self.spins))
            self._kept.append(kept)
        self._meet()  # nobody sends before all counters are zero

    def _meet(self) -> None:
        if not self._buffers:
            return
        on_gpu = self._buffers[0].own.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        dist.barrier(self.group)
        if on_gpu:
            torch.cuda.synchronize()

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group)

    def lane(self) -> Buffers:
        """What the current stream exchanges through."""
        if not self._buffers[0].own.is_cuda:
            return self._buffers[0]
        stream = torch.cuda.current_stream()
        at = self._streams.setdefault(stream.cuda_stream, len(self._streams) % len(self._buffers))
        last, self._last[at] = self._last[at], stream
        if last is not None and last != stream:
            stream.wait_stream(last)
        return self._buffers[at]

    @property
    def can_overflow(self) -> bool:
        """The same on all ranks, whatever room they have made since."""
        return self._planned < self.worst

    @property
    def overflowed(self) -> Tensor:
        """() bool on the device: since the last `grow`, rows of this rank did not fit."""
        return self._state(NEEDED).amax() > self.capacity

    @property
    def late(self) -> Tensor:
        """() bool on the device: a wait for a peer gave up, and what was read since is worthless."""
        return self._state(LATE).amax() > 0

    def grow(self) -> int:
        """Room for as many rows as were wanted, which the host reads here. Returns how many more these are.

        What is wanted after an overflow depends on worthless rows, so that the next try may have to grow again; the
        worst case ends it.
        """
        before, needed = self.capacity, int(self._state(NEEDED).amax())
        self.capacity = min(max(before, needed), self.worst)
        for buffers in self._buffers:
            buffers.state[NEEDED] = 0
        return self.capacity - before

    def _state(self, which: int) -> Tensor:
        return torch.stack([buffers.state[which] for buffers in self._buffers])


class SymmetricDispatcher:
    """Rank r of the exchange's group holds experts [r L, (r + 1) L); an expert sees the ranks' rows in order of ranks.

    ``precision`` says in which format rows travel to their experts, and in backward the gradients of their outputs; sums
    travel as they are. None: everything as it is. Every rank takes part in each call and each backward, be it without
    tokens, in the same order. A plan's weights are those of the rows.
    """

    def __init__(self, exchange: Exchange, precision: Precision | None = None) -> None:
        self.exchange, self.precision = exchange, precision

    fixed_rows = True

    def announce(self, expert_TK: Tensor) -> None:
        """The host waits for nothing."""

    def dispatch(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, announced: None = None
    ) -> tuple[Tensor, Tensor, Plan]:
        """rows (capacity, D) for this rank's experts, sorted by expert; count_L; plan."""
        rows, weight_R, count_L, position_SK = _Out.apply(x_TD, weight_TK, expert_TK, self.exchange, self.precision)
        return rows, count_L, Plan(weight_R, (expert_TK, position_SK))

    def row_weights(self, plan: Plan) -> Tensor:
        """(capacity,): the gate's weight of each row that is here."""
        assert plan.weight is not None, "the plan's weight was taken out"
        return plan.weight

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        """(T, D): each rank's sum of a token's rows, weighted if the plan has weights, and the sum of these sums."""
        if plan.weight is not None:
            rows_RD = (rows_RD * plan.weight[: len(rows_RD), None]).to(rows_RD.dtype)
        return _Home.apply(rows_RD, *plan.detail, self.exchange, self.precision)


class _Out(torch.autograd.Function):
    """Tokens' rows and weights to their experts; in backward the sums of their gradients home."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_TK: Tensor, expert_TK: Tensor, exchange: Exchange, precision: Precision | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        buffers, capacity = exchange.lane(), exchange.capacity
        rows, scale, dtype = _packed(x_TD, precision)
        all_to_all.send(buffers, rows, expert_TK, exchange.num_local, weight_TK, scale)
        all_to_all.wait(buffers)
        position, count = all_to_all.place(buffers, exchange.num_local, capacity)
        out, weight = all_to_all.expand(
            buffers, rows, position, capacity, dtype, weighted=True, scaled=scale is not None
        )
        assert weight is not None
        ctx.exchange, ctx.dtypes = exchange, (x_TD.dtype, weight_TK.dtype)
        ctx.save_for_backward(expert_TK, position)
        ctx.mark_non_differentiable(count, position)
        return out, weight.to(weight_TK.dtype), count, position

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        expert_TK, position = ctx.saved_tensors
        grad_x, grad_weight = _home(ctx.exchange, grads[0], position, expert_TK, grads[1])
        assert grad_weight is not None
        return grad_x.to(ctx.dtypes[0]), grad_weight.to(ctx.dtypes[1]), None, None, None


class _Home(torch.autograd.Function):
    """Sums to their tokens; in backward the tokens' gradients out, to the same places."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, expert_TK: Tensor, position_SK: Tensor, exchange: Exchange, precision: Precision | None
    ) -> Tensor:  # fmt: skip
        ctx.exchange, ctx.precision, ctx.dtype, ctx.rows = exchange, precision, rows_RD.dtype, len(rows_RD)
        ctx.save_for_backward(expert_TK, position_SK)
        return _home(exchange, rows_RD, position_SK, expert_TK, None)[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        expert_TK, position = ctx.saved_tensors
        buffers = ctx.exchange.lane()
        rows, scale, dtype = _packed(grads[0], ctx.precision)
        all_to_all.send(buffers, rows, expert_TK, ctx.exchange.num_local, None, scale, choices=False)
        all_to_all.wait(buffers)
        out, _ = all_to_all.expand(buffers, rows, position, ctx.rows, dtype, scaled=scale is not None)
        return out.to(ctx.dtype), None, None, None, None


def _home(
    exchange: Exchange, rows_RD: Tensor, position: Tensor, expert_TK: Tensor, weight_R: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    buffers = exchange.lane()
    sums, numbers = all_to_all.reduce(buffers, rows_RD, position, weight_R)
    all_to_all.send_back(buffers, sums, numbers, position)
    all_to_all.wait(buffers)
    return all_to_all.collect(buffers, expert_TK, exchange.num_local, rows_RD.dtype, weight_R is not None)


def _packed(rows_TD: Tensor, precision: Precision | None) -> tuple[Tensor, Tensor | None, torch.dtype]:
    """What travels, its scales if it is codes, and the dtype it arrives in."""
    payload = (rows_TD,) if precision is None else precision.pack(rows_TD)
    if len(payload) == 1:
        return payload[0].contiguous(), None, payload[0].dtype
    codes, scale = payload
    return codes.contiguous(), scale, torch.bfloat16
