"""Multi-head latent attention through the kernels against the same through their references."""

import pytest
import torch

from litseek.models.config import DeepSeekV3Config
from litseek.models.mla import MLA
from litseek.models.norm import RMSNorm
from litseek.models.rope import rotation
from litseek.precision import FP32


def config(q_lora_rank):
    return DeepSeekV3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=3,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("q_lora_rank", [None, 24])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_change_nothing(recompute, q_lora_rank, device, monkeypatch):
    cfg = config(q_lora_rank)
    norm, attention = RMSNorm(32, 1e-6), MLA(cfg, FP32(), recompute)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, seed = torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    positions = torch.arange(7).expand(2, 7) + torch.tensor([[0], [40]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]])

    def run(device):
        modules = torch.nn.ModuleList([norm, attention]).to(device)
        leaf = x.to(device).requires_grad_()
        out = attention(leaf, norm, rotation(cfg, positions.to(device)), documents.to(device))
        grads = torch.autograd.grad(out, [leaf, *modules.parameters()], seed.to(device))
        return [t.detach().cpu() for t in (out, *grads)]

    want = run("cpu")
    if device == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    for got, wanted in zip(run(device), want):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
