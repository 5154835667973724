"""Supervised fine-tuning (report §5.1): loss on answers, packed samples that do not see one another."""

from __future__ import annotations

from litseek.stages.accuracy import judge
from litseek.stages.base import StageModule


class Sft(StageModule):
    """The data's labels hold answers only, and its document ids isolate the samples of a row, MTP's included.

    ``accuracy`` also judges the model as it came from its parent: ``eval/accuracy_before``.
    """

    name = "sft"

    def on_train_start(self) -> None:
        if self.step == 0 and self.accuracy is not None:
            before = judge(self, self.accuracy)["eval/accuracy"]
            self.results["eval/accuracy_before"] = before
            self.report({"eval/accuracy": before})
