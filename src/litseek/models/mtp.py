"""Multi-token prediction (report §2.2): depth k predicts the token k + 1 places ahead, keeping the causal chain.

Embedding and head are the main model's own tensors. Letters: B batch, S sequence, D model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from litseek.models.block import Block, Phase
from litseek.models.config import DeepSeekV3Config
from litseek.models.norm import RMSNorm
from litseek.precision import Precision


class MTP(nn.Module):
    """One depth: h' = M [norm(Emb(t_{i+k})) ; norm(h)], a block, a final norm.

    ``h`` is the previous depth's state after its final norm (the main model's for depth 1), and the embedding comes
    first in the concatenation: both as in the released weights.
    """

    def __init__(self, cfg: DeepSeekV3Config, precision: Precision, recompute: bool, aux_weight: float):
        super().__init__()
        self.enorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.hnorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.eh_proj = precision.linear(2 * cfg.hidden_size, cfg.hidden_size, role="mtp")
        self.block = Block(cfg, cfg.num_hidden_layers, precision, recompute, aux_weight)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def enter(self, embedded_BSD: Tensor, h_BSD: Tensor) -> Tensor:
        """The block's input from the shifted tokens' embeddings and the previous depth's state."""
        return self.eh_proj(torch.cat([self.enorm(embedded_BSD), self.hnorm(h_BSD)], dim=-1))

    def phases(self, depth: int, embed: nn.Module) -> list[Phase]:
        """Entry, the block's phases, exit; ``depth`` counts from 0. Leaves its state under "mtp.<depth>"."""
        name, source = f"mtp.{depth}", "hidden" if depth == 0 else f"mtp.{depth - 1}"

        def enter(state, micro):
            embedded = embed(shift_left(micro.tokens, depth + 1))
            return {**state, "x": self.enter(embedded, state[source])}

        def leave(state, micro):
            rest = {k: v for k, v in state.items() if k != "x"}
            return {**rest, name: self.norm(state["x"])}

        return [
            Phase(f"{name}.enter", enter, (embed, self.enorm, self.hnorm, self.eh_proj)),
            *self.block.phases(name),
            Phase(f"{name}.leave", leave, (self.norm,)),
        ]


def shift_left(tokens_BS: Tensor, places: int) -> Tensor:
    """tokens[:, i + places]; the last ``places`` columns, which no depth is scored on, are token 0."""
    shifted = torch.zeros_like(tokens_BS)
    shifted[:, : max(tokens_BS.shape[1] - places, 0)] = tokens_BS[:, places:]
    return shifted
