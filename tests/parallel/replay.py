"""A schedule checked without running it: what must be there, in which order, and that nobody waits for ever.

Written from the rules, not from `simulate` and `program`, which it checks.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque

from litseek.parallel.schedule import Compute, Instruction, Part, Schedule, Send, Transfer


def check_complete(schedule: Schedule, backward: bool = True) -> None:
    """Every stage of every micro-batch: one F, and one B or one I and one W, on the rank that owns the stage."""
    found: Counter[Part] = Counter()
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            assert "".join(part.op for part in action.parts) in ("F", "B", "I", "W", "FB"), action
            assert action.kind == ("F&B" if len(action.parts) == 2 else action.parts[0].op)
            if len(action.parts) == 2:
                assert action.parts[0][1:] != action.parts[1][1:], action
            for part in action.parts:
                assert schedule.owner(part.stage, part.micro) == rank, (rank, part)
                found[part] += 1
    wanted: Counter[Part] = Counter()
    for stage in range(schedule.num_stages):
        for micro in range(schedule.micros):
            wanted[Part("F", stage, micro)] += 1
            if backward:
                split = found[Part("I", stage, micro)] > 0
                wanted.update(Part(op, stage, micro) for op in ("IW" if split else "B"))  # type: ignore[arg-type]
    assert found == wanted, (found - wanted, wanted - found)


def replay(schedule: Schedule, lists: tuple[tuple[Instruction, ...], ...], blocking: bool) -> None:
    """Run every rank's list, each transfer in its pair's one stream.

    A stream moves its oldest transfer once both sides have posted it, and fails when they posted different ones. Actions
    wait for what they need; under `blocking` each send and receive waits for its own end too.
    """
    pairs: dict[tuple[int, int], tuple[deque[Transfer], deque[Transfer]]] = defaultdict(lambda: (deque(), deque()))
    have: list[set[tuple[str, int, int]]] = [
        set() for _ in lists
    ]  # tensors on a rank: F an output, B an input's gradient
    used: list[set[tuple[str, int, int]]] = [set() for _ in lists]
    moved: set[Transfer] = set()
    at = [0] * len(lists)
    posted = [False] * len(lists)

    def step(rank: int) -> bool:
        instruction = lists[rank][at[rank]]
        if isinstance(instruction, Compute):
            for part in instruction.action.parts:
                needed = _needed(part, schedule.num_stages)
                if not needed <= have[rank]:
                    return False
                used[rank] |= needed
            for op, stage, micro in instruction.action.parts:
                have[rank].add(("B" if op in "BI" else op, stage, micro))
            return True
        transfer = instruction.transfer
        mine, other = (
            (transfer.source, transfer.target) if isinstance(instruction, Send) else (transfer.target, transfer.source)
        )
        assert mine == rank != other
        if not posted[rank]:
            if isinstance(instruction, Send):
                assert (transfer.kind, transfer.stage, transfer.micro) in have[rank], (
                    f"{transfer} is sent before it is made"
                )
            low, high = min(mine, other), max(mine, other)
            sides = pairs[low, high]
            sides[mine == high].append(transfer)
            while sides[0] and sides[1]:
                first, second = sides[0].popleft(), sides[1].popleft()
                assert first == second, f"ranks {low} and {high} post {first} and {second} to each other"
                have[first.target].add((first.kind, first.stage, first.micro))
                moved.add(first)
            posted[rank] = True
        if blocking and transfer not in moved:
            return False
        posted[rank] = False
        return True

    progress = True
    while progress:
        progress = False
        for rank, instructions in enumerate(lists):
            while at[rank] < len(instructions) and step(rank):
                at[rank] += 1
                progress = True
    stuck = {rank: ins[at[rank]] for rank, ins in enumerate(lists) if at[rank] < len(ins)}
    assert not stuck, f"deadlock: {stuck}"
    for (low, high), sides in pairs.items():
        assert not any(sides), f"ranks {low} and {high} never move {sides}"
    for transfer in moved:
        assert (transfer.kind, transfer.stage, transfer.micro) in used[transfer.target], f"{transfer} is not used"


def _needed(part: Part, num_stages: int) -> set[tuple[str, int, int]]:
    op, stage, micro = part
    if op == "F":
        return {("F", stage - 1, micro)} if stage > 0 else set()
    if op == "W":
        return {("B", stage, micro)}
    return {("F", stage, micro)} | ({("B", stage + 1, micro)} if stage < num_stages - 1 else set())
