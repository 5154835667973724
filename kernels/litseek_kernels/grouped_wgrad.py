"""Weight gradient of the grouped FP8 product. Spec: ref.grouped_wgrad. Letters: E experts, N out, K in, R padded rows."""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from litseek_kernels.ref import grouped_wgrad as ref

CHUNK = 128
"""Rows a scale covers, and so the rows whose product the tensor cores may add up before FP32 takes over."""
OUT_DTYPES = (torch.float32, torch.bfloat16)
TILE_N, TILE_K, SUPER_N = 64, 128, 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels were decorated for the interpreter, which runs them on CPU tensors."""


@triton.jit
def _wgrad(grad_desc, rows_desc, grad_scale, rows_scale, padded_start, out, N, K,
           ACCUMULATE: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
           TILE_N: tl.constexpr, TILE_K: tl.constexpr, SUPER_N: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    tiles_n, tiles_k = tl.cdiv(N, TILE_N), tl.cdiv(K, TILE_K)
    expert = tl.program_id(0) // (tiles_n * tiles_k)
    tile = tl.program_id(0) % (tiles_n * tiles_k)
    # Tiles of SUPER_N rows side by side: what the programs of one moment read stays in L2.
    first_n = tile // (SUPER_N * tiles_k) * SUPER_N
    height = tl.minimum(tiles_n - first_n, SUPER_N)
    tile_n = first_n + tile % (SUPER_N * tiles_k) % height
    tile_k = tile % (SUPER_N * tiles_k) // height
    begin = tl.load(padded_start + expert) // CHUNK
    end = tl.load(padded_start + expert + 1) // CHUNK
    n = tile_n * TILE_N + tl.arange(0, TILE_N)
    k = tile_k * TILE_K + tl.arange(0, TILE_K)
    sum_NK = tl.zeros((TILE_N, TILE_K), dtype=tl.float32)
    for chunk in tl.range(begin, end, num_stages=STAGES):
        grad = grad_desc.load([tile_n * TILE_N, chunk * CHUNK])
        rows = rows_desc.load([tile_k * TILE_K, chunk * CHUNK])
        scale_n = tl.load(grad_scale + chunk * N + n, mask=n < N, other=0.0)
        scale_k = tl.load(rows_scale + chunk * K + k, mask=k < K, other=0.0)
        if UPCAST:
            grad, rows = grad.to(tl.float32), rows.to(tl.float32)
        part_NK = tl.dot(grad, rows.T, out_dtype=tl.float32)
        sum_NK += part_NK * scale_k[None, :] * scale_n[:, None]
    at = out + expert.to(tl.int64) * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    mask = (n < N)[:, None] & (k < K)[None, :]
    if ACCUMULATE:
        if end > begin:
            sum_NK += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tl.store(at, sum_NK.to(out.dtype.element_ty), mask=mask)
    else:
        tl.store(at, sum_NK.to(out.dtype.element_ty), mask=mask)


def grouped_wgrad_fp8(
    grad_t: Tensor,
    grad_scale_t: Tensor,
    rows_t: Tensor,
    rows_scale_t: Tensor,
    padded_start_E: Tensor,
    *,
    out_dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    accumulate: bool = False,
) -> Tensor:
    """(E, N, K): every expert's dW = grad^T @ rows over its own rows, FP8 in, FP32 promotion every 128 rows (report §3.3.2).

    ``grad_t`` (N, R) and ``rows_t`` (K, R) are E4M3 codes of the padded rows, transposed; ``grad_scale_t`` (R/128, N) and
    ``rows_scale_t`` (R/128, K) float32. ``padded_start_E`` (E + 1,) int32 stays on the device: expert e owns rows
    [start[e], start[e + 1]), multiples of 128. An expert without rows gets zeros. With ``out`` the result lies there,
    in ``out``'s dtype; with ``accumulate`` it is added to what is there.
    """
    check(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out_dtype, out, accumulate)
    if out is None:
        return _wgrad_op(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out_dtype)
    _wgrad_into_op(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out, accumulate)
    return out


@torch.library.custom_op("litseek::grouped_wgrad_fp8", mutates_args=())
def _wgrad_op(
    grad_t: Tensor, grad_scale_t: Tensor, rows_t: Tensor, rows_scale_t: Tensor, padded_start_E: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    shape = padded_start_E.numel() - 1, grad_t.shape[0], rows_t.shape[0]
    out = torch.empty(shape, dtype=out_dtype, device=grad_t.device)
    _run(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out, False)
    return out


@_wgrad_op.register_fake
def _(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out_dtype):
    return grad_t.new_empty(padded_start_E.numel() - 1, grad_t.shape[0], rows_t.shape[0], dtype=out_dtype)


@torch.library.custom_op("litseek::grouped_wgrad_fp8_into", mutates_args=("out",))
def _wgrad_into_op(
    grad_t: Tensor, grad_scale_t: Tensor, rows_t: Tensor, rows_scale_t: Tensor, padded_start_E: Tensor,
    out: Tensor, accumulate: bool,
) -> None:  # fmt: skip
    _run(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out, accumulate)


@_wgrad_into_op.register_fake
def _(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out, accumulate):
    return None


def _run(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out, accumulate) -> None:
    if not (grad_t.is_cuda or INTERPRETED):
        ref.grouped_wgrad_fp8(
            grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out=out, accumulate=accumulate
        )
        return
    E, N, K = out.shape
    if grad_t.shape[1] == 0 or out.numel() == 0:
        if not accumulate:
            out.zero_()
        return
    _wgrad[(E * triton.cdiv(N, TILE_N) * triton.cdiv(K, TILE_K),)](
        TensorDescriptor.from_tensor(grad_t, [TILE_N, CHUNK]), TensorDescriptor.from_tensor(rows_t, [TILE_K, CHUNK]),
        grad_scale_t, rows_scale_t, padded_start_E, out, N, K,
        ACCUMULATE=accumulate, UPCAST=INTERPRETED, STAGES=3,
        TILE_N=TILE_N, TILE_K=TILE_K, SUPER_N=SUPER_N, CHUNK=CHUNK, num_warps=4,
    )  # fmt: skip


def check(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out_dtype, out, accumulate) -> None:
    """ValueError with the shape for what the kernel does not take."""
    if grad_t.ndim != 2 or rows_t.ndim != 2 or grad_t.shape[1] != rows_t.shape[1] or grad_t.shape[1] % CHUNK:
        raise ValueError(
            f"grad_t (N, R) and rows_t (K, R) need the same R, a multiple of {CHUNK}; "
            f"got {tuple(grad_t.shape)} and {tuple(rows_t.shape)}"
        )
    for name, codes in (("grad_t", grad_t), ("rows_t", rows_t)):
        if codes.dtype != torch.float8_e4m3fn or not codes.is_contiguous():
            raise ValueError(f"{name} must be contiguous float8_e4m3fn, got {codes.dtype} {tuple(codes.shape)}")
    chunks = grad_t.shape[1] // CHUNK
    pairs = (("grad_scale_t", grad_scale_t, grad_t), ("rows_scale_t", rows_scale_t, rows_t))
    for name, scale, codes in pairs:
        wanted = (chunks, codes.shape[0])
        if tuple(scale.shape) != wanted or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 {wanted} for codes {tuple(codes.shape)}, "
                f"got {scale.dtype} {tuple(scale.shape)}"
            )
    if padded_start_E.ndim != 1 or padded_start_E.numel() < 2 or padded_start_E.dtype != torch.int32:
        raise ValueError(f"padded_start_E must be int32 (E + 1,), got {padded_start_E.dtype} {tuple(padded_start_E.shape)}")
    if out is None:
        if accumulate:
            raise ValueError("accumulate needs out, the tensor to add to")
        if out_dtype not in OUT_DTYPES:
            raise ValueError(f"out_dtype must be float32 or bfloat16, got {out_dtype}")
        return
    wanted = (padded_start_E.numel() - 1, grad_t.shape[0], rows_t.shape[0])
    if tuple(out.shape) != wanted or out.dtype not in OUT_DTYPES or not out.is_contiguous():
        raise ValueError(f"out must be contiguous float32 or bfloat16 {wanted}, got {out.dtype} {tuple(out.shape)}")
