"""Group relative policy optimisation (report §5.2.2). Letters: G outputs of a batch, T token places of one."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards_PG: Tensor, eps: float = 1e-6) -> Tensor:
    """A = (r - mean) / std within each prompt's group (report §5.2.2, eq. 28), float32, the rewards' shape (..., G).

    The population's standard deviation. A group whose rewards are all alike says nothing and gets exactly 0.
    """
    rewards_PG = rewards_PG.float()
    centred_PG = rewards_PG - rewards_PG.mean(dim=-1, keepdim=True)
    std_P1 = rewards_PG.std(dim=-1, keepdim=True, correction=0)
    return torch.where(std_P1 > eps, centred_PG / std_P1.clamp(min=eps), 0.0)


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """pi_ref/pi - log(pi_ref/pi) - 1 (report §5.2.2, eq. 27): never negative, unbiased for KL(pi || pi_ref)."""
    log_ratio = reference_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1


def grpo_loss(
    logprobs_GT: Tensor,
    old_logprobs_GT: Tensor,
    advantages_G: Tensor,
    mask_GT: Tensor,
    reference_logprobs_GT: Tensor | None = None,
    *,
    clip: float = 0.2,
    beta: float = 0.0,
    level: str = "token",
) -> tuple[Tensor, dict[str, Tensor]]:
    """-mean over outputs of min(rho A, clip(rho, 1 - eps, 1 + eps) A) - beta KL (report §5.2.2, eq. 26).

    ``logprobs`` are of the sampled tokens under the policy (with gradient), when sampled, and under the frozen
    reference (needed when beta > 0); ``mask`` marks the output's tokens. ``level`` "token" forms rho and KL for each
    token, averages over each output, then over outputs (DeepSeekMath); "sequence" forms them once for the whole
    output, as the report writes it. An output without tokens counts as 0.
    Metrics, detached: ``clip_fraction`` (of tokens or outputs, where the clip cut the gradient), ``kl``, ``ratio``.
    """
    if level not in ("token", "sequence"):
        raise ValueError(f"level is '{level}', allowed are 'token' and 'sequence'")
    if beta and reference_logprobs_GT is None:
        raise ValueError(f"beta is {beta}, so reference_logprobs are needed and none were given")
    mask_GT = mask_GT.bool()
    length_G = mask_GT.sum(dim=1).clamp(min=1)

    def over_output(x_GT: Tensor) -> Tensor:  # where, not a product: padding may hold inf or nan
        return torch.where(mask_GT, x_GT, 0.0).sum(dim=1)

    if level == "sequence":
        policy, old = over_output(logprobs_GT), over_output(old_logprobs_GT)
        reference = None if reference_logprobs_GT is None else over_output(reference_logprobs_GT)
        advantages, counted = advantages_G, mask_GT.any(dim=1)

        def mean(x: Tensor) -> Tensor:
            return torch.where(counted, x, 0.0).mean()
    else:
        # padding is made equal everywhere first, so that its ratio is 1 and no gradient of it can be nan
        policy, old = (torch.where(mask_GT, x, 0.0) for x in (logprobs_GT, old_logprobs_GT))
        reference = None if reference_logprobs_GT is None else torch.where(mask_GT, reference_logprobs_GT, 0.0)
        advantages, counted = advantages_G[:, None], mask_GT

        def mean(x: Tensor) -> Tensor:
            return (over_output(x) / length_G).mean()

    ratio = (policy - old).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -mean(torch.minimum(ratio * advantages, clipped * advantages))
    kl = torch.zeros_like(ratio) if reference is None else kl_k3(policy, reference)
    if beta:
        loss = loss + beta * mean(kl)
    with torch.no_grad():
        cut = (clipped * advantages < ratio * advantages) & counted
        metrics = {
            "clip_fraction": cut.sum() / counted.sum().clamp(min=1),
            "kl": mean(kl),
            "ratio": (ratio * counted).sum() / counted.sum().clamp(min=1),
        }
    return loss, metrics
