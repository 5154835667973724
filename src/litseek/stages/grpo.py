"""Group relative policy optimisation against verifiable rewards (report §5.2.2). Letters: N samples, S sequence."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from litseek.data.batch import IGNORE, MicroBatch
from litseek.errors import LitseekError
from litseek.inference.engine import Sampling
from litseek.losses import grpo_loss, token_logprobs
from litseek.models.transformer import Transformer, build
from litseek.parallel.checkpoint import load_weights
from litseek.parallel.executor import Executor, State
from litseek.rl.rewards import Rewards, Sample
from litseek.rl.rollout import Rollout, collect, stream_seed
from litseek.stages.accuracy import judge
from litseek.stages.base import Schedule, StageModule
from litseek.stages.loader import Batch
from litseek.stages.scores import Scores

LEVELS = ("token", "sequence")


class Grpo(StageModule):
    """One step is one update on a whole rollout: ``batch`` samples, ``group`` of them (G) for each prompt.

    Every ``updates_per_rollout`` steps the current policy samples anew, at ``temperature`` and at most ``max_tokens``
    long; an answer that does not end gets what its rewards give an unfinished one. ``rewards``: name -> weight, see
    ``litseek.rl.rewards``. ``clip`` is epsilon, ``beta`` weighs the KL term (0: no reference model is kept), ``level``
    "token" or "sequence". The balance biases are frozen unless ``balance_speed`` is set; MTP depths stay as they are.
    ``accuracy`` judges held-out problems before the first step, at every validation and at the end.

    All ranks sample, each its share of the prompts' answers (`StageModule.generating`), and then know the whole rollout;
    a rank trains on its part of the global batch. The reference lies on the ranks as the policy does.
    """

    name = "grpo"

    def __init__(
        self,
        *args: Any,
        group: int = 16,
        updates_per_rollout: int = 1,
        rewards: Mapping[str, float] | None = None,
        max_tokens: int = 64,
        temperature: float = 1.0,
        clip: float = 0.2,
        beta: float = 0.04,
        level: str = "token",
        max_generate: int = 256,
        balance_speed: Schedule = 0.0,
        **keys: Any,
    ) -> None:
        self.group, self.updates_per_rollout = group, updates_per_rollout
        self.rewards = Rewards(rewards if rewards is not None else {"verifier": 1.0})
        self.max_tokens, self.temperature, self.max_generate = max_tokens, temperature, max_generate
        self.clip, self.beta, self.level = clip, beta, level
        self.rollout: Rollout | None = None
        self._trained_share = 1.0
        self.sampling_gap = 0.0
        """Mean distance between the engine's and the executor's log-probabilities of the sampled tokens."""
        super().__init__(*args, mtp_weight=0.0, balance_speed=balance_speed, **keys)

    def check(self) -> None:
        super().check()
        if not isinstance(self.batch, int):
            raise ValueError("stage.batch must be a number for grpo: every rollout has as many samples.")
        if self.group < 2:
            raise ValueError(
                f"stage.group={self.group} must be at least 2: an advantage compares answers to one prompt."
            )
        if self.batch % self.group:
            raise ValueError(f"stage.batch={self.batch} is not a multiple of stage.group={self.group}.")
        if self.updates_per_rollout < 1:
            raise ValueError(f"stage.updates_per_rollout={self.updates_per_rollout} must be at least 1.")
        if self.temperature <= 0:
            raise ValueError(f"stage.temperature={self.temperature} must be above 0: equal answers teach nothing.")
        if self.level not in LEVELS:
            raise ValueError(f"stage.level is {self.level!r}, allowed are {', '.join(LEVELS)}.")
        if self.clip <= 0 or self.beta < 0:
            raise ValueError(f"stage.clip={self.clip} must be above 0 and stage.beta={self.beta} not below 0.")
        if not 0 < self.max_tokens < self.data.seq_len:
            raise ValueError(
                f"stage.max_tokens={self.max_tokens} leaves no room for a prompt in data.seq_len={self.data.seq_len}."
            )

    # -- model --------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        super().configure_model()
        self.model.mtp.requires_grad_(False)

    def phases(self) -> list[Any]:
        """Up to the final norm: no loss here reads the MTP depths."""
        phases = self.model.phases()
        return phases[: [phase.name for phase in phases].index("norm") + 1]

    def on_train_start(self) -> None:
        if self.step == 0 and self.accuracy is not None:
            before = judge(self, self.accuracy)["eval/accuracy"]
            self.results["eval/accuracy_before"] = before
            self.report({"eval/accuracy": before})
        self._reference = self._make_reference() if self.beta else None

    def _make_reference(self) -> Executor:
        """The model as it was when the stage began, frozen, and cut like the policy."""
        with self._home():
            reference: Transformer = build(self.cfg, self.precision, False, self.seed)
        phases = reference.phases()[: len(self.phases())]
        self.strategy.team.partition(reference, phases, self.data.seq_len)
        if self.strategy.spread:
            group = self.strategy.writer.group
            self.strategy.team.fill(reference, lambda pieces: self.fill(pieces, group), self.seed)
        elif self.parent is not None:
            load_weights(reference, self.parent)
        reference.to(self.device).requires_grad_(False).eval()
        self._reference_head = reference.lm_head.weight
        return self.strategy.executor_of(phases)

    # -- data ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        assert isinstance(self.batch, int)
        prompts = self.batch // self.group
        if prompts % self.strategy.dp:
            raise ValueError(
                f"stage.batch={self.batch} holds {prompts} prompts of stage.group={self.group} samples, which "
                f"{self.strategy.dp} data-parallel ranks cannot share equally."
            )

    def train_dataloader(self) -> Iterable[Batch]:
        return _Steps(self)

    def val_dataloader(self) -> Iterable[Batch]:
        return [{}]  # nothing to score: validation is the judging

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The answers are sampled once, when the epoch ends."""

    def measured(self, scores: Scores, reduced: bool = False) -> dict[str, float]:
        return {} if self.accuracy is None else judge(self, self.accuracy)

    def final_metrics(self) -> dict[str, float]:
        return self.measured(Scores())

    # -- rollouts -----------------------------------------------------------------------------------------------

    def inputs(self, batch: Batch) -> list[MicroBatch]:
        index = self.step // self.updates_per_rollout
        if self.rollout is None or self.rollout.index != index:
            self.rollout = self.roll(index)
        self.log_dict(self.rollout.metrics())
        self.log("rollout/logprob_gap", self.sampling_gap)
        trained = sum(len(rows) for rank in range(self.strategy.dp) for rows in self._rows(self.rollout, rank))
        self._trained_share = trained / len(self.rollout)
        return self._micros(self.rollout)

    def roll(self, index: int) -> Rollout:
        """Sample, reward and score rollout ``index``; all its randomness comes from (seed, index)."""
        assert isinstance(self.batch, int)
        count = self.batch // self.group
        prompts = [self.data[index * count + i] for i in range(count)]
        for prompt in prompts:
            if len(prompt.ids) + self.max_tokens > self.data.seq_len:
                raise LitseekError(
                    f"A prompt of {len(prompt.ids)} tokens and stage.max_tokens={self.max_tokens} exceed "
                    f"data.seq_len={self.data.seq_len}: {prompt.problem.prompt[:60]!r}."
                )
        sampling = Sampling(
            self.max_tokens,
            self.temperature,
            stop=(self.data.tokenizer.eos_id,),
            seed=stream_seed(self.seed, "rollout", index),
        )
        rank, world = self.strategy.global_rank, self.strategy.world_size
        first, last = self.batch * rank // world, self.batch * (rank + 1) // world
        asked = [prompts[n // self.group].ids for n in range(first, last)]
        with self.generating() as engine:
            found = engine.generate(asked, sampling, self.max_generate, first)
        answers = list(zip(found.lists(), found.stopped.tolist(), found.logprobs.tolist(), strict=True))
        answers = list(chain.from_iterable(self.strategy.sums.objects(answers)))
        scored = [
            self._reward(index, n, prompts[n // self.group].problem, tokens, stopped)
            for n, (tokens, stopped, _) in enumerate(answers)
        ]
        rollout = collect(
            index,
            [p.ids for p in prompts],
            [tokens for tokens, _, _ in answers],
            [stopped for _, stopped, _ in answers],
            [reward for reward, _ in scored],
            [correct for _, correct in scored],
            self.group,
            self.data.tokenizer.pad_id,
        )
        rollout.old_logprobs = self._score(rollout, self.strategy.executor, self.model.lm_head.weight)
        if self._reference is not None:
            rollout.ref_logprobs = self._score(rollout, self._reference, self._reference_head)
        self.sampling_gap = _gap(rollout, [logprobs for _, _, logprobs in answers]) if self.temperature == 1 else 0.0
        return rollout

    def _reward(self, index: int, n: int, problem: Any, tokens: list[int], finished: bool) -> tuple[float, float]:
        """(reward, verdict of the task's verifier) of sample n."""
        response = self.data.tokenizer.decode(tokens)
        draw = random.Random(stream_seed(self.seed, "reward", index, n))
        reward = self.rewards(Sample(self.data.problems, problem, response, finished, len(tokens), draw))
        return reward, self.data.problems.score(problem, response) if finished else 0.0

    def _score(self, rollout: Rollout, executor: Executor, head_VD: Tensor) -> Tensor:
        """(N, S) log-probabilities by forward passes of the very micro-batches that are trained on: the same shapes,
        so that the first update's ratio is 1 to the last bit."""
        out_NS = torch.zeros(rollout.tokens.shape)

        def head(state: State, micro: MicroBatch) -> Tensor:
            return self._logprobs(state, micro, head_VD)

        rows = self._rows(rollout, self.strategy.dp_rank)
        parts = executor.forward(self._micros(rollout), head, until="norm")
        for rows_R, part in zip(rows, parts):  # blank micro-batches come last
            if part is not None:  # scored by the rank that has the head
                out_NS[rows_R, : part.shape[1]] = part.cpu()
        return self.strategy.sum(out_NS.to(self.device)).cpu()

    def _rows(self, rollout: Rollout, rank: int) -> list[Tensor]:
        """A rank's samples in micro-batches of like length. Without a KL term a sample of advantage 0 has no gradient
        and is left out."""
        share = len(rollout) // self.strategy.dp
        mine = torch.arange(rank * share, (rank + 1) * share)
        if not self.beta:
            mine = mine[rollout.advantage[mine] != 0]
            if not len(mine):
                return []
        mine = mine[torch.argsort(rollout.length[mine], stable=True)]
        return list(mine.split(self.micro_batch))

    def _micros(self, rollout: Rollout) -> list[MicroBatch]:
        micros = [rollout.micro(rows) for rows in self._rows(rollout, self.strategy.dp_rank)]
        if not micros:  # every rank runs the executor
            micros = [rollout.micro(torch.zeros(1, dtype=torch.int64)).blanked()]
        if not self.beta:  # otherwise all samples are there, as many on every rank as `setup` has checked
            most = max(1, *(len(self._rows(rollout, rank)) for rank in range(self.strategy.dp)))
            micros = self.strategy.filled(micros, most)
        for micro in micros:  # found here, as a search on a GPU would make the host wait for its length
            micro.extra["places"] = (micro.labels != IGNORE).flatten().nonzero()[:, 0]
        return [micro.to(self.device) for micro in micros]

    # -- loss ---------------------------------------------------------------------------------------------------

    def head_loss(self, hidden: State, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_NS = self._logprobs(hidden, micro, self.model.lm_head.weight)
        mask_NS = micro.labels != IGNORE
        loss, metrics = grpo_loss(
            logprobs_NS,
            micro.extra["old_logprobs"],
            micro.extra["advantage"],
            mask_NS,
            micro.extra.get("ref_logprobs"),
            clip=self.clip,
            beta=self.beta,
            level=self.level,
        )
        # the mean surprise of sampled tokens estimates the policy's entropy without its whole distribution
        metrics["entropy"] = -logprobs_NS.detach().sum() / mask_NS.sum().clamp(min=1)
        # the executor averages over the samples it is given; the others count with a loss of 0
        return loss * self._trained_share, metrics

    def _logprobs(self, state: State, micro: MicroBatch, head_VD: Tensor) -> Tensor:
        """(N, S) log-probabilities of the labels at the sampling temperature; the head runs on scored places only."""
        places = micro.extra["places"]
        hidden_MD = state["hidden"].flatten(0, 1).index_select(0, places)
        labels_M = micro.labels.flatten().index_select(0, places)
        dtype = self.precision.compute_dtype
        found_M = token_logprobs(hidden_MD, head_VD, labels_M, self.temperature, compute_dtype=dtype)
        return found_M.new_zeros(micro.labels.numel()).index_copy(0, places, found_M).view(micro.labels.shape)

    # -- checkpoints --------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["sampling_gap"] = self.sampling_gap
        if self.rollout is not None:
            checkpoint["rollout"] = self.rollout.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.sampling_gap = float(checkpoint["sampling_gap"])
        if "rollout" in checkpoint:
            self.rollout = Rollout.from_state_dict(checkpoint["rollout"])


class _Steps:
    """Endless empty batches: which samples a step trains on follows from its number alone."""

    def __init__(self, stage: Grpo) -> None:
        self.stage = stage

    def __iter__(self) -> Iterator[Batch]:
        first, count = self.stage.consumed, self.stage.batch_size(self.stage.consumed)
        while True:
            yield {"first": first, "count": count}
            first += count


def _gap(rollout: Rollout, sampled: list[list[float]]) -> float:
    """Mean |log p by the engine - log p by the executor| over the tokens that the executor scored."""
    total, count = 0.0, 0
    scored_N = rollout.old_logprobs.any(dim=1).tolist()
    for n, logprobs in enumerate(sampled):
        if not scored_N[n]:
            continue
        start, end = int(rollout.prompt_length[n]) - 1, int(rollout.length[n]) - 1
        scored = rollout.old_logprobs[n, start:end]
        total += float((scored - torch.tensor(logprobs[: end - start])).abs().sum())
        count += end - start
    return total / max(count, 1)
