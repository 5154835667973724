"""Which dispatcher moves rows between the ranks that share experts, and the passes that it may have to repeat.

``all_to_all`` and ``hierarchical`` take any number of tokens. ``symmetric`` has memory of a fixed size: before a pass all
ranks agree on the most tokens of a micro-batch, and after it, where rows may not have had room, on whether it must run
again with more. Nothing of a pass that is repeated remains: neither gradients, nor losses, metrics and loads, nor drawn
random numbers; what a step does with its result (balance biases, averages, counters) comes after the last try.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from litseek.data.batch import MicroBatch
from litseek.errors import LitseekError
from litseek.models.dispatch import Dispatcher
from litseek.models.transformer import Transformer
from litseek.parallel import symmetric
from litseek.parallel.dispatch import AllToAllDispatcher, Sizes
from litseek.parallel.hierarchical import HierarchicalDispatcher, NodeGroups, node_ranks
from litseek.parallel.mesh import Groups, Mesh, Ranks
from litseek.parallel.segment import random_state, set_random
from litseek.parallel.sums import Sums

Result = TypeVar("Result")


class Choice(NamedTuple):
    """What the strategy's keys say."""

    kind: str = "all_to_all"
    sms: int = 20
    """Multiprocessors that exchange rows."""
    factor: float | None = None
    """Of `symmetric.Exchange`."""
    lanes: int = 1
    """CUDA streams that exchange at once."""
    per_node: int = 1
    """Ranks on each node."""


class Dispatchers:
    """Those of one rank. Made on all ranks alike, since process groups are."""

    def __init__(self, choice: Choice, mesh: Mesh, groups: Groups, sums: Sums, timeout: timedelta) -> None:
        self.choice, self.mesh, self.groups, self.sums, self.timeout = choice, mesh, groups, sums, timeout
        self.exchanges: dict[tuple[int, int, int, torch.dtype], symmetric.Exchange] = {}
        """By number of experts, choices, width and dtype: models of one shape share it."""
        self._late: Sizes | None = None
        self._warned = False
        for way in ("forward", "backward"):
            groups.make(way, mesh.ep_groups(), choice.sms)
        if choice.kind == "hierarchical":
            between, inside = node_ranks(mesh.ep_groups(), choice.per_node)
            for way in ("forward", "backward"):
                groups.make(f"{way} between nodes", map(tuple, between), choice.sms)
                groups.make(f"{way} inside", map(tuple, inside), choice.sms)

    def make(self, model: Transformer) -> tuple[Dispatcher, Dispatcher | None]:
        """For one of the model's mixtures: in training and scoring, and in generation if that is another one.

        Generation goes through ``all_to_all`` where ``symmetric`` trains: the tokens of a forward pass vary from rank to
        rank and from one token to the next there, and a prompt's may be many more than a micro-batch has.
        """
        experts = model.cfg.n_routed_experts
        if self.choice.kind == "hierarchical":
            return HierarchicalDispatcher(
                experts, self._nodes("forward"), self._nodes("backward"), model.precision
            ), None
        forward, backward = (self._group(way, self._ranks()) for way in ("forward", "backward"))
        hops = AllToAllDispatcher(experts, forward, backward, model.precision)
        if self.choice.kind == "all_to_all":
            return hops, None
        return symmetric.SymmetricDispatcher(self._exchange(model, forward), model.precision), hops

    def _ranks(self) -> Ranks:
        return next(group for group in self.mesh.ep_groups() if self.mesh.rank in group)

    def _group(self, purpose: str, ranks: Ranks) -> dist.ProcessGroup:
        group = self.groups.get(purpose, ranks)
        assert group is not None
        return group

    def _nodes(self, way: str) -> NodeGroups:
        between, inside = node_ranks([self._ranks()], self.choice.per_node)
        found = []
        for where, lists in (("between nodes", between), ("inside", inside)):
            own = next(tuple(ranks) for ranks in lists if self.mesh.rank in ranks)
            found.append(self._group(f"{way} {where}", own))
        return NodeGroups(*found)

    def _exchange(self, model: Transformer, group: dist.ProcessGroup) -> symmetric.Exchange:
        cfg, dtype, choice = model.cfg, model.precision.compute_dtype, self.choice
        key = cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.hidden_size, dtype
        if key not in self.exchanges:
            self.exchanges[key] = symmetric.Exchange(
                cfg.n_routed_experts, group, 0, cfg.num_experts_per_tok, cfg.hidden_size, dtype, choice.factor,
                choice.lanes, choice.sms, self.timeout.total_seconds(), symmetric.share,
            )  # fmt: skip
        return self.exchanges[key]

    # -- passes -------------------------------------------------------------------------------------------------

    def train(self, attempt: Callable[[], Result], clear: Callable[[], None], tokens: int) -> tuple[Result, int | None]:
        """``attempt()`` until its rows had room on all ranks, with cleared gradients each time, and how often it had to be
        repeated; None if it never has to. ``tokens`` is the most that a micro-batch of any rank has. A collective.

        LitseekError, on every rank, where a wait for a peer gave up. If nothing can overflow the host waits for nothing,
        and `late` tells.
        """
        self._fit(tokens)
        if not any(exchange.can_overflow for exchange in self.exchanges.values()):
            return attempt(), None
        return self._repeat(attempt, clear)

    def score(self, attempt: Callable[[], Result], micros: Sequence[MicroBatch]) -> Result:
        """The same for a pass without gradients, whose results the host reads anyway."""
        if not self.exchanges:
            return attempt()
        own = max(micro.num_tokens for micro in micros)
        self._fit(max(int(row[0]) for row in self.sums.gather([own])))
        return self._repeat(attempt, lambda: None)[0]

    def late(self) -> Tensor | None:
        """() bool on the device: whether a wait gave up on any rank, so that a step's result is worthless; None where
        `train` has asked. The host hears of it one step later, without waiting. Errors: LitseekError, on every rank."""
        if not self.exchanges or any(exchange.can_overflow for exchange in self.exchanges.values()):
            return None
        late = torch.stack([exchange.late for exchange in self.exchanges.values()]).any().int().view(1)
        dist.all_reduce(late, dist.ReduceOp.MAX)
        before, self._late = self._late, Sizes(late)
        if before is not None and before.read()[0]:
            raise self._gave_up()
        return late[0] > 0

    def _fit(self, tokens: int) -> None:
        for exchange in self.exchanges.values():
            exchange.fit(tokens)

    def _repeat(self, attempt: Callable[[], Result], clear: Callable[[], None]) -> tuple[Result, int]:
        random, retries = random_state(), 0
        while True:
            result = attempt()
            exchanges = list(self.exchanges.values())
            flags = torch.stack([torch.stack([one.overflowed, one.late]) for one in exchanges]).any(0).int()
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            overflowed, late = flags.tolist()  # the one wait of the host
            if late:
                raise self._gave_up()
            if not overflowed:
                return result, retries
            more = sum(exchange.grow() for exchange in exchanges)
            retries += 1
            if more and not self._warned:
                self._warned = True
                warnings.warn(
                    f"rank {self.mesh.rank} had too little room for its experts' rows and has made room for {more} more; "
                    f"the pass runs again. strategy.capacity_factor={self.choice.factor} was too small; further retries "
                    "are counted in dispatch/retries only.",
                    stacklevel=2,
                )
            clear()
            set_random(*random)

    def _gave_up(self) -> LitseekError:
        return LitseekError(
            f"A rank waited longer than strategy.timeout_s={self.timeout.total_seconds():g} allows for rows of another rank "
            "that shares its experts (strategy.dispatcher=symmetric); every rank must run the same passes."
        )
