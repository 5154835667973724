"""Grouped FP8 product with block scales, forward and input gradient (report §3.3.2). Spec: ref.grouped_gemm.

Letters: R padded rows, E experts, N out, K in, k and n blocks of 128 of them; J tiles of 128 rows.

The kernel is Gluon for Hopper: a persistent program a multiprocessor, one warp that loads through the copy engine, two
warpgroups of 64 rows each that multiply. While one adds its partial product to its sums in FP32, the other's product
runs; that hides the promotion in part only (without it the kernel is 19 to 36% faster: that loss is open). A tile is
128 x 256, which reads less from L2 than 128 x 128 does (8 to 17% slower); its two halves share one partial of 64
registers a thread.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
from litseek_kernels.ref import grouped_gemm as ref
from litseek_kernels.ref.grouped_gemm import TILE

OUT_DTYPES = (torch.bfloat16, torch.float32)
GROUP_M = 8
"""Tiles of rows that are walked side by side, so that a weight tile is read from memory once for all of them."""


def grouped_mm_fp8(
    codes_RK: Tensor,
    scale_kR: Tensor,
    weight_ENK: Tensor,
    weight_scale_Enk: Tensor,
    tile_expert: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    compact: tuple[Tensor, Tensor, int] | None = None,
    promote: bool = True,
) -> Tensor:
    """(R, N): every row times the matrix of the expert that owns its tile, FP32 promotion every 128 of K.

    ``codes_RK`` E4M3 rows in the padded layout with ``scale_kR`` float32 (1x128, R-contiguous); ``weight_ENK`` E4M3 with
    ``weight_scale_Enk`` float32 (128x128; a transposed view will do, so the input gradient takes the transposed codes
    and scale.transpose(1, 2)). ``tile_expert`` (R / 128,) int32 stays on the device. K and N are multiples of 16.

    Padding rows of used tiles come out as zeros, since their codes are zeros. Tiles of no expert (-1) are neither read
    nor written: they hold whatever the memory held, so what reads the result must skip them too.

    ``compact=(tile_begin, tile_count, rows)`` of ``row_layout`` gives (rows, N) instead: the rows without padding.
    ``promote=False`` leaves all sums to the tensor cores, which keep fewer bits than FP32, and takes the first block's scales
    for all of K; a GPU only, for ablations. ValueError with the shape for what the kernel does not take.
    """
    begin, count, rows = compact if compact is not None else (None, None, codes_RK.shape[0])
    check(codes_RK, scale_kR, weight_ENK, weight_scale_Enk, tile_expert, out_dtype, begin, count)
    operands = codes_RK, scale_kR, weight_ENK, weight_scale_Enk, tile_expert
    return _grouped_mm_op(*operands, out_dtype, begin, count, rows, promote)


def mm_fp8(
    codes_MK: Tensor,
    scale_kM: Tensor,
    weight_NK: Tensor,
    weight_scale_nk: Tensor,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """(M, N): the dense case, one expert that owns every row. M is a multiple of 128.

    torch's own product where it takes the shape and is faster, the grouped kernel elsewhere: seen equal bit for bit.
    """
    M, one, stack = codes_MK.shape[0], weight_NK[None], weight_scale_nk[None]
    if codes_MK.is_cuda and out_dtype == torch.bfloat16 and _torch_is_faster(*weight_NK.shape):
        check(codes_MK, scale_kM, one, stack, torch.empty(M // TILE, dtype=torch.int32), out_dtype, None, None)
        return _dense_mm_op(codes_MK, scale_kM, weight_NK, weight_scale_nk)
    tile_expert = torch.zeros(M // TILE, dtype=torch.int32, device=codes_MK.device)
    return grouped_mm_fp8(codes_MK, scale_kM, one, stack, tile_expert, out_dtype=out_dtype)


def _torch_is_faster(N: int, K: int) -> bool:
    """It wants four scales along K at a time, and on an H200 it gains 1 to 24% but where the output is wide: 512 to 4096
    takes 5% longer, 1536 to 12288 2%."""
    return K % (4 * TILE) == 0 and N <= 2 * K


@operator("litseek::dense_mm_fp8")
def _dense_mm_op(codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    rows, block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    kn = weight_scale.contiguous().t()
    return F.scaled_mm(codes, weight.t(), scale.t(), rows, kn, block, output_dtype=torch.bfloat16)


@_dense_mm_op.register_fake
def _(codes, scale, weight, weight_scale):
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=torch.bfloat16)


@operator("litseek::grouped_mm_fp8")
def _grouped_mm_op(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, tile_expert: Tensor, out_dtype: torch.dtype,
    tile_begin: Tensor | None, tile_count: Tensor | None, rows: int, promote: bool = True,
) -> Tensor:  # fmt: skip
    if not codes.is_cuda:  # Gluon has no interpreter
        ref.check_promotion(promote)
        compact = None if tile_begin is None or tile_count is None else (tile_begin, tile_count, rows)
        return ref.grouped_mm_fp8(codes, scale, weight, weight_scale, tile_expert, out_dtype=out_dtype, compact=compact)
    (R, K), (E, N) = codes.shape, weight.shape[:2]
    out = torch.empty(rows, N, dtype=out_dtype, device=codes.device)
    if out.numel() == 0 or R == 0 or K == 0:
        return out.zero_()
    wide = out_dtype == torch.float32
    grid = min(multiprocessors(codes.device.index), R // TILE * triton.cdiv(N, 2 * TILE))
    _grouped_kernel[(grid,)](
        TensorDescriptor.from_tensor(codes, [HALF, TILE], CODES),
        TensorDescriptor.from_tensor(weight.view(E * N, K), [TILE, TILE], CODES),
        TensorDescriptor.from_tensor(out, [HALF, TILE], SUMS if wide else ROUNDED),
        out, scale, weight_scale, *weight_scale.stride(), tile_expert,
        tile_expert if tile_begin is None else tile_begin, tile_expert if tile_count is None else tile_count,
        int(tile_begin is not None), R // TILE, N, K,
        PROMOTE=promote, STAGES=3 if wide else 4, GROUP_M=GROUP_M, num_warps=4,
    )  # fmt: skip
    return out


grouped_mm_op = torch.ops.litseek.grouped_mm_fp8.default
"""The operator, for policies that name what to keep."""


@_grouped_mm_op.register_fake
def _(codes, scale, weight, weight_scale, tile_expert, out_dtype, tile_begin, tile_count, rows, promote=True):
    return codes.new_empty(rows, weight.shape[1], dtype=out_dtype)


def check(codes, scale, weight, weight_scale, tile_expert, out_dtype, tile_begin, tile_count) -> None:
    """ValueError with the shape for what the kernel does not take."""
    if codes.ndim != 2 or weight.ndim != 3 or codes.shape[1] != weight.shape[2] or codes.shape[0] % TILE:
        raise ValueError(
            f"codes (R, K) and weight (E, N, K) need the same K, and R a multiple of {TILE}; "
            f"got {tuple(codes.shape)} and {tuple(weight.shape)}"
        )
    for name, tensor in (("codes", codes), ("weight", weight)):
        if tensor.dtype != torch.float8_e4m3fn or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous float8_e4m3fn, got {tensor.dtype} {tuple(tensor.shape)}")
    (R, K), (E, N) = codes.shape, weight.shape[:2]
    if N % 16 or K % 16:
        raise ValueError(f"N and K must be multiples of 16, got weight {tuple(weight.shape)}")
    blocks = -(-N // TILE), -(-K // TILE)
    if tuple(scale.shape) != (blocks[1], R) or scale.dtype != torch.float32 or not scale.is_contiguous():
        raise ValueError(
            f"scale must be contiguous float32 {(blocks[1], R)} for codes {(R, K)}, got {scale.dtype} {tuple(scale.shape)}"
        )
    if tuple(weight_scale.shape) != (E, *blocks) or weight_scale.dtype != torch.float32:
        raise ValueError(
            f"weight_scale must be float32 {(E, *blocks)} for weight {tuple(weight.shape)}, "
            f"got {weight_scale.dtype} {tuple(weight_scale.shape)}"
        )
    for name, tensor in (("tile_expert", tile_expert), ("tile_begin", tile_begin), ("tile_count", tile_count)):
        if tensor is not None and (tuple(tensor.shape) != (R // TILE,) or tensor.dtype != torch.int32):
            raise ValueError(
                f"{name} must be int32 {(R // TILE,)} for {R} rows, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if out_dtype not in OUT_DTYPES:
        raise ValueError(f"out_dtype must be bfloat16 or float32, got {out_dtype}")


HALF = TILE // 2
CODES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
ROUNDED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SUMS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)


@gluon.jit(do_not_specialize=("compact", "tiles_m"))
def _grouped_kernel(
    codes_desc, weight_desc, out_desc, out, scale, weight_scale, stride_e, stride_n, stride_k,
    tile_expert, tile_begin, tile_count, compact, tiles_m, N, K,
    PROMOTE: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    codes = gl.allocate_shared_memory(codes_desc.dtype, [STAGES * 2, 64, 128], codes_desc.layout)
    weights = gl.allocate_shared_memory(weight_desc.dtype, [STAGES * 2, 128, 128], weight_desc.layout)
    staging = gl.allocate_shared_memory(out_desc.dtype, [2, 64, 128], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    buffers = (codes, weights, full, empty)
    sizes = (tiles_m, N, K)
    place = (out_desc, out, staging, compact, tile_begin, tile_count)
    scales = (scale, weight_scale, stride_e, stride_n, stride_k)
    gl.warp_specialize([
        (_multiply, (buffers, scales, place, tile_expert, sizes, 0, PROMOTE, STAGES, GROUP_M)),
        (_multiply, (buffers, scales, place, tile_expert, sizes, 1, PROMOTE, STAGES, GROUP_M)),
        (_load, (codes_desc, weight_desc, buffers, tile_expert, sizes, STAGES, GROUP_M)),
    ], [4, 1], [240, 24])  # fmt: skip


@gluon.jit
def _tile(index, tiles_m, tiles_n, GROUP_M: gl.constexpr):
    """Groups of GROUP_M tiles of rows; within one, rows are walked first."""
    group = index // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = gl.minimum(tiles_m - first, GROUP_M)
    rest = index - group * (GROUP_M * tiles_n)
    return first + rest % height, rest // height


@gluon.jit
def _load(codes_desc, weight_desc, buffers, tile_expert, sizes, STAGES: gl.constexpr, GROUP_M: gl.constexpr):
    """One warp: fills the stages in the order in which both warpgroups empty them."""
    codes, weights, full, empty = buffers
    tiles_m, N, K = sizes
    tiles_n = gl.cdiv(N, 256)
    stage = 0
    phase = 1
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _tile(index, tiles_m, tiles_n, GROUP_M)
        expert = gl.load(tile_expert + m)
        if expert >= 0:
            # Past an expert's last row lies the next one's matrix or nothing; those columns are not stored.
            row = expert * N + n * 256
            for k in range(0, K, 128):
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), phase)
                mbarrier.expect(bar, (128 + 256) * 128)
                tma.async_copy_global_to_shared(codes_desc, [m * 128, k], bar, codes.index(stage * 2))
                tma.async_copy_global_to_shared(weight_desc, [row, k], bar, weights.index(stage * 2))
                tma.async_copy_global_to_shared(codes_desc, [m * 128 + 64, k], bar, codes.index(stage * 2 + 1))
                tma.async_copy_global_to_shared(weight_desc, [row + 128, k], bar, weights.index(stage * 2 + 1))
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1


@gluon.jit
def _multiply(
    buffers, scales, place, tile_expert, sizes, WARPGROUP: gl.constexpr, PROMOTE: gl.constexpr, STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows by 2 x 128 columns of every tile of this program."""
    codes, weights, full, empty = buffers
    scale, weight_scale, stride_e, stride_n, stride_k = scales
    out_desc, out, staging, compact, tile_begin, tile_count = place
    tiles_m, N, K = sizes
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 32])
    tiles_n = gl.cdiv(N, 256)
    blocks_n = gl.cdiv(N, 128)
    blocks_k = gl.cdiv(K, 128)
    # Always false, which the compiler does not know: it must keep one partial and finish adding it up before the next
    # product may overwrite it. Knowing, it would use two and spill 64 registers.
    never = tiles_m < 0
    part = gl.zeros((64, 128), gl.float32, mma)
    stage = 0
    phase = 0
    for index in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = _tile(index, tiles_m, tiles_n, GROUP_M)
        expert = gl.load(tile_expert + m)
        if expert >= 0:
            row_at = scale + m * 128 + WARPGROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
            left_at = weight_scale + expert * stride_e + n * 2 * stride_n
            right_at = left_at + gl.where(n * 2 + 1 < blocks_n, stride_n, 0)
            scale_row = gl.load(row_at)
            scale_left = gl.load(left_at)
            scale_right = gl.load(right_at)
            left = gl.zeros((64, 128), gl.float32, mma)
            right = gl.zeros((64, 128), gl.float32, mma)
            for k in range(blocks_k):
                mbarrier.wait(full.index(stage), phase)
                rows = codes.index(stage * 2 + WARPGROUP)
                if PROMOTE:
                    part = warpgroup_mma(
                        rows, weights.index(stage * 2).permute((1, 0)), part, use_acc=never, is_async=True
                    )
                    factor_left = scale_row * scale_left
                    factor_right = scale_row * scale_right
                    following = gl.minimum(k + 1, blocks_k - 1)
                    scale_row = gl.load(row_at + following * (tiles_m * 128))
                    scale_left = gl.load(left_at + following * stride_k)
                    scale_right = gl.load(right_at + following * stride_k)
                    part = warpgroup_mma_wait(0, deps=(part,))
                    left += part * factor_left[:, None]
                    part = warpgroup_mma(
                        rows, weights.index(stage * 2 + 1).permute((1, 0)), part, use_acc=never, is_async=True
                    )
                    part = warpgroup_mma_wait(0, deps=(part,))
                    mbarrier.arrive(empty.index(stage), count=1)
                    right += part * factor_right[:, None]
                else:
                    left = warpgroup_mma(rows, weights.index(stage * 2).permute((1, 0)), left, is_async=True)
                    right = warpgroup_mma(rows, weights.index(stage * 2 + 1).permute((1, 0)), right, is_async=True)
                    left, right = warpgroup_mma_wait(0, deps=(left, right))
                    mbarrier.arrive(empty.index(stage), count=1)
                stage += 1
                if stage == STAGES:
                    stage = 0
                    phase ^= 1
            if not PROMOTE:
                left *= (scale_row * scale_left)[:, None]
                right *= (scale_row * scale_right)[:, None]
            row = gl.where(compact != 0, gl.load(tile_begin + m), m * 128) + WARPGROUP * 64
            real = gl.where(compact != 0, gl.minimum(gl.maximum(gl.load(tile_count + m) - WARPGROUP * 64, 0), 64), 64)
            _store(left, out_desc, out, staging.index(WARPGROUP), row, n * 256, real, N)
            _store(right, out_desc, out, staging.index(WARPGROUP), row, n * 256 + 128, real, N)
    tma.store_wait(0)


@gluon.jit
def _store(sums, out_desc, out, staging, row, column, real, N):
    """64 x 128 by the copy engine; the last rows of an expert, followed by its neighbour's, by a masked store."""
    tma.store_wait(0)
    staging.store(sums.to(staging.dtype))
    fence_async_shared()
    if real == 64:
        tma.async_copy_shared_to_global(out_desc, [row, column], staging)
    else:
        wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        r = gl.arange(0, 64, gl.SliceLayout(1, wide))
        c = column + gl.arange(0, 128, gl.SliceLayout(0, wide))
        at = out + (row + r).to(gl.int64)[:, None] * N + c[None, :]
        gl.store(at, staging.load(wide), mask=(r < real)[:, None] & (c < N)[None, :])
