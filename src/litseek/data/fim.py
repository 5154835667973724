"""Fill in the middle at document level, prefix-suffix-middle (report §4.1): rate 0.1, before packing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from litseek.data.tokenizer import FIM_BEGIN, FIM_END, FIM_HOLE, Tokenizer


class Split(NamedTuple):
    """A document cut in three; prefix + middle + suffix is the document."""

    prefix: str
    middle: str
    suffix: str


def draw(text: str, rate: float, rng: np.random.Generator) -> Split | None:
    """Two uniform cut points with probability ``rate``, else None. Cuts fall between characters, not tokens, so that the
    model learns to go on from the inside of a token."""
    if not 0 <= rate <= 1:
        raise ValueError(f"data.fim_rate={rate} must lie in 0..1.")
    if rng.random() >= rate:
        return None
    a, b = sorted(int(c) for c in rng.integers(0, len(text) + 1, size=2))
    return Split(text[:a], text[a:b], text[b:])


def arrange(split_ids: tuple[list[int], list[int], list[int]], tokenizer: Tokenizer) -> list[int]:
    """(prefix, middle, suffix) ids -> ``<|fim_begin|>pre<|fim_hole|>suf<|fim_end|>mid<|eos_token|>``."""
    prefix, middle, suffix = split_ids
    begin, hole, end = (tokenizer.control(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
    return [begin, *prefix, hole, *suffix, end, *middle, tokenizer.eos_id]
