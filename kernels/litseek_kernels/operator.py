"""Kernels as torch operators: what torch.compile puts into its graphs, and called straight where nothing is traced.

A call through the dispatcher passes three layers of Python and costs the host about as much as ten launches; a training step
makes thousands, and where micro-batches are small the host is what limits it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


class Operator:
    """The operator ``op``, as torch.library.custom_op made it, of the function ``launch``."""

    def __init__(self, name: str, mutates_args: Sequence[str], launch: Callable[..., Any]) -> None:
        self.op: Any = torch.library.custom_op(name, launch, mutates_args=mutates_args)
        self.launch, self.pure = launch, not mutates_args
        self.function: Any = None

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or not self.pure or type(args[0]) not in _PLAIN:
            return self.op(*args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return self.op(*args) if self.function is None else self.function.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.launch(*args)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes of the results, for tracing."""
        return self.op.register_fake(fake)

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """As torch.autograd.Function has them."""
        self.op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:  # one that has a setup_context binds its arguments anew each time
            with torch._C._AutoDispatchBelowAutograd():
                out = self.launch(*args)
            setup_context(ctx, args, out)
            return out

        parts = {"forward": forward, "backward": backward}
        self.function = type("_Called", (torch.autograd.Function,), {k: staticmethod(v) for k, v in parts.items()})


def operator(name: str, mutates_args: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: the function as the operator ``name``; its annotations give the schema."""
    return lambda launch: Operator(name, mutates_args, launch)
