"""Pre-training data as an endless, seekable list of rows: ``source[i]`` is a pure function of (seed, i).

Nothing else is remembered between samples, so a run that resumes at sample n repeats nothing and loses nothing.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from litseek.data import tokenizer as bpe
from litseek.data.cache import cached
from litseek.data.corpora import Corpus, Files, StandardLibrary
from litseek.data.documents import Split, SplitCorpus, TokenFile, Transform, tokenized
from litseek.data.mixture import Mixture
from litseek.data.packing import Row, num_windows, score_windows, window
from litseek.data.tokenizer import Tokenizer
from litseek.errors import LitseekError


class TextSource:
    """Documents packed into one stream and cut into windows, without masks between documents (report §4.1).

    ``corpus``: one corpus, or a mapping of names to corpora that ``weights`` mixes (default: by their sizes).
    ``tokenizer``: a ``tokenizer.json`` or its folder; without one, ``vocab_size`` tokens are trained on the corpus.
    The token arrays depend on neither ``seq_len`` nor the seed, so stages of one tokenizer share them.
    """

    def __init__(
        self,
        corpus: Corpus | Mapping[str, Corpus] | None = None,
        *,
        seq_len: int,
        weights: Mapping[str, float] | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        digits: int = 3,
        tokenizer_bytes: int = 100_000_000,
        fim_rate: float = 0.1,
        split_rate: float = 0.1,
        validation_fraction: float = 0.04,
        validation_bytes: int = 400_000,
        transform_seed: int = 0,
    ):
        if seq_len < 1:
            raise ValueError(f"data.seq_len={seq_len} must be at least 1.")
        corpus = StandardLibrary() if corpus is None else corpus
        self.corpora: dict[str, Corpus] = dict(corpus) if isinstance(corpus, Mapping) else {"text": corpus}
        if weights is not None and set(weights) != set(self.corpora):
            raise ValueError(f"data.weights names {sorted(weights)}, but data.corpus has {sorted(self.corpora)}.")
        self.weights = dict(weights) if weights is not None else None
        self.seq_len = seq_len
        self.transform = Transform(fim_rate, split_rate, transform_seed)
        self.split = Split(validation_fraction, validation_bytes)
        self.tokenizer_spec = TokenizerSpec(tokenizer, vocab_size, digits, tokenizer_bytes)
        self.seed = 0
        self.tokenizer: Tokenizer
        self.files: dict[str, TokenFile] = {}

    def set_seed(self, seed: int) -> None:
        """The seed of the order of samples."""
        self.seed = seed

    def use_tokenizer(self, path: str | Path) -> None:
        """The parent stage's tokenizer instead of one trained here; an explicit ``data.tokenizer`` stays."""
        self.tokenizer_spec = self.tokenizer_spec.inherit(path)

    def prepare(self, cache_dir: Path) -> None:
        """Loads or trains the tokenizer and opens the token arrays; everything is cached and may be called again."""
        divided: dict[str, SplitCorpus] = {}

        def parts(name: str) -> SplitCorpus:
            if name not in divided:
                divided[name] = SplitCorpus(self.corpora[name], self._splits[name])
            return divided[name]

        total = sum(self.weights.values()) if self.weights else float(len(self.corpora))
        self._splits = {
            n: Split(self.split.fraction, max(int(self.split.limit * (self.weights[n] if self.weights else 1.0) / total), 1))
            for n in self.corpora
        }
        identity = {n: [c.identity(), vars(self._splits[n])] for n, c in self.corpora.items()}
        self.tokenizer = self.tokenizer_spec.get(
            cache_dir, identity, lambda: (d.text for n in self.corpora for d in parts(n).training())
        )
        self.files = {
            n: tokenized(cache_dir, c, self.tokenizer, self.transform, self._splits[n], divided.get(n))
            for n, c in self.corpora.items()
        }
        self.streams = {n: f.train for n, f in self.files.items()}
        for name, stream in self.streams.items():
            if num_windows(stream, self.seq_len) < 1:
                raise LitseekError(
                    f"Corpus {name!r} has {len(stream)} tokens, too few for one row of data.seq_len={self.seq_len}."
                )
        self._orders: dict[str, tuple[tuple[int, int], int, np.ndarray]] = {}
        self._mixture: Mixture | None = None

    @property
    def num_tokens(self) -> int:
        """Training tokens of all corpora together."""
        return sum(len(s) for s in self.streams.values())

    def __getitem__(self, i: int) -> Row:
        if i < 0:
            raise IndexError(f"sample {i}: samples are numbered from 0.")
        name, j = self.mixture[i] if len(self.streams) > 1 else (next(iter(self.streams)), i)
        stream = self.streams[name]
        per_epoch = num_windows(stream, self.seq_len)
        epoch, within = divmod(j, per_epoch)
        offset, order = self._order(name, epoch, per_epoch)
        return window(stream, (offset + int(order[within]) * self.seq_len) % len(stream), self.seq_len)

    @property
    def mixture(self) -> Mixture:
        if self._mixture is None or self._mixture.seed != self.seed:
            self._mixture = Mixture(self.weights or {n: len(s) for n, s in self.streams.items()}, self.seed)
        return self._mixture

    def _order(self, name: str, epoch: int, per_epoch: int) -> tuple[int, np.ndarray]:
        """(where the epoch's first window begins, the order of its windows)."""
        held = self._orders.get(name)
        if held is None or held[0] != (self.seed, epoch):
            rng = np.random.default_rng([self.seed, epoch, list(self.streams).index(name), self.seq_len])
            held = ((self.seed, epoch), int(rng.integers(len(self.streams[name]))), rng.permutation(per_epoch))
            self._orders[name] = held
        return held[1], held[2]

    # -- the held-out split

    def validation(self) -> list[Row]:
        """Rows over the held-out text in which every token is scored once."""
        stream = np.concatenate([f.held_out for f in self.files.values()])
        return score_windows(stream, self.seq_len, self.tokenizer.pad_id)

    @property
    def validation_text(self) -> bytes:
        return b"".join(f.held_out_text for f in self.files.values())

    @property
    def validation_bytes(self) -> int:
        return len(self.validation_text)


class FileSource(TextSource):
    """``TextSource`` over local files: ``data=jsonl data.files=[a.jsonl.xz,'b/*.jsonl']``."""

    def __init__(self, files: str | Sequence[str], field: str = "text", **text: Any):
        super().__init__(Files(files, field), **text)


class TokenizerSpec:
    """Where the tokenizer comes from: a path, or training with these settings."""

    def __init__(self, path: str | Path | None, vocab_size: int, digits: int = 3, limit: int = 100_000_000):
        self.path, self.vocab_size, self.digits, self.limit = path, vocab_size, digits, limit

    def inherit(self, path: str | Path) -> TokenizerSpec:
        return self if self.path else TokenizerSpec(path, self.vocab_size, self.digits, self.limit)

    def get(self, cache_dir: Path, identity: Any, texts: Any) -> Tokenizer:
        """``texts()`` gives the training texts; ``identity`` names them."""
        if self.path:
            return bpe.load(self.path)

        def build(folder: Path) -> None:
            bpe.train(_first(texts(), self.limit), self.vocab_size, self.digits).save(folder)

        depends_on = ["bpe", 1, identity, self.vocab_size, self.digits, self.limit]
        return bpe.load(cached(cache_dir, "tokenizer", depends_on, build))


def _first(texts: Iterator[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text
        limit -= len(text)


def gzip_bits_per_byte(data: bytes) -> float:
    """What ``gzip -9`` needs for these bytes; receipts state it beside the model's bits per byte."""
    return 8 * len(gzip.compress(data, 9, mtime=0)) / max(len(data), 1)


def xz_bits_per_byte(data: bytes) -> float:
    """What ``xz -9e`` needs for these bytes."""
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / max(len(data), 1)
