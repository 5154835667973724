"""Cross-entropy kernels against float64. Relative errors: 2e-6 with float32 logits; with BF16 logits the loss is as
exact and the gradient, rounded once, within 2.5e-3 (5e-3 in the interpreter, whose stores cut off instead of rounding).
"""

import pytest
import torch
import torch.nn.functional as F
from litseek_kernels.cross_entropy import cross_entropy, cross_entropy_and_gradient_, cross_entropy_backward_, scale_
from litseek_kernels.testing import relative_error

IGNORE = -100
SHAPES = [(5, 41), (1, 1), (3, 8), (4, 4096), (2, 20011), (0, 16)]


def case(rows, vocab, dtype, device, spread=3.0):
    generator = torch.Generator().manual_seed(rows + vocab)
    logits = (spread * torch.randn(rows, vocab, generator=generator)).to(dtype).to(device)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[1::3] = IGNORE
    return logits, labels.to(device)


def exact(logits, labels, grad, scale=1.0):
    wide = logits.double().requires_grad_()
    nll = F.cross_entropy(wide * scale, labels, reduction="none", ignore_index=IGNORE)
    (wide_grad,) = torch.autograd.grad(nll, wide, grad.double())
    return nll.detach(), wide_grad


def gradient_error(dtype, device):
    return 2e-6 if dtype == torch.float32 else 2.5e-3 if device.type == "cuda" else 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1 / 0.7])
def test_loss_and_gradient(shape, dtype, scale, device):
    logits, labels = case(*shape, dtype, device)
    grad = torch.linspace(-1, 2, shape[0], device=device)
    want_nll, want_grad = exact(logits, labels, grad, scale)
    nll, lse = cross_entropy(logits, labels, IGNORE, scale)
    assert nll.dtype == lse.dtype == torch.float32 and (nll[labels == IGNORE] == 0).all()
    assert relative_error(nll, want_nll) <= 2e-6
    scored = labels != IGNORE
    assert relative_error(lse[scored], (logits.double() * scale).logsumexp(1)[scored]) <= 2e-6
    out = cross_entropy_backward_(logits, labels, lse, grad, IGNORE, scale)
    assert out.data_ptr() == logits.data_ptr() and (out[~scored] == 0).all()
    assert relative_error(out, want_grad) <= gradient_error(dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_at_once_are_the_two(shape, dtype, device):
    logits, labels = case(*shape, dtype, device)
    nll, lse = cross_entropy(logits, labels, IGNORE, 0.5)
    apart = cross_entropy_backward_(logits.clone(), labels, lse, torch.ones_like(nll), IGNORE, 0.5)
    assert torch.equal(cross_entropy_and_gradient_(logits, labels, IGNORE, 0.5), nll)
    torch.testing.assert_close(logits, apart, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-9)


def test_far_logits(device):
    logits, labels = case(6, 300, torch.float32, device, spread=1e4)
    want, want_grad = exact(logits, labels, torch.ones(6, device=device))
    nll = cross_entropy_and_gradient_(logits, labels, IGNORE)
    assert relative_error(nll, want) <= 2e-6 and relative_error(logits, want_grad) <= 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(bad, device):
    logits, labels = case(4, 50, torch.bfloat16, device)
    logits[2, 17] = bad
    nll = cross_entropy_and_gradient_(logits, labels, IGNORE)
    assert nll[2].isnan() and logits[2].isnan().any() and nll[[0, 1, 3]].isfinite().all()


def test_minus_infinity_is_probability_zero(device):
    logits, labels = case(1, 50, torch.float32, device)
    logits[0, 20:] = -float("inf")
    labels[0] = 3
    want, want_grad = exact(logits, labels, torch.ones(1, device=device))
    nll = cross_entropy_and_gradient_(logits, labels, IGNORE)
    assert relative_error(nll, want) <= 2e-6 and relative_error(logits, want_grad) <= 2e-6


def test_a_label_outside_of_the_vocabulary_gives_nan(device):
    logits, labels = case(3, 50, torch.float32, device)
    labels[0], labels[2] = 50, -1
    assert cross_entropy(logits, labels, IGNORE)[0].isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("factor", [1.0, 0.25, float("nan")])
def test_scale(factor, device):
    x = torch.randn(77, 131, device=device)
    want = x * factor
    torch.testing.assert_close(scale_(x, torch.tensor(factor, device=device)), want, equal_nan=True)


def test_refusals_name_the_shape():
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(3,\)"):
        cross_entropy(torch.zeros(4, 5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"strides \(1, 5\)"):
        cross_entropy(torch.zeros(4, 5).T, torch.zeros(5, dtype=torch.int64))


def test_ops_are_registered(device):
    logits, labels = case(4, 40, torch.float32, device)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.litseek.cross_entropy, (logits, labels, IGNORE, 1.0), test_utils=tests)
    torch.library.opcheck(torch.ops.litseek.cross_entropy_and_gradient, (logits, labels, IGNORE, 1.0), test_utils=tests)
    rows = torch.ones(4, device=device)
    torch.library.opcheck(
        torch.ops.litseek.cross_entropy_backward, (logits, labels, rows, rows, IGNORE, 1.0), test_utils=tests
    )
    torch.library.opcheck(torch.ops.litseek.scale, (logits, rows[0]), test_utils=tests)
