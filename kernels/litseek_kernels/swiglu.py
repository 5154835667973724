"""silu(gate) * up in one pass (report §3.2.3). Spec: ref.swiglu. Fused with FP8: litseek_kernels.swiglu_fp8.

Letters: N rows, F hidden, G = 2 F (gate first).
``weight`` is one number a row, the gate's, multiplied into the activation: y = W2 (w a), so combine is a plain sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from litseek_kernels.device import runs_kernel
from litseek_kernels.e4m3 import INTERPRET, narrow
from litseek_kernels.operator import operator
from litseek_kernels.ref import swiglu as ref


def swiglu(gate_up: Tensor, weight: Tensor | None = None) -> Tensor:
    """(..., F) of (..., 2F), times weight (...) where given. Backward recomputes: only ``gate_up`` (and weight) is kept."""
    if gate_up.ndim < 1 or gate_up.shape[-1] % 2 or not gate_up.is_floating_point():
        raise ValueError(f"swiglu wants the gate's and the up half in the last dimension, got {_named(gate_up)}")
    if weight is not None and weight.shape != gate_up.shape[:-1]:
        raise ValueError(f"swiglu's weight {_named(weight)} is not one number for each row of {_named(gate_up)}")
    rows = gate_up.flatten(0, -2) if gate_up.ndim > 1 else gate_up[None]
    out = _swiglu(rows, None if weight is None else weight.flatten())
    return out.unflatten(0, gate_up.shape[:-1]) if gate_up.ndim > 1 else out[0]


def _named(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


@operator("litseek::swiglu")
def _swiglu(gate_up: Tensor, weight: Tensor | None) -> Tensor:
    if not _has_kernel(gate_up):
        return ref.swiglu_forward(gate_up, weight)
    gate_up = gate_up.contiguous()
    N, F = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(N, F)
    if out.numel():
        grid = (triton.cdiv(N, BLOCK_N), triton.cdiv(F, BLOCK_F))
        _forward_kernel[grid](
            gate_up, weight, out, N, F, WEIGHTED=weight is not None, BLOCK_N=BLOCK_N, BLOCK_F=BLOCK_F, num_warps=4
        )
    return out


@_swiglu.register_fake
def _(gate_up, weight):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@operator("litseek::swiglu_backward")
def _swiglu_backward(gate_up: Tensor, grad: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of gate_up and weight; the second has no elements without a weight."""
    if not _has_kernel(gate_up):
        grad_gate_up, grad_weight = ref.swiglu_backward(gate_up, grad, weight)
        return grad_gate_up, grad.new_empty(0) if grad_weight is None else grad_weight
    gate_up, grad = gate_up.contiguous(), grad.contiguous()
    N, F = grad.shape
    grad_gate_up = torch.empty_like(gate_up)
    grad_weight = grad.new_empty(0) if weight is None else torch.empty_like(weight)
    if N:
        _backward_kernel[(triton.cdiv(N, ROWS_BACKWARD),)](
            gate_up, grad, weight, grad_gate_up, grad_weight, N, F,
            WEIGHTED=weight is not None, BLOCK_N=ROWS_BACKWARD, BLOCK_F=BLOCK_F_BACKWARD, num_warps=4,
        )  # fmt: skip
    return grad_gate_up, grad_weight


@_swiglu_backward.register_fake
def _(gate_up, grad, weight):
    return torch.empty_like(gate_up), grad.new_empty(0) if weight is None else torch.empty_like(weight)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _autograd(ctx, grad):
    gate_up, weight = ctx.saved_tensors
    grad_gate_up, grad_weight = _swiglu_backward(gate_up, grad, weight)
    return grad_gate_up, grad_weight if weight is not None else None


_swiglu.register_autograd(_autograd, setup_context=_setup)


BLOCK_N, BLOCK_F = 4, 512
ROWS_BACKWARD, BLOCK_F_BACKWARD = 4, 256


def _has_kernel(x: Tensor) -> bool:
    return runs_kernel(x) and x.dtype in (torch.bfloat16, torch.float32)


@triton.jit
def _sigmoid(x):
    """1 / (1 + 2^(-x log2 e)) in four instructions where tl.sigmoid's exact division takes ten.

    Relative error a few times 1e-7, and for negative x it grows as the rounding of x log2 e does, 1e-7 |x|.
    """
    if INTERPRET:
        return tl.sigmoid(x)
    else:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x * -1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def _forward_kernel(
    h_ptr, weight_ptr, out_ptr, N, F, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (n < N)[:, None] & (f < F)[None, :]
    at = n.to(tl.int64)[:, None] * F + f[None, :]
    at_gate = n.to(tl.int64)[:, None] * (2 * F) + f[None, :]
    gate = tl.load(h_ptr + at_gate, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + at_gate + F, mask=mask, other=0.0).to(tl.float32)
    out = gate * _sigmoid(gate) * up
    if WEIGHTED:
        out = out * tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(out_ptr + at, narrow(out, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_gradients(gate, up, grad, weight, WEIGHTED: tl.constexpr):
    """Of gate and up, then silu(gate) and the unweighted activation; grad is that of the weighted activation."""
    gate_sigmoid = _sigmoid(gate)
    silu = gate * gate_sigmoid
    if WEIGHTED:
        grad = grad * weight[:, None]
    return grad * up * (gate_sigmoid + silu * (1.0 - gate_sigmoid)), grad * silu, silu * up


@triton.jit
def _backward_kernel(
    h_ptr, grad_ptr, weight_ptr, grad_h_ptr, grad_weight_ptr, N, F,
    WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Whole rows a program, so that the weight's gradient is one sum in one order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)[:, None]
    if WEIGHTED:
        weight = tl.load(weight_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    else:
        weight = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for first in range(0, F, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        mask = (n < N)[:, None] & (f < F)[None, :]
        at_gate = row * (2 * F) + f[None, :]
        gate = tl.load(h_ptr + at_gate, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + at_gate + F, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
        grad_gate, grad_up, activation = swiglu_gradients(gate, up, grad, weight, WEIGHTED)
        total += grad * activation
        tl.store(grad_h_ptr + at_gate, narrow(grad_gate, grad_h_ptr.dtype.element_ty), mask=mask)
        tl.store(grad_h_ptr + at_gate + F, narrow(grad_up, grad_h_ptr.dtype.element_ty), mask=mask)
    if WEIGHTED:
        rounded = narrow(tl.sum(total, 1), grad_weight_ptr.dtype.element_ty)
        tl.store(grad_weight_ptr + n, rounded, mask=n < N)
