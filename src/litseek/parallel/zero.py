"""Gradients summed over the ranks that hold a parameter, and ZeRO-1: each of them steps its share of the rows.

Every row of every parameter is stepped by exactly one rank, so the global gradient norm is one sum over all ranks,
whatever the layout. Letters: n ranks of a replica group, C rows of a share (the last shares are shorter or empty).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from litseek.parallel.mesh import Ranks
from litseek.parallel.partition import Placement

BUCKET = 2**24
"""Elements that one collective carries: 64 MB of float32."""


@dataclass
class Share:
    """The rows of a parameter that this rank steps."""

    name: str
    whole: nn.Parameter
    placement: Placement
    begin: int
    """First row, counted among the rows that are here."""
    end: int
    part: nn.Parameter
    """What the optimizer sees: the rows themselves, not a copy; the whole parameter where it is not split."""

    @property
    def split(self) -> bool:
        return self.part is not self.whole

    def rows_of(self, index: int) -> tuple[int, int]:
        """The share of the replica group's ``index``-th rank."""
        return share_of(self.placement.rows, len(self.placement.replicas), index)


def share_of(rows: int, ranks: int, index: int) -> tuple[int, int]:
    """(begin, end) of one rank's rows: runs of ceil(rows / ranks)."""
    size = -(-rows // ranks)
    return min(index * size, rows), min((index + 1) * size, rows)


class Shares:
    """All of a model's parameters here, split or not. ``group`` gives the process group of a set of ranks."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        placements: Mapping[str, Placement],
        rank: int,
        dp: int,
        group: Callable[[Ranks], dist.ProcessGroup | None],
        split: bool,
    ) -> None:
        self.rank, self.dp, self.group = rank, dp, group
        self.shares = [self._share(name, p, placements[name], split) for name, p in parameters]

    def _share(self, name: str, whole: nn.Parameter, placement: Placement, split: bool) -> Share:
        replicas = placement.replicas
        if not split or len(replicas) == 1 or whole.ndim == 0:
            return Share(name, whole, placement, 0, placement.rows, whole)
        begin, end = share_of(placement.rows, len(replicas), replicas.index(self.rank))
        part = nn.Parameter(whole.data[begin:end], requires_grad=whole.requires_grad)
        return Share(name, whole, placement, begin, end, part)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """For the optimizer."""
        return [(share.name, share.part) for share in self.shares]

    # -- gradients ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self) -> None:
        """Every gradient averaged over the global batch; where a parameter is split only this rank's rows are kept.

        A parameter that got no gradient has one of zeros.
        """
        trained = [share for share in self.shares if share.whole.requires_grad]
        for share in trained:
            if share.whole.grad is None:
                share.whole.grad = torch.zeros_like(share.whole)
        for replicas, bucket in _buckets(trained, lambda share: share.whole):
            group, grads = self.group(replicas), [_grad(share) for share in bucket]
            if group is None:
                if self.dp > 1:
                    torch._foreach_div_(grads, self.dp)
            elif bucket[0].split:
                self._scatter(bucket, grads, group)
            else:
                flat = torch.cat([grad.flatten() for grad in grads])
                dist.all_reduce(flat, group=group)
                flat /= self.dp
                parts = flat.split([grad.numel() for grad in grads])
                torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads)])

    def _scatter(self, bucket: Sequence[Share], grads: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        n = dist.get_world_size(group)
        flat = _flat(bucket, n, grads[0])
        for i, row in enumerate(flat):
            _pack(row, bucket, grads, i)
        if dist.get_backend(group) == "gloo":  # which has no reduce-scatter
            dist.all_reduce(flat, group=group)
            own = flat[dist.get_rank(group)]
        else:
            own = torch.empty_like(flat[0])
            dist.reduce_scatter_tensor(own, flat, group=group)
        own /= self.dp
        place = 0
        for share in bucket:
            size = share.part.numel()
            share.part.grad = own[place : place + size].view_as(share.part)
            share.whole.grad = None
            place += _room(share, n)

    def grads(self) -> list[Tensor]:
        """What this rank steps with, after `reduce`."""
        return [share.part.grad for share in self.shares if share.part.grad is not None]

    def squares_count_once(self) -> list[tuple[Tensor, float]]:
        """Gradients, each with the share of its squared norm that this rank adds to the global one: all of a split
        parameter's, 1 / n of one that n ranks hold alike."""
        return [
            (share.part.grad, 1.0 if share.split else 1.0 / len(share.placement.replicas))
            for share in self.shares
            if share.part.grad is not None
        ]

    def clear(self) -> None:
        for share in self.shares:
            share.whole.grad = share.part.grad = None

    # -- weights ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def gather(self) -> None:
        """After a step: every rank's rows to all that hold the parameter."""
        split = [share for share in self.shares if share.split and share.whole.requires_grad]
        for replicas, bucket in _buckets(split, lambda share: share.whole):
            group = self.group(replicas)
            assert group is not None
            n = dist.get_world_size(group)
            values = [share.whole.data for share in bucket]
            flat = _flat(bucket, n, values[0])
            own = flat[dist.get_rank(group)].clone()
            _pack(own, bucket, values, dist.get_rank(group))
            dist.all_gather_into_tensor(flat.view(-1), own, group=group)
            for i, row in enumerate(flat):
                _unpack(row, bucket, values, i)
        if split:
            torch.autograd.graph.increment_version([share.whole for share in split])


def _grad(share: Share) -> Tensor:
    assert share.whole.grad is not None
    return share.whole.grad


def _room(share: Share, n: int) -> int:
    """Elements of the largest share."""
    begin, end = share.rows_of(0)
    return (end - begin) * (share.whole.numel() // max(share.placement.rows, 1))


def _flat(bucket: Sequence[Share], n: int, like: Tensor) -> Tensor:
    return like.new_zeros(n, sum(_room(share, n) for share in bucket))


def _pack(row: Tensor, bucket: Sequence[Share], values: Sequence[Tensor], index: int) -> None:
    """The ``index``-th rank's rows of every value, one after another."""
    pairs = list(_slots(row, bucket, values, index))
    torch._foreach_copy_([slot for slot, _ in pairs], [value for _, value in pairs])


def _unpack(row: Tensor, bucket: Sequence[Share], values: Sequence[Tensor], index: int) -> None:
    pairs = list(_slots(row, bucket, values, index))
    torch._foreach_copy_([value for _, value in pairs], [slot for slot, _ in pairs])


def _slots(
    row: Tensor, bucket: Sequence[Share], values: Sequence[Tensor], index: int
) -> Iterable[tuple[Tensor, Tensor]]:
    place = 0
    for share, value in zip(bucket, values):
        begin, end = share.rows_of(index)
        part = value[begin:end]
        if part.numel():
            yield row[place : place + part.numel()].view_as(part), part
        place += _room(share, len(share.placement.replicas))


def _buckets(shares: Sequence[Share], tensor: Callable[[Share], Tensor]) -> list[tuple[Ranks, list[Share]]]:
    """Runs of one replica group, kind and dtype, of about ``BUCKET`` elements; in the same order on all its ranks."""
    kinds: dict[tuple[Ranks, bool, torch.dtype], list[list[Share]]] = {}
    sizes: dict[tuple[Ranks, bool, torch.dtype], int] = {}
    for share in shares:
        value = tensor(share)
        kind = share.placement.replicas, share.split, value.dtype
        runs, size = kinds.setdefault(kind, [[]]), value.numel()
        if runs[-1] and sizes[kind] + size > BUCKET:
            runs.append([])
        sizes[kind] = size + (sizes[kind] if runs[-1] else 0)
        runs[-1].append(share)
    ordered = sorted(kinds.items(), key=lambda item: (item[0][0], item[0][1], str(item[0][2])))
    return [(replicas, run) for (replicas, _, _), runs in ordered for run in runs]
