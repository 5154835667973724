"""Kernels run in Triton's interpreter on CPU tensors here and nowhere else; on CUDA tensors they run compiled.

``device`` gives a test "cpu" and, under the marker gpu, "cuda".
"""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cpu":
        if torch.cuda.is_available():
            pytest.skip("kernels were compiled for the GPU in this process")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device(request.param)
