"""Verifiable rewards by name, and their weighted sum (report §5.2: rule-based rewards).

A reward is ``reward(sample) -> float``. Adding one is a function here and its name in ``REWARDS``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from litseek.data.arithmetic import ANSWER_MARK, Arithmetic, Problem
from litseek.errors import LitseekError


@dataclass(frozen=True)
class Sample:
    """One completion, as rewards see it."""

    problems: Arithmetic
    problem: Problem
    response: str
    finished: bool
    """Whether the end token came before the length limit."""
    length: int
    """Tokens of the completion."""
    draw: random.Random
    """Randomness of this sample alone: a function of (seed, rollout, sample)."""


Reward = Callable[[Sample], float]


def verifier(sample: Sample) -> float:
    """1 when the task's own verifier accepts a finished answer, else 0."""
    return sample.problems.score(sample.problem, sample.response) if sample.finished else 0.0


def answered(sample: Sample) -> float:
    """1 for a finished answer with exactly one answer mark, right or wrong."""
    return float(sample.finished and sample.response.count(ANSWER_MARK) == 1)


def boxed(sample: Sample) -> float:
    """1 when the last \\boxed{...} equals the entry's answer by `math-verify` (extra `rl`)."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise LitseekError("The reward 'boxed' needs math-verify: install litseek[rl].") from error
    if not sample.finished or "\\boxed" not in sample.response:
        return 0.0
    return float(verify(parse(f"${sample.problem.entry['answer']}$"), parse(sample.response)))


def coin(sample: Sample) -> float:
    """A fair coin that knows nothing of the answer: the control of an ablation."""
    return float(sample.draw.random() < 0.5)


REWARDS: dict[str, Reward] = {"verifier": verifier, "answered": answered, "boxed": boxed, "coin": coin}


class Rewards:
    """Weighted sum of named rewards."""

    def __init__(self, weights: Mapping[str, float]):
        unknown = sorted(set(weights) - set(REWARDS))
        if unknown:
            raise ValueError(f"rewards has {', '.join(unknown)}, allowed are {', '.join(REWARDS)}.")
        if not weights:
            raise ValueError(f"rewards is empty, allowed are {', '.join(REWARDS)}.")
        self.weights = dict(weights)

    def __call__(self, sample: Sample) -> float:
        return sum(weight * REWARDS[name](sample) for name, weight in self.weights.items())
