"""Which rank does what: the axes pp (pipeline), edp and ep (experts), dp = edp x ep (report §3.2).

rank = (pp_rank * edp + edp_rank) * ep + ep_rank: ranks that share experts are neighbours, so that their all-to-all
stays inside a node as long as ep does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

Ranks = tuple[int, ...]


@dataclass(frozen=True)
class Mesh:
    """One rank's place. Errors: ValueError naming the axis and the number it does not divide."""

    world: int = 1
    pp: int = 1
    ep: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        for name in ("pp", "ep"):
            size = getattr(self, name)
            if size < 1:
                raise ValueError(f"strategy.{name}={size} must be at least 1.")
        if self.world % (self.pp * self.ep):
            raise ValueError(
                f"strategy.pp={self.pp} times strategy.ep={self.ep} is {self.pp * self.ep}, which does not divide the "
                f"{self.world} ranks: trainer.devices times trainer.num_nodes must be a multiple of it."
            )

    @property
    def edp(self) -> int:
        """Copies of each expert."""
        return self.world // (self.pp * self.ep)

    @property
    def dp(self) -> int:
        """Ranks that share a global batch."""
        return self.edp * self.ep

    @property
    def pp_rank(self) -> int:
        return self.rank // self.dp

    @property
    def dp_rank(self) -> int:
        return self.rank % self.dp

    @property
    def edp_rank(self) -> int:
        return self.dp_rank // self.ep

    @property
    def ep_rank(self) -> int:
        return self.rank % self.ep

    def at(self, pp_rank: int) -> int:
        """The rank of another pipeline place with the same share of the batch."""
        return pp_rank * self.dp + self.dp_rank

    def dense(self, pp_ranks: Iterable[int]) -> Ranks:
        """All ranks at these pipeline places: who holds a dense parameter."""
        return tuple(p * self.dp + d for p in sorted(pp_ranks) for d in range(self.dp))

    def experts(self, pp_ranks: Iterable[int], ep_rank: int) -> Ranks:
        """Those of them with this share of the experts."""
        return tuple(rank for rank in self.dense(pp_ranks) if rank % self.ep == ep_rank)

    def ep_groups(self) -> list[Ranks]:
        """Every group of ranks that share one set of experts."""
        return [tuple(range(first, first + self.ep)) for first in range(0, self.world, self.ep)]

    def neighbours(self) -> list[Ranks]:
        """Every two ranks that follow each other in a pipeline."""
        return [(rank, rank + self.dp) for rank in range(self.world - self.dp)] if self.pp > 1 else []


class Groups:
    """Process groups by their ranks. All ranks ask for the same ones in the same order; a lone rank needs none."""

    def __init__(self, mesh: Mesh, timeout: timedelta) -> None:
        self.mesh, self.timeout = mesh, timeout
        self.made: dict[tuple[str, Ranks], dist.ProcessGroup] = {}

    def make(self, purpose: str, wanted: Iterable[Ranks], sms: int | None = None) -> None:
        """Groups of their own for ``purpose``: collectives of two purposes may run at once. ``sms``: at most so many of a
        GPU's multiprocessors work for them, and come before other work."""
        for ranks in sorted(set(wanted)):
            if len(ranks) > 1:
                group = dist.new_group(list(ranks), timeout=self.timeout, pg_options=_options(sms))
                if self.mesh.rank in ranks:
                    self.made[purpose, ranks] = group

    def get(self, purpose: str, ranks: Ranks) -> dist.ProcessGroup | None:
        """None for a lone rank."""
        return self.made[purpose, ranks] if len(ranks) > 1 else None

    def close(self) -> None:
        """Give them back. No rank may still use one."""
        while self.made:
            dist.destroy_process_group(self.made.popitem()[1])


def _options(sms: int | None) -> Any:
    if sms is None or dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = sms
    return options
