"""Pre-training data as an endless, seekable list of rows: ``source[i]`` is a pure function of (seed, i).

Nothing else is remembered between samples, so a run that resumes at sample n repeats nothing and loses nothing.
"""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from litseek.data.corpora import Corpus, Files, StandardLibrary
from litseek.data.documents import Split, SplitCorpus, Transform, tokenized
from litseek.data.mixture import Mixture
from litseek.data.packing import Row, num_windows, score_windows, window
from litseek.data.tokenizer import Tokenizer
from litseek.data.tokenizer_spec import TokenizerSpec
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
        tokenizer_chars: int = 100_000_000,
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
        if not self.corpora:
            raise ValueError("data.corpus is empty: it needs at least one corpus.")
        if weights is not None and set(weights) != set(self.corpora):
            raise ValueError(f"data.weights names {sorted(weights)}, but data.corpus has {sorted(self.corpora)}.")
        self.weights = dict(weights) if weights is not None else None
        self.seq_len = seq_len
        self.transform = Transform(fim_rate, split_rate, transform_seed)
        self.split = Split(validation_fraction, validation_bytes)
        self.tokenizer_spec = TokenizerSpec(tokenizer, vocab_size, digits, tokenizer_chars)
        self.seed = 0
        self.tokenizer: Tokenizer
        self.streams: dict[str, np.ndarray] = {}
        self._held_out: list[tuple[np.ndarray, bytes]] = []
        self._orders: dict[str, tuple[tuple[int, int], int, np.ndarray]] = {}
        self._mixture: Mixture | None = None

    def set_seed(self, seed: int) -> None:
        """The seed of the order of samples."""
        self.seed = seed

    def use_tokenizer(self, path: str | Path) -> None:
        """The parent stage's tokenizer instead of one trained here; an explicit ``data.tokenizer`` stays."""
        self.tokenizer_spec = self.tokenizer_spec.inherit(path)

    def prepare(self, cache_dir: Path) -> None:
        """Loads or trains the tokenizer and opens the token arrays; everything is cached and may be called again."""
        divided = _Divided(self.corpora, self._splits())
        self.tokenizer = self.tokenizer_spec.get(cache_dir, self.corpora, self.split, divided)
        files = [
            tokenized(cache_dir, c, self.tokenizer, self.transform, divided.splits[n], partial(divided.__getitem__, n))
            for n, c in self.corpora.items()
        ]
        self.streams = dict(zip(self.corpora, (f.train for f in files)))
        self._held_out = [(f.held_out, f.held_out_text) for f in files]
        self._orders, self._mixture = {}, None
        for name, stream in self.streams.items():
            if num_windows(stream, self.seq_len) < 1:
                raise LitseekError(
                    f"Corpus {name!r} has {len(stream)} tokens, too few for one row of data.seq_len={self.seq_len}."
                )

    @property
    def num_tokens(self) -> int:
        """Training tokens of all corpora together."""
        return sum(len(s) for s in self.streams.values())

    def __getitem__(self, i: int) -> Row:
        if i < 0:
            raise IndexError(f"sample {i}: samples are numbered from 0.")
        if len(self.corpora) == 1:
            return self.row(next(iter(self.corpora)), i)
        if self._mixture is None or self._mixture.seed != self.seed:
            self._mixture = Mixture(self._mixture_weights(), self.seed)
        return self.row(*self._mixture[i])

    def row(self, name: str, j: int) -> Row:
        """The j-th row of one corpus: every epoch begins elsewhere in the stream and shuffles its windows anew."""
        stream = self.streams[name]
        per_epoch = num_windows(stream, self.seq_len)
        epoch, within = divmod(j, per_epoch)
        held = self._orders.get(name)
        if held is None or held[0] != (self.seed, epoch):
            rng = np.random.default_rng([self.seed, epoch, list(self.corpora).index(name), self.seq_len])
            held = ((self.seed, epoch), int(rng.integers(len(stream))), rng.permutation(per_epoch))
            self._orders[name] = held
        _, offset, order = held
        return window(stream, (offset + int(order[within]) * self.seq_len) % len(stream), self.seq_len)

    # -- the held-out split

    def validation(self) -> list[Row]:
        """Rows over the held-out text in which every token is scored once, the ends of documents included: they are
        no bytes of the text, so bits per byte errs against the model."""
        stream = np.concatenate([ids for ids, _ in self._held_out])
        return score_windows(stream, self.seq_len, self.tokenizer.pad_id)

    @property
    def validation_text(self) -> bytes:
        return b"".join(text for _, text in self._held_out)

    @property
    def validation_bytes(self) -> int:
        return len(self.validation_text)

    # -- details

    def _mixture_weights(self) -> Mapping[str, float]:
        return self.weights or {n: len(s) for n, s in self.streams.items()}

    def _splits(self) -> dict[str, Split]:
        """Each corpus has its share of ``validation_bytes``."""
        weights = self.weights or dict.fromkeys(self.corpora, 1.0)
        total = sum(weights.values())
        limits = {n: max(int(self.split.limit * w / total), 1) for n, w in weights.items()}
        return {n: Split(self.split.fraction, limits[n]) for n in self.corpora}


class FileSource(TextSource):
    """``TextSource`` over local files: ``data=jsonl data.files=[a.jsonl.xz,'b/*.jsonl']``."""

    def __init__(self, files: str | Sequence[str], field: str = "text", **text: Any):
        if "corpus" in text:  # a preset may have set it for the standard library
            raise ValueError(
                "data.corpus goes with data=stdlib, this source reads data.files: leave the key, or the preset that sets it, out."
            )
        super().__init__(Files(files, field), **text)


class _Divided(Mapping[str, SplitCorpus]):
    """Corpora divided into training and held-out part, each read through when first asked for."""

    def __init__(self, corpora: Mapping[str, Corpus], splits: Mapping[str, Split]):
        self.corpora, self.splits = corpora, splits
        self._made: dict[str, SplitCorpus] = {}

    def __getitem__(self, name: str) -> SplitCorpus:
        if name not in self._made:
            self._made[name] = SplitCorpus(self.corpora[name], self.splits[name])
        return self._made[name]

    def __iter__(self) -> Any:
        return iter(self.corpora)

    def __len__(self) -> int:
        return len(self.corpora)


def gzip_bits_per_byte(data: bytes) -> float:
    """What ``gzip -9`` needs for these bytes; receipts state it beside the model's bits per byte."""
    return 8 * len(gzip.compress(data, 9, mtime=0)) / max(len(data), 1)


def xz_bits_per_byte(data: bytes) -> float:
    """What ``xz -9e`` needs for these bytes."""
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / max(len(data), 1)
