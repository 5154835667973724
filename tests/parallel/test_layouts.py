"""Every layout trains as one process does: losses, gradient norms, weights, balance biases, average of weights."""

from functools import cache

import pytest
import torch

from tests.parallel.layouts import LAYOUTS, joined, train, train_here
from tests.toy import toy_optim


@cache
def alone(folder, **keys):
    return train_here(folder, {}, **dict(keys))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return train_here(tmp_path_factory.mktemp("one"), {})


def same(parts, one, atol=1e-12):
    for part in parts:
        assert part["losses"] == pytest.approx(one["losses"], rel=1e-6, abs=atol)
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


def test_recompute_and_two_mtp_depths_with_experts_and_a_pipeline(tmp_path):
    model = dict(num_nextn_predict_layers=2)
    one = train_here(tmp_path / "one", {}, model=model)
    same(train("ep2_pp2_v", tmp_path / "four", recompute=["all"], model=model), one)


SAVED = {"one": None, "ep2": "ep2", "ep2_pp2_v": "ep2_pp2_v"}


@pytest.fixture(scope="module")
def halves(tmp_path_factory, one):
    """Three steps of each layout, saved."""
    folders = {}
    for name in SAVED:
        folder = folders[name] = tmp_path_factory.mktemp(name)
        if name == "one":
            train_here(folder, {}, steps=3)
        else:
            train(name, folder, steps=3)
    return folders


@pytest.mark.parametrize("name", SAVED)
@pytest.mark.parametrize("saved", SAVED)
def test_a_checkpoint_of_any_layout_goes_on_on_any_other(saved, name, halves, one, tmp_path):
    resume = str(halves[saved] / "checkpoints" / "step-00000003")
    parts = [train_here(tmp_path, {}, resume=resume)] if name == "one" else train(name, tmp_path, resume=resume)
    rest = one | {"losses": one["losses"][3:], "norms": one["norms"][3:]}
    same(parts, rest)


def test_a_model_is_never_whole_on_a_rank_and_starts_as_on_one_process(tmp_path):
    optim = toy_optim(lr=1e-5)  # of one element the first gradient is next to nothing, of which Adam makes much
    one = train_here(tmp_path / "one", {}, steps=2, biased=False, optim=optim)
    same(train("ep2_pp2_v", tmp_path / "four", steps=2, biased=False, optim=optim), one)


def test_a_parents_weights_come_to_every_rank_in_part(halves, tmp_path):
    parent = str(halves["ep2"] / "checkpoints" / "step-00000003")
    optim = toy_optim(lr=1e-5)  # Adam's first steps make much of gradients that are next to nothing
    one = train_here(tmp_path / "one", {}, steps=2, biased=False, parent=parent, optim=optim)
    same(train("ep2_pp2_v", tmp_path / "four", steps=2, biased=False, parent=parent, optim=optim), one)
