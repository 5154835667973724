"""SFT data: conversations packed into rows with isolation, loss on answers only (report §5.1)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from litseek.data import chat
from litseek.data.corpora import StandardLibrary
from litseek.data.documents import Split
from litseek.data.mixture import Mixture
from litseek.data.packing import Row, pack_isolated
from litseek.data.tokenizer import Tokenizer
from litseek.data.tokenizer_spec import TokenizerSpec
from litseek.errors import LitseekError

log = logging.getLogger(__name__)

Conversations = Iterable[Sequence[chat.Message]]
TOO_LONG = ("drop", "error")


class ChatSource:
    """``conversations``: an iterable of message lists, several of them, or a mapping of names to iterables.

    Several are packed together and seen equally often; ``weights`` (by name) gives each its share of the rows instead.
    The seed orders the rows, anew in every epoch. ``too_long``: what happens to a conversation that no row can hold:
    ``drop`` counts and logs it, ``error`` stops.
    """

    def __init__(
        self,
        conversations: Conversations | Sequence[Conversations] | Mapping[str, Conversations],
        *,
        seq_len: int,
        weights: Mapping[str, float] | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        digits: int = 3,
        tokenizer_chars: int = 100_000_000,
        validation_fraction: float = 0.04,
        validation_bytes: int = 100_000,
        too_long: str = "drop",
    ):
        if seq_len < 1:
            raise ValueError(f"data.seq_len={seq_len} must be at least 1.")
        if too_long not in TOO_LONG:
            raise ValueError(f"data.too_long={too_long!r} must be one of {', '.join(TOO_LONG)}.")
        self.sources = _named(conversations)
        if weights is not None and set(weights) != set(self.sources):
            raise ValueError(
                f"data.weights names {sorted(weights)}, but data.conversations has {sorted(self.sources)}."
            )
        self.weights = dict(weights) if weights is not None else None
        self.seq_len, self.too_long = seq_len, too_long
        self.split = Split(validation_fraction, validation_bytes)
        self.tokenizer_spec = TokenizerSpec(tokenizer, vocab_size, digits, tokenizer_chars)
        self.seed = 0
        self.tokenizer: Tokenizer
        self.dropped = 0
        """Conversations that were too long for a row."""
        self.rows: dict[str, list[Row]] = {}
        self._validation: list[Row] = []
        self._text = b""
        self._orders: dict[str, tuple[tuple[int, int], np.ndarray]] = {}
        self._mixture: Mixture | None = None

    def set_seed(self, seed: int) -> None:
        """The seed of the order of samples."""
        self.seed = seed

    def use_tokenizer(self, path: str | Path) -> None:
        """The parent stage's tokenizer instead of one trained here; an explicit ``data.tokenizer`` stays."""
        self.tokenizer_spec = self.tokenizer_spec.inherit(path)

    def prepare(self, cache_dir: Path) -> None:
        """Loads the tokenizer (or trains it on the standard library), encodes and packs all conversations."""
        self.tokenizer = self.tokenizer_spec.get(cache_dir, {"text": StandardLibrary()}, self.split)
        self.dropped, self._orders, self._mixture = 0, {}, None
        training: dict[str, list[chat.Encoded]] = {}
        held_out: list[tuple[int, chat.Encoded, bytes]] = []
        for name, conversations in self.sources.items():
            encoded = training.setdefault(name if self.weights else "all", [])
            for messages in conversations:
                sample = self._encode(messages, name)
                if sample is None:
                    continue
                digest = _digest(messages)
                if digest < self.split.fraction * 2**64:
                    held_out.append((digest, sample, chat.answers(messages).encode()))
                else:
                    encoded.append(sample)
        for name, encoded in training.items():
            if not encoded:
                raise LitseekError(
                    f"SFT data {name!r} has no conversation to train on; {self.dropped} were too long for "
                    f"data.seq_len={self.seq_len}."
                )
        pad = self.tokenizer.pad_id
        self.rows = {n: pack_isolated(e, self.seq_len, pad) for n, e in training.items()}
        kept = _capped(held_out, self.split.limit)
        self._validation = pack_isolated([sample for _, sample, _ in kept], self.seq_len, pad)
        self._text = b"".join(text for _, _, text in kept)
        if self.dropped:
            log.warning(
                "%d conversations are longer than data.seq_len=%d and were left out.", self.dropped, self.seq_len
            )

    def __getitem__(self, i: int) -> Row:
        if i < 0:
            raise IndexError(f"sample {i}: samples are numbered from 0.")
        if self.weights is None:
            return self._row("all", i)
        if self._mixture is None or self._mixture.seed != self.seed:
            self._mixture = Mixture(self.weights, self.seed)
        return self._row(*self._mixture[i])

    @property
    def rows_per_epoch(self) -> int:
        """Rows until every conversation was seen once (with ``weights``: rows of all sources)."""
        return sum(len(r) for r in self.rows.values())

    def validation(self) -> list[Row]:
        """Packed rows of held-out conversations; may be empty for a handful of conversations."""
        return self._validation

    @property
    def validation_text(self) -> bytes:
        """The held-out answers."""
        return self._text

    @property
    def validation_bytes(self) -> int:
        return len(self._text)

    def _row(self, name: str, j: int) -> Row:
        epoch, within = divmod(j, len(self.rows[name]))
        held = self._orders.get(name)
        if held is None or held[0] != (self.seed, epoch):
            rng = np.random.default_rng([self.seed, epoch, list(self.rows).index(name)])
            held = ((self.seed, epoch), rng.permutation(len(self.rows[name])))
            self._orders[name] = held
        return self.rows[name][int(held[1][within])]

    def _encode(self, messages: Sequence[chat.Message], name: str) -> chat.Encoded | None:
        sample = chat.encode(messages, self.tokenizer)
        if not any(sample.answer):
            raise LitseekError(f"SFT data {name!r}: a conversation without an answer: {messages[0]['content'][:60]!r}.")
        if len(sample.ids) - 1 <= self.seq_len:
            return sample
        if self.too_long == "error":
            raise LitseekError(
                f"SFT data {name!r}: a conversation of {len(sample.ids)} tokens does not fit data.seq_len={self.seq_len}: "
                f"{messages[0]['content'][:60]!r}."
            )
        self.dropped += 1
        return None


def _named(
    conversations: Conversations | Sequence[Conversations] | Mapping[str, Conversations],
) -> dict[str, Conversations]:
    if isinstance(conversations, Mapping):
        return dict(conversations)
    if isinstance(conversations, list | tuple) and not (conversations and _is_conversation(conversations[0])):
        return {str(n): c for n, c in enumerate(conversations)}
    return {"all": conversations}  # type: ignore[dict-item]


def _is_conversation(item: object) -> bool:
    return isinstance(item, list | tuple) and bool(item) and isinstance(item[0], Mapping)


def _digest(messages: Sequence[chat.Message]) -> int:
    text = json.dumps([[m["role"], m["content"]] for m in messages])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _capped(held_out: list[tuple[int, chat.Encoded, bytes]], limit: int) -> list[tuple[int, chat.Encoded, bytes]]:
    """By digest, as many whole conversations as ``limit`` bytes of answers hold, at least one."""
    kept: list[tuple[int, chat.Encoded, bytes]] = []
    used = 0
    for item in sorted(held_out, key=lambda h: h[0]):
        if kept and used + len(item[2]) > limit:
            break
        kept.append(item)
        used += len(item[2])
    return kept
