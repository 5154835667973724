"""The router through its kernels against the router through their references: one decision, one gradient."""

import pytest
import torch
from litseek_kernels.testing import relative_error

from litseek.models.moe import Router
from tests.toy import toy_config

WHERE = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=WHERE)
def device(request, monkeypatch) -> str:
    if request.param == "interpreter":
        if torch.cuda.is_available():
            pytest.skip("kernels were compiled for the GPU in this process")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        return "cpu"
    return "cuda"


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("per_sequence", [True, False], ids=["per sequence", "per batch"])
def test_kernels_decide_as_the_references(device, monkeypatch, per_sequence, training):
    cfg = toy_config(n_routed_experts=12, n_group=3, topk_group=2, num_experts_per_tok=4, seq_aux=per_sequence)
    router = Router(cfg, aux_weight=0.01).train(training)
    torch.nn.init.normal_(router.weight, std=0.2)
    router.e_score_correction_bias.normal_(std=0.1)
    u = torch.randn(2, 19, cfg.hidden_size).bfloat16()
    seed = torch.randn(38, 4)

    def run(where: str):
        there = router.to(where)
        x = u.to(where).requires_grad_()
        out = there(x)
        loss = (out.weight_TK * seed.to(where)).sum() + (out.aux if training else 0)
        return out, torch.autograd.grad(loss, (x, there.weight))

    out, grads = run(device)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wanted, exact = run("cpu")
    assert torch.equal(out.expert_TK.cpu(), wanted.expert_TK) and torch.equal(out.load_E.cpu(), wanted.load_E)
    assert relative_error(out.weight_TK.cpu(), wanted.weight_TK) < 1e-6
    assert (out.aux is None) == (wanted.aux is None) == (not training)
    if training:
        assert relative_error(out.aux.cpu(), wanted.aux) < 1e-6
    assert relative_error(grads[0].cpu(), exact[0]) < 6e-3  # bfloat16, which the interpreter cuts instead of rounding
    assert relative_error(grads[1].cpu(), exact[1]) < 1e-5
