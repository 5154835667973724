"""What the strategy's keys may not be: refused in one sentence with the key and its value."""

import pytest

from litseek.parallel.settings import check_nodes
from litseek.parallel.strategy import LitseekStrategy


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(ep=2, dispatcher="nccl"), r"strategy\.dispatcher=nccl is not known: allowed are all_to_all, symmetric"),
        (dict(dispatcher="symmetric"), r"strategy\.ep=1 must be above 1"),
        (dict(ep=2, capacity_factor=1.5), r"strategy\.capacity_factor=1\.5 is for strategy\.dispatcher=symmetric"),
        (dict(ep=2, dispatcher="symmetric", capacity_factor=0), r"strategy\.capacity_factor=0 must be above 0"),
        (dict(comm_sms=0), r"strategy\.comm_sms=0 must be an integer of at least 1"),
        (dict(schedule="gpipe"), r"strategy\.schedule=gpipe is not known: allowed are 1f1b"),
        (dict(pp=3, schedule="dualpipe"), r"strategy\.pp=3 must be even"),
        (dict(recompute=["gate"]), r"strategy\.recompute names 'gate'"),
        (dict(ep=2, recompute=["combine"]), r"strategy\.ep=2 must be 1"),
    ],
)
def test_key_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        LitseekStrategy(**keys)


@pytest.mark.parametrize(
    ("dispatcher", "ep", "ranks", "device", "message"),
    [
        ("symmetric", 2, 2, "cpu", r"runs on CUDA GPUs, the ranks here are on 'cpu'"),
        ("symmetric", 4, 2, "cuda", r"strategy\.ep=4 ranks that share experts must lie on one"),
        ("hierarchical", 2, 2, "cuda", r"strategy\.ep=2 must be two or more times trainer\.devices=2"),
        ("hierarchical", 4, 1, "cuda", r"trainer\.devices=1, which must be above 1"),
    ],
)
def test_dispatcher_is_refused_where_it_cannot_run(dispatcher, ep, ranks, device, message):
    with pytest.raises(ValueError, match=message):
        check_nodes(dispatcher, ep, ranks, device)


def test_dispatchers_are_taken_where_they_can_run():
    check_nodes("symmetric", 2, 8, "cuda")
    check_nodes("hierarchical", 16, 8, "cuda")
    check_nodes("all_to_all", 4, 1, "cpu")
