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
def divide(x, y, inverse):
    """x / y rounded as IEEE has it, where ``inverse`` is 1 / y rounded so: three instructions, no branch (Markstein).

    Holds while y and inverse are normal and x / y does not overflow; where x / y is tiny its last bits may differ.
    """
    if INTERPRET:  # its fma rounds twice
        return tl.div_rn(x, y)
    else:
        quotient = x * inverse
        return tl.fma(tl.fma(-quotient, y, x), inverse, quotient)


@triton.jit
def tile_scale(bits, POWER_OF_TWO: tl.constexpr):
    """Scale of a tile and the factor that makes codes, from its largest ``magnitude``; NaN where that is not finite."""
    amax = tl.maximum(bits, 0x38D1B717).to(tl.float32, bitcast=True)  # 1e-4
    limit = tl.full(amax.shape, 448.0, tl.float32)
    scale = divide(amax, limit, 1.0 / 448.0)
    if POWER_OF_TWO:
        exponent = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000
        scale = exponent.to(tl.float32, bitcast=True)
        inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    else:
        inverse = tl.div_rn(limit, amax)
    finite = bits < 0x7F800000
    return tl.where(finite, scale, float("nan")), tl.where(finite, inverse, float("nan"))


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
        return tl.where(code >= 0x80, -value, value)
    else:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)


@triton.jit
def store_transposed(out_ptr, c0, c1, c2, c3, first_row, k, K, M, PACKED: tl.constexpr):
    """Store the (I, K) codes of rows first_row + 4 i + 0, 1, 2, 3 into (K, M) codes.

    Packed, four rows are one 32-bit word before the transpose through shared memory, a quarter of the accesses; the
    words must be aligned, so M must be a multiple of 16 and ``out_ptr`` an int32 pointer.
    """
    i = tl.arange(0, c0.shape[0])
    at_k = k.to(tl.int64)[:, None]
    if PACKED:
        low = c0.to(tl.int32) | (c1.to(tl.int32) << 8)
        word = low | (c2.to(tl.int32) << 16) | (c3.to(tl.int32) << 24)
        m = first_row // 4 + i
        mask = (k < K)[:, None] & (m < M // 4)[None, :]
        tl.store(out_ptr + at_k * (M // 4) + m[None, :], tl.trans(word), mask=mask)
    else:
        for j in tl.static_range(4):
            code = c0 if j == 0 else (c1 if j == 1 else (c2 if j == 2 else c3))
            m = first_row + 4 * i + j
            mask = (k < K)[:, None] & (m < M)[None, :]
            tl.store(out_ptr + at_k * M + m[None, :], tl.trans(code), mask=mask)
