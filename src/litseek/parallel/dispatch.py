"""Token dispatch between ranks through torch.distributed's all-to-all; the meaning is the local dispatcher's.

A token's row goes once to each rank that holds some of its experts and is copied there for each of them; back comes one
row, the sum of what they made of it (report §3.2.2). On the way are one or more hops, each inside a process group.
Letters: T tokens of this rank, D model, K chosen, E experts of all ranks, L experts of this rank, W ranks of a hop's
group, P tokens that arrived here, R rows of this rank's experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from litseek_kernels.permute import permute, sort_by_expert, unpermute, weight_of_rows
from torch import Tensor

from litseek.models.dispatch import Plan
from litseek.precision import Precision


class Hop:
    """One exchange inside ``group``, whose rank w holds the w-th part of the experts that come here.

    What autograd's backward sends goes through ``backward_group``: where one micro-batch's forward and another's
    backward overlap, their collectives meet in a different order on each rank, which one group does not allow.
    """

    def __init__(self, group: dist.ProcessGroup, backward_group: dist.ProcessGroup | None = None) -> None:
        self.group, self.backward_group = group, group if backward_group is None else backward_group
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.bytes_sent = 0
        """To other ranks so far, forward and backward; the table of counts is not in it."""

    def exchange(self, rows: Tensor, sent: list[int], received: list[int], backward: bool) -> Tensor:
        """Rows ordered by destination -> rows ordered by source."""
        group = self.backward_group if backward else self.group
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        self.bytes_sent += (sum(sent) - sent[self.rank]) * prod(rows.shape[1:]) * rows.element_size()
        return out

    def exchange_table(self, table_WN: Tensor) -> Tensor:
        """Row w to rank w; from each rank its row for this one."""
        out = torch.empty_like(table_WN)
        dist.all_to_all_single(out, table_WN.contiguous(), group=self.group)
        return out


@dataclass(frozen=True)
class Leg:
    """A hop of one dispatch: which tokens travel (P of T) and how many between each two ranks."""

    hop: Hop
    order_P: Tensor
    """Each row sent -> flat (token, choice), as in litseek_kernels.permute."""
    inverse_TK: Tensor
    """Each choice -> the row sent; -1 where an earlier choice takes the token to the same rank."""
    sent: list[int]
    received: list[int]

    def out(self, rows: Tensor, backward: bool = False) -> Tensor:
        """(T, ...) here -> (P, ...) at the ranks of their experts."""
        return self.hop.exchange(permute(rows, self.order_P, self.inverse_TK), self.sent, self.received, backward)

    def home(self, rows: Tensor, backward: bool = False) -> Tensor:
        """(P, ...) at those ranks -> (T, ...): the sums, taken in float32, of what they send back."""
        back = self.hop.exchange(rows, self.received, self.sent, backward)
        return unpermute(back, None, self.order_P, self.inverse_TK)


@dataclass(frozen=True)
class Route:
    """A dispatch's way: its legs, and where the P tokens that arrived lie among the R rows of this rank's experts."""

    legs: tuple[Leg, ...]
    order_R: Tensor
    inverse_PK: Tensor
    count_L: Tensor


class Sizes:
    """Counts on their way to the host, beside whatever the GPU does next."""

    def __init__(self, sizes: Tensor) -> None:
        self.event = None
        self.here = sizes
        if sizes.is_cuda:
            self.here = torch.empty(sizes.shape, dtype=sizes.dtype, pin_memory=True)
            self.here.copy_(sizes, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> list[int]:
        """The one wait of the host."""
        if self.event is not None:
            self.event.synchronize()
        return self.here.tolist()


class HopDispatcher:
    """Dispatch over ``hops``, outermost first: the first one splits the experts between its ranks, the next one the
    part of each of these, and so on. One read of counts by the host a dispatch; no row is dropped.

    ``precision`` says in which format rows travel to their experts, and in backward the gradients of their outputs;
    sums travel as they are, in the experts' dtype. None: everything as it is. The counts that `dispatch` returns are of
    this rank's experts. Every rank of the groups must take part in each call and each backward, be it without tokens.
    """

    fixed_rows = False

    def __init__(self, num_experts: int, hops: Sequence[Hop], precision: Precision | None = None) -> None:
        ranks = prod(hop.world for hop in hops)
        if num_experts % ranks:
            raise ValueError(
                f"model.n_routed_experts={num_experts} is not a multiple of the {ranks} ranks that share them."
            )
        self.num_experts, self.num_local, self.hops, self.precision = num_experts, num_experts // ranks, hops, precision

    def announce(self, expert_TK: Tensor) -> Sizes:
        """Start the exchange of counts."""
        return Sizes(self._sizes(expert_TK))

    def dispatch(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, announced: Sizes | None = None
    ) -> tuple[Tensor, Tensor, Plan]:
        """rows for this rank's experts, sorted by expert; count_L; plan."""
        sizes = announced or self.announce(expert_TK)
        route = self._route(expert_TK, sizes.read())
        arrived_PD = _Out.apply(x_TD, route.legs, self.precision)
        return permute(arrived_PD, route.order_R, route.inverse_PK), route.count_L, Plan(weight_TK, route)

    def row_weights(self, plan: Plan) -> Tensor:
        """(R,): the gate's weight of each row that is here, sent after the rows."""
        return weight_of_rows(self._weights(plan), plan.detail.order_R, plan.detail.inverse_PK)

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        """(T, D): each rank's sum of a token's rows, weighted if the plan has weights, and the sum of these sums."""
        route = plan.detail
        weight_PK = None if plan.weight is None else self._weights(plan)
        sums_PD = unpermute(rows_RD, weight_PK, route.order_R, route.inverse_PK)
        return _Home.apply(sums_PD, route.legs, self.precision)

    def _weights(self, plan: Plan) -> Tensor:
        """(P, K): all weights of the tokens that arrived."""
        assert plan.weight is not None, "the plan's weight was taken out"
        return _Out.apply(plan.weight, plan.detail.legs, None)

    def _route(self, expert_TK: Tensor, sizes: list[int]) -> Route:
        legs, span, expert = [], self.num_experts, expert_TK
        for hop in self.hops:
            span //= hop.world
            order, inverse, _ = sort_by_expert(first_of_part(expert // span), hop.world)
            sent, received = sizes[: hop.world], sizes[hop.world : 2 * hop.world]
            legs.append(Leg(hop, order[: sum(sent)], inverse, sent, received))
            expert = legs[-1].out(expert.to(torch.int32)) - hop.rank * span
            expert = expert.masked_fill((expert < 0) | (expert >= span), -1)  # another rank's
            sizes = sizes[2 * hop.world :]
        order, inverse, count_L = sort_by_expert(expert, self.num_local)
        (rows,) = sizes
        return Route(tuple(legs), order[:rows], inverse, count_L)

    def _sizes(self, expert_TK: Tensor) -> Tensor:
        """For each hop how many tokens go to its ranks and come from them; last how many rows this rank's experts get.

        A rank whose tokens others pass on cannot count them, so the table that travels over a hop holds for each rank:
        the tokens that go there, and the same again for each rank of the next hop; innermost is the number of rows.
        """
        parts = self.num_experts // self.num_local
        table = sort_by_expert(expert_TK // self.num_local, parts)[2]
        for hop in reversed(self.hops):
            token = sort_by_expert(first_of_part(expert_TK // (self.num_experts // parts)), parts)[2]
            table = torch.cat([token.view(parts, 1), table.view(parts, -1)], dim=1)
            parts //= hop.world
        sizes = []
        for hop in self.hops:
            leaving = table.view(hop.world, -1)
            arriving = hop.exchange_table(leaving)
            sizes += [leaving[:, 0], arriving[:, 0]]
            table = arriving[:, 1:].sum(0)
        return torch.cat([*sizes, table])


class AllToAllDispatcher(HopDispatcher):
    """Rank r of ``group`` holds experts [r L, (r + 1) L); an expert sees the ranks' rows in order of ranks."""

    def __init__(
        self,
        num_experts: int,
        group: dist.ProcessGroup,
        backward_group: dist.ProcessGroup | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(num_experts, [Hop(group, backward_group)], precision)


class _Out(torch.autograd.Function):
    """Tokens' rows to their experts' ranks; in backward the sums of their gradients home."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, legs: tuple[Leg, ...], precision: Precision | None) -> Tensor:
        ctx.legs, ctx.dtype = legs, rows.dtype
        return _out(rows, legs, precision, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _home(grads[0], ctx.legs, backward=True).to(ctx.dtype), None, None


class _Home(torch.autograd.Function):
    """Sums to their tokens; in backward the tokens' gradients out."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, legs: tuple[Leg, ...], precision: Precision | None) -> Tensor:
        ctx.legs, ctx.precision, ctx.dtype = legs, precision, rows.dtype
        return _home(rows, legs, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _out(grads[0], ctx.legs, ctx.precision, backward=True).to(ctx.dtype), None, None


def _out(rows: Tensor, legs: tuple[Leg, ...], precision: Precision | None, backward: bool) -> Tensor:
    payload = (rows,) if precision is None else precision.pack(rows)
    for leg in legs:
        payload = tuple(leg.out(part, backward) for part in payload)
    return payload[0] if precision is None else precision.unpack(payload)


def _home(rows: Tensor, legs: tuple[Leg, ...], backward: bool) -> Tensor:
    for leg in reversed(legs):
        rows = leg.home(rows, backward)
    return rows


def first_of_part(part_TK: Tensor) -> Tensor:
    """-1 in place of a part that an earlier choice of the same token names."""
    earlier_TK = (part_TK[:, :, None] == part_TK[:, None, :]).tril(-1).any(2)
    return part_TK.masked_fill(earlier_TK, -1)
