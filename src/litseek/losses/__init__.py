"""Pure loss functions."""

from litseek.losses.balance import batch_balance, sequence_balance
from litseek.losses.cross_entropy import IGNORE, linear_cross_entropy, token_logprobs
from litseek.losses.grpo import group_advantages, grpo_loss, kl_k3
from litseek.losses.mtp import mtp_labels, mtp_loss

__all__ = [
    "IGNORE",
    "batch_balance",
    "group_advantages",
    "grpo_loss",
    "kl_k3",
    "linear_cross_entropy",
    "mtp_labels",
    "mtp_loss",
    "sequence_balance",
    "token_logprobs",
]
