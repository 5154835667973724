"""`litseek bench`: how fast this machine trains, in one table, with one JSON line a row and a CSV that remembers."""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from litseek import __version__
from litseek.callbacks.throughput import peak_tflops
from litseek.cli import receipt
from litseek.cli.bench_peers import PEERS, require
from litseek.cli.bench_profile import Profile, profile_step
from litseek.cli.bench_slice import BlocksStep
from litseek.cli.bench_step import Timing, TrainingStep, free, time_steps
from litseek.cli.compose import conf_dir, make
from litseek.cli.errors import Usage
from litseek.cli.generate import pick_device
from litseek.cli.say import is_zero
from litseek.errors import LitseekError
from litseek.models.config import DeepSeekV3Config

COLUMNS = (
    *(
        "what",
        "model",
        "implementation",
        "layout",
        "precision",
        "batch",
        "seq_len",
        "micro_batch",
        "compile",
        "recompute",
    ),
    *("tokens_per_s", "ms", "model_tflops", "mfu", "peak_gib", "ratio", "value", "note", "parts"),
    *("gpu", "torch", "triton", "litseek", "commit", "date"),
)
"""Of results.csv. `ratio`: our tokens/s, in the first of `precisions`, over the peer's. `value`: the last loss. `parts`: a profile's, as JSON."""
TITLES = {
    "step": "training step: forward, backward, clip, optimizer, bias update",
    "slice": "forward and backward of MoE blocks: no network, no bubble",
    "profile": "training step",
}


def run(cfg: DictConfig) -> None:
    """Measure, print, append. Raises LitseekError at the end if a row could not be measured."""
    if cfg.what == "kernels":
        return _kernels(cfg)
    device = pick_device(cfg.device)
    rows = []
    for row in _rows(cfg, device):
        rows.append(about(cfg, device) | row)
        if is_zero():
            print(json.dumps(rows[-1]), flush=True)
            append([rows[-1]], Path(cfg.results or "results.csv").expanduser())
    if is_zero():
        show(rows, TITLES[cfg.what])
    if failed := [row for row in rows if row["ms"] is None]:
        names = ", ".join(f"{row['implementation']} {row['precision']} batch {row['batch']}" for row in failed)
        raise LitseekError(f"not measured: {names}: {failed[0]['note']}")


def check(cfg: DictConfig) -> None:
    """What can be refused before the first measurement: names, sizes, peers that are not installed."""
    if cfg.what == "kernels":
        runner = _runner()
        if unknown := sorted(set(cfg.ops) - set(runner.names())):
            raise Usage.nearest(f"ops names '{unknown[0]}'", unknown[0], runner.names())
        if not runner.has_gpu():
            raise LitseekError("what=kernels times on a GPU, and torch finds none here.")
        return
    for key in ("batch", "precisions"):
        if not numbers(cfg, key):
            raise Usage(f"{key}=[] is empty: nothing would be measured.")
    model = make(cfg.model)
    for name in numbers(cfg, "precisions"):
        _precision(name)
    for batch in numbers(cfg, "batch"):
        micro = cfg.micro_batch or batch
        if not isinstance(batch, int) or batch < 1 or batch % micro:
            raise Usage(f"batch={batch} must be at least 1 and a multiple of micro_batch={micro}.")
    for key, least in (("steps", 1), ("warmup", 0), ("seq_len", 1)):
        if not isinstance(cfg[key], int) or cfg[key] < least:
            raise Usage(f"{key}={cfg[key]} must be an integer of at least {least}.")
    for name in cfg.vs:
        if name not in PEERS:
            raise Usage.nearest(f"vs names '{name}'", name, PEERS)
        if cfg.what != "step":
            raise Usage(f"vs={list(cfg.vs)} goes with what=step only: peers have no what={cfg.what}.")
        require(name, model)
    pick_device(cfg.device)
    make(cfg.optim), make(cfg.strategy)


def layout(strategy: DictConfig) -> str:
    """In words: "one rank", "ep 2 on 2 ranks"; `batch` and tokens/s are one rank's."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    words = [f"{axis} {strategy[axis]}" for axis in ("pp", "ep") if strategy[axis] > 1]
    words += [strategy.schedule] if strategy.schedule else []
    words += ["overlap"] if strategy.overlap else []
    return f"{' '.join(words)} on {ranks} ranks".strip() if ranks > 1 else " ".join(words) or "one rank"


def numbers(cfg: DictConfig, key: str) -> list[Any]:
    """`batch=4` is `batch=[4]`."""
    return list(cfg[key]) if OmegaConf.is_list(cfg[key]) else [cfg[key]]


def _rows(cfg: DictConfig, device: torch.device) -> Iterator[dict[str, Any]]:
    """Ours in every precision, then the peers, for each batch."""
    model = make(cfg.model)
    for batch in numbers(cfg, "batch"):
        rates = {}
        for name in numbers(cfg, "precisions"):
            row = _guarded(_ours, cfg, model, name, batch, device)
            rates[name] = row["tokens_per_s"]
            yield row
        for peer in cfg.vs:
            row = _guarded(_peer, cfg, model, peer, batch, device)
            if row["tokens_per_s"]:
                times = {name: rate / row["tokens_per_s"] for name, rate in rates.items() if rate}
                row["ratio"] = next(iter(times.values()), None)
                row["note"] += "".join(f"; ours in {name} is {x:.3f} times as fast" for name, x in times.items())
            yield row


def _guarded(
    measure: Any, cfg: DictConfig, model: DeepSeekV3Config, name: str, batch: int, device: torch.device
) -> Any:
    """`measure`'s row, or one that says that memory did not suffice; either way nothing of it stays in memory."""
    ours = measure is _ours
    row: dict[str, Any] = {
        "implementation": "litseek" if ours else name,
        "precision": name if ours else "bf16",
        "batch": batch,
    }
    blank = dict.fromkeys(("tokens_per_s", "ms", "model_tflops", "mfu", "peak_gib", "value"))
    left = torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    try:
        row |= {"note": ""} | measure(cfg, model, name, batch, device)
        if left > 0.1:  # it counts in peak_gib, so a row must not hide it
            row["note"] += f"; {left:.1f} GiB were held before it began"
        return row
    except torch.OutOfMemoryError as error:
        return row | blank | {"note": f"out of memory: {str(error).split('. ')[0]}"}
    finally:
        free()


def _ours(cfg: DictConfig, model: DeepSeekV3Config, name: str, batch: int, device: torch.device) -> dict[str, Any]:
    shape = dict(batch=batch, micro_batch=cfg.micro_batch or batch, seq_len=cfg.seq_len, device=device, seed=cfg.seed)
    options: dict[str, Any] = shape | dict(compile=cfg.compile, recompute=cfg.recompute)
    tokens = batch * cfg.seq_len
    if cfg.what == "slice":
        blocks = BlocksStep(model, _precision(name), make(cfg.strategy), **options)
        timing = time_steps(blocks, cfg.warmup, cfg.steps, device)
        row = rates(timing, tokens, blocks.flops_per_token(), device)
        row["tokens_per_s"] *= model.num_hidden_layers / cfg.slice.layers
        return row | {"note": f"{model.num_hidden_layers} of {cfg.slice.layers} layers: no network, no bubble"}
    step = TrainingStep(model, _precision(name), make(cfg.optim), make(cfg.strategy), **options)
    profiled = cfg.profile.steps if cfg.what == "profile" else 0
    step.prepare(cfg.warmup + cfg.steps + profiled + min(profiled, 1))
    timing = time_steps(step, cfg.warmup, cfg.steps, device)
    row = rates(timing, tokens, model.flops_per_token(cfg.seq_len), device)
    if profiled:
        found: Profile = profile_step(step, model, name, tokens, cfg.seq_len, timing.ms, profiled, device)
        found.show(cfg.profile.top)
        row["parts"] = found.as_dict()
    return row


def _peer(cfg: DictConfig, model: DeepSeekV3Config, name: str, batch: int, device: torch.device) -> dict[str, Any]:
    step = PEERS[name](model, batch, cfg.seq_len, device, cfg.compile, cfg.seed)
    timing = time_steps(step, cfg.warmup, cfg.steps, device)
    return rates(timing, batch * cfg.seq_len, model.flops_per_token(cfg.seq_len), device) | {"note": step.about}


def rates(timing: Timing, tokens: int, flops_per_token: float, device: torch.device) -> dict[str, Any]:
    """Tokens and model FLOPs a second; MFU against the dense BF16 peak of a known GPU, whatever the precision."""
    tokens_per_s = tokens / timing.ms * 1e3
    tflops, peak = tokens_per_s * flops_per_token / 1e12, peak_tflops(device)
    return {
        "tokens_per_s": tokens_per_s,
        "ms": timing.ms,
        "model_tflops": tflops,
        "mfu": None if peak is None else tflops / peak,
        "peak_gib": timing.peak_gib,
        "value": timing.value,
    }


def about(cfg: DictConfig, device: torch.device) -> dict[str, Any]:
    """What every row says of the machine and the setting."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU: {receipt.device()}"
    recompute = ["norms"] * bool(cfg.recompute) + list(cfg.strategy.recompute)
    return {
        "what": cfg.what,
        "model": model_name(OmegaConf.to_container(cfg.model, resolve=True)),  # type: ignore[arg-type]
        "layout": layout(cfg.strategy),
        "seq_len": cfg.seq_len,
        "micro_batch": cfg.micro_batch,
        "compile": bool(cfg.compile),
        "recompute": " ".join(recompute) or "none",
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "litseek": __version__,
        "commit": receipt.commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def model_name(fields: dict[str, Any]) -> str:
    """The file of conf/model that this is, or is nearest to, and what was changed: `yardstick num_hidden_layers=2`."""
    files: dict[str, dict[str, Any]] = {
        path.stem: OmegaConf.to_container(OmegaConf.load(path))  # type: ignore[misc]
        for path in (conf_dir() / "model").glob("*.yaml")
    }
    changes = {
        name: [
            f"{key}={fields.get(key)}"
            for key in sorted(file.keys() | fields.keys())
            if file.get(key) != fields.get(key)
        ]
        for name, file in files.items()
    }
    nearest = min(changes, key=lambda name: (len(changes[name]), name))
    return " ".join([nearest, *changes[nearest]])


def append(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Rows at the end of a CSV file with these columns; another file's columns are refused."""
    fresh = not path.exists()
    if not fresh:
        header = path.open(encoding="utf-8").readline().strip()
        if header != ",".join(COLUMNS):
            raise LitseekError(f"{path}: its columns are not those of litseek bench; give another file as results=…")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for row in rows:
            cells = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow(cells | {"parts": json.dumps(row["parts"]) if row.get("parts") else ""})


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    """The rows as a table."""
    first = rows[0]
    table = Table(
        title=f"{title}\n{first['model']}, {first['layout']}, sequences of {first['seq_len']}, {first['gpu']}, torch {first['torch']}"
    )
    for column in ("", "batch", "tokens/s", "ms a step", "model TFLOP/s", "MFU", "peak GiB", "ours / it", "note"):
        table.add_column(column, justify="left" if column in ("", "note") else "right")
    for row in rows:
        cells = (
            f"{row['implementation']} {row['precision']}", str(row["batch"]), _text(row["tokens_per_s"], ",.0f"),
            _text(row["ms"], ".1f"), _text(row["model_tflops"], ".1f"), _text(row["mfu"], ".3f"),
            _text(row["peak_gib"], ".1f"), _text(row.get("ratio"), ".3f"), row["note"],
        )  # fmt: skip
        table.add_row(*cells)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _precision(name: str) -> Any:
    """conf/precision/<name>.yaml as an object; every row gets its own."""
    folder = conf_dir() / "precision"
    if not (folder / f"{name}.yaml").is_file():
        raise Usage.nearest(f"precisions names '{name}'", str(name), {path.stem for path in folder.glob("*.yaml")})
    return make(OmegaConf.load(folder / f"{name}.yaml"))  # type: ignore[arg-type]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _kernels(cfg: DictConfig) -> None:
    runner = _runner()
    results = Path(cfg.results).expanduser() if cfg.results else runner.RESULTS
    if runner.run(list(cfg.ops), results):
        raise LitseekError(f"some of kernels/bench failed: {results} says which and why.")


def _runner() -> Any:
    """kernels/bench/run.py, which works without litseek too."""
    path = conf_dir().parent / "kernels" / "bench" / "run.py"
    if not path.is_file():
        raise LitseekError(f"{path} is missing: what=kernels needs the repository, not only the installed package.")
    spec = importlib.util.spec_from_file_location("kernels_bench_run", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
