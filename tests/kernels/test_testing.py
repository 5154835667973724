"""The timer, the error measure and the shape grids that all kernels share."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from litseek_kernels.testing import DENSE, GROUPED, MODELS, median_ms, relative_error, turns, uneven_counts

CONF = Path(__file__).resolve().parents[2] / "conf" / "model"
FIELDS = {
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "expert": "moe_intermediate_size",
    "experts": "n_routed_experts",
    "chosen": "num_experts_per_tok",
    "heads": "num_attention_heads",
    "q_lora": "q_lora_rank",
    "kv_lora": "kv_lora_rank",
    "vocab": "vocab_size",
    "shared": "n_shared_experts",
}


@pytest.mark.parametrize("model", MODELS)
def test_the_grids_are_the_models(model: str):
    conf = yaml.safe_load((CONF / f"{model}.yaml").read_text(encoding="utf-8"))
    for ours, theirs in FIELDS.items():
        assert getattr(MODELS[model], ours) == conf[theirs], theirs
    assert conf["qk_nope_head_dim"] + conf["qk_rope_head_dim"] == 192 and conf["v_head_dim"] == 128


def test_grids_hold_the_anchors_shapes():
    assert (8, 1024, 4096, 7168) in GROUPED and (64, 1536, 1536, 768) in GROUPED
    assert (8192, 2112 - 1536, 7168) in DENSE  # kv_a_proj_with_mqa of the 671B: 576 wide


def test_relative_error():
    ref = torch.tensor([3.0, 4.0])
    assert relative_error(ref * 1.01, ref) == pytest.approx(0.01)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert math.isnan(relative_error(torch.tensor([3.0, math.nan]), ref))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        relative_error(torch.zeros(3), ref)


def test_uneven_counts_sum_up():
    count = uneven_counts(64, 12345)
    assert count.sum() == 12345 and (count >= 0).all() and (count == 0).any() and count.unique().numel() > 16
    assert uneven_counts(1, 7).tolist() == [7] and uneven_counts(4, 0).sum() == 0


def test_median_counts_calls():
    calls = []
    assert median_ms(lambda: calls.append(1), warmup=1, rep=2) < 100
    assert len(calls) > 2


def test_turns_go_round():
    made = iter(range(9))
    sets = turns(lambda: next(made), 3)
    assert [next(sets) for _ in range(5)] == [0, 1, 2, 0, 1]
