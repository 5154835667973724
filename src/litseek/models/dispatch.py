"""Token dispatch on one device: the meaning that every dispatcher keeps.

Letters: T tokens, D model, K chosen, E experts, R rows. No token is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from litseek_kernels.permute import permute, sort_by_expert, unpermute, weight_of_rows
from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """What combine must know. ``weight`` is the only part with a gradient: a phase takes it out and puts it back."""

    weight: Tensor | None
    detail: Any

    def with_weight(self, weight: Tensor | None) -> Plan:
        return replace(self, weight=weight)


class Dispatcher(Protocol):
    """``dispatch`` sends each token's row to its experts, sorted by expert; ``combine`` returns the weighted sums.

    A block takes the weights out of the plan and multiplies them into the experts' hidden activations instead:
    ``row_weights`` are the plan's weights in the rows' order, and combine without weights is a plain sum.

    ``fixed_rows`` says that the rows' number does not depend on the choices: those after ``count_E.sum()`` mean nothing.
    Otherwise ``announce`` may send ahead what the host will have to wait for; ``dispatch`` of the same choices takes what it gave.
    """

    @property
    def fixed_rows(self) -> bool: ...

    def announce(self, expert_TK: Tensor) -> Any: ...

    def dispatch(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, announced: Any = None
    ) -> tuple[Tensor, Tensor, Plan]: ...

    def row_weights(self, plan: Plan) -> Tensor: ...

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor: ...


class LocalDispatcher:
    """All experts are here: a sort and its inverse."""

    fixed_rows = True

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def announce(self, expert_TK: Tensor) -> None:
        """Nobody waits for anything."""

    def dispatch(
        self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor, announced: None = None
    ) -> tuple[Tensor, Tensor, Plan]:
        """rows (T * K, D) sorted by expert, count_E, plan."""
        order_R, inverse_TK, count_E = sort_by_expert(expert_TK, self.num_experts)
        return permute(x_TD, order_R, inverse_TK), count_E, Plan(weight_TK, (order_R, inverse_TK))

    def row_weights(self, plan: Plan) -> Tensor:
        """(R,): the gate's weight of each row."""
        assert plan.weight is not None, "the plan's weight was taken out"
        return weight_of_rows(plan.weight, *plan.detail)

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        """(T, D): the sum over a token's experts, times the gate's weights if the plan has them."""
        return unpermute(rows_RD, plan.weight, *plan.detail)
