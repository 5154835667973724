"""Schedules to 32 ranks: complete, in order, without deadlock, with the report's bubble and activations (§3.2.1)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from litseek.parallel.schedule import (
    KINDS,
    Action,
    Compute,
    Part,
    Recv,
    Schedule,
    Send,
    make_forward,
    make_schedule,
    program,
    simulate,
)
from litseek.parallel.timeline import Timeline
from tests.parallel.replay import check_complete, replay

EVEN = list(range(2, 33, 2))


def in_words(schedule: Schedule, rank: int) -> str:
    """`F0.1` is F of stage 0, micro-batch 1."""
    return " ".join("&".join(f"{p.op}{p.stage}.{p.micro}" for p in a.parts) for a in schedule.actions[rank])


def check(schedule: Schedule) -> None:
    check_complete(schedule)
    replay(schedule, program(schedule), blocking=True)
    line = Timeline(schedule)
    assert line.bubble == line.bubble_formula
    assert max(line.activations) == line.activations_formula


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", EVEN)
def test_every_even_size(kind: str, ranks: int) -> None:
    check(make_schedule(kind, ranks, 2 * ranks))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_numbers_of_micro_batches(kind: str, ranks: int) -> None:
    for micros in (2 * ranks + 2, 3 * ranks, 4 * ranks + 6):
        check(make_schedule(kind, ranks, micros))


@pytest.mark.parametrize("kind", ["1f1b", "zb1p", "dualpipev"])
def test_odd_sizes(kind: str) -> None:
    for ranks, more in itertools.product((1, 3, 7), (0, 3)):
        check(make_schedule(kind, ranks, 2 * ranks + more))


@pytest.mark.parametrize("kind", ["1f1b", "zb1p"])
def test_fewer_micro_batches_than_ranks(kind: str) -> None:
    for ranks, micros in ((4, 1), (4, 3), (9, 2)):
        schedule = make_schedule(kind, ranks, micros)
        check_complete(schedule)
        replay(schedule, program(schedule), blocking=True)
        line = Timeline(schedule)
        assert max(line.activations) == micros
        assert line.bubble == line.bubble_formula or kind == "zb1p"
    assert Timeline(make_schedule("zb1p", 4, 1)).time == 4 * 2 + 1  # there and back, then the first stage's weights


def test_shortest_lists() -> None:
    assert in_words(make_schedule("1f1b", 1, 2), 0) == "F0.0 B0.0 F0.1 B0.1"
    assert in_words(make_schedule("zb1p", 1, 2), 0) == "F0.0 B0.0 F0.1 B0.1"
    assert in_words(make_schedule("dualpipev", 1, 2), 0) == "F0.0 F1.0 F0.1 B1.0 F1.1&B0.0 B1.1 I0.1 W0.1"
    assert in_words(make_schedule("1f1b", 2, 3), 0) == "F0.0 F0.1 B0.0 F0.2 B0.1 B0.2"
    assert in_words(make_schedule("zb1p", 2, 3), 1) == "F1.0 I1.0 F1.1 I1.1 W1.0 F1.2 I1.2 W1.1 W1.2"
    pair = make_schedule("dualpipe", 2, 4)
    assert in_words(pair, 0) == "F0.0 F1.2 F0.1 B1.2 F1.3&B0.0 B1.3 I0.1 W0.1"
    assert in_words(pair, 1) == "F0.2 F1.0 F0.3 B1.0 F1.1&B0.2 B1.1 I0.3 W0.3"


def test_owners() -> None:
    v, two = make_schedule("dualpipev", 4, 8), make_schedule("dualpipe", 4, 8)
    assert [v.owner(stage, 5) for stage in range(v.num_stages)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [two.owner(stage, 3) for stage in range(two.num_stages)] == [0, 1, 2, 3]
    assert [two.owner(stage, 4) for stage in range(two.num_stages)] == [3, 2, 1, 0]
    assert [two.direction(micro) for micro in range(8)] == [0] * 4 + [1] * 4
    assert {v.direction(micro) for micro in range(8)} == {0}


@pytest.mark.parametrize("kind", KINDS)
def test_forward_only(kind: str) -> None:
    """Any number of micro-batches; no idle time but the pipe's own length."""
    for ranks, micros in ((2, 1), (4, 3), (4, 8), (8, 20)):
        schedule = make_forward(kind, ranks, micros)
        check_complete(schedule, backward=False)
        replay(schedule, program(schedule), blocking=True)
        stages = schedule.num_stages
        per_rank = {"1f1b": micros, "zb1p": micros, "dualpipe": 2 * -(-micros // 2), "dualpipev": 2 * micros}[kind]
        assert max(end for times in simulate(schedule) for _, end in times) <= stages + per_rank
    assert in_words(make_forward(kind, 1 + (kind == "dualpipe"), 1), 0).startswith("F0.0")


@pytest.mark.parametrize("kind", KINDS)
def test_posts_ahead_of_their_ends(kind: str) -> None:
    """Receives that nobody waits for until an action needs them, as on a GPU's own streams."""
    for ranks, micros in ((2, 4), (6, 14), (8, 20)):
        schedule = make_schedule(kind, ranks, micros)
        lists = program(schedule)
        replay(schedule, lists, blocking=False)
        for actions, instructions in zip(schedule.actions, lists, strict=True):
            assert tuple(step.action for step in instructions if isinstance(step, Compute)) == actions


def test_sends_follow_their_action_at_once() -> None:
    for instructions in program(make_schedule("dualpipev", 4, 10)):
        last: tuple[Part, ...] = ()
        for step in instructions:
            if isinstance(step, Compute):
                last = step.action.parts
            elif isinstance(step, Send):
                made = {("B" if part.op == "I" else part.op, *part[1:]) for part in last}
                assert step.transfer[:3] in made


def test_no_transfer_within_a_rank() -> None:
    assert all(isinstance(step, Compute) for step in program(make_schedule("dualpipev", 1, 4))[0])
    bottom = program(make_schedule("dualpipev", 3, 6))[2]
    turns = {(step.transfer.kind, step.transfer.stage) for step in bottom if isinstance(step, Send | Recv)}
    assert turns == {("F", 1), ("F", 3), ("B", 4), ("B", 2)}  # not F of stage 2 nor B of stage 3


def test_replay_sees_mistakes() -> None:
    """The checker itself: other orders of the same instructions are refused."""
    schedule = make_schedule("dualpipev", 2, 4)
    lists = program(schedule)
    sends = [i for i, step in enumerate(lists[0]) if isinstance(step, Send)]
    swapped = list(lists[0])
    swapped[sends[0]], swapped[sends[1]] = swapped[sends[1]], swapped[sends[0]]
    with pytest.raises(AssertionError):
        replay(schedule, (tuple(swapped), lists[1]), blocking=False)
    receive = next(i for i, step in enumerate(lists[1]) if isinstance(step, Recv))
    late = [*lists[1][:receive], *lists[1][receive + 1 :], lists[1][receive]]
    with pytest.raises(AssertionError):
        replay(schedule, (lists[0], tuple(late)), blocking=False)
    with pytest.raises(AssertionError):
        check_complete(replace(schedule, actions=(schedule.actions[0][:-1], schedule.actions[1])))


def test_circle_is_named() -> None:
    schedule = make_schedule("1f1b", 2, 2)
    turned = replace(schedule, actions=(schedule.actions[0][::-1], schedule.actions[1]))
    with pytest.raises(ValueError, match="the 1f1b schedule stops: rank 0 waits for F of stage 0, micro-batch 1"):
        simulate(turned)


@pytest.mark.parametrize(
    ("kind", "ranks", "micros", "words"),
    [
        ("gpipe", 4, 8, "schedule gpipe is not known: there are 1f1b, zb1p, dualpipe, dualpipev."),
        ("1f1b", 0, 8, "found 0 ranks and 8 micro-batches"),
        ("zb1p", 4, 0, "found 4 ranks and 0 micro-batches"),
        ("dualpipe", 3, 8, "takes even numbers of ranks and micro-batches: found 3 ranks and 8 micro-batches"),
        ("dualpipe", 4, 9, "takes even numbers of ranks and micro-batches: found 4 ranks and 9 micro-batches"),
        ("dualpipe", 4, 6, "on 4 ranks takes at least 8 micro-batches .2 a rank.: found 6"),
        ("dualpipev", 8, 15, "on 8 ranks takes at least 16 micro-batches .2 a rank.: found 15"),
    ],
)
def test_refused(kind: str, ranks: int, micros: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_schedule(kind, ranks, micros)


@pytest.mark.parametrize(("kind", "bad"), [("gpipe", 4), ("dualpipe", 3), ("1f1b", 0)])
def test_forward_refuses_the_same_ranks(kind: str, bad: int) -> None:
    with pytest.raises(ValueError, match=rf"schedule {kind} .*({bad}|dualpipev)"):
        make_forward(kind, bad, 1)


class TestTimeline:
    TIMES = (0.5, 1.0, 1.5)

    @pytest.mark.parametrize("kind", KINDS)
    def test_bubble_at_other_times(self, kind: str) -> None:
        """Where `EXACT` says so, the formula; above it only where dualpipe's f > b or w > f."""
        schedule = make_schedule(kind, 4, 12)
        for f, b, w in itertools.product(self.TIMES, self.TIMES, (0.0, *self.TIMES)):
            line = Timeline(schedule, f, b, w)
            if kind == "1f1b" or (kind == "zb1p" and w <= min(f, b)) or (kind.startswith("dual") and f == b >= w):
                assert line.bubble == line.bubble_formula, (f, b, w)
            elif kind.startswith("dual") and b >= f >= w:
                assert line.bubble <= line.bubble_formula, (f, b, w)

    @pytest.mark.parametrize("kind", KINDS)
    def test_events(self, kind: str) -> None:
        line = Timeline(make_schedule(kind, 4, 10), 1.0, 1.25, 0.5)
        cost = {"F": 1.0, "I": 1.25, "W": 0.5, "B": 1.75, "F&B": 2.75}
        by_rank: dict[int, float] = {}
        for event in line.events:
            assert event.start >= by_rank.get(event.rank, 0)
            assert event.end - event.start == cost[event.kind]
            by_rank[event.rank] = event.end
        assert len(by_rank) == 4 and max(by_rank.values()) == line.time
        for rank in range(4):
            assert sum(e.end - e.start for e in line.events if e.rank == rank) == line.work == line.time - line.bubble

    def test_known_shares(self) -> None:
        """Two GPUs, four stages or two twice as long, 8 micro-batches: 4.0% and 11%."""
        v, plain = Timeline(make_schedule("dualpipev", 2, 8)), Timeline(make_schedule("1f1b", 2, 8), 2, 2, 2)
        assert v.bubble / v.time == pytest.approx(0.040) and plain.bubble / plain.time == pytest.approx(0.111, abs=1e-3)
        assert Timeline(make_schedule("dualpipe", 2, 8)).bubble == 0

    def test_activations(self) -> None:
        assert Timeline(make_schedule("1f1b", 4, 8)).activations == [4, 3, 2, 1]
        assert Timeline(make_schedule("zb1p", 4, 8)).activations == [4, 4, 4, 4]
        assert Timeline(make_schedule("dualpipev", 4, 8)).activations == [9, 9, 9, 9]
        assert Timeline(make_schedule("dualpipe", 4, 8)).activations == [5, 5, 5, 5]

    @pytest.mark.parametrize(
        ("times", "words"), [((-1, 1, 1), "f=-1 "), ((1, 1, float("nan")), "w=nan"), ((0, 0, 0), "above 0")]
    )
    def test_refused(self, times: tuple[float, float, float], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            Timeline(make_schedule("1f1b", 2, 4), *times)


def test_torch_has_the_same_dualpipev() -> None:
    """Action by action, against torch.distributed.pipelining's list (its F&B holds two actions, its B is named FULL_BACKWARD)."""
    torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    theirs = object.__new__(torch_schedules.ScheduleDualPipeV)
    for ranks, micros in ((1, 2), (2, 4), (3, 8), (8, 20)):
        theirs.pp_group_size, theirs._n_microbatches = ranks, micros
        ours = make_schedule("dualpipev", ranks, micros)
        for rank in range(ranks):
            listed = [a for a in theirs._calculate_single_rank_operations(rank) if a is not None]
            assert [_from_torch(action) for action in listed] == list(ours.actions[rank]), (ranks, rank)


def _from_torch(action) -> Action:
    ops = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}
    parts = action.sub_actions or (action,)
    return Action(tuple(Part(ops[p.computation_type.name], p.stage_index, p.microbatch_index) for p in parts))
