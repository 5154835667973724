"""How many programs a persistent kernel starts."""

from types import SimpleNamespace

import pytest
import torch
from litseek_kernels import device


def test_persistent_kernels_leave_what_products_leave(monkeypatch):
    gpu = SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    device._multiprocessors.cache_clear()
    assert device.multiprocessors(0) == 132
    torch._C._set_sm_carveout_experimental(20)
    try:
        assert device.multiprocessors(0) == 112
    finally:
        torch._C._set_sm_carveout_experimental(None)
        device._multiprocessors.cache_clear()


def test_another_gpu_is_refused(monkeypatch):
    gpu = SimpleNamespace(major=8, minor=0, multi_processor_count=108, name="A100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    device._multiprocessors.cache_clear()
    with pytest.raises(ValueError, match=r"A100 has \(8, 0\)"):
        device.multiprocessors(0)
    device._multiprocessors.cache_clear()
