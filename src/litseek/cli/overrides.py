"""The command line: flags, text values kept as typed, and sweeps multiplied out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from litseek.cli.errors import Usage

PROSE = {"prompt", "system"}
"""Keys whose value is what a person wrote: nothing in it means anything to Hydra, `${` included."""

PATHS = {
    "run_dir",
    "init_from",
    "checkpoint",
    "source",
    "target",
    "folder",
    "input_file",
    "output_file",
    "results",
    "out",
}
"""Root keys that hold a path: commas, equals signs and spaces are part of it."""

_KEY = re.compile(r"^(?P<sign>\+\+|\+|~)?(?P<key>[A-Za-z_][\w./@-]*)=(?P<value>.*)$", re.DOTALL)


@dataclass(frozen=True)
class Request:
    """What was asked: overrides in Hydra's grammar, whether they sweep, and whether only the config is to be shown."""

    overrides: tuple[str, ...]
    multirun: bool = False
    show: bool = False


def parse(argv: Sequence[str], positional: str | None = None) -> Request:
    """Sort the arguments. A bare word becomes `positional`'s value; a flag that nobody knows is refused."""
    overrides: list[str] = []
    multirun = show = False
    for word in argv:
        if word in ("-m", "--multirun"):
            multirun = True
        elif word in ("-c", "--cfg"):
            show = True
        elif word.startswith("-"):
            raise Usage.nearest(f"'{word}' is not a flag", word, ["-m", "--multirun", "--cfg", "--help"])
        elif match := _KEY.match(word):
            overrides.append(_quoted(match))
        elif word.startswith("~"):
            overrides.append(word)
        elif positional is not None and not any(key_of(o) == positional for o in overrides):
            overrides.append(_quoted(_as_match(f"{positional}={word}")))
        else:
            raise Usage(f"'{word}' is neither key=value nor a flag; write settings as key=value.")
    return Request(tuple(overrides), multirun, show)


def key_of(override: str) -> str:
    """`model.hidden_size` of `+model.hidden_size=64`."""
    return override.lstrip("+~").partition("=")[0]


def expand(request: Request) -> list[tuple[str, ...]]:
    """The overrides of each job: one job, or under -m the product of all swept values in the order they were typed."""
    try:
        parsed = OverridesParser.create().parse_overrides(list(request.overrides))
    except HydraException as error:
        raise Usage(f"{_culprit(request.overrides)} is not understood: {str(error).splitlines()[0]}.") from error
    swept = [o for o in parsed if o.is_sweep_override()]
    if not request.multirun:
        if swept:
            line = swept[0].input_line
            key, _, value = (line or "").partition("=")
            raise Usage(f"{line} names several values: add -m to run each, or write a list as {key}=[{value}].")
        return [request.overrides]
    try:
        batches = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        raise Usage(f"this sweep is not possible: {error}.") from error
    return [tuple(job) for job in batches[0]]


def swept_keys(request: Request) -> list[str]:
    """Keys that vary under -m, in the order they were typed."""
    if not request.multirun:
        return []
    parsed = OverridesParser.create().parse_overrides(list(request.overrides))
    return [str(o.key_or_group) for o in parsed if o.is_sweep_override()]


def _culprit(overrides: Sequence[str]) -> str:
    parser = OverridesParser.create()
    for override in overrides:
        try:
            parser.parse_override(override)
        except HydraException:
            return override
    return " ".join(overrides)


def _as_match(word: str) -> re.Match[str]:
    match = _KEY.match(word)
    assert match is not None
    return match


def _quoted(match: re.Match[str]) -> str:
    """Text values in Hydra's quotes; everything else untouched, so that lists, sweeps and numbers keep their meaning."""
    sign, key, value = match["sign"] or "", match["key"], match["value"]
    if key in PATHS and value not in ("", "null", "???"):
        return f"{sign}{key}={QuotedString(text=value, quote=Quote.single).with_quotes()}"
    if key in PROSE:
        return f"{sign}{key}={QuotedString(text=literal(value), quote=Quote.single).with_quotes()}"
    return match.string


def literal(text: str) -> str:
    """`text` such that OmegaConf gives it back unchanged: `${` would be looked up, `???` taken for a missing value."""
    if text == "???":
        return """${oc.decode:"'???'"}"""
    if "${" not in text:
        return text
    return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", text)
