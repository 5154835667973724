"""Accuracy of a model on fixed held-out problems, sampled at temperature 1 (report §5.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from litseek.data.arithmetic import Arithmetic
from litseek.data.prompts import encode_problem
from litseek.data.tokenizer import Tokenizer
from litseek.inference.engine import Engine, Sampling


@dataclass(frozen=True)
class Tally:
    """Sums over some of the problems, so that ranks can add theirs up."""

    sums: Tensor
    """(4,) float64: problems, correct, finished, response tokens."""
    samples: list[dict[str, str | float]]
    """The first answers, to look at."""

    def metrics(self) -> dict[str, float]:
        problems, correct, finished, tokens = self.sums.tolist()
        return {
            "eval/problems": problems,
            "eval/accuracy": correct / problems,
            "eval/finished": finished / problems,
            "eval/response_tokens": tokens / problems,
        }


class Accuracy:
    """Share of ``count`` fixed problems that the task's verifier accepts; an answer that does not end counts as wrong.

    The problems are the first ``count`` of the split ``eval``, whatever the run's seed; ``seed`` is the sampling's,
    fixed too, so that every stage and arm is judged alike. Deterministic for a model on one kind of machine.
    """

    def __init__(
        self,
        problems: Arithmetic,
        count: int = 500,
        max_tokens: int = 64,
        temperature: float = 1.0,
        seed: int = 0,
        max_batch: int = 512,
        samples: int = 4,
    ):
        if problems.split != "eval":
            raise ValueError(f"accuracy.problems.split is {problems.split!r}, only 'eval' is held out from training.")
        self.source, self.problems = problems, problems.held_out(count)
        self.sampling = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        self.max_batch, self.samples = max_batch, samples

    @torch.no_grad()
    def __call__(self, engine: Engine, tokenizer: Tokenizer, rank: int = 0, world: int = 1) -> Tally:
        """This rank's share of the problems; each problem's sample is the same for every ``world``."""
        first, last = len(self.problems) * rank // world, len(self.problems) * (rank + 1) // world
        prompts = [encode_problem(problem, tokenizer) for problem in self.problems[first:last]]
        sampling = Sampling(stop=(tokenizer.eos_id,), **self.sampling)  # type: ignore[arg-type]
        found = engine.generate([prompt.ids for prompt in prompts], sampling, self.max_batch, first)
        responses = [tokenizer.decode(ids) for ids in found.lists()]
        correct = [
            self.source.score(prompt.problem, response) if stopped else 0.0
            for prompt, response, stopped in zip(prompts, responses, found.stopped.tolist(), strict=True)
        ]
        sums = [len(prompts), sum(correct), float(found.stopped.sum()), float(found.lengths.sum())]
        samples: list[dict[str, str | float]] = [
            {"prompt": prompt.problem.prompt, "completion": response, "correct": score}
            for prompt, response, score in zip(prompts, responses, correct, strict=True)
        ]
        return Tally(torch.tensor(sums, dtype=torch.float64), samples[: self.samples] if rank == 0 else [])
