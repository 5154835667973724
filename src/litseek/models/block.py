"""A Transformer block as a list of phases: attend, dispatch, experts, combine (report §3.2).

A phase maps a state to a state and is an autograd segment of its own: an executor may run it on detached inputs, keep
what backward needs, recompute it, or run another block's phase in between. Calling phases in order is the plain block.
Letters: B batch, S sequence, T = B * S tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from litseek.data.batch import MicroBatch
from litseek.models.config import DeepSeekV3Config
from litseek.models.dispatch import Dispatcher, LocalDispatcher
from litseek.models.mla import MLA, LayerCache
from litseek.models.moe import MoE, SwiGLU
from litseek.models.norm import RMSNorm
from litseek.models.recompute import keep_products
from litseek.models.rope import Rotary, rotation
from litseek.precision import Precision

State = dict[str, Any]
"""Named values between phases. Floating tensors carry gradients; integer tensors and a dispatch plan just pass.

"x" is the residual stream (B, S, D). Two keys never travel: "aux" (auxiliary loss of this phase, a scalar) and "load"
((E,) int64 tokens an expert): whoever runs the phases takes them out.
"""


class Whole(NamedTuple):
    """A phase and those after it, as many as ``phases``, at once: the same numbers for less of the host's time."""

    run: Callable[[State, MicroBatch], State]
    phases: int


@dataclass(frozen=True, eq=False)
class Phase:
    """One segment. ``announce``, for one that talks to other ranks, may run earlier and puts into the state what will
    spare ``run`` a wait: whoever skips it gets the same."""

    name: str
    run: Callable[[State, MicroBatch], State]
    modules: tuple[nn.Module, ...]
    """Whose parameters it uses."""
    announce: Callable[[State], State] | None = None
    whole: Whole | None = None

    def __call__(self, state: State, micro: MicroBatch) -> State:
        return self.run(state, micro)


class Block(nn.Module):
    """Pre-norm attention and feed-forward. Knows no ranks: ``dispatcher`` moves the rows."""

    def __init__(self, cfg: DeepSeekV3Config, layer: int, precision: Precision, recompute: bool, aux_weight: float):
        super().__init__()
        self.recompute = recompute
        self.wrap: Callable[[Any], Any] = lambda function: function
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = MLA(cfg, precision, recompute)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp: MoE | SwiGLU
        if cfg.is_moe(layer):
            self.mlp = MoE(cfg, precision, aux_weight)
        else:
            self.mlp = SwiGLU(cfg, precision, cfg.intermediate_size)
        self.cfg = cfg
        self.dispatcher: Dispatcher = LocalDispatcher(cfg.n_routed_experts)
        self.cached_dispatcher: Dispatcher | None = None
        """Moves the rows in `forward_cached`, where the numbers of tokens vary, if another one shall."""

    def phases(self, prefix: str) -> list[Phase]:
        """attend, dispatch, experts, combine; a dense block has attend and experts only."""
        attention = (self.input_layernorm, self.self_attn, self.post_attention_layernorm)

        def on_stream(inner: Callable[..., State]) -> Callable[[State, MicroBatch], State]:
            def run(state: State, micro: MicroBatch) -> State:
                rotary = micro.once(("rotary", id(self.cfg)), lambda: rotation(self.cfg, micro.positions))
                return {**state, **inner(state["x"], rotary, micro.documents)}

            return run

        attend, whole = on_stream(self.wrap(self._attend)), on_stream(self.wrap(self._whole))
        if isinstance(self.mlp, SwiGLU):
            return [
                Phase(f"{prefix}.attend", attend, attention, whole=Whole(whole, 2)),
                Phase(f"{prefix}.experts", self.wrap(self._dense), (self.mlp,)),
            ]
        shared = () if self.mlp.shared_experts is None else (self.mlp.shared_experts,)
        local = isinstance(self.dispatcher, LocalDispatcher)
        announce = None if self.dispatcher.fixed_rows else self._announce
        return [
            Phase(f"{prefix}.attend", attend, (*attention, self.mlp.gate), whole=Whole(whole, 4) if local else None),
            Phase(f"{prefix}.dispatch", self._dispatch, (), announce),
            Phase(f"{prefix}.experts", self._experts_phase(), (self.mlp.experts, *shared)),
            Phase(f"{prefix}.combine", self._combine, ()),
        ]

    def _experts_phase(self) -> Callable[[State, MicroBatch | None], State]:
        """Compiled where the number of rows is always the same; each other one would be compiled anew."""
        if self.dispatcher.fixed_rows:
            return self.wrap(self._experts)
        return partial(self._experts, shared=self.wrap(self._add_shared))

    def compile_phases(self) -> None:
        """torch.compile for the phases that are more than a kernel and talk to nobody; inference stays as it is."""
        self.wrap = partial(torch.compile, dynamic=False)

    def forward_cached(
        self, x_BSD: Tensor, positions_BS: Tensor, cache: LayerCache, length: int, absorbed: bool
    ) -> Tensor:
        """The block for inference: attention over the latent cache, then the feed-forward."""
        normed = self.input_layernorm(x_BSD)
        x_BSD = x_BSD + self.self_attn.forward_cached(normed, positions_BS, cache, length, absorbed)
        return self._feed_forward(self._feed({"x": x_BSD}), self.cached_dispatcher)["x"]

    def _whole(self, x_BSD: Tensor, rotary: Rotary, documents_BS: Tensor | None) -> State:
        """All phases at once, where no other rank has a part in them."""
        return self._feed_forward(self._attend(x_BSD, rotary, documents_BS))

    def _feed_forward(self, state: State, by: Dispatcher | None = None) -> State:
        if isinstance(self.mlp, SwiGLU):
            return self._dense(state, None)
        return self._combine(self._experts(self._dispatch(state, None, by), None), None, by=by)

    def _attend(self, x_BSD: Tensor, rotary: Rotary, documents_BS: Tensor | None) -> State:
        return self._feed({"x": x_BSD + self.self_attn(x_BSD, self.input_layernorm, rotary, documents_BS)})

    def _feed(self, state: State) -> State:
        """Add the feed-forward's normed input and, in a mixture, the gate's decision."""
        norm, x = self.post_attention_layernorm, state["x"]
        u = keep_products(norm, x) if self.recompute and x.requires_grad else norm(x)
        state = {**state, "u": u}
        if isinstance(self.mlp, MoE):
            routing = self.mlp.gate(u)
            state |= {"expert": routing.expert_TK, "weight": routing.weight_TK, "load": routing.load_E}
            if routing.aux is not None:
                state["aux"] = routing.aux
        return state

    def _announce(self, state: State) -> State:
        return {**state, "announced": self.dispatcher.announce(state["expert"])}

    def _dispatch(self, state: State, micro: MicroBatch | None, by: Dispatcher | None = None) -> State:
        by = by or self.dispatcher
        rest = {k: v for k, v in state.items() if k not in ("expert", "weight", "announced")}
        u_TD = state["u"].flatten(0, 1)
        rows, count, plan = by.dispatch(u_TD, state["expert"], state["weight"], state.get("announced"))
        weight = by.row_weights(plan)
        return {**rest, "rows": rows, "count": count, "weight": weight, "plan": plan.with_weight(None)}

    def _experts(
        self, state: State, micro: MicroBatch | None, shared: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> State:
        assert isinstance(self.mlp, MoE)
        rest = {k: v for k, v in state.items() if k not in ("u", "count", "weight")}
        rest["rows"] = self.mlp.experts(state["rows"], state["count"], state["weight"])
        if self.mlp.shared_experts is not None:
            rest["x"] = (shared or self._add_shared)(state["x"], state["u"])
        return rest

    def _add_shared(self, x: Tensor, u: Tensor) -> Tensor:
        assert isinstance(self.mlp, MoE) and self.mlp.shared_experts is not None
        return x + self.mlp.shared_experts(u)

    def _combine(self, state: State, micro: MicroBatch | None, by: Dispatcher | None = None) -> State:
        rest = {k: v for k, v in state.items() if k not in ("rows", "plan")}
        y = (by or self.dispatcher).combine(state["rows"], state["plan"]).view_as(state["x"])
        return {**rest, "x": state["x"] + y}

    def _dense(self, state: State, micro: MicroBatch | None) -> State:
        assert isinstance(self.mlp, SwiGLU)
        rest = {k: v for k, v in state.items() if k != "u"}
        return {**rest, "x": state["x"] + self.mlp(state["u"])}
