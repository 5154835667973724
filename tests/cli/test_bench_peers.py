"""Peers at our configuration: as many parameters, a step that learns, and a sentence when one is not installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from litseek.cli.__main__ import main
from litseek.cli.bench_peers import TorchTitan, Transformers
from litseek.models.config import DeepSeekV3Config

SMALL = DeepSeekV3Config(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0,
    intermediate_size=48, moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
    n_group=2, topk_group=1, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, max_position_embeddings=64, initializer_range=0.1,
)  # fmt: skip


def test_transformers_steps():
    peer = Transformers(SMALL, 2, 16, torch.device("cpu"), compile=False, seed=0)
    assert sum(p.numel() for p in peer.model.parameters()) == SMALL.num_params()
    assert all(p.dtype == torch.bfloat16 for p in peer.model.parameters())
    peer.optimizer.param_groups[0]["lr"] = 1e-2
    losses = [float(peer().detach()) for _ in range(20)]
    assert losses[-1] < losses[0] and torch.get_default_dtype() == torch.float32
    assert peer.about.startswith("transformers ")


def test_torchtitan_is_asked_for_our_model(monkeypatch: pytest.MonkeyPatch):
    """With stand-ins for its classes, since it is rarely installed: what they are given, and that a step can be made."""

    class Theirs(torch.nn.Module):
        def __init__(self, args: types.SimpleNamespace):
            super().__init__()
            self.args = args
            self.embed, self.head = (
                torch.nn.Embedding(args.vocab_size, args.dim),
                torch.nn.Linear(args.dim, args.vocab_size),
            )
            self.layers = torch.nn.ModuleDict()

        def init_weights(self, device: torch.device) -> None:
            assert device.type == "cpu"

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    path = "torchtitan.models.deepseek_v3.model"
    for name, offered in (
        (f"{path}.args", {"DeepSeekV3ModelArgs": types.SimpleNamespace}),
        (f"{path}.model", {"DeepSeekV3Model": Theirs}),
        ("torchtitan.models.moe", {"MoEArgs": types.SimpleNamespace}),
    ):
        module = types.ModuleType(name)
        vars(module).update(offered)
        monkeypatch.setitem(sys.modules, name, module)
    for parent in ("torchtitan", "torchtitan.models", "torchtitan.models.deepseek_v3", path):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.2")
    peer = TorchTitan(SMALL, 2, 16, torch.device("cpu"), compile=False, seed=0)
    args = peer.model.args
    assert (args.dim, args.n_layers, args.n_dense_layers, args.q_lora_rank, args.max_seq_len) == (32, 2, 1, 16, 16)
    assert (args.moe_args.num_experts, args.moe_args.top_k, args.moe_args.num_limited_groups) == (4, 2, 1)
    assert float(peer().detach()) > 0 and peer.about.startswith("torchtitan 0.2.2")


def test_the_ratio_is_ours_over_the_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [
        *(
            "bench",
            "model=tiny",
            "model.num_nextn_predict_layers=0",
            "model.num_hidden_layers=2",
            "model.vocab_size=64",
            "seq_len=32",
            "vs=[transformers]",
        ),
        *("batch=2", "steps=1", "warmup=0", "compile=false", "device=cpu", f"results={tmp_path / 'r.csv'}"),
    ]
    assert main(words) == 0
    ours, peer = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert (ours["implementation"], peer["implementation"]) == ("litseek", "transformers")
    assert peer["ratio"] == pytest.approx(ours["tokens_per_s"] / peer["tokens_per_s"], abs=1e-3)


def test_a_peer_that_is_not_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchtitan" else found(name, *a))
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "vs=[torchtitan]"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "torchtitan, which is not installed" in err


def test_a_peer_without_mtp_is_no_comparison(capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "model=tiny", "vs=[transformers]"]) == 1
    assert "model.num_nextn_predict_layers=1: only 0 can be compared" in capsys.readouterr().err
