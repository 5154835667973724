"""DeepSeekMoE feed-forward (report §2.1.2). Letters: B batch, S sequence, T = B * S tokens, D model, E experts, K chosen, R rows, F hidden."""

from __future__ import annotations

from typing import NamedTuple

import torch
from litseek_kernels.gate import gate
from litseek_kernels.linear_float32 import linear_float32
from torch import Tensor, nn

from litseek.losses.balance import balance_loss
from litseek.models.config import DeepSeekV3Config
from litseek.precision import Precision


class Routing(NamedTuple):
    """What the gate decided for T tokens."""

    expert_TK: Tensor
    weight_TK: Tensor
    load_E: Tensor
    """(E,) int64: tokens that chose each expert."""
    aux: Tensor | None
    """Balance loss times its weight, or None where there is none."""


class Router(nn.Module):
    """Sigmoid gate in float32 with group-limited choice; the balance bias acts on the choice only."""

    e_score_correction_bias: Tensor

    def __init__(self, cfg: DeepSeekV3Config, aux_weight: float):
        super().__init__()
        self.cfg, self.aux_weight = cfg, aux_weight
        self.weight = nn.Parameter(torch.empty(cfg.n_routed_experts, cfg.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(cfg.n_routed_experts, dtype=torch.float32))

    def forward(self, u_BSD: Tensor) -> Routing:
        cfg = self.cfg
        sequences = u_BSD.shape[0] if self.aux_weight and self.training else 0
        chosen = gate(
            linear_float32(u_BSD.flatten(0, 1), self.weight),
            self.e_score_correction_bias,
            cfg.num_experts_per_tok,
            cfg.n_group,
            cfg.topk_group,
            cfg.experts_per_group_score,
            cfg.norm_topk_prob,
            cfg.routed_scaling_factor,
            sequences,
        )
        aux = None
        if sequences:
            even = balance_loss(chosen.share_BE, chosen.probability_BE, cfg.num_experts_per_tok, cfg.seq_aux)
            aux = self.aux_weight * even
        return Routing(chosen.expert_TK, chosen.weight_TK, chosen.load_E, aux)


class Experts(nn.Module):
    """The routed experts held here, stacked: gate_up_proj (E, 2F, D) with the gate's rows first, down_proj (E, D, F)."""

    def __init__(self, cfg: DeepSeekV3Config, precision: Precision, num_local: int | None = None):
        super().__init__()
        self.precision = precision
        experts, hidden = num_local or cfg.n_routed_experts, cfg.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * hidden, cfg.hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, cfg.hidden_size, hidden))

    def forward(self, rows_RD: Tensor, count_E: Tensor, weight_R: Tensor | None = None) -> Tensor:
        """(R, D): each row through its expert, times its gate's weight; rows are sorted by expert."""
        return self.precision.experts(rows_RD, self.gate_up_proj, self.down_proj, count_E, weight_R)


class SwiGLU(nn.Module):
    """A dense feed-forward: the first layers' and the shared experts'."""

    def __init__(self, cfg: DeepSeekV3Config, precision: Precision, hidden: int):
        super().__init__()
        self.precision = precision
        self.gate_proj = precision.linear(cfg.hidden_size, hidden)
        self.up_proj = precision.linear(cfg.hidden_size, hidden)
        self.down_proj = precision.linear(hidden, cfg.hidden_size)

    def forward(self, u: Tensor) -> Tensor:
        return self.precision.feed_forward(u, self.gate_proj, self.up_proj, self.down_proj)


class MoE(nn.Module):
    """Shared experts plus K of E routed ones. A container: the block's phases call its parts in order."""

    def __init__(self, cfg: DeepSeekV3Config, precision: Precision, aux_weight: float):
        super().__init__()
        self.gate = Router(cfg, aux_weight)
        self.experts = Experts(cfg, precision)
        self.shared_experts = None
        if cfg.n_shared_experts:
            self.shared_experts = SwiGLU(cfg, precision, cfg.moe_intermediate_size * cfg.n_shared_experts)
