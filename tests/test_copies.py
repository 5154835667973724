"""Copies of weights: what products read, and where their gradients arrive."""

import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from litseek import deferral
from litseek.copies import version_of
from litseek.optim import AdamWConfig
from litseek.precision import BF16, FP8, compute_copy, operand


def made(seed: int = 0) -> nn.Linear:
    linear = BF16().linear(24, 16)
    nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(seed))
    return linear


def test_a_product_reads_the_copy_and_the_master_gets_float32_gradients():
    linear, plain = made(), made()
    BF16().attach(linear.weight, "linear")
    x = torch.randn(5, 24)
    for _ in range(2):  # two micro-batches add up
        linear(x).float().square().sum().backward()
        plain(x).float().square().sum().backward()
    assert compute_copy(linear.weight).dtype == torch.bfloat16 and compute_copy(linear.weight).grad is None
    assert linear.weight.grad.dtype == torch.float32
    torch.testing.assert_close(linear.weight.grad, plain.weight.grad, rtol=1e-6, atol=0)


def test_a_gradient_put_off_reaches_the_master_when_it_is_run():
    linear, plain = made(), made()
    x, later = torch.randn(5, 24), []
    for layer in (linear, plain):
        BF16().attach(layer.weight, "linear")
    with deferral.splitting(True):
        out = linear(x).float().square().sum()
    with deferral.deferring(later):
        out.backward()
    assert linear.weight.grad is None
    deferral.run(later)
    plain(x).float().square().sum().backward()
    torch.testing.assert_close(linear.weight.grad, plain.weight.grad, rtol=1e-6, atol=0)


def test_the_copy_follows_the_optimizer_and_a_loaded_checkpoint():
    linear = made()
    BF16().attach(linear.weight, "linear")
    optimizer = AdamWConfig(lr=0.1).build(linear.named_parameters())
    linear(torch.randn(5, 24)).float().sum().backward()
    optimizer.step()
    copy = compute_copy(linear.weight)
    assert torch.equal(copy, linear.weight.bfloat16()) and copy.of_version == version_of(linear.weight)
    linear.load_state_dict(made(seed=1).state_dict())
    assert torch.equal(operand(linear.weight, torch.bfloat16), linear.weight.bfloat16())
    assert compute_copy(linear.weight) is copy


def test_float64_weights_have_no_copy():
    linear = made().double()
    BF16().attach(linear.weight, "linear")
    assert compute_copy(linear.weight) is None


def test_a_model_and_its_copies_are_freed():
    linear = made()
    BF16().attach(linear.weight, "linear")
    linear(torch.randn(5, 24)).float().sum().backward()
    master = weakref.ref(linear.weight)
    del linear
    gc.collect()
    assert master() is None


@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_weight_that_is_frozen_or_freed_after_its_copy_was_made(frozen_first):
    linear = made()
    linear.weight.requires_grad_(not frozen_first)
    BF16().attach(linear.weight, "linear")
    linear.weight.requires_grad_(frozen_first)
    BF16().attach(linear.weight, "linear")
    linear(torch.randn(5, 24).requires_grad_()).float().sum().backward()
    assert (linear.weight.grad is not None) == frozen_first


def test_an_unpickled_model_still_gets_gradients():
    linear = made()
    BF16().attach(linear.weight, "linear")
    again = pickle.loads(pickle.dumps(linear))
    BF16().attach(again.weight, "linear")
    again(torch.randn(5, 24)).float().sum().backward()
    assert again.weight.grad is not None


@pytest.mark.parametrize("precision", [BF16(), FP8()], ids=["bf16", "fp8"])
def test_data_that_was_replaced_is_seen(precision):
    """As by torch.nn.utils.vector_to_parameters, and by a move to another device: the version stays what it was."""
    linear = precision.linear(32, 16)
    nn.init.normal_(linear.weight)
    precision.attach(linear.weight, "linear")
    new, x = torch.randn(16, 32), torch.randn(3, 32)
    nn.utils.vector_to_parameters(new.flatten(), linear.parameters())
    fresh = precision.linear(32, 16)
    fresh.load_state_dict({"weight": new})
    assert torch.equal(linear(x), fresh(x))
    precision.attach(linear.weight, "linear")
    assert torch.equal(linear(x), fresh(x))
