"""Multi-token prediction, equation by equation (report §2.2). Balance biases are non-zero throughout."""

import pytest
import torch

from litseek.data.batch import IGNORE, MicroBatch
from litseek.losses import linear_cross_entropy, mtp_labels, mtp_loss
from litseek.models.config import DeepSeekV3Config
from litseek.models.transformer import Transformer
from tests.conformance.slow import YARN, Slow, model_of, random_tokens, tiny
from tests.models.parity import relative


def micro_of(tokens: torch.Tensor) -> MicroBatch:
    """T + 1 tokens as T inputs with T labels."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    return MicroBatch(inputs, labels, torch.arange(inputs.shape[1]).expand_as(inputs), None, float(labels.numel()))


def inputs_of(module: torch.nn.Module, run) -> list[torch.Tensor]:
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("changes", [{}, dict(rope_scaling=YARN), dict(q_lora_rank=None)], ids=["plain", "yarn", "q"])
@pytest.mark.parametrize("depths", [1, 2])
def test_report_2_2_eq_21_and_22_states_of_every_depth(depths, changes):
    model = model_of(tiny(num_nextn_predict_layers=depths, **changes))
    slow, tokens = Slow(model), random_tokens(2, 8)
    with torch.no_grad():
        state = model(MicroBatch.of(tokens))
    for row, ids in enumerate(tokens.tolist()):
        expected = slow.mtp(ids, slow.hidden(ids))
        for k in range(1, depths + 1):
            mine = state[f"mtp.{k - 1}"][row, : 8 - k].double()
            assert relative(mine, torch.stack(expected[k - 1]).detach()) < 1e-5


def test_report_2_2_eq_21_embedding_first_then_the_state_after_the_final_norm():
    """The released order, [enorm(Emb(t_{i+1})); hnorm(h)], h being after the main final norm."""
    model = model_of(tiny())
    slow, tokens = Slow(model), random_tokens(1, 6)
    micro = MicroBatch.of(tokens)
    with torch.no_grad():
        (joined,) = inputs_of(model.mtp[0].eh_proj, lambda: model(micro))
        (given,) = inputs_of(model.mtp[0].hnorm, lambda: model(micro))
        hidden = model(micro)["hidden"]
    assert torch.equal(given, hidden)
    ids = tokens[0].tolist()
    for i, h in enumerate(slow.hidden(ids)[:-1]):
        embedded = slow.norm("mtp.0.enorm", slow.w["embed_tokens.weight"][ids[i + 1]])
        expected = torch.cat([embedded, slow.norm("mtp.0.hnorm", h)])
        assert relative(joined[0, i].double(), expected.detach()) < 1e-5


def test_report_2_2_eq_21_depth_k_looks_at_the_token_k_places_on():
    model = model_of(tiny(num_nextn_predict_layers=2))
    tokens = random_tokens(1, 7)
    with torch.no_grad():
        for k in (1, 2):
            (embedded,) = inputs_of(model.mtp[k - 1].enorm, lambda: model(MicroBatch.of(tokens)))
            assert torch.equal(embedded[0, : 7 - k], model.embed_tokens(tokens[0, k:]))


def test_report_2_2_depth_2_continues_from_depth_1():
    model = model_of(tiny(num_nextn_predict_layers=2))
    with torch.no_grad():
        micro = MicroBatch.of(random_tokens(1, 7))
        (given,) = inputs_of(model.mtp[1].hnorm, lambda: model(micro))
        assert torch.equal(given, model(micro)["mtp.0"])


@pytest.mark.parametrize("depths", [1, 2])
def test_report_2_2_the_causal_chain_is_kept(depths):
    """Depth k at place i knows tokens up to i + k and nothing later."""
    model = model_of(tiny(num_nextn_predict_layers=depths)).eval()
    tokens, place = random_tokens(1, 10), 6
    changed = tokens.clone()
    changed[0, place] = (changed[0, place] + 1) % 31
    with torch.no_grad():
        before, after = model(MicroBatch.of(tokens)), model(MicroBatch.of(changed))
    for k, key in enumerate(["hidden", *(f"mtp.{d}" for d in range(depths))]):
        change = (before[key] - after[key]).abs().amax(-1)[0]
        first = place - k  # the state at i = place - k is the first that has seen the changed token
        # not bit-equal before it: other tokens share an expert's product
        assert change[:first].max() < 1e-5 < 1e-3 < change[first : 10 - k].min(), key


@pytest.mark.parametrize("depths", [1, 2])
def test_report_2_2_padded_places_at_the_end_reach_no_scored_place(depths):
    """Depth k has T - k places; what stands in the k columns after them is of no influence."""
    model = model_of(tiny(num_nextn_predict_layers=depths)).eval()
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        before = model(MicroBatch.of(tokens))
        model.embed_tokens.weight[0] += 5.0  # the token that fills the shifted rows' end
        tokens_without_0 = not (tokens == 0).any()
        after = model(MicroBatch.of(tokens))
    assert tokens_without_0
    for k in range(1, depths + 1):
        change = (before[f"mtp.{k - 1}"] - after[f"mtp.{k - 1}"]).abs().amax(-1)[0]
        assert change[: 9 - k].max() < 1e-5 < 1e-3 < change[9 - k :].min()


def test_report_2_2_embedding_and_head_are_the_main_models_own_tensors():
    model = model_of(tiny(num_nextn_predict_layers=2))
    names = [name for name, _ in model.named_parameters()]
    assert [n for n in names if "embed" in n or "head" in n] == ["embed_tokens.weight", "lm_head.weight"]
    modules = {name: set(map(id, phase.modules)) for phase in model.phases() for name in [phase.name]}
    for name in ("embed", "mtp.0.enter", "mtp.1.enter"):
        assert id(model.embed_tokens) in modules[name]


def test_report_3_2_3_gradients_of_main_and_mtp_add_up_in_the_shared_tensors():
    model = model_of(tiny(num_nextn_predict_layers=2))
    micro, weight = micro_of(random_tokens(1, 9)), model.lm_head.weight

    def gradients(main: float, mtp: float) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        state = model(micro)
        loss = main * linear_cross_entropy(state["hidden"], weight, micro.labels)
        depths, _ = mtp_loss([state["mtp.0"], state["mtp.1"]], weight, micro.labels, 1.0)
        (loss + mtp * depths).backward()
        return model.embed_tokens.weight.grad.clone(), weight.grad.clone()

    both, main, mtp = gradients(1.0, 0.3), gradients(1.0, 0.0), gradients(0.0, 0.3)
    for together, a, b in zip(both, main, mtp):
        assert a.norm() > 0 and b.norm() > 0 and relative(together, a + b) < 1e-5


def test_report_2_2_gradient_of_the_mtp_loss_reaches_the_main_model():
    model = model_of(tiny())
    micro = micro_of(random_tokens(1, 9))
    state = model(micro)
    mtp_loss([state["mtp.0"]], model.lm_head.weight, micro.labels, micro.targets)[0].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("depths", [1, 2])
def test_report_2_2_eq_24_and_25_loss_sums_t_minus_k_terms_over_t(depths):
    model = model_of(tiny(num_nextn_predict_layers=depths))
    slow, tokens = Slow(model), random_tokens(1, 9)
    micro, ids = micro_of(tokens), tokens[0].tolist()
    state = model(micro)
    hiddens = [state[f"mtp.{k}"] for k in range(depths)]
    mean, each = mtp_loss(hiddens, model.lm_head.weight, micro.labels, micro.targets)
    states = slow.mtp(ids[:-1], slow.hidden(ids[:-1]))
    expected = []
    for k in range(1, depths + 1):
        assert (mtp_labels(micro.labels, k) != IGNORE).sum() == 8 - k
        expected.append(sum(slow.nll(states[k - 1][i], ids[i + k + 1]) for i in range(8 - k)).item() / 8)
    assert [e.item() for e in each] == pytest.approx(expected, rel=1e-5)
    assert mean.item() == pytest.approx(sum(expected) / depths, rel=1e-5)  # times lambda: lambda / D of the sum


def test_report_2_2_without_depths_nothing_is_added():
    model = model_of(tiny(num_nextn_predict_layers=0))
    assert set(model(MicroBatch.of(random_tokens(1, 5)))) == {"hidden", "aux", "loads"}
    assert model.phases()[-1].name == "norm"


def test_report_2_2_main_predictions_do_not_depend_on_mtp():
    """MTP modules can be dropped at inference."""
    with_mtp, without = model_of(tiny(num_nextn_predict_layers=2)), model_of(tiny(num_nextn_predict_layers=0))
    tokens = random_tokens(2, 8)
    with torch.no_grad():
        assert torch.equal(with_mtp.logits(tokens), without.logits(tokens))
        assert torch.equal(with_mtp(MicroBatch.of(tokens))["hidden"], without(MicroBatch.of(tokens))["hidden"])


TABLE = {
    "671B": (DeepSeekV3Config(), 671_026_404_352, 37_552_282_624, 36_625_603_584),
    "15.7B": (
        DeepSeekV3Config(
            num_hidden_layers=27, first_k_dense_replace=1, hidden_size=2048, num_attention_heads=16, q_lora_rank=None,
            intermediate_size=10944, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2,
            moe_intermediate_size=1408, n_group=1, topk_group=1, vocab_size=102400, num_nextn_predict_layers=0,
        ), 15_706_484_224, 2_661_150_208, 2_451_435_008,
    ),
}  # fmt: skip


@pytest.mark.parametrize("cfg, total, active, without_embedding", TABLE.values(), ids=TABLE.keys())
def test_report_4_2_parameter_counts(cfg, total, active, without_embedding):
    """Counted from the built model: of the routed experts, top k of E are active."""
    with torch.device("meta"):
        model = Transformer(cfg)
    main = {n: p.numel() for n, p in model.named_parameters() if not n.startswith("mtp.")}
    routed = sum(size for name, size in main.items() if ".mlp.experts." in name)
    assert sum(main.values()) == total  # the balance biases are buffers and do not count
    used = total - routed + routed * cfg.num_experts_per_tok // cfg.n_routed_experts
    assert used == active and used - main["embed_tokens.weight"] == without_embedding
    assert cfg.num_active_params() == without_embedding
    assert cfg.num_params() == sum(p.numel() for p in model.parameters())


def test_report_2_2_released_mtp_layer_adds_its_own_and_two_copies():
    cfg = TABLE["671B"][0]
    own = cfg.num_params() - cfg.replace(num_nextn_predict_layers=0).num_params()
    assert own == pytest.approx(11.61e9, rel=1e-3)
    copies = 2 * cfg.vocab_size * cfg.hidden_size
    assert cfg.num_params() + copies == pytest.approx(685e9, rel=1e-3)
