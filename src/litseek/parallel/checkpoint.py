"""Where weights come from: a run, a stage, a checkpoint or a released-format folder; and putting them into a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litseek.errors import LitseekError
from litseek.models.config import DeepSeekV3Config
from litseek.models.hf import load_pretrained
from litseek.models.hf_config import config_from_json, read_json
from litseek.models.hf_files import INDEX
from litseek.models.hf_layout import parameter_shapes
from litseek.models.transformer import Transformer, build
from litseek.parallel import storage
from litseek.parallel.agree import Group, every
from litseek.parallel.pieces import Piece, Stored
from litseek.parallel.released import load_released

STAGES = ("pretrain", "context_32k", "context_128k", "sft", "grpo")
"""The lineage's order, in which a run's last finished stage is looked for."""
FREE = (
    *("max_position_embeddings", "rope_scaling", "aux_loss_alpha", "aux_loss_reduction", "seq_aux", "mtp_aux_loss"),
    *("initializer_range", "num_nextn_predict_layers", "group_score_experts", "bos_token_id", "eos_token_id"),
    *("num_key_value_heads",),
)
"""Configuration fields that may differ between a checkpoint and the model that takes its weights."""


@dataclass(frozen=True)
class CheckpointRef:
    """Weights on disk, found but not read yet."""

    path: Path
    released: bool
    """In the released format instead of our own."""
    config: DeepSeekV3Config
    stage: str | None = None
    """Which stage wrote it, when one did."""

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer.json, where it has one."""
        path = self.path / storage.TOKENIZER
        return path if path.is_file() else None

    @property
    def seq_len(self) -> int | None:
        """Length of the rows that its stage trained on, where one of ours wrote it."""
        if self.released:
            return None
        state = json.loads((self.path / storage.STATE).read_text(encoding="utf-8"))
        return state.get("stage", {}).get("seq_len")

    @property
    def digest(self) -> str:
        """Changes with the content: of our manifest (all files' sha256), or of a released folder's names, sizes and JSON."""
        if not self.released:
            return hashlib.sha256((self.path / storage.MANIFEST).read_bytes()).hexdigest()
        digest = hashlib.sha256()
        for path in sorted(self.path.iterdir()):
            if path.suffix in (".json", ".safetensors"):
                digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            if path.suffix == ".json":
                digest.update(path.read_bytes())
        return digest.hexdigest()


def resolve_checkpoint(path: str | Path) -> CheckpointRef:
    """What ``init_from`` and ``checkpoint`` name: a run folder (its last finished stage), a stage folder (its newest
    checkpoint), a checkpoint, or a released-format folder. Errors: LitseekError in one sentence."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise LitseekError(f"{folder}: no such checkpoint, stage or run folder.")
    if (folder / storage.MANIFEST).is_file():
        return _own(folder)
    if (folder / "checkpoints").is_dir():
        newest = storage.last(folder / "checkpoints")
        if newest is None:
            raise LitseekError(f"{folder / 'checkpoints'}: no finished checkpoint in it yet.")
        return _own(newest)
    finished = [name for name in STAGES if (folder / name / "receipt.json").is_file()]
    if finished:
        return resolve_checkpoint(folder / finished[-1])
    if (folder / storage.CONFIG).is_file() and (any(folder.glob("*.safetensors")) or (folder / INDEX).is_file()):
        config = config_from_json(read_json(folder / storage.CONFIG), folder / storage.CONFIG)
        return CheckpointRef(folder, True, config)
    begun = [name for name in STAGES if (folder / name).is_dir()]
    if begun:
        raise LitseekError(
            f"{folder}: no stage of this run has finished; give {folder / begun[-1]} for its newest checkpoint."
        )
    raise LitseekError(
        f"{folder}: neither a run, a stage, a checkpoint ({storage.MANIFEST}) nor released weights "
        f"({storage.CONFIG} and *.safetensors)."
    )


def load_weights(target: Any, ref: CheckpointRef) -> None:
    """Fill a Transformer, or a stage (which also takes over the parent's tokenizer and rotary settings).

    Errors: LitseekError naming the configuration key or the parameter that does not fit, or the damaged file.
    """
    if not isinstance(target, Transformer):
        target.start_from(ref)
        target.configure_model()
        return
    fill(target.cfg, {name: Piece.whole(tensor) for name, tensor in target.state_dict().items()}, ref)


def fill(cfg: DeepSeekV3Config, parameters: Mapping[str, Piece], ref: CheckpointRef, group: Group = None) -> None:
    """Weights into ``parameters`` (global name -> what this rank holds of it), of which a model ``cfg`` may lack some.

    Of the files a rank reads its own rows only; the ranks of ``group`` check them together. Errors as `load_weights`, on
    every rank the same.
    """
    check_same_model(cfg, ref)
    if ref.released:
        load_released(ref.path, parameters, group)
        return
    storage.verify(ref.path, group)
    every(lambda: _fill(cfg, parameters, ref), group)


def load_model(ref: CheckpointRef, precision: Any = None) -> Transformer:
    """A model built and filled from the checkpoint alone: for generation, conversion and evaluation."""
    if ref.released:
        return load_pretrained(ref.path, precision)
    model = build(ref.config, precision)
    load_weights(model, ref)
    return model


def check_same_model(cfg: DeepSeekV3Config, ref: CheckpointRef) -> None:
    """The shapes agree, or LitseekError naming the key and both values."""
    ours, theirs = cfg.to_dict(), ref.config.to_dict()
    for key in ours:
        if key not in FREE and ours[key] != theirs[key]:
            raise LitseekError(
                f"model.{key}={ours[key]} does not fit the checkpoint {ref.path}, which has {theirs[key]}."
            )
    if cfg.num_nextn_predict_layers > ref.config.num_nextn_predict_layers:
        raise LitseekError(
            f"model.num_nextn_predict_layers={cfg.num_nextn_predict_layers}, but the checkpoint {ref.path} has only "
            f"{ref.config.num_nextn_predict_layers} MTP depths."
        )


@torch.no_grad()
def _fill(cfg: DeepSeekV3Config, parameters: Mapping[str, Piece], ref: CheckpointRef) -> None:
    stored, prefix = Stored(ref.path), "state_dict/"
    names = {name.removeprefix(prefix) for name in stored.names() if name.startswith(prefix)}
    for name, piece in parameters.items():
        if name not in names:
            raise LitseekError(f"{ref.path}: the checkpoint has no '{name}', which the model needs.")
        found = stored.shape(prefix + name)
        if found != tuple(piece.shape):
            raise LitseekError(f"{ref.path}: '{name}' has shape {found}, the model wants {tuple(piece.shape)}.")
    # MTP depths that the configuration leaves out are the only weights a model may ignore
    extra = {n for n in names - set(parameters) - set(parameter_shapes(cfg)) if not n.startswith("mtp.")}
    if extra:
        raise LitseekError(f"{ref.path}: the checkpoint has '{min(extra)}', which the model has no place for.")
    for name, piece in parameters.items():  # one at a time: weights are not held twice
        piece.tensor.copy_(stored.read({prefix + name: piece.rows})[prefix + name])


def _own(folder: Path) -> CheckpointRef:
    for name in (storage.CONFIG, storage.STATE):
        if not (folder / name).is_file():
            raise LitseekError(f"{folder / name}: missing from the checkpoint.")
    try:
        config = DeepSeekV3Config(**json.loads((folder / storage.CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise LitseekError(f"{folder / storage.CONFIG}: not a model configuration ({error}).") from error
    stage = folder.parent.parent.name if folder.parent.name == "checkpoints" else None
    return CheckpointRef(folder, False, config, stage)
