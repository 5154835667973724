"""The chunked head against torch's cross-entropy over whole logits."""

import pytest
import torch
import torch.nn.functional as F
from litseek_kernels.ref.cross_entropy import cross_entropy, cross_entropy_backward_

from litseek.data.batch import IGNORE as DATA_IGNORE
from litseek.losses import IGNORE, linear_cross_entropy, token_logprobs


def head(rows=23, width=16, vocab=41, ignored=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[:ignored] = IGNORE
    return hidden, weight, labels


def plain(hidden, weight, labels, reduction, temperature=1.0):
    return F.cross_entropy(hidden @ weight.T / temperature, labels, reduction=reduction)


def test_ignored_label_is_the_datas():
    assert IGNORE == DATA_IGNORE


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 100])
@pytest.mark.parametrize("ignored", [0, 1, 20, 23])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradients(reduction, chunk_rows, ignored, temperature):
    hidden, weight, labels = head(ignored=ignored)
    upstream = torch.tensor(0.3) if reduction == "sum" else torch.linspace(-1, 2, 23)
    ours = linear_cross_entropy(hidden, weight, labels, reduction, temperature=temperature, chunk_rows=chunk_rows)
    theirs = plain(hidden, weight, labels, reduction, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)
    for mine, other in zip(
        torch.autograd.grad(ours, (hidden, weight), upstream), torch.autograd.grad(theirs, (hidden, weight), upstream)
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_leading_dimensions_stay():
    hidden, weight, labels = head(rows=24)
    whole = linear_cross_entropy(hidden, weight, labels, "none")
    shaped = linear_cross_entropy(hidden.view(2, 12, -1), weight, labels.view(2, 12), "none")
    assert torch.equal(whole.view(2, 12), shaped)


def test_second_backward_finds_the_gradients_unscaled():
    hidden, weight, labels = head()
    loss = 0.5 * linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, labels = head()
    linear_cross_entropy(hidden.detach(), weight, labels).backward()
    assert weight.grad is not None
    linear_cross_entropy(hidden, weight.detach(), labels).backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, labels).requires_grad


def test_bf16_hidden_states_with_a_float32_master():
    hidden, weight, labels = head(rows=64, width=32)
    loss = linear_cross_entropy(hidden.bfloat16(), weight, labels)
    rounded = plain(hidden.bfloat16().float(), weight.bfloat16().float(), labels, "sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, rounded, rtol=3e-3, atol=0)
    (grad_hidden, grad_weight) = torch.autograd.grad(loss, (hidden, weight))
    (want_hidden, want_weight) = torch.autograd.grad(rounded, (hidden, weight))
    assert grad_weight.dtype == torch.float32
    for got, want in ((grad_hidden, want_hidden), (grad_weight, want_weight)):
        assert (got - want).norm() / want.norm() < 1e-2


def test_large_logits_do_not_overflow():
    hidden, weight, labels = head()
    loss = linear_cross_entropy(1e4 * hidden, weight, labels)
    assert loss.isfinite() and torch.autograd.grad(loss, hidden)[0].isfinite().all()


def test_all_logits_are_never_held(monkeypatch):
    seen = []
    module = __import__("litseek.losses.cross_entropy", fromlist=["_logits"])
    original = module._logits
    monkeypatch.setattr(module, "_logits", lambda *args: seen.append(len(args[0])) or original(*args))
    hidden, weight, labels = head(rows=64)
    linear_cross_entropy(hidden, weight, labels, "none", chunk_rows=10).sum().backward()
    assert max(seen) == 10 and len(seen) == 14  # seven chunks forward, seven recomputed


def test_token_logprobs_are_log_softmax_at_a_temperature():
    hidden, weight, labels = head(ignored=2)
    logprobs = token_logprobs(hidden, weight, labels, temperature=0.5)
    table = torch.log_softmax(hidden @ weight.T / 0.5, dim=-1)
    torch.testing.assert_close(logprobs[2:], table[torch.arange(2, 23), labels[2:]], rtol=1e-5, atol=1e-5)
    assert torch.equal(logprobs[:2], torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_backward_overwrites_and_zeroes_ignored_rows(dtype):
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    labels = torch.tensor([IGNORE, 3, 0, 10, 5])
    _, lse = cross_entropy(logits, labels)
    grad = cross_entropy_backward_(logits, labels, lse, torch.ones(5))
    assert grad is logits and torch.equal(grad[0], torch.zeros(11, dtype=dtype))
    torch.testing.assert_close(
        grad.float().sum(dim=1), torch.zeros(5), rtol=0, atol=1e-6 if dtype.itemsize > 2 else 1e-2
    )


def test_reference_backward_keeps_a_confident_gradient_in_bf16():
    """softmax = 0.9999 rounds to 1 in bfloat16; the gradient at the label must not become 0."""
    logits = torch.tensor([[9.2, 0.0]], dtype=torch.bfloat16)
    label = torch.tensor([0])
    _, lse = cross_entropy(logits, label)
    want = torch.sigmoid(logits.float()[0, 0]) - 1
    grad = cross_entropy_backward_(logits, label, lse, torch.ones(1))
    assert float(grad[0, 0]) == pytest.approx(float(want), rel=1e-2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(reduction="mean"), "'mean', allowed are 'sum' and 'none'"),
        (dict(temperature=0.0), "temperature is 0.0"),
        (dict(labels_N=torch.zeros(3, dtype=torch.int64)), r"labels have shape \(3,\)"),
    ],
)
def test_bad_arguments_are_named(change, words):
    hidden, weight, labels = head()
    arguments = dict(labels_N=labels, reduction="sum", temperature=1.0) | change
    with pytest.raises(ValueError, match=words):
        linear_cross_entropy(hidden, weight, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_compiled_on_a_gpu_equals_the_cpu(reduction):
    hidden, weight, labels = head(rows=300, width=64, vocab=1001)
    ours = linear_cross_entropy(hidden.cuda(), weight.cuda(), labels.cuda(), reduction, chunk_rows=128)
    theirs = linear_cross_entropy(hidden, weight, labels, reduction)
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-4)
    got, want = torch.autograd.grad(ours.sum(), (hidden, weight)), torch.autograd.grad(theirs.sum(), (hidden, weight))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
