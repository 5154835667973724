"""What all stages share: one global batch a step, counters, validation, checkpoints. Layouts belong to the strategy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from litseek.callbacks.progress import Progress
from litseek.data.batch import IGNORE, MicroBatch
from litseek.data.sources import gzip_bits_per_byte, xz_bits_per_byte
from litseek.errors import LitseekError
from litseek.inference.engine import Engine
from litseek.losses import linear_cross_entropy, mtp_loss
from litseek.models.config import DeepSeekV3Config
from litseek.models.transformer import Transformer, build
from litseek.optim import BatchRamp, set_lr, update_biases_
from litseek.parallel import preempt
from litseek.parallel.checkpoint import CheckpointRef, check_same_model, fill, load_weights
from litseek.parallel.executor import Executor, State, StepResult
from litseek.parallel.pieces import Piece
from litseek.parallel.strategy import LitseekStrategy
from litseek.precision import compute_copy
from litseek.stages.accuracy import judge
from litseek.stages.loader import Batch, TrainingBatches, ValidationBatches, micro_batches
from litseek.stages.scores import Scores, labels_in

Schedule = float | Callable[[int], float]
"""A number, or a function of the tokens trained so far."""


class StageModule(pl.LightningModule):
    """A stage of the lineage. ``training_step`` is one global batch and one optimizer step.

    ``batch`` is the global batch in sequences, or a ramp of it; ``micro_batch`` the sequences that one rank computes at
    once. ``mtp_weight`` is lambda, ``balance_speed`` gamma: numbers or schedules over tokens (report §4.2).
    ``checkpoint_every`` steps a checkpoint is written (0: only the last), and ``checkpoint_keep`` of them are kept.
    ``accuracy`` (a ``litseek.rl.evaluate.Accuracy``) judges held-out problems when training ends.
    Errors: ValueError at construction naming both keys that contradict each other.
    """

    name = "stage"
    owns_rope = False
    """Whether this stage's own configuration sets the rotary settings; otherwise they come with the parent's weights."""

    def __init__(
        self,
        model: DeepSeekV3Config,
        precision: Any,
        optim: Any,
        data: Any,
        *,
        batch: int | BatchRamp,
        micro_batch: int = 1,
        seed: int = 0,
        name: str | None = None,
        mtp_weight: Schedule = 0.3,
        balance_speed: Schedule = 0.001,
        recompute: bool = False,
        compile: bool = False,
        checkpoint_every: int = 0,
        checkpoint_keep: int = 2,
        accuracy: Any = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.cfg, self.precision, self.optim, self.data = model, precision, optim, data
        self.batch, self.micro_batch, self.seed = batch, micro_batch, seed
        self.name = name or type(self).name
        self.mtp_weight, self.balance_speed, self.recompute = mtp_weight, balance_speed, recompute
        self.compiled = compile
        self.checkpoint_every, self.checkpoint_keep = checkpoint_every, checkpoint_keep
        self.accuracy = accuracy
        self.cache_dir = Path(cache_dir or os.environ.get("LITSEEK_CACHE", "~/.cache/litseek")).expanduser()
        self.model: Transformer = None  # type: ignore[assignment]  # until configure_model
        self.attached: Any = None
        """The strategy that runs this stage; it sets itself."""
        self.parent: CheckpointRef | None = None
        self.step = 0
        """Finished steps, skipped ones included."""
        self.consumed = 0
        """Samples trained on: with the seed, the position in the data."""
        self.tokens_seen = 0
        self.step_result: StepResult | None = None
        self.results: dict[str, float] = {}
        """What the receipt states, filled when training ends."""
        self._compressed: dict[str, float] = {}
        self._prepared = False
        self._scores = Scores()
        self._held_out_tokens = 0
        self.check()

    # -- what a stage defines -----------------------------------------------------------------------------------

    def inputs(self, batch: Batch) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch."""
        return [micro.to(self.device) for micro in micro_batches(batch["rows"], self.micro_batch)]

    def head_loss(self, hidden: State, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a micro-batch from the head's inputs (report §2.2), and metrics that are averaged like it."""
        weight = self.model.lm_head.weight
        form: Any = {"compute_dtype": self.precision.compute_dtype, "weight_copy_VD": compute_copy(weight)}
        total = linear_cross_entropy(hidden["hidden"], weight, micro.labels, "sum", **form)
        main = total / max(micro.targets, 1.0)
        depths = [hidden[f"mtp.{k}"] for k in range(self.cfg.num_nextn_predict_layers)]
        if not depths:
            return main, {"loss/main": main.detach()}
        mtp, _ = mtp_loss(depths, weight, micro.labels, micro.targets, micro.documents, **form)
        loss = main + at(self.mtp_weight, self.tokens_seen) * mtp
        return loss, {"loss/main": main.detach(), "loss/mtp": mtp.detach()}

    def check(self) -> None:
        """Settings that contradict each other."""
        if not isinstance(self.batch, (int, BatchRamp)):
            raise ValueError(f"stage.batch={self.batch} must be a number of sequences or a BatchRamp.")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be an integer from 0 to {2**32 - 1}.")
        sizes = [self.batch] if isinstance(self.batch, int) else [self.batch.start, self.batch.end]
        if self.micro_batch < 1 or min(sizes) < 1:
            raise ValueError(f"stage.batch={min(sizes)} and stage.micro_batch={self.micro_batch} must be at least 1.")
        for size in sizes:  # with the ranks, which are not known yet, `setup` looks again
            if size % self.micro_batch:
                raise ValueError(f"stage.batch={size} is not a multiple of stage.micro_batch={self.micro_batch}.")
        if self.owns_rope:
            self.check_length()

    def check_length(self) -> None:
        """Rows fit into the positions that the model can tell apart."""
        cfg, length = self.cfg, getattr(self.data, "seq_len", 0)
        if length > cfg.max_position_embeddings:
            raise ValueError(
                f"data.seq_len={length} exceeds model.max_position_embeddings={cfg.max_position_embeddings}; a longer "
                "range needs model.rope_scaling (YaRN) as well."
            )
        if cfg.rope_scaling is not None:
            factor, original = cfg.rope_scaling["factor"], cfg.rope_scaling["original_max_position_embeddings"]
            if length > factor * original:
                raise ValueError(
                    f"data.seq_len={length} exceeds what model.rope_scaling reaches: factor={factor} times "
                    f"original_max_position_embeddings={original} is {int(factor * original)}."
                )

    # -- model and data -----------------------------------------------------------------------------------------

    def start_from(self, ref: CheckpointRef) -> None:
        """Take over the parent's tokenizer, its rotary settings unless this stage sets its own, and its weights as soon
        as there is a model."""
        if not self.owns_rope and self.model is None:
            own, theirs = self.cfg.rope_scaling, ref.config.rope_scaling
            if own is not None and own != theirs:
                raise ValueError(f"model.rope_scaling={dict(own)} differs from {theirs} of the checkpoint {ref.path}.")
            reach = ref.config.max_position_embeddings
            self.cfg = self.cfg.replace(rope_scaling=theirs, max_position_embeddings=reach)
        self.parent = ref
        if ref.tokenizer is not None and hasattr(self.data, "use_tokenizer"):
            self.data.use_tokenizer(ref.tokenizer)
            self._prepared = False
        check_same_model(self.cfg, ref)
        if self.model is not None:
            load_weights(self.model, ref)

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.check_length()
        with self._home():
            self.model = build(self.cfg, self.precision, self.recompute, self.seed)
        if self.compiled:
            self.model.compile_phases()
        if self.parent is not None and self.model.norm.weight.device.type != "meta":
            load_weights(self.model, self.parent)

    def _home(self) -> Any:
        """Where a model is made: nowhere if each rank shall hold a part of it, which the strategy then fills."""
        if self.attached is None:
            return nullcontext()
        return torch.device("meta") if self.attached.spread else self.attached.root_device

    def fill(self, parts: Mapping[str, Piece], group: Any) -> bool:
        """The parent's weights into what this rank holds of the model; False where there is no parent."""
        if self.parent is not None:
            fill(self.cfg, parts, self.parent, group)
        return self.parent is not None

    def prepare_data(self) -> None:
        if self._prepared:  # the command prepares before the folder is touched, Lightning asks again
            return
        self.data.set_seed(self.seed)
        self.data.prepare(self.cache_dir)
        self.data.tokenizer.check_fits(self.cfg.vocab_size)
        self._prepared = True

    def setup(self, stage: str) -> None:
        if not self._prepared:  # Lightning prepares on one process of a node; the others find its files
            self.prepare_data()
        pl.seed_everything(self.seed, verbose=False)
        unit = self.strategy.dp * self.micro_batch
        sizes = [self.batch] if isinstance(self.batch, int) else [self.batch.start, self.batch.multiple]
        for size in sizes:
            if size % unit:
                raise ValueError(
                    f"stage.batch={size} is not a multiple of stage.micro_batch={self.micro_batch} times "
                    f"{self.strategy.dp} data-parallel ranks."
                )
            self.check_micros(size // unit)

    def check_micros(self, micros: int) -> None:
        """Errors: ValueError where the strategy's schedule cannot run so many micro-batches."""
        self.strategy.check_micros(micros)

    def phases(self) -> list[Any]:
        return self.model.phases()

    @property
    def strategy(self) -> LitseekStrategy:
        if not isinstance(self.attached, LitseekStrategy):
            raise ValueError(
                f"strategy={type(self.trainer.strategy).__name__} cannot run a stage; use strategy=single or strategy=dp."
            )
        return self.attached

    def batch_size(self, consumed: int) -> int:
        """Sequences of the global batch that starts after ``consumed`` samples."""
        if isinstance(self.batch, int):
            return self.batch
        return self.batch.sequences(consumed * self.data.seq_len)

    def train_dataloader(self) -> Iterable[Batch]:
        rank, ranks = self.strategy.dp_rank, self.strategy.dp
        return TrainingBatches(self.data, lambda: self.consumed, self.batch_size, rank, ranks)

    def val_dataloader(self) -> Iterable[Batch]:
        return ValidationBatches(self.data.validation(), self.micro_batch, self.strategy.dp_rank, self.strategy.dp)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch  # micro-batches move one by one, in `inputs`

    # -- the step -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optim.build(self.strategy.named_parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.learning_rate = self.optim.schedule.lr(self.step, self.tokens_seen)
        set_lr(self.trainer.optimizers[0], self.learning_rate)
        result = self.strategy.forward_backward(self.inputs(batch), self.head_loss)
        self.step_result = result
        self._next = (batch["first"] + batch["count"], self.tokens_seen + result.tokens)
        # what is for a progress bar Lightning reads every step; ours reads the loss itself, when it has arrived
        read = not isinstance(self.trainer.progress_bar_callback, (Progress, type(None)))
        self.log("loss", result.loss, prog_bar=read)
        assert result.grad_norm is not None
        self.log_dict({**result.metrics, "grad_norm": result.grad_norm, "lr": self.learning_rate})
        self.log("tokens", float(self._next[1]))
        return result.loss

    def log(self, name: str, value: Any, *args: Any, **keys: Any) -> None:
        """Lightning's, but numbers become tensors of the CPU: it would copy them to the GPU and wait for that."""
        if isinstance(value, (int, float)) and not keys.get("sync_dist"):
            value = torch.tensor(value, dtype=torch.get_default_dtype())
        super().log(name, value, *args, **keys)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Nothing: Lightning calls it after training_step, when the executor has filled the gradients already."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """By the global norm that the strategy found; ``trainer.gradient_clip_val`` precedes ``optim.clip``."""
        if gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        limit = gradient_clip_val if gradient_clip_val is not None else self.optim.clip
        if limit:
            self.strategy.clip_gradients(limit)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        assert self.step_result is not None
        self.update_biases(self.step_result)
        self.step += 1
        self.consumed, self.tokens_seen = self._next

    def update_biases(self, result: StepResult) -> None:
        """Balance biases by the step's loads (report §2.1.2), unless the step is skipped."""
        speed = at(self.balance_speed, self.tokens_seen)
        routers = {name: router for name, router in self.model.balance_routers().items() if name in result.loads}
        if speed:
            biases = [router.e_score_correction_bias for router in routers.values()]
            update_biases_(biases, [result.loads[name] for name in routers], speed, result.finite)

    # -- validation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._scores = Scores()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.score(batch, self._scores)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.measured(self._scores))

    def score(self, batch: Batch, scores: Scores, executor: Executor | None = None) -> None:
        """Add the main head's token losses of held-out rows."""
        self.model.attach()
        weight, dtype = self.model.lm_head.weight, self.precision.compute_dtype

        def head(state: State, micro: MicroBatch) -> Tensor:
            return linear_cross_entropy(state["hidden"], weight, micro.labels, "none", compute_dtype=dtype)

        micros = self.inputs(batch)
        found = (executor or self.strategy.executor).forward(micros, head, until="norm")
        for micro, nats in zip(micros, found, strict=True):
            if nats is None:  # scored by the rank that has the head
                scores.add(torch.zeros(micro.labels.shape), torch.full_like(micro.labels, IGNORE))
            else:
                scores.add(nats, micro.labels)

    def evaluate(self, executor: Executor | None = None) -> Scores:
        """The whole held-out split, outside Lightning's validation loop; another executor scores another model."""
        scores = Scores()
        self.model.eval()
        for batch in self.val_dataloader():
            self.score(batch, scores, executor)
        self.model.train()
        scores.reduce(self.strategy.sum, self.device)
        return scores

    @contextmanager
    def generating(self) -> Iterator[Engine]:
        """An engine with the present weights. All ranks must ask for it and `generate` equally often, each its share."""
        self.model.attach()  # or FP8 would quantise every weight for every token, and compiled phases see old ones
        self.model.eval()
        yield self.strategy.team.engine(self.model)
        self.model.train()

    def measured(self, scores: Scores, reduced: bool = False) -> dict[str, float]:
        """val/loss, and against the bytes of the text where the data knows them."""
        if not reduced:
            scores.reduce(self.strategy.sum, self.device)
        metrics = {"val/loss": scores.loss}
        num_bytes = getattr(self.data, "validation_bytes", None)
        if num_bytes:
            self._held_out_tokens = self._held_out_tokens or labels_in(self.data.validation())
            metrics["val/bits_per_byte"] = scores.bits_per_byte(num_bytes, self._held_out_tokens)
            metrics |= self._compressors()
            metrics["val/bytes"] = float(num_bytes)
        return metrics

    def _compressors(self) -> dict[str, float]:
        """What gzip -9 and xz -9e need for the same bytes."""
        if not self._compressed:
            text = self.data.validation_text
            self._compressed["val/gzip_bits_per_byte"] = gzip_bits_per_byte(text)
            self._compressed["val/xz_bits_per_byte"] = xz_bits_per_byte(text)
        return self._compressed

    # -- checkpoints --------------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return Path(self.trainer.default_root_dir) / "checkpoints"

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if self.step == self.trainer.max_steps:  # the one at the end is written by on_train_end, with the results in it
            return
        if self.strategy.stopping or (self.checkpoint_every and self.step % self.checkpoint_every == 0):
            self.save()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.strategy.stopping:  # saved above; here the step's metrics are written too
            self.strategy.finish_checkpoint()
            raise preempt.stopped(f"step {self.step}")

    def on_train_end(self) -> None:
        self.results |= self.final_metrics()
        self.report(self.results)
        self.save()
        self.strategy.finish_checkpoint()

    def final_metrics(self) -> dict[str, float]:
        """What the receipt states of the trained model."""
        metrics = self.measured(self.evaluate(), reduced=True)
        return metrics if self.accuracy is None else metrics | judge(self, self.accuracy)

    def report(self, metrics: dict[str, float]) -> None:
        """Metrics that arise outside Lightning's loops, to every logger."""
        if self.strategy.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, step=self.step)

    def save(self) -> None:
        self.trainer.save_checkpoint(self.checkpoints / f"step-{self.step:08d}", weights_only=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        counters = {key: getattr(self, key) for key in ("step", "consumed", "tokens_seen", "seed", "results")}
        checkpoint["stage"] = {"name": self.name, "seq_len": self.data.seq_len, **counters}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["stage"]
        if saved["name"] != self.name:
            raise LitseekError(
                f"The checkpoint is of stage {saved['name']}, not of {self.name}; start from it with init_from."
            )
        for key in ("step", "consumed", "tokens_seen", "results"):
            setattr(self, key, saved[key])

    def checkpoint_files(self) -> dict[str, Any]:
        """What lies beside the tensors, so that model and tokenizer can be rebuilt from the checkpoint alone; and how many
        checkpoints are kept once this one is written."""
        tokenizer = self.data.tokenizer.raw.to_str()
        return {"config": self.cfg.to_dict(), "tokenizer": tokenizer, "keep": self.checkpoint_keep}


def at(schedule: Schedule, tokens: int) -> float:
    """The schedule's value for the step that starts after ``tokens``."""
    return schedule(tokens) if callable(schedule) else schedule
