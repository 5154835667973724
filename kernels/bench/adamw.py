"""The optimizer's step and the gradients' norm over a quarter of the yardstick's parameters, in its shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from litseek_kernels.adamw import MultiAdamW, MultiNorm
from litseek_kernels.ref.adamw import l2_norm
from litseek_kernels.testing import median_ms
from torch import Tensor

LAYER = [
    (64, 1536, 1536), (64, 1536, 768), (3072, 1536), (1536, 1536), (64, 1536), (768, 1536), (3072, 768), (576, 1536),
    (4096, 512), (1536, 2048), (1536,), (1536,), (768,), (512,),
]  # fmt: skip
SHAPES = [(32768, 1536), *LAYER * 4, (1536,)]
NAME = "yardstick, 4 layers, {:.2f}G parameters"
SETTING = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def rows() -> Iterable[dict[str, Any]]:
    """GB/s count each implementation's own bytes, every tensor read and written once."""
    shape = NAME.format(sum(torch.Size(s).numel() for s in SHAPES) / 1e9)
    for name, note, bytes_each, make in (
        ("litseek", "float32 gradient, BF16 moments and copy", 22, lambda: _ours(torch.float32)),
        ("litseek", "BF16 gradient, BF16 moments and copy", 20, lambda: _ours(torch.bfloat16)),
        ("foreach in buckets", "float32 gradient, BF16 moments and copy", 22, _foreach),
        ("torch fused", "float32 gradient, float32 moments, copy by foreach", 34, lambda: _torch(torch.float32)),
        ("torch fused", "all BF16, no master", 14, lambda: _torch(torch.bfloat16)),
    ):
        yield _row("adamw", shape, name, note, bytes_each, make)
    for name, note, make in (
        ("litseek", "float32", lambda: _norm(torch.float32, MultiNorm())),
        ("litseek", "BF16", lambda: _norm(torch.bfloat16, MultiNorm())),
        ("torch foreach", "float32", lambda: _norm(torch.float32, l2_norm)),
    ):
        yield _row("l2_norm", shape, name, note, 2 if note == "BF16" else 4, make)


def _row(
    op: str, shape: str, name: str, note: str, bytes_each: int, make: Callable[[], Callable[[], Any]]
) -> dict[str, Any]:
    step = make()
    ms = median_ms(step)
    del step
    torch.cuda.empty_cache()
    count = sum(torch.Size(s).numel() for s in SHAPES)
    value = count * bytes_each / ms / 1e6
    return dict(op=op, shape=shape, implementation=name, ms=ms, value=value, unit="GB/s", note=note)


def _random(dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    return [torch.randn(shape, device="cuda", dtype=dtype).mul_(scale) for shape in SHAPES]


def _ours(dtype: torch.dtype) -> Callable[[], Any]:
    params, grads = _random(torch.float32), _random(dtype)
    moments = _random(torch.bfloat16, 0.1), [m.square_() for m in _random(torch.bfloat16)]
    steps = [torch.ones((), dtype=torch.int64, device="cuda") for _ in SHAPES]
    copies, optimizer = [p.bfloat16() for p in params], MultiAdamW()
    scale, finite = torch.ones((), device="cuda"), torch.ones((), dtype=torch.bool, device="cuda")
    return lambda: optimizer(params, grads, *moments, steps, copies, **SETTING, scale=scale, finite=finite)


def _torch(dtype: torch.dtype) -> Callable[[], Any]:
    params = [torch.nn.Parameter(p) for p in _random(dtype)]
    for param, grad in zip(params, _random(dtype)):
        param.grad = grad
    optimizer = torch.optim.AdamW(params, **SETTING, fused=True)
    if dtype == torch.bfloat16:
        return optimizer.step
    copies = [p.detach().bfloat16() for p in params]

    def step() -> None:
        optimizer.step()
        torch._foreach_copy_(copies, [p.detach() for p in params])

    return step


def _foreach() -> Callable[[], Any]:
    """AdamW by foreach operations, 2 ** 26 elements at a time so that its temporaries fit."""
    params, grads = _random(torch.float32), _random(torch.float32)
    moments = _random(torch.bfloat16, 0.1), [m.square_() for m in _random(torch.bfloat16)]
    copies = [p.bfloat16() for p in params]
    buckets: list[list[int]] = [[]]
    for i, param in enumerate(params):
        if buckets[-1] and sum(params[j].numel() for j in buckets[-1]) + param.numel() > 2**26:
            buckets.append([])
        buckets[-1].append(i)
    lists = [tuple([tensors[i] for i in bucket] for tensors in (params, grads, *moments)) for bucket in buckets]

    def step() -> None:
        for each in lists:
            _foreach_step(*each)
        torch._foreach_copy_(copies, params)

    return step


def _foreach_step(params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor]) -> None:
    beta1, beta2 = SETTING["betas"]  # type: ignore[misc]
    lr, decay = SETTING["lr"], SETTING["weight_decay"]
    means, squares = [m.float() for m in exp_avgs], [v.float() for v in exp_avg_sqs]
    torch._foreach_lerp_(means, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    torch._foreach_copy_(exp_avgs, means)
    torch._foreach_copy_(exp_avg_sqs, squares)
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, 1.0)
    torch._foreach_add_(denominators, SETTING["eps"])
    torch._foreach_mul_(params, 1 - lr * decay)  # type: ignore[operator]
    torch._foreach_addcdiv_(params, means, denominators, -lr)  # type: ignore[operator]


def _norm(dtype: torch.dtype, norm: Callable[[list[Tensor]], Any]) -> Callable[[], Any]:
    tensors = _random(dtype)
    return lambda: norm(tensors)
