"""Where SFT's conversations come from: any iterable of message lists. These are the usual ones."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from litseek.data import chat
from litseek.data.corpora import Document, Files, HubDataset, StandardLibrary
from litseek.data.files import rows

Conversation = list[dict[str, str]]

QUESTIONS = (
    "What does {name} do?",
    "Explain {name}.",
    "Describe the {kind} {name}.",
    "How is {name} documented?",
    "What is {name} for?",
)


class Docstrings:
    """Questions about the standard library's functions and classes, answered by their docstrings.

    ``max_chars``: an answer keeps its first whole paragraphs up to this; one whose first paragraph is longer is left
    out. Needs no download.
    """

    def __init__(self, max_chars: int = 400, packages: Sequence[str] | None = None, limit: int | None = None):
        if max_chars < 1:
            raise ValueError(f"max_chars={max_chars} must be at least 1.")
        self.library = StandardLibrary(packages=packages)
        self.max_chars, self.limit = max_chars, limit

    def __iter__(self) -> Iterator[Conversation]:
        return islice(self._all(), self.limit)

    def _all(self) -> Iterator[Conversation]:
        seen = set()
        for document in self.library.documents():
            for kind, name, doc in _documented(document):
                answer = _opening(doc, self.max_chars)
                if answer and name not in seen:
                    seen.add(name)
                    pick = hashlib.sha256(name.encode()).digest()[0] % len(QUESTIONS)
                    question = QUESTIONS[pick].format(name=name, kind=kind)
                    yield [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class ConversationFiles:
    """Conversations in local files, in any layout that ``chat.from_row`` knows."""

    def __init__(self, files: str | Sequence[str], limit: int | None = None):
        self.paths, self.limit = Files(files).paths, limit

    def __iter__(self) -> Iterator[Conversation]:
        found = (chat.from_row(row, place) for path in self.paths for place, row in rows(path))
        return islice(found, self.limit)


class HubConversations:
    """Conversations of a dataset that ``datasets`` loads; the arguments are ``HubDataset``'s."""

    def __init__(self, path: str, limit: int | None = None, **arguments: Any):
        self.dataset, self.limit = HubDataset(path, **arguments), limit

    def __iter__(self) -> Iterator[Conversation]:
        name = self.dataset.arguments["path"]
        found = (chat.from_row(row, f"{name} row {n}") for n, row in enumerate(self.dataset.load()))
        return islice(found, self.limit)


class Problems:
    """The first ``count`` items of an endless list of problems, each of which has a ``conversation()``."""

    def __init__(self, problems: Any, count: int):
        if count < 1:
            raise ValueError(f"count={count} must be at least 1.")
        self.problems, self.count = problems, count

    def __iter__(self) -> Iterator[Conversation]:
        return (self.problems[i].conversation() for i in range(self.count))


def _documented(document: Document) -> Iterator[tuple[str, str, str]]:
    """(kind, dotted name, docstring) of a source file's public functions, classes and methods."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):  # templates and deliberately broken sources
        return
    module = document.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    queue: list[tuple[str, ast.AST]] = [(module, tree)]
    while queue:
        path, node = queue.pop(0)
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or child.name[0] == "_":
                continue
            name = f"{path}.{child.name}"
            doc = ast.get_docstring(child, clean=False)
            inside = isinstance(child, ast.ClassDef)
            if doc:
                yield "class" if inside else "method" if node is not tree else "function", name, inspect.cleandoc(doc)
            if inside:
                queue.append((name, child))


def _opening(doc: str, max_chars: int) -> str:
    """The first whole paragraphs of a docstring, at most ``max_chars`` long."""
    kept = ""
    for paragraph in doc.split("\n\n"):
        longer = f"{kept}\n\n{paragraph}" if kept else paragraph
        if len(longer) > max_chars:
            break
        kept = longer
    return kept.strip()
