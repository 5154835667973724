"""Rewards: each by itself, their sum, and mistakes in their names."""

import random

import pytest

from litseek.data.arithmetic import Arithmetic
from litseek.rl.rewards import REWARDS, Rewards, Sample


def sample(response: str, finished: bool = True, seed: int = 0) -> Sample:
    problems = Arithmetic("grpo")
    problem = problems.problem({"answer": "12", "question": "", "metadata": {"expression": "3 + 9"}})
    return Sample(problems, problem, response, finished, length=5, draw=random.Random(seed))


@pytest.mark.parametrize(
    ("name", "response", "finished", "expected"),
    [
        ("verifier", "3 + 9 = 12\nAnswer: 12", True, 1.0),
        ("verifier", "3 + 9 = 12\nAnswer: 12", False, 0.0),
        ("verifier", "Answer: 13", True, 0.0),
        ("answered", "Answer: 13", True, 1.0),
        ("answered", "Answer: 13", False, 0.0),
        ("answered", "Answer: 1\nAnswer: 2", True, 0.0),
        ("boxed", "so \\boxed{12}", True, 1.0),
        ("boxed", "so \\boxed{13}", True, 0.0),
        ("boxed", "12", True, 0.0),
    ],
)
def test_reward(name, response, finished, expected):
    if name == "boxed":
        pytest.importorskip("math_verify")
    assert REWARDS[name](sample(response, finished)) == expected


def test_coin_is_fair_and_repeats_for_its_stream():
    draws = [REWARDS["coin"](sample("", seed=seed)) for seed in range(200)]
    assert 70 < sum(draws) < 130
    assert draws == [REWARDS["coin"](sample("", seed=seed)) for seed in range(200)]


def test_weighted_sum():
    rewards = Rewards({"verifier": 1.0, "answered": 0.25})
    assert rewards(sample("Answer: 12")) == 1.25
    assert rewards(sample("Answer: 7")) == 0.25


def test_unknown_and_empty_rewards_are_refused():
    with pytest.raises(ValueError, match="rewards has verifyer, allowed are verifier"):
        Rewards({"verifyer": 1.0})
    with pytest.raises(ValueError, match="rewards is empty"):
        Rewards({})
