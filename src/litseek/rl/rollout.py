"""Rollouts: G completions a prompt, their rewards and advantages (report §5.2).

Letters: N samples (prompts x G), S sequence (prompt and completion, right-padded).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from litseek.data.batch import IGNORE, MicroBatch
from litseek.losses.grpo import group_advantages


@dataclass
class Rollout:
    """One batch of experience; all of it is plain tensors, so that it lives in the checkpoint."""

    index: int
    """Which rollout of the run this is; with the seed it decides all of its randomness."""
    tokens: Tensor
    """(N, S) int64, right-padded."""
    prompt_length: Tensor
    """(N,) int64."""
    length: Tensor
    """(N,) int64, prompt and completion."""
    finished: Tensor
    """(N,) bool: the end token came before the length limit."""
    reward: Tensor
    """(N,) float32."""
    correct: Tensor
    """(N,) float32: 1 where the verifier accepts."""
    advantage: Tensor
    """(N,) float32."""
    old_logprobs: Tensor
    """(N, S) float32: of ``labels`` under the policy that sampled, scored by the training executor; 0 elsewhere and for
    samples that teach nothing."""
    ref_logprobs: Tensor
    """(N, S) float32 under the frozen reference; (N, 0) when the KL term is off."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def labels(self) -> Tensor:
        """(N, S) int64: the completion's tokens, shifted by one; ``IGNORE`` for prompt and padding."""
        place = torch.arange(self.tokens.shape[1]).expand_as(self.tokens)
        scored = (place >= self.prompt_length[:, None] - 1) & (place < self.length[:, None] - 1)
        shifted = torch.roll(self.tokens, -1, dims=1)
        return torch.where(scored, shifted, torch.full_like(shifted, IGNORE))

    def micro(self, rows: slice | Tensor) -> MicroBatch:
        """Some samples as a micro-batch; ``extra`` carries what the loss needs."""
        # No further than the longest sample among them: padding costs attention for nothing.
        width = int(self.length[rows].max())
        tokens = self.tokens[rows, :width]
        extra = {"advantage": self.advantage[rows], "old_logprobs": self.old_logprobs[rows, :width]}
        if self.ref_logprobs.shape[1]:
            extra["ref_logprobs"] = self.ref_logprobs[rows, :width]
        return MicroBatch(
            tokens=tokens,
            labels=self.labels[rows, :width],
            positions=torch.arange(width).expand_as(tokens).contiguous(),
            targets=float(len(tokens)),
            extra=extra,
        )

    def state_dict(self) -> dict[str, Tensor]:
        return {"index": torch.tensor(self.index)} | {f.name: getattr(self, f.name) for f in fields(self)[1:]}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> Rollout:
        return cls(index=int(state["index"]), **{f.name: state[f.name].cpu() for f in fields(cls)[1:]})

    def metrics(self) -> dict[str, float]:
        return {
            "rollout/reward": float(self.reward.mean()),
            "rollout/accuracy": float(self.correct.mean()),
            "rollout/response_tokens": float((self.length - self.prompt_length).float().mean()),
            "rollout/finished": float(self.finished.float().mean()),
        }


def collect(
    index: int,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    finished: Sequence[bool],
    rewards: Sequence[float],
    correct: Sequence[float],
    group: int,
    pad: int = 0,
) -> Rollout:
    """Put N completions of N / group prompts into one buffer; log-probabilities come later."""
    assert len(completions) == len(prompts) * group == len(rewards) == len(correct) == len(finished)
    rows = [[*prompts[n // group], *completion] for n, completion in enumerate(completions)]
    width = max(len(row) for row in rows)
    reward = torch.tensor(rewards, dtype=torch.float32)
    return Rollout(
        index=index,
        tokens=torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        prompt_length=torch.tensor([len(prompts[n // group]) for n in range(len(rows))]),
        length=torch.tensor([len(row) for row in rows]),
        finished=torch.tensor(finished, dtype=torch.bool),
        reward=reward,
        correct=torch.tensor(correct, dtype=torch.float32),
        advantage=group_advantages(reward.view(-1, group)).reshape(-1),
        old_logprobs=torch.zeros(len(rows), width),
        ref_logprobs=torch.zeros(len(rows), 0),
    )


def stream_seed(seed: int, *parts: int | str) -> int:
    """A seed for one stream of randomness: a function of the run's seed and the parts, of no global state."""
    digest = hashlib.sha256(repr((seed, *parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
