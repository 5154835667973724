"""silu(gate) * up, and the same read and written in FP8. Letters: N rows, R rows of experts, F hidden, G = 2 F (gate first).

Arithmetic is float32 at least. A row's weight, the gate's, may be multiplied in: y = W2 (w a) makes combine a plain sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from litseek_kernels.ref.layout import to_compact, to_padded
from litseek_kernels.ref.quantise import dequantise_rows, quantise_columns, quantise_rows


def swiglu(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """(N, F) in the inputs' dtype."""
    return F.silu(gate_NF) * up_NF


def swiglu_forward(gate_up_NG: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """(N, F) = silu(gate) * up [* weight], rounded once to the dtype of ``gate_up_NG``."""
    gate, up = _wide(gate_up_NG).chunk(2, dim=-1)
    out = gate * gate.sigmoid() * up
    if weight_N is not None:
        out = out * weight_N.to(out.dtype)[:, None]
    return out.to(gate_up_NG.dtype)


def swiglu_backward(
    gate_up_NG: Tensor, grad_NF: Tensor, weight_N: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``gate_up_NG`` (its dtype) and of the weight (its dtype), given that of ``swiglu_forward``."""
    grad_gate_up, grad_weight = _backward(_wide(gate_up_NG), _wide(grad_NF), weight_N)
    if weight_N is not None:
        grad_weight = grad_weight.to(weight_N.dtype)
        return grad_gate_up.to(gate_up_NG.dtype), grad_weight
    return grad_gate_up.to(gate_up_NG.dtype), None


def swiglu_quantise(
    h_RG: Tensor,
    tile_begin: Tensor | None = None,
    tile_count: Tensor | None = None,
    weight_R: Tensor | None = None,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scale (1x128) of the activation, then of h itself, which is what backward keeps.

    With tiles (see litseek_kernels.layout) h is padded and weight_R compact; padding rows count as zeros.
    """
    h_RG = _masked(h_RG, tile_begin, tile_count)
    weight = _spread(weight_R, tile_begin, tile_count)
    activation = swiglu_forward(h_RG.float(), weight)
    return *quantise_rows(activation, power_of_two), *quantise_rows(h_RG)


def swiglu_backward_quantise(
    h_codes: Tensor,
    h_scale: Tensor,
    grad_RF: Tensor,
    tile_begin: Tensor | None = None,
    tile_count: Tensor | None = None,
    weight_R: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """From h in FP8 and the activation's gradient: the recomputed activation 128x1 (codes_t, scale_t), the gradient of h
    1x128 (codes, scale) and 128x1 (codes_t, scale_t), and the weight's gradient (float32, compact) or None. What is
    quantised 128x1 is rounded to BF16 before, as it is where rows are turned from BF16 in memory."""
    h = _masked(dequantise_rows(h_codes, h_scale), tile_begin, tile_count)
    grad = _masked(grad_RF, tile_begin, tile_count).float()
    weight = _spread(weight_R, tile_begin, tile_count)
    activation = swiglu_forward(h, weight)
    grad_h, grad_weight = _backward(h, grad, weight)
    if weight_R is not None and tile_begin is not None and tile_count is not None:
        grad_weight = to_compact(grad_weight, weight_R.shape[0], tile_begin, tile_count)
    return (
        *quantise_columns(activation.bfloat16()),
        *quantise_rows(grad_h),
        *quantise_columns(grad_h.bfloat16()),
        None if weight_R is None else grad_weight,
    )


def _backward(gate_up: Tensor, grad: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, dim=-1)
    gate_sigmoid = gate.sigmoid()
    silu = gate * gate_sigmoid
    grad_weight = (grad * silu * up).sum(dim=-1)
    if weight is not None:
        grad = grad * weight.to(grad.dtype)[:, None]
    grad_gate = grad * up * (gate_sigmoid + silu * (1 - gate_sigmoid))
    return torch.cat([grad_gate, grad * silu], dim=-1), grad_weight


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _masked(x: Tensor, tile_begin: Tensor | None, tile_count: Tensor | None) -> Tensor:
    """Padding rows as zeros, whatever they hold."""
    if tile_begin is None or tile_count is None:
        return x
    live = torch.arange(x.shape[0] // tile_count.shape[0], device=x.device) < tile_count[:, None]
    return torch.where(live.flatten()[:, None], x, 0)


def _spread(weight_R: Tensor | None, tile_begin: Tensor | None, tile_count: Tensor | None) -> Tensor | None:
    if weight_R is None or tile_begin is None or tile_count is None:
        return weight_R
    return to_padded(weight_R, tile_begin, tile_count)
