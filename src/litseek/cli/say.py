"""Which process speaks, known before anything heavy is imported."""

from __future__ import annotations

import os


def is_zero() -> bool:
    """Whether this process is the one that writes and speaks; torchrun, our launcher and our SLURM jobs set these."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


def say(line: str) -> None:
    """A line on stdout, once for all ranks."""
    if is_zero():
        print(line, flush=True)
