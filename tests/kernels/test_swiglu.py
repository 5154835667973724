"""SwiGLU against float64: forward, both gradients, ugly shapes."""

import pytest
import torch
from litseek_kernels.ref import swiglu as ref
from litseek_kernels.swiglu import swiglu
from litseek_kernels.testing import UGLY_ROWS, relative_error

# Rounding to nearest: bfloat16 keeps 8 bits, so one number is off by 3.9e-3 at most (1.7e-3 root mean square, from which
# the few numbers of 7 x 1 scatter).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 3.91e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [*UGLY_ROWS, (9, 768)])
def test_values_and_gradients_equal_float64(shape, weighted, dtype, device):
    rows, hidden = shape
    gate_up = torch.randn(rows, 2 * hidden, device=device).to(dtype).requires_grad_()
    weight = torch.rand(rows, device=device).requires_grad_() if weighted else None
    seed = torch.randn(rows, hidden, device=device).to(dtype)
    out = swiglu(gate_up, weight)
    out.backward(seed)
    exact = gate_up.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_() if weighted else None
    wanted = ref.swiglu(*exact.chunk(2, dim=-1))
    if exact_weight is not None:
        wanted = wanted * exact_weight[:, None]
    wanted.backward(seed.double())
    assert out.dtype == dtype and relative_error(out, wanted) < TOLERANCE[dtype]
    assert gate_up.grad.dtype == dtype and relative_error(gate_up.grad, exact.grad) < TOLERANCE[dtype]
    if weighted:
        assert weight.grad.dtype == torch.float32 and relative_error(weight.grad, exact_weight.grad) < 1e-5


def test_leading_dimensions_and_float64_gradients():
    gate_up = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(swiglu(gate_up), ref.swiglu_forward(gate_up))
    assert torch.autograd.gradcheck(swiglu, (gate_up, weight))
    assert torch.autograd.gradcheck(swiglu, (gate_up,))
    assert swiglu(gate_up[0, 0]).shape == (4,)


def test_nan_and_inf_stay(device):
    gate_up = torch.ones(3, 8, device=device, dtype=torch.bfloat16)
    gate_up[0, 1], gate_up[1, 6] = torch.nan, torch.inf
    out = swiglu(gate_up)
    assert out[0, 1].isnan() and out[1, 2].isinf() and out.isfinite().sum() == 10


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(3, 7\)"):
        swiglu(torch.randn(3, 7))
    with pytest.raises(ValueError, match=r"\(4,\).*\(3, 8\)"):
        swiglu(torch.randn(3, 8), torch.randn(4))


def test_the_op_is_sound_for_compilers():
    gate_up = torch.randn(3, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.litseek.swiglu.default, (gate_up, torch.rand(3, requires_grad=True)))
    torch.library.opcheck(torch.ops.litseek.swiglu.default, (gate_up, None))
