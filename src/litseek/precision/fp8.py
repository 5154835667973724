"""The report's FP8 recipe (§3.3): E4M3 everywhere, activations 1x128, weights 128x128, FP32 promotion every 128 of K.

FP8 are the Linears of attention and feed-forward and the experts; embedding, head, MTP's projection, gate, norms and the
attention core stay high. Masters are FP32; their codes are made once a step (`FP8.attach`). Kept for backward are codes:
a Linear's input 128x1, SwiGLU's input 1x128 with its output recomputed, and the input of the Linear after attention 1x128
with power-of-two scales, turned in backward. On a CPU the same recipe runs through the kernels' references.

Letters: M rows, N out, K in, R rows of experts, E experts, D model, F hidden, G = 2 F.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from litseek_kernels.grouped_gemm import grouped_mm_fp8, mm_fp8
from litseek_kernels.grouped_wgrad import grouped_wgrad_fp8
from litseek_kernels.layout import TILE, Layout, padded_capacity, row_layout
from litseek_kernels.quantise import quantise_both, quantise_rows, quantise_weight, requantise_transposed
from litseek_kernels.swiglu_fp8 import swiglu_backward_quantise, swiglu_quantise
from torch import Tensor, nn

from litseek.copies import version_of
from litseek.deferral import splits, weight_gradient
from litseek.precision.high import BF16, Linear

HIGH = ("head", "mtp")
"""Roles of Linears that stay in BF16."""


WIDTH = 16
"""The products' and the transposed codes' rows start at multiples of 16 bytes."""
MULTIPROCESSORS, FLOPS, BYTES = 132, 8.2e12, 3.0e12
"""Of a Hopper GPU, the operations a second of one of them, the memory's bytes a second: as timed on an H100."""


class Codes(NamedTuple):
    """A weight in FP8."""

    codes: Tensor
    """(..., N, K)."""
    scale: Tensor
    """(..., N / 128, K / 128) float32."""
    codes_t: Tensor
    """(..., K, N): the tensor cores want both operands with K innermost, so the input's gradient needs its own."""


class FP8(BF16):
    """FP8 products with FP32 masters. Refuses a GPU whose tensor cores the kernels are not written for."""

    name = "fp8"

    def linear(self, in_features: int, out_features: int, role: str = "linear") -> Linear:
        if role in HIGH:
            return super().linear(in_features, out_features, role)
        if in_features % WIDTH or out_features % WIDTH:
            raise ValueError(
                f"precision=fp8 wants widths that are multiples of {WIDTH}, a Linear of the model has {in_features} in and "
                f"{out_features} out; change the model's widths or use precision=bf16."
            )
        return LinearFP8(in_features, out_features, self.compute_dtype, role)

    def linears(self, x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
        """The input is quantised once for all, and its gradient summed in BF16."""
        rows_MK = _whole_tiles(x.to(self.compute_dtype))
        weights = [linear.weight for linear in linears]
        codes = [part for weight in weights for part in codes_of(weight)]
        return tuple(_as_before(out, x) for out in _Products.apply(rows_MK, len(weights), *weights, *codes))

    def attach(self, weight: nn.Parameter, role: str) -> None:
        if role in HIGH:
            super().attach(weight, role)
            return
        check_device(weight.device)
        if getattr(weight, "codes_of_version", None) != version_of(weight):
            keep_codes(weight)

    def experts(
        self, rows_RD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, count_E: Tensor, weight_R: Tensor | None = None
    ) -> Tensor:
        layout = row_layout(count_E, padded_capacity(rows_RD.shape[0], count_E.shape[0]))
        codes = *codes_of(gate_up_EGD), *codes_of(down_EDF)
        return _Experts.apply(rows_RD.to(self.compute_dtype), gate_up_EGD, down_EDF, weight_R, *codes, *layout)

    def feed_forward(self, x: Tensor, gate: Linear, up: Linear, down: Linear) -> Tensor:
        """One expert that sees every row; its gate and up halves are one product where their blocks can be stacked."""
        if gate.out_features % TILE:
            return super().feed_forward(x, gate, up, down)
        rows_MK = _whole_tiles(x.to(self.compute_dtype))
        codes = *_stacked(codes_of(gate.weight), codes_of(up.weight)), *codes_of(down.weight)
        return _as_before(_FeedForward.apply(rows_MK, gate.weight, up.weight, down.weight, *codes), x)

    def pack(self, rows_RD: Tensor) -> tuple[Tensor, ...]:
        """1x128 codes as bytes (R, D) and their power-of-two scales (R, ceil(D / 128)) float32."""
        codes, scale = quantise_rows(rows_RD.to(self.compute_dtype), power_of_two=True)
        return codes.view(torch.uint8), scale.t().contiguous()

    def unpack(self, payload: tuple[Tensor, ...]) -> Tensor:
        """(R, D) BF16, without a rounding: a code times a power of two has at most 4 significant bits. Nor does
        quantising it with power-of-two scales again round: a tile whose largest code is 224 gets half the scale and
        twice the codes, any other tile its own."""
        codes, scale = payload
        wide = scale.to(torch.bfloat16).repeat_interleave(TILE, dim=1)[:, : codes.shape[1]]
        return codes.view(torch.float8_e4m3fn).to(torch.bfloat16) * wide


class LinearFP8(Linear):
    """y = x W^T with both operands in FP8."""

    def forward(self, x: Tensor) -> Tensor:
        rows_MK = _whole_tiles(x.to(self.compute_dtype))
        turned = self.role == "attention_out"
        out_MN = _Product.apply(rows_MK, self.weight, turned, *codes_of(self.weight))
        return _as_before(out_MN, x)


def _whole_tiles(x: Tensor) -> Tensor:
    """(M, K) of (..., K), zero rows added up to a multiple of 128."""
    rows_MK = x.reshape(-1, x.shape[-1])
    padding = -rows_MK.shape[0] % TILE
    return F.pad(rows_MK, (0, 0, 0, padding)) if padding else rows_MK


def _as_before(out_MN: Tensor, x: Tensor) -> Tensor:
    """Without those rows, in x's leading shape."""
    return out_MN[: x.shape[:-1].numel()].unflatten(0, x.shape[:-1])


def keep_codes(weight: nn.Parameter) -> None:
    """Quantise a master and keep the codes beside it."""
    holder: Any = weight
    holder.fp8_codes, holder.fp8_scale, holder.fp8_codes_t = quantise_weight(weight.detach())
    holder.codes_of_version = version_of(weight)


def codes_of(weight: Tensor) -> Codes:
    """The weight's codes as `FP8.attach` keeps them, or made now where it was not attached or has been written since."""
    holder: Any = weight
    if not torch.compiler.is_compiling():  # there a version would be a constant, and every step compile anew
        kept = getattr(
            weight, "codes_of_version", None
        )  # first whether there are any: inference tensors have no version
        if kept is None or kept != version_of(weight):
            check_device(weight.device)
            return Codes(*quantise_weight(weight.detach()))
    return Codes(holder.fp8_codes, holder.fp8_scale, holder.fp8_codes_t)


def check_device(device: torch.device) -> None:
    """ValueError on a GPU without the FP8 tensor cores that the kernels use."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"precision=fp8 needs a GPU of compute capability 9.0 (H100, H200, H800), {torch.cuda.get_device_name(device)} "
            f"has {major}.{minor}; precision=bf16 runs on it."
        )


def _dense_wgrad(grad_t: Tensor, grad_scale_t: Tensor, rows_t: Tensor, rows_scale_t: Tensor) -> Tensor:
    """(N, K). Where a matrix has too few tiles for the GPU the rows are split into parts, whose sums are added."""
    (N, M), K = grad_t.shape, rows_t.shape[0]
    parts = _parts(M, N, K)
    edge = torch.arange(parts + 1, dtype=torch.int32, device=grad_t.device) * (M // TILE) // parts * TILE
    sums = grouped_wgrad_fp8(grad_t, grad_scale_t, rows_t, rows_scale_t, edge)
    return sums[0] if parts == 1 else sums.sum(0)


def _parts(M: int, N: int, K: int) -> int:
    """How many parts take the least time: rounds of 256 x 128 tiles, then the sums written in FP32 and read again."""
    tiles, best, least = -(-N // 256) * -(-K // TILE), 1, math.inf
    for parts in range(1, max(1, M // (16 * TILE)) + 1):
        rounds = -(-tiles * parts // MULTIPROCESSORS)
        seconds = rounds * (M / parts) * 2 * 256 * TILE / FLOPS
        if parts > 1:
            seconds += 8 * parts * N * K / BYTES
        if seconds < least:
            best, least = parts, seconds
    return best


def _leaves(*weights: Tensor) -> tuple[Tensor | None, ...]:
    """The masters, where their gradients may be put off."""
    return weights if splits() else (None,) * len(weights)


def _of_weight(leaf: Tensor | None, compute: Callable[[], Tensor]) -> Tensor | None:
    return compute() if leaf is None else weight_gradient(leaf, compute)


class _Product(torch.autograd.Function):
    """(M, N) of BF16 rows (M, K), M a multiple of 128, and a master (N, K) given with its codes."""

    @staticmethod
    def forward(
        ctx: Any, rows_MK: Tensor, weight: Tensor, turned: bool, codes: Tensor, scale: Tensor, codes_t: Tensor
    ) -> Tensor:
        ctx.turned, ctx.leaves = turned, _leaves(weight)
        if turned:
            rows, rows_scale = quantise_rows(rows_MK, power_of_two=True)
            kept = [rows, rows_scale]
        else:
            rows, rows_scale, *kept = quantise_both(rows_MK)
        ctx.save_for_backward(*kept, scale, codes_t)
        return mm_fp8(rows, rows_scale, codes, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_t, rows_scale_t, scale, codes_t = ctx.saved_tensors
        if ctx.turned:
            rows_t, rows_scale_t = requantise_transposed(rows_t, rows_scale_t)
        grad, grad_scale, grad_t, grad_scale_t = quantise_both(grads[0].contiguous())
        grad_rows = mm_fp8(grad, grad_scale, codes_t, scale.t())
        operands = grad_t, grad_scale_t, rows_t, rows_scale_t
        return grad_rows, _of_weight(ctx.leaves[0], lambda: _dense_wgrad(*operands)), None, None, None, None


class _Products(torch.autograd.Function):
    """(M, N) for each of several masters (N, K), of the same BF16 rows."""

    @staticmethod
    def forward(ctx: Any, rows_MK: Tensor, count: int, *weights_and_codes: Tensor) -> tuple[Tensor, ...]:
        rows, rows_scale, *kept = quantise_both(rows_MK)
        codes, ctx.leaves = weights_and_codes[count:], _leaves(*weights_and_codes[:count])
        ctx.save_for_backward(*kept, *codes[1::3], *codes[2::3])
        return tuple(mm_fp8(rows, rows_scale, codes[3 * i], codes[3 * i + 1]) for i in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_t, rows_scale_t, *codes = ctx.saved_tensors
        count, grad_rows, grad_weights = len(grads), None, []
        for one, leaf, scale, codes_t in zip(grads, ctx.leaves, codes[:count], codes[count:]):
            grad, grad_scale, grad_t, grad_scale_t = quantise_both(one.contiguous())
            part = mm_fp8(grad, grad_scale, codes_t, scale.t())
            grad_rows = part if grad_rows is None else grad_rows + part
            operands = grad_t, grad_scale_t, rows_t, rows_scale_t
            grad_weights.append(_of_weight(leaf, partial(_dense_wgrad, *operands)))
        return grad_rows, None, *grad_weights, *(None,) * (3 * count)


class _Experts(torch.autograd.Function):
    """(R, D) of compact BF16 rows through their experts, whose rows are padded in between."""

    @staticmethod
    def forward(
        ctx: Any, rows_RD: Tensor, gate_up: Tensor, down: Tensor, weight_R: Tensor | None, *codes_and_layout: Tensor
    ) -> Tensor:
        up, low, layout = Codes(*codes_and_layout[:3]), Codes(*codes_and_layout[3:6]), Layout(*codes_and_layout[6:])
        ctx.leaves = _leaves(gate_up, down)
        out, kept = _forward(rows_RD, weight_R, up, low, layout, layout)
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, of_up, of_down, grad_weight = _backward(grads[0], ctx.saved_tensors, padded=True)
        gate_up, down = ctx.leaves
        return grad_rows, _of_weight(gate_up, of_up), _of_weight(down, of_down), grad_weight, *(None,) * 10


class _FeedForward(torch.autograd.Function):
    """(M, D) of BF16 rows, M a multiple of 128, through gate and up (F, D) and down (D, F)."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, gate: Tensor, up: Tensor, down: Tensor, *codes: Tensor) -> Tensor:
        stacked, low = (Codes(*(part[None] for part in three)) for three in (codes[:3], codes[3:]))
        ctx.leaves = _leaves(gate, up, down)
        out, kept = _forward(rows_MD, None, stacked, low, None, _one_expert(rows_MD))
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_rows, of_both, of_down, _ = _backward(grads[0], ctx.saved_tensors, padded=False)
        gate, up, down = ctx.leaves
        halves: list[Tensor] = []  # gate's comes first and leaves up's here

        def of_gate() -> Tensor:
            grad_gate, grad_up = of_both().chunk(2)
            halves.append(grad_up)
            return grad_gate

        grad_gate, grad_up = _of_weight(gate, of_gate), _of_weight(up, halves.pop)
        return grad_rows, grad_gate, grad_up, _of_weight(down, of_down), *(None,) * 6


def _stacked(gate: Codes, up: Codes) -> Codes:
    """Codes of (2F, D): gate's rows first."""
    codes, scale = torch.cat([gate.codes, up.codes]), torch.cat([gate.scale, up.scale])
    return Codes(codes, scale, torch.cat([gate.codes_t, up.codes_t], dim=1))


def _one_expert(rows_MD: Tensor) -> Layout:
    """The layout of rows that all go to one expert and need no padding."""
    tile = torch.arange(rows_MD.shape[0] // TILE, dtype=torch.int32, device=rows_MD.device)
    start = torch.arange(2, dtype=torch.int32, device=rows_MD.device) * rows_MD.shape[0]
    return Layout(torch.zeros_like(tile), start, tile * TILE, torch.full_like(tile, TILE))


def _stack_product(
    codes_RK: Tensor,
    scale_kR: Tensor,
    weight_ENK: Tensor,
    scale_Enk: Tensor,
    layout: Layout,
    compact: tuple[Tensor, Tensor, int] | None,
    grouped: bool,
) -> Tensor:
    """Rows through the matrices of their experts, or, not ``grouped``, all through the only one."""
    if not grouped:
        return mm_fp8(codes_RK, scale_kR, weight_ENK[0], scale_Enk[0])
    return grouped_mm_fp8(codes_RK, scale_kR, weight_ENK, scale_Enk, layout.tile_expert, compact=compact)


def _forward(
    rows_RD: Tensor, weight_R: Tensor | None, up: Codes, down: Codes, padding: Layout | None, layout: Layout
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Down(SwiGLU(gate and up)), SwiGLU's output times the gate's weight; and what backward needs. ``padding`` is the
    layout where the rows need one: they are routed rows then, and have power-of-two scales as the dispatch between ranks
    has (report §3.3.3), which leaves rows that came through it as they are."""
    routed = padding is not None
    rows, rows_scale, rows_t, rows_scale_t = quantise_both(rows_RD, power_of_two=routed, layout=padding)
    hidden = _stack_product(rows, rows_scale, up.codes, up.scale, layout, None, routed)
    act, act_scale, kept, kept_scale = swiglu_quantise(hidden, layout=padding, weight_R=weight_R)
    compact = None if padding is None else (layout.tile_begin, layout.tile_count, rows_RD.shape[0])
    out = _stack_product(act, act_scale, down.codes, down.scale, layout, compact, routed)
    weights = up.scale, up.codes_t, down.scale, down.codes_t
    return out, (rows_t, rows_scale_t, kept, kept_scale, weight_R, *weights, *layout)


def _backward(
    grad_RD: Tensor, kept: tuple[Tensor, ...], padded: bool
) -> tuple[Tensor, Callable[[], Tensor], Callable[[], Tensor], Tensor | None]:
    """Gradients of the rows, then what makes those of gate and up and of down, and of the gate's weights."""
    rows_t, rows_scale_t, hidden, hidden_scale, weight_R, up_scale, up_codes_t, down_scale, down_codes_t = kept[:9]
    layout = Layout(*kept[9:])
    padding = layout if padded else None
    grad, grad_scale, grad_t, grad_scale_t = quantise_both(grad_RD.contiguous(), power_of_two=padded, layout=padding)
    grad_act = _stack_product(grad, grad_scale, down_codes_t, down_scale.transpose(1, 2), layout, None, padded)
    made = swiglu_backward_quantise(hidden, hidden_scale, grad_act, layout=padding, weight_R=weight_R)
    wgrad = partial(grouped_wgrad_fp8, padded_start_E=layout.padded_start_E) if padded else _dense_wgrad
    of_down = partial(wgrad, grad_t, grad_scale_t, made.activation_t, made.activation_scale_t)
    compact = (layout.tile_begin, layout.tile_count, grad_RD.shape[0]) if padded else None
    grad_rows = _stack_product(made.codes, made.scale, up_codes_t, up_scale.transpose(1, 2), layout, compact, padded)
    of_up = partial(wgrad, made.codes_t, made.scale_t, rows_t, rows_scale_t)
    return grad_rows, of_up, of_down, made.weight
