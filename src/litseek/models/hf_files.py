"""Reading and writing folders of safetensors shards one tensor at a time, every damage named by file and tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from litseek.errors import LitseekError
from litseek.models.hf_config import read_json, write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class ShardReader:
    """The tensors of one folder: names, shapes and dtypes at once, contents on demand.

    Opening checks that every shard is there, whole, and holds what the index says it holds; LitseekError otherwise.
    Contents are mapped, not held: a tensor that was read is freed with its last reference.
    """

    def __init__(self, folder: Path, files: Iterable[str] | None = None) -> None:
        """``files``: all safetensors to look into; by default those that the folder's index names."""
        self.folder = folder
        self.info: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._file_of: dict[str, str] = {}
        self._open: tuple[str, Any] | None = None
        weight_map: dict[str, str] = {}
        if files is None:
            weight_map, files = self._index()
        for file in files:
            self._scan(file)
        for name, file in weight_map.items():
            if self._file_of.get(name) != file:
                raise LitseekError(f"{folder / file} lacks the tensor {name} that {INDEX} places there")

    def names(self) -> Iterable[str]:
        """In the order of the files, so that reading in this order goes through the disk once."""
        return self.info.keys()

    def file_of(self, name: str) -> Path:
        return self.folder / self._file_of[name]

    def read(self, name: str, index: tuple[Any, ...] | None = None) -> Tensor:
        """The tensor, or with ``index`` that part of it, without reading the rest."""
        if name not in self._file_of:
            raise LitseekError(f"{self.folder} has no tensor {name}")
        file = self._file_of[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, self._handle(file))
        try:
            return self._open[1].get_tensor(name) if index is None else self._open[1].get_slice(name)[index]
        except (SafetensorError, OSError, RuntimeError) as error:
            raise LitseekError(f"{self.folder / file}: the tensor {name} cannot be read: {error}") from None

    def _index(self) -> tuple[dict[str, str], list[str]]:
        """Where each tensor should be, and the files; without an index there is one file."""
        index = self.folder / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise LitseekError(f"{index} has no weight_map")
            return weight_map, sorted(set(weight_map.values()))
        if (self.folder / SINGLE).is_file():
            return {}, [SINGLE]
        raise LitseekError(f"{self.folder} holds neither {INDEX} nor {SINGLE}")

    def _scan(self, file: str) -> None:
        if Path(file).name != file:
            raise LitseekError(f"{self.folder / INDEX} names the file {file}, allowed are files of the same folder")
        handle = self._handle(file)
        for name in handle.offset_keys():
            part = handle.get_slice(name)
            code = part.get_dtype()
            if code not in _DTYPES:
                raise LitseekError(f"{self.folder / file}: {name} has dtype {code}, allowed are {', '.join(_DTYPES)}")
            if name in self.info:
                raise LitseekError(f"{self.folder / file} holds {name}, and {self._file_of[name]} holds it too")
            self.info[name] = (tuple(part.get_shape()), _DTYPES[code])
            self._file_of[name] = file

    def _handle(self, file: str) -> Any:
        path = self.folder / file
        if not path.is_file():
            raise LitseekError(f"the shard {path} is missing")
        try:
            return safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise LitseekError(f"{path} is damaged or truncated: {error}") from None


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: shape and dtype are known before it is made, so shards can be planned."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: Callable[[], Iterable[Tensor]]
    """Makes the tensor as consecutive pieces of its memory; only one piece is held at a time."""

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(folder: Path, entries: Iterable[Entry], shard_size: int, index: bool = True) -> list[Path]:
    """Write ``entries`` as shards of at most ``shard_size`` bytes (one tensor at least), and the index; the shards.

    Holds one piece of one tensor at a time. The folder must exist; what an error leaves in it is the caller's to remove.
    """
    shards = plan_shards(entries, shard_size)
    files = [folder / shard_name(i, len(shards)) for i in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards):
        write_shard(file, shard)
    if index:
        weight_map = {entry.name: file.name for file, shard in zip(files, shards) for entry in shard}
        write_index(folder, weight_map, sum(entry.num_bytes for shard in shards for entry in shard))
    return files


def plan_shards(entries: Iterable[Entry], shard_size: int) -> list[list[Entry]]:
    """``entries`` in their order, cut where the next one would pass ``shard_size`` bytes."""
    shards: list[list[Entry]] = []
    filled = 0
    for entry in entries:
        if not shards or filled + entry.num_bytes > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    return shards


def shard_name(number: int, count: int) -> str:
    """The release's own names; ``number`` counts from 1."""
    return f"model-{number:05d}-of-{count:06d}.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, str], num_bytes: int) -> None:
    """Which file holds each tensor."""
    write_json(folder / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))})


def write_shard(path: Path, shard: list[Entry], about: Mapping[str, str] | None = None) -> None:
    """One safetensors file: length of the header (8 bytes, little-endian), JSON header, tensors without gaps.

    ``about`` goes into the header. Errors: TypeError for a dtype that such files do not have; OSError of the disk.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(about or {})}}
    offset = 0
    # Wide dtypes lie first, which keeps every tensor aligned to its own width; they are made in the order given.
    for entry in sorted(shard, key=lambda entry: -entry.dtype.itemsize):
        if entry.dtype not in _CODES:
            raise TypeError(
                f"{path} cannot hold {entry.name} of {entry.dtype}: allowed are {', '.join(map(str, _CODES))}."
            )
        span = [offset, offset + entry.num_bytes]
        header[entry.name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for entry in shard:
            file.seek(8 + len(text) + header[entry.name]["data_offsets"][0])
            written = 0
            for part in entry.parts():
                assert part.dtype == entry.dtype, f"{entry.name} is {part.dtype}, planned was {entry.dtype}"
                written += file.write(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
                del part
            assert written == entry.num_bytes, f"{entry.name} has {written} bytes, planned were {entry.num_bytes}"
