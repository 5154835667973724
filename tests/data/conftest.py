"""Small corpora and a tokenizer for the data tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from litseek.data.corpora import Document, StandardLibrary
from litseek.data.tokenizer import Tokenizer, train


class Texts:
    """A corpus in memory."""

    def __init__(self, texts: list[str]):
        self.texts = texts

    def identity(self) -> dict[str, Any]:
        return {"texts": self.texts}

    def documents(self) -> Iterator[Document]:
        return (Document(f"text {n}", t) for n, t in enumerate(self.texts))


@pytest.fixture(scope="session")
def library() -> list[str]:
    """Source files of a few standard packages, about 300 KB."""
    return [d.text for d in StandardLibrary(packages=["json", "email", "logging"]).documents()]


@pytest.fixture(scope="session")
def tokenizer(library: list[str]) -> Tokenizer:
    return train(library, vocab_size=512)


@pytest.fixture
def texts() -> type[Texts]:
    return Texts
