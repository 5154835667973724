"""Forward and backward of a model's blocks alone: what one GPU of a large deployment computes (report §3.4's widths).

No embedding, head, optimizer, network or pipeline bubble: the experts that a GPU would hold get all chosen rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from litseek.data.batch import MicroBatch
from litseek.models.config import DeepSeekV3Config
from litseek.models.transformer import build
from litseek.parallel.executor import Executor, State
from litseek.parallel.strategy import LitseekStrategy, recomputed


class BlocksStep:
    """Calling it runs all blocks forward and backward once, through the executor, on random activations.

    Weight gradients start from nothing, as in a step's first micro-batch; what a precision keeps of the weights is made
    once before, as for the many micro-batches of a step.
    """

    def __init__(
        self,
        cfg: DeepSeekV3Config,
        precision: Any,
        strategy: LitseekStrategy,
        *,
        batch: int,
        micro_batch: int,
        seq_len: int,
        device: torch.device,
        compile: bool = False,
        recompute: bool = False,
        seed: int = 0,
    ):
        # embedding and head take no part: one row of each
        self.cfg, self.seq_len = cfg.replace(vocab_size=1, num_nextn_predict_layers=0), seq_len
        with device:
            self.model = build(self.cfg, precision, recompute, seed)
            tokens = torch.zeros(micro_batch, seq_len, dtype=torch.int64)
            shape = (micro_batch, seq_len, cfg.hidden_size)
            self.x_BSD = torch.randn(shape).to(precision.compute_dtype)
            self.grad_BSD = torch.randn(shape).to(precision.compute_dtype)
        if compile:
            self.model.compile_phases()
        self.micros = [MicroBatch.of(tokens) for _ in range(batch // micro_batch)]
        blocks = [phase for phase in self.model.phases() if phase.name.startswith("layers.")]
        self.executor = Executor([_Input(self.x_BSD), *blocks], strategy.num_chunks, recomputed(strategy.recompute))

    def __call__(self) -> Tensor:
        self.model.attach()
        for parameter in self.model.parameters():
            parameter.grad = None
        return self.executor.forward_backward(self.micros, self._head).loss

    def flops_per_token(self) -> float:
        """Forward and backward of the blocks, causal attention at half."""
        return self.cfg.flops_per_token(self.seq_len) - 6 * self.cfg.vocab_size * self.cfg.hidden_size

    def _head(self, state: State, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        return _Given.apply(state["x"], self.grad_BSD), {}


class _Input:
    """The phase before the first block."""

    name = "input"

    def __init__(self, x_BSD: Tensor):
        self.x_BSD = x_BSD

    def __call__(self, state: State, micro: MicroBatch) -> State:
        return {"x": self.x_BSD}


class _Given(torch.autograd.Function):
    """A loss of 0 whose gradient is given: the blocks' backward starts without a pass over the activations."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, grad_BSD: Tensor) -> Tensor:
        ctx.save_for_backward(grad_BSD)
        return torch.zeros((), dtype=torch.float32, device=x_BSD.device)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad_BSD,) = ctx.saved_tensors
        return grad_BSD, None
