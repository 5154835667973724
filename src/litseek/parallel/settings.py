"""What the strategy's keys may be. Errors: ValueError naming the key, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

from litseek.parallel.executor import EXCHANGE
from litseek.parallel.mesh import Mesh
from litseek.parallel.schedule import KINDS

RECOMPUTED = ("attend", "dispatch", "experts", "combine", "all")
DISPATCHERS = ("all_to_all", "symmetric", "hierarchical")


def check_layout(pp: int, ep: int, schedule: str | None, chunks: int, recompute: Sequence[str]) -> None:
    for name in recompute:
        if name not in RECOMPUTED:
            raise ValueError(f"strategy.recompute names '{name}': allowed are {', '.join(RECOMPUTED)}.")
        if ep > 1 and name in EXCHANGE:
            raise ValueError(
                f"strategy.recompute names '{name}', which talks to other ranks: strategy.ep={ep} must be 1."
            )
    if schedule is not None and schedule not in KINDS:
        raise ValueError(f"strategy.schedule={schedule} is not known: allowed are {', '.join(KINDS)}, or null.")
    if pp > 1 and schedule is None:
        raise ValueError(f"strategy.pp={pp} needs strategy.schedule: one of {', '.join(KINDS)}.")
    if schedule is not None and chunks != 1:
        raise ValueError(f"strategy.chunks={chunks} is for one process, strategy.schedule={schedule} cuts by itself.")
    if schedule == "dualpipe" and pp % 2:
        raise ValueError(f"strategy.schedule=dualpipe pairs the ranks of a pipeline: strategy.pp={pp} must be even.")
    Mesh(pp * ep, pp, ep)


def check_exchange(dispatcher: str, ep: int, comm_sms: int, capacity_factor: float | None) -> None:
    if not isinstance(comm_sms, int) or comm_sms < 1:
        raise ValueError(f"strategy.comm_sms={comm_sms} must be an integer of at least 1.")
    if dispatcher not in DISPATCHERS:
        raise ValueError(f"strategy.dispatcher={dispatcher} is not known: allowed are {', '.join(DISPATCHERS)}.")
    if dispatcher != "all_to_all" and ep == 1:
        raise ValueError(
            f"strategy.dispatcher={dispatcher} moves rows between ranks that share experts: strategy.ep=1 must be above 1, "
            "or strategy.dispatcher=all_to_all."
        )
    if capacity_factor is None:
        return
    if dispatcher != "symmetric":
        raise ValueError(
            f"strategy.capacity_factor={capacity_factor} is for strategy.dispatcher=symmetric, with {dispatcher} every row "
            "has room: it must be null."
        )
    if not capacity_factor > 0:
        raise ValueError(
            f"strategy.capacity_factor={capacity_factor} must be above 0, or null: room for the worst case."
        )


def check_nodes(dispatcher: str, ep: int, ranks: int, device: str) -> None:
    """``ranks`` on each node, of one ``device``: may this dispatcher run there?"""
    if dispatcher == "symmetric":
        if device != "cuda":
            raise ValueError(
                f"strategy.dispatcher=symmetric runs on CUDA GPUs, the ranks here are on '{device}': allowed are "
                "all_to_all and, over several nodes, hierarchical."
            )
        if ranks % ep:
            raise ValueError(
                f"strategy.dispatcher=symmetric stores into other GPUs of a node: the strategy.ep={ep} ranks that share "
                f"experts must lie on one, and trainer.devices={ranks} of a node is not a multiple of them; allowed are "
                "all_to_all and, where the ranks fill whole nodes, hierarchical."
            )
    if dispatcher == "hierarchical" and (ranks == 1 or ep <= ranks or ep % ranks):
        raise ValueError(
            f"strategy.dispatcher=hierarchical is for ranks that share experts over whole nodes of several ranks: "
            f"strategy.ep={ep} must be two or more times trainer.devices={ranks}, which must be above 1; allowed are "
            "all_to_all and, inside a node, symmetric."
        )
