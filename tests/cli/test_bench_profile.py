"""Kernels sorted by name: real names of an H200's step, and what the parts need at least."""

from __future__ import annotations

import pytest
import torch

from litseek.cli.bench_floors import Rates, floors, linear_widths
from litseek.cli.bench_profile import PARTS, Kernel, Profile, classify
from litseek.models.config import DeepSeekV3Config

YARDSTICK = DeepSeekV3Config(
    vocab_size=32768, hidden_size=1536, num_hidden_layers=16, first_k_dense_replace=1, num_nextn_predict_layers=0,
    intermediate_size=6144, moe_intermediate_size=768, n_routed_experts=64, n_shared_experts=2, num_experts_per_tok=6,
    n_group=8, topk_group=4, num_attention_heads=16, q_lora_rank=768,
)  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "operators", "part"),
    [
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", ("aten::mm",), "dense GEMM"),
        (
            "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
            ("aten::mm", "aten::matmul", "litseek: head"),
            "cross-entropy",
        ),
        (
            "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<GroupProblemShape>>",
            (),
            "grouped GEMM",
        ),
        ("void cutlass::device_kernel<GemmUniversal>", ("aten::_grouped_mm",), "grouped GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", (), "attention"),
        ("_quantise_rows", ("litseek::quantise_1x128",), "quantise"),
        ("void at::native::multi_tensor_apply_kernel<LpNormFunctor>", (), "optimizer"),
        ("void at::native::elementwise_kernel", ("aten::mul_", "litseek: optimizer"), "optimizer"),
        ("void at::native::vectorized_gather_kernel", ("aten::index",), "permute, route"),
        ("triton_per_fused_scatter_sigmoid_topk_3", (), "permute, route"),
        ("triton_poi_fused__to_copy_t_12", (), "copies, casts"),
        ("Memcpy HtoD (Pageable -> Device)", (), "copies, casts"),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_2", (), "norm, elementwise"),
        ("void at::native::embedding_backward_kernel", ("aten::embedding_dense_backward",), "rest"),
        ("_forward_kernel", ("litseek::swiglu", "_SwiGLU"), "norm, elementwise"),
        ("_rows_kernel", ("litseek::quantise", "litseek: head"), "quantise"),
        ("nvjet_sm90_tst", ("aten::mm", "litseek::grouped_mm_fp8"), "grouped GEMM"),
        ("_split_kernel", ("litseek::linear_float32",), "permute, route"),
        ("_squares", (), "optimizer"),
        ("an_fp8_product", ("aten::_scaled_mm_v2",), "dense GEMM"),
        ("something_nobody_knows", (), "rest"),
    ],
)
def test_parts_by_name(kernel: str, operators: tuple[str, ...], part: str):
    assert classify(kernel, operators) == part and part in PARTS


def test_parts_and_idle_add_up():
    kernels = [Kernel("a", "dense GEMM", 3.0, 2), Kernel("b", "rest", 1.0, 1), Kernel("c", "dense GEMM", 2.0, 1)]
    found = Profile(10.0, kernels, {}, Rates(600.0, None, 4000.0))
    assert found.parts["dense GEMM"] == 5 and found.parts["rest"] == 1 and found.parts["idle"] == 4
    assert sum(found.parts.values()) == found.total_ms == 10
    assert Profile(5.0, kernels, {}, Rates(600.0, None, 4000.0)).total_ms == 6


def test_floors_count_the_models_flops():
    rates = Rates(bf16=600.0, fp8=None, copy=4000.0)
    found = floors(YARDSTICK, "bf16", 32768, 4096, rates)
    products = sum(found[part].ms for part in ("dense GEMM", "grouped GEMM", "cross-entropy", "attention"))
    model = YARDSTICK.flops_per_token(4096) * 32768 / 600e12 * 1e3
    attention = found["attention"].ms
    assert products - attention * 0.5 / 3.5 == pytest.approx(model, rel=1e-6)
    assert "quantise" not in found and set(found) < set(PARTS)


def test_fp8_needs_quantising_and_halves_the_products():
    bf16 = floors(YARDSTICK, "bf16", 32768, 4096, Rates(600.0, None, 4000.0))
    fp8 = floors(YARDSTICK, "fp8", 32768, 4096, Rates(600.0, 1200.0, 4000.0))
    assert fp8["quantise"].ms > 0 and fp8["grouped GEMM"].ms == bf16["grouped GEMM"].ms / 2
    assert fp8["attention"].ms == bf16["attention"].ms


def test_widths_are_those_of_the_linears():
    """Inputs and outputs of every Linear module of a built model, but gate and up read the same input once."""
    from litseek.models.transformer import build
    from litseek.precision.high import Linear

    with torch.device("meta"):
        model = build(YARDSTICK)
    every = [m for name, m in model.named_modules() if isinstance(m, Linear) and name != "lm_head"]
    twice = YARDSTICK.num_hidden_layers * YARDSTICK.hidden_size  # up_proj's input is gate_proj's
    twice += YARDSTICK.num_hidden_layers * YARDSTICK.hidden_size  # kv_a_proj's is q_a_proj's
    assert sum(m.in_features + m.out_features for m in every) - twice == linear_widths(YARDSTICK)
