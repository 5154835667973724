"""One thread for every test process: tiny shapes gain nothing from more, and processes that share cores lose much.

Every test starts from the same random numbers.
"""

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
import torch  # the variables above are read when torch is loaded

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Kernels that are imported from here on are made for the interpreter; the variable has to stand before triton is
    # imported, whose own tl.sum and the like are kernels too. Ops still run their references on CPU tensors, as for a
    # user, except where TRITON_INTERPRET=1 is set: tests/kernels/conftest.py does so per test.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
