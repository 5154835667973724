"""Weight gradient of the grouped FP8 product (report §3.3.2). Spec: ref.grouped_wgrad.

Letters: E experts, N out, K in, R padded rows, C chunks of 128 of them.

The kernel is Gluon for Hopper: a persistent program a multiprocessor, one warp that loads codes and scales through the
copy engine, two warpgroups that multiply. Each has two times 64 rows, whose products share one partial of 64 registers a
thread; while it promotes, the other warpgroup's product runs.

Measured on an H200 at 8 experts x 4096 rows, 4096 x 7168: 820 and 839 TFLOP/s. A 128 x 128 tile reached 690 to 880; its
loads alone took as long as 1173 TFLOP/s, loads and products without promotion 1181, at 630 to 690 W of 700.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from litseek_kernels.device import multiprocessors
from litseek_kernels.operator import operator
from litseek_kernels.ref import grouped_wgrad as ref
from litseek_kernels.ref.grouped_gemm import check_promotion
from litseek_kernels.ref.grouped_wgrad import CHUNK

OUT_DTYPES = (torch.float32, torch.bfloat16)
TILE_N, TILE_K = 256, 128
STAGES = 4
SUPER_N = 8
"""Tiles that lie along N are walked this many at a time, so that what the programs of one moment read stays in L2."""


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
    promote: bool = True,
) -> Tensor:
    """(E, N, K): every expert's dW = grad^T @ rows over its own rows, FP32 promotion every 128 rows.

    ``grad_t`` (N, R) and ``rows_t`` (K, R) are E4M3 codes of the padded rows, transposed; ``grad_scale_t`` (R/128, N) and
    ``rows_scale_t`` (R/128, K) float32. ``padded_start_E`` (E + 1,) int32 stays on the device: expert e owns rows
    [start[e], start[e + 1]), multiples of 128. N and K are multiples of 16.

    An expert without rows gets zeros. With ``out`` the result lies there, in ``out``'s dtype; with ``accumulate`` it is
    added to what is there, and experts without rows are not touched. ``promote=False`` leaves all sums to the tensor cores,
    which keep fewer bits than FP32, and takes a group's last scales for all its rows; a GPU only, without ``out``, for
    ablations. ValueError with the shape for what does not fit.
    """
    check(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out_dtype, out, accumulate)
    if out is None:
        return _wgrad_op(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out_dtype, promote)
    assert promote
    _wgrad_into_op(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out, accumulate)
    return out


@operator("litseek::grouped_wgrad_fp8")
def _wgrad_op(
    grad_t: Tensor, grad_scale_t: Tensor, rows_t: Tensor, rows_scale_t: Tensor, padded_start_E: Tensor,
    out_dtype: torch.dtype, promote: bool = True,
) -> Tensor:  # fmt: skip
    shape = padded_start_E.numel() - 1, grad_t.shape[0], rows_t.shape[0]
    out = torch.empty(shape, dtype=out_dtype, device=grad_t.device)
    _run(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out, False, promote)
    return out


@_wgrad_op.register_fake
def _(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out_dtype, promote=True):
    return grad_t.new_empty(padded_start_E.numel() - 1, grad_t.shape[0], rows_t.shape[0], dtype=out_dtype)


@operator("litseek::grouped_wgrad_fp8_into", mutates_args=("out",))
def _wgrad_into_op(
    grad_t: Tensor, grad_scale_t: Tensor, rows_t: Tensor, rows_scale_t: Tensor, padded_start_E: Tensor,
    out: Tensor, accumulate: bool,
) -> None:  # fmt: skip
    _run(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out, accumulate, True)


@_wgrad_into_op.register_fake
def _(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out, accumulate):
    return None


def _run(grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E, out, accumulate, promote) -> None:
    if not grad_t.is_cuda:  # Gluon has no interpreter
        check_promotion(promote)
        tensors = grad_t, grad_scale_t, rows_t, rows_scale_t, padded_start_E
        ref.grouped_wgrad_fp8(*tensors, out=out, accumulate=accumulate)
        return
    E, N, K = out.shape
    if grad_t.shape[1] == 0 or out.numel() == 0:
        if not accumulate:
            out.zero_()
        return
    grid = min(multiprocessors(grad_t.device.index), E * triton.cdiv(N, TILE_N) * triton.cdiv(K, TILE_K))
    _wgrad_kernel[(grid,)](
        TensorDescriptor.from_tensor(grad_t, [TILE_N, CHUNK], CODES),
        TensorDescriptor.from_tensor(rows_t, [TILE_K, CHUNK], CODES),
        TensorDescriptor.from_tensor(grad_scale_t.view(-1), [TILE_N], SCALES),
        TensorDescriptor.from_tensor(rows_scale_t.view(-1), [TILE_K], SCALES),
        padded_start_E, out, E, N, K, ACCUMULATE=accumulate, PROMOTE=promote, STAGES=STAGES, SUPER_N=SUPER_N, num_warps=4,
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
    N, K = grad_t.shape[0], rows_t.shape[0]
    if N % 16 or K % 16:
        raise ValueError(f"N and K must be multiples of 16, got {tuple(grad_t.shape)} and {tuple(rows_t.shape)}")
    chunks = grad_t.shape[1] // CHUNK
    pairs = (("grad_scale_t", grad_scale_t, grad_t), ("rows_scale_t", rows_scale_t, rows_t))
    for name, scale, codes in pairs:
        grid = (chunks, codes.shape[0])
        if tuple(scale.shape) != grid or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32 {grid} for codes {tuple(codes.shape)}, "
                f"got {scale.dtype} {tuple(scale.shape)}"
            )
    if padded_start_E.ndim != 1 or padded_start_E.numel() < 2 or padded_start_E.dtype != torch.int32:
        raise ValueError(
            f"padded_start_E must be int32 (E + 1,), got {padded_start_E.dtype} {tuple(padded_start_E.shape)}"
        )
    if out is None:
        if accumulate:
            raise ValueError("accumulate needs out, the tensor to add to")
        if out_dtype not in OUT_DTYPES:
            raise ValueError(f"out_dtype must be float32 or bfloat16, got {out_dtype}")
        return
    wanted = (padded_start_E.numel() - 1, N, K)
    if tuple(out.shape) != wanted or out.dtype not in OUT_DTYPES or not out.is_contiguous():
        raise ValueError(f"out must be contiguous float32 or bfloat16 {wanted}, got {out.dtype} {tuple(out.shape)}")


CODES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


@gluon.jit(do_not_specialize=("E",))
def _wgrad_kernel(
    grad_desc, rows_desc, grad_scale_desc, rows_scale_desc, padded_start, out, E, N, K,
    ACCUMULATE: gl.constexpr, PROMOTE: gl.constexpr, STAGES: gl.constexpr, SUPER_N: gl.constexpr,
):  # fmt: skip
    grads = gl.allocate_shared_memory(grad_desc.dtype, [STAGES, 256, 128], grad_desc.layout)
    rows = gl.allocate_shared_memory(rows_desc.dtype, [STAGES, 128, 128], rows_desc.layout)
    grad_scales = gl.allocate_shared_memory(gl.float32, [STAGES, 256], grad_scale_desc.layout)
    rows_scales = gl.allocate_shared_memory(gl.float32, [STAGES, 128], rows_scale_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    buffers = (grads, rows, grad_scales, rows_scales, full, empty)
    descs = (grad_desc, rows_desc, grad_scale_desc, rows_scale_desc)
    sizes = (E, N, K)
    gl.warp_specialize([
        (_multiply, (out, buffers, padded_start, sizes, 0, ACCUMULATE, PROMOTE, STAGES, SUPER_N)),
        (_multiply, (out, buffers, padded_start, sizes, 1, ACCUMULATE, PROMOTE, STAGES, SUPER_N)),
        (_load, (descs, buffers, padded_start, sizes, STAGES, SUPER_N)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def _tile(index, tiles_n, tiles_k, SUPER_N: gl.constexpr):
    """Expert by expert; within one, strips of SUPER_N tiles along N, walked along N first."""
    expert = index // (tiles_n * tiles_k)
    within = index - expert * (tiles_n * tiles_k)
    strip = within // (SUPER_N * tiles_k)
    height = gl.minimum(tiles_n - strip * SUPER_N, SUPER_N)
    rest = within - strip * (SUPER_N * tiles_k)
    return expert, strip * SUPER_N + rest % height, rest // height


@gluon.jit
def _load(descs, buffers, padded_start, sizes, STAGES: gl.constexpr, SUPER_N: gl.constexpr):
    """One warp: fills the stages in the order in which both warpgroups empty them."""
    grad_desc, rows_desc, grad_scale_desc, rows_scale_desc = descs
    grads, rows, grad_scales, rows_scales, full, empty = buffers
    E, N, K = sizes
    tiles_n = gl.cdiv(N, 256)
    tiles_k = gl.cdiv(K, 128)
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), E * tiles_n * tiles_k, gl.num_programs(0)):
        expert, tile_n, tile_k = _tile(index, tiles_n, tiles_k, SUPER_N)
        n = tile_n * 256
        k = tile_k * 128
        for chunk in range(gl.load(padded_start + expert) // 128, gl.load(padded_start + expert + 1) // 128):
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            mbarrier.expect(bar, (256 + 128) * (128 + 4))
            tma.async_copy_global_to_shared(grad_desc, [n, chunk * 128], bar, grads.index(stage))
            tma.async_copy_global_to_shared(rows_desc, [k, chunk * 128], bar, rows.index(stage))
            # Past the last row or column lie the next chunk's scales or zeros; what they scale is not stored.
            tma.async_copy_global_to_shared(grad_scale_desc, [chunk * N + n], bar, grad_scales.index(stage))
            tma.async_copy_global_to_shared(rows_scale_desc, [chunk * K + k], bar, rows_scales.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _multiply(
    out, buffers, padded_start, sizes, WARPGROUP: gl.constexpr, ACCUMULATE: gl.constexpr, PROMOTE: gl.constexpr,
    STAGES: gl.constexpr, SUPER_N: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 2 x 64 rows by 128 columns of every tile of this program."""
    grads, rows, grad_scales, rows_scales, full, empty = buffers
    E, N, K = sizes
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    tiles_n = gl.cdiv(N, 256)
    tiles_k = gl.cdiv(K, 128)
    never = E < 0  # always false, which the compiler does not know: it must keep to one partial
    part = gl.zeros((64, 128), gl.float32, mma)
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), E * tiles_n * tiles_k, gl.num_programs(0)):
        expert, tile_n, tile_k = _tile(index, tiles_n, tiles_k, SUPER_N)
        chunks = gl.load(padded_start + expert + 1) // 128 - gl.load(padded_start + expert) // 128
        upper = gl.zeros((64, 128), gl.float32, mma)
        lower = gl.zeros((64, 128), gl.float32, mma)
        if not PROMOTE:
            last_k = gl.zeros((128,), gl.float32, gl.SliceLayout(0, mma))
            last_upper = gl.zeros((64,), gl.float32, gl.SliceLayout(1, mma))
            last_lower = gl.zeros((64,), gl.float32, gl.SliceLayout(1, mma))
        for _ in range(chunks):
            mbarrier.wait(full.index(stage), phase)
            grad = grads.index(stage)
            columns = rows.index(stage).permute((1, 0))
            if PROMOTE:
                part = warpgroup_mma(grad.slice(WARPGROUP * 128, 64), columns, part, use_acc=never, is_async=True)
                scale_k = rows_scales.index(stage).load(gl.SliceLayout(0, mma))
                scale_n = grad_scales.index(stage).slice(WARPGROUP * 128, 64).load(gl.SliceLayout(1, mma))
                part = warpgroup_mma_wait(0, deps=(part,))
                upper += part * scale_k[None, :] * scale_n[:, None]
                # Nothing is outstanding here. The wait keeps the compiler from moving the promotion below the next product,
                # for which it would copy the partial and spill.
                upper, part = warpgroup_mma_wait(0, deps=(upper, part))
                part = warpgroup_mma(grad.slice(WARPGROUP * 128 + 64, 64), columns, part, use_acc=never, is_async=True)
                scale_n = grad_scales.index(stage).slice(WARPGROUP * 128 + 64, 64).load(gl.SliceLayout(1, mma))
                part = warpgroup_mma_wait(0, deps=(part,))
                fence_async_shared()  # without it a scale may still be on its way from memory that the copy engine rewrites
                mbarrier.arrive(empty.index(stage), count=1)
                lower += part * scale_k[None, :] * scale_n[:, None]
                lower, part = warpgroup_mma_wait(0, deps=(lower, part))
            else:
                upper = warpgroup_mma(grad.slice(WARPGROUP * 128, 64), columns, upper, is_async=True)
                lower = warpgroup_mma(grad.slice(WARPGROUP * 128 + 64, 64), columns, lower, is_async=True)
                last_k = rows_scales.index(stage).load(gl.SliceLayout(0, mma))
                last_upper = grad_scales.index(stage).slice(WARPGROUP * 128, 64).load(gl.SliceLayout(1, mma))
                last_lower = grad_scales.index(stage).slice(WARPGROUP * 128 + 64, 64).load(gl.SliceLayout(1, mma))
                upper, lower = warpgroup_mma_wait(0, deps=(upper, lower))
                fence_async_shared()
                mbarrier.arrive(empty.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        if not PROMOTE:
            upper *= last_upper[:, None] * last_k[None, :]
            lower *= last_lower[:, None] * last_k[None, :]
        if (chunks > 0) | (not ACCUMULATE):
            at = out + expert.to(gl.int64) * N * K
            _store(upper, at, tile_n * 256 + WARPGROUP * 128, tile_k * 128, N, K, mma, ACCUMULATE)
            _store(lower, at, tile_n * 256 + WARPGROUP * 128 + 64, tile_k * 128, N, K, mma, ACCUMULATE)


@gluon.jit
def _store(sums, out, n, k, N, K, mma: gl.constexpr, ACCUMULATE: gl.constexpr):
    """64 x 128 from the product's own registers: four threads write 32 bytes, a whole sector."""
    n += gl.arange(0, 64, gl.SliceLayout(1, mma))
    k += gl.arange(0, 128, gl.SliceLayout(0, mma))
    at = out + n.to(gl.int64)[:, None] * K + k[None, :]
    mask = (n < N)[:, None] & (k < K)[None, :]
    if ACCUMULATE:
        sums += gl.load(at, mask=mask, other=0.0).to(gl.float32)
    gl.store(at, sums.to(out.dtype.element_ty), mask=mask, cache_modifier=".cs")
