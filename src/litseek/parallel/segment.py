"""Phases on one micro-batch as an autograd graph of their own (report §3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from litseek.data.batch import MicroBatch

State = dict[str, Any]


class Phase(Protocol):
    """What the executor needs of a phase: a name and `state, micro -> state`."""

    @property
    def name(self) -> str: ...

    def __call__(self, state: State, micro: MicroBatch) -> State: ...


class Segment:
    """One phase or several on one micro-batch: the edges of the autograd graph, the inputs only if it recomputes, the
    backward.

    Inputs enter through `_Entry` and outputs are kept as edges, so that a tensor between two phases lives exactly as
    long as an operation needs it for backward.
    """

    def __init__(self, phases: Sequence[Phase], micro: MicroBatch, aux_weight: float, recompute: bool) -> None:
        self.phases, self.micro, self.aux_weight, self.recompute = phases, micro, aux_weight, recompute
        self.auxes: list[Tensor] = []
        self.loads: dict[str, Tensor] = {}
        """By name of the phase that counted."""
        self.grads: dict[str, Tensor] = {}
        self.roots: dict[str | int, GradientEdge] = {}
        """Of the outputs by name, of the auxiliary losses by number."""

    def forward(self, state: State) -> State:
        if self.recompute:
            self.inputs, self.random = state, random_state()
        with torch.set_grad_enabled(not self.recompute):
            outputs, auxes, self.loads = self._run(state)
        self.auxes = [aux.detach() for aux in auxes]
        if not self.recompute:
            self.roots = _edges(outputs, auxes)
        return {k: v.detach() if isinstance(v, Tensor) else v for k, v in outputs.items()}

    def backward(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the inputs from those of the outputs; parameters accumulate on the way."""
        roots = self._again() if self.recompute else self.roots
        seeds: dict[str | int, Tensor] = dict(grads.items())
        if self.auxes:
            weight = torch.full_like(self.auxes[0], self.aux_weight)
            seeds |= dict.fromkeys(range(len(self.auxes)), weight)
        reached = [key for key in roots if seeds.get(key) is not None]
        if reached:
            torch.autograd.backward([roots[key] for key in reached], [seeds[key] for key in reached])
        found, self.grads, self.roots, self.inputs = self.grads, {}, {}, {}
        return found

    def _run(self, state: State) -> tuple[State, list[Tensor], dict[str, Tensor]]:
        if torch.is_grad_enabled():
            floating = [key for key, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()]
            token = torch.zeros((), requires_grad=True)
            entered = _Entry.apply(self.grads, floating, token, *(state[key] for key in floating))
            state = {**state, **dict(zip(floating, entered or ()))}
        state, auxes, loads, done = dict(state), [], {}, 0
        while done < len(self.phases):
            run, taken = _next(self.phases[done:])
            state = dict(run(state, self.micro))
            if "aux" in state:
                auxes.append(state.pop("aux"))
            if "load" in state:
                loads[self.phases[done].name] = state.pop("load")
            done += taken
        return state, auxes, loads

    def _again(self) -> dict[str | int, GradientEdge]:
        with _random_restored(self.random), torch.enable_grad():
            outputs, auxes, _ = self._run(self.inputs)  # loads were counted on the first forward
        return _edges(outputs, auxes)


def _next(phases: Sequence[Phase]) -> tuple[Callable[[State, MicroBatch], State], int]:
    """What runs next, and of how many phases it is the work: several where the first one knows how to run them at once."""
    whole = getattr(phases[0], "whole", None)
    if whole is not None and len(phases) >= whole.phases:
        return whole.run, whole.phases
    return phases[0], 1


class _Entry(torch.autograd.Function):
    """Where a segment's graph begins: hands its inputs in, and leaves their gradients in a dictionary.

    Unlike leaves it keeps no input alive. ``token`` requires a gradient, so that the outputs do.
    """

    @staticmethod
    def forward(ctx: Any, grads: dict[str, Tensor], keys: list[str], token: Tensor, *values: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        ctx.grads, ctx.keys = grads, keys
        return tuple(value.view_as(value) for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.grads.update((key, grad) for key, grad in zip(ctx.keys, grads) if grad is not None)
        return (None,) * (len(grads) + 3)


def _edges(outputs: State, auxes: Sequence[Tensor]) -> dict[str | int, GradientEdge]:
    tensors: list[tuple[str | int, Any]] = [*outputs.items(), *enumerate(auxes)]
    return {k: get_gradient_edge(v) for k, v in tensors if isinstance(v, Tensor) and v.requires_grad}


def random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


@contextmanager
def _random_restored(state: tuple[Tensor, Tensor | None]):
    """The generators as they were at the first forward, and afterwards as if nothing had been drawn again."""
    cpu, cuda = state
    now = random_state()
    try:
        set_random(cpu, cuda)
        yield
    finally:
        set_random(*now)


def set_random(cpu: Tensor, cuda: Tensor | None) -> None:
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
