"""The bias update of all layers together, and of none in a step that is skipped."""

import pytest
import torch

from litseek.optim import update_bias_, update_biases_

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_layers_together_equal_each_alone(device):
    generator = torch.Generator().manual_seed(0)
    loads = [torch.randint(0, 2**40, (8,), generator=generator) for _ in range(3)]
    loads.append(torch.full((8,), 2**40))
    biases, alone = ([torch.linspace(-1, 1, 8, device=device) for _ in loads] for _ in range(2))
    update_biases_(biases, [load.to(device) for load in loads], 1e-3)
    for bias, load in zip(alone, loads):
        update_bias_(bias, load.to(device), 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(biases, alone))
    mean = loads[0].double().mean()
    wanted = torch.linspace(-1, 1, 8).double() + 1e-3 * torch.sign(mean - loads[0])
    torch.testing.assert_close(biases[0].cpu().double(), wanted, rtol=0, atol=1e-7)
    assert torch.equal(biases[-1].cpu(), torch.linspace(-1, 1, 8))
    update_biases_([], [], 1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("finite", [True, False])
def test_a_skipped_step_moves_none(device, finite):
    bias, load = torch.zeros(4, device=device), torch.tensor([9, 1, 1, 1], device=device)
    update_biases_([bias], [load], 0.5, torch.tensor(finite, device=device))
    assert bias.tolist() == ([-0.5, 0.5, 0.5, 0.5] if finite else [0, 0, 0, 0])
