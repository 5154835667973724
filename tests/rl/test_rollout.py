"""The rollout buffer: labels, advantages, micro-batches, and its way through a checkpoint."""

import torch

from litseek.data.batch import IGNORE
from litseek.rl.rollout import Rollout, collect, stream_seed


def buffer() -> Rollout:
    return collect(
        index=3,
        prompts=[[1, 2, 3], [4, 5]],
        completions=[[6, 7], [8], [9, 10, 11, 12], [13]],
        finished=[True, True, False, True],
        rewards=[1.0, 0.0, 0.5, 0.5],
        correct=[1.0, 0.0, 0.0, 0.0],
        group=2,
    )


def test_labels_are_the_completion_shifted_by_one():
    rollout = buffer()
    x = IGNORE
    assert rollout.tokens.tolist()[1] == [1, 2, 3, 8, 0, 0]
    assert rollout.labels.tolist() == [
        [x, x, 6, 7, x, x],
        [x, x, 8, x, x, x],
        [x, 9, 10, 11, 12, x],
        [x, 13, x, x, x, x],
    ]


def test_advantage_is_the_standardised_reward_of_its_group():
    assert buffer().advantage.tolist() == [1.0, -1.0, 0.0, 0.0]


def test_micro_batch_is_cut_to_its_longest_sample():
    rollout = buffer()
    rollout.ref_logprobs = torch.ones(4, 6)
    micro = rollout.micro(slice(0, 2))
    assert micro.tokens.tolist() == [[1, 2, 3, 6, 7], [1, 2, 3, 8, 0]]
    assert micro.targets == 2.0
    assert micro.positions[1].tolist() == [0, 1, 2, 3, 4]
    assert {k: tuple(v.shape) for k, v in micro.extra.items()} == {
        "advantage": (2,),
        "old_logprobs": (2, 5),
        "ref_logprobs": (2, 5),
    }


def test_state_dict_round_trip(tmp_path):
    rollout = buffer()
    rollout.old_logprobs.normal_()
    torch.save(rollout.state_dict(), tmp_path / "rollout.pt")
    again = Rollout.from_state_dict(torch.load(tmp_path / "rollout.pt", weights_only=True))
    assert again.index == 3 and len(again) == 4
    for name, value in rollout.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_streams_differ_by_seed_and_part_and_repeat():
    seeds = {stream_seed(s, r, "x") for s in range(3) for r in range(3)}
    assert len(seeds) == 9
    assert stream_seed(1, 2) == stream_seed(1, 2)
