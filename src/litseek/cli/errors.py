"""One sentence for the user out of any error, and when to show a traceback instead."""

from __future__ import annotations

import difflib
import errno
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from litseek.errors import LitseekError

INTERRUPTED = "interrupted; the same command goes on from the last checkpoint."


class Usage(LitseekError):
    """The command line was not understood; nothing ran. Exit status 2."""

    @classmethod
    def nearest(cls, what: str, given: str, choices: Iterable[str]) -> Usage:
        """`what`, followed by the closest of `choices`, or by all of them when none is close."""
        return cls(f"{what}{suggest(given, choices)}")


def suggest(given: str, choices: Iterable[str]) -> str:
    """The end of a sentence: '; did you mean …?', or every choice when none is near, or a full stop when too many."""
    known = sorted(set(choices))
    close = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
    if not close:  # a right last name under a wrong parent: lr -> optim.lr
        close = [key for key in known if key.rsplit(".", 1)[-1] == given.rsplit(".", 1)[-1]][:1]
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(known)}." if 0 < len(known) <= 20 else "."


def wants_traceback(argv: Sequence[str]) -> bool:
    """`debug=true` on the command line or LITSEEK_DEBUG=1 in the environment."""
    asked = [a.partition("=")[2].lower() for a in argv if a.startswith("debug=")]
    return (asked[-1] in ("true", "1", "yes", "on")) if asked else os.environ.get("LITSEEK_DEBUG", "") not in ("", "0")


def describe(error: BaseException) -> str:
    """The error as one line that names the thing. Errors that were not foreseen say their type and how to see more."""
    error = _root(error)
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip()
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; earlier checkpoints are untouched."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}." if error.filename else f"{error.strerror.lower()}."
    foreseen = isinstance(error, (LitseekError, ValueError)) or type(error).__name__ == "MisconfigurationException"
    if foreseen and text:  # the last is Lightning's, for settings that its Trainer refuses
        return text if text[-1] in ".?!" else f"{text}."
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("litseek"):
        return f"the Python package '{error.name}' is not installed; pip install 'litseek[dev]' brings all of them."
    return f"unexpected {type(error).__name__}: {text or 'no message'} (debug=true shows where)."


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings as one line on stderr, without the source line that raised them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"litseek: {message}", file=sys.stderr)
        yield


def _root(error: BaseException) -> BaseException:
    """Hydra and Lightning wrap what our constructors raise: what the user should read is inside."""
    while type(error).__module__.startswith(("hydra", "omegaconf")) and error.__cause__ is not None:
        error = error.__cause__
    return error
