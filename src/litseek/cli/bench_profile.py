"""Where a training step's time goes: kernels sorted into parts, each beside the least time that its work needs.

Parts are told by a kernel's name and by the operators that launched it; what matches nothing is "rest", so the parts and
"idle" add up to the step.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from litseek.cli.bench_floors import Floor, Rates, floors
from litseek.cli.bench_step import TrainingStep
from litseek.models.config import DeepSeekV3Config

OURS: tuple[tuple[str, str], ...] = (
    ("quantise", r"quanti[sz]e"),
    ("grouped GEMM", r"grouped_"),
    ("cross-entropy", r"cross_entropy|scale$"),
    ("permute, route", r"gate|permute|sort_by_expert|_layout|linear_float32"),
    ("norm, elementwise", r"norm|swiglu|mla_heads|rope"),
)
"""Parts of our own operators, which may hide their kernels' names; the first that fits counts."""
RULES: tuple[tuple[str, str, str], ...] = (
    # part, in the kernel's name, in the name of any operator around it; the first that fits counts
    (
        "optimizer",
        r"multi_tensor_apply|adamw|lpnorm|^_(squares|root_of_sum|count)$",
        r"^Optimizer\.step|litseek: optimizer",
    ),
    (
        "cross-entropy",
        r"cross_entropy|softmax|nll_loss",
        r"cross_?entropy|litseek: head|^_SumBackward|^_PerRowBackward",
    ),
    ("attention", r"sdpa|fmha|flash|attention|attn", r"scaled_dot_product|attention_backward"),
    ("quantise", r"quanti[sz]e", r"litseek::\w*quanti[sz]e"),
    ("grouped GEMM", r"grouped|GroupProblem|ptr_array", r"grouped_(mm|gemm|wgrad)"),
    ("rest", r"embedding", r"aten::embedding"),
    (
        "permute, route",
        r"permute|scatter|gather|(?<!with_)index|sort|radix|topk|cumsum|bincount|histogram|scan_|dispatch|combine|choose_experts|_layout|(^|_)gate(_|$)",
        r"permute|aten::(index|sort|argsort|topk|cumsum|bincount|scatter|gather|histc)|litseek::(gate|dispatch|combine|\w*layout)",
    ),
    (
        "dense GEMM",
        r"gemm|nvjet|cutlass|wgmma|matmul|cublas|splitK|triton_tem\w*_mm",
        r"^aten::(mm|addmm|bmm|_?scaled_mm\w*|matmul)$",
    ),
    (
        "copies, casts",
        r"memcpy|memset|copy_kernel|CatArray|FillFunctor|^triton_poi_fused_(_?(to_copy|t|transpose|view|clone|cat|zeros|slice|split|expand|permute)_?)+_\d+$",
        r"^aten::(copy_|_to_copy|to|clone|contiguous|fill_|zero_|cat)$",
    ),
    (
        "norm, elementwise",
        r"triton_|elementwise|reduce|norm|swiglu|rope",
        r"^aten::(add|mul|sum|mean|silu|sigmoid|rsqrt|pow|div)",
    ),
)
PARTS = (*dict.fromkeys(part for part, _, _ in RULES if part != "rest"), "rest")
_COMPILED = [(part, re.compile(a, re.IGNORECASE), re.compile(b, re.IGNORECASE)) for part, a, b in RULES]


@dataclass
class Kernel:
    """All launches of one kernel in one part, a step."""

    name: str
    part: str
    ms: float = 0.0
    count: float = 0.0


@dataclass
class Profile:
    """A step's time by part. ``total_ms`` is the unprofiled step, or the kernels' sum where that is more."""

    total_ms: float
    kernels: list[Kernel]
    floors: dict[str, Floor]
    rates: Rates
    parts: dict[str, float] = field(init=False)
    """Part -> ms; they and ``idle`` add up to ``total_ms``."""

    def __post_init__(self) -> None:
        self.parts = {part: sum(k.ms for k in self.kernels if k.part == part) for part in PARTS}
        self.total_ms = max(self.total_ms, sum(self.parts.values()))
        self.parts["idle"] = self.total_ms - sum(self.parts.values())

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Part -> {"ms", "floor_ms"}."""
        floor = {part: self.floors[part].ms if part in self.floors else 0.0 for part in self.parts}
        return {part: {"ms": round(ms, 3), "floor_ms": round(floor[part], 3)} for part, ms in self.parts.items()}

    def show(self, top: int) -> None:
        """Two tables: the parts against their floors, and the kernels that took most."""
        table = Table(title=f"one step: {self.rates}")
        for column in ("part", "ms", "share", "launches", "floor ms", "x floor", "floor"):
            table.add_column(column, justify="left" if column in ("part", "floor") else "right")
        for part, ms in self.parts.items():
            floor = self.floors.get(part)
            launches = sum(k.count for k in self.kernels if k.part == part)
            table.add_row(
                part, f"{ms:.2f}", f"{ms / self.total_ms:.1%}", f"{launches:.0f}",
                "" if floor is None else f"{floor.ms:.2f}",
                "" if floor is None or not floor.ms else f"{ms / floor.ms:.2f}",
                "" if floor is None else floor.what,
            )  # fmt: skip
        least = sum(floor.ms for floor in self.floors.values())
        launches = sum(k.count for k in self.kernels)
        table.add_section()
        table.add_row(
            "step", f"{self.total_ms:.2f}", "100.0%", f"{launches:.0f}", f"{least:.2f}", f"{self.total_ms / least:.2f}"
        )
        longest = Table(title=f"the {top} kernels that took most, a step")
        for column in ("ms", "launches", "part", "kernel"):
            longest.add_column(column, justify="left" if column in ("part", "kernel") else "right", no_wrap=True)
        for kernel in sorted(self.kernels, key=lambda k: -k.ms)[:top]:
            longest.add_row(f"{kernel.ms:.3f}", f"{kernel.count:g}", kernel.part, kernel.name[:110])
        console = Console(width=None if sys.stdout.isatty() else 165)
        console.print(table)
        console.print(longest, markup=False)


def profile_step(
    step: TrainingStep,
    cfg: DeepSeekV3Config,
    precision: str,
    tokens: int,
    seq_len: int,
    ms: float,
    steps: int,
    device: torch.device,
) -> Profile:
    """Profile ``steps`` calls of a warm ``step`` after one that starts the profiler; ``ms`` is its unprofiled median."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, acc_events=True):  # the first session pays for the profiler's own start
        step()
        _wait(device)
    with profile(activities=activities, acc_events=True) as prof:
        for _ in range(steps):
            step()
        _wait(device)
    kernels = _device_kernels(prof, steps) if device.type == "cuda" else _host_operators(prof, steps)
    rates = Rates.measure(device, precision)
    return Profile(ms, kernels, floors(cfg, precision, tokens, seq_len, rates), rates)


def classify(kernel: str, operators: Iterable[str] = ()) -> str:
    """The part of a kernel; ``operators`` are the names around its launch, innermost first."""
    names = list(operators)
    for name in names:
        if name.startswith("litseek::"):
            return next((part for part, fits in OURS if re.search(fits, name)), "rest")
    for part, of_kernel, of_operator in _COMPILED:
        if of_kernel.search(kernel) or any(of_operator.search(name) for name in names):
            return part
    return "rest"


def _device_kernels(prof: profile, steps: int) -> list[Kernel]:
    """Kernels, copies and fills of the GPU. Annotations span them and are left out."""
    events = {event.id: event for event in prof.events() if event.device_type == DeviceType.CPU}  # type: ignore[union-attr]
    found = []
    for event in prof.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.device_type() != DeviceType.CUDA or _annotation(event):
            continue
        around = _around(events.get(event.linked_correlation_id()))
        found.append((event.name(), around, event.duration_ns() / 1e6))
    return _sum(found, steps)


def _annotation(event: Any) -> bool:
    name = event.name()
    return event.is_user_annotation() or name.startswith(
        ("Optimizer.step", "Optimizer.zero_grad", "litseek: ", "ProfilerStep")
    )


def _host_operators(prof: profile, steps: int) -> list[Kernel]:
    """On a CPU every operator's own time takes the place of a kernel's."""
    found = [(event.name, _around(event), event.self_cpu_time_total / 1e3) for event in prof.events() or ()]
    return _sum(found, steps)


def _around(event: Any) -> tuple[str, ...]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return tuple(names)


def _sum(found: Sequence[tuple[str, tuple[str, ...], float]], steps: int) -> list[Kernel]:
    kernels: dict[tuple[str, str], Kernel] = {}
    for name, around, ms in found:
        part = classify(name, around)
        kernel = kernels.setdefault((name, part), Kernel(name, part))
        kernel.ms += ms / steps
        kernel.count += 1 / steps
    return list(kernels.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
