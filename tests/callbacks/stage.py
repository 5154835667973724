"""A stage as small as the callbacks' contract allows, and a trainer for it."""

from __future__ import annotations

from types import SimpleNamespace

import lightning.pytorch as pl
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1)
        self.register_buffer("e_score_correction_bias", torch.zeros(2))
        self.cfg = SimpleNamespace(flops_per_token=lambda seq_len: 1000.0 * seq_len)


class TinyStage(pl.LightningModule):
    """One step trains on 100 tokens; steps in ``bad`` (from 1) are not finite and change nothing."""

    name = "tiny"

    def __init__(self, bad=(), loads=True):
        super().__init__()
        self.model, self.bad, self.with_loads = Model(), set(bad), loads
        self.data = SimpleNamespace(seq_len=8)
        self.tokens_seen, self.step_result = 0, None

    def training_step(self, batch, batch_idx):
        step = self.trainer.global_step + 1
        loss = self.model.linear(batch).square().mean()
        finite = step not in self.bad
        loads = {"layers.1.attend": torch.tensor([step, 100 - step]), "mtp.0.attend": torch.tensor([50, 50])}
        self.step_result = SimpleNamespace(
            loss=loss.detach() if finite else torch.tensor(float("nan")),
            metrics={}, loads=loads if self.with_loads else {}, finite=finite, grad_norm=torch.tensor(1.0),
        )  # fmt: skip
        self.log("loss", self.step_result.loss)
        return loss

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        if self.step_result.finite:
            self.model.e_score_correction_bias += 1
        self.tokens_seen += 100

    def validation_step(self, batch, batch_idx):
        self.log("val/weight", self.model.linear.weight.sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(64, 4), batch_size=1)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2, 4), batch_size=1)


def trainer(folder, callbacks, steps, **settings):
    settings = {"logger": False, "enable_progress_bar": False, "limit_val_batches": 0} | settings
    return pl.Trainer(
        max_steps=steps, callbacks=callbacks, default_root_dir=folder, accelerator="cpu", log_every_n_steps=1,
        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip
