"""Steps that several ranks take together: whatever fails on one of them fails on all, with the same words.

``group`` is a process group of the CPU (gloo), used by one thread at a time; None is a process alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from litseek.errors import LitseekError

T = TypeVar("T")
Group = dist.ProcessGroup | None


def rank_in(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def size_of(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def every(part: Callable[[], T], group: Group) -> T:
    """Run ``part`` on every rank; its own result, or the error of the first rank that failed, raised on all."""
    if group is None:
        return part()
    result, failure = _tried(part)
    failures: list[Any] = [None] * size_of(group)
    dist.all_gather_object(failures, _portable(failure), group)
    _raise_first(failures, failure)
    return cast(T, result)


def gather(part: Callable[[], T], group: Group) -> list[T]:
    """`every`, with the results of all ranks, in order, on the first one; the others get an empty list."""
    result = every(part, group)
    if group is None:
        return [result]
    results: list[Any] | None = [None] * size_of(group) if rank_in(group) == 0 else None
    dist.gather_object(result, results, dist.get_global_rank(group, 0), group)
    return results or []


def first(part: Callable[[], T], group: Group) -> T:
    """Run ``part`` on the first rank alone; its result, or its error, on all."""
    if group is None:
        return part()
    result, failure = _tried(part) if rank_in(group) == 0 else (None, None)
    box: list[Any] = [result, _portable(failure)]
    dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group)
    _raise_first(box[1:], failure)
    return box[0]


def _tried(part: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return part(), None
    except Exception as error:
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """What can be sent: an error of some library may not survive the way."""
    if error is None or isinstance(error, LitseekError) or type(error).__module__ == "builtins":
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _raise_first(failures: list[Exception | None], own: Exception | None) -> None:
    found = next((failure for failure in failures if failure is not None), None)
    if found is not None:
        raise found from own
