"""Muon: which parameters take it, what the update is, and that its state survives."""

import pytest
import torch
from torch import nn

from litseek.optim import MuonConfig
from litseek.optim import muon as module
from litseek.optim.muon import orthogonal


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed_tokens.weight": (20, 8),
        "layers.0.self_attn.o_proj.weight": (8, 12),
        "layers.1.mlp.gate.weight": (4, 8),
        "layers.1.mlp.experts.gate_up_proj": (4, 12, 8),
        "layers.1.mlp.shared_experts.gate_proj.weight": (8, 12),
        "norm.weight": (8,),
        "lm_head.weight": (20, 8),
    }
    return [(n, nn.Parameter(torch.randn(s, generator=generator))) for n, s in shapes.items()]


def step(named, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, param in named:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (1, 24, 24)])
def test_singular_values_come_near_one(shape):
    x = orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0)), steps=5)
    values = torch.linalg.svdvals(x)
    assert x.shape == shape and values.min() > 0.4 and values.max() < 1.3


def test_each_expert_is_a_matrix_of_its_own():
    x = torch.randn(4, 12, 8, generator=torch.Generator().manual_seed(1))
    one = torch.stack([orthogonal(e[None], 5)[0] for e in x])
    torch.testing.assert_close(orthogonal(x, 5), one, rtol=0, atol=0.02)
    torch.testing.assert_close(
        orthogonal(x * torch.tensor([1.0, 100.0, 0.01, 1.0])[:, None, None], 5), one, rtol=0, atol=0.05
    )


def test_hidden_matrices_and_experts_take_muon_the_rest_adamw():
    named = parameters()
    optimizer = MuonConfig().build(named)
    muon, rest = optimizer.param_groups
    assert muon["param_names"] == [
        "layers.0.self_attn.o_proj.weight",
        "layers.1.mlp.experts.gate_up_proj",
        "layers.1.mlp.shared_experts.gate_proj.weight",
    ]
    assert len(rest["param_names"]) == 4
    step(named, optimizer, 0)
    kinds = {n: set(optimizer.state[p]) for n, p in named}
    assert kinds["layers.1.mlp.experts.gate_up_proj"] == {"step", "momentum"}
    assert kinds["lm_head.weight"] == {"step", "exp_avg", "exp_avg_sq"}


def test_update_has_the_size_of_an_adamw_step():
    named = parameters()
    before = {n: p.detach().clone() for n, p in named}
    step(named, MuonConfig(lr=1e-2, weight_decay=0.0).build(named), 0)
    for name, param in named:
        rms = (param.detach() - before[name]).square().mean().sqrt()
        assert 0.1e-2 < rms < 1.1e-2, name


def test_batching_by_shape_does_not_mix_parameters():
    named = parameters()
    alone = dict(named)["layers.0.self_attn.o_proj.weight"].detach().clone().requires_grad_()
    both = MuonConfig(moments="fp32").build(named)
    single = MuonConfig(moments="fp32").build([("layers.0.self_attn.o_proj.weight", nn.Parameter(alone))])
    step(named, both, 0)
    param = single.param_groups[0]["params"][0]
    param.grad = dict(named)["layers.0.self_attn.o_proj.weight"].grad
    single.step()
    torch.testing.assert_close(param, dict(named)["layers.0.self_attn.o_proj.weight"], rtol=1e-2, atol=1e-4)


def test_resume_is_bit_equal(tmp_path):
    straight = parameters()
    optimizer = MuonConfig().build(straight)
    for seed in range(4):
        step(straight, optimizer, seed)
    named = parameters()
    first = MuonConfig().build(named)
    for seed in range(2):
        step(named, first, seed)
    torch.save(first.state_dict(), tmp_path / "state")
    second = MuonConfig().build(named)
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for seed in range(2, 4):
        step(named, second, seed)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(straight, named))


def test_buckets_keep_order_and_size(monkeypatch):
    monkeypatch.setattr(module, "BUCKET", 30)
    sizes = [10, 10, 10, 1, 99, 5]
    buckets = [[p.numel() for p in bucket] for bucket in module.buckets([torch.zeros(n) for n in sizes])]
    assert buckets == [[10, 10, 10], [1], [99], [5]]
