import numpy as np
import pytest

from litseek.data import fim


def test_the_three_parts_make_the_document():
    text = "0123456789" * 5
    for seed in range(50):
        cut = fim.draw(text, 1.0, np.random.default_rng(seed))
        assert cut.prefix + cut.middle + cut.suffix == text


def test_cuts_reach_both_ends_and_one_character_texts_work():
    cuts = [fim.draw("ab", 1.0, np.random.default_rng(s)) for s in range(60)]
    assert {(len(c.prefix), len(c.middle)) for c in cuts} == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)}
    assert fim.draw("x", 1.0, np.random.default_rng(0)) is not None


def test_a_rate_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"data.fim_rate=1.5"):
        fim.draw("x", 1.5, np.random.default_rng(0))
