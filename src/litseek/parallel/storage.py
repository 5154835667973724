"""Checkpoints: torch.distributed.checkpoint in safetensors files, global names, everything else as JSON.

A checkpoint is a folder: `*.safetensors` (all tensors, each written by a rank that holds it), `state.json` (numbers,
names and the tree the tensors hang in), `config.json` (the model), `tokenizer.json`, and `manifest.json` with every
file's size and sha256. Neither writing nor reading touches pickle: torch.distributed.checkpoint's own metadata file
would be one, its safetensors storage is not. What one number of ranks saved, any other loads.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litseek.errors import LitseekError
from litseek.parallel.agree import Group, every, first, gather, rank_in, size_of
from litseek.parallel.pieces import Piece, Rows, Stored, save_pieces
from litseek.parallel.tree import flatten, unflatten, unite

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
LAST = "last"
"""File beside the checkpoints that holds the name of the newest finished one."""
FORMAT = 1


def save(
    folder: Path,
    state: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    keep: int = 0,
    group: Group = None,
) -> None:
    """Write ``state`` (nested; tensors, pieces of tensors, numbers, text) as the checkpoint ``folder``, all or nothing.

    All ranks of ``group`` call it together, each with what it holds: its pieces, and the keys that only it has. Of what
    several have the lowest rank's is taken. ``config`` is the model's, ``tokenizer`` the text of its tokenizer.json,
    ``keep`` how many of the newest `step-*` stay beside it (0: all). Errors, on every rank the same: LitseekError
    naming the folder when a disk refuses; an earlier checkpoint of the same name stays as it was.
    """
    write_prepared(folder, *prepare(state, group), config, tokenizer, keep, group)


def prepare(state: Mapping[str, Any], group: Group = None) -> tuple[dict[str, Piece], dict[str, Any]]:
    """`save`'s first half: (path -> this rank's piece, the tree of all ranks on the first one).

    Errors, on every rank: TypeError naming the path of a value that cannot be stored.
    """
    taken: dict[str, Tensor | Piece] = {}

    def tree() -> dict[str, Any]:
        tensors, tree = flatten(state)
        taken.update(tensors)
        return tree

    trees = gather(tree, group)
    united: dict[str, Any] = every(lambda: reduce(unite, trees) if trees else {}, group)
    return {name: t if isinstance(t, Piece) else Piece.whole(t.detach()) for name, t in taken.items()}, united


def write_prepared(
    folder: Path,
    pieces: Mapping[str, Piece],
    tree: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    keep: int = 0,
    group: Group = None,
) -> None:
    """`save`'s second half."""
    write(folder, tree, lambda partial: _save_tensors(partial, pieces, group), config, tokenizer, True, keep, group)


def write(
    folder: Path,
    tree: Mapping[str, Any],
    save_tensors: Callable[[Path], list[Path]],
    config: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    point: bool = False,
    keep: int = 0,
    group: Group = None,
) -> None:
    """`save` for a state that was flattened already; ``save_tensors`` puts this rank's tensors, as safetensors, into a
    folder and returns the files.

    ``point``: whether the folder above shall name this checkpoint as its newest.
    """
    partial = folder.parent / f".{folder.name}.partial"

    def begin() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        partial.mkdir()

    def own_files() -> dict[str, list[Any]]:
        return {path.name: _finished(path) for path in save_tensors(partial)}

    def finish(written: Mapping[str, list[Any]]) -> None:
        _write(partial / STATE, json.dumps(tree))
        if config is not None:
            _write(partial / CONFIG, json.dumps(config, indent=2))
        if tokenizer is not None:
            _write(partial / TOKENIZER, tokenizer)
        rest = {path.name: _finished(path) for path in partial.iterdir() if path.name not in written}
        files = dict(sorted({**written, **rest}.items()))
        _write(partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2))
        for path in (partial / MANIFEST, partial):
            _sync(path)
        if folder.exists():
            folder.rename(_aside(folder))
        partial.rename(folder)
        if point:
            _point(folder)
        _clear(folder)
        if keep:
            keep_newest(folder.parent, keep)

    try:
        first(begin, group)
        files = gather(own_files, group)
        first(lambda: finish({name: mark for own in files for name, mark in own.items()}), group)
    except Exception as error:
        # all ranks have left the step that failed: nobody writes any more
        if rank_in(group) == 0:
            shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise LitseekError(
            f"{folder}: the checkpoint could not be written ({error.strerror or error}); earlier checkpoints are unharmed."
        ) from error


Wanted = Callable[[str, tuple[int, ...]], Rows | None]
"""(path, shape of the whole tensor) -> the rows that a rank wants of it, or None."""


def load(folder: Path, prefix: str = "", wanted: Wanted | None = None, group: Group = None) -> dict[str, Any]:
    """The state that `save` was given, every file checked first; with ``prefix`` only that branch (say "state_dict/").

    ``wanted`` chooses the rows of each tensor that this rank gets; tensors of which it wants none are left out. The
    ranks of ``group``, any number whatever number saved, share the checking of files. Errors, on every rank the same:
    LitseekError naming the file that is missing, truncated or damaged.
    """
    verify(folder, group)
    return every(lambda: _loaded(folder, prefix, wanted), group)


def _loaded(folder: Path, prefix: str, wanted: Wanted | None) -> dict[str, Any]:
    stored, rows = Stored(folder), {}
    for name in stored.names():
        if name.startswith(prefix):
            shape = stored.shape(name)
            found = (0, shape[0] if shape else 1) if wanted is None else wanted(name, shape)
            if found is not None:
                rows[name] = found
    tensors = stored.read(rows)
    try:
        tree = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return unflatten(tensors, tree, partial=bool(prefix) or wanted is not None)
    except Exception as error:
        raise LitseekError(f"{folder}: not a readable checkpoint ({error}).") from error


def verify(folder: Path, group: Group = None) -> dict[str, Any]:
    """The manifest, after every file it names was found whole; the ranks of ``group`` share the files among them."""
    return every(lambda: _verified(folder, rank_in(group), size_of(group)), group)


def _verified(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    if not folder.is_dir():
        raise LitseekError(f"{folder}: no such checkpoint.")
    manifest = folder / MANIFEST
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
        files = content["files"]
        version = content["format"]
    except FileNotFoundError:
        raise LitseekError(f"{manifest}: missing, so {folder} is not a finished checkpoint.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise LitseekError(f"{manifest}: damaged ({error}).") from error
    if version != FORMAT:
        raise LitseekError(f"{manifest}: format {version} is not known here, only {FORMAT}.")
    for name, (size, digest) in list(files.items())[rank::ranks]:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise LitseekError(f"{path}: missing from the checkpoint.")
        if path.stat().st_size != size:
            raise LitseekError(f"{path}: truncated, {path.stat().st_size} bytes where {size} were written.")
        if _fingerprint(path)[1] != digest:
            raise LitseekError(f"{path}: damaged, its sha256 differs from the manifest's.")
    stray = {path.name for path in folder.glob("*.safetensors")} - set(files)
    if stray:
        raise LitseekError(f"{folder / min(stray)}: not named in the manifest.")
    return content


def remove(folder: Path) -> None:
    """Take a checkpoint away; its manifest goes first, so that a half-removed one is never taken for whole."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def last(checkpoints: Path) -> Path | None:
    """The newest finished checkpoint of a stage's `checkpoints` folder, by its pointer."""
    pointer = checkpoints / LAST
    if not pointer.is_file():
        return None
    name = pointer.read_text(encoding="utf-8").strip()
    if not name or Path(name).name != name:
        raise LitseekError(f"{pointer}: damaged, it should hold the name of a checkpoint.")
    _restore(checkpoints / name)
    return checkpoints / name


def keep_newest(checkpoints: Path, keep: int) -> None:
    """Remove all but the ``keep`` newest `step-*` folders; the one that `last` points to always stays."""
    newest = last(checkpoints)
    steps = sorted(path for path in checkpoints.glob("step-*") if path.is_dir())
    for path in steps[:-keep] if keep > 0 else []:
        if path != newest:
            remove(path)


def replace_text(path: Path, text: str) -> None:
    """All of the text or nothing. Raises LitseekError naming the file."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        with fresh.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise LitseekError(f"{path}: could not be written ({error.strerror or error}).") from error


def random_state() -> dict[str, Any]:
    """Generators of this process: python, numpy, torch and, where there are GPUs, theirs."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # type: ignore[misc]
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _save_tensors(folder: Path, pieces: Mapping[str, Piece], group: Group) -> list[Path]:
    return save_pieces(folder, pieces, group)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _fingerprint(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _finished(path: Path) -> list[Any]:
    """Its fingerprint, once it is on the disk."""
    _sync(path)
    return _fingerprint(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _aside(folder: Path) -> Path:
    """Where a checkpoint waits while another takes its name."""
    return folder.parent / f".{folder.name}.replaced"


def _restore(folder: Path) -> None:
    """Its old content back, if the one that was to replace it never came."""
    if _aside(folder).is_dir() and not folder.exists():
        _aside(folder).rename(folder)


def _clear(folder: Path) -> None:
    """What processes that were killed while saving left here and, of a stage's own steps, beside it."""
    for other in (
        folder,
        *(path.with_name(path.name[1:].rpartition(".")[0]) for path in folder.parent.glob(".step-*")),
    ):
        _restore(other)
        shutil.rmtree(_aside(other), ignore_errors=True)
        shutil.rmtree(other.parent / f".{other.name}.partial", ignore_errors=True)


def _point(folder: Path) -> None:
    """Let `last` name this checkpoint, and the folder's entries reach the disk."""
    fresh = folder.parent / f".{LAST}.new"
    _write(fresh, folder.name)
    _sync(fresh)
    fresh.rename(folder.parent / LAST)
    _sync(folder.parent)
