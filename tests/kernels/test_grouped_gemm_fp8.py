"""Grouped FP8 product against float64 on the dequantised operands: relative error below 1e-3 in FP32, 2e-3 in BF16.

On the CPU the op is its reference (the kernel is Gluon, which has no interpreter); on a Hopper GPU it is the kernel.
"""

import pytest
import torch
from litseek_kernels import grouped_gemm as kernel
from litseek_kernels.layout import Layout, padded_capacity, row_layout
from litseek_kernels.ref import grouped_gemm as ref

FP8 = torch.float8_e4m3fn
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-3}
CASES = {
    "plain": ([128, 256], 256, 256),
    "ragged rows": ([130, 1, 200], 128, 256),
    "empty first, middle, last": ([0, 100, 0, 300, 0], 128, 128),
    "all to one": ([0, 0, 500], 256, 384),
    "no rows": ([0, 0], 128, 128),
    "576 wide": ([140, 20], 576, 512),
    "576 deep": ([64, 65], 128, 576),
    "one block less a bit": ([77, 60], 112, 80),
    "three half tiles": ([191, 64], 384, 272),
    "smallest": ([1], 16, 16),
}


def inputs(counts, N, K, device="cpu", seed=0):
    """Codes and scales in the padded layout, padding rows zero; what no expert owns is NaN and nobody may read it."""
    generator = torch.Generator().manual_seed(seed)
    E, capacity = len(counts), padded_capacity(sum(counts), len(counts))
    layout = row_layout(torch.tensor(counts, device=device), capacity)

    def codes(*shape):
        return torch.randn(*shape, generator=generator).mul(100).clamp(-448, 448)

    def scales(*shape):
        return torch.rand(*shape, generator=generator) * 0.01 + 1e-3

    rows = codes(capacity, K)
    real = real_rows(layout, capacity)
    rows[~real] = 0
    rows[int(layout.padded_start_E[-1]) :] = float("nan")
    tensors = (
        rows.to(FP8),
        scales(-(-K // 128), capacity),
        codes(E, N, K).to(FP8),
        scales(E, -(-N // 128), -(-K // 128)),
    )
    return *(t.to(device) for t in tensors), layout


def real_rows(layout: Layout, capacity: int) -> torch.Tensor:
    row = torch.arange(capacity)
    return row % 128 < layout.tile_count.cpu()[row // 128]


def oracle(codes, scale, weight, weight_scale, layout):
    """(rows, N) compact float64: dequantise both, multiply once."""
    codes, scale, weight, weight_scale = (t.cpu().double() for t in (codes, scale, weight, weight_scale))
    (R, K), (E, N) = codes.shape, weight.shape[:2]
    rows = codes * scale.t().repeat_interleave(128, 1)[:, :K]
    full = weight * weight_scale.repeat_interleave(128, 1)[:, :N].repeat_interleave(128, 2)[:, :, :K]
    owner, real = layout.tile_expert.cpu().repeat_interleave(128), real_rows(layout, R)
    return torch.cat([rows[(owner == e) & real] @ full[e].t() for e in range(E)])


def error(got, wanted):
    return float((got.cpu().double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def compact_of(layout, counts):
    return layout.tile_begin, layout.tile_count, sum(counts)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_padded_and_compact_against_float64(case, dtype, device):
    *tensors, layout = inputs(*case, device=device)
    counts, N, _ = case
    wanted = oracle(*tensors, layout)
    padded = kernel.grouped_mm_fp8(*tensors, layout.tile_expert, out_dtype=dtype)
    assert padded.dtype == dtype and padded.shape == (tensors[0].shape[0], N)
    real = real_rows(layout, len(padded))
    assert error(padded.cpu()[real], wanted) < TOLERANCE[dtype]
    padding = padded.cpu()[: int(layout.padded_start_E[-1])][~real[: int(layout.padded_start_E[-1])]]
    assert not padding.any(), "padding rows of used tiles are zeros"
    compact = kernel.grouped_mm_fp8(*tensors, layout.tile_expert, out_dtype=dtype, compact=compact_of(layout, counts))
    assert compact.shape == (sum(counts), N) and torch.equal(compact.cpu(), padded.cpu()[real])


@pytest.mark.parametrize("device", DEVICES)
def test_input_gradient_takes_transposed_codes_and_a_view_of_the_scales(device):
    _, _, weight, weight_scale, layout = inputs([130, 70], 256, 384, device=device)
    transposed = weight.transpose(1, 2).contiguous()
    gradient, gradient_scale, *_ = inputs([130, 70], 16, 256, device=device, seed=1)
    got = kernel.grouped_mm_fp8(
        gradient, gradient_scale, transposed, weight_scale.transpose(1, 2), layout.tile_expert, out_dtype=torch.float32
    )
    wanted = oracle(gradient, gradient_scale, transposed, weight_scale.transpose(1, 2), layout)
    assert error(got.cpu()[real_rows(layout, len(got))], wanted) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_nan_reaches_its_row_and_its_column_only(device):
    codes, scale, weight, weight_scale, layout = inputs([140, 100], 256, 256, device=device)
    codes[3, 5], weight[1, 7, 200] = float("nan"), float("nan")
    bad = kernel.grouped_mm_fp8(
        codes, scale, weight, weight_scale, layout.tile_expert, compact=compact_of(layout, [140, 100])
    ).isnan()
    expected = torch.zeros_like(bad)
    expected[3, :], expected[140:, 7] = True, True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_an_infinite_scale_is_seen(device):
    codes, scale, weight, weight_scale, layout = inputs([20], 128, 128, device=device)
    scale[0, 4] = float("inf")
    out = kernel.grouped_mm_fp8(codes, scale, weight, weight_scale, layout.tile_expert)
    assert not out[4].isfinite().any() and out[:4].isfinite().all() and out[5:20].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_dense_is_one_expert(device):
    codes, scale, weight, weight_scale, _ = inputs([256], 272, 400, device=device)
    got = kernel.mm_fp8(codes[:256], scale[:, :256].contiguous(), weight[0], weight_scale[0], torch.float32)
    rows = codes[:256].double() * scale[:, :256].double().t().repeat_interleave(128, 1)[:, :400]
    full = (
        weight_scale[0].double().repeat_interleave(128, 0)[:272].repeat_interleave(128, 1)[:, :400] * weight[0].double()
    )
    assert error(got, (rows @ full.t()).cpu()) < 1e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("N", "K"), [(576, 1536), (1536, 1536), (512, 4096), (1536, 576)])
def test_torchs_dense_product_is_the_grouped_kernels(N, K, device):
    """Where `mm_fp8` takes torch's on a GPU (K a multiple of 512), and next to it; weights' scales turned as for dgrad."""
    codes, scale, weight, weight_scale, _ = inputs([384], N, K, device=device)
    codes, scale, turned = codes[:384], scale[:, :384].contiguous(), weight_scale[0].t().contiguous().t()
    one_J = torch.zeros(3, dtype=torch.int32, device=device)
    got = kernel.mm_fp8(codes, scale, weight[0], turned)
    assert torch.equal(got, kernel.grouped_mm_fp8(codes, scale, weight, turned[None], one_J))
    exact = kernel.grouped_mm_fp8(codes, scale, weight, turned[None], one_J, out_dtype=torch.float32)
    assert error(got, exact.double().cpu()) < 2e-3


@pytest.mark.gpu
@pytest.mark.parametrize(
    "counts, N, K", [([900, 1100, 0, 77], 1536, 768), ([2048], 4096, 7168), ([5, 300] * 16, 512, 1536)]
)
def test_many_tiles_a_program_and_the_same_bits_every_time(counts, N, K):
    *tensors, layout = inputs(counts, N, K, device="cuda")
    compact = compact_of(layout, counts)
    first = kernel.grouped_mm_fp8(*tensors, layout.tile_expert, compact=compact)
    assert error(first, oracle(*tensors, layout)) < 2e-3
    for _ in range(20):
        assert torch.equal(kernel.grouped_mm_fp8(*tensors, layout.tile_expert, compact=compact), first)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_of_capacity_at_all(device):
    codes, scale = torch.empty(0, 128, dtype=FP8, device=device), torch.empty(1, 0, device=device)
    weight, weight_scale = torch.ones(3, 64, 128, device=device).to(FP8), torch.ones(3, 1, 1, device=device)
    tiles = torch.empty(0, dtype=torch.int32, device=device)
    assert kernel.grouped_mm_fp8(codes, scale, weight, weight_scale, tiles).shape == (0, 64)
    assert kernel.grouped_mm_fp8(codes, scale, weight, weight_scale, tiles, compact=(tiles, tiles, 0)).shape == (0, 64)


def test_the_operator_has_a_fake():
    *tensors, layout = inputs([130, 70], 64, 128)
    checks = ("test_faketensor",)  # the schema check multiplies its inputs, which float8 cannot do on the CPU
    op = torch.ops.litseek.grouped_mm_fp8
    rest = (layout.tile_expert, torch.bfloat16)
    torch.library.opcheck(op, (*tensors, *rest, None, None, len(tensors[0])), test_utils=checks)
    torch.library.opcheck(op, (*tensors, *rest, layout.tile_begin, layout.tile_count, 200), test_utils=checks)


def test_the_reference_in_float64_is_the_definition():
    *tensors, layout = inputs([130, 1, 200], 160, 272)
    compact = compact_of(layout, [130, 1, 200])
    got = ref.grouped_mm_fp8(
        *tensors, layout.tile_expert, out_dtype=torch.float64, compact=compact, compute=torch.float64
    )
    assert error(got, oracle(*tensors, layout)) < 1e-14


def test_errors_name_the_shape():
    codes, scale, weight, weight_scale, layout = inputs([130], 64, 128)
    tiles = layout.tile_expert
    with pytest.raises(ValueError, match=r"multiple of 128; got \(100, 128\) and \(1, 64, 128\)"):
        kernel.grouped_mm_fp8(codes[:100], scale, weight, weight_scale, tiles)
    with pytest.raises(ValueError, match=r"N and K must be multiples of 16, got weight \(1, 60, 128\)"):
        kernel.grouped_mm_fp8(codes, scale, weight[:, :60].contiguous(), weight_scale, tiles)
    with pytest.raises(ValueError, match=r"weight must be contiguous float8_e4m3fn, got torch.float32 \(1, 64, 128\)"):
        kernel.grouped_mm_fp8(codes, scale, weight.float(), weight_scale, tiles)
    with pytest.raises(ValueError, match=r"scale must be contiguous float32 \(1, 384\) for codes \(384, 128\)"):
        kernel.grouped_mm_fp8(codes, scale.t(), weight, weight_scale, tiles)
    with pytest.raises(ValueError, match=r"weight_scale must be float32 \(1, 1, 1\) for weight \(1, 64, 128\)"):
        kernel.grouped_mm_fp8(codes, scale, weight, weight_scale[0], tiles)
    with pytest.raises(ValueError, match=r"tile_expert must be int32 \(3,\) for 384 rows, got torch.int64 \(3,\)"):
        kernel.grouped_mm_fp8(codes, scale, weight, weight_scale, tiles.long())
    with pytest.raises(ValueError, match=r"tile_count must be int32 \(3,\)"):
        kernel.grouped_mm_fp8(codes, scale, weight, weight_scale, tiles, compact=(tiles, tiles[:2], 130))
    with pytest.raises(ValueError, match=r"out_dtype must be bfloat16 or float32, got torch\.float16"):
        kernel.grouped_mm_fp8(codes, scale, weight, weight_scale, tiles, out_dtype=torch.float16)
