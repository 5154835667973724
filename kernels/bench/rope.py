"""MLA's heads (rotation and the shared rotary key), forward and backward: ours beside torch eager and compiled.

Value: GB/s of the bytes that must move once: rotary parts of the queries in and out, keys' part in, keys out; backward
the same and the values' gradient in and out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from litseek_kernels.ref import rope as ref
from litseek_kernels.rope import mla_heads
from litseek_kernels.testing import median_ms

SHAPES = ((8, 4096, 16), (2, 4096, 128))
"""(batch, length, heads) of the yardstick and of the 671B; heads are 128 + 64 and 128 wide."""
NOPE, ROPE, VALUE = 128, 64, 128


def rows() -> Iterator[dict[str, Any]]:
    for batch, length, heads in SHAPES:

        def new(*width: int, b: int = batch, s: int = length) -> torch.Tensor:
            return torch.randn(b, s, *width, device="cuda", dtype=torch.bfloat16)

        q, kv, latent = new(heads * (NOPE + ROPE)), new(heads * (NOPE + VALUE)), new(512 + ROPE)
        angle = torch.arange(length, device="cuda")[:, None] * torch.rand(ROPE // 2, device="cuda")
        cos, sin = (t.expand(batch, -1, -1).contiguous() for t in (angle.cos(), angle.sin()))
        seeds = [new(heads, width) for width in (NOPE + ROPE, NOPE + ROPE, VALUE)]
        part = 2 * batch * length * heads
        moved = {
            "forward": part * (2 * ROPE + NOPE + NOPE + ROPE),
            "backward": part * (2 * ROPE + NOPE + ROPE + VALUE + NOPE + VALUE),
        }
        compiled = torch.compile(ref.mla_heads, dynamic=False)
        for name, function in (
            ("litseek", mla_heads),
            ("torch eager", ref.mla_heads),
            ("torch compiled", compiled),
        ):
            inputs = [t.clone().requires_grad_() for t in (q, kv, latent)]
            plain = [t.clone() for t in (q, kv, latent)]

            def call(inputs: list[torch.Tensor], f: Any = function) -> Any:
                return f(inputs[0], inputs[1], inputs[2][..., 512:], cos, sin, heads)

            with torch.no_grad():
                ms = {"forward": median_ms(lambda: call(plain))}
            outputs = call(inputs)
            ms["backward"] = median_ms(lambda: torch.autograd.grad(outputs, inputs, seeds, retain_graph=True))
            for kind, took in ms.items():
                yield {
                    "op": f"mla_heads {kind}",
                    "shape": f"{batch}x{length}x{heads}",
                    "implementation": name,
                    "ms": took,
                    "value": moved[kind] / took / 1e6,
                    "unit": "GB/s",
                }
