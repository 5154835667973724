"""AdamW of many tensors in one launch, and the norm of many gradients in two. Spec: ref.adamw_.

Letters: P tensors, B blocks of CHUNK elements. The tensors lie where they lie: a table in device memory holds their
addresses, a map says which tensor and which part of it a block works on. An element costs its own bytes once: with a
float32 gradient, BF16 moments and a BF16 copy of the weight that is 22.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from litseek_kernels.device import runs_kernel
from litseek_kernels.ref.adamw import l2_norm

_FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_COLUMNS = tl.constexpr(8)
"""Of a table's row: parameter, gradient, two moments, copy, elements, aligned or not, step count."""
CHUNK, BLOCK, WARPS, HALF = 4096, 1024, 4, 8
"""HALF: the bytes of a load of BF16; with 8 a thread has as many elements of it as of a 16-byte load of float32."""
NORM_CHUNK, NORM_BLOCK, NORM_WARPS = 32768, 2048, 4


@triton.jit
def _bf16(x, INTERPRET: tl.constexpr):
    """To nearest even. The interpreter truncates, so there the rounding is added by hand."""
    if INTERPRET:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(tl.bfloat16)


@triton.jit
def _address(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, first, ALIGNED: tl.constexpr):
    """Of a tensor's element ``first``; ALIGNED bytes are promised to the compiler, 0 for none."""
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED > 0:
        pointer = tl.multiple_of(pointer, ALIGNED)
    return pointer + first


@triton.jit
def _update(
    row, first, left, scale, root, rate, keep, weight1, beta2, weight2, eps,
    GRAD: tl.constexpr, MOMENT: tl.constexpr, COPY: tl.constexpr, NEAR: tl.constexpr, HALF: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One chunk of one tensor; WHOLE: all of it is there and aligned, so that loads are 16 bytes wide."""
    FULL: tl.constexpr = 16 if WHOLE else 0
    PART: tl.constexpr = HALF if WHOLE else 0
    param_ptr = _address(row, 0, tl.float32, first, FULL)
    grad_ptr = _address(row, 1, GRAD, first, FULL if tl.float32 == GRAD else PART)
    mean_ptr = _address(row, 2, MOMENT, first, FULL if tl.float32 == MOMENT else PART)
    square_ptr = _address(row, 3, MOMENT, first, FULL if tl.float32 == MOMENT else PART)
    copy_ptr = _address(row, 4, tl.bfloat16, first, PART)
    for start in range(0, CHUNK, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if WHOLE:
            grad = tl.load(grad_ptr + i).to(tl.float32)
            param = tl.load(param_ptr + i)
            mean = tl.load(mean_ptr + i).to(tl.float32)
            square = tl.load(square_ptr + i).to(tl.float32)
        else:
            mask = i < left
            grad = tl.load(grad_ptr + i, mask=mask, other=0.0).to(tl.float32)
            param = tl.load(param_ptr + i, mask=mask, other=0.0)
            mean = tl.load(mean_ptr + i, mask=mask, other=0.0).to(tl.float32)
            square = tl.load(square_ptr + i, mask=mask, other=0.0).to(tl.float32)
        grad = grad * scale
        # operation by operation as torch does it on a CPU: lerp and addcmul end in a fused multiply-add
        if NEAR:
            mean = tl.fma(grad - mean, weight1, mean)
        else:
            mean = tl.fma(grad - mean, weight1 - 1.0, grad)
        square = tl.fma(grad * weight2, grad, square * beta2)
        denominator = tl.div_rn(tl.sqrt_rn(square), root) + eps
        param = param * keep + tl.div_rn(mean * rate, denominator)
        if tl.bfloat16 == MOMENT:
            new_mean, new_square = _bf16(mean, INTERPRET), _bf16(square, INTERPRET)
        else:
            new_mean, new_square = mean, square
        if WHOLE:
            tl.store(param_ptr + i, param)
            tl.store(mean_ptr + i, new_mean)
            tl.store(square_ptr + i, new_square)
            if COPY:
                tl.store(copy_ptr + i, _bf16(param, INTERPRET))
        else:
            tl.store(param_ptr + i, param, mask=mask)
            tl.store(mean_ptr + i, new_mean, mask=mask)
            tl.store(square_ptr + i, new_square, mask=mask)
            if COPY:
                tl.store(copy_ptr + i, _bf16(param, INTERPRET), mask=mask)


@triton.jit
def _adamw(
    map_ptr, table_ptr, factor_ptr, scale_ptr, finite_ptr, keep, weight1, beta2, weight2, eps,
    GRAD: tl.constexpr, MOMENT: tl.constexpr, COPY: tl.constexpr, NEAR: tl.constexpr, HALF: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    owner, chunk = tl.load(map_ptr + 2 * block), tl.load(map_ptr + 2 * block + 1)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    go = 1
    if finite_ptr is not None:
        go = tl.load(finite_ptr).to(tl.int32)
    row = table_ptr + owner * _COLUMNS
    first = chunk.to(tl.int64) * CHUNK
    left = tl.load(row + 5) - first
    aligned = tl.load(row + 6)
    root, rate = tl.load(factor_ptr + 2 * owner), tl.load(factor_ptr + 2 * owner + 1)
    if go != 0:
        if (left >= CHUNK) & (aligned != 0):
            _update(
                row, first, left, scale, root, rate, keep, weight1, beta2, weight2, eps,
                GRAD, MOMENT, COPY, NEAR, HALF, CHUNK, BLOCK, True, INTERPRET,
            )  # fmt: skip
        else:
            _update(  # in small blocks: its masks and narrow loads would cost the other branch registers
                row, first, left, scale, root, rate, keep, weight1, beta2, weight2, eps,
                GRAD, MOMENT, COPY, NEAR, HALF, CHUNK, 512, False, INTERPRET,
            )  # fmt: skip


@triton.jit
def _power(base, exponent):
    """base ** exponent in float64 by squaring; exponents below 2 ** 40."""
    result = base * 0 + 1
    for _ in range(40):
        result = tl.where((exponent & 1) != 0, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _count(
    table_ptr, factor_ptr, finite_ptr, lr, lr_rest, num_tensors,
    BETA1: tl.constexpr, BETA2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the step to each tensor's count, and write what its bias correction makes of the rate and of the root."""
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = tensor < num_tensors
    step_ptr = tl.load(table_ptr + tensor * _COLUMNS + 7, mask=mask, other=0).to(tl.pointer_type(tl.int64))
    step = tl.load(step_ptr, mask=mask, other=0)
    if finite_ptr is not None:
        step += tl.load(finite_ptr).to(tl.int64)
    else:
        step += 1
    tl.store(step_ptr, step, mask=mask)
    one = tl.full((BLOCK,), 1.0, tl.float64)
    bias1 = 1.0 - _power(one * BETA1, step)
    bias2 = 1.0 - _power(one * BETA2, step)
    rate = -(one * lr + one * lr_rest)
    tl.store(factor_ptr + 2 * tensor, tl.sqrt(bias2).to(tl.float32), mask=mask)
    tl.store(factor_ptr + 2 * tensor + 1, (rate / bias1).to(tl.float32), mask=mask)


@triton.jit
def _squares(
    map_ptr, table_ptr, partial_ptr, TYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    owner, chunk = tl.load(map_ptr + 2 * block), tl.load(map_ptr + 2 * block + 1)
    row = table_ptr + owner * _COLUMNS
    first = chunk.to(tl.int64) * CHUNK
    left = tl.load(row + 5) - first
    total = tl.zeros((BLOCK,), tl.float32)
    if (left >= CHUNK) & (tl.load(row + 6) != 0):
        grad_ptr = _address(row, 1, TYPE, first, 16)
        for start in range(0, CHUNK, BLOCK):
            grad = tl.load(grad_ptr + start + tl.arange(0, BLOCK)).to(tl.float32)
            total += grad * grad
    else:
        grad_ptr = _address(row, 1, TYPE, first, 0)
        for start in range(0, CHUNK, BLOCK):
            i = start + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + i, mask=i < left, other=0.0).to(tl.float32)
            total += grad * grad
    tl.store(partial_ptr + block, tl.sum(total, 0))


@triton.jit
def _root_of_sum(partial_ptr, norm_ptr, finite_ptr, num_partials, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_partials, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + i, mask=i < num_partials, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total, 0)).to(tl.float32)
    tl.store(norm_ptr, norm)
    tl.store(finite_ptr, (norm - norm == 0).to(tl.int8))


class Addresses:
    """A table and a map in device memory, made anew only when a tensor has moved or the list has changed."""

    def __init__(self, chunk: int):
        self.chunk = chunk
        self._rows: list[tuple[int, ...]] = []
        self._sizes: list[int] = []
        self.table = self.map = torch.empty(0)

    def find(self, rows: list[tuple[int, ...]], device: torch.device) -> int:
        """Bring both up to date with ``rows`` (each of eight numbers) and return the number of blocks."""
        if rows != self._rows:
            self._rows = rows
            self.table = _to_device(torch.tensor(rows, dtype=torch.int64), device)
            sizes = [row[5] for row in rows]
            if sizes != self._sizes:
                self._sizes = sizes
                chunks = torch.tensor([-(-size // self.chunk) for size in sizes])
                owner = torch.arange(len(sizes)).repeat_interleave(chunks)
                place = torch.arange(len(owner)) - (chunks.cumsum(0) - chunks)[owner]
                self.map = _to_device(torch.stack([owner, place], dim=1).to(torch.int32), device)
        return len(self.map)


class MultiAdamW:
    """``ref.adamw_`` for lists of CUDA tensors: one launch for all of a kind, plus one that counts steps.

    Keeps the table of addresses between steps, so that an unchanged list costs no copy. Every operation is rounded to
    nearest as in the reference on a CPU (whose own root, MKL's, can miss by a unit in the last place).
    """

    def __init__(self) -> None:
        self._addresses: dict[tuple[Any, ...], Addresses] = {}

    def __call__(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        steps: Sequence[Tensor],
        copies: Sequence[Tensor | None],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        scale: Tensor | None = None,
        finite: Tensor | None = None,
    ) -> None:
        """Step ``params`` (float32) and ``exp_avgs``, ``exp_avg_sqs`` (all float32 or all BF16), in place.

        ``grads``: float32, BF16 or float16; ``steps``: int64 scalars, counted up; ``copies``: BF16 of the parameter's
        shape, or None. ``scale`` (float32 scalar) multiplies every gradient as it is read; ``finite`` (bool scalar)
        false leaves everything as it was, the counts too. Both stay on the device. Errors: ValueError naming the shape.
        """
        kinds: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[Tensor | None, ...]]] = {}
        for row in zip(params, grads, exp_avgs, exp_avg_sqs, copies, steps, strict=True):
            param, grad, mean, square, copy, step = row
            _check(param, grad, mean, square, copy, step)
            kinds.setdefault((grad.dtype, mean.dtype, copy is not None), []).append(row)
        for kind, rows in kinds.items():
            addresses = self._addresses.setdefault(kind, Addresses(CHUNK))
            self._launch(kind, rows, addresses, lr, betas, eps, weight_decay, scale, finite)

    def _launch(
        self,
        kind: tuple[torch.dtype, torch.dtype, bool],
        rows: list[Any],
        addresses: Addresses,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        scale: Tensor | None,
        finite: Tensor | None,
    ) -> None:
        device = rows[0][0].device
        blocks = addresses.find([_row(*row) for row in rows], device)
        if not blocks:
            return
        grad, moment, copy = kind
        factors = torch.empty(len(rows), 2, dtype=torch.float32, device=device)
        rate = float(torch.tensor(lr, dtype=torch.float32))
        flag = None if finite is None else finite.view(torch.int8)
        with _on(device):
            _count[(triton.cdiv(len(rows), 128),)](
                addresses.table, factors, flag, rate, lr - rate, len(rows), *betas, 128, num_warps=4
            )
            _adamw[(blocks,)](
                addresses.map, addresses.table, factors, scale, flag,
                1 - lr * weight_decay, 1 - betas[0], betas[1], 1 - betas[1], eps,
                _FLOATS[grad], _FLOATS[moment], copy, 1 - betas[0] < 0.5, HALF, CHUNK, BLOCK, device.type == "cpu",
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip


class MultiNorm:
    """Euclidean norm over all elements of many tensors: each is read once, sums are taken in a fixed order."""

    def __init__(self) -> None:
        self._addresses: dict[torch.dtype, Addresses] = {}

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(norm, finite): float32 and bool scalars on the tensors' device."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.dtype not in _FLOATS or not tensor.is_contiguous():
                raise ValueError(f"l2_norm: {_told(tensor)}; it must be float32, bfloat16 or float16 and contiguous")
            kinds.setdefault(tensor.dtype, []).append(tensor)
        device = tensors[0].device
        parts = []
        for dtype, alike in kinds.items():
            addresses = self._addresses.setdefault(dtype, Addresses(NORM_CHUNK))
            parts.append((dtype, addresses, addresses.find([_place(t) for t in alike], device)))
        total = sum(blocks for _, _, blocks in parts)
        partial = torch.empty(total, dtype=torch.float32, device=device)
        norm = torch.empty((), dtype=torch.float32, device=device)
        finite = torch.empty((), dtype=torch.bool, device=device)
        done = 0
        with _on(device):
            for dtype, addresses, blocks in parts:
                if blocks:
                    _squares[(blocks,)](
                        addresses.map, addresses.table, partial[done : done + blocks],
                        _FLOATS[dtype], NORM_CHUNK, NORM_BLOCK, num_warps=NORM_WARPS,
                    )  # fmt: skip
                done += blocks
            _root_of_sum[(1,)](partial, norm, finite.view(torch.int8), total, 4096, num_warps=16)
        return norm, finite


def l2_norm_and_finite(tensors: Iterable[Tensor], norm: MultiNorm | None = None) -> tuple[Tensor, Tensor]:
    """Norm over all elements of ``tensors`` and whether it is finite, as scalars where the tensors are.

    ``norm`` keeps the addresses between calls. Without tensors: 0 and True, on the CPU.
    """
    tensors = list(tensors)
    if tensors and runs_kernel(tensors[0]):
        return (norm or MultiNorm())([t.contiguous() for t in tensors])
    value = l2_norm(tensors)
    return value, value.isfinite()


def _place(grad: Tensor) -> tuple[int, ...]:
    return (0, grad.data_ptr(), 0, 0, 0, grad.numel(), int(grad.data_ptr() % 16 == 0), 0)


def _row(
    param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, copy: Tensor | None, step: Tensor
) -> tuple[int, ...]:
    places = [param.data_ptr(), grad.data_ptr(), mean.data_ptr(), square.data_ptr()]
    places.append(0 if copy is None else copy.data_ptr())
    aligned = all(place % 16 == 0 for place in places)
    return (*places, param.numel(), int(aligned), step.data_ptr())


def _check(param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, copy: Tensor | None, step: Tensor) -> None:
    for name, tensor, dtypes in (
        ("parameter", param, (torch.float32,)),
        ("gradient", grad, tuple(_FLOATS)),
        ("exp_avg", mean, (torch.float32, torch.bfloat16)),
        ("exp_avg_sq", square, (mean.dtype,)),
        ("copy", copy, (torch.bfloat16,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes or tensor.shape != param.shape or not tensor.is_contiguous():
            raise ValueError(
                f"adamw: {name} {_told(tensor)}; it must be contiguous, of shape {tuple(param.shape)} and "
                + " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            )
    if step.dtype != torch.int64 or step.device != param.device:
        raise ValueError(f"adamw: step count {_told(step)} on {step.device}; it must be int64 on {param.device}")


def _told(tensor: Tensor) -> str:
    layout = "" if tensor.is_contiguous() else ", not contiguous"
    return f"of shape {tuple(tensor.shape)} is {str(tensor.dtype).removeprefix('torch.')}{layout}"


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Through pinned memory: a copy from pageable memory would wait for the stream."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
