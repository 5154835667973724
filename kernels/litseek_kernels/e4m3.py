"""What every FP8 kernel shares: scales of tiles, the cast to E4M3 and back, the transposed store. Spec: ref.quantise.

Codes travel as uint8: Triton's interpreter rounds its own cast to E4M3 wrongly, so there the rounding is written in
integer steps. Letters: I rows of a quarter tile, K columns, M the transposed codes' row length.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def magnitude(x):
    """|x| as int32, in the order of the floats, with Inf and NaN on top: an integer max that no NaN slips through."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round to nearest even; the interpreter's own cast to bfloat16 truncates."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x).to(tl.bfloat16)
    else:
        return x.to(dtype)


@triton.jit
def bf16_pair(low, high):
    """Two tensors of float32 rounded to BF16, in the halves of an int32: what a kernel keeps in registers."""
    if INTERPRET:
        low, high = narrow(low, tl.bfloat16).to(tl.float32), narrow(high, tl.bfloat16).to(tl.float32)
        return ((low.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | (high.to(tl.int32, bitcast=True) & -65536)
    else:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def pair_of(low, high):
    """The same of tensors that are BF16 already."""
    low, high = low.to(tl.int16, bitcast=True).to(tl.int32), high.to(tl.int16, bitcast=True).to(tl.int32)
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def low_of(pair):
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def high_of(pair):
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def larger_pair(most, pair):
    """The larger magnitude of each half, NaN on top; ``most`` has no signs."""
    if INTERPRET:
        low = tl.maximum(magnitude(low_of(most)), magnitude(low_of(pair)))
        high = tl.maximum(magnitude(high_of(most)), magnitude(high_of(pair)))
        return (low >> 16) | high
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b32 a; and.b32 a, $2, 0x7FFF7FFF; max.NaN.bf16x2 $0, $1, a;}",
            "=r,r,r", [most, pair], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def divide(x, y, inverse):
    """x / y rounded as IEEE has it, where ``inverse`` is 1 / y rounded so: three instructions, no branch (Markstein).

    Holds while y and inverse are normal and x / y does not overflow; where x / y is tiny its last bits may differ.
    """
    if INTERPRET:  # its fma rounds twice
        return tl.div_rn(x, x * 0.0 + y)
    else:
        quotient = x * inverse
        return tl.fma(tl.fma(-quotient, y, x), inverse, quotient)


@triton.jit
def _448_over(x):
    """448 / x rounded as IEEE has it: seen equal to div_rn for every float32 from 1e-4 up on an H200. From 2^-100 up
    nothing on the way is subnormal, so that exponents make no difference."""
    if INTERPRET:
        return tl.div_rn(x * 0.0 + 448.0, x)
    else:
        y = x * 0.015625  # 7 / (x / 64), so that no reciprocal is subnormal
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [y], dtype=tl.float32, is_pure=True, pack=1
        )
        inverse = tl.fma(tl.fma(-y, inverse, 1.0), inverse, inverse)
        quotient = 7.0 * inverse
        return tl.fma(tl.fma(-quotient, y, 7.0), inverse, quotient)


@triton.jit
def tile_scale(bits, POWER_OF_TWO: tl.constexpr):
    """Scale of a tile and the factor that makes codes, from its largest ``magnitude``; NaN where that is not finite."""
    amax = tl.maximum(bits, 0x1F800000).to(tl.float32, bitcast=True)  # 2^-64, ref.quantise.AMAX_FLOOR
    scale = divide(amax, 448.0, 1.0 / 448.0)
    if POWER_OF_TWO:
        exponent = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = exponent.to(tl.float32, bitcast=True)
        inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    else:
        inverse = _448_over(amax)
    if POWER_OF_TWO or INTERPRET:
        finite = bits < 0x7F800000
        scale, inverse = tl.where(finite, scale, float("nan")), tl.where(finite, inverse, float("nan"))
    return scale, inverse  # compiled, the remainders of Inf are NaN already


@triton.jit
def to_e4m3(x):
    """float32 to E4M3 as uint8: nearest even, beyond 448 the largest code, NaN stays NaN."""
    if INTERPRET:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        high = tl.minimum(size, 0x43E00000)  # 448
        normal = ((high + 0x7FFFF + ((high >> 20) & 1)) >> 20) - 960
        # below 2^-6 codes are multiples of 2^-9; adding 2^23 rounds to whole numbers
        small = (tl.minimum(size, 0x3C800000).to(tl.float32, bitcast=True) * 512.0 + 8388608.0).to(
            tl.int32, bitcast=True
        )
        code = tl.where(size < 0x3C800000, small & 0xFF, normal)
        code = tl.where(size > 0x7F800000, 0x7F, code)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def from_e4m3(code):
    """E4M3 as uint8 to float32, exact."""
    if INTERPRET:
        code = code.to(tl.int32)
        size = code & 0x7F
        normal = ((size << 20) + 0x3C000000).to(tl.float32, bitcast=True)
        value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
        value = tl.where(size == 0x7F, float("nan"), value)
        return (value.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)
    else:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def pack_pair(low, x0, x1, FIRST: tl.constexpr):
    """E4M3 codes of x0 and x1 in the lower (FIRST) or the upper half of a 32-bit word; ``low`` is what the lower half
    holds when FIRST is false.

    Cast in pairs across rows: one instruction makes two codes in place. Packing codes that are stored elsewhere too is
    not only slower: ptxas 12.8 then reads registers that nothing wrote.
    """
    if INTERPRET:
        pair = to_e4m3(x0).to(tl.int32) | (to_e4m3(x1).to(tl.int32) << 8)
        return pair if FIRST else low | (pair << 16)
    elif FIRST:
        return tl.inline_asm_elementwise(
            "{.reg .b16 a, z; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; mov.b16 z, 0; mov.b32 $0, {a, z};}",
            "=r,r,r", [x0, x1], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{.reg .b16 a, b, z; cvt.rn.satfinite.e4m3x2.f32 b, $3, $2; mov.b32 {a, z}, $1; mov.b32 $0, {a, b};}",
            "=r,r,r,r", [low, x0, x1], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def store_transposed(out_ptr, word, first_row, k, K, M, PACKED: tl.constexpr):
    """Store (I, K) words of four rows' codes, rows first_row + 4 i + 0, 1, 2, 3, into (K, M) codes.

    As words, so that the transpose through shared memory makes a quarter of the accesses. PACKED, M is a multiple of 16
    and ``out_ptr`` counts int32; else M is any number and it counts bytes.
    """
    i = tl.arange(0, word.shape[0])
    at_k = k.to(tl.int64)[:, None]
    if PACKED:
        m = first_row // 4 + i
        mask = (k < K)[:, None] & (m < M // 4)[None, :]
        tl.store(out_ptr + at_k * (M // 4) + m[None, :], tl.trans(word), mask=mask)
    else:
        for j in tl.static_range(4):
            m = first_row + 4 * i + j
            mask = (k < K)[:, None] & (m < M)[None, :]
            tl.store(out_ptr + at_k * M + m[None, :], (tl.trans(word) >> (8 * j)).to(tl.uint8), mask=mask)
