"""What of the model lies on this rank: pipeline stages cut by cost, experts cut over ep (report §3.2).

The model is written for one device and built whole (without memory, on "meta", where it is large); here it loses what
other ranks hold. Modules stay, hollow, so that every name stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from litseek.models.block import Block, Phase
from litseek.models.config import DeepSeekV3Config
from litseek.models.dispatch import Dispatcher
from litseek.models.moe import Experts, MoE
from litseek.models.transformer import Transformer
from litseek.parallel.mesh import Mesh, Ranks

HEAD = "lm_head"


@dataclass(frozen=True)
class Placement:
    """Where a tensor of the model lies: this rank holds rows [start, start + rows) along dim 0 of ``shape``."""

    name: str
    shape: tuple[int, ...]
    start: int
    rows: int
    replicas: Ranks
    """The ranks that hold the very same rows, in order."""


@dataclass(frozen=True)
class Layout:
    """How pipeline stages lie on pipeline ranks. ``owners[stage]``: who runs it (two ranks in the bidirectional form)."""

    num_stages: int
    owners: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, kind: str | None, pp: int) -> Layout:
        """For a schedule's kind; None is one stage on every rank (no pipeline)."""
        if kind is None:
            return cls(1, (tuple(range(pp)),))
        if kind == "dualpipev":
            return cls(2 * pp, tuple((min(s, 2 * pp - 1 - s),) for s in range(2 * pp)))
        if kind == "dualpipe":
            return cls(pp, tuple(tuple(sorted({s, pp - 1 - s})) for s in range(pp)))
        return cls(pp, tuple((s,) for s in range(pp)))

    def stages(self, pp_rank: int) -> list[int]:
        return [stage for stage, owners in enumerate(self.owners) if pp_rank in owners]


def cut(phases: Sequence[Phase], cfg: DeepSeekV3Config, seq_len: int, num_stages: int) -> list[list[Phase]]:
    """Phases in ``num_stages`` runs of whole blocks, so that the costliest is as cheap as can be.

    The first run has the embedding; the last the final norm and the MTP depths, since they share the head with the main
    model. ValueError where there are fewer blocks than stages.
    """
    if num_stages == 1:
        return [list(phases)]
    units = _units(phases)
    if len(units) < num_stages:
        raise ValueError(
            f"model.num_hidden_layers={cfg.num_hidden_layers} gives {len(units)} parts that can be cut apart (each layer; "
            f"the final norm with head and MTP), and strategy.pp and strategy.schedule ask for {num_stages} stages."
        )
    costs = [_cost(unit, cfg, seq_len) for unit in units]
    edges = _balanced(costs, num_stages)
    return [[phase for unit in units[a:b] for phase in unit] for a, b in pairwise(edges)]


def _units(phases: Sequence[Phase]) -> list[list[Phase]]:
    """The embedding with the first block, every other block, and the tail."""
    units: list[list[Phase]] = []
    opened: str | None = None
    for phase in phases:
        kind, _, rest = phase.name.partition(".")
        name = f"layers.{rest.partition('.')[0]}" if kind == "layers" else "embed" if kind == "embed" else "tail"
        if name != opened and opened != "embed":
            units.append([])
        units[-1].append(phase)
        opened = name
    return units


def _cost(unit: Sequence[Phase], cfg: DeepSeekV3Config, seq_len: int) -> float:
    """Multiply-adds a token: the attended length's share, every chosen matrix, and the head where it is."""
    d, cost = cfg.hidden_size, 0.0
    attention = cfg._attention() + cfg.num_attention_heads * (cfg.qk_head_dim + cfg.v_head_dim) * seq_len / 2
    for phase in unit:
        kind, _, rest = phase.name.partition(".")
        if phase.name.endswith(".attend"):
            moe = kind == "mtp" or cfg.is_moe(int(rest.partition(".")[0]))
            cost += attention + (cfg._moe(cfg.num_experts_per_tok) if moe else cfg._dense())
        elif phase.name.endswith(".enter"):
            cost += 2 * d * d + cfg.vocab_size * d  # a depth runs the head once more
        elif phase.name == "norm":
            cost += cfg.vocab_size * d
    return cost


def _balanced(costs: Sequence[float], parts: int) -> list[int]:
    """Edges of ``parts`` non-empty runs whose largest sum is least; among equals the sums' squares decide."""
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    best: dict[tuple[int, int], tuple[float, float, int]] = {(0, 0): (0.0, 0.0, 0)}
    for part in range(1, parts + 1):
        for end in range(part, len(costs) + 1):
            found = []
            for begin in range(part - 1, end):
                if (part - 1, begin) in best:
                    largest, squares, _ = best[part - 1, begin]
                    here = total[end] - total[begin]
                    found.append((max(largest, here), squares + here * here, begin))
            if found:
                best[part, end] = min(found)
    edges = [len(costs)]
    for part in range(parts, 0, -1):
        edges.append(best[part, edges[-1]][2])
    return edges[::-1]


@dataclass(frozen=True)
class Partition:
    """The plan of one model on a mesh; ``apply`` makes a model of the same configuration into this rank's part."""

    mesh: Mesh
    layout: Layout
    stage_phases: tuple[tuple[str, ...], ...]
    """Names of each stage's phases, for all stages."""
    placements: dict[str, Placement]
    """Of every tensor of this rank's part, by global name."""
    all_replicas: frozenset[Ranks]
    """Every set of ranks that holds some tensor together: alike on all ranks."""
    owner: dict[str, tuple[Ranks, ...]]
    """For every tensor of the whole model, the replica sets that hold its rows, in order of rows."""
    width: int
    dtype: torch.dtype
    """Of what one stage hands to the next."""

    @classmethod
    def plan(cls, model: Transformer, phases: Sequence[Phase], mesh: Mesh, layout: Layout, seq_len: int) -> Partition:
        """From the whole model (on any device); ``phases`` are those that the stage runs.

        Errors: ValueError where experts or layers do not divide.
        """
        cfg = model.cfg
        if cfg.n_routed_experts % mesh.ep:
            raise ValueError(
                f"model.n_routed_experts={cfg.n_routed_experts} is not a multiple of strategy.ep={mesh.ep}, the ranks that "
                "share the experts."
            )
        stages = cut(phases, cfg, seq_len, layout.num_stages)
        users: dict[str, set[int]] = {}
        prefix = {module: name for name, module in model.named_modules()}
        everything = [*model.phases(), Phase(HEAD, _never, (model.lm_head,))]
        stage_of = {phase.name: s for s, phases_of in enumerate(stages) for phase in phases_of}
        for phase in everything:  # what the stage leaves out (MTP in GRPO) stays with the last stage's rank
            stage = stage_of.get(phase.name, layout.num_stages - 1)
            for module in phase.modules:
                for name, _ in _tensors(module, prefix[module]):
                    users.setdefault(name, set()).update(layout.owners[stage])
        split = {f"{name}.{part}" for module, name in prefix.items() if isinstance(module, Experts) for part in EXPERT}
        placements, owner = {}, {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            places, shape = users[name], tuple(tensor.shape)
            rows = shape[0] if shape else 1
            if name in split:
                owner[name] = tuple(mesh.experts(places, e) for e in range(mesh.ep))
                rows //= mesh.ep
                start = mesh.ep_rank * rows
            else:
                owner[name], start = (mesh.dense(places),), 0
            if mesh.pp_rank in places:
                replicas = owner[name][mesh.ep_rank if name in split else 0]
                placements[name] = Placement(name, shape, start, rows, replicas)
        names = tuple(tuple(phase.name for phase in stage) for stage in stages)
        sets = frozenset(replicas for of_one in owner.values() for replicas in of_one)
        weight = model.embed_tokens.weight
        dtype = weight.dtype if weight.dtype == torch.float64 else model.precision.compute_dtype
        return cls(mesh, layout, names, placements, sets, owner, cfg.hidden_size, dtype)

    def apply(self, model: Transformer, dispatchers: Callable[[], tuple[Dispatcher, Dispatcher | None]] | None) -> None:
        """Keep this rank's tensors only. ``dispatchers`` gives each mixture its own, and another for generation or None;
        None leaves the local one."""
        for prefix, module in model.named_modules():
            if isinstance(module, Experts) and self.mesh.ep > 1:
                for part in EXPERT:
                    _keep_rows(module, part, self.placements.get(f"{prefix}.{part}"))
            if isinstance(module, Block) and isinstance(module.mlp, MoE) and dispatchers is not None:
                module.dispatcher, module.cached_dispatcher = dispatchers()
            for kind in (module._parameters, module._buffers):
                for name in kind:
                    if (f"{prefix}.{name}" if prefix else name) not in self.placements:
                        kind[name] = None

    def stages(self, phases: Sequence[Phase]) -> dict[int, list[Phase]]:
        """This rank's stages out of the model's phases."""
        by_name = {phase.name: phase for phase in phases}
        own = self.layout.stages(self.mesh.pp_rank)
        return {stage: [by_name[n] for n in self.stage_phases[stage] if n in by_name] for stage in own}


EXPERT = ("gate_up_proj", "down_proj")


def _never(state: Any, micro: Any) -> Any:
    raise AssertionError("the head is no phase")


def _tensors(module: nn.Module, prefix: str) -> Iterable[tuple[str, Tensor]]:
    for name, tensor in module.state_dict(keep_vars=True).items():
        yield f"{prefix}.{name}", tensor


def _keep_rows(module: nn.Module, name: str, placement: Placement | None) -> None:
    whole = getattr(module, name)
    if placement is not None and whole is not None:
        part = whole.detach()[placement.start : placement.start + placement.rows].clone()
        setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))
