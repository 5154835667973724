"""Documents to token ids: the held-out split, FIM, random splitting, and the cached token array.

What is drawn at random here (FIM, its cut points, the splits) depends on ``transform_seed`` and the document's text
alone. So every stage, and every run seed, shares one token array.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litseek.data import fim
from litseek.data.cache import cached
from litseek.data.corpora import Corpus, Document
from litseek.data.tokenizer import Tokenizer
from litseek.errors import LitseekError

FORMAT = 1
"""Raised when the meaning of the cached arrays changes."""
BATCH_CHARS = 2_000_000


@dataclass(frozen=True)
class Split:
    """Which documents are held out: those whose digest lies in the lowest ``fraction`` of all digests.

    A document keeps its side in every corpus, at every size and in every stage. At most ``limit`` bytes of them are
    scored (in the order of digests, the last one cut at a line); what is held out beyond that is never trained on
    either. Where no document falls into the split (a corpus of a few large files), the last ``fraction`` of the longest
    document's lines is held out.
    """

    fraction: float = 0.04
    limit: int = 400_000

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"data.validation_fraction={self.fraction} must lie between 0 and 1.")
        if self.limit < 1:
            raise ValueError(f"data.validation_bytes={self.limit} must be at least 1.")

    def holds_out(self, document: Document) -> bool:
        return document.digest < self.fraction * 2**64

    def cut_tail(self, document: Document) -> tuple[Document, Document]:
        """(what is trained on, what is held out) of one long document."""
        size = max(int(len(document.text) * self.fraction), 1)
        at = document.text.find("\n", len(document.text) - size - 1) + 1
        if at <= 0 or at >= len(document.text):
            at = max(len(document.text) - size, 1)
        return Document(document.name, document.text[:at]), Document(document.name, document.text[at:])

    def capped(self, held_out: Iterable[Document]) -> list[Document]:
        """The held-out documents that are scored: by digest, up to ``limit`` bytes."""
        kept: list[Document] = []
        room = self.limit
        for document in sorted(held_out, key=lambda d: d.digest):
            data = document.text.encode()
            if len(data) > room:
                data = data[:room]
                data = data[: data.rfind(b"\n") + 1] or data
                text = data.decode("utf-8", errors="ignore")  # the cut may fall inside a character
                return [*kept, Document(document.name, text)] if text else kept
            kept.append(document)
            room -= len(data)
        return kept


class SplitCorpus:
    """A corpus with its held-out part set aside."""

    def __init__(self, corpus: Corpus, split: Split):
        self.corpus, self.split = corpus, split
        self.held_out: list[Document] = []
        self._cut: int | None = None
        found, longest, num = [], (0, -1), 0
        for num, document in enumerate(corpus.documents(), start=1):
            longest = max(longest, (len(document.text), -num))
            if split.holds_out(document):
                found.append(document)
        if num == 0:
            raise LitseekError(f"The corpus is empty: {describe(corpus)} has no document with text in it.")
        if found and len(found) < num:
            self.held_out = split.capped(found)
        else:
            self._cut = -longest[1]
            tails = [split.cut_tail(d)[1] for n, d in enumerate(corpus.documents(), 1) if n == self._cut]
            self.held_out = split.capped(tails)

    def training(self) -> Iterator[Document]:
        for number, document in enumerate(self.corpus.documents(), start=1):
            if self._cut is not None:
                yield self.split.cut_tail(document)[0] if number == self._cut else document
            elif not self.split.holds_out(document):
                yield document


@dataclass(frozen=True)
class Transform:
    """What happens to a training document: FIM and the splitting of joined tokens, both at a rate."""

    fim_rate: float = 0.1
    split_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("fim_rate", "split_rate"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"data.{key}={getattr(self, key)} must lie in 0..1.")

    def encode(self, documents: list[Document], tokenizer: Tokenizer, epoch: int = 0) -> list[np.ndarray]:
        """Ids of each document: BOS, the text or its FIM arrangement, EOS."""
        rngs = [np.random.default_rng([self.seed, epoch, d.digest]) for d in documents]
        cuts = [fim.draw(d.text, self.fim_rate, rng) for d, rng in zip(documents, rngs, strict=True)]
        texts: list[str] = []
        for document, cut in zip(documents, cuts, strict=True):
            texts += cut if cut else [document.text]
        encoded = iter(tokenizer.encode_batch(texts))
        result = []
        for cut, rng in zip(cuts, rngs, strict=True):
            if cut:
                ids = fim.arrange((next(encoded), next(encoded), next(encoded)), tokenizer)
            else:
                ids = [*next(encoded), tokenizer.eos_id]
            result.append(tokenizer.split_joined([tokenizer.bos_id, *ids], self.split_rate, rng))
        return result


PLAIN = Transform(fim_rate=0.0, split_rate=0.0)
"""For held-out text: scored as it is."""


@dataclass(frozen=True)
class TokenFile:
    """One corpus as token ids on disk."""

    folder: Path

    @property
    def meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    @property
    def train(self) -> np.ndarray:
        """All training documents one after another, memory-mapped."""
        return np.memmap(self.folder / "train.bin", dtype=self.meta["dtype"], mode="r")

    @property
    def held_out(self) -> np.ndarray:
        return np.fromfile(self.folder / "held_out.bin", dtype=self.meta["dtype"])

    @property
    def held_out_text(self) -> bytes:
        return (self.folder / "held_out.txt").read_bytes()


def tokenized(
    cache_dir: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    transform: Transform,
    split: Split,
    divided: Callable[[], SplitCorpus] | None = None,
) -> TokenFile:
    """The corpus as token ids, computed once per (corpus, tokenizer, transform, split)."""
    identity = corpus.identity()
    depends_on = [FORMAT, identity, tokenizer.digest, vars(transform), vars(split)]

    def build(folder: Path) -> None:
        parts = divided() if divided else SplitCorpus(corpus, split)
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        num_documents = num_tokens = 0
        with open(folder / "train.bin", "wb") as out:
            for batch in batched(parts.training()):
                for ids in transform.encode(batch, tokenizer):
                    ids.astype(dtype).tofile(out)
                    num_documents, num_tokens = num_documents + 1, num_tokens + len(ids)
        held = PLAIN.encode(parts.held_out, tokenizer)
        np.concatenate(held).astype(dtype).tofile(folder / "held_out.bin")
        text = "".join(d.text for d in parts.held_out).encode()
        (folder / "held_out.txt").write_bytes(text)
        meta = {
            "dtype": dtype, "documents": num_documents, "tokens": num_tokens, "corpus": identity,
            "tokenizer": tokenizer.digest, "transform": vars(transform), "split": vars(split),
            "held_out_documents": [d.name for d in parts.held_out], "held_out_bytes": len(text),
        }  # fmt: skip
        (folder / "meta.json").write_text(json.dumps(meta, indent=1, default=str))

    return TokenFile(cached(cache_dir, "tokens", depends_on, build))


def batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents of about ``BATCH_CHARS`` characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def describe(corpus: Corpus) -> str:
    """What a message calls a corpus: its files, else its kind."""
    corpus = getattr(corpus, "corpus", corpus)  # what a wrapper wraps
    paths = getattr(corpus, "paths", None)
    if not isinstance(paths, list):
        return type(corpus).__name__
    return ", ".join(map(str, paths[:3])) + (", …" if len(paths) > 3 else "")
