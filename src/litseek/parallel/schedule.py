"""Pipeline schedules as data: what each rank computes, and when it sends and receives (report §3.2).

A schedule is a pure function of (kind, ranks, micro-batches) and knows no tensors. The executor runs it, the planner
times it (`timeline`), tests check it. Stages are numbered 0..N-1 along the model:

    1f1b, zb1p   N = ranks       rank r owns stage r
    dualpipev    N = 2 x ranks   rank r owns r and N-1-r, so rank 0 has the first and the last
    dualpipe     N = ranks       rank r owns r for the first half of the micro-batches, which enter at rank 0
                                 (direction 0), and N-1-r for the second half, which enter at the last rank (direction 1)
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

Kind = Literal["1f1b", "zb1p", "dualpipe", "dualpipev"]
Op = Literal["F", "B", "I", "W"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Part(NamedTuple):
    """One stage's work for one micro-batch: F forward, B backward, I and W its input and weight halves apart."""

    op: Op
    stage: int
    """Along the micro-batch's own direction."""
    micro: int


class Action(NamedTuple):
    """What a rank computes in one go: one part, or F of one micro-batch overlapped with B of another, in this order."""

    parts: tuple[Part, ...]

    @property
    def kind(self) -> str:
        """F, B, I, W or F&B."""
        return "&".join(part.op for part in self.parts)


class Transfer(NamedTuple):
    """F: the output of `stage` goes to the owner of stage + 1. B: the gradient of its input goes to the owner of stage - 1."""

    kind: Literal["F", "B"]
    stage: int
    micro: int
    source: int
    target: int


class Compute(NamedTuple):
    """Run the action, once the receives that it needs have arrived."""

    action: Action


class Send(NamedTuple):
    """Post this rank's side of the transfer; stands after the action that makes the tensor."""

    transfer: Transfer


class Recv(NamedTuple):
    """Post this rank's side of the transfer; stands before the action that needs the tensor."""

    transfer: Transfer


Instruction = Compute | Send | Recv


@dataclass(frozen=True)
class Schedule:
    """Every rank's actions in order."""

    kind: Kind
    ranks: int
    micros: int
    """In both directions together."""
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_stages(self) -> int:
        return 2 * self.ranks if self.kind == "dualpipev" else self.ranks

    def direction(self, micro: int) -> int:
        """1 for a micro-batch that enters at the last rank, which only `dualpipe` has."""
        return int(self.kind == "dualpipe" and micro >= (self.micros + 1) // 2)

    def owner(self, stage: int, micro: int) -> int:
        """The rank that computes this stage of this micro-batch."""
        if self.direction(micro):
            return self.ranks - 1 - stage
        return min(stage, self.num_stages - 1 - stage) if self.kind == "dualpipev" else stage


def make_schedule(kind: str, ranks: int, micros: int) -> Schedule:
    """The schedule of one training step.

    Raises ValueError for an unknown kind and for ranks or micro-batches that the kind does not take: dualpipe's ranks
    and micro-batches are even; dualpipe and dualpipev want 2 micro-batches a rank (DeepSeek's DualPipe has these rules).
    """
    known = _known(kind, ranks, micros)
    if known == "dualpipe" and (ranks % 2 or micros % 2):
        raise ValueError(
            f"schedule dualpipe takes even numbers of ranks and micro-batches: found {ranks} ranks and {micros} micro-batches."
        )
    if known in ("dualpipe", "dualpipev") and micros < 2 * ranks:
        raise ValueError(
            f"schedule {known} on {ranks} ranks takes at least {2 * ranks} micro-batches (2 a rank): found {micros}."
        )
    order = {"1f1b": _1f1b, "zb1p": _zb1p, "dualpipe": _dualpipe, "dualpipev": _dualpipev}[known]
    return Schedule(known, ranks, micros, tuple(tuple(order(r, ranks, micros)) for r in range(ranks)))


def fewest_micros(kind: str, ranks: int, micros: int) -> int:
    """The smallest number from ``micros`` on that `make_schedule` takes. Raises ValueError as it does, but for their number."""
    known = _known(kind, ranks, max(micros, 1))
    least = 2 * ranks if known in ("dualpipe", "dualpipev") else 1
    return max(micros + (known == "dualpipe" and micros % 2), least)


def make_forward(kind: str, ranks: int, micros: int) -> Schedule:
    """Only the forwards, on the ranks that own the stages under `kind`: validation, scoring. Takes any number of micro-batches.

    A micro-batch enters every second slot and moves on a stage a slot, so a rank's two stages never meet. Raises
    ValueError for an unknown kind and for dualpipe on an odd number of ranks.
    """
    known = _known(kind, ranks, micros)
    if known == "dualpipe" and ranks % 2:
        raise ValueError(f"schedule dualpipe takes an even number of ranks: found {ranks}.")
    empty = Schedule(known, ranks, micros, ())
    slots: list[list[tuple[int, Action]]] = [[] for _ in range(ranks)]
    for micro in range(micros):
        entered = micro - empty.direction(micro) * ((micros + 1) // 2)
        for stage in range(empty.num_stages):
            slots[empty.owner(stage, micro)].append((2 * entered + stage, _one("F", stage, micro)))
    return Schedule(known, ranks, micros, tuple(tuple(action for _, action in sorted(slot)) for slot in slots))


def program(schedule: Schedule) -> tuple[tuple[Instruction, ...], ...]:
    """Each rank's actions with the sends and receives between them.

    Every rank's list is a part of one order of all actions and transfers, by the simulated time at which an action ends
    and makes what is transferred. So two ranks post the transfers between them in the same order, as NCCL's one stream
    a pair demands, and nothing deadlocks even if every send and receive blocks. A receive stands before the action that
    runs while its tensor is made, no earlier: its buffer would lie empty. Within one rank there is no transfer.
    """
    clock = simulate(schedule)
    # (end, 0, 0) an action; (end, 1, …) a transfer of what it made: any action that needs it ends later
    timed: list[list[tuple[float, int, int, Instruction]]] = [[] for _ in schedule.actions]
    for rank, actions in enumerate(schedule.actions):
        for action, (_, end) in zip(actions, clock[rank], strict=True):
            timed[rank].append((end, 0, 0, Compute(action)))
            for part in action.parts:
                if (transfer := _transfer(schedule, part, rank)) is not None:
                    tie = (transfer.micro * schedule.num_stages + transfer.stage) * 2 + (transfer.kind == "B")
                    timed[rank].append((end, 1, tie, Send(transfer)))
                    timed[transfer.target].append((end, 1, tie, Recv(transfer)))
    return tuple(tuple(step[-1] for step in sorted(steps)) for steps in timed)


def simulate(schedule: Schedule, f: float = 1, b: float = 1, w: float = 1) -> list[list[tuple[float, float]]]:
    """(start, end) of every action when each starts as soon as its rank is free and its inputs exist; transfers take no time.

    `f`, `b`, `w` are the times of a forward and of a backward's input and weight halves of one stage: B takes b + w,
    F&B takes f + b + w. Raises ValueError if the actions wait for each other in a circle or for something that is missing.
    """
    cost = {"F": f, "I": b, "W": w, "B": b + w}
    done: dict[tuple[str, int, int], float] = {}
    clock: list[list[tuple[float, float]]] = [[] for _ in schedule.actions]
    waiting: dict[tuple[str, int, int], list[int]] = {}
    ready = deque(range(len(clock)))
    last = schedule.num_stages - 1
    while ready:
        rank = ready.popleft()
        times, actions = clock[rank], schedule.actions[rank]
        while len(times) < len(actions):
            parts = actions[len(times)].parts
            start = times[-1][1] if times else 0
            missing = None
            for part in parts:
                for need in needs(part, last):
                    if need not in done:
                        missing = missing or need
                    elif done[need] > start:
                        start = done[need]
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            end = start + sum([cost[part.op] for part in parts])
            times.append((start, end))
            for part in parts:
                made = ("B" if part.op == "I" else part.op, part.stage, part.micro)
                done[made] = end
                ready.extend(waiting.pop(made, ()))
    if waiting:
        (op, stage, micro), ranks = next(iter(waiting.items()))
        raise ValueError(
            f"the {schedule.kind} schedule stops: rank {ranks[0]} waits for {op} of stage {stage}, micro-batch {micro}."
        )
    return clock


def needs(part: Part, last: int) -> list[tuple[str, int, int]]:
    """(op, stage, micro) of what must be done before this part; `last` is the last stage. B stands for I as well."""
    op, stage, micro = part
    if op == "F":
        return [("F", stage - 1, micro)] if stage else []
    if op == "W":
        return [("B", stage, micro)]
    return [("F", stage, micro), *([("B", stage + 1, micro)] if stage < last else [])]


def _transfer(schedule: Schedule, part: Part, rank: int) -> Transfer | None:
    """What leaves this rank after this part."""
    if part.op == "W":
        return None
    kind: Literal["F", "B"] = "F" if part.op == "F" else "B"
    to = part.stage + 1 if kind == "F" else part.stage - 1
    if not 0 <= to < schedule.num_stages or (target := schedule.owner(to, part.micro)) == rank:
        return None
    return Transfer(kind, part.stage, part.micro, rank, target)


def _known(kind: str, ranks: int, micros: int) -> Kind:
    if kind not in KINDS:
        raise ValueError(f"schedule {kind} is not known: there are {', '.join(KINDS)}.")
    if ranks < 1 or micros < 1:
        raise ValueError(
            f"schedule {kind} takes at least 1 rank and 1 micro-batch: found {ranks} ranks and {micros} micro-batches."
        )
    return cast(Kind, kind)


def _one(op: Op, stage: int, micro: int) -> Action:
    return Action((Part(op, stage, micro),))


def _1f1b(rank: int, ranks: int, micros: int) -> Iterator[Action]:
    """Forwards until the first gradient can arrive, then one forward, one backward."""
    ahead = min(micros, ranks - 1 - rank)
    for m in range(micros + ahead):
        if m < micros:
            yield _one("F", rank, m)
        if m >= ahead:
            yield _one("B", rank, m - ahead)


def _zb1p(rank: int, ranks: int, micros: int) -> Iterator[Action]:
    """1F1B whose weight halves wait, `rank` of them at most, so that all ranks hold as much as the first (ZB-H1 of Zero Bubble)."""
    for action in _1f1b(rank, ranks, micros):
        op, stage, m = action.parts[0]
        if op == "F" or rank == 0:  # nobody waits for the first stage's input gradient
            yield action
            continue
        yield _one("I", stage, m)
        if m >= rank:
            yield _one("W", stage, m - rank)
    for m in range(max(micros - rank, 0), micros if rank else 0):
        yield _one("W", rank, m)


def _dualpipev(rank: int, ranks: int, micros: int) -> Iterator[Action]:
    stages = (rank, 2 * ranks - 1 - rank)
    return _two_lanes(_steps(rank, ranks, micros), stages, (0, 0))


def _dualpipe(rank: int, ranks: int, micros: int) -> Iterator[Action]:
    """DualPipeV's order on both halves of the ranks; what turns round at its last rank here goes on to the other half."""
    near = min(rank, ranks - 1 - rank)
    first = (0, micros // 2) if rank == near else (micros // 2, 0)
    return _two_lanes(_steps(near, ranks // 2, micros // 2), (near, ranks - 1 - near), first)


def _steps(rank: int, ranks: int, micros: int) -> list[str]:
    """DualPipe's order on a rank, as ops with their lane: 0 the stage nearer to the model's start, 1 the one nearer to its end.

    Follows the phases of figure 5 of the report. `rank` counts from the end of the pipe where micro-batches enter to
    its middle, `micros` those of one lane.
    """
    behind = ranks - 1 - rank  # ranks between this one and the middle
    steps = ["F0"] * (2 * behind)
    steps += ["F0", "F1"] * (rank + 1)
    steps += ["I1", "W", "F1"] * behind
    both = ["F0B1", "F1B0"] * (micros - 2 * ranks + rank + 1)
    if not behind:  # the middle's first pair one after the other: the neighbour waits for its F
        both[:1] = ["F0", "B1"]
    steps += both
    steps += ["B1", "F1B0"] * behind
    drain = ["B1", "B0"] * (rank + 1)
    steps += drain[: rank + 1] + [step.replace("B", "I") for step in drain[rank + 1 :]]
    steps += ["W", "I0"] * behind
    return steps + ["W"] * (rank + 1)


def _two_lanes(steps: list[str], stages: tuple[int, int], first: tuple[int, int]) -> Iterator[Action]:
    """Numbers the steps' micro-batches: in order on each lane, from `first` on; a W is the oldest I's."""
    count: Counter[str] = Counter()
    owed: deque[Part] = deque()
    for step in steps:
        if step == "W":
            yield Action((owed.popleft(),))
            continue
        parts = []
        for op, lane in zip(step[::2], map(int, step[1::2]), strict=True):
            way = ("F" if op == "F" else "B") + str(lane)
            part = Part(cast(Op, op), stages[lane], first[lane] + count[way])
            count[way] += 1
            parts.append(part)
            if op == "I":
                owed.append(part._replace(op="W"))
        yield Action(tuple(parts))
