"""Runs the phases of a model forward and backward, one autograd segment a phase (report §3.2).

A segment sees detached inputs, so that its backward can run on its own: later than the next block's forward, twice the
forward when it recomputes, or on the rank that owns it. Which segment runs when is a list of actions; one process with
one chunk is the shortest such list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from litseek.data.batch import MicroBatch

State = dict[str, Any]
HeadLoss = Callable[[State, MicroBatch], tuple[Tensor, dict[str, Tensor]]]


class Phase(Protocol):
    """What the executor needs of a phase: a name and `state, micro -> state`."""

    @property
    def name(self) -> str: ...

    def __call__(self, state: State, micro: MicroBatch) -> State: ...


class Action(NamedTuple):
    """F runs a chunk forward for a micro-batch, B runs it backward."""

    kind: Literal["F", "B"]
    chunk: int
    micro: int


@dataclass
class StepResult:
    """What one pass over the micro-batches gave; the last three are filled in by the strategy."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    loads: dict[str, Tensor] = field(default_factory=dict)
    """Phase name -> (E,) int64 tokens that each expert received."""
    tokens: int = 0
    """Of the global batch."""
    finite: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.bool))
    """Scalar where the gradients are; on a GPU whoever asks the host for its value stops the queue."""
    grad_norm: Tensor | None = None


def one_after_another(chunks: int, micros: int) -> list[Action]:
    """Each micro-batch forward through all chunks and back: one micro-batch's activations at a time."""
    actions = []
    for m in range(micros):
        actions += [Action("F", c, m) for c in range(chunks)]
        actions += [Action("B", c, m) for c in reversed(range(chunks))]
    return actions


class Executor:
    """Forward and backward of a flat list of phases, cut into chunks.

    ``recompute`` says by phase name which phases keep only their inputs and run again in backward.
    Gradients accumulate in ``param.grad``; the caller clears them.
    """

    def __init__(
        self, phases: Sequence[Phase], chunks: int = 1, recompute: Callable[[str], bool] | None = None
    ) -> None:
        if not 1 <= chunks <= len(phases):
            raise ValueError(f"strategy.chunks={chunks} must lie between 1 and the model's {len(phases)} phases.")
        edges = [round(i * len(phases) / chunks) for i in range(chunks + 1)]
        self.chunks = [list(phases[a:b]) for a, b in pairwise(edges)]
        self.recompute = recompute or (lambda name: False)

    def forward_backward(
        self,
        micros: Sequence[MicroBatch],
        head_loss: HeadLoss,
        *,
        total_targets: float | None = None,
        actions: Iterable[Action] | None = None,
    ) -> StepResult:
        """Loss of the batch and its gradients.

        ``head_loss(state, micro)`` gives the micro-batch's mean loss; it counts with ``micro.targets / total_targets``
        (default: the sum over ``micros``). Auxiliary losses count with one over the number of micro-batches.
        """
        if not micros:
            raise ValueError("A step needs at least one micro-batch.")
        if total_targets is None:
            total_targets = sum(micro.targets for micro in micros)
        weights = [micro.targets / total_targets if total_targets > 0 else 0.0 for micro in micros]
        run = _Run(self, micros, head_loss, weights)
        for action in actions if actions is not None else one_after_another(len(self.chunks), len(micros)):
            if action.kind == "F":
                run.forward(action.chunk, action.micro)
            else:
                run.backward(action.chunk, action.micro)
        assert not run.stash, f"actions left forwards without a backward: {sorted(run.stash)}"
        return run.result()

    @torch.no_grad()
    def forward(
        self, micros: Sequence[MicroBatch], head: Callable[[State, MicroBatch], Any], until: str | None = None
    ) -> list[Any]:
        """`head(state, micro)` of each micro-batch, without gradients: validation and scoring.

        ``until`` names the last phase to run; "norm" leaves the MTP depths out.
        """
        phases = [phase for chunk in self.chunks for phase in chunk]
        if until is not None:
            phases = phases[: [phase.name for phase in phases].index(until) + 1]
        answers = []
        for micro in micros:
            state: State = {}
            for phase in phases:
                state = phase(state, micro)
                state.pop("aux", None)
                state.pop("load", None)
            answers.append(head(state, micro))
        return answers


class _Run:
    """The stash and the sums of one `forward_backward`."""

    def __init__(
        self, executor: Executor, micros: Sequence[MicroBatch], head_loss: HeadLoss, weights: list[float]
    ) -> None:
        self.executor, self.micros, self.head_loss, self.weights = executor, micros, head_loss, weights
        self.stash: dict[tuple[int, int], list[_Segment]] = {}
        self.states: dict[tuple[int, int], State] = {}
        self.grads: dict[tuple[int, int], dict[str, Tensor]] = {}
        self.loss: Tensor | None = None
        self.aux: Tensor | None = None
        self.metrics: dict[str, Tensor] = {}
        self.loads: dict[str, Tensor] = {}

    def forward(self, chunk: int, m: int) -> None:
        micro = self.micros[m]
        state = self.states.pop((chunk, m)) if chunk else {}
        segments = []
        for phase in self.executor.chunks[chunk]:
            segment = _Segment(phase, micro, 1 / len(self.micros), self.executor.recompute(phase.name))
            state = segment.forward(state)
            self._count(phase.name, segment)
            segments.append(segment)
        if chunk == len(self.executor.chunks) - 1:
            head = _Segment(self._head(m), micro, self.weights[m], recompute=False)
            head.forward(state)
            assert head.aux is not None
            self.loss = _plus(self.loss, head.aux * self.weights[m])
            segments.append(head)
        else:
            self.states[chunk + 1, m] = state
        self.stash[chunk, m] = segments

    def backward(self, chunk: int, m: int) -> None:
        grads = self.grads.pop((chunk, m), {})
        segments = self.stash.pop((chunk, m))
        while segments:
            grads = segments.pop().backward(grads)
        if chunk:
            self.grads[chunk - 1, m] = grads

    def result(self) -> StepResult:
        assert self.loss is not None
        metrics = dict(self.metrics)
        if self.aux is not None:
            metrics["loss/balance"] = self.aux
        return StepResult(_plus(self.aux, self.loss), metrics, self.loads)

    def _head(self, m: int) -> Phase:
        def head(state: State, micro: MicroBatch) -> State:
            loss, metrics = self.head_loss(state, micro)
            for name, value in metrics.items():
                self.metrics[name] = _plus(self.metrics.get(name), torch.as_tensor(value).detach() * self.weights[m])
            return {"aux": loss}

        head.name = "head"  # type: ignore[attr-defined]
        return head  # type: ignore[return-value]

    def _count(self, name: str, segment: _Segment) -> None:
        if segment.aux is not None:
            self.aux = _plus(self.aux, segment.aux / len(self.micros))
        if segment.load is not None:
            self.loads[name] = _plus(self.loads.get(name), segment.load)


class _Segment:
    """One phase on one micro-batch: the edges of its autograd graph, its inputs only if it recomputes, its backward.

    Inputs enter through `_Entry` and outputs are kept as edges, so that a tensor between two phases lives exactly as
    long as an operation needs it for backward.
    """

    def __init__(self, phase: Phase, micro: MicroBatch, aux_weight: float, recompute: bool) -> None:
        self.phase, self.micro, self.aux_weight, self.recompute = phase, micro, aux_weight, recompute
        self.aux: Tensor | None = None
        self.load: Tensor | None = None
        self.grads: dict[str, Tensor] = {}
        self.roots: dict[str, GradientEdge] = {}

    def forward(self, state: State) -> State:
        if self.recompute:
            self.inputs, self.random = state, _random_state()
        with torch.set_grad_enabled(not self.recompute):
            outputs = self._run(state)
        self.load = outputs.pop("load", None)
        self.aux = outputs["aux"].detach() if "aux" in outputs else None
        if not self.recompute:
            self.roots = _edges(outputs)
        return {k: v.detach() if isinstance(v, Tensor) else v for k, v in outputs.items() if k != "aux"}

    def backward(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of the inputs from those of the outputs; parameters accumulate on the way."""
        roots = self._again() if self.recompute else self.roots
        seeds = dict(grads)
        if "aux" in roots:
            assert self.aux is not None
            seeds["aux"] = torch.full_like(self.aux, self.aux_weight)
        reached = [key for key in roots if seeds.get(key) is not None]
        if reached:
            torch.autograd.backward([roots[key] for key in reached], [seeds[key] for key in reached])
        found, self.grads, self.roots, self.inputs = self.grads, {}, {}, {}
        return found

    def _run(self, state: State) -> State:
        if torch.is_grad_enabled():
            floating = [key for key, value in state.items() if isinstance(value, Tensor) and value.is_floating_point()]
            token = torch.zeros((), requires_grad=True)
            entered = _Entry.apply(self.grads, floating, token, *(state[key] for key in floating))
            state = {**state, **dict(zip(floating, entered or ()))}
        return dict(self.phase(dict(state), self.micro))

    def _again(self) -> dict[str, GradientEdge]:
        with _random_restored(self.random), torch.enable_grad():
            outputs = self._run(self.inputs)
        outputs.pop("load", None)  # counted on the first forward
        return _edges(outputs)


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


def _edges(outputs: State) -> dict[str, GradientEdge]:
    tensors = {key: value for key, value in outputs.items() if isinstance(value, Tensor) and value.requires_grad}
    return {key: get_gradient_edge(value) for key, value in tensors.items()}


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total + value


def _random_state() -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


@contextmanager
def _random_restored(state: tuple[Tensor, Tensor | None]):
    """The generators as they were at the first forward, and afterwards as if nothing had been drawn again."""
    cpu, cuda = state
    now = _random_state()
    try:
        _set_random(cpu, cuda)
        yield
    finally:
        _set_random(*now)


def _set_random(cpu: Tensor, cuda: Tensor | None) -> None:
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
