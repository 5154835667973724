"""Reading local data files row by row, with the file and line in every complaint."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from litseek.errors import LitseekError

EXTENSIONS = {
    ".txt": "text", ".text": "text", ".md": "text", ".rst": "text", ".py": "text", ".tex": "text", ".html": "text",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl",
    ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
_PACKERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


def kind_of(path: Path) -> str:
    """text, jsonl, csv, parquet or arrow, from the name without its .gz, .xz or .bz2."""
    name = Path(path.stem) if path.suffix in _PACKERS else path
    if name.suffix not in EXTENSIONS:
        allowed = ", ".join(EXTENSIONS)
        raise LitseekError(
            f"{path}: cannot tell the kind of file from its name; known are {allowed}, also with .gz, .xz or .bz2."
        )
    return EXTENSIONS[name.suffix]


def open_bytes(path: Path) -> IO[bytes]:
    """The file's unpacked bytes."""
    try:
        return cast(IO[bytes], _PACKERS.get(path.suffix, lambda p: open(p, "rb"))(path))
    except OSError as e:
        raise LitseekError(f"{path}: cannot be opened: {e.strerror or e}.") from e


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a JSON-lines, CSV, Parquet or Arrow file; place is "file:line" or "file row n"."""
    kind = kind_of(path)
    if kind == "jsonl":
        yield from read_jsonl(path)
    elif kind == "csv":
        with open_bytes(path) as handle:
            reader = csv.DictReader(io.TextIOWrapper(handle, encoding="utf-8", newline=""))
            for row in reader:
                yield f"{path}:{reader.line_num}", row
    elif kind in ("parquet", "arrow"):
        import datasets

        try:
            table = datasets.load_dataset(kind, data_files=str(path), split="train", streaming=True)
            for number, row in enumerate(table):
                yield f"{path} row {number}", row
        except LitseekError:
            raise
        except Exception as e:
            raise LitseekError(f"{path}: cannot be read as {kind}: {' '.join(str(e).split())}.") from e
    else:
        raise LitseekError(f"{path}: a text file has no rows; use a .jsonl, .csv, .parquet or .arrow file.")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", row) for every line; lines end at "\\n" only, since a row may hold U+2028 or "\\r"."""
    number = 0
    with open_bytes(path) as handle:
        try:
            for line in handle:  # bytes are split at b"\n" alone
                number += 1
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, UnicodeDecodeError) as e:
                    raise LitseekError(f"{path}:{number}: not a line of JSON ({e}).") from e
                if not isinstance(row, dict):
                    raise LitseekError(f"{path}:{number}: a row must be a JSON object, not {type(row).__name__}.")
                yield f"{path}:{number}", row
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as e:
            raise LitseekError(f"{path}: damaged or cut short after line {number} ({e}).") from e
