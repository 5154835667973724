"""DeepSeekMoE and its balance, rule by rule (report §2.1.2). Balance biases are non-zero throughout."""

import pytest
import torch

from litseek.data.batch import MicroBatch
from litseek.losses import batch_balance, sequence_balance
from litseek.models.config import DeepSeekV3Config
from litseek.models.transformer import Transformer
from litseek.precision import BF16
from tests.conformance import slow as oracle
from tests.conformance.slow import Slow, model_of, random_tokens, tiny
from tests.models.parity import relative

NAME = "layers.1.mlp"


def states(cfg, batch: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randn(batch, length, cfg.hidden_size, generator=torch.Generator().manual_seed(5))


def gate(model: Transformer):
    return model.layers[1].mlp.gate


def feed_forward(model: Transformer, u: torch.Tensor) -> torch.Tensor:
    """The mixture's output for its normed input, through the block's own phases on a zero residual."""
    block = model.layers[1]
    block.post_attention_layernorm = torch.nn.Identity()
    state = {"x": u}
    state = block._feed(state)
    state["x"] = torch.zeros_like(u)
    for phase in block.phases("layers.1")[1:]:
        state = phase(state, MicroBatch.of(torch.zeros(u.shape[:2], dtype=torch.int64)))
    return state["x"]


def scores_to_states(model: Transformer, scores: list[list[float]], biases: list[float]) -> torch.Tensor:
    """States whose affinities are exactly ``scores``: the gate's weight is made the identity's first rows."""
    router = gate(model)
    with torch.no_grad():
        router.weight.copy_(torch.eye(*router.weight.shape))
        router.e_score_correction_bias.copy_(torch.tensor(biases))
    u = torch.zeros(1, len(scores), model.cfg.hidden_size)
    u[0, :, : len(biases)] = torch.tensor(scores).logit()
    return u


@pytest.mark.parametrize(
    "changes",
    [{}, dict(n_group=1, topk_group=1), dict(n_shared_experts=0), dict(num_experts_per_tok=2), dict(topk_group=4)],
    ids=["groups", "one group", "no shared", "one a group", "all groups"],
)
def test_report_2_1_2_eq_12_to_16_whole_mixture_and_its_gradients(changes):
    model = model_of(tiny(**changes))
    slow, u = Slow(model), states(model.cfg)
    mine = u.clone().requires_grad_()
    out = feed_forward(model, mine)
    theirs = u.double().requires_grad_()
    expected = torch.stack([torch.stack([slow.moe(NAME, token) for token in row]) for row in theirs])
    assert relative(out.double(), expected) < 1e-6
    seed = torch.randn_like(expected)
    out.backward(seed.float())
    expected.backward(seed)
    assert relative(mine.grad.double(), theirs.grad) < 1e-5
    for name, parameter in model.layers[1].mlp.named_parameters():
        assert relative(parameter.grad.double(), slow.w[f"{NAME}.{name}"].grad) < 1e-5, name


def test_report_2_1_2_eq_15_affinity_is_a_sigmoid_in_float32():
    """A BF16 model gates its BF16 states with the FP32 master weight: rounding it would flip choices."""
    model = model_of(tiny(), precision=BF16())
    u = states(model.cfg).bfloat16()
    routing = gate(model)(u)
    assert routing.weight_TK.dtype == torch.float32
    slow = Slow(model)
    for t, token in enumerate(u.flatten(0, 1).double()):
        expected = slow.gate(NAME, token)
        assert routing.expert_TK[t].tolist() == list(expected)
        wanted = torch.stack(list(expected.values()))
        assert relative(routing.weight_TK[t].double(), wanted) < 1e-6  # bfloat16 would be 1e-3 away


def test_report_2_1_2_eq_16_choice_is_by_biased_affinity():
    model = model_of(tiny(n_group=1, topk_group=1, num_experts_per_tok=2))
    score = [[0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]
    u = scores_to_states(model, score, [-1.0, 0, 1.0, 0, 0, 0, 0, 0])
    assert set(gate(model)(u).expert_TK[0].tolist()) == {1, 2}


def test_report_2_1_2_eq_16_gate_weights_are_unbiased():
    model = model_of(tiny(n_group=1, topk_group=1, num_experts_per_tok=2))
    score = [[0.9, 0.8, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]]
    u = scores_to_states(model, score, [-1.0, 0, 1.0, 0, 0, 0, 0, 0])
    routing = gate(model)(u)
    weights = dict(zip(routing.expert_TK[0].tolist(), routing.weight_TK[0].tolist()))
    assert weights == pytest.approx({1: 2.5 * 0.8 / 0.9, 2: 2.5 * 0.1 / 0.9}, rel=1e-5)


def test_report_2_1_2_eq_13_weights_sum_to_one_times_the_scaling_factor():
    model = model_of(tiny())
    routing = gate(model)(states(model.cfg))
    assert torch.allclose(routing.weight_TK.sum(-1), torch.full((14,), 2.5), rtol=1e-6)
    plain = gate(model_of(tiny(norm_topk_prob=False, routed_scaling_factor=1.0)))(states(model.cfg))
    assert (plain.weight_TK <= 1).all() and (plain.weight_TK.sum(-1) - 1).abs().min() > 1e-3


def test_report_2_1_2_eq_13_vanishing_affinities_do_not_divide_by_zero():
    model = model_of(tiny())
    u = torch.zeros(1, 1, model.cfg.hidden_size)
    with torch.no_grad():
        gate(model).weight.fill_(-1000.0)
    routing = gate(model)(u + 1)
    assert torch.equal(routing.weight_TK, torch.zeros(1, 4))


def test_report_2_1_2_group_score_is_the_sum_of_the_k_over_m_highest_biased():
    """K_r / M = 4 / 2 = 2: groups 0 and 2 have the best pairs, 1 the best expert, 3 the second best sum of all."""
    cfg = tiny(n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=4)
    assert cfg.experts_per_group_score == 2
    model = model_of(cfg)
    score = [[0.5, 0.5, 0.1, 0.9, 0.05, 0.05, 0.6, 0.5, 0.3, 0.4, 0.4, 0.4]]
    u = scores_to_states(model, score, [0.1] * 12)
    assert set(gate(model)(u).expert_TK[0].tolist()) == {0, 1, 6, 7}
    biased = scores_to_states(model, score, [0.1] * 4 + [0.6] + [0.1] * 7)  # lifts group 1's pair above group 0's
    assert set(gate(model)(biased).expert_TK[0].tolist()) == {3, 4, 6, 7}


@pytest.mark.parametrize(
    "top_k, groups, experts, best", [(8, 4, 256, 2), (6, 2, 64, 3), (4, 4, 64, 1), (2, 4, 64, 1), (8, 1, 64, 8)]
)
def test_report_2_1_2_group_score_counts_k_over_m_experts(top_k, groups, experts, best):
    cfg = DeepSeekV3Config(num_experts_per_tok=top_k, topk_group=groups, n_routed_experts=experts)
    assert cfg.experts_per_group_score == best


def test_report_2_1_2_group_score_of_the_released_code_is_a_setting():
    """The release always takes 2. With K_r / M = 1 a lone strong expert wins its group; with 2 it does not."""
    score = [[0.9, 0.1, 0.6, 0.7, 0.2, 0.2, 0.2, 0.2]]
    chosen = []
    for best in (None, 2):
        model = model_of(tiny(num_experts_per_tok=1, topk_group=1, group_score_experts=best))
        chosen.append(gate(model)(scores_to_states(model, score, [0.0] * 8)).expert_TK[0].tolist())
    assert chosen == [[0], [3]]


def test_report_2_1_2_masked_groups_are_minus_infinity_not_zero():
    """All biased scores are negative: experts masked with 0 would win."""
    model = model_of(tiny())
    score = [[0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.1, 0.1]]
    u = scores_to_states(model, score, [-2.0] * 8)
    routing = gate(model)(u)
    assert set(routing.expert_TK[0].tolist()) == {0, 1, 2, 3}
    random = states(model.cfg)
    slow = Slow(model)  # of the biases of -2
    for t, token in enumerate(random.flatten(0, 1).double()):
        assert gate(model)(random).expert_TK[t].tolist() == list(slow.gate(NAME, token))


def test_report_2_1_2_a_token_reaches_at_most_the_chosen_groups():
    model = model_of(tiny(), bias_size=2.0)
    chosen = gate(model)(states(model.cfg, 8, 50)).expert_TK
    assert max(len(set(row)) for row in (chosen // 2).tolist()) == 2


def test_report_2_1_2_shared_experts_see_every_token():
    model = model_of(tiny())
    u, seen = states(model.cfg), []
    model.layers[1].mlp.shared_experts.register_forward_hook(lambda m, args, out: seen.append(args[0].clone()))
    with torch.no_grad():
        feed_forward(model, u)
        assert len(seen) == 1 and torch.equal(seen[0], u)
        model.layers[1].mlp.experts.down_proj.zero_()
        slow = Slow(model)
        expected = torch.stack([slow.swiglu(f"{NAME}.shared_experts", token) for token in u.flatten(0, 1).double()])
        assert relative(feed_forward(model, u).flatten(0, 1).double(), expected) < 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_report_2_1_2_no_token_is_dropped_when_all_choose_the_same_experts(training):
    model = model_of(tiny()).train(training)
    gate(model).e_score_correction_bias.copy_(torch.tensor([0.0, 0, 9, 9, 0, 0, 9, 9]))
    slow, u = Slow(model), states(model.cfg, 3, 20)
    routing = gate(model)(u)
    assert routing.load_E.tolist() == [0, 0, 60, 60, 0, 0, 60, 60]
    expected = torch.stack([slow.moe(NAME, token) for token in u.flatten(0, 1).double()])
    assert relative(feed_forward(model, u).flatten(0, 1).double(), expected) < 1e-6


def test_report_2_1_2_no_token_is_dropped_with_one_expert_for_all():
    model = model_of(tiny(num_experts_per_tok=1, topk_group=1))
    gate(model).e_score_correction_bias.copy_(torch.eye(8)[5] * 9)
    slow, u = Slow(model), states(model.cfg)
    assert gate(model)(u).load_E.tolist() == [0, 0, 0, 0, 0, 14, 0, 0]
    expected = torch.stack([slow.moe(NAME, token) for token in u.flatten(0, 1).double()])
    assert relative(feed_forward(model, u).flatten(0, 1).double(), expected) < 1e-6


def slow_balance(model: Transformer, u: torch.Tensor) -> list[torch.Tensor]:
    slow = Slow(model)
    rows = [[slow.scores(NAME, token) for token in row] for row in u.double()]
    return [oracle.sequence_balance(row, model.cfg.num_experts_per_tok) for row in rows]


def test_report_2_1_2_eq_17_to_20_sequence_loss_equals_the_formulas_per_sequence():
    model = model_of(tiny(aux_loss_alpha=0.0001), bias_size=1.0)
    u = states(model.cfg, 3)
    expected = sum(slow_balance(model, u)) / 3  # over the batch's sequences, the mean
    assert gate(model)(u).aux.item() == pytest.approx(1e-4 * expected.item(), rel=1e-6)


def test_report_2_1_2_eq_17_to_20_gradient_of_the_sequence_loss():
    model = model_of(tiny(aux_loss_alpha=1.0), bias_size=1.0)
    slow, u = Slow(model), states(model.cfg, 1)
    gate(model)(u).aux.backward()
    rows = [slow.scores(NAME, token) for token in u[0].double()]
    oracle.sequence_balance(rows, 4).backward()
    assert relative(gate(model).weight.grad.double(), slow.w[f"{NAME}.gate.weight"].grad) < 1e-5


def test_report_2_1_2_eq_18_sequence_loss_counts_its_own_choice():
    """Highest UNbiased affinities, no group limit: neither the bias nor the groups enter."""
    model = model_of(tiny(aux_loss_alpha=1.0))
    u = states(model.cfg)
    before = gate(model)(u)
    gate(model).e_score_correction_bias.copy_(torch.tensor([5.0, 5, 0, 0, 5, 5, 0, 0]))
    after = gate(model)(u)
    assert not torch.equal(before.load_E, after.load_E) and torch.equal(before.aux, after.aux)
    ungrouped = model_of(tiny(aux_loss_alpha=1.0, n_group=1, topk_group=1))
    assert torch.equal(gate(ungrouped)(u).aux, before.aux)


def test_report_2_1_2_eq_17_perfect_balance_costs_alpha():
    model = model_of(tiny(aux_loss_alpha=0.01, num_experts_per_tok=1, topk_group=1))
    score = [[0.8 if e == t else 0.2 for e in range(8)] for t in range(8)]
    aux = gate(model)(scores_to_states(model, score, [0.3] * 8)).aux
    assert aux.item() == pytest.approx(0.01, rel=1e-5)


def test_report_4_5_3_batch_wise_loss_takes_all_sequences_together():
    score = torch.rand(3, 5, 8, dtype=torch.float64)
    rows = [[list(token) for token in row] for row in score]
    together = oracle.sequence_balance([token for row in rows for token in row], 3)
    assert batch_balance(score, 3).item() == pytest.approx(together.item(), rel=1e-12)
    apart = sum(oracle.sequence_balance(row, 3) for row in rows) / 3
    assert sequence_balance(score, 3).item() == pytest.approx(apart.item(), rel=1e-12)
    assert abs(together.item() - apart.item()) > 1e-3
    model, u = model_of(tiny(aux_loss_alpha=0.5, seq_aux=False)), states(tiny())
    slow = Slow(model)
    expected = 0.5 * oracle.sequence_balance([slow.scores(NAME, t) for t in u.flatten(0, 1).double()], 4)
    assert gate(model)(u).aux.item() == pytest.approx(expected.item(), rel=1e-6)


def aux_of(**changes) -> float:
    cfg = tiny(**{"aux_loss_alpha": 0.1, "num_hidden_layers": 4, "num_nextn_predict_layers": 2, **changes})
    return model_of(cfg)(MicroBatch.of(random_tokens(2, 6)))["aux"].item()


def test_report_2_1_2_balance_loss_over_layers_is_a_sum_or_a_mean():
    """3 mixture layers and 2 MTP blocks; the report leaves the reduction and the MTP block's loss open."""
    with_mtp, without = aux_of(), aux_of(mtp_aux_loss=False)
    assert aux_of(aux_loss_reduction="mean") == pytest.approx(with_mtp / 5, rel=1e-5)
    assert aux_of(aux_loss_reduction="mean", mtp_aux_loss=False) == pytest.approx(without / 3, rel=1e-5)
    assert aux_of(num_nextn_predict_layers=0) == pytest.approx(without, rel=1e-6) and without < with_mtp
    assert aux_of(aux_loss_alpha=0.2) == pytest.approx(2 * with_mtp, rel=1e-5)
    assert aux_of(aux_loss_alpha=0.0) == 0.0


def test_report_2_1_2_balance_loss_is_for_training_only():
    model = model_of(tiny(aux_loss_alpha=0.1)).eval()
    state = model(MicroBatch.of(random_tokens(1, 6)))
    assert state["aux"] == 0 and gate(model)(states(model.cfg)).aux is None


def test_report_2_1_2_loads_count_each_chosen_expert_once():
    model = model_of(tiny(num_nextn_predict_layers=2))
    micro = MicroBatch.of(random_tokens(3, 6))
    with torch.no_grad():
        loads = model(micro)["loads"]
    assert list(loads) == ["layers.1.attend", "mtp.0.attend", "mtp.1.attend"] == list(model.balance_routers())
    assert all(load.dtype == torch.int64 and load.sum() == 3 * 6 * 4 for load in loads.values())
    slow, expected = Slow(model), torch.zeros(8, dtype=torch.int64)
    for row in micro.tokens.tolist():
        xs = slow.block("layers.0", [slow.w["embed_tokens.weight"][t] for t in row], list(range(6)), [0] * 6)
        normed = [slow.norm("layers.1.input_layernorm", x) for x in xs]
        attended = slow.attention("layers.1.self_attn", normed, list(range(6)), [0] * 6)
        for x, a in zip(xs, attended):
            for expert in slow.gate(NAME, slow.norm("layers.1.post_attention_layernorm", x + a)):
                expected[expert] += 1
    assert torch.equal(loads["layers.1.attend"], expected)


def test_report_4_2_first_layers_are_dense_and_the_mtp_block_is_a_mixture():
    model = model_of(tiny(num_hidden_layers=3, first_k_dense_replace=2))
    kinds = [type(block.mlp).__name__ for block in model.layers]
    assert kinds == ["SwiGLU", "SwiGLU", "MoE"] and type(model.mtp[0].block.mlp).__name__ == "MoE"


def test_report_4_2_shared_experts_are_one_feed_forward_of_their_total_width():
    shared = model_of(tiny()).layers[1].mlp.shared_experts
    assert shared.gate_proj.weight.shape == (2 * 6, 16)
    wide = model_of(tiny(n_shared_experts=1)).layers[1].mlp.shared_experts
    assert wide.gate_proj.weight.shape == (6, 16)
