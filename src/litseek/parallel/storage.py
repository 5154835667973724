"""Checkpoints: torch.distributed.checkpoint in safetensors files, global names, everything else as JSON.

A checkpoint is a folder: `model-*.safetensors` (all tensors), `state.json` (numbers, names and the tree the tensors hang
in), `config.json` (the model), `tokenizer.json`, and `manifest.json` with every file's size and sha256. Neither writing
nor reading touches pickle: torch.distributed.checkpoint's own metadata file would be one, its safetensors storage is not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from litseek.errors import LitseekError
from litseek.parallel.tree import flatten, unflatten

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
LAST = "last"
"""File beside the checkpoints that holds the name of the newest finished one."""
FORMAT = 1
SHARD = 2**30
"""Bytes of tensors in one file."""


def save(
    folder: Path, state: Mapping[str, Any], config: Mapping[str, Any] | None = None, tokenizer: str | None = None
) -> None:
    """Write ``state`` (nested; tensors, numbers, text) as the checkpoint ``folder``, all of it or nothing.

    ``config`` is the model's, ``tokenizer`` the text of its tokenizer.json. Errors: LitseekError naming the folder when
    the disk refuses; an earlier checkpoint of the same name stays as it was.
    """
    tensors, tree = flatten(state)
    write(folder, tree, lambda partial: _save_tensors(partial, tensors), config, tokenizer, point=True)


def write(
    folder: Path,
    tree: Mapping[str, Any],
    save_tensors: Callable[[Path], None],
    config: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    point: bool = False,
) -> None:
    """`save` for a state that was flattened already; ``save_tensors`` puts its tensors, as safetensors, into a folder.

    ``point``: whether the folder above shall name this checkpoint as its newest.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial"
    _clear(folder)
    try:
        partial.mkdir()
        save_tensors(partial)
        _write(partial / STATE, json.dumps(tree))
        if config is not None:
            _write(partial / CONFIG, json.dumps(config, indent=2))
        if tokenizer is not None:
            _write(partial / TOKENIZER, tokenizer)
        files = {path.name: _fingerprint(path) for path in sorted(partial.iterdir())}
        _write(partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2))
        for path in (*partial.iterdir(), partial):
            _sync(path)
        if folder.exists():
            folder.rename(_aside(folder))
        partial.rename(folder)
        if point:
            _point(folder)
        _clear(folder)
    except (Exception, CheckpointException) as error:
        shutil.rmtree(partial, ignore_errors=True)
        cause = _os_error(error)
        if cause is None:
            raise
        raise LitseekError(
            f"{folder}: the checkpoint could not be written ({cause.strerror or cause}); earlier checkpoints are unharmed."
        ) from error


def load(folder: Path, prefix: str = "") -> dict[str, Any]:
    """The state that `save` was given, every file checked first; with ``prefix`` only that branch (say "state_dict/").

    Errors: LitseekError naming the file that is missing, truncated or damaged.
    """
    verify(folder)
    try:
        rest = json.loads((folder / STATE).read_text(encoding="utf-8"))
        reader = HuggingFaceStorageReader(str(folder))
        found = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(meta.size, dtype=meta.properties.dtype)  # type: ignore[union-attr]
            for name, meta in found.items()
            if name.startswith(prefix)
        }
        if tensors:
            with _alone():
                dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (Exception, CheckpointException) as error:
        raise LitseekError(f"{folder}: not a readable checkpoint ({error}).") from error
    return unflatten(tensors, rest, prefix)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, after every file it names was found whole."""
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
    for name, (size, digest) in files.items():
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


def _save_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """In files of about `SHARD` bytes: each is put together in memory before it is written."""
    if not tensors:
        return
    own: dict[str, Tensor] = {}
    shard: dict[str, int] = {}
    room, seen = 0, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()  # safetensors refuses tensors that share memory
        seen.add(storage.data_ptr())
        if tensor.nbytes > room:
            shard[name], room = max(shard.values(), default=0) + 1, SHARD
        else:
            shard[name] = max(shard.values())
        room -= tensor.nbytes
        own[name] = tensor
    with _alone():
        dcp.save(own, storage_writer=HuggingFaceStorageWriter(str(folder), shard), no_dist=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Without the remark that this is a single process (replicated state is written by rank 0 alone), and without the
    two log lines a tensor that nobody reads."""
    logger = logging.getLogger("c10d-NullHandler-dcp_logger")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    finally:
        logger.setLevel(level)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _fingerprint(path: Path) -> list[Any]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


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


def _os_error(error: BaseException | None) -> OSError | None:
    """The disk's complaint behind an exception; torch.distributed.checkpoint wraps it, in a BaseException."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError):
            return error
        seen.add(id(error))
        for wrapped in getattr(error, "failures", {}).values():
            inner = wrapped[0] if isinstance(wrapped, tuple) else wrapped
            if isinstance(inner, OSError):
                return inner
        error = error.__cause__ or error.__context__
    return None
