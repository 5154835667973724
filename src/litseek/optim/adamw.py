"""AdamW over float32 masters with BF16 moments (report §3.3.2, §4.2) and its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from litseek_kernels.adamw import MultiAdamW
from litseek_kernels.ref.adamw import adamw_
from torch import Tensor, nn

from litseek.copies import compute_copy, mark_fresh, refresh_copy
from litseek.optim.schedules import LRSchedule

MOMENTS = {"bf16": torch.bfloat16, "fp32": torch.float32}


class AdamW(torch.optim.Optimizer):
    """AdamW whose parameters are the float32 masters; the moments are kept in ``moments``' dtype.

    State per parameter, where the parameter is: ``step`` (int64 scalar), ``exp_avg`` and ``exp_avg_sq`` (its shape).
    A group's ``lr`` is absolute; ``set_lr`` writes it before each step. A parameter's attribute ``compute_copy``, a BF16
    tensor of its shape, holds the stepped parameter rounded to BF16 after a step. Float32 on a GPU.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        moments: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, dict(lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay))
        self.moments = moments
        self._many: dict[Tensor, MultiAdamW] = {}

    def materialise(self) -> None:
        """Make the state of every parameter now, so that a checkpoint has somewhere to load into."""
        for group in self.param_groups:
            for param in group["params"]:
                self._state(param, group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        scale: Tensor | None = None,
        finite: Tensor | None = None,
    ) -> Any:
        """One step of every parameter that has a gradient; the others keep their state untouched.

        ``scale`` (float32 scalar) multiplies the gradients on their way in, ``finite`` (bool scalar) false leaves
        parameters, copies and state as they were. On a GPU both are read there: the host waits for neither.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if finite is None or finite.is_cuda or bool(finite):
            for group in self.param_groups:
                self._step_group(group, [p for p in group["params"] if p.grad is not None], scale, finite)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would widen the moments to the parameters' dtype: they are narrowed again, losslessly."""
        super().load_state_dict(state_dict)
        for param, state in self.state.items():
            for key, value in state.items():
                state[key] = value.to(param.device) if key == "step" else value.to(self.moments)

    def _state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64, device=param.device)
            for key in self._moments_of(group):
                state[key] = torch.zeros_like(param, dtype=self.moments)
        return state

    def _moments_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _step_group(
        self, group: dict[str, Any], params: Sequence[Tensor], scale: Tensor | None, finite: Tensor | None
    ) -> None:
        if not params:
            return
        states = [self._state(param, group) for param in params]
        setting = {key: group[key] for key in ("lr", "eps", "weight_decay")}
        if params[0].is_cuda:
            many = self._many.setdefault(group["params"][0], MultiAdamW())
            many(
                params,
                [gradient(param).contiguous() for param in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                [compute_copy(param) for param in params],
                betas=group["betas"],
                scale=scale,
                finite=finite,
                **setting,
            )
            torch.autograd.graph.increment_version(params)  # autograd did not see the kernel write
            for param in params:
                mark_fresh(param)
            return
        beta1, beta2 = group["betas"]
        for param, state in zip(params, states):  # one by one stays in cache: foreach takes twice as long
            grad = gradient(param) if scale is None else gradient(param) * scale
            step = int(state["step"].add_(1))
            adamw_(param, grad, state["exp_avg"], state["exp_avg_sq"], step, beta1=beta1, beta2=beta2, **setting)
            refresh_copy(param)


def gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate that the schedule returned."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class AdamWConfig:
    """What ``conf/optim/adamw.yaml`` holds; ``build`` makes the optimizer, ``schedule`` its learning rate.

    ``decay_norms`` True decays every parameter, as the report excludes nothing; False exempts norms and biases
    (parameters of one dimension). ``moments`` is "bf16" (the report's) or "fp32". ``clip`` is the global gradient
    norm that the trainer clips to. Without a ``schedule`` the rate is constant. Raises ValueError naming the key.
    """

    by_element = True
    """A parameter's rows can be stepped apart: what ZeRO-1 asks."""

    def __init__(
        self,
        lr: float = 2.2e-4,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay_norms: bool = True,
        moments: str = "bf16",
        clip: float = 1.0,
        schedule: LRSchedule | None = None,
    ):
        if moments not in MOMENTS:
            raise ValueError(f"optim.moments is '{moments}', allowed are {', '.join(map(repr, MOMENTS))}")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"optim.betas is {list(betas)}, it must be two numbers in [0, 1)")
        for key, value in (("lr", lr), ("eps", eps), ("clip", clip)):
            if not value > 0:
                raise ValueError(f"optim.{key} is {value}, it must be above 0")
        if weight_decay < 0:
            raise ValueError(f"optim.weight_decay is {weight_decay}, it must not be below 0")
        self.lr, self.betas, self.eps, self.weight_decay = lr, (betas[0], betas[1]), eps, weight_decay
        self.decay_norms, self.moments, self.clip = decay_norms, moments, clip
        self.schedule = schedule or LRSchedule(peak=lr)

    def build(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> AdamW:
        """The optimizer over these parameters; the groups carry their global names (``param_names``)."""
        return AdamW(
            self.split(named_parameters), self.lr, self.betas, self.eps, self.weight_decay, MOMENTS[self.moments]
        )

    def split(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Parameter groups: with weight decay, and without where there are any."""
        named = list(named_parameters)
        exempt = [] if self.decay_norms else [(name, param) for name, param in named if param.ndim < 2]
        decayed = [pair for pair in named if self.decay_norms or pair[1].ndim >= 2]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": exempt, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]
