"""Folders of computed data, named by a hash of all that they depend on and put in place in one step."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from litseek.data.corpora import fingerprint
from litseek.errors import LitseekError


def cached(cache_dir: Path, kind: str, depends_on: Any, build: Callable[[Path], None]) -> Path:
    """The folder ``<kind>-<hash>``; ``build(folder)`` fills it if it is not there yet.

    It is filled under a temporary name and renamed, so that a reader sees all of it or nothing, whoever is killed.
    """
    target = Path(cache_dir) / f"{kind}-{fingerprint(depends_on)}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as e:
        raise LitseekError(f"{target.parent}: cannot write the data cache there: {e.strerror or e}.") from e
    try:
        build(building)
        try:
            os.rename(building, target)
        except OSError:
            if not target.is_dir():  # else another process was first, with the same content
                raise
    except OSError as e:
        raise LitseekError(f"{target}: cannot write the data cache: {e.strerror or e}.") from e
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target
