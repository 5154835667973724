"""Shapes, counts, phases, recompute and the cached forms of the model."""

from pathlib import Path

import pytest
import torch
import yaml

from litseek.data.batch import IGNORE, MicroBatch
from litseek.models.config import DeepSeekV3Config
from litseek.models.transformer import Transformer
from litseek.precision import BF16
from tests.models.parity import YARN, relative, tiny_config, with_biases

SHAPES = {
    "v3_671b": (671_026_404_352, 36_625_603_584, 11_610_067_968),
    "v3_16b": (15_706_484_224, 2_451_435_008, 0),
    "yardstick": (3_788_740_096, 659_527_168, 0),
    "small": (399_804_672, 102_140_160, 32_346_496),
    "tiny": None,
}


def shape(name: str) -> DeepSeekV3Config:
    values = yaml.safe_load((Path(__file__).parents[2] / "conf" / "model" / f"{name}.yaml").read_text())
    assert values.pop("_target_") == "litseek.models.config.DeepSeekV3Config"
    return DeepSeekV3Config(**values)


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_builds_on_meta_with_the_stated_counts(name):
    cfg = shape(name)
    with torch.device("meta"):
        model = Transformer(cfg)
    assert sum(p.numel() for p in model.parameters()) == cfg.num_params()
    if SHAPES[name]:
        main, active, mtp = SHAPES[name]
        assert cfg.replace(num_nextn_predict_layers=0).num_params() == main
        assert cfg.num_params() - main == mtp
        assert cfg.num_active_params() == active


def test_flops_per_token_of_the_yardstick_and_the_report():
    assert shape("yardstick").flops_per_token(4096) == pytest.approx(4.963e9, rel=1e-3)
    assert shape("v3_671b").flops_per_token(4096) * 1543 == pytest.approx(385e12, rel=5e-3)  # its causal TFLOP/s


@pytest.mark.parametrize("recompute_documents", [False, True])
@pytest.mark.parametrize("length", [20, 1056])  # plain softmax, then SDPA
def test_recompute_changes_nothing(recompute_documents, length):
    cfg = tiny_config(num_nextn_predict_layers=2, aux_loss_alpha=0.01, num_hidden_layers=2)
    micro = MicroBatch.of(torch.randint(0, 97, (1, length)))
    if recompute_documents:
        micro.documents = torch.arange(length)[None] // 7
    results = []
    for recompute in (False, True):
        model = with_biases(Transformer(cfg, recompute=recompute, seed=5))
        state = model(micro)
        loss = sum(state[k].square().mean() for k in ("hidden", "mtp.0", "mtp.1")) + state["aux"]
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}, state["loads"]))
    (loss, gradients, loads), (again, gradients_again, loads_again) = results
    assert relative(again, loss) < 1e-5
    assert all(torch.equal(loads[k], loads_again[k]) for k in loads)
    assert set(loads) == {"layers.1.attend", "mtp.0.attend", "mtp.1.attend"}
    for name, gradient in gradients.items():
        if gradient is not None:
            assert relative(gradients_again[name], gradient) < 1e-5, name


def test_recompute_keeps_fewer_bytes():
    micro = MicroBatch.of(torch.randint(0, 97, (1, 1056)))
    kept = []
    for recompute in (False, True):
        model, saved = Transformer(tiny_config(), recompute=recompute), {}

        def pack(t, saved=saved):
            saved[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            state = model(micro)
        kept.append(sum(saved.values()))
        del state
    assert kept[1] < 0.75 * kept[0]


class ListCache:
    """The plainest latent cache: a dense tensor a layer."""

    def __init__(self, cfg, batch, length):
        self.length = length
        self.layers = [
            (torch.zeros(batch, length, cfg.kv_lora_rank), torch.zeros(batch, length, cfg.qk_rope_head_dim))
            for _ in range(cfg.num_hidden_layers)
        ]

    def layer(self, index):
        c, k = self.layers[index]

        class Layer:
            def write(self, positions, c_new, k_new):
                rows = torch.arange(len(c))[:, None]
                c[rows, positions], k[rows, positions] = c_new, k_new

            def read(self, length):
                return c[:, :length], k[:, :length]

        return Layer()


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("scaling", [None, YARN])
@torch.no_grad()
def test_cached_forms_equal_the_plain_logits(absorbed, scaling):
    model = with_biases(Transformer(tiny_config(rope_scaling=scaling), seed=2)).eval()
    tokens = torch.randint(0, 97, (3, 24))
    expected = model.logits(tokens)
    cache = ListCache(model.cfg, 3, 24)
    positions = torch.arange(24).expand(3, 24)
    first = model.forward_cached(tokens[:, :9], positions[:, :9], cache, absorbed)
    steps = [model.forward_cached(tokens[:, i : i + 1], positions[:, i : i + 1], cache, absorbed) for i in range(9, 24)]
    got = model.head_logits(torch.cat([first, *steps], dim=1))
    assert (got - expected).abs().max() < 1e-4


def test_documents_are_isolated():
    model = with_biases(Transformer(tiny_config(), seed=2)).eval()
    a, b = torch.randint(0, 97, (1, 11)), torch.randint(0, 97, (1, 6))
    packed = MicroBatch.of(torch.cat([a, b], dim=1))
    packed.positions = torch.cat([torch.arange(11), torch.arange(6)])[None]
    packed.documents = torch.cat([torch.zeros(11), torch.ones(6)]).long()[None]
    logits = model.head_logits(model(packed)["hidden"])
    assert (logits[:, :11] - model.logits(a)).abs().max() < 1e-5
    assert (logits[:, 11:] - model.logits(b)).abs().max() < 1e-5


def test_bf16_runs_and_is_near_fp32():
    # every expert chosen: rounding must not flip a choice here
    cfg = tiny_config(initializer_range=0.05, n_group=1, topk_group=1, num_experts_per_tok=8)
    micro = MicroBatch.of(torch.randint(0, 97, (2, 16), generator=torch.Generator().manual_seed(0)))
    exact = Transformer(cfg, seed=1)(micro)["hidden"]
    model = Transformer(cfg, BF16(), seed=1)
    state = model(micro)
    assert state["hidden"].dtype == torch.bfloat16
    assert relative(state["hidden"].float(), exact) < 0.02
    state["hidden"].float().square().mean().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_initial_weights_depend_on_seed_and_name_only():
    whole, short = Transformer(tiny_config(), seed=4), Transformer(tiny_config(num_hidden_layers=2), seed=4)
    other = Transformer(tiny_config(), seed=5)
    name = "layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(whole.get_parameter(name), short.get_parameter(name))
    assert not torch.equal(whole.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_routed_experts=10), ("n_group=4", "n_routed_experts=10")),
        (dict(topk_group=5), ("topk_group=5", "n_group=4")),
        (dict(num_experts_per_tok=5), ("num_experts_per_tok=5", "topk_group=2")),
        (dict(first_k_dense_replace=4), ("first_k_dense_replace=4", "num_hidden_layers=3")),
        (dict(qk_rope_head_dim=7), ("qk_rope_head_dim=7",)),
        (dict(rope_scaling={"factr": 4}), ("rope_scaling.factr", "factor")),
        (dict(rope_scaling={"type": "linear"}), ("linear", "yarn")),
        (dict(scoring_func="softmax"), ("softmax", "sigmoid")),
    ],
)
def test_contradictions_are_refused_by_name(changes, words):
    with pytest.raises(ValueError) as error:
        tiny_config(**changes)
    assert all(word in str(error.value) for word in words)


def test_labels_of_a_plain_batch():
    micro = MicroBatch.of(torch.tensor([[3, 4, 5]]))
    assert micro.labels.tolist() == [[4, 5, IGNORE]] and micro.targets == 2


def test_logits_past_the_range_are_refused():
    model = Transformer(tiny_config(max_position_embeddings=8))
    with pytest.raises(ValueError, match=r"tokens have 9 positions, model\.max_position_embeddings=8"):
        model.logits(torch.zeros(1, 9, dtype=torch.int64))
