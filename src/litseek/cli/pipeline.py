"""`litseek pipeline`: the stages in order, each from its parent's checkpoint, then a report and a sample.

Stages run in this process one after the other, so killing the command kills the stage, and the same command again skips
what is finished and goes on in what is not. SIGTERM stops the stage after its step, with a checkpoint, and the command with it.
"""

from __future__ import annotations

import importlib
import secrets
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from litseek.cli import compose, train
from litseek.cli.overrides import parse
from litseek.cli.receipt import read_receipt
from litseek.cli.say import is_zero, say
from litseek.parallel import preempt
from litseek.parallel.checkpoint import CheckpointRef, check_same_model

RERUN = ".rerun"
"""File in the run folder that names a request to run again which is not done yet."""


def run(cfg: DictConfig) -> None:
    """`cfg.jobs` holds each stage's configuration, composed and checked before the first one starts."""
    for name in cfg.jobs:
        read_receipt(Path(cfg.run_dir) / name)  # a damaged one stops here, not after hours in front of it
    request = rerun_request(Path(cfg.run_dir), cfg.start)
    asked = False
    for name, job in cfg.jobs.items():
        asked = asked or name == cfg.start
        result = train.train(job, request if asked else None)
        say(train.summary(Path(cfg.run_dir) / name, result))
        if preempt.requested():
            raise preempt.stopped(f"stage {name}")
    if is_zero():
        (Path(cfg.run_dir) / RERUN).unlink(missing_ok=True)
        finish(cfg)


def check(cfg: DictConfig) -> None:
    """Every stage's values, alone and against its parent's, so that the last one's mistake stops before the first trains."""
    parent = None
    for name, job in cfg.jobs.items():
        stage = train.construct(job)["stage"]
        if parent is not None:
            check_same_model(stage.cfg, CheckpointRef(Path(str(job.init_from)), released=False, config=parent.cfg))
            if not stage.owns_rope:
                rope = {key: getattr(parent.cfg, key) for key in ("rope_scaling", "max_position_embeddings")}
                stage.cfg = stage.cfg.replace(**rope)
                try:
                    stage.check_length()
                except ValueError as error:
                    raise ValueError(f"stage={name}: {error}") from error
        parent = stage


def rerun_request(run_dir: Path, start: str | None) -> str | None:
    """A name for this request to run again from `start`, the same one until it is done: a killed one is gone on with."""
    if start is None:
        return None
    path = run_dir / RERUN
    if path.is_file() and path.read_text(encoding="utf-8").startswith(f"start={start} "):
        return path.read_text(encoding="utf-8")
    request = f"start={start} {secrets.token_hex(8)}"
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(request, encoding="utf-8")
    return request


def finish(cfg: DictConfig) -> None:
    """The report page, and what the trained model says to `prompt`."""
    if cfg.report:
        call("report", folder=str(cfg.run_dir))
    if cfg.sample:
        print(f"\n{cfg.prompt}")
        call("generate", checkpoint=str(cfg.run_dir), prompt=str(cfg.prompt))


def call(command: str, **settings: Any) -> None:
    """Another command with its defaults and these settings."""
    request = parse([f"{key}={value}" for key, value in settings.items()])
    importlib.import_module(f"litseek.cli.{command}").run(compose.compose(command, request.overrides).cfg)
