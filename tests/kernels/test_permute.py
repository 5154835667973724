"""The permutation's kernels against ref.permute: places equal, copies exact, sums by relative error to float64."""

import pytest
import torch
from litseek_kernels import permute as op
from litseek_kernels.ref import permute as ref
from litseek_kernels.testing import relative_error

SHAPES = {
    "plain": (16, 3, 8, 64),
    "one token": (1, 4, 8, 5),
    "one choice": (6, 1, 4, 3),
    "no tokens": (0, 3, 8, 64),
    "all experts": (5, 4, 4, 2),
    "ugly": (123, 5, 31, 431),
    "wide": (9, 6, 64, 1536),
    "wider than a block": (3, 8, 256, 1100),
    "experts not a power of two": (40, 6, 160, 33),
    "no width": (4, 2, 4, 0),
}
BOUND = {torch.float32: 5e-7, torch.bfloat16: 3e-3}
"""Of sums, against the float64 reference: rounding of the output. The interpreter's stores cut bfloat16 instead of
rounding it, which is twice as far."""


def choices(tokens: int, top_k: int, experts: int, device: torch.device) -> torch.Tensor:
    score = torch.rand(tokens, experts)
    score[:, experts // 2 :] *= torch.rand(experts - experts // 2)  # uneven, as routing is
    return score.topk(top_k, dim=-1).indices.to(device)


def bound(dtype: torch.dtype, device: torch.device) -> float:
    return BOUND[dtype] * (2 if device.type == "cpu" and dtype == torch.bfloat16 else 1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_places_and_counts_equal_the_reference(shape, device):
    tokens, top_k, experts, _ = shape
    expert_TK = choices(tokens, top_k, experts, device)
    for got, wanted in zip(op.sort_by_expert(expert_TK, experts), ref.sort_by_expert(expert_TK, experts)):
        assert got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(got, wanted)


def test_places_over_several_blocks_of_rows(device):
    expert_TK = choices(411, 6, 48, device)  # 2466 rows: three blocks, the last one not full
    for got, wanted in zip(op.sort_by_expert(expert_TK, 48), ref.sort_by_expert(expert_TK, 48)):
        assert torch.equal(got, wanted)


def test_one_expert_takes_everything(device):
    expert_TK = torch.full((1300, 1), 2, device=device)
    order, inverse, count = op.sort_by_expert(expert_TK, 4)
    assert count.tolist() == [0, 0, 1300, 0]
    assert order.tolist() == inverse.flatten().tolist() == list(range(1300))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(32768, 6, 64), (8192, 8, 256), (131072, 8, 256)])
def test_places_at_real_sizes(shape):
    tokens, top_k, experts = shape
    expert_TK = torch.rand(tokens, experts, device="cuda").topk(top_k, dim=-1).indices
    for got, wanted in zip(op.sort_by_expert(expert_TK, experts), ref.sort_by_expert(expert_TK, experts)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_permute_copies_and_its_gradient_sums(shape, dtype, device):
    tokens, top_k, experts, dim = shape
    plan = ref.sort_by_expert(choices(tokens, top_k, experts, device), experts)[:2]
    x = torch.randn(tokens, dim, device=device, dtype=dtype, requires_grad=True)
    rows = op.permute(x, *plan)
    assert torch.equal(rows, ref.permute(x, *plan))
    seed = torch.randn_like(rows)
    exact = x.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(ref.permute(exact, *plan), exact, seed.double())
    (got,) = torch.autograd.grad(rows, x, seed)
    assert got.dtype == dtype and relative_error(got, wanted) <= bound(dtype, device)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain sum"])
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_unpermute_sums_and_its_gradients(shape, dtype, weighted, device):
    tokens, top_k, experts, dim = shape
    plan = ref.sort_by_expert(choices(tokens, top_k, experts, device), experts)[:2]
    rows = torch.randn(tokens * top_k, dim, device=device, dtype=dtype, requires_grad=True)
    weight = torch.rand(tokens, top_k, device=device, requires_grad=True) if weighted else None
    leaves = [leaf for leaf in (rows, weight) if leaf is not None]
    out = op.unpermute(rows, weight, *plan)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = ref.unpermute(exact[0], exact[1] if weighted else None, *plan)
    assert out.dtype == dtype and relative_error(out, wanted) <= bound(dtype, device)
    seed = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, seed)
    for a, b in zip(got, torch.autograd.grad(wanted, exact, seed.double())):
        limit = bound(dtype, device) if a.dtype == dtype else 1e-6
        assert a.shape == b.shape and relative_error(a, b) <= limit


def test_without_weights_nothing_of_the_rows_is_kept(device):
    order, inverse, _ = ref.sort_by_expert(choices(7, 2, 5, device), 5)
    rows = torch.randn(14, 8, device=device, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        op.unpermute(rows, None, order, inverse)
    assert [x.dtype for x in kept] == [torch.int32]


def test_weights_in_the_rows_order(device):
    expert_TK = choices(11, 3, 6, device)
    order, inverse, _ = ref.sort_by_expert(expert_TK, 6)
    weight = torch.rand(11, 3, device=device, requires_grad=True)
    weight_R = op.weight_of_rows(weight, order, inverse)
    assert torch.equal(weight_R, weight.flatten()[order])
    (grad,) = torch.autograd.grad(weight_R, weight, torch.arange(33.0, device=device))
    assert torch.equal(grad, inverse.float())


@pytest.mark.parametrize("owned", [0.4, 0.0], ids=["some choices", "no choice"])
def test_choices_of_minus_one_have_no_row(owned, device):
    """As where the other ranks hold their experts: equal to the dense form without those rows."""
    expert_TK = choices(123, 5, 31, device)
    expert_TK = expert_TK.masked_fill(torch.rand(123, 5, device=device) >= owned, -1)
    order, inverse, count = op.sort_by_expert(expert_TK, 31)
    R = int(count.sum())
    flat, order = expert_TK.flatten(), order[:R]
    mine = (flat >= 0).nonzero().flatten()
    assert torch.equal(order.long(), mine[flat[mine].argsort(stable=True)])
    assert torch.equal(count, torch.bincount(flat[mine], minlength=31))
    assert torch.equal(inverse.flatten()[order], torch.arange(R, dtype=torch.int32, device=device))
    assert inverse[expert_TK < 0].eq(-1).all()

    x = torch.randn(123, 43, device=device, requires_grad=True)
    rows = op.permute(x, order, inverse)
    assert torch.equal(rows, x[order // 5])
    seed = torch.randn(R, 43, device=device)
    (got,) = torch.autograd.grad(rows, x, seed)
    assert relative_error(got, torch.zeros_like(x, dtype=torch.float64).index_add(0, order // 5, seed.double())) <= 5e-7

    rows = rows.detach().requires_grad_()
    weight = torch.rand(123, 5, device=device, requires_grad=True)
    seed = torch.randn_like(x)
    for w in (None, weight):
        out = op.unpermute(rows, w, order, inverse)
        factor = torch.ones(R, device=device) if w is None else op.weight_of_rows(w, order, inverse)
        exact = torch.zeros_like(x, dtype=torch.float64)
        exact = exact.index_add(0, order // 5, (rows * factor[:, None]).double())
        assert relative_error(out, exact) <= 5e-7
        leaves = [rows] if w is None else [rows, w]
        for a, b in zip(torch.autograd.grad(out, leaves, seed), torch.autograd.grad(exact, leaves, seed.double())):
            assert relative_error(a, b) <= 1e-6


def test_nan_and_inf_pass_through(device):
    order, inverse, _ = ref.sort_by_expert(torch.tensor([[0, 1], [1, 2]], device=device), 3)
    x = torch.tensor([[float("nan"), 1.0], [float("inf"), 2.0]], device=device)
    rows = op.permute(x, order, inverse)
    assert rows.isnan().sum() == 2 and rows.isinf().sum() == 2
    out = op.unpermute(rows, torch.ones(2, 2, device=device), order, inverse)
    assert out[0, 0].isnan() and out[1, 0].isinf() and out[:, 1].tolist() == [2.0, 4.0]


def test_shapes_that_do_not_fit_are_named(device):
    order, inverse, _ = ref.sort_by_expert(torch.tensor([[0, 1], [1, 2]], device=device), 3)
    with pytest.raises(ValueError, match=r"permute has rows \(3, 8\) for choices \(2, 2\)"):
        op.permute(torch.randn(3, 8, device=device), order, inverse)
    with pytest.raises(ValueError, match=r"unpermute has rows \(7, 8\)"):
        op.unpermute(torch.randn(7, 8, device=device), None, order, inverse)
    with pytest.raises(ValueError, match=r"weights \(2, 3\) for choices \(2, 2\)"):
        op.unpermute(torch.randn(4, 8, device=device), torch.ones(2, 3, device=device), order, inverse)


def test_operators_are_described_for_the_compiler(device):
    _, inverse, _ = ref.sort_by_expert(choices(6, 2, 5, device), 5)
    x = torch.randn(6, 8, device=device, requires_grad=True)
    rows = torch.randn(12, 8, device=device, requires_grad=True)
    weight = torch.rand(6, 2, device=device, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.litseek.sort_by_expert, (choices(6, 2, 5, device), 5), test_utils=checks)
    torch.library.opcheck(torch.ops.litseek.permute, (x, inverse, 12), test_utils=checks)
    torch.library.opcheck(torch.ops.litseek.unpermute, (rows, weight, inverse), test_utils=checks)
    torch.library.opcheck(torch.ops.litseek.unpermute, (rows, None, inverse), test_utils=checks)
