"""Every layout trains as one process does: losses, gradient norms, weights, balance biases, average of weights."""

from functools import cache

import pytest
import torch

from tests.parallel.layouts import LAYOUTS, joined, train, train_here


@cache
def alone(folder, **keys):
    return train_here(folder, {}, **dict(keys))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train_here(tmp_path_factory.mktemp("one"), {})


def same(parts, one):
    for part in parts:
        assert part["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert part["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert part["tokens"] == one["tokens"]
        assert part["results"] == pytest.approx(one["results"], rel=1e-6)
        assert all(torch.equal(part["loads"][name], load) for name, load in one["loads"].items())
    for key in ("state", "average"):
        whole = joined(parts, key)
        assert whole.keys() == one[key].keys()
        for name, value in one[key].items():
            torch.testing.assert_close(whole[name], value, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", LAYOUTS)
def test_six_steps_equal_one_process(name, one, tmp_path):
    same(train(name, tmp_path), one)
