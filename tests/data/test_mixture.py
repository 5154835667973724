from collections import Counter

import pytest

from litseek.data.mixture import BLOCK, Mixture


def test_every_source_is_read_in_order_without_a_gap():
    mixture = Mixture({"a": 5, "b": 2, "c": 0.001}, seed=3)
    seen: dict[str, list[int]] = {}
    for i in range(3 * BLOCK):
        name, j = mixture[i]
        seen.setdefault(name, []).append(j)
    assert all(js == list(range(len(js))) for js in seen.values())
    shares = {n: len(js) / (3 * BLOCK) for n, js in seen.items()}
    assert shares["a"] == pytest.approx(5 / 7, abs=0.002) and shares["b"] == pytest.approx(2 / 7, abs=0.002)
    assert shares["c"] == 1 / BLOCK


def test_it_is_a_pure_function_of_seed_and_index():
    forward = [Mixture({"a": 1, "b": 2}, seed=5)[i] for i in range(50)]
    mixture = Mixture({"a": 1, "b": 2}, seed=5)
    assert [mixture[i] for i in reversed(range(50))][::-1] == forward
    assert [Mixture({"a": 1, "b": 2}, seed=6)[i] for i in range(50)] != forward


def test_many_equal_sources_fill_the_block():
    mixture = Mixture({str(n): 1 for n in range(1000)})
    counts = Counter(mixture[i][0] for i in range(BLOCK))
    assert sum(counts.values()) == BLOCK and len(counts) == 1000


@pytest.mark.parametrize("weights", [{}, {"a": 0}, {"a": 1, "b": -1}, {"a": float("nan")}])
def test_weights_must_be_positive(weights):
    with pytest.raises(ValueError, match=r"data\.weights"):
        Mixture(weights)
