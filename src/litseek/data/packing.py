"""Rows of a fixed length from token streams: windows for pre-training, isolated samples for SFT (report §4.1, §5.1).

A row is a dict of 1-D int64 tensors ``tokens``, ``labels``, ``positions`` and, under isolation, ``documents``.
Letters: S row length, N stream length, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from litseek.data.batch import IGNORE, MicroBatch

Row = dict[str, Tensor]


def window(stream_N: np.ndarray, start: int, length: int) -> Row:
    """``length`` tokens from ``start`` on, labelled with their successors. The stream is a ring: an epoch may begin
    anywhere in it, so that no document's tail is always cut off."""
    at = np.arange(start, start + length + 1)
    ids = torch.from_numpy(np.asarray(stream_N[start : start + length + 1] if at[-1] < len(stream_N) else stream_N[at % len(stream_N)]).astype(np.int64))
    return {"tokens": ids[:-1], "labels": ids[1:], "positions": torch.arange(length)}


def num_windows(stream_N: np.ndarray, length: int) -> int:
    """Windows an epoch: every token is a label at most once."""
    return (len(stream_N) - 1) // length


def score_windows(stream_N: np.ndarray, length: int, pad_id: int) -> list[Row]:
    """Windows in which each token but the first is a label exactly once; the last is filled up with padding."""
    rows = []
    for start in range(0, len(stream_N) - 1, length):
        ids = torch.from_numpy(np.asarray(stream_N[start : start + length + 1]).astype(np.int64))
        tokens, labels = torch.full((length,), pad_id), torch.full((length,), IGNORE)
        tokens[: len(ids) - 1], labels[: len(ids) - 1] = ids[:-1], ids[1:]
        rows.append({"tokens": tokens, "labels": labels, "positions": torch.arange(length)})
    return rows


def collate(rows: Sequence[Row]) -> MicroBatch:
    """Rows of one length -> a micro-batch, its targets counted."""
    stacked = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
    labels = stacked["labels"]
    return MicroBatch(
        stacked["tokens"], labels, stacked["positions"], stacked.get("documents"),
        targets=float((labels != IGNORE).sum()),
    )  # fmt: skip
