"""Which tokenizer a data source uses: one from a file, or one trained on a corpus and kept in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from litseek.data import tokenizer as bpe
from litseek.data.cache import cached
from litseek.data.corpora import Corpus
from litseek.data.documents import Split, SplitCorpus
from litseek.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizerSpec:
    """``path`` if there is one, else ``vocab_size`` tokens trained on at most ``limit`` characters of a corpus."""

    path: str | Path | None
    vocab_size: int
    digits: int
    limit: int

    def inherit(self, path: str | Path) -> TokenizerSpec:
        """The same with a parent stage's tokenizer, unless one was named."""
        return self if self.path else replace(self, path=path)

    def get(
        self,
        cache_dir: Path,
        corpora: Mapping[str, Corpus],
        split: Split,
        divided: Mapping[str, SplitCorpus] | None = None,
    ) -> Tokenizer:
        """Loads it, or trains it on what the split leaves for training."""
        if self.path:
            return bpe.load(self.path)

        def build(folder: Path) -> None:
            parts = divided or {n: SplitCorpus(c, split) for n, c in corpora.items()}
            texts = (d.text for d in chain.from_iterable(parts[n].training() for n in corpora))
            bpe.train(_first(texts, self.limit), self.vocab_size, self.digits).save(folder)

        corpus_ids = [c.identity() for c in corpora.values()]
        depends_on = ["bpe", 1, corpus_ids, split.fraction, self.vocab_size, self.digits, self.limit]
        return bpe.load(cached(cache_dir, "tokenizer", depends_on, build))


def _first(texts: Iterator[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield text
        limit -= len(text)
