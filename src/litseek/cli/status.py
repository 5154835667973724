"""How a command ends: the sentence that its error becomes, who says it, and the exit status."""

from __future__ import annotations

import os
import sys

from litseek.cli.errors import INTERRUPTED, Usage, describe
from litseek.cli.say import is_zero
from litseek.errors import Preempted
from litseek.parallel import watchdog


def report(error: BaseException, alike: bool = False) -> tuple[int, str]:
    """Say the error once: exit status and sentence. ``alike``: every rank of this machine has the same one."""
    if isinstance(error, BrokenPipeError):  # the reader of our output (head, a pager) left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    if isinstance(error, Preempted):
        if is_zero():
            _say(str(error))
        return 143, str(error)
    interrupted = isinstance(error, KeyboardInterrupt)
    sentence = INTERRUPTED if interrupted else describe(error)
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    if not watchdog.fail(sentence) and not (alike and os.environ.get("LOCAL_RANK", "0") != "0"):
        _say(sentence if is_zero() else f"rank {rank}: {sentence}")
    return (130 if interrupted else 2 if isinstance(error, Usage) else 1), sentence


def _say(sentence: str) -> None:
    print(f"litseek: {sentence}", file=sys.stderr, flush=True)
