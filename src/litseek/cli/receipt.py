"""What a stage's folder says about itself: receipt.json when it is finished, session.json while it is not.

The receipt's `config` hash covers what changes the result. Logger, callbacks, paths and progress do not count.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import litseek
from litseek import __version__
from litseek.errors import LitseekError
from litseek.parallel.storage import replace_text

RECEIPT, SESSION, CONFIG = "receipt.json", "session.json", "config.yaml"

IMMATERIAL = {
    *("run_dir", "init_from", "experiment", "preset", "debug", "logger", "callbacks", "stage.cache_dir"),
    *("stage.checkpoint_every", "stage.checkpoint_keep"),
    *(
        "cluster",
        "strategy",
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.accelerator",
    ),  # a checkpoint fits every layout
    *("trainer.default_root_dir", "trainer.enable_progress_bar", "trainer.enable_model_summary"),
    *("trainer.log_every_n_steps", "trainer.profiler", "trainer.num_sanity_val_steps"),
}
"""Dotted keys that do not change a stage's result. The parent counts by its checkpoint's digest, not by its path."""

PACKAGES = ("torch", "lightning", "numpy", "tokenizers", "datasets", "wandb", "hydra-core", "omegaconf")


def material(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a resolved configuration that matters, as flat dotted keys."""
    flat = {}
    for key, value in _flat(config):
        parts = key.split(".")
        if not any(".".join(parts[:i]) in IMMATERIAL for i in range(1, len(parts) + 1)):
            flat[key] = value
    return flat


def digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(material(config), sort_keys=True).encode()).hexdigest()


def difference(folder: Path, config: Mapping[str, Any], parent: str | None) -> str | None:
    """Why the folder's content is not what `config` and `parent` ask for, or None when it is.

    Errors: LitseekError naming a file of the folder that cannot be read.
    """
    old = material(_load(folder / CONFIG, yaml.safe_load))
    new = material(config)
    changed = [
        key for key in [*old, *(k for k in new if k not in old)] if old.get(key, "unset") != new.get(key, "unset")
    ]
    if changed:
        first = changed[0]
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return f"{first} was {old.get(first, 'unset')}, now {new.get(first, 'unset')}{more}"
    session = read_session(folder)
    if session.get("parent") != parent:
        return "its parent's checkpoint changed"
    return None


def read_receipt(folder: Path) -> dict[str, Any] | None:
    return _load(folder / RECEIPT, json.loads) if (folder / RECEIPT).is_file() else None


def read_session(folder: Path) -> dict[str, Any]:
    """W&B id, digest of the parent, and the seconds that earlier attempts took."""
    return _load(folder / SESSION, json.loads) if (folder / SESSION).is_file() else {}


def write_session(folder: Path, session: Mapping[str, Any]) -> None:
    write_json(folder / SESSION, session)


def write_receipt(
    folder: Path,
    config: Mapping[str, Any],
    parent: str | None,
    tokens: int,
    wall_s: float,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """The stage is finished from here on."""
    receipt = {
        "stage": folder.name,
        "config": digest(config),
        "parent": parent,
        "commit": commit(),
        "versions": versions(),
        "device": device(),
        "tokens": tokens,
        "wall_s": round(wall_s, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "metrics": dict(sorted(metrics.items())),
    }
    write_json(folder / RECEIPT, receipt)
    return receipt


def write_json(path: Path, content: Any) -> None:
    """All of it or nothing."""
    replace_text(path, json.dumps(content, indent=2))


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    fresh = folder / f".{CONFIG}.new"
    fresh.write_text(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    fresh.replace(folder / CONFIG)


def commit() -> str | None:
    """Of the repository that the package is run from, '+changes' when its tracked files differ; None in a wheel."""
    top = Path(litseek.__file__).resolve().parents[2]
    if not (top / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=top, capture_output=True, text=True, check=True, timeout=20
        )
        diff = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=top, capture_output=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("" if diff.returncode == 0 else "+changes")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "litseek": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> str:
    """What the stage ran on: the GPU's name, or the processor's with the threads that torch uses."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def _load(path: Path, parse: Any) -> Any:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LitseekError(f"{path}: missing; remove {path.parent} to start the stage afresh.") from None
    except (ValueError, yaml.YAMLError) as error:
        raise LitseekError(f"{path}: damaged ({str(error).splitlines()[0]}).") from error
    if not isinstance(content, dict):
        raise LitseekError(f"{path}: damaged, it should hold a mapping.")
    return content


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key in node:
            yield from _flat(node[key], f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node
