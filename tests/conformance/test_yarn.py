"""YaRN on the decoupled rotary part (report §4.3), against the paper's formula and transformers' own."""

import math

import pytest
import torch
from transformers import DeepseekV3Config as TheirConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from litseek.models import rope
from litseek.models.config import ROPE_SCALING_DEFAULTS, DeepSeekV3Config
from tests.conformance.slow import YARN, Slow, frequencies, model_of, random_tokens, tiny
from tests.models.parity import relative, theirs, tiny_config, with_biases

REPORT = DeepSeekV3Config(rope_scaling=ROPE_SCALING_DEFAULTS, max_position_embeddings=163840)
SCALINGS = {
    "report, s = 40": {},
    "32K only": dict(factor=8.0),
    "short original": dict(original_max_position_embeddings=256),
    "no stretch": dict(factor=1.0),
    "other betas": dict(beta_fast=8.0, beta_slow=2.0),
}


def their_rotary(cfg: DeepSeekV3Config) -> DeepseekV3RotaryEmbedding:
    keys = ("qk_rope_head_dim", "qk_nope_head_dim", "rope_theta", "max_position_embeddings", "num_attention_heads")
    scaling = dict(cfg.rope_scaling) if cfg.rope_scaling else None
    config = TheirConfig(**{k: getattr(cfg, k) for k in keys}, num_hidden_layers=1, rope_scaling=scaling)
    return DeepseekV3RotaryEmbedding(config)


@pytest.mark.parametrize("changes", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("width", [64, 8])
def test_report_4_3_frequencies_equal_the_formula_and_transformers(changes, width):
    cfg = DeepSeekV3Config(rope_scaling={**ROPE_SCALING_DEFAULTS, **changes}, qk_rope_head_dim=width)
    ours = rope.frequencies(cfg)
    assert ours.dtype == torch.float32 and ours.shape == (width // 2,)
    assert torch.allclose(ours.double(), torch.tensor(frequencies(cfg), dtype=torch.float64), rtol=1e-6)
    assert torch.equal(ours, their_rotary(cfg).inv_freq)  # a unit in the last place is 0.008 radians at 128K


def test_report_4_3_ramp_runs_between_pairs_10_and_23_of_32():
    assert rope.ramp_bounds(REPORT) == (10, 23)
    plain = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    ratio = rope.frequencies(REPORT).double() / plain
    assert torch.allclose(ratio[:11], torch.ones(11, dtype=torch.float64), rtol=1e-6)  # fast pairs keep their speed
    assert torch.allclose(ratio[23:], torch.full((9,), 1 / 40, dtype=torch.float64), rtol=1e-6)
    ramp = torch.tensor([i / 13 for i in range(1, 13)], dtype=torch.float64)
    assert torch.allclose(ratio[11:23], ramp / 40 + 1 - ramp, rtol=1e-6)


def test_report_2_1_1_frequencies_without_yarn_are_theta_to_the_pair():
    expected = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)], dtype=torch.float64)
    assert torch.allclose(rope.frequencies(DeepSeekV3Config()).double(), expected, rtol=1e-6)


def test_report_4_3_softmax_scale_is_the_attention_factor_squared():
    factor = 0.1 * math.log(40) + 1
    assert rope.softmax_scale(REPORT) == pytest.approx(factor**2 / math.sqrt(192), rel=1e-12)
    assert rope.softmax_scale(REPORT) == pytest.approx(0.135234, abs=5e-7)
    assert rope.softmax_scale(DeepSeekV3Config()) == pytest.approx(1 / math.sqrt(192), rel=1e-12)
    no_stretch = DeepSeekV3Config(rope_scaling={**ROPE_SCALING_DEFAULTS, "factor": 1.0})
    assert rope.softmax_scale(no_stretch) == pytest.approx(1 / math.sqrt(192), rel=1e-12)


def test_report_4_3_the_model_multiplies_by_that_scale():
    with_yarn = model_of(tiny(rope_scaling=YARN))
    other = theirs(with_biases(model_of(tiny_config(rope_scaling=YARN))))
    assert with_yarn.layers[0].self_attn.scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(10))
    assert other.model.layers[0].self_attn.scaling == pytest.approx((0.1 * math.log(40) + 1) ** 2 / math.sqrt(20))


def test_report_4_3_cos_and_sin_are_not_scaled():
    positions = torch.tensor([[0, 1, 5, 4096, 131071]])
    cos, sin = rope.rotation(REPORT, positions)
    assert torch.allclose(cos**2 + sin**2, torch.ones_like(cos), atol=1e-6)
    angle = positions[..., None].double() * rope.frequencies(REPORT).double()
    assert (cos - angle.cos()).abs().max() < 0.02  # angles are float32, as in transformers
    their_cos, their_sin = their_rotary(REPORT)(torch.zeros(1), positions)
    assert torch.equal(cos, their_cos[..., :32]) and torch.equal(sin, their_sin[..., :32])


def test_report_4_3_cos_and_sin_take_the_factor_when_the_mscales_differ():
    for changes in (dict(mscale=0.707), dict(mscale_all_dim=0.0), dict(mscale=0.707, mscale_all_dim=0.5)):
        cfg = DeepSeekV3Config(rope_scaling={**ROPE_SCALING_DEFAULTS, **changes})
        m, all_dim = cfg.rope_scaling["mscale"], cfg.rope_scaling["mscale_all_dim"]
        expected = (0.1 * m * math.log(40) + 1) / (0.1 * all_dim * math.log(40) + 1)
        cos, _ = rope.rotation(cfg, torch.zeros(1, 1, dtype=torch.int64))
        assert cos[0, 0, 0].item() == pytest.approx(expected, rel=1e-6)


def test_report_4_3_the_same_scaled_frequencies_turn_query_and_key():
    """Score of rotary parts depends on the distance only, and both turn by the slow oracle's frequencies."""
    freq = rope.frequencies(REPORT).double()
    query, key = torch.randn(2, 64, dtype=torch.float64)
    scores = []
    for position in (3, 700, 3000):
        positions = torch.tensor([[position, position - 3]])
        cos, sin = rope.rotation(REPORT, positions)
        turned = rope.rotate(torch.stack([query, key])[None, :, None], cos, sin)[0, :, 0]
        scores.append((turned[0] @ turned[1]).item())
    pairs = (query.view(-1, 2) * key.view(-1, 2)).sum(-1) * (3 * freq).cos()
    cross = query.view(-1, 2)[:, 1] * key.view(-1, 2)[:, 0] - query.view(-1, 2)[:, 0] * key.view(-1, 2)[:, 1]
    expected = (pairs - cross * (3 * freq).sin()).sum().item()
    assert scores == pytest.approx([expected] * 3, abs=5e-3)


def test_report_2_1_1_rotary_pairs_are_interleaved():
    """As in the released weights: dimensions 2j and 2j + 1 turn together."""
    x = torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    x[..., 2] = 1.0
    cos, sin = torch.tensor([[[0.8, 0.6]]]), torch.tensor([[[0.6, 0.8]]])
    assert torch.allclose(rope.rotate(x, cos, sin).flatten(), torch.tensor([0, 0, 0.6, 0.8], dtype=torch.float64))


@torch.no_grad()
def test_report_4_3_short_sequences_use_yarn_too():
    """As transformers, and unlike the released demo, which scales above the original length only."""
    cfg = tiny_config(rope_scaling={**YARN, "original_max_position_embeddings": 64})
    model = with_biases(model_of(cfg)).eval()
    tokens = random_tokens(2, 12)  # far shorter than 64
    assert (model.logits(tokens) - theirs(model)(tokens).logits).abs().max() < 1e-4
    plain = model_of(cfg.replace(rope_scaling=None))
    plain.load_state_dict(model.state_dict())
    assert (model.logits(tokens) - plain.eval().logits(tokens)).abs().max() > 1e-2


@torch.no_grad()
def test_report_4_3_positions_beyond_the_original_length_follow_the_formulas():
    model = model_of(tiny(rope_scaling=YARN)).eval()  # original length 16
    x = torch.randn(1, 5, 16)
    positions = [3, 90, 91, 400, 600]
    out = model.layers[0].self_attn(x, torch.nn.Identity(), rope.rotation(model.cfg, torch.tensor([positions])), None)
    expected = Slow(model).attention("layers.0.self_attn", list(x[0].double()), positions, [0] * 5)
    assert relative(out[0].double(), torch.stack(expected)) < 1e-4  # float32 angles


def test_report_4_3_left_out_keys_take_the_reports_values():
    cfg = DeepSeekV3Config(rope_scaling={"factor": 40})
    assert cfg.rope_scaling == ROPE_SCALING_DEFAULTS
    assert ROPE_SCALING_DEFAULTS["beta_slow"] == 1 and ROPE_SCALING_DEFAULTS["beta_fast"] == 32
