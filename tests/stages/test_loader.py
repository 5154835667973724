"""Order of training samples and the shares of ranks."""

from itertools import islice

import torch

from litseek.data.batch import IGNORE
from litseek.stages.loader import TrainingBatches, ValidationBatches, micro_batches
from tests.toy import ToySource


def indices(**keys):
    source = ToySource()
    batches = list(islice(TrainingBatches(source, **keys), 3))
    return source.asked, [(b["first"], b["count"], len(b["rows"])) for b in batches]


def test_global_batches_follow_on_from_what_was_consumed():
    asked, shapes = indices(consumed=lambda: 10, size=lambda consumed: 4)
    assert asked == list(range(10, 22)) and shapes == [(10, 4, 4), (14, 4, 4), (18, 4, 4)]


def test_ranks_take_contiguous_shares_that_make_up_the_batch():
    both = [indices(consumed=lambda: 0, size=lambda n: 4 if n < 4 else 8, rank=r, ranks=2)[0] for r in (0, 1)]
    assert both == [[0, 1, 4, 5, 6, 7, 12, 13, 14, 15], [2, 3, 8, 9, 10, 11, 16, 17, 18, 19]]


def test_iteration_starts_where_the_counter_stands_at_that_moment():
    counter = [0]
    batches = TrainingBatches(ToySource(), lambda: counter[0], lambda n: 2)
    counter[0] = 6
    assert next(iter(batches))["first"] == 6


def test_validation_scores_every_row_once_and_ranks_have_as_many_batches():
    rows = [{"tokens": torch.full((4,), i), "labels": torch.full((4,), i)} for i in range(5)]
    shares = [ValidationBatches(rows, 2, rank, 2) for rank in (0, 1)]
    assert [len(s) for s in shares] == [2, 2] == [len(list(s)) for s in shares]
    scored = [int(r["labels"][0]) for s in shares for b in s for r in b["rows"] if r["labels"][0] != IGNORE]
    assert sorted(scored) == [0, 1, 2, 3, 4]


def test_micro_batches_count_targets_and_keep_what_a_stage_adds():
    rows = [ToySource(documents=True)[i] | {"weight": torch.tensor([float(i)])} for i in range(3)]
    first, second = micro_batches(rows, 2)
    assert first.tokens.shape == (2, 16) and second.tokens.shape == (1, 16)
    assert first.targets == sum(int((r["labels"] != IGNORE).sum()) for r in rows[:2])
    assert second.extra["weight"].tolist() == [[2.0]] and second.documents is not None
