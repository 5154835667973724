"""AdamW against torch's, its moments, groups, state and configuration."""

import pytest
import torch
from torch import nn

from litseek.optim import AdamWConfig, MuonConfig, clip_grad_norm_, set_lr
from litseek.optim import adamw as module


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"layers.0.up.weight": (6, 4), "layers.0.norm.weight": (4,), "layers.1.experts": (3, 5, 4)}
    return [(n, nn.Parameter(torch.randn(s, generator=generator))) for n, s in shapes.items()]


def give_gradients(named, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, param in named:
        param.grad = torch.randn(param.shape, generator=generator)


def train(config, steps, named=None):
    named = named or parameters()
    optimizer = config.build(named)
    for step in range(steps):
        give_gradients(named, step)
        optimizer.step()
    return named, optimizer


def test_float32_moments_equal_torch():
    ours, _ = train(AdamWConfig(lr=1e-2, moments="fp32"), 20)
    theirs = parameters()
    reference = torch.optim.AdamW([p for _, p in theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(20):
        give_gradients(theirs, step)
        reference.step()
    for (_, a), (_, b) in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_bf16_moments_are_stored_so_and_stay_close():
    bf16, optimizer = train(AdamWConfig(lr=1e-2), 50)
    fp32, _ = train(AdamWConfig(lr=1e-2, moments="fp32"), 50)
    assert {s[k].dtype for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    for (_, a), (_, b) in zip(bf16, fp32):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 5e-3  # of the 0.5 that 50 steps of 0.01 can go


def test_the_first_update_is_not_rounded():
    """Moments are used before they are rounded: after one step BF16 and float32 moments give equal weights."""
    (bf16, _), (fp32, _) = train(AdamWConfig(), 1), train(AdamWConfig(moments="fp32"), 1)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(bf16, fp32))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def on(device):
    return [(name, nn.Parameter(param.detach().to(device))) for name, param in parameters()]


def step_with(optimizer, named, seed, **keys):
    generator = torch.Generator().manual_seed(seed)
    for _, param in named:
        param.grad = torch.randn(param.shape, generator=generator).to(param.device)
    optimizer.step(**keys)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [AdamWConfig(lr=1e-2), MuonConfig(lr=1e-2)], ids=["adamw", "muon"])
def test_the_copy_is_the_stepped_parameter_rounded(config, device):
    named = on(device)
    for _, param in named[:2]:
        param.compute_copy = param.detach().bfloat16()
    optimizer = config.build(named)
    for seed in range(3):
        before = [param.compute_copy.clone() for _, param in named[:2]]
        step_with(optimizer, named, seed)
        for (_, param), old in zip(named, before):
            assert torch.equal(param.compute_copy, param.detach().bfloat16()) and not torch.equal(
                param.compute_copy, old
            )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [AdamWConfig(lr=1e-2), MuonConfig(lr=1e-2)], ids=["adamw", "muon"])
def test_a_step_that_is_not_finite_leaves_all_as_it_was(config, device):
    named = on(device)
    named[0][1].compute_copy = named[0][1].detach().bfloat16()
    optimizer = config.build(named)
    yes, no, scale = (torch.tensor(value, device=device) for value in (True, False, 1.0))
    step_with(optimizer, named, 0, scale=scale, finite=yes)
    kept = lambda: [p.detach() for _, p in named] + [v for s in optimizer.state.values() for v in s.values()]
    before = [value.clone() for value in [*kept(), named[0][1].compute_copy]]
    step_with(optimizer, named, 1, scale=scale * float("nan"), finite=no)
    assert all(torch.equal(a, b) for a, b in zip(before, [*kept(), named[0][1].compute_copy]))
    step_with(optimizer, named, 1, finite=yes)
    assert {int(s["step"]) for s in optimizer.state.values()} == {2}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", [AdamWConfig(lr=1e-2), MuonConfig(lr=1e-2)], ids=["adamw", "muon"])
def test_the_scale_is_as_if_the_gradients_were_multiplied(config, device):
    one, other = on(device), on(device)
    optimizer, plain = config.build(one), config.build(other)
    scale = torch.tensor(0.3, device=device)
    for seed in range(3):
        step_with(optimizer, one, seed, scale=scale)
        generator = torch.Generator().manual_seed(seed)
        for _, param in other:
            param.grad = torch.randn(param.shape, generator=generator).to(device) * scale
        plain.step()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, other))


@pytest.mark.gpu
@pytest.mark.parametrize("moments", ["bf16", "fp32"])
def test_a_gpu_and_a_cpu_take_the_same_steps_and_each_others_state(moments):
    """Parameters within 1e-6 after four steps, two of them from the other device's state."""
    config, runs = AdamWConfig(lr=1e-2, moments=moments), {}
    for device, other in (("cpu", "cuda"), ("cuda", "cpu")):
        named = on(device)
        optimizer = config.build(named)
        for seed in range(2):
            step_with(optimizer, named, seed)
        moved = [(name, nn.Parameter(param.detach().to(other))) for name, param in named]
        again = config.build(moved)
        again.load_state_dict(optimizer.state_dict())
        assert all(value.device.type == other for state in again.state.values() for value in state.values())
        for seed in range(2, 4):
            step_with(again, moved, seed)
        runs[device] = [param.detach().cpu() for _, param in moved]
    for a, b in zip(runs["cpu"], runs["cuda"]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 if moments == "fp32" else 1e-4)


def test_norms_decay_unless_exempt():
    for decay_norms in (True, False):
        named = parameters()
        before = {n: p.detach().clone() for n, p in named}
        optimizer = AdamWConfig(lr=0.5, weight_decay=0.2, decay_norms=decay_norms).build(named)
        for _, param in named:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        for name, param in named:
            decayed = decay_norms or "norm" not in name
            torch.testing.assert_close(param.detach(), before[name] * (0.9 if decayed else 1.0))


def test_a_parameter_without_gradient_keeps_its_state():
    named = parameters()
    optimizer = AdamWConfig().build(named)
    give_gradients(named, 0)
    named[0][1].grad = None
    before = named[0][1].detach().clone()
    optimizer.step()
    assert torch.equal(named[0][1], before) and named[0][1] not in optimizer.state


@pytest.mark.parametrize("moments", ["bf16", "fp32"])
def test_resume_is_bit_equal_and_keeps_the_moments_dtype(moments, tmp_path):
    config = AdamWConfig(lr=1e-2, moments=moments)
    straight, _ = train(config, 6)
    named, optimizer = train(config, 3)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    again = config.build(named)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert {s["exp_avg"].dtype for s in again.state.values()} == {module.MOMENTS[moments]}
    for step in range(3, 6):
        give_gradients(named, step)
        again.step()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(straight, named))


def test_materialise_makes_zero_state_and_changes_nothing():
    named = parameters()
    optimizer = AdamWConfig().build(named)
    optimizer.materialise()
    assert {p for _, p in named} == set(optimizer.state)
    give_gradients(named, 0)
    optimizer.step()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, train(AdamWConfig(), 1)[0]))


def test_set_lr_and_a_zero_rate():
    named, optimizer = train(AdamWConfig(), 1)
    before = [p.detach().clone() for _, p in named]
    set_lr(optimizer, 0.0)
    optimizer.step()
    assert all(torch.equal(p, b) for (_, p), b in zip(named, before))


def test_step_runs_a_closure_with_gradients():
    named = parameters()
    optimizer = AdamWConfig().build(named)

    def closure():
        loss = sum(p.square().sum() for _, p in named)
        loss.backward()
        return loss

    assert optimizer.step(closure).detach() > 0 and len(optimizer.state) == 3


def test_groups_carry_global_names():
    optimizer = AdamWConfig(decay_norms=False).build(parameters())
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["layers.0.up.weight", "layers.1.experts"],
        ["layers.0.norm.weight"],
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(moments="fp8"), "optim.moments is 'fp8', allowed are 'bf16', 'fp32'"),
        (dict(betas=(0.9, 1.0)), "optim.betas is"),
        (dict(lr=0.0), "optim.lr is 0.0"),
        (dict(clip=-1), "optim.clip is -1"),
        (dict(weight_decay=-0.1), "optim.weight_decay is -0.1"),
    ],
)
def test_bad_settings_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        AdamWConfig(**arguments)


def test_clip_scales_to_the_global_norm():
    named = parameters()
    give_gradients(named, 1)
    params = [p for _, p in named]
    want = torch.cat([p.grad.flatten() for p in params]).norm()
    torch.testing.assert_close(clip_grad_norm_(params, 0.5), want)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in params]).norm(), torch.tensor(0.5))
    small = [p.grad.clone() for p in params]
    clip_grad_norm_(params, 10.0)
    assert all(torch.equal(p.grad, s) for p, s in zip(params, small))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clip_leaves_gradients_alone_when_one_is_not_finite(bad):
    named = parameters()
    give_gradients(named, 1)
    params = [p for _, p in named]
    params[0].grad[0, 0] = bad
    before = [p.grad.clone() for p in params]
    assert not clip_grad_norm_(params, 0.5).isfinite()
    assert all(torch.equal(p.grad, b) for p, b in zip(params[1:], before[1:]))
