"""Quantiser kernels give the reference's codes and scales bit for bit; the reference is held to the definition."""

from __future__ import annotations

import math

import pytest
import torch
from litseek_kernels.layout import padded_capacity, row_layout
from litseek_kernels.quantise import (
    quantise_both,
    quantise_columns,
    quantise_rows,
    quantise_weight,
    requantise_both,
    requantise_transposed,
)
from litseek_kernels.ref import quantise as ref
from litseek_kernels.testing import UGLY_ROWS, relative_error

FP8 = torch.float8_e4m3fn
SHAPES = [*UGLY_ROWS, (144, 192), (256, 0)]
DTYPES = [torch.bfloat16, torch.float32]


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit; of NaN the sign is free (torch keeps it, the hardware does not)."""
    got, wanted = got.cpu(), wanted.cpu()
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    if got.dtype == FP8:
        a, b = got.view(torch.uint8), wanted.view(torch.uint8)
        return bool(((a == b) | ((a & 0x7F == 0x7F) & (b & 0x7F == 0x7F))).all())
    return torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())


def all_same(got, wanted) -> bool:
    return all(same(a, b) for a, b in zip(got, wanted, strict=True))


def numbers(shape, dtype) -> torch.Tensor:
    """Magnitudes over twenty orders, zeros among them."""
    x = torch.randn(shape) * torch.exp(6 * torch.randn(shape))
    x[torch.rand(shape) < 0.05] = 0
    return x.to(dtype)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_equal_the_reference(shape, dtype, power_of_two, device):
    x = numbers(shape, dtype)
    wanted = *ref.quantise_rows(x, power_of_two), *ref.quantise_columns(x, power_of_two)
    assert all_same(quantise_both(x.to(device), power_of_two=power_of_two), wanted)
    assert all_same(quantise_rows(x.to(device), power_of_two=power_of_two), wanted[:2])
    if shape == (129, 576):
        assert all_same(quantise_columns(x.to(device), power_of_two=power_of_two), wanted[2:])


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_reference_is_the_definition(power_of_two):
    x = numbers((3, 300), torch.float32)
    codes, scale = ref.quantise_rows(x, power_of_two)
    assert codes.shape == (3, 300) and scale.shape == (3, 3)
    for m in range(3):
        for t in range(3):
            tile = x[m, 128 * t : 128 * t + 128]
            amax = max(tile.abs().max().item(), ref.AMAX_FLOOR)
            exact = 2 ** math.ceil(math.log2(amax / 448)) if power_of_two else amax / 448
            assert scale[t, m].item() == pytest.approx(exact, rel=0 if power_of_two else 1e-7)
            # 3 bits after the leading one; below 2^-6 steps of 2^-9
            error = (codes[m, 128 * t : 128 * t + 128].double() * exact - tile.double()).abs()
            assert (error <= (tile.double().abs() / 16).clamp_min(exact * 2**-10) * (1 + 1e-6)).all()


def test_relative_error_of_normal_numbers():
    x = torch.randn(256, 512)
    for power_of_two in (False, True):
        codes, scale = ref.quantise_rows(x, power_of_two)
        assert relative_error(ref.dequantise_rows(codes, scale), x) < 0.027  # 2^-4 at most, uniform in between


def test_nan_and_inf_poison_their_tiles_and_nothing_else(device):
    x = torch.randn(130, 300, dtype=torch.bfloat16)
    x[3, 5], x[7, 299], x[129, 140] = torch.nan, torch.inf, -torch.inf
    codes, scale, codes_t, scale_t = (t.float().cpu() for t in quantise_both(x.to(device)))
    bad = torch.zeros(130, 300, dtype=torch.bool)
    bad[3, :128], bad[7, 256:], bad[129, 128:256] = True, True, True
    assert torch.equal(codes.isnan(), bad) and scale.isnan().sum() == 3
    bad_t = torch.zeros(300, 130, dtype=torch.bool)
    bad_t[5, :128], bad_t[299, :128], bad_t[140, 128:] = True, True, True
    assert torch.equal(codes_t.isnan(), bad_t) and scale_t.isnan().sum() == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_numbers_are_finite_and_zeros_stay(dtype, device):
    x = torch.zeros(16, 256)
    x[0, 0], x[0, 1] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    x[1, 3], x[2, 128:] = 1e-38, ref.AMAX_FLOOR
    x[4, 7], x[5, 8:12] = 3e-7, torch.tensor([1e-10, 3e-12, 1e-16, 2e-18])  # gradients
    x = x.to(dtype)
    got = quantise_both(x.to(device))
    assert all_same(got, (*ref.quantise_rows(x), *ref.quantise_columns(x)))
    codes, scale = got[0].float().cpu(), got[1].cpu()
    assert codes[0, 0] == 448 and codes[0, 1] == -448 and codes[1].abs().max() == 0 and codes[3].abs().max() == 0
    assert codes[2, 128] == codes[4, 7] == codes[5, 8] == 448 and codes[6:].abs().max() == 0
    assert scale[0, 6] == torch.tensor(ref.AMAX_FLOOR) / torch.full((), 448.0)


def test_rows_of_a_wider_tensor_and_broken_strides(device):
    wide = torch.randn(64, 512, dtype=torch.bfloat16)
    assert all_same(quantise_rows(wide.to(device)[:, 128:384]), ref.quantise_rows(wide[:, 128:384]))
    assert all_same(quantise_both(wide.to(device).t()), quantise_both(wide.t().contiguous()))


COUNTS = {"ugly": [3, 0, 130, 1], "all to one": [0, 200, 0], "no rows": [0, 0]}


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_compact_rows_to_the_padded_layout(counts, gather, device):
    rows, count_E = sum(counts), torch.tensor(counts)
    layout = row_layout(count_E, padded_capacity(rows, len(counts)))
    used = int(layout.padded_start_E[-1])
    x = numbers((40 if gather else rows, 192), torch.bfloat16)
    index = torch.randint(0, 40, (rows,)) if gather else None
    there = type(layout)(*(t.to(device) for t in layout))
    got = quantise_both(x.to(device), layout=there, index_R=None if index is None else index.to(device))
    moved = ref.gather_rows(x, layout.tile_begin, layout.tile_count, index)
    wanted = *ref.quantise_rows(moved), *ref.quantise_columns(moved)
    assert all_same(cut(got, used), cut(wanted, used))
    only = quantise_rows(x.to(device), layout=there, index_R=None if index is None else index.to(device))
    assert all_same(cut(only, used), cut(wanted[:2], used))
    for e, count in enumerate(counts):
        begin, end = layout.padded_start_E[e : e + 2].tolist()
        assert got[0][begin + count : end].float().abs().sum() == 0


def cut(tensors, used):
    """The part of codes, scale, codes_t, scale_t that experts own; the rest is not written."""
    codes, scale, *rest = tensors
    out = [codes[:used], scale[:, :used]]
    if rest:
        out += [rest[0][:, :used], rest[1][: used // 128]]
    return [t.cpu() for t in out]


@pytest.mark.parametrize("shape", [(123, 431), (256, 128)])
def test_requantised_payload(shape, device):
    x = numbers(shape, torch.bfloat16)
    codes, scale = ref.quantise_rows(x, power_of_two=True)
    got = requantise_transposed(codes.to(device), scale.to(device))
    assert all_same(got, ref.requantise_transposed(codes, scale))
    exact = ref.dequantise_rows(codes, scale)
    assert relative_error(ref.dequantise_rows(*(t.cpu() for t in got)).t(), exact) < 0.027
    # a payload whose tiles all have the same scale loses nothing
    flat = torch.randn(128, 128).clamp(-2, 2)
    flat[:, 0] = flat[0] = 2.0
    codes, scale = ref.quantise_rows(flat, power_of_two=True)
    again_t, _ = requantise_transposed(codes.to(device), scale.to(device))
    assert same(again_t, codes.view(torch.uint8).t().contiguous().view(FP8))


def test_a_dispatched_payload_moves_to_the_padded_layout(device):
    counts = [3, 0, 130]
    layout = row_layout(torch.tensor(counts), padded_capacity(133, 3))
    there = type(layout)(*(t.to(device) for t in layout))
    used = int(layout.padded_start_E[-1])
    x = numbers((133, 192), torch.bfloat16)
    codes, scale = ref.quantise_rows(x, power_of_two=True)
    got = requantise_both(codes.to(device), scale.to(device), layout=there)
    moved = ref.gather_rows(ref.dequantise_rows(codes, scale), layout.tile_begin, layout.tile_count)
    wanted = *quantise_both(x, power_of_two=True, layout=layout)[:2], *ref.quantise_columns(moved, True)
    assert all_same(cut(got, used), cut(wanted, used))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(123, 431), (576, 128), (2, 144, 192), (3, 7, 1), (0, 128), (0, 16, 16)])
def test_weights_equal_the_reference(shape, dtype, device):
    weight = numbers(shape, dtype)
    codes, scale, codes_t = quantise_weight(weight.to(device))
    assert all_same((codes, scale, codes_t), ref.quantise_weight(weight))
    matrices = [weight] if weight.ndim == 2 else list(weight)
    for e, matrix in enumerate(matrices):
        one = codes if weight.ndim == 2 else codes[e]
        assert same(one, ref.quantise_block(matrix)[0])


def test_tiny_weights_take_the_released_floor(device):
    weight = torch.full((128, 256), 1e-7)
    weight[:, 128:] = 1e-3
    codes, scale, _ = quantise_weight(weight.to(device))
    wanted = ref.quantise_weight(weight)
    assert all_same((codes, scale), wanted[:2])
    assert scale[0].tolist() == pytest.approx([1e-4 / 448, 1e-3 / 448])


def test_a_weight_block_with_inf_has_only_nan_codes(device):
    weight = torch.randn(256, 128)
    weight[5, 5] = torch.inf
    codes, scale, codes_t = quantise_weight(weight.to(device))
    assert codes[:128].float().isnan().all() and codes[128:].float().isfinite().all() and scale[0, 0].isnan()
    assert codes_t.float().t().isnan()[:128].all()


def test_without_a_gpu_ops_are_their_references():
    x = numbers((130, 192), torch.bfloat16)
    layout = row_layout(torch.tensor([3, 127]), padded_capacity(130, 2))
    wanted = *ref.quantise_rows(x, True), *ref.quantise_columns(x, True)
    assert all_same(quantise_both(x, power_of_two=True), wanted)
    codes, scale = quantise_rows(x, power_of_two=True)
    assert all_same(requantise_both(codes, scale), (codes, scale, *ref.requantise_transposed(codes, scale)))
    moved = requantise_both(codes, scale, layout=layout)
    assert all_same(moved[:2], quantise_rows(x, power_of_two=True, layout=layout))
    assert all_same(quantise_columns(x, layout=layout), quantise_both(x, layout=layout)[2:])
    assert all_same(quantise_weight(x), ref.quantise_weight(x))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        quantise_rows(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="float16"):
        quantise_both(torch.zeros(2, 3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3\)"):
        requantise_transposed(torch.zeros(2, 3).to(FP8), torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"\(5,\)"):
        quantise_weight(torch.zeros(5))


def test_ops_are_sound_for_compilers():
    x = torch.randn(16, 32)
    layout = row_layout(torch.tensor([7, 9]), padded_capacity(16, 2))
    checks = ("test_schema", "test_faketensor")
    op = torch.ops.litseek.quantise.default
    torch.library.opcheck(op, (x, None, None, None, None, False, True, True), test_utils=checks)
    tiles = layout.tile_begin, layout.tile_count, torch.arange(16)
    torch.library.opcheck(op, (x, None, *tiles, True, True, False), test_utils=checks)
    torch.library.opcheck(torch.ops.litseek.quantise_weight.default, (x,), test_utils=checks)
