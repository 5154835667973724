"""Numbers that arrive when they arrive, and nobody waits."""

import pytest
import torch

from litseek.callbacks.later import Later


def test_on_a_cpu_a_value_is_there_at_once_and_once():
    later = Later()
    assert later.get() is None
    later.put(torch.tensor([1.0, 2.0]))
    assert later.get().tolist() == [1.0, 2.0]
    assert later.get() is None


@pytest.mark.gpu
def test_on_a_gpu_it_comes_after_the_work_before_it_and_as_it_was():
    later, value = Later(), torch.ones(2, device="cuda")
    torch.cuda._sleep(10**9)
    later.put(value)
    value += 1
    later.put(value)  # the first is on its way, so this one is not taken
    assert later.get() is None
    torch.cuda.synchronize()
    assert later.get().tolist() == [1.0, 1.0] and later.get() is None
    later.put(value)
    torch.cuda.synchronize()
    assert later.get().tolist() == [2.0, 2.0]
