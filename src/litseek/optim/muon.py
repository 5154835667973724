"""Muon for hidden matrices, AdamW for the rest: an option, not the report's. Letters: M matrices, R rows, C columns.

Muon (Jordan 2024) replaces a matrix's momentum by the nearest semi-orthogonal matrix; the scale 0.2 * sqrt(max(R, C))
(Liu et al., arXiv 2502.16982) gives its update AdamW's size, so that both share one learning rate and one decay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from litseek.copies import refresh_copy
from litseek.optim.adamw import MOMENTS, AdamW, AdamWConfig, gradient
from litseek.optim.schedules import LRSchedule

BUCKET = 2**26
"""Elements that one Newton-Schulz iteration works on together: its temporaries take a few times this."""


class Muon(AdamW):
    """Groups with ``muon`` True take orthogonalised Nesterov momentum, the others AdamW."""

    momentum = 0.95
    newton_schulz_steps = 5

    def _moments_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum",) if group.get("muon") else super()._moments_of(group)

    def _step_group(
        self, group: dict[str, Any], params: Sequence[Tensor], scale: Tensor | None, finite: Tensor | None
    ) -> None:
        if not group.get("muon"):
            return super()._step_group(group, params, scale, finite)
        by_shape: dict[tuple[int, int], list[Tensor]] = {}
        for param in params:
            by_shape.setdefault((param.shape[-2], param.shape[-1]), []).append(param)
        # one batched iteration a shape, in buckets for memory's sake: small matrices alone waste the cores
        for shape, alike in ((shape, bucket) for shape, all_ in by_shape.items() for bucket in buckets(all_)):
            directions = [self._direction(param, group, scale, finite) for param in alike]
            update_MRC = orthogonal(torch.cat(directions), self.newton_schulz_steps)
            rate = -group["lr"] * 0.2 * max(shape) ** 0.5
            for param, update in zip(alike, update_MRC.split([p.numel() // (shape[0] * shape[1]) for p in alike])):
                stepped = param * (1 - group["lr"] * group["weight_decay"])
                stepped.add_(update.reshape(param.shape), alpha=rate)
                _write(param, stepped, finite)
                refresh_copy(param)
        return None

    def _direction(self, param: Tensor, group: dict[str, Any], scale: Tensor | None, finite: Tensor | None) -> Tensor:
        """Nesterov momentum as (M, R, C); the moment is rounded to its dtype only after use."""
        state = self._state(param, group)
        state["step"].add_(1 if finite is None else finite)
        grad = gradient(param).to(param.dtype)
        if scale is not None:
            grad = grad * scale
        momentum = state["momentum"].to(param.dtype, copy=True).lerp_(grad, 1 - self.momentum)
        direction = torch.lerp(grad, momentum, self.momentum).reshape(-1, *param.shape[-2:])
        _write(state["momentum"], momentum, finite)
        return direction


def _write(tensor: Tensor, value: Tensor, finite: Tensor | None) -> None:
    """In place, unless the step is not finite, which is not known on the host."""
    tensor.copy_(value if finite is None else torch.where(finite, value.to(tensor.dtype), tensor))


def buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of parameters on one device, of at most ``BUCKET`` elements unless a single one is larger."""
    bucket: list[Tensor] = []
    size = 0
    for param in params:
        if bucket and (param.device != bucket[0].device or size + param.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(param)
        size += param.numel()
    if bucket:
        yield bucket


def orthogonal(x_MRC: Tensor, steps: int) -> Tensor:
    """Roughly the nearest semi-orthogonal matrix of each: singular values between 0.7 and 1.2 after five
    Newton-Schulz steps with Jordan's quintic (3.4445, -4.7750, 2.0315). In BF16 where the hardware has it (four times
    as fast on a CPU with AVX512-BF16), else in float32: the iteration corrects its own rounding."""
    flat = x_MRC.shape[1] > x_MRC.shape[2]
    x = x_MRC.mT if flat else x_MRC
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x = x.to(torch.bfloat16 if _multiplies_bf16(x) else x.dtype).contiguous()
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x.mT if flat else x).to(x_MRC.dtype)


def _multiplies_bf16(x: Tensor) -> bool:
    return x.is_cuda or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class MuonConfig(AdamWConfig):
    """What ``conf/optim/muon.yaml`` holds: AdamW's keys, and ``adamw_names``.

    Matrices and stacked experts (E, R, C) take Muon unless a part of ``adamw_names`` is in their name. Experts'
    joined gate and up projections count as one matrix.
    """

    by_element = False

    def __init__(
        self,
        lr: float = 3e-3,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay_norms: bool = True,
        moments: str = "bf16",
        clip: float = 1.0,
        schedule: LRSchedule | None = None,
        adamw_names: Sequence[str] = ("embed_tokens", "lm_head", "mlp.gate.weight"),
    ):
        super().__init__(lr, betas, eps, weight_decay, decay_norms, moments, clip, schedule)
        self.adamw_names = tuple(adamw_names)

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Muon:
        """The optimizer over these parameters; the groups carry their global names (``param_names``)."""
        named = list(named_parameters)
        hidden = [(n, p) for n, p in named if p.ndim >= 2 and not any(part in n for part in self.adamw_names)]
        taken = {name for name, _ in hidden}
        groups: list[dict[str, Any]] = [{"params": hidden, "muon": True}] if hidden else []
        groups += self.split(pair for pair in named if pair[0] not in taken)
        return Muon(groups, self.lr, self.betas, self.eps, self.weight_decay, MOMENTS[self.moments])
