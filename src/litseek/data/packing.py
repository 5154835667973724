"""Rows of a fixed length from token streams: windows for pre-training, isolated samples for SFT (report §4.1, §5.1).

A row is a dict of 1-D int64 tensors ``tokens``, ``labels``, ``positions`` and, under isolation, ``documents``.
Letters: S row length, N stream length, W windows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from litseek.data.batch import IGNORE, MicroBatch
from litseek.data.chat import Encoded

Row = dict[str, Tensor]


def window(stream_N: np.ndarray, start: int, length: int) -> Row:
    """``length`` tokens from ``start`` on, labelled with their successors. The stream is a ring: an epoch may begin
    anywhere in it, so that no document's tail is always cut off."""
    ids_N = np.asarray(stream_N[start : start + length + 1])
    if len(ids_N) <= length:
        ids_N = np.concatenate([ids_N, stream_N[: length + 1 - len(ids_N)]])
    ids = torch.from_numpy(ids_N.astype(np.int64))
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


def pack_isolated(samples: Sequence[Encoded], length: int, pad_id: int) -> list[Row]:
    """Several samples a row, none of which sees another (report §5.1): positions start anew in each, ``documents``
    tells them apart, only answers are labels. Rows are filled longest sample first, each where it fits most tightly.

    A sample of n tokens takes n - 1 places, since its last token predicts nothing; none may take more than ``length``.
    """
    rows: list[list[Encoded]] = []
    room: list[tuple[int, int]] = []  # (free places, row), sorted
    for sample in sorted(samples, key=lambda s: -len(s.ids)):
        need = len(sample.ids) - 1
        assert need <= length, f"a sample of {need} places for rows of {length}"
        at = bisect_left(room, (need, 0))
        if at == len(room):
            free, row = length, len(rows)
            rows.append([])
        else:
            free, row = room.pop(at)
        rows[row].append(sample)
        if free > need:
            insort(room, (free - need, row))
    return [_isolated_row(r, length, pad_id) for r in rows]


def _isolated_row(samples: Sequence[Encoded], length: int, pad_id: int) -> Row:
    tokens, labels = torch.full((length,), pad_id), torch.full((length,), IGNORE)
    positions, documents = torch.arange(length), torch.full((length,), len(samples))
    start = 0
    for number, sample in enumerate(samples):
        ids, answer = torch.tensor(sample.ids), torch.tensor(sample.answer)
        at = slice(start, start + len(ids) - 1)
        tokens[at] = ids[:-1]
        labels[at] = torch.where(answer[1:], ids[1:], IGNORE)
        documents[at] = number
        start = at.stop
        positions[at] = torch.arange(len(ids) - 1)
    positions[start:] = torch.arange(length - start)  # the padding is a document of its own
    return {"tokens": tokens, "labels": labels, "positions": positions, "documents": documents}
