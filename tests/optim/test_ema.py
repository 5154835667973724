"""The average of weights: its arithmetic, its state, and the copy beside a GPU's work."""

import pytest
import torch

from litseek.optim import EMA


def test_follows_by_one_minus_decay_in_float32():
    value = torch.ones(3, dtype=torch.bfloat16)
    ema = EMA(0.9)
    ema.start({"w": value})
    ema.update({"w": value * 2})
    ema.update({"w": value * 3})
    assert ema.average["w"].dtype == torch.float32 and ema.updates == 2
    torch.testing.assert_close(ema.average["w"], torch.full((3,), 0.9 * (0.9 + 0.2) + 0.3))


def test_start_copies_and_keeps_a_loaded_average():
    value = torch.zeros(2)
    ema = EMA(0.5)
    ema.start({"w": value})
    value += 1
    assert ema.average["w"].tolist() == [0, 0]
    other = EMA(0.5)
    other.load_state_dict(ema.state_dict())
    other.start({"w": value})
    assert other.average["w"].tolist() == [0, 0]


def test_resume_is_bit_equal():
    values = [{"w": torch.randn(5, generator=torch.Generator().manual_seed(i))} for i in range(6)]
    straight, first, second = EMA(0.9), EMA(0.9), EMA(0.9)
    for ema, part in ((straight, values), (first, values[:3])):
        ema.start(values[0])
        for value in part:
            ema.update(value)
    second.load_state_dict(first.state_dict())
    for value in values[3:]:
        second.update(value)
    assert torch.equal(straight.average["w"], second.average["w"]) and second.updates == 6


def test_bad_decay_and_foreign_average_are_named():
    with pytest.raises(ValueError, match=r"decay is 1.0"):
        EMA(1.0)
    ema = EMA(0.5)
    ema.start({"w": torch.zeros(2)})
    other = EMA(0.5)
    other.load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="differ in 'extra'"):
        other.start({"w": torch.zeros(2), "extra": torch.zeros(1)})


@pytest.mark.gpu
def test_gpu_values_are_averaged_beside_the_stream():
    value = torch.zeros(1 << 22, device="cuda")
    plain, ema = torch.zeros(1 << 22), EMA(0.9)
    ema.start({"w": value})
    for step in range(5):
        ema.wait_copied()
        value += step + 1
        ema.update({"w": value})
        plain.lerp_(value.cpu(), 1 - 0.9)
    ema.wait()
    torch.testing.assert_close(ema.average["w"], plain)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_update_that_is_not_finite_does_not_count(device):
    ema, value = EMA(0.5), torch.zeros(3, device=device)
    ema.start({"w": value})
    for finite in (True, False, True):
        value += 1
        ema.update({"w": value}, torch.tensor(finite, device=device))
        ema.wait_copied()
    ema.wait()
    assert ema.updates == 2 and ema.average["w"].tolist() == [0.25 + 1.5] * 3
