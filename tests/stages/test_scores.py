"""Nats a token, bits a byte, loss by position."""

import math

import pytest
import torch

from litseek.data.batch import IGNORE
from litseek.stages.scores import Scores, labels_in


def scored() -> Scores:
    scores = Scores()
    scores.add(torch.tensor([[1.0, 2.0, 0.0, 4.0]]), torch.tensor([[5, 5, IGNORE, 5]]))
    scores.add(torch.tensor([[3.0, 0.0, 0.0, 0.0]]), torch.tensor([[5, IGNORE, IGNORE, IGNORE]]))
    return scores


def test_loss_counts_only_scored_tokens():
    assert scored().tokens == 4 and scored().loss == pytest.approx(2.5)


def test_bits_per_byte_is_all_nats_over_all_bytes_and_a_part_counts_as_its_share():
    assert scored().bits_per_byte(20, all_tokens=4) == pytest.approx(10 / math.log(2) / 20)
    assert scored().bits_per_byte(40, all_tokens=8) == pytest.approx(10 / math.log(2) / 20)


def test_loss_by_position_leaves_out_what_nobody_scored():
    assert scored().by_position() == {"positions": [0, 1, 3], "loss": [2.0, 2.0, 4.0]}
    assert scored().by_position(points=2) == {"positions": [0.5, 2.5], "loss": [2.0, 4.0]}


def test_reduce_adds_ranks_up():
    scores = scored()
    scores.reduce(lambda both: both * 2, torch.device("cpu"))
    assert (scores.tokens, scores.loss) == (8, pytest.approx(2.5))


def test_labels_in():
    assert labels_in([{"labels": torch.tensor([1, IGNORE, 2])}, {"labels": torch.tensor([IGNORE])}]) == 2
