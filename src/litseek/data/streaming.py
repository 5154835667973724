"""Pre-training data that is read and packed as it arrives, for corpora too large to store as a token array.

The stream of rows is fixed by the corpus; the seed shuffles it within blocks of ``shuffle_rows`` rows. Rows can be asked
for in any order, cheaply so long as they ascend. Where each block begins is noted in the cache (position in the data,
tokens left over), so that a run that resumes goes there at once; without the notes it reads from the start again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from litseek.data.cache import cached
from litseek.data.corpora import Corpus, Document, HubDataset, fingerprint
from litseek.data.documents import FORMAT, PLAIN, Split, Transform, describe
from litseek.data.packing import Row, window
from litseek.data.sources import TextSource
from litseek.data.tokenizer import Tokenizer
from litseek.errors import LitseekError

NOTE_TOKENS = 2**20
"""About how many tokens lie between two notes of the stream's position."""


class StreamingTextSource(TextSource):
    """``TextSource`` without the token array; the arguments are its own, and

    ``shuffle_rows``: rows a block, the reach of the shuffling. Several corpora need ``weights``. The tokenizer and the
    scored part of the held-out split come from the stream's beginning; what falls into the split is never trained on,
    however far the stream goes. An epoch reads the documents in the same order, with new draws of FIM.
    """

    def __init__(
        self,
        corpus: Corpus | Mapping[str, Corpus] | None = None,
        *,
        shuffle_rows: int = 256,
        tokenizer_chars: int = 20_000_000,
        **text: Any,
    ):
        super().__init__(corpus, tokenizer_chars=tokenizer_chars, **text)
        if shuffle_rows < 1:
            raise ValueError(f"data.shuffle_rows={shuffle_rows} must be at least 1.")
        if len(self.corpora) > 1 and self.weights is None:
            raise ValueError("data.weights is needed to mix several streams, whose sizes are not known.")
        self.shuffle_rows = shuffle_rows
        self.packers: dict[str, Packer] = {}

    def prepare(self, cache_dir: Path) -> None:
        splits = self._splits()
        chars = max(self.tokenizer_spec.limit, int(2 * self.split.limit / self.split.fraction))
        heads = {n: _Head(c, chars) for n, c in self.corpora.items()}
        self.tokenizer = self.tokenizer_spec.get(cache_dir, heads, self.split)
        self._held_out, self._mixture = [], None
        self.packers = {}
        for name, corpus in self.corpora.items():
            self._held_out.append(self._hold_out(cache_dir, name, heads[name], splits[name]))
            depends_on = [FORMAT, corpus.identity(), self.tokenizer.digest, vars(self.transform), self.split.fraction]
            notes = Path(cache_dir) / f"stream-{fingerprint([depends_on, self.seq_len, self.shuffle_rows])}"
            self.packers[name] = Packer(
                corpus, self.tokenizer, self.transform, self.split, self.seq_len, self.shuffle_rows, notes
            )

    def row(self, name: str, j: int) -> Row:
        block, within = divmod(j, self.shuffle_rows)
        rng = np.random.default_rng([self.seed, block, list(self.corpora).index(name)])
        at = int(rng.permutation(self.shuffle_rows)[within])
        return window(self.packers[name].block(block), at * self.seq_len, self.seq_len)

    @property
    def num_tokens(self) -> int:
        raise LitseekError("A stream does not know how many tokens it has.")

    def _mixture_weights(self) -> Mapping[str, float]:
        assert self.weights is not None
        return self.weights

    def _hold_out(self, cache_dir: Path, name: str, head: _Head, split: Split) -> tuple[np.ndarray, bytes]:
        def build(folder: Path) -> None:
            held_out = split.capped(d for d in head.documents() if split.holds_out(d))
            if not held_out:
                raise LitseekError(
                    f"None of the first {len(head.read())} documents of stream {name!r} falls into the held-out split; "
                    f"raise data.validation_fraction={split.fraction} or data.validation_bytes={self.split.limit}."
                )
            np.save(folder / "ids.npy", np.concatenate(PLAIN.encode(held_out, self.tokenizer)).astype(np.int64))
            (folder / "text.txt").write_bytes("".join(d.text for d in held_out).encode())

        depends_on = [FORMAT, head.identity(), self.tokenizer.digest, vars(split)]
        folder = cached(cache_dir, "held-out", depends_on, build)
        return np.load(folder / "ids.npy"), (folder / "text.txt").read_bytes()


class Packer:
    """Blocks of ``num_rows`` x ``length`` + 1 tokens, cut from the documents in their order.

    Block b is a pure function of b. The last token of a block is the first of the next, since it is only a label here.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        transform: Transform,
        split: Split,
        length: int,
        num_rows: int,
        notes: Path,
    ):
        self.corpus, self.tokenizer, self.transform, self.split = corpus, tokenizer, transform, split
        self.size, self.notes = length * num_rows, notes
        self._current: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._next = -1  # the block that the reader stands before

    def block(self, index: int) -> np.ndarray:
        if self._current[0] != index:
            if not 0 <= self._next <= index:
                self._seek(index)
            while self._current[0] != index:
                self._current = (self._next, self._read())
        return self._current[1]

    def _seek(self, index: int) -> None:
        """To the last block at or before ``index`` whose beginning is noted, or to the start."""
        noted = (int(path.stem) for path in self.notes.glob("[0-9]*.npz"))
        at = max((b for b in noted if b <= index), default=0)
        self._next, self._left = at, np.empty(0, dtype=np.int64)
        self._reader = Reader(self.corpus)
        if at:
            with np.load(self._note(at), allow_pickle=False) as note:
                self._left = note["left"]
                self._reader = Reader(self.corpus, json.loads(str(note["state"])))

    def _read(self) -> np.ndarray:
        parts, have = [self._left], len(self._left)
        while have <= self.size:
            documents = self._reader.take(self.size + 1 - have, self.split)
            encoded = self.transform.encode(documents, self.tokenizer, self._reader.epoch_taken)
            parts += encoded
            have += sum(map(len, encoded))
        stream = np.concatenate(parts)
        self._left = stream[self.size :]
        self._next += 1
        self._write_note()
        return stream[: self.size + 1]

    def _note(self, block: int) -> Path:
        return self.notes / f"{block:09d}.npz"

    def _write_note(self) -> None:
        path = self._note(self._next)
        if self._next % max(1, NOTE_TOKENS // self.size) or path.is_file():
            return
        draft = path.with_name(f".{os.getpid()}-{path.name}")
        try:
            self.notes.mkdir(parents=True, exist_ok=True)
            np.savez(draft, left=self._left, state=np.array(json.dumps(self._reader.state())))
            os.replace(draft, path)
        except OSError as e:
            draft.unlink(missing_ok=True)
            raise LitseekError(f"{path}: cannot note the stream's position: {e.strerror or e}.") from e


class Reader:
    """Documents of a corpus over and over, and the place to go on from as plain data."""

    def __init__(self, corpus: Corpus, state: dict[str, Any] | None = None):
        state = state or {"epoch": 0, "number": 0, "inner": None}
        self.corpus = corpus
        self.epoch, self.number = int(state["epoch"]), int(state["number"])
        self.epoch_taken = self.epoch
        """The epoch that the documents of the last ``take`` belong to."""
        self._open(state["inner"])

    def _open(self, inner: Any) -> None:
        self._dataset = self.corpus.load() if isinstance(self.corpus, HubDataset) else None
        if isinstance(self.corpus, HubDataset):
            self._documents = self.corpus.read(self._dataset, self.number, inner)
        else:
            self._documents = islice(self.corpus.documents(), self.number, None)

    def take(self, chars: int, split: Split) -> list[Document]:
        """The next training documents of one epoch, about ``chars`` characters of them, at least one."""
        taken: list[Document] = []
        fruitless = False
        while not taken:
            self.epoch_taken = self.epoch
            for document in self._documents:
                self.number += 1
                if split.holds_out(document):
                    continue
                taken.append(document)
                chars -= len(document.text)
                if chars <= 0:
                    return taken
            if self.number == 0:
                raise LitseekError(f"The corpus is empty: {describe(self.corpus)} has no document with text in it.")
            if not taken and fruitless:
                raise LitseekError(
                    f"Every document of {describe(self.corpus)} falls into the held-out split, so none is left to train "
                    f"on; lower data.validation_fraction={split.fraction}."
                )
            fruitless = not taken
            self.epoch, self.number = self.epoch + 1, 0
            self._open(None)
        return taken

    def state(self) -> dict[str, Any]:
        inner = None if self._dataset is None else getattr(self._dataset, "state_dict", lambda: None)()
        return {"epoch": self.epoch, "number": self.number, "inner": inner}


class _Head:
    """The beginning of a corpus, about so many characters of it, read once and only if asked for."""

    def __init__(self, corpus: Corpus, chars: int):
        self.corpus, self.chars = corpus, chars
        self._kept: list[Document] | None = None

    def identity(self) -> dict[str, Any]:
        return {"first": self.chars, "of": self.corpus.identity()}

    def documents(self) -> Iterator[Document]:
        return iter(self.read())

    def read(self) -> list[Document]:
        if self._kept is None:
            self._kept, left = [], self.chars
            for document in self.corpus.documents():
                self._kept.append(document)
                left -= len(document.text)
                if left <= 0:
                    break
        return self._kept
