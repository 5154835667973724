"""The Lightning strategy that runs a stage's micro-batches through the executor (report §3.2).

Lightning's closure runs training_step, zero_grad and backward in this order. Here the executor has already run
backward inside training_step, so gradients are cleared when a step starts, `optimizer_zero_grad` of the stage does
nothing, and `backward` only calls the hooks. Automatic optimization stays on: clipping, schedulers and callbacks work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import ReduceOp, _init_dist_connection, _sync_ddp_if_available
from lightning.fabric.utilities.rank_zero import rank_zero_only as fabric_rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from litseek_kernels.adamw import MultiNorm, l2_norm_and_finite
from torch import Tensor
from torch.optim import Optimizer

from litseek.data.batch import MicroBatch
from litseek.errors import LitseekError
from litseek.optim import AdamW
from litseek.parallel import preempt, storage
from litseek.parallel.executor import Executor, HeadLoss, StepResult
from litseek.parallel.launch import Launcher

RECOMPUTED = ("attend", "dispatch", "experts", "combine", "all")
BUCKET = 2**24
"""Gradient elements that one all-reduce carries: 64 MB of float32."""


class LitseekStrategy(ParallelStrategy):
    """One process or plain data parallelism; both run the same executor.

    ``chunks`` cuts the model for the executor. ``recompute`` names the phases that run again in backward instead of
    keeping their activations, by their last part: "attend", "experts", or "all".
    """

    is_distributed = True  # without it Lightning injects no sampler into a user's own DataLoader

    def __init__(
        self,
        chunks: int = 1,
        recompute: Sequence[str] = (),
        backend: str | None = None,
        timeout_s: float = 1800,
        **plugins: Any,
    ) -> None:
        super().__init__(**plugins)
        for name in recompute:
            if name not in RECOMPUTED:
                raise ValueError(f"strategy.recompute names '{name}': allowed are {', '.join(RECOMPUTED)}.")
        self.num_chunks, self.recompute = chunks, tuple(recompute)
        self.backend, self.timeout = backend, timedelta(seconds=timeout_s)
        self.num_nodes = 1
        self._executor: Executor | None = None
        self.step_result: StepResult | None = None
        self._scale: Tensor | None = None
        self._norm = MultiNorm()
        self._host_group: dist.ProcessGroup | None = None
        self.stopping = False
        """Whether a rank was asked to stop before the step in progress began: all ranks do after it."""

    # -- processes ----------------------------------------------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def dp(self) -> int:
        """Ranks that share a global batch."""
        return self.world_size

    @property
    def dp_rank(self) -> int:
        return self.global_rank

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def set_world_ranks(self) -> None:
        assert self.cluster_environment is not None and self.parallel_devices is not None
        self.cluster_environment.set_global_rank(self.node_rank * len(self.parallel_devices) + self.local_rank)
        self.cluster_environment.set_world_size(self.num_nodes * len(self.parallel_devices))
        rank_zero_only.rank = fabric_rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None and self.parallel_devices is not None
        processes = len(self.parallel_devices)
        if processes * self.num_nodes > 1:
            self._launcher = Launcher(self.cluster_environment, processes, self.num_nodes)

    def setup_environment(self) -> None:
        if type(self.precision_plugin) is not Precision:
            raise ValueError(
                f"trainer.precision asks for {type(self.precision_plugin).__name__}, but precision is built into the "
                "model: leave trainer.precision out and choose precision=fp32 or precision=bf16."
            )
        super().setup_environment()
        self.set_world_ranks()
        if self.world_size > 1:
            assert self.cluster_environment is not None
            backend = self.backend or ("nccl" if self.root_device.type == "cuda" else "gloo")
            device = None if backend == "gloo" else self.root_device
            _init_dist_connection(self.cluster_environment, backend, timeout=self.timeout, device_id=device)

    def setup(self, trainer: Trainer) -> None:
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} is not supported, only 1: "
                "one step is one global batch; raise stage.batch or lower stage.micro_batch instead."
            )
        super().setup(trainer)
        if self.world_size > 1:
            for tensor in self._module.state_dict().values():
                dist.broadcast(tensor, 0)

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def barrier(self, name: str | None = None) -> None:
        if self.world_size > 1 and dist.is_initialized():
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self.world_size == 1 or not dist.is_initialized():
            return obj
        box = [obj]
        dist.broadcast_object_list(box, src)
        return box[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: ReduceOp | str | None = "mean") -> Any:
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, Tensor) else tensor

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    # -- the step -----------------------------------------------------------------------------------------------

    @property
    def executor(self) -> Executor:
        if self._executor is None:
            assert self.lightning_module is not None
            self._executor = Executor(
                self.lightning_module.phases(),  # type: ignore[operator]  # a stage may leave phases out
                self.num_chunks,
                recompute=recomputed(self.recompute),
            )
        return self._executor

    def forward_backward(self, micros: Sequence[MicroBatch], head_loss: HeadLoss) -> StepResult:
        """Loss and gradients of the global batch, of which ``micros`` are this rank's part; equal on all ranks."""
        counts = [sum(micro.targets for micro in micros), float(sum(micro.num_tokens for micro in micros))]
        targets, tokens, stop = self._sum_on_host([*counts, float(preempt.requested())])
        self.stopping = stop > 0
        if hasattr(self._module, "attach"):
            self._module.attach()
        # gradients and losses are averaged over ranks below, hence the division here
        result = self.executor.forward_backward(micros, head_loss, total_targets=targets / self.dp)
        result.tokens = int(tokens)
        self._reduce(result)
        grads = self._reduce_grads()
        result.grad_norm, finite = l2_norm_and_finite(grads, self._norm)
        result.finite = finite & torch.isfinite(result.loss)
        self.step_result, self._scale = result, None
        return result

    def _sum_on_host(self, values: list[float]) -> list[float]:
        """The sums over all ranks of numbers that the host knows, without a detour through a GPU."""
        if self.world_size == 1:
            return values
        if self._host_group is None and dist.get_backend() == "nccl":
            self._host_group = dist.new_group(backend="gloo")
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._host_group)
        return total.tolist()

    def _reduce(self, result: StepResult) -> None:
        if self.world_size == 1:
            return
        names = sorted(result.metrics)
        scalars = torch.stack([result.loss.double(), *(result.metrics[n].double() for n in names)])
        scalars = (self.sum(scalars) / self.dp).to(result.loss.dtype)
        result.loss = scalars[0]
        result.metrics = dict(zip(names, scalars[1:]))
        for name in sorted(result.loads):
            self.sum(result.loads[name])

    def _reduce_grads(self) -> list[Tensor]:
        """Average every gradient over the ranks; a parameter that got none has a gradient of zeros."""
        grads = []
        for parameter in self._module.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grads.append(parameter.grad)
        if self.world_size > 1:
            for bucket in _buckets(grads):
                flat = torch.cat([grad.flatten() for grad in bucket])
                dist.all_reduce(flat)
                flat /= self.dp
                parts = flat.split([grad.numel() for grad in bucket])
                torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket)])
        return grads

    def clear_gradients(self) -> None:
        for parameter in self._module.parameters():
            parameter.grad = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.clear_gradients()
        return super().training_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Only the hooks: the executor ran backward in training_step."""
        assert self.lightning_module is not None
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Run the closure, clip, then step unless the loss or the gradient is not finite."""
        module = model or self.lightning_module
        assert isinstance(module, LightningModule)
        loss = closure()
        self.precision_plugin._after_closure(module, optimizer)
        self.step(optimizer, **kwargs)
        return loss

    def clip_gradients(self, max_norm: float) -> None:
        """Let the next `step` scale gradients so that the norm found by `forward_backward` is at most ``max_norm``."""
        assert self.step_result is not None and self.step_result.grad_norm is not None
        self._scale = (max_norm / (self.step_result.grad_norm + 1e-6)).clamp(max=1.0)

    def step(self, optimizer: Optimizer, **kwargs: Any) -> None:
        """Clip and step, unless the loss or the gradient is not finite.

        On a GPU our own optimizers do all of this there, in one pass over the gradients, which keep their values;
        others make the host wait for the answer.
        """
        scale, self._scale = self._scale, None
        finite = None if self.step_result is None else self.step_result.finite
        if finite is not None and finite.is_cuda and isinstance(optimizer, AdamW):
            optimizer.step(scale=scale, finite=finite, **kwargs)
            return
        if scale is not None:
            torch._foreach_mul_([p.grad for p in self._module.parameters() if p.grad is not None], scale)
        if finite is None or finite:
            optimizer.step(**kwargs)
            if not isinstance(optimizer, AdamW):  # torch's fused ones write parameters behind autograd's back
                params = [param for group in optimizer.param_groups for param in group["params"]]
                torch.autograd.graph.increment_version(params)

    # -- checkpoints --------------------------------------------------------------------------------------------

    @property
    def _module(self) -> Any:
        """The model of the stage: what is trained and saved under global names."""
        assert self.lightning_module is not None
        return self.lightning_module.model

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._module.state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state under parameter names instead of numbers."""
        names = {parameter: name for name, parameter in self._module.named_parameters()}
        return {
            "state": {names[p]: dict(state) for p, state in optimizer.state.items()},
            "param_groups": [
                group | {"params": [names[p] for p in group["params"]]} for group in optimizer.param_groups
            ],
        }

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Back by name, each tensor in the dtype it was saved in: `Optimizer.load_state_dict` would widen BF16 moments."""
        parameters = dict(self._module.named_parameters())
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"]):
            optimizer.state.clear()
            for name, state in saved["state"].items():
                parameter = parameters[name]
                optimizer.state[parameter] = {
                    key: value.to(parameter.device) if isinstance(value, Tensor) else value
                    for key, value in state.items()
                }
            for group, stored in zip(optimizer.param_groups, saved["param_groups"]):
                group.update({key: value for key, value in stored.items() if key != "params"})

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        state = checkpoint | {"random": self._gathered(storage.random_state())}
        failure: Exception | None = None
        if self.is_global_zero:
            try:
                stage: Any = self.lightning_module
                storage.save(Path(filepath), state, **stage.checkpoint_files())
            except Exception as error:  # told to every rank below, or the others would wait for ever
                failure = error
        message = self.broadcast(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if message is not None:
            raise LitseekError(message)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        state = storage.load(Path(checkpoint_path))
        states = state.pop("random", [])
        if self.global_rank < len(states):
            # set when training starts: building the optimizer and the data loader may still draw
            self._random = states[self.global_rank]
        return state

    def on_train_start(self) -> None:
        state, self._random = self._random, None
        if state is not None:
            storage.set_random_state(state)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        if self.is_global_zero:
            storage.remove(Path(filepath))

    _random: dict[str, Any] | None = None

    def _gathered(self, value: Any) -> list[Any]:
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def recomputed(names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a phase runs again in backward, by its name: "layers.3.attend" is named by "attend" and by "all"."""
    return lambda name: "all" in names or name.rpartition(".")[2] in names


def _buckets(grads: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    room = 0
    for grad in grads:
        if grad.numel() > room or buckets[-1][0].dtype != grad.dtype:
            buckets.append([])
            room = BUCKET
        buckets[-1].append(grad)
        room -= grad.numel()
    return buckets
