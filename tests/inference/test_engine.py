"""Generation against the uncached model, and what seeds, limits and stop ids promise."""

from __future__ import annotations

import pytest
import torch

from litseek.errors import LitseekError
from litseek.inference.engine import PAD, Engine, Sampling, choose
from litseek.models.config import DeepSeekV3Config
from litseek.models.transformer import build
from litseek.precision import BF16, FP32

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}


def tiny(**changes):
    """A small model that is far from uniform, with balance biases that matter."""
    cfg = dict(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        num_attention_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        max_position_embeddings=64,
        rope_scaling=YARN,
        initializer_range=0.2,
        num_nextn_predict_layers=1,
    )
    model = build(DeepSeekV3Config(**(cfg | changes)), seed=3)
    for i, router in enumerate(model.balance_routers().values()):
        router.e_score_correction_bias.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
    return model


def prompts(count, seed=0, longest=20):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(0, 96, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def uncached(model, prompt, count):
    """Greedy tokens and their log-probabilities with the whole sequence read again for every token."""
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        logits = model.logits(torch.tensor([tokens]))[0, -1]
        tokens.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1).max()))
    return tokens[len(prompt) :], logprobs


@pytest.mark.parametrize("absorbed", [True, False])
@pytest.mark.parametrize("q_lora_rank", [24, None])
def test_greedy_equals_the_uncached_model_in_a_right_padded_batch(absorbed, q_lora_rank):
    model, batch = tiny(q_lora_rank=q_lora_rank), prompts(6)
    out = Engine(model, absorbed).generate(batch, Sampling(max_tokens=12, temperature=0))
    for i, prompt in enumerate(batch):
        wanted, logprobs = uncached(model, prompt, 12)
        assert out.tokens[i].tolist() == wanted
        assert out.logprobs[i].tolist() == pytest.approx(logprobs, abs=1e-4)


def test_prefill_in_chunks_gives_the_same_tokens(monkeypatch):
    model, batch = tiny(), prompts(5)
    whole = Engine(model).generate(batch, Sampling(max_tokens=6, temperature=0))
    monkeypatch.setattr("litseek.inference.engine._SCORE_BUDGET", 5 * 2 * 20 * 3)
    assert Engine(model).generate(batch, Sampling(max_tokens=6, temperature=0)).lists() == whole.lists()


def test_sampling_is_a_function_of_seed_and_number_alone():
    model, batch = tiny(), prompts(8)
    engine, sampling = Engine(model), Sampling(max_tokens=10, seed=5)
    torch.manual_seed(0)
    first = engine.generate(batch, sampling)
    torch.manual_seed(1)
    assert engine.generate(batch, sampling, max_batch=3).lists() == first.lists()
    assert engine.generate(batch[4:6], sampling, first=4).lists() == first.lists()[4:6]
    assert list(engine.stream(batch[2], sampling, index=2)) == first.lists()[2]
    assert engine.generate(batch, Sampling(max_tokens=10, seed=6)).lists() != first.lists()


def test_sampling_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    Engine(tiny()).generate(prompts(2), Sampling(max_tokens=3))
    assert torch.equal(torch.get_rng_state(), before)


def test_stop_ids_end_each_sequence_and_the_rest_goes_on_unchanged():
    model, batch = tiny(), prompts(12)
    free = Engine(model).generate(batch, Sampling(max_tokens=15))
    stops = (free.lists()[0][3], free.lists()[5][1])
    out = Engine(model).generate(batch, Sampling(max_tokens=15, stop=stops))
    ended = 0
    for i, tokens in enumerate(free.lists()):
        cut = next((n + 1 for n, t in enumerate(tokens) if t in stops), None)
        wanted = tokens if cut is None else tokens[:cut]
        assert out.lists()[i] == wanted
        assert bool(out.stopped[i]) == (cut is not None)
        assert (out.tokens[i, len(wanted) :] == PAD).all() and (out.logprobs[i, len(wanted) :] == 0).all()
        ended += cut is not None
    assert 2 <= ended < 12


def test_a_sequence_stops_at_the_end_of_the_models_range():
    model = tiny()
    out = Engine(model).generate([[1] * 60, [1] * 5], Sampling(max_tokens=80, temperature=0))
    assert out.lengths.tolist() == [4, 59] and not out.stopped.any()
    assert out.lists()[1] == uncached(model, [1] * 5, 59)[0]


def test_prompt_longer_than_the_range_is_refused():
    with pytest.raises(LitseekError, match=r"prompt 2 has 64 tokens.*range of 64 positions"):
        Engine(tiny()).generate([[1], [1] * 64], Sampling())
    with pytest.raises(LitseekError, match="prompt 1 is empty"):
        Engine(tiny()).generate([[]], Sampling())


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_settings_outside_their_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_draws_follow_the_distribution_with_and_without_top_p():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    grid = ((torch.arange(10_000) + 0.5) / 10_000)[torch.randperm(10_000, generator=torch.Generator().manual_seed(0))]
    rows = logits.expand(10_000, -1)

    def shares(**how):
        token, logprob = choose(rows, Sampling(**how), grid)
        assert torch.allclose(logprob, logits[token])
        return (torch.bincount(token, minlength=4) / 10_000).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-3)
    assert shares(top_p=0.75) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)
    assert shares(top_p=0.4) == [1, 0, 0, 0]
    sharp = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    assert shares(temperature=0.5) == pytest.approx((sharp / sharp.sum()).tolist(), abs=1e-3)


def test_the_largest_random_number_never_draws_an_impossible_token():
    logits = torch.full((1, 50), float("-inf"))
    logits[0, 7] = 0.0
    for uniform in (0.0, 1 - 2**-24):
        assert choose(logits, Sampling(), torch.tensor([uniform]))[0].item() == 7
        assert choose(logits, Sampling(top_p=0.5), torch.tensor([uniform]))[0].item() == 7


def test_no_prompts_give_an_empty_generation():
    out = Engine(tiny()).generate([], Sampling(max_tokens=4))
    assert out.tokens.shape == (0, 4) and out.lists() == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [FP32(), BF16()])
def test_on_a_gpu(precision):
    """Float32 gives the CPU's greedy tokens; BF16 runs, samples and stops."""
    batch, wanted = prompts(6), Engine(tiny()).generate(prompts(6), Sampling(max_tokens=12, temperature=0))
    cfg = tiny().cfg
    with torch.device("cuda"):
        model = build(cfg, precision)
    model.load_state_dict(tiny().state_dict())
    out = Engine(model).generate(batch, Sampling(max_tokens=12, temperature=0))
    if precision.name == "fp32":
        assert out.lists() == wanted.lists()
    sampled = Engine(model).generate(batch, Sampling(max_tokens=12, stop=tuple(range(24)), top_p=0.9))
    assert out.tokens.is_cuda and sampled.stopped.any() and sampled.logprobs.isfinite().all()
