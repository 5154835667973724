"""Block-scaled FP8 against its definition, on real and ugly shapes."""

from __future__ import annotations

import math

import pytest
import torch
from litseek_kernels.ref.quantise import block_grid, dequantise_block, quantise_block, requantise_block

FP8 = torch.float8_e4m3fn


def by_hand(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block, straight from the definition."""
    codes = torch.empty_like(weight, dtype=FP8)
    scales = torch.empty(math.ceil(weight.shape[0] / 128), math.ceil(weight.shape[1] / 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = (slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
            scales[i, j] = weight[at].abs().max().clamp_min(1e-4) / 448
            codes[at] = (weight[at] / scales[i, j]).clamp(-448, 448).to(FP8)
    return codes, scales


@pytest.mark.parametrize("shape", [(128, 128), (576, 256), (123, 431), (1, 1), (130, 5), (256, 384)])
def test_equals_the_definition_block_by_block(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise_block(weight)
    wanted_codes, wanted_scale = by_hand(weight)
    assert scale.shape == block_grid(*shape) and torch.equal(scale, wanted_scale)
    assert torch.equal(codes.view(torch.uint8), wanted_codes.view(torch.uint8))
    error = (dequantise_block(codes, scale) - weight).abs()
    # Half a step of three mantissa bits, or half the smallest step where codes are subnormal.
    bound = torch.maximum(weight.abs() / 16, scale.max() * 2**-10) * 1.0001
    assert (error <= bound).all()


def test_a_latent_projection_of_the_release_has_scales_5_x_56():
    assert block_grid(576, 7168) == (5, 56)


def test_block_of_zeros_and_tiny_values_take_the_floor():
    codes, scale = quantise_block(torch.zeros(128, 128))
    assert scale.item() == pytest.approx(1e-4 / 448) and not codes.float().any()
    assert quantise_block(torch.full((4, 4), 1e-7))[1].item() == pytest.approx(1e-4 / 448)


def test_the_largest_value_becomes_448_and_nothing_overflows():
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(1)) * 1e30
    codes, _ = quantise_block(weight)
    assert codes.float().abs().max() == 448 and codes.float().isfinite().all()


def test_nan_is_not_turned_into_a_number():
    weight = torch.ones(128, 256)
    weight[3, 3] = float("nan")
    back = dequantise_block(*quantise_block(weight))
    assert back[3, 3].isnan() and torch.equal(back[:, 128:], weight[:, 128:])


def test_released_cast_to_bf16_multiplies_in_float32_and_rounds_once():
    generator = torch.Generator().manual_seed(2)
    codes = torch.randn(200, 300, generator=generator).mul_(100).to(FP8)
    scale = torch.rand(2, 3, generator=generator) * 1e-3
    full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :300]
    assert torch.equal(dequantise_block(codes, scale, torch.bfloat16), (codes.float() * full).to(torch.bfloat16))


def test_untrained_blocks_keep_codes_and_scales_whatever_the_scale():
    """Scales that no amax / 448 would give: largest code 3 of 448, odd mantissas."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randn(300, 260, generator=generator).to(FP8)
    scale = torch.rand(3, 3, generator=generator) * 10
    weight = dequantise_block(codes, scale)
    again, same = requantise_block(weight, scale)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8)) and torch.equal(same, scale)


def test_a_trained_block_gets_a_fresh_scale_and_its_neighbours_keep_theirs():
    generator = torch.Generator().manual_seed(4)
    codes = torch.randn(256, 256, generator=generator).to(FP8)
    scale = torch.rand(2, 2, generator=generator)
    weight = dequantise_block(codes, scale)
    weight[200, 10] *= 1.5
    again, mixed = requantise_block(weight, scale)
    fresh_codes, fresh_scale = quantise_block(weight)
    assert mixed[1, 0] == fresh_scale[1, 0] and torch.equal(again[128:, :128].float(), fresh_codes[128:, :128].float())
    mixed[1, 0] = scale[1, 0]
    assert torch.equal(mixed, scale) and torch.equal(again[:128].float(), codes[:128].float())
