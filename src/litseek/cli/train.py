"""`litseek train`: build one stage from its configuration, run it to its end, and leave a receipt."""

from __future__ import annotations

import logging
import netrc
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import wandb
from omegaconf import DictConfig, OmegaConf

from litseek.callbacks import MetricsCSV
from litseek.cli import receipt as receipts
from litseek.cli.compose import make
from litseek.cli.folder import Attempt, begin, finished
from litseek.cli.say import is_zero, say
from litseek.cli.watch import Watch, connect
from litseek.parallel import preempt
from litseek.parallel.checkpoint import CheckpointRef, resolve_checkpoint

SHOWN = (
    ("bits per byte", "val/bits_per_byte", "gzip", "val/gzip_bits_per_byte"),
    ("accuracy", "eval/accuracy", "before", "eval/accuracy_before"),
)
"""Metrics of the closing line, each with what it is to be compared with."""


def run(cfg: DictConfig) -> None:
    """One stage, and one line at the end that says where it lies and what it reached."""
    result = train(cfg)
    say(summary(Path(cfg.run_dir) / cfg.stage.name, result))


def train(cfg: DictConfig, rerun: str | None = None) -> dict[str, Any]:
    """Train the stage unless its receipt matches; return the receipt.

    `rerun` names a request to train anew what matches too; a folder that this request already made is gone on with.
    Errors: Preempted when SIGTERM stopped it, with a checkpoint to go on from.
    """
    connect()
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    folder = Path(cfg.run_dir) / cfg.stage.name
    parent = None if cfg.init_from is None else resolve_checkpoint(cfg.init_from)
    parent_digest = None if parent is None else parent.digest
    if (done := finished(folder, config, parent_digest, rerun)) is not None:
        say(f"{folder}: finished and nothing changed; skipped.")
        return done
    _quieten()
    objects = construct(cfg)
    prepare(objects, cfg, parent)
    attempt = begin(folder, config, parent_digest, rerun)
    return _fit(cfg, config, objects, attempt, parent_digest)


def check(cfg: DictConfig) -> None:
    """Values that contradict each other, found by the constructors; nothing is read, written or trained."""
    construct(cfg)


def construct(cfg: DictConfig) -> dict[str, Any]:
    """The stage without weights or data, the callbacks and the strategy. Every constructor checks its own values."""
    allowed = {
        "max_steps": lambda n: n != 0,
        "limit_train_batches": lambda n: n != 0,
        "accumulate_grad_batches": lambda n: n == 1,
    }
    for key, fits in allowed.items():
        if (value := cfg.trainer.get(key)) is not None and not fits(value):
            why = "nothing would be trained" if value == 0 else "a step is one global batch, so only 1 is supported"
            raise ValueError(f"trainer.{key}={value}: {why}.")
    parts = {key: make(cfg[key]) for key in ("model", "precision", "optim", "data")}
    return {
        "stage": make(cfg.stage, **parts, seed=cfg.seed),
        "callbacks": {name: make(node) for name, node in cfg.callbacks.items() if wanted(cfg, node)},
        "strategy": make(cfg.strategy),
    }


def wanted(cfg: DictConfig, node: DictConfig | None) -> bool:
    """Callbacks set to null are left out, and the progress bar where the trainer shall have none."""
    bar = node is not None and node._target_.endswith(".Progress")
    return node is not None and not (bar and cfg.trainer.get("enable_progress_bar") is False)


def prepare(objects: dict[str, Any], cfg: DictConfig, parent: CheckpointRef | None) -> None:
    """The parent's weights and the data: what can still be refused before the stage's folder is touched."""
    pl.seed_everything(cfg.seed, verbose=False)
    if parent is not None:
        objects["stage"].start_from(parent)
    if is_zero():
        objects["stage"].prepare_data()


def _fit(
    cfg: DictConfig, config: dict[str, Any], objects: dict[str, Any], attempt: Attempt, parent: str | None
) -> dict[str, Any]:
    """Lightning's fit from the last checkpoint; the stage's own results at its end make the receipt."""
    folder, stage = attempt.folder, objects["stage"]
    trainer = make(
        cfg.trainer,
        default_root_dir=str(folder),
        callbacks=[Watch(), *objects["callbacks"].values()],
        strategy=objects["strategy"],
        logger=loggers(cfg, config, folder, attempt.wandb_id),
    )
    started = time.monotonic()
    try:
        trainer.fit(stage, ckpt_path=None if attempt.resume is None else str(attempt.resume))
        spent = attempt.spent_s + time.monotonic() - started
        result: dict[str, Any] = {}
        if trainer.is_global_zero:
            result = receipts.write_receipt(folder, config, parent, stage.tokens_seen, spent, stage.results)
        result, stop = trainer.strategy.broadcast((result, preempt.requested()))
        preempt.agree(stop)  # too late for this stage; a pipeline stops before the next one
        trainer.strategy.team.close()
        return result
    except SystemExit:  # what Lightning makes of Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    finally:
        _close_wandb(failed=not (folder / receipts.RECEIPT).is_file())


def loggers(cfg: DictConfig, config: dict[str, Any], folder: Path, wandb_id: str) -> list[Any]:
    """The configured loggers, told which run this is. W&B goes offline unless someone is logged in."""
    made: list[Any] = [MetricsCSV(folder)]
    for node in cfg.logger.values():
        if node is None:
            continue
        extra: dict[str, Any] = {"save_dir": str(folder)}
        if node["_target_"].endswith("WandbLogger"):
            os.environ.setdefault("WANDB_SILENT", "true")
            if not wandb_login():
                os.environ.setdefault("WANDB_MODE", "offline")
            wandb.setup()  # reads it; otherwise the first warning comes before
            extra |= {
                "id": wandb_id,
                "group": group(cfg),
                "name": f"{group(cfg)}/{cfg.stage.name}",
                "job_type": cfg.stage.name,
                "offline": not wandb_login(),
                "config": config,
            }
            if cfg.experiment:
                extra["name"] = f"{cfg.experiment}/seed={cfg.seed}"
        made.append(make(node, **{key: value for key, value in extra.items() if key not in node}))
    return made


def group(cfg: DictConfig) -> str:
    """One W&B group for an experiment's arms and seeds, and one for all stages of a run folder."""
    return str(cfg.experiment).split("/")[0] if cfg.experiment else Path(cfg.run_dir).as_posix().removeprefix("runs/")


def summary(folder: Path, result: dict[str, Any]) -> str:
    """`runs/demo/sft: 1,200,000 tokens in 80 s, accuracy 0.41 (before 0.02)`."""
    line = f"{folder}: {result['tokens']:,} tokens in {result['wall_s']:.0f} s"
    metrics = result["metrics"]
    for label, value, name, beside in SHOWN:
        if value in metrics:
            line += f", {label} {metrics[value]:.3f}"
            line += f" ({name} {metrics[beside]:.3f})" if beside in metrics else ""
    return line


def wandb_login() -> bool:
    """Whether W&B has a key, from the environment or from `wandb login`; WANDB_MODE=offline wins."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _close_wandb(failed: bool) -> None:
    """So that the next stage of this process gets a run of its own."""
    if wandb.run is not None:
        wandb.finish(exit_code=int(failed))


def _quieten() -> None:
    """Lightning's hints are for its own API's users; what our users must know we say ourselves."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", module=r"torch\..*")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
