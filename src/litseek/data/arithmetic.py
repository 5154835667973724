"""Arithmetic with a verifier: worked conversations for SFT, problems for GRPO, a fixed held-out set (report §5).

Problems come from `reasoning-gym`. A hash of the problem's text decides which split it belongs to, so that
no problem of one split is ever in another, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass, field
from typing import Any

ANSWER_MARK = "Answer:"
"""What stands before the final answer; the verifier reads what follows the last one."""
ACCEPT = 0.99
"""Scores below this are junk that some verifiers half accept."""
SPLITS = {"sft": (0, 45), "grpo": (45, 90), "eval": (90, 100)}
"""Percent of all problem texts, from and to."""
STRIDE = 64
"""Candidates per index; at 45 percent a split misses all of them once in 4e16."""
EVAL_CANDIDATES = 100_000


@dataclass(frozen=True)
class Problem:
    """One question, its worked answer and the entry that its verifier reads."""

    prompt: str
    """What the user says."""
    solution: str
    """A worked answer that ends in ``ANSWER_MARK`` and the result."""
    entry: dict[str, Any] = field(repr=False, hash=False, compare=False)

    def conversation(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}, {"role": "assistant", "content": self.solution}]


def problem_key(entry: dict[str, Any]) -> str:
    """The text that identifies a problem: its expression where it has one, else the question."""
    return " ".join(str(entry["metadata"].get("expression", entry["question"])).split())


def split_of(key: str) -> str:
    """The one split that a problem text belongs to."""
    percent = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    return next(name for name, (low, high) in SPLITS.items() if low <= percent < high)


class Arithmetic:
    """Problems of one split; ``problems[i]`` is a pure function of (seed, i), for every i >= 0.

    ``options`` are the task's own settings (its difficulty). ``worked`` writes steps before the answer.
    ``spaced_digits`` writes 12 as "1 2", so that a tokenizer that joins digits still shows each one to the model.
    ``limit`` keeps only the first so many problems of the split and reshuffles them every epoch. ``slips`` is the share of
    worked answers that are wrong, as answers that nobody verified are: one step off by one, the rest following from it.
    """

    def __init__(
        self,
        split: str,
        task: str = "chain_sum",
        options: dict[str, Any] | None = None,
        worked: bool = True,
        spaced_digits: bool = False,
        limit: int | None = None,
        slips: float = 0.0,
        seed: int = 0,
    ):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, allowed are {', '.join(SPLITS)}.")
        if worked and task not in WORKED_STEPS:
            raise ValueError(f"worked is true but task {task!r} has no worked steps, only {', '.join(WORKED_STEPS)}.")
        if limit is not None and limit < 1:
            raise ValueError(f"limit is {limit}, it must be at least 1 or null.")
        if not 0 <= slips <= 1 or (slips and not worked):
            raise ValueError(
                f"slips is {slips}, it must be a share from 0 to 1 of worked answers (worked is {worked})."
            )
        self.slips = slips
        self.split, self.task, self.worked, self.limit, self.spaced_digits = split, task, worked, limit, spaced_digits
        self.options = dict(options or {})
        self._source = _create(task, self.options)
        self.set_seed(seed)

    def set_seed(self, seed: int) -> None:
        # Under a limit the set itself stays the same for every seed; only its order changes.
        self.seed = seed
        self._base = _number(self.split, 0 if self.limit else seed) << 24
        self._order: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, index: int) -> Problem:
        if self.limit is not None:
            epoch, place = divmod(index, self.limit)
            index = self._permutation(epoch)[place]
        for candidate in range(STRIDE):
            entry = self._source[self._base + index * STRIDE + candidate]
            if split_of(problem_key(entry)) == self.split:
                return self.problem(entry)
        raise ValueError(f"{self.task} with options {self.options} has no problem in split {self.split!r}.")

    def held_out(self, count: int) -> list[Problem]:
        """The first ``count`` distinct problems of this split: the same ones for every seed."""
        base, found = _number(self.split, "held-out") << 24, dict[str, Problem]()
        for index in range(EVAL_CANDIDATES):
            entry = self._source[base + index]
            key = problem_key(entry)
            if key not in found and split_of(key) == self.split:
                found[key] = self.problem(entry)
                if len(found) == count:
                    return list(found.values())
        raise ValueError(
            f"{self.task} with options {self.options} has {len(found)} held-out problems, {count} were asked for."
        )

    def problem(self, entry: dict[str, Any]) -> Problem:
        expression = entry["metadata"].get("expression")
        prompt = f"{expression} =" if self.task in WORKED_STEPS and expression else entry["question"]
        answer, steps = entry["answer"], []
        if self.worked and expression:
            slip = _number("slip", problem_key(entry)) if self.slips else None
            steps = WORKED_STEPS[self.task](
                expression, slip if slip is not None and slip < self.slips * 2**32 else None
            )
            answer = steps[-1].rpartition(" ")[2] if steps else answer
        solution = "\n".join([*steps, f"{ANSWER_MARK} {answer}"])
        if self.spaced_digits:
            prompt, solution = space_digits(prompt), space_digits(solution)
        return Problem(prompt, solution, entry)

    def score(self, problem: Problem, response: str) -> float:
        """1.0 when the task's own verifier accepts the answer after the last mark, else 0.0."""
        answer = extract_answer(response)
        if answer is None:
            return 0.0
        if self.spaced_digits:
            answer = join_digits(answer)
        try:
            score = self._source.score_answer(answer=answer, entry=problem.entry)
        except (ValueError, TypeError, ArithmeticError, SyntaxError):
            return 0.0  # some tasks raise on an answer that is not of their kind
        return float(score >= ACCEPT)

    def _permutation(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(self.limit or 0))
            random.Random(_number(self.split, self.seed, epoch)).shuffle(order)
            self._order = (epoch, order)
        return self._order[1]


def extract_answer(response: str) -> str | None:
    """What follows the last ``ANSWER_MARK``, to the end; None without a mark."""
    _, mark, answer = response.rpartition(ANSWER_MARK)
    return answer.strip() if mark else None


def space_digits(text: str) -> str:
    return re.sub(r"(?<=\d)(?=\d)", " ", text)


def join_digits(text: str) -> str:
    return re.sub(r"(?<=\d) (?=\d)", "", text)


def chain_sum_steps(expression: str, slip: int | None = None) -> list[str]:
    """One line a term: "3 + 4 = 7", "7 - 9 = -2". A number for ``slip`` decides which line is off by one, and which way."""
    first, *rest = expression.split()
    total, lines = int(first), list[str]()
    if len(rest) % 2 or not set(rest[::2]) <= {"+", "-"}:
        raise ValueError(f"worked steps exist for sums of + and - alone, not for {expression!r}; set worked to false.")
    wrong = None if slip is None or not rest else slip % (len(rest) // 2)
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        if len(lines) == wrong:
            after += 1 if (slip or 0) // 64 % 2 or not after else -1
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return lines


WORKED_STEPS = {"chain_sum": chain_sum_steps, "basic_arithmetic": chain_sum_steps}


def _create(task: str, options: dict[str, Any]) -> Any:
    from reasoning_gym.factory import DATASETS, create_dataset

    if task not in DATASETS:
        raise ValueError(f"task is {task!r}, which reasoning-gym does not have; it has for example chain_sum.")
    try:
        return create_dataset(task, seed=0, size=2**62, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"options {options} do not suit task {task!r}: {error}.") from error


def _number(*parts: object) -> int:
    """A 32-bit number drawn from the parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
