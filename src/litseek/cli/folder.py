"""A stage's folder through its life: new, unfinished, finished, or holding something else than what is asked for.

A folder appears with its config.yaml and session.json at once, so that a killed start leaves nothing half-made.
"""

from __future__ import annotations

import secrets
import shutil
import string
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from litseek.cli import receipt as receipts
from litseek.cli.say import is_zero, say
from litseek.cli.watch import from_rank_0
from litseek.errors import LitseekError
from litseek.parallel.storage import last


@dataclass(frozen=True)
class Attempt:
    """One start of a stage. `resume` is the checkpoint to go on from; `spent_s` the seconds of earlier attempts."""

    folder: Path
    wandb_id: str
    resume: Path | None = None
    spent_s: float = 0.0


def finished(
    folder: Path, config: Mapping[str, Any], parent: str | None, rerun: str | None = None
) -> dict[str, Any] | None:
    """The receipt, if the stage is finished, is what `config` and `parent` ask for, and `rerun` has seen to it."""
    found = receipts.read_receipt(folder)
    if found is None or found.get("config") != receipts.digest(config) or found.get("parent") != parent:
        return None
    return found if _answers(folder, rerun) else None


def begin(folder: Path, config: Mapping[str, Any], parent: str | None, rerun: str | None = None) -> Attempt:
    """Go on in `folder` if it holds the same work unfinished; else start afresh, setting the old content aside.

    What is set aside lies in `<folder>.replaced` until the next time, and a line says why. `rerun` as in `train`.
    """
    if dist.is_initialized():  # by `connect`, or by an earlier stage of this pipeline
        return _agree(lambda: _decide(folder, config, parent, rerun))
    if not is_zero():
        return _join(folder)  # rank 0 decided before it launched this process
    return _decide(folder, config, parent, rerun)


def _decide(folder: Path, config: Mapping[str, Any], parent: str | None, rerun: str | None) -> Attempt:
    if not folder.is_dir():
        return _create(folder, config, parent, rerun)
    if not (folder / receipts.CONFIG).is_file() and any(folder.iterdir()):
        raise LitseekError(
            f"{folder}: holds files but no {receipts.CONFIG}, so no stage of ours; choose another run_dir."
        )
    reason = receipts.difference(folder, config, parent)
    if reason is None and not _answers(folder, rerun):
        reason = f"{str(rerun).split()[0]} asks for it"
    if reason is None:
        return _go_on(folder)
    if any((folder / "checkpoints").glob("*/")):
        aside = folder.with_name(f"{folder.name}.replaced")
        say(f"{folder}: starts afresh because {reason}; what was there is now {aside}.")
        if aside.is_dir():
            shutil.rmtree(aside)
        folder.rename(aside)
    else:  # nothing was reached here, and what an earlier change set aside is worth more
        say(f"{folder}: starts afresh because {reason}.")
        shutil.rmtree(folder)
    return _create(folder, config, parent, rerun)


def _answers(folder: Path, rerun: str | None) -> bool:
    return rerun is None or receipts.read_session(folder).get("rerun") == rerun


def _agree(decide: Callable[[], Attempt]) -> Attempt:
    """All ranks come here at once: rank 0 decides and tells the others, its errors too."""
    decided: Attempt | Exception | None = None
    if dist.get_rank() == 0:
        try:
            decided = decide()
        except Exception as error:
            decided = error
    decided = from_rank_0(decided)
    if isinstance(decided, Exception):
        raise decided
    assert decided is not None
    return decided


def _create(folder: Path, config: Mapping[str, Any], parent: str | None, rerun: str | None) -> Attempt:
    fresh = folder.with_name(f".{folder.name}.new")
    try:
        if fresh.is_dir():
            shutil.rmtree(fresh)
        fresh.mkdir(parents=True)
        wandb_id = "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))
        receipts.write_config(fresh, config)
        session = {"wandb_id": wandb_id, "parent": parent, "rerun": rerun, "spent_s": 0.0, "started": time.time()}
        receipts.write_session(fresh, session)
        fresh.rename(folder)
    except OSError as error:
        raise LitseekError(f"{folder}: the stage's folder could not be made ({error.strerror or error}).") from error
    return Attempt(folder, wandb_id)


def _go_on(folder: Path) -> Attempt:
    session = receipts.read_session(folder)
    newest = last(folder / "checkpoints")
    spent = float(session["spent_s"]) + max(0.0, _last_change(folder) - float(session["started"]))
    receipts.write_session(folder, session | {"spent_s": spent, "started": time.time()})
    where = (
        f"goes on from {newest.name}"
        if newest is not None
        else "starts again: it was stopped before its first checkpoint"
    )
    say(f"{folder}: {where}.")
    return Attempt(folder, str(session["wandb_id"]), newest, spent)


def _join(folder: Path) -> Attempt:
    """Another rank's view of what rank 0 decided before it launched this process."""
    session = receipts.read_session(folder)
    return Attempt(folder, str(session["wandb_id"]), last(folder / "checkpoints"), float(session["spent_s"]))


def _last_change(folder: Path) -> float:
    """When the earlier attempt last wrote something."""
    return max(path.stat().st_mtime for path in folder.rglob("*") if path.name != receipts.SESSION)
