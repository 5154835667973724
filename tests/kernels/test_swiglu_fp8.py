"""SwiGLU fused with FP8 quantisation: against its reference, and that against float64."""

from __future__ import annotations

import pytest
import torch
from litseek_kernels.layout import padded_capacity, row_layout
from litseek_kernels.ref import swiglu as ref
from litseek_kernels.ref.quantise import dequantise_rows, quantise_rows
from litseek_kernels.swiglu_fp8 import swiglu_backward_quantise, swiglu_quantise
from litseek_kernels.testing import relative_error

COUNTS = {"ugly": [3, 0, 130, 1], "all to one": [0, 200, 0]}
FP8_ERROR = 0.027
"""Root mean square of rounding to 3 bits, and a little of what the tiles' scales cost."""


def make(counts, hidden, weighted, device):
    rows = sum(counts)
    layout = row_layout(torch.tensor(counts), padded_capacity(rows, len(counts)))
    capacity = layout.tile_begin.numel() * 128
    h = (2 * torch.randn(capacity, 2 * hidden)).bfloat16()  # padding rows hold numbers that must not be seen
    grad = torch.randn(capacity, hidden).bfloat16()
    weight = torch.rand(rows) + 0.1 if weighted else None
    there = type(layout)(*(t.to(device) for t in layout))
    return layout, there, int(layout.padded_start_E[-1]), h, grad, weight


def close(got, wanted, used, transposed):
    """Same scales to float32 rounding; all but a few codes the same (exp differs in its last bit)."""
    codes, scale = (t.cpu() for t in got)
    rows = slice(None), slice(used)
    if transposed:
        codes, wanted_codes = codes[rows], wanted[0][rows]
        scale, wanted_scale = scale[: used // 128], wanted[1][: used // 128]
    else:
        codes, wanted_codes = codes[:used], wanted[0][:used]
        scale, wanted_scale = scale[rows], wanted[1][rows]
    assert relative_error(scale, wanted_scale) < 1e-6
    assert (codes.view(torch.uint8) != wanted_codes.view(torch.uint8)).float().mean() < 1e-4
    assert relative_error(dequantise_rows(codes, scale), dequantise_rows(wanted_codes, wanted_scale)) < 1e-3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_forward_and_backward_equal_the_reference(counts, weighted, device):
    layout, there, used, h, grad, weight = make(counts, 128, weighted, device)
    weight_there = None if weight is None else weight.to(device)
    got = swiglu_quantise(h.to(device), layout=there, weight_R=weight_there, power_of_two=weighted)
    wanted = ref.swiglu_quantise(h, layout.tile_begin, layout.tile_count, weight, power_of_two=weighted)
    close(got[:2], wanted[:2], used, False)
    close(got[2:], wanted[2:], used, False)
    kept = wanted[2:]
    gradients = swiglu_backward_quantise(
        kept[0].to(device), kept[1].to(device), grad.to(device), layout=there, weight_R=weight_there
    )
    exact = ref.swiglu_backward_quantise(*kept, grad, layout.tile_begin, layout.tile_count, weight)
    close(gradients[:2], exact[:2], used, True)
    close(gradients[2:4], exact[2:4], used, False)
    close(gradients[4:6], exact[4:6], used, True)
    if weighted:
        assert relative_error(gradients.weight, exact[6]) < 1e-5
    else:
        assert gradients.weight is None
    for e, count in enumerate(counts):
        begin, end = layout.padded_start_E[e : e + 2].tolist()
        assert gradients.codes[begin + count : end].float().abs().sum() == 0
        assert gradients.activation_t[:, begin + count : end].float().abs().sum() == 0


@pytest.mark.parametrize("hidden", [256, 72])
def test_without_a_layout_and_with_ragged_widths(hidden, device):
    h, grad = (2 * torch.randn(256, 2 * hidden)).bfloat16(), torch.randn(256, hidden).bfloat16()
    got = swiglu_quantise(h.to(device))
    wanted = ref.swiglu_quantise(h)
    close(got[:2], wanted[:2], 256, False)
    gradients = swiglu_backward_quantise(wanted[2].to(device), wanted[3].to(device), grad.to(device))
    exact = ref.swiglu_backward_quantise(wanted[2], wanted[3], grad)
    for part, transposed in ((0, True), (2, False), (4, True)):
        close(gradients[part : part + 2], exact[part : part + 2], 256, transposed)


def test_the_reference_against_float64():
    h, grad, weight = torch.randn(128, 512).bfloat16(), torch.randn(128, 256), torch.rand(128) + 0.1
    kept = quantise_rows(h)
    exact = dequantise_rows(*kept).double().requires_grad_()
    exact_weight = weight.double().requires_grad_()
    activation = ref.swiglu(*exact.chunk(2, dim=-1)) * exact_weight[:, None]
    activation.backward(grad.double())
    a_t, a_scale_t, codes, scale, codes_t, scale_t, grad_weight = ref.swiglu_backward_quantise(
        *kept, grad, weight_R=weight
    )
    assert relative_error(dequantise_rows(a_t, a_scale_t).t(), activation) < FP8_ERROR
    assert relative_error(dequantise_rows(codes, scale), exact.grad) < FP8_ERROR
    assert relative_error(dequantise_rows(codes_t, scale_t).t(), exact.grad) < FP8_ERROR
    assert relative_error(grad_weight, exact_weight.grad) < 1e-5


@pytest.mark.parametrize("grouped", [False, True])
def test_without_a_gpu_ops_are_their_references(grouped):
    layout, _, used, h, grad, weight = make([3, 130], 72, True, "cpu")
    tiles = (layout.tile_begin, layout.tile_count) if grouped else (None, None)
    layout = layout if grouped else None
    weight = weight if grouped else torch.rand(len(h))
    got, wanted = swiglu_quantise(h, layout=layout, weight_R=weight), ref.swiglu_quantise(h, *tiles, weight)
    close(got[:2], wanted[:2], used, False)
    gradients = swiglu_backward_quantise(*got[2:], grad, layout=layout, weight_R=weight)
    exact = ref.swiglu_backward_quantise(*got[2:], grad, *tiles, weight)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(gradients, exact, strict=True))


def test_no_rows(device):
    layout = row_layout(torch.tensor([0, 0]).to(device), padded_capacity(0, 2))
    h = torch.randn(256, 256, device=device).bfloat16()
    codes, scale, h_codes, h_scale = swiglu_quantise(h, layout=layout)
    gradients = swiglu_backward_quantise(h_codes, h_scale, h[:, :128].contiguous(), layout=layout)
    assert codes.shape == (256, 128) and scale.shape == (1, 256) and gradients.codes.shape == (256, 256)


def test_what_does_not_fit_is_named():
    layout = row_layout(torch.tensor([3, 4]), padded_capacity(7, 2))
    with pytest.raises(ValueError, match=r"\(128, 8\).*3 tiles"):
        swiglu_quantise(torch.zeros(128, 8), layout=layout)
    with pytest.raises(ValueError, match=r"\(3, 7\)"):
        swiglu_quantise(torch.zeros(3, 7))
    with pytest.raises(ValueError, match=r"\(4, 4\).*\(1, 4\).*\(4, 3\)"):
        swiglu_backward_quantise(torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.zeros(1, 4), torch.zeros(4, 3))


def test_ops_are_sound_for_compilers():
    h = torch.randn(16, 32)
    layout = row_layout(torch.tensor([7]), padded_capacity(7, 1))
    torch.library.opcheck(
        torch.ops.litseek.swiglu_quantise.default,
        (h, None, None, None, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    h_codes, h_scale = quantise_rows(torch.randn(256, 32))
    arguments = h_codes, h_scale, torch.randn(256, 16), layout.tile_begin, layout.tile_count, torch.rand(7)
    # torch's schema test cannot compare float8 inputs
    torch.library.opcheck(
        torch.ops.litseek.swiglu_backward_quantise.default, arguments, test_utils=("test_faketensor",)
    )
