"""Where text comes from: the standard library by default, local files of any usual kind, or a hub dataset.

A corpus yields documents in a fixed order, and states an identity: plain data that changes when its content does, so
that whatever was computed from it can be cached.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, Protocol

from litseek.data.files import kind_of, open_bytes, rows
from litseek.errors import LitseekError


@dataclass(frozen=True)
class Document:
    """One text, and the name by which a message can point at it."""

    name: str
    text: str

    @property
    def digest(self) -> int:
        """64 bits of the text's SHA-256: what decides the held-out split and seeds the document's draws."""
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:8], "big")


class Corpus(Protocol):
    """Documents in a fixed order."""

    def identity(self) -> dict[str, Any]: ...

    def documents(self) -> Iterator[Document]: ...


SKIPPED = {"site-packages", "dist-packages", "__pycache__"}
TESTS = {"test", "tests", "idle_test"}


class StandardLibrary:
    """The running Python's own sources and its language reference (``pydoc_data/topics.py``). Needs no download.

    ``tests`` adds the test packages, which more than double it; ``packages`` keeps only these top-level names
    (``[json, email]``), for something very small.
    """

    def __init__(self, tests: bool = False, packages: Sequence[str] | None = None):
        self.root = Path(sysconfig.get_path("stdlib"))
        self.tests = tests
        self.packages = sorted(packages) if packages else None
        if not self.root.is_dir():
            raise LitseekError(f"The standard library's folder {self.root} does not exist.")

    def paths(self) -> list[Path]:
        skipped = SKIPPED if self.tests else SKIPPED | TESTS
        found = []
        for folder, below, names in os.walk(self.root):
            top = Path(folder) == self.root
            below[:] = sorted(b for b in below if b not in skipped and not (top and self._left_out(b)))
            sources = (n for n in names if n.endswith(".py") and not (top and self._left_out(n)))
            found += [Path(folder, n) for n in sources]
        return sorted(found)

    def _left_out(self, name: str) -> bool:
        return self.packages is not None and name.removesuffix(".py") not in self.packages

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for doc in self.documents():
            digest.update(f"{doc.name}\0{len(doc.text)}\0".encode())
            digest.update(doc.text.encode())
        return {"corpus": "stdlib", "sha256": digest.hexdigest()}

    def documents(self) -> Iterator[Document]:
        for path in self.paths():
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a handful of files in older encodings, kept as test material
                continue
            if text.strip():
                yield Document(path.relative_to(self.root).as_posix(), text)


class Files:
    """Local files: text, JSON lines, CSV, Parquet or Arrow, plain or packed (.gz, .xz, .bz2).

    ``files``: paths and glob patterns. A text file is one document; in the other kinds each row's ``field`` is one.
    """

    def __init__(self, files: str | Sequence[str], field: str = "text"):
        patterns = [files] if isinstance(files, str) else [str(f) for f in files]
        if not patterns:
            raise ValueError("data.files is empty: it needs at least one path or glob pattern.")
        self.field = field
        self.paths: list[Path] = []
        for pattern in patterns:
            found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
            if not found:
                raise LitseekError(f"data.files: {pattern!r} matches no file.")
            self.paths += [Path(f) for f in found if Path(f).is_file()]
        for path in self.paths:
            kind_of(path)

    def identity(self) -> dict[str, Any]:
        stats = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self.paths]
        return {"corpus": "files", "field": self.field, "files": stats}

    def documents(self) -> Iterator[Document]:
        for path in self.paths:
            if kind_of(path) == "text":
                with open_bytes(path) as handle:
                    text = _decode(handle, path)
                if text.strip():
                    yield Document(path.name, text)
                continue
            for place, row in rows(path):
                if self.field not in row:
                    raise LitseekError(f"{place}: no field {self.field!r}; this row has {', '.join(sorted(row))}.")
                text = row[self.field]
                if not isinstance(text, str):
                    raise LitseekError(f"{place}: field {self.field!r} holds {type(text).__name__}, not text.")
                if text.strip():
                    yield Document(place, text)


class HubDataset:
    """Any dataset that ``datasets`` can load, from the hub or from local builders.

    ``path``, ``name``, ``split``, ``revision`` and ``data_files`` go to ``datasets.load_dataset``. ``streaming`` reads
    it as it arrives instead of storing all of it first. ``limit``: at most this many documents.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "train",
        field: str = "text",
        revision: str | None = None,
        data_files: Any = None,
        streaming: bool = True,
        limit: int | None = None,
    ):
        self.field, self.limit = field, limit
        self.arguments = {
            "path": path, "name": name, "split": split, "revision": revision, "data_files": data_files,
            "streaming": streaming,
        }  # fmt: skip

    def load(self) -> Any:
        """The ``datasets`` object itself, for callers that resume from its own state."""
        import datasets

        with self._one_sentence("cannot load"):
            dataset = datasets.load_dataset(**self.arguments)
        return dataset if self.limit is None else dataset.take(self.limit)

    def identity(self) -> dict[str, Any]:
        return {"corpus": "hub", "field": self.field, "limit": self.limit, **self.arguments}

    def documents(self) -> Iterator[Document]:
        return self.read(self.load(), 0, None)

    def read(self, dataset: Any, number: int, state: Any) -> Iterator[Document]:
        """Documents after the first ``number``; ``state`` is the ``datasets`` stream's own record of that place."""
        if state is not None:
            dataset.load_state_dict(state)
            return self._read(dataset, number)
        return islice(self._read(dataset, 0), number, None)

    def _read(self, dataset: Any, start: int) -> Iterator[Document]:
        name, rows = self.arguments["path"], iter(dataset)
        for number in count(start):
            with self._one_sentence("cannot go on reading"):
                row = next(rows, None)
            if row is None:
                return
            text = row.get(self.field)
            if not isinstance(text, str):
                fields = ", ".join(sorted(row))
                raise LitseekError(f"{name} row {number}: no text in field {self.field!r}; the fields are {fields}.")
            if text.strip():
                yield Document(f"{name}:{number}", text)

    @contextmanager
    def _one_sentence(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as e:  # datasets raises a dozen unrelated types, some over many lines
            reason = " ".join(str(e.__cause__ or e).split()) or type(e).__name__
            raise LitseekError(f"datasets {what} {self.arguments['path']!r}: {reason}") from e


def _decode(handle: IO[bytes], path: Path) -> str:
    try:
        return handle.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise LitseekError(f"{path}: not UTF-8 text (byte {e.start}).") from e
    except (OSError, EOFError, ValueError) as e:
        raise LitseekError(f"{path}: cannot be unpacked: {e}.") from e


def fingerprint(value: Any) -> str:
    """20 hex digits that name a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]
