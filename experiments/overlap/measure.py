"""A step's time, and how much of its communication runs beside computation, on two ranks.

    torchrun --nproc-per-node 2 experiments/overlap/measure.py ep2_plain ep2_overlap [model=tiny precision=fp32 ...]

Words are arms of this folder, key=value are settings as `litseek train` takes them; `warmup=`, `steps=` and `out=` (a
folder) are this script's. Of each arm a row of results.csv, and on GPUs <arm>.json (the kernels of one step) and <arm>.png.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from litseek.cli.bench_step import TrainingStep, free
from litseek.cli.compose import compose, make
from litseek.parallel.transport import PeerToPeer

Spans = list[tuple[float, float]]
COLUMNS = (
    "arm",
    "settings",
    "device",
    "world",
    "step_ms",
    "tokens_per_s_per_gpu",
    "communication_ms",
    "hidden_share",
    "idle_share",
)


def union(spans: Spans) -> Spans:
    """Sorted, without overlaps."""
    merged: Spans = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def common(a: Spans, b: Spans) -> Spans:
    """Where both of two unions are."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def communicates(kernel: str) -> bool:
    """NCCL's, or those of `litseek_kernels.all_to_all` that write to other ranks or wait for them."""
    return "nccl" in kernel.lower() or kernel in ("_send_kernel", "_wait_kernel")


def kernels_of(trace: dict[str, Any]) -> dict[str, Spans]:
    """Lane -> spans in ms from the first kernel's start. Copies and fills count in neither lane.

    A communication kernel lasts from its launch, so its time holds the wait for the other rank.
    """
    kernels = [e for e in trace["traceEvents"] if e.get("cat") == "kernel"]
    begin = min(e["ts"] for e in kernels)
    lanes: dict[str, Spans] = {"compute": [], "communication": []}
    for e in kernels:
        lane = "communication" if communicates(e["name"]) else "compute"
        lanes[lane].append(((e["ts"] - begin) / 1e3, (e["ts"] + e["dur"] - begin) / 1e3))
    return lanes


def shares(lanes: dict[str, Spans]) -> dict[str, float]:
    """Of the step from its first kernel to its last one's end."""
    compute, talk = union(lanes["compute"]), union(lanes["communication"])
    whole = max(end for _, end in compute + talk)
    hidden = length(common(compute, talk)) / length(talk) if talk else 0.0
    return {
        "communication_ms": length(talk),
        "hidden_share": hidden,
        "idle_share": 1 - length(compute) / whole,
    }


def draw(ranks: list[dict[str, Spans]], title: str, file: Path) -> None:
    """Two lanes a rank. Each rank's time starts at its own first kernel."""
    figure = Figure(figsize=(14, 0.9 + 0.8 * len(ranks)), layout="constrained")
    axes = figure.add_subplot()
    names = [f"rank {rank} {lane}" for rank in range(len(ranks)) for lane in ("compute", "communication")]
    for row, name in enumerate(names):
        lane = name.split()[-1]
        bars = [(start, end - start) for start, end in union(ranks[row // 2][lane])]
        axes.broken_barh(bars, (row - 0.4, 0.8), color="#3d5a98" if lane == "compute" else "#c4553b")
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="ms", title=title, ylim=(len(names) - 0.5, -0.5))
    FigureCanvasAgg(figure).print_png(str(file))


def profiled(step: TrainingStep, device: torch.device) -> dict[str, Spans]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        return kernels_of(json.loads(file.read_text(encoding="utf-8")))


def timed(
    step: TrainingStep, warmup: int, steps: int, device: torch.device, clear: Callable[[], None]
) -> tuple[float, float]:
    """Median ms of steps that all ranks start together, and the last one's; ``clear`` is called before each."""
    found = []
    for _ in range(warmup + steps):
        dist.barrier()
        clear()
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(found[warmup:]), found[-1]


class Waits:
    """On a CPU: the seconds in which this rank of a pipeline waited for the other, since `clear`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("arrived", "finish"):
            setattr(PeerToPeer, name, self._timed(getattr(PeerToPeer, name)))

    def clear(self) -> None:
        self.seconds = 0.0

    def _timed(self, wait: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return wait(*args)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


def main() -> None:
    arms = [word for word in sys.argv[1:] if "=" not in word]
    words = [word for word in sys.argv[1:] if "=" in word]
    own = {"warmup": "3", "steps": "10", "out": str(Path(__file__).parent)}
    own |= {key: value for key, _, value in (w.partition("=") for w in words) if key in own}
    settings = [word for word in words if word.partition("=")[0] not in own]
    cuda, local = torch.cuda.is_available(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    waits = Waits()
    for arm in arms:
        measure(arm, settings, own, device, waits)
        free()
    dist.destroy_process_group()


def measure(arm: str, settings: list[str], own: dict[str, str], device: torch.device, waits: Waits) -> None:
    cfg = compose("train", (f"experiment=overlap/{arm}", *settings)).cfg
    world, warmup, steps = int(os.environ["WORLD_SIZE"]), int(own["warmup"]), int(own["steps"])
    if cfg.stage.batch % world:
        sys.exit(f"stage.batch={cfg.stage.batch} is not a multiple of the {world} ranks.")
    shape = dict(batch=cfg.stage.batch // world, micro_batch=cfg.stage.micro_batch, seq_len=cfg.data.seq_len)
    parts = [make(part) for part in (cfg.model, cfg.precision, cfg.optim, cfg.strategy)]
    step = TrainingStep(*parts, **shape, device=device, compile=cfg.stage.compile)
    step.prepare(warmup + steps + 1)
    cuda = device.type == "cuda"
    ms, last = timed(step, warmup, steps, device, waits.clear)
    row: dict[str, Any] = {"arm": arm, "settings": " ".join(settings), "world": world, "step_ms": round(ms, 3)}
    row["device"] = torch.cuda.get_device_name(device) if cuda else "cpu"
    row["tokens_per_s_per_gpu"] = round(cfg.stage.batch * cfg.data.seq_len / ms * 1e3 / world)
    ranks: list[Any] = [None] * world
    dist.all_gather_object(ranks, profiled(step, device) if cuda else waits.seconds)
    if dist.get_rank() == 0:
        out = Path(own["out"])
        out.mkdir(parents=True, exist_ok=True)
        if cuda:
            each = [shares(lanes) for lanes in ranks]
            row |= {key: round(statistics.mean(found[key] for found in each), 4) for key in each[0]}
            (out / f"{arm}.json").write_text(json.dumps(ranks), encoding="utf-8")
            draw(ranks, f"{arm}: one step, {ms:.1f} ms unprofiled", out / f"{arm}.png")
        elif step.strategy.pp > 1:
            row["idle_share"] = round(statistics.mean(ranks) / last * 1e3, 4)
        file, new = out / "results.csv", not (out / "results.csv").is_file()
        with file.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, COLUMNS)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
