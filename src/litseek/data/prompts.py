"""GRPO data: problems as prompts in the chat template; ``source[i]`` is a pure function of (seed, i) (report §5.2)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from litseek.data import chat
from litseek.data.arithmetic import Arithmetic, Problem
from litseek.data.corpora import StandardLibrary
from litseek.data.documents import Split
from litseek.data.tokenizer import Tokenizer
from litseek.data.tokenizer_spec import TokenizerSpec


class Prompt(NamedTuple):
    """A problem and the token ids up to where the assistant begins to write."""

    problem: Problem
    ids: list[int]


class PromptSource:
    """``problems`` in the chat template, without end. ``seq_len`` is the room for a prompt and its answer together."""

    def __init__(
        self,
        problems: Arithmetic,
        *,
        seq_len: int,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        digits: int = 3,
        tokenizer_chars: int = 100_000_000,
    ):
        if seq_len < 2:
            raise ValueError(f"data.seq_len={seq_len} must be at least 2.")
        self.problems, self.seq_len = problems, seq_len
        self.tokenizer_spec = TokenizerSpec(tokenizer, vocab_size, digits, tokenizer_chars)
        self.tokenizer: Tokenizer

    def set_seed(self, seed: int) -> None:
        """The seed of the order of problems."""
        self.problems.set_seed(seed)

    def use_tokenizer(self, path: str | Path) -> None:
        """The parent stage's tokenizer instead of one trained here; an explicit ``data.tokenizer`` stays."""
        self.tokenizer_spec = self.tokenizer_spec.inherit(path)

    def prepare(self, cache_dir: Path) -> None:
        """Loads the tokenizer, or trains it on the standard library."""
        self.tokenizer = self.tokenizer_spec.get(cache_dir, {"text": StandardLibrary()}, Split())

    def __getitem__(self, i: int) -> Prompt:
        if i < 0:
            raise IndexError(f"prompt {i}: prompts are numbered from 0.")
        return encode_problem(self.problems[i], self.tokenizer)


def encode_problem(problem: Problem, tokenizer: Tokenizer) -> Prompt:
    return Prompt(problem, chat.encode_prompt(problem.conversation()[:1], tokenizer))
