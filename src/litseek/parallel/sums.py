"""What all ranks must agree on in a step: numbers of the batch, loss and metrics, loads, the gradients' norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from litseek_kernels.adamw import MultiNorm, l2_norm_and_finite
from torch import Tensor

from litseek.data.batch import MicroBatch
from litseek.errors import LitseekError
from litseek.parallel.executor import StepResult
from litseek.parallel.mesh import Mesh


class Totals(NamedTuple):
    """Of the global batch."""

    targets: float
    tokens: int
    stop: bool
    """Whether any rank asks for it."""
    longest: int
    """The most tokens of a micro-batch, blank ones included."""


class Sums:
    """Sums over all ranks of one run. What the host knows travels between hosts, without a detour through a GPU."""

    def __init__(self, mesh: Mesh, host_group: dist.ProcessGroup | None) -> None:
        self.mesh, self.host_group = mesh, host_group
        self._names: tuple[list[str], dict[str, int]] | None = None
        self._norms: dict[float, MultiNorm] = {}

    def batch(self, micros: Sequence[MicroBatch], stop: bool = False) -> Totals:
        """LitseekError, on every rank, if the ranks of a pipeline were given different micro-batches, or ranks that exchange
        rows different numbers of them.
        """
        counted = [micro for micro in micros if not micro.blank]
        targets = sum(micro.targets for micro in counted)
        tokens = sum(micro.num_tokens for micro in counted)
        longest = max((micro.num_tokens for micro in micros), default=0)
        if self.mesh.world == 1:
            return Totals(targets, tokens, stop, longest)
        shapes = 0
        for micro in micros:
            for size in micro.tokens.shape:
                shapes = (shapes * 1000003 + size) % 2**40
        rows = self.gather([targets, tokens, len(micros), shapes, float(stop), longest])
        dp = self.mesh.dp
        for rank, row in enumerate(rows):
            partner = rows[rank % dp]
            if row[2:4] != partner[2:4]:
                raise LitseekError(
                    f"rank {rank} of the pipeline has {int(row[2])} micro-batches of other lengths than rank {rank % dp}, "
                    f"which has {int(partner[2])}: all ranks of a pipeline must be given the same batch."
                )
            if self.mesh.ep > 1 and row[2] != rows[0][2]:
                raise LitseekError(
                    f"rank {rank} has {int(row[2])} micro-batches and rank 0 has {int(rows[0][2])}: ranks that share "
                    "experts must run as many."
                )
        stop, longest = any(row[4] for row in rows), max(int(row[5]) for row in rows)
        return Totals(sum(row[0] for row in rows[:dp]), int(sum(row[1] for row in rows[:dp])), stop, longest)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's numbers, in order of ranks."""
        if self.mesh.world == 1:
            return [list(values)]
        found = torch.empty(self.mesh.world, len(values), dtype=torch.float64)
        own = torch.tensor(values, dtype=torch.float64)
        dist.all_gather_into_tensor(found.view(-1), own, group=self.host_group)
        return found.tolist()

    def objects(self, value: Any) -> list[Any]:
        """Every rank's value, in order of ranks."""
        if self.mesh.world == 1:
            return [value]
        values: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def result(self, result: StepResult) -> None:
        """Loss, metrics and loads of the whole global batch, alike on all ranks: each comes from who computed it."""
        if self.mesh.world == 1:
            return
        names, experts = self._agreed(result)
        zero = result.loss.new_zeros((), dtype=torch.float64)
        values = [result.loss.double(), *(result.metrics.get(name, zero).double() for name in names)]
        scalars = torch.stack(values)
        dist.all_reduce(scalars)
        scalars = (scalars / self.mesh.dp).to(result.loss.dtype)
        result.loss = scalars[0]
        result.metrics = dict(zip(names, scalars[1:]))
        loads = [
            result.loads.get(name, torch.zeros(size, dtype=torch.int64, device=scalars.device))
            for name, size in experts.items()
        ]
        if loads:
            flat = torch.cat(loads)
            dist.all_reduce(flat)
            result.loads = dict(zip(experts, flat.split(list(experts.values()))))

    def _agreed(self, result: StepResult) -> tuple[list[str], dict[str, int]]:
        """Names of metrics and loads that any rank has, found in the first step and the same in all."""
        if self._names is None:
            own = (sorted(result.metrics), {name: len(load) for name, load in result.loads.items()})
            found = self.objects(own)
            metrics = sorted({name for names, _ in found for name in names})
            loads: dict[str, int] = {}
            for _, sizes in found:  # ranks of the first stages come first
                loads |= {name: size for name, size in sizes.items() if name not in loads}
            self._names = metrics, loads
        return self._names

    def norm(self, grads: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, Tensor]:
        """(global norm, finite): of gradients that count with the given share of their squares on this rank."""
        shares: dict[float, list[Tensor]] = {}
        for grad, share in grads:
            if grad.numel():
                shares.setdefault(share, []).append(grad)
        found = [
            (share, *l2_norm_and_finite(alike, self._norms.setdefault(share, MultiNorm())))
            for share, alike in shares.items()
        ]
        if self.mesh.world == 1:
            return found[0][1:] if found else l2_norm_and_finite([])
        device = grads[0][0].device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for share, norm, finite in found:
            sums[0] += norm.double().square() * share
            sums[1] += (~finite).double()
        dist.all_reduce(sums)
        return sums[0].sqrt().float(), sums[1] == 0
