"""A nested state taken apart into tensors and plain JSON, and put together again. No pickle on either way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litseek.parallel.pieces import Piece

KIND = "__kind__"
"""Marks a JSON object that stands for something JSON has not: a tensor, a tuple, a dictionary with other keys."""


def flatten(state: Mapping[str, Any]) -> tuple[dict[str, Tensor | Piece], dict[str, Any]]:
    """(path -> tensor or piece of one, JSON tree). Errors: TypeError naming the path of a value that cannot be stored."""
    tensors: dict[str, Tensor | Piece] = {}
    return tensors, _take(state, "", tensors)


def unflatten(tensors: Mapping[str, Tensor], tree: Mapping[str, Any], partial: bool = False) -> dict[str, Any]:
    """The state again; with ``partial``, what has no tensor in ``tensors`` is left out."""
    return _give(tree, tensors, partial)


def unite(tree: Any, other: Any) -> Any:
    """``tree`` with the keys that only ``other`` has; where both have a value ``tree``'s stays.

    Lists are taken item by item where they are equally long. Errors: ValueError naming tensors that would be lost.
    """
    if isinstance(tree, dict) and isinstance(other, dict) and KIND not in tree and KIND not in other:
        return tree | {key: unite(tree[key], item) if key in tree else item for key, item in other.items()}
    if isinstance(tree, list) and isinstance(other, list) and len(tree) == len(other):
        return [unite(*pair) for pair in zip(tree, other)]
    lost = set(_paths(other)) - set(_paths(tree))
    if lost:
        raise ValueError(f"A checkpoint has no place for '{min(lost)}': one rank has it, and another something else.")
    return tree


def _take(value: Any, path: str, tensors: dict[str, Tensor | Piece]) -> Any:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor | Piece):
        assert path not in tensors, f"two tensors at {path}"
        tensors[path] = value
        return {KIND: "tensor", "path": path}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, torch.dtype):
        return {KIND: "dtype", "name": str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and KIND not in value:
            return {key: _take(item, _join(path, key), tensors) for key, item in value.items()}
        items = [[_take(k, path, tensors), _take(v, _join(path, str(k)), tensors)] for k, v in value.items()]
        return {KIND: "items", "items": items}
    if isinstance(value, list | tuple):
        items = [_take(item, _join(path, str(i)), tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {KIND: "tuple", "items": items}
    raise TypeError(f"A checkpoint cannot hold {type(value).__name__} at '{path}'.")


_ABSENT = object()


def _give(tree: Any, tensors: Mapping[str, Tensor], partial: bool) -> Any:
    if isinstance(tree, list):
        return [_give(item, tensors, partial) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind = tree.get(KIND)
    if kind is None:
        given = {key: _give(item, tensors, partial) for key, item in tree.items()}
        return {key: item for key, item in given.items() if item is not _ABSENT}
    if kind == "tensor":
        return tensors.get(tree["path"], _ABSENT) if partial else tensors[tree["path"]]
    if kind == "dtype":
        return getattr(torch, tree["name"])
    if kind == "tuple":
        return tuple(_give(item, tensors, partial) for item in tree["items"])
    if kind == "items":
        return {_give(k, tensors, partial): _give(v, tensors, partial) for k, v in tree["items"]}
    raise ValueError(f"unknown kind {kind!r}")


def _paths(tree: Any) -> Iterator[str]:
    """Of the tensors in it."""
    if isinstance(tree, dict) and tree.get(KIND) == "tensor":
        yield tree["path"]
        return
    for item in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _paths(item)


def _join(path: str, key: str) -> str:
    return f"{path}/{key}" if path else key
