"""Functions run on gloo processes that are started once per world size and kept for the whole test session."""

from __future__ import annotations

import atexit
import os
import socket
import traceback
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Ranks:
    """A pool of ``world`` processes in one gloo group. ``run(f, ...)`` calls the module-level function ``f`` on each."""

    def __init__(self, world: int, method: str = "forkserver") -> None:
        """``method="spawn"``: processes that import everything themselves, in the environment as it is now."""
        context = mp.get_context(method)
        if method == "forkserver":  # which imports once for all pools
            context.set_forkserver_preload(["tests.parallel.layouts"])
        port = _free_port()
        self.pipes, self.processes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, world, port), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120, **keys: Any) -> list[Any]:
        """What ``function`` returned on each rank, in order of ranks. Its error is raised here with that rank's trace."""
        for pipe in self.pipes:
            pipe.send((function, args, keys))
        results, failures = [], []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer within {timeout} s")
            ok, value = pipe.recv()
            if ok:
                results.append(value)
            else:
                failures.append(f"rank {rank}:\n{value}")
        for pipe in self.pipes:
            pipe.send(None)  # all are done: none uses another's groups any more
        if failures:
            raise RuntimeError("\n".join(failures))
        return results

    def close(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.terminate()
        _pool.cache_clear()


def ranks(world: int) -> Ranks:
    """The session's pool of this size."""
    return _pool(world)


@cache
def _pool(world: int) -> Ranks:
    return Ranks(world)


def _serve(pipe: Any, rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        if task is None:
            _drop_groups()
            continue
        function, args, keys = task
        try:
            pipe.send((True, function(*args, **keys)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


KEPT: list[dist.ProcessGroup] = []
"""Process groups that a module makes once and uses in several tests."""


def _drop_groups() -> None:
    """Those that the last function left behind: each has a thread that wakes a hundred times a second."""
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and group not in KEPT:
            dist.destroy_process_group(group)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
