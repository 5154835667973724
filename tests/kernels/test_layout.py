"""The padded layout against plain Python, number by number; kernel and reference agree."""

import pytest
import torch
from litseek_kernels.layout import TILE, Layout, group_layout, padded_capacity, row_layout
from litseek_kernels.ref import layout as ref

COUNTS = {
    "plain": [3, 300, 128, 256],
    "empty at both ends and inside": [0, 5, 0, 0, 129, 0],
    "all to one": [0, 0, 1000, 0],
    "no rows": [0, 0, 0],
    "one expert": [640],
    "full tiles": [128, 256, 128],
    "many": [(7 * e * e) % 301 for e in range(64)],
}


def by_hand(counts: list[int], capacity: int) -> Layout:
    expert, start, begin, real = [], [0], [], []
    for e, count in enumerate(counts):
        for done in range(0, count, TILE):
            expert.append(e)
            begin.append(sum(counts[:e]) + done)
            real.append(min(count - done, TILE))
        start.append(len(expert) * TILE)
    rest = capacity // TILE - len(expert)
    columns = expert + [-1] * rest, start, begin + [0] * rest, real + [0] * rest
    return Layout(*(torch.tensor(column, dtype=torch.int32) for column in columns))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
@pytest.mark.parametrize("spare", [0, 3])
def test_layout_equals_python(counts, spare, device):
    capacity = padded_capacity(sum(counts), len(counts)) + spare * TILE
    count_E = torch.tensor(counts)
    expected = by_hand(counts, capacity)
    for got in (row_layout(count_E.to(device), capacity), Layout(*ref.row_layout(count_E, capacity))):
        for name, mine, wanted in zip(Layout._fields, got, expected, strict=True):
            assert mine.dtype == torch.int32 and torch.equal(mine.cpu(), wanted), name
    tile_expert, padded_start_E = group_layout(count_E.to(device), capacity)
    assert torch.equal(tile_expert.cpu(), expected[0]) and torch.equal(padded_start_E.cpu(), expected[1])


def test_the_capacity_holds_the_worst_counts():
    for experts in (1, 3, 64):
        worst = [1 + TILE * (e % 3) for e in range(experts)]
        used = sum(-(-count // TILE) * TILE for count in worst)
        assert used <= padded_capacity(sum(worst), experts)


def test_compact_to_padded_and_back():
    counts = [3, 0, 300, 128]
    rows = torch.randn(sum(counts), 5)
    layout = row_layout(torch.tensor(counts), padded_capacity(sum(counts), 4))
    padded = ref.to_padded(rows, layout.tile_begin, layout.tile_count)
    start = 0
    for e, count in enumerate(counts):
        begin, end = layout.padded_start_E[e : e + 2].tolist()
        assert begin % TILE == 0 and torch.equal(padded[begin : begin + count], rows[start : start + count])
        assert padded[begin + count : end].abs().sum() == 0
        start += count
    assert torch.equal(ref.to_compact(padded, len(rows), layout.tile_begin, layout.tile_count), rows)


def test_a_capacity_of_broken_tiles_is_refused():
    with pytest.raises(ValueError, match="200"):
        row_layout(torch.tensor([3, 4]), 200)
