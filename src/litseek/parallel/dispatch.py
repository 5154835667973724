"""Token dispatch between ranks through torch.distributed's all-to-all; the meaning is the local dispatcher's.

Letters: T tokens of this rank, D model, K chosen, E experts of all ranks, L experts of this rank, W ranks, R rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from litseek_kernels.permute import permute, sort_by_expert, unpermute, weight_of_rows
from torch import Tensor

from litseek.models.dispatch import Plan


class AllToAllDispatcher:
    """Rank r of ``group`` holds experts [r L, (r + 1) L). One read of counts by the host a dispatch; no row is dropped.

    Rows leave sorted by expert, hence by rank; at their destination they are sorted by expert again, and stably, so that
    an expert sees the ranks' rows in order of ranks. The counts that `dispatch` returns are of this rank's experts.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.world = dist.get_world_size(group)
        if num_experts % self.world:
            raise ValueError(
                f"model.n_routed_experts={num_experts} is not a multiple of the {self.world} ranks that share them."
            )
        self.num_experts, self.num_local = num_experts, num_experts // self.world

    def dispatch(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> tuple[Tensor, Tensor, Plan]:
        """rows for this rank's experts, sorted by expert; count_L; plan."""
        order_R, inverse_TK, count_E = sort_by_expert(expert_TK, self.num_experts)
        count_WL = torch.empty_like(count_E)  # how many rows each rank sends to each of ours
        dist.all_to_all_single(count_WL, count_E, group=self.group)
        count_WL = count_WL.view(self.world, self.num_local)
        sent, received = torch.stack([count_E.view(self.world, -1).sum(1), count_WL.sum(1)]).tolist()

        rows = _AllToAll.apply(permute(x_TD, order_R, inverse_TK), sent, received, self.group)
        expert_R = torch.arange(self.num_local, device=x_TD.device).repeat(self.world)
        expert_R = expert_R.repeat_interleave(count_WL.flatten(), output_size=sum(received))
        by_expert_R = expert_R.argsort(stable=True)
        plan = Plan(weight_TK, (order_R, inverse_TK, by_expert_R, sent, received))
        return rows[by_expert_R], count_WL.sum(0), plan

    def row_weights(self, plan: Plan) -> Tensor:
        """(R,): the gate's weight of each row that is here, sent after the rows."""
        assert plan.weight is not None, "the plan's weight was taken out"
        order_R, inverse_TK, by_expert_R, sent, received = plan.detail
        weight_R = weight_of_rows(plan.weight, order_R, inverse_TK)
        return _AllToAll.apply(weight_R, sent, received, self.group)[by_expert_R]

    def combine(self, rows_RD: Tensor, plan: Plan) -> Tensor:
        """(T, D): rows back to the ranks that sent them, and there the sum over a token's experts, weighted if the plan
        has weights."""
        order_R, inverse_TK, by_expert_R, sent, received = plan.detail
        back = torch.empty_like(by_expert_R)
        back[by_expert_R] = torch.arange(len(back), device=back.device)
        rows = _AllToAll.apply(rows_RD[back], received, sent, self.group)
        return unpermute(rows, plan.weight, order_R, inverse_TK)


class _AllToAll(torch.autograd.Function):
    """Rows to their ranks; in backward, gradients the same way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.sizes, ctx.group = (sent, received), group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sent, received = ctx.sizes
        return _exchange(grads[0], received, sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
    out = rows.new_empty((sum(received), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out
