"""The multi-tensor AdamW and norm against the reference on the CPU.

On a GPU moments are bit-equal to it. So are parameters, but for a unit in the last place of the update in fewer than one
element in a hundred: torch's root on the CPU (MKL) is not always rounded to nearest, and the beta's power is computed
elsewhere. The interpreter has no fused multiply-add, so that there a few units are allowed.
"""

import pytest
import torch
from litseek_kernels import adamw as kernel
from litseek_kernels.adamw import MultiAdamW, MultiNorm, l2_norm_and_finite
from litseek_kernels.ref.adamw import adamw_

SHAPES = [(6, 4), (4,), (130, 257), (0, 3), (1,), (3, 64, 96)]
SETTING = dict(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
ULP = 2.0**-23


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several blocks a tensor without large tensors."""
    monkeypatch.setattr(kernel, "NORM_CHUNK", 4096)


class State:
    """Tensors of one optimizer and what the reference makes of the same."""

    def __init__(self, device, moments=torch.bfloat16, shapes=SHAPES, copies=True):
        generator = torch.Generator().manual_seed(1)
        self.device, self.generator = device, generator
        self.wanted = [torch.randn(shape, generator=generator) for shape in shapes]
        self.wanted_m, self.wanted_v = ([torch.zeros_like(p, dtype=moments) for p in self.wanted] for _ in range(2))
        clone = lambda tensors: [t.to(device, copy=True) for t in tensors]
        self.params, self.m, self.v = clone(self.wanted), clone(self.wanted_m), clone(self.wanted_v)
        self.steps = [torch.zeros((), dtype=torch.int64, device=device) for _ in shapes]
        self.copies = [p.bfloat16() if copies and i % 2 == 0 else None for i, p in enumerate(self.params)]
        self.optimizer = MultiAdamW()

    def gradients(self, dtype):
        return [torch.randn(p.shape, generator=self.generator).to(dtype) for p in self.wanted]

    def step(self, grads, on_device=None, **keys):
        grads = on_device or [g.to(self.device) for g in grads]
        lists = (self.params, grads, self.m, self.v, self.steps, self.copies)
        self.optimizer(*lists, **SETTING, **keys)

    def reference(self, grads, count, scale=1.0):
        s = SETTING
        for p, g, m, v in zip(self.wanted, grads, self.wanted_m, self.wanted_v):
            adamw_(p, g.float() * scale, m, v, count, s["lr"], *s["betas"], s["eps"], s["weight_decay"])

    def tensors(self):
        return [*self.params, *self.m, *self.v, *self.steps, *(c for c in self.copies if c is not None)]

    def check(self):
        for ours, theirs in zip([*self.params, *self.m, *self.v], [*self.wanted, *self.wanted_m, *self.wanted_v]):
            # a BF16 moment may fall on the other side of a rounding
            unit = ULP if theirs.dtype == torch.float32 else 2.0**-8
            torch.testing.assert_close(ours.cpu(), theirs, rtol=4 * unit, atol=4 * ULP)
        for param, copy in zip(self.params, self.copies):
            assert copy is None or torch.equal(copy, param.bfloat16())


def same(got, wanted):
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("grads", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_steps_equal_the_reference(device, moments, grads):
    state = State(device, moments)
    scale = torch.tensor(0.37)
    for count in range(1, 5):
        given = state.gradients(grads)
        state.reference(given, count, scale)
        state.step(given, scale=scale.to(device))
    state.check()
    assert [int(step) for step in state.steps] == [4] * len(SHAPES)


@pytest.mark.gpu
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_on_a_gpu_moments_are_bit_equal_to_the_cpu_and_nearly_all_parameters(moments, monkeypatch):
    root = torch.sqrt
    monkeypatch.setattr(torch, "sqrt", lambda x: root(x.double()).to(x.dtype))
    state = State(torch.device("cuda"), moments)
    for count in range(1, 9):
        given = state.gradients(torch.float32)
        state.reference(given, count)
        state.step(given)
    assert same([t.cpu() for t in (*state.m, *state.v)], [*state.wanted_m, *state.wanted_v])
    ours, theirs = (torch.cat([p.cpu().flatten() for p in params]) for params in (state.params, state.wanted))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * ULP)
    assert (ours != theirs).float().mean() < 0.01


def test_a_step_that_is_not_finite_changes_nothing(device):
    state = State(device)
    state.step(state.gradients(torch.float32))
    before = [t.clone() for t in state.tensors()]
    bad = state.gradients(torch.float32)
    bad[0][0, 0] = float("nan")
    state.step(bad, scale=torch.tensor(float("nan"), device=device), finite=torch.tensor(False, device=device))
    assert same(state.tensors(), before)
    state.step(state.gradients(torch.float32), finite=torch.tensor(True, device=device))
    assert [int(step) for step in state.steps] == [2] * len(SHAPES) and not same(state.tensors()[:3], before[:3])


def test_counts_may_differ(device):
    state = State(device, torch.float32)
    for i, step in enumerate(state.steps):
        step.fill_(10 * i)
    given = state.gradients(torch.float32)
    for i, (p, g, m, v) in enumerate(zip(state.wanted, given, state.wanted_m, state.wanted_v)):
        adamw_(p, g, m, v, 10 * i + 1, 1e-2, 0.9, 0.95, 1e-8, 0.1)
    state.step(given)
    state.check()


def test_gradients_may_move_and_lie_at_odd_addresses(device):
    state = State(device)
    for count in (1, 2, 3):
        given = state.gradients(torch.float32)
        flat = torch.cat([torch.zeros(count), *(g.flatten() for g in given)]).to(device)
        views = [view.view(g.shape) for view, g in zip(flat[count:].split([g.numel() for g in given]), given)]
        state.reference(given, count)
        state.step(given, on_device=views)
    state.check()


def test_a_low_beta_takes_lerps_other_branch(device, monkeypatch):
    monkeypatch.setitem(SETTING, "betas", (0.3, 0.4))
    state = State(device, torch.float32)
    for count in (1, 2):
        given = state.gradients(torch.float32)
        state.reference(given, count)
        state.step(given)
    state.check()


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,), (torch.float32, torch.bfloat16)])
def test_norm(device, dtypes):
    """Within 1e-6 of float64, the same to the last bit twice, and false for a norm that is not finite."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(s, generator=generator).to(dtypes[i % len(dtypes)]) for i, s in enumerate(SHAPES)]
    wanted = torch.cat([t.double().flatten() for t in tensors]).norm()
    on_device, keep = [t.to(device) for t in tensors], MultiNorm()
    norm, finite = l2_norm_and_finite(on_device, keep)
    assert norm.dtype == torch.float32 and finite.dtype == torch.bool and bool(finite)
    assert abs(float(norm) - float(wanted)) < 1e-6 * float(wanted)
    assert torch.equal(l2_norm_and_finite(on_device, keep)[0], norm)
    for bad in (float("nan"), float("inf"), -float("inf")):
        on_device[-1].view(-1)[-1] = bad
        norm, finite = l2_norm_and_finite(on_device, keep)
        assert not norm.isfinite() and not finite


def test_norm_of_nothing(device):
    assert [t.item() for t in l2_norm_and_finite([])] == [0.0, True]
    assert [t.item() for t in l2_norm_and_finite([torch.empty(0, device=device)])] == [0.0, True]


def test_on_the_cpu_the_norm_is_torchs():
    tensors = [torch.randn(5, 7), torch.randn(3)]
    assert torch.equal(l2_norm_and_finite(tensors)[0], torch.nn.utils.get_total_norm(tensors))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(params=lambda p: p.double()), r"parameter of shape \(6, 4\) is float64"),
        (dict(grads=lambda g: g.t()), r"gradient of shape \(4, 6\) is float32, not contiguous"),
        (dict(m=lambda m: m[:3]), r"exp_avg of shape \(3, 4\)"),
        (dict(v=lambda v: v.float()), r"exp_avg_sq of shape \(6, 4\) is float32; .* or|and bfloat16"),
        (dict(copies=lambda c: c.float()), r"copy of shape \(6, 4\) is float32; it must be .* bfloat16"),
        (dict(steps=lambda s: s.float()), r"step count of shape \(\) is float32"),
    ],
)
def test_what_does_not_fit_is_named(device, change, words):
    state = State(device, shapes=SHAPES[:1])
    grads = state.gradients(torch.float32)
    for name, make in change.items():
        if name == "grads":
            grads = [make(grads[0])]
        else:
            setattr(state, name, [make(getattr(state, name)[0])])
    with pytest.raises(ValueError, match=words):
        state.step(grads)
