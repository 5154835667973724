"""The FP8 recipe against float64 and against the same operands rounded by hand.

E4M3 rounds to 4 significant bits: an error of 2.6% of an operand's norm, 3.7% of a product's.
"""

import contextlib
from functools import partial

import pytest
import torch
from litseek_kernels.quantise import quantise_rows
from litseek_kernels.ref.quantise import dequantise_block, dequantise_rows, quantise_block
from litseek_kernels.testing import relative_error
from torch._dynamo.testing import CompileCounter

from litseek import deferral
from litseek.data.batch import MicroBatch
from litseek.models.transformer import build
from litseek.parallel.executor import Executor
from litseek.precision import BF16, FP8
from litseek.precision.fp8 import LinearFP8, codes_of
from tests.models.parity import tiny_config

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
PRODUCT = 0.04
EXPERTS = 0.09


def linear(role: str = "linear", out: int = 192, device: str = "cpu") -> LinearFP8:
    made = FP8().linear(256, out, role).to(device)
    assert isinstance(made, LinearFP8)
    torch.nn.init.normal_(made.weight, std=0.02)
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize(
    ("role", "out", "rows"), [("linear", 192, 200), ("linear", 576, 128), ("attention_out", 256, 3)]
)
def test_a_linear_and_its_gradients(role, out, rows, attached, device):
    made = linear(role, out, device)
    if attached:
        FP8().attach(made.weight, role)
    x = torch.randn(2, rows, 256, device=device).bfloat16().requires_grad_()
    grad = torch.randn(2, rows, out, device=device).bfloat16()
    y = made(x)
    y.backward(grad)
    wide, weight = x.detach().double().flatten(0, 1), made.weight.detach().double()
    assert relative_error(y.flatten(0, 1), wide @ weight.T) < PRODUCT
    assert relative_error(x.grad.flatten(0, 1), grad.double().flatten(0, 1) @ weight) < PRODUCT
    assert relative_error(made.weight.grad, grad.double().flatten(0, 1).T @ wide) < PRODUCT
    assert made.weight.grad.dtype == torch.float32


def test_a_linear_multiplies_the_dequantised_operands():
    """Every scale is where it belongs: against the operands rounded by hand only BF16's rounding of the sum is left."""
    made, x = linear(), torch.randn(128, 256).bfloat16()
    codes, scale_kM = quantise_rows(x)
    rounded = (codes.double().unflatten(1, (2, 128)) * scale_kM.double().T[:, :, None]).flatten(1)
    assert relative_error(rounded, x) < 0.03
    weight = dequantise_block(*quantise_block(made.weight.detach()), dtype=torch.float64)
    assert relative_error(made(x), rounded @ weight.T) < 2e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("counts", [[100, 0, 150, 51], [301, 0, 0, 0], [0, 0, 0, 0]])
def test_experts_and_their_gradients(counts, device):
    experts, rows = len(counts), sum(counts)
    count_E = torch.tensor(counts, device=device)
    made = [torch.randn(rows, 256), torch.randn(experts, 256, 256) * 0.05, torch.randn(experts, 256, 128) * 0.05]
    made = [made[0].bfloat16(), *made[1:], torch.rand(rows) + 0.5]
    grad = torch.randn(rows, 256).bfloat16().to(device)
    results = []
    for precision in (FP8(), BF16()):
        x, up, down, weight = (t.to(device).detach().requires_grad_() for t in made)
        y = precision.experts(x, up, down, count_E, weight)
        y.backward(grad)
        results.append([y.detach(), *(t.grad for t in (x, up, down, weight))])
    for ours, wanted in zip(*results):
        assert ours.shape == wanted.shape
        if wanted.numel() and wanted.any():
            assert relative_error(ours, wanted) < EXPERTS
        else:
            assert not ours.any()


@pytest.mark.parametrize("size", [1e-30, 1e-19, 1.0, 1e20])
@pytest.mark.parametrize("shape", [(37, 256), (5, 144), (0, 256)])
def test_a_payload_is_rounded_once(shape, size):
    """Codes and power-of-two scales are exact in BF16, and stay what they are when the experts quantise them."""
    x = (torch.randn(shape) * size).bfloat16()
    payload = FP8().pack(x)
    assert [part.dtype for part in payload] == [torch.uint8, torch.float32]
    assert payload[1].shape == (shape[0], -(-shape[1] // 128))
    rows = FP8().unpack(payload)
    assert rows.dtype == torch.bfloat16 and rows.shape == shape
    assert relative_error(rows, x) < 0.03 or size == 1e-30  # below 2**-64 a tile's scale is that of zeros
    assert torch.equal(dequantise_rows(*quantise_rows(rows, power_of_two=True)), rows.float())


def test_a_payload_keeps_what_is_not_finite():
    x = torch.randn(3, 256).bfloat16()
    x[1, 5], x[2, 200] = float("nan"), float("inf")
    found = FP8().unpack(FP8().pack(x)).isnan()
    assert found.sum() == 256 and found[1, :128].all() and found[2, 128:].all()


def test_the_experts_take_a_payloads_rows_without_rounding_them():
    """Forward on rows that travelled equals forward on the rows themselves: both have the same codes and scales."""
    x, count_E = torch.randn(60, 256).bfloat16(), torch.tensor([25, 35])
    weights = torch.randn(2, 256, 256) * 0.05, torch.randn(2, 256, 128) * 0.05
    travelled = FP8().unpack(FP8().pack(x))
    assert torch.equal(FP8().experts(travelled, *weights, count_E), FP8().experts(x, *weights, count_E))


@pytest.mark.parametrize("hidden", [128, 96])
def test_a_feed_forward_with_and_without_stacked_halves(hidden):
    made = [linear("linear", hidden), linear("linear", hidden), FP8().linear(hidden, 256)]
    torch.nn.init.normal_(made[2].weight, std=0.02)
    x = torch.randn(3, 50, 256).bfloat16().requires_grad_()
    grad = torch.randn(3, 50, 256).bfloat16()
    results = []
    for precision, parts in ((FP8(), made), (BF16(), [BF16().linear(m.in_features, m.out_features) for m in made])):
        for part, source in zip(parts, made):
            part.load_state_dict(source.state_dict())
            part.weight.grad = None
        x.grad = None
        y = precision.feed_forward(x, *parts)
        y.backward(grad)
        results.append([y.detach(), x.grad.clone(), *(part.weight.grad for part in parts)])
    for ours, wanted in zip(*results):
        assert relative_error(ours, wanted) < EXPERTS


@pytest.mark.parametrize("device", DEVICES)
def test_weight_gradients_put_off_are_the_same(device):
    """Every product: its weights' half comes when it is run, bit for bit what a whole backward gives."""
    precision = FP8()
    a, b, out = linear("linear", 256, device), linear("linear", 256, device), linear("attention_out", 256, device)
    stacks = [torch.randn(2, 512, 256, device=device) * 0.05, torch.randn(2, 256, 256, device=device) * 0.05]
    stacks = [torch.nn.Parameter(stack) for stack in stacks]
    weights = [a.weight, b.weight, out.weight, *stacks]
    x = torch.randn(140, 256, device=device).bfloat16()

    def gradients(put_off: bool) -> list[torch.Tensor]:
        for weight in weights:
            weight.grad = None
        rows, queue = x.clone().requires_grad_(), []
        with deferral.splitting(put_off):
            y = sum(precision.linears(rows, a, b)) + out(rows)
            y = y + precision.feed_forward(y, a, b, out)
            y = y + precision.experts(
                y, *stacks, torch.tensor([100, 40], device=device), torch.ones(140, device=device)
            )
        with deferral.deferring(queue) if put_off else contextlib.nullcontext():
            y.backward(torch.ones_like(y))
        if put_off:
            assert len(queue) == 8 and all(weight.grad is None for weight in weights)
            deferral.run(queue)
        return [rows.grad, *(weight.grad for weight in weights)]

    for later, now in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(later, now)


def test_codes_follow_the_master():
    made = linear()
    FP8().attach(made.weight, "linear")
    kept = made.weight.fp8_codes
    with torch.no_grad():
        made.weight.mul_(-1)
    assert torch.equal(codes_of(made.weight).codes.float(), -kept.float())  # before `attach` has made them again
    FP8().attach(made.weight, "linear")
    assert torch.equal(made.weight.fp8_codes.float(), -kept.float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-6, 1e-10, 1e-14])
def test_small_gradients_are_as_exact_as_large_ones(size, device):
    """A loss that is a mean over 63M tokens, the report's batch, has gradients near 1e-10."""
    made, x = linear(device=device), torch.randn(128, 256, device=device).bfloat16().requires_grad_()
    grad = (torch.randn(128, 192, device=device) * size).bfloat16()
    made(x).backward(grad)
    assert relative_error(x.grad, grad.double() @ made.weight.detach().double()) < PRODUCT
    assert relative_error(made.weight.grad, grad.double().T @ x.detach().double()) < PRODUCT
    weights = torch.randn(2, 256, 256, device=device) * 0.05, torch.randn(2, 256, 128, device=device) * 0.05
    results = []
    for precision in (FP8(), BF16()):
        leaves = [t.detach().requires_grad_() for t in (x, *weights, torch.rand(128, device=device) + 0.5)]
        torch.manual_seed(0)
        y = precision.experts(
            leaves[0], *leaves[1:3], torch.tensor([100, 28], device=device), leaves[3].detach().fill_(0.7)
        )
        y.backward((torch.randn(128, 256) * size).bfloat16().to(device))
        results.append([leaf.grad for leaf in leaves[:3]])
    for ours, wanted in zip(*results):
        assert relative_error(ours, wanted) < EXPERTS


def test_a_linear_that_was_made_in_inference_mode():
    with torch.inference_mode():
        assert linear()(torch.randn(3, 256)).isfinite().all()


def test_not_a_number_is_not_hidden():
    x = torch.randn(4, 256).bfloat16()
    x[1, 7] = float("nan")
    x[2, 200] = float("inf")
    y = linear()(x)
    assert y[0].isfinite().all() and y[3].isfinite().all()
    assert y[1].isnan().all() and not y[2].isfinite().any()


def test_a_model_knows_what_stays_high_and_is_near_bf16():
    """Head, MTP's projection and embedding have no codes; the loss differs from BF16's by less than 0.25%."""
    cfg = tiny_config(
        hidden_size=128, moe_intermediate_size=128, intermediate_size=128, num_nextn_predict_layers=1,
        q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, initializer_range=0.02,
    )  # fmt: skip
    micro = MicroBatch.of(torch.randint(cfg.vocab_size, (2, 64)))
    losses = {}
    for precision in (BF16(), FP8()):
        model = build(cfg, precision, seed=1)
        model.attach()

        def head(state, micro, model=model):
            logits = model.head_logits(state["hidden"]).flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, micro.labels.flatten()), {}

        losses[precision.name] = Executor(model.phases()).forward_backward([micro], head).loss.item()
        named = dict(model.named_parameters())
        high = [name for name, weight in named.items() if not hasattr(weight, "fp8_codes")]
        if precision.name == "fp8":
            assert not [n for n in high if n.endswith("_proj.weight") and "eh_proj" not in n]
            assert {"lm_head.weight", "embed_tokens.weight", "mtp.0.eh_proj.weight"} <= set(high)
            assert named["layers.1.mlp.experts.down_proj"].grad.dtype == torch.float32
    assert abs(losses["fp8"] / losses["bf16"] - 1) < 0.0025


def test_the_weight_gradient_of_many_rows_is_a_sum_of_parts():
    """A 192 x 256 matrix and 8192 rows: two tiles, so that the rows are split in four."""
    made = linear(out=192)
    x, grad = torch.randn(8192, 256).bfloat16(), torch.randn(8192, 192).bfloat16()
    made(x).backward(grad)
    assert relative_error(made.weight.grad, grad.double().T @ x.double()) < PRODUCT


def test_linears_of_one_input_are_the_linears():
    first, second = linear(out=192), linear(out=64)
    x = torch.randn(3, 50, 256).bfloat16().requires_grad_()
    grads = [torch.randn(3, 50, 192).bfloat16(), torch.randn(3, 50, 64).bfloat16()]
    results = []
    for run in (lambda: FP8().linears(x, first, second), lambda: (first(x), second(x))):
        x.grad = first.weight.grad = second.weight.grad = None
        outs = run()
        torch.autograd.backward(outs, grads)
        results.append([*outs, x.grad, first.weight.grad, second.weight.grad])
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted)


def small_model(recompute: bool):
    cfg = tiny_config(
        hidden_size=128, moe_intermediate_size=128, intermediate_size=128, q_lora_rank=32, kv_lora_rank=32,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, initializer_range=0.02,
    )  # fmt: skip
    model = build(cfg, FP8(), recompute, seed=1)
    model.attach()
    return model


def test_recompute_changes_nothing():
    results = []
    micro = MicroBatch.of(torch.randint(97, (2, 64)))
    for recompute in (False, True):
        model = small_model(recompute)

        def head(state, micro, model=model):
            return model.head_logits(state["hidden"]).square().mean(), {}

        loss = Executor(model.phases()).forward_backward([micro], head).loss
        results.append([loss, *(weight.grad for weight in model.parameters())])
    for kept, again in zip(*results):
        torch.testing.assert_close(kept, again, rtol=0, atol=0)


def test_odd_widths_are_refused_when_the_model_is_made():
    with pytest.raises(ValueError, match="multiples of 16, a Linear of the model has 32 in and 24 out"):
        FP8().linear(32, 24)
    assert type(FP8().linear(32, 97, role="head")) is not LinearFP8


def test_compiled_phases_see_weights_that_were_written(monkeypatch):
    """They cannot tell by themselves, neither in the model's plain views nor where GRPO scores a new rollout."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    sizes = {key: 32 for key in ("q_lora_rank", "kv_lora_rank", "hidden_size", "intermediate_size")}
    cfg = tiny_config(
        **sizes, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, moe_intermediate_size=32, num_hidden_layers=2
    )
    plain, compiled = build(cfg, FP8(), seed=1), build(cfg, FP8(), seed=1)
    compiled.compile_phases()
    compiled.attach()
    tokens = torch.randint(cfg.vocab_size, (2, 16))
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled.logits(tokens), plain.logits(tokens))
            for model in (plain, compiled):
                for weight in model.parameters():
                    weight.mul_(-1.5)


def test_steps_and_layers_share_compiled_phases(monkeypatch):
    """A step writes all weights: what a compiled phase reads of them must be no constant of its own."""
    graphs = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=graphs))
    sizes = {key: 32 for key in ("q_lora_rank", "kv_lora_rank", "hidden_size", "intermediate_size")}
    cfg = tiny_config(
        **sizes, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, moe_intermediate_size=32, num_hidden_layers=6
    )
    model = build(cfg, FP8(), seed=1)
    model.compile_phases()
    made = []
    for _ in range(3):
        model.attach()
        model.logits(torch.randint(cfg.vocab_size, (2, 16))).sum().backward()
        made.append(graphs.frame_count)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(0.9)
    assert made[0] == made[-1] <= 6, made  # attend before either feed-forward, these, and _experts after such a layer
