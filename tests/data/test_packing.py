import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from litseek.data.batch import IGNORE
from litseek.data.chat import Encoded
from litseek.data.packing import collate, num_windows, pack_isolated, score_windows, window


def test_a_window_is_labelled_with_its_successors_also_around_the_end():
    stream = np.arange(10, dtype=np.uint16)
    assert window(stream, 2, 4)["tokens"].tolist() == [2, 3, 4, 5]
    assert window(stream, 2, 4)["labels"].tolist() == [3, 4, 5, 6]
    around = window(stream, 8, 4)
    assert around["tokens"].tolist() == [8, 9, 0, 1] and around["labels"].tolist() == [9, 0, 1, 2]
    assert window(stream, 6, 4)["labels"].tolist() == [7, 8, 9, 0]
    assert around["positions"].tolist() == [0, 1, 2, 3] and around["tokens"].dtype == torch.int64
    assert num_windows(stream, 4) == 2 and num_windows(stream, 9) == 1 and num_windows(stream, 10) == 0


@settings(max_examples=60, deadline=None, database=None)
@given(st.integers(2, 200), st.integers(1, 50))
def test_scoring_windows_score_each_token_but_the_first_once(size, length):
    rows = score_windows(np.arange(1000, 1000 + size), length, pad_id=7)
    labels = torch.cat([r["labels"] for r in rows])
    assert labels[labels != IGNORE].tolist() == list(range(1001, 1000 + size))
    assert all(len(r["tokens"]) == length for r in rows)


def sample(n: int) -> Encoded:
    return Encoded(list(range(100, 100 + n)), [i >= n // 2 for i in range(n)])


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.integers(2, 33), min_size=1, max_size=40))
def test_isolated_packing_loses_and_repeats_nothing(sizes):
    rows = pack_isolated([sample(n) for n in sizes], 32, pad_id=7)
    found = []
    for row in rows:
        pieces = row["documents"].unique().tolist()
        for piece in pieces:
            at = row["documents"] == piece
            assert row["positions"][at].tolist() == list(range(int(at.sum())))
            if not (row["tokens"][at] == 7).all():
                found.append((int(at.sum()) + 1, row["labels"][at].tolist()))
    assert sorted(n for n, _ in found) == sorted(sizes)
    for n, labels in found:
        s = sample(n)
        assert labels == [t if a else IGNORE for t, a in zip(s.ids[1:], s.answer[1:], strict=True)]


def test_isolated_packing_fills_rows_tightly():
    sizes = np.random.default_rng(0).integers(5, 60, size=400)
    rows = pack_isolated([sample(int(n)) for n in sizes], 64, pad_id=7)
    assert len(rows) <= 1.05 * (sizes - 1).sum() / 64


def test_collate_counts_the_targets():
    rows = pack_isolated([sample(9), sample(5)], 16, pad_id=7)
    micro = collate(rows * 2)
    assert micro.tokens.shape == (2, 16) and micro.documents is not None
    assert micro.targets == float((micro.labels != IGNORE).sum()) == 2 * (5 + 3)
    assert collate(score_windows(np.arange(9), 4, 0)).documents is None
