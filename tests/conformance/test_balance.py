"""Balance without and with auxiliary losses (report §2.1.2, §4.2, §4.5.3), one rule a test."""

import pytest
import torch

from litseek.data.batch import MicroBatch
from litseek.losses import batch_balance, sequence_balance
from litseek.models.transformer import Transformer
from litseek.optim import Steps, update_bias_
from litseek.parallel.executor import Executor
from tests.models.parity import tiny_config, with_biases


def model(**changes) -> Transformer:
    return with_biases(Transformer(tiny_config(**changes)))


def micros(count: int, rows: int = 2, length: int = 12) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(3)
    return [MicroBatch.of(torch.randint(0, 97, (rows, length), generator=generator)) for _ in range(count)]


def slow_balance(scores, top_k):
    """f and P of one sequence (T, E), one token and expert at a time (report §2.1.2, eq. 17-20)."""
    tokens, experts = len(scores), len(scores[0])
    total = 0.0
    for i in range(experts):
        hits = sum(i in sorted(range(experts), key=lambda j, s=s: -s[j])[:top_k] for s in scores)
        f = experts / (top_k * tokens) * hits
        p = sum(s[i] / sum(s) for s in scores) / tokens
        total += f * p
    return total


def test_sec_2_1_2_bias_falls_when_overloaded_and_rises_when_underloaded():
    bias = torch.tensor([0.3, -0.2, 0.0, 0.1])
    update_bias_(bias, torch.tensor([10, 2, 5, 3]), speed=0.001)
    torch.testing.assert_close(bias, torch.tensor([0.299, -0.199, 0.0, 0.101]), rtol=0, atol=1e-7)


def test_sec_2_1_2_bias_moves_by_the_speed_however_large_the_imbalance():
    bias = torch.zeros(4)
    update_bias_(bias, torch.tensor([1_000_000, 0, 0, 0]), speed=0.001)
    assert bias.tolist() == pytest.approx([-0.001, 0.001, 0.001, 0.001])


def test_sec_2_1_2_bias_stays_at_exactly_mean_load():
    bias = torch.tensor([0.5, -0.5])
    update_bias_(bias, torch.tensor([7, 7]), speed=0.001)
    assert bias.tolist() == [0.5, -0.5]


def test_sec_2_1_2_bias_compares_loads_that_float32_cannot_tell_apart():
    large = 2**30
    bias = torch.zeros(2)
    update_bias_(bias, torch.tensor([large + 1, large - 1]), speed=1.0)
    assert bias.tolist() == [-1.0, 1.0]


def test_sec_2_1_2_load_is_of_the_whole_global_batch():
    """Four micro-batches give the loads, and so the step, of one batch; their own signs would differ."""
    net = model()
    parts = micros(4)
    whole = MicroBatch.of(torch.cat([micro.tokens for micro in parts]))

    def head(state, micro):
        return state["hidden"].float().mean(), {}

    split = Executor(net.phases()).forward_backward(parts, head).loads
    joined = Executor(net.phases()).forward_backward([whole], head).loads
    assert split.keys() == joined.keys() == net.balance_routers().keys()
    for name, router in net.balance_routers().items():
        assert torch.equal(split[name], joined[name])
        assert split[name].sum() == whole.num_tokens * net.cfg.num_experts_per_tok
        before = router.e_score_correction_bias.clone()
        update_bias_(router.e_score_correction_bias, split[name], 0.001)
        mean = split[name].double().mean()
        want = before + 0.001 * torch.sign(mean - split[name])
        torch.testing.assert_close(router.e_score_correction_bias, want.float(), rtol=0, atol=1e-7)


def test_sec_2_1_2_bias_is_no_parameter_and_gets_no_gradient():
    net = model()
    assert not any("bias" in name for name, _ in net.named_parameters())
    state = net(micros(1)[0])
    state["hidden"].sum().backward()
    for router in net.balance_routers().values():
        assert not router.e_score_correction_bias.requires_grad and router.e_score_correction_bias.grad is None
        assert router.e_score_correction_bias.dtype == torch.float32


def test_sec_4_2_bias_is_frozen_for_the_last_500b_tokens():
    speed = Steps([0.001, 0.0], [14.3e12])
    assert (speed(0), speed(int(14.3e12) - 1), speed(int(14.3e12)), speed(int(14.8e12))) == (0.001, 0.001, 0.0, 0.0)
    bias = torch.tensor([0.25, -0.75])
    update_bias_(bias, torch.tensor([9, 1]), speed(int(14.5e12)))
    assert bias.tolist() == [0.25, -0.75]


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_sec_2_1_2_sequence_loss_formula(top_k):
    scores = torch.rand(3, 9, 8, generator=torch.Generator().manual_seed(top_k))
    want = sum(slow_balance(s.tolist(), top_k) for s in scores) / 3
    assert float(sequence_balance(scores, top_k)) == pytest.approx(want, rel=1e-5)


def test_sec_2_1_2_sequence_loss_is_one_at_perfect_balance():
    even = torch.full((2, 8, 8), 0.1)
    even[:, torch.arange(8), torch.arange(8)] = 0.9  # every expert is first once
    assert float(sequence_balance(even, 1)) == pytest.approx(1.0, rel=1e-6)


def test_sec_2_1_2_sequence_loss_counts_unbiased_scores_without_group_limit():
    """Its own top-k rule: the chosen experts, which biases and groups shape, give another value."""
    net = model(aux_loss_alpha=1.0, aux_loss_reduction="sum")
    router = net.layers[1].mlp.gate
    u = torch.randn(2, 11, net.cfg.hidden_size, generator=torch.Generator().manual_seed(5))
    routing = router(u)
    scores = torch.sigmoid(u @ router.weight.T)
    want = sum(slow_balance(s.tolist(), net.cfg.num_experts_per_tok) for s in scores.detach()) / 2
    assert float(routing.aux.detach()) == pytest.approx(want, rel=1e-5)
    unlimited = scores.flatten(0, 1).topk(net.cfg.num_experts_per_tok, dim=-1).indices
    chosen = torch.bincount(unlimited.flatten(), minlength=8)
    assert not torch.equal(routing.load_E, chosen)  # biases and groups really choose otherwise here
    router.e_score_correction_bias.add_(torch.linspace(-1, 1, 8))
    assert torch.equal(router(u).aux, routing.aux)


def test_sec_2_1_2_sequence_loss_has_its_gradient_through_p_alone():
    scores = torch.rand(2, 6, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    (grad,) = torch.autograd.grad(sequence_balance(scores, 2), scores)
    with torch.no_grad():
        hits = torch.zeros(2, 6, 8).scatter_(-1, scores.topk(2, -1).indices, 1.0)
    f = hits.mean(1) * 8 / 2
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)
    (want,) = torch.autograd.grad((f * p).sum(-1).mean(), scores)
    torch.testing.assert_close(grad, want)


def test_sec_2_1_2_sequence_loss_is_per_sequence_and_alpha_scales_it():
    """Two sequences that are each one-sided but balance together: dear per sequence, cheap over the batch."""
    scores = torch.full((2, 6, 4), 0.05)
    scores[0, :, :2], scores[1, :, 2:] = 0.9, 0.9
    assert float(sequence_balance(scores, 2)) == pytest.approx(2 * 0.9 / 0.95, rel=1e-5)
    assert float(batch_balance(scores, 2)) == pytest.approx(1.0, rel=1e-5)
    aux = {a: model(aux_loss_alpha=a)(micros(1)[0])["aux"].detach() for a in (1e-4, 1e-2)}
    assert float(aux[1e-2]) == pytest.approx(100 * float(aux[1e-4]), rel=1e-5)


def test_sec_4_5_3_batch_loss_is_over_all_tokens_of_the_batch():
    scores = torch.rand(3, 9, 8, generator=torch.Generator().manual_seed(2))
    want = slow_balance(scores.flatten(0, 1).tolist(), 2)
    assert float(batch_balance(scores, 2)) == pytest.approx(want, rel=1e-5)
