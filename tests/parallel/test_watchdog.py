"""Ranks that die or fail, as processes with nothing but the watchdog in them: who is named, by whom, and how fast."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import json, os, pathlib, sys, time
from litseek.parallel import watchdog
rank, world, box, how = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4]
def share(value):
    if rank == 0:
        box.with_suffix(".new").write_text(json.dumps(value)); box.with_suffix(".new").rename(box)
    while not box.exists():
        time.sleep(0.01)
    return json.loads(box.read_text())
watchdog.start(rank, rank, world, share)
if os.fork() == 0:  # a worker of the data loader, say: it holds what its parent held
    time.sleep(20); os._exit(0)
if how == "end":
    sys.exit(0)
if how.startswith("raise"):
    said = watchdog.fail(how)
    sys.exit(1 if said else 3)
if how == "die":
    time.sleep(0.2); os.kill(os.getpid(), 9)
time.sleep(60)
"""


def run(folder: Path, *how: str) -> tuple[list[int], list[str], float]:
    """Exit status and last words of one rank for each of ``how``, and the seconds until the last one ended."""
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), str(len(how)), str(folder / "box"), what],
            stderr=(folder / f"{rank}.err").open("w"),
        )
        for rank, what in enumerate(how)
    ]
    statuses = [process.wait(timeout=30) for process in ranks]
    return statuses, [(folder / f"{rank}.err").read_text() for rank in range(len(how))], time.monotonic() - began


@pytest.mark.parametrize(("dead", "speaker"), [(1, 0), (2, 0), (0, 1)])
def test_killed_rank_ends_all_and_is_named_once(tmp_path: Path, dead: int, speaker: int) -> None:
    statuses, words, seconds = run(tmp_path, *("die" if rank == dead else "wait" for rank in range(3)))
    assert statuses == [-signal.SIGKILL if rank == dead else 1 for rank in range(3)]
    assert words[speaker].startswith(f"litseek: rank {dead} died without a word")
    assert seconds < 10 and [bool(text) for text in words] == [rank == speaker for rank in range(3)]


def test_failed_rank_is_quoted(tmp_path: Path) -> None:
    statuses, words, seconds = run(tmp_path, "wait", "wait", "raise: the disk is full.")
    assert statuses == [1, 1, 1] and seconds < 10
    assert words == [
        "litseek: rank 2 failed: raise: the disk is full.\n", "", "litseek: rank 2: raise: the disk is full.\n"
    ]  # fmt: skip


def test_error_of_all_ranks_is_said_once(tmp_path: Path) -> None:
    statuses, words, _ = run(tmp_path, *["raise: stage.batch=3."] * 3)
    assert statuses == [1, 1, 1] and sum(text.count("stage.batch=3.") for text in words) == 1


def test_what_a_collective_says_of_a_dead_rank_is_not_the_cause(tmp_path: Path) -> None:
    statuses, words, _ = run(tmp_path, "raise: gloo: Connection closed by peer", "die", "wait")
    assert statuses == [1, -signal.SIGKILL, 1]
    assert words[0].startswith("litseek: rank 1 died without a word") and words[0].count("\n") == 1


def test_ranks_may_end_at_different_times(tmp_path: Path) -> None:
    statuses, words, _ = run(tmp_path, "end", "end", "end")
    assert statuses == [0, 0, 0] and words == ["", "", ""]
