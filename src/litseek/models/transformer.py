"""The whole model, for one device (report §2). Letters: B batch, S sequence, D model, V vocabulary."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from litseek.data.batch import MicroBatch
from litseek.models.block import Block, Phase, State
from litseek.models.config import DeepSeekV3Config
from litseek.models.mla import LayerCache
from litseek.models.moe import Experts, MoE, Router
from litseek.models.mtp import MTP
from litseek.models.norm import RMSNorm
from litseek.precision import FP32, Linear, Precision


class Cache(Protocol):
    """A latent cache (litseek.inference.cache): slot index = position."""

    length: int

    def layer(self, index: int) -> LayerCache: ...


def build(
    cfg: DeepSeekV3Config, precision: Precision | None = None, recompute: bool = False, seed: int = 0
) -> Transformer:
    """A model with fresh weights on the current default device; on "meta" it has none."""
    return Transformer(cfg, precision, recompute, seed)


class Transformer(nn.Module):
    """Embedding, blocks, final norm, head, and MTP depths that share embedding and head. Knows no ranks.

    Parameter names are the released ones without their ``model.`` prefix; MTP depth k is ``mtp.<k>``.
    """

    def __init__(
        self, cfg: DeepSeekV3Config, precision: Precision | None = None, recompute: bool = False, seed: int = 0
    ):
        super().__init__()
        precision = precision or FP32()
        self.cfg, self.precision = cfg, precision
        self.compiled = False
        aux = _aux_weight(cfg)
        self.embed_tokens = Embedding(cfg, precision)
        self.layers = nn.ModuleList(Block(cfg, i, precision, recompute, aux) for i in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = precision.linear(cfg.hidden_size, cfg.vocab_size, role="head")
        mtp_aux = aux if cfg.mtp_aux_loss else 0.0
        self.mtp = nn.ModuleList(MTP(cfg, precision, recompute, mtp_aux) for _ in range(cfg.num_nextn_predict_layers))
        if self.norm.weight.device.type != "meta":
            self.init_weights(seed)

    def phases(self) -> list[Phase]:
        """Everything that turns token ids into head inputs, in order: "hidden" (after the final norm) and "mtp.<k>"."""
        phases = [Phase("embed", self._embed, (self.embed_tokens,))]
        for i, block in enumerate(self._blocks()):
            phases += block.phases(f"layers.{i}")
        phases.append(Phase("norm", self._norm, (self.norm,)))
        for depth, mtp in enumerate(self._depths()):
            phases += mtp.phases(depth, self.embed_tokens)
        return phases

    def forward(self, micro: MicroBatch) -> State:
        """All phases under plain autograd. Adds "aux" (sum of the auxiliary losses) and "loads" (phase name -> (E,))."""
        self._attach_compiled()
        state: State = {}
        aux, loads = torch.zeros((), device=micro.tokens.device), {}
        for phase in self.phases():
            state = phase(state, micro)
            aux = aux + state.pop("aux", 0.0)
            if "load" in state:
                loads[phase.name] = state.pop("load")
        return {**state, "aux": aux, "loads": loads}

    @torch.inference_mode(False)  # what is kept must serve the training that follows a validation
    def attach(self) -> None:
        """Before a step, on the final device: keep the products' weights as the precision multiplies them. What is kept
        already is made again only where something but the optimizer (a checkpoint, an average) wrote the weight."""
        for weight, role in self._product_weights():
            self.precision.attach(weight, role)

    def compile_phases(self) -> None:
        """Compile the blocks' own work (torch.compile); layers of one kind share a graph."""
        self.compiled = True
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        for module in self.modules():
            if isinstance(module, Block):
                module.compile_phases()

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, V) float32 of the main head: a plain view for evaluation. ValueError past the model's range."""
        if tokens.shape[1] > self.cfg.max_position_embeddings:
            raise ValueError(
                f"tokens have {tokens.shape[1]} positions, model.max_position_embeddings={self.cfg.max_position_embeddings} "
                "is the most that the model was made for."
            )
        self._attach_compiled()
        state: State = {}
        micro = MicroBatch.of(tokens)
        for phase in self.phases():
            state = phase(state, micro)
            if phase.name == "norm":
                break
        return self.head_logits(state["hidden"])

    def head_logits(self, hidden_BSD: Tensor) -> Tensor:
        """(..., D) after the final norm -> (..., V), float32 at least."""
        logits = self.lm_head(hidden_BSD)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward_cached(self, tokens_BS: Tensor, positions_BS: Tensor, cache: Cache, absorbed: bool = True) -> Tensor:
        """(B, S, D) after the final norm; writes the new positions' latents, attends to slots <= each position.

        ``cache.length`` must already cover the new positions.
        """
        x = self.embed_tokens(tokens_BS)
        for i, block in enumerate(self._blocks()):
            x = block.forward_cached(x, positions_BS, cache.layer(i), cache.length, absorbed)
        return self.norm(x)

    def balance_routers(self) -> dict[str, Router]:
        """Phase name -> the router whose load that phase reports, MTP's included; those that are on this rank."""
        blocks = {f"layers.{i}": block for i, block in enumerate(self._blocks())}
        blocks |= {f"mtp.{k}": mtp.block for k, mtp in enumerate(self._depths())}
        routers = {f"{name}.attend": b.mlp.gate for name, b in blocks.items() if isinstance(b.mlp, MoE)}
        return {name: router for name, router in routers.items() if router.e_score_correction_bias is not None}

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Normal with ``initializer_range``, norms at 1. Each tensor's numbers depend on (seed, its global name) only,
        so that every layout starts alike."""
        for name, parameter in self.named_parameters():
            self.draw(name, parameter, seed)
        for router in self.balance_routers().values():
            router.e_score_correction_bias.zero_()

    @torch.no_grad()
    def draw(self, name: str, parameter: Tensor, seed: int) -> None:
        """Fresh numbers for the whole tensor of this global name."""
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
            return
        generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        parameter.normal_(0.0, self.cfg.initializer_range, generator=generator)

    def _product_weights(self) -> Iterator[tuple[nn.Parameter, str]]:
        for module in self.modules():
            if next(iter(module._parameters.values()), None) is None:
                continue  # nothing of its own, or on another rank
            if isinstance(module, Linear):
                yield module.weight, module.role
            elif isinstance(module, Experts):
                yield module.gate_up_proj, "experts"
                yield module.down_proj, "experts"

    def _attach_compiled(self) -> None:
        """Compiled phases take what is attached as it is, even of weights that were written since."""
        if self.compiled:
            self.attach()

    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    def _depths(self) -> list[MTP]:
        return cast(list[MTP], list(self.mtp))

    def _embed(self, state: State, micro: MicroBatch) -> State:
        return {"x": self.embed_tokens(micro.tokens)}

    def _norm(self, state: State, micro: MicroBatch) -> State:
        return {"hidden": self.norm(state["x"])}


class Embedding(nn.Module):
    """Token rows from the FP32 master, handed on in the compute dtype."""

    def __init__(self, cfg: DeepSeekV3Config, precision: Precision):
        super().__init__()
        self.compute_dtype = precision.compute_dtype
        self.weight = nn.Parameter(torch.empty(cfg.vocab_size, cfg.hidden_size))

    def forward(self, tokens: Tensor) -> Tensor:
        rows = nn.functional.embedding(tokens, self.weight)
        return rows if rows.dtype == torch.float64 else rows.to(self.compute_dtype)


def _aux_weight(cfg: DeepSeekV3Config) -> float:
    layers = cfg.num_hidden_layers - cfg.first_k_dense_replace
    layers += cfg.num_nextn_predict_layers if cfg.mtp_aux_loss else 0
    return cfg.aux_loss_alpha / layers if cfg.aux_loss_reduction == "mean" and layers else cfg.aux_loss_alpha
