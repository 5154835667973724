"""Dispatch over two levels: each row crosses between nodes once and fans out inside its target node (report §3.2.2).

Ranks are numbered inside nodes first: rank = node * local + index. A row goes to the rank of its own index on the
target node, and from there to the ranks of its experts; the way back forms the sum inside the node first.
Letters: T tokens, K chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from litseek.parallel.dispatch import Hop, HopDispatcher, first_of_part
from litseek.precision import Precision


class NodeGroups(NamedTuple):
    """A rank's groups inside one expert-parallel group."""

    between: dist.ProcessGroup
    """The ranks of the same index on each node, in order of nodes."""
    inside: dist.ProcessGroup
    """The ranks of the same node, in order of indices."""


def node_ranks(expert_groups: Sequence[Sequence[int]], local: int) -> tuple[list[list[int]], list[list[int]]]:
    """The ranks of every group between nodes and of every group inside one, ``local`` of an expert-parallel group's ranks
    lying on a node."""
    for ranks in expert_groups:
        if len(ranks) % local:
            raise ValueError(f"An expert-parallel group of {len(ranks)} ranks is not a multiple of {local} on a node.")
    between = [list(ranks[i::local]) for ranks in expert_groups for i in range(local)]
    inside = [list(ranks[n : n + local]) for ranks in expert_groups for n in range(0, len(ranks), local)]
    return between, inside


def node_groups(expert_groups: Sequence[Sequence[int]], local: int) -> NodeGroups:
    """This rank's two groups. ``expert_groups`` are the world's ranks by expert-parallel group, the same on every rank,
    since all of them make all groups together; ``local`` is how many ranks of each lie on a node."""
    return NodeGroups(*(dist.new_subgroups_by_enumeration(lists)[0] for lists in node_ranks(expert_groups, local)))


class HierarchicalDispatcher(HopDispatcher):
    """Between nodes, then inside. Rank ``node * local + index`` holds the experts that it would hold in one group."""

    def __init__(
        self,
        num_experts: int,
        groups: NodeGroups,
        backward_groups: NodeGroups | None = None,
        precision: Precision | None = None,
    ) -> None:
        backward = groups if backward_groups is None else backward_groups
        hops = [Hop(groups.between, backward.between), Hop(groups.inside, backward.inside)]
        super().__init__(num_experts, hops, precision)

    def bytes_between_nodes(self) -> int:
        """What this rank has sent to other nodes so far."""
        return self.hops[0].bytes_sent


def rows_between_nodes(expert_TK: Tensor, num_experts: int, nodes: int, home: int) -> int:
    """How many rows cross from node ``home``, where these tokens are, to others: one for each other node that holds
    some of a token's experts."""
    node_TK = first_of_part(expert_TK // (num_experts // nodes))
    return int(((node_TK >= 0) & (node_TK != home)).sum())
