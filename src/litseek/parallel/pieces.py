"""Tensors of a checkpoint, whole or spread over ranks: torch.distributed.checkpoint plans, safetensors files hold them.

A piece is always rows [start, start + length) along dim 0 of a global tensor. Files of one process are ordinary
safetensors; those of several carry, in their header, where each piece begins, as torch.distributed.checkpoint has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import _save_state_dict
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from litseek.errors import LitseekError
from litseek.models.hf_files import Entry, plan_shards, shard_name, write_shard
from litseek.parallel.agree import Group, rank_in

SHARD = 2**30
"""Bytes of tensors in one file."""
Rows = tuple[int, int]
"""(start, length) along dim 0; (0, anything) of a tensor without dimensions is all of it."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, start + len(tensor)) along dim 0 of a global tensor of ``shape``; may be empty."""

    tensor: Tensor
    start: int
    shape: tuple[int, ...]
    writes: bool = True
    """False where another rank writes the same rows. Rows that two ranks would write are written by the lower one."""

    def __post_init__(self) -> None:
        own, whole = tuple(self.tensor.shape), tuple(self.shape)
        assert own[1:] == whole[1:] and len(own) == len(whole), f"{own} are no rows of {whole}"
        assert not own or 0 <= self.start <= whole[0] - own[0], f"rows {self.rows} of {whole}"

    @classmethod
    def whole(cls, tensor: Tensor) -> Piece:
        return cls(tensor, 0, tuple(tensor.shape))

    @property
    def rows(self) -> Rows:
        return self.start, (self.tensor.shape[0] if self.shape else 1)

    @property
    def written(self) -> bool:
        """Empty pieces are not, unless the tensor itself is empty."""
        return self.writes and (not self.shape or self.tensor.shape[0] > 0 or self.shape[0] == 0)

    @property
    def chunk(self) -> ChunkStorageMetadata:
        offsets = (self.start, *[0] * (len(self.shape) - 1)) if self.shape else ()
        return ChunkStorageMetadata(torch.Size(offsets), self.tensor.shape)


def save_pieces(folder: Path, pieces: Mapping[str, Piece], group: Group = None) -> list[Path]:
    """Write what this rank has to write, as files of about `SHARD` bytes; the files.

    All ranks of ``group`` call it together. Errors, on all of them: the OSError of a disk, or RuntimeError where the
    pieces of all ranks do not make up whole tensors.
    """
    files = _Files(folder, group)
    try:
        _save_state_dict(
            dict(pieces), storage_writer=files, process_group=group, no_dist=group is None, planner=_SavePlanner()
        )
    except CheckpointException as error:  # a BaseException, which holds the errors of all ranks
        raise os_error(error) or RuntimeError(str(error)) from error
    return files.written


class Stored:
    """The tensors in a checkpoint's files: names, shapes and dtypes at once, rows on demand, without reading others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = HuggingFaceStorageReader(str(folder))
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:
            raise LitseekError(f"{folder}: not a readable checkpoint ({error}).") from error
        self._reader.read_metadata = lambda: self._metadata  # type: ignore[method-assign]  # opens every file
        self.found: dict[str, TensorStorageMetadata] = self._metadata.state_dict_metadata  # type: ignore[assignment]

    def names(self) -> list[str]:
        return list(self.found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.found[name].size)

    def read(self, wanted: Mapping[str, Rows]) -> dict[str, Tensor]:
        """These rows of these tensors. Errors: LitseekError naming the tensor whose rows are not all there."""
        pieces = {name: self._empty(name, rows) for name, rows in wanted.items()}
        planner = _LoadPlanner()
        try:
            _load_state_dict(dict(pieces), storage_reader=self._reader, no_dist=True, planner=planner)
        except (Exception, CheckpointException) as error:
            raise LitseekError(f"{self.folder}: not a readable checkpoint ({error}).") from error
        for name, piece in pieces.items():
            if planner.elements[name] != piece.tensor.numel():
                raise LitseekError(f"{self.folder}: '{name}' lacks some of its rows {piece.rows}.")
        return {name: piece.tensor for name, piece in pieces.items()}

    def tensor(self, name: str) -> Tensor:
        """The whole of it."""
        return self.read({name: (0, self.shape(name)[0] if self.shape(name) else 1)})[name]

    def _empty(self, name: str, rows: Rows) -> Piece:
        if name not in self.found:
            raise LitseekError(f"{self.folder} has no tensor '{name}'.")
        whole, dtype = self.shape(name), self.found[name].properties.dtype
        shape = (rows[1], *whole[1:]) if whole else ()
        return Piece(torch.empty(shape, dtype=dtype), rows[0], whole)


def os_error(error: BaseException | None) -> OSError | None:
    """The disk's complaint behind an exception of torch.distributed.checkpoint, which wraps that of any rank."""
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


class _SavePlanner(DefaultSavePlanner):
    """Every piece that a rank writes is an item; the first rank checks that they make up whole tensors."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, dedup_save_to_lowest_rank=True)

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.pieces: dict[str, Piece] = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(name, piece) for name, piece in self.pieces.items() if piece.written])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].tensor


class _LoadPlanner(DefaultLoadPlanner):
    """The overlap of each wanted piece with the pieces in the files."""

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        assert metadata is not None
        self.pieces: dict[str, Piece] = state_dict
        self.found: dict[str, TensorStorageMetadata] = metadata.state_dict_metadata  # type: ignore[assignment]
        self.elements = dict.fromkeys(state_dict, 0)

    def create_local_plan(self) -> LoadPlan:
        items = []
        for name, piece in self.pieces.items():
            if piece.tensor.numel():
                found = create_read_items_for_chunk_list(name, self.found[name], [piece.chunk])
                self.elements[name] = sum(math.prod(item.lengths) for item in found)
                items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].tensor


class _Files(StorageWriter):
    """One rank's safetensors files. torch's own writer puts a whole file together in memory, and holds Python's lock
    meanwhile; here a tensor goes to the disk as it is, and the training beside it is not held up."""

    def __init__(self, folder: Path, group: Group) -> None:
        self.folder, self.prefix = folder, "" if group is None else f"rank-{rank_in(group):05d}-"
        self.written: list[Path] = []

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        shards = plan_shards([_entry(item, planner) for item in plan.items], SHARD)
        offsets = {item.index.fqn: {"saved_offsets": list(item.index.offset or ())} for item in plan.items}
        for i, shard in enumerate(shards, start=1):
            self.written.append(self.folder / (self.prefix + shard_name(i, len(shards))))
            spread = {entry.name: offsets[entry.name] for entry in shard}
            about = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(spread)} if self.prefix else {}
            write_shard(self.written[-1], shard, about)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _item(name: str, piece: Piece) -> WriteItem:
    properties = TensorProperties(dtype=piece.tensor.dtype)
    data = TensorWriteData(piece.chunk, properties, torch.Size(piece.shape))
    return WriteItem(MetadataIndex(name, piece.chunk.offsets), WriteItemType.SHARD, tensor_data=data)


def _entry(item: WriteItem, planner: SavePlanner) -> Entry:
    assert item.tensor_data is not None
    shape, dtype = tuple(item.tensor_data.chunk.sizes), item.tensor_data.properties.dtype
    return Entry(item.index.fqn, shape, dtype, partial(_held, item, planner))


def _held(item: WriteItem, planner: SavePlanner) -> list[Tensor]:
    return [planner.resolve_data(item)]  # type: ignore[list-item]  # no items of bytes are planned
