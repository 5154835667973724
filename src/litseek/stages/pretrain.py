"""Pre-training (report §2.2, §4.2)."""

from __future__ import annotations

from litseek.stages.base import StageModule


class Pretrain(StageModule):
    """Next-token and MTP loss over packed documents, balance by the routers' biases."""

    name = "pretrain"
    owns_rope = True
