"""Runs the phases of a model forward and backward, one autograd segment a phase (report §3.2).

A segment sees detached inputs, so that its backward can run on its own: later than the next block's forward, twice the
forward when it recomputes, or on the rank that owns it. Which segment runs when is a list of instructions (see
`litseek.parallel.schedule`); one process with one stage is the shortest such list.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from litseek import deferral
from litseek.data.batch import MicroBatch
from litseek.parallel.lanes import ARRIVALS, OneLane
from litseek.parallel.schedule import (
    Action,
    Compute,
    Instruction,
    Op,
    Part,
    Recv,
    Send,
    Transfer,
    make_forward,
    make_schedule,
    program,
)
from litseek.parallel.segment import Phase, Segment, State

HeadLoss = Callable[[State, MicroBatch], tuple[Tensor, dict[str, Tensor]]]
BETWEEN = "x"
"""What one stage hands to the next: the residual stream (B, S, D). The model is cut nowhere else."""
Place = tuple[int, int]
"""Stage and micro-batch."""
Steps = Generator[bool, None, None]
"""A part of an action, phase by phase: before each it says whether that phase talks to other ranks."""
EXCHANGE = ("dispatch", "combine")
"""Last parts of the names of phases that talk to other ranks."""


class Transport(Protocol):
    """Moves tensors between this rank's stages and others'."""

    def send(self, transfer: Transfer, value: Tensor) -> None: ...

    def expect(self, transfer: Transfer, micro: MicroBatch) -> None:
        """Post the receive."""

    def arrived(self, transfer: Transfer) -> Tensor:
        """What was expected, once it is there (on a GPU: in the order of its work)."""

    def finish(self) -> None:
        """Nothing that was sent is still needed here."""


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


def one_after_another(stages: int, micros: int) -> list[Instruction]:
    """Each micro-batch forward through all stages and back: one micro-batch's activations at a time."""
    steps: list[Part] = []
    for m in range(micros):
        steps += [Part("F", s, m) for s in range(stages)]
        steps += [Part("B", s, m) for s in reversed(range(stages))]
    return [Compute(Action((part,))) for part in steps]


def two_by_two(micros: int) -> list[Instruction]:
    """One stage; two micro-batches side by side, forward and then backward, so that no exchange has to stand alone."""
    pairs = [range(m, min(m + 2, micros)) for m in range(0, micros, 2)]
    ops: tuple[Op, ...] = ("F", "B")
    return [Compute(Action(tuple(Part(op, 0, m) for m in pair))) for pair in pairs for op in ops]


class Pipeline:
    """One rank's place in a pipeline: which instructions it runs for so many micro-batches."""

    def __init__(self, kind: str, ranks: int, rank: int, transport: Transport) -> None:
        self.kind, self.ranks, self.rank, self.transport = kind, ranks, rank, transport
        self.steps = lru_cache(self._steps)
        self.forward_steps = lru_cache(self._forward_steps)

    def _steps(self, micros: int) -> tuple[Instruction, ...]:
        return program(make_schedule(self.kind, self.ranks, micros))[self.rank]

    def _forward_steps(self, micros: int) -> tuple[Instruction, ...]:
        return program(make_forward(self.kind, self.ranks, micros))[self.rank]


class Executor:
    """Forward and backward of a flat list of phases, all in one process, cut into ``chunks`` stages.

    ``recompute`` says by phase name which phases keep only their inputs and run again in backward. ``beside`` lets two
    micro-batches run side by side, phase by phase. Gradients accumulate in ``param.grad``; the caller clears them.
    """

    pipeline: Pipeline | None = None
    lanes: OneLane = OneLane()
    """Where two parts that run side by side do."""
    score: Callable[[Callable[[], list[Any]], Sequence[MicroBatch]], list[Any]]
    """Runs a forward pass, as often as it takes (`litseek.parallel.dispatchers`)."""

    def __init__(
        self,
        phases: Sequence[Phase],
        chunks: int = 1,
        recompute: Callable[[str], bool] | None = None,
        beside: bool = False,
    ) -> None:
        if not 1 <= chunks <= len(phases):
            raise ValueError(f"strategy.chunks={chunks} must lie between 1 and the model's {len(phases)} phases.")
        edges = [round(i * len(phases) / chunks) for i in range(chunks + 1)]
        self.stages = {i: list(phases[a:b]) for i, (a, b) in enumerate(pairwise(edges))}
        self.num_stages, self.by_phase = chunks, beside
        self.recompute = recompute or (lambda name: False)
        self.score = lambda attempt, micros: attempt()

    @classmethod
    def staged(
        cls,
        stages: Mapping[int, Sequence[Phase]],
        num_stages: int,
        recompute: Callable[[str], bool] | None,
        pipeline: Pipeline,
        beside: bool = False,
    ) -> Executor:
        """The stages of one rank of a pipeline: number -> phases; the last of ``num_stages`` has the head."""
        made = cls([phase for stage in stages.values() for phase in stage], 1, recompute, beside)
        made.stages = {number: list(phases) for number, phases in stages.items()}
        made.num_stages, made.pipeline = num_stages, pipeline
        return made

    def forward_backward(
        self,
        micros: Sequence[MicroBatch],
        head_loss: HeadLoss,
        *,
        total_targets: float | None = None,
        instructions: Sequence[Instruction] | None = None,
    ) -> StepResult:
        """Loss of the batch and its gradients: this rank's share of both, where stages lie elsewhere.

        ``head_loss(state, micro)`` gives the micro-batch's mean loss; it counts with ``micro.targets / total_targets``
        (default: the sum over ``micros``). Auxiliary losses count with one over the number of micro-batches. Micro-batches
        that are ``blank`` run along and count nowhere.
        """
        if not micros:
            raise ValueError("A step needs at least one micro-batch.")
        if total_targets is None:
            total_targets = sum(micro.targets for micro in micros)
        if instructions is None:
            instructions = self._instructions(len(micros))
        run = _Run(self, micros, head_loss, total_targets)
        splits = any(isinstance(i, Compute) and i.action.parts[0].op == "W" for i in instructions)
        with deferral.splitting(splits), self.lanes.open():
            for instruction in instructions:
                run.follow(instruction)
        assert not run.stash and not run.put_off, f"left without a backward: {[*run.stash, *run.put_off]}"
        if self.pipeline is not None:
            self.pipeline.transport.finish()
        return run.result()

    def _instructions(self, micros: int) -> Sequence[Instruction]:
        if self.pipeline is not None:
            return self.pipeline.steps(micros)
        if self.by_phase and self.num_stages == 1:
            return two_by_two(micros)
        return one_after_another(self.num_stages, micros)

    def segments(self, stage: int) -> list[list[Phase]]:
        """The stage's phases, those together that are one autograd graph: each alone where others may run in between,
        or where it recomputes, so that no more than one phase's activations come back at a time."""
        found: list[list[Phase]] = []
        for phase in self.stages[stage]:
            alone = self.by_phase or self.recompute(phase.name)
            if found and not alone and not self.recompute(found[-1][0].name):
                found[-1].append(phase)
            else:
                found.append([phase])
        return found

    def forward(
        self, micros: Sequence[MicroBatch], head: Callable[[State, MicroBatch], Any], until: str | None = None
    ) -> list[Any]:
        """`head(state, micro)` of each micro-batch, without gradients: validation and scoring. None for a micro-batch
        whose last stage lies elsewhere, and for a blank one.

        ``until`` names the last phase to run; "norm" leaves the MTP depths out. ``head`` may be called again for the same
        micro-batch, with another state: what it gave before is dropped.
        """
        return self.score(lambda: self._forward(micros, head, until), micros)

    @torch.no_grad()
    def _forward(
        self, micros: Sequence[MicroBatch], head: Callable[[State, MicroBatch], Any], until: str | None
    ) -> list[Any]:
        answers: list[Any] = [None] * len(micros)
        states: dict[tuple[int, int], State] = {}
        ends = [number for number, phases in self.stages.items() if any(phase.name == until for phase in phases)]
        last = ends[0] if ends else self.num_stages - 1
        steps: Sequence[Instruction] = one_after_another(last + 1, len(micros))
        if self.pipeline is not None:
            steps = self.pipeline.forward_steps(len(micros))
        for step in steps:
            if not isinstance(step, Compute):
                self._forward_transfer(step, states, micros)
                continue
            op, stage, m = step.action.parts[0]
            if op != "F":
                continue
            state = self.received(states.pop((stage, m))) if stage else {}
            for phase in self.stages[stage]:
                state = phase(state, micros[m])
                state.pop("aux", None)
                state.pop("load", None)
                if phase.name == until:
                    break
            if stage == last:
                answers[m] = None if micros[m].blank else head(state, micros[m])
            else:
                states[stage + 1, m] = state
        if self.pipeline is not None:
            self.pipeline.transport.finish()
        return answers

    def _forward_transfer(self, step: Send | Recv, states: dict[Any, State], micros: Sequence[MicroBatch]) -> None:
        assert self.pipeline is not None
        transfer = step.transfer
        if isinstance(step, Send):
            self.pipeline.transport.send(transfer, states.pop((transfer.stage + 1, transfer.micro))[BETWEEN])
        else:
            self.pipeline.transport.expect(transfer, micros[transfer.micro])
            states[transfer.stage + 1, transfer.micro] = {"expected": transfer}

    def received(self, state: State) -> State:
        """The state itself, or what another rank sent in its place."""
        if "expected" in state:
            assert self.pipeline is not None
            return {BETWEEN: self.pipeline.transport.arrived(state["expected"])}
        return state


class _Run:
    """The stash and the sums of one `forward_backward`."""

    def __init__(
        self, executor: Executor, micros: Sequence[MicroBatch], head_loss: HeadLoss, total_targets: float
    ) -> None:
        self.executor, self.micros, self.head_loss = executor, micros, head_loss
        self.weights = [micro.targets / total_targets if total_targets > 0 else 0.0 for micro in micros]
        counted = sum(not micro.blank for micro in micros)
        self.aux_weights = [0.0 if micro.blank else 1 / counted for micro in micros]
        self.stash: dict[Place, list[Segment]] = {}
        self.put_off: dict[Place, list[deferral.Work]] = {}
        self.lane: dict[Place, int] = {}
        self.states: dict[Place, tuple[State, int]] = {}
        """For a stage and a micro-batch its input, and the lane that it comes from."""
        self.grads: dict[Place, tuple[State, int]] = {}
        # summed at the end: until then each stays where the lane that made it may still write
        self.losses: list[Tensor] = []
        self.auxes: list[Tensor] = []
        self.metrics: dict[str, list[Tensor]] = {}
        self.loads: dict[str, list[Tensor]] = {}

    def follow(self, instruction: Instruction) -> None:
        if isinstance(instruction, Compute):
            self._compute(instruction.action.parts)
            return
        assert self.executor.pipeline is not None
        transport, transfer, lanes = self.executor.pipeline.transport, instruction.transfer, self.executor.lanes
        forward = transfer.kind == "F"
        place = (transfer.stage + (1 if forward else -1), transfer.micro)
        kept = self.states if forward else self.grads
        if isinstance(instruction, Recv):
            with lanes.on(ARRIVALS):
                transport.expect(transfer, self.micros[transfer.micro])
            kept[place] = {"expected": transfer}, ARRIVALS
        else:
            state, lane = kept.pop(place)
            with lanes.on(lane):
                transport.send(transfer, state[BETWEEN])

    def _compute(self, parts: Sequence[Part]) -> None:
        """One part, or two phase by phase, on two lanes."""
        taken = [self.lane[part.stage, part.micro] for part in parts if part.op != "F"]
        for part in parts:
            if part.op == "F":
                lane = 0 if not taken else 1 - taken[-1]
                self.lane[part.stage, part.micro] = lane
                taken.append(lane)
        steps = [self._on(self.lane[part.stage, part.micro], self._part(part)) for part in parts]
        if len(steps) == 2:
            interleave(*steps)
        else:
            for _ in steps[0]:
                pass

    def _on(self, lane: int, steps: Steps) -> Steps:
        done = False
        while not done:
            with self.executor.lanes.on(lane):
                coming = next(steps, None)
            done = coming is None
            if coming is not None:
                yield coming

    def _taken(self, kept: dict[Place, tuple[State, int]], place: Place) -> State:
        """What another stage left for this one."""
        state, origin = kept.pop(place)
        state = self.executor.received(state)
        self.executor.lanes.hand_over(state, origin, self.lane[place])
        return state

    def _part(self, part: Part) -> Steps:
        if part.op == "F":
            return self._forward(part.stage, part.micro)
        if part.op == "W":
            return self._weights(part.stage, part.micro)
        return self._backward(part.stage, part.micro, part.op == "I")

    def _forward(self, stage: int, m: int) -> Steps:
        """Phase by phase; before each it yields whether that phase talks to other ranks.

        A phase that announces talks twice: what is announced goes out at once, and the phase itself runs with the next
        one, when the host does not have to wait for the answer any more.
        """
        micro = self.micros[m]
        state = self._taken(self.states, (stage, m)) if stage else {}
        segments = self.stash[stage, m] = []
        announced = False
        for phases in self.executor.segments(stage):
            phase = phases[0]
            if not announced:
                yield talks(phase.name)
            announced = False
            if self.executor.by_phase and (announce := getattr(phase, "announce", None)) is not None:
                state = announce(state)
                yield False
                announced = True
            segment = Segment(phases, micro, self.aux_weights[m], self.executor.recompute(phase.name))
            state = segment.forward(state)
            self._count(m, segment)
            segments.append(segment)
        if stage == self.executor.num_stages - 1:
            head = Segment((self._head(m),), micro, self.weights[m], recompute=False)
            head.forward(state)
            self.losses.append(head.auxes[0] * self.weights[m])
            segments.append(head)
        else:
            self.states[stage + 1, m] = state, self.lane[stage, m]

    def _backward(self, stage: int, m: int, inputs_only: bool) -> Steps:
        grads: State = {}
        if stage < self.executor.num_stages - 1:
            grads = self._taken(self.grads, (stage, m))
        segments = self.stash.pop((stage, m))
        later = self.put_off.setdefault((stage, m), []) if inputs_only else None
        while segments:
            segment = segments.pop()
            yield talks(segment.phases[0].name)
            if later is None:
                grads = segment.backward(grads)
            else:
                with deferral.deferring(later):
                    grads = segment.backward(grads)
        if stage:
            self.grads[stage - 1, m] = grads, self.lane[stage, m]

    def _weights(self, stage: int, m: int) -> Steps:
        yield False
        deferral.run(self.put_off.pop((stage, m)), self.executor.lanes.add)

    def result(self) -> StepResult:
        metrics = {name: _sum(values) for name, values in self.metrics.items()}
        totals = []
        if self.auxes:
            metrics["loss/balance"] = _sum(self.auxes)
            totals.append(metrics["loss/balance"])
        if self.losses:
            totals.append(_sum(self.losses))
        total = _sum(totals) if totals else torch.zeros((), device=self.micros[0].tokens.device)
        return StepResult(total, metrics, {name: _sum(values) for name, values in self.loads.items()})

    def _head(self, m: int) -> Phase:
        def head(state: State, micro: MicroBatch) -> State:
            if micro.blank:  # whatever the stage's loss makes of no targets: a zero that every gradient comes from
                return {"aux": sum(v.sum() for v in state.values() if isinstance(v, Tensor) and v.requires_grad) * 0.0}
            loss, metrics = self.head_loss(state, micro)
            for name, value in metrics.items():
                self.metrics.setdefault(name, []).append(torch.as_tensor(value).detach() * self.weights[m])
            return {"aux": loss}

        head.name = "head"  # type: ignore[attr-defined]
        return head  # type: ignore[return-value]

    def _count(self, m: int, segment: Segment) -> None:
        self.auxes += [aux * self.aux_weights[m] for aux in segment.auxes]
        if not self.micros[m].blank:
            for name, load in segment.loads.items():
                self.loads.setdefault(name, []).append(load)


def talks(name: str) -> bool:
    return name.rpartition(".")[2] in EXCHANGE


def interleave(one: Steps, other: Steps) -> None:
    """Two parts phase by phase: each side's exchanges are started just before a computation of the other side.

    So backward's combine runs under forward's attend, forward's dispatch under backward's experts, and so on (report
    figure 4).
    """
    sides = [other, one]
    coming = [next(side, None) for side in sides]  # True: an exchange, False: a computation, None: nothing more
    here, there = 0, 1
    while coming != [None, None]:
        while coming[here]:
            coming[here] = next(sides[here], None)
        if coming[there] is False or coming[here] is None:
            coming[there] = next(sides[there], None)
        here, there = there, here


def _sum(values: Sequence[Tensor]) -> Tensor:
    return sum(values[1:], values[0])
