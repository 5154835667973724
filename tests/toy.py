"""A model and a data source small enough for tests of everything around them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from litseek.data.batch import IGNORE
from litseek.models.config import DeepSeekV3Config
from litseek.models.transformer import Transformer
from litseek.optim import AdamWConfig
from litseek.precision import FP32

SEQ = 16


def toy_config(**changes: Any) -> DeepSeekV3Config:
    return DeepSeekV3Config(
        **{
            **dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, first_k_dense_replace=1, intermediate_size=48),
            **dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1),
            **dict(num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4),
            **dict(v_head_dim=8, max_position_embeddings=SEQ, num_nextn_predict_layers=1, aux_loss_alpha=0.01),
            **dict(initializer_range=0.1),
            **changes,
        }
    )


def with_biases(model: Transformer, size: float = 0.3) -> Transformer:
    """Balance biases other than zero: zero would hide a gate that weighs by biased scores."""
    generator = torch.Generator().manual_seed(7)
    for router in model.balance_routers().values():
        bias = router.e_score_correction_bias
        bias.copy_(torch.randn(bias.shape, generator=generator) * size)
    return model


class ToyTokenizer:
    """As much of the tokenizer as a stage asks for."""

    vocab_size = 64
    pad_id = 0

    class raw:
        @staticmethod
        def to_str() -> str:
            return json.dumps({"toy": True})

    def check_fits(self, vocab_size: int) -> None:
        assert vocab_size >= self.vocab_size


class ToySource:
    """Rows in which each token is its predecessor plus a step of the row's own; a function of (seed, i)."""

    def __init__(self, seq_len: int = SEQ, documents: bool = False, held_out: int = 5) -> None:
        self.seq_len, self.documents, self.held_out = seq_len, documents, held_out
        self.seed = 0
        self.tokenizer = ToyTokenizer()
        self.asked: list[int] = []
        self.inherited: Path | None = None

    def set_seed(self, seed: int) -> None:
        self.seed = seed

    def use_tokenizer(self, path: Path) -> None:
        self.inherited = path

    def prepare(self, cache_dir: Path) -> None:
        pass

    def row(self, *key: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(hash(key) % 2**31)
        start, step = (int(torch.randint(1, 6, (), generator=g)) for _ in range(2))
        ids = (start + step * torch.arange(self.seq_len + 1)) % 60 + 1
        row = {"tokens": ids[:-1], "labels": ids[1:].clone(), "positions": torch.arange(self.seq_len)}
        if self.documents:
            half = self.seq_len // 2
            row["documents"] = (torch.arange(self.seq_len) >= half).long()
            row["positions"] = torch.arange(self.seq_len) % half
            row["labels"][: 2 + start] = IGNORE
            row["labels"][half - 1] = IGNORE
        return row

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        self.asked.append(i)
        return self.row(self.seed, i)

    def validation(self) -> list[dict[str, torch.Tensor]]:
        return [self.row(-1, i) for i in range(self.held_out)]

    @property
    def validation_text(self) -> bytes:
        return b"the bytes of these tokens, three each" * 7

    @property
    def validation_bytes(self) -> int:
        return len(self.validation_text)


def toy_optim(**changes: Any) -> AdamWConfig:
    return AdamWConfig(**{"lr": 3e-3, "moments": "fp32", **changes})


def toy_stage(
    cls: type,
    *,
    model: dict[str, Any] | None = None,
    precision: Any = None,
    data: Any = None,
    optim: Any = None,
    **keys: Any,
) -> Any:
    """A stage over the toy source; ``model`` changes fields of the toy configuration."""
    return cls(
        toy_config(**(model or {})),
        precision or FP32(),
        optim or toy_optim(),
        data or ToySource(),
        **{"batch": 4, "micro_batch": 2, "seed": 3, **keys},
    )
