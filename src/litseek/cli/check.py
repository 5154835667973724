"""Checks before any work: unknown keys, missing values, arguments that a class does not take."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import types
import typing
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from litseek.cli.errors import Usage, suggest
from litseek.cli.overrides import key_of

_ABSENT = object()

FILLED = {"stage": {"model", "precision", "optim", "data", "seed"}, "logger": {"save_dir"}}
"""Arguments that the command hands over itself, by the root key of the object that takes them."""


def is_value(override: str, conf: Path) -> bool:
    """Whether an override sets a key, rather than choosing a file of a group."""
    key = key_of(override)
    return "@" not in key and not (conf / key).is_dir() and not key.startswith("hydra.")


def allow(override: str, base: DictConfig) -> str:
    """`override` with a `+` where its key is absent from the files and yet an argument of the object it belongs to."""
    key, _, value = override.partition("=")
    parts = key.split(".")
    if override[0] in "+~":
        return override
    found = OmegaConf.select(base, key, default=_ABSENT, throw_on_missing=False)
    if found is not _ABSENT:  # a mapping may get entries that the files do not have
        return f"++{override}" if OmegaConf.is_dict(found) and value.startswith("{") else override
    for i in range(len(parts) - 1, 0, -1):
        node = OmegaConf.select(base, ".".join(parts[:i]))
        if OmegaConf.is_dict(node) and "_target_" in node:
            try:
                taken, _ = arguments(_object(node._target_))
            except (HydraException, ImportError, AttributeError):
                return override
            return f"+{override}" if parts[i] in taken else override
    return override


def explain(error: Exception, overrides: list[str], compose: Callable[[list[str]], DictConfig], conf: Path) -> Usage:
    """Hydra's error as one sentence: the override at fault, its value, and the nearest thing that exists."""
    groups = {p.name for p in conf.iterdir() if p.is_dir()}
    for override in overrides:
        key, value = key_of(override), override.partition("=")[2]
        if key in groups and not override.startswith("~"):
            choices = {str(p.relative_to(conf / key).with_suffix("")) for p in (conf / key).rglob("*.yaml")}
            if value not in choices and value not in ("null", "???"):
                return Usage.nearest(f"{key}={value} is not in conf/{key}", value, choices)
    chosen = [o for o in overrides if not is_value(o, conf)]
    if len(chosen) < len(overrides):
        try:
            base = compose(chosen)
        except Usage as deeper:
            return deeper
        known = set(_paths(base)) | groups | set(_accepted(base))
        for override in overrides:
            key, value = key_of(override), override.partition("=")[2]
            if override not in chosen and not override.startswith("+") and key not in known:
                return Usage.nearest(f"{key}={value}: there is no key '{key}'", key, known)
    text = re.sub(r"\s*\n\s*", " ", str(error).split("\nConfig search path")[0]).strip()
    return Usage(f"{text.rstrip('.')}.")


def check_root(cfg: DictConfig, known: Set[str], sources: list[str]) -> None:
    """A misspelt key in an arm, a preset or after a `+` would otherwise be added silently and do nothing."""
    for key in map(str, cfg):
        if key not in known:
            given = next((s for s in sources if key_of(s).split(".")[0] == key), " or ".join(sources))
            raise Usage.nearest(f"{given}: there is no key '{key}'", key, known)


def check_missing(cfg: DictConfig, about: str) -> None:
    """`???` that nobody filled."""
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        raise Usage(f"{about} needs {' and '.join(missing)}: give {' '.join(f'{key}=…' for key in missing)}.")


def check_targets(cfg: DictConfig) -> None:
    """Every `_target_` exists and takes the arguments beside it; so a typo in a file stops like one on the command line."""
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise Usage(re.sub(r"\s*\n\s*", " ", str(error)).strip().rstrip(".") + ".") from error
    for path, node in _targets(plain):
        check_call(path, node)


def check_call(path: str, node: dict[str, Any]) -> None:
    """`node`'s keys against the signature of its `_target_`."""
    try:
        target = _object(node["_target_"])
    except (HydraException, ImportError, AttributeError) as error:
        raise Usage(f"{path}._target_={node['_target_']} cannot be imported: {_inner(error)}.") from error
    if node.get("_partial_"):
        return
    parameters, open_ended = arguments(target)
    filled = FILLED.get(path.partition(".")[0], set())
    given = {key for key in node if not key.startswith("_")}
    for key in sorted(given - set(parameters)):
        if not open_ended:
            what = f"{path}.{key}={node[key]!r}: {target.__name__} has no setting '{key}'"
            raise Usage(f"{what}{suggest(key, set(parameters) - filled)}")
    needed = {name for name, p in parameters.items() if p.default is p.empty}
    if absent := sorted(needed - given - filled):
        raise Usage(f"{target.__name__} needs {' and '.join(f'{path}.{key}' for key in absent)}, which nothing sets.")
    check_values(target, {f"{path}.{key}": (key, node[key]) for key in sorted(given & set(parameters))})


def check_values(target: Any, given: dict[str, tuple[str, Any]]) -> None:
    """Numbers, texts and truth values against the annotations of `target`; `given`: full name -> (argument, value)."""
    kinds = kinds_of(target)
    for name, (key, value) in given.items():
        if key in kinds and (wanted := _mismatch(value, kinds[key])):
            found = "null" if value is None else repr(value)
            raise Usage(f"{name}={found} is not {wanted}.")


@functools.cache
def kinds_of(target: Any) -> dict[str, tuple[Any, ...]]:
    """The types that each argument may have; arguments whose annotation cannot be told are left out."""
    calls = (
        [vars(c)["__init__"] for c in target.__mro__[:-1] if "__init__" in vars(c)] if inspect.isclass(target) else []
    )
    found: dict[str, tuple[Any, ...]] = {}
    for call in reversed(calls or [target]):
        try:
            hints = typing.get_type_hints(call)
        except (NameError, TypeError, AttributeError):  # of names that only a type checker imports
            continue
        found |= {name: tuple(_members(hint)) for name, hint in hints.items()}
    return found


def _members(hint: Any) -> Iterator[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for inner in typing.get_args(hint):
            yield from _members(inner)
    else:
        yield typing.get_origin(hint) or hint


def _mismatch(value: Any, kinds: tuple[Any, ...]) -> str | None:
    """What was wanted, if `value` is plain and surely of none of `kinds`. Mappings and lists are their object's affair."""
    sure = {int, float, bool, str, type(None)}
    if isinstance(value, (dict, list)) or any(not isinstance(k, type) or k in (object, Any, Path) for k in kinds):
        return None
    if type(value) in kinds or (isinstance(value, int) and not isinstance(value, bool) and float in kinds):
        return None
    if bool in kinds and value in (0, 1):
        return None
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    wanted = [names[k] for k in kinds if k in sure and not (k is int and float in kinds)]
    return " or ".join(wanted) or f"what {kinds[0].__name__} is made from"


@functools.cache
def arguments(target: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """Names that a callable takes, and whether it takes any other too. A class whose `**keys` go on to its base is closed."""
    calls = [target]
    if inspect.isclass(target):
        calls = [vars(c)["__init__"] for c in target.__mro__[:-1] if "__init__" in vars(c)] or [target]
    taken: dict[str, inspect.Parameter] = {}
    for call in calls:
        parameters = inspect.signature(call).parameters
        named = {
            n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and n != "self"
        }
        taken = named | taken
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return taken, False
    return taken, True


def _object(name: str) -> Any:
    """What `_target_` names. Hydra logs what it also raises."""
    logger = logging.getLogger("hydra.utils")
    logger.disabled = True
    try:
        return get_object(name)
    finally:
        logger.disabled = False


def _inner(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return re.sub(r"\s*\n\s*", " ", str(error)).rstrip(".")


def _targets(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield path, node
        for key, value in node.items():
            yield from _targets(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _targets(value, f"{path}[{i}]")


def _accepted(cfg: DictConfig) -> Iterator[str]:
    """Dotted names of arguments that objects take, whether or not a file mentions them."""
    for path, node in _targets(OmegaConf.to_container(cfg)):
        try:
            yield from (f"{path}.{name}" for name in arguments(_object(node["_target_"]))[0])
        except (HydraException, ImportError, AttributeError):
            continue


def _paths(cfg: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of every key, inner ones too."""
    if OmegaConf.is_dict(cfg):
        for key in cfg:
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path
            if not OmegaConf.is_missing(cfg, key) and not OmegaConf.is_interpolation(cfg, key):
                yield from _paths(cfg[key], path)
