"""Grouped FP8 weight gradient against float64 on the dequantised operands: relative error below 1e-3, BF16 out 2e-3."""

from itertools import pairwise

import pytest
import torch
from litseek_kernels import grouped_wgrad as kernel

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-3}
CASES = {
    "plain": ([128, 256], 64, 128),
    "ragged rows": ([130, 1, 200], 64, 128),
    "empty first, middle, last": ([0, 100, 0, 300, 0], 64, 128),
    "all to one": ([0, 0, 384], 64, 128),
    "no rows": ([0, 0], 64, 128),
    "width 576": ([140, 20], 80, 576),
    "one tile and a bit": ([129], 272, 144),
    "several tiles": ([700, 129, 1], 528, 400),
}


def inputs(counts, N, K, device="cpu", spare=2, seed=0):
    """Codes and scales in the padded layout; rows of padding are zeros, unused tiles hold garbage nobody may read."""
    generator = torch.Generator().manual_seed(seed)
    tiles = [-(-count // 128) for count in counts]
    start = torch.tensor([0, *tiles]).cumsum(0).mul(128).to(torch.int32)
    capacity = (sum(tiles) + spare) * 128

    def codes(width):
        values = torch.randn(width, capacity, generator=generator).mul(60).clamp(-448, 448)
        for e, count in enumerate(counts):
            values[:, int(start[e]) + count : int(start[e + 1])] = 0
        values[:, int(start[-1]) :] = float("nan")
        return values.to(torch.float8_e4m3fn)

    def scales(width):
        return torch.rand(capacity // 128, width, generator=generator) + 0.01

    tensors = codes(N), scales(N), codes(K), scales(K), start
    return tuple(t.to(device) for t in tensors)


def oracle(tensors):
    """(E, N, K) float64: dequantised operands, multiplied expert by expert."""
    grad, grad_scale, rows, rows_scale, start = (t.cpu() for t in tensors)
    grad = grad.double() * grad_scale.double().repeat_interleave(128, 0).t()
    rows = rows.double() * rows_scale.double().repeat_interleave(128, 0).t()
    return torch.stack([grad[:, begin:end] @ rows[:, begin:end].t() for begin, end in pairwise(start.tolist())])


def error(got, wanted):
    wanted = wanted.to(got.device)
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_float64(case, dtype, device):
    tensors = inputs(*case, device=device)
    got = kernel.grouped_wgrad_fp8(*tensors, out_dtype=dtype)
    assert got.dtype == dtype and got.shape == (len(case[0]), case[1], case[2])
    assert error(got, oracle(tensors)) < TOLERANCE[dtype]
    for e, count in enumerate(case[0]):
        assert count or not got[e].any(), "an expert without rows has a zero gradient"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_accumulates_into_out_and_leaves_experts_without_rows(dtype, device):
    tensors = inputs([130, 0, 70], 80, 144, device=device)
    before = torch.randn(3, 80, 144, device=device).mul(3e4).to(dtype)
    out = before.clone()
    assert kernel.grouped_wgrad_fp8(*tensors, out=out, accumulate=True) is out
    assert torch.equal(out[1], before[1])
    assert error(out, before.double() + oracle(tensors).to(device)) < TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES)
def test_writes_every_element_of_out(device):
    tensors = inputs([0, 140], 80, 144, device=device)
    out = torch.full((2, 80, 144), float("nan"), device=device)
    kernel.grouped_wgrad_fp8(*tensors, out=out)
    assert error(out, oracle(tensors)) < 1e-3 and not out[0].any()


@pytest.mark.parametrize("device", DEVICES)
def test_nan_reaches_its_row_and_column_only(device):
    tensors = inputs([140, 100], 64, 128, device=device)
    tensors[0][3, 5], tensors[2][7, 260] = float("nan"), float("nan")
    bad = kernel.grouped_wgrad_fp8(*tensors).isnan()
    expected = torch.zeros_like(bad)
    expected[0, 3, :], expected[1, :, 7] = True, True
    assert torch.equal(bad, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_no_rows_of_capacity_at_all(device):
    codes = torch.empty(64, 0, dtype=torch.float8_e4m3fn, device=device)
    scales, start = torch.empty(0, 64, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    assert not kernel.grouped_wgrad_fp8(codes, scales, codes, scales, start).any()
    out = torch.ones(3, 64, 64, device=device)
    assert kernel.grouped_wgrad_fp8(codes, scales, codes, scales, start, out=out, accumulate=True).eq(1).all()


def test_the_operator_has_a_fake():
    tensors = inputs([130, 70], 64, 128)
    checks = ("test_faketensor",)  # the schema check multiplies its inputs, which float8 cannot do on the CPU
    torch.library.opcheck(torch.ops.litseek.grouped_wgrad_fp8, (*tensors, torch.float32), test_utils=checks)
    out = torch.zeros(2, 64, 128)
    torch.library.opcheck(torch.ops.litseek.grouped_wgrad_fp8_into, (*tensors, out, True), test_utils=checks)


def test_errors_name_the_shape():
    grad, grad_scale, rows, rows_scale, start = inputs([130], 64, 128)
    with pytest.raises(ValueError, match=r"multiple of 128; got \(64, 500\) and \(128, 500\)"):
        kernel.grouped_wgrad_fp8(grad[:, :500], grad_scale, rows[:, :500], rows_scale, start)
    with pytest.raises(ValueError, match=r"N and K must be multiples of 16, got \(60, 512\) and \(128, 512\)"):
        kernel.grouped_wgrad_fp8(grad[:60], grad_scale[:, :60].contiguous(), rows, rows_scale, start)
    with pytest.raises(ValueError, match=r"grad_scale_t must be contiguous float32 \(4, 64\)"):
        kernel.grouped_wgrad_fp8(grad, grad_scale.t(), rows, rows_scale, start)
    with pytest.raises(ValueError, match=r"rows_t must be contiguous float8_e4m3fn, got torch.float32 \(128, 512\)"):
        kernel.grouped_wgrad_fp8(grad, grad_scale, rows.float(), rows_scale, start)
    with pytest.raises(ValueError, match=r"padded_start_E must be int32"):
        kernel.grouped_wgrad_fp8(grad, grad_scale, rows, rows_scale, start.long())
    with pytest.raises(ValueError, match=r"out must be .* \(1, 64, 128\), got torch.float32 \(1, 128, 64\)"):
        kernel.grouped_wgrad_fp8(grad, grad_scale, rows, rows_scale, start, out=torch.zeros(1, 128, 64))
    with pytest.raises(ValueError, match="accumulate needs out"):
        kernel.grouped_wgrad_fp8(grad, grad_scale, rows, rows_scale, start, accumulate=True)
    with pytest.raises(ValueError, match=r"out_dtype must be float32 or bfloat16, got torch\.float16"):
        kernel.grouped_wgrad_fp8(grad, grad_scale, rows, rows_scale, start, out_dtype=torch.float16)


@pytest.mark.gpu
def test_a_hundred_runs_agree_bit_for_bit():
    """Loads, products and promotion overlap; what overlaps wrongly differs from run to run."""
    tensors = inputs([1000, 0, 513, 3000], 1024, 768, device="cuda")
    first = kernel.grouped_wgrad_fp8(*tensors)
    assert all(torch.equal(kernel.grouped_wgrad_fp8(*tensors), first) for _ in range(100))
    assert error(first, oracle(tensors)) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [False, True])
def test_counts_are_never_read_on_the_host(accumulate):
    tensors = inputs([200, 0, 70], 80, 144, device="cuda")
    out = torch.zeros(3, 80, 144, device="cuda")
    kernel.grouped_wgrad_fp8(*tensors, out=out, accumulate=accumulate)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a host read fails under capture
        kernel.grouped_wgrad_fp8(*tensors, out=out, accumulate=accumulate)
    tensors[-1].copy_(torch.tensor([0, 128, 384, 384]))
    out.zero_()
    graph.replay()
    assert error(out, oracle(tensors)) < 1e-3
