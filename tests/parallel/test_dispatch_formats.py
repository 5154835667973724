"""What travels in which format: rows and output gradients as the precision packs them, sums as they are."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from litseek.models.dispatch import LocalDispatcher
from litseek.parallel.dispatch import AllToAllDispatcher
from litseek.precision import BF16, FP8
from tests.ranks import ranks

E, D, F, K, T = 4, 256, 128, 2, 40


class Rounded(torch.autograd.Function):
    """Rounds as the wire does, forward or backward."""

    @staticmethod
    def forward(ctx, x, forward: bool):
        ctx.forward = forward
        return FP8().unpack(FP8().pack(x)) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return (grad if ctx.forward else FP8().unpack(FP8().pack(grad))), None


def made() -> list[Tensor]:
    """x, choices, weights, the experts' matrices, the output's gradient; of both ranks."""
    g = torch.Generator().manual_seed(3)
    expert = torch.rand(2 * T, E, generator=g).topk(K).indices
    x, grad = (torch.randn(2 * T, D, generator=g).bfloat16() for _ in range(2))
    up, down = torch.randn(E, 2 * F, D, generator=g) * 0.05, torch.randn(E, D, F, generator=g) * 0.05
    return [x, expert, torch.rand(2 * T, K, generator=g), up, down, grad]


def through(dispatcher, x, expert, weight, up, down, grad, wire=lambda x, forward: x) -> list[Tensor]:
    x, weight, up, down = (t.clone().requires_grad_() for t in (x, weight, up, down))
    rows, count, plan = dispatcher.dispatch(wire(x, True), expert, weight)
    out = FP8().experts(rows, up, down, count, dispatcher.row_weights(plan))
    y = wire(dispatcher.combine(out, plan.with_weight(None)), False)
    y.backward(grad)
    return [y.detach(), x.grad, weight.grad, up.grad, down.grad]


def in_fp8() -> tuple[list[Tensor], int]:
    rank = dist.get_rank()
    dispatcher = AllToAllDispatcher(E, dist.group.WORLD, precision=FP8())
    mine = [part.chunk(2)[rank] for part in made()]
    return through(dispatcher, *mine), dispatcher.hops[0].bytes_sent


def test_fp8_rows_go_out_and_bfloat16_sums_come_back():
    (first, sent0), (second, sent1) = ranks(2).run(in_fp8)
    expected = through(LocalDispatcher(E), *made(), wire=Rounded.apply)
    y, x_grad, weight_grad, up_grad, down_grad = (torch.cat(parts) for parts in zip(first, second))
    assert y.dtype == x_grad.dtype == torch.bfloat16
    for ours, wanted in zip((weight_grad, up_grad, down_grad), expected[2:]):
        assert torch.equal(ours, wanted)  # the same rows and gradients in the same order
    for ours, wanted in zip((y, x_grad), expected):  # a sum of two ranks' sums, each rounded to BF16
        assert (ours.double() - wanted.double()).norm() < 4e-3 * wanted.double().norm()

    rank_TK = made()[1] // 2
    away = [int((rank_TK.chunk(2)[rank] != rank).any(1).sum()) for rank in (0, 1)]
    row, places, weights, total = D + 4 * D // 128, 4 * K, 4 * K, 2 * D
    for rank, sent in enumerate(
        (sent0, sent1)
    ):  # out: rows, places, weights and output gradients; back: the three sums
        assert sent == away[rank] * (2 * row + places + weights) + away[1 - rank] * (2 * total + weights)


def in_bfloat16() -> list[torch.dtype]:
    x = torch.randn(6, D, requires_grad=True)
    dispatcher = AllToAllDispatcher(E, dist.group.WORLD, precision=BF16())
    rows, _, plan = dispatcher.dispatch(x, torch.arange(12).view(6, 2) % E, torch.rand(6, 2))
    y = dispatcher.combine(rows.float(), plan)
    y.sum().backward()
    return [rows.dtype, y.dtype, x.grad.dtype]


@pytest.mark.parametrize("rank", [0, 1])
def test_bfloat16_goes_out_and_gradients_have_their_tensors_dtype(rank):
    assert ranks(2).run(in_bfloat16)[rank] == [torch.bfloat16, torch.float32, torch.float32]
