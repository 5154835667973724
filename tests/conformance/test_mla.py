"""Multi-head latent attention, equation by equation (report §2.1.1). Balance biases are non-zero throughout."""

import math

import pytest
import torch

from litseek.data.batch import MicroBatch
from litseek.models.config import DeepSeekV3Config
from litseek.models.rope import rotation
from litseek.models.transformer import Transformer
from tests.conformance.slow import YARN, Slow, model_of, random_tokens, tiny
from tests.models.parity import relative

KINDS = {"plain": {}, "yarn": dict(rope_scaling=YARN), "no q_lora": dict(q_lora_rank=None)}
NAME = "layers.0.self_attn"


class Recorder:
    """A latent cache of one tensor a layer that remembers what it was given."""

    def __init__(self, cfg: DeepSeekV3Config, length: int):
        self.length, self.written = length, []
        width = cfg.kv_lora_rank + cfg.qk_rope_head_dim
        self.slots = torch.zeros(cfg.num_hidden_layers, length, width)
        self.rank = cfg.kv_lora_rank

    def layer(self, index: int):
        return RecorderLayer(self, index)


class RecorderLayer:
    def __init__(self, cache: Recorder, index: int):
        self.cache, self.index = cache, index

    def write(self, positions, c_kv, k_rope):
        assert len(positions) == 1
        self.cache.written.append((self.index, c_kv.clone(), k_rope.clone()))
        self.cache.slots[self.index, positions[0]] = torch.cat([c_kv, k_rope], dim=-1)[0]

    def read(self, length):
        return self.cache.slots[self.index, None, :length].split(
            [self.cache.rank, self.cache.slots.shape[-1] - self.cache.rank], dim=-1
        )


def states(cfg: DeepSeekV3Config, length: int = 6) -> torch.Tensor:
    return torch.randn(1, length, cfg.hidden_size, generator=torch.Generator().manual_seed(11))


def attention(model: Transformer, x: torch.Tensor, positions=None, documents=None) -> torch.Tensor:
    """The attention of layer 0 on already normed states."""
    if positions is None:
        positions = torch.arange(x.shape[1])[None]
    return model.layers[0].self_attn(x, torch.nn.Identity(), rotation(model.cfg, positions), documents)


def seen_by(module: torch.nn.Module, run) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a submodule while ``run`` runs."""
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    run()
    handle.remove()
    ((given, made),) = seen
    return given, made


def written_by(model: Transformer, tokens: torch.Tensor):
    """What each layer puts into its cache: (layer, c_kv, k_rope)."""
    cache = Recorder(model.cfg, tokens.shape[1])
    with torch.no_grad():
        model.forward_cached(tokens, torch.arange(tokens.shape[1])[None], cache)
    return cache.written


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_report_2_1_1_eq_1_to_11_whole_attention_and_its_gradients(changes):
    model = model_of(tiny(**changes))
    slow, x = Slow(model), states(model.cfg)
    mine = x.clone().requires_grad_()
    out = attention(model, mine)
    theirs = x.double().requires_grad_()
    expected = torch.stack(slow.attention(NAME, list(theirs[0]), list(range(6)), [0] * 6))
    assert relative(out[0].double(), expected) < 1e-6
    seed = torch.randn_like(expected)
    out[0].backward(seed.float())
    expected.backward(seed)
    assert relative(mine.grad.double(), theirs.grad) < 1e-5
    for name, parameter in model.layers[0].self_attn.named_parameters():
        assert relative(parameter.grad.double(), slow.w[f"{NAME}.{name}"].grad) < 1e-5, name


def test_report_2_1_1_eq_1_latent_is_a_projection_of_the_state_to_the_rank():
    model = model_of(tiny())
    x, mla = states(model.cfg), model.layers[0].self_attn
    c_kv, _ = seen_by(mla.kv_a_layernorm, lambda: attention(model, x))
    down = mla.kv_a_proj_with_mqa.weight[: model.cfg.kv_lora_rank]
    assert c_kv.shape == (1, 6, 7) and relative(c_kv, x @ down.T) < 1e-6


def test_report_4_2_latents_are_normed_before_they_are_projected_up():
    model = model_of(tiny())
    slow, x, mla = Slow(model), states(model.cfg), model.layers[0].self_attn
    given, _ = seen_by(mla.kv_b_proj, lambda: attention(model, x))
    expected = torch.stack([slow.latent(NAME, h, 0)[0] for h in x[0].double()])
    assert relative(given[0].double(), expected) < 1e-6
    given, _ = seen_by(mla.q_b_proj, lambda: attention(model, x))
    down = slow.w[f"{NAME}.q_a_proj.weight"]
    expected = torch.stack([slow.norm(f"{NAME}.q_a_layernorm", down @ h) for h in x[0].double()])
    assert relative(given[0].double(), expected) < 1e-6


def test_report_2_1_1_eq_2_and_5_heads_hold_their_key_then_their_value():
    """The rows of kv_b_proj lie head by head: k_nope, then v."""
    model = model_of(tiny())
    slow, x = Slow(model), states(model.cfg)
    _, made = seen_by(model.layers[0].self_attn.kv_b_proj, lambda: attention(model, x))
    expected = []
    for h in x[0].double():
        c_kv, _ = slow.latent(NAME, h, 0)
        expected.append(torch.cat([part for i in range(3) for part in slow.key_value(NAME, c_kv, i)]))
    assert relative(made[0].double(), torch.stack(expected)) < 1e-6


def test_report_2_1_1_eq_3_rotary_key_comes_straight_from_the_state():
    model = model_of(tiny())
    tokens = random_tokens(1, 5)
    (_, c_before, k_before), *_ = written_by(model, tokens)
    with torch.no_grad():
        model.layers[0].self_attn.kv_a_layernorm.weight *= 3
    (_, c_after, k_after), *_ = written_by(model, tokens)
    assert torch.equal(k_before, k_after) and relative(c_after, 3 * c_before) < 1e-6
    with torch.no_grad():
        model.layers[0].self_attn.kv_a_proj_with_mqa.weight *= 2
    (_, _, k_doubled), *_ = written_by(model, tokens)
    assert relative(k_doubled, 2 * k_before) < 1e-6  # a norm would have taken the 2 away


def test_report_2_1_1_eq_4_one_rotary_key_serves_all_heads():
    """Zero the unrotated queries: every head then scores with the one shared key, as the formula says."""
    model = model_of(tiny())
    cfg, x = model.cfg, states(model.cfg)
    with torch.no_grad():
        weight = model.layers[0].self_attn.q_b_proj.weight.view(3, cfg.qk_head_dim, -1)
        weight[:, : cfg.qk_nope_head_dim] = 0
        weight[1], weight[2] = weight[0], weight[0]  # equal queries: heads differ by keys only
    slow = Slow(model)
    given, _ = seen_by(model.layers[0].self_attn.o_proj, lambda: attention(model, x))
    hs = list(x[0].double())
    q = slow.query(NAME, hs[-1], 5, 0)[1]
    score = torch.stack([q @ slow.latent(NAME, h, j)[1] for j, h in enumerate(hs)]) / math.sqrt(cfg.qk_head_dim)
    weights = score.softmax(0)
    for head in range(3):
        values = torch.stack([slow.key_value(NAME, slow.latent(NAME, h, 0)[0], head)[1] for h in hs])
        mine = given[0, -1, head * cfg.v_head_dim : (head + 1) * cfg.v_head_dim]
        assert relative(mine.double(), weights @ values) < 1e-6


@pytest.mark.parametrize("changes", [{}, dict(q_lora_rank=None)], ids=["q_lora", "no q_lora"])
def test_report_2_1_1_eq_6_to_9_query_heads_are_unrotated_then_rotated(changes):
    """Equal positions turn nothing; shifting all positions alike changes nothing: only differences matter."""
    model = model_of(tiny(**changes))
    x = states(model.cfg)
    slow = Slow(model)
    still = attention(model, x, torch.zeros(1, 6, dtype=torch.int64))
    expected = torch.stack(slow.attention(NAME, list(x[0].double()), [0] * 6, [0] * 6))
    assert relative(still[0].double(), expected) < 1e-6
    plain, shifted = attention(model, x), attention(model, x, torch.arange(6)[None] + 37)
    assert relative(shifted, plain) < 1e-5 and relative(still, plain) > 1e-3


def test_report_2_1_1_eq_10_scale_counts_both_parts_of_the_query():
    cfg = DeepSeekV3Config()
    with torch.device("meta"):
        mla = Transformer(cfg.replace(num_hidden_layers=1, first_k_dense_replace=1)).layers[0].self_attn
    assert mla.scale == pytest.approx(1 / math.sqrt(192), rel=1e-12)


def test_report_2_1_1_eq_10_attention_is_causal():
    model = model_of(tiny()).eval()
    tokens = random_tokens(1, 9)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 31
    before, after = model.logits(tokens), model.logits(changed)
    change = (before - after).abs().amax(-1)[0]  # not bit-equal: other tokens share an expert's product
    assert change[:5].max() < 1e-5 < 1e-3 < change[5:].min()


def test_report_5_1_packed_samples_do_not_see_one_another():
    """Isolation by document ids equals the formulas over each document alone, positions restarted."""
    model = model_of(tiny())
    slow, x = Slow(model), states(model.cfg, 8)
    documents, positions = [0, 0, 0, 1, 2, 2, 2, 2], [0, 1, 2, 0, 0, 1, 2, 3]
    out = attention(model, x, torch.tensor([positions]), torch.tensor([documents]))
    expected = torch.stack(slow.attention(NAME, list(x[0].double()), positions, documents))
    assert relative(out[0].double(), expected) < 1e-6
    alone = slow.attention(NAME, list(x[0, 4:].double()), [0, 1, 2, 3], [0] * 4)
    assert relative(out[0, 4:].double(), torch.stack(alone)) < 1e-6


def test_report_4_2_pretraining_packs_without_a_mask_across_documents():
    model = model_of(tiny())
    x = states(model.cfg, 8)
    plain = attention(model, x)
    one = attention(model, x, documents=torch.full((1, 8), 4))
    assert MicroBatch.of(random_tokens(1, 8)).documents is None
    assert relative(one, plain) < 1e-6


def test_report_2_1_1_cache_holds_the_normed_latent_and_the_rotated_key_only():
    model = model_of(tiny(rope_scaling=YARN))
    cfg, tokens = model.cfg, random_tokens(1, 7)
    written = written_by(model, tokens)
    assert [layer for layer, _, _ in written] == [0, 1]
    assert all(c[0, 0].numel() + k[0, 0].numel() == cfg.kv_lora_rank + cfg.qk_rope_head_dim for _, c, k in written)
    slow = Slow(model)
    xs = [slow.w["embed_tokens.weight"][t] for t in tokens[0].tolist()]
    for layer, c_kv, k_rope in written:
        normed = [slow.norm(f"layers.{layer}.input_layernorm", x) for x in xs]
        expected = [slow.latent(f"layers.{layer}.self_attn", h, t) for t, h in enumerate(normed)]
        assert relative(c_kv[0].double(), torch.stack([c for c, _ in expected])) < 1e-6
        assert relative(k_rope[0].double(), torch.stack([k for _, k in expected])) < 1e-6
        xs = slow.block(f"layers.{layer}", xs, list(range(7)), [0] * 7)


def test_report_2_1_1_cache_of_v3_is_576_numbers_a_token_a_layer():
    cfg = DeepSeekV3Config()
    assert cfg.kv_lora_rank + cfg.qk_rope_head_dim == 576


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
@torch.no_grad()
def test_report_2_1_1_absorbed_equals_up_projected_equals_the_formulas(changes):
    model = model_of(tiny(**changes)).eval()
    tokens = random_tokens(1, 9)
    expected = torch.stack(Slow(model).hidden(tokens[0].tolist())).detach()
    forms = []
    for absorbed in (True, False):
        cache, parts = Recorder(model.cfg, 9), []
        for begin, end in ((0, 4), (4, 5), (5, 8), (8, 9)):  # prefill, one token, a draft's worth, one token
            positions = torch.arange(begin, end)[None]
            parts.append(model.forward_cached(tokens[:, begin:end], positions, cache, absorbed))
        forms.append(torch.cat(parts, dim=1)[0])
        assert relative(forms[-1].double(), expected) < 1e-6
    assert relative(*forms) < 1e-6


def test_report_2_1_1_absorbed_form_never_up_projects_the_cache():
    model = model_of(tiny()).eval()
    calls = []
    for block in model.layers:
        block.self_attn.kv_b_proj.register_forward_hook(lambda *a: calls.append(1))
    written_by(model, random_tokens(1, 5))
    assert not calls
