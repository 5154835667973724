"""Output head with cross-entropy, forward and backward: ours, eager torch, and eager compiled; and the passes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from litseek_kernels.cross_entropy import cross_entropy, cross_entropy_and_gradient_
from litseek_kernels.testing import HEADS, median_ms
from torch import Tensor

from litseek.losses import linear_cross_entropy


def rows() -> Iterator[dict]:
    for tokens, vocab, width in HEADS:
        yield from head(tokens, vocab, width)
    yield from passes(4096, 129280)


def head(tokens: int, vocab: int, width: int) -> Iterator[dict]:
    """Value: GiB at the peak beyond inputs and gradients. All start from an FP32 master and end with its gradient."""
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    master = torch.randn(vocab, width, device="cuda").mul_(width**-0.5).requires_grad_()
    copy = master.detach().bfloat16()
    labels = torch.randint(0, vocab, (tokens,), device="cuda")

    def plain(hidden: Tensor, master: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ master.bfloat16().T).float(), labels, reduction="sum")

    compiled = torch.compile(plain)
    cases: dict[str, Callable[[], Tensor]] = {
        "litseek, BF16 copy at hand": lambda: linear_cross_entropy(hidden, master, labels, weight_copy_VD=copy),
        "litseek": lambda: linear_cross_entropy(hidden, master, labels),
        "torch eager": lambda: plain(hidden, master, labels),
        "torch compiled": lambda: compiled(hidden, master, labels),
    }
    for name, loss in cases.items():

        def step(loss: Callable[[], Tensor] = loss) -> None:
            torch.autograd.grad(loss(), (hidden, master))

        extra = peak_gib(step) - (hidden.nbytes + master.nbytes) / 2**30
        flops = 6 * tokens * vocab * width
        ms = median_ms(step)
        note = f"{flops / ms / 1e9:.0f} TFLOP/s"
        yield {
            "op": "linear_cross_entropy",
            "shape": f"{tokens}x{vocab}x{width}",
            "implementation": name,
            "ms": ms,
            "value": extra,
            "unit": "GiB",
            "note": note,
        }


def passes(tokens: int, vocab: int) -> Iterator[dict]:
    """Value: GB/s of the bytes that must move, each once: logits read, and written where there is a gradient."""
    logits = torch.randn(tokens, vocab, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, vocab, (tokens,), device="cuda")
    cases = {"loss": (1, cross_entropy), "loss and gradient": (2, cross_entropy_and_gradient_)}
    for name, (crossings, op) in cases.items():
        ms = median_ms(lambda op=op: op(logits, labels))  # type: ignore[misc]
        yield {
            "op": f"cross_entropy ({name})",
            "shape": f"{tokens}x{vocab}",
            "implementation": "litseek",
            "ms": ms,
            "value": crossings * logits.nbytes / ms / 1e6,
            "unit": "GB/s",
        }


def peak_gib(step: Callable[[], None]) -> float:
    step()  # kernels, handles and workspaces are there after this
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30
