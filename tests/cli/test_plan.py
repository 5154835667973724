"""`litseek plan what=schedule`: the JSON replayed, the printed numbers, the picture, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from litseek.cli.__main__ import main
from litseek.parallel.schedule import Action, Part, make_schedule
from tests.parallel.replay import check_complete


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["plan", "what=schedule", *words])
    return (status, *capsys.readouterr())


def check(events: list[dict[str, Any]], kind: str, ranks: int, micros: int, times: dict[str, float]) -> None:
    """Complete, nothing at once on a rank, nothing before its inputs, and each kind as long as it must be."""
    schedule = make_schedule(kind, ranks, micros)
    lists: list[list[Action]] = [[] for _ in range(ranks)]
    ends: dict[tuple[str, int, int], float] = {}
    free = [0.0] * ranks
    for event in sorted(events, key=lambda event: (event["start"], event["end"])):
        assert set(event) == {"rank", "kind", "parts", "start", "end"}
        assert all(set(part) == {"op", "stage", "microbatch"} for part in event["parts"])
        rank, start, end = event["rank"], event["start"], event["end"]
        assert start >= free[rank] - 1e-9, event
        free[rank] = end
        parts = tuple(Part(part["op"], part["stage"], part["microbatch"]) for part in event["parts"])
        lists[rank].append(Action(parts))
        assert event["kind"] == lists[rank][-1].kind
        length = {"F": times["f"], "I": times["b"], "W": times["w"], "B": times["b"] + times["w"]}
        assert end - start == pytest.approx(sum(length[part.op] for part in parts))
        ends |= {("B" if op in "BI" else op, stage, micro): end for op, stage, micro in parts}
    check_complete(replace(schedule, actions=tuple(map(tuple, lists))))
    for event in events:
        for part in event["parts"]:
            op, stage, micro = part["op"], part["stage"], part["microbatch"]
            if op == "W":
                needed = [("B", stage, micro)]
            elif op == "F":
                needed = [("F", stage - 1, micro)] if stage else []
            else:
                needed = [("F", stage, micro)] + [("B", stage + 1, micro)] * (stage + 1 < schedule.num_stages)
            assert all(ends[key] <= event["start"] + 1e-9 for key in needed), (part, needed)


@pytest.mark.parametrize(
    ("kind", "ranks", "micros", "bubble", "peak"),
    [
        ("1f1b", 4, 8, 3 * (2 + 3 + 2), 4),
        ("zb1p", 4, 8, 3 * (2 + 5 - 2 * 2), 4),
        ("dualpipe", 4, 8, 1 * (2 + 5 + 5 - 3 * 2), 5),
        ("dualpipev", 4, 8, 3 * (2 + 5 + 5 - 3 * 2), 9),
        ("1f1b", 1, 4, 0, 1),
        ("dualpipev", 1, 2, 0, 3),
    ],
)
def test_events_and_numbers(
    kind: str, ranks: int, micros: int, bubble: float, peak: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "new" / "timeline.json"
    status, out, err = plan(
        capsys, f"kind={kind}", f"ranks={ranks}", f"microbatches={micros}", "f=2", "b=3", "w=2", f"out={file}"
    )
    assert status == 0, err
    events = json.loads(file.read_text())
    check(events, kind, ranks, micros, {"f": 2, "b": 3, "w": 2})
    assert f"formula gives {bubble:g}" in out and f"formula gives {peak}" in out
    total = max(event["end"] for event in events)
    busy = sum(event["end"] - event["start"] for event in events if event["rank"] == 0)
    found = re.search(r"bubble ([\d.]+)%: ([\d.]+) of ([\d.]+)", out)
    assert found is not None and float(found[3]) == total and float(found[2]) == pytest.approx(total - busy)
    assert float(found[1]) == pytest.approx(100 * (total - busy) / total, abs=0.06)
    rows = [line.split() for line in out.splitlines() if re.match(r" \d", line)]
    assert len(rows) == ranks
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    assert plan(capsys)[0] == 0
    assert not list(tmp_path.iterdir())


def test_a_schedule_of_no_length_in_one_half(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "t.json"
    status, _, err = plan(capsys, "kind=zb1p", "ranks=2", "microbatches=4", "w=0", "b=0.5", f"out={file}")
    assert status == 0, err
    check(json.loads(file.read_text()), "zb1p", 2, 4, {"f": 1, "b": 0.5, "w": 0})


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["kind=dualpipe", "ranks=7"], ["7", "20"]),
        (["kind=dualpipe", "microbatches=21"], ["8", "21"]),
        (["kind=dualpipe", "microbatches=10"], ["16", "10"]),
        (["kind=dualpipev", "microbatches=15"], ["16", "15"]),
        (["kind=dualpipes"], ["dualpipes", "dualpipe?"]),
        (["ranks=0"], ["0", "1"]),
        (["microbatches=2.5"], ["2.5", "1"]),
        (["f=-1"], ["-1", "0"]),
        (["w=inf"], ["inf", "0"]),
        (["b=two"], ["two"]),
        (["f=0", "b=0", "w=0"], ["0"]),
        (["out=picture.png"], ["picture.png"]),
        (["rank=8"], ["rank"]),
    ],
)
def test_refused_in_one_sentence(words: list[str], numbers: list[str], capsys: pytest.CaptureFixture[str]):
    status, out, err = plan(capsys, *words)
    assert status != 0 and not out
    assert err.startswith("litseek: ") and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert all(number in err for number in numbers), err


def test_another_commands_planner_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "what=kernels"]) != 0
    assert "what=kernels does not go with litseek plan" in capsys.readouterr().err


def test_help_lists_the_keys(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {key}: " in out for key in ("kind", "ranks", "microbatches", "f", "b", "w", "out"))
