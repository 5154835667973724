"""Group relative policy optimisation (report §5.2.2), both forms, one rule a test."""

import math

import pytest
import torch

from litseek.losses import group_advantages, grpo_loss, kl_k3

CLIP = 0.2


@pytest.fixture
def outputs():
    """Three outputs of 5, 3 and 0 tokens; the policy has moved far enough that some ratios are clipped."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(3, 5, generator=generator) - 0.5
    new = (old + 0.4 * torch.randn(3, 5, generator=generator)).requires_grad_()
    reference = old + 0.3 * torch.randn(3, 5, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()
    return new, old, torch.tensor([1.3, -0.7, 0.4]), mask, reference


def term(log_ratio, advantage):
    ratio = math.exp(log_ratio)
    return min(ratio * advantage, min(max(ratio, 1 - CLIP), 1 + CLIP) * advantage)


def k3(new, reference):
    return math.exp(reference - new) - (reference - new) - 1


def rows(outputs):
    new, old, advantages, mask, reference = outputs
    for g in range(3):
        kept = [t for t in range(5) if mask[g, t]]
        yield [[float(x.detach()[g, t]) for t in kept] for x in (new, old, reference)], float(advantages[g])


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_sec_5_2_2_token_form_averages_over_each_output_then_over_outputs(outputs, beta):
    new, old, advantages, mask, reference = outputs
    loss, _ = grpo_loss(new, old, advantages, mask, reference, clip=CLIP, beta=beta)
    want = 0.0
    for (n, o, r), a in rows(outputs):
        terms = [term(x - y, a) - beta * k3(x, z) for x, y, z in zip(n, o, r)]
        want -= sum(terms) / max(len(terms), 1) / 3
    assert float(loss.detach()) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_sec_5_2_2_sequence_form_takes_ratio_and_kl_of_whole_outputs(outputs, beta):
    new, old, advantages, mask, reference = outputs
    loss, _ = grpo_loss(new, old, advantages, mask, reference, clip=CLIP, beta=beta, level="sequence")
    want = 0.0
    for (n, o, r), a in rows(outputs):
        if n:
            want -= (term(sum(n) - sum(o), a) - beta * k3(sum(n), sum(r))) / 3
    assert float(loss.detach()) == pytest.approx(want, rel=1e-5)


def test_sec_5_2_2_kl_is_k3():
    policy, reference = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.0, -1.0, -3.0])
    ratio = (reference - policy).exp()
    torch.testing.assert_close(kl_k3(policy, reference), ratio - ratio.log() - 1)
    assert kl_k3(policy, reference)[0] == 0 and (kl_k3(policy, reference)[1:] > 0).all()


def test_sec_5_2_2_kl_is_unbiased_for_the_divergence():
    p, q = torch.softmax(torch.randn(2, 50, generator=torch.Generator().manual_seed(1)), dim=-1)
    assert float((p * kl_k3(p.log(), q.log())).sum()) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


def test_sec_5_2_2_advantages_are_normalised_within_a_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 4.0]])
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages.mean(dim=1), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(advantages.std(dim=1, correction=0), torch.ones(2))
    assert advantages[0].tolist() == pytest.approx([1.0, -1.0, -1.0, 1.0])


def test_sec_5_2_2_a_group_of_equal_rewards_says_nothing():
    assert torch.equal(group_advantages(torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.1, 0.1]])), torch.zeros(2, 3))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_first_update_has_ratio_one_and_the_policy_gradient(outputs, level):
    """At the sampling policy the gradient is -A / (length x outputs) a token, by tokens, or -A / outputs by outputs."""
    _, old, advantages, mask, _ = outputs
    new = old.clone().requires_grad_()
    loss, metrics = grpo_loss(new, old, advantages, mask, level=level)
    loss.backward()
    length = mask.sum(1, keepdim=True).clamp(min=1) if level == "token" else 1
    torch.testing.assert_close(new.grad, -advantages[:, None] * mask / length / 3)
    assert float(metrics["ratio"]) == pytest.approx(1.0) and float(metrics["clip_fraction"]) == 0


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "passes"),
    [(0.5, 1.0, False), (-0.5, 1.0, True), (0.5, -1.0, True), (-0.5, -1.0, False), (0.1, 1.0, True)],
)
def test_clip_stops_only_gradients_that_go_further(log_ratio, advantage, passes):
    new = torch.full((1, 1), log_ratio, requires_grad=True)
    ones = torch.ones(1, 1)
    loss, metrics = grpo_loss(new, torch.zeros(1, 1), torch.tensor([advantage]), ones, clip=CLIP)
    loss.backward()
    assert bool(new.grad.abs().sum() > 0) is passes
    assert float(metrics["clip_fraction"]) == (0.0 if passes else 1.0)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_may_hold_anything(outputs, level):
    new, old, advantages, mask, reference = outputs
    clean, _ = grpo_loss(new, old, advantages, mask, reference, beta=0.1, level=level)
    dirty_old, dirty_reference = (x.masked_fill(~mask, float("nan")) for x in (old, reference))
    dirty_new = new.detach().masked_fill(~mask, float("-inf")).requires_grad_()
    dirty, metrics = grpo_loss(dirty_new, dirty_old, advantages, mask, dirty_reference, beta=0.1, level=level)
    assert torch.equal(clean, dirty)
    dirty.backward()
    clean.backward()
    torch.testing.assert_close(dirty_new.grad, new.grad)
    assert all(value.isfinite() for value in metrics.values())


def test_bad_settings_are_named(outputs):
    new, old, advantages, mask, _ = outputs
    with pytest.raises(ValueError, match="level is 'word'"):
        grpo_loss(new, old, advantages, mask, level="word")
    with pytest.raises(ValueError, match=r"beta is 0.1, so reference_logprobs"):
        grpo_loss(new, old, advantages, mask, beta=0.1)
