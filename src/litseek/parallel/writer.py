"""Checkpoints written in the background: tensors are copied to host memory, training goes on, a thread writes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litseek.parallel import storage
from litseek.parallel.agree import Group
from litseek.parallel.pieces import Piece

ALIGNMENT = 64
"""Bytes; every copied tensor begins at a multiple."""


class CheckpointWriter:
    """One save at a time: the next one waits for the former, and raises its error.

    ``group`` is a gloo group that nobody else uses, since its collectives run in the thread beside the training's.
    All ranks call all methods together. Without ``background`` a save returns when everything is on the disk.
    """

    def __init__(self, background: bool = True, group: Group = None) -> None:
        self.background, self.group = background, group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def save(self, folder: Path, state: Mapping[str, Any], **files: Any) -> None:
        """`storage.save`, of the state as it is now. Raises what the former save, if it is not finished yet, failed of."""
        self.finish()
        pieces, tree = storage.prepare(state, self.group)
        if not self.background:
            storage.write_prepared(folder, pieces, tree, group=self.group, **files)
            return
        held, copied = self._copy({name: piece for name, piece in pieces.items() if piece.written})

        def write() -> None:
            if copied is not None:
                copied.synchronize()
            storage.write_prepared(folder, held, tree, group=self.group, **files)

        self._pending = self._thread.submit(write)

    def finish(self) -> None:
        """Wait until the last save is on the disk. Raises its error, on every rank the same."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """`finish`, and give the memory back."""
        try:
            self.finish()
        finally:
            self._thread.shutdown()
            self._release()

    def _copy(self, pieces: Mapping[str, Piece]) -> tuple[dict[str, Piece], torch.cuda.Event | None]:
        """The pieces in host memory that is kept from save to save, and the event that they are all there.

        The copies are queued like any kernel: what the next step does to the tensors comes after them.
        """
        sizes = {name: -(-piece.tensor.nbytes // ALIGNMENT) * ALIGNMENT for name, piece in pieces.items()}
        on_gpu = any(piece.tensor.is_cuda for piece in pieces.values())
        self._reserve(sum(sizes.values()), on_gpu)
        held, place = {}, 0
        for name, piece in pieces.items():
            copy = _view(self._memory[place : place + piece.tensor.nbytes], piece.tensor)
            copy.copy_(piece.tensor.detach(), non_blocking=True)
            held[name] = Piece(copy, piece.start, piece.shape)
            place += sizes[name]
        return held, torch.cuda.current_stream().record_event() if on_gpu else None

    def _reserve(self, num_bytes: int, pinned: bool) -> None:
        if self._memory.numel() >= num_bytes and self._pinned == pinned:
            return
        self._release()
        self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        if pinned and num_bytes:
            # torch's own pinned memory comes in powers of two, which may be twice of what is needed
            _check(torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), num_bytes, 0))
            self._pinned = True

    def _release(self) -> None:
        if self._pinned:
            _check(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr()))
        self._memory, self._pinned = torch.empty(0, dtype=torch.uint8), False


def _view(memory: Tensor, like: Tensor) -> Tensor:
    return memory.view(like.dtype).view(like.shape)


def _check(error: Any) -> None:
    if int(error):
        raise RuntimeError(f"The host memory of checkpoints could not be pinned (CUDA error {int(error)}).")
