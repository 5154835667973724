"""Prefill and decode of a batch over the latent cache (report §3.4, on one device).

Letters: B sequences asked for, A sequences still running, S prompt positions, N new tokens, V vocabulary, D model.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from litseek.errors import LitseekError
from litseek.inference.cache import LatentCache
from litseek.models.transformer import Transformer

PAD = 0
"""Fills positions after a sequence's end; never seen by a real one."""
_SCORE_BUDGET = 2**26
"""Attention scores (B x heads x new x cached) that one prefill chunk may hold: 256 MiB in float32."""
_COMPACT_BELOW = 0.75
"""Finished sequences are dropped from the batch when this share or less is still running."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The same seed gives sequence i the same random numbers in any batch."""

    max_tokens: int = 256
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Smallest set of tokens whose probabilities reach this sum; 1 is all of them."""
    stop: tuple[int, ...] = ()
    """Token ids that end a sequence; the one met is kept in the output."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be at least 0 (0 is greedy)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")


@dataclass(frozen=True)
class Generation:
    """What was generated, in the order of the prompts."""

    tokens: Tensor
    """(B, N) int64, ``PAD`` after a sequence's end."""
    lengths: Tensor
    """(B,) int64 new tokens, the stop token included."""
    logprobs: Tensor
    """(B, N) float32: log-probability of each token under the model itself (temperature 1, no top-p); 0 where padded."""
    stopped: Tensor
    """(B,) bool: ended by a stop token, not by a limit."""

    def lists(self) -> list[list[int]]:
        """New tokens of each sequence, without padding."""
        return [row[:length] for row, length in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]


class Engine:
    """Generates with one model on its device.

    ``absorbed`` picks the form of MLA that decodes; the tokens are the same. Prefill always up-projects: for many new
    positions at once the products with 128 wide heads cost less than those with the 512 wide latent.
    ``pace`` is for ranks that share the model's experts, all of which must `generate` at once: each says before every
    forward pass whether it still has a token to find, and hears whether any of them has.
    """

    def __init__(self, model: Transformer, absorbed: bool = True, pace: Callable[[bool], bool] | None = None) -> None:
        self.model, self.absorbed, self.pace = model, absorbed, pace

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, max_batch: int = 256, first: int = 0
    ) -> Generation:
        """Continue every prompt. ``first`` is the first prompt's number in the stream of random numbers.

        LitseekError where a prompt is empty or leaves no room in the model's range; a sequence that reaches the end of
        the range stops there.
        """
        parts = [
            self._generate_batch(prompts[i : i + max_batch], sampling, first + i)
            for i in range(0, len(prompts), max_batch)
        ]
        if not parts:
            parts = [self._empty(0, sampling)]
        self._keep_pace()
        return Generation(*(torch.cat(column) for column in zip(*map(_columns, parts), strict=True)))

    def stream(self, prompt: Sequence[int], sampling: Sampling, index: int = 0) -> Iterator[int]:
        """The same tokens as ``generate`` gives for this one prompt, each as soon as it is there."""
        for step in self._steps([prompt], sampling, index):
            yield int(step.token_A[0])

    def _generate_batch(self, prompts: Sequence[Sequence[int]], sampling: Sampling, first: int) -> Generation:
        out = self._empty(len(prompts), sampling)
        for n, step in enumerate(self._steps(prompts, sampling, first)):
            out.tokens[step.row_A, n] = step.token_A
            out.logprobs[step.row_A, n] = step.logprob_A
            out.lengths[step.row_A] = n + 1
            out.stopped[step.row_A] = step.stopped_A
        return out

    @torch.no_grad()
    def _steps(self, prompts: Sequence[Sequence[int]], sampling: Sampling, first: int) -> Iterator[_Step]:
        """One item a decoding step: the sequences that got a token in it, their tokens and log-probabilities."""
        device = self.model.norm.weight.device
        cfg = self.model.cfg
        lengths = self._checked_lengths(prompts)
        longest = max(lengths)
        max_new = min(sampling.max_tokens, cfg.max_position_embeddings - min(lengths))
        cache = LatentCache(
            cfg,
            len(prompts),
            min(longest + max_new, cfg.max_position_embeddings),
            device,
            self._cache_dtype(),
        )
        position_A = torch.tensor(lengths, device=device)
        limit_A = (cfg.max_position_embeddings - position_A).clamp_max(sampling.max_tokens)
        row_A = torch.arange(len(prompts), device=device)
        uniform_BN = _uniforms(sampling, first, len(prompts), max_new).to(device)
        stop = torch.tensor(sampling.stop, dtype=torch.int64, device=device)
        hidden_AD = self._prefill(prompts, position_A, cache)
        done_A = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        for n in range(max_new):
            token_A, logprob_A = choose(self.model.head_logits(hidden_AD), sampling, uniform_BN[row_A, n])
            stopped_A = torch.isin(token_A, stop) & ~done_A
            running = ~done_A
            yield _Step(row_A[running], token_A[running], logprob_A[running], stopped_A[running])
            done_A = done_A | stopped_A | (n + 1 >= limit_A)
            alive = int((~done_A).sum())
            if alive == 0:
                return
            if alive <= _COMPACT_BELOW * len(done_A):
                kept = (~done_A).nonzero()[:, 0]
                cache.keep(kept)
                row_A, token_A, position_A, limit_A, done_A = (
                    t[kept] for t in (row_A, token_A, position_A, limit_A, done_A)
                )
                longest = int(position_A.max()) - n
            # A finished sequence that is still in the batch may be at the last slot: it stays there.
            slot_A = position_A.clamp_max(cache.max_len - 1)
            cache.length = min(longest + n + 1, cache.max_len)
            hidden = self._forward(token_A[:, None], slot_A[:, None], cache, self.absorbed)
            hidden_AD = hidden[:, 0]
            position_A = position_A + 1

    def _prefill(self, prompts: Sequence[Sequence[int]], length_B: Tensor, cache: LatentCache) -> Tensor:
        """(B, D): the state at each prompt's last token. Prompts are padded on the right and read in chunks."""
        longest = max(map(len, prompts))
        tokens_BS = torch.tensor([[*p, *[PAD] * (longest - len(p))] for p in prompts], device=length_B.device)
        chunk = max(1, _SCORE_BUDGET // (len(prompts) * self.model.cfg.num_attention_heads * longest))
        last_BD: Tensor | None = None
        for start in range(0, longest, chunk):
            end = min(start + chunk, longest)
            cache.length = end
            position_BS = torch.arange(start, end, device=length_B.device).expand(len(prompts), -1)
            hidden = self._forward(tokens_BS[:, start:end], position_BS, cache, absorbed=False)
            here = (length_B - 1 - start).clamp(0, end - start - 1)
            state_BD = hidden[torch.arange(len(prompts), device=here.device), here]
            inside = ((length_B > start) & (length_B <= end))[:, None]
            last_BD = state_BD if last_BD is None else torch.where(inside, state_BD, last_BD)
        assert last_BD is not None
        return last_BD

    def _forward(self, tokens_BS: Tensor, position_BS: Tensor, cache: LatentCache, absorbed: bool) -> Tensor:
        if self.pace is not None:
            self.pace(True)
        return self.model.forward_cached(tokens_BS, position_BS, cache, absorbed)

    @torch.no_grad()
    def _keep_pace(self) -> None:
        """Nothing is left to do here: pass one token along as long as another rank needs the experts that lie here."""
        while self.pace is not None and self.pace(False):
            device = self.model.norm.weight.device
            cache = LatentCache(self.model.cfg, 1, 1, device, self._cache_dtype())
            cache.length = 1
            zero_11 = torch.zeros(1, 1, dtype=torch.int64, device=device)
            self.model.forward_cached(zero_11, zero_11, cache, self.absorbed)

    def _checked_lengths(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        limit = self.model.cfg.max_position_embeddings
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise LitseekError(f"prompt {i + 1} is empty: it needs at least one token")
            if len(prompt) >= limit:
                raise LitseekError(
                    f"prompt {i + 1} has {len(prompt)} tokens, and the model's range of {limit} positions "
                    f"(max_position_embeddings) allows at most {limit - 1}"
                )
        return [len(prompt) for prompt in prompts]

    def _cache_dtype(self) -> torch.dtype:
        """The precision's, but float64 for a float64 model, which is an oracle."""
        own = self.model.norm.weight.dtype
        return own if own == torch.float64 else self.model.precision.compute_dtype

    def _empty(self, batch: int, sampling: Sampling) -> Generation:
        device = self.model.norm.weight.device
        shape = (batch, sampling.max_tokens)
        return Generation(
            torch.full(shape, PAD, dtype=torch.int64, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(batch, dtype=torch.bool, device=device),
        )


def choose(logits_AV: Tensor, sampling: Sampling, uniform_A: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (A,) and their log-probabilities under ``logits`` as they are. ``uniform_A`` in [0, 1) is all the chance."""
    logits_AV = logits_AV.float()
    if sampling.temperature == 0:
        token_A = logits_AV.argmax(-1)
    else:
        weight_AV = (logits_AV / sampling.temperature).softmax(-1)
        if sampling.top_p < 1:
            sorted_AV, order_AV = weight_AV.sort(dim=-1, descending=True, stable=True)
            before_AV = sorted_AV.cumsum(-1) - sorted_AV
            place_A = _draw(sorted_AV.masked_fill(before_AV >= sampling.top_p, 0.0), uniform_A)
            token_A = order_AV.gather(-1, place_A[:, None])[:, 0]
        else:
            token_A = _draw(weight_AV, uniform_A)
    logprob_A = logits_AV.gather(-1, token_A[:, None])[:, 0] - logits_AV.logsumexp(-1)
    return token_A, logprob_A


def _draw(weight_AV: Tensor, uniform_A: Tensor) -> Tensor:
    """The first index whose cumulated weight passes ``uniform`` of the whole; never one of weight 0."""
    total_AV = weight_AV.cumsum(-1)
    whole_A = total_AV[:, -1]
    threshold_A = torch.minimum(uniform_A * whole_A, torch.nextafter(whole_A, torch.zeros_like(whole_A)))
    return torch.searchsorted(total_AV, threshold_A[:, None], right=True)[:, 0]


def _uniforms(sampling: Sampling, first: int, count: int, steps: int) -> Tensor:
    """(B, N) in [0, 1): a stream of its own for each sequence, whoever else is in the batch."""
    if sampling.temperature == 0:
        return torch.zeros(count, steps)
    rows = []
    for index in range(first, first + count):
        # The CPU generator looks at 32 bits of its seed only, so both numbers are hashed into them.
        seed = zlib.crc32(f"{sampling.seed}/{index}".encode())
        rows.append(torch.rand(steps, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)


class _Step(NamedTuple):
    """One decoding step, for the sequences that were running in it."""

    row_A: Tensor
    token_A: Tensor
    logprob_A: Tensor
    stopped_A: Tensor


def _columns(part: Generation) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return part.tokens, part.lengths, part.logprobs, part.stopped
