"""Context extension with YaRN (report §4.3): 32K and 128K are two configurations of one class."""

from __future__ import annotations

import json
from typing import Any

import torch

from litseek.models.transformer import build
from litseek.parallel.checkpoint import CheckpointRef
from litseek.parallel.storage import replace_text
from litseek.stages.accuracy import judge
from litseek.stages.base import StageModule
from litseek.stages.scores import Scores

OLD, UNTRAINED, TRAINED = "old frequencies", "yarn untrained", "yarn trained"


class Context(StageModule):
    """Pre-training's loss at a longer ``data.seq_len``, under the rotary settings of this stage's own model config.

    Before the first step the parent is scored at the new length with its old frequencies and with the new ones, so that
    what the change of frequencies gives is told apart from what training gives. ``loss_by_position.json`` has all three.
    """

    name = "context"
    owns_rope = True
    by_position: dict[str, Any]

    def start_from(self, ref: CheckpointRef) -> None:
        theirs, own = ref.config, self.cfg.rope_scaling
        if own is None:
            if self.data.seq_len > theirs.max_position_embeddings and theirs.rope_scaling is None:
                raise ValueError(
                    f"data.seq_len={self.data.seq_len} is longer than the {theirs.max_position_embeddings} positions of "
                    f"{ref.path}, and model.rope_scaling is null: the stage needs YaRN."
                )
        else:
            scaled = theirs.rope_scaling
            trained = scaled["original_max_position_embeddings"] if scaled else theirs.max_position_embeddings
            if own["original_max_position_embeddings"] != trained:
                raise ValueError(
                    "model.rope_scaling.original_max_position_embeddings="
                    f"{own['original_max_position_embeddings']} is not the length {trained} that {ref.path} began with."
                )
        super().start_from(ref)

    def on_train_start(self) -> None:
        if self.step > 0:
            return
        if self.parent is None:
            raise ValueError(f"stage={self.name} extends a trained model: init_from is missing.")
        self.by_position = {"unit": "nats a token", "old_length": self.parent.seq_len, "arms": {}}
        old = self._scores_with_old_frequencies()
        new = self.evaluate()
        self._keep(OLD, old)
        self._keep(UNTRAINED, new)
        names = {"_before": old, "_untrained": new}
        before = {
            f"{key}{suffix}": value
            for suffix, scores in names.items()
            for key, value in self.measured(scores, reduced=True).items()
            if key in ("val/loss", "val/bits_per_byte")
        }
        self.results |= before
        self.report(before)

    def final_metrics(self) -> dict[str, float]:
        scores = self.evaluate()
        self._keep(TRAINED, scores)
        if self.strategy.is_global_zero:
            path = self.checkpoints.parent / "loss_by_position.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(path, json.dumps(self.by_position))
        metrics = self.measured(scores, reduced=True)
        return metrics if self.accuracy is None else metrics | judge(self, self.accuracy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stage"]["by_position"] = self.by_position

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.by_position = checkpoint["stage"]["by_position"]

    def _scores_with_old_frequencies(self) -> Scores:
        """The same weights under the parent's rotary settings; no second copy of them is made."""
        assert self.parent is not None
        cfg = self.cfg.replace(rope_scaling=self.parent.config.rope_scaling)
        with torch.device("meta"):
            old = build(cfg, self.precision)
        self.strategy.team.partition(old, self.phases(), self.data.seq_len)
        old.load_state_dict(self.model.state_dict(), assign=True)
        return self.evaluate(self.strategy.executor_of(old.phases()))

    def _keep(self, arm: str, scores: Scores) -> None:
        curve = scores.by_position(points=64)
        self.by_position["positions"] = curve["positions"]
        self.by_position["arms"][arm] = curve["loss"]
