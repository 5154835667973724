"""Training steps of other projects at our configuration, for `litseek bench vs=[…]`; each is asked for as its users run it.

Both train pure BF16 weights with torch's fused AdamW: no FP32 master, no clip, no bias update, so less work and 21 GiB less
state than ours at the yardstick.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from litseek.errors import LitseekError
from litseek.models.config import DeepSeekV3Config


class _Peer(ABC):
    """A BF16 model with fused AdamW on random tokens; calling it makes one step and returns the loss."""

    package: str
    version: str
    """The one the adapter was written for."""

    def __init__(self, cfg: DeepSeekV3Config, batch: int, seq_len: int, device: torch.device, compile: bool, seed: int):
        torch.manual_seed(seed)
        self.about = f"{self.package} {importlib.metadata.version(self.package)}, BF16 weights, fused AdamW"
        with device, _default_dtype(torch.bfloat16):
            self.model = self.build(cfg, seq_len, compile)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=device.type == "cuda")
        self.ids = torch.randint(cfg.vocab_size, (batch, seq_len + 1), device=device)

    def __call__(self) -> Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    @abstractmethod
    def build(self, cfg: DeepSeekV3Config, seq_len: int, compile: bool) -> nn.Module: ...

    @abstractmethod
    def loss(self) -> Tensor: ...


class TorchTitan(_Peer):
    """torchtitan's DeepSeekV3Model, its blocks and loss compiled one by one as its trainer does."""

    package, version = "torchtitan", "0.2.2"

    def build(self, cfg: DeepSeekV3Config, seq_len: int, compile: bool) -> nn.Module:
        from torchtitan.models.deepseek_v3.model.args import DeepSeekV3ModelArgs
        from torchtitan.models.deepseek_v3.model.model import DeepSeekV3Model
        from torchtitan.models.moe import MoEArgs

        moe = MoEArgs(
            num_experts=cfg.n_routed_experts,
            num_shared_experts=cfg.n_shared_experts,
            top_k=cfg.num_experts_per_tok,
            num_expert_groups=cfg.n_group,
            num_limited_groups=cfg.topk_group,
            score_func="sigmoid",
            route_norm=cfg.norm_topk_prob,
            route_scale=cfg.routed_scaling_factor,
            score_before_experts=False,
            use_grouped_mm=True,
        )
        args = DeepSeekV3ModelArgs(
            max_seq_len=seq_len,
            vocab_size=cfg.vocab_size,
            dim=cfg.hidden_size,
            inter_dim=cfg.intermediate_size,
            moe_inter_dim=cfg.moe_intermediate_size,
            n_layers=cfg.num_hidden_layers,
            n_dense_layers=cfg.first_k_dense_replace,
            n_heads=cfg.num_attention_heads,
            q_lora_rank=cfg.q_lora_rank or 0,
            kv_lora_rank=cfg.kv_lora_rank,
            qk_nope_head_dim=cfg.qk_nope_head_dim,
            qk_rope_head_dim=cfg.qk_rope_head_dim,
            v_head_dim=cfg.v_head_dim,
            attn_type="sdpa",
            rope_factor=1.0,
            moe_args=moe,
        )
        args.moe_impl = "standard"
        model = DeepSeekV3Model(args)
        with torch.no_grad():
            model.init_weights(torch.get_default_device())
        self.cross_entropy: Callable[..., Tensor] = _cross_entropy
        if compile:
            torch._dynamo.config.capture_scalar_outputs = True
            for block in model.layers.values():
                block.compile(fullgraph=False)
            self.cross_entropy = torch.compile(_cross_entropy)
        return model

    def loss(self) -> Tensor:
        return self.cross_entropy(self.model(self.ids[:, :-1]), self.ids[:, 1:])


class Transformers(_Peer):
    """DeepseekV3ForCausalLM with SDPA and grouped products, compiled as a whole."""

    package, version = "transformers", "5.17"

    def build(self, cfg: DeepSeekV3Config, seq_len: int, compile: bool) -> nn.Module:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        theirs = DeepseekV3Config(
            vocab_size=cfg.vocab_size,
            hidden_size=cfg.hidden_size,
            num_hidden_layers=cfg.num_hidden_layers,
            first_k_dense_replace=cfg.first_k_dense_replace,
            intermediate_size=cfg.intermediate_size,
            moe_intermediate_size=cfg.moe_intermediate_size,
            n_routed_experts=cfg.n_routed_experts,
            n_shared_experts=cfg.n_shared_experts,
            num_experts_per_tok=cfg.num_experts_per_tok,
            n_group=cfg.n_group,
            topk_group=cfg.topk_group,
            routed_scaling_factor=cfg.routed_scaling_factor,
            norm_topk_prob=cfg.norm_topk_prob,
            num_attention_heads=cfg.num_attention_heads,
            num_key_value_heads=cfg.num_attention_heads,
            q_lora_rank=cfg.q_lora_rank,
            kv_lora_rank=cfg.kv_lora_rank,
            qk_nope_head_dim=cfg.qk_nope_head_dim,
            qk_rope_head_dim=cfg.qk_rope_head_dim,
            v_head_dim=cfg.v_head_dim,
            max_position_embeddings=seq_len,
            tie_word_embeddings=False,
            attn_implementation="sdpa",  # type: ignore[call-arg]
        )
        theirs._experts_implementation = "grouped_mm"
        model = DeepseekV3ForCausalLM(theirs)
        model.train()
        model.config.use_cache = False
        self.call: Callable[..., Any] = torch.compile(model) if compile else model
        return model

    def loss(self) -> Tensor:
        ids = self.ids[:, :-1]
        return self.call(input_ids=ids, labels=ids, use_cache=False).loss


PEERS: dict[str, type[_Peer]] = {"torchtitan": TorchTitan, "transformers": Transformers}


def require(name: str, cfg: DeepSeekV3Config) -> None:
    """Errors: LitseekError when the peer's package is not installed, or has no such model."""
    peer = PEERS[name]
    if importlib.util.find_spec(peer.package) is None:
        raise LitseekError(
            f"vs names {name}, which is not installed: pip install '{peer.package}' (written for {peer.version}), or leave it out."
        )
    if cfg.num_nextn_predict_layers:
        raise LitseekError(
            f"vs names {name}, which trains no MTP, but model.num_nextn_predict_layers={cfg.num_nextn_predict_layers}: "
            "only 0 can be compared."
        )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
