"""The model's part of the training system: phases, recompute, loads, masters (report §3.2, §3.3, §4.2)."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from litseek.data.batch import MicroBatch
from litseek.losses import linear_cross_entropy, mtp_loss
from litseek.models.config import DeepSeekV3Config
from litseek.models.transformer import Transformer
from litseek.optim.balance import update_bias_
from litseek.parallel.executor import Executor
from litseek.precision import BF16
from tests.conformance.slow import model_of, random_tokens, tiny
from tests.models.parity import relative

DEPTHS = dict(num_hidden_layers=3, num_nextn_predict_layers=2)


def head_loss(model: Transformer):
    def loss(state, micro):
        weight = model.lm_head.weight
        total = linear_cross_entropy(state["hidden"], weight, micro.labels) / micro.targets
        hiddens = [state[f"mtp.{k}"] for k in range(len(model.mtp))]
        return total + 0.3 * mtp_loss(hiddens, weight, micro.labels, micro.targets)[0], {}

    return loss


def gradients(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def whole_step(cfg: DeepSeekV3Config, micro: MicroBatch, **kwargs):
    """Loss, loads and gradients under plain autograd."""
    model = model_of(cfg, **kwargs)
    state = model(micro)
    loss = head_loss(model)(state, micro)[0] + state["aux"]
    loss.backward()
    return loss.detach(), state["loads"], gradients(model)


def test_report_3_2_a_block_is_attend_dispatch_experts_combine():
    names = [phase.name for phase in model_of(tiny()).phases()]
    assert names[:7] == [
        *("embed", "layers.0.attend", "layers.0.experts"),
        *("layers.1.attend", "layers.1.dispatch", "layers.1.experts", "layers.1.combine"),
    ]
    model = model_of(tiny())  # every parameter but the head's belongs to the phase that uses it
    used = {id(p) for phase in model.phases() for module in phase.modules for p in module.parameters()}
    assert {name for name, p in model.named_parameters() if id(p) not in used} == {"lm_head.weight"}


@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("recompute", [None, lambda name: True, lambda name: name.endswith("experts")])
def test_report_3_2_every_phase_is_a_segment_of_its_own(chunks, recompute):
    """Detached phases one after the other give the loss, loads and gradients of the whole."""
    cfg = tiny(aux_loss_alpha=0.01, **DEPTHS)
    micro = MicroBatch.of(random_tokens(2, 9))
    loss, loads, expected = whole_step(cfg, micro)
    model = model_of(cfg)
    result = Executor(model.phases(), chunks, recompute).forward_backward([micro], head_loss(model))
    assert relative(result.loss, loss) < 1e-6
    assert result.loads.keys() == loads.keys() and all(torch.equal(result.loads[k], loads[k]) for k in loads)
    for name, gradient in gradients(model).items():
        assert relative(gradient, expected[name]) < 1e-5, name


def test_report_2_1_2_micro_batches_add_up_to_the_global_batch():
    """Loads sum; the sequence-wise loss is a mean over all sequences, however they are cut."""
    cfg = tiny(aux_loss_alpha=0.05, **DEPTHS)
    tokens = random_tokens(4, 9)
    loss, loads, expected = whole_step(cfg, MicroBatch.of(tokens))
    model = model_of(cfg)
    micros = [MicroBatch.of(row) for row in tokens.split(1)]
    result = Executor(model.phases()).forward_backward(micros, head_loss(model))
    assert relative(result.loss, loss) < 1e-6
    assert all(torch.equal(result.loads[name], load) for name, load in loads.items())
    for name, gradient in gradients(model).items():
        assert relative(gradient, expected[name]) < 1e-5, name


def test_report_2_1_2_bias_moves_once_a_step_by_the_global_batchs_load():
    """Every router by its own loads, MTP's included; micro-batches that pull apart do not move it twice."""
    model = model_of(tiny(**DEPTHS))
    micros = [MicroBatch.of(row) for row in random_tokens(4, 9).split(1)]
    before = {n: r.e_score_correction_bias.clone() for n, r in model.balance_routers().items()}
    loads = Executor(model.phases()).forward_backward(micros, head_loss(model)).loads
    assert loads.keys() == model.balance_routers().keys()
    for name, router in model.balance_routers().items():
        assert torch.equal(router.e_score_correction_bias, before[name])  # forward and backward leave it alone
        update_bias_(router.e_score_correction_bias, loads[name], 0.001)
        counts = loads[name].tolist()
        mean = 4 * 9 * 4 / 8
        moved = (router.e_score_correction_bias - before[name]).tolist()
        expected = [0.001 if c < mean else -0.001 if c > mean else 0.0 for c in counts]
        assert sum(counts) == 4 * 9 * 4 and moved == pytest.approx(expected, abs=1e-7)
        assert any(moved)


def test_report_2_1_2_bias_is_a_float32_buffer_without_gradient():
    model = model_of(tiny(**DEPTHS), precision=BF16())
    buffers = {n: b for n, b in model.named_buffers() if "e_score_correction_bias" in n}
    assert set(buffers) == {
        *(f"layers.{i}.mlp.gate.e_score_correction_bias" for i in (1, 2)),
        *(f"mtp.{k}.block.mlp.gate.e_score_correction_bias" for k in (0, 1)),
    }
    assert all(b.dtype == torch.float32 and not b.requires_grad for b in buffers.values())
    assert buffers.keys() <= model.state_dict().keys()
    assert not any("bias" in name for name, _ in model.named_parameters())


def test_report_2_1_2_bias_passes_no_gradient_through_the_choice():
    """Moving a bias without changing a choice changes neither loss nor gradients."""
    cfg, micro = tiny(), MicroBatch.of(random_tokens(1, 9))
    results = []
    for shift in (0.0, 5.0):  # the same for all experts: order and groups stay
        model = model_of(cfg)
        for router in model.balance_routers().values():
            router.e_score_correction_bias += shift
        loss = head_loss(model)(model(micro), micro)[0]
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(results[0][1][n], g) for n, g in results[1][1].items())


class Ops(TorchDispatchMode):
    """Counts the aten ops that run."""

    def __init__(self):
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [9, 1030])
def test_report_3_2_3_norms_and_up_projections_are_recomputed_and_nothing_dear(length):
    """Hooks count calls: down-projections are called again inside a recomputed region, their products are not."""
    cfg = tiny(num_nextn_predict_layers=0)
    micro = MicroBatch.of(random_tokens(1, length))
    calls, ops = {}, {}
    for recompute in (False, True):
        model, seen = model_of(cfg, recompute=recompute), Counter()
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda m, a, name=name, seen=seen: seen.update([name]))
        with Ops() as counted:
            state = model(micro)
            state["hidden"].sum().backward()
        calls[recompute], ops[recompute] = seen, counted.count
    twice = ("kv_a_layernorm", "q_a_layernorm", "kv_b_proj", "q_b_proj")
    for layer in ("layers.0", "layers.1"):
        for name in (*(f"self_attn.{n}" for n in twice), "input_layernorm", "post_attention_layernorm"):
            assert (calls[False][f"{layer}.{name}"], calls[True][f"{layer}.{name}"]) == (1, 2), name
        assert calls[True][f"{layer}.self_attn.o_proj"] == 1
    for name in ("layers.1.mlp.gate", "layers.1.mlp.experts", "layers.1.mlp.shared_experts", "norm", "embed_tokens"):
        assert calls[True][name] == 1, name
    up_projections = 2 * cfg.num_hidden_layers  # q_b_proj and kv_b_proj of every layer
    assert ops[True]["mm.default"] - ops[False]["mm.default"] == up_projections


def test_report_3_2_3_loads_are_counted_once_under_recompute():
    cfg, micro = tiny(aux_loss_alpha=0.01, **DEPTHS), MicroBatch.of(random_tokens(2, 9))
    _, plain, _ = whole_step(cfg, micro)
    _, again, _ = whole_step(cfg, micro, recompute=True)
    model = model_of(cfg, recompute=True)
    both = Executor(model.phases(), 3, lambda name: True).forward_backward([micro], head_loss(model)).loads
    for name, load in plain.items():
        assert load.sum() == 2 * 9 * 4 and torch.equal(load, again[name]) and torch.equal(load, both[name])


@pytest.mark.parametrize("training", [True, False])
def test_report_2_1_2_a_forward_pass_leaves_no_trace_in_the_model(training):
    """Loads are an output, not a state: evaluation cannot leak into the next bias update."""
    model = model_of(tiny(aux_loss_alpha=0.01, **DEPTHS)).train(training)
    before = {n: t.clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    with torch.no_grad():
        model(MicroBatch.of(random_tokens(2, 9)))
        Executor(model.phases()).forward([MicroBatch.of(random_tokens(2, 9))], lambda state, micro: None)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())


def test_report_3_3_2_masters_and_their_gradients_are_float32():
    cfg, micro = tiny(aux_loss_alpha=0.01, **DEPTHS), MicroBatch.of(random_tokens(2, 9))
    model = model_of(cfg, precision=BF16())
    state = model(micro)
    assert state["hidden"].dtype == torch.bfloat16 and state["aux"].dtype == torch.float32
    (head_loss(model)(state, micro)[0] + state["aux"]).backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_report_4_2_initial_weights():
    """Normal with std 0.006; norms at 1; no biases anywhere; embedding and head are two tensors."""
    cfg = tiny(initializer_range=DeepSeekV3Config().initializer_range, hidden_size=64, vocab_size=500)
    model = Transformer(cfg, seed=1)
    assert cfg.initializer_range == 0.006 and cfg.rms_norm_eps == DeepSeekV3Config().rms_norm_eps == 1e-6
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), name
        else:
            tolerance = 5 * 0.006 / (2 * parameter.numel()) ** 0.5
            assert abs(parameter.std().item() - 0.006) < tolerance, name
            assert abs(parameter.mean().item()) < 5 * 0.006 / parameter.numel() ** 0.5, name
        assert not name.endswith("bias")
    assert model.embed_tokens.weight.data_ptr() != model.lm_head.weight.data_ptr()
    assert all(r.e_score_correction_bias.abs().max() == 0 for r in model.balance_routers().values())
